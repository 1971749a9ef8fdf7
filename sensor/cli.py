"""The `ringside` command. What a subcommand needs is imported when it runs: --help is quick."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .config import Config, load, parse_duration, parse_flag
from .errors import RequestError, RingsideError

if TYPE_CHECKING:
    import asyncio

C = TypeVar("C", bound=Callable[..., Any])

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Commands(click.Group):
    """Commands whose errors are a line on standard error: status 1, or 2 if the command line is at fault."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit in standalone mode."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        _open_standard_files()
        try:
            # click returns the status of a ctx.exit(), and what a command returns, which is None here
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            if isinstance(error, _NO_ARGUMENTS):
                error.show()
            else:
                _complain(error.format_message())
            status = error.exit_code
        except click.Abort:  # Ctrl-C where nothing catches it
            status = 130
        except Exception as error:
            if not _is_expected(error):
                raise
            _complain(str(error))
            status = 1
        sys.exit(status or 0)


# since click 8.2; before, it has printed the help and exits with 0
_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def _open_standard_files() -> None:
    """Put /dev/null where 0, 1 or 2 is closed: another file would be taken for it, and libuv aborts."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def _is_expected(error: Exception) -> bool:
    """True for an error that is no fault of this program."""
    if isinstance(error, RingsideError):
        return True
    errors = sys.modules.get("ringside.client.errors")  # not imported, not raised
    return errors is not None and isinstance(error, errors.ClientError)


def _complain(message: str) -> None:
    from .show import clean

    click.echo("ringside: " + "\n".join(map(clean, message.rstrip(".").split("\n"))), err=True)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(package_name="ringside", message="ringside %(version)s")
def main() -> None:
    """A container-aware telemetry sensor for Linux: what programs do, as typed events."""


# -- settings --------------------------------------------------------------------------------------------


def _configured(**options: Any) -> Config:
    """The configuration; what is wrong with it is a fault of the command line."""
    file = options.pop("config", None)
    try:
        return load(options, file=file)
    except RequestError as error:
        raise click.UsageError(str(error)) from error


def _config_option(command: C) -> C:
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A TOML file of settings, as in serve --help.",
    )(command)


def _show_default(field: dataclasses.Field[Any]) -> str:
    """A setting's default as one would write it."""
    value = getattr(Config(), field.name)
    kind = field.metadata.get("kind")
    if kind == "size":
        for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
            if value >= 1 << shift and not value % (1 << shift):
                return f"{value >> shift}{unit}"
    if kind == "duration":
        for unit, factor in (("s", 10**9), ("ms", 10**6)):
            if not value % factor:
                return f"{value // factor}{unit}"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _setting_options(command: C) -> C:
    """An option for each field of Config."""
    for field in reversed(dataclasses.fields(Config)):
        name = "--" + field.name.replace("_", "-")
        kind = field.metadata.get("kind")
        text = field.metadata["help"]
        if field.metadata["parse"] is parse_flag:
            option = click.option(f"{name}/--no-{name[2:]}", field.name, default=None, help=text)
        else:
            shown = _show_default(field)
            option = click.option(
                name,
                field.name,
                multiple=bool(field.metadata.get("many")),
                metavar={"size": "SIZE", "duration": "TIME"}.get(str(kind), "TEXT"),
                help=f"{text}  [default: {shown}]" if shown else text,
            )
        command = option(command)
    return command


# -- serve -----------------------------------------------------------------------------------------------


@main.command()
@_config_option
@_setting_options
def serve(**options: Any) -> None:
    """Serve events over gRPC, to any number of subscribers, until SIGTERM or SIGINT.

    Each setting is also a variable (RINGSIDE_RING_SIZE for --ring-size) and a key of the --config file
    (ring-size = "8M"). Options win over variables, variables over the file.
    """
    import asyncio
    import gc

    import uvloop

    from .service import serve as run
    from .systemd import notify

    def started(addresses: list[str]) -> None:
        # what is there by now stays, and processes come and go without cycles: little to look for
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        for address in addresses:
            click.echo(f"listening at {address}")
        notify("READY=1")

    async def stopping(stop: asyncio.Event) -> None:
        await stop.wait()
        notify("STOPPING=1")

    async def served() -> None:
        stop = asyncio.Event()
        told = asyncio.create_task(stopping(stop))
        try:
            await run(config, started=started, stop=stop)
        finally:
            told.cancel()

    config = _configured(**options)
    logging.basicConfig(format="ringside: %(message)s", level=logging.WARNING)
    uvloop.run(served())


# -- watch -----------------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    """A time on the command line."""
    try:
        nanoseconds = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if nanoseconds <= 0:
        raise click.BadParameter("must be more than 0")
    return nanoseconds / 10**9


def _named(text: str) -> tuple[str, str]:
    """A NAME=FETCHARG on the command line."""
    name, _, fetch = text.partition("=")
    if not name or not fetch:
        raise click.BadParameter(f"{text!r} is not NAME=FETCHARG, as in flags=+0($arg3):u64")
    return name, fetch


