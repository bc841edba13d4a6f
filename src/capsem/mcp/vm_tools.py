"""Tools for VMs: their lives, commands, files, forks and checkpoints. See `tool`."""

from __future__ import annotations

from typing import Final

from capsem.mcp.tool import DESTROY, HERE, ID, READ, TAIL, Param, Tool, vm

JOB_OUTPUT: Final = "capsem_job_output"

MAX_OUTPUT: Final = Param("maxOutput", "integer", "characters of each output to return", key=HERE, default=60_000)
ENV: Final = Param("env", "object", 'environment variables, {"KEY": "value"}')
CHECKPOINT: Final = Param("checkpoint", "string", "its id, or the first digits of it", required=True)

VM_TOOLS: Final = (
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
        (vm(),),
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
            vm("VM, as capsem_list shows it"),
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
            vm(),
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
        (vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_job_kill",
        "kill_job",
        "End a background command and all its processes. capsem_job_output still has what it wrote.",
        (
            vm(),
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
            vm(),
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
        (vm(), Param("path", "string", required=True), Param("content", "string", required=True)),
        core=True,
    ),
    Tool(
        "capsem_list_files",
        "list_files",
        "List a directory of a VM's /root: {entries: [{name, path, type, size, mtime}]}. Works on stopped VMs too.",
        (
            vm(),
            Param("path", "string", 'relative to /root, default "" is all of it'),
            Param("depth", "integer", "levels, 1 (default) to 6"),
        ),
        fixed=(("exact", True),),
        effect=READ,
    ),
    Tool(
        "capsem_stop",
        "stop",
        "Shut a VM down. Processes end; a persistent VM keeps its disk (capsem_resume boots it again), a temporary one "
        "is DESTROYED. To go on where you are later, use capsem_suspend.",
        (vm(),),
        effect=DESTROY,
    ),
    Tool(
        "capsem_suspend",
        "suspend",
        "Save a persistent VM, memory and running processes included, and free what it used of the host. Takes a few "
        "seconds. capsem_resume continues every process. A temporary VM needs capsem_persist first.",
        (vm(),),
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
        (vm(),),
        effect=DESTROY,
        core=True,
    ),
    Tool(
        "capsem_persist",
        "persist",
        "Turn a running temporary VM into a persistent one called `name`, which is its id from then on. No reboot.",
        (vm(), Param("name", "string", required=True)),
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
            vm("the source"),
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
        (vm(), Param("message", "string", "what is special about this instant")),
        structured=True,
    ),
    Tool(
        "capsem_checkpoints",
        "checkpoints",
        "The checkpoints of a VM, oldest first, with ids, messages and sizes.",
        (vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_rollback",
        "rollback",
        "Take a VM back to one of its checkpoints: disk, memory and processes are as they were then. The present is "
        "kept as another checkpoint (`saved`), unless save=false.",
        (vm(), CHECKPOINT, Param("save", "boolean", "keep the present, default true")),
        effect=DESTROY,
        structured=True,
    ),
    Tool(
        "capsem_checkpoint_remove",
        "remove_checkpoint",
        "Remove a checkpoint and free its disk. VMs that were forked from it are not touched.",
        (vm(), CHECKPOINT),
        effect=DESTROY,
    ),
)
