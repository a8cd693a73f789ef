"""Samplers of latents, distances between sets of images, and the commands that use them."""

import json
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from command_line import fails, runs
from conftest import SAMPLE
from safetensors.torch import load_file
from variants import make

import hf_ae
from hf_ae.evaluation import feature_network
from hf_ae.evaluation.evaluate import evaluate
from hf_ae.evaluation.fidelity import accuracy, distances, frechet, kernel, neighbourhoods, train_classifier
from hf_ae.evaluation.generation import measure_generation, model_generator, pipeline_generator
from hf_ae.hub.push import check_folder
from hf_ae.latents import sampling
from hf_ae.train import ImageTrainingArguments, train
from hf_ae.training.collapse import discriminator_wins, generative_collapse, posterior_collapse


def two_clouds(n=4000):
    """Latents (n, 2, 1) of two classes, far apart."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 2
    return (torch.randn(n, 2) @ torch.tensor([[0.5, 0.3], [0.0, 0.1]]) + labels[:, None] * 8.0)[:, :, None], labels


# Samplers


def test_a_gaussian_has_the_mean_and_covariance_of_the_latents():
    latents, _ = two_clouds()
    drawn = sampling.fit(latents, "gaussian").sample(20_000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2, 1)
    torch.testing.assert_close(drawn.mean(0), latents.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(torch.cov(drawn[:, :, 0].T), torch.cov(latents[:, :, 0].T), rtol=0.05, atol=0.05)


def test_a_mixture_finds_both_clouds_and_one_gaussian_cannot():
    latents, _ = two_clouds()
    middle = {}
    for kind in ("gaussian", "mixture"):
        drawn = sampling.fit(latents, kind, components=2).sample(4000, generator=torch.Generator().manual_seed(0))
        middle[kind] = ((drawn[:, 0, 0] - 4).abs() < 2).float().mean().item()
    assert middle["mixture"] == 0 and middle["gaussian"] > 0.2


def test_classes_are_drawn_as_asked_and_saved_with_the_sampler(tmp_path):
    latents, labels = two_clouds()
    sampler = sampling.fit(latents, "mixture", labels, components=3)
    asked = torch.tensor([1, 0, 1, 1, 0])
    drawn = sampler.sample(5, asked, torch.Generator().manual_seed(1))
    assert ((drawn[:, 0, 0] > 4) == asked.bool()).all() and sampler.num_classes == 2
    assert set(load_file(sampler.save(tmp_path))) == {"weights", "means", "factors", "classes"}
    again = sampling.Sampler.load(tmp_path)
    torch.testing.assert_close(again.sample(5, asked, torch.Generator().manual_seed(1)), drawn, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no class 7"):
        again.sample(1, torch.tensor([7]))
    sampling.prior([3, 2]).save(tmp_path)
    assert sampling.Sampler.load(tmp_path).sample(4).shape == (4, 3, 2)
    with pytest.raises(ValueError, match="label_column"):
        sampling.fit(latents, "gaussian").sample(1, torch.tensor([0]))


def test_the_short_name_of_the_module_stays():
    assert hf_ae.sampling.Sampler is sampling.Sampler and hf_ae.sampling.fit_sampler is sampling.fit_sampler


def test_samplers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mixture"):
        sampling.fit(torch.randn(9, 2), "flow")
    with pytest.raises(ValueError, match="too few"):
        sampling.fit(torch.randn(3, 5), "gaussian")
    with pytest.raises(ValueError, match="at most"):
        sampling.fit(torch.randn(10, 8, 32, 32), "gaussian")
    with pytest.raises(ValueError, match="fit-sampler"):
        sampling.Sampler.load(tmp_path)
    (tmp_path / sampling.FILE).write_bytes(b"pickle")
    with pytest.raises(ValueError, match="fit-sampler"):
        sampling.Sampler.load(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        sampling.sample(make("vae-mlp"), 2, sampling.prior([7]))


def test_samples_are_decoded_draws_of_the_prior_in_the_models_pixel_range():
    model = make("vae-resnet").eval()
    images = sampling.sample(model, 5, seed=3)
    assert images.shape == (5, 3, 16, 24) and torch.equal(images, sampling.sample(model, 5, seed=3))
    latents = torch.randn(5, *model.config.latent_shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(images, model.decode(latents).sample.detach())
    assert not torch.equal(images, sampling.sample(model, 5, seed=4))


def test_a_model_with_a_prior_generates_by_that_in_parts_and_with_labels(monkeypatch):
    """The codes are those that its `generate` draws, part by part, from one generator."""
    prior = dict(prior_layers=1, prior_hidden_size=16, prior_heads=2, prior_classes=3)
    model = make("vqvae2", **prior).eval()
    monkeypatch.setattr(sampling, "batch_for", lambda values: 5)
    generator, labels = model_generator(model), torch.arange(12) % 3
    images = generator.generate(12, labels)
    assert generator.name == "its own prior" and generator.num_classes == 3
    draws = torch.Generator().manual_seed(0)
    parts = [model.generate(n, labels[start : start + n], generator=draws) for n, start in ((5, 0), (5, 5), (2, 10))]
    assert images.shape == (12, 1, 12, 20) and torch.equal(images, torch.cat(parts))
    assert torch.equal(generator.generate(12, labels), images) and not torch.equal(generator.generate(12), images)
    fitted = model_generator(model, sampling.prior(model.config.latent_shape))
    assert fitted.name == "prior" and not torch.equal(fitted.generate(12), images)


# Distances


def test_frechet_distance_is_that_of_the_formula():
    from scipy.linalg import sqrtm

    torch.manual_seed(0)
    real, fake = torch.randn(500, 6), torch.randn(400, 6) @ torch.randn(6, 6) + 1
    a, b = real.double().numpy(), fake.double().numpy()
    covariances = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet(real, fake) == pytest.approx(wanted, rel=1e-6)
    assert frechet(real, real) < 1e-6


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    torch.manual_seed(0)
    real, same, moved = torch.randn(600, 8), torch.randn(600, 8), torch.randn(600, 8) + 0.5
    assert abs(kernel(real, same)) < 10 < kernel(real, moved)
    k = lambda x, y: (x.double() @ y.double().T / 8 + 1) ** 3  # noqa: E731
    off = lambda m: (m.sum() - m.diagonal().sum()) / (600 * 599)  # noqa: E731
    wanted = off(k(real, real)) + off(k(moved, moved)) - 2 * k(real, moved).mean()
    assert kernel(real, moved) == pytest.approx(1000 * wanted.item(), rel=1e-3)


def test_neighbourhoods_are_those_of_the_papers_written_out():
    torch.manual_seed(0)
    real, fake = torch.randn(40, 3), torch.randn(30, 3) * 0.7
    apart = lambda a, b: (a - b).norm().item()  # noqa: E731

    def radius(points, i, k):
        return sorted(apart(points[i], p) for p in points)[k]

    r3, r5 = [radius(real, i, 3) for i in range(40)], [radius(real, i, 5) for i in range(40)]
    f3 = [radius(fake, j, 3) for j in range(30)]
    wanted = {
        "precision": sum(any(apart(y, x) <= r for x, r in zip(real, r3)) for y in fake) / 30,
        "recall": sum(any(apart(x, y) <= r for y, r in zip(fake, f3)) for x in real) / 40,
        "density": sum(sum(apart(y, x) <= r for x, r in zip(real, r5)) for y in fake) / 5 / 30,
        "coverage": sum(any(apart(y, x) <= r for y in fake) for x, r in zip(real, r5)) / 40,
    }
    assert neighbourhoods(real, fake) == pytest.approx(wanted)


def test_missing_modes_lower_recall_and_coverage_and_noise_lowers_precision():
    latents, labels = two_clouds(600)
    real = latents[:, :, 0]
    half, noise = distances(real, real[labels == 0]), distances(real, torch.randn(600, 2) * 20)
    assert half["precision"] > 0.95 and half["recall"] < 0.6 and half["coverage"] < 0.6
    assert noise["precision"] < 0.3 and noise["density"] < 0.3 < half["density"]
    with pytest.raises(ValueError, match="at least 10"):
        distances(real, real[:9])


# The network


def sample_images(split="test"):
    rows = datasets.load_dataset(str(SAMPLE), split=split)
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(pixels).float()[:, None] / 255, torch.tensor(rows["label"])


def test_the_network_that_ships_knows_fashion_and_its_file_is_checked(monkeypatch, tmp_path):
    images, labels = sample_images()
    network = feature_network.load_feature_network()
    with torch.no_grad():
        assert (network.classify(images).argmax(1) == labels).float().mean() > 0.87
    assert feature_network.features_of(network, images).shape == (len(images), 64)
    larger = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    assert feature_network.features_of(network, larger).shape == (len(images), 64)
    with pytest.raises(ValueError, match="feature_network"):
        feature_network.features_of(network, torch.rand(2, 3, 28, 28))
    assert 100_000 < feature_network.WEIGHTS.stat().st_size < 400_000
    changed = bytearray(feature_network.WEIGHTS.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "w").write_bytes(changed)
    monkeypatch.setattr(feature_network, "WEIGHTS", tmp_path / "w")
    with pytest.raises(ValueError, match="install hf_ae again"):
        feature_network.load_feature_network()


def test_a_network_of_ones_own_and_a_pipeline_are_measured_by_the_same_function(tmp_path):
    from tiny_pipelines import pipeline
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    network = feature_network.load_feature_network(str(tmp_path))
    pipe = pipeline()
    generator = pipeline_generator(pipe, ["a red cat", "a dog"], batch=5)
    drawn = generator.generate(3)
    torch.testing.assert_close(drawn[:1], pipe("a red cat", seed=0, output_type="pt").images, rtol=1e-3, atol=1e-3)
    metrics, images = measure_generation(generator, torch.rand(12, 3, 16, 16), torch.rand(12, 3, 16, 16), network)
    assert metrics["fid"] > metrics["floor"]["fid"] and images.shape == (12, 3, 16, 16)
    with pytest.raises(ValueError, match="nowhere"):
        feature_network.load_feature_network(str(tmp_path / "nowhere"))


def test_a_classifier_learns_from_generated_images_what_their_labels_say():
    images, labels = sample_images("train")
    held_out, wanted = sample_images()
    torch.manual_seed(0)
    networks = [feature_network.FeatureNetwork(10) for _ in range(2)]
    right = accuracy(train_classifier(networks[0], images, labels, steps=40), held_out, wanted)
    wrong = accuracy(train_classifier(networks[1], images, labels.roll(1), steps=40), held_out, wanted)
    assert right > 0.6 and wrong < 0.3


# The commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A VAE and a plain autoencoder, trained for a moment."""
    root = tmp_path_factory.mktemp("generation")
    common = dict(dataset_name=str(SAMPLE), num_train_epochs=12, learning_rate=3e-3, validation_epochs=0)
    common |= dict(train_batch_size=50, config_overrides="hidden_sizes=[64],latent_dim=8")
    train(ImageTrainingArguments(**common, output_dir=str(root / "vae"), model_type="hf_ae_vae"))
    train(ImageTrainingArguments(**common, output_dir=str(root / "plain")))
    return root


