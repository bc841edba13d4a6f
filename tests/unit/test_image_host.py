"""Starting the host's tools: what is missing or fails is told so that somebody can act on it."""

from __future__ import annotations

import os
import sys

import pytest

from capsem.image.host import Host
from capsem.model.errors import HostNotReady, MachineFailed


def test_missing_tools_come_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None if name in {"mke2fs", "debugfs", "zstd"} else name)
    Host().require("tar")
    with pytest.raises(HostNotReady, match="mke2fs, debugfs, zstd") as caught:
        Host().require("tar", "mke2fs", "debugfs", "zstd")
    assert caught.value.hint == "apt-get install -y e2fsprogs zstd"


def test_missing_files_likewise() -> None:
    with pytest.raises(HostNotReady, match="/no/such/file"):
        Host().require("/no/such/file")


def test_output_comes_back_and_input_goes_in() -> None:
    assert Host().run([sys.executable, "-c", "print(input()[::-1])"], stdin=b"abc") == b"cba\n"


def test_environment_is_added_to() -> None:
    program = "import os; print(os.environ['A'], os.environ['LC_ALL'], '/sbin' in os.environ['PATH'])"
    assert Host().run([sys.executable, "-c", program], env={"A": "1"}) == b"1 C.UTF-8 True\n"


def test_files_get_their_usual_modes_whatever_the_callers_umask() -> None:
    program = "import os, sys; print(oct(os.umask(0)), file=sys.stderr)"
    lines: list[str] = []
    before = os.umask(0o077)
    try:
        Host().run([sys.executable, "-c", program], on_line=lines.append)
        assert Host().run(["sh", "-c", "umask"]) == b"0022\n"
    finally:
        os.umask(before)
    assert lines == ["0o22"]


def test_failure_comes_with_the_last_words() -> None:
    with pytest.raises(MachineFailed, match="exit status 3: first; E: it broke"):
        Host().run([sys.executable, "-c", "import sys; print('first\\n\\nE: it broke', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(HostNotReady):
        Host().run(["no-such-program-anywhere"])


def test_lines_are_seen_as_they_come() -> None:
    lines: list[str] = []
    program = "import sys; print('I: one', file=sys.stderr); print('I: two', file=sys.stderr)"
    Host().run([sys.executable, "-c", program], on_line=lines.append)
    assert lines == ["I: one", "I: two"]
    with pytest.raises(MachineFailed, match="I: one; I: two"):
        Host().run([sys.executable, "-c", program + "; sys.exit(1)"], on_line=lines.append)


def test_an_interrupted_program_is_ended() -> None:
    class Enough(Exception):
        pass

    def stop(_line: str) -> None:
        raise Enough

    program = "import sys, time; print('x', file=sys.stderr, flush=True); time.sleep(600)"
    with pytest.raises(Enough):
        Host().run([sys.executable, "-c", program], on_line=stop)


def test_a_host_without_user_namespaces_says_what_would_allow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capsem.image.host.AS_ROOT", (sys.executable, "-c", "exit('Operation not permitted')"))
    with pytest.raises(HostNotReady, match="Operation not permitted") as caught:
        Host().require_user_namespace()
    assert "sysctl -w user.max_user_namespaces" in str(caught.value.hint)


def test_without_user_ids_of_its_own_a_user_is_told_what_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.exists", lambda _self: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda _self: "somebody-else:100000:65536\n")
    with pytest.raises(HostNotReady) as caught:
        Host().require_user_ids()
    assert "usermod --add-subuids" in str(caught.value.hint)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # one that has no name here
    with pytest.raises(HostNotReady, match="4000000000 has no line in /etc/subuid"):
        Host().require_user_ids()
