"""Outliers: each score beside an independent reference, a threshold that holds, and files that come back."""

import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from command_line import fails, runs
from conftest import SAMPLE
from PIL import Image
from scipy.spatial.distance import mahalanobis
from shipped import ROOT
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from variants import make

import hf_ae
from hf_ae.anomaly import FILE, PARTS
from hf_ae.evaluation.anomaly import detection_metrics, rivals
from hf_ae.evaluation.evaluate import evaluate, summary
from hf_ae.hub.push import check_folder
from hf_ae.latents.sampling import Sampler, fit, prior
from hf_ae.loading import image_processor_for

MODEL = ROOT / "model_cards" / "fashion-vae"


@pytest.fixture(scope="module")
def splits():
    return datasets.load_dataset(str(SAMPLE))


@pytest.fixture(scope="module")
def normal(splits):
    return splits["train"].select(range(300))


def images(count=40, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8))


def latents_of(model, data):
    processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
    with torch.no_grad():
        return model.eval().encode(processor(data, return_tensors="pt").pixel_values).latents.flatten(1)


def alone(detector, data):
    """A detector's scores, higher is less normal, before they are brought to one scale."""
    mean, std = detector.tensors["part_mean"], detector.tensors["part_std"]
    return -detector.score_samples(data) * std.numpy() + mean.numpy()


def test_log_density_of_a_mixture_is_that_of_torch():
    torch.manual_seed(0)
    factors = torch.randn(3, 4, 4).tril(-1) + torch.diag_embed(torch.rand(3, 4) + 0.5)
    weights, means, z = torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 4), torch.randn(7, 4)
    parts = torch.distributions.MultivariateNormal(means, scale_tril=factors)
    mixed = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
    found = Sampler("mixture", weights, means, factors, [2, 2]).log_prob(z.view(7, 2, 2))
    torch.testing.assert_close(found, mixed.log_prob(z))
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(prior([4]).log_prob(z), normal)
    torch.testing.assert_close(fit(torch.randn(5000, 4), "gaussian").log_prob(z), normal, atol=0.5, rtol=0.1)


@pytest.fixture(scope="module")
def pieces(normal):
    """score -> (detector, latents it was fitted to, images to score and their latents), of one model."""
    model, found = make("vae-mlp"), {}
    processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
    x = processor(list(normal["image"]), return_tensors="pt").pixel_values
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = model.eval().encode(x).latents
        odd = model.encode(processor(images(), return_tensors="pt").pixel_values).latents
    for part in PARTS:
        found[part] = hf_ae.AnomalyDetector(model, part, components=3).fit(normal)
    return found, z[order[60:]].double(), odd.double()


def test_gaussian_is_the_distance_of_mahalanobis(pieces):
    detectors, z, odd = pieces
    covariance = np.cov(z.numpy().T) + 1e-3 * np.trace(np.cov(z.numpy().T)) / 5 * np.eye(5)
    inverse, mean = np.linalg.inv(covariance), z.numpy().mean(0)
    wanted = [mahalanobis(row, mean, inverse) ** 2 for row in odd.numpy()]
    np.testing.assert_allclose(alone(detectors["gaussian"], images()), wanted, rtol=1e-3)


def test_mixture_is_that_of_scikit_learn(pieces):
    detectors, z, odd = pieces
    least = 1e-3 * z.var(0).mean().item()
    reference = GaussianMixture(3, reg_covar=least, random_state=0, max_iter=200)
    directions = detectors["mixture"].tensors["directions"].double()
    centre = z.mean(0)
    reference.fit(((z - centre) @ directions.T).numpy())
    wanted = -reference.score_samples(((odd - centre) @ directions.T).numpy())
    np.testing.assert_allclose(alone(detectors["mixture"], images()), wanted, rtol=2e-2, atol=0.05)


def test_neighbours_are_those_of_scikit_learn(pieces):
    detectors, z, odd = pieces
    covariance = np.cov(z.numpy().T) + 1e-3 * np.trace(np.cov(z.numpy().T)) / 5 * np.eye(5)
    white = np.linalg.cholesky(np.linalg.inv(covariance))
    distance, _ = NearestNeighbors(n_neighbors=5).fit(z.numpy() @ white).kneighbors(odd.numpy() @ white)
    np.testing.assert_allclose(alone(detectors["neighbors"], images()), distance.mean(1), rtol=1e-3)


def test_errors_and_bounds_are_those_of_the_model(pieces):
    detectors, _, _ = pieces
    model = detectors["bound"].model.eval()
    x = torch.from_numpy(np.stack(images())).float()[:, None] / 255
    with torch.no_grad():
        errors = [(model(row[None]).reconstruction - row).square().sum().log().item() for row in x]
        bounds = [sum(term.item() for term in model(row[None]).losses.values()) for row in x]
    np.testing.assert_allclose(alone(detectors["reconstruction"], images()), errors, rtol=1e-4)
    np.testing.assert_allclose(alone(detectors["bound"], images()), bounds, rtol=1e-4)


