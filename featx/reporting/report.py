"""A run's `report.html` and `plots/`: its numbers, figures and photographs for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from featx.errors import FeatxError, RunError
from featx.extraction.report import ALL, COUNTS
from featx.features import Features
from featx.measuring.curve import Curve
from featx.measuring.quantised import Int8Cost
from featx.metrics import SCORES
from featx.records import read_record
from featx.reporting import gallery, plots
from featx.reporting.gallery import RunMaterial
from featx.reporting.page import Drawing, Table, write_page
from featx.runs import Run, open_run
from featx.sources.own import FIGURES
from featx.sources.source import Source

LISTED = 30  # files that the extraction names one by one, classes that need no scrolling
WAYS = {"center": "centre crop only", "views": "with views", "averaged": "with views, averaged"}  # of learning
Layout = Literal["tsne", "pca"]
# the grid that a head chose its regularisation from: the name of the one chosen, and of the axis
GRIDS = {
    "strengths": ("strength", "C (larger = less regularisation)"),
    "weight_decays": ("weight_decay", "weight decay"),
    "penalties": ("penalty", "penalty (larger = more regularisation)"),
}
LOSSES = {"log_loss": "log-loss", "mean_squared_error": "mean squared error"}  # what it was chosen by


def write_report(
    run: str | Path | Run, *, layout: Layout = "tsne", features: Features | None = None, source: Source | None = None
) -> Path:
    """Write `report.html`, one file that needs nothing else, and the same figures as `plots/*.png`.

    features, source: what the run was fitted and measured on. By default they come from its cache and its data,
    without any forward pass; what is not there any more is left out, and the page says so. layout: of the map of
    features, `tsne` (seeded, from a PCA) or `pca`. Returns the page's path. Raises `RunError` if `run` is not
    a finished run.
    """
    if layout not in get_args(Layout):
        raise FeatxError(f"layout is {' or '.join(get_args(Layout))}, not {layout!r}")
    opened = open_run(run)
    material = gallery.gather(opened, features, source)
    config, report = opened.config, opened.report
    pictures = {show.__name__: show(material) for show in (gallery.mistakes, gallery.predictions, gallery.batch)}
    drawings: dict[str, Drawing | None] = {
        "confusion": _confusion(report),
        "reliability": _reliability(report),
        "map": gallery.feature_map(material, layout),
        "curves": _curves(opened),
        "path": _path(report["fit"]),
        "learning": _learning(opened.path / "curve.json"),
    } | {name: gallery.grid(shown) for name, shown in pictures.items()}
    assert drawings.keys() == set(FIGURES)

    return write_page(
        opened.path / "report.html",
        drawings,
        title=f"{Path(config.data).name} · {_short(config.backbone.name)} · {config.head}",
        config=config,
        report=report,
        scores=SCORES,
        warnings=[*map(material.clean, report.get("notes", [])), *material.missing],
        confused=_confused(report),
        per_class=_per_class(report),
        pictures=pictures,
        views=_views(report),
        extraction=_extraction(report["extract"]),
        extraction_notes=[*map(material.clean, _extraction_notes(report["extract"]))],
        configuration=_configuration(material),
        fit_notes=[*map(material.clean, report["fit"].get("notes", []))],
    )


def _confusion(report: dict[str, Any]) -> Drawing | None:
    if not report.get("confusion"):
        return None
    table = np.array(report["confusion"])
    right = int(np.trace(table))
    note = f"Images by true label (rows) and answer (columns): {right:,} right, {int(table.sum()) - right:,} wrong."
    width = 420 if len(table) <= 4 else 560 if len(table) <= 20 else 900
    return Drawing(plots.confusion(table, report["labels"], report["confusion_columns"]), note, width)


def _confused(report: dict[str, Any]) -> Table | None:
    """The most frequent confusions, where the drawing is too large for numbers."""
    table = np.array(report.get("confusion") or [])
    if len(table) <= plots.NUMBERED:
        return None
    np.fill_diagonal(table, 0)
    most = np.argsort(-table, axis=None, kind="stable")[:10]
    cells = [divmod(int(i), table.shape[1]) for i in most if table.flat[i]]
    rows = [[report["labels"][i], report["confusion_columns"][j], int(table[i, j])] for i, j in cells]
    return Table(["true label", "answer", "images"], rows, "The most frequent confusions.") if rows else None


def _reliability(report: dict[str, Any]) -> Drawing | None:
    if not report.get("reliability"):
        return None
    note = "Where the points lie on the diagonal, a confidence of 0.8 is right 80% of the time. "
    note += f"Error: {report['calibration_error']:.3f}."
    return Drawing(plots.reliability(report["reliability"]), note, 440)


def _per_class(report: dict[str, Any]) -> Table | None:
    rows = sorted(report.get("per_class", []), key=lambda row: (row["support"] == 0, row["f1"]))
    if not rows:
        return None
    columns = {"label": "class", "precision": "precision", "recall": "recall", "f1": "F1", "support": "images"}
    columns |= {"average_precision": "average precision"} if "average_precision" in rows[0] else {}
    caption = "Lowest F1 first." + (f" Scroll for all {len(rows):,} classes." if len(rows) > LISTED else "")
    return Table(list(columns.values()), [[row[c] for c in columns] for row in rows], caption)


def _curves(run: Run) -> Drawing | None:
    """Loss, accuracy and learning rate by epoch: of fine-tuning, else of the head's own SGD."""
    fit = run.report["fit"]
    losses = enumerate(fit.get("training_loss") or [], 1)
    epochs = fit["finetune"]["epochs"] if "finetune" in fit else [{"epoch": e, "loss": loss} for e, loss in losses]
    rates = [{"epoch": row["epoch"], **row.get("lr", {})} for row in epochs]

    def points(key: str, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
        return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]

    panels = {
        "loss": {"training": points("loss", epochs), "held out": points("held_loss", epochs)},
        "accuracy": {"training": points("accuracy", epochs), "held out": points("held_accuracy", epochs)},
        "learning rate": {name: points(name, rates) for row in rates[-1:] for name in row if name != "epoch"},
    }
    panels = {panel: {name: line for name, line in lines.items() if line} for panel, lines in panels.items()}
    panels = {panel: lines for panel, lines in panels.items() if lines}
    if not panels:
        return None
    return Drawing(plots.curves(panels), f"{', '.join(panels).capitalize()} by epoch.", 360 * len(panels) + 40)


