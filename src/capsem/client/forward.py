"""A port of this computer's loopback that leads to one in a VM: each connection is a stream of its own.

The listener stays when the VM is suspended: connections break, as with any machine that goes away, and what connects
after the resume gets through again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

from capsem.client.sync import Client
from capsem.model.errors import CapsemError, MachineFailed

_PIECE = 64 * 1024


class Forwarding:
    """Listens from construction on; `serve` accepts until `close` is called, from any thread. `with` closes it.

    `port` 0 chooses one; `address` is (host, port). `failed` is told why a connection was ended. Raises MachineFailed
    when the port cannot be had.
    """

    def __init__(
        self,
        client: Client,
        vm_id: str,
        guest_port: int,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        failed: Callable[[CapsemError], None] = lambda _error: None,
    ) -> None:
        self._client = client
        self._vm_id = vm_id
        self._body: dict[str, Any] = {"port": guest_port}
        self._failed = failed
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            raise MachineFailed(
                f"cannot listen at {host}:{port}: {error.strerror}", hint="choose another port: PORT:GUESTPORT"
            ) from error
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    def __enter__(self) -> Forwarding:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Serve on a thread of its own."""
        threading.Thread(target=self.serve, name="forward", daemon=True).start()

    def serve(self) -> None:
        """Accept until closed; each connection has its own thread."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._carry, args=(connection,), name="forwarded", daemon=True).start()

    def close(self) -> None:
        """Accept no more; connections that there are go on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept
        self._listener.close()

    def _carry(self, connection: socket.socket) -> None:
        with connection:
            try:
                with self._client.stream(self._vm_id, self._body, _Received(connection), operation="forward") as stream:
                    for _, data in stream:
                        connection.sendall(data)
            except CapsemError as error:
                self._failed(error)
            except OSError:  # who connected has gone
                pass
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads


class _Received:
    """What comes from a socket, as client.sync.Input."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, size: int, /) -> bytes:
        """See client.sync.Input."""
        return self._connection.recv(min(size, _PIECE))