@pytest.mark.parametrize("name", ["fashion-vae", "fashion-conv-ae", "fashion-denoising", "fashion-vqvae"])
def test_photographic_negatives_are_outliers(name, splits):
    detector = hf_ae.AnomalyDetector(ROOT / "model_cards" / name, contamination=0.1).fit(splits["train"])
    normal = list(splits["test"]["image"])
    negatives = [255 - np.asarray(image) for image in normal]
    scores = np.concatenate([detector.score_samples(normal), detector.score_samples(negatives)])
    found = detection_metrics(scores, np.arange(len(scores)) < len(normal))
    assert found["auroc"] > 0.97 and found["aupr"] > 0.97
    flagged = np.mean(detector.predict(normal) == -1)
    assert 0.05 < flagged < 0.17  # a tenth, of images that it was not fitted to
    assert np.mean(detector.predict(negatives) == -1) > 0.85


def test_conventions_of_scikit_learn(normal):
    detector = hf_ae.AnomalyDetector(make("autoencoder-mlp"))
    assert detector.fit(normal) is detector
    scores, data = detector.score_samples(images()), images()
    np.testing.assert_array_equal(detector.decision_function(data), scores - detector.offset_)
    np.testing.assert_array_equal(detector.predict(data) == 1, scores >= detector.offset_)
    assert set(detector.predict(list(normal["image"]))) == {1, -1} and scores.shape == (40,)


@pytest.mark.parametrize("kind", ["dataset", "list", "array", "tensor"])
def test_all_kinds_of_images_score_alike(kind, normal):
    detector = hf_ae.AnomalyDetector(make("vae-mlp")).fit(normal)
    some = normal.select(range(9))
    stack = np.stack([np.asarray(image) for image in some["image"]])[..., None]
    given = {"dataset": some, "list": list(some["image"]), "array": stack, "tensor": torch.from_numpy(stack)}[kind]
    np.testing.assert_allclose(detector.score_samples(given), detector.score_samples(some), atol=1e-4)


@pytest.mark.parametrize("name", ["vae-mlp", "autoencoder-conv", "denoising", "vqvae-ema"])
def test_saved_and_loaded_it_says_the_same(name, tmp_path):
    model = make(name).train()
    height, width = model.config.image_hw
    shape = (30, height, width, model.config.num_channels)
    data = list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    detector = hf_ae.AnomalyDetector(model, "reconstruction+gaussian+mixture+neighbors", num_neighbors=3).fit(data)
    assert model.training
    detector.save_pretrained(tmp_path)
    again = hf_ae.AnomalyDetector.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.predict(data), detector.predict(data))
    # distances of neighbours are small differences of large products: what is last in them differs by the threads
    np.testing.assert_allclose(again.score_samples(data), detector.score_samples(data), rtol=1e-3)
    assert (again.score, again.num_neighbors) == (detector.score, 3)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}


def test_the_map_shows_where_it_is(splits):
    detector = hf_ae.AnomalyDetector(ROOT / "model_cards" / "fashion-conv-ae").fit(splits["train"].select(range(500)))
    clean = np.stack([np.asarray(image) for image in splits["test"].select(range(50))["image"]])
    marked = clean.copy()
    marked[:, 3:7, 20:24] = 255 - marked[:, 3:7, 20:24]
    before, after = detector.anomaly_map(list(clean)), detector.anomaly_map(list(marked))
    assert before.shape == (50, 28, 28) and before.min() >= 0 and after.max() <= 1
    inside = np.zeros((28, 28), dtype=bool)
    inside[3:7, 20:24] = True
    more = (after - before).mean(0)
    assert more[inside].mean() > 10 * np.abs(more[~inside]).mean()


def test_figures_are_those_of_counted_pairs():
    rng = np.random.default_rng(0)
    normal = np.arange(60) < 40
    scores = rng.normal(size=60) + normal
    pairs = [(a > b) + (a == b) / 2 for a in scores[normal] for b in scores[~normal]]
    assert detection_metrics(scores, normal)["auroc"] == pytest.approx(np.mean(pairs))
    order = np.argsort(scores)
    right = np.cumsum(~normal[order])
    precision = [right[i] / (i + 1) for i in range(60) if not normal[order][i]]
    assert detection_metrics(scores, normal)["aupr"] == pytest.approx(np.mean(precision))
    for one_kind in (np.ones(60, bool), np.zeros(60, bool)):
        with pytest.raises(ValueError, match="only one kind"):
            detection_metrics(scores, one_kind)


def test_detectors_without_an_autoencoder(normal):
    x = torch.from_numpy(np.stack([np.asarray(image) for image in normal["image"]])).float()[:, None] / 255
    found = dict(rivals(x[:250], torch.cat([x[250:], 1 - x[250:]])))
    assert len(found) == 5
    for name, scores in found.items():
        assert detection_metrics(scores, np.arange(100) < 50)["auroc"] > 0.9, name


