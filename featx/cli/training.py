"""The commands that learn and measure: extract, fit, evaluate, report, curve, sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

import featx.cli.base as base
from featx.cli.base import DONE, SKIPPED, Place, echo, json_option, option, options_of, say
from featx.finetuning.processes import rank
from featx.options import Criterion
from featx.text import printable, prose

if TYPE_CHECKING:
    from pathlib import Path

    from featx.finetuning.recipes import FinetuneConfig
    from featx.runs import Run


@click.command()
@click.argument("data", type=Place())
@base.backbone_options
@base.extraction_options
@click.option("--dry-run", is_flag=True, help="Say how many images, how long, how much disk; write no feature.")
@click.option(
    "--findings", metavar="FILE", type=Place(dir_okay=False), help="Name all odd images there, as JSON lines."
)
@click.option(
    "--chunk", metavar="K/N", help="Compute this part of the images alone, from 0/N to N-1/N (docs/scale.md)."
)
@click.option("--prepare", is_flag=True, help="List the images and export the backbone, once, for all chunks.")
@json_option
def extract(
    data: str, dry_run: bool, findings: str | None, chunk: str | None, prepare: bool, as_json: bool, **options: Any
) -> int:
    """Run the frozen backbone once per image of DATA; the features go to the cache.

    DATA is a folder (one folder a class, or train/ and val/ with such folders, or images alone) or a
    manifest (.csv, .jsonl, .parquet).
    """
    given = {"--dry-run": dry_run, "--prepare": prepare, "--chunk": chunk, "--findings": findings}
    several = [name for name, value in given.items() if value not in (None, False)]
    if len(several) > 1:
        raise click.UsageError(f"{' and '.join(several)} cannot be combined; give one of them")
    if prepare or chunk is not None:
        return part_of(data, chunk, as_json, **options)
    if dry_run:
        from featx.extraction.planning import plan

        planned = plan(data, **options)
        base.show(planned, as_json)
        return DONE
    from featx.extraction.findings import check_findings
    from featx.extraction.pipeline import sync

    if findings:
        check_findings(findings)
    extraction = sync(data, **options)
    if findings:
        extraction.findings.write(findings)
    report = extraction.report
    if as_json:
        base.emit(report.to_dict() | {"backbone": extraction.info.to_dict(), "cache": str(extraction.cache)})
    else:
        say(report.text())
        say(f"{extraction.info.name} ({extraction.info.weights_note}), {extraction.info.row_shape} a row")
    return report.exit_code


def part_of(data: str, chunk: str | None, as_json: bool, **options: Any) -> int:
    """`extract --prepare`, or `extract --chunk`."""
    from featx.errors import FeatxError
    from featx.extraction.chunks import extract_chunk, parse_chunk, prepare_chunks

    if chunk is None:
        base.show(prepare_chunks(data, **options), as_json)
        return DONE
    try:
        number, chunks = parse_chunk(chunk)
    except FeatxError as error:
        raise click.BadParameter(str(error), param_hint="--chunk") from None
    report = extract_chunk(data, number, chunks, **options)
    base.show(report, as_json)
    return report.exit_code


# fields of `FinetuneConfig` with options of their own; the command line cannot import it, which would import torch
FINETUNE: dict[str, tuple[Any, str]] = {
    "epochs": (click.IntRange(1), "Fine-tuning: passes over the training images."),
    "lr": (str, "Fine-tuning: 1e-3, or by group: features=1e-4,classifier.6=1e-3."),
    "layer_decay": (float, "Fine-tuning: each group's rate as a share of the next one's."),
    "freeze_until": (str, "Fine-tuning, partial: the first group that is trained."),
    "init": (click.Choice(["fitted", "random"]), "Fine-tuning: where the head starts."),
    "select": (click.Choice(["holdout", "val", "last"]), "Fine-tuning: what chooses the epoch."),
    "cache_prefix": (bool, "Fine-tuning, partial: keep the frozen layers' activations."),
}
modes = click.Choice(["full", "partial", "scratch"])
finetune_options = options_of(
    click.option("--finetune", "mode", type=modes, help="Train the backbone further, from the fitted head on."),
    click.option("--recipe", help="Fine-tuning: a published schedule by name, such as tutorial."),
    *(
        click.option(f"--{name.replace('_', '-')}", type=kind, is_flag=kind is bool, default=None, help=text)
        for name, (kind, text) in FINETUNE.items()
    ),
    click.option(
        "--tune", "tuning", multiple=True, metavar="NAME=VALUE", help="Another fine-tuning field; repeatable."
    ),
)


@click.command()
@click.argument("data", type=Place())
@click.option("--head", "-H", default="logreg", help="logreg, linear, ridge, ncm or pretrained.")
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the head (docs/cli.md); repeatable."
)
@click.option("--output", "-o", type=Place(file_okay=False), help="The run's folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing run, once a new head is fitted; your files stay.")
@click.option("--restrict", is_flag=True, help="Pretrained head: answer mapped classes only.")
@click.option("--map", "mapping", multiple=True, metavar="LABEL=CLASS", help="Pretrained head: name a label's class.")
@click.option("--report/--no-report", default=True, help="Write report.html and plots/.")
@click.option("--gain/--no-gain", default=True, help="Cross-validate what views bring.")
@base.memory_option
@finetune_options
@base.backbone_options
@base.extraction_options
@json_option
def fit(data: str, report: bool, as_json: bool, **options: Any) -> int:
    """Extract what is missing, train a head, evaluate it, write a run.

    The run's folder is export/<data>-<backbone>-<head>-<hash of the configuration>, or --output.
    """
    from featx.fitting import fit

    settings = base.assignments(options.pop("pairs"), "--set")
    if options.pop("restrict"):
        settings["restrict"] = True
    if mapping := options.pop("mapping"):
        settings["mapping"] = base.assignments(mapping, "--map")
    finetune = finetuning(options)
    run = fit(data, settings=settings, finetune=finetune, **options)
    if rank() != 0:
        return DONE  # only one of several processes prints

    if not as_json:
        say(summary(run.report))
    if report:  # once people have the answer: it takes ten times as long as a head on cached features
        write_page(run)
    if as_json:
        base.emit({"run": str(run.path), **run.report})
    else:
        echo(printable(str(run.path)))
    return SKIPPED if run.report["extract"]["skipped"] else DONE


def finetuning(options: dict[str, Any]) -> FinetuneConfig | None:
    """Take the options of fine-tuning out of a command's; None where nothing is fine-tuned."""
    mode, recipe, pairs = (options.pop(name) for name in ("mode", "recipe", "tuning"))
    chosen = {name: value for name in FINETUNE if (value := options.pop(name)) is not None}
    chosen |= rates(chosen.pop("lr", "")) | base.assignments(pairs, "--tune")
    if mode is None and (chosen or recipe):
        raise click.UsageError(f"{', '.join(chosen) or 'a recipe'}: for fine-tuning; add --finetune full or partial")
    if mode is None:
        return None
    from featx.finetuning.recipes import configure

    return configure(recipe, mode=mode, seed=options["seed"], **chosen)


