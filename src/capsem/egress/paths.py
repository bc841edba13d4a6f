"""Paths of requests as policy sees them: one spelling for all that mean the same, and patterns over that.

`normalise` is applied to what the guest sent, before anything is judged. Where a server may read a path in two ways (an
encoded slash, a thing encoded twice), `readings` gives both: a rule that allows has to fit every reading, one that denies
needs only one.

In a pattern "*" stands for any characters of one segment, and "**", which has to be a whole segment, for any number of
segments: "/v1/*" is "/v1/models" but not "/v1/models/x", which "/v1/**" is, too.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_AMBIGUOUS: Final = re.compile(r"%(?:2F|5C|25)|\\|;")
_DEEPEST: Final = 4  # how many times over something may be encoded, before it is given up as what it is then


def normalise(target: str) -> str:
    """The path of a request's target in origin form ("/a/../b?x"), without its query: characters that need no escape are
    not escaped, escapes are upper-case, "." and ".." are resolved, slashes are not doubled. "*" stays what it is."""
    path = target.partition("?")[0].partition("#")[0]
    if not path.startswith("/"):
        return path
    return _resolve(_ESCAPE.sub(_unescape, path))


def readings(path: str) -> tuple[str, ...]:
    """What a server may take a normalised path for: itself; and, if it holds what some decode once more, that."""
    if not _AMBIGUOUS.search(path):
        return (path,)
    decoded = path
    for _ in range(_DEEPEST):
        previous, decoded = decoded, unquote(decoded, errors="replace")
        if previous == decoded:
            break
    bare = "/".join(segment.partition(";")[0] for segment in decoded.replace("\\", "/").split("/"))
    return (path, _resolve(bare))


def _unescape(match: re.Match[str]) -> str:
    char = chr(int(match[1], 16))
    return char if char in _UNRESERVED else match[0].upper()


def _resolve(path: str) -> str:
    kept: list[str] = []
    last = ""
    for segment in path.split("/"):
        last = segment
        if segment == "..":
            del kept[-1:]
        elif segment not in {"", "."}:
            kept.append(segment)
    directory = last in {"", ".", ".."} and bool(kept)
    return "/" + "/".join(kept) + ("/" if directory else "")


class PathPattern:
    """A compiled pattern. Raises ValueError, with what is wrong, for one that nothing could match as it was meant.

    One that can itself be read in two ways fits a path's other reading in its own other reading, too.
    """

    __slots__ = ("_second", "_segments", "text")

    def __init__(self, text: str) -> None:
        if not text.startswith("/"):
            raise ValueError("a path begins with /")
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"as it is sent it would be {quote(text, safe='/*%')}")
        if "?" in text or "#" in text:
            raise ValueError("a path pattern has no query")
        segments = text[1:].split("/")
        if any("**" in segment and segment != "**" for segment in segments):
            raise ValueError("** stands for whole segments: put it between slashes")
        plain = text.replace("*", "x")
        if normalise(plain) != plain:
            raise ValueError(f"no normalised path looks like that; write {normalise(text)}")
        self.text = text
        self._segments = segments
        second = readings(text)[-1]
        self._second = second[1:].split("/") if second.count("*") == text.count("*") else segments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathPattern) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"PathPattern({self.text!r})"

    def matches(self, path: str, *, second: bool = False) -> bool:
        """Whether a path is one of these; `second`: it is the other one that `readings` gives."""
        if not path.startswith("/"):
            return False
        given = path[1:].split("/")
        return _walk(self._segments, given) or (second and _walk(self._second, given))


def _walk(wanted: list[str], given: list[str]) -> bool:
    """Whether segments fit; of several "**" only the last met has ever to be tried again, so this is quick."""
    at, here, star, mark = 0, 0, -1, 0
    while here < len(given):
        if at < len(wanted) and wanted[at] == "**":
            if at == len(wanted) - 1:
                return True  # at least one segment is left, if only an empty one
            star, mark, at = at, here, at + 1
        elif at < len(wanted) and _fits(wanted[at], given[here]):
            at, here = at + 1, here + 1
        elif star >= 0:
            mark += 1
            at, here = star + 1, mark
        else:
            return False
    return at == len(wanted)


def _fits(pattern: str, segment: str) -> bool:
    """Whether one segment fits its pattern, in which "*" is any characters."""
    if "*" not in pattern:
        return pattern == segment
    first, *middle, last = pattern.split("*")
    if len(segment) < len(first) + len(last) or not segment.startswith(first) or not segment.endswith(last):
        return False
    at, end = len(first), len(segment) - len(last)
    for part in middle:
        at = segment.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True
