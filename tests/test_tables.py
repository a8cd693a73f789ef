"""Tables of numbers: trained by the script, reloaded, encoded and searched for outliers, in their own units."""

import shutil

import datasets
import numpy as np
import pandas
import pytest
import torch
from command_line import fails, runs
from sklearn.datasets import load_wine
from transformers import AutoImageProcessor, AutoModel

import hf_ae
from hf_ae import train
from hf_ae.data import open_dataset
from hf_ae.hub.push import check_folder

NAMES = ["alcohol", "hue", "proline", "magnesium"]
FLAGS = ["--max_train_steps", "300", "--learning_rate", "0.01", "--train_batch_size", "32"]


@pytest.fixture(scope="module")
def frame():
    wine = load_wine(as_frame=True)
    return (
        wine.data[NAMES]
        .assign(kind=wine.target, name=[f"wine {i}" for i in range(178)])
        .sample(frac=1, random_state=0)
    )


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    """A CSV file for each split."""
    folder = tmp_path_factory.mktemp("wine")
    frame[:140].to_csv(folder / "train.csv", index=False)
    frame[140:].to_csv(folder / "test.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("model") / "wine"
    words = ["--dataset_name", str(folder), "--output_dir", str(output), "--feature_columns", ",".join(NAMES), *FLAGS]
    train.main([*words, "--config_overrides", "latent_dim=3,hidden_sizes=[32]", "--validation_epochs", "10"])
    return output


def test_a_trained_folder_knows_its_columns_and_their_units(trained, frame):
    model, processor = AutoModel.from_pretrained(trained).eval(), AutoImageProcessor.from_pretrained(trained)
    assert (model.config.image_size, model.config.network, processor.feature_columns) == ([1, 4], "mlp", NAMES)
    np.testing.assert_allclose(processor.feature_means, frame[:140][NAMES].mean(), rtol=1e-9)
    held_out = frame[140:]
    inputs = processor(held_out, return_tensors="pt")
    with torch.no_grad():
        back = processor.postprocess(model(**inputs).reconstruction)
    error = np.square(back - held_out[NAMES]).mean() / held_out[NAMES].var(ddof=0)
    assert error.mean() < 0.3  # of the variance
    far = processor(np.full((1, 4), 1e9), return_tensors="pt").pixel_values
    assert far.max() == 10  # ten standard deviations


def test_the_card_shows_how_to_use_it_and_the_folder_can_be_pushed(trained):
    card = (trained / "README.md").read_text()
    assert "`alcohol`, `hue`, `proline`, `magnesium`" in card and "processor(table" in card and "image.png" not in card
    assert (
        "recipe.yaml" in check_folder(trained) and "feature_columns: alcohol" in (trained / "recipe.yaml").read_text()
    )


def test_rows_are_encoded_and_searched_for_outliers(trained, folder, tmp_path, frame, capsys):
    model, processor = AutoModel.from_pretrained(trained).eval(), AutoImageProcessor.from_pretrained(trained)
    runs("encode", trained, "--dataset_name", folder, "-o", tmp_path / "codes", "--keep_columns", "name,kind")
    codes = datasets.load_dataset(str(tmp_path / "codes"), cache_dir=tmp_path / "cache")
    with torch.no_grad():
        wanted = model.encode(processor(frame[140:], return_tensors="pt").pixel_values).latents
    np.testing.assert_allclose(codes["test"]["latents"], wanted, atol=1e-5)
    assert list(codes["test"]["name"]) == list(frame[140:]["name"]) and len(codes["train"]) == 140
    odd = frame[140:].copy()
    odd.loc[odd.index[:5], "proline"] = 40_000.0
    (tmp_path / "odd").mkdir()
    frame[:140].to_csv(tmp_path / "odd" / "train.csv", index=False)
    odd.to_csv(tmp_path / "odd" / "test.csv", index=False)
    runs("anomaly", trained, "--dataset_name", tmp_path / "odd", "-o", tmp_path / "scores.csv")
    assert not (tmp_path / "scores.png").exists()
    scores = pandas.read_csv(tmp_path / "scores.csv")
    assert set(scores["score"].nsmallest(5).index) == set(range(5)) and scores["outlier"][:5].all()
    assert list(scores["name"]) == list(odd["name"])
    detector = hf_ae.AnomalyDetector.from_pretrained(trained)
    np.testing.assert_allclose(detector.score_samples(odd), scores["score"], rtol=1e-3, atol=1e-3)
    fails(capsys, ["evaluate", trained, "--dataset_name", folder], "this model takes a table")
    (tmp_path / "narrow").mkdir()
    frame.drop(columns="hue").to_csv(tmp_path / "narrow" / "train.csv", index=False)
    words = ["--dataset_name", tmp_path / "narrow", "-o"]
    fails(
        capsys, ["encode", trained, *words, tmp_path / "narrow-codes"], "There is no column hue, which the model takes"
    )
    fails(
        capsys, ["anomaly", trained, *words, tmp_path / "scores.csv"], "There is no column hue, which the model takes"
    )


def test_a_folder_may_have_the_name_of_a_kind_of_dataset(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "csv")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    assert open_dataset("csv").column_names == open_dataset(str(folder)).column_names


def test_a_failed_encoding_leaves_its_folder_free(trained, tmp_path, frame, capsys):
    (tmp_path / "data").mkdir()
    words = ["encode", trained, "--dataset_name", tmp_path / "data", "-o", tmp_path / "codes"]
    frame.assign(hue=np.nan).to_csv(tmp_path / "data" / "train.csv", index=False)
    fails(capsys, words, "NaN or infinite")
    frame.to_csv(tmp_path / "data" / "train.csv", index=False)
    runs(*words)


def test_what_is_no_table_is_one_line(folder, tmp_path, capsys, frame):
    words = ["--dataset_name", str(folder), "--output_dir", str(tmp_path / "run"), *FLAGS]
    for more, said in (
        (["--feature_columns", "hue,acid"], "no column acid"),
        (["--feature_columns", "hue,name"], "The column 'name' holds no numbers"),
        (["--feature_columns", "hue", "--random_flip"], "random_flip is for images"),
        (["--feature_columns", "hue,proline", "--config_overrides", "network=conv"], "does not divide"),
    ):
        fails(capsys, [*words, *more], said, main=train.main)
    (tmp_path / "holes").mkdir()
    frame[:50].assign(hue=np.nan).to_csv(tmp_path / "holes" / "train.csv", index=False)
    words[1] = str(tmp_path / "holes")
    fails(capsys, [*words, "--feature_columns", "alcohol,hue"], "hue", "NaN or infinite", main=train.main)
