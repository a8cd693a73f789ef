"""The formulas, against independent references."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence
from variants import make, pixels

import hf_ae
from hf_ae.evaluation.likelihood import importance_weighted_bound, log_likelihood
from hf_ae.metrics import pca_reconstruction, psnr, reconstruction_metrics
from hf_ae.models.bottlenecks import DiagonalGaussian, stratified_log_weights, total_correlation_terms
from hf_ae.models.corruptions import corrupt


def test_kl_and_log_prob_match_torch_distributions():
    posterior = DiagonalGaussian(torch.randn(6, 10) * 2)
    reference = Normal(posterior.mean, posterior.std)
    torch.testing.assert_close(posterior.kl(), kl_divergence(reference, Normal(0.0, 1.0)).sum(1))
    z = torch.randn(6, 5)
    torch.testing.assert_close(posterior.log_prob(z), reference.log_prob(z))


def test_samples_have_the_mean_and_spread_of_the_posterior():
    posterior = DiagonalGaussian(torch.tensor([[1.0, -2.0, math.log(4.0), math.log(0.25)]]).expand(200_000, 4))
    z = posterior.sample()
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([2.0, 0.5]), atol=0.02, rtol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "identity", "relu"])
def test_one_layer_contraction_is_the_norm_of_autograds_jacobian(activation):
    model = hf_ae.ContractiveAutoencoderModel(
        hf_ae.ContractiveAutoencoderConfig(image_size=4, hidden_sizes=[], latent_dim=7, latent_activation=activation)
    )
    x = torch.rand(3, 1, 4, 4)
    expected = [
        torch.autograd.functional.jacobian(lambda v: model.encode(v).latents, x[i : i + 1]).square().sum()
        for i in range(3)
    ]
    torch.testing.assert_close(model.jacobian_norm(x), torch.stack(expected))


def test_deep_contraction_estimate_is_unbiased():
    model = hf_ae.ContractiveAutoencoderModel(
        hf_ae.ContractiveAutoencoderConfig(image_size=4, hidden_sizes=[12], latent_dim=5)
    )
    x = torch.rand(1, 1, 4, 4)
    exact = torch.autograd.functional.jacobian(lambda v: model.encode(v).latents, x).square().sum()
    torch.manual_seed(0)
    draws = model.jacobian_norm(x.expand(20_000, -1, -1, -1)).detach()
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(len(draws))


def test_contraction_is_differentiable_and_works_without_gradients():
    model = make("contractive-deep")
    model.jacobian_norm(pixels(model)).sum().backward()
    assert model.encoder.layers[0].linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model.eval()(pixels(model)).loss.requires_grad


def test_total_correlation_matches_the_closed_form_on_gaussians():
    """q(z) = N(0, C): TC = -½ log det(correlation), I(x; z) = ½ log(det C / det noise), the KL of each dimension."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.5, 0.9], [0.9, 1.2]])
    noise = torch.tensor([0.3, 0.4])
    n = 3000
    means = MultivariateNormal(torch.zeros(2), covariance - torch.diag(noise)).sample((n,))
    posterior = DiagonalGaussian(torch.cat([means, noise.log().expand(n, 2)], 1))
    terms = total_correlation_terms(posterior.sample(), posterior, dataset_size=n)
    variance = covariance.diagonal()
    correlation = covariance / (variance[:, None] * variance).sqrt()
    expected = {
        "mutual_information": 0.5 * torch.log(covariance.det() / noise.prod()),
        "total_correlation": -0.5 * torch.log(correlation.det()),
        "dimension_wise_kl": 0.5 * (variance - 1 - variance.log()).sum(),
    }
    for name, value in expected.items():
        assert abs(terms[name] - value) < 0.08, (name, terms[name], value)
    torch.testing.assert_close(sum(terms.values()), posterior.kl().mean(), atol=0.1, rtol=0)


