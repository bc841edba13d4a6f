"""The service of `service_world`, whose guests are processes of this host, behind its HTTP face, on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from capsem.service.app import build_app
from service_world import World, world


@contextlib.contextmanager
def served_world(worlds: list[World] | None = None) -> Iterator[str]:
    """The path of its socket; it is put into `worlds`, for tests that reach around its face."""
    with tempfile.TemporaryDirectory(prefix="capsem-") as text:
        directory, socket = Path(text), f"{text}/service.sock"
        up, done = threading.Event(), asyncio.Event()
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            async with world(directory, 20) as it:
                if worlds is not None:
                    worlds.append(it)
                config = uvicorn.Config(build_app(it.handlers, "1.2.3"), uds=socket, log_config=None, lifespan="off")
                server = uvicorn.Server(config)
                serving = asyncio.create_task(server.serve())
                while not server.started:
                    await asyncio.sleep(0.005)
                up.set()
                await done.wait()
                server.should_exit = True
                await serving

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert up.wait(30)
        try:
            yield socket
        finally:
            loops[0].call_soon_threadsafe(done.set)
            thread.join(60)
            assert not thread.is_alive()
