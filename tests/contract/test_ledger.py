"""The ledgers of a service, of real supervisors (as tasks) and real agents (as processes)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from capsem.api.types import ExecRequest, PersistRequest, ProvisionRequest, ReadFileRequest, WriteFileRequest
from capsem.ledger.database import reader
from capsem.store.layout import SessionDir
from service_world import World, play


def rows(session: SessionDir, sql: str) -> list[tuple[Any, ...]]:
    with reader(session.ledger) as connection:
        return connection.execute(sql).fetchall()


def session_of(it: World, vm_id: str, *, persistent: bool = True) -> SessionDir:
    return it.layout.session(vm_id, persistent=persistent)


async def boot(it: World, name: str = "box", *, persistent: bool = True) -> SessionDir:
    await it.handlers.provision(ProvisionRequest(name=name, persistent=persistent))
    await it.fleet.get(name).ready_link()
    return session_of(it, name, persistent=persistent)


def journals(path: Path) -> list[str]:
    return [name for _, _, names in os.walk(path) for name in names if name.endswith(("-wal", "-shm"))]


def test_commands_files_and_lives_are_recorded(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        await it.handlers.execute("box", ExecRequest(command="echo out; echo err >&2; exit 3", job="first"))
        for _ in range(2):
            await it.handlers.write_file("box", WriteFileRequest(path="a/b.txt", content="hello"))
        await it.handlers.read_file("box", ReadFileRequest(path="a/b.txt"))
        await it.handlers.stop("box")
        ((exec_id, command, code, out, err, size, source, pid),) = rows(
            session,
            "SELECT exec_id, command, exit_code, stdout_preview, stderr_preview, stdout_bytes, source, pid FROM exec_events",
        )
        assert (exec_id, command) == ("first", "echo out; echo err >&2; exit 3")
        assert (code, out, err, size, source) == (3, "out\n", "err\n", 4, "exec")
        audit = rows(session, "SELECT pid, exe, comm, argv, exec_id, uid FROM audit_events")
        assert audit == [(pid, "/bin/bash", "bash", f'["bash", "-c", "{command}"]', "first", os.getuid())]
        assert rows(session, "SELECT action, path, size FROM fs_events") == [
            ("created", "/root/a/b.txt", 5),
            ("modified", "/root/a/b.txt", 5),
            ("read", "/root/a/b.txt", 5),
        ]
        lives = "SELECT event, state, detail FROM lifecycle_events"
        first = [("start", "starting", "cold"), ("ready", "running", None), ("stop", "stopping", None),
                 ("exited", "stopped", "stopped")]  # fmt: skip
        assert rows(session, lives) == first
        await it.handlers.resume("box")
        await it.handlers.stop("box")
        assert rows(session, lives) == first * 2

    play(tmp_path, scene)


def test_a_command_whose_vm_is_stopped(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        running = asyncio.create_task(it.handlers.execute("box", ExecRequest(command="echo up; sleep 100")))
        while not rows(session, "SELECT 1 FROM audit_events"):
            await asyncio.sleep(0.01)
        assert rows(session, "SELECT exit_code, error FROM exec_events") == [(None, None)]
        await it.handlers.stop("box")
        await asyncio.gather(running, return_exceptions=True)
        ((code, error),) = rows(session, "SELECT exit_code, error FROM exec_events")
        assert code is not None or error  # whichever came first: the command's end, or the machine's

    play(tmp_path, scene)


def test_the_ledger_moves_with_its_vm(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it, "calm", persistent=False)
        await it.handlers.execute("calm", ExecRequest(command="echo before"))
        with reader(session.ledger) as connection:
            connection.execute("SELECT * FROM exec_events").fetchall()
            await it.handlers.persist("calm", PersistRequest(name="kept"))
        await it.handlers.execute("kept", ExecRequest(command="echo after"))
        await it.handlers.stop("kept")
        kept = session_of(it, "kept")
        assert rows(kept, "SELECT command FROM exec_events") == [("echo before",), ("echo after",)]
        assert ("persisted", "running", "calm is kept") in rows(
            kept, "SELECT event, state, detail FROM lifecycle_events"
        )
        assert not session.path.exists()

    play(tmp_path, scene)


def test_no_journal_is_left_behind_by_any_end(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        names = [f"vm{number}" for number in range(8)]
        await asyncio.gather(*(boot(it, name) for name in names))
        for turn in range(2):
            commands = [
                asyncio.create_task(it.handlers.execute(name, ExecRequest(command="seq 1000"))) for name in names * 3
            ]
            if turn:
                await asyncio.gather(*commands)
            await asyncio.gather(*(it.handlers.stop(name) for name in names))
            await asyncio.gather(*commands, return_exceptions=True)
            assert journals(tmp_path) == []
            await asyncio.gather(*(it.handlers.resume(name) for name in names))
        await asyncio.gather(*(it.handlers.delete(name) for name in names))
        assert journals(tmp_path) == []

    play(tmp_path, scene)
