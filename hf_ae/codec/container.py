"""The file format `.hfae`.

Numbers of more than one byte are little-endian; a *varint* holds 7 bits a byte, lowest first, with the top bit set in
all bytes but the last.

| bytes | what |
| ---: | --- |
| 2 | AE 68 |
| 1 | from the top: 3 bits version (1), 1 bit mode (see MODES), 1 bit names its model, 3 bits method (see METHODS) |
| 1-5 | width, varint |
| 1-5 | height, varint |
| 3 | fingerprint: the first bytes of the SHA-256 over the weights and tables that decoding uses |
| 0-256 | where the file names its model: length of the id in bytes, 1 byte; the id, UTF-8: of the Hub, or relative |
| … | the method's parameters, then its entropy-coded symbols (see the `method_…` modules and `entropy_coder`) |
| 4 | CRC-32 of everything before |
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from ..errors import UserError, require

MAGIC = b"\xaeh"
VERSION = 1
METHODS = ("hyperprior", "latents", "palette", "indices")
MODES = ("L", "RGB")
MAX_PIXELS = 2**26
"""Larger images, padded as the model works on them, are refused before anything is allocated."""
FINGERPRINT_BYTES = 3


class CorruptFileError(UserError):
    """A compressed file that is damaged, of another version, or of another model."""


@dataclass
class File:
    """What an `.hfae` file holds."""

    method: str
    mode: str
    width: int
    height: int
    fingerprint: bytes
    model_id: str
    body: bytes = field(repr=False)
    """The method's parameters and its entropy-coded symbols."""


def pack(file: File) -> bytes:
    """The bytes of a file. Raises ValueError where a field does not fit the format."""
    name = file.model_id.encode()
    require(
        len(name) <= 255, f"The model's id has {len(name)} bytes, and the format holds 255: pass a shorter model_id."
    )
    check_pixels(file.width, file.height)
    kind = VERSION << 5 | MODES.index(file.mode) << 4 | bool(name) << 3 | METHODS.index(file.method)
    head = MAGIC + bytes([kind]) + varint(file.width) + varint(file.height) + file.fingerprint
    data = head + (bytes([len(name)]) + name if name else b"") + file.body
    return data + zlib.crc32(data).to_bytes(4, "little")


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for images that the format does not take."""
    good = 0 < width * height <= MAX_PIXELS
    require(good, f"An image of {width}×{height} pixels is beyond the limit of {MAX_PIXELS:,} pixels.")


def unpack(data: bytes, max_pixels: int = MAX_PIXELS) -> File:
    """Bytes -> File. Raises CorruptFileError for anything that `pack` did not write, and beyond `max_pixels`."""
    expect(data[:2] == MAGIC, "This is no .hfae file: it does not begin with AE 68.")
    version = data[2] >> 5 if len(data) > 2 else VERSION
    expect(version == VERSION, f"The file has format version {version}, and this reader knows version {VERSION}.")
    good = len(data) >= 12 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
    expect(good, "The file is damaged: its checksum does not match.")
    reader = Reader(data[2:-4])
    kind = reader.take(1)[0]
    expect(kind & 7 < len(METHODS), f"The file uses method {kind & 7}, which this reader does not know.")
    width, height = reader.varint(), reader.varint()
    good = 0 < width * height <= max_pixels
    expect(good, f"The file claims {width}×{height} pixels, and at most {max_pixels:,} are read.")
    fingerprint, name = reader.take(FINGERPRINT_BYTES), b""
    if kind & 8:
        name = reader.take(reader.take(1)[0])
    try:
        model_id = name.decode()
    except UnicodeDecodeError as error:
        raise CorruptFileError("The model's id in the file is not UTF-8.") from error
    return File(METHODS[kind & 7], MODES[kind >> 4 & 1], width, height, fingerprint, model_id, reader.rest())


def expect(condition: object, message: str) -> None:
    """Raise CorruptFileError with the message unless the condition holds."""
    if not condition:
        raise CorruptFileError(message)


def varint(value: int) -> bytes:
    """A whole number, 7 bits a byte."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Reads fields from bytes; CorruptFileError where they end too soon."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        expect(self.position + count <= len(self.data), "The file is damaged: it ends in the middle of a field.")
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self) -> int:
        """The next whole number."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise CorruptFileError("The file is damaged: a number in its header is too long.")

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self.data) - self.position)
