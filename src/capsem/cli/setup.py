"""`capsem setup`: from installed to ready."""

from __future__ import annotations

import click

from capsem.cli.context import Context
from capsem.cli.doctor import doctor_command
from capsem.cli.image import image_build
from capsem.image.catalog import Catalog
from capsem.model.errors import NotFound


@click.command("setup", epilog="\b\nExample:\n  capsem setup && capsem run 'uname -a'")
@click.pass_context
def setup_command(ctx: click.Context) -> None:
    """Make the guest image if there is none, then look whether this host can run VMs.

    Making the image takes root and minutes, once. Exits with 0 when nothing failed; doing it again changes nothing.
    """
    obj = ctx.find_object(Context)
    assert obj is not None
    catalog = Catalog.from_environment(obj.environ)
    try:
        catalog.find()
    except NotFound:
        click.echo("There is no guest image yet: making it.")
        with ctx.scope():
            ctx.obj = catalog
            ctx.invoke(image_build, mirror=None, force=False)
        ctx.obj = obj
    ctx.invoke(doctor_command, fast=True, as_json=False, bundle=None)
