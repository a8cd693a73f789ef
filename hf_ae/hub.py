"""A model or pipeline folder is a Hub repository: its card, its check, its upload."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.repocard_data import EvalResult
from safetensors.torch import load_file

from .pipeline_folder import components, has_code, read_json, write_code

ALLOWED = (
    r"README\.md|recipe[\w-]*\.yaml|(model_index|config|preprocessor_config|metrics)\.json|\.gitattributes|[a-z_]+\.py|[\w-]+\.(png|jpg)"
)
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|sampler\.safetensors"
"""At the top of a model folder."""
COMPONENT_FILES = r"[\w.-]+\.(safetensors|json|txt|model|jinja|py)"
"""In the folder of a pipeline's component."""
RUN_FILES = re.compile(r"(checkpoint-\d+|samples|latents|logs|__pycache__|\..*)/|\.hf_ae_run")
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
    "hf_ae_vaegan": "A variational autoencoder with a discriminator",
    "hf_ae_compressive": "A compressive autoencoder",
}


def write_card(folder) -> Path:
    """Write `folder`/README.md from what lies beside it: the configuration, recipe.yaml, metrics.json and pictures.

    A hand-written section "## Notes" of an earlier card is kept, and its licence.
    """
    folder = Path(folder)
    is_pipeline, metrics = (folder / "model_index.json").is_file(), read_json(folder / "metrics.json")
    recipe_path = folder / "recipe.yaml"
    recipe = yaml.safe_load(recipe_path.read_text()) if recipe_path.is_file() else {}
    dataset = recipe.get("dataset_name") or metrics.get("dataset")
    name = folder.resolve().name
    old = (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""
    notes = re.search(r"^## Notes\n.*", old, re.S | re.M)
    front: dict[str, Any]
    if is_pipeline:
        front = dict(library_name="diffusers", pipeline_tag="text-to-image", tags=["hf_ae", "text-to-image", "latent-diffusion"])
        sections = [pipeline_summary(dataset), *picture_section(folder), pipeline_use_section(name), components_section(folder)]
        sections += [figures_section(metrics)] if metrics else []
    else:
        config = read_json(folder / "config.json")
        tags = ["hf_ae", "autoencoder", config.get("model_type", "").removeprefix("hf_ae_")]
        front = dict(license="apache-2.0", library_name="transformers", tags=tags)
        front |= dict(model_name=name, eval_results=eval_results(metrics)) if metrics else {}
        sections = [summary(config, dataset), *picture_section(folder), use_section(name)]
        sections += [codec_section(name)] if config.get("model_type") == "hf_ae_compressive" else []
        sections += [results_section(metrics)] if metrics else []
    if license := front_matter(old).get("license"):
        front["license"] = license
    if dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not Path(dataset).exists():
        front["datasets"] = [dataset]
    if recipe:
        sections.append(training_section(recipe, "train_latent_diffusion" if is_pipeline else "train"))
    if notes:
        sections.append(notes.group(0).strip())
    path = folder / "README.md"
    path.write_text(f"---\n{ModelCardData(**front).to_yaml()}\n---\n\n" + "\n\n".join([f"# {name}", *sections]) + "\n")
    return path


def front_matter(card: str) -> dict:
    """The fields at the top of a card, {} where there are none."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.S)
    try:
        fields = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        fields = None
    return fields if isinstance(fields, dict) else {}


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
        "samples.png": "Pictures drawn from prompts" if (folder / "model_index.json").is_file() else "Generated pictures",
        "samples-of-captions.png": "Pictures drawn from captions of the dataset",
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


def codec_section(name: str) -> str:
    return f"""As an image codec (`pip install 'hf_ae[codec]'`):

```python
from hf_ae.codec import compress, decompress

data = compress(model, "image.png", quality=0.5)  # the bytes of an .hfae file; quality from 0 to 1
picture = decompress(data, model)
```

On the command line: `hf-ae compress image.png -o image.hfae --model {name}` and `hf-ae decompress image.hfae -o image.png`"""


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
    if "compression" in metrics:
        text += f"\n\nWhole files of {metrics['compression']['images']:,} pictures at their own size, means:\n\n"
        text += "| quality | bytes | bits per pixel | PSNR (dB) |\n| ---: | ---: | ---: | ---: |\n"
        qualities = metrics["compression"]["qualities"].items()
        text += "\n".join(f"| {q} | {v['bytes']:,.0f} | {v['bpp']:.3f} | {v['psnr']:.2f} |" for q, v in qualities)
    if rows or "likelihood" in metrics or "compression" in metrics:
        text += f"\n\nPrinted by\n\n```\n{metrics['command']}\n```"
    return text + (generation_table(metrics["generation"]) if "generation" in metrics else "")


def generation_table(found: dict) -> str:
    """Generated pictures beside real ones of the training split, in the same features."""
    network = "the feature network of hf_ae" if found["features"] == "hf_ae" else f"`{found['features']}`"
    columns = {
        "fid": "FID",
        "kid": "KID × 1000",
        "precision": "precision",
        "recall": "recall",
        "density": "density",
        "coverage": "coverage",
    }
    text = f"\n\nGenerated pictures ({found['images']:,}, sampled from: {found['sampler']}), in features of {network}; figures in other "
    text += "features, such as Inception's, cannot be compared:\n\n"
    text += "| | " + " | ".join(columns.values()) + " |\n| --- |" + " ---: |" * len(columns) + "\n"
    for title, values in (("generated", found), ("real, of the training split", found["floor"])):
        text += f"| {title} | " + " | ".join(f"{values[name]:.3g}" for name in columns) + " |\n"
    text += f"\n{found['seconds_per_image'] * 1000:.3g} ms a picture."
    if "classification_accuracy" in found:
        text += f" A classifier trained on generated pictures alone gets {found['classification_accuracy']:.1%} of the real ones right."
    return text + f"\n\nPrinted by\n\n```\n{found['command']}\n```"


def pipeline_summary(dataset: str | None) -> str:
    trained = f", trained on `{dataset}`" if dataset else ""
    return (
        f"A latent-diffusion pipeline that draws pictures from prompts{trained}: a U-Net turns noise into a code, "
        "guided by the text, and the decoder of an autoencoder turns the code into a picture. "
        "Made with hf_ae: every autoencoder as a Hugging Face model."
    )


def pipeline_use_section(name: str) -> str:
    return f"""## Use

```python
from hf_ae.pipelines import TextToImagePipeline

repo = "{name}"  # this folder, or its id on the Hub
pipe = TextToImagePipeline.from_pretrained(repo)
pipe("a slice of pizza").images[0].save("pizza.png")
```

Without hf_ae, `diffusers` runs the code that the repository carries:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
```

On the command line: `hf-ae generate "a slice of pizza" --model {name} -o pizza.png`"""


def components_section(folder: Path) -> str:
    """A table of a pipeline's components; sizes are those of the stored tensors."""
    rows = []
    for name, (library, class_name) in components(folder).items():
        tensors = [t for path in (folder / name).glob("*.safetensors") for t in load_file(path).values()]
        count, dtypes = sum(t.numel() for t in tensors), {str(t.dtype).removeprefix("torch.") for t in tensors}
        source = "hf_ae" if library == "pipeline" or library.startswith("modeling_hf_ae_") else library
        rows.append(f"| `{name}` | {source} `{class_name}` | {f'{count:,}' if tensors else ''} | {', '.join(sorted(dtypes))} |")
    return "## Components\n\n| | class | parameters | stored as |\n| --- | --- | ---: | --- |\n" + "\n".join(rows)


def figures_section(metrics: dict) -> str:
    """A table of all numbers and texts that metrics.json holds."""

    def rows(values: dict, prefix: str = ""):
        for key, value in values.items():
            title = f"{prefix}{key.replace('_', ' ')}"
            if isinstance(value, dict):
                yield from rows(value, f"{title}: ")
            elif key != "command" and not isinstance(value, list):
                yield f"| {title} | {f'{value:.4g}' if isinstance(value, float) else value} |"

    text = "## Results\n\n| | |\n| --- | ---: |\n" + "\n".join(rows(metrics))
    return text + (f"\n\nPrinted by\n\n```\n{metrics['command']}\n```" if "command" in metrics else "")


def training_section(recipe: dict, script: str) -> str:
    return (
        f"## Training\n\n```\naccelerate launch -m hf_ae.{script} recipe.yaml\n```\n\n```yaml\n"
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
    """Bring the code beside a checkpoint or in a pipeline, and the card, up to this version of the package. The weights stay."""
    from transformers.dynamic_module_utils import get_relative_import_files

    folder, package = Path(folder), Path(__file__).parent
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


def check_folder(folder) -> list[str]:
    """The files of a model or pipeline folder to upload. Raises ValueError where something is missing, broken or does not belong.

    What save_pipeline would write of code into a pipeline folder, and is not there, is written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
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
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [f for f in files if not RUN_FILES.match(f)]
    inside = rf"({'|'.join(parts)})/{COMPONENT_FILES}" if is_pipeline else WEIGHTS
    stray = [f for f in files if not re.fullmatch(rf"{ALLOWED}|{inside}", f)]
    if stray:
        raise ValueError(f"{folder} holds files that do not belong in a model repository: {', '.join(stray[:5])}. Remove them first.")
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
    """Check a model or pipeline folder and upload it to the Hub repository `repo` in one commit; returns the repository's address.

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
