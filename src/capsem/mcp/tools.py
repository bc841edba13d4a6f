"""Every tool, once: its name, the operation of the service behind it, its parameters, and what a model is told of it.

A tool says what it is called and read as; what it does is the operation's. So its row holds names of `api.operations`
and keys of `api.types`, and `translate` does the rest. A description is written for a model that has never seen Capsem,
and pays for every word of it in every conversation: when to use it, what it costs, what comes back, an example.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple

ID: Final = "{id}"  # where a parameter goes that stands in the path
HERE: Final = ""  # one that is used on this side, on the answer

VERSION: Final = "capsem_version"
INSPECT_SCHEMA: Final = "capsem_inspect_schema"
JOB_OUTPUT: Final = "capsem_job_output"
ASKS: Final = "capsem_network_asks"

INSTRUCTIONS: Final = """\
Capsem gives you Linux machines (Debian 13 VMs) of your own. You are root in them; nothing you do there touches the host.

- capsem_create makes one; give it a `name` and it keeps its disk. capsem_exec runs bash in it, home is /root.
- What a VM reaches of the internet, its owner allows. A denied request says by which rule; another way round is useless.
  git, curl, python3 are there.
- capsem_suspend keeps a VM with all its running processes and frees memory and CPU; capsem_resume continues it.
- Before something risky: capsem_checkpoint; if it went wrong: capsem_rollback. To try several ways: capsem_fork with live.
- Commands that take minutes: capsem_exec with background, then capsem_job_output.

