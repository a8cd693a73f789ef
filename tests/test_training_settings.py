"""What a training is told counts: on resume, in its losses, on the hardware and the processes that it finds."""

import os

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import fails
from conftest import SAMPLE
from processes import run_ranks
from safetensors.torch import load_file

import hf_ae
from hf_ae.data import ImagesInMemory, ImageStream, read_labels, to_pixel_values
from hf_ae.data.images import in_threads
from hf_ae.evaluation.evaluate import evaluate
from hf_ae.train import main, train, validate
from hf_ae.train_prior import encode_images
from hf_ae.training import precision
from hf_ae.training.arguments import TrainingArguments
from hf_ae.training.optimizers import KernelMuon, make_optimizers
from hf_ae.training.run import Run


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


# Going on with other settings


def test_a_rate_changed_on_resume_counts(train_args, tmp_path, capsys):
    """With weight decay too: a run that goes on with a rate of about 0 stays where it was."""
    train(train_args(checkpointing_steps=2, max_train_steps=2, lr_scheduler="constant"))
    first = weights(tmp_path / "run" / "checkpoint-2")
    capsys.readouterr()
    resume = dict(max_train_steps=4, lr_scheduler="constant", resume_from_checkpoint="latest")
    train(train_args(**resume, learning_rate=1e-30, weight_decay=0.5))
    said = capsys.readouterr().out
    assert "learning_rate 0.001 there and 1e-30 here" in said and "weight_decay 0.0 there and 0.5 here" in said
    assert all(torch.equal(first[k], value) for k, value in weights(tmp_path / "run").items())
    decayed = dict(resume, max_train_steps=3, output_dir=str(tmp_path / "decayed"))
    decayed["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-2")
    train(train_args(**decayed, learning_rate=0.1, weight_decay=1.0))
    kept = weights(tmp_path / "decayed")["encoder.to_code.weight"].norm() / first["encoder.to_code.weight"].norm()
    train(train_args(**{**decayed, "output_dir": str(tmp_path / "plain")}, learning_rate=0.1))
    plain = weights(tmp_path / "plain")["encoder.to_code.weight"].norm() / first["encoder.to_code.weight"].norm()
    assert kept < plain


def test_the_schedule_of_a_run_that_goes_on_is_its_own(train_args, tmp_path, monkeypatch):
    rates = []
    update = Run.update_weights

    def noting(run):
        rates.append([group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups])
        update(run)

    monkeypatch.setattr(Run, "update_weights", noting)
    train(train_args(checkpointing_steps=2, max_train_steps=2, lr_scheduler="constant"))
    resume = dict(resume_from_checkpoint="latest", lr_scheduler="linear", learning_rate=0.01, max_train_steps=5)
    train(train_args(**resume))
    assert rates[2:] == [[pytest.approx(0.01 * (5 - step) / 5)] for step in (2, 3, 4)]


def test_settings_that_cannot_change_on_resume_are_refused(train_args, tmp_path):
    train(train_args(checkpointing_steps=2))
    for change in (dict(optimizer="muon"), dict(pretrain_layerwise_epochs=1)):
        with pytest.raises(ValueError, match=f"cannot go on with other settings: {next(iter(change))}"):
            train(train_args(resume_from_checkpoint="latest", max_train_steps=6, **change))


