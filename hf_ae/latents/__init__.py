"""What one does with codes."""

from .walks import arithmetic, decode, interpolate, manifold_grid, random_codes, traversal

__all__ = ["arithmetic", "decode", "interpolate", "manifold_grid", "random_codes", "traversal"]