def test_total_correlation_terms_agree_in_train_and_eval():
    """In eval() the latents are the mean, but the estimate still needs samples: the terms must stay near the KL."""
    model = make("beta-vae-tc")
    model.config.dataset_size = 256
    x = pixels(model, 256)
    kl = model.encode(x).latent_dist.kl().mean()
    for mode in (True, False):
        terms = model.train(mode)(x).losses
        total = terms["mutual_information"] + terms["total_correlation"] / 4.0 + terms["dimension_wise_kl"]
        torch.testing.assert_close(total, kl, atol=0.15, rtol=0.05)


def test_stratified_weights_sum_to_one():
    for batch, size in ((4, 4), (16, 1000), (1, 50)):
        torch.testing.assert_close(
            stratified_log_weights(batch, size).exp().sum(1), torch.ones(batch), atol=1.0 / size, rtol=0
        )


def test_capacity_rises_linearly_and_survives_reloading(tmp_path):
    model = make("beta-vae-capacity")
    for _ in range(4):
        model(pixels(model))
    assert model.current_capacity == 1.5
    model.eval()(pixels(model))
    model.save_pretrained(tmp_path)
    assert hf_ae.BetaVAEModel.from_pretrained(tmp_path).current_capacity == 1.5
    kl = model.encode(pixels(model)).latent_dist.kl().mean()
    torch.testing.assert_close(model(pixels(model)).losses["kl"], 4.0 * (kl - 1.5).abs())


def test_sparse_penalties_match_their_definitions():
    kl_model, l1_model = make("sparse-kl"), make("sparse-l1")
    output = kl_model(pixels(kl_model))
    mean = output.latents.mean((0, 2, 3))
    expected = kl_divergence(Bernoulli(mean), Bernoulli(torch.tensor(kl_model.config.sparsity_target))).sum()
    torch.testing.assert_close(output.losses["sparsity"], 0.1 * expected, rtol=1e-4, atol=1e-6)
    output = l1_model(pixels(l1_model))
    torch.testing.assert_close(output.losses["sparsity"], 0.1 * output.latents.abs().sum(1).mean())


@pytest.mark.parametrize("loss", ["mse", "bce", "l1"])
def test_reconstruction_terms_are_sums_over_an_image(loss):
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(reconstruction_loss=loss, hidden_sizes=[8], latent_dim=3))
    x = pixels(model)
    output = model(x)
    r = output.reconstruction
    each = {"mse": (r - x) ** 2, "l1": (r - x).abs(), "bce": -(x * r.log() + (1 - x) * (1 - r).log())}[loss]
    torch.testing.assert_close(output.losses["reconstruction"], each.sum((1, 2, 3)).mean(), rtol=1e-4, atol=1e-3)


def test_unpooling_puts_each_maximum_back_where_it_was():
    model = make("autoencoder-unpool")
    down, up = model.encoder.layers[0], model.decoder.layers[1]
    x = torch.rand(2, 1, 12, 16)
    pooled, positions = down(x)
    before = down.activation(down.conv(x))
    restored = torch.nn.functional.max_unpool2d(pooled, positions, 2)
    assert torch.equal(restored[restored != 0], before[restored != 0])
    assert (restored != 0).sum() == pooled.numel()
    torch.testing.assert_close(up(pooled, positions), up.activation(up.conv(restored)))


def test_only_the_greatest_latents_stay():
    model, plain = make("sparse-topk").eval(), make("sparse-topk").eval()
    plain.load_state_dict(model.state_dict())
    plain.config.k = None
    x = pixels(model)
    kept, all_of_them = model.encode(x).latents, plain.encode(x).latents
    assert ((kept != 0).sum(1) == 5).all()
    least = all_of_them.topk(5).values[:, -1:]
    assert torch.equal(kept, torch.where(all_of_them >= least, all_of_them, 0))
    with pytest.raises(ValueError, match="k belongs to sparsity='topk'"):
        hf_ae.SparseAutoencoderConfig(sparsity="topk")
    with pytest.raises(ValueError, match="k=99 must lie between 1 and the 40 latents"):
        hf_ae.SparseAutoencoderConfig(sparsity="topk", k=99, latent_dim=40)


