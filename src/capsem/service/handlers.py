"""All operations of the contract (api/operations.py is the table they stand in), on a fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from capsem.api.usage_types import UsageResponse
from capsem.api.vm_types import AssetHealth, ListResponse, LogsResponse, SandboxInfo, VmPolicy
from capsem.config import Paths, Settings
from capsem.egress.floor import floor
from capsem.egress.resolve import is_own
from capsem.ledger.queries import Totals
from capsem.model.errors import CapsemError, Corrupt, HostNotReady, NotFound
from capsem.model.lifecycle import State, Status
from capsem.model.policy import OFF
from capsem.model.vm import VmRecord
from capsem.service.asks import AskFeed
from capsem.service.create import Maker
from capsem.service.files import Files
from capsem.service.flattening import Flattening
from capsem.service.fleet import Fleet
from capsem.service.host import Host
from capsem.service.ledgers import Ledgers
from capsem.service.lending import Lending
from capsem.service.network import Network
from capsem.service.observation import Observation
from capsem.service.policies import Policies
from capsem.service.registries import discover, run_program
from capsem.service.secret_desk import SecretDesk
from capsem.service.secrets import Secrets
from capsem.service.traces import Traces
from capsem.service.transfer import Transfer
from capsem.service.usage import Found, Named, usage
from capsem.service.vm import Vm
from capsem.store import durable
from capsem.store.lines import read_tail

LOG_LIMIT = 1024 * 1024  # bytes of each log in one answer
STARTED_FROM = MappingProxyType(
    {
        "template": "template",
        "pool": "pool",
        "warm": "checkpoint",
        "forked": "checkpoint",
        "cold": "disk",
        "cold-after-failure": "disk",
    }
)  # by boot kind
MAY_BE_SUSPENDED = frozenset({Status.RUNNING, Status.SUSPENDED})


def actions(status: Status, record: VmRecord, blocked: CapsemError | None) -> list[str]:
    """What can be done with a VM, by operation. One that runs and is `blocked` cannot be spoken to. Only a suspended one
    has a way around what keeps it from being resumed: its image is another matter, without which nothing starts."""
    if status == Status.RUNNING and blocked is not None:
        return ["stop", "delete"]
    if status == Status.RUNNING:
        return [*(("checkpoint", "suspend") if record.persistent else ()), "stop", "fork", "delete"]
    if blocked is None:
        return ["resume", "fork", "delete"]
    if isinstance(blocked, Corrupt) and status != Status.SUSPENDED:
        return ["delete"]
    cold = status == Status.SUSPENDED and not isinstance(blocked, (NotFound, HostNotReady))
    return [*(("resume_cold",) if cold else ()), "fork", "delete"]


def _telemetry(totals: Totals) -> dict[str, float]:
    """The contract's keys, and whether the cost is of all calls."""
    return {
        "total_input_tokens": totals.input_tokens,
        "total_output_tokens": totals.output_tokens,
        "total_estimated_cost": totals.estimated_cost,
        "total_tool_calls": totals.tool_calls,
        "total_mcp_calls": totals.mcp_calls,
        "total_requests": totals.requests,
        "allowed_requests": totals.allowed_requests,
        "denied_requests": totals.denied_requests,
        "total_file_events": totals.file_events,
        "model_call_count": totals.model_calls,
        **({"unpriced_model_calls": totals.unpriced_calls} if totals.unpriced_calls else {}),
    }


