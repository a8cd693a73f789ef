"""Files: exact round trips, damage, foreign models, threads, sizes, other autoencoders, and the command line."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_compressive import shaken
from variants import make

import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress
from hf_ae.codec import compression as codec
from hf_ae.codec import container as bitstream
from hf_ae.codec import methods as codec_methods
from hf_ae.codec.container import File, SymbolDecoder, SymbolEncoder, SymbolTables, pack, unpack
from hf_ae.pipelines.vae_roundtrip import VAERoundTripPipeline, encode_as
from hf_ae_cli import main


def picture(width=61, height=40, mode="L", seed=0):
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    array = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int) + rng.integers(
        -6, 7, (height, width, 3)
    )
    return Image.fromarray(array.clip(0, 255).astype(np.uint8)).convert(mode)


def rgb_model():
    torch.manual_seed(0)
    fields = dict(
        image_size=32, hidden_sizes=[8, 8], patch_size=4, num_res_blocks=1, latent_channels=24, hyper_channels=[8, 4]
    )
    return hf_ae.CompressiveAutoencoderModel(hf_ae.CompressiveAutoencoderConfig(**fields)).eval()


@pytest.fixture(scope="module")
def gray():
    return shaken(amount=0.02)


# The entropy coder and the file


def test_ten_thousand_random_codes_come_back_exactly():
    rng = np.random.default_rng(0)
    gaussians = codec_methods.scale_tables()
    for trial in range(10_000):
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
    gaussians = codec_methods.scale_tables()
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


def test_damaged_files_are_refused_and_never_give_a_picture(gray):
    rng = np.random.default_rng(1)
    files = [compress(gray, picture(seed=s), model_id="a/b") for s in range(3)]
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
    data = compress(gray, picture(), quality=0.5, model_id="")
    content, own = data[:-4], codec.fingerprint(gray)
    head = 5  # magic, kind, width and height of one byte each
    huge = [
        bitstream.varint(w) + bitstream.varint(h)
        for w, h in ((2**31, 2**31), (70000, 70000), (2**34, 1), (0, 5), (8193, 8192))
    ]
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


def test_payload_of_another_picture_with_a_right_checksum_ends_in_an_error_or_a_picture(gray):
    """A forger can write any symbols; nothing may crash."""
    rng = np.random.default_rng(2)
    content = compress(gray, picture(), model_id="")[:-4]
    for _ in range(50):
        forged = bytearray(content)
        forged[9:] = rng.integers(0, 256, int(rng.integers(0, 300)), dtype=np.uint8).tobytes()
        with contextlib.suppress(CorruptFileError):
            assert decompress(sealed(bytes(forged)), gray).size == (61, 40)


def test_forged_size_with_a_right_checksum_ends_within_a_second_and_200_megabytes(tmp_path):
    """67 megapixels claimed by files that hold no such picture, in a process of their own."""
    model = shaken(amount=0.02)
    model.save_pretrained(tmp_path)
    rng, size = np.random.default_rng(3), bitstream.varint(8192) + bitstream.varint(8192)
    content = compress(model, picture(), quality=0.5, model_id="")[:-4]
    start = content[:3] + size + content[5:9]
    payloads = [b"", b"\x00", content[9:], rng.bytes(2000), bytes(2000), b"\xff" * 2000]
    for number, payload in enumerate(payloads):
        (tmp_path / f"{number}.hfae").write_bytes(sealed(start + payload))
    child = """
import resource, sys, time
from pathlib import Path
from PIL import Image
import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress
model = hf_ae.CompressiveAutoencoderModel.from_pretrained(sys.argv[1]).eval()
decompress(compress(model, Image.new("L", (90, 90))), model)
for path in sorted(Path(sys.argv[1]).glob("*.hfae")):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        decompress(path.read_bytes(), model)
        outcome = "a picture"
    except CorruptFileError:
        outcome = "refused"
    print(path.name, outcome, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", child, tmp_path], capture_output=True, text=True, cwd=os.getcwd())
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split() for line in run.stdout.splitlines()]
    assert len(rows) == len(payloads)
    for name, outcome, *figures in rows:
        seconds, kilobytes = map(float, figures)
        assert outcome == "refused" and seconds < 1 and kilobytes < 200_000, (name, outcome, figures)


# Compressive models


def test_decoder_gets_the_latents_that_the_encoder_wrote(gray, monkeypatch):
    image, seen = picture(), []
    monkeypatch.setattr(
        codec_methods,
        "decode_tiles",
        lambda model, latents: seen.append(latents) or torch.zeros(1, 1, 64, 64, dtype=torch.uint8),
    )
    for quality in (0.0, 0.4, 1.0):
        decompress(compress(gray, image, quality), gray)
        values = torch.from_numpy(np.array(image))[None, None].float() / 255
        with torch.no_grad():
            expected = gray.encode(values.contiguous(memory_format=torch.channels_last), quality=quality).latents
        assert torch.equal(seen[-1], expected)


