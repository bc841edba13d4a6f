"""capsem-process: `--id ID --session-dir DIR`, so that it can be found; everything else comes on standard input.

A service also keeps a spare one, `--spare`: everything that a start needs is imported, which takes longer than all the
rest of a start, and it waits for its standard input to tell what VM it is to supervise. Then it shows the arguments that
it would have had, and logs where it would have logged. One that is told nothing ends with its service.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from capsem import config, faults, tracing
from capsem import log as logs
from capsem.api.internal import BOUND, PROTOCOL, Bootstrap, Stop, speaks
from capsem.egress import authority
from capsem.hypervisor import registry
from capsem.model.errors import CapsemError, InvalidInput, host_failed
from capsem.model.ids import check_name
from capsem.store.layout import Layout, SessionDir
from capsem.supervisor.outlet import Outside
from capsem.supervisor.owned import Names
from capsem.supervisor.supervisor import Supervisor
from capsem.system import System
from capsem.system.process import command_line, set_command_line, set_process_name
from capsem.system.real import real_system
from capsem.wire.frames import ProtocolError
from capsem.wire.schema import decode_message

if TYPE_CHECKING:
    from capsem.supervisor.carrying import Carrying

SIGTERM_GRACE = 1.0  # seconds for the guest's processes: the service allows two in all
SIGTERM_WAIT = 0.5  # and for the gate
DESCRIPTORS = 2048  # open files, for 512 streams of a guest and what they lead to

log = logging.getLogger("capsem_process")


def read_bootstrap(data: bytes) -> Bootstrap:
    """The parameters that came on standard input. Raises InvalidInput."""
    try:
        message = decode_message(data, {Bootstrap.tag: Bootstrap})
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


def show(vm_id: str, session_dir: Path) -> None:
    """Be, to whoever looks, the supervisor that was started for this VM; where there is no room for that, stay as it is."""
    program = command_line()
    options = next(place for place, word in enumerate(program) if word in (b"--spare", b"--id"))
    set_command_line([*program[:options], b"--id", vm_id.encode(), b"--session-dir", os.fsencode(session_dir)])


def stand_in(vm_id: str, session_dir: Path) -> None:
    """For a spare: be the supervisor that was started for this VM, and log where it would have logged."""
    show(vm_id, session_dir)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(SessionDir(session_dir).process_log, flags, 0o600)
    os.dup2(fd, 2)
    os.close(fd)


def _trace(file: str, vm_id: str, *, spare: bool) -> None:
    """Tell what is done here from the beginning, which for a spare was long ago."""
    trace = tracing.to_file(file, f"capsem-process {vm_id}")
    if not spare:
        trace.add("start the program, import", tracing.process_began(), tracing.now())
    tracing.follow(trace)


def outside(system: System) -> Outside | None:
    """This host, for connections of guests; None, with the reason in the log, when they cannot be carried."""
    home = config.Paths.from_environment(os.environ).home
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < DESCRIPTORS:
        few = hard != resource.RLIM_INFINITY and hard < DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if few else DESCRIPTORS, hard))
        if few:
            log.warning("this host allows %d open files, %d would be enough for any VM", hard, DESCRIPTORS)
    try:
        content = _authority(home, system.clock.time())
        certificate = authority.certificate(home / authority.FILE, content)
    except (authority.AuthorityError, OSError) as error:
        log.error("VMs have no network: %s", error)
        return None

    def carrying() -> Carrying:
        from capsem.supervisor.carrying import of_host

        return of_host(home, content, system.clock)

    return Outside(certificate, carrying)


def _authority(home: Path, now: float) -> bytes:
    """What is in the authority's file, which is made if there is none. Raises AuthorityError, OSError."""
    path = home / authority.FILE
    try:
        return path.read_bytes()
    except FileNotFoundError:
        from capsem.egress.mint import open_authority  # see supervisor.carrying

        open_authority(home, now, platform.node())
        return path.read_bytes()


async def serve(vm_id: str, session_dir: Path, bootstrap: Bootstrap) -> int:
    """Supervise until the VM has ended; returns the exit status."""
    layout = Layout(Path(bootstrap.run_dir))
    names = Names(SessionDir(session_dir), layout, Path(bootstrap.socket), Path(bootstrap.ready_file))
    system = real_system()
    driver = registry.make_driver(bootstrap.hypervisor, layout.run_dir, system, os.environ)
    supervisor = Supervisor(
        system,
        driver,
        names,
        bootstrap,
        announce_bound,
        lambda now: show(now.session.path.name, now.session.path),
        outside(system),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: supervisor.stop(Stop(grace=SIGTERM_GRACE, wait=SIGTERM_WAIT)))
    log.info("supervising %s", vm_id)
    return await supervisor.run()


def main() -> int:
    """Entry point."""
    set_process_name("capsem-process")
    parser = argparse.ArgumentParser(
        prog="capsem-process", description="Supervises one running VM; started by capsem-service."
    )
    parser.add_argument("--id")
    parser.add_argument("--session-dir", type=Path)
    parser.add_argument("--spare", metavar="ROOM", help="wait to be told which VM")
    parser.add_argument("--hypervisor", default="qemu", help="whose driver a spare has imported by then")
    arguments = parser.parse_args()
    if arguments.spare is None and None in (arguments.id, arguments.session_dir):
        parser.error("--id and --session-dir are needed")
    os.umask(0o077)
    os.chdir("/")
    try:
        if arguments.spare is not None:
            registry.load(arguments.hypervisor)
        data = sys.stdin.buffer.read()
        if arguments.spare is not None and not data:
            return 0
        bootstrap = read_bootstrap(data)
        vm_id, session_dir = arguments.id or bootstrap.vm_id, arguments.session_dir or Path(bootstrap.session_dir)
        check_name(vm_id)
        if arguments.spare is not None:
            stand_in(vm_id, session_dir)
        logs.setup(os.environ)
        faults.load(bootstrap.faults)
        if bootstrap.trace:
            _trace(bootstrap.trace, vm_id, spare=arguments.spare is not None)
        status = asyncio.run(serve(vm_id, session_dir, bootstrap))
        # The VM has ended and its record says so; taking the interpreter apart would add a third to the time of a delete.
        logging.shutdown()
        os._exit(status)
    except (CapsemError, OSError) as caught:
        error = caught if isinstance(caught, CapsemError) else host_failed("the VM cannot be supervised", caught)
        logging.getLogger("capsem_process").error("%s", error)
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
