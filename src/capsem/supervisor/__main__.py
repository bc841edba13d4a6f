"""capsem-process: `--id ID --session-dir DIR`, so that it can be found; everything else comes on standard input."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from capsem import log as logs
from capsem.api.internal import BOUND, PROTOCOL, Bootstrap, Stop, speaks
from capsem.hypervisor.registry import make_driver
from capsem.model.errors import CapsemError, InvalidInput
from capsem.model.ids import check_name
from capsem.store.layout import Layout, SessionDir
from capsem.supervisor.supervisor import Names, Supervisor
from capsem.system.process import set_process_name
from capsem.system.real import real_system
from capsem.wire.frames import ProtocolError
from capsem.wire.messages import decode_message

SIGTERM_GRACE = 1.0  # seconds for the guest's processes: the service allows two in all

log = logging.getLogger("capsem_process")


def read_bootstrap() -> Bootstrap:
    """The parameters on standard input. Raises InvalidInput."""
    try:
        message = decode_message(sys.stdin.buffer.read(), {Bootstrap.tag: Bootstrap})
    except ProtocolError as error:
        raise InvalidInput(
            f"bad bootstrap on standard input: {error}", hint="capsem-service starts this program"
        ) from error
    assert isinstance(message, Bootstrap)
    if not speaks(message.protocol):
        raise InvalidInput(
            f"the service speaks protocol {message.protocol}, this supervisor {PROTOCOL}",
            hint="restart the service: its programs were upgraded",
        )
    return message


def announce_bound() -> None:
    """Tell the service that the socket is there, and let go of its pipe."""
    os.write(1, BOUND)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)


async def serve(vm_id: str, session_dir: Path, bootstrap: Bootstrap) -> int:
    """Supervise until the VM has ended; returns the exit status."""
    layout = Layout(Path(bootstrap.run_dir))
    names = Names(SessionDir(session_dir), layout, Path(bootstrap.socket), Path(bootstrap.ready_file))
    supervisor = Supervisor(
        real_system(), make_driver(bootstrap.hypervisor, layout.run_dir), names, bootstrap, announce_bound
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: supervisor.stop(Stop(grace=SIGTERM_GRACE)))
    log.info("supervising %s", vm_id)
    return await supervisor.run()


def main() -> int:
    """Entry point."""
    set_process_name("capsem-process")
    parser = argparse.ArgumentParser(
        prog="capsem-process", description="Supervises one running VM; started by capsem-service."
    )
    parser.add_argument("--id", required=True)
    parser.add_argument("--session-dir", required=True, type=Path)
    arguments = parser.parse_args()
    os.umask(0o077)
    os.chdir("/")
    try:
        check_name(arguments.id)
        bootstrap = read_bootstrap()
        logs.setup(os.environ)
        status = asyncio.run(serve(arguments.id, arguments.session_dir, bootstrap))
        # The VM has ended and its record says so; taking the interpreter apart would add a third to the time of a delete.
        logging.shutdown()
        os._exit(status)
    except CapsemError as error:
        logging.getLogger("capsem_process").error("%s", error)
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
