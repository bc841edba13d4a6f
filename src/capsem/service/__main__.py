"""capsem-service: one daemon per user. Start-up and shutdown as interface.md 1.2 has them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from capsem import __version__, config, faults
from capsem import log as logs
from capsem.config import Paths, Settings
from capsem.hypervisor.registry import make_driver
from capsem.image.catalog import Catalog
from capsem.model.errors import CapsemError, HostNotReady
from capsem.service.app import build_app
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import Gate
from capsem.service.handlers import Handlers
from capsem.service.launch import Launcher, find_process_binary, passed_on
from capsem.service.ledgers import Ledgers
from capsem.service.protocol import Protocol
from capsem.service.spares import Spares
from capsem.service.streamed import unexpected
from capsem.service.timers import Timers
from capsem.store import durable
from capsem.store.gate import default_path
from capsem.store.layout import LONGEST_SOCKET, Layout
from capsem.store.locks import Lock, try_lock
from capsem.system.process import set_process_name
from capsem.system.real import real_system
from capsem.system.unix import bind_private

PROBE_LIMIT = 0.5  # seconds
START_LOCK_LIMIT = 30.0  # seconds
LOCK_TURN = 0.05
PARENT_TURN = 0.1
DRAIN_LIMIT = 1.0  # seconds for requests under way when the service stops

log = logging.getLogger("capsem_service")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of the contract."""
    parser = argparse.ArgumentParser(
        prog="capsem-service", description="Runs virtual machines for the user who started it."
    )
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground (it always does)")
    parser.add_argument("--uds-path", type=Path, help="socket to bind (default: service.sock in the run directory)")
    parser.add_argument("--process-binary", type=Path, help="the capsem-process program")
    parser.add_argument("--gateway-binary", type=Path, help="accepted for compatibility; there is no gateway yet")
    parser.add_argument("--gateway-port", type=int, help="accepted for compatibility")
    parser.add_argument("--tray-binary", type=Path, help="accepted and ignored")
    parser.add_argument("--assets-dir", type=Path, help="directory of guest images")
    parser.add_argument("--parent-pid", type=int, help="end as soon as this process is no longer our parent")
    parser.add_argument("--version", action="version", version=f"capsem-service {__version__}")
    return parser.parse_args(argv)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PROBE_LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PROBE_LIMIT)
        self.sock.connect(str(self._path))


def running_version(path: Path) -> str | None:
    """The version of the service that answers on a socket, None when nobody does within half a second."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/version")
        return str(json.loads(connection.getresponse().read())["version"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()


async def claim_place(path: Path, layout: Layout) -> tuple[socket.socket, Lock] | int:
    """The listening socket and the run directory's lock, or an exit status when another service is there: 0 for the
    same version, 1 for another.

    A service that is too busy to answer within half a second is no dead one: what is at the socket path is removed only
    by who holds the run directory's lock, hence never while another service lives.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.create()
    starting = await _acquire(path.with_suffix(".lock"), path)
    if isinstance(starting, int):
        return starting
    try:
        owner = await _acquire(layout.run_dir / "owner.lock", path)
        if isinstance(owner, int):
            return owner
        if (status := _already_running(path)) is not None:
            return status
        try:
            return _bind(path), owner
        except OSError as error:
            sys.stderr.write(
                f"error: cannot bind {path}: {error}; CAPSEM_RUN_DIR names another directory, or --uds-path a path, "
                f"of at most {LONGEST_SOCKET} bytes with all that leads to it\n"
            )
            return 1
    finally:
        starting.release()


async def _acquire(lock: Path, path: Path) -> Lock | int:
    """Wait for a lock for as long as a start may take; an exit status when a service answers meanwhile, or nobody yields."""
    deadline = time.monotonic() + START_LOCK_LIMIT
    while time.monotonic() < deadline:
        if (status := _already_running(path)) is not None:
            return status
        turn = time.monotonic() + PROBE_LIMIT
        while time.monotonic() < turn:
            if (held := try_lock(lock)) is not None:
                return held
            await asyncio.sleep(LOCK_TURN)
    sys.stderr.write(f"error: another capsem-service holds {lock} and does not answer on {path}; stop it first\n")
    return 1


def _bind(path: Path) -> socket.socket:
    """Bind and listen, mode 0600, in place of whatever is there. Raises OSError (a directory is there, path too long)."""
    path.unlink(missing_ok=True)
    listener = bind_private(path)
    listener.listen(128)
    return listener


def _already_running(path: Path) -> int | None:
    version = running_version(path)
    if version is None:
        return None
    if version == __version__:
        log.info("a service of this version is already running on %s", path)
        return 0
    sys.stderr.write(
        f"error: capsem-service {version} is running on {path}, this is {__version__}; stop that one first\n"
    )
    return 1


