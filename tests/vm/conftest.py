"""One service and one VM that all tests share: a boot under emulation takes seconds, a command milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from real_service import SMALL, Service, running_service


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)


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
