"""Secrets on their way from the service to VMs: which are granted to which, and values for supervisors that ask.

A VM's record says which secrets it was lent, by what placeholders; the settings say what those are and where they may go. So
a secret that is taken out of the settings is lent to nobody any more, and one that changes is another one everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from types import MappingProxyType

from capsem.api.secret_messages import LendSecrets, SecretValue, SecretWanted, SetSecrets
from capsem.control.channel import Stream
from capsem.egress import grants
from capsem.model.errors import CapsemError, InvalidInput
from capsem.model.vm import VmRecord
from capsem.service.fleet import Fleet
from capsem.service.link import Link
from capsem.service.secrets import Secrets
from capsem.service.vm import Vm
from capsem.wire.schema import Message

Lent = Mapping[str, tuple[str, ...]]  # as a record has it: placeholders by secret, the VM's own first

NOTHING: Lent = MappingProxyType({})

log = logging.getLogger("capsem_service.lending")


class Lending:
    """For the VMs of one fleet."""

    def __init__(self, fleet: Fleet, secrets: Secrets) -> None:
        self._fleet = fleet
        self._secrets = secrets
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: dict[Vm, Link] = {}
        fleet.watchers.append(self._watch)
        secrets.changed = self.renew

    # -- what is lent

    def lend(self, names: Sequence[str], env: Mapping[str, str]) -> Lent:
        """New placeholders for a VM, whose environment otherwise is `env`. Raises NotFound, InvalidInput."""
        lent: dict[str, tuple[str, ...]] = {}
        variables = set(env)
        for name in dict.fromkeys(names):
            secret = self._secrets.get(grants.check_name(name))
            if secret.env is not None and secret.env in variables:
                raise InvalidInput(
                    f"the variable {secret.env} would be set twice: by the secret {name}, and otherwise",
                    hint="leave one of them out",
                )
            variables |= {secret.env} if secret.env is not None else set()
            lent[name] = (self._placeholder(name, secret.prefix),)
        return MappingProxyType(lent)

    def inherit(self, source: VmRecord) -> Lent:
        """For a fork that is to have what its source was lent: placeholders of its own, and beside them those that stand in
        its memory."""
        inherited = {}
        for name, texts in source.secrets.items():
            secret = self._secrets.find(name)
            inherited[name] = (self._placeholder(name, secret.prefix if secret is not None else ""), *texts)
        return MappingProxyType(inherited)

    def _placeholder(self, name: str, prefix: str) -> str:
        return grants.new_placeholder(name, prefix, self._fleet.system.entropy.token_bytes)

    def granted(self, lent: Lent) -> str:
        """What that comes to by the settings of now, as a supervisor is told."""
        found = [(self._secrets.find(name), texts) for name, texts in lent.items()]
        return grants.to_json([secret.grant(texts) for secret, texts in found if secret is not None])

    def renew(self) -> None:
        """The settings or values have changed: tell those whom it concerns."""
        for vm in self._fleet.known():
            if vm.link is not None and vm.record.secrets:
                self._begin(self._tell(vm, vm.link))

    async def _tell(self, vm: Vm, link: Link) -> None:
        try:
            await link.open(SetSecrets(grants=self.granted(vm.record.secrets))).result()
        except CapsemError as error:
            log.warning("%s goes on with the secrets that it had: %s", vm.id, error)

    # -- values

    def _watch(self, vm: Vm) -> None:
        """Serve every supervisor whose VM was lent something."""
        link = vm.link
        if link is None or link.lost.is_set():
            self._served.pop(vm, None)
        elif vm.record.secrets and self._served.get(vm) is not link:
            self._served[vm] = link
            self._begin(self._serve(vm, link))

    async def _serve(self, vm: Vm, link: Link) -> None:
        try:
            stream = link.open(LendSecrets())
            stream.on_message = lambda message: self._wanted(vm, stream, message)
            await stream.result()
        except CapsemError as error:  # it is of a version that knows no secrets; or it is gone
            log.debug("%s is lent nothing any more: %s", vm.id, error)

    def _wanted(self, vm: Vm, stream: Stream, message: Message) -> None:
        if isinstance(message, SecretWanted):
            self._begin(self._answer(vm, stream, message.secret))

    async def _answer(self, vm: Vm, stream: Stream, name: str) -> None:
        """Give a value to a VM that was lent it, and to no other."""
        if name not in vm.record.secrets:
            log.error("%s asks for the secret %s, which it was not lent", vm.id, name[:60])
            stream.send(SecretValue(secret=name, problem="it was not lent to this VM"))
            return
        try:
            value = await self._secrets.value(name)
        except CapsemError as error:
            stream.send(SecretValue(secret=name, problem=error.message))
        else:
            stream.send(SecretValue(secret=name, value=value.text, seconds=value.seconds))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