def test_evaluate_measures_samples_beside_real_images(trained, capsys, monkeypatch):
    monkeypatch.setattr("hf_ae.evaluation.generation.train_classifier", partial(train_classifier, steps=50))
    folder = trained / "vae"
    flags = ["evaluate", folder, "--dataset_name", SAMPLE, "--tasks", "generation", "--max_images", 150]
    runs(*flags)
    found = json.loads((folder / "metrics.json").read_text())["generation"]
    assert found["images"] == 150 and found["sampler"] == "prior" and found["seconds_per_image"] > 0
    assert found["fid"] > 2 * found["floor"]["fid"] and found["floor"]["coverage"] > 0.7
    assert f"fid {found['fid']:.4g}" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "samples.png" in card and f"| generated | {found['fid']:.3g} |" in card
    runs(*flags, "--sampler", "gaussian", "--label_column", "label")
    again = json.loads((folder / "metrics.json").read_text())
    assert again["generation"]["sampler"] == "gaussian" and 0.3 < again["generation"]["classification_accuracy"] < 1
    assert again["generation"]["asked_class"] > 0.3 and again["generation"]["floor"]["asked_class"] > 0.5
    assert "--sampler gaussian --label_column label" in again["generation"]["command"]


def test_a_sampler_is_fitted_saved_published_and_used(trained, tmp_path, capsys):
    folder = tmp_path / "vae"
    shutil.copytree(trained / "vae", folder)
    runs("fit-sampler", folder, "--dataset_name", SAMPLE, "--components", 3, "--max_images", 400)
    assert "sampler.safetensors" in check_folder(folder)
    sampler, model = sampling.Sampler.load(folder), hf_ae.VAEModel.from_pretrained(folder)
    assert len(sampler.weights) == 3 and sampling.sample(model, 4, sampler).shape == (4, 1, 28, 28)
    metrics = evaluate(folder, str(SAMPLE), tasks="generation", max_images=150, save=False)
    assert metrics["generation"]["sampler"] == "mixture"
    of_prior = evaluate(folder, str(SAMPLE), tasks="generation", max_images=150, sampler="prior", save=False)
    assert metrics["generation"]["fid"] < of_prior["generation"]["fid"]
    fails(capsys, ["fit-sampler", folder, "--dataset_name", SAMPLE, "--kind", "flow"], "flow", "mixture")
    fails(
        capsys,
        ["fit-sampler", folder, "--dataset_name", SAMPLE, "--label_column", "colour"],
        "no column 'colour'",
        "label",
    )
    fails(capsys, ["fit-sampler", "me/none", "--dataset_name", SAMPLE], "me/none cannot be loaded")


