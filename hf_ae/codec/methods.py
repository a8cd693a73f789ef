"""How the codec writes a picture's code, by method, and reads it back.

What follows the header of a file (see `bitstream`):

- `hyperprior`, of a CompressiveAutoencoderModel: 1 byte quality in 1/128; then for each window of 64×64 positions of the code, row
  by row, the hyper-latents, then the symbols in three steps: even rows and columns, odd rows and columns, the rest.
- `latents`, of any other autoencoder: 1 byte number of groups, 1 byte quality in 1/128; for each group mean and standard deviation
  (float16 each); then the symbols round((value - mean) / step), step = standard deviation · 64^-quality, as of a Gaussian.
  A spatial code has a group for each channel, a vector is one group.
- `palette`, likewise (spatial codes): 1 byte number of groups; mean and standard deviation of each; varint number of colours; the
  colours, each one byte a channel (steps of 1/32 standard deviation around the mean); a varint for each colour, how often it
  occurs; then the colour of each position. Made with k-means and error diffusion, as people did with Stable Diffusion's VAE in 2022.
- `indices`, of a VQVAEModel or VQVAE2Model: the indices of each level, the coarsest first, row by row, with tables of 1 + how often
  the images of the training used each codeword (the model carries these counts; without them all codewords weigh the same).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn import functional as F

from .container import CorruptFileError, File, Reader, SymbolDecoder, SymbolEncoder, SymbolTables, varint
from ..models.entropy_models import HYPER_LIMIT, QUALITY_LEVELS, SCALES, STEPS, gaussian_weights, positions_of
from ..models.tiling import tiled

WINDOW = 64
"""Positions of the code, high and wide, that share a hyperprior; larger pictures are also worked on in tiles of this size."""
PALETTE_SIZE = 256

# Pixels


def pixel_range(model) -> tuple[float, float]:
    """What the model's pixels are in; diffusers' autoencoders take -1…1."""
    low, high = getattr(model.config, "pixel_range", (-1.0, 1.0))
    return low, high


def to_values(model, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> pixel_values."""
    low, high = pixel_range(model)
    values = pixels.to(model.device).float() / 255 * (high - low) + low
    return values.to(model.dtype).contiguous(memory_format=torch.channels_last)


