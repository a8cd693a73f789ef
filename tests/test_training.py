"""The training script: end to end, resumed after a kill, and on bad input. Of two processes: test_processes.py."""

import math
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from command_line import fails
from conftest import SAMPLE
from PIL import Image
from processes import environment, run_ranks
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ae.evaluation.evaluate import evaluate
from hf_ae.train import main, train
from hf_ae.training.arguments import parse_overrides
from hf_ae.training.output_folder import checkpoints
from hf_ae.training.run import Run
from hf_ae.training.tracking import NonFiniteLossError

FLAGS = [
    "--dataset_name", SAMPLE, "--max_train_samples", "400", "--train_batch_size", "20", "--max_train_steps", "60",
    "--checkpointing_steps", "7", "--validation_epochs", "0", "--model_type", "hf_ae_vae", "--use_ema",
    "--ema_decay", "0.9", "--config_overrides", "hidden_sizes=[16],latent_dim=4", "--random_shift", "1",
    "--max_grad_norm", "50", "--lr_warmup_steps", "5",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start_and_kill(output: Path, *command: object):
    """Start a training, and kill its process and all that this started once the second checkpoint is there."""
    command = [sys.executable, *map(str, [*command, "--output_dir", output])]
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(output)) < 2 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
    for process in family:  # torchrun's workers have sessions of their own
        process.kill()
    psutil.wait_procs(family)
    child.wait()
    assert checkpoints(output), "the run did not get as far as a checkpoint"
    assert not (output / "model.safetensors").exists(), "the run ended before it was killed"


def assert_bitwise_equal(one: Path, other: Path):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


def test_killed_and_resumed_gives_bitwise_the_weights_of_an_uninterrupted_run(tmp_path, capsys):
    """The killed run has a process of its own; benchmarks/kill_and_resume.py does it ten times."""
    flags = [*map(str, FLAGS), "--optimizer", "muon", "--gradient_accumulation_steps", "2"]
    main([*flags, "--output_dir", str(tmp_path / "whole")])
    start_and_kill(tmp_path / "cut", "-m", "hf_ae.train", *flags)
    capsys.readouterr()
    main([*flags, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "latest"])
    assert "Going on from checkpoint-" in capsys.readouterr().out
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "cut")
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-49", "checkpoint-56"]


@pytest.mark.slow
def test_two_processes_that_are_killed_and_resumed_give_bitwise_the_weights_of_uninterrupted_ones(tmp_path):
    overrides = "hidden_sizes=[16],latent_dim=4,discriminator_channels=[4,8]"
    command = [*TORCHRUN, "-m", "hf_ae.train", *FLAGS, "--model_type", "hf_ae_vaegan", "--config_overrides", overrides]
    run_ranks(1, *command, "--output_dir", tmp_path / "whole")
    start_and_kill(tmp_path / "cut", *command)
    (printed,) = run_ranks(1, *command, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert "Going on from checkpoint-" in printed
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "cut")
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-49", "checkpoint-56"]


def test_accelerate_launch_trains_from_a_recipe_and_the_folder_reloads(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_type: hf_ae_denoising\nconfig_overrides: {{network: conv, hidden_sizes: [4, 8], latent_dim: 6}}\n"
        f"dataset_name: {SAMPLE}\nmax_train_samples: 100\nnum_train_epochs: 2\ntrain_batch_size: 25\n"
        "learning_rate: 1e-3\nreport_to: tensorboard\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_ae.train", recipe]
    flags = ["--output_dir", tmp_path / "run", "--train_batch_size", "50", "--max_eval_samples", "20"]
    (printed,) = run_ranks(1, *launch, *flags)
    assert "Trained on 200 images" in printed
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "hf_ae_denoising" and model.config.latent_dim == 6
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"README.md", "recipe.yaml", "preprocessor_config.json", "samples", "logs"} <= files
    assert "modeling_regularized.py" in files
    assert list((tmp_path / "run" / "logs").rglob("events*"))
    sheet = Image.open(max((tmp_path / "run" / "samples").glob("*.png")))
    assert sheet.width > 600 and sheet.height > 150


def test_streaming_trains_and_learns_what_memory_does(train_args, tmp_path):
    losses = {}
    for streaming in (False, True):
        output = tmp_path / str(streaming)
        options = dict(max_train_samples=None, max_train_steps=400, learning_rate=3e-3)
        train(train_args(streaming=streaming, output_dir=str(output), **options))
        metrics = evaluate(output, str(SAMPLE), tasks="reconstruction", max_images=200)
        losses[streaming] = metrics["reconstruction"]["mse"]
    assert losses[True] < 0.045 and abs(losses[True] - losses[False]) < 0.1 * losses[False]


