"""One service and one VM that all tests share: a boot under emulation takes seconds, a command milliseconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import shared_templates
from real_service import SMALL, Service, running_service


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session", autouse=True)
def templates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One boot of a size is enough for all services, of all workers."""
    base = tmp_path_factory.getbasetemp()
    shared_templates.place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "templates"


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    with running_service() as it:
        yield it


@pytest.fixture
def own_service() -> Iterator[Service]:
    """For tests that kill it."""
    with running_service() as it:
        yield it


@pytest.fixture(scope="session")
def box(service: Service) -> str:
    """A running persistent VM that tests leave as they found it."""
    service.client.call("provision", body={"name": "box", "persistent": True, "env": {"GREETING": "hello"}, **SMALL})
    service.output("box", "true")
    return "box"
