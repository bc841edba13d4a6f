"""`capsem image`: guest images, made, listed, checked and removed on this host, without the service."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from capsem.cli.context import IMAGE, Context
from capsem.cli.terminal import Line, table, waiting
from capsem.image.build import build
from capsem.image.catalog import Catalog, Image
from capsem.image.recipe import PROFILES, for_this_machine
from capsem.model.errors import CapsemError, WrongState
from capsem.store import durable

_SHORT = 12  # hexadecimal digits that tell digests apart


@click.group("image", epilog="\b\nExamples:\n  capsem image build\n  capsem image list")
@click.option("--assets-dir", type=click.Path(path_type=Path), metavar="DIR", help="Look here first, and write here.")
@click.pass_context
def image_command(ctx: click.Context, assets_dir: Path | None) -> None:
    """Make and look after guest images."""
    obj = ctx.find_object(Context)
    assert obj is not None
    ctx.obj = Catalog.from_environment(obj.environ, assets_dir)


@image_command.command(
    "build",
    epilog="\b\nExamples:\n  capsem image build\n  capsem image build --profile code\n"
    "  capsem image build --mirror http://mirror.example/debian",
)
@click.option("--profile", type=click.Choice([*PROFILES]), default="default", help="What is in it; else `default`.")
@click.option("--mirror", metavar="URL", help="A Debian mirror; else it is found out.")
@click.option("--force", is_flag=True, help="Make it anew though nothing has changed.")
@click.pass_context
def image_build(ctx: click.Context, profile: str, mirror: str | None, force: bool) -> None:
    """Make an image.

    Profile `default` is a small Debian with Python and git; `code` adds compilers, Node, npm, pip and the like. Nothing
    is done if the image is there and its recipe has not changed. An older one that no VM needs is removed.
    """
    catalog, context = ctx.find_object(Catalog), ctx.find_root().obj
    assert catalog is not None
    began = time.time()
    with Steps() as steps:
        image = build(for_this_machine(profile), catalog.write_to, mirror=mirror, force=force, progress=steps.show)
    done = "is up to date" if image.manifest.created_at < began else "built"
    click.echo(f"{image.name} {image.digest[:_SHORT]} {done}: {image.directory}")
    if done == "built":
        try:
            _show_removed(catalog.prune(context.paths.run_dir, name=profile))
        except WrongState as exc:
            click.echo(f"note: older images stay: {exc.message}", err=True)
    _prepare(context, profile)


def _prepare(context: Context, profile: str) -> None:
    """Have a service that runs make a template of the image, so that the first VM need not wait for it."""
    try:
        answer = context.client(start=False).call("prepare", body={"profile": profile})
    except CapsemError:  # there is none; the first VM of the next one makes it
        return
    if answer["making"]:
        click.echo("note: the service makes a template of it for new VMs, which are there sooner then", err=True)


@image_command.command("list", epilog="\b\nExample:\n  capsem image list --json")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def image_list(catalog: Catalog, as_json: bool) -> None:
    """List the images on this host.

    Where a name comes twice, the first one counts.
    """
    images = catalog.list()
    if as_json:
        click.echo(json.dumps([_describe(image) for image in images], indent=2))
    elif not images:
        click.echo("No images.")
    else:
        rows = [
            (image.name, image.digest[:_SHORT], f"{_size(image) >> 20}M", _date(image), str(image.directory))
            for image in images
        ]
        for line in table(("NAME", "DIGEST", "SIZE", "BUILT", "DIRECTORY"), rows):
            click.echo(line)


@image_command.command("rm", epilog="\b\nExample:\n  capsem image rm default")
@click.argument("name", type=IMAGE)
@click.option("--force", is_flag=True, help="Though VMs were made from it, which cannot start without it.")
@click.pass_context
def image_rm(ctx: click.Context, name: str, force: bool) -> None:
    """Remove every image of a name, unless VMs need one.

    NAME may also be that of one image's directory, for that one alone.
    """
    catalog, context = ctx.find_object(Catalog), ctx.find_root().obj
    assert catalog is not None
    removed = catalog.remove(name, context.paths.run_dir, force=force)
    _show_removed(removed)
    if not removed:  # there was one, but it was damaged
        click.echo(f"{name} removed")


@image_command.command("prune", epilog="\b\nExample:\n  capsem image prune")
@click.pass_context
def image_prune(ctx: click.Context) -> None:
    """Remove images that are out of date and that no VM needs."""
    catalog, context = ctx.find_object(Catalog), ctx.find_root().obj
    assert catalog is not None
    removed = catalog.prune(context.paths.run_dir)
    _show_removed(removed)
    if not removed:
        click.echo("Nothing to remove.")


@image_command.command("verify", epilog="\b\nExample:\n  capsem image verify")
@click.argument("name", type=IMAGE, default="default")
@click.pass_obj
def image_verify(catalog: Catalog, name: str) -> None:
    """Compare an image with its manifest.

    All of it is read, which takes a while.
    """
    image = catalog.find(name)
    with waiting(f"reading {name}"):
        catalog.verify(image)
    click.echo(f"{image.name} {image.digest[:_SHORT]} ok")


class Steps:
    """What a build is at: a line for each step; on a terminal also how far it is, in place."""

    def __init__(self) -> None:
        self._line = Line()
        self._step = ""
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._line.clear()

    def show(self, step: str, fraction: float | None) -> None:
        """Take note of progress."""
        if self._terminal:
            self._line.show(step if fraction is None else f"{step} {fraction:4.0%}")
        elif step != self._step:
            click.echo(step, err=True)
        self._step = step


def _show_removed(images: list[Image]) -> None:
    for image in images:
        click.echo(f"{image.name} {image.digest[:_SHORT]} removed")


def _describe(image: Image) -> dict[str, object]:
    return {
        "name": image.name,
        "digest": image.digest,
        "size_bytes": _size(image),
        "created_at": image.manifest.created_at,
        "kernel_version": image.manifest.kernel_version,
        "directory": str(image.directory),
    }


def _size(image: Image) -> int:
    return durable.allocated_bytes(image.directory)


def _date(image: Image) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(image.manifest.created_at))