def test_bad_requests_are_one_line(trained, capsys):
    plain = ["evaluate", trained / "plain", "--dataset_name", SAMPLE, "--tasks", "generation", "--max_images", 50]
    fails(capsys, plain, "variational", "--sampler mixture")
    fails(capsys, [*plain, "--sampler", "saved"], "fit-sampler")
    fails(capsys, [*plain, "--sampler", "flow"], "flow", "gaussian")
    fails(capsys, [*plain, "--sampler", "gaussian", "--train_split", "all"], "train_split")
    runs(*plain, "--sampler", "gaussian")


def test_compare_puts_models_into_one_table_and_one_figure(trained, tmp_path, capsys):
    table = tmp_path / "table.md"
    models = [trained / "vae", trained / "plain"]
    runs("compare", *models, "--dataset_name", SAMPLE, "--max_images", 100, "-o", table)
    printed, text = capsys.readouterr().out, table.read_text()
    assert text.split("\n\n")[0] in printed
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert list(lines)[2:] == ["vae", "plain", "real (training split)"]
    assert lines["vae"].count("|") == lines[""].count("|") and "FID" in lines[""] and "PSNR" in lines[""]
    assert "plain: Only a variational" in text and (tmp_path / "table.png").stat().st_size > 1000
    runs(
        "compare",
        *models,
        "--dataset_name",
        SAMPLE,
        "--max_images",
        100,
        "--sampler",
        "gaussian",
        "-o",
        tmp_path / "t.json",
    )
    rows = json.loads((tmp_path / "t.json").read_text())
    assert rows["plain"]["fid"] > rows["real (training split)"]["fid"] and rows["vae"]["parameters"] > 100_000
    fails(capsys, ["compare", *models, "--dataset_name", SAMPLE, "-o", tmp_path / "t.txt"], ".md or .json")
    fails(capsys, ["compare", tmp_path / "none", "--dataset_name", SAMPLE], "none is neither a folder nor")


