"""A folder of a model, a pipeline or a Space is a Hub repository: its code, its check, its upload. Its card is written by `cards`."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from huggingface_hub import HfApi

from .cards import front_matter, write_card
from .pipeline_folder import components, has_code, read_json, write_code

ALLOWED = (
    r"README\.md|recipe[\w-]*\.yaml|(model_index|config|preprocessor_config|metrics)\.json|\.gitattributes|[a-z_]+\.py|[\w-]+\.(png|jpg)"
)
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|sampler\.safetensors"
"""At the top of a model folder."""
COMPONENT_FILES = r"[\w.-]+\.(safetensors|json|txt|model|jinja|py)"
"""In the folder of a pipeline's component."""
SPACE_FILES = r"README\.md|requirements\.txt|packages\.txt|\.gitattributes|[a-z_]+\.(py|css)|[\w-]+\.(png|jpg)|examples/[\w-]+\.(png|jpg)"
SPACE_CARD = ["title", "sdk", "sdk_version", "app_file", "license"]
RUN_FILES = re.compile(r"(checkpoint-\d+|samples|latents|logs|__pycache__|\..*)/|\.hf_ae_run")
"""What a training run leaves beside the model: never uploaded."""


def refresh(folder):
    """Bring the code beside a checkpoint or in a pipeline, and the card, up to this version of the package. The weights stay."""
    from transformers.dynamic_module_utils import get_relative_import_files

    folder, package = Path(folder), Path(__file__).parent.parent / "models"
    if (folder / "model_index.json").is_file():
        write_code(folder)
    else:
        used: set[str] = set()
        for name in ("config.json", "preprocessor_config.json"):
            for target in read_json(folder / name)["auto_map"].values():
                entry = package / f"{target.split('.')[0]}.py"
                used |= {entry.name, *(Path(p).name for p in get_relative_import_files(str(entry)))}
        for path in folder.glob("*.py"):
            path.unlink()
        for name in used:
            (folder / name).write_text((package / name).read_text())
    write_card(folder)


def is_space(folder: Path) -> bool:
    """Whether the card of a folder says that it is a Space."""
    card = folder / "README.md"
    return card.is_file() and bool(front_matter(card.read_text()).get("sdk"))


def check_space(folder: Path) -> list[str]:
    """The files of a Space's folder to upload. Raises ValueError where one is missing, does not belong or is no Python."""
    files = files_of(folder)
    check_card(folder / "README.md", SPACE_CARD)
    needed = [front_matter((folder / "README.md").read_text())["app_file"], "requirements.txt"]
    if missing := [name for name in needed if name not in files]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    check_stray(folder, files, SPACE_FILES, "a Space")
    for name in (f for f in files if f.endswith(".py")):
        try:
            compile((folder / name).read_text(), name, "exec")
        except SyntaxError as error:
            raise ValueError(f"{folder / name} is no Python: {error}") from None
    return files


def files_of(folder: Path) -> list[str]:
    """All files of a folder but those that a run leaves."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [f for f in files if not RUN_FILES.match(f)]


def check_stray(folder: Path, files: list[str], allowed: str, what: str):
    """Raise ValueError where a file does not fit the pattern."""
    if stray := [f for f in files if not re.fullmatch(allowed, f)]:
        raise ValueError(f"{folder} holds files that do not belong in {what}: {', '.join(stray[:5])}. Remove them first.")


def check_folder(folder) -> list[str]:
    """The files of a model, pipeline or Space folder to upload. Raises ValueError where one is missing, broken or does not belong.

    What save_pipeline would write of code into a pipeline folder, and is not there, is written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    if is_space(folder):
        return check_space(folder)
    is_pipeline = (folder / "model_index.json").is_file()
    needed = (
        [*(f"{name}/" for name in components(folder)), "README.md"]
        if is_pipeline
        else ["config.json", "preprocessor_config.json", "README.md"]
    )
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    if is_pipeline and not has_code(folder):
        write_code(folder)
    parts = components(folder) if is_pipeline else {"": ("transformers", "AutoModel")}
    files = files_of(folder)
    inside = rf"({'|'.join(parts)})/{COMPONENT_FILES}" if is_pipeline else WEIGHTS
    check_stray(folder, files, rf"{ALLOWED}|{inside}", "a model repository")
    check_card(folder / "README.md", ["tags"] if is_pipeline else ["license", "tags"])
    named = [
        v.split(".")[0] for f in ("config.json", "preprocessor_config.json") for v in read_json(folder / f).get("auto_map", {}).values()
    ]
    for path in folder.glob("*.py"):
        named += re.findall(r"^from \.(\w+) import", path.read_text(), re.M)
    absent = sorted({f"{name}.py" for name in named} - set(files))
    if absent:
        raise ValueError(f"{folder} lacks remote code that its files need: {', '.join(absent)}. Save the model again with save_pretrained.")
    for name, (library, class_name) in parts.items():
        check_loads(folder / name, library, class_name)
    return files


def check_card(path: Path, needed: list[str]):
    """Raise ValueError unless the card has front matter with the `needed` fields, and text."""
    text = path.read_text()
    lacking = [k for k in needed if not front_matter(text).get(k)]
    if lacking or not re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).strip():
        raise ValueError(f"The card {path} is not complete: {', '.join(lacking) or 'text'} is missing from it.")


def check_loads(folder: Path, library: str, class_name: str):
    """Raise ValueError unless the folder loads as that class, a model with every weight from the file."""
    import torch
    from transformers import AutoModel

    try:
        ours = library.startswith("modeling_hf_ae_")
        module = "hf_ae.pipelines" if library == "pipeline" else library
        cls = AutoModel if ours else getattr(importlib.import_module(module), class_name)
        is_model = cls is AutoModel or issubclass(cls, torch.nn.Module)
        loaded = cls.from_pretrained(folder, **({"output_loading_info": True} if is_model else {}))
    except Exception as error:
        raise ValueError(f"The model in {folder} does not load: {first_line(error)}") from None
    info = loaded[1] if is_model else {}
    problems = [
        f"{kind.replace('_', ' ')} {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    if problems:
        raise ValueError(f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")


def push_folder(folder, repo: str, private: bool = False, dry_run: bool = False) -> str:
    """Check a folder of a model, a pipeline or a Space and upload it to the Hub repository `repo` in one commit; returns its address.

    Nothing is uploaded when the check fails (ValueError) or with `dry_run`; nothing is committed when nothing changed.
    """
    files = check_folder(folder)
    api, header = HfApi(), front_matter((Path(folder) / "README.md").read_text())
    kind, prefix = ("space", "spaces/") if header.get("sdk") else ("model", "")
    if dry_run:
        return f"{api.endpoint}/{prefix}{repo}"
    try:
        repo = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True, space_sdk=header.get("sdk")).repo_id
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, allow_patterns=files, commit_message="Upload with hf_ae")
    except Exception as error:  # refused, offline, or no such host: each client library has its own exceptions
        raise ValueError(f"Nothing was uploaded to {repo}; {folder} is as it was: {first_line(error)}") from None
    return f"{api.endpoint}/{prefix}{repo}"


def check_login():
    """Raise ValueError unless the Hub can be reached with a valid token."""
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(f"push_to_hub needs a login (hf auth login) and the Hub: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What an exception says, without its tail."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
