"""Owns the commands that learn and measure: extract, fit, evaluate, report, curve, sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featx.cli.base import (
    DONE,
    SKIPPED,
    assignments,
    backbone_options,
    cache_option,
    emit,
    extraction_options,
    factory_option,
    json_option,
    option,
    options_of,
    say,
)
from featx.finetuning.processes import rank
from featx.text import printable, prose

if TYPE_CHECKING:
    from featx.runs import Run


@click.command()
@click.argument("data", type=click.Path())
@backbone_options
@extraction_options
@click.option("--dry-run", is_flag=True, help="Say how many images, how long, how much disk; write no feature.")
@json_option
def extract(data: str, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Run the frozen backbone once per image of DATA; the features go to the cache.

    DATA is a folder (one folder a class, or train/ and val/ with such folders, or images alone) or a
    manifest (.csv, .jsonl, .parquet).
    """
    if dry_run:
        from featx.extraction.planning import plan

        planned = plan(data, **options)
        emit(planned.to_dict()) if as_json else say(planned.text())
        return DONE
    from featx.extraction.pipeline import sync

    extraction = sync(data, **options)
    report = extraction.report
    if as_json:
        emit(report.to_dict() | {"backbone": extraction.info.to_dict(), "cache": str(extraction.cache)})
    else:
        say(report.text())
        say(f"{extraction.info.name} ({extraction.info.weights_note}), {extraction.info.row_shape} a row")
    return report.exit_code


finetune_options = options_of(
    click.option(
        "--finetune",
        "mode",
        type=click.Choice(["full", "partial", "scratch"]),
        help="Train the backbone further, end to end, from the fitted head on.",
    ),
    click.option("--recipe", help="Fine-tuning: a published schedule by name, such as tutorial."),
    click.option("--epochs", type=click.IntRange(1), help="Fine-tuning: passes over the training images."),
    click.option("--lr", help="Fine-tuning: 1e-3, or by group: features=1e-4,classifier.6=1e-3."),
    click.option("--layer-decay", type=float, help="Fine-tuning: each group's rate as a share of the next one's."),
    click.option("--freeze-until", help="Fine-tuning, partial: the first group that is trained."),
    click.option("--init", type=click.Choice(["fitted", "random"]), help="Fine-tuning: where the head starts."),
    click.option(
        "--select", type=click.Choice(["holdout", "val", "last"]), help="Fine-tuning: what chooses the epoch."
    ),
    click.option("--cache-prefix", is_flag=True, help="Fine-tuning, partial: keep the frozen layers' activations."),
    click.option(
        "--tune", "tuning", multiple=True, metavar="NAME=VALUE", help="Any other field of fine-tuning; repeatable."
    ),
)


