"""The control plane in a simulated host: a few hundred of its seeds, and whether it notices a product that is broken.

CAPSEM_SIMULATION_SEEDS is how many are played here, 400 unless given, of 75 operations each, which takes a minute or two;
`make soak` plays 20,000 of 50.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = 4
OPERATIONS = 75  # of a seed
SEEDS = int(os.environ.get("CAPSEM_SIMULATION_SEEDS", "400"))


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capsem.simulation", "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_breaks_what_was_promised(part: int) -> None:
    first, last = 1 + SEEDS * part // PARTS, SEEDS * (part + 1) // PARTS
    done = simulate("--seeds", f"{first}:{last}", "--operations", str(OPERATIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{last - first + 1} seeds, {(last - first + 1) * OPERATIONS} operations" in done.stdout


@pytest.mark.soak
def test_a_million_operations() -> None:
    done = simulate("--seeds", "1:20000", "--operations", "50", "--jobs", str(os.cpu_count()))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mutant", "seeds"),
    [
        ("gate-off", 40),
        ("retry-without-dedup", 40),
        ("ack-before-exit", 40),
        ("ack-before-commit", 40),
        ("goes-on-in-a-frozen-layer", 40),
        ("merges-what-is-written", 300),  # one in thirty fails
    ],
)
def test_a_broken_product_is_noticed(mutant: str, seeds: int) -> None:
    done = simulate("--seeds", f"1:{seeds}", "--mutant", mutant, "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""  # the seed that was played at the same time does not complain that nobody listens
    assert f"--mutant {mutant}" in done.stdout
    assert "again: python -m capsem.simulation --seed " in done.stdout


GIVEN_UP = """
import time
from capsem.simulation.__main__ import _Child
from capsem.simulation.seed import Order, directories
child = _Child(Order(1, operations=100_000))
while not directories(child.pid):
    time.sleep(0.01)
child.give_up()
print(directories(child.pid))
"""


def test_a_seed_that_is_given_up_leaves_no_files() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_UP], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_seed_is_all_that_a_run_depends_on() -> None:
    first, second = (simulate("--seed", "17").stdout.splitlines()[:-1] for _ in range(2))
    assert len(first) > 100
    assert first == second


def play(scene: str, number: int) -> str:
    command = [sys.executable, Path(__file__).with_name("scenes.py"), scene, str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("writes", range(10))
def test_a_vm_whose_supervisor_is_killed_while_it_gets_a_name_is_whole_or_gone(writes: int) -> None:
    assert play("persist", writes).split() in (["Interrupted", "gone"], ["Interrupted", "new"], ["persisted", "new"])


@pytest.mark.parametrize("seed", [15, 16, 27, 33, 39, 45, 51, 63, 81, 82])  # in which it went wrong
def test_a_service_that_comes_while_a_vm_of_the_last_one_is_about_to_begin_takes_nothing_away(seed: int) -> None:
    assert play("resume", seed) == "kept\n"
