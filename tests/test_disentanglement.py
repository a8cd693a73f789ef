"""Scores of disentanglement beside independent references, the sprites whose factors are known, and FactorVAE."""

import math

import datasets
import numpy as np
import pytest
import torch
from command_line import fails, runs
from scipy import stats
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from variants import make

import hf_ae
from hf_ae import disentanglement
from hf_ae.data.sprites import LARGEST, SHAPES, SIDE, sprites, stamp
from hf_ae.evaluation.evaluate import evaluate
from hf_ae.loading import image_processor_for
from hf_ae.models.discriminators import LatentDiscriminator, discriminator_loss, permuted

SIZES = (3, 6, 5)
SCORES = ("mig", "sap", "dci", "factor_vae_score", "beta_vae_score")


@pytest.fixture(scope="module")
def factors():
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(size, size=600) for size in SIZES], 1)


@pytest.fixture(scope="module")
def mixed(factors):
    """Latents that each follow several factors, with noise."""
    rng = np.random.default_rng(1)
    return factors @ rng.normal(size=(3, 4)) + 0.5 * rng.normal(size=(len(factors), 4))


@pytest.mark.parametrize("score", SCORES)
def test_perfect_and_useless_codes(score, factors):
    function, noise = getattr(disentanglement, score), np.random.default_rng(2).normal(size=(len(factors), 4))
    chance = 1 / 3 if score in ("factor_vae_score", "beta_vae_score") else 0.0
    perfect = np.concatenate([noise[:, :1], factors[:, ::-1] * [-1.0, 0.5, 3.0]], 1)  # in any order, scale and sign
    assert function(perfect, factors) > 0.95
    assert abs(function(noise, factors) - chance) < 0.06
    perfect, factors = perfect[:100], factors[:100]
    found = function(perfect, factors)
    assert function(perfect, np.concatenate([factors, np.ones_like(factors)], 1)) == found
    assert function(torch.from_numpy(perfect), torch.from_numpy(factors)) == found


def test_two_copies_of_a_perfect_code_leave_no_gap(factors):
    twice = np.concatenate([factors, factors], 1)
    assert disentanglement.mig(twice, factors) == pytest.approx(0, abs=1e-9)
    assert disentanglement.sap(twice, factors) == pytest.approx(0, abs=1e-9)


def test_mig_against_scikit_learn(mixed, factors):
    gaps = []
    for factor in factors.T:
        bins = [np.digitize(z, np.histogram(z, 20)[1][:-1]) for z in mixed.T]
        first, second = sorted((mutual_info_score(b, factor) for b in bins), reverse=True)[:2]
        gaps.append((first - second) / stats.entropy(np.bincount(factor)))
    assert disentanglement.mig(mixed, factors) == pytest.approx(np.mean(gaps), abs=1e-6)


def test_sap_against_correlations(mixed, factors):
    r2 = np.corrcoef(mixed.T, factors.T)[:4, 4:] ** 2
    first, second = np.sort(r2, 0)[[-1, -2]]
    assert disentanglement.sap(mixed, factors) == pytest.approx(np.mean(first - second), abs=1e-6)


def test_dci_against_its_definition(mixed, factors):
    train, test = disentanglement.split_rows(len(mixed), 0)
    assert len(set(train) | set(test)) == len(train) + len(test) == len(mixed)
    trees = [GradientBoostingClassifier(random_state=0).fit(mixed[train], f[train]) for f in factors.T]
    importance = np.stack([model.feature_importances_ for model in trees], 1)
    wanted = {
        "disentanglement": np.average([1 - stats.entropy(r, base=3) for r in importance], weights=importance.sum(1)),
        "completeness": np.average([1 - stats.entropy(c, base=4) for c in importance.T], weights=importance.sum(0)),
        "informativeness": np.mean([m.score(mixed[test], f[test]) for m, f in zip(trees, factors.T)]),
    }
    assert disentanglement.dci_scores(mixed, factors) == pytest.approx(wanted, abs=1e-6)


