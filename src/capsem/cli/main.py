"""The command `capsem`: its group of commands, each imported when it is called, and the one place where errors become
text and an exit code.

Exit codes: 0 done; the command's own for exec, run and output; 1 an error; 2 a mistake in the call; 75 cut off, by a
suspend or because something died: what was asked for may go on; 124 a time limit ran out; 130 interrupted; 141 nobody
reads the output any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Final

import click

from capsem.cli.context import INTERRUPTED, Context
from capsem.cli.terminal import printable
from capsem.model.errors import CapsemError

PROGRAM: Final = "capsem"
_COMPLETION: Final = "_CAPSEM_COMPLETE"
_BROKEN_PIPE: Final = 141

# Command -> the module that has it, as an attribute `<command>_command` (a "-" as "_").
COMMANDS: Final = MappingProxyType(
    {
        "create": "capsem.cli.create",
        "run": "capsem.cli.execute",
        "exec": "capsem.cli.execute",
        "shell": "capsem.cli.shell",
        "forward": "capsem.cli.forward",
        "jobs": "capsem.cli.jobs",
        "output": "capsem.cli.jobs",
        "list": "capsem.cli.show",
        "info": "capsem.cli.show",
        "logs": "capsem.cli.show",
        "history": "capsem.cli.ledger",
        "timeline": "capsem.cli.ledger",
        "inspect": "capsem.cli.ledger",
        "stats": "capsem.cli.ledger",
        "triage": "capsem.cli.ledger",
        "panics": "capsem.cli.ledger",
        "host-logs": "capsem.cli.ledger",
        "stop": "capsem.cli.change",
        "resume": "capsem.cli.change",
        "suspend": "capsem.cli.change",
        "delete": "capsem.cli.change",
        "restart": "capsem.cli.change",
        "persist": "capsem.cli.change",
        "fork": "capsem.cli.change",
        "checkpoint": "capsem.cli.checkpoint",
        "checkpoints": "capsem.cli.checkpoint",
        "rollback": "capsem.cli.checkpoint",
        "set": "capsem.cli.policy",
        "secret": "capsem.cli.secret",
        "net": "capsem.cli.net",
        "purge": "capsem.cli.change",
        "cp": "capsem.cli.copy",
        "mcp": "capsem.cli.mcp",
        "image": "capsem.cli.image",
        "df": "capsem.cli.show",
        "top": "capsem.cli.top",
        "doctor": "capsem.cli.doctor",
        "stress": "capsem.cli.stress",
        "support-bundle": "capsem.cli.doctor",
        "setup": "capsem.cli.setup",
        "update": "capsem.cli.host",
        "status": "capsem.cli.daemon",
        "start": "capsem.cli.daemon",
        "install": "capsem.cli.daemon",
        "uninstall": "capsem.cli.daemon",
        "version": "capsem.cli.host",
        "completions": "capsem.cli.host",
    }
)
ALIASES: Final = MappingProxyType({"ls": "list", "rm": "delete", "attach": "resume"})


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, by its name or an alias."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[name]), f"{name.replace('-', '_')}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, which knows of no commands until they are imported: it may have meant one of them."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as exc:
            raise click.exceptions.NoSuchCommand(exc.command_name, possibilities=COMMANDS, ctx=ctx) from None


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        command = cli.get_command(ctx, "version")
        assert command is not None
        ctx.invoke(command)
        ctx.exit()


@click.command(
    PROGRAM,
    cls=LazyGroup,
    epilog="\b\nExamples:\n  capsem run 'echo hello'\n  capsem create -n box && capsem exec box 'uname -a'",
)
@click.option(
    "--uds-path",
    metavar="PATH",
    help="Talk to the service at this socket, and start none.",
)
@click.option("--trace", metavar="FILE", help="Write what took how long to FILE, for chrome://tracing or Perfetto.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="As `capsem version`."
)
@click.pass_context
def cli(ctx: click.Context, uds_path: str | None, trace: str | None) -> None:
    """Linux machines for AI agents: hardware-isolated, persistent by name."""
    ctx.obj = Context(os.environ, uds_path)
    if trace is not None:
        from capsem.cli.trace import begin

        ctx.call_on_close(begin(trace, ctx.obj))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; nothing is raised."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if os.environ.get(_COMPLETION):
            cli.main(arguments, prog_name=PROGRAM)  # answers the shell and exits
        with cli.make_context(PROGRAM, arguments) as ctx:
            code = cli.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except CapsemError as exc:
        return _fail(exc.message, exc.hint, exc.exit_code)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return exc.exit_code
    except click.UsageError as exc:
        return _fail(exc.format_message(), _usage_hint(exc), exc.exit_code)
    except click.ClickException as exc:
        return _fail(exc.format_message(), None, exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return _BROKEN_PIPE
    except OSError as exc:
        return _fail(str(exc), None, 1)
    except Exception as exc:
        if "debug" in os.environ.get("RUST_LOG", "") + os.environ.get("CAPSEM_LOG", ""):
            raise
        return _fail(f"unexpected {type(exc).__name__}: {exc}", "CAPSEM_LOG=debug shows where", 1)
    return code if isinstance(code, int) else 0


def _usage_hint(exc: click.UsageError) -> str:
    """Where to read how it is called; and for `exec box ls -l`, whose options those after the command's name are."""
    if exc.ctx is None:
        return f"{PROGRAM} --help"
    words = any(each.name == "command" and each.nargs == -1 for each in exc.ctx.command.params)
    if isinstance(exc, click.NoSuchOption) and words:
        return f"{exc.ctx.command_path} --help; options of the command in the VM go after a --"
    return f"{exc.ctx.command_path} --help"


def _fail(message: str, hint: str | None, code: int) -> int:
    click.echo(f"error: {printable(message)}", err=True)
    if hint:
        click.echo(f"hint: {printable(hint)}", err=True)
    return code


def _forget_stdout() -> None:
    """Keep the interpreter from complaining, at its end, about output that nobody takes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