def test_a_pipeline_draws_classes_and_stands_beside_other_models(trained, tmp_path, capsys):
    from hf_ae.train_latent_diffusion import LatentDiffusionArguments
    from hf_ae.train_latent_diffusion import train as train_pipeline

    fields = "network=conv,hidden_sizes=[8,8],latent_channels=2"
    common = dict(dataset_name=str(SAMPLE), max_train_samples=100, validation_epochs=0, max_train_steps=4)
    vae = dict(output_dir=str(tmp_path / "spatial"), model_type="hf_ae_vae", config_overrides=fields)
    train(ImageTrainingArguments(**common, **vae))
    parts = dict(
        vae=str(tmp_path / "spatial"), caption_columns="label", num_inference_steps=2,
        text_encoder="hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16",
        unet_overrides="block_out_channels=[8,16],norm_num_groups=4,attention_head_dim=4",
    )  # fmt: skip
    train_pipeline(LatentDiffusionArguments(**common, **parts, output_dir=str(tmp_path / "pipe")))
    data = ["--dataset_name", SAMPLE, "--max_images", 30]
    runs("compare", trained / "vae", tmp_path / "pipe", *data, "-o", tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text())
    row = rows["pipe"]
    assert row["sampler"] == "prompts" and row["code_size"] == 98 and row["fid"] > 0 and row["psnr"] > 0
    assert (tmp_path / "t.png").stat().st_size > 1000