@dataclass
class Service:
    """The daemon's parts, put together."""

    arguments: argparse.Namespace
    paths: Paths
    settings: Settings

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        arguments = self.arguments
        layout = Layout(self.paths.run_dir)
        path = arguments.uds_path.absolute() if arguments.uds_path else layout.socket
        if arguments.parent_pid is not None and os.getppid() != arguments.parent_pid:
            return 0
        place = await claim_place(path, layout)
        if isinstance(place, int):
            return place
        listener, owner = place
        identity = path.stat().st_ino
        pid_file = layout.run_dir / "service.pid"
        durable.write(pid_file, f"{os.getpid()}\n".encode())
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        fleet = self._fleet(layout)
        process_binary = self.arguments.process_binary or find_process_binary()
        hypervisor = os.environ.get("CAPSEM_HYPERVISOR") or "qemu"
        spares = Spares(fleet.system, [str(process_binary)], hypervisor, passed_on(os.environ), Path(os.devnull))
        handlers = self._handlers(fleet, process_binary, hypervisor, spares)
        server = make_server(handlers)
        timers = Timers(fleet, handlers)
        log.info("capsem_service %s serves %s", __version__, path)
        await fleet.reconcile()
        handlers.flattening.begin()
        handlers.pool.begin()
        await server.startup(sockets=[listener])
        spares.prepare()
        handlers.policies.prepare()
        watching = asyncio.create_task(_watch_parent(arguments.parent_pid, stop))
        await stop.wait()
        log.info("stopping")
        fleet.stopping = True
        await timers.close()
        await handlers.pool.close()
        await spares.close()
        await handlers.flattening.close()
        await handlers.asks.close()
        for each in server.servers:
            each.close()  # no new connection from here on
        if handlers.settings.on_service_stop == config.KEEP:
            # As if we were killed: commands go on, and who follows them connects again and finds them.
            fleet.leave_all()
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        else:
            suspends = handlers.settings.on_service_stop == config.SUSPEND
            await fleet.stop_all(handlers.suspend if suspends else None)
        await server.shutdown(sockets=[listener])
        await handlers.ledgers.close()
        watching.cancel()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == identity:  # not the socket of a service that took our place
                path.unlink()
        pid_file.unlink(missing_ok=True)
        log.info("stopped")
        owner.release()
        return 0

    def _fleet(self, layout: Layout) -> Fleet:
        return Fleet(real_system(), layout, self.settings.max_concurrent_vms)

    def _handlers(self, fleet: Fleet, process_binary: Path, hypervisor: str, spares: Spares) -> Handlers:
        driver = make_driver(hypervisor, fleet.layout.run_dir, fleet.system, os.environ)
        lock, overlap = default_path(os.environ), driver.features.transitions_overlap
        launcher = Launcher(
            system=fleet.system,
            layout=fleet.layout,
            environ=os.environ,
            process_binary=process_binary,
            hypervisor=hypervisor,
            parent_pid=self.arguments.parent_pid,
            log_level=os.environ.get("RUST_LOG") or "info",
            spares=spares,
            gate=None if overlap else lock,
        )
        gate = Gate(fleet.system.clock, overlap=overlap, path=lock)
        catalog = Catalog.from_environment(os.environ, self.arguments.assets_dir)
        catalog.declare(fleet.layout.run_dir)  # it may have been moved here since its VMs were made
        fleet.ledger = self.settings.ledger
        ledgers = Ledgers(fleet, self.paths.home / "sessions" / "main.db")
        maker = Maker(fleet, driver, catalog, launcher, gate)
        handlers = Handlers(fleet, maker, self.settings, os.environ, ledgers)
        handlers.policies.load()
        handlers.values.load()
        return handlers


def make_server(handlers: Handlers) -> uvicorn.Server:
    """A server to be started and shut down by hand: its own main loop would wake up ten times a second, for the date."""
    config = uvicorn.Config(
        build_app(handlers, __version__),
        log_config=None,
        access_log=False,
        lifespan="off",
        date_header=False,
        server_header=False,
        timeout_graceful_shutdown=int(DRAIN_LIMIT),
        http=Protocol,
    )
    config.load()
    logging.getLogger("uvicorn.error").addFilter(unexpected)
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    return server


async def _watch_parent(pid: int | None, stop: asyncio.Event) -> None:
    """The contract's watch: a parent that is no longer ours ends us, whether it died or not."""
    while pid is not None:
        if os.getppid() != pid:
            log.info("process %d is no longer our parent", pid)
            stop.set()
            return
        await asyncio.sleep(PARENT_TURN)


def _open_run_directory(path: Path) -> None:
    """Make it where it is missing, and log into it. Raises HostNotReady."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        logs.setup(os.environ, path / "service.log")
    except OSError as error:
        raise HostNotReady(
            f"the run directory {path} cannot be used: {error.strerror}",
            hint="CAPSEM_RUN_DIR names it; it has to be a directory that you may write to",
        ) from error


def main() -> int:
    """Entry point."""
    set_process_name("capsem-service")
    os.umask(0o077)
    arguments = parse_arguments()
    try:
        paths = Paths.from_environment(os.environ)
        settings = config.load(os.environ)
        _open_run_directory(paths.run_dir)
        for warning in settings.warnings:
            log.warning("%s", warning)
        if orders := os.environ.get(faults.VARIABLE):
            log.warning("faults are made to happen, as %s orders", orders)
            faults.load(orders)
        return asyncio.run(Service(arguments, paths, settings).run())
    except CapsemError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
