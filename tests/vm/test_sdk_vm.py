"""The SDK's examples on a real VM: one makes it and suspends it in the middle of its work, the other finds it again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from capsem import AsyncSandbox, Client, Interrupted, NotFound, Sandbox
from real_service import Service

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(service: Service, name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], env=service.env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_examples_and_what_straddles_a_suspend(service: Service) -> None:
    assert run(service, "ten_lines") == "counted ['1', '2', '3']\nHELLO\n"
    client = Client(service.socket)
    box = Sandbox("ten-lines", client=client)

    async def follow_across() -> str:
        there = AsyncSandbox("ten-lines", client=client)
        process = await there.spawn("for i in {1..40}; do echo $i; sleep 0.05; done")
        text = ""
        with pytest.raises(Interrupted) as cut:
            async for piece in process:
                text += piece.text
                if text.endswith("3\n"):
                    suspending = asyncio.create_task(there.suspend())
        assert cut.value.job == process.job
        await suspending
        await there.resume()
        async for piece in process:
            text += piece.text
        assert (await process.wait()).stdout == text
        return text

    assert asyncio.run(follow_across()) == "".join(f"{number}\n" for number in range(1, 41))
    before = box.checkpoint("before").id
    box.files.write("note", "x")
    assert before in [each.id for each in box.checkpoints()]
    assert box.rollback(before).running
    with pytest.raises(NotFound):
        box.files.read("note")
    assert run(service, "ten_lines_async") == "squares [0, 1, 4, 9, 16]\ngot it\ntwin has ['count.sh']\n"
    with pytest.raises(NotFound):
        box.info()
