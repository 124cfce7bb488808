"""Owns a run's `report.html` and `plots/`: what was measured, as people look at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.errors import FeatxError
from featx.files import write_atomic
from featx.reporting import gallery, page, plots
from featx.reporting.gallery import Material
from featx.runs import Run, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from featx.features import Features
    from featx.sources.source import Source

# Adds a figure to `plots/` and gives its HTML: name, figure, what a screen reader says, width in pixels.
Draw = Callable[..., str]

LISTED = 30  # files that the extraction names one by one
SCORES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "Micro F1",
    "macro_f1": "Macro F1",
    "log_loss": "Log-loss",
}


def write_report(
    run: str | Path | Run, *, layout: str = "tsne", features: Features | None = None, source: Source | None = None
) -> Path:
    """Write `report.html`, one file that needs nothing else, and the same figures as `plots/*.png`.

    features, source: what the run was fitted and measured on. Where they are not given they come from its cache and
    its data, without any forward pass; what is not there any more is left out and said. layout: of the map of features,
    `tsne` (seeded, from a PCA) or `pca`. Returns the page's path. Raises `RunError` for what is no finished run.
    """
    if layout not in ("tsne", "pca"):
        raise FeatxError(f"layout is tsne or pca, not {layout!r}")
    opened = open_run(run)
    material = gallery.gather(opened, features, source)
    figures: dict[str, Figure] = {}

    def draw(name: str, figure: Figure, description: str, width: int = 640, caption: str = "") -> str:
        figures[name] = figure
        return page.figure(plots.svg(figure, name, description), width, caption)

    config, report = material.config, material.report
    title = f"{Path(config['data']).name} · {_short(config['backbone']['name'])} · {config['head']}"
    mistakes, mistake_grid = gallery.mistakes(material)
    predictions, prediction_grid = gallery.predictions(material)
    batch, batch_grid = gallery.batch(material)
    figures |= {
        name: grid
        for name, grid in (("mistakes", mistake_grid), ("predictions", prediction_grid), ("batch", batch_grid))
        if grid is not None
    }
    html = page.page(
        title,
        _header(material, title),
        _headline(report),
        page.notes([*map(material.clean, report.get("notes", [])), *material.missing]),
        page.pair(_confusion(report, draw), _reliability(report, draw)),
        _per_class(report),
        mistakes,
        predictions,
        batch,
        _map(material, layout, draw),
        _curves(material, draw),
        _path(report, draw),
        _views(report),
        _learning(material, draw),
        _calibration(report),
        page.pair(_extraction(material), _configuration(material)),
        f"<footer>featx {page.text(config.get('featx', ''))}. Intervals hold 95%; report.json has every number, "
        "plots/ every figure.</footer>",
    )
    folder = opened.path / "plots"
    for old in folder.glob("*.png"):
        if old.stem not in figures:  # of a former report
            old.unlink()
    for name, figure in figures.items():
        plots.png(figure, folder / f"{name}.png", dpi=100)
    write_atomic(opened.path / "report.html", html)
    return opened.path / "report.html"


def _header(material: Material, title: str) -> str:
    config, report = material.config, material.report
    splits = config.get("splits") or {}
    trained = f"{splits.get('train', 0):,} training images, {len(config['class_names'])} classes"
    if not report.get("count"):
        lead = "There are no validation images: nothing was measured on images that the head has not seen."
    else:
        accuracy, limits = report["accuracy"], report["intervals"]["accuracy"]
        right = round(accuracy * report["count"])
        what = "with all of their labels right" if report.get("confusion") is None else "answered correctly"
        lead = (
            f"{right:,} of {report['count']:,} validation images {what}: {accuracy:.1%}, a 95% interval of "
            f"{limits['low']:.1%} to {limits['high']:.1%}."
        )
    return (
        f'<header><h1>{page.text(title)}</h1><p class="muted">{page.text(trained)}</p>'
        f'<p class="lead">{page.text(lead)}</p></header>'
    )


def _headline(report: dict[str, Any]) -> str:
    parts = []
    for name, title in SCORES.items():
        value = report.get(name)
        if value is not None:
            limits = report.get("intervals", {}).get(name, {})
            parts.append(page.score(title, value, limits.get("low"), limits.get("high"), name != "log_loss"))
    if report.get("calibration_error") is not None:
        parts.append(page.score("Calibration error", report["calibration_error"], None, None, True))
    test = report.get("test")
    if test:
        limits = test["intervals"]["accuracy"]
        title = f"Accuracy on {test['count']:,} test images"
        parts.append(page.score(title, test["accuracy"], limits["low"], limits["high"], True))
    return f'<div class="scores">{"".join(parts)}</div>' if parts else ""


def _confusion(report: dict[str, Any], draw: Draw) -> str:
    if not report.get("confusion"):
        return ""
    table = np.array(report["confusion"])
    wrong = int(table.sum() - np.trace(table[:, : len(table)]))
    description = f"Confusion matrix of {len(table)} labels: {int(table.sum()) - wrong} answers right, {wrong} wrong."
    figure = plots.confusion(table, report["labels"], report["confusion_columns"])
    width = 420 if len(table) <= 4 else 560 if len(table) <= 20 else 900
    card = draw("confusion", figure, description, width)
    pairs = ""
    if len(table) > plots.NUMBERED:  # the drawing has no numbers: name what is confused most
        apart = table.copy()
        np.fill_diagonal(apart, 0)
        most = np.argsort(-apart.ravel(), kind="stable")[:10]
        rows = [(*divmod(int(i), table.shape[1]), int(apart.ravel()[i])) for i in most if apart.ravel()[i]]
        names, answers = report["labels"], report["confusion_columns"]
        listed = [[names[i], answers[j], count] for i, j, count in rows]
        pairs = page.table(["true label", "answer", "images"], listed, "What is confused most.") if rows else ""
    return page.section("Confusion matrix", card, pairs, note="Images by true label (rows) and answer (columns).")


def _reliability(report: dict[str, Any], draw: Draw) -> str:
    if not report.get("reliability"):
        return ""
    error = report["calibration_error"]
    figure = plots.reliability(report["reliability"])
    card = draw("reliability", figure, f"Accuracy by confidence; calibration error {error:.3f}.", 440)
    note = f"Where the points lie on the diagonal, a confidence of 0.8 is right 80% of the time. Error: {error:.3f}."
    return page.section("Reliability", card, note=note)


def _per_class(report: dict[str, Any]) -> str:
    rows = report.get("per_class") or []
    if not rows:
        return ""
    columns = ["label", "precision", "recall", "f1", "support"]
    heads = ["class", "precision", "recall", "F1", "images"]
    if "average_precision" in rows[0]:
        columns, heads = [*columns, "average_precision"], [*heads, "average precision"]
    worst = sorted(rows, key=lambda row: (row["support"] == 0, row["f1"]))
    return page.section(
        "Per class", page.table(heads, [[row[c] for c in columns] for row in worst], "Lowest F1 first.")
    )


def _map(material: Material, layout: str, draw: Draw) -> str:
    figure, note = gallery.feature_map(material, layout)
    if figure is None:
        return ""
    return page.section("Map of the features", draw("map", figure, "Map of the features. " + note, 760), note=note)


def _curves(material: Material, draw: Draw) -> str:
    """Loss, accuracy and learning rate by epoch: of fine-tuning's `metrics.jsonl`, else of the head's own SGD."""
    rows = _epochs(material.run.path / "metrics.jsonl")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        values = {("loss", "training"): row.get("loss"), ("loss", "held out"): row.get("held_loss")}
        values |= {("accuracy", "training"): row.get("accuracy"), ("accuracy", "held out"): row.get("held_accuracy")}
        rates = row.get("lr")
        rates = rates if isinstance(rates, dict) else {"": rates}
        values |= {("learning rate", str(name)): rate for name, rate in rates.items()}
        for (panel, line), value in values.items():
            if isinstance(value, (int, float)):
                panels.setdefault(panel, {}).setdefault(line, []).append((row["epoch"], value))
    for panel, lines in panels.items():  # epoch 0 has only been measured; training comes first all the same
        panels[panel] = dict(sorted(lines.items(), key=lambda line: line[0] == "held out"))
    if not rows:
        loss = material.report.get("fit", {}).get("training_loss")
        if loss:
            panels = {"loss": {"training": [(epoch, value) for epoch, value in enumerate(loss, 1)]}}
    if not panels:
        return ""
    card = draw("curves", plots.curves(panels), f"Curves by epoch of {', '.join(panels)}.", 360 * len(panels) + 40)
    return page.section("Training curves", card)


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a torn last line, of a run that was killed, is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), (int, float)):
            rows.append(row)
    return rows


def _path(report: dict[str, Any], draw: Draw) -> str:
    found = report.get("fit", {}).get("cross_validation") or {}
    losses = found.get("log_loss") or []
    # the heads call what they regularise with by its own name: strengths, weight_decays, alphas
    name = next(
        (k for k, v in found.items() if k != "log_loss" and isinstance(v, list) and len(v) == len(losses)), None
    )
    if name is None or len(losses) < 2:
        return ""
    grid, what = found[name], name.removesuffix("s")
    chosen = report["fit"].get(what)
    best = min(losses)
    titles = {"strength": "strength (C): weak prior to the right", "weight_decay": "weight decay"}
    label = titles.get(what, what.replace("_", " "))
    figure = plots.path(grid, losses, chosen if isinstance(chosen, (int, float)) else None, label)
    note = f"Held-out log-loss over {found.get('folds', 'all')} folds of the training images; the least is {best:.3f}."
    card = draw("path", figure, f"Held-out log-loss by {label}, least {best:.3f}.", 620)
    return page.section("Choice of the regularisation", card, note=note)


def _learning(material: Material, draw: Draw) -> str:
    """The learning curve, where `featx.measuring.curve.learning_curve` has left one."""
    try:
        values = json.loads((material.run.path / "curve.json").read_bytes())
    except (OSError, ValueError):
        return ""
    card = draw("learning", plots.learning(values["rows"], values["forecast"]), values["verdict"], 620)
    note = (
        f"The head fitted on parts of the training images ({values['repeats']} subsets a size), measured on "
        f"{values['measured_on']:,} validation images, with 95% intervals over both. {values['verdict']}"
    )
    return page.section("Would more photographs help?", card, note=note)


def _views(report: dict[str, Any]) -> str:
    """What views brought, on held-out training images; and averaging over views, on the validation images."""
    found = report.get("views")
    parts = []
    if found:
        rows = []
        for key, title in (
            ("center", "centre crop only"),
            ("views", "with views"),
            ("averaged", "with views, averaged"),
        ):
            if key in found:
                each = found[key]
                gain = found.get(f"{key}_gain")
                rows.append(
                    [title, f"{each['accuracy']:.3f}", f"{each['log_loss']:.3f}"]
                    + ([_signed(gain["accuracy"]), _signed(gain["log_loss"])] if gain else ["–", "–"])
                )
        caption = f"Held out over {found['folds']} folds of {found['images']:,} training images. "
        caption += "A gain compares the same images, with its 95% interval."
        parts.append(
            page.table(["trained on", "accuracy", "log-loss", "gain in accuracy", "in log-loss"], rows, caption)
        )
    averaged = report.get("averaged_views")
    if averaged:
        limits = averaged["intervals"]["accuracy"]
        sentence = (
            f"Averaging the probabilities of {averaged['views']} views of each validation image gives an accuracy of "
            f"{averaged['accuracy']:.1%} ({limits['low']:.1%} to {limits['high']:.1%}) and a log-loss of "
            f"{averaged['log_loss']:.3f}; the centre crop alone {report['accuracy']:.1%} and {report['log_loss']:.3f}."
        )
        parts.append(page.notes([sentence]))
    return page.section("Augmented views", *parts)


def _signed(gain: dict[str, float]) -> str:
    return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _calibration(report: dict[str, Any]) -> str:
    """What calibration and the reject threshold did, on held-out folds and on the validation images."""
    sentences = []
    found = report.get("fit", {}).get("calibration")
    if found:
        sentences.append(
            f"Calibration: temperature {found['temperature']:.3f}; the error on held-out folds goes from "
            f"{found['ece_before']:.3f} to {found['ece_after']:.3f}."
        )
    for where, values in (
        ("held-out folds", report.get("fit", {}).get("rejection")),
        ("validation", report.get("rejection")),
    ):
        if values:
            sentences.append(
                f"Reject below {values['threshold']:.3f}, {where}: {values['coverage']:.1%} answered, "
                f"{values['accuracy']:.1%} of them right."
            )
    return page.section("Calibration and rejection", page.notes(sentences))


def _extraction(material: Material) -> str:
    found = material.report.get("extract")
    if not found:
        return ""
    counts = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")
    rows = [[name, found[name]] for name in counts if name in found]
    if found.get("images_per_second"):
        rows.append(["images per second", f"{found['images_per_second']:,.1f}"])
    sentences = [f"skipped {gallery.name(i['id'])}: {i['reason']}" for i in found.get("skipped_images", [])]
    sentences += [f"ignored {gallery.name(name)}" for name in found.get("ignored_files", [])]
    sentences += [" = ".join(map(gallery.name, same)) + ": the same bytes" for same in found.get("duplicates", [])]
    sentences += [
        "several labels for the same bytes: " + ", ".join(f"{gallery.name(i)} ({label})" for i, label in c.items())
        for c in found.get("conflicts", [])
    ]
    sentences = (
        [*sentences[:LISTED], f"{len(sentences) - LISTED} more in report.json"]
        if len(sentences) > LISTED
        else sentences
    )
    sentences += found.get("notes", [])
    table = page.table(["images", "count"], rows, "")
    return page.section("Extraction", table, page.notes([material.clean(s) for s in sentences]))


def _configuration(material: Material) -> str:
    config, fit = material.config, material.report.get("fit", {})
    backbone, crop = config["backbone"], material.preprocess
    rows: list[list[Any]] = [
        ["data", Path(config["data"]).name],
        ["data digest", config["data_digest"][:16]],
        ["backbone", _short(backbone["name"])],
        ["weights", f"{material.clean(backbone['weights_note'])}, {backbone['weights_digest'][:16]}"],
        ["layer", f"{backbone['layer']} {backbone['row_shape']}"],
        ["pixels", f"short side {crop.resize}, crop {crop.crop}, {crop.interpolation}, {crop.pixels}"],
        ["features", f"{config['spec']['precision']}, stored as {config['spec']['dtype']}"],
        ["views", config.get("views", 0)],
        ["head", config["head"]],
        ["settings", material.clean(json.dumps(config["settings"], ensure_ascii=False))],
        ["seed", config["seed"]],
    ]
    skip = ("cross_validation", "notes", "training_loss", "calibration", "rejection", "epochs")
    for name, value in fit.items():
        if name not in skip and isinstance(value, (int, float, str, bool)):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append([f"fit: {name.replace('_', ' ')}", material.clean(str(shown))])
    if material.report.get("train_accuracy") is not None:
        rows.append(["training accuracy", f"{material.report['train_accuracy']:.3f}"])
    table = page.table(["setting", "value"], [[a, str(b)] for a, b in rows], "")
    return page.section("Configuration", table, page.notes([material.clean(n) for n in fit.get("notes", [])]))


def _short(backbone: str) -> str:
    return backbone.removeprefix("torchvision/")
