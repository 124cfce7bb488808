"""What was measured on a GPU against what was asked, and as a page."""

from __future__ import annotations

import math
import statistics
from typing import Any

EXACT, BY_GPU, LOADER = "featx, --decode exact", "featx, --decode gpu", "DataLoader + AMP + compile"
CPU_DECODES, GPU_DECODES, ALONE = "decoding alone, all cores", "decoding alone, the GPU", "backbone alone, featx"


def rate(extraction: dict[str, Any], label: str) -> float | None:
    """Images per second, the median of the rounds; None where there is none."""
    seconds = extraction.get("times", {}).get(label)
    return extraction["images"][label] / statistics.median(seconds) if seconds else None


def bound(extraction: dict[str, Any], decodes: str) -> tuple[str, float] | None:
    """The slowest stage of a pipeline and its images per second; stages run beside each other on a GPU."""
    stages = {label: rate(extraction, label) for label in (decodes, ALONE)}
    known = {label: value for label, value in stages.items() if value}
    slowest = min(known, key=lambda label: known[label], default="")
    return (slowest, known[slowest]) if len(known) == len(stages) else None


def verdicts(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked, what was found, and `met`, `missed` or `unmeasured`."""
    found = results["parts"]
    extraction, out = found.get("extraction", {}), {}

    def asked(what: str, least: float, top: float | None, bottom: float | None, note: str = "") -> None:
        value = top / bottom if top and bottom else None
        verdict = "unmeasured" if value is None else "met" if value >= least else "missed"
        out[what] = {"asked": least, "found": value and round(value, 3), "verdict": verdict, "note": note}

    exact, by_gpu = rate(extraction, EXACT), rate(extraction, BY_GPU)
    asked("exact decoding against DataLoader + AMP + compile", 1.2, exact, rate(extraction, LOADER))
    asked("--decode gpu against exact decoding", 1.5, by_gpu, exact, "else it goes")
    for way, whole, decodes in (("exact", exact, CPU_DECODES), ("gpu", by_gpu, GPU_DECODES)):
        name, slowest = bound(extraction, decodes) or ("", None)
        asked(f"--decode {way} against its slowest stage", 0.85, whole, slowest, name)
    for table, fit in found.get("solver", {}).get("fits", {}).items():
        asked(f"logreg on the GPU, {table}", 1.5, fit.get("cpu"), fit.get("gpu"), "else its passes go")
    for name, row in found.get("precision", {}).get("distances", {}).items():
        if row["tolerance"]:  # fp32 has one; in less, the distance depends on the network and is only stated
            most = max(row["difference"], 1e-9)  # rows may be equal
            asked(f"distance, {name}: times below its tolerance", 1.0, row["tolerance"], most)
        elif not math.isfinite(row["difference"]):
            out[f"distance, {name}"] = {"asked": "finite rows", "found": "infinite or NaN", "verdict": "missed"}
        if not row["alone is equal"]:
            out[f"distance, {name}: rows alone"] = {"asked": "equal", "found": "differ", "verdict": "missed"}
    tests = found.get("tests", {})
    ran = tests.get("passed", 0) + tests.get("failed", 0)
    verdict = "unmeasured" if not ran else "missed" if tests["failed"] or tests["end"] != "done" else "met"
    skipped = f", {tests['skipped']} skipped" if tests.get("skipped") else ""
    count = f"{tests.get('passed', 0)} of {ran}{skipped}"
    out["pytest -m gpu"] = {"asked": "all pass", "found": count, "verdict": verdict}
    return out


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    found = results["parts"]
    lines = ["# On a GPU", "", "Written by `make gpu`, which runs `benchmarks/gpu.py`. Compiling networks and"]
    lines += ["opening engines is not timed, on either side. Weights are random, except SqueezeNet's.", ""]
    if results["device"] == "cpu":
        lines += ["**A rehearsal on a CPU: these figures say nothing about a GPU.**", ""]
    lines += [f"- {key}: {value}" for key, value in found.get("machine", {}).get("facts", {}).items()]
    lines += ["", "## Against what was asked", "", "| | asked | found | |", "|---|---|---|---|"]
    for what, row in verdicts(results).items():
        note = f" ({row['note']})" if row.get("note") else ""
        value = "" if row["found"] is None else row["found"]
        lines.append(f"| {what}{note} | {row['asked']} | {value} | {row['verdict']} |")

    lines += ["", "## Parts", "", "| part | ended | seconds | |", "|---|---|---|---|"]
    for name, part in found.items():
        lines.append(f"| {name} | {part['end']} | {part['took']} | {' '.join(part.get('said', [])[-1:])} |")
    for failure in found.get("tests", {}).get("failures", []):
        lines.append(f"\n- failed: {failure}")
    return "\n".join([*lines, *_extraction(found.get("extraction", {})), *_rest(found), ""])


def _extraction(part: dict[str, Any]) -> list[str]:
    if not part.get("times"):
        return []
    lines = ["", f"## Extraction, {part['network']}, {part['precision']}", ""]
    lines += ["| | images/s (least - most) | rounds | of the bf16 roof |", "|---|---|---|---|"]
    roofs = part["times"].get("roof")
    roof = 2 * 8192**3 / statistics.median(roofs) / 1e12 if roofs else None
    for label, seconds in part["times"].items():
        if label != "roof" and seconds:
            rates = sorted(part["images"][label] / value for value in seconds)
            middle = statistics.median(rates)
            share = f"{middle * part['gflop'] / 1000 / roof:.1%}" if roof and "decoding" not in label else ""
            spread = f"{middle:.0f} ({rates[0]:.0f} - {rates[-1]:.0f})"
            lines.append(f"| {label} | {spread} | {len(seconds)} | {share} |")
    lines += [f"| {label} | not measured | | {why} |" for label, why in part.get("absent", {}).items()]
    lines += ["", f"- The network is {part['gflop']:.2f} GFLOP an image."]
    if roof:
        lines.append(f"- The roof, a bf16 product of matrices of 8192 x 8192: {roof:.2f} TFLOP/s.")
    for label, said in part.get("stages", {}).items():
        shares = ", ".join(f"{name} {share:.0%}" for name, share in said["shares"].items())
        lines.append(f"- {label}: work {shares}. {said['advice']}")
    return lines


def _rest(found: dict[str, Any]) -> list[str]:
    lines = []
    if rows := found.get("precision", {}).get("distances"):
        lines += ["", "## Rows against eager fp32 on the CPU", ""]
        lines += ["| network and precision | largest difference | tolerance | least cosine | alone | batch |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, row in rows.items():
            alone = "equal" if row["alone is equal"] else "differs"
            lines.append(
                f"| {name} | {row['difference']:.1e} | {row['tolerance'] or ''} | {row['cosine']:.6f} | {alone} "
                f"| {row['batch']} |"
            )
    if fits := found.get("solver", {}).get("fits"):
        lines += ["", "## The solver's passes, `logreg.fit` with cross-validation", ""]
        lines += ["| table | CPU, s | GPU, s | same strength | weights differ |", "|---|---|---|---|---|"]
        for table, fit in fits.items():
            if "gpu" in fit:  # the rest may have been beyond the time limit
                cpu = f"{fit['cpu']:.2f}" if "cpu" in fit else "not measured"
                alike = {True: "yes", False: "no"}.get(fit.get("same strength"), "")
                apart = f"{fit['difference']:.1e}" if "difference" in fit else ""
                lines.append(f"| {table} | {cpu} | {fit['gpu']:.2f} | {alike} | {apart} |")
    if rows := found.get("decoding", {}).get("rows"):
        lines += ["", "## Pixels and features of the GPU's decoder against Pillow's", ""]
        lines += ["| resize | chroma | network | least cosine | below 0.999 | mean difference | largest |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            lines.append(
                f"| {row['resize']} | {row['chroma']} | {row['network']} | {row['cosine']:.5f} | {row['below']} of "
                f"{row['images']} | {row['mean']:.3f} | {row['largest']} |"
            )
    return lines
