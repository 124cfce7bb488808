"""The commands `backbones`, `completion`, and `cache` with its subcommands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import featx.cli.base as base
from featx.cli.base import DONE, ERROR, Place, cache_option, cli, echo, emit, json_option, say
from featx.text import printable

if TYPE_CHECKING:
    import numpy as np


@click.command()
@click.argument("pattern", default="")
@json_option
def backbones(pattern: str, as_json: bool) -> None:
    """List the torchvision backbones; PATTERN keeps the names that contain it.

    timm networks (timm/NAME) and factories of your own (package.module:function) work as well.
    """
    from featx.backbones.table import listing

    rows = [row for row in listing() if pattern in row["name"]]
    if not rows:
        say(f"no name contains {pattern!r}; `featx backbones` lists them all")
    if as_json:
        emit(rows)
        return
    width = max([len(row["name"]) for row in rows], default=8)
    echo(f"{'backbone':<{width}}  features  parameters  input  weights")
    for row in rows:
        line = f"{row['name']:<{width}}  {row['features']:>8}  {row['parameters'] / 1e6:>8.1f} M  {row['crop']:>5}"
        echo(f"{line}  {', '.join(row['weights'])}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script: eval "$(featx completion bash)"."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    found = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    echo(found(cli, {}, "featx", "_FEATX_COMPLETE").source())


@click.group()
def cache() -> None:
    """List, check, tidy and share the features in a cache. Nothing is removed unless you say so."""


against_option = click.option(
    "--against", metavar="DATA", type=Place(), help="Which rows does DATA use? Reads no pixels."
)


@cache.command("list")
@cache_option
@json_option
def list_(cache: str, as_json: bool) -> None:
    """List the cache's entries, with sizes."""
    from featx.cache import caching
    from featx.sources.own import MADE_AGAIN

    found, sizes = caching.entries(Path(cache)), caching.sizes(Path(cache))
    if as_json:
        emit({"entries": [entry.to_dict() for entry in found], "bytes": sizes})
        return

    width = max([len(entry.name) for entry in found], default=4)
    echo(f"{'name':<{width}}  {'MB':>9}  shards  row       what")
    for entry in found:
        what, shape = "spec.json is lost", "?"
        if entry.form:
            spec, shape = entry.form.spec, "x".join(map(str, entry.form.row_shape)) or "?"
            what = f"{spec.backbone} {spec.layer} {spec.view} {spec.precision} {spec.dtype} {spec.preprocess.pixels}"
            what += f", weights {spec.weights[:8]}"
            what += f", calibration {spec.calibration[:8]} by {spec.engine}" if spec.calibration else ""
        what += f"; {entry.damaged} damaged files set aside" if entry.damaged else ""
        line = f"{entry.name:<{width}}  {entry.bytes / 1e6:>9.1f}  {entry.shards:>6}  {shape:<8}  {what}"
        echo(printable(line))
    others = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items() if name in MADE_AGAIN)
    if others:
        say(f"beside the features, and made again after `featx cache remove`: {others}")
    if size := sizes.get("calibrations"):
        say(f"beside the features, and needed by those in int8 and by their runs: calibrations {size / 1e6:.1f} MB")


@cache.command()
@click.argument("name")
@cache_option
@against_option
@json_option
def info(name: str, cache: str, against: str | None, as_json: bool) -> None:
    """Describe the entry NAME (or the start of its name)."""
    from featx.cache import caching

    emit_or_say(caching.info(Path(cache), name, keys_of(cache, against)).to_dict(), as_json)


@cache.command()
@click.argument("name", required=False)
@cache_option
@json_option
def verify(name: str | None, cache: str, as_json: bool) -> int:
    """Read every byte of NAME, or of all entries; damage is named and set aside, and ends in exit code 1."""
    from featx.cache import caching

    rows = caching.verify(Path(cache), name)
    if as_json:
        emit([asdict(row) for row in rows])
    else:
        for row in rows:
            say(row.text())
    return ERROR if any(row.notes for row in rows) else DONE


@cache.command()
@click.argument("name")
@cache_option
@against_option
@click.option("--only", is_flag=True, help="Drop the rows that the data set of --against does not use.")
@json_option
def compact(name: str, cache: str, against: str | None, only: bool, as_json: bool) -> None:
    """Merge NAME's shards into one file that is memory-mapped, in the order of --against if given."""
    from featx.cache import caching

    if only and against is None:
        raise click.UsageError("--only drops what a data set does not use: name it with --against DATA")
    found = caching.compact(Path(cache), name, keys_of(cache, against, whole=only), only=only)
    emit_or_say(asdict(found), as_json)
    if not as_json and not found.done:
        say("one file in this order already: there was nothing to do")


@cache.command()
@click.argument("name")
@cache_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(name: str, cache: str, yes: bool) -> None:
    """Remove the entry NAME and all its features; or engines, memo, plans, rates or resolved, which runs make again."""
    from featx.cache import caching

    path, size = caching.removable(Path(cache), name)
    if not yes:
        try:
            agreed = click.confirm(f"Remove {path.name}, {size / 1e6:.1f} MB?", err=True)
        except click.Abort:  # nobody there to ask, or Ctrl-C
            raise click.UsageError("nothing was removed; --yes removes without asking") from None
        if not agreed:
            say("nothing was removed")
            return
    say(f"removed {caching.remove(Path(cache), path.name).name}")


@cache.command("export")
@click.argument("data", type=Place())
@click.argument("file", type=Place(dir_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace FILE, if featx exported it.")
@base.backbone_options
@base.extraction_options
def export_(data: str, file: str, overwrite: bool, **options: Any) -> int:
    """Write the features of DATA as one plain HDF5 FILE: features, labels, class names, ids, spec.

    What the cache lacks is extracted first. h5py, MATLAB and R read the file without featx.
    """
    from featx.cache import caching
    from featx.extraction.pipeline import extract

    caching.check_export(Path(file), overwrite)
    features = extract(data, **options)
    path = caching.export(features, Path(file), overwrite=overwrite)
    echo(printable(str(path)))
    assert features.report is not None
    for image in features.report.skipped_images[:10]:
        say(f"skipped: {printable(image['id'])}: {image['reason']}")
    return features.report.exit_code


def keys_of(cache: str, data: str | None, *, whole: bool = False) -> np.ndarray | None:
    """The content keys of a data set, `uint8 [N, 32]`; of all its files, or of those that can be read."""
    from featx.extraction.keys import content_keys

    return None if data is None else content_keys(data, cache, whole=whole)


def emit_or_say(values: dict[str, Any], as_json: bool) -> None:
    """A flat dict, for machines or for people."""
    if as_json:
        return emit(values)
    width = max(map(len, values))
    for name, value in values.items():
        echo(printable(f"{name:<{width}}  {value}"))
