"""The card of a model or pipeline folder, written from what lies in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from safetensors.torch import load_file

from ..training.output_folder import ADAPTERS
from .card_parts import body_of, front_matter, merged_front, read_card, with_section
from .card_results import markdown_table, printed_by, results, rivals
from .eval_results import hub_id, model_index, write_eval_results
from .files import read_json
from .pipeline_folder import components

TITLES = {
    "hf_ae_autoencoder": "An autoencoder", "hf_ae_sparse": "A sparse autoencoder",
    "hf_ae_denoising": "A denoising autoencoder", "hf_ae_contractive": "A contractive autoencoder",
    "hf_ae_vae": "A variational autoencoder", "hf_ae_beta_vae": "A β-VAE",
    "hf_ae_vaegan": "A variational autoencoder with a discriminator",
    "hf_ae_compressive": "A compressive autoencoder", "hf_ae_vqvae": "A VQ-VAE", "hf_ae_vqvae2": "A VQ-VAE-2",
}  # fmt: skip
FIGURES = {
    "reconstructions.png": "Held-out images and what becomes of them",
    "samples.png": "Generated images",
    "samples-of-captions.png": "Images drawn from captions of the dataset",
    "rate_distortion.png": "Kodak's photos: quality against the size of the file",
    "traversals.png": "What each latent changes, those that vary most first",
    "repair.png": "Damaged images, the best repair without learning, and this model's",
    "outliers.png": "The most unusual images of the test, what the model makes of them, and where it errs",
    "roundtrip.jpg": "An image through a file and back, beside other formats at that size",
    "latent_plane.png": "The latent plane: latents of held-out images, and what the decoder draws all over it",
}
"""File -> caption."""
MADE_WITH = "Made with hf_ae: every autoencoder as a Hugging Face model."
UNPOOLING = """The decoder also gets the positions of the maxima that the encoder's pooling kept (`pool_positions`): a
reconstruction uses more than the latents alone, so its error is not comparable with models that decode the latents
alone."""
RECIPES = (
    ("recipe.yaml", "train", "## Training"), ("recipe-prior.yaml", "train_prior", "## Training of the prior"),
    ("recipe-discriminator.yaml", "train_discriminator", "## Training of the discriminator"),
)  # fmt: skip


def write_card(folder: str | Path) -> Path:
    """Write `folder`/README.md, and `.eval_results`, from what lies beside it: the configuration, recipes,
    metrics.json and figures.

    Only the marked section is written anew; what a person wrote around it stays, with the licence and all fields of
    the front matter that are not ours.
    """
    folder = Path(folder)
    name, path = folder.resolve().name, folder / "README.md"
    old = read_card(path)
    recipes = {
        file: yaml.safe_load((folder / file).read_text()) for file, _, _ in RECIPES if (folder / file).is_file()
    }
    metrics = read_json(folder / "metrics.json")
    recipe = recipes.get("recipe.yaml") or {}
    dataset = recipe.get("dataset_name") or metrics.get("dataset")
    is_pipeline = (folder / "model_index.json").is_file()
    is_lora = (folder / ADAPTERS).is_file() and not is_pipeline
    kind = lora_card if is_lora else pipeline_card if is_pipeline else model_card
    front, sections = kind(folder, name, metrics, dataset)
    if hub_id(dataset):
        front["datasets"] = [dataset]
    sources = [recipe.get(field) for field in ("pretrained_model", "pretrained_pipeline", "vae", "text_encoder")]
    if bases := [source for source in sources if hub_id(source)]:
        front["base_model"] = bases
    for file, script, title in RECIPES:
        if file in recipes:
            script = "train_latent_diffusion" if (is_pipeline or is_lora) and script == "train" else script
            text = yaml.safe_dump(recipes[file], sort_keys=False)
            sections.append(f"{title}\n\n```\naccelerate launch -m hf_ae.{script} {file}\n```\n\n```yaml\n{text}```")
    data = ModelCardData(**merged_front(front_matter(old), front))
    text = with_section(body_of(old), name, "\n\n".join(sections), MADE_WITH)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    write_eval_results(folder, metrics)
    return path


def figures(folder: Path, captions: dict[str, str]) -> list[str]:
    """The figures that are there."""
    return [f"![{text}]({name})" for name, text in captions.items() if (folder / name).is_file()]


# A model


def model_card(
    folder: Path, name: str, metrics: dict[str, Any], dataset: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(front matter, sections)."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "")
    tags = ["hf_ae", "autoencoder", kind.removeprefix("hf_ae_")]
    front: dict[str, Any] = dict(license="apache-2.0", library_name="transformers", tags=tags)
    front["pipeline_tag"] = "image-to-image" if kind == "hf_ae_denoising" else "image-feature-extraction"
    front |= dict(model_name=name, eval_results=model_index(metrics)) if metrics else {}
    columns = read_json(folder / "preprocessor_config.json").get("feature_columns")
    use = TABLE_USE.format(name=name, columns=", ".join(f"`{c}`" for c in columns)) if columns else MODEL_USE
    sections = [summary(config, dataset), *figures(folder, FIGURES), use.format(name=name)]
    sections += [GENERATE_USE] if config.get("prior_layers") else []
    sections += [CODEC_USE.format(name=name), *rivals(metrics)] if kind == "hf_ae_compressive" else []
    return front, sections + ([results(metrics)] if metrics else [])


def summary(config: dict[str, Any], dataset: str | None) -> str:
    """What the model is, in two sentences."""
    size = config["image_size"]
    height, width = size if isinstance(size, list) else [size] * 2
    latents = (
        f"{config['latent_dim']} values" if config["latent_dim"] else f"a map of {config['latent_channels']} channels"
    )
    if config.get("codebook_size"):
        latents += f", each vector of it one of {config['codebook_size']} codewords"
    kind, trained = TITLES.get(config["model_type"], "An autoencoder"), f", trained on `{dataset}`" if dataset else ""
    about = f"{kind} (`{config['model_type']}`, network `{config['network']}`, {config['hidden_sizes']})"
    images = f"{height}×{width} images with {config['num_channels']} channel(s)"
    text = f"{about} of {images}{trained}. Its latents are {latents}. {MADE_WITH}"
    return f"{text}\n\n{UNPOOLING}" if config.get("upsample") == "unpool" else text


MODEL_USE = """## Use

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
TABLE_USE = """It takes rows of numbers, as images of height 1: {columns}.

## Use

```python
import hf_ae
from transformers import AutoImageProcessor, AutoModel

repo = "{name}"  # this folder, or its id on the Hub
model = AutoModel.from_pretrained(repo).eval()
processor = AutoImageProcessor.from_pretrained(repo)  # with each column's mean and standard deviation
inputs = processor(table, return_tensors="pt")  # a data frame, an array (rows, columns), or rows as mappings
latents = model.encode(**inputs).latents
rows = processor.postprocess(model(**inputs).reconstruction)  # in the units of the table
```"""
GENERATE_USE = """New images, of codes that the model's prior draws:

```python
images = processor.postprocess(model.generate(16, seed=0))  # labels=[…] asks for classes, by index or name
```"""
CODEC_USE = """As an image codec (`pip install 'hf_ae[codec]'`):

```python
from hf_ae.codec import compress, decompress

data = compress(model, "image.png", quality=0.5)  # the bytes of an .hfae file; quality from 0 to 1
image = decompress(data, model)
```

On the command line:

```
hf-ae compress image.png -o image.hfae --model {name}
hf-ae decompress image.hfae -o image.png --model {name}
```"""


