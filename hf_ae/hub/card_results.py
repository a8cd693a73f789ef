"""Tables for a card, from what metrics.json holds."""

from __future__ import annotations

from typing import Any

from .eval_results import METRIC_NAMES

GENERATION = {"fid": "FID", "kid": "KID × 1000"} | {n: n for n in ("precision", "recall", "density", "coverage")}


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table; its first column is aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines[0] = lines[0].replace("  |", " |")
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def printed_by(command: str) -> str:
    return f"Printed by\n\n```\n{command}\n```"


def rivals(metrics: dict[str, Any]) -> list[str]:
    """Tables of what benchmarks/rate_distortion.py measured against other formats, [] where it did not."""
    formats, parts = ("JPEG", "WebP", "AVIF"), []
    if kodak := metrics.get("kodak"):
        keys = {"PSNR": "psnr_{}", "PSNR, headers stripped": "psnr_{}_stripped", "MS-SSIM": "ms_ssim_{}"}
        rows = [[n, *(f"{kodak[f'bd_rate_{key.format(f)}']:+.1f} %" for f in formats)] for n, key in keys.items()]
        table = markdown_table(["bytes at equal", *(f"against {f}" for f in formats)], rows)
        title = f"{kodak['pictures']} Kodak photos, 0.1 to 1.0 bits per pixel (BD-rate, whole files):"
        parts.append(f"{title}\n\n{table}")
    for data in ("fashion", "emoji"):
        rows = []
        for row in metrics.get(data, {}).values():
            sizes = [f"{row[key]:.0f}" for key in ("bytes", *(f"bytes_{f}" for f in formats))]
            fractions = [f"{row[key]:.1%}" for key in ("share_of_best", "share_of_best_stripped")]
            rows.append([f"{row['quality']:g}", f"{row['psnr']:.1f}", *sizes, *fractions])
        if rows:
            head = ["quality", "PSNR (dB)", "bytes", *formats, "of the best", "of the best, headers stripped"]
            parts.append(f"Bytes of a file at the same PSNR, image by image, means:\n\n{markdown_table(head, rows)}")
    if speed := metrics.get("speed"):
        low, high = speed["entropy_coding_overhead"]
        times = f"encoded in {speed['encode_s']:.2f} s and decoded in {speed['decode_s']:.2f} s"
        weights = f"{speed['decoder_values']:,} of the {speed['all_values']:,} weights"
        parts.append(
            f"A {speed['picture']} photo is {times} with {speed['threads']} threads. Its symbols take {low:+.2%} to "
            f"{high:+.2%} more bits than the model estimates. Decoding takes {weights}."
        )
    printed = "Printed by `benchmarks/rate_distortion.py` of the source repository."
    return ["## Against other formats", *parts, printed] if parts else []


def results(metrics: dict[str, Any]) -> str:
    """Tables of what metrics.json holds."""
    names = {
        "reconstruction": "this model",
        "pca": f"PCA, {metrics['code_size']} components",
        "denoising_input": "damaged image, as it is",
        "denoising": "this model, from the damaged image",
    }
    columns = list(metrics.get("reconstruction", {}))
    rows = [[title, *(f"{metrics[key][c]:.4g}" for c in columns)] for key, title in names.items() if key in metrics]
    parts = [f"On {metrics['images']:,} images of split `{metrics['split']}` of `{metrics['dataset']}`:"]
    parts += [markdown_table(["", *(METRIC_NAMES[c] for c in columns)], rows)] if rows else []
    if bound := metrics.get("likelihood"):
        lower = f"evidence lower bound {bound['elbo']:.2f} nats"
        higher = f"importance-weighted bound {bound['log_likelihood_bound']:.2f} nats"
        count = f"({bound['samples']:,} samples, {bound['images']:,} images)"
        parts.append(f"Log-likelihood under {bound['model']}: {lower}, {higher} {count}.")
    for name, level in metrics.get("codes", {}).items():
        use = f"{level['usage']:.1%} of the codewords in use, perplexity {level['perplexity']:.1f}"
        size = f"{level['codes']} an image" + (f" ({level['bits']:.0f} bits)" if "bits" in level else "")
        parts.append(f"Codes, {name.replace('_', ' ')}: {size}, {use}.")
    if files := metrics.get("compression"):
        head = ["quality", "bytes", "bits per pixel", "PSNR (dB)"]
        measured = files["qualities"].items()
        sizes = [[q, f"{v['bytes']:,.0f}", f"{v['bpp']:.3f}", f"{v['psnr']:.2f}"] for q, v in measured]
        title = f"Whole files of {files['images']:,} images at their own size, means:"
        parts += [title, markdown_table(head, sizes)]
    if rows or "likelihood" in metrics or "compression" in metrics:
        parts.append(printed_by(metrics["command"]))
    parts += generation(metrics["generation"]) if "generation" in metrics else []
    for task, section in OTHERS.items():
        if task in metrics:
            parts += [*section(metrics[task]), printed_by(metrics[task]["command"])]
    return "\n\n".join(["## Results", *parts])


