"""Whole regularisation paths: featx's solver against scikit-learn's lbfgs, cold and warm-started.

    env -u OPENBLAS_CORETYPE python benchmarks/heads.py

All minimise the same objective on the same standardised features, which are drawn so that the classes are
not linearly separable. featx solves all 45 strengths, and its time includes checking, standardising and the
eigendecomposition. scikit-learn (float64, features standardised beforehand, its default `tol` of 1e-4) is
measured at every fifth strength (`--every`), once, and the rest is extrapolated: cold from zero, and warm
from the optimum one grid step below, as a loop with `warm_start` would have it. Gaps are relative to an
optimum in float64. Seconds are wall-clock; CPU seconds stand beside them, for machines that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path as FilePath

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_info

from featx.cache.store import FeatureStore
from featx.devices import single_thread
from featx.features import FeatureSpec
from featx.heads import logreg, ridge
from featx.options import Options
from featx.solvers import training as _training
from featx.solvers.design import Design
from featx.solvers.examples import Examples
from featx.solvers.path import Path, minimise

STRENGTHS = np.array(logreg.STRENGTHS)


def features(rows: int, size: int, classes: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with a power-law spectrum, as pooled features have, rotated: `float32 [N, D]`, `[N]`.

    A fifth of the labels are drawn at random, so that the classes are not linearly separable.
    """
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0].astype(np.float32)
    scale = (np.arange(1, size + 1) ** -0.5).astype(np.float32)
    y = rng.integers(0, classes, rows)
    means = (apart * scale * rng.normal(size=(classes, size))).astype(np.float32)
    X = (rng.standard_normal((rows, size), dtype=np.float32) * scale + means[y]) @ turn
    return X, np.where(rng.random(rows) < 0.2, rng.integers(0, classes, rows), y)


def solve_path(X: np.ndarray, y: np.ndarray, names: list[str]) -> Path:
    with single_thread():
        task = _training.check(X, y, names)
        path = Path(Design(task, np.full(len(y), -1)), STRENGTHS, np.array([-1]))
        path.whole()
    return path


def compare_paths(rows: int, size: int, classes: int, apart: float, every: int) -> None:
    X, y = features(rows, size, classes, apart)
    names = [str(c) for c in range(classes)]
    spent = []
    for _ in range(2):
        started = np.array([time.perf_counter(), time.process_time()])
        path = solve_path(X, y, names)
        spent.append(np.array([time.perf_counter(), time.process_time()]) - started)
    ours = np.min(spent, axis=0)
    measured = list(range(every // 2, len(STRENGTHS), every))
    start = np.concatenate([path.solved[i].A for i in measured], axis=1).astype(np.float64)
    none = np.full(len(measured), -1)
    with single_thread():
        optimum = minimise(path.design, STRENGTHS[measured], none, start, tolerance=1e-9, most=100).loss
    Z = _training.check(X, y, names).standard().astype(np.float64)
    cold: list[np.ndarray] = []
    warm: list[np.ndarray] = []
    gaps = []
    for i, best in zip(measured, optimum, strict=True):
        for times, before in ((cold, None), (warm, i - 1)):
            model = LogisticRegression(C=STRENGTHS[i], max_iter=10_000, warm_start=True)
            if before is not None:
                model.coef_, model.intercept_ = path.design.features_space(path.solved[before].A[:, 0])
                model.classes_ = np.arange(classes)
            started = np.array([time.perf_counter(), time.process_time()])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(Z, y)
            times.append(np.array([time.perf_counter(), time.process_time()]) - started)
            gaps.append(objective(Z, y, model.coef_, model.intercept_, STRENGTHS[i]) / best - 1)
        print(f"  C={STRENGTHS[i]:.2e} cold {cold[-1][0]:.2f} s, warm {warm[-1][0]:.2f} s", flush=True)
    share = len(STRENGTHS) / len(measured)
    answers = Z[:5000] @ path.design.features_space(path.solved[30].A[:, 0])[0].T
    print(f"\nN={rows:,} D={size} C={classes}, {len(STRENGTHS)} strengths; training accuracy at C=30: ", end="")
    print(f"{(answers.argmax(axis=1) == y[:5000]).mean():.2f}")
    ours_gap = max(path.solved[i].loss[0] / b - 1 for i, b in zip(measured, optimum, strict=True))
    print(
        f"  featx, whole path     {ours[0]:8.2f} s, CPU {ours[1]:8.2f} s; largest gap {ours_gap:.1e}; "
        f"{path.passes} passes; best of {len(spent)}"
    )
    for label, times, part in (("cold", cold, gaps[::2]), ("warm", warm, gaps[1::2])):
        total = np.sum(times, axis=0) * share
        ratio = total / ours
        print(
            f"  scikit-learn, {label}    {total[0]:8.2f} s, CPU {total[1]:8.2f} s; largest gap {max(part):.1e}; "
            f"{len(times)} of {len(STRENGTHS)} fits measured, the rest extrapolated; "
            f"{ratio[0]:.1f} times featx, by CPU {ratio[1]:.1f}"
        )


def objective(Z: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, strength: float) -> float:
    logits = Z @ weight.T + bias
    top = logits.max(axis=1)
    loss = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(y)), y]
    return float(loss.sum() + (weight**2).sum() / (2 * strength))


