"""Check the folder of a model, a pipeline or a Space, and upload it to the Hub."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line, require
from ..loading import HUB_ERRORS, LOADING_ERRORS
from ..training.arguments import TrainingArguments, write_recipe
from ..training.output_folder import ADAPTERS, end_run
from .card_parts import body_of, front_matter, read_card
from .cards import write_card
from .eval_results import check_eval_results
from .files import read_json
from .pipeline_folder import components, has_pipeline_code, pipeline_classes, write_pipeline_code
from .remote_code import has_model_code, write_model_code

ALLOWED = (
    r"README\.md|recipe[\w-]*\.yaml|(model_index|config|preprocessor_config|metrics)\.json|\.gitattributes"
    r"|[a-z_]+\.py|[\w-]+\.(png|jpg)|\.eval_results/[\w.-]+\.yaml"
    r"|map\.html|onnxruntime-web\.js"
)
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(sampler|anomaly_detector)\.safetensors"
"""At the top of a model folder."""
COMPONENT_FILES = r"[\w.-]+\.(safetensors|json|txt|model|jinja|py)"
"""In the folder of a pipeline's component."""
SPACE_FILES = (
    r"README\.md|requirements\.txt|packages\.txt|\.gitattributes|[a-z_]+\.(py|css)|[\w-]+\.(png|jpg)"
    r"|examples/[\w-]+\.(png|jpg)"
)
SPACE_CARD = ["title", "sdk", "sdk_version", "app_file", "license"]
RUN_FILES = re.compile(r"(checkpoint-\d+|samples|latents|logs|__pycache__|\.(?!eval_results/).*)/|\.hf_ae_run")
"""What a training run leaves beside the model: never uploaded."""
LIBRARIES = ("diffusers", "transformers")
"""What the components of a pipeline may come from, beside hf_ae: nothing else is imported by a name in a file."""


def refresh(folder: str | Path) -> None:
    """Bring the code beside a checkpoint or in a pipeline, and the card, up to this version of the package."""
    write_code(Path(folder))
    write_card(folder)


def write_code(folder: Path) -> None:
    """Write the code that the folder of a model or a pipeline carries. The weights stay."""
    if (folder / "model_index.json").is_file():
        write_pipeline_code(folder)
    elif not (folder / ADAPTERS).is_file():
        write_model_code(folder)


def check_folder(folder: str | Path, dry_run: bool = False) -> list[str]:
    """The files of a model, pipeline or Space folder to upload. Raises ValueError where one is missing, broken or does
    not belong.

    Code that the folder should carry and that is not there is written; with `dry_run` into a copy, so that the folder
    stays as it is.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder} is no folder.")
    if is_space(folder):
        return check_space(folder)
    if not dry_run:
        return check_model_folder(folder)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / (folder.resolve().name or "model")
        shutil.copytree(folder, copy, ignore=ignored_files(folder), copy_function=copy_or_link)
        try:
            return check_model_folder(copy)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(folder))) from error


def ignored_files(folder: Path) -> Callable[[str, list[str]], set[str]]:
    """What a copy of the folder leaves out: all that a run leaves."""

    def ignored(place: str, names: list[str]) -> set[str]:
        top = Path(place).relative_to(folder).as_posix()
        return {n for n in names if top == "." and RUN_FILES.match(f"{n}/" if Path(place, n).is_dir() else n)}

    return ignored


def copy_or_link(source: str, target: str) -> None:
    """A copy of a file; of weights, which are large and never written, a link."""
    if source.endswith(".safetensors"):
        os.symlink(Path(source).resolve(), target)
    else:
        shutil.copy2(source, target)


def check_model_folder(folder: Path) -> list[str]:
    """`check_folder` of a model, a pipeline or adapters."""
    is_pipeline = (folder / "model_index.json").is_file()
    if (folder / ADAPTERS).is_file() and not is_pipeline:
        return check_lora(folder)
    kind = read_json(folder / "config.json").get("model_type")
    foreign = not is_pipeline and kind is not None and not str(kind).startswith("hf_ae_")
    takes = "hf-ae push takes models of hf_ae, pipelines with one inside, and Spaces"
    require(not foreign, f"{folder} holds a {kind!r} model, and {takes}: upload others with hf upload.")
    parts = components(folder) if is_pipeline else {"": ("transformers", "AutoModel")}
    needed = [f"{name}/" for name in parts] if is_pipeline else ["config.json", "preprocessor_config.json"]
    check_there(folder, [*needed, "README.md"])
    if not (has_pipeline_code(folder) if is_pipeline else has_model_code(folder)):
        write_code(folder)
        parts = components(folder) if is_pipeline else parts
    files = files_of(folder)
    inside = rf"({'|'.join(parts)})/{COMPONENT_FILES}" if is_pipeline else WEIGHTS
    check_stray(folder, files, rf"{ALLOWED}|{inside}", "a model repository")
    check_card(folder / "README.md", ["tags"] if is_pipeline else ["license", "tags"])
    check_eval_results(folder)
    for name, (library, class_name) in parts.items():
        check_loads(folder / name, library, class_name)
    return files


def check_lora(folder: Path) -> list[str]:
    """`check_folder` of a denoiser's adapters."""
    check_there(folder, ["README.md"])
    files = files_of(folder)
    check_stray(folder, files, rf"{ALLOWED}|{re.escape(ADAPTERS)}", "a repository of adapters")
    check_card(folder / "README.md", ["tags"])
    try:
        with safe_open(folder / ADAPTERS, "pt") as weights:
            names = list(weights.keys())
    except SafetensorError as error:
        raise UserError(f"{folder / ADAPTERS} cannot be read: {first_line(error)}") from error
    good = names and all("lora" in name for name in names)
    require(good, f"{folder / ADAPTERS} holds other weights than adapters.")
    return files


