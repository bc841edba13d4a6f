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
from capsem.egress.presets import Registry
from capsem.model.errors import HostNotReady, InvalidInput, NotFound, PermissionDenied, ToolFailed, Unavailable
from capsem.model.lifecycle import State
from contract.fake_service import FakeManager, FakeService


class Place:
    def __init__(self, home: Path) -> None:
        self.file = home / "config.toml"
        self.log = home / "service.log"
        self.applied: list[Settings] = []
        self.manager = FakeManager()
        self.environ = {"CAPSEM_HOME": str(home), "PATH": ""}
        registries = (Registry("pip", "pypi.corp.test", 443, "/etc/pip.conf"),)
        self.manager.settle(self.environ, home, self.applied.append, registries)
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
        client.call("approve_tool", vm_id="server__tool")
    with pytest.raises(ToolFailed):
        client.call("call_tool", vm_id="server__tool", body={"a": 1})
    assert ToolFailed.status == 502
    place.manager.states = {"off": State.STOPPED}
    with pytest.raises(Unavailable):
        client.call("call_tool", vm_id="server__tool", body={})


def test_presets_say_what_they_let_pass_on_this_host(place: Place) -> None:
    presets = {each["id"]: each for each in place.client.call("presets")["presets"]}
    assert list(presets) == ["off", "high", "medium", "open-with-floor"]
    assert [name for name, each in presets.items() if each.get("active")] == ["medium"]
    assert presets["off"].get("rules", []) == []
    assert presets["high"]["rules"] == [
        {
            "name": "pip-pypi.corp.test-443",
            "action": "allow",
            "host": ["pypi.corp.test"],
            "port": [443],
            "method": ["GET", "HEAD"],
            "where": "/etc/pip.conf",
        }
    ]
    place.client.call("use_preset", vm_id="off")
    assert value(place.client, "network.preset") == "off"
    assert place.applied[-1].network_preset == "off"
    with pytest.raises(NotFound, match="open-with-floor"):
        place.client.call("use_preset", vm_id="wide")


def test_policies_are_linted(place: Place) -> None:
    wide, narrow = "name = 'w'\naction = 'deny'\nhost = '*.a.test'", "name = 'n'\naction = 'allow'\nhost = 'b.a.test'"
    policy = f"[[network.rule]]\n{wide}\n[[network.rule]]\n{narrow}\n"
    answer = place.client.call("lint_settings", body={"policy": policy, "settings": {"no.such": 1}})
    assert not answer["valid"]
    assert any("policy, line 5: rule n: it can never decide: rule w" in each for each in answer["problems"])
    assert any("no.such" in each for each in answer["problems"])
    lab = "[[network.rule]]\naction = 'allow'\ncidr = '10.0.0.0/8'\nport = 22\n"
    assert place.client.call("lint_settings", body={"policy": lab})["valid"]
    assert not place.client.call("lint_settings", body={"policy": lab, "layer": "user"})["valid"]
    with pytest.raises(InvalidInput, match="there is no layer"):
        place.client.call("lint_settings", body={"policy": lab, "layer": "preset"})


def test_the_company_s_file_is_put_in_place_unless_somebody_has_named_one(place: Place) -> None:
    denial = "[vm.resources]\ncpu_count = 1\n[[network.rule]]\naction = 'deny'\nhost = 'evil.test'\n"
    assert place.client.call("set_corp_config", body={"config": denial}) == {"success": True}
    assert place.applied[-1].cpu_count == 1
    answer = place.client.call("network_check", query={"url": "https://evil.test/"})
    assert (answer["action"], answer["layer"], "remedy" in answer) == ("deny", "corporate", False)
    assert answer["where"].endswith("corp.toml, line 3")
    for bad in ("[[network.rule]]\n", "[vm.resources]\ncpu_count = 99\n", "["):
        with pytest.raises(InvalidInput):
            place.client.call("set_corp_config", body={"config": bad})
    assert (place.file.parent / "corp.toml").read_text() == denial
    place.environ["CAPSEM_CORP_CONFIG"] = "/etc/capsem.toml"
    with pytest.raises(PermissionDenied, match=r"/etc/capsem.toml"):
        place.client.call("set_corp_config", body={"config": ""})


def test_a_bad_file_leaves_the_policy_as_it_was_and_says_so(place: Place) -> None:
    place.file.write_text("[[network.rule]]\nname = 'mine'\naction = 'allow'\nhost = 'a.test'\n")
    place.client.call("reload_config")
    place.file.write_text("[[network.rule]]\nname = 'mine'\naction = 'allow'\nhosts = 'b.test'\n")
    with pytest.raises(InvalidInput, match=r"config.toml, line 4: rule mine: there is no key hosts"):
        place.client.call("reload_config")
    assert place.client.call("network_check", query={"url": "a.test"})["rule"] == "mine"
    assert place.client.call("network_check", query={"url": "b.test"})["action"] == "deny"


def test_a_verdict_is_told_with_everything_about_it(place: Place) -> None:
    answer = place.client.call("network_check", query={"url": "https://pypi.corp.test/simple/../x?y", "method": "POST"})
    assert answer == {
        "action": "deny",
        "rule": "default",
        "layer": "default",
        "reason": "no rule is about POST pypi.corp.test:443/x",
        "host": "pypi.corp.test",
        "port": 443,
        "protocol": "http",
        "method": "POST",
        "path": "/x",
        "remedy": "capsem net allow VM pypi.corp.test",
    }
    answer = place.client.call("network_check", query={"url": "https://pypi.corp.test/"})
    assert (answer["action"], answer["rule"], answer["where"]) == ("allow", "pip-pypi.corp.test-443", "/etc/pip.conf")
    assert "once it is looked up" in answer["note"]
    assert place.client.call("network_check", query={"url": "http://127.0.0.1:99/"})["layer"] == "floor"
    raw = place.client.call("network_check", query={"url": "tcp://db.test:5432"})
    assert (raw["protocol"], raw["remedy"]) == ("tcp", "capsem net allow VM db.test:5432 --tcp")
    for bad in (
        "ftp://a.test",
        "https://",
        "tcp://a.test",
        "https://a b/",
        "https://a.test:99999/",
        "https://[::1",
        "x" * 300,
    ):
        with pytest.raises(InvalidInput):
            place.client.call("network_check", query={"url": bad})
    with pytest.raises(InvalidInput):
        place.client.call("network_check", query={"url": "a.test", "method": "get\r\n"})
    with pytest.raises(NotFound):
        place.client.call("network_check", query={"url": "a.test", "id": "nobody"})


def test_the_authority_is_made_once_and_shown_without_its_key(place: Place) -> None:
    first = place.client.call("network_ca")
    assert "PRIVATE" not in json.dumps(first)
    assert (Path(first["file"]).stat().st_mode & 0o777, first["certificate"][:27]) == (
        0o600,
        "-----BEGIN CERTIFICATE-----",
    )
    assert place.client.call("network_ca") == first
    second = place.client.call("rotate_network_ca")
    assert second["fingerprint"] != first["fingerprint"]
    assert "next start" in second["message"]
    Path(first["file"]).write_text("damaged")
    with pytest.raises(HostNotReady, match="rotate"):
        place.client.call("network_ca")


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
