"""A VM's record: what is written is read, what a newer version wrote is kept, anything else is said to be corrupt."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import MappingProxyType
from typing import Any

import pytest

from capsem.model.errors import Corrupt, WrongState
from capsem.model.lifecycle import Event, State
from capsem.model.policy import Policy
from capsem.model.spec import VmSpec
from capsem.model.vm import FORMAT, Exit, VmRecord, record_from_json

LAYER = "0123456789abcdef" * 2
PLAIN = VmRecord(
    id="box", persistent=True, spec=VmSpec(), image="default", image_digest="d", layers=(LAYER,), created_at=1e9
)
FULL = dataclasses.replace(
    PLAIN,
    spec=VmSpec(2, 512, 2048, MappingProxyType({"A": "ü", "B": "\udc80"})),
    layers=(LAYER, LAYER[::-1]),
    state=State.FAILED,
    version="1.2.3",
    owner_epoch=4,
    forked_from="other",
    description="for\nwhat",
    started_at=1e9 + 1,
    host_boot_id="boot",
    boot_kind="cold-after-failure",
    boot_note="the restore failed",
    checkpoint="1" * 32,
    saving="2" * 32,
    current="3" * 32,
    kept=("4" * 32, "5" * 32),
    machine_id="6" * 32,
    policy=Policy(idle_secs=900.0, checkpoint_keep=3),
    network=MappingProxyType({"preset": "off", "rule": [{"name": "a", "action": "allow", "host": ["a.test"]}]}),
    learning_since=1e9 + 2,
    attached=("7" * 32,),
    freezing=True,
    secrets=MappingProxyType({"key": ("capsem-key-x", "capsem-key-y")}),
    template=True,
    pooled=True,
    last_exit=Exit("failed", "the VMM ended", "last line"),
)


@pytest.mark.parametrize("record", [PLAIN, FULL], ids=["plain", "full"])
def test_round_trip(record: VmRecord) -> None:
    again = record_from_json(record.to_json(), source="vm.json")
    assert again == record
    assert again.to_json() == record.to_json()
    assert isinstance(again.layers, tuple)
    assert isinstance(again.state, State)


def test_every_field_survives() -> None:
    """A field that is added and forgotten on the way to the file would be lost at the next start."""
    defaults = {field.name: field.default for field in dataclasses.fields(VmRecord)}
    unset = [name for name, default in defaults.items() if getattr(FULL, name) == default]
    assert unset == ["hardware"]
    assert json.loads(FULL.to_json()).keys() == {*defaults, "format"} - {"extra"}


def test_keys_of_a_newer_version_are_kept() -> None:
    body = json.loads(FULL.to_json()) | {"colour": "red", "deep": {"list": [1, None]}}
    record = record_from_json(json.dumps(body).encode(), source="vm.json")
    assert dict(record.extra) == {"colour": "red", "deep": {"list": [1, None]}}
    assert json.loads(record.after(Event.START).to_json())["colour"] == "red"


def test_keys_of_an_older_version_may_be_missing() -> None:
    body = json.loads(PLAIN.to_json())
    for name in ("version", "hardware", "owner_epoch"):
        body.pop(name)
    assert record_from_json(json.dumps(body).encode(), source="vm.json") == PLAIN


def test_another_format_is_said_to_be_one() -> None:
    body = json.loads(PLAIN.to_json()) | {"format": FORMAT + 1}
    with pytest.raises(Corrupt, match=r"vm\.json has a format") as caught:
        record_from_json(json.dumps(body).encode(), source="vm.json")
    assert "upgrade" in (caught.value.hint or "")


def changed(**changes: Any) -> bytes:
    body = json.loads(PLAIN.to_json()) | changes
    return json.dumps({name: value for name, value in body.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        PLAIN.to_json()[:-1],
        b"[" * 100_000,
        changed(id="../escape"),
        changed(id=""),
        changed(id=7),
        changed(state="unheard-of"),
        changed(secrets=3),
        changed(secrets={"key": []}),
        changed(secrets={"key": "text"}),
        changed(spec={"cpus": 1}),
        changed(spec={"cpus": 99, "ram_mb": 512, "disk_mb": 2048, "env": {}}),
        changed(spec={"cpus": 1, "ram_mb": 512, "disk_mb": 2048, "env": {"LD_PRELOAD": "x"}}),
        changed(layers=None),
        changed(layers=["../../etc/passwd"]),
        changed(layers=LAYER),
        changed(last_exit={"how": "clean"}),
        changed(last_exit="clean"),
    ],
    ids=range(22),
)
def test_anything_else_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match=r"vm\.json") as caught:
        record_from_json(data, source="vm.json")
    assert caught.value.hint


def test_events_follow_the_table() -> None:
    started = PLAIN.after(Event.START, started_at=5.0)
    assert (started.state, started.started_at, PLAIN.state) == (State.STARTING, 5.0, State.CREATED)
    with pytest.raises(WrongState):
        PLAIN.after(Event.READY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.state = State.RUNNING  # type: ignore[misc]


def test_the_last_error_is_that_of_a_failed_vm() -> None:
    assert FULL.last_error == "the VMM ended\nlast line"
    assert dataclasses.replace(FULL, last_exit=Exit("failed", "only this")).last_error == "only this"
    assert dataclasses.replace(FULL, state=State.STOPPED).last_error is None
    assert dataclasses.replace(FULL, last_exit=None).last_error is None


SAVED, OLDER = "a" * 32, "b" * 32


@pytest.mark.parametrize("same_boot", [True, False])
def test_a_suspend_that_was_cut_off_after_its_commit_is_done(same_boot: bool) -> None:
    record = dataclasses.replace(
        PLAIN, state=State.SUSPENDING, layers=(LAYER, OLDER), saving=SAVED, checkpoint=OLDER, host_boot_id="boot"
    )
    after = record.recovered("boot" if same_boot else "other", saved=True)
    assert (after.state, after.checkpoint, after.saving, after.layers) == (State.SUSPENDED, SAVED, None, (LAYER,))


def test_a_suspend_that_was_cut_off_before_its_commit_is_lost_with_its_machine_and_keeps_its_layers() -> None:
    record = dataclasses.replace(
        PLAIN, state=State.SUSPENDING, layers=(LAYER, OLDER), saving=SAVED, checkpoint=OLDER, host_boot_id="boot"
    )
    for boot, state in (("boot", State.FAILED), ("other", State.STOPPED)):
        after = record.recovered(boot, saved=False)
        assert (after.state, after.checkpoint, after.saving, after.layers) == (state, OLDER, None, (LAYER, OLDER))


@pytest.mark.parametrize(
    ("state", "freezing", "frozen"),
    [
        (State.RUNNING, False, 2),
        (State.RUNNING, True, 1),  # it may still write to the layer below the one that it will go on in
        (State.SUSPENDING, True, 1),
        (State.SUSPENDING, False, 1),  # a supervisor of an earlier version
        (State.SUSPENDED, False, 3),
        (State.STOPPED, False, 2),
    ],
)
def test_a_layer_is_frozen_when_nothing_writes_to_it(state: State, freezing: bool, frozen: int) -> None:
    layers = (SAVED, OLDER, LAYER)
    record = dataclasses.replace(PLAIN, state=state, layers=layers, freezing=freezing)
    assert record.frozen == layers[:frozen]


@pytest.mark.parametrize("boot", ["boot", "other"])
def test_a_resume_that_was_cut_off_leaves_the_vm_suspended_where_it_was(boot: str) -> None:
    record = dataclasses.replace(
        PLAIN, state=State.RESUMING, layers=(LAYER, OLDER), checkpoint=SAVED, host_boot_id="boot"
    )
    after = record.recovered(boot, saved=False)
    assert (after.state, after.checkpoint, after.layers) == (State.SUSPENDED, SAVED, (LAYER,))


@pytest.mark.parametrize("state", [s for s in State if s not in (State.SUSPENDING, State.RESUMING)])
def test_recovering_never_takes_a_layer_from_any_other_state(state: State) -> None:
    record = dataclasses.replace(PLAIN, state=state, layers=(LAYER, OLDER), checkpoint=SAVED, host_boot_id="boot")
    for boot, saved in itertools.product(("boot", "other"), (True, False)):
        after = record.recovered(boot, saved=saved)
        assert after.layers == record.layers
        assert after.recovered(boot, saved=saved) == after