_WHATS = [
    ("process[:KIND]", "processes that fork, exec, exit"),
    (
        "syscall[:CALL[:SIDE]]",
        "system calls by name or number, all if none or *; enter (the default), exit, both",
    ),
    ("file[:GLOB]", "files being opened"),
    (
        "network[:KIND[:SIDE]]",
        "connect, bind, listen, accept, sendto, recvfrom; attempt, result, both if none",
    ),
    ("kernel:SYMBOL[:SIDE]", "calls of a kernel function; enter (the default), exit, both"),
    ("container[:KIND]", "containers created, running, exited, destroyed"),
    ("ticker:TIME", "the time, every 1s or whatever is said"),
    ("chargen:N", "texts of N characters, as fast as they are read"),
]


class _WatchCommand(click.Command):
    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What can be watched, as a list that click would fold."""
        with formatter.section("What can be watched"):
            formatter.write_dl(_WHATS)


@main.command(cls=_WatchCommand, no_args_is_help=True)
@click.argument("what", nargs=-1, required=True)
@click.option(
    "--connect",
    metavar="ADDR",
    envvar="RINGSIDE_CONNECT",
    help="A running sensor, at unix:PATH or HOST:PORT. Without it one runs in this command.",
)
@click.option(
    "--filter",
    "where",
    metavar="EXPR",
    default="",
    help="Only events whose fields are so, as in 'sin_port == 443 && sin_addr != 127.0.0.1'. "
    "With kernel:SYMBOL it is in the kernel's own filter language.",
)
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    type=_named,
    metavar="NAME=FETCHARG",
    help="With kernel:SYMBOL: a value to fetch, as in flags=+0($arg3):u64. May be repeated.",
)
@click.option(
    "--container",
    "containers",
    multiple=True,
    metavar="NAME",
    help="Only containers of this name, glob or id. May be repeated.",
)
@click.option(
    "--image", "images", multiple=True, metavar="GLOB", help="Only containers of this image. May be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="An object a line, with the API's names.")
@click.option("--quiet", is_flag=True, help="Only count.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="End after so many events.")
@click.option("--for", "duration", type=_seconds, metavar="TIME", help="End after this time, as in 10s.")
@click.option(
    "--since",
    type=_seconds,
    metavar="TIME",
    help="Begin with what a running sensor remembers of this time, as in 1m.",
)
@click.option("--include-self/--no-include-self", default=None, help="Include what the sensor itself does.")
@_config_option
def watch(
    what: Sequence[str],
    connect: str | None,
    where: str,
    arguments: Sequence[tuple[str, str]],
    containers: Sequence[str],
    images: Sequence[str],
    as_json: bool,
    quiet: bool,
    limit: int | None,
    duration: float | None,
    since: float | None,
    include_self: bool | None,
    config: Path | None,
) -> None:
    """Show events as they happen, until Ctrl-C.

    \b
    ringside watch process
    ringside watch syscall:openat:exit file:'/etc/*' --container web
    ringside watch network:connect --filter 'sin_port == 443' --json --limit 10
    ringside watch kernel:do_unlinkat --arg 'path=+0(+0($arg2)):string'
    """
    if as_json and quiet:
        raise click.UsageError("--json and --quiet exclude each other")
    if connect and include_self is not None:
        raise click.UsageError("--include-self is a setting of the sensor that --connect names")
    if since and not connect:
        raise click.UsageError("--since needs --connect: a sensor that is only now started remembers nothing")
    if len(dict(arguments)) < len(arguments):
        raise click.UsageError("--arg: the same name twice")
    form = "json" if as_json else "count" if quiet else "lines"
    settings = _configured(
        config=config,
        include_self=include_self,
        # else there is no telling which program made a system call: its process may be gone by then
        lineage="all" if form == "lines" else None,
    )

    from . import what as words

    try:
        subscription = words.subscription(
            what,
            where=where,
            arguments=dict(arguments),
            # asked for by id alone, others' events need not be made
            container=[name for name in containers if not words.is_id(name)],
            container_id=[name for name in containers if words.may_be_id(name)],
            image=images,
            limit=limit,
            duration=duration,
            since=since,
        )
    except (words.WhatError, RequestError) as error:
        raise click.UsageError(str(error)) from error

    import uvloop

    from .watch import View, Watch

    logging.basicConfig(format="ringside: %(message)s", level=logging.ERROR)  # losses are in the closing line
    view = View(form, bool(containers or images), words.symbols(subscription))
    uvloop.run(Watch(subscription, view, settings, connect or "").run())


# -- check -----------------------------------------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_config_option
@click.pass_context
def check(ctx: click.Context, as_json: bool, config: Path | None) -> None:
    """Tell what this kernel and these privileges allow. Exit status 0 only if it is everything."""
    settings = _configured(config=config)

    import uvloop

    from .check import as_json as render
    from .check import mechanisms, table

    logging.basicConfig(format="ringside: %(message)s", level=logging.ERROR)
    rows = uvloop.run(mechanisms(settings))
    click.echo(render(rows) if as_json else table(rows))
    ctx.exit(0 if all(row.served for row in rows) else 1)


if __name__ == "__main__":
    main()
