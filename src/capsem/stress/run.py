"""A stress test from the first to the last: services, VMs, clients, and what is left when all is over."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from capsem.model.errors import CapsemError
from capsem.stress.clients import Clients, Failed, Vm
from capsem.stress.guests import Guest, LinuxGuest, SimGuest
from capsem.stress.hosts import Service, start_services
from capsem.stress.options import QEMU, Options
from capsem.stress.report import Report

_TURN: Final = 0.2  # seconds between words of progress
_FAULTS_EVERY: Final = (0.5, 3.0)  # seconds
_SETTLE: Final = 10.0  # seconds for what is removed in the background


def stress(
    options: Options, environ: Mapping[str, str], progress: Callable[[Report], None]
) -> tuple[Report, list[Service]]:
    """Run it; returns what came of it. A KeyboardInterrupt ends it early, and in order.

    Everything lies in one temporary directory, of which the evidence of anomalies stays. Raises HostNotReady.
    """
    options.check_room(environ)
    root = Path(tempfile.mkdtemp(prefix="capsem-stress-", dir=environ.get("TMPDIR"))).resolve()
    report = Report(options, root / "evidence")
    services: list[Service] = []
    try:
        services = start_services(root, options, environ)
        _run(options, services, report, progress)
    finally:
        for service in services:
            service.stop()
        for service in services:
            shutil.rmtree(service.home, ignore_errors=True)
        shutil.rmtree(root / "simulated-host", ignore_errors=True)
        if report.clean:
            shutil.rmtree(root, ignore_errors=True)
        else:
            report.keep(services)
    return report, services


def _run(options: Options, services: list[Service], report: Report, progress: Callable[[Report], None]) -> None:
    vms = [Vm(service, f"vm-{number}") for service in services for number in range(1, options.vms + 1)]
    guest: Guest = LinuxGuest() if options.hypervisor == QEMU else SimGuest()
    clients = Clients(options, guest, vms, report)
    made = threading.Barrier(options.clients)
    threads = [
        threading.Thread(target=_client, args=(clients, vms, number, made), name=f"client {number}")
        for number in range(options.clients)
    ]
    if options.faults:
        threads.append(threading.Thread(target=_trouble, args=(services, options.seed, clients), name="faults"))
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            progress(report)
            time.sleep(_TURN)
    except KeyboardInterrupt:
        report.interrupted = True
        clients.stop.set()
        for thread in threads:
            thread.join()
    if options.faults:
        for service in services:
            service.end_faults()
            service.stop()  # what a killed supervisor leaves in the store goes when its service starts
            service.start()
    _end(services, vms, report)


def _client(clients: Clients, vms: list[Vm], number: int, made: threading.Barrier) -> None:
    """Make a share of the VMs, then, when all are there, use all of them."""
    for vm in vms[number :: made.parties]:
        if not clients.done:
            with contextlib.suppress(Failed):
                clients.renew(vm)
    made.wait()
    clients.run(number)


def _trouble(services: list[Service], seed: int, clients: Clients) -> None:
    chance = random.Random(f"{seed} faults")
    while not clients.done:
        chance.choice(services).order_fault(chance)
        clients.stop.wait(chance.uniform(*_FAULTS_EVERY))


def _end(services: list[Service], vms: list[Vm], report: Report) -> None:
    """Delete everything, and see whether anything is left."""
    for vm in vms:
        report.look_for_signs(vm.service, vm.name)

    def purge(service: Service) -> None:
        service.revive()
        try:
            service.client.call("purge", body={"all": True})
        except CapsemError as error:
            report.anomaly("failed", service, "", f"not all could be deleted: {error.code}: {error.message}")
        deadline = time.monotonic() + _SETTLE
        while (left := service.remains()) and time.monotonic() < deadline:
            time.sleep(_TURN)
        if left:
            report.anomaly("left over", service, "", ", ".join(left[:20]))

    with ThreadPoolExecutor(len(services)) as pool:
        list(pool.map(purge, services))
