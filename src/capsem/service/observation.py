"""What happened: the ledgers' history and timeline, SQL on them, sums over all VMs, logs, and what is wrong."""

from __future__ import annotations

import asyncio
import base64
import os
from pathlib import Path
from typing import Final

from capsem.api.ledger_types import (
    MAIN_ID,
    FailedCommand,
    HistoryCommand,
    HistoryCountsResponse,
    HistoryQuery,
    HistoryResponse,
    HostLogsQuery,
    HostTriage,
    InspectRequest,
    InspectResponse,
    PanicsQuery,
    PanicsResponse,
    ProcessesResponse,
    ProcessInfo,
    ProviderStats,
    SessionStats,
    SessionTriage,
    StatsResponse,
    TimelineQuery,
    TimelineResponse,
    ToolStats,
    Totals,
    TranscriptQuery,
    TranscriptResponse,
    TriageQuery,
    TriageResponse,
)
from capsem.api.operations import OPERATIONS
from capsem.ledger import queries
from capsem.ledger.schema import iso
from capsem.model.errors import InvalidInput, NotFound
from capsem.model.since import parse_since
from capsem.service import findings
from capsem.service.findings import Source
from capsem.service.fleet import Fleet
from capsem.service.ledgers import Ledgers, sums, tops
from capsem.service.vm import Vm
from capsem.store.lines import read_tail

MOST_ROWS: Final = 2000  # of a timeline or a history
MOST_FINDINGS: Final = 200
SESSIONS_SHOWN: Final = 100
TOPS_SHOWN: Final = 20
TRANSCRIPT: Final = 4 * 1024 * 1024  # bytes of a transcript in one answer
LOG_BYTES: Final = 5 * 1024 * 1024
HOST_LOGS: Final = ("service", "mcp", "gateway", "tray", "app")


