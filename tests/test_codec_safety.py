"""What a file may cost, what it may tell, and what the codec does to the model of its caller."""

import json
import shutil
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails, runs
from PIL import Image
from processes import run_python
from shipped import ROOT
from variants import make, rgb_model, shaken, smooth_image

import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress, roundtrip, unpack
from hf_ae.codec.container import File, pack
from hf_ae.loading import load_autoencoder, load_model, load_pipeline, pick_device


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(2**21, 1), (1, 2**21)])
def test_a_picture_of_one_row_counts_as_what_the_model_makes_of_it(size):
    """2 million pixels in one row are 64 rows of the hyperprior's positions: beyond the limit, in either direction."""
    model = shaken(amount=0.02)
    width, height = size
    honest = unpack(compress(model, smooth_image(), model_id=""))
    forged = pack(File(honest.method, honest.mode, width, height, honest.fingerprint, "", honest.body))
    started = time.perf_counter()
    with pytest.raises(CorruptFileError, match=r"of which this model makes [\d,]+, is too large"):
        decompress(forged, model, max_pixels=2**23)
    with pytest.raises(ValueError, match="is too large"):
        compress(model, Image.new("L", (2**23, 1)))
    assert time.perf_counter() - started < 5


def test_a_limit_holds_for_padded_pixels_of_plain_latents_too():
    model = make("vae-resnet").eval()
    data = compress(model, smooth_image(33, 1, "RGB"), model_id="")
    with pytest.raises(CorruptFileError, match="is too large"):
        decompress(data, model, max_pixels=33)
    assert decompress(data, model, max_pixels=40 * 8).size == (33, 1)


def test_no_file_holds_a_path_of_this_machine(tmp_path, monkeypatch):
    folder, image = save(rgb_model(), tmp_path / "model"), smooth_image(mode="RGB")
    data = compress(load_autoencoder(folder), image)
    assert unpack(data).model_id == "" and str(tmp_path).encode() not in data
    with pytest.raises(ValueError, match="pass the model"):
        decompress(data)
    for private in (str(folder), "~/model", "C:\\Users\\me\\model", "../me/model", "file:///me/model"):
        with pytest.raises(ValueError, match="a path of this machine"):
            compress(load_autoencoder(folder), image, model_id=private)
    monkeypatch.chdir(tmp_path)
    assert unpack(compress(load_autoencoder("model"), image)).model_id == "model"
    assert unpack(compress(load_autoencoder(folder), image, model_id="me/model")).model_id == "me/model"


def test_the_command_line_names_a_model_only_as_others_may_see_it(tmp_path, monkeypatch, capsys):
    folder, image, file = save(rgb_model(), tmp_path / "model"), tmp_path / "in.png", tmp_path / "out.hfae"
    smooth_image(mode="RGB").save(image)
    runs("compress", image, "-o", file, "--model", folder)
    assert unpack(file.read_bytes()).model_id == "" and "decompress it with --model" in capsys.readouterr().out
    fails(capsys, ["decompress", file, "-o", tmp_path / "back.png"], "names no model", "--model")
    runs("decompress", file, "-o", tmp_path / "back.png", "--model", folder)
    monkeypatch.chdir(tmp_path)
    runs("compress", image, "-o", file, "--model", "model")
    assert unpack(file.read_bytes()).model_id == "model"


def pickled(folder: Path, name: str, path: Path) -> Path:
    """A copy of a folder with its weights as a pickle that leaves the file `path` when it is read."""

    class Hostile:
        def __reduce__(self):
            return open, (str(path), "w")

    copy = folder.with_name(f"{folder.name}-pickled")
    shutil.copytree(folder, copy)
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    torch.save({"x": Hostile()}, copy / name)
    return copy


