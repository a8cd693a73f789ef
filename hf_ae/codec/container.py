"""The file format `.hfae`, and the entropy coder.

Numbers of more than one byte are little-endian; a *varint* holds 7 bits a byte, lowest first, with the top bit set in all
bytes but the last.

| bytes | what |
| ---: | --- |
| 2 | AE 68 |
| 1 | from the top: 3 bits version (1), 1 bit Pillow mode (see MODES), 1 bit whether the file names its model, 3 bits method (see METHODS) |
| 1-5 | width, varint |
| 1-5 | height, varint |
| 3 | fingerprint: the first bytes of the SHA-256 over the weights and tables that decoding uses |
| 0-256 | where the file names its model: length of the id in bytes, 1 byte; the id, UTF-8: a Hub id or a folder |
| … | the method's parameters, then its entropy-coded symbols (see `codec`) |
| 4 | CRC-32 of everything before |

Symbols are range-coded with `constriction` (32-bit words, big-endian). The last words are chosen so that they end in as many zero
bytes as possible, of which up to 7 are left out. Its models are made from tables of whole-number weights, in arithmetic that is
the same on every machine.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

MAGIC = b"\xaeh"
VERSION = 1
METHODS = ("hyperprior", "latents", "palette", "indices")
MODES = ("L", "RGB")
MAX_PIXELS = 2**26
"""Larger pictures are refused before anything is allocated."""
FINGERPRINT_BYTES = 3
ZERO_TAIL = 7
"""So many zero bytes at the end of the symbols are not written."""
CHUNK = 2**18
"""Symbols decoded at a time; after each chunk the decoder looks whether the data has ended too soon."""
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
    kind = VERSION << 5 | MODES.index(file.mode) << 4 | bool(name) << 3 | METHODS.index(file.method)
    head = MAGIC + bytes([kind]) + varint(file.width) + varint(file.height) + file.fingerprint
    data = head + (bytes([len(name)]) + name if name else b"") + file.body
    return data + zlib.crc32(data).to_bytes(4, "little")


def unpack(data: bytes, max_pixels: int = MAX_PIXELS) -> File:
    """Bytes -> File. Raises CorruptFileError for anything that `pack` did not write, and for pictures beyond `max_pixels`."""
    if data[:2] != MAGIC:
        raise CorruptFileError("This is no .hfae file: it does not begin with AE 68.")
    if len(data) > 2 and data[2] >> 5 != VERSION:
        raise CorruptFileError(f"The file has format version {data[2] >> 5}, and this reader knows version {VERSION}.")
    if len(data) < 12 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptFileError("The file is damaged: its checksum does not match.")
    reader = Reader(data[2:-4])
    kind = reader.take(1)[0]
    if kind & 7 >= len(METHODS):
        raise CorruptFileError(f"The file uses method {kind & 7}, which this reader does not know.")
    width, height = reader.varint(), reader.varint()
    if not 0 < width * height <= max_pixels:
        raise CorruptFileError(f"The file claims {width}×{height} pixels, and at most {max_pixels:,} are read.")
    fingerprint, name = reader.take(FINGERPRINT_BYTES), b""
    if kind & 8:
        name = reader.take(reader.take(1)[0])
    try:
        model_id = name.decode()
    except UnicodeDecodeError:
        raise CorruptFileError("The model's id in the file is not UTF-8.") from None
    return File(METHODS[kind & 7], MODES[kind >> 4 & 1], width, height, fingerprint, model_id, reader.rest())


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
        """The bytes. Any number of the coder's last interval will do: that with the most zero bytes at its end is written."""
        words, (low, width) = self.coder.pos()
        data = self.coder.get_compressed().astype(">u4").tobytes()
        if low + width < 2**64:  # else the sum carries into words before
            unit = next(u for u in (1 << 8 * n for n in range(7, -1, -1)) if -(-low // u) * u < low + width)
            data = data[: 4 * words] + (-(-low // unit) * unit).to_bytes(8, "big")
        return data[: max(len(data.rstrip(b"\0")), len(data) - ZERO_TAIL)]


class SymbolDecoder:
    """Bytes -> symbols: the inverse of SymbolEncoder, asked in the same order."""

    def __init__(self, data: bytes):
        self.stream = constriction_stream()
        words = np.frombuffer(data + bytes(12 + -len(data) % 4), ">u4").astype(np.uint32)  # an honest decoder never reaches the last
        self.coder = self.stream.queue.RangeDecoder(words)

    def decode(self, count: int, table: np.ndarray | int, tables: SymbolTables) -> np.ndarray:
        """The next `count` symbols, int32. Raises CorruptFileError where no encoder can have written the data."""
        symbols = np.empty(count, np.int32)
        try:
            for number, where in groups((count,), table):
                index = self._take(int(symbols[where].size), tables.models[number])
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

    def _take(self, count: int, model) -> np.ndarray:
        parts = [np.empty(0, np.int32)]
        for start in range(0, count, CHUNK):
            parts.append(self.coder.decode(model, min(CHUNK, count - start)))
            if self.coder.maybe_exhausted():
                raise ValueError("it ends before the picture does")
        return np.concatenate(parts)

    def _escaped(self, count: int, reach: int) -> np.ndarray:
        digits = self._take(count, self.stream.model.Uniform(ESCAPE_DIGITS))
        excess = (digits == 1).astype(np.int64)
        for number in np.unique(digits[digits > 1]).tolist():
            low = self._take(int((digits == number).sum()), self.stream.model.Uniform(1 << number - 1))
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
