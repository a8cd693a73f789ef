"""The transformer of scikit-learn: its own estimator checks, tables in their units, pictures, and what is saved."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from transformers import AutoImageProcessor, AutoModel

from hf_ae.sklearn import AutoencoderTransformer

QUICK = dict(max_steps=60, random_state=0)


@parametrize_with_checks(
    [
        AutoencoderTransformer(max_steps=20, random_state=0),
        AutoencoderTransformer(latent_dim=2, model_type="hf_ae_vae", max_steps=20, random_state=0),
    ]
)
def test_the_checks_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.fixture(scope="module")
def table():
    return load_wine(return_X_y=True)


def test_a_linear_autoencoder_finds_the_principal_components(table):
    """Without activations and with enough steps its error is that of PCA on standardised columns."""
    x = (table[0] - table[0].mean(0)) / table[0].std(0)
    pca = PCA(3).fit(x)
    error = np.square(pca.inverse_transform(pca.transform(x)) - x).sum(1)
    linear = AutoencoderTransformer(3, hidden_sizes=[], max_steps=1500, learning_rate=0.01, random_state=0)
    found = -linear.fit(table[0]).score_samples(table[0])
    assert found.mean() == pytest.approx(error.mean(), rel=0.02) and np.corrcoef(found, error)[0, 1] > 0.99
    back = linear.inverse_transform(linear.transform(table[0]))
    np.testing.assert_allclose(np.square((back - table[0]) / table[0].std(0)).sum(1), found, rtol=1e-6)


def test_units_and_constant_columns(table):
    x = np.concatenate([table[0] * 1000 + 5e4, np.full((len(table[0]), 1), 7.0)], 1)
    one = AutoencoderTransformer(4, **QUICK).fit(x)
    same = AutoencoderTransformer(4, **QUICK).fit(np.concatenate([table[0], np.zeros((len(x), 1))], 1))
    np.testing.assert_allclose(one.transform(x), same.transform(np.c_[table[0], np.zeros(len(x))]), atol=1e-5)
    back = one.inverse_transform(one.transform(x))
    assert back.shape == x.shape and np.abs(back.mean(0) / x.mean(0) - 1).max() < 0.1


def test_in_a_pipeline_a_grid_and_cloned(table):
    x, y = table
    steps = make_pipeline(AutoencoderTransformer(**QUICK), LogisticRegression(max_iter=1000))
    assert cross_val_score(steps, x, y, cv=3).mean() > 0.85
    search = GridSearchCV(steps, {"autoencodertransformer__latent_dim": [1, 6]}, cv=3).fit(x, y)
    assert search.best_params_["autoencodertransformer__latent_dim"] == 6
    copy = clone(steps[0]).set_params(latent_dim=3)
    assert copy.fit_transform(x).shape == (178, 3)
    assert list(copy.get_feature_names_out()) == [f"autoencodertransformer{i}" for i in range(3)]
    by_error = GridSearchCV(AutoencoderTransformer(**QUICK), {"latent_dim": [1, 8]}, cv=3).fit(x)
    assert by_error.best_params_["latent_dim"] == 8


def test_odd_rows_score_less():
    x = load_breast_cancer().data
    model = AutoencoderTransformer(6, max_steps=300, random_state=0).fit(x)
    shuffled = np.stack([np.random.default_rng(i).permutation(column) for i, column in enumerate(x.T)], 1)
    assert np.median(model.score_samples(shuffled)) < np.quantile(model.score_samples(x), 0.1)
    assert model.score(x) == pytest.approx(model.score_samples(x).mean())


@pytest.mark.parametrize("model_type", ["hf_ae_autoencoder", "hf_ae_denoising", "hf_ae_vae", "hf_ae_beta_vae"])
def test_variants_and_the_callers_random_numbers(model_type, table):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = dict(objective="factor") if model_type == "hf_ae_beta_vae" else None
    model = AutoencoderTransformer(4, model_type=model_type, config=config, **QUICK)
    first, again = model.fit_transform(table[0]), clone(model).fit(table[0]).transform(table[0])
    np.testing.assert_array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["list", "gray array", "colour array"])
def test_pictures(kind):
    rng = np.random.default_rng(0)
    array = np.repeat(np.repeat(rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8), 4, 1), 4, 2)
    given = {
        "list": [Image.fromarray(a) for a in array], "gray array": array[..., 0], "colour array": array
    }[kind]  # fmt: skip
    model = AutoencoderTransformer(12, max_steps=200, random_state=0).fit(given)
    latents = model.transform(given)
    assert latents.shape == (40, 12) and model.model_.config.network == "conv"
    back = model.inverse_transform(latents)
    wanted = (array[..., :1] if kind == "gray array" else array) / 255
    assert back.shape == wanted.shape
    assert np.square(back - wanted).mean() < 0.8 * np.square(wanted - wanted.mean(0)).mean()
    with pytest.raises(ValueError, match="fitted to pictures, and is given a table"):
        model.transform(np.zeros((3, 768)))


def test_what_is_saved_is_a_model_with_its_standardisation(table, tmp_path):
    import pandas

    x = pandas.DataFrame(table[0], columns=load_wine().feature_names)
    fitted = AutoencoderTransformer(5, **QUICK).fit(x)
    fitted.model_.save_pretrained(tmp_path)
    fitted.processor_.save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.feature_columns == list(x.columns)
    for rows in (x, x.to_numpy(), x.to_dict("list"), x.to_dict("records"), x[x.columns[::-1]]):
        values = processor(rows, return_tensors="pt").pixel_values
        with torch.no_grad():
            np.testing.assert_allclose(model.encode(values).latents, fitted.transform(x), atol=1e-4)
    np.testing.assert_allclose(processor.postprocess(values), x, rtol=1e-4)
    for wrong, words in (
        (x.drop(columns="hue"), "lacks the columns hue"),
        (x.assign(hue=np.nan), r"NaN or infinite values \(hue\)"),
        (x.to_numpy()[:, :4], r"shape \(178, 4\) has not the columns"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(model_type="bert"), "model_type='bert' is not one of hf_ae's"),
        (dict(model_type="hf_ae_nothing"), "hf_ae_nothing"),
        (dict(latent_dim=0), "latent_dim=0 must be positive"),
        (dict(max_steps=0), "max_steps and batch_size must be at least 1"),
        (dict(config={"latent_dims": 3}), "did you mean 'latent_dim'"),
        (dict(device="tpu"), "device='tpu' is not known"),
    ],
)
def test_bad_options_are_one_line_when_fitted(options, words, table):
    with pytest.raises(ValueError, match=words) as caught:
        AutoencoderTransformer(**options).fit(table[0])
    assert "\n" not in str(caught.value)
