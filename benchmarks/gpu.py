"""All that wants a GPU, in six minutes: the tests for it, then the benchmarks, each part with its own time limit.

    make gpu                                     on a machine with a GPU; python3 there has torch with CUDA
    python benchmarks/gpu.py --device cpu        a rehearsal, with small sizes
    python benchmarks/gpu.py --draw build/gpu/gpu.json --page docs/benchmarks/gpu.md

Nothing is installed or downloaded. What the machine lacks comes along in the folder `.gpu` of the checkout, which git
ignores: `packages/` (its first line says which), `data/hymenoptera_data/` with photographs, `weights/` with those of
SqueezeNet.
`gpu.json` and `gpu.md` are written after every part, so what was measured before a time-out is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_page import page, verdicts

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".gpu"
# Seconds for each part, 360 in all; what they do is in gpu_parts.py.
LIMITS = {"machine": 20, "tests": 95, "extraction": 135, "precision": 45, "solver": 40, "decoding": 25}
# What the parts import, and what the packages that are likely to be carried import: pip brings each one alone
# (`--no-deps`), so that the machine's own numpy and torch stay in use.
IMPORTED = "numpy", "torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "h5py", "sklearn", "scipy", "PIL"
BROUGHT = "onnx_ir", "ml_dtypes", "google.protobuf", "typing_extensions", "iniconfig", "pluggy", "packaging", "pygments"
NEEDED = (*IMPORTED, "threadpoolctl", "msgspec", "safetensors", "tqdm", "pytest", *BROUGHT)
# The names under which packages are imported, where the index has another.
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "google.protobuf": "protobuf"}
NEED_PHOTOGRAPHS = {"extraction", "precision", "decoding"}


def missing(needed: Iterable[str]) -> str:
    """What to carry to this machine, as one line; empty where all is there."""
    absent = [NAMES.get(name, name) for name in needed if not _there(name)]
    version = ".".join(map(str, sys.version_info[:2]))
    if not absent:
        return ""
    install = f"pip install --only-binary=:all: --no-deps --python-version {version} --target .gpu/packages"
    return f"missing: {', '.join(absent)}; where there is a package index: {install} {' '.join(absent)}"


def _there(name: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package around it
        return importlib.util.find_spec(name) is not None
    return False


def environment(data: Path) -> dict[str, str]:
    """For the parts: the checkout and the carried packages can be imported, the photographs are found."""
    paths = [str(ROOT), str(CARRIED / "packages"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "FEATX_TEST_DATA": str(data),
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def lacking(options: argparse.Namespace, data: Path) -> str:
    """What keeps the parts from being measured here, as one line; empty where nothing does."""
    if line := missing(NEEDED):
        return line
    sys.path.append(str(ROOT))
    from featx.devices import has_cuda

    photographs = data / "data" / "hymenoptera_data"
    if options.device != "cpu" and not has_cuda():
        return "missing: a GPU that NVIDIA's driver sees; --device cpu rehearses without one"
    if NEED_PHOTOGRAPHS & {*options.parts} and not any(photographs.glob("*/*/*.jpg")):
        return f"missing: photographs, {photographs}/*/*/*.jpg; bring some, or choose --parts machine tests solver"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "gpu.log").write_text("")
    except OSError as error:
        return f"the results cannot be written to {options.output} ({error}); choose another folder by --output"
    return ""


def ran(command: list[str], limit: float, variables: dict[str, str], log: Path) -> tuple[str, float]:
    """How a command ended (`done`, `failed`, `time limit`), and its seconds; at the limit its children end with it."""
    begin = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            end = "time limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return end, time.monotonic() - begin


def parts(options: argparse.Namespace, data: Path) -> Iterator[dict[str, Any]]:
    """All results so far, after every part."""
    results: dict[str, Any] = {"device": options.device, "parts": {}}
    log, file = options.output / "gpu.log", options.output / "part.json"
    for name in options.parts:
        file.unlink(missing_ok=True)
        log.open("a").write(f"\n== {name}\n")
        start = log.stat().st_size
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), name, "--results", str(file)]
        command += ["--device", options.device, "--data", str(data), "--images", str(options.images)]
        limit = options.limits.get(name, LIMITS[name])
        with tempfile.TemporaryDirectory() as scratch:  # a part that is killed leaves its files there
            variables = environment(data) | {"TMPDIR": scratch}
            end, seconds = ran([*command, "--seconds", str(0.8 * limit)], limit, variables, log)
        found = json.loads(file.read_text()) if file.exists() else {}
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        found |= {"end": end, "took": round(seconds, 1)} | ({} if end == "done" else {"said": said[-5:]})
        results["parts"][name] = found
        file.unlink(missing_ok=True)
        yield results | {"verdicts": verdicts(results)}


def limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"a part is one of {', '.join(LIMITS)}, not {name}")
    return name, float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data", type=Path, help="holds data/hymenoptera_data and weights; by default .gpu")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--images", type=int, default=8192, help="files of an extraction")
    parser.add_argument("--parts", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--limits", nargs="*", type=limit, default=[], help="seconds of a part: extraction=60")
    parser.add_argument("--draw", type=Path, help="write the page of results that are there, and run nothing")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    options.limits = dict(options.limits)
    if options.draw:
        if not options.page:
            parser.error("--page is missing: where the page goes")
        options.page.write_text(page(json.loads(options.draw.read_text())))
        return
    sys.path.append(str(CARRIED / "packages"))
    given = os.environ.get("FEATX_TEST_DATA") or (CARRIED if (CARRIED / "data").exists() else ROOT.parent / "shared")
    data = (options.data or Path(given)).absolute()
    if line := lacking(options, data):
        sys.exit(line)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # `ran` then ends what it has started
    for results in parts(options, data):
        (options.output / "gpu.json").write_text(json.dumps(results, indent=1))
        (options.output / "gpu.md").write_text(page(results))
        name, found = list(results["parts"].items())[-1]
        print(f"{name}: {found['end']} after {found['took']} s", *found.get("said", []), sep="\n    ", flush=True)
    print((options.output / "gpu.md").read_text())


if __name__ == "__main__":
    main()