# Collapse


def test_a_collapsed_posterior_is_named_with_its_field():
    model, latents = hf_ae.VAEModel(hf_ae.VAEConfig(kl_weight=4.0)), torch.randn(100, 32)
    assert posterior_collapse(model, {"kl": 40.0}, latents) is None
    assert "kl_weight (now 4)" in posterior_collapse(model, {"kl": 0.1}, latents)
    latents[:, 2:] *= 0.01
    assert "30 of 32 units" in posterior_collapse(model, {"kl": 8.0}, latents)
    assert "beta (now 4)" in posterior_collapse(make("beta-vae"), {"kl": 0.01}, latents)
    for other in ("autoencoder-mlp", "beta-vae-capacity"):
        assert posterior_collapse(make(other), {"reconstruction": 1.0, "kl": 0.01}, latents) is None


def test_a_winning_discriminator_is_named_with_its_flag():
    config = hf_ae.VAEGANConfig()
    assert "--discriminator_learning_rate" in discriminator_wins(config, {"discriminator": 0.01, "adversarial": 1.2})
    for fair in ({"discriminator": 0.8, "adversarial": 0.1}, {"discriminator": 0.0, "adversarial": 0.0}):
        assert discriminator_wins(config, fair) is None
    softer = hf_ae.VAEGANConfig(adversarial_loss="non_saturating", adversarial_weight=1.0)
    assert discriminator_wins(softer, {"discriminator": 0.01, "adversarial": 1.2}) is None
    assert len(generative_collapse(hf_ae.VAEModel(hf_ae.VAEConfig()), {"kl": 0.0}, None)) == 1


def test_training_warns_of_a_collapse(train_args, capsys):
    fields = dict(hidden_sizes=[16], latent_dim=4, kl_weight=500)
    options = dict(max_train_steps=120, learning_rate=3e-3, validation_epochs=100)
    train(train_args(model_type="hf_ae_vae", config_overrides=fields, **options))
    assert "warning: Posterior collapse" in capsys.readouterr().out
