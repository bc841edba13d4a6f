"""The agent runs on the standard library and `capsem.wire`, and does not pay for what it does not need.

Under emulation each module of the standard library costs milliseconds of every boot.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import capsem
from capsem.control.guest import Guest, Identity
from capsem.system.real import RealClock, RealEntropy
from capsem.wire.messages import STDIN, Exec, Exited

SOURCE = Path(capsem.__file__).parent
# Loading any of these would be felt (asyncio: a third of a second under emulation).
TOO_DEAR = {"asyncio", "dataclasses", "typing", "subprocess", "pathlib", "contextlib", "socket", "threading", "logging"}

# What it imports, beside what every interpreter loads before its first line; a new name here is a decision. Names that
# begin with "_" are how these are made, and differ from one Python to the next.
STANDARD_LIBRARY = set(
    "collections copyreg encodings enum errno fcntl functools genericpath heapq itertools json keyword mmap operator os "
    "posixpath re reprlib select signal stat struct types".split()
)

LAUNCH = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv.pop(1))
from capsem.guest.__main__ import main
status = main(sys.argv[2:])
loaded = sorted(set(sys.modules) - before)
paths = sorted(str(module.__file__) for name, module in sys.modules.items() if name.startswith("capsem"))
import json
with open(sys.argv[1], "w") as file:
    json.dump([status, loaded, paths], file)
"""


async def serve(source: Path, directory: Path) -> tuple[int, list[str], list[str]]:
    """Let an agent made of the files under `source` do some of everything; returns its status and what it loaded."""
    ours, theirs = socket.socketpair()
    (directory / "root").mkdir()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", LAUNCH, str(source), str(directory / "report")),
        *("--fd", str(theirs.fileno()), "--bystander"),
        *("--workspace", str(directory / "root"), "--memory", str(directory / "memory")),
        pass_fds=[theirs.fileno()],
        env={"PATH": os.environ["PATH"]},
    )
    theirs.close()
    guest = Guest(Identity("box", "box", {"A": "b"}), RealClock(), RealEntropy())
    await asyncio.get_running_loop().create_unix_connection(lambda: guest.channel, sock=ours)
    async with asyncio.timeout(120):
        await guest.wait_ready(30)
        await guest.ping(10)
        await guest.write_file("d/file", b"content")
        assert (await guest.read_file("d/file", 100))[0] == b"content"
        await guest.quiesce(100, "a" * 32)
        guest.go_on()
        stream = guest.execute(Exec(job="j", command="cat; exit 3", stdin=True, timeout=20))
        await stream.write(STDIN, b"x")
        stream.end(STDIN)
        result = await stream.result()
        assert isinstance(result, Exited)
        assert result.exit_code == 3
        guest.power_off(0.1)
        await process.wait()
    guest.channel.hang_up()
    status, loaded, paths = json.loads((directory / "report").read_text(encoding="utf-8"))
    return status, loaded, paths


def test_the_agent_needs_wire_and_guest_and_little_of_the_standard_library(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "capsem").mkdir(parents=True)
    shutil.copy(SOURCE / "__init__.py", source / "capsem")
    for package in ("wire", "guest"):
        shutil.copytree(SOURCE / package, source / "capsem" / package, ignore=shutil.ignore_patterns("__pycache__"))
    status, loaded, paths = asyncio.run(serve(source, tmp_path))
    assert status == 100
    assert paths
    assert all(path.startswith(str(source)) for path in paths)
    outside = {name.partition(".")[0] for name in loaded if not name.startswith("_")} - {"capsem"}
    assert not outside & TOO_DEAR
    assert outside <= STANDARD_LIBRARY, f"new: {sorted(outside - STANDARD_LIBRARY)}"
