"""A ledger's writer that is killed in the middle: what it had said was written is there, and the file is whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsem.ledger.database import journal, open_writer, reader, tidy
from capsem.ledger.schema import SESSION

WRITE = """
import sys, pathlib
from capsem.ledger.events import lifecycle_event
from capsem.ledger.schema import SESSION
from capsem.ledger.writer import Writer
writer, number = Writer(pathlib.Path(sys.argv[1]), SESSION), 0
while True:
    for _ in range(20):
        writer.put(lifecycle_event(number, str(number), detail="x" * 500))
        number += 1
    writer.flush().result()
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_loses_nothing_that_was_flushed(tmp_path: Path, seed: int) -> None:
    path, chance = tmp_path / "session.db", random.Random(seed)
    with subprocess.Popen([sys.executable, "-c", WRITE, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 40)):  # some of them beyond the first checkpoint of the journal
            flushed = int(process.stdout.readline())
        time.sleep(chance.random() / 100)
        process.send_signal(signal.SIGKILL)
        flushed = int((process.stdout.read().split() or [flushed])[-1])
    assert journal(path).stat().st_size > 0
    if seed % 2:
        tidy(path)  # the service, after a VM's end
        assert os.listdir(tmp_path) == ["session.db"]
    else:
        open_writer(path, SESSION).close()  # the VM's next supervisor
    with reader(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [int(row[0]) for row in connection.execute("SELECT event FROM lifecycle_events ORDER BY id")]
    assert found == list(range(len(found)))
    assert len(found) >= flushed