def compare_ridge(rows: int, size: int, classes: int, apart: float) -> None:
    X, y = features(rows, size, classes, apart)
    names = [str(c) for c in range(classes)]
    T = (2 * np.eye(classes, dtype=np.float32) - 1)[y]

    def best(call: Callable[[], object]) -> np.ndarray:
        spent = []
        for _ in range(4):
            started = np.array([time.perf_counter(), time.process_time()])
            call()
            spent.append(np.array([time.perf_counter(), time.process_time()]) - started)
        return np.asarray(np.min(spent, axis=0))

    ours = best(lambda: ridge.fit(Examples(X, y), names, penalties=np.logspace(-6, 5, 45).tolist()))
    print(f"\nRidge, N={rows:,} D={size} C={classes}, best of 4")
    print(
        f"  featx.fit, 45 penalties with leave-one-out, checked, standardised, calibrated  {ours[0]:.3f} s, "
        f"CPU {ours[1]:.3f} s"
    )
    one = best(lambda: ridge.fit(Examples(X, y), names, penalties=[1e-2]))
    print(
        f"  the same with one penalty: {one[0]:.3f} s, CPU {one[1]:.3f} s; ratio {ours[0] / one[0]:.2f}, by CPU ",
        end="",
    )
    print(f"{ours[1] / one[1]:.2f}")
    for dtype in (np.float32, np.float64):
        Z, targets = X.astype(dtype), T.astype(dtype)
        peer = best(lambda: Ridge(alpha=rows * 1e-2, solver="cholesky").fit(Z, targets))  # noqa: B023
        print(
            f"  scikit-learn, one Ridge(solver='cholesky'), {np.dtype(dtype).name}  {peer[0]:.3f} s, "
            f"CPU {peer[1]:.3f} s; featx takes {ours[0] / peer[0]:.2f} times that, by CPU {ours[1] / peer[1]:.2f}"
        )


def small_fit() -> None:
    X, y = features(244, 512, 2, 0.12)
    spent, burnt = [], []
    for _ in range(20):
        started, cpu = time.perf_counter(), time.process_time()
        fitted = logreg.fit(Examples(X, y), ["ants", "bees"])
        spent.append(time.perf_counter() - started)
        burnt.append(time.process_time() - cpu)
    print(f"\nlogreg.fit with cross-validation, N=244 D=512 C=2: best {1000 * min(spent):.0f} ms, median ", end="")
    print(f"{1000 * np.median(spent):.0f} ms; {1000 * min(burnt):.0f} ms of CPU; ", end="")
    print(f"{len(fitted.info['cross_validation']['strengths'])} strengths tried")


