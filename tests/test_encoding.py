"""A dataset of images becomes a dataset of latents: exactly those of the model, whole after a kill, by any number of
tasks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import hub_clients
import numpy as np
import pytest
import torch
from command_line import fails, runs
from hub_clients import run_client
from hub_server import OWNER, HubServer
from PIL import Image
from variants import VARIANTS, make

import hf_ae
from hf_ae.latents import encoding

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests" / "data" / "fashion_mnist_sample"
KINDS = ("autoencoder-mlp", "autoencoder-nearest", "vae-mlp", "vqvae-ema", "vqvae2", "beta-vae-factor", "compressive")


@pytest.fixture(scope="module")
def rows():
    return datasets.load_dataset(str(SAMPLE), split="test").select(range(40))


def images_for(model, count=7):
    config, rng = model.config, np.random.default_rng(0)
    shape = (count, *config.image_hw, config.num_channels)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(p.squeeze()) for p in pixels]


def as_dataset(images, **columns):
    kinds = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    return datasets.Dataset.from_dict({"image": images, **columns}, datasets.Features(kinds))


@pytest.mark.parametrize("name", KINDS)
def test_latents_are_those_of_the_model(name):
    assert name in VARIANTS
    model = make(name).train()
    images = images_for(model)
    codes = hf_ae.encode_dataset(model, as_dataset(images))
    assert model.training  # as it was
    processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
    with torch.no_grad():
        wanted = model.eval().encode(processor(images, return_tensors="pt").pixel_values)
    found = codes.with_format("torch")
    torch.testing.assert_close(found["latents"][:], wanted.latents.float(), atol=1e-5, rtol=1e-4)
    if model.has_discrete_codes:
        levels = model.levels_of(wanted.indices)
        names = ["indices"] if len(levels) == 1 else [f"indices_{i + 1}" for i in range(len(levels))]
        assert codes.column_names == ["latents", *names]
        for column, level in zip(names, levels):
            assert torch.equal(found[column][:].long(), level.long())
    model.decode(found["latents"][:2])


def test_columns_stay_beside_their_latents_and_broken_rows_go(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MOST_ROWS", 3)
    model = make("autoencoder-mlp")
    images = images_for(model)
    rows = as_dataset(images, name=[f"image {i}" for i in range(7)])
    broken = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    broken[4]["image"] = {"bytes": b"no image", "path": None}
    bad = datasets.Dataset.from_list(broken, features=rows.features)
    whole = hf_ae.encode_dataset(model, rows, ["name"])
    with pytest.raises(ValueError, match=r"Row 4 .* --skip_broken_images"):
        hf_ae.encode_dataset(model, bad, ["name"])
    without = hf_ae.encode_dataset(model, bad, ["name"], output_dir=tmp_path, skip_broken_images=True)
    assert without["name"] == [f"image {i}" for i in (0, 1, 2, 3, 5, 6)]
    np.testing.assert_allclose(without["latents"], np.delete(whole["latents"], 4, 0), atol=1e-6)


@pytest.mark.parametrize(
    "order",
    [[(0, 1)], [(1, 2), (0, 2)], [(2, 3), (0, 3), (1, 3)], [(8, 9), (7, 9), *((i, 9) for i in range(7))]],
    ids=len,
)
def test_any_number_of_tasks_writes_the_same_rows(order, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MOST_ROWS", 6)
    model = make("vae-mlp")
    wanted = hf_ae.encode_dataset(model, rows, ["label"])
    for task, tasks in order:
        assert not encoding.is_complete(tmp_path)
        last = hf_ae.encode_dataset(model, rows, ["label"], output_dir=tmp_path, task=task, num_tasks=tasks)
    assert encoding.is_complete(tmp_path)
    found = datasets.load_dataset(str(tmp_path), cache_dir=tmp_path / "cache")
    assert list(found) == ["train"] and found["train"].features == wanted.features
    for result in (found["train"], last):
        assert result.to_dict() == wanted.to_dict()
    assert len(list((tmp_path / "data").iterdir())) == 7


def test_the_shards_that_are_there_are_kept(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MOST_ROWS", 6)
    model = make("vae-mlp")
    hf_ae.encode_dataset(model, rows, output_dir=tmp_path)
    files = sorted((tmp_path / "data").iterdir())
    written = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()
    again = hf_ae.encode_dataset(model, rows, output_dir=tmp_path)
    assert [file for file in files if file.stat().st_mtime_ns != written[file]] == [files[3]]
    assert again["latents"] == hf_ae.encode_dataset(model, rows)["latents"]


def test_a_folder_holds_the_latents_of_one_model_and_one_dataset(rows, tmp_path):
    model = make("vae-mlp")
    hf_ae.encode_dataset(model, rows, output_dir=tmp_path)
    with torch.no_grad():
        model.encoder.to_code.bias += 1e-3
    for other in ((model, rows), (make("vae-mlp"), rows.select(range(39))), (make("vae-mlp"), rows, ["label"])):
        with pytest.raises(ValueError, match="latents of another model, of other rows or with other columns"):
            hf_ae.encode_dataset(*other, output_dir=tmp_path)
    foreign = tmp_path / "foreign"
    (foreign / "data").mkdir(parents=True)
    (foreign / "data" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match="not ours"):
        hf_ae.encode_dataset(model, rows, output_dir=foreign)


def test_all_splits_of_a_folder(tmp_path):
    found = hf_ae.encode_dataset(ROOT / "model_cards" / "fashion-vae", SAMPLE, output_dir=tmp_path)
    there = datasets.load_dataset(str(SAMPLE))
    assert {name: len(part) for name, part in found.items()} == {name: len(part) for name, part in there.items()}
    read = datasets.load_dataset(str(tmp_path), cache_dir=tmp_path / "cache")
    assert {name: len(part) for name, part in read.items()} == {name: len(part) for name, part in there.items()}


KILLED = """
import sys, hf_ae
from hf_ae.latents import encoding
encoding.MOST_ROWS = 20
from hf_ae_cli import main
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(tmp_path):
    """Killed as soon as it has written two shards."""
    words = ["encode", str(ROOT / "model_cards" / "fashion-vae"), "--dataset_name", str(SAMPLE)]
    words += ["--split", "test", "--keep_columns", "label", "-o"]
    command = [sys.executable, "-c", KILLED, *words, str(tmp_path / "killed")]
    shards = tmp_path / "killed" / "data"
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(shards.glob("t*"))) < 2 and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    _, errors = run.communicate()
    assert run.returncode == -signal.SIGKILL, errors
    assert not encoding.is_complete(tmp_path / "killed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs(*words, tmp_path / "whole")
    killed, whole = (
        datasets.load_dataset(str(tmp_path / name), split="test", cache_dir=tmp_path / "cache" / name)
        for name in ("killed", "whole")
    )
    assert len(list(shards.glob("t*"))) > 4
    assert killed["label"] == whole["label"] == datasets.load_dataset(str(SAMPLE), split="test")["label"]
    np.testing.assert_allclose(killed["latents"], whole["latents"], atol=1e-5)


@pytest.mark.slow
def test_latents_go_to_the_hub_and_come_back(rows, tmp_path):
    model, images = make("autoencoder-mlp"), tmp_path / "images"
    model.save_pretrained(tmp_path / "model")
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    images.mkdir()
    call = {"model": str(tmp_path / "model"), "folder": str(tmp_path / "codes"), "repo_id": "me/codes"}
    with HubServer() as server:
        first = (hub_clients.push_and_read_dataset, {"repo_id": "me/images", "folder": str(images)})
        _, found = run_client(server, tmp_path / "home", first, (hub_clients.encode_and_push, call), token=OWNER)
        files = server.files("me/codes", "dataset")
    wanted = hf_ae.encode_dataset(model, datasets.Dataset.from_parquet(str(next(images.iterdir()))))
    assert found["splits"] == ["train"] and found["label"] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found["latents"], wanted["latents"], atol=1e-6)
    assert {"README.md", "data/train-00000-of-00001.parquet"} == set(files) - {".gitattributes"}
    assert b"Latents of images" in files["README.md"] and str(tmp_path).encode() not in files["README.md"]


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """Four times the rows take no more than a tenth more memory."""
    program = """
import resource, sys, datasets, hf_ae
from hf_ae.latents import encoding
encoding.MOST_ROWS = 2000
rows = datasets.load_dataset(sys.argv[1], split="test")
rows = datasets.concatenate_datasets([rows] * int(sys.argv[3]))
hf_ae.encode_dataset("model_cards/fashion-conv-ae", rows, output_dir=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    times = 8000 // len(datasets.load_dataset(str(SAMPLE), split="test"))
    for factor in (1, 4):
        command = [sys.executable, "-c", program, str(SAMPLE), str(tmp_path / str(factor)), str(times * factor)]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_bad_input_is_one_line(capsys, tmp_path, rows):
    model = str(ROOT / "model_cards" / "fashion-vae")
    words = ["encode", model, "--dataset_name", SAMPLE, "-o", tmp_path / "codes"]
    fails(capsys, [*words, "--keep_columns", "name"], "no column 'name'", "label")
    fails(capsys, [*words, "--split", "dev"], "no split 'dev'")
    fails(capsys, [*words, "--task", "2", "--num_tasks", "2"], "task=2 must lie between 0 and num_tasks - 1")
    fails(capsys, [*words[:-1], model + "/config.json"], "is a file")
    with pytest.raises(ValueError, match="no known length"):
        hf_ae.encode_dataset(make("vae-mlp"), rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="rename it"):
        hf_ae.encode_dataset(make("vae-mlp"), rows.rename_column("label", "latents"), ["latents"])
    with pytest.raises(ValueError, match="from_list"):
        hf_ae.encode_dataset(make("vae-mlp"), [{"image": None}])
    with pytest.raises(ValueError, match="no column 'labels'"):
        hf_ae.encode_dataset(make("vae-mlp"), rows, "labels")
    with pytest.raises(ValueError, match="empty"):
        hf_ae.encode_dataset(make("vae-mlp"), rows.select([]))


def test_the_nearest_images_by_code_are_found_by_the_index_of_datasets():
    pytest.importorskip("faiss")
    model = make("autoencoder-mlp").eval()
    rows = datasets.load_dataset(str(SAMPLE), split="test").select(range(60))
    codes = hf_ae.encode_dataset(model, rows, ["label"]).with_format("numpy")
    codes.add_faiss_index("latents")
    latents = np.stack(codes["latents"]).astype(np.float64)
    for row in (0, 17):
        _, near = codes.get_nearest_examples("latents", latents[row].astype(np.float32), k=5)
        expected = np.square(latents - latents[row]).sum(1).argsort()[:5]
        assert np.allclose(np.stack(near["latents"]), latents[expected])
