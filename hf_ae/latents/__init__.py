"""What one does with latents: walk from one to another, add and subtract them, map a plane, draw new ones."""

from .walks import (
    arithmetic,
    decode,
    encode_images,
    interpolate,
    manifold_grid,
    random_codes,
    random_latents,
    reconstruct,
    traversal,
)

__all__ = [
    "arithmetic", "decode", "encode_images", "interpolate", "manifold_grid", "random_codes", "random_latents",
    "reconstruct", "traversal",
]  # fmt: skip
