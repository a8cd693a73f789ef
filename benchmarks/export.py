"""Export each shipped model to ONNX and compare onnxruntime with the model itself: one line for each.

    python benchmarks/export.py [MODEL_FOLDER …]

The image is random; of models with spatial latents it is three times as high and twice as wide as the model's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from hf_ae.export import differences, export
from hf_ae.loading import load_model

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def main(folders: list[Path]) -> None:
    """Print a table in Markdown: size of the files, and the largest difference of each output."""
    print("| model | size | largest difference | values that differ by more than 1e-5 |")
    print("| --- | ---: | --- | ---: |")
    for folder in folders:
        model, _ = load_model(folder)
        with tempfile.TemporaryDirectory() as place:
            files = export(model, place)
            size = sum(file.stat().st_size for file in files.values()) / 1e6
            found = {
                f"{part}.{name}": value for part, outputs in differences(model, files).items()
                for name, value in outputs.items()
            }  # fmt: skip
        largest = ", ".join(f"{name} {value.max():.0e}" for name, value in found.items())
        beyond = sum(int((value > 1e-5).sum()) for value in found.values())
        total = sum(value.numel() for value in found.values())
        print(f"| {folder.name} | {size:.1f} MB | {largest} | {beyond} of {total:,} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of model_cards")
    main(parser.parse_args().folders or sorted(path.parent for path in CARDS.glob("*/config.json")))
