"""The prior over the codes of a VQ-VAE-2: exact probabilities, sampling, training, what it draws."""

import itertools

import pytest
import torch
from conftest import SAMPLE
from safetensors.torch import load_file
from transformers import AutoModel
from variants import make, pixels

import hf_ae
from hf_ae.hub.push import check_folder
from hf_ae.train import train
from hf_ae.train_prior import PriorArguments
from hf_ae.train_prior import train as train_prior


def tiny(classes=2, **fields):
    torch.manual_seed(0)
    fields = {**dict(image_size=8, hidden_sizes=[4], patch_size=4, latent_channels=4, codebook_size=3), **fields}
    prior = dict(prior_layers=2, prior_hidden_size=16, prior_heads=2, prior_classes=classes)
    model = hf_ae.VQVAE2Model(hf_ae.VQVAE2Config(**fields, **prior)).eval()
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_probabilities_of_all_codes_add_up_to_one():
    prior = tiny().prior
    rows = torch.tensor(list(itertools.product(range(3), repeat=5)))
    assert prior.lengths == [1, 4]
    for labels in (None, torch.ones(1, dtype=torch.int64)):
        each = torch.cat([prior(row[None], labels).loss[None] for row in rows])
        assert (-each.detach()).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_samples_follow_the_probabilities():
    """Frequencies of the first two codes in 4,000 samples, against the exact probabilities."""
    prior = tiny().prior
    drawn = prior.sample(4000, torch.ones(4000, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(list(itertools.product(range(3), repeat=5)))
    exact = torch.zeros(9)
    with torch.no_grad():
        probabilities = torch.cat(
            [-prior(row[None], torch.ones(1, dtype=torch.int64)).loss[None] for row in rows]
        ).exp()
    exact.index_add_(0, rows[:, 0] * 3 + rows[:, 1], probabilities)
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 4000
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2}, {"guidance_scale": 3.0}])
def test_sampling_with_kept_keys_and_values_is_sampling_without(options):
    prior, labels = tiny(image_size=[16, 12]).prior, torch.tensor([0, 1, 1])
    with_cache, without = (
        prior.sample(3, labels, **options, use_cache=use, generator=torch.Generator().manual_seed(0))
        for use in (True, False)
    )
    assert torch.equal(with_cache, without) and with_cache.shape == (3, 4 + 12)


def test_rows_hold_the_coarse_level_first_and_come_back():
    model = tiny(image_size=[16, 12])
    indices = model.encode(pixels(model)).indices
    row = model.prior.to_row(list(indices))
    assert torch.equal(row[:, :4], indices[0].flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(model.prior.to_levels(row), indices))


def test_generate_takes_names_and_seeds_and_refuses_what_it_cannot_draw(tmp_path):
    model = tiny()
    model.config.id2label = {0: "shirt", 1: "Sneaker"}
    images = model.generate(5, labels=["sneaker", 0], seed=3, temperature=0.8, top_k=2, guidance_scale=2.0)
    again = model.generate(5, [1, 0], 0.8, 2, 2.0, generator=torch.Generator().manual_seed(3))
    assert images.shape == (5, 1, 8, 8) and torch.equal(images, again)
    assert model.generate(labels=[0, 1, 1]).shape[0] == 3 and model.generate().shape[0] == 1
    for bad, words in (
        ({"labels": [2]}, "Sneaker"),
        ({"labels": "boot"}, "boot"),
        ({"temperature": 0}, "temperature"),
        ({"n": 0}, "n=0"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(**bad)
    with pytest.raises(ValueError, match="no classes"):
        tiny(classes=0).generate(2, labels=[0])
    with pytest.raises(ValueError, match=r"hf_ae.train_prior"):
        make("vqvae-ema").generate(2)


def test_model_with_its_prior_reloads_also_in_bf16(tmp_path):
    """test_models.py loads one where hf_ae is not installed."""
    model = tiny()
    model.save_pretrained(tmp_path)
    images = model.generate(3, [0, 1], seed=0)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).generate(3, [0, 1], seed=0), images)
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).generate(3, [0, 1], seed=0).isfinite().all()


def test_prior_trains_resumes_bitwise_and_learns_the_classes(train_args, tmp_path, capsys):
    """Through the scripts: a VQ-VAE-2, then its prior, cut off and resumed; the AE's weights stay as they are."""
    fields = "hidden_sizes=[8],patch_size=4,latent_channels=8,codebook_size=16"
    train(train_args(model_type="hf_ae_vqvae2", config_overrides=fields, max_train_steps=10, save_dtype="float16"))

    def prior_args(folder, **values):
        defaults = dict(
            model=str(tmp_path / "run"), dataset_name=str(SAMPLE), output_dir=str(tmp_path / folder),
            max_train_samples=200, max_eval_samples=20, train_batch_size=20, max_train_steps=8, validation_epochs=0,
            lr_scheduler="constant", prior_overrides="prior_layers=1,prior_hidden_size=32", random_flip=True,
            use_ema=True, save_dtype="float16",
        )  # fmt: skip
        return PriorArguments(**{**defaults, **values})

    train_prior(prior_args("whole", validation_epochs=1))
    train_prior(prior_args("cut", max_train_steps=4, checkpointing_steps=4))
    (tmp_path / "cut" / "model.safetensors").unlink()
    train_prior(prior_args("cut", resume_from_checkpoint="latest"))
    start, whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert all(torch.equal(start[k], whole[k]) for k in start) and any(k.startswith("prior.") for k in whole)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"recipe.yaml", "recipe-prior.yaml", "samples.png", "modeling_code_prior.py", "README.md"} <= files
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "model.generate" in card and "hf_ae.train_prior" in card
    check_folder(tmp_path / "whole")
    model = AutoModel.from_pretrained(tmp_path / "whole")
    assert model.config.prior_classes == 10 and model.generate(2, labels=["Sneaker"], seed=0).shape == (2, 1, 28, 28)
    for bad, words in (
        (dict(model=None), "--model"),
        (dict(prior_overrides="layers=2"), "prior_layers"),
        (dict(label_column="x"), "no column 'x': write --label_column with one of image, label"),
    ):
        with pytest.raises(ValueError, match=words):
            train_prior(prior_args("bad", **bad))


def test_prior_learns_what_a_class_looks_like():
    model = tiny()
    codes, labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 0, 1]]).repeat(8, 1), torch.tensor([0, 1]).repeat(8)
    optimizer = torch.optim.Adam(model.prior.parameters(), 1e-2)
    for _ in range(60):
        loss = model.prior(codes, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.prior.sample(16, labels, generator=torch.Generator().manual_seed(0)), codes)