def is_space(folder: Path) -> bool:
    """Whether the card of a folder says that it is a Space."""
    card = folder / "README.md"
    return card.is_file() and bool(front_matter(read_card(card)).get("sdk"))


def check_space(folder: Path) -> list[str]:
    """The files of a Space's folder to upload. Raises ValueError where one is missing, does not belong or is no
    Python."""
    files = files_of(folder)
    check_card(folder / "README.md", SPACE_CARD)
    check_there(folder, [front_matter(read_card(folder / "README.md"))["app_file"], "requirements.txt"])
    check_stray(folder, files, SPACE_FILES, "a Space")
    for name in (f for f in files if f.endswith(".py")):
        try:
            compile((folder / name).read_text(), name, "exec")
        except SyntaxError as error:
            raise UserError(f"{folder / name} is no Python: {error}") from error
    return files


def files_of(folder: Path) -> list[str]:
    """All files of a folder but those that a run leaves."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [f for f in files if not RUN_FILES.match(f)]


def check_there(folder: Path, needed: Sequence[str]) -> None:
    """Raise ValueError where a file or folder is missing."""
    missing = [name for name in needed if not (folder / name).exists()]
    require(not missing, f"{folder} lacks {', '.join(missing)}.")


def check_stray(folder: Path, files: Sequence[str], allowed: str, what: str) -> None:
    """Raise ValueError where a file does not fit the pattern."""
    stray = [f for f in files if not re.fullmatch(allowed, f)]
    require(
        not stray, f"{folder} holds files that do not belong in {what}: {', '.join(stray[:5])}. Remove them first."
    )


def check_card(path: Path, needed: Sequence[str]) -> None:
    """Raise ValueError unless the card has front matter with the `needed` fields, and text."""
    text = read_card(path)
    lacking = [k for k in needed if not front_matter(text).get(k)]
    complete = not lacking and body_of(text)
    require(complete, f"The card {path} is not complete: {', '.join(lacking) or 'text'} is missing from it.")


def component_class(library: str, class_name: str) -> Any:
    """The class of a pipeline's component, of hf_ae or of LIBRARIES. Raises ValueError for any other."""
    from transformers import AutoModel

    if library.startswith("modeling_hf_ae_"):
        return AutoModel
    if ours := pipeline_classes().get(class_name):
        return ours
    known = f"components come from {', '.join(LIBRARIES)} or hf_ae"
    require(library in LIBRARIES, f"model_index.json names the library {library!r}, and {known}.")
    cls = getattr(importlib.import_module(library), class_name, None)
    loads = isinstance(cls, type) and hasattr(cls, "from_pretrained")
    require(loads, f"model_index.json names {library}.{class_name}, which is no class that loads a component.")
    return cls


