"""Probes and units, beside definitions and codes whose answer is known."""

import numpy as np
import pytest
import torch
from command_line import fails
from conftest import SAMPLE

import hf_ae
from hf_ae.evaluation.evaluate import evaluate
from hf_ae.evaluation.representation import best_f1, nearest, probes, selectivity, spread_labels, units, wilson
from hf_ae.loading import image_processor_for


def grouped(count: int, classes: int = 3, spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values around a corner for each class, and the classes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return np.eye(classes)[labels] + spread * generator.standard_normal((count, classes)), labels


def test_probes_find_what_is_there_and_nothing_in_noise():
    (train, labels), (test, wanted) = grouped(300), grouped(90, seed=1)
    found = probes(train, labels, test, wanted)
    for name in ("linear_probe", "neighbors", "precision", "few_labels", "spread"):
        assert found[name] == pytest.approx(1, abs=0.01), name
    noise = np.random.default_rng(0).standard_normal((1200, 4))
    nothing = probes(noise[:300], labels, noise[300:], np.arange(900) % 3)
    assert nothing["linear_probe"] < 0.45 and nothing["precision"] == pytest.approx(1 / 3, abs=0.03)
    low, high = found["linear_probe_interval"]
    assert low < 1 and high == pytest.approx(1)


def test_labels_spread_along_a_ring_where_a_line_cannot_tell():
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 400)
    labels = np.arange(400) % 2
    rings = (1 + 2 * labels[:, None]) * np.stack([np.cos(angle), np.sin(angle)], 1)
    draws = [np.concatenate([np.flatnonzero(labels[:300] == c)[:10] for c in (0, 1)])]
    (accuracy,) = spread_labels(rings[:300], labels[:300], rings[300:], labels[300:], draws)
    assert accuracy == 1


def test_wilson_is_the_interval_of_the_definition():
    from scipy.stats import binomtest

    expected = binomtest(83, 100).proportion_ci(method="wilson")
    assert wilson(0.83, 100) == pytest.approx([expected.low, expected.high], abs=1e-3)


def test_selectivity_and_f1_are_those_of_scikit_learn():
    from sklearn.metrics import f1_score, roc_auc_score

    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 6, (60, 3)).astype(float), generator.integers(0, 3, 60)  # with ties
    areas, scores = selectivity(values, labels), best_f1(values, labels)
    for unit in range(3):
        for label in range(3):
            area = roc_auc_score(labels == label, values[:, unit])
            assert areas[unit, label] == pytest.approx(max(area, 1 - area))
            tries = [
                f1_score(labels == label, sign * values[:, unit] >= threshold, zero_division=0)
                for sign in (1, -1)
                for threshold in sign * np.unique(values[:, unit])
            ]
            assert scores[unit, label] == pytest.approx(max(tries))


def test_grandmother_units_and_distributed_codes():
    one_hot, labels = grouped(300, classes=4, spread=0.05)
    found = units(one_hot, labels)
    assert found["grandmother_units"] == 4 and found["units_a_class_needs"] == 1
    turned = one_hot @ np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    found = units(turned, labels)
    assert found["grandmother_units"] == 0 and found["units_a_class_needs"] >= 2
    sparse = np.where(np.arange(8) == labels[:, None], 1.0, 0.0)
    assert units(sparse, labels)["active"] == pytest.approx(1 / 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[64], latent_dim=8))
    model.save_pretrained(folder)
    image_processor_for(model).save_pretrained(folder)
    return folder


def test_evaluate_keeps_the_figures_and_the_card_tells_them(model, capsys):
    found = evaluate(model, str(SAMPLE), tasks="representation", max_images=60)
    assert set(found["representation"]["values"]) == {"latents", "pixels", "PCA, 8"}
    card = (model / "README.md").read_text()
    assert "10 labels a class" in card and "PCA, 8" in card and "--tasks representation" in card
    assert "linear probe" in card
    command = ["evaluate", model, "--dataset_name", SAMPLE, "--tasks", "representation"]
    fails(capsys, [*command, "--label_column", "kind"], "There is no column 'kind'")
    fails(capsys, [*command, "--train_split", "dev"], "there is no other split 'dev'")


def test_one_class_only_has_one_line(model, tmp_path, capsys):
    import datasets

    for split in ("train", "test"):
        rows = datasets.load_dataset(str(SAMPLE))[split].select(range(40)).remove_columns("label")
        rows = rows.add_column("label", [0] * len(rows))
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    command = ["evaluate", model, "--dataset_name", tmp_path, "--tasks"]
    fails(capsys, [*command, "representation"], "holds one class only")
    fails(capsys, [*command, "anomaly", "--normal_class", "0"], "one kind")
    fails(capsys, [*command, "anomaly", "--normal_class", "7"], "There is no class '7'")
    fails(capsys, [*command, "anomaly"], "it needs outliers: write --outliers DATASET")


def test_nearest_rows_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    generator = np.random.default_rng(0)
    for offset in (0, 1000):  # far from the origin, too
        rows, others = (offset + generator.standard_normal((count, 20)) for count in (2500, 1100))
        found = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(rows).kneighbors(others, return_distance=False)
        assert (nearest(rows, others, 10) == found).mean() > 0.999
    assert nearest(rows[:3], others, 10).shape == (1100, 3)