def test_picture_is_the_models_own_reconstruction(gray):
    image = picture()
    values = torch.from_numpy(np.array(image))[None, None].float() / 255
    with torch.no_grad():
        expected = (gray(values, quality=0.7).reconstruction[0, 0] * 255).round()
    decoded = np.asarray(decompress(compress(gray, image, quality=0.7), gray))
    assert np.abs(decoded - expected.numpy()).max() <= 1 and (decoded == expected.numpy()).mean() > 0.999


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (17, 31), (64, 64), (3, 90)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_size_and_mode(size, mode):
    model = rgb_model()
    image = picture(*size, mode)
    decoded = decompress(compress(model, image, quality=1.0), model)
    assert (decoded.size, decoded.mode) == (size, mode)
    assert np.abs(np.asarray(decoded).astype(float) - np.asarray(image)).mean() < 40


def test_entropy_coder_writes_what_the_model_estimates():
    """After a short training. What a model holds for impossible it counts as 30 bits, and the coder takes fewer."""
    model = rgb_model().train()
    image = picture(320, 200, "RGB")
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


def test_transparent_and_coloured_pictures_that_cannot_be_kept_are_refused_in_words(gray):
    image = picture(mode="RGB").convert("RGBA")
    model = rgb_model()
    assert decompress(compress(model, image), model).mode == "RGB"
    image.putpixel((3, 3), (0, 0, 0, 10))
    with pytest.raises(ValueError, match="background"):
        compress(model, image)
    with pytest.raises(ValueError, match="gray"):
        compress(gray, picture(mode="RGB"))
    with pytest.raises(ValueError, match="palette"):
        compress(gray, picture(), palette=True)


def test_large_pictures_go_through_in_tiles(monkeypatch):
    model = rgb_model()
    image = picture(200, 136, "RGB")
    whole = np.asarray(decompress(compress(model, image, quality=0.8), model)).astype(float)
    monkeypatch.setattr(codec_methods, "WINDOW", 8)
    data = compress(model, image, quality=0.8)
    tiles = np.asarray(decompress(data, model)).astype(float)
    assert tiles.shape == whole.shape and np.abs(tiles - whole).mean() < 6


def test_a_file_of_another_model_is_refused_with_both_fingerprints(gray):
    other = shaken(amount=0.021)
    data = compress(gray, picture(), model_id="me/mine")
    with pytest.raises(CorruptFileError) as refusal:
        decompress(data, other)
    for words in (codec.fingerprint(gray).hex(), codec.fingerprint(other).hex(), "me/mine"):
        assert words in str(refusal.value)
    with torch.no_grad():
        other.encoder.stem.weight.add_(1.0)
    assert codec.fingerprint(other) == codec.fingerprint(shaken(amount=0.021))


def test_batches_give_the_same_files_and_training_mode_is_left_as_it_was(gray):
    images = [picture(seed=s) for s in range(3)]
    files = codec.compress_batch(gray, images, quality=0.5)
    assert files == [compress(gray, image, quality=0.5) for image in images]
    assert [a.tobytes() for a in codec.decompress_batch(files, gray)] == [decompress(f, gray).tobytes() for f in files]
    model = make("compressive").train()
    compress(model, images[0])
    assert model.training


def test_same_picture_with_one_and_two_threads_in_another_process(tmp_path):
    """Files written with two threads, read with one and with two in new processes that load the model the files name."""
    model = rgb_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    model.save_pretrained(tmp_path / "model")
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    loaded = hf_ae.CompressiveAutoencoderModel.from_pretrained(tmp_path / "model").eval()
    images = [picture(160 + 9 * s, 90, "RGB", s) for s in range(4)]
    files = codec.compress_batch(loaded, images, quality=0.9)
    pictures = [image.tobytes() for image in codec.decompress_batch(files, loaded)]
    torch.set_num_threads(threads)
    for number, data in enumerate(files):
        (tmp_path / f"{number}.hfae").write_bytes(data)
    child = """
import sys, torch, zlib
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
from hf_ae.codec.compression import decompress
print([zlib.crc32(decompress((Path(sys.argv[1]) / f"{n}.hfae").read_bytes()).tobytes()) for n in range(4)])
"""
    for count in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", child, tmp_path, count], capture_output=True, text=True, cwd=os.getcwd()
        )
        assert run.returncode == 0, run.stderr[-2000:]
        assert json.loads(run.stdout.splitlines()[-1]) == [zlib.crc32(p) for p in pictures]


# Other autoencoders


def psnr(a, b):
    return -10 * np.log10(((np.asarray(a).astype(float) - np.asarray(b)) ** 2).mean() / 255**2 + 1e-10)