def _path(fit: dict[str, Any]) -> Drawing | None:
    """How the head chose its regularisation: the loss of held-out training images over the grid."""
    found = fit.get("cross_validation") or fit.get("leave_one_out") or {}
    lists = {name: values for name, values in found.items() if isinstance(values, list) and len(values) > 1}
    measure = next((name for name in LOSSES if name in lists), None)
    grid = next((name for name in lists if name not in LOSSES), None)
    if measure is None or grid is None:
        return None
    what, axis = GRIDS.get(grid, (grid.removesuffix("s"), grid.removesuffix("s").replace("_", " ")))
    how = f"over {found['folds']} folds of the training images" if "folds" in found else "of training images left out"
    note = f"Held-out {LOSSES[measure]} {how}; the least is {min(lists[measure]):.3f}."
    return Drawing(plots.path(lists[grid], lists[measure], fit.get(what), axis, LOSSES[measure]), note)


def _learning(path: Path) -> Drawing | None:
    """The learning curve, where `featx.measuring.curve.learning_curve` has left one."""
    if not path.is_file():
        return None
    try:
        curve = Curve.from_dict(read_record(path)[0])
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it, or measure it again (featx curve RUN)") from error
    note = (
        f"The head fitted on parts of the training images ({curve.repeats} subsets per size), measured on "
        f"{curve.measured_on:,} validation images, with 95% intervals over both. {curve.verdict}"
    )
    forecast = None if curve.forecast is None else vars(curve.forecast)
    return Drawing(plots.learning([*map(vars, curve.points)], forecast), note, 620)


def _views(report: dict[str, Any]) -> Table | None:
    """What views brought, on held-out training images."""
    if "views" not in report:
        return None
    found, rows = report["views"], []
    for way, title in WAYS.items():
        gains = found.get(f"{way}_gain", {})
        differences = ["{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**gain) for gain in gains.values()]
        rows.append([title, found[way]["accuracy"], found[way]["log_loss"], *(differences or (None, None))])
    caption = f"Held out over {found['folds']} folds of {found['images']:,} training images. "
    caption += "A gain compares the same images, with its 95% interval."
    return Table(["trained on", "accuracy", "log-loss", "gain in accuracy", "in log-loss"], rows, caption)


def _extraction(found: dict[str, Any]) -> Table:
    rows = [[name, found[name]] for name in COUNTS]
    if found["images_per_second"]:
        rows.append(["images per second", f"{found['images_per_second']:,.1f}"])
    return Table(["images", "count"], rows)


def _extraction_notes(found: dict[str, Any]) -> list[str]:
    name = gallery.name
    sentences = [f"skipped {name(image['id'])}: {image['reason']}" for image in found["skipped_images"]]
    sentences += [f"ignored {name(file)}" for file in found["ignored_files"]]
    sentences += [" = ".join(map(name, same)) + ": the same bytes" for same in found["duplicates"]]
    sentences += [
        "several labels for the same bytes: " + ", ".join(f"{name(id)} ({label})" for id, label in same.items())
        for same in found["conflicts"]
    ]
    groups = [found.get(f"{what}_groups", len(found[f"{what}s"])) for what in ("duplicate", "conflict")]  # older runs
    if (more := found["skipped"] + found["ignored"] + sum(groups) - LISTED) > 0:
        sentences[LISTED:] = [f"{more:,} more, {ALL}"]
    return [*sentences, *found["notes"]]


def _configuration(material: RunMaterial) -> Table:
    config, report = material.run.config, material.run.report
    backbone, crop = config.backbone, config.backbone.preprocess
    rows = {
        "data": Path(config.data).name,
        "data digest": config.data_digest[:16],
        "backbone": _short(backbone.name),
        "weights": f"{backbone.weights_note}, {backbone.weights_digest[:16]}",
        "layer": f"{backbone.layer} {list(backbone.row_shape)}",
        "pixels": f"short side {crop.resize}, crop {crop.crop}, {crop.interpolation}, {crop.pixels}",
        "features": f"{config.spec.precision}, stored as {config.spec.dtype}",
        "calibration": f"{config.spec.calibration[:16]}, run by {config.spec.engine}",
        "views": config.views,
        "head": config.head,
        "settings": json.dumps(config.settings, ensure_ascii=False),
        "seed": config.seed,
    }
    for name, value in report["fit"].items():
        if isinstance(value, (int, float, str)) and name != "epochs":  # the settings have it
            rows[f"fit: {name.replace('_', ' ')}"] = f"{value:.4g}" if isinstance(value, float) else value
    if config.spec.precision != "int8":
        del rows["calibration"]
    if "int8" in report:
        rows["int8 or fp32"] = Int8Cost.from_dict(report["int8"]).text()
    if report["train_accuracy"] is not None:
        rows["training accuracy"] = f"{report['train_accuracy']:.3f}"
    return Table(["setting", "value"], [[name, material.clean(str(value))] for name, value in rows.items()])


def _short(backbone: str) -> str:
    return backbone.removeprefix("torchvision/")