def test_gradient_accumulation_equals_a_larger_batch(train_args, tmp_path):
    for name, batch, accumulate in (("one", 40, 1), ("two", 20, 2)):
        options = dict(train_batch_size=batch, gradient_accumulation_steps=accumulate, max_train_steps=3)
        train(train_args(output_dir=str(tmp_path / name), **options))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4


def test_moving_average_is_what_gets_saved(train_args, tmp_path):
    train(train_args(output_dir=str(tmp_path / "raw"), max_train_steps=8))
    train(train_args(output_dir=str(tmp_path / "ema"), max_train_steps=8, use_ema=True, checkpointing_steps=8))
    raw, ema = load_file(tmp_path / "raw" / "model.safetensors"), load_file(tmp_path / "ema" / "model.safetensors")
    state = load_file(tmp_path / "ema" / "checkpoint-8" / "training_state.safetensors")
    assert not torch.equal(raw["decoder.to_pixels.bias"], ema["decoder.to_pixels.bias"])
    assert any(torch.equal(state[k], ema["decoder.to_pixels.bias"]) for k in state if k.startswith("ema."))


def test_nothing_in_a_checkpoint_is_a_pickle(train_args, tmp_path):
    train(train_args(checkpointing_steps=2, use_ema=True, optimizer="muon"))
    kinds = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {".safetensors", ".json"} <= kinds <= {".safetensors", ".json", ".py", ".md", ".yaml", ""}
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("every, last", [(1, "last good checkpoint is {}/checkpoint-1."), (None, "No checkpoint")])
def test_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(every, last, train_args, tmp_path):
    options = dict(learning_rate=1e8, max_train_steps=200, lr_scheduler="constant", model_type="hf_ae_vae")
    with pytest.raises(NonFiniteLossError) as error:
        train(train_args(**options, checkpointing_steps=every))
    assert str(error.value).startswith("At step 2 the loss is inf: the term kl is not finite.")
    assert last.format(tmp_path / "run") in str(error.value)
    for path in checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


def test_a_weight_that_is_not_finite_is_not_saved_in_a_checkpoint(train_args, tmp_path, monkeypatch):
    """The loss of the step may still be finite."""
    update = Run.update_weights

    def spoil(run):
        update(run)
        run.bare_model.decoder.to_pixels.bias.data[0] = math.inf if run.progress.step == 1 else 0.0

    monkeypatch.setattr(Run, "update_weights", spoil)
    with pytest.raises(NonFiniteLossError, match=r"At step 2 the weight decoder.to_pixels.bias is not finite"):
        train(train_args(checkpointing_steps=1))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


# Bad input: one line, exit code 2, nothing lost


def broken_dataset(folder: Path) -> Path:
    """100 images, of which number 41 is cut off."""
    rows = (
        datasets.load_dataset(str(SAMPLE), split="train[:100]")
        .cast_column("image", datasets.Image(decode=False))
        .to_list()
    )
    rows[41]["image"]["bytes"] = rows[41]["image"]["bytes"][:60]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "train-0.parquet")
    return folder


def test_fine_tuning_begins_with_the_given_weights_and_changes_what_overrides_name(tmp_path, capsys):
    few = ["--dataset_name", str(SAMPLE), "--max_train_samples", "40", "--train_batch_size", "20"]
    few += ["--validation_epochs", "0"]
    make = ["--model_type", "hf_ae_vae", "--config_overrides", "hidden_sizes=[16],latent_dim=4"]
    main([*few, *make, "--output_dir", str(tmp_path / "first"), "--max_train_steps", "1", "--learning_rate", "1e-2"])
    tune = [*few, "--pretrained_model", str(tmp_path / "first"), "--max_train_steps", "1", "--learning_rate", "1e-20"]
    main([*tune, "--config_overrides", "kl_weight=0.25", "--output_dir", str(tmp_path / "second")])
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.config.kl_weight == 0.25 and second.config.latent_dim == 4
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    expect_one_line(
        capsys, [*tune, "--config_overrides", "latent_dim=5", "--output_dir", tmp_path / "third"], "shape", "first"
    )


def expect_one_line(capsys, argv: list, *words: str):
    fails(capsys, argv, *words, main=main)