def test_corruption_statistics():
    x = torch.rand(8, 3, 100, 100) * 0.4 + 0.3
    g = torch.Generator().manual_seed(0)
    noise = corrupt(x, "gaussian", 0.05, generator=g) - x
    assert abs(noise.std() - 0.05) < 5e-4 and abs(noise.mean()) < 5e-4
    masked = corrupt(x, "masking", 0.3, generator=g)
    assert abs((masked[:, 0] == 0).float().mean() - 0.3) < 0.01
    assert torch.equal(masked[:, 0] == 0, masked[:, 2] == 0)
    salted = corrupt(x, "salt_pepper", 0.2, low=-1.0, high=1.0, generator=g)
    assert abs((salted == 1).float().mean() - 0.1) < 0.01 and abs((salted == -1).float().mean() - 0.1) < 0.01
    hidden = corrupt(x, "patches", 0.75, generator=g, patch_size=8) == 0
    patches = (
        torch.nn.functional.pad(hidden[:, 0], (0, 4, 0, 4)).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)[:, :12, :12]
    )
    assert torch.equal(patches.any(3), patches.all(3))  # whole squares
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    assert not torch.equal(hidden[0], hidden[1])
    whole = corrupt(torch.ones(3, 1, 96, 96), "patches", 0.75, generator=g, patch_size=8) == 0
    assert (whole.sum((1, 2, 3)) == 0.75 * 96 * 96).all()  # as many in each image
    for level in (0.0, 1.0):  # at least one patch, and never all
        assert 0 < (corrupt(torch.ones(1, 1, 28, 28), "patches", level) == 0).sum() < 28 * 28
    bright = corrupt(x * 0.5, "brightness", 0.5, generator=g) / (x * 0.5)
    factors = bright[:, :, 0, 0].log()
    torch.testing.assert_close(bright.log(), factors[..., None, None].expand_as(x), atol=1e-4, rtol=0)
    assert factors.abs().max() <= 0.5 and factors.std() > 0.1 and torch.equal(factors[:, 0] > 0, factors[:, 2] > 0)
    dark = corrupt(x * 2 - 1, "brightness", 0.5, low=-1.0, high=1.0, generator=g)
    assert dark.min() >= -1 and dark.max() <= 1
    small = corrupt(x, "low_resolution", 4)
    torch.testing.assert_close(small[0, 0, :4, :4], x[0, 0, :4, :4].mean().expand(4, 4))
    assert corrupt(torch.rand(1, 1, 30, 31), "low_resolution", 4).shape == (1, 1, 30, 31)
    gray = corrupt(x, "grayscale", 0)
    torch.testing.assert_close(gray[:, 1], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])


def test_denoising_damages_only_in_training_unless_asked_and_compares_with_the_clean_image():
    model = make("denoising")
    x = pixels(model)
    clean = model.eval()(x)
    assert torch.equal(model(x).loss, clean.loss)
    damaged = model(x, corrupt=True)
    assert not torch.equal(damaged.reconstruction, clean.reconstruction)
    expected = (damaged.reconstruction - x).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(damaged.losses["reconstruction"], expected)
    assert torch.equal(model.train()(x, corrupt=False).reconstruction, clean.reconstruction)
    assert not torch.equal(model(x).reconstruction, clean.reconstruction)


def test_a_transform_that_keeps_every_frequency_starts_as_the_identity():
    model = make("denoising-transform").eval()
    gray = model.corrupt(pixels(model))
    torch.testing.assert_close(model(gray).reconstruction, gray, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode(gray).latents.square().sum(), gray.square().sum())
    with pytest.raises(ValueError, match=r"write latent_channels and pixel_range=\[-1, 1\]"):
        hf_ae.DenoisingAutoencoderConfig(network="transform", latent_channels=48)


def test_importance_weighted_bound_is_exact_for_a_linear_gaussian_model():
    """A linear decoder of a Gaussian code has a closed-form p(x), which the bound must reach from below."""
    torch.manual_seed(0)
    config = hf_ae.VAEConfig(image_size=2, hidden_sizes=[], latent_dim=2, pixel_range=[-1.0, 1.0])
    model = hf_ae.VAEModel(config).eval()
    weight, bias = model.decoder.to_pixels.weight.detach(), model.decoder.to_pixels.bias.detach()
    x = torch.randn(5, 1, 2, 2) * 0.5
    exact = MultivariateNormal(bias, weight @ weight.T + 0.5 * torch.eye(4)).log_prob(x.flatten(1))
    elbo, bound = importance_weighted_bound(model, x, 20_000)
    torch.testing.assert_close(bound, exact, atol=0.03, rtol=0)
    assert (elbo < bound).all()


