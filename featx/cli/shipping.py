"""Owns the commands that ship: export, predict, inspect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from featx.cli._base import DONE, SKIPPED, json_option, printable, say


@click.command()
@click.argument("model", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--top-k", "-k", default=5, show_default=True, type=click.IntRange(1), help="Classes named an image.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--workers", type=click.IntRange(1), help="Decoding threads; by default one a core.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the model; by default one a core.")
@click.option("--provider", "providers", multiple=True, help="onnxruntime execution provider: cpu, cuda, ...")
@click.option("--head", type=click.Path(), help="A head exported alone, for the features of MODEL.")
@click.option("--features", is_flag=True, help="Put the features into --json.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on standard output.")
@json_option
def predict(
    model: str, images: tuple[str, ...], providers: tuple[str, ...], as_csv: bool, as_json: bool, **options: Any
) -> int:
    """Classify IMAGES (files, folders, globs) with an exported MODEL; onnxruntime only, no torch.

    --json prints one JSON object a line, as soon as its batch is done.
    """
    from featx import prediction

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    failed = 0

    def counted() -> Iterator[prediction.Prediction]:
        nonlocal failed
        for one in prediction.predict(model, images, providers=list(providers) or None, **options):
            failed += one.error is not None
            if one.error is not None and not as_json:
                say(f"skipped: {one.id}: {one.error}")
            yield one

    lines: Iterable[str]
    if as_json:
        lines = prediction.json_lines(counted())
    elif as_csv:
        lines = prediction.csv_lines(counted(), options["top_k"])
    else:
        lines = prediction.table_lines(one for one in counted() if one.error is None)
    for line in lines:
        click.echo(printable(line))
    return SKIPPED if failed else DONE
