"""Kill training at random steps, resume, and compare the final weights bit by bit with an uninterrupted run.

    python benchmarks/kill_and_resume.py [--times 10] [--processes 1 2]

For one and for two processes. Each kill is a SIGKILL of every process at a random moment of the run; a killed run is
resumed with --resume_from_checkpoint latest, and killed again, until it ends. Prints how many runs were identical.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

SAMPLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "fashion_mnist_sample"
FLAGS = """
    --train_batch_size 20 --max_train_steps 400 --checkpointing_steps 7 --validation_epochs 0 --model_type hf_ae_vae
    --config_overrides hidden_sizes=[64],latent_dim=8 --use_ema --random_flip --random_shift 1 --lr_warmup_steps 20
    --max_grad_norm 50
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def start(processes: int, folder: Path, *flags: str) -> subprocess.Popen:
    """A training in so many processes."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split() if processes > 1 else []
    where = ["--dataset_name", str(SAMPLE), "--output_dir", str(folder)]
    command = [sys.executable, *launch, "-m", "hf_ae.train", *where, *FLAGS.split(), *flags]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)


def killed_run(processes: int, folder: Path, dice: random.Random) -> list[int]:
    """Run, kill once at a random step of the first half and once of the second, resume to the end; returns the
    steps."""
    killed = []
    for low, high in ((1, 180), (200, 370)):
        aim = dice.randint(low, high)
        child = start(processes, folder, "--resume_from_checkpoint", "latest")
        while newest(folder) < aim and child.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.05)
        if child.poll() is None:
            family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
            for process in family:
                process.kill()
            psutil.wait_procs(family)
            killed.append(newest(folder))
        child.wait()
    if start(processes, folder, "--resume_from_checkpoint", "latest").wait():
        raise SystemExit(f"the resumed run in {folder} failed")
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    times, dice = args.times, random.Random(0)
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as scratch:
            if start(processes, Path(scratch, "whole")).wait():
                raise SystemExit("the uninterrupted run failed")
            whole, same = load_file(Path(scratch, "whole", "model.safetensors")), 0
            for index in range(times):
                folder = Path(scratch, f"cut-{index}")
                steps = killed_run(processes, folder, dice)
                cut = load_file(folder / "model.safetensors")
                equal = all(torch.equal(whole[name], cut[name]) for name in whole)
                same += equal
                verdict = f"killed after checkpoints {steps}: {'identical' if equal else 'DIFFERENT'}"
                print(f"{processes} process(es), run {index}: {verdict}", flush=True)
            print(f"{processes} process(es): {same} of {times} identical", flush=True)


if __name__ == "__main__":
    main()