def summary(report: dict[str, Any]) -> str:
    """A run's `report.json` for people."""
    from featx.extraction.report import ExtractionReport
    from featx.measuring.evaluation import Report
    from featx.measuring.quantised import Int8Cost
    from featx.measuring.views import Gain

    lines = [ExtractionReport(**report["extract"]).text()]
    lines += [Report.from_dict(report).text()] if report["count"] else report["notes"]
    notes = [*report["fit"].get("notes", []), *(report[name] for name in ("views_note", "int8_note") if name in report)]
    lines += [f"note: {note}" for note in notes]
    lines += [Gain.from_dict(report["views"]).text()] if "views" in report else []
    lines += [Int8Cost.from_dict(report["int8"]).text()] if "int8" in report else []
    return "\n".join(lines)


def write_page(run: str | Run) -> Path:
    from featx.errors import RunError
    from featx.reporting.report import write_report

    try:
        return write_report(run)
    except OSError as error:
        path = run if isinstance(run, str) else run.path
        raise RunError(
            f"the page of {path} cannot be written ({error.strerror or error}); the run itself is finished: make room, "
            f"then `featx report {path}` writes its page"
        ) from error


def rates(text: str) -> dict[str, Any]:
    """`--lr`: one number, or `group=number` pairs; both may stand together: `1e-3,features=1e-4`."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        group, equals, number = part.strip().rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            raise click.BadParameter(f"{part!r} is neither RATE nor GROUP=RATE", param_hint="--lr") from None
        if equals:
            found.setdefault("lrs", {})[group] = rate
        else:
            found["lr"] = rate
    return found


@click.command()
@click.argument("run", type=Place(file_okay=False))
@click.argument("data", type=Place())
@click.option("--split", type=base.splits, help="Images of this split only; by default all of them.")
@base.memory_option
@option("device")
@option("workers")
@base.cluster_options
@base.run_options
@json_option
def evaluate(run: str, data: str, as_json: bool, **options: Any) -> int:
    """Evaluate RUN on other labelled DATA, with the same backbone and cache."""
    from featx.measuring.evaluation import evaluate

    report = evaluate(run, data, **options)
    base.show(report, as_json)
    return SKIPPED if report.skipped else DONE


@click.command()
@click.argument("run", type=Place(file_okay=False))
def report(run: str) -> int:
    """Write report.html and plots/ of RUN again; one page that needs no network."""
    echo(printable(str(write_page(run))))
    return DONE


@click.command()
@click.argument("run", type=Place(file_okay=False))
@click.option("--sizes", help="Numbers of training images: 20,50,100.")
@click.option("--repeats", default=5, type=click.IntRange(1), help="Subsets of each size.")
@base.memory_option
@option("device")
@base.run_options
@json_option
def curve(run: str, sizes: str | None, as_json: bool, **options: Any) -> int:
    """Would more images help? Fit RUN's head on parts of its training images; the report then shows it."""
    from featx.measuring.curve import learning_curve

    try:
        wanted = [int(size) for size in sizes.split(",")] if sizes else None
    except ValueError:
        raise click.BadParameter(f"{sizes!r} is not a list of whole numbers", param_hint="--sizes") from None
    found = learning_curve(run, sizes=wanted, **options)
    if not as_json:
        echo(prose(found.text()))
    write_page(run)
    if as_json:
        base.emit(found.to_dict())
    return DONE


