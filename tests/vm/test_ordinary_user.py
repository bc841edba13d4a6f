"""Capsem as somebody installs it who is not root: the built wheel, in an environment of its own, makes an image and runs a
command in it. Run by root, this is done as another user, who sees nothing of the checkout.

The base system comes from the cache of the image that the other tests run on, so neither takes a network.
"""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from capsem.image import users
from capsem.image.catalog import Catalog, Image

ROOT = Path(__file__).parents[2]
NOBODY = pwd.getpwnam("nobody")


@dataclass
class Installation:
    """A virtual environment with Capsem, which its user cannot write, and that user's home."""

    venv: Path
    home: Path
    become: list[str]  # the user

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        # What root had set for itself stays behind.
        environment = {"HOME": str(self.home), "PATH": f"{self.venv}/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        return subprocess.run(
            [*self.become, "env", "-i", *(f"{key}={value}" for key, value in environment.items()), *argv],
            cwd=self.home,
            umask=0o077,  # a careful user's; what is in the image is not to depend on it
            capture_output=True,
            text=True,
            timeout=300,
        )

    def output(self, *argv: str) -> str:
        done = self.run(*argv)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout


def ordinary_user(python: Path) -> list[str]:
    """The command prefix to become one; skips where there is none who could run this."""
    if os.geteuid() != 0:
        become: list[str] = []
    else:
        become = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups", "--no-new-privs"]
        if not succeeds(*become, "env", python, "-c", ""):
            # An interpreter in root's own home, say. To look into directories is all that this one may in addition.
            become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    if not succeeds(*become, "env", python, "-c", ""):
        pytest.skip(f"{python.resolve()} is root's alone, and root may not lend it to others here")
    if not succeeds(*become, "unshare", "--map-root-user", "true"):
        pytest.skip("this host lets no ordinary user make a user namespace")
    return become


def succeeds(*argv: str | Path) -> bool:
    # Through `env`, where there is one: setpriv itself still has root's rights when it starts its program.
    return subprocess.run(argv, capture_output=True).returncode == 0


def current_image() -> Image:
    return Catalog.from_environment(os.environ).find()


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with tempfile.TemporaryDirectory(prefix="capsem-user-") as text:
        place = Path(text)
        place.chmod(0o755)
        install(place / "venv")
        become = ordinary_user(place / "venv" / "bin" / "python")
        home = place / "home"
        cache = home / ".capsem" / "assets" / "cache"
        cache.mkdir(parents=True)
        for file in (current_image().directory.parent / "cache").glob("default-*"):
            shutil.copy(file, cache)
        if os.geteuid() == 0:
            for path in (home, *home.rglob("*")):
                os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
        it = Installation(place / "venv", home, become)
        try:
            yield it
        finally:
            it.run("capsem", "stop")
            (place / "venv" / "share").chmod(0o755)


def install(venv: Path) -> None:
    """The wheel of this checkout, and copies of what it depends on: taken from here, for there may be no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "share").mkdir(exist_ok=True)
    (venv / "share").chmod(0o555)  # as in an installation that belongs to the system
    [library] = venv.glob("lib/python*/site-packages")
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        options = ["--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "wheel", *options, "--wheel-dir", wheels, ROOT], check=True)
        [wheel] = Path(wheels).glob("capsem-*.whl")
        subprocess.run([*pip, "--python", venv / "bin" / "python", "install", *options, wheel], check=True)
    for distribution in dependencies("capsem"):
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = library / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(distribution.locate_file(file), target)  # type: ignore[arg-type]


def dependencies(name: str) -> list[importlib.metadata.Distribution]:
    """All that a distribution needs to run, without itself."""
    found: dict[str, importlib.metadata.Distribution] = {}
    names = [name]
    while names:
        for line in importlib.metadata.distribution(names.pop()).requires or ():
            match = re.match(r"[A-Za-z0-9._-]+", line)
            assert match
            if match[0] not in found and "extra ==" not in line:
                try:
                    found[match[0]] = importlib.metadata.distribution(match[0])
                except importlib.metadata.PackageNotFoundError:
                    continue  # for another platform or Python
                names.append(match[0])
    return [*found.values()]


def test_an_ordinary_user_makes_the_same_image_and_runs_a_command_in_it(installation: Installation) -> None:
    said = installation.output("capsem", "image", "build")
    images = installation.home / ".capsem" / "assets"
    built = Catalog([images], images).find()
    assert str(built.directory) in said
    # From the wheel and without root it is the very same, byte for byte.
    assert built.digest == current_image().digest
    assert {path.stat().st_uid for path in images.rglob("*")} == {images.stat().st_uid}
    assert installation.output("capsem", "run", "--ram", "0.5", "--cpu", "1", "id -u") == "0\n"
    assert [link.readlink() for link in (images / users.DIRECTORY).iterdir()] == [installation.home / ".capsem" / "run"]


def test_doctor_knows_what_an_ordinary_user_needs(installation: Installation) -> None:
    done = installation.run("capsem", "doctor", "--fast")
    [line] = [line for line in done.stdout.splitlines() if " build tools " in line]
    assert "newuidmap" in line or "has no line in /etc/subuid" in line