def drawn(factors, draw):
    """What `draw` gives for each factor, with the random numbers of a score, to fit and to test on."""
    groups, rng, parts = [disentanglement.Groups(f) for f in factors.T], np.random.default_rng(0), []
    for total in disentanglement.VOTES:
        counts = [total // 3 + (i < total % 3) for i in range(3)]
        parts.append([draw(group, count, rng) for group, count in zip(groups, counts)])
    return parts


def test_factor_vae_score_against_a_plain_loop(mixed, factors):
    tables = []
    for part in drawn(factors, lambda group, count, rng: group.batches(count, rng)):
        table = np.zeros((4, 3))
        for factor, batches in enumerate(part):
            for rows in batches[:200]:
                assert len(set(factors[rows, factor])) == 1
            for rows in batches:
                table[np.argmin(np.var(mixed[rows], axis=0) / np.var(mixed, axis=0)), factor] += 1
        tables.append(table)
    fitted, tested = tables
    right = sum(tested[latent, np.argmax(fitted[latent])] for latent in range(4)) / tested.sum()
    assert disentanglement.factor_vae_score(mixed, factors) == pytest.approx(right, abs=1e-6)


def test_beta_vae_score_against_scikit_learn(mixed, factors):
    train, test = drawn(factors, lambda group, count, rng: group.differences(mixed, count, rng))
    labels = [np.repeat([0, 1, 2], [len(part) for part in parts]) for parts in (train, test)]
    train, test = np.concatenate(train), np.concatenate(test)
    machine = LogisticRegression(max_iter=1000, random_state=0).fit(train / train.std(0), labels[0])
    wanted = machine.score(test / train.std(0), labels[1])
    assert disentanglement.beta_vae_score(mixed, factors) == pytest.approx(
        wanted, abs=1e-3
    )  # a few of 5,000 lie on the edge


def test_pairs_share_their_factor(factors):
    group, rng = disentanglement.Groups(factors[:, 1]), np.random.default_rng(0)
    values = factors[rng.integers(len(factors), size=(50, 64)), 1]
    rows = group.rows(values, rng)
    assert (factors[rows, 1] == values).all() and len(np.unique(rows)) > 550


@pytest.mark.parametrize(
    ("latents", "factors", "message"),
    [
        (np.zeros((5, 2)), np.zeros((4, 1)), r"shapes \(5, 2\) and \(4, 1\)"),
        (np.zeros(5), np.zeros(5), "shapes"),
        (np.full((6, 2), np.nan), np.arange(6)[:, None] % 2, "not finite"),
        (np.zeros((6, 2)), np.zeros((6, 2)), "No factor varies"),
        (np.zeros((6, 2)), np.linspace(0, 1, 6)[:, None], "Factor 0 has 6 values in 6 rows"),
    ],
)
def test_what_does_not_fit_is_one_line(latents, factors, message):
    for score in SCORES:
        with pytest.raises(ValueError, match=message) as caught:
            getattr(disentanglement, score)(latents, factors)
        assert "\n" not in str(caught.value)


def test_one_factor_alone_cannot_come_apart(mixed, factors):
    for score in ("dci", "factor_vae_score", "beta_vae_score"):
        with pytest.raises(ValueError, match="only one varies"):
            getattr(disentanglement, score)(mixed, factors[:, :1])


# Sprites


@pytest.fixture(scope="module")
def rows():
    return sprites(scales=2, orientations=4, positions=3)


def test_sprites_hold_every_combination_once(rows):
    columns = ["shape", "scale", "orientation", "x", "y"]
    seen = list(zip(*(rows[name] for name in columns)))
    assert len(seen) == len(set(seen)) == 3 * 2 * 4 * 3 * 3
    assert seen != sorted(seen)  # the first rows are a sample
    assert sprites(scales=2, orientations=4, positions=3)["x"] == rows["x"]
    assert sprites(scales=2, orientations=4, positions=3, seed=1)["x"] != rows["x"]
    assert rows.features["shape"].names == list(SHAPES)


def test_factors_do_what_they_say(rows):
    places = np.linspace(0, SIDE - 2 * LARGEST, 3).round() + LARGEST
    areas = {}
    for row in rows:
        pixels = np.asarray(row["image"].convert("L"))
        assert pixels.shape == (SIDE, SIDE) and set(np.unique(pixels)) == {0, 255}
        height, width = np.nonzero(pixels)
        slack = 0.2 * LARGEST  # a heart's middle is not its centre of mass
        assert abs(width.mean() + 0.5 - places[row["x"]]) < slack
        assert abs(height.mean() + 0.5 - places[row["y"]]) < slack
        areas.setdefault((row["shape"], row["scale"]), []).append(len(width))
    for shape in range(3):
        small, large = np.mean(areas[shape, 0]), np.mean(areas[shape, 1])
        assert large / small == pytest.approx(4, rel=0.17)  # twice the size, in whole pixels


def test_a_quarter_turn_is_clockwise_and_no_angle_comes_twice():
    heart = [stamp("heart", 1.0, 2 * math.pi * k / 40) for k in range(40)]
    assert len({image.tobytes() for image in heart}) == 40
    assert np.mean(heart[10] != np.rot90(heart[0], -1)) < 0.01
    assert heart[0][LARGEST - 8 : LARGEST].sum() > heart[0][LARGEST : LARGEST + 8].sum()  # upright: broad above


def test_colored_sprites_are_independent_of_their_colour():
    rows = sprites(colored=True, scales=1, orientations=1, positions=2)
    assert len(rows) == 3 * 2 * 2 * 6
    for row in rows:
        pixels = np.asarray(row["image"].convert("RGB")).reshape(-1, 3)
        colours = np.unique(pixels, axis=0)
        assert len(colours) == 2 and tuple(colours[0]) == (0, 0, 0)
    assert len({(r["shape"], r["x"], r["y"], r["color"]) for r in rows}) == len(rows)


@pytest.mark.parametrize("wrong", [dict(positions=0), dict(positions=40), dict(scales=0), dict(orientations=-1)])
def test_sprites_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must"):
        sprites(**wrong)


# FactorVAE


def test_the_discriminator_tells_the_total_correlation():
    """Of a Gaussian with correlation r it is -½ log(1 - r²)."""
    torch.manual_seed(0)
    factor, net = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]])), LatentDiscriminator(2, width=64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(300):
        z = torch.randn(512, 2) @ factor.T
        loss = discriminator_loss("non_saturating", net(z), net(permuted(z)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = net(torch.randn(20_000, 2) @ factor.T).mean().item()
    assert found == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.06)


def test_permuting_keeps_each_value_on_its_own():
    z = torch.randn(200, 3)
    mixed = permuted(z, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(0).values, z.sort(0).values)
    assert torch.corrcoef(torch.stack([z[:, 0], mixed[:, 0]]))[0, 1].abs() < 0.2


def test_each_term_of_a_factor_vae_trains_its_own_part():
    model = make("beta-vae-factor").train()
    for name, reached, others in (
        ("total_correlation", model.encoder, [model.discriminator, model.decoder]),
        ("discriminator", model.discriminator, [model.encoder, model.decoder]),
    ):
        model.zero_grad()
        model(torch.rand(16, 1, 28, 28)).losses[name].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reached.parameters())
        assert all(p.grad is None or p.grad.abs().sum() == 0 for part in others for p in part.parameters())


def test_a_factor_vae_needs_vector_latents():
    with pytest.raises(ValueError, match="objective='factor' needs vector latents"):
        hf_ae.BetaVAEConfig(objective="factor", network="conv", hidden_sizes=[4], latent_channels=2)


def test_the_command_line_generates_what_load_dataset_reads(tmp_path, monkeypatch, capsys):
    small = sprites(scales=1, orientations=2, positions=2)
    monkeypatch.setattr("hf_ae.data.sprites.sprites", lambda colored: small)
    runs("sprites", "-o", tmp_path / "sprites")
    read = datasets.load_dataset(str(tmp_path / "sprites"), split="train", cache_dir=tmp_path / "cache")
    assert read.features == small.features and read["x"] == small["x"]
    fails(capsys, ["sprites", "-o", tmp_path / "sprites"], "is there already")


def test_evaluate_scores_the_factors_of_a_dataset_and_draws_traversals(tmp_path, capsys):
    rows = sprites(scales=3, orientations=4, positions=5)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    torch.manual_seed(0)
    config = dict(image_size=32, network="conv", hidden_sizes=[4, 8], latent_dim=3)
    model = hf_ae.BetaVAEModel(hf_ae.BetaVAEConfig(**config))
    model.save_pretrained(tmp_path / "model")
    image_processor_for(model).save_pretrained(tmp_path / "model")
    how = dict(tasks="disentanglement", factor_columns="shape,x,y", max_images=600)
    found = evaluate(tmp_path / "model", str(tmp_path / "data"), **how)["disentanglement"]
    assert found["factors"] == ["shape", "x", "y"] and found["images"] == 600
    assert all(0 <= found[name] <= 1 for name in ("mig", "sap", "disentanglement", "factor_vae_score"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "MIG" in card and "![What each latent changes" in card
    assert (tmp_path / "model" / "traversals.png").stat().st_size > 1000
    command = ["evaluate", tmp_path / "model", "--dataset_name", tmp_path / "data", "--tasks", "disentanglement"]
    fails(capsys, [*command, "--factor_columns", "x,colour"], "no column 'colour'")
    fails(capsys, [*command, "--max_images", "20"], "20 images are too few")
