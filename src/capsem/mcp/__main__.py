"""capsem-mcp: standard input and output are the protocol's, everything else goes to mcp.log in the run directory."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

from capsem import __version__
from capsem import log as logs
from capsem.client.service import start
from capsem.client.sync import Client
from capsem.config import Paths
from capsem.mcp.tools import TOOLSETS
from capsem.model.errors import CapsemError

LOG_NAME = "mcp.log"

log = logging.getLogger("capsem_mcp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until standard input ends; returns the exit code."""
    parser = argparse.ArgumentParser("capsem-mcp", description="Capsem's MCP server, on standard input and output.")
    parser.add_argument(
        "--toolset", choices=TOOLSETS, default="all", help="which tools to offer (default: %(default)s)"
    )
    parser.add_argument("--version", action="version", version=f"capsem-mcp {__version__}")
    options = parser.parse_args(arguments)
    try:
        paths = Paths.from_environment(os.environ)
        paths.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        logs.setup(os.environ, paths.run_dir / LOG_NAME)
    except (CapsemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    asyncio.run(_serve(paths, options.toolset))
    return 0


async def _serve(paths: Paths, toolset: str) -> None:
    # Imported late: the SDK takes most of the start, and a mistake in the arguments should not wait for it. What it makes
    # stays for good, and looking through it for garbage meanwhile would be a fifth of that time.
    gc.disable()
    from mcp.server.stdio import stdio_server

    from capsem.mcp.calls import Service
    from capsem.mcp.server import Tools

    gc.freeze()
    gc.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _end, number)
    service = Service(Client(paths.socket, start=lambda: start(paths, os.environ)))
    server = Tools(service, toolset).server()
    log.info("serving", extra={"fields": {"toolset": toolset, "socket": paths.socket}})
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())
    log.info("standard input has ended")


def _end(number: int) -> None:
    """End at once: the SDK reads standard input in a thread that nothing can wake. The service notices that its calls
    are gone, and nothing else is ours."""
    log.info("ended by signal %d", number)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
