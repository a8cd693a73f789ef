"""Symbols <-> bytes: range coding with `constriction` (32-bit words, big-endian).

The last words are chosen so that they end in as many zero bytes as possible, of which up to 7 are left out. The
coder's models are made from tables of whole-number weights, in arithmetic that is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import UserError, require
from .container import CorruptFileError

ZERO_TAIL = 7
"""So many zero bytes at the end of the symbols are not written."""
CHUNK = 2**18
"""Symbols decoded at a time; after each chunk the decoder looks whether the data has ended too soon."""
ESCAPE_LIMIT, ESCAPE_DIGITS = 2**15, 18
"""Symbols lie in -32767 … 32767; twice that and a sign has 0 … 17 binary digits."""


class SymbolTables:
    """Distributions of symbols, each given by whole-number weights."""

    def __init__(self, weights: Sequence[np.ndarray], first: list[int], escape: bool = False) -> None:
        """`weights[t][i]` is the weight of the symbol `first[t] + i` in table t; with `escape` the last weight stands
        for all other symbols."""
        stream = constriction_stream()
        at_least_two = [w if len(w) > 1 else np.array([w[0], 1]) for w in weights]
        self.models = [stream.model.Categorical(w.astype(np.float64), perfect=False) for w in at_least_two]
        self.first, self.sizes, self.escape = first, [len(w) for w in weights], escape

    @classmethod
    def symmetric(cls, halves: Sequence[np.ndarray]) -> SymbolTables:
        """From weights of 0, 1, …, reach and of everything beyond."""
        whole = [np.concatenate([half[-2:0:-1], half]) for half in halves]
        return cls(whole, [2 - len(half) for half in halves], escape=True)


class SymbolEncoder:
    """Symbols -> bytes, by range coding."""

    def __init__(self) -> None:
        self.stream = constriction_stream()
        self.coder = self.stream.queue.RangeEncoder()

    def encode(self, symbols: np.ndarray, table: np.ndarray | int, tables: SymbolTables) -> None:
        """Append `symbols`; `table` says which of `tables` each is coded with (or all are). Raises ValueError for a
        symbol that its table does not hold."""
        for t, where in groups(symbols.shape, table):
            index = symbols[where].astype(np.int64) - tables.first[t]
            last = tables.sizes[t] - 1
            if not tables.escape:
                inside = not len(index) or 0 <= index.min() <= index.max() <= last
                require(inside, f"A symbol lies outside its table of {last + 1}.")
                self.coder.encode(index.astype(np.int32), tables.models[t])
                continue
            beyond = (index < 0) | (index >= last)
            self.coder.encode(np.where(beyond, last, index).astype(np.int32), tables.models[t])
            if beyond.any():
                self._escape(symbols[where].astype(np.int64)[beyond], -tables.first[t])

    def _escape(self, symbols: np.ndarray, reach: int) -> None:
        """Symbols beyond ±reach: how many binary digits their excess has, then these digits."""
        good = np.abs(symbols).max() < ESCAPE_LIMIT
        require(good, "This image has latents beyond 32767 quantization steps: the model is broken.")
        excess = 2 * (np.abs(symbols) - reach - 1) + (symbols < 0)
        digits = np.frexp(excess.astype(np.float64))[1]
        self.coder.encode(digits.astype(np.int32), self.stream.model.Uniform(ESCAPE_DIGITS))
        for count in np.unique(digits[digits > 1]).tolist():
            low = excess[digits == count] - (1 << count - 1)
            self.coder.encode(low.astype(np.int32), self.stream.model.Uniform(1 << count - 1))

    def finish(self) -> bytes:
        """The bytes. Any number of the coder's last interval will do: that with the most zero bytes at its end."""
        words, (low, width) = self.coder.pos()
        data: bytes = self.coder.get_compressed().astype(">u4").tobytes()
        if low + width < 2**64:  # else the sum carries into words before
            for zero_bytes in range(7, -1, -1):
                unit = 1 << 8 * zero_bytes
                rounded_up = (low + unit - 1) // unit * unit
                if rounded_up < low + width:
                    data = data[: 4 * words] + rounded_up.to_bytes(8, "big")
                    break
        return data[: max(len(data.rstrip(b"\0")), len(data) - ZERO_TAIL)]


class SymbolDecoder:
    """Bytes -> symbols: the inverse of SymbolEncoder, asked in the same order."""

    def __init__(self, data: bytes) -> None:
        self.stream = constriction_stream()
        padded = data + bytes(12 + -len(data) % 4)  # an honest decoder never reaches the last word
        self.coder = self.stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def decode(self, count: int, table: np.ndarray | int, tables: SymbolTables) -> np.ndarray:
        """The next `count` symbols, int32. Raises CorruptFileError where no encoder can have written the data."""
        symbols = np.empty(count, np.int32)
        try:
            for t, where in groups((count,), table):
                index = self._take(int(symbols[where].size), tables.models[t])
                require(not len(index) or index.max() < tables.sizes[t], "a symbol without a table entry")
                values = index + np.int32(tables.first[t])
                beyond = index == tables.sizes[t] - 1
                if tables.escape and beyond.any():
                    values[beyond] = self._escaped(int(beyond.sum()), -tables.first[t])
                symbols[where] = values
        except (AssertionError, ValueError) as error:
            raise CorruptFileError(f"The file is damaged: its symbols cannot be decoded ({error}).") from error
        return symbols

    def _take(self, count: int, model: Any) -> np.ndarray:
        parts = [np.empty(0, np.int32)]
        for start in range(0, count, CHUNK):
            parts.append(self.coder.decode(model, min(CHUNK, count - start)))
            require(not self.coder.maybe_exhausted(), "it ends before the image does")
        return np.concatenate(parts)

    def _escaped(self, count: int, reach: int) -> np.ndarray:
        digits = self._take(count, self.stream.model.Uniform(ESCAPE_DIGITS))
        excess = (digits == 1).astype(np.int64)
        for n in np.unique(digits[digits > 1]).tolist():
            low = self._take(int((digits == n).sum()), self.stream.model.Uniform(1 << n - 1))
            excess[digits == n] = low + (1 << n - 1)
        return np.where(excess % 2, -1, 1) * (excess // 2 + reach + 1)


def groups(shape: tuple[int, ...], table: np.ndarray | int) -> Iterator[tuple[int, Any]]:
    """(index of a table, where the symbols lie that are coded with it), in rising order of tables."""
    if isinstance(table, int):
        yield table, slice(None)
        return
    order = np.argsort(table.astype(np.uint16), kind="stable")
    counts = np.bincount(table.astype(np.int64))
    ends = np.cumsum(counts)
    for t in np.flatnonzero(counts).tolist():
        yield t, order[ends[t] - counts[t] : ends[t]]


def constriction_stream() -> Any:
    """The library of entropy coders. It is imported where it is used."""
    try:
        from constriction import stream
    except ModuleNotFoundError as error:
        raise UserError("Compression needs constriction: pip install 'hf_ae[codec]'") from error
    return stream
