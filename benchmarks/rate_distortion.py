"""Images in as few bytes as possible: our compressive models against JPEG, WebP and AVIF (Pillow).

    python benchmarks/rate_distortion.py [kodak|fashion|emoji|speed …] [--kodak FOLDER] [--images N]

kodak: curves of PSNR and MS-SSIM (LPIPS too, where the package lpips is installed) over bits per pixel, BD-rates
between 0.1 and 1.0 bpp, a plot and the panel of a round trip. fashion, emoji: bytes at the same PSNR, image by
image; a panel. speed: seconds to encode and to decode a Kodak photo, and how well symbols are coded. Sizes are those
of whole files unless "stripped" stands beside them. Results are added to metrics.json of the model measured, after
`hf-ae evaluate`. FOLDER is a dataset of the Kodak photos, outputs/emoji is made by
model_cards/emoji-text-to-image/dataset.py.
"""

import argparse
import functools
import io
import json
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.interpolate import PchipInterpolator
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from hf_ae.codec import compress, decompress, unpack
from hf_ae.codec.compression import ENCODER_ONLY
from hf_ae.data import image_column, open_dataset, pick_split
from hf_ae.loading import load_autoencoder
from hf_ae.metrics import psnr as psnr_of_error
from hf_ae.models.image_processing import to_mode
from hf_ae.pipelines.vae_roundtrip import VAERoundTripPipeline, encode_as

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
QUALITIES = [i / 8 for i in range(9)]
RIVALS = {
    "JPEG": (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95),
    "WebP": (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95),
    "AVIF": (10, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90),
}
VARIANTS: dict[str, list[dict]] = {
    "JPEG": [{}, {"subsampling": 0}],
    "WebP": [{}],
    "AVIF": [{}, {"subsampling": "4:4:4"}],
}
"""Ways to encode a small image, of which each rival takes the best."""
PUBLISHED = {
    "factorized prior": (
        (0.1226, 0.1885, 0.2878, 0.4404, 0.6481, 0.9670),
        (26.909, 28.218, 29.617, 31.277, 32.956, 35.381),
    ),
    "scale hyperprior": (
        (0.1313, 0.2089, 0.3199, 0.4784, 0.6687, 0.9388),
        (27.582, 29.197, 30.972, 32.838, 34.526, 36.743),
    ),
    "mean & scale": (
        (0.1239, 0.1980, 0.3072, 0.4606, 0.6617, 0.9144),
        (27.699, 29.359, 31.129, 32.951, 34.968, 36.911),
    ),
}
"""(bpp, dB) on all 24 Kodak photos, from CompressAI's tables (bmshj2018-factorized, bmshj2018-hyperprior,
mbt2018-mean; MSE)."""


def images(dataset: str, channels: int, most: int, size: int | None = None) -> list[Image.Image]:
    """The first test images, of `size` pixels high and wide where asked."""
    rows = pick_split(open_dataset(dataset), "test")
    column = image_column(rows)
    found = [to_mode(rows[i][column], channels) for i in range(min(most, len(rows)))]
    return [i if size is None else i.resize((size, size), Image.Resampling.BICUBIC) for i in found]


def tensor(image: Image.Image) -> Tensor:
    """(1, channels, height, width) in 0…1."""
    values = torch.from_numpy(np.array(image)).float() / 255
    return values.view(1, image.height, image.width, -1).permute(0, 3, 1, 2)


def psnr(x: Image.Image, y: Image.Image) -> float:
    a, b = (np.asarray(image, float) for image in (x, y.convert(x.mode)))  # WebP has no gray mode
    return psnr_of_error(torch.tensor(np.square(a - b).mean() / 255**2)).item()


def stripped(data: bytes) -> int:
    """Bytes of a file without its headers: scans of a JPEG, partitions of a WebP, media data of an AVIF, our
    payload."""
    if data[:2] == b"\xff\xd8":
        at = 2
        while data[at + 1] != 0xDA:  # the start of the scan
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        return len(data) - at - 2 - struct.unpack(">H", data[at + 2 : at + 4])[0] - 2
    if data[:4] == b"RIFF":
        return len(data) - 30  # RIFF, chunk and frame headers
    if data[4:8] == b"ftyp":
        at, total = 0, 0
        while at < len(data):
            length, kind = struct.unpack(">I4s", data[at : at + 8])
            total += length - 8 if kind == b"mdat" else 0
            at += length
        return total
    return len(unpack(data).body)


@functools.cache
def perceptual_metric() -> torch.nn.Module | None:
    """LPIPS (Zhang et al. 2018, AlexNet), where the package lpips is installed."""
    try:
        from lpips import LPIPS
    except ModuleNotFoundError:
        return None
    return LPIPS(net="alex", verbose=False).eval()


