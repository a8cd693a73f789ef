"""The training script: end to end, resumed after a kill, in two processes, and on bad input."""

import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from conftest import SAMPLE
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ae.train import main, train
from hf_ae.training.arguments import checkpoints, parse_overrides

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
FLAGS = [
    "--dataset_name", str(SAMPLE), "--max_train_samples", "400", "--train_batch_size", "20", "--max_train_steps", "60",
    "--checkpointing_steps", "7", "--validation_epochs", "0", "--model_type", "hf_ae_vae", "--use_ema", "--ema_decay", "0.9",
    "--config_overrides", "hidden_sizes=[16],latent_dim=4", "--random_shift", "1", "--max_grad_norm", "50", "--lr_warmup_steps", "5",
]  # fmt: skip


def command(processes: int, *flags) -> list[str]:
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *start, "-m", "hf_ae.train", *FLAGS, *map(str, flags)]


def kill_all(child: subprocess.Popen):
    """SIGKILL to a process and all that it started (torchrun's workers have sessions of their own)."""
    family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
    for process in family:
        process.kill()
    psutil.wait_procs(family)
    child.wait()


def run(processes, *flags):
    done = subprocess.run(command(processes, *flags), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_gives_bitwise_the_weights_of_an_uninterrupted_run(processes, tmp_path):
    """SIGKILL to every process once the second checkpoint is there; benchmarks/kill_and_resume.py does it ten times."""
    adversarial = [
        "--model_type",
        "hf_ae_vaegan",
        "--config_overrides",
        "hidden_sizes=[16],latent_dim=4,discriminator_channels=[4,8]",
    ]
    extra = ["--optimizer", "muon", "--gradient_accumulation_steps", "2"] if processes == 1 else adversarial
    run(processes, "--output_dir", tmp_path / "whole", *extra)
    child = subprocess.Popen(
        command(processes, "--output_dir", tmp_path / "cut", *extra),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(checkpoints(tmp_path / "cut")) < 2 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    kill_all(child)
    assert not (tmp_path / "cut" / "model.safetensors").exists(), "the run ended before it was killed"
    assert "Going on from checkpoint-" in run(
        processes, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest", *extra
    )
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-49", "checkpoint-56"]


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(tmp_path):
    """With plain SGD-like single steps the weights after a step differ as the gradients do."""
    child = """
import sys, torch
from accelerate import Accelerator
from hf_ae.data.images import ImagesInMemory, image_column, open_dataset, to_pixel_values
import hf_ae
accelerator = Accelerator()
torch.manual_seed(0)
model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[32], latent_dim=8))
processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
dataset = open_dataset(sys.argv[1])["train"]
images = ImagesInMemory.load(dataset, image_column(dataset), processor, limit=64)
model = accelerator.prepare(model)
batch = next(images.batches(32 // accelerator.num_processes, 0, rank=accelerator.process_index, processes=accelerator.num_processes))
accelerator.backward(model(to_pixel_values(batch, accelerator.device, (0.0, 1.0))).loss)
if accelerator.is_main_process:
    torch.save([p.grad for p in model.parameters()], sys.argv[2])
accelerator.wait_for_everyone()
accelerator.end_training()
"""
    script = tmp_path / "child.py"
    script.write_text(child)
    for processes in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        subprocess.run(
            [sys.executable, *start, script, SAMPLE, tmp_path / f"{processes}.pt"],
            env=ENV,
            check=True,
            capture_output=True,
        )
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert max((a - b).abs().max() / a.abs().max() for a, b in zip(one, two)) < 1e-5


def test_accelerate_launch_trains_from_a_recipe_and_the_folder_reloads(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_type: hf_ae_denoising\nconfig_overrides: {{network: conv, hidden_sizes: [4, 8], latent_dim: 6}}\n"
        f"dataset_name: {SAMPLE}\nmax_train_samples: 100\nnum_train_epochs: 2\ntrain_batch_size: 25\n"
        "learning_rate: 1e-3\nreport_to: tensorboard\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_ae.train", recipe,
         "--output_dir", tmp_path / "run", "--train_batch_size", "50", "--max_eval_samples", "20"],
        env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trained on 200 images" in done.stdout
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "hf_ae_denoising" and model.config.latent_dim == 6
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "README.md",
        "recipe.yaml",
        "preprocessor_config.json",
        "modeling_regularized.py",
        "samples",
        "logs",
    } <= files
    assert list((tmp_path / "run" / "logs").rglob("events*"))
    picture = Image.open(max((tmp_path / "run" / "samples").glob("*.png")))
    assert picture.width > 600 and picture.height > 150


def test_streaming_trains_and_learns_what_memory_does(train_args, tmp_path):
    losses = {}
    for streaming in (False, True):
        output = tmp_path / str(streaming)
        train(
            train_args(
                streaming=streaming,
                max_train_samples=None,
                max_train_steps=400,
                output_dir=str(output),
                learning_rate=3e-3,
            )
        )
        from hf_ae.evaluation.evaluate import evaluate

        losses[streaming] = evaluate(output, str(SAMPLE), tasks="reconstruction", max_images=200)["reconstruction"][
            "mse"
        ]
    assert losses[True] < 0.045 and abs(losses[True] - losses[False]) < 0.1 * losses[False]


def test_gradient_accumulation_equals_a_larger_batch(train_args, tmp_path):
    for name, batch, accumulate in (("one", 40, 1), ("two", 20, 2)):
        train(
            train_args(
                output_dir=str(tmp_path / name),
                train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_train_steps=3,
            )
        )
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
    assert kinds <= {".safetensors", ".json", ".py", ".md", ".yaml", ""}


def test_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(train_args, tmp_path):
    with pytest.raises(ValueError) as error:
        train(
            train_args(
                learning_rate=1e8,
                max_train_steps=200,
                checkpointing_steps=1,
                model_type="hf_ae_vae",
                lr_warmup_steps=0,
                lr_scheduler="constant",
            )
        )
    text = str(error.value)
    assert "step" in text and ("kl" in text or "reconstruction" in text or "weight" in text)
    good = checkpoints(tmp_path / "run")
    assert f"{good[-1]}" in text if good else "No checkpoint" in text
    for path in good:
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


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
    few = [
        "--dataset_name",
        str(SAMPLE),
        "--max_train_samples",
        "40",
        "--train_batch_size",
        "20",
        "--validation_epochs",
        "0",
    ]
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
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]


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
    expect_one_line(capsys, [*data, "--batch_size", "3"], "--batch_size")
    expect_one_line(capsys, [*data, "--train_batch_size", "many"], "train_batch_size")
    expect_one_line(capsys, [*data, "--push_to_hub"], "push_to_hub", "login")
    expect_one_line(capsys, [*data, "--report_to", "wandb"], "pip install wandb")
    expect_one_line(capsys, [*data, "--optimizer", "adamw3"], "adamw3")
    expect_one_line(capsys, [*data, "--lr_scheduler", "wave"], "wave", "cosine")
    expect_one_line(capsys, [*data, "--report_to", "paper"], "tensorboard")
    expect_one_line(capsys, ["--output_dir", tmp_path / "o"], "--dataset_name")
    expect_one_line(capsys, ["--dataset_name", tmp_path / "none", "--output_dir", tmp_path / "o"], "none")
    expect_one_line(capsys, [tmp_path / "missing.yaml"], "missing.yaml")
    (tmp_path / "half.yaml").write_text("train_batch_size: 12.5\n")
    expect_one_line(capsys, [tmp_path / "half.yaml"], "train_batch_size=12.5")
    (tmp_path / "bad.yaml").write_text("learning_rat: 1e-3\n")
    expect_one_line(capsys, [tmp_path / "bad.yaml"], "learning_rat")
    datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "empty" / "train.parquet"
    )
    expect_one_line(capsys, ["--dataset_name", tmp_path / "empty", "--output_dir", tmp_path / "o"], "empty")


