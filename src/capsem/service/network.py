"""What VMs may reach: shown, changed, checked, learnt, and looked up in what was recorded."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from capsem.api.network_messages import AnswerAsk, AskAnswered, SetNetwork
from capsem.api.network_types import (
    AllowRequest,
    AllowResponse,
    AuthorityInfo,
    CheckQuery,
    CheckResponse,
    DenyRequest,
    LearnRequest,
    LearnResponse,
    NetworkInfo,
    NetworkLogQuery,
    NetworkLogResponse,
    NetworkRequest,
)
from capsem.api.operation import unknown_vm
from capsem.api.operations import OPERATIONS
from capsem.egress.allow import Destination, allowing, denying, destination, subject_of_url, with_rule, without_opposite
from capsem.egress.authority import FILE, AuthorityError
from capsem.egress.compose import compose
from capsem.egress.document import Document, from_dict
from capsem.egress.facts import Action, Layer, Verdict
from capsem.egress.learn import learn
from capsem.egress.lint import lint
from capsem.egress.mint import open_authority
from capsem.egress.policy import Policy
from capsem.egress.schema import PRESETS
from capsem.egress.toml import dump
from capsem.ledger import queries
from capsem.ledger.schema import iso
from capsem.model.errors import HostNotReady, InvalidInput, PermissionDenied, WrongState, host_failed
from capsem.model.since import parse_since
from capsem.service.fleet import Fleet
from capsem.service.ledgers import Ledgers
from capsem.service.policies import Policies
from capsem.service.vm import Vm

ROTATED: Final = "VMs trust it from their next start or resume on; until then they keep the one that they have"
DECISIONS: Final = frozenset({"allowed", "denied", "error", "interrupted"})
_TRIED: Final = ("GET", "POST", "PUT")  # methods that have to pass for a host to be allowed already


class Network:
    """`preset` tells that of new VMs."""

    def __init__(self, fleet: Fleet, policies: Policies, ledgers: Ledgers, preset: Callable[[], str]) -> None:
        self._fleet = fleet
        self._policies = policies
        self._ledgers = ledgers
        self._preset = preset

    # -- for those who make VMs

    async def document(
        self, wanted: str | NetworkRequest | None, source: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The own policy of a new VM, as its record has it; `source` is that of the VM it is a copy of. Raises InvalidInput."""
        if isinstance(wanted, str):
            wanted = NetworkRequest(preset=wanted)
        before = (
            Document(preset=self._preset()) if source is None else from_dict(source, Layer.VM, "the source's policy")
        )
        own = before if wanted is None else self._changed(before, wanted)
        await self._policy(own, "VM")  # does it hold together with the files?
        return own.to_dict()

    def _changed(self, own: Document, wanted: NetworkRequest) -> Document:
        if isinstance(wanted.policy, str):
            own = self._with_preset(self._policies.parse(wanted.policy, Layer.VM, "policy"), own)
        elif wanted.policy is not None:
            document = from_dict(wanted.policy, Layer.VM, "policy")
            if problems := lint(document.rules, self._policies.floor):
                raise InvalidInput("; ".join(each.at("policy") for each in problems), hint="correct that")
            own = self._with_preset(document, own)
        if wanted.preset is not None:
            if wanted.preset not in PRESETS:
                raise InvalidInput(f"there is no preset {wanted.preset!r}", hint=f"there are: {', '.join(PRESETS)}")
            own = replace(own, preset=wanted.preset)
        return own

    @staticmethod
    def _with_preset(document: Document, before: Document) -> Document:
        return document if document.preset else replace(document, preset=before.preset)

    # -- one VM

    def _vm(self, operation: str, vm_id: str) -> Vm:
        vm = self._fleet.get(vm_id)
        OPERATIONS[operation].require(vm.state, vm_id)
        return vm

    @staticmethod
    def _own(vm: Vm) -> Document:
        return from_dict(vm.record.network, Layer.VM, f"the policy of {vm.id}")

    async def _policy(self, own: Document, vm_id: str, *, learning: bool = False) -> Policy:
        layers = await self._policies.layers(own)
        return compose(layers, own, floor=self._policies.floor, vm=vm_id, learning=learning)[0]

    async def show(self, vm_id: str) -> NetworkInfo:
        """What a VM may reach."""
        return await self._show(self._vm("network", vm_id))

    async def _show(self, vm: Vm) -> NetworkInfo:
        own = self._own(vm)
        policy = await self._policy(own, vm.id)
        rules = sorted(policy.at(self._now).rules, key=lambda rule: rule.rank)
        return NetworkInfo(
            id=vm.id,
            preset=self._policies.preset(own),
            own=own.to_dict(),
            policy=dump(own),
            rules=[{**rule.to_dict(), "layer": str(rule.layer), "where": rule.where} for rule in rules],
            otherwise=str(policy.otherwise),
            learning_since=vm.record.learning_since,
        )

    @property
    def _now(self) -> float:
        return self._fleet.system.clock.time()

    async def set(self, vm_id: str, request: NetworkRequest) -> NetworkInfo:
        """Another policy for a VM."""
        vm = self._vm("set_network", vm_id)
        async with vm.turn:
            self._same(vm, vm_id)
            try:
                own = self._own(vm)
            except InvalidInput:  # of a newer Capsem, say: what is not known is replaced
                own = Document()
            await self._put(vm, self._changed(own, request))
        return await self._show(vm)

    async def _put(self, vm: Vm, own: Document, learning: bool | None = None) -> None:
        """Into the record, and in force. The caller has the VM's turn. Raises InvalidInput; then nothing has changed."""
        await self._policy(own, vm.id)  # does it hold together?
        try:
            if vm.running:
                layers = (await self._policies.layers(own)).to_json()
                link = vm.link or await vm.ready_link()
                await link.open(SetNetwork(layers=layers, own=json.dumps(own.to_dict()), learning=learning)).result()
                vm.reload()
            else:
                since = vm.record.learning_since
                if learning is not None:
                    since = (since or self._now) if learning else None
                vm.rewrite(network=own.to_dict(), learning_since=since)
        except OSError as error:
            raise host_failed(f"the network policy of {vm.id} could not be written down", error) from error

    @staticmethod
    def _same(vm: Vm, vm_id: str) -> None:
        if vm.deleted or vm.id != vm_id:
            raise unknown_vm(vm_id)

    # -- one host

    async def allow(self, vm_id: str, request: AllowRequest) -> AllowResponse:
        """Let a VM reach a host, or answer what waits."""
        vm = self._vm("network_allow", vm_id)
        if request.ask is not None or request.once:
            return await self._answer(vm, request.ask, request.host, allow=True)
        wanted = destination(request.host or "", request.port, tcp=request.tcp)
        until = None if request.for_secs is None else self._now + request.for_secs
        async with vm.turn:
            self._same(vm, vm_id)
            before = self._without_ended(self._own(vm))
            rule = allowing(before, wanted, request.method or (), until)
            own, removed = without_opposite(before, rule)
            methods = request.method or _TRIED
            verdicts = await self._verdicts(own, vm.id, wanted, methods)
            already = all(verdict.action is Action.ALLOW for verdict in verdicts)
            if already and until is None and not request.always:
                if removed:
                    await self._put(vm, own)
                return AllowResponse(
                    message=f"{vm.id} may reach {wanted.text}: {verdicts[0].reason}"
                    if removed
                    else f"{vm.id} may reach {wanted.text} already: {verdicts[0].reason}",
                    removed=removed,
                )
            asked = any(verdict.action is Action.ASK and verdict.layer is Layer.VM for verdict in verdicts)
            rule = replace(rule, answers=asked)
            changed, idle = with_rule(own, rule)
            for verdict in await self._verdicts(changed, vm.id, wanted, request.method or ("GET",)):
                self._require_allowed(verdict)
            await self._put(vm, changed)
        if request.always:
            try:
                name = rule.name.replace("allowed-", "always-", 1)
                await self._policies.remember(replace(rule, name=name, answers=False))
            except OSError as error:
                raise host_failed("what is allowed for always could not be written down", error) from error
            await self.spread()
        end = "" if until is None else f" until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return AllowResponse(
            message=f"{vm.id} may reach {wanted.text}{end}"
            + (", and so may others with medium" if request.always else ""),
            rule=rule.to_dict(),
            removed=[*removed, *idle],
        )

    def _without_ended(self, own: Document) -> Document:
        return replace(own, rules=tuple(rule for rule in own.rules if rule.until is None or rule.until > self._now))

    async def _verdicts(self, own: Document, vm_id: str, wanted: Destination, methods: Sequence[str]) -> list[Verdict]:
        policy = await self._policy(own, vm_id)
        return [policy.judge(subject) for subject in wanted.subjects(methods)]

    @staticmethod
    def _require_allowed(verdict: Verdict) -> None:
        """Raises PermissionDenied where something stronger than the VM's own rule forbids it, WrongState for one beside it."""
        if verdict.action is Action.ALLOW:
            return
        if verdict.layer is Layer.VM:
            raise WrongState(
                f"the VM's own policy says otherwise: {verdict.reason}",
                hint="capsem net show prints it, and capsem net set takes another one",
            )
        raise PermissionDenied(verdict.reason, hint="that is not for this user to allow")

    async def deny(self, vm_id: str, request: DenyRequest) -> AllowResponse:
        """Keep a VM from a host, or refuse what waits."""
        vm = self._vm("network_deny", vm_id)
        if request.ask is not None or request.once:
            return await self._answer(vm, request.ask, request.host, allow=False)
        wanted = destination(request.host or "", request.port)
        async with vm.turn:
            self._same(vm, vm_id)
            before = self._without_ended(self._own(vm))
            rule = denying(before, wanted)
            own, removed = without_opposite(before, rule)
            changed, idle = with_rule(own, rule)
            for verdict in await self._verdicts(changed, vm.id, wanted, ("GET",)):
                if verdict.action is Action.ALLOW:
                    raise PermissionDenied(
                        f"it stays allowed: {verdict.reason}", hint="that layer is above the VM's own"
                    )
            await self._put(vm, changed)
        return AllowResponse(
            message=f"{vm.id} is kept from {wanted.text}", rule=rule.to_dict(), removed=[*removed, *idle]
        )

    async def _answer(self, vm: Vm, ask: str | None, host: str | None, *, allow: bool) -> AllowResponse:
        link = await vm.ready_link()
        answered = await link.open(AnswerAsk(allow=allow, ask=ask, host=host)).result()
        assert isinstance(answered, AskAnswered)
        if not answered.count:
            raise WrongState(
                f"nothing about {host or f'ask {ask}'} waits for an answer in {vm.id}",
                hint="requests wait while `capsem net asks` runs; to allow one that is to come: --for 10m",
            )
        word = "allowed" if allow else "denied"
        return AllowResponse(message=f"{word}, for once", answered=answered.count)

    # -- what would be

    async def check(self, query: CheckQuery) -> CheckResponse:
        """The verdict on a URL."""
        subject = subject_of_url(query.url, query.method)
        if query.id is None:
            own, name, learning = Document(preset=self._preset()), "VM", False
        else:
            vm = self._fleet.get(query.id)
            own, name, learning = self._own(vm), vm.id, vm.record.learning_since is not None
        policy = (await self._policy(own, name, learning=learning)).at(self._now)
        verdict = policy.judge(subject)
        return CheckResponse(
            action=str(verdict.action),
            rule=verdict.rule,
            layer=str(verdict.layer),
            reason=verdict.reason,
            host=subject.host or subject.address or "",
            port=subject.port,
            protocol=str(verdict.protocol),
            method=subject.method,
            path=subject.path,
            where=next((rule.where for rule in policy.rules if _is(rule, verdict)), None) or None,
            remedy=verdict.remedy,
            note=None
            if subject.host is None or verdict.action is Action.DENY
            else "the addresses that the name leads to are judged, too, once it is looked up",
        )

    # -- what was

    async def log(self, vm_id: str, query: NetworkLogQuery) -> NetworkLogResponse:
        """Entries of a VM's record."""
        vm = self._vm("network_log", vm_id)
        decisions = tuple(filter(None, (query.decision or "").replace(" ", "").split(",")))
        if unknown := [each for each in decisions if each not in DECISIONS]:
            raise InvalidInput(
                f"there is no decision {unknown[0][:40]!r}", hint=f"there are: {', '.join(sorted(DECISIONS))}"
            )
        since = None if query.since is None else iso(parse_since(query.since, self._now))
        rows = await self._ledgers.ask(
            vm,
            lambda ledger: queries.net_log(
                ledger, limit=query.limit, since=since, decisions=decisions, after=query.after
            ),
        )
        events = [{key: value for key, value in row.items() if value is not None} for row in rows]
        return NetworkLogResponse(events=events, last=max((row["id"] for row in rows), default=query.after or 0))

    async def learn(self, vm_id: str, request: LearnRequest) -> LearnResponse:
        """Begin to learn, end it, or say what was learnt."""
        vm = self._vm("network_learn", vm_id)
        if request.action == "start":
            return await self._start_learning(vm, vm_id)
        since, decision = vm.record.learning_since, "allowed"
        if request.action == "denials":
            since, decision = parse_since(request.since, self._now) if request.since else 0.0, "denied"
        if since is None:
            raise WrongState(f"{vm_id} is not learning", hint=f"capsem net learn start {vm_id}")
        if request.action == "stop":
            async with vm.turn:
                self._same(vm, vm_id)
                await self._put(vm, self._own(vm), learning=False)
        rows = await self._ledgers.ask(
            vm, lambda ledger: queries.net_summary(ledger, since=iso(since), decision=decision, paths=request.paths)
        )
        learnt = learn(rows, self._own(vm), paths=request.paths)
        what = "Would have allowed what was denied" if decision == "denied" else "Learnt from what was done"
        head = (
            f"{what} in {vm_id}: {learnt.rows} requests and connections.",
            f"capsem create -n NAME --net FILE makes a VM with it, capsem net set {vm_id} FILE gives it to this one.",
            *(f"Left out: {each}" for each in learnt.left_out),
        )
        return LearnResponse(
            learning=vm.record.learning_since is not None,
            policy=dump(learnt.document, head=head, comments=learnt.comments),
            events=learnt.rows,
            left_out=list(learnt.left_out),
            learning_since=vm.record.learning_since,
        )

    async def _start_learning(self, vm: Vm, vm_id: str) -> LearnResponse:
        if not self._fleet.ledger:
            raise WrongState(
                "nothing is recorded, so nothing can be learnt", hint="set vm.ledger to on, and restart the VM"
            )
        async with vm.turn:
            self._same(vm, vm_id)
            await self._put(vm, self._own(vm), learning=True)
        return LearnResponse(learning=True, learning_since=vm.record.learning_since)

    # -- the authority

    async def authority(self, *, rotate: bool = False) -> AuthorityInfo:
        """The authority of this installation, made if there is none, or anew. Raises HostNotReady."""
        home, name = self._policies.home, os.uname().nodename
        try:
            found = await asyncio.to_thread(open_authority, home, self._now, name, rotate=rotate)
        except AuthorityError as error:
            raise HostNotReady(str(error), hint="capsem net ca rotate makes another one") from error
        return AuthorityInfo(
            certificate=found.pem.decode(),
            fingerprint=found.fingerprint,
            not_after=found.certificate.not_valid_after_utc.timestamp(),
            file=str(home / FILE),
            message=ROTATED if rotate else None,
        )

    # -- the files have changed

    async def spread(self) -> tuple[int, list[str]]:
        """Give every running VM the layers as they are now; returns how many have them, and what went wrong."""
        told, failures = 0, []
        for vm in [each for each in self._fleet.known() if each.running and each.link is not None]:
            try:
                own = self._own(vm)
                layers = (await self._policies.layers(own)).to_json()
                if vm.link is not None:
                    await vm.link.open(SetNetwork(layers=layers)).result()
                    told += 1
            except Exception as error:  # noqa: BLE001  one VM keeps no other from its policy
                if vm.running:
                    failures.append(f"{vm.id}: {error}")
        return told, failures

    async def layers(self, own: Mapping[str, Any]) -> str:
        """What a supervisor is started with; where its VM's own policy cannot be read, it will deny everything."""
        try:
            document = from_dict(own, Layer.VM, "the VM's policy")
        except InvalidInput:
            document = Document()
        return (await self._policies.layers(document)).to_json()


def _is(rule: Any, verdict: Verdict) -> bool:
    return bool((rule.name, rule.layer) == (verdict.rule, verdict.layer))
