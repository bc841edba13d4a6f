"""Every tool, by name and by set, in the order in which clients list them; and what a model is told of all of them."""

from __future__ import annotations

from typing import Final

from capsem.mcp.host_tools import HOST_TOOLS
from capsem.mcp.network_tools import NETWORK_TOOLS
from capsem.mcp.record_tools import RECORD_TOOLS
from capsem.mcp.vm_tools import VM_TOOLS

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

TOOLS: Final = {tool.name: tool for tool in (*VM_TOOLS, *NETWORK_TOOLS, *RECORD_TOOLS, *HOST_TOOLS)}
TOOLSETS: Final = {
    "all": tuple(TOOLS.values()),
    "core": tuple(tool for tool in TOOLS.values() if tool.core),
}
