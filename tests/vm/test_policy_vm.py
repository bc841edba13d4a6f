"""What a VM may reach, on real VMs: programs in the guest against servers of this computer, and people who allow, deny, ask and
learn meanwhile."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from origins import HALF, Origins, serving
from real_service import BIN, SMALL, Service, running_service, wait_for


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


@contextlib.contextmanager
def reading(service: Service, *words: str) -> Iterator[IO[bytes]]:
    """What a command writes, which is ended afterwards."""
    argv = [BIN / "capsem", *words]
    with subprocess.Popen(argv, env=service.env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


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


def test_somebody_who_listens_is_asked_and_nobody_is_a_denial(lab: Service, origins: Origins) -> None:
    ask = f'[[network.rule]]\nname = "ask-me"\naction = "ask"\nhost = "news.test"\nport = [{origins.port}]\n'
    create(lab, "asker", {"preset": "off", "policy": ask})
    url = origins.url("news")
    status, body = curl(lab, "asker", url)
    assert (status, json.loads(body)["rule"]) == (403, "ask-me")
    assert "nobody is there to be asked" in body
    with reading(lab, "net", "asks", "--vm", "asker", "--json") as events:
        wait_for(lambda: lab.client.call("network_asks")["followers"])
        job = lab.client.call("exec", vm_id="asker", body={"command": f"curl -sS -m 90 {url}", "wait": False})["job"]
        event = json.loads(events.readline())
        assert (event["event"], event["id"], event["host"]) == ("ask", "asker", "news.test")
        assert net(lab, "allow", "asker", "--ask", event["ask"]) == "allowed, for once\n"
        assert json.loads(events.readline())["outcome"] == "allowed"
        answer = lab.client.call("exec", vm_id="asker", body={"job": job, "offsets": {}, "keep": True})
        assert (answer["exit_code"], answer["stdout"]) == (0, "nothing new\n")
    assert net(lab, "allow", "asker", f"news.test:{origins.port}", "--for", "1h").startswith(
        "asker may reach news.test"
    )
    assert curl(lab, "asker", url)[0] == 200
    lab.client.call("delete", vm_id="asker")


def test_what_was_learnt_lets_a_new_vm_do_the_same_and_nothing_else(
    lab: Service, origins: Origins, tmp_path: Path
) -> None:
    def work(vm: str) -> list[int]:
        return [
            curl(lab, vm, origins.url("mirror", "/v1/things"))[0],
            curl(lab, vm, origins.url("mirror", "/v1/things"), "-X PUT -d x")[0],
            curl(lab, vm, origins.url("other"))[0],
            lab.exec(
                vm, f"git -c http.sslVerify=true clone -q {origins.url('git', '/hello.git')} /root/w && rm -rf /root/w"
            )[0],
        ]

    create(lab, "pupil", "off")
    assert "is learning" in net(lab, "learn", "start", "pupil")
    assert work("pupil") == [200, 200, 200, 0]
    assert curl(lab, "pupil", "http://169.254.169.254/latest/")[0] in {0, 403}
    file = tmp_path / "policy.toml"
    assert "a policy from" in net(lab, "learn", "stop", "pupil", "-o", str(file))
    rules = tomllib.loads(file.read_text())["network"]["rule"]
    assert {host for rule in rules for host in rule.get("host", ())} == {"mirror.test", "other.test", "git.test"}
    assert not any("169.254" in each for rule in rules for each in rule.get("cidr", ()))
    assert curl(lab, "pupil", origins.url("other"))[0] in {0, 403}  # off again, and with no rule of its own
    done = lab.cli("create", "-n", "graduate", "--net", str(file), "--ram", "0.5", "--cpu", "1")
    assert done.returncode == 0, done.stderr
    assert work("graduate") == [200, 200, 200, 0]
    assert curl(lab, "graduate", origins.url("news"))[0] == 403
    assert curl(lab, "graduate", origins.url("other"), "-X POST -d x")[0] == 403
    for name in ("pupil", "graduate"):
        lab.client.call("delete", vm_id=name)


def test_a_reload_leaves_a_download_alone_and_a_bad_file_the_policy(lab: Service, origins: Origins) -> None:
    user = lab.home / "config.toml"
    user.write_text(
        f'[[network.rule]]\nname = "users"\naction = "allow"\nhost = "other.test"\nport = [{origins.port}]\n'
    )
    net(lab, "reload")
    url = origins.url("other", "/held")
    body = {"command": f"curl -sS -o /root/held -w '%{{http_code}} %{{size_download}}' {url}", "wait": False}
    job = lab.client.call("exec", vm_id="box", body=body)["job"]
    lab.output("box", "until [ -s /root/held ]; do sleep 0.1; done")
    user.write_text("[[network.rule]]\nname = 'users'\naction = 'allow'\nhots = 'other.test'\n")
    done = lab.cli("net", "reload")
    assert done.returncode == 2
    assert b"config.toml, line 4: rule users: there is no key hots" in done.stderr
    assert curl(lab, "box", origins.url("other"))[0] == 200
    user.write_text("")
    net(lab, "reload")
    assert curl(lab, "box", origins.url("other"))[0] == 403
    assert curl(lab, "box", origins.url("mirror", "/release"))[0] == 200
    answer = lab.client.call("exec", vm_id="box", body={"job": job, "offsets": {}, "keep": True})
    assert (answer["exit_code"], answer["stdout"].split()) == (0, ["200", str(2 * HALF)])


def test_a_suspend_a_fork_and_a_restart_of_the_service_keep_the_policy(lab: Service, origins: Origins) -> None:
    url = origins.url("mirror")
    assert curl(lab, "box", url)[0] == 200
    lab.client.call("suspend", vm_id="box")
    net(lab, "allow", "box", f"other.test:{origins.port}")  # while it sleeps
    lab.client.call("resume", vm_id="box")
    assert [curl(lab, "box", origins.url(name))[0] for name in ("mirror", "other", "news")] == [200, 200, 403]
    lab.client.call("fork", vm_id="box", body={"name": "twin", "live": True})
    net(lab, "deny", "box", "other.test")
    assert curl(lab, "twin", origins.url("other"))[0] == 200
    assert "capsem net allow twin" in curl(lab, "twin", origins.url("news"))[1]
    assert curl(lab, "box", origins.url("other"))[0] in {0, 403}
    lab.client.call("delete", vm_id="twin")
