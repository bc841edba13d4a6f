"""The ledgers of a service, of real supervisors (as tasks) and real agents (as processes)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from capsem.api.exec_types import ExecRequest
from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.ledger_types import (
    HistoryCountsResponse,
    HistoryQuery,
    HostLogsQuery,
    InspectRequest,
    PanicsQuery,
    TimelineQuery,
    TranscriptQuery,
    TranscriptResponse,
    TriageQuery,
)
from capsem.api.vm_types import ForkRequest, PersistRequest, ProvisionRequest
from capsem.egress.events import DnsEvent, ModelCall, NetEvent, ToolCall
from capsem.ledger.database import reader
from capsem.ledger.schema import iso
from capsem.model.errors import Corrupt, InvalidInput, NotFound, NotRunning, QueryFailed
from capsem.store.layout import SessionDir
from capsem.supervisor import recording
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
            assert journals(it.layout.run_dir) == []
            await asyncio.gather(*(it.handlers.resume(name) for name in names))
        await asyncio.gather(*(it.handlers.delete(name) for name in names))
        assert journals(it.layout.run_dir) == []

    play(tmp_path, scene)


def test_history_at_once_and_what_it_says(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await boot(it)
        seen = it.handlers.observation
        for number in range(12):
            await it.handlers.execute("box", ExecRequest(command=f"echo {number}"))
            newest = (await seen.history("box", HistoryQuery(limit=1, layer="exec"))).commands[0]
            assert (newest.command, newest.exit_code, newest.stdout_preview) == (f"echo {number}", 0, f"{number}\n")
        found = await seen.history("box", HistoryQuery(search="echo 1", layer="exec", limit=2))
        assert [each.command for each in found.commands] == ["echo 11", "echo 10"]
        assert (found.total, found.has_more) == (3, True)
        assert not (await seen.history("box", HistoryQuery(offset=23, limit=1))).has_more
        assert await seen.history_counts("box") == HistoryCountsResponse(exec_count=12, audit_count=12)
        ((program),) = (await seen.history_processes("box")).processes
        assert (program.exe, program.command_count) == ("/bin/bash", 12)
        rows = (await seen.timeline("box", TimelineQuery(layers="exec,lifecycle"))).rows
        assert [row[1] for row in rows] == ["lifecycle"] * 2 + ["exec"] * 12
        with pytest.raises(InvalidInput, match="no layer"):
            await seen.timeline("box", TimelineQuery(layers="exec,secrets"))
        await it.handlers.stop("box")
        assert (await seen.history("box", HistoryQuery(layer="exec"))).total == 12
        assert journals(it.layout.run_dir) == []

    play(tmp_path, scene)


def test_inspect_is_for_running_vms_and_for_the_index(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await boot(it)
        seen = it.handlers.observation
        await it.handlers.execute("box", ExecRequest(command="true"))
        found = await seen.inspect("box", InspectRequest(sql="SELECT command, exit_code FROM exec_events"))
        assert (found.columns, found.rows) == (["command", "exit_code"], [["true", 0]])
        with pytest.raises(QueryFailed):
            await seen.inspect("box", InspectRequest(sql="DELETE FROM exec_events"))
        found = await seen.inspect("_main", InspectRequest(sql="SELECT name, status FROM sessions"))
        assert found.rows == [["box", "Running"]]
        await it.handlers.stop("box")
        with pytest.raises(NotRunning):
            await seen.inspect("box", InspectRequest(sql="SELECT 1"))
        with pytest.raises(NotFound):
            await seen.inspect("nobody", InspectRequest(sql="SELECT 1"))

    play(tmp_path, scene)


def test_forks_have_the_history_of_their_source_and_go_their_own_way(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await boot(it)
        seen = it.handlers.observation

        async def commands(vm_id: str) -> list[str]:
            return [each.command for each in (await seen.history(vm_id, HistoryQuery(layer="exec"))).commands]

        await it.handlers.execute("box", ExecRequest(command="echo one"))
        await it.handlers.fork("box", ForkRequest(name="of-running"))
        await it.handlers.stop("box")
        await it.handlers.fork("box", ForkRequest(name="of-stopped"))
        for child in ("of-running", "of-stopped"):
            assert await commands(child) == ["echo one"]
            await it.handlers.resume(child)
            await it.handlers.execute(child, ExecRequest(command=f"echo {child}"))
            assert await commands(child) == [f"echo {child}", "echo one"]
        await it.handlers.delete("box")
        assert await commands("of-stopped") == ["echo of-stopped", "echo one"]
        assert stat.S_IMODE(session_of(it, "of-stopped").ledger.stat().st_mode) == 0o600

    play(tmp_path, scene)


def test_stats_and_info_count_what_is_and_what_was(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await boot(it)
        gone = (await it.handlers.provision(ProvisionRequest())).id
        for vm_id in ("box", gone):
            await it.handlers.write_file(vm_id, WriteFileRequest(path="f", content="x"))
            await it.handlers.execute(vm_id, ExecRequest(command="true"))
        assert (await it.handlers.info("box")).total_file_events == 1
        for _ in range(2):
            stats = await it.handlers.observation.stats()
            assert (stats.global_.total_sessions, stats.global_.total_file_events) == (2, 2)
            assert {each.id: each.exec_count for each in stats.sessions} == {"box": 1, gone: 1}
            if gone in await names(it):
                await it.handlers.delete(gone)
        assert {each.id: each.status for each in stats.sessions} == {"box": "Running", gone: "Deleted"}
        await it.handlers.persist((await it.handlers.provision(ProvisionRequest())).id, PersistRequest(name="kept"))
        await it.handlers.stop("box")
        await it.restart()
        stats = await it.handlers.observation.stats()
        assert {each.id: (each.status, each.persistent) for each in stats.sessions} == {
            "box": ("Stopped", True), gone: ("Deleted", False), "kept": ("Running", True),
        }  # fmt: skip
        info = await it.handlers.info("box")
        assert (info.total_file_events, info.total_requests, info.total_estimated_cost) == (1, 0, 0.0)
        assert (stats.top_providers, stats.top_tools, stats.top_mcp_tools) == ([], [], [])

    play(tmp_path, scene)


def test_traffic_is_in_the_ledger_the_counts_and_the_index(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        (child,) = it.processes.children.values()
        traffic = child.supervisor.recording.traffic
        traffic.net(NetEvent(1_700_000_000.0, "a.test", 443, decision="allowed"))
        traffic.net(NetEvent(1_700_000_000.0, "b.test", 443, decision="denied"))
        traffic.dns(DnsEvent(1_700_000_000.0, "a.test", "A", "allowed"))
        call = ModelCall(1_700_000_000.0, "a.test", "anthropic", "m", "POST", "/", stream=False, status_code=200)
        call.tools.append(ToolCall(0, "c", "bash", "{}"))
        traffic.model(call)
        seen = it.handlers.observation
        rows_seen = (await seen.timeline("box", TimelineQuery(layers="net,model"))).rows
        assert sorted(row[3] for row in rows_seen) == ["a.test", "anthropic m", "b.test"]
        await it.handlers.fork("box", ForkRequest(name="child"))
        for _ in range(2):  # while it runs, and by what the index was told
            stats = await seen.stats()
            total = stats.global_
            assert (total.total_requests, total.total_allowed, total.total_denied) == (2, 1, 1)
            assert (total.total_model_calls, total.total_unpriced_calls, total.total_tool_calls) == (1, 1, 1)
            assert [(each.provider, each.call_count) for each in stats.top_providers] == [("anthropic", 1)]
            assert [(each.tool_name, each.call_count) for each in stats.top_tools] == [("bash", 1)]
            info = await it.handlers.info("box")
            assert (info.total_requests, info.denied_requests, info.model_call_count) == (2, 1, 1)
            assert (info.total_estimated_cost, info.unpriced_model_calls) == (0.0, 1)
            child_info = await it.handlers.info("child")
            assert (child_info.total_requests, child_info.unpriced_model_calls) == (0, None)
            if (await it.handlers.info("box")).pid:
                await it.handlers.stop("box")
        assert rows(session, "SELECT domain, decision FROM dns_events") == [("a.test", "allowed")]
        assert len(rows(session_of(it, "child"), "SELECT id FROM net_events")) == 2

    play(tmp_path, scene)


def test_a_guest_that_asks_for_ever_does_not_fill_the_hosts_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "TRAFFIC_LIMIT", 5)

    async def scene(it: World) -> None:
        session = await boot(it)
        (child,) = it.processes.children.values()
        for _ in range(9):
            child.supervisor.recording.traffic.net(NetEvent(1_700_000_000.0, "a.test", 443, decision="denied"))
        await it.handlers.execute("box", ExecRequest(command="true"))
        await it.handlers.stop("box")
        assert rows(session, "SELECT count(*) FROM net_events") == [(5,)]
        assert rows(session, "SELECT count(*) FROM exec_events") == [(1,)], "what else happens is recorded"
        assert rows(session, "SELECT sum(detail) FROM lifecycle_events WHERE event = 'lost'") == [(4,)]

    play(tmp_path, scene)


async def names(it: World) -> set[str]:
    return {box.id for box in (await it.handlers.list()).sandboxes}


def test_a_vm_whose_ledger_is_not_there(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        await it.handlers.stop("box")
        session.ledger.unlink()
        with pytest.raises(NotFound, match="no ledger"):
            await it.handlers.observation.history("box", HistoryQuery())
        assert not session.ledger.exists()
        await it.restart()
        info = await it.handlers.info("box")
        assert info.total_requests is None
        session.ledger.write_bytes(b"nonsense" * 1000)
        with pytest.raises(Corrupt):
            await it.handlers.observation.history("box", HistoryQuery())
        await it.handlers.resume("box")
        assert (await it.handlers.observation.history("box", HistoryQuery())).total == 0
        assert session.ledger.with_name("session.db.damaged").exists()

    play(tmp_path, scene)


def test_nothing_is_recorded_of_commands_where_that_is_not_wanted(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        it.fleet.ledger = False
        session = await boot(it)
        await it.handlers.execute("box", ExecRequest(command="true"))
        await it.handlers.write_file("box", WriteFileRequest(path="f", content="x"))
        await it.handlers.stop("box")
        assert rows(session, "SELECT * FROM exec_events UNION ALL SELECT * FROM exec_events") == []
        assert rows(session, "SELECT count(*) FROM fs_events, audit_events") == [(0,)]
        assert len(rows(session, "SELECT * FROM lifecycle_events")) == 4

    play(tmp_path, scene)


def test_transcripts_and_host_logs(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        seen = it.handlers.observation
        assert await seen.transcript("box", TranscriptQuery()) == TranscriptResponse(content="", bytes=0)
        session.pty_log.write_bytes(b"one\r\ntwo\r\n\xff")
        for lines, expected in ((None, b"one\r\ntwo\r\n\xff"), (2, b"two\r\n\xff"), (0, b"")):
            found = await seen.transcript("box", TranscriptQuery(tail_lines=lines))
            assert (base64.b64decode(found.content), found.bytes) == (expected, len(expected))
        (it.layout.run_dir / "mcp.log").write_text("".join(f"Line {number} a & b\n" for number in range(100)))
        assert (await seen.host_logs("mcp", HostLogsQuery(grep="A & B", tail=2))) == "Line 98 a & b\nLine 99 a & b\n"
        assert (await seen.host_logs("mcp", HostLogsQuery(max_bytes=20))) == "Line 99 a & b\n"
        assert await seen.host_logs("gateway", HostLogsQuery()) == ""
        for name in ("../vm.json", "service.log", ""):
            with pytest.raises(InvalidInput, match="no log"):
                await seen.host_logs(name, HostLogsQuery())

    play(tmp_path, scene)


def test_triage_and_panics(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        session = await boot(it)
        seen, now = it.handlers.observation, it.fleet.system.clock.time()

        def line(at: float, level: str, message: str, **more: object) -> str:
            return json.dumps({"timestamp": iso(at), "level": level, "target": "t", "message": message, **more}) + "\n"

        (it.layout.run_dir / "service.log").write_text(
            line(now - 9000, "ERROR", "too long ago")
            + line(now - 3, "ERROR", "write failed: No space left on device")
            + line(now - 2, "ERROR", "write failed: No space left on device")
            + line(now - 1, "ERROR", "exec failed", exception="Traceback (most recent call last):\nKeyError: 'x'")
            + line(now, "INFO", "save.machine.complete", fields={"duration_ms": 2500.0})
            + "no json\n{broken\n[]\n"
        )
        session.serial_log.write_bytes(b"[ 1.0] Kernel panic - not syncing: Fatal exception\r\n")
        await it.handlers.execute("box", ExecRequest(command="echo oh no >&2; exit 4"))
        found = await seen.triage(TriageQuery(id="box"))
        assert sorted(each.message for each in found.host.panics) == [
            "Kernel panic - not syncing: Fatal exception", "exec failed",
        ]  # fmt: skip
        assert [each.fingerprint for each in found.host.errors] == ["host-disk-full"] * 2
        assert [each.duration_ms for each in found.host.slow_ops] == [2500.0]
        assert found.session is not None
        assert [(each.command, each.exit_code) for each in found.session.failed_commands] == [
            ("echo oh no >&2; exit 4", 4)
        ]
        assert found.session.errors[0].vm == "box"
        assert [(each.kind, each.fingerprint, each.count) for each in found.rank] == [
            ("panic", "guest-panicked", 1), ("panic", "program-error", 1), ("error", "host-disk-full", 2),
            ("command", None, 1), ("slow", None, 1),
        ]  # fmt: skip
        assert all(each.hint for each in found.rank if each.fingerprint)
        panics = (await seen.panics(PanicsQuery(limit=1))).panics
        assert len(panics) == 1
        assert (await seen.triage(TriageQuery(since="2999-01-01T00:00:00Z"))).rank == []
        with pytest.raises(NotFound):
            await seen.triage(TriageQuery(id="nobody"))
        with pytest.raises(InvalidInput, match="since"):
            await seen.panics(PanicsQuery(since="yesterday"))

    play(tmp_path, scene)