def measure(originals: list[Image.Image], files: list[bytes], decode: Callable[[bytes], Image.Image]) -> dict:
    """Means over images."""
    pairs = [(original, decode(data)) for original, data in zip(originals, files)]
    pixels = [i.width * i.height for i in originals]
    result = {
        "bpp": statistics.mean(8 * len(d) / n for d, n in zip(files, pixels)),
        "bpp_stripped": statistics.mean(8 * stripped(d) / n for d, n in zip(files, pixels)),
        "psnr": statistics.mean(psnr(x, y) for x, y in pairs),
    }
    if lpips := perceptual_metric():
        with torch.no_grad():
            found = [lpips(*(tensor(image.convert("RGB")) * 2 - 1 for image in pair)).item() for pair in pairs]
        result["lpips"] = statistics.mean(found)
    if min(originals[0].size) > 160:
        found = [ms_ssim(tensor(y), tensor(x), data_range=1.0).item() for x, y in pairs]
        result["ms_ssim"] = statistics.mean(found)
    return result


def bd_rate(
    ours: list[dict], theirs: list[dict], metric: str = "psnr", rate: str = "bpp", low: float = 0.1, high: float = 1.0
) -> float:
    """Mean difference of the rate at equal quality, in % (Bjøntegaard 2001), where both curves lie between `low` and
    `high` bpp."""

    def curve(points: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        points = sorted({round(p[metric], 9): p[rate] for p in points}.items())
        quality = np.array([transform(q, metric) for q, _ in points])
        return quality, np.log([r for _, r in points])

    spans, curves = [], []
    for points in (ours, theirs):
        quality, rates = curve(points)
        line = PchipInterpolator(quality, rates)
        fine = np.linspace(quality[0], quality[-1], 2000)
        inside = fine[(line(fine) >= np.log(low)) & (line(fine) <= np.log(high))]
        spans.append((inside[0], inside[-1]))
        curves.append(line)
    first, last = max(s[0] for s in spans), min(s[1] for s in spans)
    difference = (curves[0].integrate(first, last) - curves[1].integrate(first, last)) / (last - first)
    return float(100 * (np.exp(difference) - 1))


def transform(value: float, metric: str) -> float:
    """MS-SSIM in dB: -10 log10(1 - value)."""
    return -10 * np.log10(1 - value) if metric == "ms_ssim" else value


def of_file(data: bytes) -> Image.Image:
    """The image in a file of another format."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def kodak(args: argparse.Namespace) -> dict:
    """Curves and BD-rates of photo-compressive."""
    model = load_autoencoder(CARDS / "photo-compressive")
    originals = images(args.kodak, 3, args.images or 24)
    ours = []
    for quality in QUALITIES:
        files = [compress(model, i, quality=quality, model_id="") for i in originals]
        ours.append(measure(originals, files, lambda data: decompress(data, model)) | {"quality": quality})
        print(f"  quality {quality:.3f}: {json.dumps(ours[-1])}", flush=True)
    curves = {"hf_ae": ours}
    for name, settings in RIVALS.items():
        files_of = ([encode_as(i, name, quality) for i in originals] for quality in settings)
        curves[name] = [measure(originals, files, of_file) for files in files_of]
    result = {"pictures": len(originals)}
    for name in RIVALS:
        result[f"bd_rate_psnr_{name}"] = bd_rate(ours, curves[name])
        result[f"bd_rate_psnr_{name}_stripped"] = bd_rate(ours, curves[name], rate="bpp_stripped")
        result[f"bd_rate_ms_ssim_{name}"] = bd_rate(ours, curves[name], "ms_ssim")
    plot(curves, CARDS / "photo-compressive" / "rate_distortion.png")
    panel(model, originals[6 % len(originals)], 0.25, "photo")
    return result | {"curve": ours}


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """PSNR and MS-SSIM over bits per pixel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), dpi=100, layout="constrained")
    for axis, metric, label in zip(axes, ("psnr", "ms_ssim"), ("PSNR, dB", "MS-SSIM, dB")):
        for name, points in curves.items():
            style = dict(marker="o", linewidth=2.5, zorder=3) if name == "hf_ae" else dict(linewidth=1.5)
            axis.plot([p["bpp"] for p in points], [transform(p[metric], metric) for p in points], label=name, **style)
        axis.set(xlim=(0, 1.2), xlabel="bits per pixel, whole files", ylabel=label)
        inside = [transform(p[metric], metric) for points in curves.values() for p in points if 0.08 < p["bpp"] < 1.2]
        axis.set_ylim(min(inside) - 0.5, max(inside) + 0.5)
        axis.grid(alpha=0.3)
    for name, points in PUBLISHED.items():
        axes[0].plot(*points, linestyle=":", marker=".", linewidth=1, label=f"{name} (published, 24 photos)")
    axes[0].legend(fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def panel(model: Any, image: Image.Image, quality: float, name: str) -> None:
    """The round trip of an image, beside other formats, for the card."""
    drawn = VAERoundTripPipeline(model)(image, quality=quality).panel
    drawn.thumbnail((1500, 1500), Image.Resampling.LANCZOS)
    drawn.save(CARDS / f"{name}-compressive" / "roundtrip.jpg", quality=92, subsampling=0)


def equal_psnr(model: Any, originals: list[Image.Image], quality: float) -> dict:
    """Bytes of our files beside those of each rival at the least quality that is as near to the original; means over
    images.

    A rival that does not come as near to an image at any quality is left out for it.
    """
    ours = [compress(model, i, quality=quality, model_id="") for i in originals]
    wanted = [psnr(i, decompress(data, model)) for i, data in zip(originals, ours)]
    sizes = []
    for image, least in zip(originals, wanted):
        smallest = {name: smallest_file(image, name, least) for name in RIVALS}
        sizes.append({name: (len(data), stripped(data)) for name, data in smallest.items() if data})
    whole, inner = sum(map(len, ours)), sum(map(stripped, ours))
    return {
        "quality": quality,
        "psnr": statistics.mean(wanted),
        "bytes": whole / len(ours),
        "bytes_stripped": inner / len(ours),
        **{f"bytes_{name}": statistics.mean(found[name][0] for found in sizes if name in found) for name in RIVALS},
        "share_of_best": whole / sum(min(size for size, _ in found.values()) for found in sizes),
        "share_of_best_stripped": inner / sum(min(size for _, size in found.values()) for found in sizes),
    }


def smallest_file(image: Image.Image, name: str, least: float) -> bytes | None:
    """The smallest file that reaches a PSNR, with chroma at half and at full resolution, of WebP also without loss;
    None where none does."""
    files = [lowest_quality(image, name, least, options) for options in VARIANTS[name]]
    if name == "WebP":
        files.append(encode_as(image, name, 100, lossless=True))
    return min((data for data in files if data), key=len, default=None)


def lowest_quality(image: Image.Image, name: str, least: float, options: dict) -> bytes | None:
    """The file of the lowest quality that reaches a PSNR."""
    low, high, found = 0, 100, None
    while low <= high:
        middle = (low + high) // 2
        data = encode_as(image, name, middle, **options)
        if psnr(image, of_file(data)) >= least:
            found, high = data, middle - 1
        else:
            low = middle + 1
    return found


def fashion(args: argparse.Namespace) -> dict:
    """Fashion-MNIST test images."""
    return small("fashion", images(args.fashion, 1, args.images or 300), drawn=0)


def emoji(args: argparse.Namespace) -> dict:
    """Held-out emoji of 64×64 pixels."""
    return small("emoji", images(args.emoji, 3, args.images or 165, 64), drawn=2)


def small(name: str, originals: list[Image.Image], drawn: int) -> dict:
    """Bytes at equal PSNR by the model of small images; the panel is of the original with the index `drawn`."""
    model = load_autoencoder(CARDS / f"{name}-compressive")
    panel(model, originals[drawn], 0.5, name)
    return {f"quality_{q}": equal_psnr(model, originals, q) for q in (0, 0.25, 0.5, 0.75)}


def speed(args: argparse.Namespace) -> dict:
    """Median seconds for one Kodak photo after loading, the bits written beside the model's own estimate, and the
    size of what decoding needs."""
    model = load_autoencoder(CARDS / "photo-compressive")
    image = images(args.kodak, 3, 1)[0]
    encoding, decoding = [], []
    for round_ in range(8):
        started = time.perf_counter()
        data = compress(model, image, quality=0.5, model_id="")
        middle = time.perf_counter()
        decompress(data, model)
        if round_:
            encoding.append(middle - started)
            decoding.append(time.perf_counter() - middle)
    overheads = [bits_written(model, image, quality) - 1 for quality in (0.0, 0.25, 0.5, 0.75, 1.0)]
    sizes = {name: values.numel() for name, values in model.state_dict().items()}
    return {
        "picture": f"{image.width}×{image.height}",
        "threads": torch.get_num_threads(),
        "encode_s": statistics.median(encoding),
        "decode_s": statistics.median(decoding),
        "entropy_coding_overhead": [min(overheads), max(overheads)],
        "decoder_values": sum(size for name, size in sizes.items() if not name.startswith(ENCODER_ONLY)),
        "all_values": sum(sizes.values()),
    }


def bits_written(model: Any, image: Image.Image, quality: float) -> float:
    """Bits of the symbols in a file, as a fraction of what the model estimates for them, window by window as the codec
    works."""
    quantize, estimates = model.quantize, []

    def watched(latents: Tensor, level: Tensor) -> Any:
        quantized = quantize(latents, level)
        estimates.append(float(quantized.bits + quantized.hyper_bits))
        return quantized

    model.quantize = watched
    try:
        body = unpack(compress(model, image, quality=quality, model_id="")).body
    finally:
        del model.quantize
    return 8 * (len(body) - 1) / sum(estimates)


PARTS = {
    "kodak": (kodak, "photo"),
    "fashion": (fashion, "fashion"),
    "emoji": (emoji, "emoji"),
    "speed": (speed, "photo"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--images", type=int, help="at most so many of each dataset")
    parser.add_argument("--kodak", default="kodak", help="folder or Hub id")
    parser.add_argument("--fashion", default="zalando-datasets/fashion_mnist")
    parser.add_argument("--emoji", default="outputs/emoji")
    args = parser.parse_args()
    for name in args.parts:
        function, model = PARTS[name]
        found = function(args)
        print(f"{name}: {json.dumps({k: v for k, v in found.items() if k != 'curve'})}", flush=True)
        path = CARDS / f"{model}-compressive" / "metrics.json"
        metrics = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(metrics | {name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
