"""What a guest is, seen from inside (interface.md section 6 and 7.2)."""

from __future__ import annotations

import platform
import time

import pytest

from real_service import Service, wait_for

TOOLS = (
    "bash cat ls pgrep free ip iptables nft ping curl python3 mount dmesg base64 awk seq nohup setsid mkfifo which hostname ss "
    "fsfreeze git e2fsck resize2fs"
).split()

# Capture of connections, and a program that is captured: it asks what address it was on its way to.
RULES = """
table inet egress {
  chain nat_out { type nat hook output priority -100; policy accept;
    ip daddr { 127.0.0.0/8, 10.0.0.1 } return
    meta nfproto ipv6 return; udp dport 53 redirect to :1053; meta l4proto tcp redirect to :10444
  }
  chain out { type filter hook output priority 0; policy drop;
    oifname "lo" accept; meta nfproto ipv4 meta l4proto tcp ct status dnat accept
    meta l4proto tcp reject with tcp reset; reject with icmpx admin-prohibited
  }
}"""
REDIRECTED = """
import socket
proxy = socket.create_server(("127.0.0.1", 10444))
program = socket.create_connection(("93.184.215.14", 443))
connection, _ = proxy.accept()
SO_ORIGINAL_DST = 80
print(socket.inet_ntoa(connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)[4:8]))
"""


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


def test_descriptors_have_names(service: Service, box: str) -> None:
    assert service.exec(box, "cat <(echo one) /dev/stdin <<<two | tee /dev/stderr") == (0, "one\ntwo\n", "one\ntwo\n")


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


@pytest.fixture
def locked_box(service: Service, box: str) -> str:
    """The VM, once init-late is through: late modules are loaded behind the agent's back, then no more can be."""
    service.output(box, "until [ -e /run/capsem/settled ]; do sleep 0.1; done")
    return box


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_disabled", "1"),
        ("kexec_load_disabled", "1"),
        ("unprivileged_bpf_disabled", "1"),
        ("kptr_restrict", "1"),
        ("dmesg_restrict", "1"),
        ("randomize_va_space", "2"),
    ],
)
def test_doors_of_the_kernel(service: Service, locked_box: str, name: str, value: str) -> None:
    assert service.output(locked_box, f"cat /proc/sys/kernel/{name}") == f"{value}\n"


def test_root_cannot_read_the_kernels_memory_by_another_way(service: Service, locked_box: str) -> None:
    """A device or a /proc of one's own is quickly made."""
    service.output(locked_box, "mkdir /tmp/own && mknod /tmp/mem c 1 1 && mount -t proc proc /tmp/own")
    for path in ("/tmp/mem", "/tmp/own/kcore"):
        code, out, err = service.exec(locked_box, f"head -c 64 {path}")
        assert (code, out) == (1, ""), path
        assert "Operation not permitted" in err
    service.output(locked_box, "umount /tmp/own && rmdir /tmp/own && rm /tmp/mem")
    assert "Lockdown" in service.output(locked_box, "dmesg")
    assert service.exec(locked_box, "insmod /usr/lib/capsem/modules/dummy.ko")[0] != 0


def test_our_own_programs_are_readable_and_executable_and_nothing_else(service: Service, box: str) -> None:
    programs = service.output(box, "find /usr/lib/capsem -type f -perm /111 -printf '%f %m %u\\n' | sort").splitlines()
    assert programs == ["busybox 555 root", "init 555 root", "init-late 555 root"]
    assert service.output(box, "find /usr/lib/capsem -type f ! -perm 0444 ! -perm 0555") == ""


def test_hardening(service: Service, locked_box: str) -> None:
    box = locked_box
    assert service.output(box, "head -c 1 /proc/kcore | wc -c").strip() == "0"
    assert service.output(box, "find / -xdev -perm /6000") == ""
    line = service.output(box, "cat /proc/cmdline").split()
    assert {"ro", "init_on_alloc=1", "slab_nomerge", "page_alloc.shuffle=1"} <= set(line)
    assert service.output(box, "pgrep -x 'systemd|sshd|cron' | wc -l").strip() == "0"
    for attempt in (
        "echo x > /usr/lib/capsem/agent.py",
        "mount -o remount,rw /usr/lib/capsem && echo x > /usr/lib/capsem/agent.py",
        "mkdir -p /tmp/lower && mount -t erofs -o rw /dev/vda /tmp/lower && touch /tmp/lower/x",
        "dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc,fsync",
    ):
        code, _, err = service.exec(box, attempt)
        assert code != 0, (attempt, err)
    assert (
        service.output(box, "umount /tmp/lower 2>/dev/null; rm -df /tmp/lower; head -c 1 /dev/vda | wc -c").strip()
        == "1"
    )


