"""One way to read a picture: `image=` of TextToImagePipeline, VAERoundTripPipeline and the image processor agree."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PROMPT, SIDE, pipeline, vae_of_hf_ae

import hf_ae
from hf_ae.pipelines import VAERoundTripPipeline
from hf_ae.pipelines.image_io import read_image

RAMP = np.linspace(0, 1, SIDE * (SIDE + 2)).reshape(SIDE, SIDE + 2)
COLOURS = Image.fromarray((np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2) * 255).astype(np.uint8))


def rotated() -> Image.Image:
    """A picture that its EXIF entry asks to turn."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    COLOURS.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


def with_transparency() -> Image.Image:
    image = COLOURS.convert("RGBA")
    image.putalpha(Image.fromarray((RAMP * 255).astype(np.uint8)))
    return image


def of_mode(mode: str, white: float) -> Image.Image:
    """A gray ramp from black to white."""
    if mode == "I;16B":
        return Image.frombytes(mode, (SIDE + 2, SIDE), (RAMP * white).astype(">u2").tobytes())
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    return Image.fromarray((RAMP * white).astype(kind))


GRAY = {
    "16 bits": of_mode("I;16", 65535),
    "16 bits, big-endian": of_mode("I;16B", 65535),
    "32 bits of 16": of_mode("I", 65535),
    "32 bits of 8": of_mode("I", 255),
    "floats to 1": of_mode("F", 1),
    "floats to 255": of_mode("F", 255),
    "floats, resampled": of_mode("F", 1.001),
}
PICTURES = GRAY | {
    "colours": COLOURS,
    "turned": rotated(),
    "transparent": with_transparency(),
    "palette": COLOURS.convert("P"),
    "CMYK": COLOURS.convert("CMYK"),
    "two colours": COLOURS.convert("1"),
    "gray and alpha": with_transparency().convert("LA"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PICTURES)
def test_the_pipeline_reads_pictures_as_the_image_processor_does(name, channels):
    processor = hf_ae.AutoencoderImageProcessor(num_channels=channels)
    expected = processor(PICTURES[name], do_resize=False)["pixel_values"]
    found = read_image(PICTURES[name], channels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.shape[2:] == ((SIDE + 2, SIDE) if name == "turned" else (SIDE, SIDE + 2))


def floats(low, high, mode="F"):
    values = low + RAMP * (high - low)
    return Image.fromarray(values.astype(np.float32 if mode == "F" else np.int32))


@pytest.mark.parametrize(
    "image",
    [floats(-1, 1), floats(0, 1e6), floats(0, np.nan), floats(0, 1 << 24, "I"), floats(-500, 500, "I")],
    ids=["-1 to 1", "millions", "NaN", "24 bits", "signed"],
)
def test_values_that_say_nothing_of_black_and_white_are_refused(image):
    with pytest.raises(ValueError, match=r"holds values from .* bring them to 0…"):
        read_image(image, 1)
    with pytest.raises(ValueError, match=r"holds values from .* bring them to 0…"):
        hf_ae.AutoencoderImageProcessor()(image)


@pytest.mark.parametrize("name", GRAY)
def test_deep_gray_pictures_are_no_white_or_black_start(name):
    pixels = read_image(GRAY[name], 3)
    np.testing.assert_allclose(pixels[0, 0].numpy(), RAMP, atol=1 / 254)
    assert pipeline()(PROMPT, image=GRAY[name], seed=0).images[0].size == (SIDE + 2, SIDE)


def test_arrays_of_16_bits_are_read():
    array = (np.repeat(RAMP[..., None], 3, axis=2) * 65535).astype(np.uint16)
    np.testing.assert_allclose(read_image(array, 3)[0, 0].numpy(), RAMP, atol=1e-4)


@pytest.mark.parametrize("name", ["16 bits", "floats to 1", "turned"])
def test_a_round_trip_compares_with_the_picture_that_was_compressed(name):
    pytest.importorskip("constriction")
    vae = vae_of_hf_ae((0.0, 1.0))
    result = VAERoundTripPipeline(vae)(PICTURES[name], others=["JPEG"])
    plain = Image.fromarray(as_bytes(read_image(PICTURES[name], 3))).convert("L" if name in GRAY else "RGB")
    expected = VAERoundTripPipeline(vae)(plain, others=["JPEG"])
    assert result.decoded.picture.size == expected.decoded.picture.size
    assert result.decoded.psnr == pytest.approx(expected.decoded.psnr, abs=0.01)
    assert result.others["JPEG"].psnr == pytest.approx(expected.others["JPEG"].psnr, abs=0.5)


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    return pixels[0].mul(255).round().byte().permute(1, 2, 0).numpy()


def test_a_truncated_picture_is_one_clear_line():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    short = buffer.getvalue()[:4000]
    with pytest.raises(ValueError, match="the image cannot be read: ") as caught:
        pipeline()(PROMPT, image=Image.open(io.BytesIO(short)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        VAERoundTripPipeline(vae_of_hf_ae())(Image.open(io.BytesIO(short)))


def test_a_misspelt_argument_of_the_round_trip_is_named(tmp_path):
    vae_of_hf_ae().save_pretrained(tmp_path / "vae")
    assert VAERoundTripPipeline.from_pretrained(tmp_path, subfolder="vae").vae.config.scaling_factor == 0.7
    with pytest.raises(TypeError, match="sub_folder"):
        VAERoundTripPipeline.from_pretrained(tmp_path, sub_folder="vae")