def cross_validated(groups: FilePath | None, every: int) -> None:
    """`logreg.fit` against cold fits of every strength and fold, on few, linearly separable rows."""
    if groups:
        arrays = np.load(groups)
        X, y = arrays["X"][arrays["train"]], arrays["y"][arrays["train"]]
    else:
        rng = np.random.default_rng(0)
        y = np.arange(340) % 20
        X = rng.normal(size=(340, 1280)) + 0.3 * rng.normal(size=(20, 1280))[y]
        X = (X * np.arange(1, 1281) ** -0.5).astype(np.float32)
    names = [str(c) for c in range(y.max() + 1)]
    spent = []
    for _ in range(5):
        started = np.array([time.perf_counter(), time.process_time()])
        fitted = logreg.fit(Examples(X, y), names)
        spent.append(np.array([time.perf_counter(), time.process_time()]) - started)
    ours = np.min(spent, axis=0)
    Z = _training.check(X, y, names).standard().astype(np.float64)
    fold = _training.folds(y, 5)[0]
    measured = [(i, k) for i in range(every // 2, len(STRENGTHS), every) for k in range(5)]
    peer = np.zeros(2)
    with single_thread():  # on matrices this small two threads are slower
        for i, k in measured:
            started = np.array([time.perf_counter(), time.process_time()])
            LogisticRegression(C=STRENGTHS[i], max_iter=10_000).fit(Z[fold != k], y[fold != k])
            peer += np.array([time.perf_counter(), time.process_time()]) - started
    peer *= len(STRENGTHS) * 5 / len(measured)
    found = fitted.info["cross_validation"]
    print(f"\nlogreg.fit with cross-validation, N={len(X)} D={X.shape[1]} C={len(names)}, ", end="")
    print(
        f"{'photographs' if groups else 'generated'}: C={fitted.info['strength']:g}, loss {found['best_log_loss']:.4f}"
    )
    print(
        f"  featx, {len(found['strengths'])} strengths tried {ours[0]:.2f} s, CPU {ours[1]:.2f} s; best of {len(spent)}"
    )
    print(
        f"  scikit-learn, 45 x 5 cold fits, one thread {peer[0]:.1f} s, CPU {peer[1]:.1f} s; {len(measured)} of 225 "
        f"measured, the rest extrapolated; {peer[0] / ours[0]:.0f} times featx, by CPU {peer[1] / ours[1]:.0f}"
    )


def whole_fit(photos: FilePath, weights: FilePath) -> None:
    """`featx.fit` from listing the folder to the run's, with all features in the cache."""
    import featx

    with tempfile.TemporaryDirectory() as folder:
        options: Options = {"weights": str(weights), "cache": f"{folder}/cache"}
        spent = []
        for _ in range(21):
            started = time.perf_counter()
            run = featx.fit(photos, "squeezenet1_1", output=f"{folder}/run", overwrite=True, **options)
            spent.append(time.perf_counter() - started)
        accuracy = run.report["accuracy"]
    print(
        f"\nfeatx.fit as a whole, photographs of {photos.name} in the cache, cross-validated, evaluated, written: ",
        end="",
    )
    print(f"best {1000 * min(spent[1:]):.0f} ms, median {1000 * np.median(spent[1:]):.0f} ms; ", end="")
    print(f"accuracy {accuracy:.4f}")


CHILD = """
import json, resource, sys, time
import numpy as np
folder, settings, limit = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # an allocation beyond it is a MemoryError
from pathlib import Path
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.features import FeatureSpec
from featx.heads import logreg, ncm, ridge
from featx.solvers import training
from featx.solvers.examples import Examples
class Counted:
    def __init__(self, X):
        self.X, self.shape, self.rows = X, X.shape, 0
    def __getitem__(self, rows):
        part = self.X[rows]
        self.rows += len(part)
        return part
keys, y, names = np.load(f"{folder}/keys.npy"), np.load(f"{folder}/y.npy"), [str(c) for c in range(10)]
store = FeatureStore(Path(folder), FeatureSpec("custom/gaussian", "00" * 32))
begin, cpu = time.perf_counter(), time.process_time()
X = Counted(StoredRows(store, keys)) if limit else store.read(keys)
module = {"logreg": logreg, "ridge": ridge, "ncm": ncm}[settings.pop("head")]
fitted = module.fit(Examples(X, y), names, device="cpu", **settings)
found = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
found["peak"] = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
found["reads"] = X.rows / len(y) if limit else 0
new = np.load(f"{folder}/new.npy")
found["right"] = float((fitted.head(new).argmax(axis=1) == np.load(f"{folder}/new_y.npy")).mean())
if module is logreg:
    task, total = training.check(X, y, names, gram=False), 0.0
    for start in range(0, len(y), 8192):
        logits = X[start : start + 8192] @ fitted.head.weight.T.astype(np.float64) + fitted.head.bias
        logits -= logits.max(axis=1, keepdims=True)
        own = np.take_along_axis(logits, y[start : start + 8192, None], 1)
        total += float((np.log(np.exp(logits).sum(axis=1)) - own[:, 0]).sum())
    weight, strength = fitted.head.weight * task.scale, fitted.info["strength"]
    found |= {"objective": total + float((weight**2).sum() / (2 * strength)), "strength": strength}
    found["tried"] = fitted.info["cross_validation"]["strengths"]
print(json.dumps(found))
"""


def million(rows: int = 1_000_000, size: int = 512, new: int = 20_000, limit: int = 10**9) -> None:
    """Fits on features of 2 GB in the cache, in processes that may allocate 1 GB, and one in memory."""
    with tempfile.TemporaryDirectory() as folder:
        X, y = features(rows + new, size, 10, 0.11)
        keys = np.random.default_rng(1).integers(0, 256, (rows, 32), dtype=np.uint8)
        with FeatureStore(FilePath(folder), FeatureSpec("custom/gaussian", "00" * 32), engine="benchmark") as store:
            for start in range(0, rows, 8192):
                end = min(start + 8192, rows)
                store.append(keys[start:end], X[start:end])
        arrays = {"keys": keys, "y": y[:rows], "new": X[rows:], "new_y": y[rows:]}
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
        del X, arrays, store
        time.sleep(2.5)  # a younger shard is hashed again at every opening
        print(f"\nN={rows:,} D={size} C=10, from the cache; streamed where at most {limit / 1e9:g} GB may be allocated")
        runs: list[tuple[str, dict[str, object], int]] = [
            ("logreg, begun on a part", {"head": "logreg"}, limit),
            ("logreg, part=0", {"head": "logreg", "part": 0}, limit),
            ("ridge", {"head": "ridge"}, limit),
            ("ncm", {"head": "ncm"}, limit),
            ("logreg, in memory", {"head": "logreg"}, 0),
        ]
        done = {}
        for how, settings, most in runs:
            command = [sys.executable, "-c", CHILD, folder, json.dumps(settings), str(most)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            done[how] = found
            strength = f"; C={found['strength']:.3g} of {len(found['tried'])} tried" if "tried" in found else ""
            print(
                f"  {how}: {found['seconds']:.1f} s, CPU {found['cpu']:.1f} s, {found['reads']:.2f} reads of it, "
                f"{found['peak']:,.0f} MiB at most, {found['right']:.4f} right of {new:,} new rows{strength}",
                flush=True,
            )
        part, whole = list(done.values())[:2]
        shares = ", ".join(f"{part[name] / whole[name]:.2f} of its {name}" for name in ("seconds", "cpu", "reads"))
        apart = part["objective"] / whole["objective"] - 1
        print(f"  begun on a part, against part=0: {shares}; objective {apart:+.1e} of it")


def environment() -> None:
    print(f"Python {platform.python_version()}, numpy {np.__version__}, scikit-learn {sklearn.__version__}, ", end="")
    print(f"{os.cpu_count()} cores ({platform.processor() or platform.machine()})")
    for pool in threadpool_info():
        print(f"  {pool['user_api']} {pool['internal_api']} {pool['version']} {pool.get('architecture', '')}", end="")
        print(f" {pool['num_threads']} threads")
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        print(f"  {name}={os.environ.get(name, '(not set)')}")
    if hasattr(os, "getloadavg"):
        print(f"  load average at the start {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["small", "groups", "ridge", "ten", "hundred", "million"])
    parser.add_argument("--photos", type=FilePath, help="train/ and val/ with class folders: a whole featx.fit too")
    parser.add_argument("--weights", type=FilePath, help="a SqueezeNet 1.1 state dict, for --photos")
    parser.add_argument("--groups", type=FilePath, help="X, y and train as .npz, for groups: instead of drawn features")
    parser.add_argument("--every", type=int, default=5, help="measure every so many of scikit-learn's fits")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    environment()
    if "small" in options.what:
        small_fit()
    if "groups" in options.what:
        cross_validated(options.groups, options.every)
    if options.photos:
        whole_fit(options.photos, options.weights)
    if "ridge" in options.what:
        compare_ridge(50_000, 512, 10, 0.11)
    if "ten" in options.what:
        compare_paths(50_000, 512, 10, 0.11, options.every)
    if "hundred" in options.what:
        compare_paths(50_000, 768, 100, 0.08, options.every)
    if "million" in options.what:
        million()