def test_modules_of_later_work_are_loaded_although_no_more_can_be(service: Service, locked_box: str) -> None:
    """A checkpoint has the modules that its VM booted with, so they are there long before anything needs them."""
    wanted = (
        # Capture of connections, rules written by iptables-nft, what `ss` asks for, logs; then the rest of the machine.
        "dummy nfnetlink nf_tables nf_defrag_ipv6 nf_defrag_ipv4 nf_conntrack nf_nat nft_chain_nat nft_redir "
        "nf_reject_ipv4 nf_reject_ipv6 nft_reject nft_reject_inet nft_ct x_tables nft_compat xt_REDIRECT xt_owner "
        "xt_tcpudp xt_addrtype nft_limit nft_log nf_log_syslog inet_diag tcp_diag libcrc32c virtio_rng pvpanic_pci"
    ).split()
    loaded = service.output(locked_box, "cut -d' ' -f1 /proc/modules").split()
    assert {*wanted} - {*loaded} == set()
    assert "does not load" not in service.client.call("logs", vm_id=locked_box)["logs"]
    # Built into this kernel, which the same modules of another might not be.
    assert (
        service.output(locked_box, "test -c /dev/fuse && cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
    )
    box = locked_box
    code, _, err = service.exec(box, f"nft -f - <<'END'\n{RULES}\nEND")
    assert code == 0, err
    assert service.output(box, f"timeout 20 python3 - <<'END'\n{REDIRECTED}\nEND") == "93.184.215.14\n"
    service.output(box, "nft flush ruleset")
    service.output(
        box, "iptables -t nat -A OUTPUT -p tcp --dport 443 -j REDIRECT --to-ports 10443 && iptables -t nat -F OUTPUT"
    )
    service.output(box, "nft add table inet t && nft add chain inet t c && nft delete table inet t")
    service.output(
        box, "cd /usr/lib/capsem && nft flush ruleset && nft -f network.nft && iptables-restore -n network.iptables"
    )


def test_connections_are_redirected_and_all_else_is_refused_at_once(service: Service, locked_box: str) -> None:
    box = locked_box
    rules = service.output(box, "iptables -t nat -S OUTPUT")
    for protocol, port, to in (("udp", 53, 1053), ("tcp", 443, 10443), ("tcp", 80, 10080), ("tcp", 11434, 10080)):
        assert f"-p {protocol} -m {protocol} --dport {port} -j REDIRECT --to-ports {to}" in rules
    script = """
import errno, socket
def attempt(kind, family, address, send):
    with socket.socket(family, kind) as sock:
        sock.settimeout(20)
        try:
            sock.sendto(b"x", address) if send else sock.connect(address)
        except OSError as error:
            return errno.errorcode.get(error.errno, type(error).__name__)
        return "went out"
print(attempt(socket.SOCK_DGRAM, socket.AF_INET, ("192.0.2.1", 443), True),
      attempt(socket.SOCK_STREAM, socket.AF_INET6, ("2001:db8::1", 443), False))
"""
    assert service.output(box, f"python3 - <<'END'\n{script}\nEND").split() == ["EPERM", "ENETUNREACH"]
    code, out, _ = service.exec(box, "curl -sS --max-time 60 http://192.0.2.1/")
    assert (code, "did not let this request" in out) == (0, True)
    service.output(box, "nft flush ruleset")
    assert service.exec(box, "curl -sS --max-time 3 http://192.0.2.1/")[0] in (7, 28)  # refused, or into the void
    service.output(box, "cd /usr/lib/capsem && nft -f network.nft && iptables-restore -n network.iptables")


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
        # In one command: a heartbeat that comes before the next would already have set it right.
        moved = service.output(box, f"a=$(date +%s); date -s @$((a + {step})) > /dev/null; echo $(($(date +%s) - a))")
        assert abs(int(moved) - step) < 10
        wait_for(lambda: off() < 0.5)  # with the next heartbeat; what is left is how late that came


def test_time_passes_as_fast_as_on_the_host(service: Service, box: str) -> None:
    """A kernel that finds out by itself how fast its counter runs may be wrong by a factor, on a busy host."""

    def reading() -> tuple[float, float, float]:
        before = time.monotonic()
        up = float(service.output(box, "cut -d' ' -f1 /proc/uptime"))  # which no heartbeat sets right
        return before, up, time.monotonic()

    first = reading()
    service.output(box, "sleep 3")
    last = reading()
    passed = last[1] - first[1]
    assert (last[0] - first[2]) * 0.99 - 0.02 < passed < (last[2] - first[0]) * 1.01 + 0.02
