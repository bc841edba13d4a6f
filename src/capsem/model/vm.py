"""A VM's record: what it is, what it was told to be, and how its last run ended. Versioned JSON in `vm.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from capsem.model.errors import Corrupt
from capsem.model.ids import check_name, check_object_id
from capsem.model.lifecycle import Event, State, recover, step
from capsem.model.policy import OFF, Policy
from capsem.model.spec import VmSpec

FORMAT: Final = 1
HARDWARE: Final = 1  # the virtual hardware of new machines, see the drivers
THIS_HOST: Final = 0  # owner epoch: which host may run the VM, counted up when it moves


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended, written by the supervisor before it exits."""

    how: str  # clean, suspended, failed
    reason: str
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class VmRecord:
    """Frozen; a change is a new record, written whole."""

    id: str
    persistent: bool
    spec: VmSpec
    image: str  # name of the image it was made from
    image_digest: str
    layers: tuple[str, ...]  # ids of the volume's own layers, bottom first; below them lies the image's volume
    created_at: float  # seconds since 1970
    state: State = State.CREATED
    version: str = ""  # of the Capsem that made it
    hardware: int = HARDWARE
    owner_epoch: int = THIS_HOST
    forked_from: str | None = None
    description: str | None = None
    started_at: float | None = None
    host_boot_id: str | None = None  # of the run that `state` speaks of
    boot_kind: str | None = None  # cold, warm, forked, template, pool, cold-after-failure
    boot_note: str | None = None  # why it was not warm though it could have been
    checkpoint: str | None = None  # suspended in; resuming from; while it runs: last resumed from
    saving: str | None = None  # while suspending: the checkpoint that is being made
    # The newest checkpoint that people see (or saw) on the way to where the VM is now: the next one's parent.
    current: str | None = None
    kept: tuple[str, ...] = ()  # checkpoints made by a suspend that the owner wants to see
    # While it runs: layers that its machine still reads, for which the volume names an equivalent by now.
    attached: tuple[str, ...] = ()
    freezing: bool = False  # while it runs: its machine may still write to the layer below the top one
    machine_id: str = ""  # of the guest, 32 hexadecimal digits; a fork's is its own
    last_exit: Exit | None = None
    policy: Policy = OFF
    # Its own network policy, the table [network] of a policy file (egress.document), and since when it has been learning.
    network: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    learning_since: float | None = None  # seconds since 1970
    # Placeholders of the secrets that it was lent, by name; its own first, then what it has in its memory as a fork.
    secrets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    template: bool = False  # nobody's: it becomes the template that others are forks of
    pooled: bool = False  # nobody's yet: it runs, and waits for somebody to create it
    extra: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # keys of a newer version

    def after(self, event: Event, **changes: Any) -> VmRecord:
        """The record after a lifecycle event, with other changes. Raises WrongState."""
        return replace(self, state=step(self.state, event), **changes)

    def recovered(self, host_boot_id: str, *, saved: bool) -> VmRecord:
        """The record of a VM that nobody supervises any more; see `lifecycle.recover`. How it ended is left to the caller.

        `saved`: the checkpoint `saving` is committed.
        """
        same_boot = self.host_boot_id in (None, host_boot_id)
        state = recover(self.state, supervisor_alive=False, same_host_boot=same_boot, saved=saved)
        if state == self.state:
            return self
        if state != State.SUSPENDED:
            return replace(self, state=state, saving=None, freezing=False)
        # What was to be written to next lies on top of what the checkpoint holds, and goes.
        checkpoint = self.saving or self.checkpoint
        layers = self.layers[:-1]
        return replace(self, state=state, saving=None, freezing=False, checkpoint=checkpoint, layers=layers)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers to which nothing writes any more, lowest first."""
        if self.state == State.SUSPENDED:
            return self.layers
        # A record names a new layer before the machine writes to it; a supervisor of an earlier version says no more.
        return self.layers[: -2 if self.freezing or self.state == State.SUSPENDING else -1]

    @property
    def nobodys(self) -> bool:
        """Whether it is the service's own, and no client can see or address it."""
        return self.template or self.pooled

    @property
    def last_error(self) -> str | None:
        """Why the VM is Defunct, for people."""
        if self.state != State.FAILED or self.last_exit is None:
            return None
        return "\n".join(part for part in (self.last_exit.reason, self.last_exit.log_tail) if part)

    @property
    def failure(self) -> str | None:
        """Why the last run failed, also when it left the VM as it was before."""
        return self.last_exit.reason if self.last_exit is not None and self.last_exit.how == "failed" else None

    def to_json(self) -> bytes:
        """The file's content."""
        body = {
            name: value
            for name in self.__dataclass_fields__
            if name not in ("spec", "extra", "last_exit", "policy", "network", "secrets")
            and (value := getattr(self, name)) is not None
        }
        spec = {
            "cpus": self.spec.cpus,
            "ram_mb": self.spec.ram_mb,
            "disk_mb": self.spec.disk_mb,
            "env": dict(self.spec.env),
        }
        body |= {"format": FORMAT, "spec": spec, **self.extra}
        if self.last_exit is not None:
            body["last_exit"] = asdict(self.last_exit)
        if policy := self.policy.to_dict():
            body["policy"] = policy
        if self.network:
            body["network"] = dict(self.network)
        if self.secrets:
            body["secrets"] = {name: list(placeholders) for name, placeholders in self.secrets.items()}
        return json.dumps(body, indent=1, sort_keys=True).encode()


def record_from_json(data: bytes, *, source: str) -> VmRecord:
    """Read a record; keys that this version does not know are kept. Raises Corrupt naming `source`."""
    try:
        body = json.loads(data)
        if body.pop("format") != FORMAT:
            raise Corrupt(f"{source} has a format that this version does not know", hint="upgrade Capsem")
        spec = body.pop("spec")
        last_exit, policy = body.pop("last_exit", None), body.pop("policy", {})
        known = {name: body.pop(name) for name in VmRecord.__dataclass_fields__ if name in body}
        for key in ("checkpoint", "saving", "current"):
            if key in known:
                check_object_id(known[key])
        return VmRecord(
            **{
                **known,
                "id": check_name(known["id"]),
                "kept": tuple(check_object_id(each) for each in known.get("kept", ())),
                "layers": tuple(check_object_id(layer) for layer in known["layers"]),
                "attached": tuple(check_object_id(layer) for layer in known.get("attached", ())),
                "state": State(known["state"]),
                "spec": VmSpec(spec["cpus"], spec["ram_mb"], spec["disk_mb"], MappingProxyType(dict(spec["env"]))),
                "last_exit": Exit(**last_exit) if last_exit else None,
                "policy": Policy.from_dict(policy),
                "network": MappingProxyType(dict(known.get("network", {}))),
                "secrets": _placeholders(known.get("secrets", {})),
                "extra": MappingProxyType(body),
            }
        )
    except Corrupt:
        raise
    except Exception as error:
        raise Corrupt(
            f"{source} is not a VM record: {error}", hint="`capsem delete` removes what is left of it"
        ) from error


def _placeholders(lent: Any) -> Mapping[str, tuple[str, ...]]:
    """Raises TypeError, AttributeError for what is none."""
    found = {str(name): tuple(str(each) for each in placeholders) for name, placeholders in lent.items()}
    if not all(found.values()) or not all(isinstance(each, list) for each in lent.values()):
        raise TypeError("a secret that was lent without a placeholder")
    return MappingProxyType(found)
