"""The commands that ship: export, check, predict, inspect."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args

import click

from featx.cli.base import (
    DONE,
    SKIPPED,
    Place,
    cluster_options,
    echo,
    emit,
    json_option,
    options_of,
    run_options,
    say,
    show,
    splits,
)
from featx.options import Input, Reduced
from featx.text import encodable, escaped, printable, prose

parity_options = options_of(
    click.option("--parity-images", "images", default=2000, type=click.IntRange(1), help="Images compared, at most."),
    click.option("--split", default="val", type=splits, help="The split these come from."),
)


@click.command()
@click.argument("run", type=Place(file_okay=False))
@click.option("--output", "-o", type=Place(dir_okay=False), help="By default model.onnx in RUN.")
@click.option(
    "--input",
    default="pixels",
    type=click.Choice(get_args(Input)),
    help="pixels: any size, resized in the file; tensor: cropped already; features: the head alone.",
)
@click.option("--outputs", help="Some of probabilities,logits,features,accepted; by default all.")
@parity_options
@click.option("--data", type=Place(), help="Where the run's images lie now, if they moved.")
@click.option("--tolerance", type=float, help="Limit for probabilities, through the file's resize; by default 0.05.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", *get_args(Reduced)]),
    help="By default int8 for an int8 run, fp32 for others, of which int8 and fp16 (for GPUs) files are written only "
    "if they are faster here and lose few right answers.",
)
@click.option("--max-loss", default=0.5, help="int8, fp16: points of accuracy that may be lost.")
@click.option("--max-changed", default=5.0, help="int8, fp16: answers that may change, in points of the images.")
@click.option("--provider", "providers", multiple=True, help="int8, fp16: execution provider to measure speed on.")
@run_options
@cluster_options
@json_option
def export(
    run: str, outputs: str | None, precision: Literal["fp32"] | Reduced | None, as_json: bool, **options: Any
) -> int:
    """Write RUN as one ONNX file, after comparing it with the torch classifier on the run's own images.

    The comparison is written beside it as parity.json. A file that exceeds a limit is not written.
    """
    from featx.runs import open_run
    from featx.shipping.exporting import DEFAULT, export, require_float

    options["outputs"] = tuple(name.strip() for name in outputs.split(",")) if outputs else None
    tolerance, providers = options.pop("tolerance"), list(options.pop("providers"))
    limits = {name: options.pop(name) for name in ("max_loss", "max_changed")}
    opened = open_run(run)
    if precision not in (None, opened.config.spec.precision):
        require_float(opened)
    if precision in ("int8", "fp16") and opened.config.spec.precision != "int8":
        from featx.shipping.reduction import export_reduced

        show(export_reduced(opened, precision, **limits, providers=providers or None, **options), as_json)
        return DONE
    show(export(opened, tolerance=tolerance, **options), as_json)
    if not as_json:
        echo(printable(options["output"] or os.path.join(run, DEFAULT[options["input"]])))
    return DONE


@click.command()
@click.argument("model", type=Place(dir_okay=False))
@click.argument("run", type=Place(file_okay=False))
@parity_options
@run_options
@json_option
def check(model: str, run: str, as_json: bool, **options: Any) -> int:
    """Compare a deployed MODEL with its RUN: is it unchanged, and does it still give the same answers?"""
    from featx.shipping.exporting import check

    show(check(model, run, **options), as_json)
    return DONE


@click.command()
@click.argument("model", type=Place())
@click.argument("images", nargs=-1, required=True, type=Place())
@click.option("--top-k", "-k", default=5, type=click.IntRange(1), help="Classes named per image.")
@click.option("--batch-size", default=32, type=click.IntRange(1))
@click.option("--workers", type=click.IntRange(1), help="Decoding threads; by default one per core.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the model; by default one per core.")
@click.option("--provider", "providers", multiple=True, help="onnxruntime execution provider: cpu, cuda, ...")
@click.option("--head", type=Place(), help="A head exported alone, for the features of MODEL.")
@click.option("--features", is_flag=True, help="Put the features into --json.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on standard output.")
@click.option("--output", "-o", type=Place(dir_okay=False), help="Write the answers to FILE.csv or FILE.jsonl.")
@json_option
def predict(
    model: str, images: tuple[str, ...], as_csv: bool, as_json: bool, output: str | None, **options: Any
) -> int:
    """Classify IMAGES (files, folders, globs) with an exported MODEL; onnxruntime only, no torch.

    --json prints one JSON object a line, as soon as its batch is done. A file appears once all answers are in it.
    """
    from featx.shipping import prediction
    from featx.shipping.deployed import Model

    if output and not (as_csv or as_json):
        as_csv, as_json = output.lower().endswith(".csv"), output.lower().endswith((".jsonl", ".json"))
        if not (as_csv or as_json):
            raise click.UsageError(f"--output {printable(output)} is neither .csv nor .jsonl; add --csv or --json")
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    if options["features"] and not as_json:
        raise click.UsageError("--features go into --json: add it")
    threads, head, providers = (options.pop(name) for name in ("threads", "head", "providers"))
    opened = Model(model, providers=list(providers) or None, threads=threads, head=head)
    failed = 0

    def noted() -> Iterator[prediction.Prediction]:
        nonlocal failed
        for one in prediction.predict(opened, images, **options):
            failed += one.error is not None
            if one.error is not None and not as_json:
                say(f"skipped: {printable(one.id)}: {one.error}")
            if one.error is None or as_json or as_csv:
                yield one

    several = opened.activation == "sigmoid"
    if as_json:
        lines = prediction.json_lines(noted())
    elif as_csv:
        lines = prediction.csv_lines(noted(), min(options["top_k"], len(opened.class_names)), several)
    else:
        lines = prediction.table_lines(noted(), several)
    if output:
        lines = iter([printable(str(prediction.write_lines(output, lines, marked=as_csv)))])
    for line in lines:
        echo(escaped(encodable(line), sys.stdout.encoding) if as_json and not output else line)
    return SKIPPED if failed else DONE


@click.command()
@click.argument("file", type=Place(dir_okay=False))
@json_option
def inspect(file: str, as_json: bool) -> int:
    """Show what an ONNX FILE is: classes, input contract, metrics, parts; any other file's inputs and outputs."""
    from featx.shipping.inspection import inspect

    found = inspect(file)
    if as_json:
        emit(found.to_dict())
    else:
        echo(prose(found.text()))
    return DONE
