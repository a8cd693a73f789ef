"""Nothing that was trained is lost: few images, two trainings in one folder, SIGTERM, a full disk."""

import json
import os
import signal
import socket
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
from processes import environment, run_python, run_ranks
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ae.hub.push import check_folder
from hf_ae.train import main, train
from hf_ae.train_prior import PriorArguments
from hf_ae.train_prior import train as train_prior
from hf_ae.training.output_folder import LOCK, checkpoints, take_lock

SPATIAL = "network=conv,hidden_sizes=[4,8],latent_channels=2"
LONG = [
    "--dataset_name", SAMPLE, "--max_train_samples", "400", "--train_batch_size", "20", "--max_train_steps", "100000",
    "--lr_scheduler", "constant", "--validation_epochs", "0", "--model_type", "hf_ae_vae", "--use_ema",
    "--config_overrides", "hidden_sizes=[16],latent_dim=4", "--random_shift", "1",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


def start(output: Path, *command: object) -> subprocess.Popen:
    """A training in a process of its own, which has begun to take steps: it has written a first checkpoint."""
    command = [sys.executable, *map(str, [*command, *LONG, "--checkpointing_steps", "5", "--output_dir", output])]
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoints(output) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    assert child.poll() is None and checkpoints(output), child.communicate()[1][-3000:]
    return child


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int(checkpoints(folder)[-1].name.split("-")[1])


# Few images


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("model_type, fields", [("hf_ae_vae", SPATIAL), ("hf_ae_vqvae", f"{SPATIAL},codebook_size=8")])
def test_a_model_of_fewer_images_than_a_batch_of_the_measures_is_saved_and_measured(
    train_args, tmp_path, model_type, fields, streaming
):
    options = dict(model_type=model_type, config_overrides=fields, streaming=streaming, max_train_samples=30)
    train(train_args(**options, max_train_steps=2))
    model = AutoModel.from_pretrained(tmp_path / "run")
    check_folder(tmp_path / "run")
    if model_type == "hf_ae_vae":
        assert model.config.scaling_factor != 1.0
    else:  # 7 × 7 codes of each of the 30 images
        assert int(model.quantizers[0].frequencies.sum()) == 30 * 49


def test_the_model_is_there_when_the_measures_fail(train_args, tmp_path):
    """The last rows of the stream are only read for the measures: one of them is broken."""
    rows = datasets.load_dataset(str(SAMPLE), split="train[:40]").cast_column("image", datasets.Image(decode=False))
    rows = rows.to_list()
    rows[-1]["image"]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train-0.parquet")
    options = dict(dataset_name=str(tmp_path / "data"), streaming=True, max_train_samples=None, max_train_steps=1)
    options |= dict(model_type="hf_ae_vae", config_overrides=SPATIAL, shuffle_buffer_size=1)
    with pytest.raises(ValueError, match="Row 39"):
        train(train_args(**options))
    check_folder(tmp_path / "run")  # card, code and weights


# Two trainings


def test_a_second_training_in_the_same_folder_is_refused_from_the_start(tmp_path, capsys):
    child = start(tmp_path / "run", "-m", "hf_ae.train")
    try:
        argv = [*LONG, "--output_dir", tmp_path / "run"]
        for more in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
            fails(capsys, [*argv, *more], f"process {child.pid} on {socket.gethostname()}", "run", main=main)
    finally:
        child.kill()
        child.communicate()
    assert (tmp_path / "run" / LOCK).exists()  # of a process that is dead
    steps = str(newest(tmp_path / "run") + 1)
    flags = ["--resume_from_checkpoint", "latest", "--max_train_steps", steps]
    main([*map(str, argv), *flags])
    assert not (tmp_path / "run" / LOCK).exists()


HOLD = """
import sys
from pathlib import Path
from hf_ae.training.output_folder import take_lock
take_lock(Path(sys.argv[1]))
"""


def test_locks_of_dead_processes_do_not_count_and_those_of_other_machines_do(tmp_path):
    run_python(HOLD, tmp_path)
    take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        take_lock(tmp_path)
    owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(owner | {"begun": "1"}))  # an earlier process with the same number
    take_lock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps(owner | {"host": "elsewhere"}))
    with pytest.raises(ValueError, match=rf"on elsewhere\): if that is over, remove .*{LOCK}"):
        take_lock(tmp_path)


def test_the_lock_is_released_on_errors_and_its_folder_can_be_trained_into(train_args, tmp_path):
    with pytest.raises(ValueError, match="no split"):
        train(train_args(eval_split="foo", validation_epochs=1))
    assert not (tmp_path / "run" / LOCK).exists()
    train(train_args())
    assert not (tmp_path / "run" / LOCK).exists()


# SIGTERM


