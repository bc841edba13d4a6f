"""HTTP as uvicorn reads it, but that what is none is answered like everything else that is refused."""

from __future__ import annotations

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from capsem.model.errors import InvalidInput


class Protocol(HttpToolsProtocol):
    """One connection."""

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser does not take, and hang up."""
        error = InvalidInput(
            "this is not a request of HTTP/1.1", hint="characters of a path or a query beyond ASCII are written as %XX"
        )
        body = msgspec.json.encode(error.to_dict())
        head = (
            f"HTTP/1.1 {error.status} Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
