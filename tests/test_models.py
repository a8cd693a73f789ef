"""What every variant must do: one list, the same tests."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import STRANGER, run_python
from safetensors.torch import save_file
from transformers import AutoModel
from variants import VARIANTS, make, pixels

import hf_ae
from hf_ae.codec import compress, unpack

ALL = pytest.mark.parametrize("name", VARIANTS)
PRIOR = dict(prior_layers=1, prior_hidden_size=16, prior_heads=2, prior_classes=2)


@ALL
def test_loss_is_the_sum_of_its_named_terms_and_trains_every_weight(name):
    model = make(name)
    x = pixels(model)
    output = model(x)
    assert output.reconstruction.shape == x.shape
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@ALL
def test_a_few_steps_lower_the_loss_on_a_batch(name):
    model = make(name)
    x = pixels(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = model(x).losses["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


@ALL
def test_encode_then_decode_is_forward_and_eval_is_deterministic(name):
    model = make(name).eval()
    x = pixels(model)
    with torch.no_grad():
        encoded, output = model.encode(x), model(x)
        decoded = model.decode(encoded.latents, pool_positions=encoded.pool_positions).sample
        torch.testing.assert_close(decoded, output.reconstruction)
        torch.testing.assert_close(encoded.latents, output.latents, rtol=0, atol=0)
        torch.testing.assert_close(model(x).loss, output.loss, rtol=0, atol=0)
    assert list(encoded.latents.shape[1:]) == model.config.latent_shape == model.config.code_shape
    low, high = model.config.pixel_range
    if low == 0:
        assert low <= decoded.min() and decoded.max() <= high
    for returned in (
        model(x, return_dict=False),
        model.encode(x, return_dict=False),
        model.decode(encoded.latents, return_dict=False),
    ):
        assert isinstance(returned, tuple)


CASES = [(name, False) for name in VARIANTS] + [(name, True) for name in VARIANTS if name.startswith("vq")]


@pytest.mark.parametrize("name, prior", CASES, ids=[name + "-with-prior" * prior for name, prior in CASES])
def test_what_a_model_says_it_can_do_is_what_it_does(name, prior):
    model = make(name, **PRIOR if prior else {})
    x = pixels(model)
    model(x)
    encoded, losses = model.eval().encode(x), model(x).losses
    assert model.can_sample == (encoded.latent_dist is not None)
    assert model.can_denoise == hasattr(model, "corrupt")
    assert model.has_discrete_codes == (encoded.indices is not None)
    assert model.can_generate_images == prior
    if prior:
        assert model.generate(2, seed=0).shape == x[:2].shape
    elif hasattr(model, "generate"):
        with pytest.raises(ValueError, match="no prior"):
            model.generate(2)
    if model.kl_weight_field is not None:
        product = getattr(model.config, model.kl_weight_field) * encoded.latent_dist.kl().mean()
        torch.testing.assert_close(losses["kl"], product)
    elif "kl" in losses:
        assert not torch.isclose(losses["kl"], model.config.beta * encoded.latent_dist.kl().mean())
    if hasattr(model.config, "dataset_size"):
        model.config.dataset_size = None
    if model.needs_dataset_size:
        with pytest.raises(ValueError, match="needs dataset_size"):
            model(x)
    else:
        assert model(x).loss.isfinite()


@ALL
def test_the_codec_writes_what_the_model_says(name):
    model = make(name).eval()
    channels, (height, width) = model.config.num_channels, model.config.image_hw
    image = Image.fromarray(np.full((height, width, 3), 77, np.uint8)).convert("L" if channels == 1 else "RGB")
    if model.codec_method is None:
        with pytest.raises(ValueError, match="cannot be a codec"):
            compress(model, image)
    else:
        assert unpack(compress(model, image, model_id="")).method == model.codec_method


@ALL
def test_batches_do_not_mix(name):
    model = make(name).eval()
    x = pixels(model, 3)
    with torch.no_grad():
        together = model(x).reconstruction
        alone = torch.cat([model(x[i : i + 1]).reconstruction for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@ALL
def test_save_and_reload_give_equal_outputs_sharded_too(name, tmp_path):
    model = make(name).eval()
    x = pixels(model)
    for folder, options in ((tmp_path / "whole", {}), (tmp_path / "shards", {"max_shard_size": "2KB"})):
        model.save_pretrained(folder, **options)
        again = AutoModel.from_pretrained(folder).eval()
        assert type(again) is hf_ae.MODELS[model.config.model_type]
        torch.testing.assert_close(again(x).reconstruction, model(x).reconstruction, rtol=0, atol=0)
        assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(folder)}
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_every_variant_runs_where_the_package_is_not_installed(tmp_path):
    """A process that cannot import hf_ae loads all variants, and one with a prior, by Auto classes and saved code."""
    models = {name: make(name) for name in VARIANTS} | {"with-prior": make("vqvae2", **PRIOR)}
    for name, model in models.items():
        folder, x = tmp_path / "models" / name, pixels(model.eval())
        model.save_pretrained(folder)
        hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
        expected = {"reconstruction": model(x).reconstruction.detach()}
        expected |= {"generated": model.generate(3, [0, 1], seed=0)} if model.can_generate_images else {}
        save_file({"pixels": x, **expected}, folder / "expected.safetensors")
    child = """
