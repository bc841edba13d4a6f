"""Unix sockets that nobody else may connect to, not even for the instant between bind and chmod."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def bind_private(path: Path) -> socket.socket:
    """A socket bound to `path`, mode 0600, that does not listen yet. Raises OSError (something is there, path too long).

    Linux gives the file the mode of the socket itself (unix(7)), so that the umask is left alone: it belongs to the whole
    process, and whoever made a directory or a program meanwhile would get it without the right to use it.
    """
    bound = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(str(path))
    except BaseException:
        bound.close()
        raise
    return bound