def test_numbers_that_teach_nothing_are_refused():
    for bad in (dict(max_grad_norm=0.0), dict(ema_decay=1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainingArguments(**bad)
    fields = dict(hidden_sizes=[8], latent_dim=2, discriminator_channels=[4, 8])
    model = hf_ae.VAEGANModel(hf_ae.VAEGANConfig(**fields))
    rates = [o.param_groups[0]["lr"] for o in make_optimizers(model, TrainingArguments(discriminator_learning_rate=0))]
    assert rates == [1e-3, 0]


def test_a_discriminator_is_clipped_on_its_own(tmp_path):
    """However large its gradients are, those of the generator stay within the norm as they are."""
    fields = dict(hidden_sizes=[8], latent_dim=2, discriminator_channels=[4, 8])
    model = hf_ae.VAEGANModel(hf_ae.VAEGANConfig(**fields))
    run = Run(TrainingArguments(output_dir=str(tmp_path), max_grad_norm=1.0), Accelerator(cpu=True), model, 1, {})
    run.optimizers = []
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1e3 if name.startswith("discriminator") else 1e-4)
    run.update_weights()
    norms = [torch.cat([p.grad.flatten() for p in part]).norm() for part in run.parts]
    assert norms[1] == pytest.approx(1.0, rel=1e-4)
    assert all(p.grad.unique().tolist() == [pytest.approx(1e-4)] for p in run.parts[0])


# Losses and batches


def test_the_held_out_loss_of_a_denoiser_is_of_damaged_images(tmp_path, capsys):
    """A model that gives back what it sees has no loss on clean images; on damaged ones it is that of the damage."""
    config = hf_ae.DenoisingAutoencoderConfig(hidden_sizes=[8], latent_dim=4, corruption="gaussian")
    model = hf_ae.DenoisingAutoencoderModel(config)
    run = Run(TrainingArguments(output_dir=str(tmp_path)), Accelerator(cpu=True), model, 1, {})
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.full((6, 1, 28, 28), 128, dtype=torch.uint8)
    before = torch.get_rng_state()
    for _ in range(2):
        validate(run, pixels)
    clean = to_pixel_values(pixels, "cpu", (0.0, 1.0))
    assert (seen[0] - clean).abs().max() > 0.1 and torch.equal(seen[0], seen[len(seen) // 2])
    assert torch.equal(torch.get_rng_state(), before)
    lines = [line for line in capsys.readouterr().out.splitlines() if "reconstruction" in line]
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.parametrize("batch", [1, 3])
def test_all_symmetries_are_shown_equally_often_in_small_batches(batch):
    corner = torch.zeros(batch, 1, 4, 4, dtype=torch.uint8)
    corner[:, 0, 0, 1] = 255
    torch.manual_seed(0)
    shown = torch.cat([to_pixel_values(corner, "cpu", (0.0, 1.0), symmetry=True) for _ in range(2400 // batch)])
    places = shown.flatten(1).argmax(1).bincount(minlength=16)
    assert (places > 0).sum() == 8 and places[places > 0].min() > 230


def test_codes_of_a_prior_are_made_in_float32(train_args, tmp_path):
    torch.manual_seed(0)
    fields = dict(image_size=8, hidden_sizes=[8], latent_channels=8, codebook_size=512, prior_layers=1)
    model = hf_ae.VQVAE2Model(hf_ae.VQVAE2Config(**fields, patch_size=4, prior_hidden_size=16, prior_heads=2)).eval()
    pixels = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    (codes,) = encode_images(model, pixels, Accelerator(cpu=True, mixed_precision="bf16"))
    with torch.no_grad():
        indices = model.encode(to_pixel_values(pixels, "cpu", model.config.pixel_range)).indices
    assert torch.equal(codes.long(), model.prior.to_row(model.levels_of(indices)))


@pytest.mark.parametrize(
    "kind, train_classes, test_classes, numbers",
    [("string", ["cat", "dog", "eel"], ["eel", "dog"], [2, 1]), ("int64", [-1, 1, 3], [3, 1], [2, 1])],
)
def test_classes_have_one_number_in_all_splits(kind, train_classes, test_classes, numbers):
    features = datasets.Features({"c": datasets.Value(kind)})
    splits = {
        name: datasets.Dataset.from_dict({"c": values}, features=features)
        for name, values in (("train", train_classes), ("test", test_classes))
    }
    found = {name: read_labels(splits, name, "c") for name in splits}
    assert found["test"][0].tolist() == numbers and found["train"][1] == found["test"][1]
    assert found["train"][0].tolist() == [0, 1, 2]


def test_a_split_without_classes_is_not_numbered():
    splits = {name: datasets.Dataset.from_dict({"c": c}) for name, c in (("train", [0, 1]), ("test", [-1, -1]))}
    assert read_labels(splits, "train", "c")[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="'test' has rows without a class"):
        read_labels(splits, "test", "c")


@pytest.mark.parametrize("kind", ["uint8", "int64", "bool"])
@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_of_0_and_1_are_black_and_white(kind, streaming):
    """Unless other images of the column hold more: then these are nearly black."""
    processor = hf_ae.AutoencoderImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
    features = datasets.Features({"image": datasets.Array2D((8, 8), kind)})
    bits = np.random.default_rng(0).integers(0, 2, (6, 8, 8))

    def pixels(images):
        rows = datasets.Dataset.from_dict({"image": list(images.astype(kind))}, features=features)
        if streaming:
            return next(ImageStream(rows.to_iterable_dataset(), "image", processor, buffer_size=1).batches(6, 0))
        return ImagesInMemory.load(rows, "image", processor).pixels

    assert pixels(bits).unique().tolist() == [0, 255]
    if kind != "bool":
        bits[5, 0, 0] = 200
        assert pixels(bits).unique().tolist() == [0, 1, 200]


def test_rows_are_read_as_they_are_decoded_and_in_order():
    read = []

    def rows():
        for i in range(100_000):
            read.append(i)
            yield i

    done = in_threads(lambda i: i * 2, rows())
    assert [next(done) for _ in range(3)] == [0, 2, 4]
    assert len(read) <= 64 * (2 * (os.cpu_count() or 1) + 2)
    done.close()
    assert list(in_threads(lambda i: -i, range(1000))) == [-i for i in range(1000)]


# Precision and processes


@pytest.mark.parametrize("flags, used", [("sse2 avx2 avx512f", "float32"), ("avx2 avx512_bf16", "bfloat16")])
def test_bf16_is_used_on_cpus_that_have_it(flags, used, train_args, tmp_path, monkeypatch, capsys):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags} pge\n")
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    train(train_args(mixed_precision="bf16", optimizer="muon"))
    said = capsys.readouterr().out
    assert f"Precision: {used}" in said and f"; Muon in {used}." in said
    assert ("which this CPU has no instructions for" in said) == (used == "float32")
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    KernelMuon([weight], 1.0, 0.0).step()
    rounded = weight.detach() / (-0.2 * 6**0.5)  # what was orthogonalised
    assert torch.allclose(rounded, rounded.bfloat16().float(), rtol=1e-6, atol=0) == (used == "bfloat16")


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_plugins_that_split_the_model_are_refused(plugin, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    argv = ["--dataset_name", SAMPLE, "--output_dir", tmp_path / "run"]
    fails(capsys, argv, plugin, "not supported", main=main)


PROCESSES = """
import sys, torch
from accelerate import Accelerator
from datetime import timedelta
from hf_ae.data import num_batches
from hf_ae.training.arguments import TrainingArguments
from hf_ae.training.processes import on_main
from hf_ae.training.start import training

with training(TrainingArguments(output_dir=sys.argv[1])) as accelerator:
    group = torch.distributed.distributed_c10d._get_default_group()
    print("waits", group._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=12))
    for count in (1, 2):
        try:
            num_batches(count, 5, accelerator.num_processes)
            print(count, "are enough")
        except ValueError as error:
            print(error)
    def full():
        raise OSError(28, "No space left on device")
    try:
        on_main(accelerator, full)
    except (OSError, ValueError) as error:
        print("all end:", error)
    accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_wait_for_the_main_one_and_share_its_errors(tmp_path):
    (tmp_path / "program.py").write_text(PROCESSES)
    for said in run_ranks(2, tmp_path / "program.py", tmp_path):
        assert "waits True" in said and "1 images are too few for 2 processes" in said and "2 are enough" in said
        assert "all end: [Errno 28] No space left on device" in said


# Errors


def test_names_are_checked_before_images_are_decoded(train_args, tmp_path, capsys):
    """The training split is broken, which would be said first."""
    rows = datasets.load_dataset(str(SAMPLE), split="train[:9]").cast_column("image", datasets.Image(decode=False))
    rows = [{**row, "image": {"bytes": b"broken", "path": None}} for row in rows]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="no split 'foo'"):
        train(train_args(dataset_name=str(tmp_path / "data"), eval_split="foo", validation_epochs=1))
    with pytest.raises(ValueError, match="network='mlp'"):
        fields = "network=conv,hidden_sizes=[4],latent_dim=2"
        train(train_args(dataset_name=str(tmp_path / "data"), config_overrides=fields, pretrain_layerwise_epochs=1))
    train(train_args())
    with pytest.raises(ValueError, match="Row 0") as error:
        evaluate(tmp_path / "run", str(tmp_path / "data"))
    assert "skip_broken" not in str(error.value)


def test_recipes_that_are_no_text_and_overrides_that_are_no_yaml_are_named(capsys, tmp_path):
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x9c")
    fails(capsys, [tmp_path / "photo.yaml"], "photo.yaml", "no text", main=main)
    (tmp_path / "list.yaml").write_text("- learning_rate: 0.1\n")
    fails(capsys, [tmp_path / "list.yaml"], "holds no keys", main=main)
    fails(capsys, [tmp_path], "is a folder", main=main)
    flags = ["--dataset_name", SAMPLE, "--output_dir", tmp_path / "run"]
    fails(capsys, [*flags, "--config_overrides", "latent_dim={4"], "latent_dim={4", main=main)


def test_code_of_another_version_does_not_stay_in_the_folder(train_args, tmp_path):
    train(train_args(checkpointing_steps=4))
    run = tmp_path / "run"
    module = run / "modeling_autoencoder.py"
    module.write_text(module.read_text().replace("from .", "from .layers_of_old import nothing\nfrom .", 1))
    (run / "layers_of_old.py").write_text("nothing = None\n")
    (run / "dataset.py").write_text("# mine\n")
    train(train_args(resume_from_checkpoint="latest", max_train_steps=5, lr_scheduler="constant"))
    assert not (run / "layers_of_old.py").exists() and (run / "dataset.py").exists()


def test_colours_that_a_gray_model_loses_are_said(train_args, tmp_path, capsys):
    import datasets
    from PIL import Image

    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (28, 28), "red")] * 8})
    (tmp_path / "colours").mkdir()
    rows.to_parquet(tmp_path / "colours" / "train-00000-of-00001.parquet")
    train(train_args(dataset_name=str(tmp_path / "colours"), max_train_steps=1, validation_epochs=0))
    assert "The images have colours and become gray" in capsys.readouterr().out