def train_on(output: Path, whole: Path, step: int, *command: object) -> None:
    """Finish the run in `output` after five more steps, and train as long in `whole` at one go; in processes of
    their own where there is a command for them."""
    for folder, resume in ((output, ["--resume_from_checkpoint", "latest"]), (whole, [])):
        flags = [*map(str, LONG), "--max_train_steps", str(step + 5), "--output_dir", str(folder), *resume]
        if command:
            run_ranks(1, *command, *flags)
        else:
            main(flags)


def assert_bitwise_equal(one: Path, other: Path):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on_bitwise(tmp_path):
    child = start(tmp_path / "cut", "-m", "hf_ae.train")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    step = newest(tmp_path / "cut")
    assert child.returncode == 143 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"stopped: SIGTERM at step {step};") and last.endswith("--resume_from_checkpoint latest")
    train_on(tmp_path / "cut", tmp_path / "whole", step)
    assert_bitwise_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_stops_when_accelerate_launch_is_stopped(tmp_path):
    """Which passes no signals on to a single process."""
    child = start(tmp_path / "run", *LAUNCH, "-m", "hf_ae.train")
    (worker,) = psutil.Process(child.pid).children()
    child.send_signal(signal.SIGTERM)
    psutil.wait_procs([worker], timeout=60)
    _, err = child.communicate()
    assert f"stopped: SIGTERM at step {newest(tmp_path / 'run')}" in err


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on_bitwise(tmp_path):
    child = start(tmp_path / "cut", *TORCHRUN, "-m", "hf_ae.train")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    step = newest(tmp_path / "cut")
    assert child.returncode != 0 and err.count("stopped: ") == 1 and f"SIGTERM at step {step};" in err
    train_on(tmp_path / "cut", tmp_path / "whole", step, *TORCHRUN, "-m", "hf_ae.train")
    assert_bitwise_equal(tmp_path / "cut", tmp_path / "whole")


WAIT = """
import sys, time
from accelerate import Accelerator
from hf_ae.training import processes
stop = processes.StopRequest(Accelerator(cpu=True))
stop.listen()
print("listening", flush=True)
while True:
    time.sleep(0.01)
    if stop.agreed(1):
        print("asked", flush=True)
"""


def test_a_second_sigterm_ends_at_once_but_not_the_copy_that_a_launcher_sends():
    child = subprocess.Popen([sys.executable, "-c", WAIT], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "listening\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "asked\n"
        child.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
        assert child.returncode == -signal.SIGTERM
    finally:
        child.kill()


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds 1.5 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


FILL = ["--dataset_name", SAMPLE, "--max_train_samples", "40", "--train_batch_size", "20", "--validation_epochs", "0"]


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints(small_disk, capsys):
    """Two checkpoints of a model of 0.2 MB with its optimizer fit, a third does not."""
    run = small_disk / "run"
    argv = [*FILL, "--config_overrides", "hidden_sizes=[24],latent_dim=4", "--output_dir", run]
    argv += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "9", "--max_train_steps", "9"]
    fails(capsys, argv, "The disk is full", main=main)
    whole = checkpoints(run)
    assert whole and not list(run.glob(".partial*"))
    for checkpoint in whole:
        assert load_file(checkpoint / "model.safetensors") and load_file(checkpoint / "training_state.safetensors")
    assert not (run / "model.safetensors").exists() and not (run / LOCK).exists()


def test_a_full_disk_at_the_end_leaves_the_model_that_was_there(small_disk, capsys):
    run = small_disk / "run"
    argv = [*FILL, "--config_overrides", "hidden_sizes=[24],latent_dim=4", "--output_dir", run]
    main([*map(str, argv), "--max_train_steps", "1"])
    before = (run / "model.safetensors").read_bytes()
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - 100_000))
    fails(capsys, [*argv, "--max_train_steps", "2", "--overwrite_output_dir"], "The disk is full", main=main)
    assert (run / "model.safetensors").read_bytes() == before and not list(run.glob(".partial*"))


# What an error leaves on the screen


def test_no_progress_bar_is_drawn_below_an_error(tmp_path):
    rate = ["--learning_rate", "1e8", "--lr_scheduler", "constant", "--output_dir", tmp_path / "run"]
    command = [sys.executable, "-m", "hf_ae.train", *LONG, *rate]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True)
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: At step "), done.stderr[-2000:]


def test_a_training_leaves_random_numbers_and_bars_of_the_program_alone(train_args, tmp_path):
    import random

    import numpy as np

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    datasets.enable_progress_bars()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    fields = f"{SPATIAL},codebook_size=8"
    train(train_args(model_type="hf_ae_vqvae", config_overrides=fields, max_train_steps=2))
    prior = dict(model=str(tmp_path / "run"), output_dir=str(tmp_path / "prior"), dataset_name=str(SAMPLE))
    prior |= dict(max_train_samples=20, train_batch_size=10, max_train_steps=1, validation_epochs=0)
    train_prior(PriorArguments(**prior, prior_overrides="prior_layers=1,prior_hidden_size=16"))
    assert draws() == expected
    assert datasets.is_progress_bar_enabled()