@pytest.mark.parametrize("load", [load_model, load_autoencoder])
def test_pickled_weights_are_refused_by_every_loader(load, tmp_path):
    folder = pickled(save(rgb_model(), tmp_path / "model"), "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(ValueError, match=r"model .* cannot be loaded: .*model\.safetensors"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_model_that_a_file_names_are_refused(tmp_path, monkeypatch):
    image, folder = smooth_image(mode="RGB"), save(rgb_model(), tmp_path / "model")
    data = compress(load_autoencoder(folder), image, model_id="model-pickled")
    pickled(folder, "pytorch_model.bin", tmp_path / "ran")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        decompress(data)
    assert not (tmp_path / "ran").exists()


REMOTE = """
import io, json, sys
from pathlib import Path
from PIL import Image
from transformers import AutoModel
folder, image = Path(sys.argv[1]), Image.open(sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
from hf_ae.codec import compress, decompress
from hf_ae.errors import UserError
try:
    data = compress(model, image, model_id="")
    Path(sys.argv[3]).write_bytes(data)
    print(json.dumps(decompress(data, model).size))
except UserError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("name", ["compressive", "vqvae-ema"])
def test_a_model_that_runs_the_code_of_its_repository_gives_the_same_file(name, tmp_path):
    from hf_ae.hub.remote_code import write_model_code

    model = make(name).eval()
    folder = save(model, tmp_path / "model")
    write_model_code(folder)
    (height, width), mode = model.config.image_hw, "L" if model.config.num_channels == 1 else "RGB"
    smooth_image(width, height, mode).save(tmp_path / "in.png")
    printed = run_python(REMOTE, folder, tmp_path / "in.png", tmp_path / "out.hfae").splitlines()[-1]
    assert json.loads(printed) == [width, height]
    expected = compress(load_autoencoder(folder), tmp_path / "in.png", model_id="")
    assert (tmp_path / "out.hfae").read_bytes() == expected


def test_a_model_whose_repository_holds_code_that_knows_no_codec_is_one_clear_line():
    """As that of version 0.1: `model_type` says that it is ours, and nothing says how its latents are written."""

    class Old(torch.nn.Module):
        config = make("compressive").config
        device, dtype = torch.device("cpu"), torch.float32

    with pytest.raises(ValueError, match=r"hf_ae_compressive model runs the code of its repository.*load_autoencoder"):
        compress(Old(), smooth_image())


def test_every_module_is_left_in_the_mode_and_the_memory_format_it_was_in():
    model = shaken(amount=0.02).train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    decompress(compress(model, smooth_image()), model)
    assert {name: module.training for name, module in model.named_modules()} == modes and len(set(modes.values())) == 2
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides


def test_threads_that_share_a_model_in_training_mode_all_get_the_file_that_one_gets():
    model = shaken(amount=0.02)
    images = [smooth_image(seed=s) for s in range(6)]
    expected = [compress(model, image, model_id="") for image in images]
    model.train()
    found: dict[int, bytes] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = compress(model, images[index], model_id="")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(index) for index in range(len(images))] == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["I;16", "I", "F"])
def test_a_round_trip_of_16_and_32_bits_and_floats_is_that_of_the_same_picture_in_8_bits(kind):
    model, image = shaken(amount=0.02), smooth_image()
    eight = np.asarray(image)
    arrays = {
        "I;16": eight.astype(np.uint16) * 257,
        "I": eight.astype(np.int32) * 257,
        "F": eight.astype(np.float32) / 255,
    }
    deep = Image.fromarray(arrays[kind])
    assert deep.mode == kind and roundtrip(model, deep) == roundtrip(model, image)


def test_one_rule_for_devices(tmp_path):
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == expected and pick_device(float64=True).type != "mps"
    for name, words in (("tpu", "not known"), ("mps", "mps has not")):
        with pytest.raises(ValueError, match=words):
            pick_device(name, float64=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no cuda on this machine"):
            pick_device("cuda:0")


def test_loading_leaves_progress_bars_as_they_were(tmp_path):
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        load_model(save(rgb_model(), tmp_path / "model"))
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_pipeline(tmp_path)
        assert logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def test_a_damaged_checksum_is_found_before_a_model_is_looked_for():
    data = pack(File("latents", "L", 3, 5, b"abc", "me/none", b"body"))
    with pytest.raises(CorruptFileError, match="checksum"):
        decompress(data[:-4] + (zlib.crc32(data) ^ 1).to_bytes(4, "little"))


@pytest.mark.parametrize("quality", ["x", float("nan"), -1, 2, True])
def test_a_quality_that_is_none_is_one_line(quality):
    with pytest.raises(ValueError, match="must lie between 0"):
        compress(shaken(amount=0.02), smooth_image(), quality=quality)


def test_mistaken_places_are_named(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    smooth_image().save(photo)
    model, pipe = ROOT / "model_cards" / "emoji-compressive", ROOT / "model_cards" / "emoji-text-to-image"
    fails(capsys, ["compress", photo, "--model", model, "-o", tmp_path / "x.png"], "no .png image", "x.hfae")
    fails(capsys, ["compress", photo, "--model", pipe, "-o", tmp_path / "x.hfae"], "is a pipeline, and a model")
    fails(capsys, ["generate", "cat", "--model", model, "-o", tmp_path / "x.png"], "is a model, and a pipeline")
    fails(
        capsys, ["compress", photo, "--model", "model_cards/emoji", "-o", tmp_path / "x.hfae"], "no such folder here"
    )
    fails(capsys, ["roundtrip", tmp_path, "--model", model, "-o", tmp_path / "x.png"], "is a folder: give an image")
    fails(capsys, ["evaluate", model, "--dataset_name", photo], "is a file")
    fails(capsys, ["evaluate", photo, "--dataset_name", tmp_path], "is a file: write the folder")
    file = tmp_path / "x.hfae"
    file.write_bytes(compress(load_autoencoder(model), photo, model_id="cards/emoji"))
    fails(capsys, ["decompress", file, "-o", tmp_path / "y.png"], "names it so: write --model")
    fails(capsys, ["demo", "-o", photo], "is a file")
    fails(capsys, ["push", model, "--repo", "a/b/c", "--dry-run"], "no repository 'a/b/c'")
    fails(capsys, ["push", model, "--repo", "b", "--dry-run"], "has no owner")
    fails(capsys, ["compare", model, "--dataset_name", tmp_path, "--sampler", "foo"], "sampler='foo'")
