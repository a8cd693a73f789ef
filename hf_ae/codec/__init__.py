"""Any autoencoder as an image codec: `compress(model, image) -> bytes`, `decompress(data) -> image`."""

from .compression import compress, compress_batch, decompress, decompress_batch, fingerprint, roundtrip, shared_name
from .container import CorruptFileError, unpack

__all__ = [
    "CorruptFileError", "compress", "compress_batch", "decompress", "decompress_batch", "fingerprint", "roundtrip",
    "shared_name", "unpack",
]  # fmt: skip
