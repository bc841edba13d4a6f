"""The host's tools that an image is made with, behind one small door.

Everything in this package that starts a program does it through a `Host` that it was given, so that the order of work
can be tested without root, network or the tools themselves.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from capsem.model.errors import HostNotReady, MachineFailed

# Which Debian or Ubuntu package brings a tool, or a file if it begins with "/", for the hint of HostNotReady.
PACKAGE_OF: Final[Mapping[str, str]] = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "zstd": "zstd",
    "lz4": "lz4",
    "tar": "tar",
    "chroot": "coreutils",
    "unshare": "util-linux",
    "newuidmap": "uidmap",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
AS_ROOT: Final = ("unshare", "--map-root-user", "--")
_UMASK: Final = 0o022  # of all that is run: the caller's own must not decide what is in an image
_LAST_LINES: Final = 8

_BOUND: Final = ("setpriv", "--pdeathsig", "KILL", "--")  # dies with us
_NAMESPACES: Final = ("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "--")


class Host:
    """Runs programs on this machine, in the caller's environment."""

    def require(self, *tools: str) -> None:
        """Check that all `tools` (see PACKAGE_OF) are there. Raises HostNotReady, with the command that installs them."""
        missing = [tool for tool in tools if not _is_there(tool)]
        if missing:
            packages = " ".join(dict.fromkeys(PACKAGE_OF.get(tool, tool) for tool in missing))
            raise HostNotReady(
                f"building an image needs {', '.join(missing)}, which this host does not have",
                hint=f"apt-get install -y {packages}",
            )

    def require_user_ids(self) -> None:
        """Check that this user, who is not root, may use other user ids in a namespace of its own, as installing packages
        needs. Raises HostNotReady, with the command that allows it."""
        number = os.getuid()
        try:
            name = pwd.getpwuid(number).pw_name
        except KeyError:  # a container can run as a user that it has no name for
            name = str(number)
        for file in (Path("/etc/subuid"), Path("/etc/subgid")):
            owners = [line.split(":", 1)[0] for line in file.read_text().splitlines()] if file.exists() else []
            if not {name, str(number)} & {*owners}:
                raise HostNotReady(
                    f"{name} has no line in {file}, so packages cannot be installed without root",
                    hint=f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
                )

    def require_user_namespace(self) -> None:
        """Check that this user, who is not root, may be it in a namespace of its own. Raises HostNotReady."""
        try:
            self.run([*AS_ROOT, "true"])
        except MachineFailed as exc:
            raise HostNotReady(
                f"this host lets no ordinary user make a user namespace ({exc.message})",
                hint="build the image as root, or allow it as root: sysctl -w user.max_user_namespaces=10000, and on Ubuntu "
                "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            ) from exc

    def is_root(self) -> bool:
        """Whether this process may change owners and roots without further ado."""
        return os.geteuid() == 0

    def may_contain(self) -> bool:
        """Whether a program can be given namespaces of its own, so that neither processes nor mounts of it can outlive it.
        An ordinary user may not, nor root in many containers."""
        return (
            self.is_root() and subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode == 0
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> bytes:
        """Run `argv` to its end and return its stdout; `env` is added to the environment.

        `on_line` is called with each line of stderr as it comes. Blocks until the program ends. Raises HostNotReady
        when it cannot be started, MachineFailed with its last words when it exits with anything but 0.
        """
        environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {}), "PATH": _search_path()}
        try:
            if on_line is None:
                done = subprocess.run(
                    argv, input=stdin, env=environment, capture_output=True, check=False, umask=_UMASK
                )
                code, stdout, lines = done.returncode, done.stdout, done.stderr.decode(errors="replace").splitlines()
            else:
                prefix = (*_BOUND, *(_NAMESPACES if self.may_contain() else ()))
                code, stdout, lines = _follow([*prefix, *argv], environment, on_line)
        except FileNotFoundError as exc:
            hint = f"apt-get install -y {PACKAGE_OF.get(argv[0], argv[0])}"
            raise HostNotReady(f"{argv[0]} was not found", hint=hint) from exc
        if code != 0:
            words = "; ".join(line.strip() for line in lines[-_LAST_LINES:] if line.strip()) or "it said nothing"
            raise MachineFailed(f"{argv[0]} failed with exit status {code}: {words}")
        return stdout


def _search_path() -> str:
    """Tools for administrators are often not on an ordinary user's PATH."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _is_there(tool: str) -> bool:
    return Path(tool).exists() if tool.startswith("/") else shutil.which(tool, path=_search_path()) is not None


def _follow(
    argv: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
) -> tuple[int, bytes, list[str]]:
    """Run with stderr read line by line; stdout, stdin are not used, so that one pipe is enough and cannot block.

    When we end, so does the program; with namespaces of its own, all it started and mounted goes with it.
    """
    lines: list[str] = []
    with subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, umask=_UMASK
    ) as process:
        assert process.stderr is not None
        try:
            for raw in process.stderr:
                line = raw.decode(errors="replace").rstrip()
                lines = [*lines[-50:], line]
                on_line(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, b"", lines
