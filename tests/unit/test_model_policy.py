"""What a VM is due for, and which automatic checkpoints stay."""

from __future__ import annotations

import json

import pytest

from capsem.model.errors import InvalidInput
from capsem.model.policy import KEEP, LONGEST, OFF, Due, Policy
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord, record_from_json

NOW = 1_000_000.0


def test_nothing_is_ever_due_unless_asked_for() -> None:
    assert OFF.decide(NOW + LONGEST, 0.0, (), LONGEST) == (None, LONGEST)
    assert OFF.to_dict() == {}


@pytest.mark.parametrize(
    ("idle", "outcome"),
    [
        (0.0, (None, 900.0)),
        (899.0, (None, 1.0)),
        (900.0, (Due.SUSPEND, 0.0)),
        (None, (None, LONGEST)),  # a supervisor that does not watch: better not
    ],
)
def test_an_idle_vm_is_suspended(idle: float | None, outcome: tuple[Due | None, float]) -> None:
    assert Policy(idle_secs=900).decide(NOW, NOW - 5000, (), idle) == outcome


def test_time_to_live_counts_from_the_start_of_the_run() -> None:
    policy = Policy(ttl_secs=7200)
    assert policy.decide(NOW, NOW - 7199, (), None) == (None, 1.0)
    assert policy.decide(NOW, NOW - 7200, (), None) == (Due.END, 0.0)


def test_checkpoints_are_made_every_so_often() -> None:
    policy = Policy(checkpoint_every_secs=300)
    assert policy.decide(NOW, NOW - 299, (), None) == (None, 1.0)
    assert policy.decide(NOW, NOW - 300, (), None) == (Due.CHECKPOINT, 0.0)
    # From the newest one on; one of an earlier run does not count against this one's start.
    assert policy.decide(NOW, NOW - 5000, [NOW - 400, NOW - 100], None) == (None, 200.0)
    assert policy.decide(NOW, NOW - 10, [NOW - 5000], None) == (None, 290.0)


def test_a_clock_that_was_set_back_makes_nobody_wait_for_a_checkpoint_until_it_is_that_late_again() -> None:
    policy = Policy(checkpoint_every_secs=300)
    assert policy.decide(NOW, NOW - 5000, [NOW + 1e6], None) == (Due.CHECKPOINT, 0.0)
    assert policy.decide(NOW, NOW + 5000, [], None) == (Due.CHECKPOINT, 0.0)
    # One has been made since; it is the newest, and stays.
    assert policy.decide(NOW, NOW + 5000, [NOW + 1e6, NOW - 100], None) == (None, 200.0)
    made = {"future": NOW + 1e6, "farther": NOW + 2e6, "older": NOW - 400, "new": NOW - 100}
    assert Policy(checkpoint_every_secs=300, checkpoint_keep=2).superfluous(made, NOW) == ["future", "farther"]


def test_the_most_final_comes_first_and_the_soonest_decides_when_to_look() -> None:
    policy = Policy(idle_secs=10, ttl_secs=20, checkpoint_every_secs=30)
    assert policy.decide(NOW, NOW - 100, (), 100.0)[0] == Due.END
    assert policy.decide(NOW, NOW - 15, (), 10.0)[0] == Due.SUSPEND
    assert policy.decide(NOW, NOW - 15, [NOW], 8.0) == (None, 2.0)


def test_which_automatic_checkpoints_go() -> None:
    made = {f"{n:02}": NOW - 100 * n for n in range(15)}
    assert Policy().superfluous(made, NOW) == [f"{n:02}" for n in range(14, KEEP - 1, -1)]
    assert Policy(checkpoint_keep=14).superfluous(made, NOW) == ["14"]
    assert Policy(checkpoint_keep=20).superfluous(made, NOW) == []
    assert Policy(checkpoint_keep=14, checkpoint_age_secs=1250).superfluous(made, NOW) == ["14", "13"]


def test_changes() -> None:
    policy = Policy(idle_secs=900, checkpoint_keep=3)
    assert policy.changed({"idle_secs": 0, "ttl_secs": 60, "checkpoint_keep": None}) == Policy(
        ttl_secs=60, checkpoint_keep=3
    )
    for bad in ({"idle_secs": 0.5}, {"ttl_secs": LONGEST * 2}, {"checkpoint_keep": 1001}):
        with pytest.raises(InvalidInput):
            policy.changed(bad)
    with pytest.raises(InvalidInput, match="persistent"):
        policy.require(persistent=False)
    Policy(ttl_secs=60).require(persistent=False)


def test_a_record_keeps_it() -> None:
    record = VmRecord("box", True, VmSpec(), "default", "d", (), NOW, policy=Policy(idle_secs=900, checkpoint_keep=2))
    assert record_from_json(record.to_json(), source="it") == record
    # One that has none reads as before; what a newer version may add is no obstacle.
    body = json.loads(record.to_json())
    del body["policy"]
    assert record_from_json(json.dumps(body).encode(), source="it").policy == OFF
    body["policy"] = {"idle_secs": 5, "of_a_newer_version": True}
    assert record_from_json(json.dumps(body).encode(), source="it").policy == Policy(idle_secs=5)