def to_pixels(model, sample: torch.Tensor) -> torch.Tensor:
    """A decoder's sample -> uint8, on the CPU."""
    low, high = pixel_range(model)
    return ((sample.float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def stride_of(model) -> int:
    """Pixels to a position of a spatial code; 0 for a vector."""
    config = model.config
    if hasattr(config, "code_shape"):
        return config.downsampling if config.latent_channels is not None else 0
    return 2 ** (len(config.block_out_channels) - 1)


def pad_to(pixels: torch.Tensor, stride: int) -> torch.Tensor:
    """Repeat the lower and right border until the stride divides height and width."""
    rows, columns = -pixels.shape[2] % stride, -pixels.shape[3] % stride
    return F.pad(pixels.float(), (0, columns, 0, rows), mode="replicate").to(pixels.dtype) if rows or columns else pixels


def encode_tiles(function, model, pixels: torch.Tensor) -> torch.Tensor:
    """`function(pixel_values)` on the picture (uint8), in tiles where it is large: its code."""
    stride = stride_of(model)
    tile = WINDOW * max(stride, 1)
    if not stride or max(pixels.shape[2:]) <= tile:
        return function(to_values(model, pixels))
    return tiled(lambda part: function(to_values(model, part)), pixels, tile, stride, down=True)


def decode_tiles(model, latents: torch.Tensor) -> torch.Tensor:
    """Latents -> uint8 pixels, in tiles where the picture is large."""

    def decode(part):
        return model.decode(part.to(model.dtype).contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part).sample

    if latents.ndim == 4 and max(latents.shape[2:]) > WINDOW:
        return to_pixels(model, tiled(decode, latents, WINDOW, stride_of(model), down=False))
    return to_pixels(model, decode(latents))


# The trained hyperprior


def hyper_tables(model) -> SymbolTables:
    """Of the hyper-latents: one table for each channel."""
    table = model.hyperprior.prior.table.cpu().numpy()
    return SymbolTables(list(table), [-HYPER_LIMIT] * len(table))


@functools.cache
def scale_tables() -> SymbolTables:
    """Of Gaussians of the standard deviations SCALES."""
    return SymbolTables.symmetric([np.array(gaussian_weights(scale)) for scale in SCALES])


def windows(height: int, width: int):
    """Slices of a code, row by row."""
    for top in range(0, height, WINDOW):
        for left in range(0, width, WINDOW):
            yield slice(top, min(top + WINDOW, height)), slice(left, min(left + WINDOW, width))


def write_hyperprior(model, pixels: torch.Tensor, quality: float | None) -> bytes:
    """Quality and symbols of a picture (uint8)."""
    level = model.levels(quality, 1)
    code = encode_tiles(model.analyse, model, pad_to(pixels, stride_of(model)))
    if not bool(code.isfinite().all()):
        raise ValueError("The encoder gives values that are not finite: the model is broken.")
    z_tables, y_tables = hyper_tables(model), scale_tables()
    coder = SymbolEncoder()
    for rows, columns in windows(*code.shape[2:]):
        quantized = model.quantize(code[..., rows, columns], level)
        z = quantized.hyper_symbols[0].cpu().numpy().astype(np.int32)
        coder.encode(z.ravel(), np.arange(len(z)).repeat(z[0].size), z_tables)
        for step in range(STEPS):
            mask = positions_of(rows.stop - rows.start, columns.stop - columns.start, step, code.device)
            symbols, index = (
                part[0][:, mask].cpu().numpy().ravel().astype(np.int32) for part in (quantized.symbols, quantized.scale_index)
            )
            coder.encode(symbols, index, y_tables)
    return bytes([int(level)]) + coder.finish()


def read_hyperprior(model, file: File) -> torch.Tensor:
    """The picture (uint8) of what `write_hyperprior` wrote."""
    reader, stride = Reader(file.body), stride_of(model)
    level = torch.tensor([reader.take(1)[0]], device=model.device)
    if level.item() > QUALITY_LEVELS:
        raise CorruptFileError(f"The file claims quality {level.item()}/{QUALITY_LEVELS}.")
    height, width = -(-file.height // stride), -(-file.width // stride)
    prior, channels = model.hyperprior, model.config.latent_channels
    decoder, z_tables, y_tables = SymbolDecoder(reader.rest()), hyper_tables(model), scale_tables()
    latents = torch.empty(1, channels, height, width, device=model.device)
    for rows, columns in windows(height, width):
        size = rows.stop - rows.start, columns.stop - columns.start
        shape = model.config.hyper_channels[1], -(-size[0] // 4), -(-size[1] // 4)
        z = decoder.decode(np.prod(shape), np.arange(shape[0]).repeat(shape[1] * shape[2]), z_tables).reshape(1, *shape)
        features = prior.features(torch.from_numpy(z).to(model.device).double(), level, *size)
        values = torch.zeros(1, channels, *size, dtype=torch.float64, device=model.device)
        for step in range(STEPS):
            mask = positions_of(*size, step, model.device)
            mean, index = (part[0][:, mask] for part in prior.parameters_of(features, values, step))
            symbols = decoder.decode(index.numel(), index.cpu().numpy().ravel().astype(np.int32), y_tables)
            values[0, :, mask] = mean + torch.from_numpy(symbols).to(mean).view_as(mean)
        latents[..., rows, columns] = model.to_latents(values, level)
    return decode_tiles(model, latents)


# Latents without a trained prior


def encode_latents(model, pixels: torch.Tensor) -> torch.Tensor:
    """The deterministic latents of a picture (uint8), float32: (1, channels, height, width) or (1, values)."""
    stride = stride_of(model)
    check_size(model, pixels.shape[2:], ValueError)

    def encode(values):
        encoded = model.encode(values)
        return (encoded.latent_dist.mode() if getattr(encoded, "latent_dist", None) is not None else encoded.latents).float()

    return encode_tiles(encode, model, pad_to(pixels, max(stride, 1))).cpu()


def groups_of(latents: torch.Tensor) -> torch.Tensor:
    """(1, channels, height, width) -> (channels, positions); (1, values) stays one group."""
    return latents[0].flatten(1) if latents.ndim == 4 else latents


def moments(values: torch.Tensor) -> tuple[bytes, torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each group, as bytes and as they will be read."""
    data = torch.stack([values.mean(1), values.std(1, correction=0).clamp(1e-4, 6e4)], 1).numpy().astype("<f2")
    mean, std = torch.from_numpy(data.astype(np.float32)).unbind(1)
    return bytes([len(data)]) + data.tobytes(), mean, std


def read_moments(model, file: File, reader: Reader):
    """What `moments` wrote, and the shape of the latents."""
    stride, config = stride_of(model), model.config
    channels = config.code_shape[0] if hasattr(config, "code_shape") else config.latent_channels
    shape = (channels, -(-file.height // stride), -(-file.width // stride)) if stride else (channels,)
    if not stride and [file.height, file.width] != config.image_hw:
        raise CorruptFileError(f"The file's {file.width}×{file.height} pixels do not fit this model.")
    count = reader.take(1)[0]
    if count != (channels if stride else 1):
        raise CorruptFileError(f"The file holds {count} groups of latents, which does not fit this model.")
    data = np.frombuffer(reader.take(4 * count), "<f2").astype(np.float32).reshape(count, 2)
    if not np.isfinite(data).all() or (data[:, 1] <= 0).any():
        raise CorruptFileError("The file's means and standard deviations are not finite.")
    return torch.from_numpy(data[:, 0]), torch.from_numpy(data[:, 1]), shape


def write_latents(model, pixels: torch.Tensor, quality: float | None) -> bytes:
    quality = 0.5 if quality is None else quality
    if not 0 <= quality <= 1:
        raise ValueError(f"quality={quality} must lie between 0 (smallest files) and 1 (best pictures).")
    level = round(quality * QUALITY_LEVELS)
    values = groups_of(encode_latents(model, pixels))
    head, mean, std = moments(values)
    symbols = ((values - mean[:, None]) / latent_step(std, level)[:, None]).round().numpy().astype(np.int32)
    coder = SymbolEncoder()
    coder.encode(symbols.ravel(), latent_table(level), scale_tables())
    return head + bytes([level]) + coder.finish()


def latent_step(std: torch.Tensor, level: int) -> torch.Tensor:
    return std * 2.0 ** (-6 * level / QUALITY_LEVELS)


def latent_table(level: int) -> int:
    """Which of SCALES is nearest to a standard deviation of 64^quality steps."""
    return int(np.abs(np.log(SCALES) - 6 * level / QUALITY_LEVELS * np.log(2)).argmin())


def read_latents(model, file: File) -> torch.Tensor:
    reader = Reader(file.body)
    mean, std, shape = read_moments(model, file, reader)
    level = reader.take(1)[0]
    if level > QUALITY_LEVELS:
        raise CorruptFileError(f"The file claims quality {level}/{QUALITY_LEVELS}.")
    symbols = SymbolDecoder(reader.rest()).decode(int(np.prod(shape)), latent_table(level), scale_tables())
    values = torch.from_numpy(symbols).float().view(len(mean), -1) * latent_step(std, level)[:, None] + mean[:, None]
    return decode_tiles(model, values.view(1, *shape).to(model.device))


# Latents of 256 colours


def write_palette(model, pixels: torch.Tensor) -> bytes:
    latents = encode_latents(model, pixels)
    if latents.ndim != 4:
        raise ValueError("palette needs a spatial code: leave it out for this model.")
    values = groups_of(latents)
    head, mean, std = moments(values)
    scaled = (((values - mean[:, None]) / std[:, None] * 32) + 128).clamp(0, 255).T.double().numpy()
    colours = k_means(scaled, min(PALETTE_SIZE, len(scaled)))
    chosen = diffuse(scaled.reshape(*latents.shape[2:], -1), colours).ravel()
    used, chosen = np.unique(chosen, return_inverse=True)
    counts = np.bincount(chosen)
    head += varint(len(used)) + colours[used].astype(np.uint8).tobytes() + b"".join(varint(int(n)) for n in counts)
    coder = SymbolEncoder()
    coder.encode(chosen.astype(np.int32), 0, SymbolTables([counts], [0]))
    return head + coder.finish()


def k_means(points: np.ndarray, colours: int, rounds: int = 12) -> np.ndarray:
    """(points, channels) -> whole-number colours (colours, channels); Lloyd's algorithm, always from the same start."""
    centres = points[np.random.default_rng(0).choice(len(points), colours, replace=False)]
    for _ in range(rounds):
        nearest = ((points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)).argmin(1)
        counts = np.bincount(nearest, minlength=colours)
        sums = np.stack([np.bincount(nearest, channel, colours) for channel in points.T], 1)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
    return centres.round().clip(0, 255)


def diffuse(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(height, width, channels) -> the number of a colour for each position, with Floyd and Steinberg's error diffusion (1976)."""
    height, width = image.shape[:2]
    rest = np.pad(image, ((0, 1), (1, 1), (0, 0)))
    chosen = np.empty((height, width), np.int64)
    for row in range(height):
        for column in range(width):
            wanted = rest[row, column + 1]
            chosen[row, column] = number = ((colours - wanted) ** 2).sum(1).argmin()
            error = (wanted - colours[number]) / 16
            rest[row, column + 2] += 7 * error
            rest[row + 1, column] += 3 * error
            rest[row + 1, column + 1] += 5 * error
            rest[row + 1, column + 2] += error
    return chosen


def read_palette(model, file: File) -> torch.Tensor:
    reader = Reader(file.body)
    mean, std, shape = read_moments(model, file, reader)
    size, positions = reader.varint(), int(np.prod(shape[1:]))
    if len(shape) != 3 or not 0 < size <= PALETTE_SIZE:
        raise CorruptFileError("The file's palette does not fit this model.")
    colours = np.frombuffer(reader.take(size * shape[0]), np.uint8).reshape(size, -1)
    counts = np.array([reader.varint() for _ in range(size)])
    if counts.sum() != positions or counts.min() < 1:
        raise CorruptFileError("The file's colours do not add up to its positions.")
    chosen = SymbolDecoder(reader.rest()).decode(positions, 0, SymbolTables([counts], [0]))
    values = (torch.from_numpy(colours[chosen].T.astype(np.float32)) - 128) / 32 * std[:, None] + mean[:, None]
    return decode_tiles(model, values.reshape(1, *shape).to(model.device))


# Indices of a codebook


def index_tables(model) -> SymbolTables:
    """One table for each level of codes."""
    weights = [quantizer.frequencies.cpu().numpy() + 1 for quantizer in model.quantizers]
    return SymbolTables(weights, [0] * len(weights))


def write_indices(model, pixels: torch.Tensor) -> bytes:
    """The indices of a picture (uint8). Only the encoder works on tiles, so that codewords are chosen once."""
    check_size(model, pixels.shape[2:], ValueError)
    code = encode_tiles(lambda values: model.encoder(values)[0].float(), model, pad_to(pixels, max(stride_of(model), 1)))
    coder, tables = SymbolEncoder(), index_tables(model)
    for level, indices in enumerate(model.levels_of(model.bottleneck(code.to(model.dtype)).indices)):
        coder.encode(indices.flatten().cpu().numpy().astype(np.int32), level, tables)
    return coder.finish()


def read_indices(model, file: File) -> torch.Tensor:
    """The picture (uint8) of what `write_indices` wrote."""
    check_size(model, (file.height, file.width), CorruptFileError)
    decoder, tables, levels = SymbolDecoder(file.body), index_tables(model), []
    for level, shape in enumerate(model.config.level_shapes(file.height, file.width)):
        symbols = decoder.decode(int(np.prod(shape)), level, tables)
        levels.append(torch.from_numpy(symbols).long().view(1, *shape).to(model.device))
    return decode_tiles(model, model.indices_to_latents(model.from_levels(levels)))


def check_size(model, size, error: type[ValueError]):
    """Raise `error` where a model with a vector code does not take pictures of this height and width."""
    if not stride_of(model) and list(size) != model.config.image_hw:
        height, width = model.config.image_hw
        raise error(f"This model has a vector code and takes pictures of {height}×{width} pixels alone, not {tuple(size)}.")