class Handlers(Transfer, Files):
    """Implements service.manager.Manager."""

    def __init__(
        self, fleet: Fleet, maker: Maker, settings: Settings, environ: Mapping[str, str], ledgers: Ledgers
    ) -> None:
        super().__init__(fleet, maker, settings)
        self.ledgers = ledgers
        self.observation = Observation(fleet, ledgers)
        self.traces = Traces(fleet.layout.traces)
        self.flattening = Flattening(fleet, maker.driver)  # not begun
        self.policies = Policies(environ, floor(is_own), lambda: discover(environ, run_program(environ)))
        self.network = Network(fleet, self.policies, ledgers, lambda: self.settings.network_preset)
        self.asks = AskFeed(fleet)
        fleet.network_layers = self.network.layers
        self.values = Secrets(environ, Paths.from_environment(environ).home, fleet.system.clock)
        self.lending = Lending(fleet, self.values)
        self.secrets = SecretDesk(fleet, self.values)
        fleet.granted = self.lending.granted
        self.host = Host(environ, fleet.layout.run_dir, self, self.policies, self.network, self._configure)

    def _configure(self, settings: Settings) -> None:
        """For VMs to come."""
        self.settings = settings
        self._fleet.limit = settings.max_concurrent_vms
        self._fleet.ledger = settings.ledger
        self.values.load()
        self.pool.look_anew()

    async def list(self) -> ListResponse:
        """Every VM, and whether there is an image to make more, of no profile in particular."""
        try:
            health = AssetHealth(ready=True, version=self._maker.catalog.find().digest[:12], missing=[])
        except (NotFound, Corrupt):
            health = AssetHealth(ready=False, version="", missing=["default image"])
        return ListResponse(sandboxes=[await self._info(vm) for vm in self._fleet.all()], asset_health=health)

    async def df(self) -> UsageResponse:
        """What VMs and images take on disk, once what was removed before is gone from it."""
        await self._fleet.cleared()
        vms = [
            Named(vm.id, vm.session.path, vm.layers, vm.record.image_digest, vm.pid, vm.record.kept)
            for vm in self._fleet.known()
        ]
        found = Found(vms, self._store.all(), frozenset(self._fleet.spare))
        # Every file is looked at, of images too: that is not for the event loop.
        disk = await asyncio.to_thread(usage, self._fleet.layout, found, self._maker.catalog)
        return msgspec.structs.replace(disk, pool=await asyncio.to_thread(self.pool.usage))

    async def info(self, vm_id: str) -> SandboxInfo:
        """One VM; a persistent one that does not run also tells its size."""
        vm = self._fleet.get(vm_id)
        size = None
        if vm.record.persistent and not vm.running:
            size = durable.allocated_bytes(vm.session.path) + self._fleet.chain_bytes(vm.record)
        work = await self.ledgers.work(vm) if vm.running or vm.work is None else vm.work
        info = await self._info(vm, size)
        return info if work is None else msgspec.structs.replace(info, **_telemetry(work.totals))

    async def _blocked(self, vm: Vm) -> CapsemError | None:
        """Why a VM that does not run could not be resumed on this host as it is, with the way out."""
        try:
            vm.check()
            if vm.record.state == State.SUSPENDED:
                await self._maker.check_restorable(vm.record, self._store.peek(vm.record.checkpoint or ""))
            else:
                self._maker.image_of(vm.record)
        except CapsemError as error:
            return error
        return None

    async def _info(self, vm: Vm, size_bytes: int | None = None) -> SandboxInfo:
        record, status = vm.record, vm.status
        assert status is not None
        uptime = None
        if vm.running and record.started_at is not None:
            uptime = max(0, int(self._fleet.system.clock.time() - record.started_at))
        blocked = None if vm.running else await self._blocked(vm)
        known = not isinstance(vm.obstacle, Corrupt)  # else the record's numbers are not the VM's
        return SandboxInfo(
            id=vm.id,
            name=vm.id if record.persistent else None,
            pid=vm.pid,
            status=status,
            persistent=record.persistent,
            ram_mb=record.spec.ram_mb if known else None,
            cpus=record.spec.cpus if known else None,
            disk_mb=record.spec.disk_mb if known else None,
            version=record.version or None,
            forked_from=record.forked_from,
            description=None if vm.running else record.description,
            size_bytes=size_bytes,
            created_at=str(int(record.created_at)),
            uptime_secs=uptime,
            boot_kind=record.boot_kind,
            boot_note=record.boot_note,
            started_from=STARTED_FROM.get(record.boot_kind or ""),
            checkpoint=record.checkpoint if status == Status.SUSPENDED else None,
            last_error=record.last_error if status == Status.DEFUNCT else None,
            reason=vm.reason if status != Status.DEFUNCT else None,
            waiting=vm.waiting,
            warning=vm.warning or (self._space_warning(vm) if status in MAY_BE_SUSPENDED else None),
            can_resume=None if vm.running else blocked is None,
            resume_blocked_reason=str(blocked) if blocked is not None else None,
            available_actions=actions(status, record, vm.obstacle if vm.running else blocked),
            policy=VmPolicy.of(record.policy) if record.policy != OFF else None,
            secrets=sorted(record.secrets) or None,
        )

    async def logs(self, vm_id: str) -> LogsResponse:
        """Console and supervisor log of a VM, also of one that is gone because it failed."""
        warning = None
        try:
            vm = self._fleet.get(vm_id)
            session, warning = vm.session, vm.warning
        except NotFound:
            kept = self._fleet.failed_session(vm_id)
            if kept is None:
                raise
            session = kept
        console = read_tail(session.serial_log, LOG_LIMIT)
        # The warning by itself: what keeps a VM from getting on may have kept its log from being written.
        return LogsResponse(
            logs=console,
            serial_logs=console,
            process_logs=read_tail(session.process_log, LOG_LIMIT),
            warning=warning,
        )