def generation(found: dict[str, Any]) -> list[str]:
    """Generated images beside real ones of the training split, in the same features."""
    network = "the feature network of hf_ae" if found["features"] == "hf_ae" else f"`{found['features']}`"
    source = f"Generated images ({found['images']:,}, sampled from: {found['sampler']}), in features of {network}"
    title = f"{source}; figures in other features, such as Inception's, cannot be compared:"
    sides = {"generated": found} | ({"real, of the training split": found["floor"]} if "floor" in found else {})
    rows = [[name, *(f"{values[key]:.3g}" for key in GENERATION)] for name, values in sides.items()]
    text = f"{found['seconds_per_image'] * 1000:.3g} ms an image."
    if "asked_class" in found and "floor" in found:
        right, real = found["classification_accuracy"], found["floor"]["asked_class"]
        text += (
            f" A classifier trained on generated images alone gets {right:.1%} of the real ones right, one trained on "
            f"real ones {real:.1%}; that one gives {found['asked_class']:.1%} of the generated ones the asked class."
        )
    return [title, markdown_table(["", *GENERATION.values()], rows), text, printed_by(found["command"])]


def repair(found: dict[str, Any]) -> list[str]:
    """Repaired images beside the damaged ones and methods without learning."""
    rows = {"damaged image, as it is": found["damaged"], **found["without_learning"], "this model": found["restored"]}
    columns = [column for column in ("psnr", "ssim") if column in found["damaged"]]
    table = [[title, *(f"{values[c]:.4g}" for c in columns)] for title, values in rows.items()]
    title = f"Repair of {found['images']:,} images, damage `{found['damage']}`:"
    return [title, markdown_table(["", *(METRIC_NAMES[c] for c in columns)], table)]


def representation(found: dict[str, Any]) -> list[str]:
    """What classifiers find in the latents, beside pixels and PCA, and what single units stand for."""
    head = ["accuracy", "linear probe", "10 nearest", "of these alike", "10 labels a class", "these, spread"]

    def with_interval(values: dict[str, Any], key: str) -> str:
        low, high = values[f"{key}_interval"]
        return f"{values[key]:.3f} ({low:.3f}–{high:.3f})"

    rows = []
    for name, v in found["values"].items():
        near = [f"{v['neighbors']:.3f}", f"{v['precision']:.3f}"]
        few = [with_interval(v, "few_labels"), with_interval(v, "spread")]
        rows.append([name, with_interval(v, "linear_probe"), *near, *few])
    title = f"Classes of {found['images']:,} images, by what is fitted to the training split (95% intervals):"
    unit = found["units"]
    area = f"an area under the ROC curve of {unit['selectivity']:.2f} (at most {unit['greatest_selectivity']:.2f})"
    alone = f"{unit['grandmother_units']} of {unit['count']:,} units have an F1 of 0.8 for a class"
    needed = f"A class needs {unit['units_a_class_needs']:.3g} units; an image has {unit['active']:.1%} of them active"
    text = f"The median unit tells its best class from the others with {area}; {alone}. {needed}."
    return [title, markdown_table(head, rows), text]


def anomaly(found: dict[str, Any]) -> list[str]:
    """Outliers told from normal images, beside detectors without an autoencoder."""
    rows = [[name, *(f"{v[key]:.4f}" for key in ("auroc", "aupr"))] for name, v in found["detectors"].items()]
    title = f"Outliers ({found['outliers']}) told from normal images, {found['images']:,} in all:"
    text = (
        f"Its own threshold (`{found['score']}`) flags {found['flagged_outliers']:.1%} of the outliers and "
        f"{found['flagged_normal']:.1%} of the normal images."
    )
    return [title, markdown_table(["", "AUROC", "AUPR"], rows), text]


def disentanglement(found: dict[str, Any]) -> list[str]:
    """Five scores of known factors."""
    names = {
        "mig": "MIG", "sap": "SAP", "disentanglement": "DCI, disentanglement", "completeness": "DCI, completeness",
        "informativeness": "DCI, informativeness", "factor_vae_score": "FactorVAE score",
        "beta_vae_score": "β-VAE score",
    }  # fmt: skip
    title = (
        f"How far single latents stand for {', '.join(found['factors'])} ({found['images']:,} images, each 0 to 1):"
    )
    return [title, markdown_table(["", "score"], [[text, f"{found[name]:.3f}"] for name, text in names.items()])]


OTHERS = {
    "repair": repair, "representation": representation, "anomaly": anomaly, "disentanglement": disentanglement,
}  # fmt: skip
"""Task -> its part of a card."""
