"""Owns the commands that learn: extract, fit, evaluate."""

from __future__ import annotations

from typing import Any

import click

from featx.cli._base import (
    DONE,
    SKIPPED,
    assignments,
    backbone_options,
    emit,
    extraction_options,
    json_option,
    printable,
    say,
)


@click.command()
@click.argument("data", type=click.Path())
@backbone_options
@extraction_options
@json_option
def extract(data: str, as_json: bool, **options: Any) -> int:
    """Run the frozen backbone once per image of DATA; the features go to the cache.

    DATA is a folder (one folder a class, or train/ and val/ with such folders, or images alone) or a
    manifest (.csv, .jsonl, .parquet).
    """
    from featx.extraction import sync

    extraction = sync(data, **options)
    report = extraction.report
    if as_json:
        emit(report | {"backbone": extraction.info.to_dict(), "cache": str(extraction.cache)})
    else:
        say(extraction_text(report))
        say(f"{extraction.info.name} ({extraction.info.weights_note}), {extraction.info.row_shape} a row")
    return SKIPPED if report["skipped"] else DONE


@click.command()
@click.argument("data", type=click.Path())
@click.option("--head", "-H", default="logreg", show_default=True, help="A file's name in featx/heads.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the head; repeatable.")
@click.option("--output", "-o", type=click.Path(file_okay=False), help="The run's folder.")
@click.option("--overwrite", is_flag=True, help="Replace a run that lies there.")
@click.option("--restrict", is_flag=True, help="pretrained head: answer mapped classes only.")
@click.option("--map", "mapping", multiple=True, metavar="LABEL=CLASS", help="pretrained head: name a label's class.")
@backbone_options
@extraction_options
@json_option
def fit(
    data: str, pairs: tuple[str, ...], restrict: bool, mapping: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Extract what is missing, train a head, evaluate it, write a run: export/<data>-<backbone>-<head>-<hash>/."""

    from featx.evaluation import Report
    from featx.fitting import fit

    settings = assignments(pairs, "--set")
    if restrict:
        settings["restrict"] = True
    if mapping:
        settings["mapping"] = assignments(mapping, "--map")
    run = fit(data, settings=settings, **options)
    report = run.report
    if as_json:
        emit({"run": str(run.path), **report})
    else:
        say(extraction_text(report["extract"]))
        say(Report.from_dict(report).table() if report["count"] else "\n".join(report["notes"]))
        click.echo(printable(str(run.path)))
    return SKIPPED if report["extract"]["skipped"] else DONE


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.argument("data", type=click.Path())
@click.option("--split", help="Rows of this split only; by default all of them.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads; by default one a core.")
@json_option
def evaluate(run: str, data: str, as_json: bool, **options: Any) -> int:
    """Evaluate RUN on other labelled DATA, with the same backbone and cache."""
    from featx.evaluation import evaluate

    report = evaluate(run, data, **options)
    if as_json:
        emit(report.to_dict())
    else:
        say(report.table())
    return DONE


def extraction_text(report: dict[str, Any]) -> str:
    """The report of an extraction, for people."""
    counts = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")
    lines = ["  ".join(f"{name} {report[name]}" for name in counts)]
    named = {
        "ignored": [f"{name} (no image)" for name in report["ignored_files"]],
        "skipped": [f"{image['id']}: {image['reason']}" for image in report["skipped_images"]],
        "same bytes, several labels": [
            ", ".join(f"{name} ({label})" for name, label in c.items()) for c in report["conflicts"]
        ],
        "note": report["notes"],
    }
    for what, names in named.items():
        lines += [f"{what}: {name}" for name in names[:10]]
        if len(names) > 10:
            lines.append(f"{what}: {len(names) - 10} more, all of them with --json")
    if report["extracted"]:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in report["shares"].items())
        lines.append(f"{report['images_per_second']} images/s; work: {shares}")
        lines += [report["advice"]] if report["advice"] else []
    return "\n".join(lines)