@click.command()
@click.argument("data", type=click.Path())
@click.option("--head", "-H", default="logreg", show_default=True, help="logreg, linear, ridge, ncm or pretrained.")
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the head, see docs/cli.md; repeatable."
)
@click.option("--output", "-o", type=click.Path(file_okay=False), help="The run's folder.")
@click.option("--overwrite", is_flag=True, help="Replace a run that lies there, once the new head is fitted.")
@click.option("--restrict", is_flag=True, help="Pretrained head: answer mapped classes only.")
@click.option("--map", "mapping", multiple=True, metavar="LABEL=CLASS", help="Pretrained head: name a label's class.")
@click.option("--report/--no-report", default=True, show_default=True, help="Write report.html and plots/.")
@click.option("--gain/--no-gain", default=True, show_default=True, help="Cross-validate what views bring.")
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    help="Larger features are read from the cache pass by pass; by default a fifth of the free memory.",
)
@finetune_options
@backbone_options
@extraction_options
@json_option
def fit(
    data: str,
    pairs: tuple[str, ...],
    restrict: bool,
    mapping: tuple[str, ...],
    memory: float | None,
    report: bool,
    as_json: bool,
    mode: str | None,
    recipe: str | None,
    epochs: int | None,
    lr: str | None,
    layer_decay: float | None,
    freeze_until: str | None,
    init: str | None,
    select: str | None,
    cache_prefix: bool,
    tuning: tuple[str, ...],
    **options: Any,
) -> int:
    """Extract what is missing, train a head, evaluate it, write a run.

    The run's folder is export/<data>-<backbone>-<head>-<hash of the configuration>, or --output.
    """
    from featx.fitting import fit
    from featx.measuring.evaluation import Report

    settings = assignments(pairs, "--set")
    if restrict:
        settings["restrict"] = True
    if mapping:
        settings["mapping"] = assignments(mapping, "--map")
    chosen: dict[str, Any] = {
        "epochs": epochs,
        "layer_decay": layer_decay,
        "freeze_until": freeze_until,
        "init": init,
        "select": select,
        "cache_prefix": cache_prefix or None,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen |= rates(lr) | assignments(tuning, "--tune")
    if mode is None and (chosen or recipe):
        raise click.UsageError(f"{', '.join(chosen) or 'a recipe'}: for fine-tuning; add --finetune full or partial")
    finetune = None
    if mode is not None:
        from featx.finetuning.recipes import configure

        finetune = configure(recipe, mode=mode, seed=options["seed"], **chosen)
    run = fit(data, settings=settings, finetune=finetune, memory=memory and memory * 1e9, **options)
    if rank() != 0:
        return DONE  # of several processes, one speaks
    values = run.report
    if not as_json:
        from featx.extraction.report import ExtractionReport

        say(ExtractionReport(**values["extract"]).text())
        say(Report.from_dict(values).table() if values["count"] else "\n".join(values["notes"]))
        for note in [*values["fit"].get("notes", []), *filter(None, [values.get("views_note")])]:
            say(f"note: {note}")
        if "views" in values:
            from featx.measuring.views import Gain

            say(Gain.from_dict(values["views"]).text())
    if report:
        page_of(run)
    if as_json:
        emit({"run": str(run.path), **values})
    else:
        click.echo(printable(str(run.path)))
    return SKIPPED if values["extract"]["skipped"] else DONE


def page_of(run: str | Run) -> None:
    """Write a run's page, once people have the answer: it takes ten times as long as a head on cached features."""
    from featx.reporting.report import write_report

    write_report(run)


def rates(text: str | None) -> dict[str, Any]:
    """`--lr`: one number, or `group=number` pairs; both may stand together: `1e-3,features=1e-4`."""
    if text is None:
        return {}
    single: dict[str, Any] = {}
    groups: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise click.BadParameter(f"{part!r} is neither RATE nor GROUP=RATE", param_hint="--lr") from None
        if equals:
            groups[name] = value
        else:
            single["lr"] = value
    return single | ({"lrs": groups} if groups else {})


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.argument("data", type=click.Path())
@click.option("--split", help="Rows of this split only; by default all of them.")
@option("device")
@option("workers")
@factory_option
@json_option
def evaluate(run: str, data: str, as_json: bool, **options: Any) -> int:
    """Evaluate RUN on other labelled DATA, with the same backbone and cache."""
    from featx.measuring.evaluation import evaluate

    report = evaluate(run, data, **options)
    if as_json:
        emit(report.to_dict())
    else:
        say(report.table())
    return SKIPPED if report.skipped else DONE


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
def report(run: str) -> int:
    """Write report.html and plots/ of RUN anew; one page that needs no network."""
    from featx.reporting.report import write_report

    click.echo(printable(str(write_report(run))))
    return DONE


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.option("--sizes", help="Numbers of training images: 20,50,100.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Subsets of each size.")
@option("device")
@factory_option
@json_option
def curve(run: str, sizes: str | None, as_json: bool, **options: Any) -> int:
    """Would more images help? Fit RUN's head on parts of its training images; goes into its report, too."""
    from featx.measuring.curve import learning_curve

    try:
        wanted = [int(size) for size in sizes.split(",")] if sizes else None
    except ValueError:
        raise click.BadParameter(f"{sizes!r} is no list of whole numbers", param_hint="--sizes") from None
    found = learning_curve(run, sizes=wanted, **options)
    if not as_json:
        click.echo(prose(found.text()))
    page_of(run)
    if as_json:
        emit(found.to_dict())
    return DONE


@click.command()
@click.argument("data", type=click.Path())
@click.option("--backbone", "-b", "backbones", multiple=True, help="Repeatable; NAME=WEIGHTS for weights of its own.")
@click.option("--head", "-H", "heads", multiple=True, help="Repeatable; with settings: 'logreg class_weight=balanced'.")
@click.option("--layer", "layers", multiple=True, help="Repeatable; by default features.")
@click.option("--views", multiple=True, type=click.IntRange(0), help="Repeatable: numbers of augmented views.")
@click.option("--by", default="accuracy", show_default=True, type=click.Choice(["accuracy", "log_loss"]))
@option("weights")
@option("seed")
@click.option("--output", "-o", type=click.Path(file_okay=False), help="By default export/<data>-sweep.")
@cache_option
@option("device")
@option("workers")
@click.option("--report/--no-report", default=True, show_default=True, help="Write the winner's report.html.")
@json_option
def sweep(
    data: str,
    backbones: tuple[str, ...],
    heads: tuple[str, ...],
    layers: tuple[str, ...],
    views: tuple[int, ...],
    report: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare backbones, heads, layers and views on DATA; each point is a run, the best is named.

    Features are extracted once for each backbone and layer. Ranked by cross-validation on training images.
    """
    from featx.reporting.comparison import write
    from featx.sweeping import sweep

    grid: dict[str, Any] = {"backbones": backbones, "heads": heads, "layers": layers, "views": views}
    found = sweep(data, **{name: chosen for name, chosen in grid.items() if chosen}, **options)
    if not as_json:
        say(found.text())
    write(found)
    if report:
        page_of(found.winner)
    if as_json:
        emit({"path": str(found.path), **found.to_dict()})
    else:
        click.echo(printable(str(found.winner.path)))
    return SKIPPED if found.failed else DONE
