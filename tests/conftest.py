"""What several test files need. No test reaches a host other than this one."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_ae_tests_")  # each of several pytest processes has its own caches
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are no faster with more, and two tests run at a time
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
SAMPLE = Path(__file__).parent / "data" / "fashion_mnist_sample"
TOGETHER = {"test_space_api": "test_space"}
"""File -> that of the tests whose process it belongs to, since both need the Space."""
FIRST = ("test_space", "test_hub", "test_models", "test_training", "test_space_folder", "test_generation")
"""What takes longest begins first, so that the processes of pytest end at about the same time."""


def piece_of_work(nodeid: str) -> str:
    """The name of the file that a test lies in, or of the one that it goes with."""
    name = Path(nodeid.split("::")[0]).stem
    return TOGETHER.get(name, name)


def pytest_collection_modifyitems(items):
    pieces = [piece_of_work(item.nodeid) for item in items]
    rank = [FIRST.index(piece) if piece in FIRST else len(FIRST) for piece in pieces]
    items[:] = [items[i] for i in sorted(range(len(items)), key=rank.__getitem__)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `pytest -n 2 --dist loadfile`, a process takes one piece of work after the other."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = piece_of_work
    return scheduler


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


def pytest_ignore_collect(collection_path, config):
    """Other projects' suites are slow, and collecting them fetches them."""
    return True if config.option.markexpr == "not slow" and collection_path.name.endswith("_suite.py") else None