def test_one_broken_image_is_named_and_skipped_only_when_told(capsys, tmp_path):
    flags = ["--dataset_name", broken_dataset(tmp_path / "data"), "--output_dir", tmp_path / "o", "--validation_epochs", "0",
             "--config_overrides", "hidden_sizes=[8]", "--num_train_epochs", "1", "--train_batch_size", "33"]  # fmt: skip
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
    flags = [
        "--dataset_name",
        SAMPLE,
        "--max_train_samples",
        "40",
        "--validation_epochs",
        "0",
        "--config_overrides",
        "hidden_sizes=[8]",
    ]
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
    flags = ["--dataset_name", SAMPLE, "--max_train_samples", "200", "--validation_epochs", "0", "--output_dir", tmp_path / "run",
             "--resume_from_checkpoint", "latest", "--config_overrides"]  # fmt: skip
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
        "model_type: hf_ae_vae\nconfig_overrides: network=resnet,image_size=16,num_channels=3,hidden_sizes=[8,8],kl_weight=1e-6,"
        "pixel_range=[-1.0,1.0]\ngradient_accumulation_steps: 4\nnum_train_epochs: 1\n"
    )
    main(["--dataset_name", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "o"), str(tmp_path / "r.yaml")])
    out = capsys.readouterr().out
    assert "only train" in out and "Trained on 24 images" in out
    model = AutoModel.from_pretrained(tmp_path / "o")
    assert model.config.kl_weight == 1e-6 and model.config.code_shape == [4, 8, 8]
    from hf_ae.evaluation.evaluate import evaluate

    metrics = evaluate(tmp_path / "o", str(tmp_path / "photos"), samples=2)
    assert metrics["split"] == "train" and metrics["likelihood"]["samples"] == 2 and "pca" not in metrics
    assert metrics["command"].endswith("photos --samples 2")


def test_training_anew_forgets_the_measurements_of_the_old_weights(train_args, tmp_path):
    from hf_ae.evaluation.evaluate import evaluate

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
