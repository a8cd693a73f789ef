"""Two processes: they learn what one learns with twice the batch, and train a pipeline together."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks

from hf_ae.pipelines import TextToImagePipeline

PROGRAM = Path(__file__).with_name("rank_program.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What rank_program.py left, run in one process and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(1, PROGRAM, folder)
    printed = run_ranks(2, PROGRAM, folder)
    assert "The pipeline is in" in printed[0] and "The pipeline is in" not in printed[1]
    return folder


def tensors(folder, name: str) -> list[dict]:
    """Of the one process, and of both ranks of two."""
    return [torch.load(folder / f"{name}-{place}.pt", weights_only=True) for place in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name, tolerance", [("autoencoder", 1e-5), ("vaegan", 1e-4)])
def test_gradients_are_those_of_one_process_with_twice_the_batch(folder, name, tolerance):
    """Of a VAE-GAN also: λ comes from the gradients of all processes, and the wrapped model is called as it is."""
    one, *ranks = tensors(folder, name)
    names = [k for k in one if not k.endswith("to_logits.bias")]  # whose gradient is ½ - ½ within the hinge's margin
    assert len(names) >= 8 and all(one[k].abs().max() > 0 for k in names)
    for two in ranks:
        assert max((one[k] - two[k]).abs().max() / one[k].abs().max() for k in names) < tolerance


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_codebooks_are_equal_and_those_of_one_process_with_twice_the_batch(folder, kind):
    one, first, second = tensors(folder, kind)
    assert set(one) == set(first) and any(name.endswith("codebook") for name in one)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for k in one:
        torch.testing.assert_close(first[k], one[k], rtol=1e-4, atol=1e-5)


def test_a_pipeline_is_trained_and_its_images_are_encoded_once(folder):
    pipe = TextToImagePipeline.from_pretrained(folder / "pipeline")
    assert pipe("rocket", seed=0).images[0].size == (32, 32)
    assert len(list((folder / "pipeline" / "latents").rglob("*.safetensors"))) == 1
