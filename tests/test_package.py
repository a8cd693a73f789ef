"""What is shipped: the checkpoints, the wheel, the cost of importing."""

import errno
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from processes import environment, run_python
from shipped import MODELS, PIPELINES, ROOT, as_in_git
from transformers import AutoImageProcessor, AutoModel

import hf_ae
from hf_ae.errors import UserError, one_line_errors, user_input
from hf_ae.hub.push import check_folder, refresh

WRITTEN = (
    "README.md", "config.json", "preprocessor_config.json", "model_index.json", "*/config.json",
    ".eval_results/*.yaml",
)  # fmt: skip
"""What `make cards` writes, of which git keeps a copy."""


@pytest.mark.parametrize("folder", MODELS + PIPELINES, ids=lambda p: p.name)
def test_shipped_folder_is_complete_small_and_as_make_cards_leaves_it(folder, tmp_path):
    copy = as_in_git(folder, tmp_path / folder.name)
    refresh(copy)
    for path in (path for pattern in WRITTEN for path in folder.glob(pattern)):
        assert (copy / path.relative_to(folder)).read_text() == path.read_text(), f"{path}: run make cards"
    files = check_folder(copy)
    assert {"recipe.yaml", "metrics.json"} <= set(files)
    size = sum((copy / name).stat().st_size for name in files if name.endswith(".safetensors"))
    if folder in PIPELINES:
        assert size <= 60_000_000
    else:
        assert size <= 8_000_000 and {"reconstructions.png", "roundtrip.jpg"} & set(files)


@pytest.mark.parametrize("folder", [p for p in MODELS if p.name.startswith("fashion")], ids=lambda p: p.name)
def test_shipped_checkpoint_reconstructs_as_its_card_says(folder):
    """On the bundled sample of the test split the error must be near that of metrics.json."""
    metrics = json.loads((folder / "metrics.json").read_text())
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    images = datasets.load_dataset(str(ROOT / "tests" / "data" / "fashion_mnist_sample"), split="test")["image"]
    x = processor(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        error = (model(x).reconstruction - x).square().mean().item()
    assert error == pytest.approx(metrics["reconstruction"]["mse"], rel=0.1)


def test_wheel_holds_all_of_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy: what an earlier build left beside the checkout does not count
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_ae", "hf_ae_cli", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(pip, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    files = {f"hf_ae/{path.relative_to(ROOT / 'hf_ae')}" for path in (ROOT / "hf_ae").rglob("*.py")}
    files |= {f"hf_ae/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")}
    files |= {f"hf_ae_cli/{path.name}" for path in (ROOT / "hf_ae_cli").glob("*.py")}
    files |= {"hf_ae/py.typed", "hf_ae/evaluation/feature_network.safetensors"}
    files |= {f"hf_ae/latents/page/{path.name}" for path in (ROOT / "hf_ae" / "latents" / "page").iterdir()}
    about = f"hf_ae-{hf_ae.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files


def test_importing_costs_little_more_than_torch_and_transformers():
    """At most 15% more, the best of three tries, each in a new process. No heavy dependency is loaded."""
    code = """
import json, sys, time
times = [time.process_time()]
import torch
from transformers import PreTrainedModel
times.append(time.process_time())
import hf_ae
times.append(time.process_time())
heavy = ("datasets", "diffusers", "sklearn", "matplotlib", "gradio", "torchmetrics", "typer", "constriction")
print(json.dumps([times[2] - times[1], times[1] - times[0], [name for name in heavy if name in sys.modules]]))
"""
    ratios = []
    while not ratios or (min(ratios) > 0.15 and len(ratios) < 3):
        own, base, loaded = json.loads(run_python(code))
        ratios.append(own / base)
        assert loaded == []
    assert min(ratios) <= 0.15, ratios


@pytest.mark.parametrize(
    "words, seconds", [(["--help"], 0.5), (["evaluate", "--help"], 0.6)], ids=["help", "evaluate"]
)
def test_help_answers_at_once(words, seconds):
    """The best of three, in processor time, which other work changes less. Nothing heavy is imported."""
    command, env = [Path(sys.executable).with_name("hf-ae"), *words], environment()
    took = []
    while not took or (min(took) > seconds and len(took) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and ("--dataset_name" if len(words) > 1 else "compress") in done.stdout
    assert min(took) <= seconds, took
    env["PYTHONPROFILEIMPORTTIME"] = "1"
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    assert "typer" in imported and not imported & {"hf_ae", "torch", "transformers", "numpy", "PIL"}


def test_what_a_user_can_mend_is_one_line_and_everything_else_keeps_its_traceback(capsys):
    def end(error):
        with one_line_errors():
            raise error

    for error in (UserError("no such\nfile"), FileNotFoundError(2, "not there", "x"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(SystemExit) as stop:
            end(error)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    for error in (ValueError("of torch"), OSError(errno.EIO, "broken"), TypeError("ours")):
        with pytest.raises(type(error)) as kept:
            end(error)
        assert kept.value is error


def test_input_that_travelling_code_refuses_is_an_error_of_the_user_with_its_cause():
    with pytest.raises(UserError, match="latent_dmi") as refused, user_input():
        hf_ae.AutoencoderConfig(latent_dmi=3)
    assert isinstance(refused.value.__cause__, ValueError)
