"""What a VM may reach, on real VMs: programs in the guest against servers of this computer, and people who allow and deny
meanwhile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from origins import Origins, serving
from real_service import SMALL, Service, running_service


@pytest.fixture(scope="module")
def origins() -> Iterator[Origins]:
    with tempfile.TemporaryDirectory(prefix="capsem-origins-") as directory, serving(Path(directory)) as served:
        yield served


@pytest.fixture(scope="module")
def lab(origins: Origins) -> Iterator[Service]:
    """A service whose user has let names lead to this computer, and the VM `box`, which may reach nothing else yet."""
    with running_service(CAPSEM_HOSTS=str(origins.hosts)) as service:
        floor = "".join(
            line + "\n" for line in origins.policy().split('[[network.rule]]\nname = "lab"')[0].splitlines()
        )
        (service.home / "corp.toml").write_text(floor)
        assert service.cli("net", "reload").returncode == 0
        create(service, "box")
        yield service


def create(service: Service, name: str, network: object = "high") -> None:
    service.client.call("provision", body={"name": name, "persistent": True, "network": network, **SMALL})


def curl(service: Service, vm: str, url: str, *options: str) -> tuple[int, str]:
    """Status and body, 0 and the reason when there is none."""
    line = f"curl -sS -o /root/out -w '%{{http_code}}' {' '.join(options)} '{url}' 2>/root/err"
    line = f"rm -f /root/out; touch /root/out; {line}; echo; cat /root/out /root/err"
    status, _, body = service.output(vm, line).partition("\n")
    return int(status), body


def net(service: Service, *words: str) -> str:
    done = service.cli("net", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def log(service: Service, vm: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in net(service, "log", vm, "--json").splitlines()]


def test_a_denied_request_says_how_it_is_allowed_and_then_it_is(lab: Service, origins: Origins) -> None:
    url = origins.url("mirror", "/page")
    status, body = curl(lab, "box", url)
    told = json.loads(body)
    assert (status, told["rule"], told["layer"]) == (403, "default", "default")
    assert told["remedy"] == f"capsem net allow box mirror.test:{origins.port}"
    assert "do not retry" in told["hint"]
    assert net(lab, *told["remedy"].split()[2:]).startswith("box may reach mirror.test")
    assert curl(lab, "box", url)[0] == 200  # without a restart of anything
    assert curl(lab, "box", origins.url("other"))[0] == 403
    denied, allowed, other = log(lab, "box")[-3:]
    assert [(each["decision"], each["matched_rule"], each["rule_layer"]) for each in (denied, allowed, other)] == [
        ("denied", "default", "default"),
        ("allowed", "allowed-mirror.test", "vm"),
        ("denied", "default", "default"),
    ]
    assert denied["policy_version"] < allowed["policy_version"]
    assert net(lab, "deny", "box", "mirror.test") == (
        "box is kept from mirror.test\nit takes the place of rule allowed-mirror.test\n"
    )
    status, body = curl(lab, "box", url)
    assert (status, "Could not resolve host" in body) == (0, True)  # a name that a rule denies is not there
    net(lab, "allow", "box", f"mirror.test:{origins.port}")


def test_methods_and_paths_are_judged_one_request_at_a_time(lab: Service, origins: Origins) -> None:
    policy = origins.policy("mirror", method=["GET"], path=["/public/**"])
    create(lab, "narrow", {"preset": "off", "policy": policy})
    there = origins.url("mirror", "/public/x")
    assert curl(lab, "narrow", there)[0] == 200
    assert curl(lab, "narrow", there, "-X POST -d x")[0] == 403
    assert curl(lab, "narrow", origins.url("mirror", "/private"))[0] == 403
    assert curl(lab, "narrow", origins.url("mirror", "/public/../private"), "--path-as-is")[0] in {400, 403}
    # One connection, two requests, two verdicts.
    shown = "-w '%{http_code} %{num_connects}\\n' -o /dev/null -o /dev/null"
    both = lab.output("narrow", f"curl -sS {shown} {there} {origins.url('mirror', '/private')}")
    assert both.split() == ["200", "1", "403", "0"]
    lab.client.call("delete", vm_id="narrow")
