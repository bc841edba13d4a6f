"""VMs through a change of the service: kept running for the next one, or run by a supervisor it cannot speak to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from capsem.model.errors import Unsupported
from real_service import BIN, SMALL, Service, alive, children, environment, wait_for, wait_until_it_answers

# A program of Capsem that speaks a protocol of its own: the constants are set before anything has read them.
OTHER = """#!{python}
import sys
import capsem.api.internal as internal
internal.PROTOCOL = internal.OLDEST_PROTOCOL = {protocol}
from capsem.{module}.__main__ import main
sys.exit(main())
"""


def family(service: Service, vm_id: str) -> list[int]:
    supervisor = service.client.call("info", vm_id=vm_id)["pid"]
    return [supervisor, *children(supervisor)]


def program(directory: Path, module: str, protocol: int) -> Path:
    path = directory / f"capsem-{module}"
    path.write_text(OTHER.format(python=sys.executable, module=module, protocol=protocol))
    path.chmod(0o755)
    return path


def test_vms_are_kept_when_the_settings_say_so(own_service: Service) -> None:
    service, client = own_service, own_service.client
    settings = service.home / "config.toml"
    settings.write_text('vm.on_service_stop = "keep"\n')
    service.stop()
    service.restart()
    client.call("provision", body={"name": "kept", "persistent": True, **SMALL})
    passing = client.call("provision", body=SMALL)["id"]
    processes = [*family(service, "kept"), *family(service, passing)]
    counting = "for i in $(seq 1 40); do echo $i; sleep 0.1; done; exit 5"
    command = subprocess.Popen(
        [BIN / "capsem", "exec", "kept", counting], env=service.env, stdout=subprocess.PIPE, bufsize=0
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"1\n"  # and no more of it: unbuffered
    service.stop()
    assert service.process.returncode == 0
    assert all(map(alive, processes))
    settings.unlink()
    service.restart()
    assert [*family(service, "kept"), *family(service, passing)] == processes
    out, _ = command.communicate(timeout=60)
    assert (command.returncode, out.split()) == (5, [str(i).encode() for i in range(2, 41)])
    assert service.output(passing, "echo here") == "here\n"
    service.stop()
    wait_for(lambda: not any(map(alive, processes)))
    service.restart()
    assert [box["id"] for box in client.call("list")["sandboxes"]] == ["kept"]


def test_a_supervisor_that_speaks_another_protocol(own_service: Service, tmp_path: Path) -> None:
    service, client = own_service, own_service.client
    service.stop()
    service.process = subprocess.Popen(
        [program(tmp_path, "service", 7), "--process-binary", program(tmp_path, "supervisor", 7)],
        env=environment(service.home),
    )
    wait_until_it_answers(client)
    for name in ("box", "gone"):
        client.call("provision", body={"name": name, "persistent": True, **SMALL})
    service.output("box", "echo kept > /root/a && sync")
    box, gone = family(service, "box"), family(service, "gone")
    service.process.kill()
    service.process.wait()
    assert all(map(alive, [*box, *gone]))

    service.restart()
    info = client.call("info", vm_id="box")
    assert (info["status"], info["pid"]) == ("Running", box[0])
    assert "speaks protocol 7" in info["reason"]
    assert b"note: its supervisor" in service.cli("list").stdout
    with pytest.raises(Unsupported, match="stop the VM and resume it"):
        client.call("exec", vm_id="box", body={"command": "true"})
    assert client.call("stop", vm_id="box")["success"]
    assert not any(map(alive, box))
    assert service.status("box") == "Stopped"
    client.call("delete", vm_id="gone")
    assert not any(map(alive, gone))
    client.call("resume", vm_id="box")
    assert service.output("box", "cat /root/a") == "kept\n"
