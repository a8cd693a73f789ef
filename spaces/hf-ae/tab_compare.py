"""Compare: what was measured of each model, read from the metrics.json beside it."""

from __future__ import annotations

import json
from collections.abc import Callable

import gradio as gr
from page import intro, show_many, table, terms
from serving import AT_ONCE, file_of, friendly, keep_file

FAMILIES = {
    "Fashion-MNIST": (
        "fashion-ae",
        "fashion-conv-ae",
        "fashion-sparse",
        "fashion-contractive",
        "fashion-denoising",
        "fashion-ae-2d",
        "fashion-inpainting",
        "fashion-sharpening",
        "fashion-vae",
        "fashion-beta-vae",
        "fashion-vaegan",
        "fashion-vqvae",
        "fashion-vqvae2",
        "fashion-compressive",
    ),
    "MNIST": ("mnist-ae-2d", "mnist-deep-ae", "mnist-vae"),
    "Photos": ("photo-compressive",),
    "Emoji": ("emoji-compressive", "emoji-coloring"),
}
"""Models that were measured on the same test images."""
COLUMNS: dict[str, Callable[[dict], str]] = {
    "bits of the code": lambda m: bits(m),
    "PSNR, dB": lambda m: f"{m['reconstruction']['psnr']:.2f}",
    "SSIM": lambda m: f"{m['reconstruction']['ssim']:.3f}",
    "PCA, as many numbers: PSNR": lambda m: f"{m['pca']['psnr']:.2f}",
    "damaged, repaired: PSNR": lambda m: f"{m['denoising_input']['psnr']:.1f}, {m['denoising']['psnr']:.1f}",
    "FID of samples": lambda m: f"{m['generation']['fid']:.1f}",
    "bytes, smallest file": lambda m: f"{m['compression']['qualities']['0']['bytes']:,.0f}",
    "bytes, best picture": lambda m: f"{m['compression']['qualities']['1']['bytes']:,.0f}",
}
"""Title -> what it is of a metrics.json."""


def measured(name: str) -> dict | None:
    """The metrics.json of a model; None where there is none."""
    path = file_of(name, "metrics.json")
    return json.loads(path.read_text()) if path else None


def bits(metrics: dict) -> str:
    """What a code takes as it is, before any compression: indices of a codebook, or floats of 32 bits each."""
    if levels := metrics.get("codes"):
        count = sum(level["codes"] for level in levels.values())
        return f"{sum(level['bits'] for level in levels.values()):,.0f} ({count:,} indices)"
    return f"{32 * metrics['code_size']:,} ({metrics['code_size']:,} floats)"


def cell(read: Callable[[dict], str], metrics: dict) -> str:
    """A figure of a model; empty where it was not measured."""
    try:
        return read(metrics)
    except KeyError:
        return ""


@friendly
def compare(family: str = "Fashion-MNIST") -> tuple[str, list[tuple[str, str]]]:
    """The measured table of a family of autoencoders: size of the code, reconstruction error, files and samples.

    Args:
        family: Fashion-MNIST, MNIST, Photos or Emoji.

    Returns:
        The table as HTML, and pictures: each model's reconstructions of test pictures.
    """
    if family not in FAMILIES:
        raise ValueError(f"This family is not known: use one of {', '.join(FAMILIES)}.")
    found = {name: metrics for name in FAMILIES[family] if (metrics := measured(name))}
    if not found:
        raise ValueError("The figures cannot be read just now: try again later.")
    rows = {name: [cell(read, metrics) for read in COLUMNS.values()] for name, metrics in found.items()}
    rows = dict(sorted(rows.items(), key=lambda row: -float(row[1][1] or 0)))
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows.values())]
    images = sorted({f"{metrics['images']:,} of {metrics['dataset'].split('/')[-1]}" for metrics in found.values()})
    caption = f"Measured on test pictures ({'; '.join(images)}), with hf-ae evaluate"
    head = ["model", *(list(COLUMNS)[i] for i in kept)]
    body = [[name, *(row[i] for i in kept)] for name, row in rows.items()]
    files = {name: file_of(name, "reconstructions.png") or file_of(name, "roundtrip.jpg") for name in rows}
    return table(head, body, caption), [(keep_file(path), name) for name, path in files.items() if path]


def build() -> list[gr.components.Component]:
    """The tab. Returns its outputs."""
    intro(
        "One recipe, many autoencoders: they differ in what the code may hold and in what they are punished for. The "
        "figures come from the <b>metrics.json</b> beside each model, as <b>hf-ae evaluate</b> wrote it.",
        ("image", "test picture"),
        ("encoder", "each encoder"),
        ("latents", "its code"),
        ("decoder", "its decoder"),
        ("chart", "error, measured"),
    )
    family = gr.Radio(list(FAMILIES), value="Fashion-MNIST", label="Trained and measured on", elem_id="family")
    figures = gr.HTML(label="Figures", elem_id="measured", apply_default_css=False)
    terms("PSNR", "SSIM", "PCA", "FID")
    images = show_many("Test pictures, and what comes back", "measured-pictures", 1)
    family.input(compare, family, [figures, images], api_name="compare", **AT_ONCE)
    return [figures, images]
