"""Training a discriminator that reads prompts: what it learns, exact resume, bad input."""

import os
import random

import datasets
import pytest
import torch
from command_line import fails
from PIL import Image
from tiny_pipelines import SIDE, bert, pipeline, pizza_pipeline, pizza_vae, vae_of_hf_ae

from hf_ae.diffusion.text_encoders import TextStates, text_states, tokenize
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train_discriminator import DiscriminatorArguments, main, read_pairs, train

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The folder of a pipeline of random models."""
    folder = tmp_path_factory.mktemp("pipe")
    save_pipeline(pipeline(text=bert, vae=vae_of_hf_ae), folder)
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A dataset of red and blue images; the last row of a split has no nearly right caption."""
    rows = []
    for i in range(64):
        color, other = list(COLORS)[:: 1 if i % 2 else -1]
        shade = tuple(min(255, value + i) for value in COLORS[color])
        wrong = [] if i == 63 else [f"a {other} cat"]
        rows.append({"image": Image.new("RGB", (SIDE, SIDE), shade), "text": f"a {color} cat", "wrong": wrong})
    folder = tmp_path_factory.mktemp("squares")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "wrong": datasets.List(datasets.Value("string"))}
    )
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def arguments(untrained, squares, tmp_path):
    def make(**values):
        sizes = "hidden_sizes=[8,16],num_heads=2,num_layers=1"
        defaults = dict(
            pretrained_pipeline=str(untrained), dataset_name=str(squares), output_dir=str(tmp_path / "run"),
            wrong_columns="wrong", discriminator_overrides=sizes, train_batch_size=16, learning_rate=3e-3,
            max_train_steps=4, validation_epochs=0,
        )  # fmt: skip
        return DiscriminatorArguments(**{**defaults, **values})

    return make


def test_it_learns_which_prompt_an_image_shows(arguments, tmp_path, capsys):
    train(arguments(max_train_steps=300, validation_epochs=25, use_ema=True, ema_decay=0.9))
    assert "accuracy" in capsys.readouterr().out
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    images = [Image.new("RGB", (SIDE, SIDE), color) for color in COLORS.values()]
    right = pipe.score(images, ["a red cat", "a blue cat"])
    wrong = pipe.score(images, ["a blue cat", "a red cat"])
    assert min(right) > 0.7 and max(wrong) < 0.3
    recipe = (tmp_path / "run" / "recipe-discriminator.yaml").read_text()
    assert "wrong_columns: wrong" in recipe
    assert "hf_ae.train_discriminator recipe-discriminator.yaml" in (tmp_path / "run" / "README.md").read_text()
    drawn = pipe("a red cat", seed=3, num_candidates=2)
    assert drawn.scores[0] >= pipe("a red cat", seed=3).scores[0]


def test_resumed_gives_bitwise_the_weights_of_an_uninterrupted_run(arguments, tmp_path):
    flags = dict(use_ema=True, optimizer="muon", checkpointing_steps=2, lr_scheduler="constant")
    train(arguments(output_dir=str(tmp_path / "whole"), max_train_steps=4, **flags))
    train(arguments(output_dir=str(tmp_path / "cut"), max_train_steps=2, **flags))
    os.rename(tmp_path / "cut" / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = dict(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    train(arguments(max_train_steps=4, **flags, **resume))
    cut, resumed, whole = (
        TextToImagePipeline.from_pretrained(tmp_path / name).discriminator.state_dict()
        for name in ("cut", "resumed", "whole")
    )
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert any(not torch.equal(resumed[k], cut[k]) for k in whole)


def test_it_trains_in_bfloat16(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_ae.training.precision.has_bf16", lambda device: True)
    train(arguments(mixed_precision="bf16"))
    assert TextToImagePipeline.from_pretrained(tmp_path / "run").discriminator is not None


def test_captions_of_the_same_image_are_never_wrong(untrained, squares, arguments):
    pipe, rows = TextToImagePipeline.from_pretrained(untrained), datasets.load_dataset(str(squares))["train"]
    pairs = read_pairs(arguments(), rows, pipe, None)
    generator = random.Random(0)
    for rows in (torch.tensor([1, 3, 5]), torch.tensor([0, 1, 2, 63])):
        _, states, labels = pairs.batch(rows, 0.5, generator)
        assert len(states) == len(labels) == 3 * len(rows)
        right, nearly, other = labels.chunk(3)
        assert right.all()
        if len(rows) == 3:  # three red images: the captions of the others are right, too
            assert other.all() and not nearly.any()
        else:  # the last has no nearly right caption: it gets that of the row before, which is of another colour
            assert (nearly.tolist() == [0, 0, 0, 0] and other.tolist() == [1, 1, 1, 1]) or not other.all()


def test_images_are_shown_as_they_are_or_reconstructed(untrained, squares, arguments):
    pipe, rows = TextToImagePipeline.from_pretrained(untrained), datasets.load_dataset(str(squares))["train"]
    pairs = read_pairs(arguments(), rows, pipe, None)
    for fraction in (0.0, 1.0):
        images, *_ = pairs.batch(torch.arange(5), fraction, random.Random(0))
        assert torch.equal(images, pairs.versions[int(fraction)][:5])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--wrong_columns", "wrongs"], "wrongs"),
        (["--pretrained_pipeline", "missing"], "neither a folder"),
        (["--discriminator_overrides", "hidden_sizes=[8],num_heads=3"], "num_heads"),
        (["--discriminator_overrides", "colour=3"], "colour"),
        (["--reconstructed", "2"], "reconstructed"),
        (["--train_batch_size", "2"], "at least 3"),
    ],
)
def test_bad_input_ends_with_one_line(flags, says, untrained, squares, tmp_path, capsys):
    common = ["--dataset_name", squares, "--output_dir", tmp_path / "run", "--pretrained_pipeline", untrained]
    fails(capsys, [*common, "--max_train_steps", "1", *flags], says, main=main)


def test_a_pipeline_with_a_prior_gets_none(squares, tmp_path, capsys):
    save_pipeline(pizza_pipeline(pizza_vae()), tmp_path / "pipe")
    common = ["--dataset_name", squares, "--output_dir", tmp_path / "run"]
    fails(capsys, [*common, "--pretrained_pipeline", tmp_path / "pipe"], "prior", main=main)


@pytest.mark.parametrize("kept", [2, 100])
def test_text_states_are_those_of_the_text_encoder_whether_they_are_kept_or_not(kept):
    encoder, tokenizer = bert()
    tokens = tokenize(tokenizer, ["a red cat", "a dog", "the blue hat", "a mat"], "cpu")
    with torch.no_grad():
        expected = text_states(encoder, **tokens).to(torch.float16)
    states = TextStates(encoder, tokens, keep=kept * 2 * tokens["input_ids"].shape[1] * 16)
    for index in ([3, 0, 3], [1, 0, 2, 3]):
        torch.testing.assert_close(states(torch.tensor(index)), expected[index], atol=2e-3, rtol=0)
    assert states.known.sum() == min(kept, 4)
