"""The folders of model_cards/."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.parent for path in ROOT.glob("model_cards/*/preprocessor_config.json"))
PIPELINES = sorted(path.parent for path in ROOT.glob("model_cards/*/model_index.json"))


def as_in_git(folder: Path, target: Path) -> Path:
    """A copy, with links to the weights, without the code that `make cards` and `hf-ae push` write."""
    own = ("dataset.py", "align_text_encoder.py", "scenes.py")

    def written(_, names):
        return [name for name in names if name == "__pycache__" or (name.endswith(".py") and name not in own)]

    def copy(source, target):
        (os.symlink if source.endswith(".safetensors") else shutil.copyfile)(source, target)

    return Path(shutil.copytree(folder, target, ignore=written, copy_function=copy))
