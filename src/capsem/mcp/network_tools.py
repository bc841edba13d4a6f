"""Tools for what a VM may reach. See `tool`."""

from __future__ import annotations

from typing import Final

from capsem.mcp.tool import DESTROY, HERE, READ, SINCE, Param, Tool, vm

ASKS: Final = "capsem_network_asks"

NETWORK_TOOLS: Final = (
    Tool(
        "capsem_network",
        "network",
        "What a VM may reach: its preset, all rules that hold (strongest first), its own policy as TOML.",
        (vm(),),
        effect=READ,
    ),
    Tool(
        "capsem_network_set",
        "set_network",
        "Give a VM another preset (off, high, medium, open-with-floor) or policy of its own (TOML, [[network.rule]]). "
        "Opens or closes the internet for it: for its owner to decide.",
        (vm(), Param("preset", "string"), Param("policy", "string", "a policy file's text")),
        effect=DESTROY,
    ),
    Tool(
        "capsem_network_allow",
        "network_allow",
        "Let a VM reach a host: for its owner to decide, so ask first. Web ports unless host:port; tcp for what is not "
        'HTTP. Or answer one of capsem_network_asks. Example: {"id": "dev", "host": "api.example.com", "seconds": 3600}',
        (
            vm(),
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
        (vm(), Param("host", "string"), Param("ask", "string", "instead of host: what waits, for once")),
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
            vm(),
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
        (vm(), Param("action", "string", "start, stop, show or denials", required=True), Param("paths", "boolean")),
        effect=DESTROY,
    ),
)
