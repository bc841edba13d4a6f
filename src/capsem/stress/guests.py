"""The commands by which a guest is told to write, and asked what it has.

A Linux guest has a process that holds a word in its memory, another word in a file system in RAM, and one that goes on
counting into a file, synced line by line, whatever happens to the machine. A simulated guest has a few commands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from capsem.stress.truth import Piece, Seen

_CUT: Final = "====="


class Guest(Protocol):
    """One kind of guest."""

    largest: int  # bytes that are written at once

    def begin(self, word: str) -> str:
        """A command that puts something into memory, once after each boot."""

    def put(self, name: str, piece: Piece, *, append: bool) -> str:
        """A command that writes, and succeeds when it is on disk."""

    def remove(self, name: str) -> str:
        """Likewise."""

    def look(self, names: Sequence[str]) -> str:
        """A command that tells what there is."""

    def read(self, output: str) -> Seen:
        """What it told. Raises ValueError."""

    def digest(self, pieces: tuple[Piece, ...]) -> str:
        """What `look` tells of a file with this content."""

    def follows(self, before: str, now: str, lost: int) -> bool:
        """Whether memory may be `now`, when at the last look it was `before`, and `lost` looks had no answer."""


class LinuxGuest:
    """See Guest."""

    largest = 60_000

    def begin(self, word: str) -> str:
        """See Guest."""
        return (
            f"mkdir -p /root/stress; echo {word} >/dev/shm/stress; "
            f"STRESS={word} setsid sleep infinity >/dev/null 2>&1 </dev/null & echo $! >/dev/shm/stress-pid; "
            # What a machine that was killed had appended and not synced may be zeros: ext4 can write a size before its data.
            # It is cut off here and now, for whoever looks next.
            "flock -n /dev/shm/stress-lock bash -c 'cd /root; touch count; "
            "truncate -s $(head -n $(wc -l <count) count | wc -c) count'; "
            "setsid flock -n /dev/shm/stress-lock bash -c 'cd /root; n=$(wc -l <count); "
            "while :; do n=$((n+1)); echo $n >>count; sync count; sleep 0.3; done' >/dev/null 2>&1 </dev/null &"
        )

    def put(self, name: str, piece: Piece, *, append: bool) -> str:
        """See Guest."""
        word, size = piece
        return f"cd /root/stress && yes {word} | head -c {size} >{'>' if append else ''}{name} && sync {name}"

    def remove(self, name: str) -> str:
        """See Guest."""
        return f"cd /root/stress && rm {name} && sync ."

    def look(self, names: Sequence[str]) -> str:
        """See Guest."""
        return (
            "cat /dev/shm/stress /proc/sys/kernel/random/boot_id /dev/shm/stress-pid; "
            "tr '\\0' '\\n' </proc/$(cat /dev/shm/stress-pid)/environ | grep ^STRESS=; "
            f'echo {_CUT}; awk \'$1 != NR {{ print "line " NR " of the count is " $1; exit }}\' /root/count; echo {_CUT}; '
            f"cd /root/stress && sha256sum {' '.join(names) or '/dev/null'}; echo {_CUT}; "
            "dmesg --level=emerg,alert,crit,err"
        )

    def read(self, output: str) -> Seen:
        """See Guest."""
        memory, wrong, sums, log = output.split(f"{_CUT}\n")
        files = {name: digest for digest, _, name in (line.partition("  ") for line in sums.splitlines())}
        return Seen(" ".join(memory.split()), files, log, wrong.strip())

    def digest(self, pieces: tuple[Piece, ...]) -> str:
        """See Guest."""
        return hashlib.sha256(b"".join((f"{word}\n".encode() * size)[:size] for word, size in pieces)).hexdigest()

    def follows(self, before: str, now: str, lost: int) -> bool:
        """See Guest: the very process, since the very boot."""
        return now == before


class SimGuest:
    """See Guest; memory is a number that each look counts up."""

    largest = 1

    def begin(self, word: str) -> str:
        """See Guest."""
        return "true"

    def put(self, name: str, piece: Piece, *, append: bool) -> str:
        """See Guest."""
        return f"echo {piece[0]} {'>>' if append else '>'} /root/{name} && sync"

    def remove(self, name: str) -> str:
        """See Guest."""
        return f"rm /root/{name} && sync"

    def look(self, names: Sequence[str]) -> str:
        """See Guest."""
        files = "".join(f"echo file {name}; cat /root/{name}; " for name in names)
        return f"tally stress; echo {_CUT}; {files}echo {_CUT}; dmesg"

    def read(self, output: str) -> Seen:
        """See Guest."""
        memory, text, log = output.split(f"{_CUT}\n")
        files: dict[str, str] = {}
        for part in text.split("file ")[1:]:
            name, _, content = part.partition("\n")
            if content:
                files[name] = content
        return Seen(str(int(memory)), files, log)

    def digest(self, pieces: tuple[Piece, ...]) -> str:
        """See Guest."""
        return "".join(f"{word}\n" for word, _ in pieces)

    def follows(self, before: str, now: str, lost: int) -> bool:
        """See Guest."""
        return 0 < int(now) - int(before) <= 1 + lost