@pytest.mark.parametrize("name", ["vae-mlp", "vae-resnet", "autoencoder-resnet", "autoencoder-conv"])
def test_latents_of_any_autoencoder_survive(name):
    model = make(name).eval()
    channels, (height, width) = model.config.num_channels, model.config.image_hw
    size = (width, height) if model.config.latent_dim else (width + 5, height + 3)
    image = picture(*size, "L" if channels == 1 else "RGB")
    coarse, fine = (compress(model, image, quality, model_id="") for quality in (0.0, 1.0))
    assert len(coarse) < len(fine)
    decoded = decompress(fine, model)
    pixels = codec_methods.pad_to(
        torch.from_numpy(np.array(image)).view(*size[::-1], channels).permute(2, 0, 1)[None],
        max(1, model.config.downsampling),
    )
    with torch.no_grad():
        exact = codec_methods.to_pixels(
            model, model.decode(model.encode(codec_methods.to_values(model, pixels)).latents).sample
        )
    exact = exact[0, :, : size[1], : size[0]].permute(1, 2, 0).squeeze(-1).numpy()
    assert decoded.size == size and psnr(decoded, exact) > 35
    with pytest.raises(CorruptFileError, match="fingerprint"):
        decompress(fine, rgb_model())


def test_vector_codes_take_their_own_size_alone_and_unpooling_is_refused():
    with pytest.raises(ValueError, match="28×28"):
        compress(make("vae-mlp"), picture())
    with pytest.raises(ValueError, match="unpool"):
        compress(make("autoencoder-unpool"), picture(16, 12))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_autoencoders_of_diffusers(kind, tmp_path):
    import diffusers

    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        model = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
        )
    else:
        small = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
        model = diffusers.AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    model.save_pretrained(tmp_path)
    image = picture(70, 50, "RGB")
    data = compress(codec.load_codec_model(str(tmp_path)), image, quality=1.0)
    assert unpack(data).model_id == str(tmp_path)
    assert decompress(data).size == (70, 50)
    sample = model.eval().encode(
        codec_methods.to_values(
            model, codec_methods.pad_to(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], 2)
        )
    )
    latents = sample.latent_dist.mode() if kind == "AutoencoderKL" else sample.latents
    exact = codec_methods.to_pixels(model, model.decode(latents.detach()).sample.detach())[0, :, :50, :70].permute(
        1, 2, 0
    )
    assert psnr(decompress(data), exact) > 35
    palette = compress(model, image, palette=True, model_id="")
    assert decompress(palette, model).size == (70, 50)
    assert psnr(decompress(palette, model), exact) > 15


def test_the_round_trip_pipeline_shows_what_the_codec_does_and_the_nearest_files_of_others():
    model, image = rgb_model(), picture(mode="RGB")
    result = VAERoundTripPipeline(model)(image, quality=0.5)
    assert result.data == compress(model, image, quality=0.5, model_id="")
    assert np.array_equal(result.decoded.picture, decompress(result.data, model))
    assert result.decoded.psnr == pytest.approx(psnr(result.decoded.picture, image), abs=1e-3)
    assert result.decoded.bpp == pytest.approx(8 * len(result.data) / (61 * 40))
    for name, found in result.others.items():
        sizes = [len(encode_as(image, name, quality)) for quality in range(101)]
        assert abs(found.size - len(result.data)) <= 1.1 * min(abs(size - len(result.data)) for size in sizes) + 16, (
            name
        )
    with pytest.raises(ValueError, match=r"others=.*TIFF.* are not known"):
        VAERoundTripPipeline(model)(image, others=["TIFF"])


# The command line


def run_cli(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_command_line_round_trip_and_its_errors(tmp_path, capsys):
    folder, image, file = tmp_path / "model", tmp_path / "in.png", tmp_path / "out.hfae"
    model = rgb_model()
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    picture(mode="RGB").save(image)
    assert run_cli("compress", image, "-o", file, "--model", folder, "--quality", 0.8) == 0
    assert run_cli("decompress", file, "-o", tmp_path / "back.png") == 0
    assert Image.open(tmp_path / "back.png").size == (61, 40)
    capsys.readouterr()
    assert run_cli("roundtrip", image, "--model", folder, "-o", tmp_path / "panel.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(folder), "JPEG", "WebP", "AVIF", "Written"]
    assert all("bits per pixel, PSNR" in line for line in lines[:4])
    assert Image.open(tmp_path / "panel.png").width > 3 * 240
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "text.txt").write_text("no picture")
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
    from conftest import SAMPLE

    model = make("compressive")
    model.save_pretrained(tmp_path)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    assert run_cli("evaluate", tmp_path, "--dataset_name", SAMPLE, "--max_images", 10, "--split", "test") == 0
    qualities = json.loads((tmp_path / "metrics.json").read_text())["compression"]["qualities"]
    rows = [qualities[q] for q in ("0", "0.25", "0.5", "0.75", "1")]
    assert [r["bpp"] for r in rows] == sorted(r["bpp"] for r in rows) and rows[0]["psnr"] < rows[-1]["psnr"]
    assert "bits per pixel" in capsys.readouterr().out and "| bits per pixel |" in (tmp_path / "README.md").read_text()
