"""What is shipped: the checkpoints, the wheel, the cost of importing."""

import json
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

import hf_ae
from hf_ae.hub.pipeline_folder import code_files
from hf_ae.hub.push import check_folder

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted(p for p in (ROOT / "model_cards").iterdir() if (p / "config.json").is_file())
PIPELINES = sorted(p.parent for p in ROOT.glob("model_cards/*/model_index.json"))


@pytest.mark.parametrize("folder", CARDS, ids=lambda p: p.name)
def test_shipped_checkpoint_is_complete_small_and_carries_the_code_of_this_checkout(folder):
    files = check_folder(folder)
    assert {"recipe.yaml", "metrics.json"} <= set(files) and {"reconstructions.png", "roundtrip.jpg"} & set(files)
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    for name in (f for f in files if f.endswith(".py")):
        assert (folder / name).read_text() == (ROOT / "hf_ae" / name).read_text(), f"{name}: run make cards"
    config = json.loads((folder / "config.json").read_text())
    assert set(v.split(".")[0] + ".py" for v in config["auto_map"].values()) <= set(files)


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda p: p.name)
def test_shipped_pipeline_is_complete_small_and_carries_the_code_of_this_checkout(folder):
    files = check_folder(folder)
    assert {"recipe.yaml", "metrics.json", "pipeline.py"} <= set(files)
    assert sum((folder / name).stat().st_size for name in files) <= 60_000_000
    for name, text in code_files(folder).items():
        assert (folder / name).read_text() == text, f"{name}: run make cards"


@pytest.mark.parametrize("folder", [p for p in CARDS if p.name.startswith("fashion")], ids=lambda p: p.name)
def test_shipped_checkpoint_reconstructs_as_its_card_says(folder):
    """On the bundled sample of the test split the error must be near that of metrics.json."""
    import datasets

    metrics = json.loads((folder / "metrics.json").read_text())
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    images = datasets.load_dataset(str(ROOT / "tests" / "data" / "fashion_mnist_sample"), split="test")["image"]
    x = processor(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        error = (model(x).reconstruction - x).square().mean().item()
    assert error == pytest.approx(metrics["reconstruction"]["mse"], rel=0.1)


def test_wheel_holds_only_the_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT],
        check=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names} <= {"hf_ae", f"hf_ae-{hf_ae.__version__}.dist-info"}
    assert {
        "hf_ae/py.typed",
        "hf_ae/configuration.py",
        "hf_ae/feature_network.safetensors",
        "hf_ae/pipelines/text_to_image.py",
    } <= set(names)


def test_importing_costs_little_more_than_torch_and_transformers():
    """At most 1.15 times; median of five pairs, each in a new process, in turn. No heavy dependency is loaded."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    base = "import torch; from transformers import PreTrainedModel"
    ratios = [seconds(base + "; import hf_ae") / seconds(base) for _ in range(5)]
    assert statistics.median(ratios) <= 1.15, ratios
    heavy = ("datasets", "diffusers", "sklearn", "matplotlib", "gradio", "torchmetrics", "typer", "constriction")
    code = f"import hf_ae, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_module_imports_against_the_direction():
    """Leaves import no file of the package; nothing imports a script; remote code may use `from .x import y` alone."""
    import re

    def imported(name):
        return (
            set(re.findall(r"^\s*from \.?(?:hf_ae\.)?(\w+) import", (ROOT / "hf_ae" / f"{name}.py").read_text(), re.M))
            & modules
        )

    modules = {p.stem for p in (ROOT / "hf_ae").glob("*.py")} - {"__init__"}
    for leaf in (
        "configuration",
        "quantizers",
        "collapse",
        "networks",
        "bottlenecks",
        "corruptions",
        "arguments",
        "tiling",
        "entropy_models",
        "bitstream",
        "plots",
        "metrics",
        "discriminators",
        "feature_network",
        "generation_metrics",
        "collapse",
        "image_processing",
    ):
        assert not imported(leaf), leaf
    assert imported("training") == {"arguments"}
    scripts = {"train", "train_latent_diffusion", "train_prior", "cli"}
    assert not [m for m in modules if imported(m) & scripts]
