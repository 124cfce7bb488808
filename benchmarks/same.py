"""Whether two checkouts of featx give the same rows, heads and exported graphs, bit for bit.

    python benchmarks/same.py BEFORE AFTER --photos DIR --weights FILE

Each checkout extracts, fits and exports in a process and a cache of its own, by the public functions; SHA-256s of what
comes out are compared. Exits with 1 where one differs. photos: `train/` and `val/` with class folders; weights: a
SqueezeNet 1.1 state dict. Augmented views and `--decode gpu` are left out: their pixels have changed on purpose.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = r"""
import hashlib, json, sys
from pathlib import Path
import numpy as np
import onnx
import featx

photos, weights, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
quiet = {"report": False} if "report" in featx.fit.__code__.co_varnames else {}
found = {}

def digest(*parts):
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()[:16]

def graph(path):
    model = onnx.load(path)
    del model.metadata_props[:]  # versions, and the metrics of a report that may have grown
    return digest(model.SerializeToString(deterministic=True))

real = {"weights": weights, "cache": folder / "cache"}
kinds = {
    "squeezenet1_1": ("squeezenet1_1", real),
    "squeezenet1_1 fast": ("squeezenet1_1", {**real, "decode": "fast"}),
    "squeezenet1_1 float16": ("squeezenet1_1", {**real, "dtype": "float16"}),
    "squeezenet1_1 bf16": ("squeezenet1_1", {**real, "precision": "bf16"}),
    "squeezenet1_1 features.9": ("squeezenet1_1", {**real, "layer": "features.9"}),
    "resnet18 random": ("resnet18", {"weights": "random", "cache": folder / "cache"}),
    "mobilenet_v2 random": ("mobilenet_v2", {"weights": "random", "cache": folder / "cache"}),
}
for name, (backbone, options) in kinds.items():
    features = featx.extract(photos, backbone, **options)
    found[f"rows of {name}"] = digest(features.X, features.y, features.keys, "|".join(features.ids).encode())
    found[f"spec of {name}"] = features.spec.digest

heads = {
    "logreg": {}, "logreg balanced": {"class_weight": "balanced", "calibrate": True}, "logreg reject": {"reject": 0.95},
    "linear": {}, "linear tutorial": {"recipe": "tutorial"}, "ridge": {}, "ncm": {},
    "pretrained": {"mapping": {"ants": "ant", "bees": "bee"}},
}
for name, settings in heads.items():
    run = featx.fit(
        photos, "squeezenet1_1", name.split()[0], settings=settings, output=folder / name.replace(" ", "-"), **real, **quiet
    )
    head = run.head
    found[f"head {name}"] = digest(head.weight, head.bias, repr((head.class_names, head.threshold)).encode())
    report = json.loads((run.path / "report.json").read_text())
    numbers = {k: report.get(k) for k in ("accuracy", "log_loss", "confusion", "intervals", "per_class", "mistakes")}
    found[f"report {name}"] = digest(json.dumps(numbers, sort_keys=True).encode())
    if name in ("logreg", "logreg reject", "ridge"):
        featx.export(run.path)
        found[f"graph {name}"] = graph(run.path / "model.onnx")
        answers = list(featx.predict(run.path / "model.onnx", f"{photos}/val/bees"))
        found[f"answers {name}"] = digest(*(a.probabilities for a in answers))
featx.export(folder / "logreg", input="tensor")
found["graph logreg, tensor"] = graph(folder / "logreg" / "model-tensor.onnx")
featx.export(folder / "logreg", input="features")
found["graph logreg, features"] = graph(folder / "logreg" / "head.onnx")
print("FOUND" + json.dumps(found))
"""


def results(checkout: Path, photos: Path, weights: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(photos), str(weights), folder]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    found: dict[str, str] = json.loads(done.stdout.split("FOUND", 1)[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    options = parser.parse_args()
    photos, weights = options.photos.resolve(), options.weights.resolve()
    before, after = (results(each.resolve(), photos, weights) for each in (options.before, options.after))
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    for name in before | after:
        print(f"{'DIFFERS' if name in differing else 'same':8} {name}")
    print(f"{len(before) - len(differing)} of {len(before)} are the same, bit for bit")
    sys.exit(1 if differing or not before else 0)


if __name__ == "__main__":
    main()
