"""The life of real VMs: stop, resume, delete, and what happens when a process is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capsem.client.sync import Client
from capsem.model.errors import AlreadyExists, NotFound, NotRunning
from capsem.store.locks import is_locked
from real_service import (
    BIN,
    PATIENCE,
    SMALL,
    Service,
    alive,
    children,
    environment,
    wait_for,
    wait_until_it_answers,
)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)


def processes_of(service: Service, vm_id: str) -> tuple[int, int]:
    """Supervisor and VMM."""
    supervisor = service.client.call("info", vm_id=vm_id)["pid"]
    [vmm] = children(supervisor)
    return supervisor, vmm


def test_run(service: Service) -> None:
    done = service.cli("run", "--ram", "0.5", "--cpu", "1", "echo $((6*7)); exit 3")
    assert (done.returncode, done.stdout) == (3, b"42\n")
    assert not list((service.run_dir / "sessions").iterdir())


def test_stop_resume_delete(service: Service) -> None:
    client = service.client
    client.call("provision", body={"name": "life", "persistent": True, "disk_mb": 2048, **SMALL})
    supervisor, vmm = processes_of(service, "life")
    assert Path(f"/proc/{supervisor}/comm").read_text() == "capsem-process\n"
    assert b"--id\0life\0--session-dir\0" in Path(f"/proc/{supervisor}/cmdline").read_bytes()
    status = Path(f"/proc/{vmm}/status").read_text()
    assert "Seccomp:\t2" in status
    assert (
        b"PATH" not in Path(f"/proc/{vmm}/environ").read_bytes()
        or b"HOME" not in Path(f"/proc/{vmm}/environ").read_bytes()
    )
    with pytest.raises(AlreadyExists):
        client.call("provision", body={"name": "life", **SMALL})
    places = "/root/a /etc/a /var/a /opt/a /usr/local/a /tmp/a"
    service.output("life", f"for p in {places}; do echo kept > $p; done")
    assert int(service.output("life", "stat -f -c '%b %S' /root | awk '{print $1*$2}'")) <= 2 << 30

    assert client.call("stop", vm_id="life") == {"success": True, "persistent": True}
    assert not alive(supervisor)
    assert not alive(vmm)
    assert not (service.run_dir / "instances" / "life.sock").exists()
    info = client.call("info", vm_id="life")
    assert (info["status"], info["pid"]) == ("Stopped", 0)
    assert 0 < info["size_bytes"] < 200 << 20
    with pytest.raises(NotRunning):
        client.call("exec", vm_id="life", body={"command": "true"})

    client.call("resume", vm_id="life")
    assert service.output("life", f"cat {places}") == "kept\n" * 6
    assert "recovering" not in service.output("life", "dmesg | grep EXT4")
    supervisor, vmm = processes_of(service, "life")
    client.call("delete", vm_id="life")
    assert not alive(supervisor)
    assert not alive(vmm)
    with pytest.raises(NotFound):
        client.call("delete", vm_id="life")
    assert not (service.run_dir / "persistent" / "life").exists()


def test_a_shutdown_typed_in_the_guest(service: Service) -> None:
    client = service.client
    client.call("provision", body={"name": "off", "persistent": True, **SMALL})
    service.output("off", "reboot; [ $? = 1 ] && (poweroff now &)")
    wait_for(lambda: service.status("off") == "Stopped")
    client.call("delete", vm_id="off")


def test_a_killed_supervisor_takes_its_vmm_along(service: Service) -> None:
    client = service.client
    client.call("provision", body={"name": "hit", "persistent": True, **SMALL})
    service.output("hit", "echo kept > /root/a && sync")
    supervisor, vmm = processes_of(service, "hit")
    kill(supervisor)
    wait_for(lambda: service.status("hit") == "Defunct")
    wait_for(lambda: not alive(vmm))
    assert not list((service.run_dir / "instances").glob("hit.*")), "nobody is ready there"
    info = client.call("info", vm_id="hit")
    assert "signal 9" in info["last_error"]
    client.call("resume", vm_id="hit")
    assert service.output("hit", "cat /root/a") == "kept\n"

    _, vmm = processes_of(service, "hit")
    kill(vmm)
    wait_for(lambda: service.status("hit") == "Defunct")
    assert "signal 9" in client.call("info", vm_id="hit")["last_error"]
    client.call("delete", vm_id="hit")


def test_vms_outlive_a_killed_service(own_service: Service) -> None:
    client = own_service.client
    client.call("provision", body={"name": "kept", "persistent": True, **SMALL})
    processes = processes_of(own_service, "kept")
    ephemeral = client.call("provision", body={**SMALL})["id"]
    own_service.output("kept", "(sleep 3; echo done > /root/done) >/dev/null 2>&1 &")
    counting = "for i in $(seq 1 60); do echo $i; echo e$i >&2; sleep 0.1; done; exit 5"
    commands = [
        subprocess.Popen(
            [BIN / "capsem", "exec", vm, counting],
            env=own_service.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        for vm in ("kept", ephemeral)
    ]
    for command in commands:
        assert command.stdout is not None
        assert command.stdout.readline() == b"1\n"  # and no more of it: unbuffered
    own_service.process.kill()
    own_service.process.wait()
    assert all(map(alive, processes))
    own_service.restart()
    assert own_service.status("kept") == own_service.status(ephemeral) == "Running"
    for command in commands:
        out, err = command.communicate(timeout=60)
        assert command.returncode == 5
        assert out.decode().split() == [str(i) for i in range(2, 61)]
        assert err.decode().split() == [f"e{i}" for i in range(1, 61)]
    assert processes_of(own_service, "kept") == processes
    assert own_service.output("kept", "while [ ! -e done ]; do sleep 0.1; done; cat done") == "done\n"

    own_service.process.terminate()
    own_service.process.wait(PATIENCE)
    wait_for(lambda: not any(map(alive, processes)))
    own_service.restart()
    assert own_service.status("kept") == "Suspended"


def test_after_a_restart_of_the_host(own_service: Service) -> None:
    """As far as that can be played: all processes are gone at once, and the records are of another boot."""
    client = own_service.client
    client.call("provision", body={"name": "before", "persistent": True, **SMALL})
    ephemeral = client.call("provision", body={**SMALL})["id"]
    own_service.output("before", "echo kept > /root/a && sync")
    family = [*processes_of(own_service, "before"), *processes_of(own_service, ephemeral)]
    own_service.process.kill()
    own_service.process.wait()
    for supervisor in family[::2]:
        kill(supervisor)
    wait_for(lambda: not any(map(alive, family)))
    for session in ("persistent/before", f"sessions/{ephemeral}"):
        path = own_service.run_dir / session / "vm.json"
        record = json.loads(path.read_text())
        assert record["host_boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        path.write_text(json.dumps(record | {"host_boot_id": "11111111-2222-4333-8444-555555555555"}))
    own_service.restart()
    [vm] = client.call("list")["sandboxes"]
    assert (vm["id"], vm["status"], vm["reason"]) == ("before", "Stopped", "host restarted")
    assert "last_error" not in vm
    assert b"host restarted" in own_service.cli("info", "before").stdout
    assert not list((own_service.run_dir / "sessions").iterdir())
    client.call("resume", vm_id="before")
    assert own_service.output("before", "cat /root/a") == "kept\n"


def test_a_resume_while_the_vmm_s_death_is_not_known_yet(service: Service) -> None:
    """The supervisor stands still, so that nobody can have heard of it."""
    client = service.client
    client.call("provision", body={"name": "quick", "persistent": True, **SMALL})
    service.output("quick", "echo kept > /root/a && sync")
    supervisor, vmm = processes_of(service, "quick")
    kill(supervisor, signal.SIGSTOP)
    try:
        kill(vmm)
        wait_for(lambda: not is_locked(service.run_dir / "persistent/quick/vmm.lock"))
        assert service.status("quick") == "Running"
        resuming = service.start_cli("resume", "quick")
    finally:
        kill(supervisor, signal.SIGCONT)
    assert resuming.wait(PATIENCE) == 0
    assert service.output("quick", "cat /root/a") == "kept\n"
    assert vmm not in processes_of(service, "quick")
    client.call("delete", vm_id="quick")


def test_a_family_ends_with_the_parent_it_was_told_to_watch(tmp_path: Path) -> None:
    home = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    script = (
        "import subprocess, sys, os, time\n"
        "service = subprocess.Popen([sys.argv[1], '--foreground', '--parent-pid', str(os.getpid())])\n"
        "print(service.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(BIN / "capsem-service")], env=environment(home), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    service_pid = int(parent.stdout.readline())
    parent.stdout.close()
    client = Client(home / "run" / "service.sock")
    wait_until_it_answers(client)
    client.call("provision", body={"name": "orphan", "persistent": True, **SMALL})
    supervisor = client.call("info", vm_id="orphan")["pid"]
    family = [service_pid, supervisor, *children(supervisor)]
    kill(service_pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, family)), 10)
    subprocess.run(["rm", "-rf", str(home)], check=True)