class Observation:
    """Asks the ledgers and the logs."""

    def __init__(self, fleet: Fleet, ledgers: Ledgers) -> None:
        self._fleet = fleet
        self._ledgers = ledgers

    def _vm(self, operation: str, vm_id: str) -> Vm:
        """A VM that may be asked for an operation in the state it is in. Raises what the table of operations says."""
        vm = self._fleet.get(vm_id)
        OPERATIONS[operation].require(vm.state, vm_id)
        return vm

    def _since(self, text: str) -> float:
        return parse_since(text, self._fleet.system.clock.time())

    # -- the ledgers

    async def inspect(self, vm_id: str, request: InspectRequest) -> InspectResponse:
        """One SELECT on a running VM's ledger, or on the index."""
        vm = None if vm_id == MAIN_ID else self._vm("inspect", vm_id)
        found = await self._ledgers.inspect(vm, request.sql)
        return InspectResponse(columns=found.columns, rows=found.rows, truncated=found.truncated)

    async def timeline(self, vm_id: str, query: TimelineQuery) -> TimelineResponse:
        """The newest events of a VM."""
        vm = self._vm("timeline", vm_id)
        layers = tuple(filter(None, (query.layers or "").replace(" ", "").split(","))) or queries.DEFAULT_LAYERS
        if unknown := [layer for layer in layers if layer not in queries.LAYERS]:
            raise InvalidInput(
                f"layers: there is no layer {unknown[0][:40]!r}", hint=f"some of: {','.join(queries.LAYERS)}"
            )
        since = None if query.since is None else iso(self._since(query.since))
        limit = min(query.limit, MOST_ROWS)
        rows = await self._ledgers.ask(
            vm,
            lambda ledger: queries.timeline(ledger, limit=limit, since=since, trace_id=query.trace_id, layers=layers),
        )
        return TimelineResponse(columns=list(queries.TIMELINE_COLUMNS), rows=[list(row) for row in rows])

    async def history(self, vm_id: str, query: HistoryQuery) -> HistoryResponse:
        """The commands of a VM, newest first."""
        vm, limit = self._vm("history", vm_id), min(query.limit, MOST_ROWS)
        found = await self._ledgers.ask(
            vm,
            lambda ledger: queries.history(
                ledger, limit=limit, offset=query.offset, search=query.search, layer=query.layer
            ),
        )
        return HistoryResponse(
            commands=[HistoryCommand(**each._asdict()) for each in found.commands],
            total=found.total,
            has_more=query.offset + len(found.commands) < found.total,
        )

    async def history_processes(self, vm_id: str) -> ProcessesResponse:
        """The programs that were started for commands."""
        found = await self._ledgers.ask(self._vm("history_processes", vm_id), queries.processes)
        return ProcessesResponse(processes=[ProcessInfo(**each._asdict()) for each in found])

    async def history_counts(self, vm_id: str) -> HistoryCountsResponse:
        """How much there is."""
        commands, processes = await self._ledgers.ask(self._vm("history_counts", vm_id), queries.counts)
        return HistoryCountsResponse(exec_count=commands, audit_count=processes)

    async def transcript(self, vm_id: str, query: TranscriptQuery) -> TranscriptResponse:
        """What the terminals showed, or the end of it."""
        path = self._vm("transcript", vm_id).session.pty_log
        data = await asyncio.to_thread(_end_of, path, TRANSCRIPT)
        if query.tail_lines is not None:
            data = b"".join(data.splitlines(keepends=True)[-query.tail_lines :]) if query.tail_lines else b""
        return TranscriptResponse(content=base64.b64encode(data).decode(), bytes=len(data))

    async def stats(self) -> StatsResponse:
        """Sums over all VMs that there ever were, and the newest of them."""
        rows = await self._ledgers.index()
        total, (providers, tools) = sums(rows), tops(rows)
        return StatsResponse(
            global_=Totals(
                total_sessions=len(rows),
                total_input_tokens=total.input_tokens,
                total_output_tokens=total.output_tokens,
                total_estimated_cost=total.estimated_cost,
                total_tool_calls=total.tool_calls,
                total_mcp_calls=total.mcp_calls,
                total_file_events=total.file_events,
                total_requests=total.requests,
                total_allowed=total.allowed_requests,
                total_denied=total.denied_requests,
                total_model_calls=total.model_calls,
                total_unpriced_calls=total.unpriced_calls,
            ),
            sessions=[
                SessionStats(
                    id=row["name"],
                    status=row["status"],
                    persistent=bool(row["persistent"]),
                    created_at=row["created_at"],
                    ended_at=row["ended_at"],
                    exec_count=row["exec_count"],
                    total_file_events=row["file_events"],
                    total_tool_calls=row["tool_calls"],
                    total_mcp_calls=row["mcp_calls"],
                    total_requests=row["requests"],
                    total_input_tokens=row["input_tokens"],
                    total_output_tokens=row["output_tokens"],
                    total_estimated_cost=row["estimated_cost"],
                    total_unpriced_calls=row["unpriced_calls"],
                )
                for row in rows[:SESSIONS_SHOWN]
            ],
            top_providers=[ProviderStats(**each._asdict()) for each in providers[:TOPS_SHOWN]],
            top_tools=[ToolStats(**each._asdict()) for each in tools[:TOPS_SHOWN]],
            top_mcp_tools=[],
        )

    # -- logs, and what is wrong

    async def host_logs(self, name: str, query: HostLogsQuery) -> str:
        """The end of one of the logs in the run directory; empty when there is none."""
        if name not in HOST_LOGS:
            raise InvalidInput(f"there is no log {name[:40]!r}", hint=f"one of: {', '.join(HOST_LOGS)}")
        path = self._fleet.layout.run_dir / f"{name}.log"
        text = await asyncio.to_thread(read_tail, path, min(query.max_bytes, LOG_BYTES))
        lines = text.splitlines(keepends=True)
        if query.grep:
            wanted = query.grep.casefold()
            lines = [line for line in lines if wanted in line.casefold()]
        if query.tail is not None:
            lines = lines[-query.tail :] if query.tail else []
        return "".join(lines)

    async def panics(self, query: PanicsQuery) -> PanicsResponse:
        """What nobody expected."""
        found = await self._look(self._since(query.since))
        return PanicsResponse(panics=found.panics[: min(query.limit, MOST_FINDINGS)])

    async def triage(self, query: TriageQuery) -> TriageResponse:
        """What went wrong lately, and what to look at first."""
        since, limit = self._since(query.since), min(query.limit, MOST_FINDINGS)
        vm = None if query.id is None else self._fleet.get(query.id)
        found = await self._look(since)
        session, failed = None, []
        if vm is not None:
            session = await self._session(vm, found, since, limit)
            failed = [(each.command, each.error or each.stderr_preview or "") for each in session.failed_commands]
        return TriageResponse(
            since=iso(since),
            session_id=query.id,
            host=HostTriage(panics=found.panics[:limit], errors=found.errors[:limit], slow_ops=found.slow_ops[:limit]),
            session=session,
            rank=findings.rank(found, failed)[:limit],
        )

    async def _session(self, vm: Vm, found: HostTriage, since: float, limit: int) -> SessionTriage:
        try:
            failed = await self._ledgers.ask(vm, lambda ledger: queries.failures(ledger, since=iso(since), limit=limit))
        except NotFound:  # it was never started
            failed = []
        assert vm.status is not None
        return SessionTriage(
            id=vm.id,
            status=vm.status,
            failed_commands=[
                FailedCommand(timestamp=at, command=command, exit_code=code, error=error, stderr_preview=stderr)
                for at, command, code, error, stderr in failed
            ],
            errors=[each for each in (*found.panics, *found.errors) if each.vm == vm.id][:limit],
            reason=vm.record.last_error or vm.reason,
            warning=vm.warning,
        )

    async def _look(self, since: float) -> HostTriage:
        run_dir = self._fleet.layout.run_dir
        sources = [Source(run_dir / f"{name}.log") for name in HOST_LOGS]
        places = [(vm.id, vm.session.path) for vm in self._fleet.known()]
        for vm_id, path in (*places, *((kept.name, kept) for kept in self._fleet.failed_sessions())):
            sources += (Source(path / "process.log", vm_id), Source(path / "serial.log", vm_id, console=True))
        return await asyncio.to_thread(findings.look, sources, since)


def _end_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except FileNotFoundError:
        return b""
