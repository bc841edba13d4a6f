"""A real VM's checkpoint leaves as a file and comes back when the VM is gone: with its memory, or as a disk."""

from __future__ import annotations

from pathlib import Path

from real_service import Service

TINY = {"ram_mb": 256, "cpus": 1}
TELL = "cat /proc/sys/kernel/random/boot_id /dev/shm/note; pgrep -x sleep; sha256sum --quiet -c sums"


def test_export_delete_import(own_service: Service, tmp_path: Path) -> None:
    service, file = own_service, tmp_path / "box.capsem"
    service.client.call("provision", body={"name": "box", "persistent": True, **TINY})
    service.output(
        "box",
        "head -c 3000000 /dev/urandom > big; sha256sum big > sums; echo one > /dev/shm/note; "
        "setsid sleep 100000 > /dev/null 2>&1 &",
    )
    before = service.output("box", TELL)
    checkpoint = service.cli("checkpoint", "box", "-m", "to go").stdout.decode().strip()
    # Other commands go on while a checkpoint is read out.
    assert service.cli("checkpoint", "export", "box", checkpoint, str(file)).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.part"))
    service.client.call("delete", vm_id="box")
    assert service.cli("checkpoint", "rm", "box", checkpoint).returncode != 0
    store = service.run_dir / "store"
    service.stop()
    service.restart()  # what belonged to the VM alone is gone for good

    done = service.cli("checkpoint", "import", str(file), "cold")
    assert done.stdout == b"Session cold is stopped.\n", done.stderr
    service.client.call("resume", vm_id="cold")
    assert service.output("cold", "hostname; ls /dev/shm | wc -l; sha256sum --quiet -c sums") == "cold\n0\n"
    service.client.call("delete", vm_id="cold")

    done = service.cli("checkpoint", "import", "--trust", str(file), "warm")
    assert done.stdout == b"Session warm is suspended.\n", done.stderr
    assert service.client.call("resume", vm_id="warm")["boot_kind"] == "forked"
    assert service.output("warm", TELL) == before
    assert service.output("warm", "hostname; dmesg --level=err | grep -c ext4 || true") == "warm\n0\n"
    service.client.call("suspend", vm_id="warm")
    service.client.call("resume", vm_id="warm")
    assert service.output("warm", TELL) == before

    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    done = service.cli("checkpoint", "import", str(file), "bad")
    assert done.returncode != 0
    assert b"digest" in done.stderr
    service.client.call("delete", vm_id="warm")
    service.client.call("df")  # once what was removed is gone
    assert not list((store / "layers").iterdir())
    assert not list((store / "checkpoints").iterdir())
