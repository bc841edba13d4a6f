"""A ledger that is not kept. The real one has a thread, whose time is not ours; its crashes have a suite of their own."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path


class NoWriter:
    """See capsem.ledger.writer.Writer."""

    dropped = 0

    def __init__(self, path: Path, *_: object) -> None:
        self.path = path

    def put(self, statement: object) -> None:
        """Forget it."""

    def flush(self) -> Future[None]:
        """It is done."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    set_aside = flush

    def close(self, *, lasting: bool = True) -> Future[None]:
        """Nothing is to be written."""
        return self.flush()

    def go_on(self, path: Path) -> None:
        """It lies elsewhere."""
        self.path = path
