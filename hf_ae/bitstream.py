"""The file format `.hfae`, and the entropy coder.

Numbers of more than one byte are little-endian; a *varint* holds 7 bits a byte, lowest first, with the top bit set in all
bytes but the last.

| bytes | what |
| ---: | --- |
| 4 | `HFAE` |
| 1 | version: 1 |
| 1 | method in the lower four bits (see METHODS), Pillow mode of the picture in the upper four (see MODES) |
| 1-5 | width, varint |
| 1-5 | height, varint |
| 4 | fingerprint: the first bytes of the SHA-256 over the weights and tables that decoding uses |
| 1 | length of the model's id in bytes; 0: the file names no model |
| 0-255 | the model's id, UTF-8: a Hub id or a folder |
| … | the method's parameters, then its entropy-coded symbols (see `codec`) |
| 4 | CRC-32 of everything before |

Symbols are range-coded with `constriction` (32-bit words, big-endian; zero bytes at the end are left out). Its models are made
from tables of whole-number weights, in arithmetic that is the same on every machine.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

MAGIC = b"HFAE"
VERSION = 1
METHODS = ("hyperprior", "latents", "palette", "indices")
MODES = ("L", "RGB")
MAX_PIXELS = 2**26
"""Larger pictures are refused before anything is allocated."""
FINGERPRINT_BYTES = 4
ESCAPE_LIMIT, ESCAPE_DIGITS = 2**15, 18
"""Symbols lie in -32767 … 32767; twice that and a sign has 0 … 17 binary digits."""


class CorruptFileError(ValueError):
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
    if len(name) > 255:
        raise ValueError(f"The model's id has {len(name)} bytes, and the format holds 255: pass a shorter model_id.")
    if not 0 < file.width * file.height <= MAX_PIXELS:
        raise ValueError(f"A picture of {file.width}×{file.height} pixels is beyond the limit of {MAX_PIXELS:,} pixels.")
    kind = METHODS.index(file.method) | MODES.index(file.mode) << 4
    head = MAGIC + bytes([VERSION, kind]) + varint(file.width) + varint(file.height) + file.fingerprint + bytes([len(name)])
    data = head + name + file.body
    return data + zlib.crc32(data).to_bytes(4, "little")


def unpack(data: bytes, max_pixels: int = MAX_PIXELS) -> File:
    """Bytes -> File. Raises CorruptFileError for anything that `pack` did not write, and for pictures beyond `max_pixels`."""
    if data[:4] != MAGIC:
        raise CorruptFileError("This is no .hfae file: it does not begin with HFAE.")
    if len(data) > 4 and data[4] != VERSION:
        raise CorruptFileError(f"The file has format version {data[4]}, and this reader knows version {VERSION}.")
    if len(data) < 18 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptFileError("The file is damaged: its checksum does not match.")
    reader = Reader(data[5:-4])
    kind = reader.take(1)[0]
    if kind & 15 >= len(METHODS) or kind >> 4 >= len(MODES):
        raise CorruptFileError(f"The file uses method {kind & 15} and mode {kind >> 4}, which this reader does not know.")
    width, height = reader.varint(), reader.varint()
    if not 0 < width * height <= max_pixels:
        raise CorruptFileError(f"The file claims {width}×{height} pixels, and at most {max_pixels:,} are read.")
    fingerprint, name = reader.take(FINGERPRINT_BYTES), reader.take(reader.take(1)[0])
    try:
        model_id = name.decode()
    except UnicodeDecodeError:
        raise CorruptFileError("The model's id in the file is not UTF-8.") from None
    return File(METHODS[kind & 15], MODES[kind >> 4], width, height, fingerprint, model_id, reader.rest())


def varint(value: int) -> bytes:
    """A whole number, 7 bits a byte."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Reads fields from bytes; CorruptFileError where they end too soon."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            raise CorruptFileError("The file is damaged: it ends in the middle of a field.")
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise CorruptFileError("The file is damaged: a number in its header is too long.")

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.position)


# Entropy coding


class SymbolTables:
    """Distributions of symbols, each given by whole-number weights."""

    def __init__(self, weights: list[np.ndarray], first: list[int], escape: bool = False):
        """`weights[t][i]` is the weight of the symbol `first[t] + i` in table t; with `escape` the last weight stands for all
        other symbols."""
        stream = constriction_stream()
        at_least_two = [w if len(w) > 1 else np.array([w[0], 1]) for w in weights]
        self.models = [stream.model.Categorical(w.astype(np.float64), perfect=False) for w in at_least_two]
        self.first, self.sizes, self.escape = first, [len(w) for w in weights], escape

    @classmethod
    def symmetric(cls, halves: list[np.ndarray]) -> SymbolTables:
        """From weights of 0, 1, …, reach and of everything beyond."""
        whole = [np.concatenate([half[-2:0:-1], half]) for half in halves]
        return cls(whole, [2 - len(half) for half in halves], escape=True)


