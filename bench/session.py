"""`python -m bench session`: what an agent does all day, step by step, and QEMU alone doing the same.

A VM from the template gets a git repository and a wheel from the host; in it the repository is cloned, the wheel installed
into a virtual environment and the tests run; then it is suspended, resumed, and forked three times, and each fork makes
an edit of its own, runs the tests and commits. The floor's way to fork is a suspend, and as many restores of what it left.
Wheels are unpacked (`python3 -m zipfile`), for pip, emulated, would take longer than all the rest.
"""

from __future__ import annotations

import base64
import os
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from bench.bare import BareMachine, Suspended
from bench.host import milliseconds, service
from bench.table import Row
from bench.warm import RAM_MB, SETTLE, SIZE, create
from capsem import Sandbox
from capsem.client.sync import Client
from capsem.hypervisor.driver import Accelerator
from capsem.image.catalog import Image

WHEEL = "double-1.0-py3-none-any.whl"
BUNDLE = "app.bundle"
FORKS = 3
CLONE = f"git clone -q -b main /root/{BUNDLE} /root/app"
INSTALL = (
    "cd /root/app && python3 -m venv --without-pip .venv && "
    f"python3 -m zipfile -e /root/{WHEEL} .venv/lib/python3*/site-packages"
)
TEST = "cd /root/app && .venv/bin/python -m unittest -q 2>/dev/null"
EDIT = (
    "cd /root/app && echo 'def triple(n): return n + double(n)  # %d' >> app.py && .venv/bin/python -m unittest -q "
    "2>/dev/null && git -c user.name=a -c user.email=a@example.com commit -qam 'Triple, %d'"
)
STEPS = ("create", "files in", "clone", "install", "tests", "suspend", "resume", "fork", "edits and tests")


def prepare(directory: Path) -> dict[str, bytes]:
    """The files that go into the VM."""
    repository, wheel = directory / "repository", directory / WHEEL
    repository.mkdir()
    (repository / "app.py").write_text("from double import double\n\n\ndef quadruple(n): return double(double(n))\n")
    (repository / "test_app.py").write_text(
        "import unittest\nfrom app import quadruple\n\n\nclass Tests(unittest.TestCase):\n"
        "    def test_quadruple(self):\n        for n in range(100):\n            self.assertEqual(quadruple(n), 4 * n)\n"
    )
    (repository / ".gitignore").write_text(".venv\n__pycache__\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    plain = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "."],
        [*who, "commit", "-qm", "Begin"],
        ["bundle", "create", "-q", str(directory / BUNDLE), "main"],
    ):
        subprocess.run(["git", "-C", str(repository), *words], env=plain, check=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("double.py", "def double(n): return n + n\n")
        file.writestr("double-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: double\nVersion: 1.0\n")
        file.writestr("double-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("double-1.0.dist-info/RECORD", "")
    return {name: (directory / name).read_bytes() for name in (BUNDLE, WHEEL)}


class Clock:
    """Milliseconds of each step."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def step(self, name: str, *actions: Callable[[], object]) -> None:
        """Do it."""
        began = time.perf_counter()
        for action in actions:
            action()
        self.taken[name] = milliseconds(began)


def ours(client: Client, files: dict[str, bytes]) -> dict[str, float]:
    """One session."""
    clock, boxes = Clock(), list[Sandbox]()

    def run(box: Sandbox, line: str) -> None:
        box.exec(line, check=True)

    clock.step("create", lambda: boxes.append(Sandbox.create("agent", client=client)), lambda: run(boxes[0], "true"))
    box = boxes[0]
    clock.step("files in", *(lambda n=name, d=data: box.files.write(n, d) for name, data in files.items()))
    clock.step("clone", lambda: run(box, CLONE))
    clock.step("install", lambda: run(box, INSTALL))
    clock.step("tests", lambda: run(box, TEST))
    clock.step("suspend", box.suspend)
    clock.step("resume", box.resume, lambda: run(box, "true"))
    clock.step("fork", lambda: boxes.extend(box.fork_many("way", FORKS)))
    clock.step("edits and tests", *(lambda b=b, n=n: run(b, EDIT % (n, n)) for n, b in enumerate(boxes[1:])))
    for each in boxes:
        each.delete()
    return clock.taken


def floor(machine: BareMachine, saved: Suspended, files: dict[str, bytes]) -> dict[str, float]:
    """The same."""
    clock, kept = Clock(), [saved]

    def put(name: str, data: bytes) -> None:
        machine.do(f"base64 -d > /root/{name} <<< {base64.b64encode(data).decode()}")

    def suspend() -> None:
        kept.append(machine.suspend()[1])

    clock.step("create", lambda: machine.resume(saved))
    clock.step("files in", *(lambda n=name, d=data: put(n, d) for name, data in files.items()))
    clock.step("clone", lambda: machine.do(CLONE))
    clock.step("install", lambda: machine.do(INSTALL))
    clock.step("tests", lambda: machine.do(TEST))
    clock.step("suspend", suspend)
    clock.step("resume", lambda: machine.resume(kept[-1]))
    suspended = machine.suspend()
    fork, edits = suspended[0], 0.0
    for number in range(FORKS):
        fork += machine.resume(suspended[1])
        began = time.perf_counter()
        machine.do(EDIT % (number, number))
        edits += milliseconds(began)
        machine.close()
    return {**clock.taken, "fork": fork, "edits and tests": edits}


def measure(directory: Path, image: Image, accelerator: Accelerator, runs: int) -> list[Row]:
    """The whole, and each step."""
    files = prepare(directory)
    machine = BareMachine(image, directory, accelerator, RAM_MB)
    machine.do("true; sync")
    _, saved = machine.suspend()
    with service(directory / "agent", **SIZE) as (client, _):
        create(client, "template")  # the first one makes it
        taken: dict[str, list[dict[str, float]]] = {"ours": [], "floor": []}
        for _ in range(runs):
            time.sleep(SETTLE)
            taken["floor"].append(floor(machine, saved, files))
            time.sleep(SETTLE)
            taken["ours"].append(ours(client, files))
    whole = [[sum(each.values()) / 1e3 for each in taken[who]] for who in ("ours", "floor")]
    return [
        Row("agent session, the whole (s)", *whole),
        *(
            Row(f"  {step} (ms)", [each[step] for each in taken["ours"]], [each[step] for each in taken["floor"]])
            for step in STEPS
        ),
    ]
