"""A process in a guest that holds what only memory holds, and can be asked about it; and random files on its disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.qemu.chain import Chain
from capsem.image.catalog import Catalog
from capsem.store import records
from capsem.store.layout import Layout
from real_service import Service

MIB = 1024 * 1024

PROGRAM = r"""
import json, os, socket, threading, time, uuid

nonce = os.urandom(32).hex()
os.makedirs("/root/held", exist_ok=True)
with open("/root/held/name", "w") as file:
    file.write(nonce)
directory = os.open("/root/held", os.O_RDONLY | os.O_DIRECTORY)
gone = open("/root/held/gone", "w+")
gone.write(nonce)
gone.flush()
os.unlink("/root/held/gone")
tmpfs = open("/dev/shm/nonce", "w+")
tmpfs.write(nonce)
tmpfs.flush()
listening = socket.create_server(("127.0.0.1", 7007))
client = os.fork()
if client == 0:
    talk = socket.create_connection(("127.0.0.1", 7007)).makefile("rw")
    count = 0
    while True:
        count += 1
        print(count, file=talk, flush=True)
        if talk.readline() != f"{count}\n":
            os._exit(1)
        time.sleep(0.2)
talked = 0
connections = 0

def serve():
    global talked, connections
    while True:
        peer, _ = listening.accept()
        connections += 1
        for line in (stream := peer.makefile("rw")):
            talked = int(line)
            stream.write(line)
            stream.flush()

beats = 0

def beat():
    global beats
    while True:
        time.sleep(0.2)
        beats += 1

for each in (serve, beat):
    threading.Thread(target=each, daemon=True).start()
asked = socket.socket(socket.AF_UNIX)
asked.bind("\0witness")
asked.listen()
while True:
    peer, _ = asked.accept()
    ended, _ = os.waitpid(client, os.WNOHANG)
    answer = {
        "nonce": nonce,
        "pids": [os.getpid(), client],
        "client": "ended" if ended else "talks",
        "held": [os.listdir(directory), os.pread(gone.fileno(), 100, 0).decode(), os.pread(tmpfs.fileno(), 100, 0).decode()],
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in (directory, gone.fileno(), tmpfs.fileno())),
        "connections": connections,
        "talked": talked,
        "beats": beats,
        "drawn": os.urandom(16).hex(),
        "uuid": str(uuid.uuid4()),
    }
    peer.sendall(json.dumps(answer).encode())
    peer.close()
"""
ASK = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0witness'); f = s.makefile('rb'); print(f.read().decode())"
MOVES = ("talked", "beats", "drawn", "uuid")  # all else of an answer stays as it is


@dataclass
class Witness:
    """What the host knows of one VM's disk and memory; a fork's begins as a copy."""

    service: Service
    vm_id: str
    files: dict[str, str] = field(default_factory=dict)  # path -> SHA-256
    before: dict[str, object] = field(default_factory=dict)
    boot_id: str = ""

    def begin(self) -> Witness:
        """Start the process in the guest."""
        self.service.client.call("write_file", vm_id=self.vm_id, body={"path": "/root/witness.py", "content": PROGRAM})
        self.service.output(
            self.vm_id,
            "ip link set lo up 2>/dev/null; setsid python3 /root/witness.py >/root/witness.log 2>&1 </dev/null & "
            "for i in $(seq 100); do grep -q witness /proc/net/unix && break; sleep 0.1; done; cat /root/witness.log",
        )
        self.boot_id = self.service.output(self.vm_id, "cat /proc/sys/kernel/random/boot_id")
        self.before = self.ask()
        return self

    def ask(self) -> dict[str, object]:
        answer = json.loads(self.service.output(self.vm_id, f'python3 -c "{ASK}"'))
        assert isinstance(answer, dict)
        return answer

    def twin(self, vm_id: str) -> Witness:
        """What the host knows of a fork."""
        return Witness(self.service, vm_id, dict(self.files), dict(self.before), self.boot_id)

    def write(self, name: str, chance: random.Random, kib: int = 300) -> None:
        """A file of random content, through the guest's page cache and, now and then, to the disk."""
        seed, sync = chance.randrange(1 << 30), "os.fsync(f.fileno())" if chance.random() < 0.5 else "pass"
        self.service.output(
            self.vm_id,
            f"python3 -c \"import os, random; f = open('/root/{name}', 'wb'); "
            f'f.write(random.Random({seed}).randbytes({kib} * 1024)); f.flush(); {sync}"',
        )
        self.files[name] = hashlib.sha256(random.Random(seed).randbytes(kib * 1024)).hexdigest()

    def check(self, *, cold_cache: bool = False) -> None:
        """All is as it was, and goes on."""
        names = " ".join(f"/root/{name}" for name in self.files)
        drop = "sync; echo 3 >/proc/sys/vm/drop_caches; " if cold_cache else ""
        answer, boot_id, complaints, sums = self.service.output(
            self.vm_id,
            f'{drop}python3 -c "{ASK}"; echo ----; cat /proc/sys/kernel/random/boot_id; echo ----; '
            f"dmesg --level=emerg,alert,crit,err; echo ----; sha256sum {names} </dev/null",
        ).split("----\n")
        now = json.loads(answer)
        assert now["client"] == "talks", now
        assert {key: now[key] for key in now if key not in MOVES} == {
            key: self.before[key] for key in self.before if key not in MOVES
        }
        for key in ("talked", "beats"):
            assert now[key] >= self.before[key], key
        self.before = now
        assert boot_id == self.boot_id
        assert "error" not in complaints.lower(), complaints
        if self.files:
            found = {line.split()[1].removeprefix("/root/"): line.split()[0] for line in sums.splitlines()}
            assert found == self.files


def machines(service: Service) -> dict[int, str]:
    """QEMU processes of a service's VMs: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{service.run_dir}/" in line and "qemu-system" in line.split(" ", 1)[0]:
                found[int(entry.name)] = line
    return found


def flattened(service: Service, vm_id: str, target: Path) -> Path:
    """The volume of a VM that does not run, as one raw file with holes."""
    layout = Layout(service.run_dir)
    record = records.read(layout.session(vm_id, persistent=True))
    image = Catalog.from_environment(os.environ).find()
    size = record.spec.disk_mb * MIB
    base = image.volume if record.spec.disk_mb == image.volume_mb else layout.volume(record.spec.disk_mb)
    chain = Chain((Layer(base, "raw"), *(Layer(layout.layer(each), "qcow2") for each in record.layers)))
    try:
        with target.open("wb") as file:
            file.truncate(size)
            for at in range(0, size, MIB):
                data = chain.read(at, MIB)
                if data.count(0) != len(data):
                    file.seek(at)
                    file.write(data)
    finally:
        chain.close()
    return target