class SymbolEncoder:
    """Symbols -> bytes, by range coding."""

    def __init__(self):
        self.stream = constriction_stream()
        self.coder = self.stream.queue.RangeEncoder()

    def encode(self, symbols: np.ndarray, table: np.ndarray | int, tables: SymbolTables):
        """Append `symbols`; `table` says which of `tables` each is coded with (or all are)."""
        for number, where in groups(symbols.shape, table):
            index = symbols[where].astype(np.int64) - tables.first[number]
            last = tables.sizes[number] - 1
            if not tables.escape:
                if len(index) and not 0 <= index.min() <= index.max() <= last:
                    raise ValueError(f"A symbol lies outside its table of {last + 1}.")
                self.coder.encode(index.astype(np.int32), tables.models[number])
                continue
            beyond = (index < 0) | (index >= last)
            self.coder.encode(np.where(beyond, last, index).astype(np.int32), tables.models[number])
            if beyond.any():
                self._escape(symbols[where].astype(np.int64)[beyond], -tables.first[number])

    def _escape(self, symbols: np.ndarray, reach: int):
        """Symbols beyond ±reach: how many binary digits their excess has, then these digits."""
        if np.abs(symbols).max() >= ESCAPE_LIMIT:
            raise ValueError("The code of this picture has values beyond 32767 quantization steps: the model is broken.")
        excess = 2 * (np.abs(symbols) - reach - 1) + (symbols < 0)
        digits = np.frexp(excess.astype(np.float64))[1]
        self.coder.encode(digits.astype(np.int32), self.stream.model.Uniform(ESCAPE_DIGITS))
        for count in np.unique(digits[digits > 1]).tolist():
            low = excess[digits == count] - (1 << count - 1)
            self.coder.encode(low.astype(np.int32), self.stream.model.Uniform(1 << count - 1))

    def finish(self) -> bytes:
        return self.coder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


class SymbolDecoder:
    """Bytes -> symbols: the inverse of SymbolEncoder, asked in the same order."""

    def __init__(self, data: bytes):
        self.stream = constriction_stream()
        words = np.frombuffer(data + bytes(8 + -len(data) % 4), ">u4").astype(np.uint32)
        self.coder = self.stream.queue.RangeDecoder(words)

    def decode(self, count: int, table: np.ndarray | int, tables: SymbolTables) -> np.ndarray:
        """The next `count` symbols, int32. Raises CorruptFileError where no encoder can have written the data."""
        symbols = np.empty(count, np.int32)
        try:
            for number, where in groups((count,), table):
                index = self.coder.decode(tables.models[number], int(symbols[where].size))
                if len(index) and index.max() >= tables.sizes[number]:
                    raise ValueError("a symbol without a table entry")
                values = index + np.int32(tables.first[number])
                beyond = index == tables.sizes[number] - 1
                if tables.escape and beyond.any():
                    values[beyond] = self._escaped(int(beyond.sum()), -tables.first[number])
                symbols[where] = values
        except (AssertionError, ValueError) as error:
            raise CorruptFileError(f"The file is damaged: its symbols cannot be decoded ({error}).") from None
        return symbols

    def _escaped(self, count: int, reach: int) -> np.ndarray:
        digits = self.coder.decode(self.stream.model.Uniform(ESCAPE_DIGITS), count)
        excess = (digits == 1).astype(np.int64)
        for number in np.unique(digits[digits > 1]).tolist():
            low = self.coder.decode(self.stream.model.Uniform(1 << number - 1), int((digits == number).sum()))
            excess[digits == number] = low + (1 << number - 1)
        return np.where(excess % 2, -1, 1) * (excess // 2 + reach + 1)


def groups(shape, table: np.ndarray | int):
    """(number of a table, where the symbols lie that are coded with it), in rising order of tables."""
    if isinstance(table, int):
        yield table, slice(None)
        return
    order = np.argsort(table.astype(np.uint16), kind="stable")
    counts = np.bincount(table.astype(np.int64))
    ends = np.cumsum(counts)
    for number in np.flatnonzero(counts).tolist():
        yield number, order[ends[number] - counts[number] : ends[number]]


def constriction_stream():
    """The library of entropy coders. It is imported where it is used."""
    try:
        from constriction import stream
    except ModuleNotFoundError:
        raise ValueError("Compression needs constriction: pip install 'hf_ae[codec]'") from None
    return stream
