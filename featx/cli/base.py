"""What every command shares: exit codes, output, groups of options."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from featx import __version__
from featx.errors import FeatxError
from featx.options import Preprocessing, Split, fields_of, fits, home
from featx.text import assigned, escaped, printable, prose, to_json

DONE, ERROR, SKIPPED, INTERRUPTED = 0, 1, 3, 130
KEPT = (
    "Features that were computed stay in the cache, and the same command continues from there. "
    "A run that has a report.json is finished: featx report RUN writes its page."
)


# how help is laid out, also on the page of the documentation
SHOWN = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class Place(click.Path):
    """A path, in which `~` is the home folder even where no shell has put it in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(home(value), param, ctx)


class Words(click.types.StringParamType):
    """A repeatable text; in the environment, several of them are quoted as in a shell."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return shlex.split(rv)


def name_variables(command: click.Command, prefix: str = "FEATX") -> None:
    """Have each option read the variable that its flag names, FEATX_SWEEP_BACKBONE, whatever its parameter."""
    prefix = f"{prefix}_{command.name}".upper()
    for option in command.params:
        if isinstance(option, click.Option):
            option.envvar = f"{prefix}_{max(option.opts, key=len).lstrip('-').replace('-', '_').upper()}"
            option.type = Words() if option.multiple and option.type is click.STRING else option.type
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        name_variables(inner, prefix)


class Commands(click.Group):
    """A group whose commands return their exit code, and whose errors become one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # `featx ... | head`: nobody reads on, which is not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:  # type: ignore[override]
        options["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # what its encoding has not, Latin-1 for one
        with warnings.catch_warnings():
            said: set[str] = set()  # a command may open a run twice

            def note(message: Warning | str, *where: Any, **more: Any) -> None:
                """A warning as a note for people, without the line of code that gave it."""
                if (text := printable(str(message))) not in said:
                    say(f"note: {text}")
                said.add(text)

            warnings.showwarning = note
            # Pillow's, on odd files: featx itself names what cannot be read
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                code = super().main(args, **options)
            except FeatxError as error:
                say(f"Error: {printable(str(error))}")
                code = ERROR
            except click.ClickException as error:
                error.show(shown := io.StringIO())
                say(shown.getvalue().rstrip("\n"))
                code = error.exit_code
            except OSError as error:  # a full disk, a pipe or a folder that cannot be written
                place = error.filename2 or error.filename  # the second is what a file would have been renamed to
                room = "; make room, then run the same command again" * (error.errno in (errno.ENOSPC, errno.EDQUOT))
                say(printable(f"Error: {error.strerror or error}{f': {place}' if place else ''}{room}"))
                code = ERROR
            except (click.Abort, KeyboardInterrupt):
                given = list(sys.argv[1:] if args is None else args)
                caches = bool(given) and given[0] in ("extract", "fit", "sweep", "evaluate", "cache")
                say(f"Interrupted. {KEPT}" if caches else "Interrupted.")
                code = INTERRUPTED
        sys.exit(code or DONE)


@click.group(cls=Commands, context_settings=SHOWN | {"auto_envvar_prefix": "FEATX"})
@click.version_option(__version__, prog_name="featx")
def cli() -> None:
    """Extract features once, retrain heads in milliseconds, ship one ONNX file.

    Every option can be set in the environment: FEATX_EXTRACT_WORKERS=4, FEATX_SWEEP_HEAD="logreg 'ridge reject=0.1'".
    Exit codes: 0 done, 1 error, 2 usage, 3 finished with images skipped, 130 interrupted.
    """


def echo(text: str) -> None:
    """A line on standard output, in the stream's own encoding; click would take another for ASCII."""
    print(text, flush=True)


def emit(values: Any) -> None:
    """Machine-readable output, on standard output."""
    echo(escaped(to_json(values), sys.stdout.encoding))


def say(text: str) -> None:
    """Prose, on standard error."""
    print(prose(text), file=sys.stderr, flush=True)


def show(found: Any, as_json: bool) -> None:
    """A result: its `to_dict` for programs, or its `text` for people."""
    emit(found.to_dict()) if as_json else say(found.text())


Command = Callable[..., Any]


def options_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator out of many, in reading order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on standard output.")


def numbers(text: str) -> list[float]:
    """`0.485,0.456,0.406`; click shows the text of a `ValueError`."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not numbers separated by commas") from None


def option(name: str) -> Callable[[Command], Command]:
    """The command line's form of one of `featx.options.Options`."""
    field = fields_of()[name]
    kind: Any = None
    if field.choices:
        kind = click.Choice(field.choices)
    elif fits([], field.hint):
        kind = numbers
    elif fits(0.5, field.hint):
        kind = click.FloatRange(field.option.least)
    elif fits(1, field.hint):
        kind = click.IntRange(None if field.option.least is None else int(field.option.least))
    elif fits(Path(), field.hint):
        kind = Place(file_okay=False)
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, default=field.option.default, type=kind, help=field.option.help)


cache_option = option("cache")
cluster_options = options_of(option("on"), option("address"))
memory_option = click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    callback=lambda context, parameter, value: value and value * 1e9,
    help="Larger features are read from the cache pass by pass; by default a fifth of the free memory.",
)
splits = click.Choice(get_args(Split))
factory_option = click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="The factory of your own that made RUN's backbone: what a run names is imported only if you name it, too.",
)
weights_option = click.option(
    "--weights", metavar="FILE", help="Where RUN's weights lie now, if they moved: they must be the same."
)
run_options = options_of(weights_option, factory_option)
preprocessing_options = options_of(*map(option, fields_of(Preprocessing)))
backbone_options = options_of(
    click.option("--backbone", "-b", default="resnet18", help="See `featx backbones`."),
    *map(option, ("weights", "layer", "seed")),
    preprocessing_options,
)
extraction_options = options_of(
    *map(
        option,
        ("cache", "device", "precision", "calibration", "runtime", "dtype", "batch_size", "workers", "views", "decode"),
    ),
    cluster_options,
)


def assignments(pairs: tuple[str, ...], option: str) -> dict[str, Any]:
    """`NAME=VALUE` pairs as a dict; a value is JSON where it reads as JSON, else text."""
    try:
        return assigned(pairs)
    except FeatxError as error:
        raise click.BadParameter(str(error), param_hint=option) from None
