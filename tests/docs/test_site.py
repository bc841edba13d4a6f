"""The site is built whole, with every link in it, and asks no other host for anything; so are the manual pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from capsem.cli.main import PROGRAM, cli
from capsem.cli.man import escaped, pages
from capsem.model.lifecycle import State

ROOT = Path(__file__).parent.parent.parent

# What people have seen in systems of this kind when something was wrong; each has its place in the page.
SYMPTOMS = (
    "loop: Write error at byte offset",
    "failed to convert unwritten extents",
    "BootReady read failed",
    "iget: checksum invalid",
    "cannot open directory '.'",
    "permission denied",
    "Broken pipe",
    "control frame too large",
    "Defunct",
    "malformed",
    "session.db-wal",
    "timed out",
    "interrupted",
    "truncated",
    "can_resume",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", ROOT / "mkdocs.yml", "-d", where],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return where


def test_every_page_is_there_and_needs_no_other_host(site: Path) -> None:
    html = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.html")}
    for source in ROOT.glob("docs/**/*.md"):
        assert source.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in html
    for name, text in html.items():
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        fetched += [
            link[1] for link in re.findall(r"<link([^>]*)\shref=[\"']?([^\"'\s>]+)", text) if "canonical" not in link[0]
        ]
        assert fetched
        assert not [each for each in fetched if re.match(r"(https?:)?//", each)], name


def test_links_within_the_site_lead_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in re.findall(r"<a[^>]*\shref=[\"']?([^\"'\s>#]+)", page.read_text()):
            if not re.match(r"[a-z]+:", target) and page.name != "404.html":
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_life_of_a_vm_is_drawn(site: Path) -> None:
    drawn = (site / "concepts.html").read_text()
    assert all(f">{state}</text>" in drawn for state in State)


def test_every_symptom_has_its_place() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert [symptom for symptom in SYMPTOMS if symptom not in page] == []


def test_comparisons_name_their_sources() -> None:
    page = (ROOT / "docs/comparison.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("| |")]
    assert len(heads) == 2
    for head in heads:
        others = [cell for cell in head.split("|")[3:] if cell.strip()]
        assert others
        assert all("](https://" in cell for cell in others)


def test_every_command_has_a_manual_page_and_an_example() -> None:
    written = dict(pages())

    def walk(ctx: click.Context) -> None:
        page = written.pop(f"{ctx.command_path.replace(' ', '-')}.1")
        assert page.startswith(".TH")
        for option in ctx.command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert escaped(option.opts[0]) in page
        if not isinstance(ctx.command, click.Group):
            assert "\nExample" in (ctx.command.epilog or ""), f"{ctx.command_path} has no example"
            return
        for name in ctx.command.list_commands(ctx):
            child = ctx.command.get_command(ctx, name)
            assert child is not None
            walk(click.Context(child, info_name=name, parent=ctx))

    walk(click.Context(cli, info_name=PROGRAM))
    assert not written


def test_what_troff_would_take_for_its_own_is_escaped() -> None:
    assert escaped(".TH a-b\\n\n'x") == "\\&.TH a\\-b\\en\n\\&'x"
