"""The certificate of the host's authority, among those that programs in the guest trust.

Every installation has an authority of its own, while an image and a checkpoint may be used on any: so it comes with each
handshake, and takes the place of another one's. It is merged into Debian's bundle, which is what nearly all programs read
or can be told to read (wire.environment.TRUST), and lies where `update-ca-certificates` finds it when it makes that anew.
"""

from __future__ import annotations

import os

from capsem.wire.environment import AUTHORITY, BUNDLE


class Trust:
    """Of the machine whose root is at `root`."""

    def __init__(self, root: str = "") -> None:
        self._bundle = root + BUNDLE
        self._authority = root + AUTHORITY
        self._trusted = ""

    def trust(self, certificate: str) -> dict[str, int]:
        """Have programs trust `certificate` (PEM), and no earlier one of ours; the files that were written, with their sizes.

        A machine that was just restored knows what it trusts, and opens no file. Raises OSError.
        """
        if certificate == self._trusted:
            return {}
        old, bundle = _read(self._authority), _read(self._bundle)
        wanted = bundle
        if old and old != certificate:
            wanted = wanted.replace(old, "")
        if certificate not in wanted:
            wanted += ("\n" if wanted and not wanted.endswith("\n") else "") + certificate
        # The bundle first: were this cut off, the authority's own file would still tell what to take out of it.
        written = {
            path: _write(path, text)
            for path, text, was in ((self._bundle, wanted, bundle), (self._authority, certificate, old))
            if text != was
        }
        self._trusted = certificate
        return written


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:  # the guest's owner does without
        return ""


def _write(path: str, text: str) -> int:
    """In one step, for programs read it at any time."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.capsem"
    with open(temporary, "w", encoding="ascii", errors="surrogateescape", newline="") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)
    return len(text)
