"""Compressed bodies, opened for the tap alone and no further than is safe: a few bytes may stand for gigabytes.

What comes out is bounded in three ways: in each step, so that no step takes long or much memory; in all by what went in
(`BASE` and `RATIO`), which no text of a model comes near; and by the window that a stream may ask for. Brotli and Zstandard
need libraries that are not there everywhere.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

BASE: Final = 8 * 1024 * 1024  # bytes that may come out of nearly nothing
RATIO: Final = 64  # times what went in; event streams compress to a tenth or so
STEP: Final = 64 * 1024  # bytes that come out at once
WINDOW: Final = 8 * 1024 * 1024  # bytes that a Zstandard stream may look back, as browsers have it
SLICE: Final = 64  # bytes of Zstandard at once: each may make two megabytes at most


class Unreadable(Exception):
    """The rest of this body cannot be looked at; the message says why."""


class Opener(Protocol):
    """Takes a body's bytes as they are on the way."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """What they stand for, in pieces. Raises Unreadable."""


def opener(coding: bytes | None) -> Opener:
    """For a value of Content-Encoding. Raises Unreadable."""
    name = (coding or b"").strip().lower()
    if name in (b"", b"identity"):
        return _Plain()
    if name in (b"gzip", b"x-gzip"):
        return _Bounded(_Zlib(31))
    if name == b"deflate":
        return _Bounded(_Deflate())
    if name == b"br":
        return _Bounded(_Brotli())
    if name == b"zstd":
        return _Bounded(_Zstandard())
    raise Unreadable(f"it is encoded as {name.decode('ascii', 'replace')[:40]}")


class _Plain:
    def feed(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk


class _Bounded:
    """Counts what goes in and comes out."""

    def __init__(self, inner: Opener) -> None:
        self._inner = inner
        self._in = self._out = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self._in += len(chunk)
        for piece in self._inner.feed(chunk):
            self._out += len(piece)
            if self._out > BASE + RATIO * self._in:
                raise Unreadable("it expands too much")
            yield piece


class _Zlib:
    """Gzip, of several members too, or zlib's own format, or neither's, by the window bits of zlib."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._inner = zlib.decompressobj(bits)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        while chunk:
            if self._inner.eof:
                self._inner = zlib.decompressobj(self._bits)
            try:
                piece = self._inner.decompress(chunk, STEP)
            except zlib.error as error:
                raise Unreadable(f"it is no {'gzip' if self._bits > 15 else 'deflate'}") from error
            chunk = self._inner.unused_data if self._inner.eof else self._inner.unconsumed_tail
            if piece:
                yield piece


class _Deflate:
    """What is called deflate is zlib's format; some servers mean the bare one. The first byte tells."""

    def __init__(self) -> None:
        self._inner: _Zlib | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if self._inner is None:
            if not chunk:
                return
            self._inner = _Zlib(15 if chunk[0] & 0x0F == 8 and chunk[0] >> 4 <= 7 else -15)
        yield from self._inner.feed(chunk)


class _Brotli:
    """Needs a library that can be told how much to give at once: without, one kilobyte may fill the memory."""

    def __init__(self) -> None:
        brotli = _library("brotli", "it is encoded as br, and the package brotli is not installed")
        self._error = brotli.error
        self._inner = brotli.Decompressor()
        if not hasattr(self._inner, "can_accept_more_data"):
            raise Unreadable("it is encoded as br, and the package brotli is older than 1.2")

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        try:
            piece = self._inner.process(chunk, output_buffer_limit=STEP)
            while piece:
                yield from _cut(piece)  # it gives a little more than it may
                piece = self._inner.process(b"", output_buffer_limit=STEP)
        except self._error as error:
            raise Unreadable("it is no brotli") from error


class _Zstandard:
    """Fed in slices so small that none makes too much; of several frames, too."""

    def __init__(self) -> None:
        zstandard = _library("zstandard", "it is encoded as zstd, and the package zstandard is not installed")
        self._error = zstandard.ZstdError
        self._make: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
        self._inner = self._make()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        for start in range(0, len(chunk), SLICE):
            rest = chunk[start : start + SLICE]
            while rest:
                if self._inner.eof:
                    self._inner = self._make()
                try:
                    piece = self._inner.decompress(rest)
                except self._error as error:
                    raise Unreadable("it is no zstd, or looks back too far") from error
                rest = self._inner.unused_data if self._inner.eof else b""
                yield from _cut(piece)


def _cut(piece: bytes) -> Iterator[bytes]:
    return (piece[place : place + STEP] for place in range(0, len(piece), STEP))


def _library(name: str, without: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unreadable(without) from error