@click.command()
@click.argument("data", type=Place())
@click.option("--backbone", "-b", "backbones", multiple=True, help="Repeatable; NAME=WEIGHTS for weights of its own.")
@click.option("--head", "-H", "heads", multiple=True, help="Repeatable; with settings: 'logreg class_weight=balanced'.")
@click.option("--layer", "layers", multiple=True, help="Repeatable; by default features.")
@click.option("--views", multiple=True, type=click.IntRange(0), help="Repeatable: numbers of augmented views.")
@click.option("--by", default="accuracy", type=click.Choice(get_args(Criterion)))
@base.memory_option
@option("weights")
@option("seed")
@base.preprocessing_options
@click.option("--output", "-o", type=Place(file_okay=False), help="By default export/<data>-sweep.")
@base.cache_option
@option("device")
@option("workers")
@base.cluster_options
@click.option("--report/--no-report", default=True, help="Write the winner's report.html.")
@json_option
def sweep(data: str, report: bool, as_json: bool, **options: Any) -> int:
    """Compare backbones, heads, layers and views on DATA; each point is a run, the best is named.

    Features are extracted once for each backbone and layer. Ranked by cross-validation on training images.
    """
    from featx.reporting.comparison import write
    from featx.sweeping import sweep

    found = sweep(data, **{name: value for name, value in options.items() if value != ()})
    if not as_json:
        say(found.text())
    write(found)
    if report:
        write_page(found.winner)
    if as_json:
        base.emit({"path": str(found.path), **found.to_dict()})
    else:
        echo(printable(str(found.winner.path)))
    return SKIPPED if found.failed else DONE
