"""The compressive autoencoder: exact arithmetic, rates, quality, and training on crops."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal
from variants import VARIANTS, make, pixels, shaken

import hf_ae
from hf_ae.models.entropy_models import (
    ERROR_WEIGHT,
    FRACTION_BITS,
    HYPER_LIMIT,
    SCALES,
    TABLE_TOTAL,
    WEIGHT_BITS,
    ExactConv2d,
    FactorizedPrior,
    economical_round,
    gaussian_bits,
    gaussian_weights,
    lower_bound,
    positions_of,
    round_straight_through,
    table_reach,
)
from hf_ae.models.modeling_compressive import ms_ssim


def test_exact_convolution_is_integer_arithmetic():
    """Against whole numbers of any length in Python, with a shift and a floor."""
    torch.manual_seed(0)
    layer = ExactConv2d(5, 3, 3, padding=1).eval()
    x = torch.randint(-(2**20), 2**20, (1, 5, 4, 4))
    weight = torch.floor(layer.weight.double() * 2**WEIGHT_BITS + 0.5).long()
    bias = torch.floor(layer.bias.double() * 2**WEIGHT_BITS + 0.5).long()
    padded = np.pad(x[0].numpy(), ((0, 0), (1, 1), (1, 1))).astype(object)
    expected = torch.empty(1, 3, 4, 4, dtype=torch.float64)
    for out, row, column in np.ndindex(3, 4, 4):
        total = (padded[:, row : row + 3, column : column + 3] * weight[out].numpy().astype(object)).sum()
        total = (total + (int(bias[out]) << FRACTION_BITS) + (1 << WEIGHT_BITS - 1)) >> WEIGHT_BITS
        expected[0, out, row, column] = max(-(2**20), min(2**20, total)) / 2**FRACTION_BITS
    assert torch.equal(layer(x.double() / 2**FRACTION_BITS), expected)


def test_entropy_parameters_do_not_depend_on_batch_threads_or_order():
    prior = shaken().hyperprior
    z, level = torch.randint(-HYPER_LIMIT, HYPER_LIMIT + 1, (3, 4, 5, 6)).float(), torch.tensor([0, 77, 128])
    known = torch.randint(-900, 900, (3, 12, 18, 21)).double() / 64

    def parameters(z, level, known):
        features = prior.features(z, level, 18, 21)
        return torch.cat([*prior.parameters_of(features, known, 0), *prior.parameters_of(features, known, 1)], 1)

    threads = torch.get_num_threads()
    with torch.no_grad():
        together = parameters(z, level, known)
        try:
            torch.set_num_threads(3 - min(threads, 2))
            alone = torch.cat([parameters(z[i : i + 1], level[i : i + 1], known[i : i + 1]) for i in range(3)])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(together, alone)
        order = torch.randperm(8)
        last, x = prior.last, torch.randint(-(2**20), 2**20, (1, 8, 9, 9)).double() / 2**FRACTION_BITS
        straight = last(x)
        last.weight.data = last.weight.data[:, order]
        assert torch.equal(last(x[:, order]), straight)
    assert together[:, 12:24].unique().numel() > 5


def test_training_and_exact_arithmetic_agree():
    """In train() the hyper-decoder runs in float32: means within a hundredth of a step of the exact ones."""
    model = shaken()
    z, level = torch.randint(-9, 9, (2, 4, 2, 2)).float(), torch.tensor([20, 100])
    with torch.no_grad():
        exact = model.hyperprior.features(z, level, 8, 8)
        model.train()
        quick = model.hyperprior.features(z, level, 8, 8)
    torch.testing.assert_close(quick.double(), exact, atol=3 / 2**FRACTION_BITS, rtol=0)
    assert quick.dtype == torch.float32 and exact.dtype == torch.float64


def test_rates_are_probabilities_of_rounded_values():
    v, scale = torch.randint(-6, 7, (200,)).float(), torch.rand(200) * 5 + 0.3
    normal = Normal(0.0, scale.double())
    expected = -torch.log2(normal.cdf(v.double() + 0.5) - normal.cdf(v.double() - 0.5)).float()
    torch.testing.assert_close(gaussian_bits(v, scale), expected.clamp(max=-math.log2(1e-9)), rtol=1e-3, atol=1e-3)
    prior = FactorizedPrior(3)
    symbols = torch.arange(-HYPER_LIMIT, HYPER_LIMIT + 1.0)
    torch.testing.assert_close(prior.probability(symbols.expand(3, -1)).sum(1), torch.ones(3), atol=1e-4, rtol=0)


def test_tables_are_the_model_in_whole_numbers():
    for scale in SCALES[::9]:
        table = torch.tensor(gaussian_weights(scale))
        masses = torch.cat([table[:1], 2 * table[1:-1], table[-1:]]).double()
        assert abs(masses.sum() / TABLE_TOTAL - 1) < 2e-3 and table.min() >= 1 and len(table) == table_reach(scale) + 2
        bits = -(table[:2].double() / TABLE_TOTAL).log2()
        torch.testing.assert_close(
            bits.float(), gaussian_bits(torch.tensor([0.0, 1.0]), torch.tensor(scale)), atol=0.02, rtol=0.02
        )


def test_no_weight_is_near_a_rounding_boundary():
    """So the error function of another machine gives the same tables: its error is below 1e-9 of a weight."""
    edges = [[math.erfc((k - 0.5) / s * math.sqrt(0.5)) / 2 for k in range(1, table_reach(s) + 2)] for s in SCALES]
    masses = np.array([m for e in edges for m in (1 - 2 * e[0], 2 * e[-1], *-np.diff(e))]) * TABLE_TOTAL
    assert np.abs(masses % 1 - 0.5).min() > 1e-5


def test_transform_starts_as_an_orthonormal_dct():
    from scipy.fft import dctn

    config = hf_ae.CompressiveAutoencoderConfig(
        image_size=16, hidden_sizes=[8], patch_size=4, latent_channels=48, num_channels=3
    )
    model = hf_ae.CompressiveAutoencoderModel(config)
    patch = torch.rand(1, 3, 4, 4)
    code = model.encoder(patch)[0].flatten()
    expected = torch.from_numpy(dctn(patch[0].numpy(), norm="ortho")).flatten()
    torch.testing.assert_close(code.sort().values, expected.sort().values, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decoder(model.encoder(patch)[0]), patch, atol=1e-5, rtol=0)


def test_quality_sets_lambda_and_trades_bits_for_distortion():
    model = make("compressive").eval()
    low, high = model.config.lambda_range
    torch.testing.assert_close(
        model.lambda_of(torch.tensor([0, 64, 128])), torch.tensor([low, math.sqrt(low * high), high])
    )
    x = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6), (48, 48), mode="bicubic").clamp(0, 1)
    outputs = [(model.encode(x, quality=q), model(x, quality=q)) for q in (0, 0.3, 0.7, 1)]
    bits = [float(encoded.bits.detach()) for encoded, _ in outputs]
    errors = [float((output.reconstruction - x).square().mean().detach()) for _, output in outputs]
    assert bits == sorted(bits) and errors == sorted(errors, reverse=True) and bits[-1] > 1.5 * bits[0]
    assert torch.equal(model(x).loss, model(x, quality=0.5).loss)
    with pytest.raises(ValueError, match="between 0"):
        model.encode(x, quality=1.2)


def test_loss_at_middle_quality_is_bits_per_pixel_plus_lambda_times_error():
    model = shaken()
    x = pixels(model)
    output, encoded = model(x), model.encode(x)
    error = 255**2 * (output.reconstruction - x).square().mean()
    rate = (encoded.bits + encoded.hyper_bits).mean() / (x.shape[2] * x.shape[3])
    expected = rate + math.sqrt(math.prod(model.config.lambda_range)) * error
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


def test_symbols_are_rounded_where_rates_allow():
    """The chosen symbol costs least among all, by bits + 30·error²; with a wide distribution it is the nearest."""
    v, scale = torch.linspace(-2.2, 2.3, 777), torch.tensor(0.6)
    candidates = torch.arange(-4.0, 5)[:, None].expand(-1, 777)
    costs = gaussian_bits(candidates, scale) + ERROR_WEIGHT * (v - candidates) ** 2
    assert torch.equal(economical_round(v, scale), costs.argmin(0) - 4.0)
    assert not torch.equal(economical_round(v, scale), round_straight_through(v))
    assert torch.equal(economical_round(v, torch.tensor(200.0)), round_straight_through(v))


def test_uniform_noise_counts_about_the_bits_of_rounding(monkeypatch):
    model = shaken()
    monkeypatch.setattr("hf_ae.models.entropy_models.ERROR_WEIGHT", 1e9)
    x = torch.nn.functional.interpolate(torch.rand(4, 1, 8, 8), (64, 64), mode="bicubic").clamp(0, 1)
    rounded = model.encode(x, quality=1.0).bits.mean()
    noisy = torch.stack([model.train().encode(x, quality=1.0).bits.mean() for _ in range(4)]).mean()
    torch.testing.assert_close(noisy, rounded, rtol=0.1, atol=0)


def test_any_size_is_padded_and_cropped():
    model = shaken()
    for size in ((1, 1), (5, 19), (33, 16)):
        output = model(torch.rand(2, 1, *size))
        assert output.reconstruction.shape == (2, 1, *size)
        assert list(output.latents.shape[2:]) == [-(-side // model.config.downsampling) for side in size]


def test_tables_follow_training_and_loaded_models_keep_theirs(tmp_path):
    model = make("compressive")
    model.train()(pixels(model)).loss.backward()
    with torch.no_grad():
        model.hyperprior.prior.log_scale.add_(1.0)
    model.save_pretrained(tmp_path)
    table = model.hyperprior.prior.table.clone()
    assert 0.98 < table.sum(1).double().mean() / TABLE_TOTAL < 1.02 and table.min() >= 1
    loaded = hf_ae.CompressiveAutoencoderModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.hyperprior.prior.log_scale.add_(1.0)  # as if another machine computed it otherwise
    loaded.update_tables()
    assert torch.equal(loaded.hyperprior.prior.table, table)
    assert not loaded.tables_are_stale


def test_gradients_pass_rounding_and_rise_from_below_a_bound():
    x = torch.tensor([-1.2, 0.4, 2.6], requires_grad=True)
    round_straight_through(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3)) and torch.equal(
        round_straight_through(x), torch.tensor([-1.0, 0.0, 3.0])
    )
    x.grad = None
    (lower_bound(x, 0.0) * torch.tensor([1.0, 1.0, 1.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0]
    x.grad = None
    (-lower_bound(x, 0.0)).sum().backward()
    assert x.grad.tolist() == [-1.0, -1.0, -1.0]


def test_steps_cover_every_position_once_and_no_value_sees_itself_or_later_ones():
    masks = [positions_of(5, 7, step) for step in range(3)]
    assert torch.equal(sum(m.int() for m in masks), torch.ones(5, 7, dtype=torch.int32))
    assert [int(m.sum()) for m in masks] == [12, 6, 17]
    prior = shaken().hyperprior
    features, known = torch.zeros(1, 8, 5, 7).double(), torch.zeros(1, 12, 5, 7).double()
    before = [prior.parameters_of(features, known, step)[0] for step in range(3)]
    known[..., 2, 2] = 3.0
    changed = [
        (prior.parameters_of(features, known, step)[0] != before[step])[0].any(0) & masks[step] for step in range(3)
    ]
    assert [int(c.sum()) for c in changed] == [0, 4, 4] and changed[1][1, 1] and changed[2][1, 2]


def test_ms_ssim_matches_torchmetrics_and_trains():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    x = torch.nn.functional.interpolate(torch.rand(2, 3, 40, 40), (176, 192), mode="bicubic").clamp(0, 1)
    y = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    torch.testing.assert_close(ms_ssim(x, y).mean(), reference(y, x, data_range=1.0), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="176"):
        hf_ae.CompressiveAutoencoderConfig(image_size=175, reconstruction_loss="ms_ssim")
    small = dict(hidden_sizes=[4, 4], num_res_blocks=1, latent_channels=4, hyper_channels=[4, 4])
    config = hf_ae.CompressiveAutoencoderConfig(image_size=176, reconstruction_loss="ms_ssim", **small)
    output = hf_ae.CompressiveAutoencoderModel(config).train()(x[..., :176, :176])
    output.loss.backward()
    assert output.loss.isfinite() and output.losses["reconstruction"] > 0


def test_distortion_with_ms_ssim_is_computed_in_float32_under_autocast():
    fields = dict(
        image_size=176,
        reconstruction_loss="mse+ms_ssim",
        hidden_sizes=[8],
        patch_size=4,
        latent_channels=8,
        hyper_channels=[4, 4],
    )
    model = hf_ae.CompressiveAutoencoderModel(hf_ae.CompressiveAutoencoderConfig(**fields))
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 20, 20), (176, 176), mode="bicubic").clamp(0, 1)
    y = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.distortion(y, x)
    error = 255**2 * (x - y).square().flatten(1).mean(1)
    torch.testing.assert_close(found, error + 1000 * (1 - ms_ssim(y, x)))
    assert (found > error).all()


def test_muon_leaves_quality_tables_to_adamw():
    from hf_ae.training.arguments import TrainingArguments
    from hf_ae.training.optimizers import make_optimizers

    model = make("compressive")
    muon, adamw = make_optimizers(model, TrainingArguments(optimizer="muon"))
    small = {id(p) for p in adamw.param_groups[0]["params"]}
    assert {id(model.log_steps.weight), id(model.hyperprior.quality_bias.weight)} <= small
    assert id(model.hyperprior.heads[0].weight) in {id(p) for p in muon.param_groups[0]["params"]}


def test_random_crops_are_windows_of_their_images_and_the_same_for_a_seed():
    from hf_ae.data import RandomCrops

    images = [torch.arange(h * w).view(1, h, w).to(torch.uint8) for h, w in ((9, 12), (12, 9), (8, 8))]
    crops = RandomCrops(images, (8, 8))
    first, again, other = (list(crops.batches(3, epoch, seed=1)) for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    whole = {tuple(i[0, r : r + 8, c : c + 8].flatten().tolist()) for i in images for r in range(5) for c in range(5)}
    assert all(tuple(window.flatten().tolist()) in whole for window in first[0])
    assert sum(len(b) for b in crops.batches(2, 0)) == 2


def test_training_on_crops_runs_resumes_and_saves_a_codec(train_args, tmp_path):
    from hf_ae.codec import compress, decompress
    from hf_ae.train import train

    overrides = VARIANTS["compressive"][1]
    common = dict(
        model_type="hf_ae_compressive",
        config_overrides=overrides,
        random_crop=True,
        optimizer="muon",
        checkpointing_steps=2,
    )
    train(train_args(**common, save_dtype="float16"))
    folder = tmp_path / "run"
    model = hf_ae.CompressiveAutoencoderModel.from_pretrained(folder)
    image = (np.arange(28 * 28).reshape(28, 28) % 251).astype(np.uint8)
    data = compress(model, Image.fromarray(image), model_id="")
    assert decompress(data, hf_ae.CompressiveAutoencoderModel.from_pretrained(folder)).size == (28, 28)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    train(train_args(**common, save_dtype="float16", resume_from_checkpoint="latest"))
    resumed = hf_ae.CompressiveAutoencoderModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