# A pipeline


def pipeline_card(
    folder: Path, name: str, metrics: dict[str, Any], dataset: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(front matter, sections)."""
    front = dict(
        library_name="diffusers", pipeline_tag="text-to-image", tags=["hf_ae", "text-to-image", "latent-diffusion"]
    )
    trained = f", trained on `{dataset}`" if dataset else ""
    about = f"A latent-diffusion pipeline that draws images from prompts{trained}"
    how = "a U-Net turns noise into latents, guided by the text, and an autoencoder decodes these into an image"
    summary = f"{about}: {how}. {MADE_WITH}"
    captions = FIGURES | {"samples.png": "Images drawn from prompts"}
    sections = [summary, *figures(folder, captions), PIPELINE_USE.format(name=name), component_table(folder)]
    if metrics:
        table = markdown_table(["", ""], [*all_figures(metrics)])
        sections += ["## Results", table, *([printed_by(metrics["command"])] if "command" in metrics else [])]
    return front, sections


PIPELINE_USE = """## Use

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


def lora_card(
    folder: Path, name: str, metrics: dict[str, Any], dataset: str | None
) -> tuple[dict[str, Any], list[str]]:
    """(front matter, sections)."""
    base = (yaml.safe_load((folder / "recipe.yaml").read_text()) or {}).get("pretrained_pipeline") or "PIPELINE"
    tags = ["hf_ae", "text-to-image", "lora"]
    front = dict(library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    trained = f", trained on `{dataset}`" if dataset else ""
    about = f"Low-rank adapters (LoRA) of the denoiser of `{base}`{trained}. {MADE_WITH}"
    return front, [about, *figures(folder, FIGURES), LORA_USE.format(name=name, base=base)]


LORA_USE = """## Use

```python
from hf_ae.pipelines import TextToImagePipeline

pipe = TextToImagePipeline.from_pretrained("{base}")
pipe.load_lora_weights("{name}")  # this folder, or its id on the Hub
pipe("a rocket").images[0].save("rocket.png")
```"""


def component_table(folder: Path) -> str:
    """A table of a pipeline's components; sizes are those of the stored tensors."""
    rows = []
    for name, (library, class_name) in components(folder).items():
        tensors = [t for path in (folder / name).glob("*.safetensors") for t in load_file(path).values()]
        count, dtypes = sum(t.numel() for t in tensors), {str(t.dtype).removeprefix("torch.") for t in tensors}
        source = library if library in ("diffusers", "transformers") else "hf_ae"
        row = [f"`{name}`", f"{source} `{class_name}`", f"{count:,}" if tensors else "", ", ".join(sorted(dtypes))]
        rows.append(row)
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"## Components\n\n| | class | parameters | stored as |\n| --- | --- | ---: | --- |\n{lines}"


def all_figures(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """A row for each number and text that metrics.json holds."""
    for key, value in values.items():
        title = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from all_figures(value, f"{title}: ")
        elif key != "command" and not isinstance(value, list):
            yield [title, f"{value:.4g}" if isinstance(value, float) else str(value)]
