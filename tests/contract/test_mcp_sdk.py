"""capsem-mcp with the SDK's own client: revisions, structured output, progress, cancellation, calls at once."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp.client.client import Client

from capsem.client.daemon import stop
from capsem.config import Paths
from mcp_client import environment, sdk_client


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="capsem-mcp-") as text:
        yield Path(text)
        stop(Paths.from_environment(environment(Path(text))))


async def answer(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(f"capsem_{tool}", arguments)
    (content,) = result.content
    assert content.type == "text"
    assert not result.is_error, content.text
    assert result.structured_content == json.loads(content.text)
    return result.structured_content


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_a_session_of_each_era(home: Path, mode: str) -> None:
    """The client holds every structured result against the schema that the tool was listed with."""

    async def scene() -> None:
        async with sdk_client(home, mode=mode) as client:
            assert client.protocol_version == ("2025-11-25" if mode == "legacy" else "2026-07-28")
            assert client.server_info is None or client.server_info.name == "capsem-mcp"
            assert "its owner allows" in (client.instructions or "")
            assert len((await client.list_tools()).tools) > 25
            await answer(client, "create", name="box", ramMb=512, cpuCount=1)
            assert (await answer(client, "exec", id="box", command="echo hi"))["stdout"] == "hi\n"
            await answer(client, "write_file", id="box", path="/root/f", content="text")
            assert (await answer(client, "read_file", id="box", path="/root/f"))["content"] == "text"
            assert (await answer(client, "checkpoint", id="box"))["id"]
            await answer(client, "suspend", id="box")
            assert (await answer(client, "resume", name="box"))["boot_kind"] == "warm"
            await answer(client, "fork", id="box", name="try", live=True)
            for name in ("try", "box"):
                await answer(client, "delete", id=name)
            missing = await client.call_tool("capsem_info", {"id": "box"})
            assert missing.is_error

    asyncio.run(scene())


def test_calls_run_at_once_and_long_ones_tell_how_they_get_on(home: Path) -> None:
    async def scene() -> None:
        async with sdk_client(home) as client:
            await answer(client, "create", name="box", ramMb=512, cpuCount=1)
            told: list[tuple[float, float | None]] = []
            first = asyncio.Event()

            async def progress(done: float, total: float | None, _message: str | None) -> None:
                told.append((done, total))
                first.set()

            arguments = {"id": "box", "command": "sleep 600", "timeout": 900}
            waiting = asyncio.create_task(client.call_tool("capsem_exec", arguments, progress_callback=progress))
            await first.wait()  # it is under way, and stays so while others come and go
            many = [answer(client, "exec", id="box", command=f"echo {n}") for n in range(20)]
            assert [each["stdout"] for each in await asyncio.gather(*many)] == [f"{n}\n" for n in range(20)]
            assert told[0][0] > 0
            assert told[0][1] == 900
            running = (await answer(client, "jobs", id="box"))["running"]
            assert len(running) == 1

            waiting.cancel()  # the client tells the server, that hangs up, and the service kills the command
            await asyncio.gather(waiting, return_exceptions=True)
            while (await answer(client, "jobs", id="box"))["running"]:
                await asyncio.sleep(0.01)
            (ended,) = [job for job in (await answer(client, "jobs", id="box"))["details"] if job["id"] == running[0]]
            assert ended["running"] is False
            await answer(client, "delete", id="box")

    asyncio.run(scene())


def test_a_command_that_takes_too_long_is_an_error_that_says_so(home: Path) -> None:
    async def scene() -> None:
        async with sdk_client(home) as client:
            await answer(client, "create", name="box", ramMb=512, cpuCount=1)
            late = await client.call_tool("capsem_exec", {"id": "box", "command": "sleep 600", "timeout": 0.2})
            assert late.is_error
            assert "500: " in str(late.content)
            assert "timed out after 0.2s" in str(late.content)
            assert (await answer(client, "exec", id="box", command="echo still"))["stdout"] == "still\n"
            await answer(client, "delete", id="box")

    asyncio.run(scene())
