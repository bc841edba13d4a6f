"""What a guest is, seen from inside (interface.md section 6 and 7.2)."""

from __future__ import annotations

import platform
import time

import pytest

from real_service import Service, wait_for

TOOLS = (
    "bash cat ls pgrep free ip iptables nft ping curl python3 mount dmesg base64 awk seq nohup setsid mkfifo which hostname ss "
    "fsfreeze git"
).split()


def test_tools_are_there(service: Service, box: str) -> None:
    assert service.output(box, f"for t in {' '.join(TOOLS)}; do command -v $t >/dev/null || echo $t; done") == ""
    assert service.output(box, "uname -m").strip() == platform.machine()
    assert service.output(box, "python3 -c 'import ssl, sqlite3, tty, venv, ctypes; print(1)'") == "1\n"


def test_storage(service: Service, box: str) -> None:
    mounts = service.output(box, "mount")
    assert "overlay on / type overlay" in mounts
    assert "/dev/vdb on /mnt/system type ext4" in mounts
    assert "/dev/vdb on /root type ext4" in mounts
    assert (
        service.output(box, "echo x > /etc/x && echo y > /bin/y && cat /etc/x /bin/y && rm /etc/x /bin/y") == "x\ny\n"
    )
    code, _, _ = service.exec(box, "test -e /root/../session.db")
    assert code == 1
    size = int(service.output(box, "stat -f -c '%b %S' /root | awk '{print $1*$2}'"))
    assert 15 << 30 < size <= 16 << 30


def test_environment(service: Service, box: str) -> None:
    lines = dict(line.split("=", 1) for line in service.output(box, "env").splitlines())
    assert lines["HOME"] == lines["PWD"] == "/root"
    assert lines["TERM"] == "xterm-256color"
    assert lines["LANG"] == "C"
    assert lines["PATH"].startswith("/opt/ai-clis/bin:/root/.local/bin:/usr/local/sbin:")
    assert lines["CAPSEM_VM_ID"] == lines["CAPSEM_VM_NAME"] == box
    assert lines["GREETING"] == "hello"
    assert service.output(box, "hostname; getent hosts $(hostname) | cut -d' ' -f1") == f"{box}\n127.0.1.1\n"


def test_nothing_leads_out(service: Service, box: str) -> None:
    links = service.output(box, "ls /sys/class/net").split()
    assert sorted(links) == ["dummy0", "lo"]
    assert "default dev dummy0" in service.output(box, "ip route")
    assert service.output(box, "cat /etc/resolv.conf").split() == ["nameserver", "127.0.0.1"]
    code, _, _ = service.exec(box, "ping -c 1 -W 1 1.1.1.1")
    assert code != 0
    assert service.output(box, "ip -6 -o address show | grep -vc ' ::1/128 ' || true").strip() == "0"


@pytest.mark.parametrize("path", ["/dev/mem", "/dev/port", "/dev/kmem", "/sys/kernel/debug/sched"])
def test_not_there(service: Service, box: str, path: str) -> None:
    assert service.exec(box, f"test -e {path}")[0] == 1


def test_hardening(service: Service, box: str) -> None:
    # Late modules are loaded behind the agent's back, then no more can be.
    service.output(box, "until grep -q 1 /proc/sys/kernel/modules_disabled; do sleep 0.1; done")
    assert service.output(box, "head -c 1 /proc/kcore | wc -c").strip() == "0"
    assert service.output(box, "find / -xdev -perm /6000 -type f") == ""
    line = service.output(box, "cat /proc/cmdline").split()
    assert {"ro", "init_on_alloc=1", "slab_nomerge", "page_alloc.shuffle=1"} <= set(line)
    assert service.output(box, "pgrep -x 'systemd|sshd|cron' | wc -l").strip() == "0"
    code, _, err = service.exec(
        box, "echo x > /usr/lib/capsem/agent.py && touch /lower 2>/dev/null; mount -o remount,rw /dev/vda"
    )
    assert code != 0, err


def test_kernel_modules_for_later_work_although_locked(service: Service, box: str) -> None:
    service.output(
        box, "iptables -t nat -A OUTPUT -p tcp --dport 443 -j REDIRECT --to-ports 10443 && iptables -t nat -F OUTPUT"
    )
    service.output(box, "nft add table inet t && nft add chain inet t c && nft delete table inet t")


def test_the_console_is_logged(service: Service, box: str) -> None:
    logs = service.client.call("logs", vm_id=box)
    assert "capsem" in logs["logs"]
    assert logs["process_logs"]


def test_the_agent_comes_back(service: Service, box: str) -> None:
    service.output(box, "echo kept > /tmp/kept")
    boot_id = service.output(box, "cat /proc/sys/kernel/random/boot_id")
    code, out, err = 0, "", ""
    try:
        code, out, err = service.exec(box, "pkill -9 -f '[/]usr/lib/capsem/agent.py'; sleep 30")
    except Exception as error:  # noqa: BLE001 - whichever way it is cut off
        assert "began anew" in str(error) or "interrupted" in str(error), error  # noqa: PT017
    else:
        pytest.fail(f"a command outlived its agent: {code} {out} {err}")
    assert service.output(box, "cat /tmp/kept; rm /tmp/kept") == "kept\n"
    assert service.output(box, "cat /proc/sys/kernel/random/boot_id") == boot_id
    assert "the agent ended with status 137" in service.client.call("logs", vm_id=box)["logs"]


def test_a_clock_that_was_set_is_set_right_again(service: Service, box: str) -> None:
    def off() -> float:
        """Seconds that the guest's clock lies outside of the time that it may be."""
        before = time.time()
        guest = float(service.output(box, "date +%s.%N"))
        return max(before - guest, guest - time.time())

    for step in (-30, 30):
        service.output(box, f"date -s @$(($(date +%s) + {step}))")
        assert off() > 10
        wait_for(lambda: off() < 0.5)  # with the next heartbeat; what is left is how late that came
