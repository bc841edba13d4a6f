"""The ledger of a real VM: what is in it at once, and through suspend, fork, persist, delete and violent ends."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

from real_service import SMALL, Service, alive, wait_for


def query(service: Service, vm_id: str, path: Path, sql: str) -> list[tuple[Any, ...]]:
    """As somebody would who knows nothing of Capsem, once what is on its way is written."""
    commands(service, vm_id)
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        found = connection.execute(sql).fetchall()
    connection.close()
    return found


def full_journals(run_dir: Path, vm_id: str) -> list[Path]:
    return [path for path in run_dir.glob(f"*/{vm_id}/session.db-wal") if path.stat().st_size]


def commands(service: Service, vm_id: str) -> list[tuple[str, int | None]]:
    answer = service.client.call("history", vm_id=vm_id, query={"layer": "exec"})
    return [(each["command"], each["exit_code"]) for each in answer["commands"]]


def test_a_ledger_through_the_life_of_its_vm(service: Service) -> None:
    name = service.client.call("provision", body={**SMALL})["id"]
    service.output(name, "true")
    path = service.run_dir / "sessions" / name / "session.db"
    # Files that the agent wrote at start, told by itself.
    written = {row[0] for row in query(service, name, path, "SELECT path FROM fs_events WHERE action = 'modified'")}
    assert {"/etc/hostname", "/etc/hosts", "/etc/machine-id"} <= written

    service.client.call("write_file", vm_id=name, body={"path": "notes.txt", "content": "hello"})
    assert query(service, name, path, "SELECT action, size FROM fs_events WHERE path = '/root/notes.txt'") == [
        ("created", 5)
    ]
    service.exec(name, "echo out; echo err >&2; exit 3")
    assert commands(service, name)[0] == ("echo out; echo err >&2; exit 3", 3)
    pid = int(service.output(name, "echo $$"))
    assert query(service, name, path, "SELECT pid, uid, exe, cwd FROM audit_events ORDER BY id DESC LIMIT 1") == [
        (pid, 0, "/bin/bash", "/root")
    ]

    service.client.call("persist", vm_id=name, body={"name": "lived"})
    path = service.run_dir / "persistent" / "lived" / "session.db"
    follower = threading.Thread(target=_begin, args=(service, "lived", "sleep 2; echo slept"))
    follower.start()
    wait_for(lambda: ("sleep 2; echo slept", None) in commands(service, "lived"))
    service.client.call("suspend", vm_id="lived")
    follower.join(60)
    assert full_journals(service.run_dir, "lived") == []
    assert commands(service, "lived")[0] == ("sleep 2; echo slept", None)

    service.client.call("resume", vm_id="lived")
    wait_for(lambda: ("sleep 2; echo slept", 0) in commands(service, "lived"))
    before = commands(service, "lived")
    assert len(before) == len({command for command, _ in before})  # nothing twice

    service.client.call("fork", vm_id="lived", body={"name": "child", "live": True})
    service.output("child", "echo child")
    assert commands(service, "child") == [("echo child", 0), *before]
    assert commands(service, "lived") == before
    info = service.client.call("info", vm_id="child")
    assert info["total_file_events"] >= 4

    supervisor = info["pid"]
    service.output("child", "echo last")
    # A command's end does not wait for its row; who asks does. What was told must outlive the supervisor.
    assert commands(service, "child")[0] == ("echo last", 0)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: service.status("child") == "Defunct")
    assert not alive(supervisor)
    assert full_journals(service.run_dir, "child") == []
    assert commands(service, "child")[0] == ("echo last", 0)
    for vm_id in ("child", "lived"):
        service.client.call("delete", vm_id=vm_id)
    for vm_id in ("child", "lived"):
        assert not list(service.run_dir.glob(f"*/{vm_id}"))
    gone = service.client.call("inspect", vm_id="_main", body={"sql": "SELECT name, status FROM sessions"})["rows"]
    assert {("child", "Deleted"), ("lived", "Deleted")} <= {(row[0], row[1]) for row in gone}


def _begin(service: Service, vm_id: str, command: str) -> None:
    """Run a command whose VM is suspended in the middle of it."""
    service.cli("exec", vm_id, command)
