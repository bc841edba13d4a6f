"""Checked by mypy, never run: what a caller may write, and, with `# error: CODE`, what has to be refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from capsem import AsyncSandbox, CapsemError, Interrupted, Output, Process, Result, Sandbox
from capsem.api.file_types import FileEntry
from capsem.api.vm_types import SandboxInfo


def blocking() -> None:
    with Sandbox.create("box", ram_mb=512, env={"A": "b"}, timeout=3.5) as box:
        result: Result = box.exec(["ls", "-l"], input=b"", check=True)
        code: int = result.exit_code
        process: Process = box.spawn("cat", stdin=True)
        pieces: Iterator[Output] = iter(process)
        ended: Result | None = process.poll()
        data: bytes = box.files.read("x")
        text: str = box.files.read_text("x")
        entries: list[FileEntry] = box.files.list(depth=2)
        forks: list[Sandbox] = box.fork_many("try", 3)
        kept: str = box.checkpoint("works").id
        with box.forward(8000, local_port=8080) as forwarding:
            address: tuple[str, int] = forwarding.address
            _ = address
        box.files.upload("a", "b", timeout=5)
        box.forward("8000")  # error: arg-type
        _ = (code, pieces, ended, data, text, entries, forks, kept)
        box.exec(5)  # error: arg-type
        box.exec("ls", timeout="5")  # error: arg-type
        box.exec("ls", tiemout=5)  # error: call-arg
        box.files.write("x", 5)  # error: arg-type
        process.poll().stdout  # error: union-attr
        box.suspend().nothing  # error: attr-defined
        wrong: str = box.files.read("x")  # error: assignment
        _ = wrong
    try:
        infos: list[SandboxInfo] = Sandbox.list()
        status: str = infos[0].status
        _ = status
    except Interrupted as error:
        job: str | None = error.job
        hint: str | None = error.hint
        _ = (job, hint)
    except CapsemError as error:
        error.job  # error: attr-defined


async def asynchronous() -> None:
    async with await AsyncSandbox.create() as box:
        result: Result = await box.exec("ls")
        process = await box.spawn("ls")
        pieces: AsyncIterator[Output] = aiter(process)
        async for piece in process:
            channel: str = piece.channel
            _ = channel
        ended: Result = await process.wait(timeout=3)
        twin: AsyncSandbox = await box.fork("twin")
        _ = (result, pieces, ended, twin)
        box.exec("ls").stdout  # error: attr-defined
        for _piece in process:  # error: attr-defined
            pass
    with Sandbox.create() as there:
        await there.exec("ls")  # error: misc
