"""`capsem forward`: ports of this computer that lead to ports in a VM."""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import click

from capsem.cli.context import SESSION, Context
from capsem.client.forward import Forwarding
from capsem.model.errors import CapsemError, InvalidInput


class Ports(NamedTuple):
    """Where to listen, and the port in the VM."""

    host: str
    port: int
    guest_port: int


def parse_ports(text: str) -> Ports:
    """[HOST:]PORT[:GUESTPORT]; PORT 0 chooses one. Raises InvalidInput."""
    *host, last = text.split(":")
    numbers = [last]
    if host and host[-1].isdecimal():
        numbers.insert(0, host.pop())
    elif len(host) > 1 or (host and not host[0]):
        numbers = []
    ports = [int(number) for number in numbers if number.isascii() and number.isdecimal() and int(number) < 65536]
    if len(host) > 1 or len(ports) != len(numbers) or not ports or not ports[-1]:
        raise InvalidInput(f"bad ports {text[:80]!r}", hint="[HOST:]PORT[:GUESTPORT], such as 8080 or 8080:80")
    return Ports(host[0] if host else "127.0.0.1", ports[0], ports[-1])


@click.command(
    "forward",
    epilog="\b\nExamples:\n  capsem forward box 8000\n  capsem forward box 8080:80 127.0.0.1:5433:5432",
)
@click.argument("session", type=SESSION)
@click.argument("ports", nargs=-1, required=True, metavar="[HOST:]PORT[:GUESTPORT]...")
@click.pass_obj
def forward_command(obj: Context, session: str, ports: tuple[str, ...]) -> None:
    """Let ports of this computer lead to ports in a VM, until Ctrl-C.

    HOST is where to listen, 127.0.0.1 unless given; anything else opens the VM's port to whoever reaches that address.
    After a suspend and a resume, new connections get through again.
    """
    wanted = [parse_ports(text) for text in ports]
    client = obj.client()
    client.call("info", vm_id=session)  # no listener for a VM that there is not

    def failed(error: CapsemError) -> None:
        click.echo(f"note: {error}", err=True)

    with contextlib.ExitStack() as stack:
        for host, port, guest_port in wanted:
            forwarding = Forwarding(client, session, guest_port, host=host, port=port, failed=failed)
            stack.enter_context(forwarding).start()
            click.echo(f"{forwarding.address[0]}:{forwarding.address[1]} -> {session}:{guest_port}")
        threading.Event().wait()
