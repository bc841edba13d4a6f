"""A checkpoint's manifest: what is written is read; which hosts may restore it, and what differs where they may not."""

import dataclasses
import json
from types import MappingProxyType

import pytest

from capsem.model.checkpoint import (
    Checkpoint,
    FrozenLayer,
    GuestState,
    Kind,
    Memory,
    Part,
    checkpoint_from_json,
)
from capsem.model.errors import Corrupt, WrongState

COLD = Checkpoint(
    id="1" * 32,
    vm_id="box",
    kind=Kind.ROLLBACK,
    created_at=1e9 + 0.123456,
    creator="1.2.3",
    layers=(),
    disk_mb=2048,
    image="default",
    image_digest="d" * 64,
    hardware=1,
    cpus=2,
    ram_mb=512,
)
WARM = dataclasses.replace(
    COLD,
    kind=Kind.SUSPEND,
    layers=(FrozenLayer("2" * 32, "e" * 64), FrozenLayer("3" * 32, "f" * 64)),
    parent="4" * 32,
    message="before\nthe ü",
    machine=MappingProxyType({"hypervisor": "qemu 7.2", "cpus": 2, "list": ["a", {"b": None}]}),
    memory=Memory(512 << 20, "a" * 64, ((0, 3), (9, 1)), 16384),
    devices=Part(81234, "b" * 64),
    jobs=Part(17, "c" * 64),
    names=Part(18, "e" * 64),
    guest=GuestState("boot", 7, "ab" * 16, "token", synced=False),
    pause=0.054321,
    network=MappingProxyType({"preset": "off", "rule": [{"name": "a", "action": "allow", "host": ["a.test"]}]}),
    owner_epoch=3,
    machine_id="c" * 32,
)


@pytest.mark.parametrize("checkpoint", [COLD, WARM], ids=["cold", "warm"])
def test_round_trip(checkpoint: Checkpoint) -> None:
    again = checkpoint_from_json(checkpoint.to_json(), source="manifest")
    assert again == checkpoint
    assert again.to_json() == checkpoint.to_json()
    assert again.warm == (checkpoint is WARM)


def test_no_field_is_lost_on_the_way() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Checkpoint)}
    assert [name for name, default in defaults.items() if getattr(WARM, name) == default] == []
    assert json.loads(WARM.to_json())["body"].keys() == defaults.keys()


def test_a_field_that_was_changed_is_found() -> None:
    outer = json.loads(WARM.to_json())
    for name in outer["body"]:
        changed = {**outer, "body": {**outer["body"], name: None}}
        with pytest.raises(Corrupt, match="digest is wrong"):
            checkpoint_from_json(json.dumps(changed).encode(), source="manifest")


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "body": {}}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_manifest_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="the file"):
        checkpoint_from_json(data, source="the file")


def test_the_same_machine_may_restore_it() -> None:
    WARM.require(dict(WARM.machine))
    assert WARM.differences(dict(WARM.machine)) == []


def test_another_machine_may_not_and_everything_that_differs_is_named() -> None:
    there = {"hypervisor": "qemu 10.0", "cpus": 2, "list": ["a", {"b": None}], "kernel": "k" * 100}
    assert WARM.differences(there) == [
        "hypervisor is qemu 10.0, was qemu 7.2",
        f"kernel is {'k' * 57}..., was unknown",
    ]
    with pytest.raises(WrongState, match=r"hypervisor is qemu 10\.0, was qemu 7\.2") as caught:
        WARM.require(there)
    assert "capsem resume --cold" in (caught.value.hint or "")
    assert WARM.differences({}) == [
        "cpus is unknown, was 2",
        "hypervisor is unknown, was qemu 7.2",
        "list is unknown, was ['a', {'b': None}]",
    ]


def test_one_without_memory_cannot_be_restored_anywhere() -> None:
    with pytest.raises(WrongState, match="holds no memory") as caught:
        COLD.require({})
    assert "cold" in (caught.value.hint or "")


def test_who_sees_what() -> None:
    for kind in Kind:
        each = dataclasses.replace(WARM, kind=kind)
        assert each.hidden == (kind in (Kind.SUSPEND, Kind.FORK, Kind.TEMPLATE))
        assert each.visible() != each.hidden
        assert each.visible((each.id,))
