"""What becomes of the rest of a request that was refused before all of it had come."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response

SHORT: Final = 64 * 1024  # bytes


def leave_unread(response: Response, headers: Headers) -> None:
    """Close the connection after this answer, unless the body is known to be short: that one is dropped as it comes.

    Many clients send the head and then the body, and if the connection breaks in between never look for the answer.
    """
    length = headers.get("content-length", "")
    if not (length.isdigit() and int(length) <= SHORT):
        response.headers["Connection"] = "close"