def check_loads(folder: Path, library: str, class_name: str) -> None:
    """Raise ValueError unless the folder loads as that class, a model from safetensors with every weight from the
    file."""
    import torch
    from transformers import AutoModel

    cls = component_class(library, class_name)
    is_model = cls is AutoModel or issubclass(cls, torch.nn.Module)
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True} if is_model else {}
    try:
        loaded = cls.from_pretrained(folder, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"The model in {folder} does not load: {first_line(error)}") from error
    info = loaded[1] if is_model else {}
    kinds = [kind for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)]
    problems = [f"{kind.replace('_', ' ')} {sorted(map(str, info[kind]))[0]}" for kind in kinds]
    require(not problems, f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")


def push_folder(folder: str | Path, repo: str, private: bool = False, dry_run: bool = False) -> str:
    """Check a folder of a model, a pipeline or a Space and upload it to the Hub repository `repo` in one commit;
    returns its address.

    Nothing is uploaded when the check fails (ValueError) or with `dry_run`; nothing is committed when nothing changed.
    """
    check_repo_id(repo)
    files = check_folder(folder, dry_run)
    api, header = HfApi(), front_matter(read_card(Path(folder) / "README.md"))
    kind, prefix = ("space", "spaces/") if header.get("sdk") else ("model", "")
    if dry_run:
        return f"{api.endpoint}/{prefix}{repo}"
    return upload(Path(folder), files, repo, kind, private, header.get("sdk"))


def check_repo_id(repo: str) -> None:
    """Raise ValueError unless it is owner/name as the Hub has them."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"The Hub has no repository {repo!r}: {first_line(error)}") from error
    require("/" in repo, f"The repository {repo!r} has no owner: write owner/name.")


def push_dataset(folder: str | Path, repo: str) -> str:
    """Upload a folder of parquet files and its card to the dataset repository `repo`; returns its address. Raises
    ValueError."""
    return upload(Path(folder), ["README.md", "data/*.parquet"], repo, "dataset")


def upload(
    folder: Path, files: list[str], repo: str, kind: str, private: bool | None = None, sdk: str | None = None
) -> str:
    """Create the repository where it is not there, and upload the files in one commit; returns its address. Raises
    ValueError."""
    api, prefix = HfApi(), "" if kind == "model" else f"{kind}s/"
    try:
        created = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk)
    except HUB_ERRORS as error:  # refused, offline, no such host, no name of a repository
        raise UserError(f"Nothing was uploaded, and {repo} was not created: {first_line(error)}") from error
    try:
        repo = created.repo_id
        where: dict[str, Any] = dict(repo_id=repo, repo_type=kind, commit_message="Upload with hf_ae")
        api.upload_folder(folder_path=folder, allow_patterns=files, **where)
    except HUB_ERRORS as error:
        said = f"The repository {repo} is there, but no file was uploaded to it"
        raise UserError(f"{said}: {first_line(error)}") from error
    return f"{api.endpoint}/{prefix}{repo}"


def publish(args: TrainingArguments, log: Callable[[str], Any], recipe: str = "recipe.yaml") -> None:
    """Complete the folder of a finished training with its recipe and card, and push it where that is asked."""
    folder = Path(args.output_dir)
    write_recipe(args, folder / recipe)
    write_card(folder)
    end_run(folder)
    if args.push_to_hub:
        log(f"Pushed to {push_folder(folder, args.hub_model_id or folder.resolve().name, args.hub_private)}")


def check_publishing(args: TrainingArguments) -> None:
    """Raise ValueError, before a training, for a card that cannot be kept up and, with `push_to_hub`, unless the Hub
    can be reached with a valid token."""
    read_card(Path(args.output_dir) / "README.md")
    if not args.push_to_hub:
        return
    try:
        HfApi().whoami()
    except HUB_ERRORS as error:
        raise UserError(f"push_to_hub needs a login (hf auth login) and the Hub: {first_line(error)}") from error
