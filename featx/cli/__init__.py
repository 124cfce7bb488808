"""Owns the command line: options -> one library call -> echo. Nothing heavy is imported for `--help`."""

from __future__ import annotations

from featx.cli.base import cli
from featx.cli.caching import backbones, cache, completion
from featx.cli.shipping import check, export, inspect, predict
from featx.cli.training import curve, evaluate, extract, fit, report, sweep

for command in (
    extract,
    fit,
    evaluate,
    report,
    curve,
    sweep,
    export,
    check,
    predict,
    inspect,
    backbones,
    cache,
    completion,
):
    cli.add_command(command)


def main() -> None:
    """The `featx` command."""
    cli()


__all__ = ["cli", "main"]