def test_bad_input_is_one_line(tmp_path, normal):
    model = make("autoencoder-mlp")
    for wrong, words in (
        (dict(score="density"), "score='density' is not known: join some of reconstruction"),
        (dict(score="bound"), "needs a variational autoencoder"),
        (dict(contamination=0), "must lie between 0 and 1"),
        (dict(num_neighbors=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            hf_ae.AnomalyDetector(model, **wrong)
    detector = hf_ae.AnomalyDetector(model)
    for call in (detector.predict, detector.score_samples):
        with pytest.raises(ValueError, match="call fit"):
            call(images())
    with pytest.raises(ValueError, match="call fit"):
        detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="too few"):
        detector.fit(images(9))
    with pytest.raises(ValueError, match="no column 'photo'"):
        detector.fit(normal, image_column="photo")
    with pytest.raises(ValueError, match="has no detector"):
        hf_ae.AnomalyDetector.from_pretrained(MODEL)
    detector.fit(normal).save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        hf_ae.AnomalyDetector.from_pretrained(tmp_path)


def test_the_command_line_fits_saves_scores_and_draws(tmp_path, capsys, splits):
    folder, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(MODEL, folder)
    data.mkdir()
    usual, kinds = splits["test"].select(range(20, 200)), splits["test"].features
    odd = [{**row, "image": Image.eval(row["image"], lambda v: 255 - v)} for row in splits["test"].select(range(20))]
    mixed = datasets.concatenate_datasets([usual, datasets.Dataset.from_list(odd, features=kinds)])
    mixed.to_parquet(data / "test-00000-of-00001.parquet")
    splits["train"].select(range(1000)).to_parquet(data / "train-00000-of-00001.parquet")
    words = ["anomaly", folder, "--dataset_name", data, "-o", tmp_path / "scores.parquet"]
    runs(*words)
    assert "Fitted and saved" in capsys.readouterr().out
    table = datasets.Dataset.from_parquet(str(tmp_path / "scores.parquet"))
    assert table.column_names == ["row", "score", "outlier", "label"] and table["label"] == mixed["label"]
    assert sum(np.array(table["score"]).argsort()[:20] >= 180) > 16 and sum(table["outlier"][180:]) > 16
    assert Image.open(tmp_path / "scores.png").size[0] > 500
    runs(*words[:-1], tmp_path / "again.csv")
    assert "Fitted" not in capsys.readouterr().out
    again = datasets.Dataset.from_csv(str(tmp_path / "again.csv"))
    np.testing.assert_allclose(again["score"], table["score"], rtol=1e-5)
    assert FILE in check_folder(folder)
    fails(capsys, [*words, "--score", "gaussian"], "write --refit")
    fails(capsys, [*words, "--train_split", "test"], "write --refit")
    fails(capsys, [*words, "--refit", "--score", "typicality"], "score='typicality' is not known")
    fails(capsys, [*words[:-1], tmp_path / "scores.txt"], "must end in .parquet, .csv or .json")
    fails(capsys, [*words, "--refit", "--train_split", "dev"], "no split 'dev'")


def test_a_folder_without_splits_is_judged_by_itself_and_says_so(tmp_path, capsys, splits):
    folder, photos = tmp_path / "model", tmp_path / "photos"
    shutil.copytree(MODEL, folder)
    photos.mkdir()
    for i in range(40):
        splits["test"][i]["image"].save(photos / f"photo-{i:02}.png")
    runs("anomaly", folder, "--dataset_name", photos, "-o", tmp_path / "scores.csv")
    assert "Fitted to the rows it judges" in capsys.readouterr().out and not (folder / FILE).exists()
    files = datasets.Dataset.from_csv(str(tmp_path / "scores.csv"))["file"]
    assert [file.split("/")[-1] for file in files] == [f"photo-{i:02}.png" for i in range(40)]


def test_evaluate_tells_another_dataset_from_the_normal_images(tmp_path):
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[32], latent_dim=8))
    model.save_pretrained(tmp_path / "model")
    image_processor_for(model).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 255, (60, 28, 28), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(x) for x in noise]})
    (tmp_path / "noise").mkdir()
    rows.to_parquet(tmp_path / "noise" / "test-00000-of-00001.parquet")
    how = dict(tasks="anomaly", max_images=60)
    found = evaluate(tmp_path / "model", str(SAMPLE), outliers=str(tmp_path / "noise"), **how)["anomaly"]
    assert found["images"] == 120 and found["detectors"]["PCA, error"]["auroc"] > 0.99
    assert {"this model", "PCA, error", "isolation forest"} <= set(found["detectors"])
    found = evaluate(tmp_path / "model", str(SAMPLE), normal_class="Bag", replace=True, tasks="anomaly")["anomaly"]
    assert re.search(r"isolation forest +auroc 0\.\d+  aupr 0\.", summary({"anomaly": found}))
    assert found["outliers"] == "not Bag" and found["images"] == 500
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Outliers (not Bag)" in card and "![The most unusual" in card and "--normal_class Bag" in card
