"""Fixtures of the contract tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_bench import LIMIT, Bench, Scenario
from agent_host import running_agent


@pytest.fixture
def with_agent(tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario, `async def scenario(bench)`, against an agent of its own."""

    @asynccontextmanager
    async def bench(env: dict[str, str] | None, network: bool) -> AsyncIterator[Bench]:
        async with running_agent(tmp_path, env, network=network) as (guest, agent):
            yield Bench(guest, agent)

    def run(scenario: Scenario, env: dict[str, str] | None = None, *, network: bool = False) -> None:
        async def main() -> None:
            async with bench(env, network) as ready, asyncio.timeout(LIMIT):
                await scenario(ready)

        asyncio.run(main())

    return run
