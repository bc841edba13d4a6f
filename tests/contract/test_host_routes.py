"""Operations that are about no VM: settings, set-up, the service's log, tools of other servers."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.api.operations import OPERATIONS
from capsem.client.sync import Client
from capsem.config import Settings
from capsem.model.errors import InvalidInput, NotFound, PermissionDenied, ToolFailed, Unavailable
from capsem.model.lifecycle import State
from capsem.service.host import Host
from contract.fake_service import FakeManager, FakeService


class Place:
    def __init__(self, home: Path) -> None:
        self.file = home / "config.toml"
        self.log = home / "service.log"
        self.applied: list[Settings] = []
        self.manager = FakeManager()
        environ = {"CAPSEM_HOME": str(home), "PATH": ""}
        self.manager.host = Host(environ, home, self.manager, self.applied.append)
        self.service = FakeService(self.manager, home / "s.sock")
        self.client = Client(home / "s.sock")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    it = Place(tmp_path)
    it.service.start()
    try:
        yield it
    finally:
        it.service.stop()


def value(client: Client, name: str) -> object:
    [row] = [row for row in client.call("settings")["settings"] if row["name"] == name]
    return row["value"]


def test_settings_are_stored_checked_and_in_force(place: Place) -> None:
    assert value(place.client, "vm.resources.ram_gb") == 4.0
    answer = place.client.call(
        "change_settings", body={"settings": {"vm.resources.ram_gb": 2, "vm.on_service_stop": "keep"}}
    )
    assert answer["path"] == str(place.file)
    assert value(place.client, "vm.resources.ram_gb") == 2
    assert place.applied[-1].ram_mb == 2048
    assert tomllib.loads(place.file.read_text())["vm"]["on_service_stop"] == "keep"
    before = place.file.read_text()
    for bad in ({"vm.resources.ram_gb": 99}, {"no.such": 1}, {"vm.on_service_stop": "explode"}):
        with pytest.raises(InvalidInput):
            place.client.call("change_settings", body={"settings": {"vm.resources.cpu_count": 2, **bad}})
        assert not place.client.call("lint_settings", body={"settings": bad})["valid"]
    assert place.file.read_text() == before
    assert place.client.call("lint_settings", body={"settings": {"vm.resources.cpu_count": 2}}) == {
        "valid": True,
        "problems": [],
    }


def test_files_that_were_edited_are_read_again(place: Place) -> None:
    place.file.write_text("[vm.resources]\ncpu_count = 3\nodd = 1\n")
    assert place.client.call("reload_config") == {"success": True, "reloaded": 0}
    assert place.applied[-1].cpu_count == 3
    assert "vm.resources.odd" in place.client.call("settings")["warnings"][0]
    place.file.write_text("[vm.resources]\ncpu_count = 'many'\n")
    with pytest.raises(InvalidInput, match="cpu_count"):
        place.client.call("reload_config")


def test_what_there_is_none_of_is_answered_as_that(place: Place) -> None:
    client = place.client
    assert client.call("presets") == {"presets": []}
    assert client.call("policy_hooks") == {"hooks": []}
    assert json.loads(client.fetch("mcp_servers")) == json.loads(client.fetch("mcp_tools")) == []
    assert client.call("mcp_policy") == {
        "global_policy": None,
        "default_tool_permission": "allow",
        "blocked_servers": [],
        "tool_permissions": {},
    }
    assert client.call("refresh_tools") == {"success": True, "instances": 0}
    assert client.call("validate_key", body={"provider": "x", "key": "y"})["valid"] is False
    with pytest.raises(NotFound):
        client.call("use_preset", vm_id="high")
    with pytest.raises(NotFound):
        client.call("approve_tool", vm_id="server__tool")
    with pytest.raises(PermissionDenied):
        client.call("set_corp_config")
    with pytest.raises(ToolFailed):
        client.call("call_tool", vm_id="server__tool", body={"a": 1})
    assert ToolFailed.status == 502
    place.manager.states = {"off": State.STOPPED}
    with pytest.raises(Unavailable):
        client.call("call_tool", vm_id="server__tool", body={})


def test_setup_says_what_is_missing(place: Place) -> None:
    for name in ("setup_state", "setup_complete", "setup_retry"):
        assert place.client.call(name) == {"completed": False, "missing": ["QEMU"]}
    assert place.client.call("setup_assets") == {"ready": True, "version": "1", "missing": []}
    assert "qemu" not in place.client.call("setup_detect")


def test_the_log_comes_as_text_in_whole_lines(place: Place) -> None:
    assert place.client.fetch("service_logs") == b""
    place.log.write_text("".join(f'{{"target": "capsem_service", "n": {number}}}\n' for number in range(10_000)))
    text = place.client.fetch("service_logs").decode()
    assert 90_000 < len(text) <= 100 * 1024
    assert all("capsem_service" in json.loads(line)["target"] for line in text.splitlines())
    assert OPERATIONS["service_logs"].gives == "text/plain"
