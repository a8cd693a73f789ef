"""What several test files need. No test reaches a host other than this one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are no faster with more, and several tests run at a time
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "data" / "fashion_mnist_sample"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each test that trains in this process makes its own Accelerator."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def train_args(tmp_path):
    """Arguments of a short training on the bundled sample; keywords override."""
    from hf_ae.train import ImageTrainingArguments

    def make(**values):
        defaults = dict(
            dataset_name=str(SAMPLE), output_dir=str(tmp_path / "run"), max_train_samples=200, max_eval_samples=50,
            max_train_steps=4, train_batch_size=20, config_overrides="hidden_sizes=[16],latent_dim=4",
            validation_epochs=0,
        )  # fmt: skip
        return ImageTrainingArguments(**{**defaults, **values})

    return make


@pytest.fixture(scope="session")
def space():
    """The address of the Space, which runs in a process of its own."""
    pytest.importorskip("gradio", reason="the Space needs pip install 'hf_ae[space]'")
    from space_server import running_space

    with running_space() as url:
        yield url


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the text-to-image pipeline, of all its modules."""
    from hf_ae.pipelines import repo_parts

    logged: list[str] = []
    monkeypatch.setattr(repo_parts.logger, "warning", logged.append)
    return logged
