"""Tools for what happened: logs, failures, and the record of what a VM did. See `tool`."""

from __future__ import annotations

from typing import Final

from capsem.mcp.tool import HERE, ID, READ, SINCE, TAIL, Param, Tool, vm

INSPECT_SCHEMA: Final = "capsem_inspect_schema"

GREP: Final = Param("grep", "string", "only lines that hold this, whatever the case", key=HERE)
LIMIT: Final = Param("limit", "integer", "default 20, at most 200")

RECORD_TOOLS: Final = (
    Tool(
        "capsem_vm_logs",
        "logs",
        "A VM's console (logs, serial_logs) and the log of its supervisor (process_logs); also of one that crashed. "
        "For when a VM does not start or died; what commands wrote is in their results.",
        (vm(), GREP, TAIL),
        effect=READ,
    ),
    Tool(
        "capsem_service_logs",
        "service_logs",
        "The end of the service's own log, JSON lines: for failures of Capsem itself.",
        (GREP, TAIL),
        effect=READ,
    ),
    Tool(
        "capsem_host_logs",
        "host_logs",
        "The end of a log of Capsem on the host, as it is.",
        (
            Param("name", "string", "service, mcp, gateway, tray or app", key=ID, required=True),
            GREP._replace(key=None),
            TAIL._replace(key=None),
            Param("maxBytes", "integer", "at most 5 MiB, default 100 KB", key="max_bytes"),
        ),
        effect=READ,
    ),
    Tool(
        "capsem_triage",
        "triage",
        "What went wrong lately on the host, and in one VM if you give its id, with what to look at first (rank). Start "
        "here when something fails for no reason that you can see.",
        (SINCE, LIMIT, Param("id", "string", "this VM, too")),
        effect=READ,
    ),
    Tool(
        "capsem_panics",
        "panics",
        "Crashes of Capsem's own programs and of guest kernels, with known causes where there are any.",
        (SINCE, LIMIT),
        effect=READ,
    ),
    Tool(
        "capsem_timeline",
        "timeline",
        "What happened in a VM, oldest first, as {columns, rows}: commands, files, and starts and stops with layers "
        'lifecycle. Works on stopped VMs. Example: {"id": "dev", "since": "1h", "layers": "exec,lifecycle"}',
        (
            vm(),
            Param("traceId", "string", "only what belongs to this trace", key="trace_id"),
            SINCE,
            Param("limit", "integer", "newest events, default 200, at most 2000"),
            Param("layers", "string", "of exec, mcp, net, fs, model, lifecycle, with commas"),
        ),
        effect=READ,
    ),
    Tool(
        INSPECT_SCHEMA,
        "inspect",
        "The CREATE TABLE statements of what capsem_inspect reads, as text.",
        effect=READ,
    ),
    Tool(
        "capsem_inspect",
        "inspect",
        "One SELECT (SQLite) on the record of what a running VM did: {columns, rows}. Add LIMIT. "
        'Example: {"id": "dev", "sql": "SELECT command, exit_code FROM exec_events ORDER BY id DESC LIMIT 5"}',
        (vm("or _main: the index of all VMs"), Param("sql", "string", required=True)),
        effect=READ,
    ),
)