def test_bernoulli_likelihood_matches_torch_distributions():
    model = make("vae-mlp").eval()
    x, z = (pixels(model, 1) > 0.5).float()[0], torch.randn(3, 5)
    expected = Bernoulli(logits=model._decode(z)).log_prob(x.expand(3, -1, -1, -1)).sum((1, 2, 3))
    torch.testing.assert_close(log_likelihood(model, x, z), expected, rtol=1e-4, atol=1e-3)


def test_pca_with_all_components_is_exact_and_metrics_follow_their_definitions():
    basis = torch.rand(3, 1, 4, 4) / 3
    train, test = (
        torch.einsum("ij,jchw->ichw", torch.rand(50, 3), basis),
        torch.einsum("ij,jchw->ichw", torch.rand(5, 3), basis),
    )
    torch.testing.assert_close(pca_reconstruction(train, test, 3), test)
    assert not torch.allclose(pca_reconstruction(train, test, 2), test, atol=1e-3)
    assert pca_reconstruction(train, test, 16) is None
    noisy = (test + 0.1).clamp(0, 2)
    metrics = reconstruction_metrics(test, noisy)
    assert math.isclose(metrics["mse"], 0.01, rel_tol=1e-4) and math.isclose(
        metrics["squared_error_per_image"], 0.16, rel_tol=1e-4
    )
    assert math.isclose(metrics["psnr"], 20.0, rel_tol=1e-4) and "ssim" not in metrics
    torch.testing.assert_close(psnr(torch.tensor([1.0, 0.001, 0.0])), torch.tensor([0.0, 30.0, 100.0]))


def test_overcomplete_code_warns_once_in_plain_words(caplog):
    import logging

    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    config = dict(image_size=4, hidden_sizes=[4], latent_dim=21)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(**config))
        hf_ae.SparseAutoencoderModel(hf_ae.SparseAutoencoderConfig(**config))
    hf_logging.disable_propagation()
    assert sum("copy its input" in r.message for r in caplog.records) == 1


def test_layerwise_pretraining_trains_each_layer_on_the_activations_below():
    from hf_ae.training.arguments import TrainingArguments
    from hf_ae.training.layerwise import level_functions, pretrain_layerwise

    torch.manual_seed(0)
    model = hf_ae.AutoencoderModel(
        hf_ae.AutoencoderConfig(image_size=8, hidden_sizes=[24, 12], latent_dim=4, activation="sigmoid")
    )
    images = (torch.rand(300, 1, 8, 1).expand(-1, -1, -1, 8) * 255).to(torch.uint8)
    lines = []
    args = TrainingArguments(train_batch_size=20, learning_rate=0.01)
    shapes = [tuple(t.shape) for level in range(3) for t in level_functions(model, level, 3)[2][::2]]
    assert shapes == [(24, 64), (64, 24), (12, 24), (24, 12), (4, 12), (12, 4)]
    before = model(images.float() / 255).loss.item()
    pretrain_layerwise(model, images, args, 30, lines.append)
    assert len(lines) == 3
    assert model(images.float() / 255).loss.item() < 0.6 * before
    with pytest.raises(ValueError, match="network='mlp' with hidden_sizes"):
        pretrain_layerwise(make("contractive-exact"), images, args, 1)


def test_muon_takes_a_kernel_as_the_matrix_that_torch_takes():
    """Three steps on a convolution kernel are those of torch's Muon on the flattened kernel."""
    from hf_ae.training.optimizers import KernelMuon

    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    ours = KernelMuon([kernel], 0.1, 0.01)
    theirs = torch.optim.Muon([matrix], 0.1, 0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(kernel.flatten(1), matrix)
