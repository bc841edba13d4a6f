"""Starts the guest agent: `python3 -I -S -m capsem.guest` in the guest, with other options as a plain process in tests.

--fd N          speak over this descriptor, which is a socket, instead of the virtio port
--workspace DIR commands begin here and files are confined to it (default /root)
--memory DIR    what must survive the agent's death (default /run/capsem/agent)
--bystander     leave clock, host name and power of this machine alone
--ports FILE    with that: listen for connections, and write into this file at which ports
"""

from __future__ import annotations

import os
import sys

from capsem.guest.agent import Agent
from capsem.guest.memory import Memory
from capsem.guest.port import find_port
from capsem.guest.system import Bystander, Machine


def main(arguments: list[str]) -> int:
    """Run the agent; returns its exit status (system.POWER_OFF_STATUS: switch the machine off)."""
    options = {"--fd": "", "--workspace": "/root", "--memory": "/run/capsem/agent", "--ports": ""}
    bystander = False
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name == "--bystander":
            bystander = True
        elif name in options and rest:
            options[name] = rest.pop(0)
        else:
            sys.stderr.write(f"capsem-agent: bad option {name}\n{__doc__}")
            return 2
    if options["--fd"]:
        fd = int(options["--fd"])
        os.set_inheritable(fd, False)
    else:
        fd = os.open(find_port(), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    agent = Agent(
        fd,
        workspace=options["--workspace"],
        memory=Memory(options["--memory"]),
        system=Bystander(options["--ports"]) if bystander else Machine(),
        ends=bool(options["--fd"]),
    )
    return agent.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