def test_bad_flags_and_datasets_are_named(capsys, tmp_path):
    data = ["--dataset_name", SAMPLE, "--output_dir", tmp_path / "o"]
    expect_one_line(capsys, [*data, "--config_overrides", "latentdim=3"], "latentdim", "latent_dim")
    expect_one_line(
        capsys, [*data, "--config_overrides", "latent_dim=3,latent_channels=2"], "latent_dim", "latent_channels"
    )
    expect_one_line(capsys, [*data, "--config_overrides", "latent_dim"], "'='")
    expect_one_line(capsys, [*data, "--model_type", "vae"], "hf_ae_vae")
    expect_one_line(capsys, [*data, "--image_column", "picture"], "picture", "image, label")
    expect_one_line(capsys, [*data, "--train_split", "validation"], "validation", "train, test")
    expect_one_line(capsys, [*data, "--streaming"], "--max_train_steps")
    expect_one_line(capsys, [*data, "--image_column", "label"], "label", "no images")
    expect_one_line(capsys, [*data, "--train_batch_size", "0"], "train_batch_size=0", "at least 1")
    expect_one_line(capsys, [*data, "--learning_rate", "nan"], "learning_rate=nan")
    expect_one_line(capsys, [*data, "--save_dtype", "half"], "float16")
    expect_one_line(capsys, [*data, "--batch_size", "3"], "Unknown flag --batch_size")
    expect_one_line(capsys, [*data, "--train_batch_size", "many"], "train_batch_size", "invalid int value: 'many'")
    expect_one_line(capsys, [*data, "--push_to_hub"], "push_to_hub", "login")
    expect_one_line(capsys, [*data, "--report_to", "wandb"], "pip install wandb")
    expect_one_line(capsys, [*data, "--optimizer", "adamw3"], "adamw3", "adamw, muon")
    expect_one_line(capsys, [*data, "--lr_scheduler", "wave"], "wave", "cosine")
    expect_one_line(capsys, [*data, "--report_to", "paper"], "tensorboard")
    expect_one_line(capsys, ["--output_dir", tmp_path / "o"], "--dataset_name")
    expect_one_line(capsys, ["--dataset_name", tmp_path / "none", "--output_dir", tmp_path / "o"], "cannot be opened")
    expect_one_line(capsys, [tmp_path / "missing.yaml"], "missing.yaml does not exist")
    (tmp_path / "half.yaml").write_text("train_batch_size: 12.5\n")
    expect_one_line(capsys, [tmp_path / "half.yaml"], "train_batch_size=12.5")
    (tmp_path / "bad.yaml").write_text("learning_rat: 1e-3\n")
    expect_one_line(capsys, [tmp_path / "bad.yaml"], "no flags: learning_rat.")
    datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "empty" / "train.parquet"
    )
    expect_one_line(
        capsys, ["--dataset_name", tmp_path / "empty", "--output_dir", tmp_path / "o"], "cannot be opened", "no data"
    )


def test_one_broken_image_is_named_and_skipped_only_when_told(capsys, tmp_path):
    flags = ["--dataset_name", broken_dataset(tmp_path / "data"), "--output_dir", tmp_path / "o"]
    flags += ["--validation_epochs", "0", "--config_overrides", "hidden_sizes=[8]", "--num_train_epochs", "1"]
    flags += ["--train_batch_size", "33"]
    expect_one_line(capsys, flags, "Row 41", "--skip_broken_images")
    main([*map(str, flags), "--skip_broken_images"])
    assert "Skipped 1 of 100" in capsys.readouterr().out
    stream = [*flags[:3], tmp_path / "s", *flags[4:], "--streaming", "--max_train_steps", "3"]
    expect_one_line(capsys, stream, "Row 41")
    main([*map(str, stream), "--skip_broken_images", "--overwrite_output_dir"])


