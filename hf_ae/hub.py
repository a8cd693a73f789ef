"""A model folder is a Hub repository: its card, its check, its upload."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.repocard_data import EvalResult

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
ALLOWED = re.compile(
    r"README\.md|recipe\.yaml|config\.json|preprocessor_config\.json|metrics\.json|\.gitattributes|[a-z_]+\.py|[\w-]+\.(png|jpg)"
)
RUN_FILES = re.compile(r"(checkpoint-\d+|samples|logs|__pycache__|\..*)/|\.hf_ae_run")
"""What a training run leaves beside the model: never uploaded."""
METRIC_NAMES = {
    "mse": "MSE",
    "squared_error_per_image": "squared error per image",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "log_likelihood_bound": "bound on log p(x) (nats)",
}

TITLES = {
    "hf_ae_autoencoder": "An autoencoder",
    "hf_ae_sparse": "A sparse autoencoder",
    "hf_ae_denoising": "A denoising autoencoder",
    "hf_ae_contractive": "A contractive autoencoder",
    "hf_ae_vae": "A variational autoencoder",
    "hf_ae_beta_vae": "A β-VAE",
}


def read_json(path: Path) -> dict:
    """The file's content, {} where there is none. Raises ValueError where it is broken."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None


def write_card(folder) -> Path:
    """Write `folder`/README.md from what lies beside it: config.json, recipe.yaml, metrics.json and pictures.

    A hand-written section "## Notes" of an earlier card is kept.
    """
    folder = Path(folder)
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    recipe_path = folder / "recipe.yaml"
    recipe = yaml.safe_load(recipe_path.read_text()) if recipe_path.is_file() else {}
    dataset = recipe.get("dataset_name") or metrics.get("dataset")
    name = folder.resolve().name
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        tags=["hf_ae", "autoencoder", config.get("model_type", "").removeprefix("hf_ae_")],
        datasets=[dataset] if dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not Path(dataset).exists() else None,
        model_name=name if metrics else None,
        eval_results=eval_results(metrics) if metrics else None,
    )
    old = (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""
    notes = re.search(r"^## Notes\n.*", old, re.S | re.M)
    sections = [f"# {name}", summary(config, dataset), *picture_section(folder), use_section(name)]
    if metrics:
        sections.append(results_section(metrics))
    if recipe:
        sections.append(training_section(recipe))
    sections.append(notes.group(0).strip() if notes else "")
    path = folder / "README.md"
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n")
    return path


def summary(config: dict, dataset: str | None) -> str:
    """What the model is, in two sentences."""
    height, width = config["image_size"] if isinstance(config["image_size"], list) else [config["image_size"]] * 2
    code = f"{config['latent_dim']} numbers" if config["latent_dim"] else f"a map of {config['latent_channels']} channels"
    kind = TITLES.get(config["model_type"], "An autoencoder")
    about = f"{kind} (`{config['model_type']}`, network `{config['network']}`, {config['hidden_sizes']}) of {height}×{width} images"
    text = f"{about} with {config['num_channels']} channel(s)" + (f", trained on `{dataset}`" if dataset else "")
    text += f". Its code is {code}. Made with hf_ae: every autoencoder as a Hugging Face model."
    if config.get("upsample") == "unpool":
        text += (
            "\n\nThe decoder also gets the positions of the maxima that the encoder's pooling kept (`pool_positions`): a "
            "reconstruction uses more than the code alone, so its error is not comparable with models that decode the code alone."
        )
    return text


def picture_section(folder: Path) -> list[str]:
    captions = {
        "reconstructions.png": "Held-out images and what becomes of them",
        "latent_plane.png": "The latent plane: codes of held-out images, and what the decoder draws all over it",
    }
    return [f"![{text}]({name})" for name, text in captions.items() if (folder / name).is_file()]


def use_section(name: str) -> str:
    return f"""## Use

```python
import hf_ae  # registers the family; without it, load with trust_remote_code=True
from transformers import AutoImageProcessor, AutoModel

repo = "{name}"  # this folder, or its id on the Hub
model = AutoModel.from_pretrained(repo).eval()
processor = AutoImageProcessor.from_pretrained(repo)
inputs = processor("image.png", return_tensors="pt")
encoded = model.encode(**inputs)  # .latents
reconstruction = processor.postprocess(model(**inputs).reconstruction)[0]  # a PIL image
```"""


def results_section(metrics: dict) -> str:
    """A table of each row of metrics.json."""
    rows = [key for key in ("reconstruction", "pca", "denoising_input", "denoising") if key in metrics]
    names = {"reconstruction": "this model", "pca": f"PCA, {metrics['code_size']} components",
             "denoising_input": "damaged image, as it is", "denoising": "this model, from the damaged image"}  # fmt: skip
    columns = list(metrics.get("reconstruction", {}))
    table = ["| | " + " | ".join(METRIC_NAMES[c] for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    table += [f"| {names[r]} | " + " | ".join(f"{metrics[r][c]:.4g}" for c in columns) + " |" for r in rows]
    text = f"## Results\n\nOn {metrics['images']:,} images of split `{metrics['split']}` of `{metrics['dataset']}`:"
    text += "\n\n" + "\n".join(table) if rows else ""
    if "likelihood" in metrics:
        bound = metrics["likelihood"]
        text += (
            f"\n\nLog-likelihood under {bound['model']}: evidence lower bound {bound['elbo']:.2f} nats, importance-weighted bound "
            f"{bound['log_likelihood_bound']:.2f} nats ({bound['samples']:,} samples, {bound['images']:,} images)."
        )
    return text + "\n\nPrinted by\n\n```\n" + metrics["command"] + "\n```"


def training_section(recipe: dict) -> str:
    return (
        "## Training\n\n```\naccelerate launch -m hf_ae.train recipe.yaml\n```\n\n```yaml\n"
        + yaml.safe_dump(recipe, sort_keys=False)
        + "```"
    )


def eval_results(metrics: dict) -> list[EvalResult]:
    """metrics.json -> the card's model-index."""
    values = {**metrics.get("reconstruction", {})}
    if "likelihood" in metrics:
        values["log_likelihood_bound"] = metrics["likelihood"]["log_likelihood_bound"]
    return [
        EvalResult(
            task_type="image-reconstruction",
            task_name="Image reconstruction",
            dataset_type=metrics["dataset"],
            dataset_name=metrics["dataset"],
            dataset_split=metrics["split"],
            metric_type=key,
            metric_name=METRIC_NAMES[key],
            metric_value=round(value, 6),
        )
        for key, value in values.items()
    ]


def refresh(folder):
    """Bring the code beside a checkpoint, and its card, up to this version of the package. The weights stay."""
    from transformers.dynamic_module_utils import get_relative_import_files

    folder, package = Path(folder), Path(__file__).parent
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


def check_folder(folder) -> list[str]:
    """The files of a model folder to upload. Raises ValueError where something is missing, broken or does not belong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [f for f in files if not RUN_FILES.match(f)]
    stray = [f for f in files if not (WEIGHTS.fullmatch(f) or ALLOWED.fullmatch(f))]
    if stray:
        raise ValueError(f"{folder} holds files that do not belong in a model repository: {', '.join(stray[:5])}. Remove them first.")
    missing = [f for f in ("config.json", "preprocessor_config.json", "README.md") if f not in files]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    check_card(folder / "README.md")
    named = [
        v.split(".")[0] for f in ("config.json", "preprocessor_config.json") for v in read_json(folder / f).get("auto_map", {}).values()
    ]
    for path in folder.glob("*.py"):
        named += re.findall(r"^from \.(\w+) import", path.read_text(), re.M)
    absent = sorted({f"{name}.py" for name in named} - set(files))
    if absent:
        raise ValueError(f"{folder} lacks remote code that its files need: {', '.join(absent)}. Save the model again with save_pretrained.")
    check_weights(folder)
    return files


def check_card(path: Path):
    """Raise ValueError unless the card has front matter with a licence and tags, and text."""
    front = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(), re.S)
    fields = yaml.safe_load(front.group(1)) if front else None
    lacking = [k for k in ("license", "tags") if not (isinstance(fields, dict) and fields.get(k))]
    if lacking or not front or not front.group(2).strip():
        raise ValueError(f"The card {path} is not complete: {', '.join(lacking) or 'text'} is missing from it.")


def check_weights(folder: Path):
    """Raise ValueError unless the folder loads as a model, every weight from the file."""
    from transformers import AutoModel

    try:
        _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"The model in {folder} does not load: {first_line(error)}") from None
    problems = [
        f"{kind.replace('_', ' ')} {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    if problems:
        raise ValueError(f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")


def push_folder(folder, repo: str, private: bool = False, dry_run: bool = False) -> str:
    """Check a model folder and upload it to the Hub repository `repo` in one commit; returns the repository's address.

    Nothing is uploaded when the check fails (ValueError) or with `dry_run`; nothing is committed when nothing changed.
    """
    files = check_folder(folder)
    api = HfApi()
    address = f"{api.endpoint}/{repo}"
    if dry_run:
        return address
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=files, commit_message="Upload with hf_ae")
    except Exception as error:  # refused, offline, or no such host: each client library has its own exceptions
        raise ValueError(f"Nothing was uploaded to {repo}; {folder} is as it was: {first_line(error)}") from None
    return f"{api.endpoint}/{repo}"


def check_login():
    """Raise ValueError unless the Hub can be reached with a valid token."""
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(f"push_to_hub needs a login (hf auth login) and the Hub: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What an exception says, without its tail."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
