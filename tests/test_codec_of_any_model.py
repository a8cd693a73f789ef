"""Files of autoencoders that were not trained for it, ours and diffusers'; the round trip beside other formats."""

import numpy as np
import pytest
import torch
from variants import make, rgb_model, shaken, smooth_image

from hf_ae.codec import CorruptFileError, compress, decompress, tiles, unpack
from hf_ae.loading import load_autoencoder
from hf_ae.pipelines.vae_roundtrip import VAERoundTripPipeline, encode_as


def psnr(a, b):
    return -10 * np.log10(((np.asarray(a).astype(float) - np.asarray(b)) ** 2).mean() / 255**2 + 1e-10)


@torch.no_grad()
def without_file(model, image) -> np.ndarray:
    """What an autoencoder makes of an image, without a file between encoder and decoder."""
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)[None]
    encoded = model.encode(tiles.to_values(model, tiles.padded(model, pixels)))
    latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
    decoded = tiles.to_pixels(model, model.decode(latents).sample)[0, :, : image.height, : image.width]
    return decoded.permute(1, 2, 0).squeeze(-1).numpy()


@pytest.mark.parametrize("name", ["vae-mlp", "vae-resnet", "autoencoder-resnet", "autoencoder-conv"])
def test_latents_of_any_autoencoder_survive(name):
    model = make(name).eval()
    channels, (height, width) = model.config.num_channels, model.config.image_hw
    size = (width, height) if model.config.latent_dim else (width + 5, height + 3)
    image = smooth_image(*size, "L" if channels == 1 else "RGB")
    coarse, fine = (compress(model, image, quality, model_id="") for quality in (0.0, 1.0))
    assert len(coarse) < len(fine)
    decoded = decompress(fine, model)
    assert decoded.size == size and psnr(decoded, without_file(model, image)) > 35
    with pytest.raises(CorruptFileError, match="fingerprint"):
        decompress(fine, shaken())


def test_vector_codes_take_their_own_size_alone_and_unpooling_is_refused():
    with pytest.raises(ValueError, match="28×28"):
        compress(make("vae-mlp"), smooth_image())
    with pytest.raises(ValueError, match="unpool"):
        compress(make("autoencoder-unpool"), smooth_image(16, 12))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_autoencoders_of_diffusers(kind, tmp_path, monkeypatch):
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
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    image = smooth_image(70, 50, "RGB")
    data = compress(load_autoencoder("model"), image, quality=1.0)
    assert unpack(data).model_id == "model"
    assert decompress(data).size == (70, 50)
    assert psnr(decompress(data), without_file(model.eval(), image)) > 35


def test_the_round_trip_pipeline_shows_what_the_codec_does_and_the_nearest_files_of_others():
    model, image = rgb_model(), smooth_image(mode="RGB")
    result = VAERoundTripPipeline(model)(image, quality=0.5)
    assert result.data == compress(model, image, quality=0.5, model_id="")
    assert np.array_equal(result.decoded.picture, decompress(result.data, model))
    assert result.decoded.psnr == pytest.approx(psnr(result.decoded.picture, image), abs=1e-3)
    assert result.decoded.bpp == pytest.approx(8 * len(result.data) / (61 * 40))
    assert set(result.others) == {"JPEG", "WebP", "AVIF"}
    for name, found in result.others.items():
        distances = [abs(len(encode_as(image, name, quality)) - len(result.data)) for quality in range(101)]
        assert abs(found.size - len(result.data)) <= 1.1 * min(distances) + 16, name
    with pytest.raises(ValueError, match=r"others=.*TIFF.* are not known"):
        VAERoundTripPipeline(model)(image, others=["TIFF"])
