"""`hf-ae export`: an autoencoder's encoder and decoder as ONNX or torch.export programs, by transformers' exporters.

```
encoder           pixel_values (and quality)  ->  latents (and logvar of VAEs, indices of discrete codes)
decoder           latents                     ->  sample, in the model's pixel range
indices_decoder   indices                     ->  sample, of models with discrete codes
```

The batch is dynamic; so are height and width of models with spatial latents.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from .errors import UserError, require

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Format -> ending of its files."""


class Part(PreTrainedModel):
    """One direction of an autoencoder, as a model of its own with tensors alone."""

    input_modalities = ["image"]

    def __init__(self, model: Any) -> None:
        super().__init__(model.config)
        self.model = model.eval()


class Encoder(Part):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, quality: Tensor | None = None) -> dict[str, Tensor]:
        """pixel_values, and qualities 0…1 (batch,) of a compressive model -> latents, and what goes with them."""
        how = {} if quality is None else {"quality": quality}
        encoded = self.model._encode(pixel_values, **how)
        found = {"latents": encoded.latents}
        if encoded.latent_dist is not None:
            found["logvar"] = encoded.latent_dist.logvar
        if encoded.indices is not None:
            found |= named(self.model.levels_of(encoded.indices))
        return found


class Decoder(Part):
    main_input_name = "latents"

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """latents -> sample."""
        return {"sample": self.model._decode_to_pixels(latents)}


class IndicesDecoder(Part):
    main_input_name = "indices"

    def forward(self, **indices: Tensor) -> dict[str, Tensor]:
        """indices, or indices_1 (the coarsest level), indices_2, … -> sample."""
        latents = self.model.indices_to_latents(self.model.from_levels([*indices.values()]))
        return {"sample": self.model._decode_to_pixels(latents)}


def named(levels: list[Tensor]) -> dict[str, Tensor]:
    """Indices of one level as `indices`, of several as `indices_1`, `indices_2`, …, the coarsest first."""
    names = ["indices"] if len(levels) == 1 else [f"indices_{i + 1}" for i in range(len(levels))]
    return dict(zip(names, levels, strict=True))


@torch.no_grad()
def parts(
    model: Any, batch: int = 2, times: tuple[int, int] = (1, 1)
) -> Iterator[tuple[str, Part, dict[str, Tensor]]]:
    """(name, part, inputs) of all that is exported; the inputs come from random images, `times` as high and as wide as
    the model's."""
    config = model.config
    low, high = config.pixel_range
    shape = (batch, config.num_channels, *(side * scale for side, scale in zip(config.image_hw, times)))
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    inputs = {"pixel_values": pixels}
    if model.codec_method == "hyperprior":
        inputs["quality"] = torch.linspace(0.25, 0.75, batch)
    encoder = Encoder(model)
    yield "encoder", encoder, inputs
    encoded = encoder(**inputs)
    yield "decoder", Decoder(model), {"latents": encoded["latents"]}
    if model.has_discrete_codes:
        indices = {name: value for name, value in encoded.items() if name.startswith("indices")}
        yield "indices_decoder", IndicesDecoder(model), indices


def dynamic_shapes(model: Any, inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Which dimensions of the inputs may differ from the example's."""
    spatial = model.config.latent_channels is not None
    shapes: dict[str, dict[int, Any]] = {}
    for name, value in inputs.items():
        shapes[name] = {0: Dim.AUTO}
        if spatial and value.ndim >= 3:
            shapes[name] |= {value.ndim - 2: Dim.AUTO, value.ndim - 1: Dim.AUTO}
    return shapes


def export(model: Any, folder: str | Path, format: str = "onnx", only: str | None = None) -> dict[str, Path]:
    """Write the parts of a model of this family into `folder`; returns name -> file.

    `format`: `onnx`, which needs onnx and onnxscript, or `torch` for programs that `torch.export.load` reads. Beside
    them goes config.json, which says what images and latents are in. `only`: one of the parts. Raises UserError.
    """
    require(format in FORMATS, f"format={format!r} is not known: write one of {', '.join(FORMATS)}.")
    require(model.device.type == "cpu", "A model is exported on the CPU: model.to('cpu').")
    with silence():
        exporter, config = exporter_of(format)
    folder, files, spatial = Path(folder), {}, model.config.latent_channels is not None
    require(not folder.is_file(), f"{folder} is a file: write the folder to export into.")
    own = (folder / "model.safetensors").exists()
    require(not own, f"{folder} holds a model, which push would then refuse: export to a folder of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    # an example with sizes of its own in each dimension: equal ones are taken for one and the same
    for name, part, inputs in parts(model, 5, (2, 3) if spatial else (1, 1)):
        if only not in (None, name):
            continue
        shapes = dynamic_shapes(model, inputs)
        with silence():
            program, _ = exporter.export_program(part, inputs, config=config(dynamic=True, dynamic_shapes=shapes))
        files[name] = folder / f"{name}{FORMATS[format]}"
        save(program, files[name])
    model.config.save_pretrained(folder)
    return files


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what exporters tell of their steps, of versions and of what they could not guess; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def exporter_of(format: str) -> tuple[Any, Any]:
    """transformers' exporter to a format, and the class of its configuration. Raises UserError."""
    try:
        from transformers.exporters.configs import DynamoConfig, OnnxConfig
        from transformers.exporters.exporter_dynamo import DynamoExporter
        from transformers.exporters.exporter_onnx import OnnxExporter

        return (OnnxExporter(), OnnxConfig) if format == "onnx" else (DynamoExporter(), DynamoConfig)
    except ImportError as error:
        raise UserError(f"Exporting needs more libraries ({error}): pip install -U 'hf_ae[export]'.") from error


def save(program: Any, path: Path) -> None:
    """An ONNX model, its weights in the same file, or a torch.export program."""
    if path.suffix == ".pt2":
        # guards of sizes that the example does not share, such as a batch of one, for which the program is right too
        program._guards_code = []
        torch.export.save(program, path)
    else:
        import onnx_ir

        onnx_ir.save(program, path)


@torch.no_grad()
def differences(model: Any, files: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """part -> output -> absolute differences of what an exported part and the model itself compute.

    Of one image, of another height and width than the example that was exported where the model allows it. Raises
    UserError where onnxruntime is not installed.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, part, inputs in parts(model, 1, (1, 1) if model.config.latent_channels is None else (3, 2)):
        outputs = run(files[name], inputs)
        found[name] = {key: (outputs[key].double() - value.double()).abs() for key, value in part(**inputs).items()}
    return found


def run(file: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of an exported part. Raises UserError."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(**inputs)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("Running ONNX needs onnxruntime: pip install 'hf_ae[export]'.") from error
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))