import json, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    x = expected["pixels"]
    same = [torch.allclose(model(x).reconstruction, expected["reconstruction"], atol=1e-5)]
    same.append(processor(torch.rand(1, *x.shape[1:])).pixel_values.shape[1:] == x.shape[1:])
    if "generated" in expected:
        same.append(torch.allclose(model.generate(3, [0, 1], seed=0), expected["generated"], atol=1e-5))
    results[folder.name] = [type(model).__module__.startswith("transformers_modules."), *map(bool, same)]
print(json.dumps(results))
"""
    printed = run_python(STRANGER + child, tmp_path / "models", HF_HOME=str(tmp_path / "home"))
    results = json.loads(printed.splitlines()[-1])
    assert set(results) == set(models) and all(all(same) for same in results.values()), results


@ALL
def test_bfloat16_is_close_to_float32(name, tmp_path):
    model = make(name).eval()
    x = pixels(model)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        output = half(x)
        difference = (output.reconstruction.float() - model(x).reconstruction).abs()
    assert output.loss.isfinite()
    # Unpooling may swap near-equal maxima, so a few pixels differ by more.
    assert difference.mean() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@ALL
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = make(name)
    x = pixels(model)

    start = {
        name: value.clone() for name, value in model.state_dict().items()
    }  # passes in training may change buffers

    def gradients():
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for a, b in zip(plain, gradients()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["autoencoder-unpool", "contractive-deep", "vae-resnet", "beta-vae-capacity", "denoising"]
)
def test_compiled_model_gives_the_same_output_and_gradients(name):
    """The five that differ in their flow; `backend="eager"` traces as inductor does, without compiling kernels."""
    model = make(name).eval()
    x = pixels(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x).reconstruction, model(x).reconstruction)
    model.train()
    compiled(x).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unpooling_without_positions_uses_the_upper_left_corner():
    model = make("autoencoder-unpool").eval()
    encoded = model.encode(pixels(model))
    assert [tuple(p.shape[1:]) for p in encoded.pool_positions] == [(4, 6, 8), (8, 3, 4)]
    with_positions = model.decode(encoded.latents, pool_positions=encoded.pool_positions).sample
    assert not torch.allclose(model.decode(encoded.latents).sample, with_positions)


def test_stored_half_precision_loads_as_float32(tmp_path):
    from hf_ae.training.checkpoints import save_model

    model = make("vae-mlp").eval()
    save_model(model, tmp_path, "float16")
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.dtype == torch.float32
    x = pixels(model)
    torch.testing.assert_close(again(x).reconstruction, model(x).reconstruction, rtol=1e-2, atol=1e-3)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * 4 * sum(p.numel() for p in model.parameters())


def test_tiles_blend_without_seams_and_slicing_changes_nothing():
    """A model of one 1×1 position sees no neighbours, so tiles must give exactly the whole image."""
    from hf_ae.models.tiling import tiled

    x = torch.rand(2, 3, 52, 70)
    for scale, down in ((1, True), (1, False)):
        torch.testing.assert_close(tiled(lambda t: t * 2, x, 16, scale, down), x * 2)
    doubled = tiled(lambda t: t.repeat_interleave(4, -1).repeat_interleave(4, -2), x, 12, 4, down=False)
    torch.testing.assert_close(doubled, x.repeat_interleave(4, -1).repeat_interleave(4, -2))
    halved = tiled(lambda t: t[..., ::2, ::2], x, 15, 2, down=True)
    torch.testing.assert_close(halved, x[..., ::2, ::2])


def test_vae_tiling_covers_large_images_and_slicing_is_exact():
    model = make("vae-resnet").eval()
    large = torch.rand(2, 3, 64, 88) * 2 - 1
    with torch.no_grad():
        whole = model.encode(large).latents
        model.enable_slicing()
        torch.testing.assert_close(model.encode(large).latents, whole, rtol=1e-4, atol=1e-5)
        model.enable_tiling(tile_size=32)
        tiles = model.encode(large).latents
        image = model.decode(tiles).sample
        for off in (lambda: model.enable_tiling(False), model.disable_tiling):  # as diffusers calls them
            model.enable_tiling()
            assert not torch.equal(model.encode(large).latents, whole)
            off()
            torch.testing.assert_close(model.encode(large).latents, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="write tile_size=32"):
        model.enable_tiling(32)
    assert tiles.shape == whole.shape and image.shape == large.shape
    with pytest.raises(ValueError, match="spatial latents"):
        make("vae-mlp").enable_tiling()


def test_drops_into_a_stock_stable_diffusion_pipeline():
    """diffusers' own img2img steps with our VAE: encode, scale, decode, by the interface of AutoencoderKL."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: F401

    vae = hf_ae.VAEModel(
        hf_ae.VAEConfig(
            network="resnet", image_size=32, num_channels=3, hidden_sizes=[8, 16, 16], pixel_range=[-1.0, 1.0]
        )
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(vae, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale_factor == 4
    embeddings = torch.randn(1, 5, 12)
    image = pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=embeddings * 0,
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="np",
    ).images
    assert image.shape == (1, 32, 32, 3)
    distribution = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    first, second = (distribution.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, distribution.mode())