An error begins with a number as of HTTP (404: no such VM, or not running) and ends with a hint in brackets. Hints speak
of the command line: `capsem resume dev` is capsem_resume."""


class Effect(Enum):
    """What a tool does to what is there; a client may ask its user before it lets one destroy."""

    READ = "read"
    CHANGE = "change"
    DESTROY = "destroy"


READ, CHANGE, DESTROY = Effect.READ, Effect.CHANGE, Effect.DESTROY


class Param(NamedTuple):
    """One parameter. `key` is its name in the request, ID or HERE; its own unless given."""

    name: str
    kind: str  # of JSON Schema
    says: str = ""
    key: str | None = None
    required: bool = False
    default: Any = None

    @property
    def goes_to(self) -> str:
        """The key."""
        return self.name if self.key is None else self.key


class Tool(NamedTuple):
    """One row; `fixed` are keys of the request that the caller has no say in. `structured`: its output has a schema."""

    name: str
    operation: str
    says: str
    params: tuple[Param, ...] = ()
    effect: Effect = CHANGE
    core: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    structured: bool = False


def _vm(says: str = "") -> Param:
    return Param("id", "string", says, key=ID, required=True)


GREP: Final = Param("grep", "string", "only lines that hold this, whatever the case", key=HERE)
TAIL: Final = Param("tail", "integer", "only the last N lines (after grep)", key=HERE)
MAX_OUTPUT: Final = Param("maxOutput", "integer", "characters of each output to return", key=HERE, default=60_000)
ENV: Final = Param("env", "object", 'environment variables, {"KEY": "value"}')
SINCE: Final = Param("since", "string", "how far back: 30m, 1h, 7d, or a time as RFC 3339")
LIMIT: Final = Param("limit", "integer", "default 20, at most 200")
CHECKPOINT: Final = Param("checkpoint", "string", "its id, or the first digits of it", required=True)

_TABLE: Final = (
    Tool(
        "capsem_create",
        "provision",
        "Create a VM and boot it; takes seconds to half a minute. With a name it is persistent: its disk lasts until "
        "capsem_delete. Without one it is temporary: gone when stopped. Returns {id}, which all other tools take. "
        'Example: {"name": "dev", "ramMb": 2048, "cpuCount": 2}',
        (
            Param("name", "string", "1-64 letters, digits, - or _; leave out for a temporary VM"),
            Param("ramMb", "integer", "256 to 16384, default 4096", key="ram_mb"),
            Param("cpuCount", "integer", "1 to 8, default 4", key="cpus"),
            Param("version", "string", "taken, and without effect: there is one image"),
            ENV,
            Param("from", "string", "name of a persistent VM whose disk is copied"),
            Param(
                "secrets", "string", "names, with commas, of keys that it may use and never sees; see capsem_secrets"
            ),
            Param(
                "network", "string", "what it may reach: off, high, medium, open-with-floor; leave out for the default"
            ),
        ),
        core=True,
        structured=True,
    ),
    Tool(
        "capsem_list",
        "list",
        "List all VMs with status (Running, Stopped, Suspended, Defunct), memory, and what can be done with each "
        "(available_actions). Cheap. Look here first: VMs outlive conversations.",
        effect=READ,
        core=True,
    ),
    Tool(
        "capsem_info",
        "info",
        "Everything about one VM: status, resources, size on disk, why it is as it is (reason, last_error, warning).",
        (_vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_exec",
        "exec",
        "Run a command with bash in a running VM, as root, in /root. Returns {stdout, stderr, exit_code}; a non-zero "
        "exit_code is a result, not an error. Each call is a new shell: cd and exports do not carry over, files do. "
        "Standard input is empty. A command that outlives the timeout is killed; for a server or a long build set "
        'background: returns {job} at once. Example: {"id": "dev", "command": "cd app && python3 -m unittest"}',
        (
            _vm("VM, as capsem_list shows it"),
            Param("command", "string", "a bash script, of several lines if need be", required=True),
            Param("timeout", "number", "seconds, default 30; no limit in the background", key="timeout_secs"),
            Param("background", "boolean", "return a job id at once; see capsem_job_output", key=HERE),
            Param("cwd", "string", "directory, default /root"),
            ENV,
            MAX_OUTPUT,
        ),
        core=True,
        structured=True,
    ),
    Tool(
        "capsem_run",
        "run",
        "Run one command in a fresh VM that is destroyed afterwards: for a single untrusted snippet. Costs a boot each "
        "time; for more than one command create a VM. Returns what capsem_exec does. "
        'Example: {"command": "python3 -c \'print(6*7)\'"}',
        (
            Param("command", "string", required=True),
            Param("timeout", "number", "seconds", key="timeout_secs", default=60),
            ENV,
            MAX_OUTPUT,
        ),
        core=True,
        structured=True,
    ),
    Tool(
        JOB_OUTPUT,
        "exec",
        "What a background command has written so far, and whether it still runs: {stdout, stderr, exit_code, running}. "
        "While running is true, exit_code means nothing. `wait` saves polling. Jobs survive suspend and resume. "
        'Example: {"id": "dev", "job": "5f3a9c0d", "wait": 20, "tail": 40}',
        (
            _vm(),
            Param("job", "string", "as capsem_exec or capsem_jobs gave it", required=True),
            Param("wait", "number", "seconds to wait for its end first", key=HERE, default=0),
            TAIL,
            MAX_OUTPUT,
        ),
        effect=READ,
        core=True,
        fixed=(("offsets", {"stdout": 0, "stderr": 0}), ("keep", True)),
        structured=True,
    ),
    Tool(
        "capsem_jobs",
        "jobs",
        "The commands of a running VM, oldest first: those that run and those that ended lately, with job ids.",
        (_vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_job_kill",
        "kill_job",
        "End a background command and all its processes. capsem_job_output still has what it wrote.",
        (
            _vm(),
            Param("job", "string", required=True),
            Param("signal", "integer", "15 asks it to end; default 9, which does not"),
        ),
        effect=DESTROY,
        core=True,
    ),
    Tool(
        "capsem_read_file",
        "read_file",
        "Read a text file under /root in a VM, at most 256 KiB, running or not: {content}. For parts of a large file "
        "give startLine and lines, or use capsem_exec with sed. Example: "
        '{"id": "dev", "path": "/root/app/main.py"}',
        (
            _vm(),
            Param("path", "string", required=True),
            Param("startLine", "integer", "first line to return, from 1", key=HERE),
            Param("lines", "integer", "how many lines", key=HERE),
        ),
        effect=READ,
        core=True,
        structured=True,
    ),
    Tool(
        "capsem_write_file",
        "write_file",
        "Create or replace a text file under /root in a running VM, at most 256 KiB; directories are made, and it is on "
        'disk when this returns. Example: {"id": "dev", "path": "/root/app/main.py", "content": "print(1)\\n"}',
        (_vm(), Param("path", "string", required=True), Param("content", "string", required=True)),
        core=True,
    ),
    Tool(
        "capsem_list_files",
        "list_files",
        "List a directory of a VM's /root: {entries: [{name, path, type, size, mtime}]}. Works on stopped VMs too.",
        (
            _vm(),
            Param("path", "string", 'relative to /root, default "" is all of it'),
            Param("depth", "integer", "levels, 1 (default) to 6"),
        ),
        effect=READ,
    ),
    Tool(
        "capsem_stop",
        "stop",
        "Shut a VM down. Processes end; a persistent VM keeps its disk (capsem_resume boots it again), a temporary one "
        "is DESTROYED. To go on where you are later, use capsem_suspend.",
        (_vm(),),
        effect=DESTROY,
    ),
    Tool(
        "capsem_suspend",
        "suspend",
        "Save a persistent VM, memory and running processes included, and free what it used of the host. Takes a few "
        "seconds. capsem_resume continues every process. A temporary VM needs capsem_persist first.",
        (_vm(),),
        core=True,
    ),
    Tool(
        "capsem_resume",
        "resume",
        "Start a VM that does not run: a suspended one goes on within a second or so where it was, a stopped or Defunct "
        "one boots. Harmless if it runs already. boot_kind says what happened (warm, cold).",
        (Param("name", "string", "the VM's id", key=ID, required=True),),
        core=True,
        structured=True,
    ),
    Tool(
        "capsem_delete",
        "delete",
        "Destroy a VM, its disk and its checkpoints for good, in any status. Forks of it live on.",
        (_vm(),),
        effect=DESTROY,
        core=True,
    ),
    Tool(
        "capsem_persist",
        "persist",
        "Turn a running temporary VM into a persistent one called `name`, which is its id from then on. No reboot.",
        (_vm(), Param("name", "string", required=True)),
        structured=True,
    ),
    Tool(
        "capsem_purge",
        "purge",
        "Destroy all temporary VMs; with all=true EVERY VM of this user, persistent ones and their data too.",
        (Param("all", "boolean", default=False),),
        effect=DESTROY,
    ),
    Tool(
        "capsem_fork",
        "fork",
        "Copy a VM; the source is left as it is. By default the copy is Stopped and has the disk alone. With live=true "
        "it runs, with memory and processes as they are this instant; count=3 makes three, called name-1 to name-3, to "
        'try things side by side. Disk is shared, so it is cheap. Example: {"id": "dev", "name": "try", "live": true}',
        (
            _vm("the source"),
            Param("name", "string", "of the copy", required=True),
            Param("description", "string"),
            Param("live", "boolean", "with its memory, and running"),
            Param("count", "integer", "how many live copies, at most 64"),
            Param("at", "string", "a checkpoint of the source, instead of now", key="checkpoint"),
            Param(
                "inheritSecrets",
                "boolean",
                "lend it what its source was lent; nothing otherwise",
                key="inherit_secrets",
            ),
        ),
        core=True,
        structured=True,
    ),
    Tool(
        "capsem_checkpoint",
        "checkpoint",
        "Save a running persistent VM, disk and memory, as a point to come back to with capsem_rollback; it goes on, "
        "after a pause of some ten milliseconds. Costs disk, up to the VM's memory each. Returns {id}. "
        'Example: {"id": "dev", "message": "tests pass"}',
        (_vm(), Param("message", "string", "what is special about this instant")),
        structured=True,
    ),
    Tool(
        "capsem_checkpoints",
        "checkpoints",
        "The checkpoints of a VM, oldest first, with ids, messages and sizes.",
        (_vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_rollback",
        "rollback",
        "Take a VM back to one of its checkpoints: disk, memory and processes are as they were then. The present is "
        "kept as another checkpoint (`saved`), unless save=false.",
        (_vm(), CHECKPOINT, Param("save", "boolean", "keep the present, default true")),
        effect=DESTROY,
        structured=True,
    ),
    Tool(
        "capsem_checkpoint_remove",
        "remove_checkpoint",
        "Remove a checkpoint and free its disk. VMs that were forked from it are not touched.",
        (_vm(), CHECKPOINT),
        effect=DESTROY,
    ),
    Tool(
        "capsem_network",
        "network",
        "What a VM may reach: its preset, all rules that hold (strongest first), its own policy as TOML.",
        (_vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_network_set",
        "set_network",
        "Give a VM another preset (off, high, medium, open-with-floor) or policy of its own (TOML, [[network.rule]]). "
        "Opens or closes the internet for it: for its owner to decide.",
        (_vm(), Param("preset", "string"), Param("policy", "string", "a policy file's text")),
        effect=DESTROY,
    ),
    Tool(
        "capsem_network_allow",
        "network_allow",
        "Let a VM reach a host: for its owner to decide, so ask first. Web ports unless host:port; tcp for what is not "
        'HTTP. Or answer one of capsem_network_asks. Example: {"id": "dev", "host": "api.example.com", "seconds": 3600}',
        (
            _vm(),
            Param("host", "string", "a name, *.domain or an address"),
            Param("ask", "string", "instead of host: what waits, for once"),
            Param("seconds", "number", "for so long; otherwise for good", key="for_secs"),
            Param("tcp", "boolean"),
        ),
        effect=DESTROY,
    ),
    Tool(
        "capsem_network_deny",
        "network_deny",
        "Keep a VM from a host, whatever else allows it, or refuse what waits.",
        (_vm(), Param("host", "string"), Param("ask", "string", "instead of host: what waits, for once")),
    ),
    Tool(
        "capsem_network_check",
        "network_check",
        "Whether a URL would be allowed, by which rule, and what would allow it. Sends nothing.",
        (
            Param("url", "string", "tcp://host:port for what is not HTTP", required=True),
            Param("id", "string", "for this VM, else for a new one"),
            Param("method", "string", "default GET"),
        ),
        effect=READ,
    ),
    Tool(
        "capsem_network_log",
        "network_log",
        "What a VM reached and was kept from, newest last, with the rule that decided: {events, last}.",
        (
            _vm(),
            SINCE,
            Param("limit", "integer", "default 100"),
            Param("decision", "string", "allowed, denied, error or interrupted alone"),
            Param("after", "integer", "what came after that `last`"),
        ),
        effect=READ,
    ),
    Tool(
        ASKS,
        "network_asks",
        "Requests of VMs that a rule wants their owner asked about: {asks}. From the first call on they wait up to a minute "
        "each for capsem_network_allow or capsem_network_deny; before, they are denied at once.",
        (Param("wait", "number", "seconds to wait for one", key=HERE, default=0),),
        effect=READ,
    ),
    Tool(
        "capsem_network_learn",
        "network_learn",
        "Learn a policy. action start: let through and record what no rule denies (owner's decision). stop: end that; gives "
        "{policy}, TOML that lets the same pass. denials: the policy that would have allowed what was denied.",
        (_vm(), Param("action", "string", "start, stop, show or denials", required=True), Param("paths", "boolean")),
        effect=DESTROY,
    ),
    Tool(
        "capsem_vm_logs",
        "logs",
        "A VM's console (logs, serial_logs) and the log of its supervisor (process_logs); also of one that crashed. "
        "For when a VM does not start or died; what commands wrote is in their results.",
        (_vm(), GREP, TAIL),
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
            _vm(),
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
        (_vm("or _main: the index of all VMs"), Param("sql", "string", required=True)),
        effect=READ,
    ),
    Tool(
        "capsem_secrets",
        "secrets",
        "The keys that VMs may be lent: name, hosts they work for, and the variable (env) that holds a placeholder in the VM. "
        "The proxy puts the key in on its way to those hosts alone; nobody in a VM, nor you, can see it. Only the user can add "
        "one (`capsem secret set`). capsem_create takes names.",
        effect=READ,
    ),
    Tool(
        VERSION,
        "version",
        "Versions, and whether the service answers: {mcp_version, service}.",
        effect=READ,
    ),
    Tool(
        "capsem_mcp_servers",
        "mcp_servers",
        "MCP servers whose tools programs inside VMs may call; often none.",
        effect=READ,
    ),
    Tool(
        "capsem_mcp_tools",
        "mcp_tools",
        "The tools of those servers.",
        (Param("server", "string", "of this server alone", key=HERE),),
        effect=READ,
    ),
    Tool(
        "capsem_mcp_call",
        "call_tool",
        "Call one of those tools by its namespaced name, through a running VM.",
        (
            Param("name", "string", "server__tool", key=ID, required=True),
            Param("arguments", "object", "what the tool takes", default={}),
        ),
    ),
)

TOOLS: Final = {tool.name: tool for tool in _TABLE}
TOOLSETS: Final = {
    "all": tuple(TOOLS.values()),
    "core": tuple(tool for tool in TOOLS.values() if tool.core),
}
