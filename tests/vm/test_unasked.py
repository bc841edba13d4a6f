"""What happens to a VM though no client asks for it: its guest does, the service ends, its time has come."""

from __future__ import annotations

import time

from real_service import SMALL, Service, alive, wait_for

PROCESS = "setsid sleep 77777 > /dev/null 2>&1 & echo $!"
ASK = "setsid sh -c 'sleep 0.5; /run/capsem-sysutil suspend now' > /dev/null 2>&1 &"


def test_a_guest_is_suspended_at_its_own_wish_and_with_the_service(own_service: Service) -> None:
    service, client = own_service, own_service.client
    client.call("provision", body={"name": "kept", "persistent": True, **SMALL})
    passing = client.call("provision", body=SMALL)["id"]
    pid = service.output("kept", PROCESS).strip()
    service.output("kept", ASK)
    service.output(passing, ASK)
    wait_for(lambda: service.status("kept") == "Suspended")
    client.call("resume", vm_id="kept")
    assert service.output("kept", "pgrep -fx 'sleep 77777'").strip() == pid
    wait_for(lambda: "persist" in client.call("info", vm_id=passing).get("warning", ""))
    assert service.output(passing, "echo here") == "here\n"

    supervisors = [client.call("info", vm_id=vm_id)["pid"] for vm_id in ("kept", passing)]
    began = time.monotonic()
    service.stop()
    print(f"the service stopped after {time.monotonic() - began:.2f} s")
    assert service.process.returncode == 0
    assert not any(map(alive, supervisors))
    service.restart()
    assert [(box["id"], box["status"]) for box in client.call("list")["sandboxes"]] == [("kept", "Suspended")]
    assert client.call("resume", vm_id="kept")["boot_kind"] == "warm"
    assert service.output("kept", "pgrep -fx 'sleep 77777'").strip() == pid


def test_a_vm_is_saved_every_so_often_and_suspended_when_idle(service: Service) -> None:
    client = service.client
    made = service.cli("create", "-n", "timed", "--ram", "0.5", "--cpu", "1", "--every", "2s", "--keep", "2")
    assert made.returncode == 0, made.stderr
    try:
        seen: list[str] = []

        def automatic() -> list[str]:
            found = [
                it["id"] for it in client.call("checkpoints", vm_id="timed")["checkpoints"] if it["kind"] == "automatic"
            ]
            seen.extend(each for each in found if each not in seen)
            return found

        wait_for(lambda: automatic() and len(seen) >= 4)
        changed = service.cli("set", "timed", "--every", "off", "--idle", "2s")
        assert changed.stdout.decode().split() == "idle 2s ttl off every off keep 2 keep-for off".split(), (
            changed.stderr
        )
        wait_for(lambda: len(automatic()) == 2)
        assert client.call("info", vm_id="timed")["policy"] == {"idle_secs": 2.0, "checkpoint_keep": 2}
        code, out, _ = service.exec("timed", "sleep 4; echo done")
        assert (code, out) == (0, "done\n")
        wait_for(lambda: service.status("timed") == "Suspended")
        client.call("policy", vm_id="timed", body={"idle_secs": 0})
        client.call("resume", vm_id="timed")
        assert service.output("timed", "echo here") == "here\n"
    finally:
        client.call("delete", vm_id="timed")
