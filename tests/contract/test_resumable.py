"""A list says which VMs could be resumed on this host as it is, and what else can be done with them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_transfer import CHECKPOINT, host, with_checkpoint

from capsem.api.checkpoint_types import CheckpointRequest
from capsem.api.vm_types import ProvisionRequest, SandboxInfo
from capsem.model.errors import NotRunning
from capsem.service import space


def told(info: SandboxInfo) -> tuple[bool | None, list[str] | None]:
    return info.can_resume, info.available_actions


def test_a_suspended_vm_waits_for_its_very_host(tmp_path: Path) -> None:
    async def scene() -> None:
        it = host(tmp_path / "host")
        await with_checkpoint(it)
        it.fleet.get("box").rewrite(state="suspended", checkpoint=CHECKPOINT)
        info = await it.handlers.info("box")
        assert told(info) == (True, ["resume", "fork", "delete"])
        assert info.resume_blocked_reason is None

        async def newer() -> str:
            return "process 2"

        version, it.driver.version = it.driver.version, newer  # type: ignore[method-assign]
        info = (await it.handlers.list()).sandboxes[0]
        assert told(info) == (False, ["resume_cold", "fork", "delete"])
        reason = info.resume_blocked_reason or ""
        assert "vmm is process 2, was process 1" in reason
        assert "resume --cold" in reason
        it.driver.version = version  # type: ignore[method-assign]
        assert (await it.handlers.info("box")).can_resume

        it.catalog.image.digest = "0" * 64
        info = await it.handlers.info("box")
        assert told(info) == (False, ["fork", "delete"])
        assert "is not on this host" in (info.resume_blocked_reason or "")

    asyncio.run(scene())


def test_what_runs_or_rests_says_what_it_can_do(tmp_path: Path) -> None:
    async def scene() -> None:
        it = host(tmp_path / "host")
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        await it.handlers.provision(ProvisionRequest(name="brief"))
        assert told(await it.handlers.info("box")) == (None, ["checkpoint", "suspend", "stop", "fork", "delete"])
        assert told(await it.handlers.info("brief")) == (None, ["stop", "fork", "delete"])
        await it.handlers.stop("box")
        assert told(await it.handlers.info("box")) == (True, ["resume", "fork", "delete"])
        with pytest.raises(NotRunning):
            await it.handlers.checkpoint("box", CheckpointRequest())
        await it.fleet.stop_all()

    asyncio.run(scene())


def test_a_disk_that_is_nearly_full_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        it = host(tmp_path / "host")
        await with_checkpoint(it)
        it.fleet.get("box").rewrite(state="suspended", checkpoint=CHECKPOINT)
        await it.handlers.provision(ProvisionRequest(name="brief"))
        assert (await it.handlers.info("box")).warning is None
        monkeypatch.setattr(space, "free_bytes", lambda _layout: 10 << 20)
        assert "the next suspend of box may need" in ((await it.handlers.info("box")).warning or "")
        assert (await it.handlers.info("brief")).warning is None  # it is never suspended
        await it.fleet.stop_all()

    asyncio.run(scene())
