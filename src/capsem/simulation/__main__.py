"""Play seeds:  python -m capsem.simulation [--seeds FIRST:LAST | --seed N] [--operations N] [--time SECONDS] [--trace]

Each seed is played in a process of its own, so that a seed is all that it depends on. One that fails prints the line
that plays it again; with `--shrink`, the smallest that was found to fail in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace

from capsem.simulation.seed import CLIENTS, OPERATIONS, Order, Outcome, play, sweep
from capsem.simulation.trouble import KINDS

LIMIT = 120  # seconds of real time that one seed may take
TRACE_LINES = 60
_NO_RANDOM_ADDRESSES = 0x0040000  # personality(2)


def fixed() -> None:
    """Begin again in a process in which sets have the same order every time: their order is by hash, and by address."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        ctypes.CDLL(None).personality(_NO_RANDOM_ADDRESSES)  # where that is forbidden, strings at least are the same
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606


class _Child:
    """A seed that is being played."""

    def __init__(self, order: Order) -> None:
        self.order = order
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(read)
                _play_and_tell(order, write)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - it ends here, whatever it is
                traceback.print_exc()
                os._exit(1)  # and nothing of the parent's, whose copy this is
        os.close(write)
        self._read = read

    def outcome(self) -> Outcome:
        """Wait for its end."""
        with os.fdopen(self._read) as file:
            data = file.read()
        os.waitpid(self.pid, 0)
        if not data:
            sweep(self.pid)
            return Outcome(self.order.seed, violation=f"it was not over after {LIMIT} s, or the process died")
        return Outcome(**json.loads(data))

    def give_up(self) -> None:
        """End it: nobody will ask how it came out."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        sweep(self.pid)
        os.close(self._read)


def _play_and_tell(order: Order, write: int) -> None:
    signal.alarm(LIMIT)
    signal.signal(signal.SIGALRM, _overdue)
    outcome = play(order)
    with os.fdopen(write, "w") as file:
        json.dump(asdict(replace(outcome, trace=outcome.trace if outcome.violation or order.trace else [])), file)


def _overdue(*_: object) -> None:
    raise AssertionError(f"it is not over after {LIMIT} s of real time")


def play_apart(order: Order) -> Outcome:
    """Play one seed in a process of its own."""
    return _Child(order).outcome()


def play_all(orders: Iterator[Order], jobs: int) -> Generator[Outcome]:
    """As many at once as there are `jobs`, in their order."""
    running: list[_Child] = []
    try:
        for order in orders:
            running.append(_Child(order))
            if len(running) >= jobs:
                yield running.pop(0).outcome()
        while running:
            yield running.pop(0).outcome()
    finally:  # whoever asked has seen enough
        for child in running:
            child.give_up()


def replay_line(order: Order) -> str:
    """The command that plays it again."""
    words = [f"python -m capsem.simulation --seed {order.seed}"]
    if order.operations != OPERATIONS:
        words.append(f"--operations {order.operations}")
    if order.clients != CLIENTS:
        words.append(f"--clients {order.clients}")
    words += [f"--without {kind}" for kind in KINDS if kind not in order.kinds]
    if order.mutant is not None:
        words.append(f"--mutant {order.mutant}")
    return " ".join(words)


def shrink(order: Order) -> Order:
    """The smallest order that was found to fail as well: less trouble, fewer operations."""
    for kind in KINDS:
        smaller = replace(order, kinds=tuple(each for each in order.kinds if each != kind))
        if smaller != order and play_apart(smaller).violation:
            order = smaller
    step = order.operations // 2
    while step:
        smaller = replace(order, operations=order.operations - step)
        if play_apart(smaller).violation:
            order = smaller
        step //= 2
    return order


def main() -> int:
    """Entry point; 1 when a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m capsem.simulation", description="Simulate the control plane.")
    parser.add_argument("--seed", type=int, help="play this one alone, and show what happened")
    parser.add_argument("--seeds", default="1:50", help="FIRST:LAST")
    parser.add_argument("--operations", type=int, default=OPERATIONS, help="of a seed's clients together")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--time", type=float, help="begin no new seed after so many seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without", action="append", default=[], choices=KINDS, help="a kind of trouble not to make")
    parser.add_argument("--mutant", help="break the product in this way first (see capsem.simulation.mutants)")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many seeds that failed")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--trace", action="store_true", help="with --seed: the logs of all processes too")
    arguments = parser.parse_args()
    fixed()
    logging.disable(logging.NOTSET if arguments.trace else logging.CRITICAL)
    logging.basicConfig(level=logging.INFO, handlers=[logging.NullHandler()])
    kinds = tuple(kind for kind in KINDS if kind not in arguments.without)
    order = Order(0, arguments.operations, arguments.clients, kinds, arguments.mutant, trace=arguments.seed is not None)
    first, last = (int(word) for word in arguments.seeds.split(":"))
    if arguments.seed is not None:
        first = last = arguments.seed
    began = time.monotonic()

    def orders() -> Iterator[Order]:
        for seed in range(first, last + 1):
            if arguments.time is not None and time.monotonic() - began > arguments.time:
                return
            yield replace(order, seed=seed)

    failed = seeds = operations = 0
    counts: Counter[str] = Counter()
    with contextlib.closing(play_all(orders(), arguments.jobs)) as outcomes:
        for outcome in outcomes:
            seeds += 1
            operations += outcome.operations
            counts.update(outcome.counts)
            counts.update({f"({kind})": number for kind, number in outcome.trouble.items()})
            if outcome.violation is not None:
                failed += 1
                found = replace(order, seed=outcome.seed)
                lines = outcome.trace if arguments.trace else outcome.trace[-TRACE_LINES:]
                print("\n".join(lines), outcome.details, sep="\n")  # noqa: T201 - this is its output
                print(f"seed {outcome.seed}: {outcome.violation}")  # noqa: T201
                print(f"again: {replay_line(shrink(found) if arguments.shrink else found)}", flush=True)  # noqa: T201
                if failed >= arguments.failures:
                    break
            elif order.trace:
                print("\n".join(outcome.trace))  # noqa: T201
    seconds = time.monotonic() - began
    print(" ".join(f"{name} {number}" for name, number in sorted(counts.items())))  # noqa: T201
    print(  # noqa: T201
        f"{seeds} seeds, {operations} operations in {seconds:.1f} s ({operations / seconds:.0f} per second), {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
