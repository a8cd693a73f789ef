"""What the library leaves as it found it: random numbers, matplotlib's backend, the mode of a model."""

import json

import pytest
import torch
from conftest import SAMPLE
from processes import run_python
from variants import make

import hf_ae
from hf_ae.evaluation.evaluate import evaluate
from hf_ae.evaluation.feature_network import load_feature_network
from hf_ae.evaluation.generation import measure_generation, model_generator
from hf_ae.latents.sampling import encode_all


@pytest.fixture
def folder(tmp_path):
    """A VAE of 28×28 pixels whose likelihood can be measured."""
    model = hf_ae.VAEModel(hf_ae.VAEConfig(hidden_sizes=[16], latent_dim=2))
    model.save_pretrained(tmp_path)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    return tmp_path


def test_measuring_leaves_the_random_numbers_of_the_caller_alone(folder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    options = dict(max_images=12, samples=3, tasks="reconstruction,likelihood,generation", train_split="train")
    first = evaluate(folder, str(SAMPLE), save=False, **options)
    assert torch.equal(torch.rand(3), expected)
    second = evaluate(folder, str(SAMPLE), save=False, **options)
    assert first["likelihood"] == second["likelihood"]
    assert first["generation"]["fid"] == second["generation"]["fid"]


def test_images_beside_themselves_are_no_floor(folder):
    found = evaluate(folder, str(SAMPLE), tasks="generation", max_images=12, train_split="test", save=False)
    assert "floor" not in found["generation"]
    generator = model_generator(make("vae-mlp"))
    images = torch.rand(12, 1, 28, 28)
    network = load_feature_network()
    assert "floor" in measure_generation(generator, images, images.flip(0), network)[0]
    assert "floor" not in measure_generation(generator, images, None, network)[0]


def test_a_figure_leaves_the_backend_of_matplotlib_alone(tmp_path):
    code = """
import json, sys
import matplotlib, numpy, torch
matplotlib.use("svg")
from matplotlib import pyplot
from hf_ae.plots import latent_plane
for name, labels in (("a.png", None), ("b.png", [0, 1, 2])):
    latent_plane(numpy.eye(3, 2), labels, torch.rand(4, 1, 8, 8), (0, 1, 0, 1), sys.argv[1] + "/" + name)
print(json.dumps([matplotlib.get_backend().lower(), pyplot.get_fignums()]))
"""
    assert json.loads(run_python(code, tmp_path).splitlines()[-1]) == ["svg", []]
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_encoding_leaves_each_module_in_its_mode():
    model = make("vae-mlp").train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    encode_all(model, torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
