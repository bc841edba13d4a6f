"""The registries of this host's own clients, from files and programs made up here."""

from __future__ import annotations

import pytest

from capsem.service.registries import discover, run_program


class Host:
    def __init__(self, tmp_path):
        self.root = tmp_path
        self.home = tmp_path / "home"
        self.environ = {"HOME": str(self.home)}
        self.programs = {}

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def found(self):
        registries = discover(self.environ, lambda argv: self.programs.get(argv[0], ""), self.root)
        return {f"{each.client} {each.host}:{each.port}" for each in registries}


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_a_host_without_clients_has_none(host):
    assert host.found() == set()


def test_pip(host):
    host.programs["python3"] = "https://default.test/simple https://files.default.test\n"
    assert host.found() == {"pip default.test:443", "pip files.default.test:443"}
    host.write(
        "etc/pip.conf", "[global]\nextra-index-url =\n  https://extra.test/simple\n  http://more.test:8080/simple\n"
    )
    assert host.found() == {
        "pip default.test:443",
        "pip files.default.test:443",
        "pip extra.test:443",
        "pip more.test:8080",
    }
    host.write(
        "home/.config/pip/pip.conf", "[install]\nindex-url = https://user:secret@index.test/simple\nfind-links = /a/b\n"
    )
    assert host.found() == {"pip extra.test:443", "pip more.test:8080", "pip index.test:443"}
    host.environ["PIP_INDEX_URL"] = "https://variable.test/simple"
    assert "pip variable.test:443" in host.found()


def test_no_password_is_kept(host):
    host.write("etc/pip.conf", "[global]\nindex-url = https://user:secret@index.test/simple\n")
    assert "secret" not in repr(discover(host.environ, lambda _argv: "", host.root))


def test_npm(host):
    host.programs["npm"] = "https://default.test/\n"
    host.write(
        "home/.npmrc", "registry=https://npm.test:8443/\n@corp:registry = https://corp.test\n//npm.test/:_authToken=x\n"
    )
    assert host.found() == {"npm default.test:443", "npm npm.test:8443", "npm corp.test:443"}
    host.programs["npm"] = "undefined\n"
    assert host.found() == {"npm npm.test:8443", "npm corp.test:443"}


def test_apt(host):
    host.write(
        "etc/apt/sources.list",
        "# deb http://no.test x\ndeb [signed-by=/a b=c] http://one.test/d trixie main\ndeb-src https://two.test/d x\n",
    )
    host.write("etc/apt/sources.list.d/a.list", "deb mirror+http://three.test/l trixie main\ndeb file:///srv x y\n")
    host.write(
        "etc/apt/sources.list.d/b.sources",
        "Types: deb\nURIs: https://four.test/d\n https://five.test/d\nSuites: x\n\nuris: http://six.test\n",
    )
    plain, tls = ("one", "three", "six"), ("two", "four", "five")
    assert host.found() == {*(f"apt {name}.test:80" for name in plain), *(f"apt {name}.test:443" for name in tls)}


def test_cargo(host):
    host.write(
        "home/.cargo/config.toml",
        '[source.crates-io]\nreplace-with = "mirror"\n[source.mirror]\nregistry = "sparse+https://mirror.test/index/"\n'
        '[registries.corp]\nindex = "https://corp.test/git"\n[registry]\ndefault = "corp"\nindex = "https://old.test/i"\n',
    )
    host.environ["CARGO_REGISTRIES_MORE_INDEX"] = "sparse+https://more.test/"
    assert host.found() == {f"cargo {name}.test:443" for name in ("mirror", "corp", "old", "more")}


def test_go(host):
    host.write("home/.config/go/env", "GOPROXY=https://file.test,direct\nGOSUMDB=off\n")
    assert host.found() == {"go file.test:443"}
    host.programs["go"] = "https://proxy.test|http://other.test:81,off\nsum.test+1234 https://sum-at.test\n"
    assert host.found() == {"go proxy.test:443", "go other.test:81", "go sum.test:443", "go sum-at.test:443"}


def test_what_cannot_be_read_says_nothing(host):
    host.write("etc/pip.conf", "index-url = https://no.section.test\n[")
    host.write("home/.npmrc", "registry=\nregistry=ht tp://\nregistry=https://[::1\nregistry=https://10.0.0.1/\n")
    host.write("home/.cargo/config.toml", "[registries]\ncorp = 1\n[source")
    host.write("home/.cargo/config", "registries = 1\nregistry = 'x'\n[source.a]\nregistry = 1\n")
    host.write("etc/apt/sources.list", "\xff\xfe\x00 deb")
    host.programs["go"] = "\n\n\n"
    assert host.found() == set()


def test_programs_are_asked_and_may_fail(tmp_path):
    program = tmp_path / "client"
    program.write_text('#!/bin/sh\n[ "$1" = good ] && echo "said $HOME" || exit 1\n')
    program.chmod(0o755)
    run = run_program({"PATH": str(tmp_path), "HOME": "/h"})
    assert run(["client", "good"]) == "said /h\n"
    assert run(["client", "bad"]) == ""
    assert run(["missing"]) == ""
    assert run_program({})(["sh", "-c", "echo x"]) == ""
