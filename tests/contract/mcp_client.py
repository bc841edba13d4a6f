"""capsem-mcp as a process, before a real service with simulated VMs, and two ways to speak to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from mcp import StdioServerParameters
from mcp.client.client import Client

COMMAND = [sys.executable, "-m", "capsem.mcp"]


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(home),
        "CAPSEM_HOME": str(home),
        "CAPSEM_RUN_DIR": str(home / "run"),
        "CAPSEM_HYPERVISOR": "sim",
    }


@contextlib.asynccontextmanager
async def sdk_client(home: Path, *options: str, mode: str = "legacy") -> AsyncIterator[Client]:
    """The SDK's own client. `mode`: "legacy" shakes hands, "2026-07-28" does without, "auto" finds out."""
    server = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *options], env=environment(home))
    async with Client(server, mode=mode, read_timeout_seconds=60) as client:
        yield client


class Lines:
    """Line by line, as the contract has it."""

    def __init__(self, home: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*COMMAND, *options], stdin=pipe, stdout=pipe, env={**environment(home), **(env or {})}, text=True
        )
        self.seen: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._last = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.put(line)

    def send(self, message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message if isinstance(message, str) else json.dumps(message) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next line."""
        message: dict[str, Any] = json.loads(self.seen.get(timeout=60))
        assert message["jsonrpc"] == "2.0"
        return message

    def request(self, method: str, params: object = None) -> int:
        self._last += 1
        self.send({"jsonrpc": "2.0", "id": self._last, "method": method, "params": params or {}})
        return self._last

    def ask(self, method: str, params: object = None) -> dict[str, Any]:
        """A request, and the line after it, which has to be its answer."""
        wanted = self.request(method, params)
        answer = self.receive()
        assert answer["id"] == wanted
        return answer

    def call(self, tool: str, **arguments: object) -> dict[str, Any]:
        result: dict[str, Any] = self.ask("tools/call", {"name": tool, "arguments": arguments})["result"]
        return result

    def shake_hands(self, version: str = "2024-11-05") -> dict[str, Any]:
        hello = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
        result: dict[str, Any] = self.ask("initialize", hello)["result"]
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return result

    def close(self) -> int:
        """End its standard input; the exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(5)
        self._reader.join(5)
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def lines(home: Path, *options: str, version: str = "2024-11-05") -> Iterator[Lines]:
    """A session that has been opened."""
    session = Lines(home, *options)
    try:
        session.shake_hands(version)
        yield session
    finally:
        session.close()


def parsed(result: Mapping[str, Any]) -> Any:
    """What the text of a result says. Fails on an error."""
    assert result["isError"] is False, result
    (content,) = result["content"]
    assert content["type"] == "text"
    return json.loads(content["text"])
