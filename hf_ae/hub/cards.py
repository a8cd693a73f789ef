"""The card of a model or pipeline folder, written from what lies in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import EvalResult
from safetensors.torch import load_file

from .pipeline_folder import components, read_json

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
    "hf_ae_vqvae": "A VQ-VAE",
    "hf_ae_vqvae2": "A VQ-VAE-2",
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
        sections += [generate_section()] if config.get("prior_layers") else []
        sections += [codec_section(name, metrics)] if config.get("model_type") == "hf_ae_compressive" else []
        sections += [results_section(metrics)] if metrics else []
    if license := front_matter(old).get("license"):
        front["license"] = license
    if dataset and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not Path(dataset).exists():
        front["datasets"] = [dataset]
    if recipe:
        sections.append(training_section(recipe, "train_latent_diffusion" if is_pipeline else "train"))
    if (folder / "recipe-prior.yaml").is_file():
        recipe = yaml.safe_load((folder / "recipe-prior.yaml").read_text())
        sections.append(training_section(recipe, "train_prior", "## Training of the prior", "recipe-prior.yaml"))
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
    if config.get("codebook_size"):
        code += f", each vector of it one of {config['codebook_size']} codewords"
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
        "rate_distortion.png": "Kodak's photos: quality against the size of the file",
        "roundtrip.jpg": "A picture through a file and back, beside other formats at that size",
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


def generate_section() -> str:
    return """New pictures, of codes that the model's prior draws:

```python
pictures = processor.postprocess(model.generate(16, seed=0))  # labels=[…] asks for classes, by number or name
```"""


def codec_section(name: str, metrics: dict) -> str:
    text = f"""As an image codec (`pip install 'hf_ae[codec]'`):

```python
from hf_ae.codec.compression import compress, decompress

data = compress(model, "image.png", quality=0.5)  # the bytes of an .hfae file; quality from 0 to 1
picture = decompress(data, model)
```

On the command line: `hf-ae compress image.png -o image.hfae --model {name}` and `hf-ae decompress image.hfae -o image.png`"""
    return "\n\n".join([text, *rivals_section(metrics)])


def rivals_section(metrics: dict) -> list[str]:
    """Tables of what benchmarks/rate_distortion.py measured against other formats, [] where it did not."""
    rivals, parts = ("JPEG", "WebP", "AVIF"), []
    if kodak := metrics.get("kodak"):
        keys = {"PSNR": "bd_rate_psnr_{}", "PSNR, headers stripped": "bd_rate_psnr_{}_stripped", "MS-SSIM": "bd_rate_ms_ssim_{}"}
        lines = [f"| {name} | " + " | ".join(f"{kodak[key.format(r)]:+.1f} %" for r in rivals) + " |" for name, key in keys.items()]
        head = "| bytes at equal | " + " | ".join(f"against {r}" for r in rivals) + " |\n| --- | ---: | ---: | ---: |\n"
        parts.append(f"{kodak['pictures']} Kodak photos, 0.1 to 1.0 bits per pixel (BD-rate, whole files):\n\n{head}" + "\n".join(lines))
    for data in ("fashion", "emoji"):
        lines = []
        for row in metrics.get(data, {}).values():
            cells = [f"{row['quality']:g}", f"{row['psnr']:.1f}", f"{row['bytes']:.0f}", *(f"{row[f'bytes_{r}']:.0f}" for r in rivals)]
            cells += [f"{row['share_of_best']:.1%}", f"{row['share_of_best_stripped']:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
        if lines:
            head = (
                "| quality | PSNR (dB) | bytes | JPEG | WebP | AVIF | of the best | of the best, headers stripped |\n"
                + "| ---: " * 8
                + "|\n"
            )
            parts.append(f"Bytes of a file at the same PSNR, picture by picture, means:\n\n{head}" + "\n".join(lines))
    if speed := metrics.get("speed"):
        parts.append(
            f"A {speed['picture']} photo is encoded in {speed['encode_s']:.2f} s and decoded in {speed['decode_s']:.2f} s with "
            f"{speed['threads']} threads. Its symbols take {speed['entropy_coding_overhead'][0]:+.2%} to "
            f"{speed['entropy_coding_overhead'][1]:+.2%} more bits than the model estimates. "
            f"Decoding takes {speed['decoder_values']:,} of the {speed['all_values']:,} weights."
        )
    command = "Printed by `benchmarks/rate_distortion.py` of the source repository."
    return ["## Against other formats", *parts, command] if parts else []


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
    for name, level in metrics.get("codes", {}).items():
        text += f"\n\nCodes, {name.replace('_', ' ')}: {level['codes']} an image, {level['usage']:.1%} of the codewords in use, "
        text += f"perplexity {level['perplexity']:.1f}."
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
    if "asked_class" in found:
        real = found["floor"]["asked_class"]
        text += f" A classifier trained on generated pictures alone gets {found['classification_accuracy']:.1%} of the real ones right"
        text += f", one trained on real ones {real:.1%}; that one gives {found['asked_class']:.1%} of the generated ones the class that "
        text += "was asked for."
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


def training_section(recipe: dict, script: str, title: str = "## Training", file: str = "recipe.yaml") -> str:
    return f"{title}\n\n```\naccelerate launch -m hf_ae.{script} {file}\n```\n\n```yaml\n" + yaml.safe_dump(recipe, sort_keys=False) + "```"


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
