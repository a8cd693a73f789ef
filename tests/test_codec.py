"""Files: exact round trips, damage, foreign models, threads, sizes, and the command line."""

import contextlib
import json
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image
from processes import run_python
from variants import make, rgb_model, shaken, smooth_image

import hf_ae
from hf_ae.codec import (
    CorruptFileError,
    compress,
    compress_batch,
    decompress,
    decompress_batch,
    fingerprint,
    tiles,
    unpack,
)
from hf_ae.codec.container import File, pack, varint
from hf_ae.codec.entropy_coder import SymbolDecoder, SymbolEncoder, SymbolTables
from hf_ae.codec.method_hyperprior import scale_tables
from hf_ae.loading import load_autoencoder
from hf_ae_cli import main


@pytest.fixture(scope="module")
def gray():
    return shaken(amount=0.02)


# The entropy coder and the file


@pytest.mark.parametrize("trials", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_symbols_come_back_exactly(trials):
    rng = np.random.default_rng(trials)
    gaussians = scale_tables()
    for trial in range(trials):
        count = int(rng.integers(0, 60))
        table = rng.integers(0, 64, count)
        spread = np.exp(rng.uniform(-2, 10 if trial % 7 == 0 else 4, count))
        symbols = np.clip(np.round(rng.normal(size=count) * spread), -32767, 32767).astype(np.int32)
        weights = [rng.integers(1, 2**20, int(rng.integers(1, 200))) for _ in range(3)]
        plain, which = SymbolTables(weights, [-3, 0, 5]), rng.integers(0, 3, 20)
        others = np.array([rng.integers(len(weights[w])) + [-3, 0, 5][w] for w in which], dtype=np.int32)
        coder = SymbolEncoder()
        coder.encode(symbols, table, gaussians)
        coder.encode(others, which, plain)
        decoder = SymbolDecoder(coder.finish())
        assert np.array_equal(decoder.decode(count, table, gaussians), symbols)
        assert np.array_equal(decoder.decode(20, which, plain), others)


def test_symbols_that_no_table_holds_are_refused():
    gaussians = scale_tables()
    with pytest.raises(ValueError, match="32767"):
        SymbolEncoder().encode(np.array([40000]), 3, gaussians)
    with pytest.raises(ValueError, match="outside"):
        SymbolEncoder().encode(np.array([4]), 0, SymbolTables([np.ones(4)], [0]))


def test_header_is_what_the_documentation_says():
    file = File("latents", "RGB", 300, 5, b"abc", "me/model", b"body")
    data = pack(file)
    expected = b"\xaeh\x39" + b"\xac\x02" + b"\x05" + b"abc" + b"\x08me/model" + b"body"
    assert data == expected + zlib.crc32(expected).to_bytes(4, "little")
    assert unpack(data) == file
    assert len(pack(File("hyperprior", "RGB", 768, 512, b"abc", "", b""))) == 14
    assert unpack(pack(File("hyperprior", "L", 1, 1, b"abc", "", b""))) == File(
        "hyperprior", "L", 1, 1, b"abc", "", b""
    )
    with pytest.raises(ValueError, match="255"):
        pack(File("latents", "L", 3, 5, b"abc", "é" * 128, b""))


def test_damaged_files_are_refused_and_never_give_an_image(gray):
    rng = np.random.default_rng(1)
    files = [compress(gray, smooth_image(seed=s), model_id="a/b") for s in range(3)]
    started, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(10_000):
        data = bytearray(files[trial % 3])
        kind = trial % 4
        if kind == 0:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 1:
            data = data[: rng.integers(len(data))]
        elif kind == 2:
            other = files[(trial + 1) % 3]
            data = data[: rng.integers(5, len(data))] + other[rng.integers(5, len(other)) :]
        else:
            data = rng.integers(0, 256, rng.integers(0, 200), dtype=np.uint8).tobytes() + bytes(
                data[: rng.integers(len(data))]
            )
        if bytes(data) in files:
            continue
        with pytest.raises(CorruptFileError):
            decompress(bytes(data), gray)
    assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def test_hostile_headers_with_a_right_checksum_are_refused_before_anything_is_allocated(gray):
    data = compress(gray, smooth_image(), quality=0.5, model_id="")
    content, own = data[:-4], fingerprint(gray)
    head = 5  # magic, kind, width and height of one byte each
    huge = [varint(w) + varint(h) for w, h in ((2**31, 2**31), (70000, 70000), (2**34, 1), (0, 5), (8193, 8192))]
    hostile = [content[:3] + size + content[head:] for size in huge]
    kinds = (
        0x40,
        0x27,
        0x21,
        0x22,
        0x28,
    )  # another version, method 7, another model's method, a name that is not there
    hostile += [content[:2] + bytes([kind]) + content[3:] for kind in kinds]
    hostile += [content[:3] + b"\xff" * 9, content[:head] + b"\xff" * 3 + content[head + 3 :], content[: head + 3]]
    hostile += [content[:2] + b"\x28" + content[3 : head + 3] + name for name in (b"\xff", b"\x02\xff\xff", b"")]
    hostile += [content[: head + 3] + b"\xff" + content[head + 4 :]]
    assert content[head : head + 3] == own
    started = time.perf_counter()
    for case in hostile:
        with pytest.raises(CorruptFileError):
            decompress(sealed(case), gray)
    assert time.perf_counter() - started < 1
    with pytest.raises(CorruptFileError, match="at most 100"):
        decompress(data, gray, max_pixels=100)


def test_payload_of_another_image_with_a_right_checksum_ends_in_an_error_or_an_image(gray):
    """A forger can write any symbols; nothing may crash."""
    rng = np.random.default_rng(2)
    content = compress(gray, smooth_image(), model_id="")[:-4]
    for _ in range(50):
        forged = bytearray(content)
        forged[9:] = rng.integers(0, 256, int(rng.integers(0, 300)), dtype=np.uint8).tobytes()
        with contextlib.suppress(CorruptFileError):
            assert decompress(sealed(bytes(forged)), gray).size == (61, 40)


@pytest.fixture(scope="module")
def another_process(tmp_path_factory):
    """What another process makes of files: (a row for each forged one, checksums of images for 1 and 2 threads)."""
    folder = tmp_path_factory.mktemp("files")
    forge_files(folder / "forged")
    images = write_files_with_two_threads(folder / "threads")
    child = """
import json, os, resource, sys, time, torch, zlib
from pathlib import Path
from PIL import Image
import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress
folder = Path(sys.argv[1])
model = hf_ae.CompressiveAutoencoderModel.from_pretrained(folder / "forged").eval()
decompress(compress(model, Image.new("L", (90, 90))), model)
forged, checksums = [], []
for path in sorted((folder / "forged").glob("*.hfae")):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        decompress(path.read_bytes(), model)
        outcome = "an image"
    except CorruptFileError:
        outcome = "refused"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    forged.append([path.name, outcome, time.perf_counter() - started, memory])
for count in (1, 2):
    torch.set_num_threads(count)
    os.chdir(folder / "threads")
    images = [decompress(path.read_bytes()) for path in sorted(Path(".").glob("*.hfae"))]
    checksums.append([zlib.crc32(image.tobytes()) for image in images])
print(json.dumps([forged, checksums]))
"""
    forged, checksums = json.loads(run_python(child, folder).splitlines()[-1])
    return forged, checksums, images


def forge_files(folder: Path):
    """Files that claim 67 megapixels and hold no such image, with a right checksum, beside their model."""
    model = shaken(amount=0.02)
    model.save_pretrained(folder)
    rng, size = np.random.default_rng(3), varint(8192) + varint(8192)
    content = compress(model, smooth_image(), quality=0.5, model_id="")[:-4]
    start = content[:3] + size + content[5:9]
    for index, payload in enumerate([b"", b"\x00", content[9:], rng.bytes(2000), bytes(2000), b"\xff" * 2000]):
        (folder / f"{index}.hfae").write_bytes(sealed(start + payload))


def write_files_with_two_threads(folder: Path) -> list[Image.Image]:
    """Files that name their model, which lies in the folder too; what is read from them here, with two threads."""
    model = rgb_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    model.save_pretrained(folder / "model")
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded = load_autoencoder(folder / "model")
        pictures = [smooth_image(160 + 9 * s, 90, "RGB", s) for s in range(4)]
        files = compress_batch(loaded, pictures, quality=0.9, model_id="model")
        images = decompress_batch(files, loaded)
    finally:
        torch.set_num_threads(threads)
    for index, data in enumerate(files):
        (folder / f"{index}.hfae").write_bytes(data)
    return images


def test_forged_size_with_a_right_checksum_ends_within_a_second_and_200_megabytes(another_process):
    rows, _, _ = another_process
    assert len(rows) == 6
    for name, outcome, seconds, kilobytes in rows:
        assert outcome == "refused" and seconds < 1 and kilobytes < 200_000, (name, outcome, seconds, kilobytes)


def test_same_image_with_one_and_two_threads_in_another_process(another_process):
    """Files written with two threads, read with one and with two in a new process that loads the model they name."""
    _, checksums, images = another_process
    assert checksums == [[zlib.crc32(image.tobytes()) for image in images]] * 2 and len(images) == 4


# Compressive models


def test_decoder_gets_the_latents_that_the_encoder_wrote(gray, monkeypatch):
    image, seen = smooth_image(), []

    def decode(model, latents):
        seen.append(latents)
        return torch.zeros(1, 1, 64, 64, dtype=torch.uint8)

    monkeypatch.setattr(tiles, "decode_tiles", decode)
    for quality in (0.0, 0.4, 1.0):
        decompress(compress(gray, image, quality), gray)
        values = torch.from_numpy(np.array(image))[None, None].float() / 255
        with torch.no_grad():
            expected = gray.encode(values.contiguous(memory_format=torch.channels_last), quality=quality).latents
        assert torch.equal(seen[-1], expected)


def test_image_is_the_models_own_reconstruction(gray):
    image = smooth_image()
    values = torch.from_numpy(np.array(image))[None, None].float() / 255
    with torch.no_grad():
        expected = (gray(values, quality=0.7).reconstruction[0, 0] * 255).round()
    decoded = np.asarray(decompress(compress(gray, image, quality=0.7), gray))
    assert np.abs(decoded - expected.numpy()).max() <= 1 and (decoded == expected.numpy()).mean() > 0.999


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (17, 31), (64, 64), (3, 90)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_size_and_mode(size, mode):
    model = rgb_model()
    image = smooth_image(*size, mode)
    decoded = decompress(compress(model, image, quality=1.0), model)
    assert (decoded.size, decoded.mode) == (size, mode)
    assert np.abs(np.asarray(decoded).astype(float) - np.asarray(image)).mean() < 40


def test_entropy_coder_writes_what_the_model_estimates():
    """After a short training. What a model holds for impossible it counts as 30 bits, and the coder takes fewer."""
    model = rgb_model().train()
    image = smooth_image(160, 104, "RGB")
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        model(values.expand(2, -1, -1, -1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for quality in (0.1, 0.5, 0.9):
        encoded = model.encode(values, quality=quality)
        estimate = float((encoded.bits + encoded.hyper_bits).detach()) / 8
        size = len(compress(model, image, quality, model_id=""))
        assert estimate * 0.97 < size < estimate * 1.01 + 24


def test_transparent_and_coloured_images_that_cannot_be_kept_are_refused_in_words(gray):
    image = smooth_image(mode="RGB").convert("RGBA")
    model = rgb_model()
    assert decompress(compress(model, image), model).mode == "RGB"
    image.putpixel((3, 3), (0, 0, 0, 10))
    with pytest.raises(ValueError, match="background"):
        compress(model, image)
    with pytest.raises(ValueError, match="gray"):
        compress(gray, smooth_image(mode="RGB"))


def test_large_images_go_through_in_tiles(monkeypatch):
    model = rgb_model()
    image = smooth_image(200, 136, "RGB")
    data = compress(model, image, quality=0.8)
    whole = np.asarray(decompress(data, model)).astype(float)
    monkeypatch.setattr(tiles, "WINDOW", 8)
    tiled = compress(model, image, quality=0.8)
    decoded = np.asarray(decompress(tiled, model)).astype(float)
    assert tiled != data and decoded.shape == whole.shape and np.abs(decoded - whole).mean() < 6


def test_a_file_of_another_model_is_refused_with_both_fingerprints(gray):
    other = shaken(amount=0.021)
    data = compress(gray, smooth_image(), model_id="me/mine")
    with pytest.raises(CorruptFileError) as refusal:
        decompress(data, other)
    for words in (fingerprint(gray).hex(), fingerprint(other).hex(), "me/mine"):
        assert words in str(refusal.value)
    with torch.no_grad():
        other.encoder.stem.weight.add_(1.0)
    assert fingerprint(other) == fingerprint(shaken(amount=0.021))


def test_batches_give_the_same_files_and_training_mode_is_left_as_it_was(gray):
    images = [smooth_image(seed=s) for s in range(3)]
    files = compress_batch(gray, images, quality=0.5)
    assert files == [compress(gray, image, quality=0.5) for image in images]
    assert [a.tobytes() for a in decompress_batch(files, gray)] == [decompress(f, gray).tobytes() for f in files]
    model = make("compressive").train()
    compress(model, images[0])
    assert model.training


# The command line


def run_cli(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_command_line_round_trip_and_its_errors(tmp_path, capsys, monkeypatch):
    folder, image, file = tmp_path / "model", tmp_path / "in.png", tmp_path / "out.hfae"
    model = rgb_model()
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    smooth_image(mode="RGB").save(image)
    monkeypatch.chdir(tmp_path)
    assert run_cli("compress", image, "-o", file, "--model", "model", "--quality", 0.8) == 0
    assert run_cli("decompress", file, "-o", tmp_path / "back.png") == 0
    assert Image.open(tmp_path / "back.png").size == (61, 40)
    capsys.readouterr()
    assert run_cli("roundtrip", image, "--model", folder, "-o", tmp_path / "panel.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(folder), "JPEG", "WebP", "AVIF", "Written"]
    assert all("bits per pixel, PSNR" in line for line in lines[:4])
    assert Image.open(tmp_path / "panel.png").width > 3 * 240
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "text.txt").write_text("no image")
    for words in (
        ("decompress", file, "-o", tmp_path / "back.png"),
        ("decompress", tmp_path / "none.hfae", "-o", tmp_path / "back.png"),
        ("decompress", file, "-o", tmp_path / "back.nothing"),
        ("compress", tmp_path / "text.txt", "-o", file, "--model", folder),
        ("compress", image, "-o", tmp_path / "no" / "file", "--model", folder),
        ("compress", image, "-o", file, "--model", folder, "--quality", 3),
        ("compress", image, "-o", file, "--model", tmp_path / "nowhere"),
    ):
        assert run_cli(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_evaluate_reports_rate_and_quality(tmp_path, capsys):
    model = make("compressive")
    model.save_pretrained(tmp_path)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    assert run_cli("evaluate", tmp_path, "--dataset_name", SAMPLE, "--max_images", 10, "--split", "test") == 0
    qualities = json.loads((tmp_path / "metrics.json").read_text())["compression"]["qualities"]
    rows = [qualities[q] for q in ("0", "0.25", "0.5", "0.75", "1")]
    assert [r["bpp"] for r in rows] == sorted(r["bpp"] for r in rows) and rows[0]["psnr"] < rows[-1]["psnr"]
    assert "bits per pixel" in capsys.readouterr().out and "| bits per pixel |" in (tmp_path / "README.md").read_text()