def test_output_folders_that_are_not_ours_are_left_alone(capsys, train_args, tmp_path):
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"precious")
    flags = ["--dataset_name", SAMPLE, "--max_train_samples", "40", "--validation_epochs", "0"]
    flags += ["--config_overrides", "hidden_sizes=[8]"]
    for more in ([], ["--overwrite_output_dir"]):
        expect_one_line(capsys, [*flags, "--output_dir", mine, *more], "photos", "not ours")
    assert [p.name for p in mine.iterdir()] == ["holiday.jpg"]
    expect_one_line(capsys, [*flags, "--output_dir", mine / "holiday.jpg"], "is a file")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("# my project")
    expect_one_line(capsys, [*flags, "--output_dir", tmp_path / "project"], "not ours")
    expect_one_line(capsys, [*flags, "--output_dir", "/proc/nowhere"], "/proc/nowhere", "cannot be written")
    train(train_args())
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    expect_one_line(capsys, [*flags, "--output_dir", tmp_path / "run"], "earlier run")
    expect_one_line(
        capsys, [*flags, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"], "finished"
    )
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(capsys, train_args, tmp_path):
    train(train_args(checkpointing_steps=2))
    flags = ["--dataset_name", SAMPLE, "--max_train_samples", "200", "--validation_epochs", "0"]
    flags += ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", "--config_overrides"]
    expect_one_line(
        capsys, [*flags, "hidden_sizes=[17],latent_dim=4"], "another model", "hidden_sizes", "[16]", "[17]"
    )
    fitting = [*flags, "hidden_sizes=[16],latent_dim=4", "--train_batch_size"]
    expect_one_line(capsys, [*fitting, "10"], "other data or batches", "train_batch_size 20 there and 10 here")
    flags[flags.index("latest")] = tmp_path / "run" / "checkpoint-2"
    expect_one_line(capsys, [*flags, "hidden_sizes=[16],latent_dim=4"], "newer checkpoint-4")
    flags[flags.index(tmp_path / "run" / "checkpoint-2")] = "latest"
    path = tmp_path / "run" / "checkpoint-4" / "training_state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    expect_one_line(capsys, [*flags, "hidden_sizes=[16],latent_dim=4"], "checkpoint-4", "damaged")
    flags[flags.index("latest")] = tmp_path
    expect_one_line(capsys, [*flags, "hidden_sizes=[16],latent_dim=4"], "no checkpoint")


def test_overrides_are_parsed_as_yaml_values():
    text = "latent_dim=16, hidden_sizes=[512, 256],network=conv,pixel_range=[-1.0,1.0]"
    assert parse_overrides(text) == {
        "latent_dim": 16,
        "hidden_sizes": [512, 256],
        "network": "conv",
        "pixel_range": [-1.0, 1.0],
    }
    assert parse_overrides("kl_weight=1e-6,latent_dim=null") == {"kl_weight": 1e-6, "latent_dim": None}
    assert parse_overrides({"kl_weight": "1e-6"}) == {"kl_weight": 1e-6}


def test_a_folder_of_image_files_trains_with_default_flags(capsys, tmp_path):
    """Colour JPEGs of mixed shapes, no test split, a recipe after the flags, fewer images than a batch."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.effect_noise((30 + 5 * i, 50 - 5 * i), 90).convert("RGB").save(tmp_path / "photos" / f"{i}.jpg")
    (tmp_path / "r.yaml").write_text(
        "model_type: hf_ae_vae\nconfig_overrides: network=resnet,image_size=16,num_channels=3,hidden_sizes=[8,8],"
        "kl_weight=1e-6,pixel_range=[-1.0,1.0]\ngradient_accumulation_steps: 4\nnum_train_epochs: 1\n"
    )
    main(["--dataset_name", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "o"), str(tmp_path / "r.yaml")])
    out = capsys.readouterr().out
    assert "only train" in out and "Trained on 24 images" in out
    model = AutoModel.from_pretrained(tmp_path / "o")
    assert model.config.kl_weight == 1e-6 and model.config.latent_shape == [4, 8, 8]
    metrics = evaluate(tmp_path / "o", str(tmp_path / "photos"), samples=2)
    assert metrics["split"] == "train" and metrics["likelihood"]["samples"] == 2 and "pca" not in metrics
    assert metrics["command"].endswith("photos --samples 2")


def test_training_anew_forgets_the_measurements_of_the_old_weights(train_args, tmp_path):
    train(train_args())
    evaluate(tmp_path / "run", str(SAMPLE), max_images=20)
    assert "model-index" in (tmp_path / "run" / "README.md").read_text()
    train(train_args(overwrite_output_dir=True))
    assert "model-index" not in (tmp_path / "run" / "README.md").read_text()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_compiled_training_resumes(train_args, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    train(train_args(checkpointing_steps=2, max_train_steps=4))
    (tmp_path / "run" / "model.safetensors").unlink()
    train(
        train_args(checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest", lr_scheduler="constant")
    )
    assert all(not k.startswith("_orig") for k in load_file(tmp_path / "run" / "model.safetensors"))
