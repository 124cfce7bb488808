"""How often the executing file of featx changes while one photograph is extracted, fitted, exported and predicted.

    python benchmarks/jumps.py --photos DIR --weights FILE
    PYTHONPATH=OTHER_CHECKOUT python benchmarks/jumps.py --photos DIR --weights FILE

A reader who follows the code makes these jumps. photos: `train/` and `val/` with class folders; weights: a SqueezeNet
1.1 state dict. One photograph is extracted and predicted; fit and export need some more, and take two of each class to
learn from and one of each to measure on. Everything has run once before: features are in the cache, modules are
imported, the backbone is exported. Calls and returns are counted by `sys.setprofile`, in all threads; what is not
featx's own code is left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import featx

PACKAGE = str(Path(featx.__file__).parent)


class Jumps:
    """Counts the changes of the file that runs, thread by thread."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: Counter[tuple[str, str]] = Counter()
        self._last = threading.local()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        now: FrameType | None = frame if event == "call" else frame.f_back
        while now is not None and not now.f_code.co_filename.startswith(PACKAGE):
            now = now.f_back
        if now is None:
            return
        file = now.f_code.co_filename
        before = getattr(self._last, "file", file)
        if before != file:
            self.count += 1
            self.pairs[before[len(PACKAGE) + 1 :], file[len(PACKAGE) + 1 :]] += 1
        self._last.file = file


def counted(step: Callable[[], object]) -> Jumps:
    jumps = Jumps()
    threading.setprofile(jumps)
    sys.setprofile(jumps)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return jumps


def some_photographs(photos: Path, folder: Path) -> Path:
    for split, count in (("train", 2), ("val", 1)):
        for kind in sorted(path for path in (photos / split).iterdir() if path.is_dir()):
            (folder / split / kind.name).mkdir(parents=True)
            for path in sorted(kind.glob("*.jpg"))[:count]:
                shutil.copy(path, folder / split / kind.name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=0, help="list so many of the most frequent jumps of each step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = some_photographs(options.photos, folder / "data")
        one = folder / "one"
        one.mkdir()
        shutil.copy(next(data.glob("val/*/*.jpg")), one / "photograph.jpg")
        shared: dict[str, Any] = {"weights": str(options.weights), "cache": str(folder / "cache"), "device": "cpu"}
        run = folder / "run"
        fit: dict[str, Any] = {"output": run, "overwrite": True, "settings": {"strengths": [0.1]}, **shared}
        if "report" in featx.fit.__code__.co_varnames:
            fit["report"] = False
        steps: dict[str, Callable[[], object]] = {
            "extract": lambda: featx.extract(one, "squeezenet1_1", **shared),
            "fit": lambda: featx.fit(data, "squeezenet1_1", "logreg", **fit),
            "export": lambda: featx.export(run),
            "predict": lambda: list(featx.predict(run / "model.onnx", one)),
        }
        for step in steps.values():
            step()

        total = 0
        for label, step in steps.items():
            jumps = counted(step)
            total += jumps.count
            print(f"{label:8} {jumps.count:6} jumps between {len({f for pair in jumps.pairs for f in pair}):3} files")
            for (one_file, other), count in jumps.pairs.most_common(options.pairs):
                print(f"{count:15}  {one_file} -> {other}")
        print(f"{'total':8} {total:6} jumps")


if __name__ == "__main__":
    main()
