"""The solver against scikit-learn: the same objective, the same optimum, whatever way the data comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from featx.devices import has_cuda
from featx.errors import FeatxError, HeadError
from featx.heads import logreg
from featx.solvers import design as _design
from featx.solvers import hessian as _hessian
from featx.solvers import moments as _moments
from featx.solvers import path as _solver
from featx.solvers import training as _training
from featx.solvers.examples import Examples


def clouds(
    rows: int, size: int, classes: int, apart: float = 0.35, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Overlapping classes in correlated columns of unlike scale and offset, as features are."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    scale = np.arange(1, size + 1) ** -0.5
    y = rng.integers(0, classes, rows)
    y[:classes] = np.arange(classes)
    means = rng.normal(size=(classes, size)) * scale * apart
    X = (rng.normal(size=(rows, size)) * scale + means[y]) @ turn
    X = X * rng.uniform(0.1, 10, size) + rng.normal(size=size) * 5
    return X.astype(np.float32), y, [f"c{i}" for i in range(classes)]


def objective(Z: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, strength: float) -> float:
    """scikit-learn's, in float64; a binary head's two rows stand for one row of their difference."""
    logits = Z @ weight.T + bias
    loss = (logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum()
    penalised = weight[1:] - weight[:1] if len(weight) == 2 else weight
    return float(loss + (penalised**2).sum() / (2 * strength))


def scikit(Z: np.ndarray, y: np.ndarray, strength: float, **fit: object) -> tuple[np.ndarray, np.ndarray]:
    model = LogisticRegression(C=strength, tol=1e-7, max_iter=10_000).fit(Z, y, **fit)
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    return np.concatenate([0 * model.coef_, model.coef_]), np.array([0.0, model.intercept_[0]])


@pytest.mark.parametrize(("rows", "size", "classes"), [(900, 40, 2), (900, 40, 5), (60, 100, 2), (90, 150, 4)])
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_the_optimum_is_scikit_learns(rows: int, size: int, classes: int, strength: float) -> None:
    X, y, names = clouds(rows, size, classes)
    fitted = logreg.fit(Examples(X, y), names, strengths=[strength])
    assert fitted.info["solver"] == "featx" and fitted.info["converged"]
    scaler = StandardScaler().fit(X.astype(np.float64))
    Z = scaler.transform(X.astype(np.float64))
    weight = fitted.head.weight.astype(np.float64)
    ours = objective(Z, y, weight * scaler.scale_, fitted.head.bias + weight @ scaler.mean_, strength)
    theirs = objective(Z, y, *scikit(Z, y, strength), strength)
    assert abs(ours - theirs) <= 1e-4 * theirs
    peer = LogisticRegression(C=strength, tol=1e-7, max_iter=10_000).fit(Z, y)
    p = fitted.head.probabilities(fitted.head(X))
    assert p == pytest.approx(peer.predict_proba(Z), abs=2e-3)
    assert p.std() > 1e-3


@pytest.mark.parametrize(("size", "classes"), [(30, 2), (30, 6)])
def test_every_strength_of_a_path_is_within_1e_4_of_its_optimum(size: int, classes: int) -> None:
    X, y, names = clouds(1200, size, classes)
    task = _training.check(X, y, names)
    grid = np.logspace(-6, 5, 45)
    path = _solver.Path(_design.Design(task, np.full(len(y), -1)), grid, np.array([-1]))
    path.whole()
    assert sorted(path.solved) == list(range(45))
    Z = task.standard().astype(np.float64)
    for i in range(0, 45, 4):
        assert path.solved[i].converged.all()
        ours = objective(Z, y, *path.design.features_space(path.solved[i].A[:, 0]), grid[i])
        theirs = objective(Z, y, *scikit(Z, y, grid[i]), grid[i])
        assert ours <= theirs * (1 + 1e-4), f"strength {grid[i]:g}"
        assert path.solved[i].loss[0] == pytest.approx(ours, rel=1e-5)


def test_cross_validated_losses_are_those_of_separate_fits() -> None:
    X, y, names = clouds(400, 20, 3)
    task = _training.check(X, y, names)
    fold, _ = _training.folds(y, 4)
    grid = np.array([1e-3, 1e-1])
    path = _solver.Path(_design.Design(task, fold), grid, np.arange(4))
    path.whole()
    Z = task.standard().astype(np.float64)
    for i, strength in enumerate(grid):
        total = 0.0
        for k in range(4):
            weight, bias = scikit(Z[fold != k], y[fold != k], strength)
            logits = Z[fold == k] @ weight.T + bias
            total += (logsumexp(logits, axis=1) - logits[np.arange(len(logits)), y[fold == k]]).sum()
        assert path.held(i) == pytest.approx(total, rel=1e-3)


def test_the_search_finds_the_paths_least_loss() -> None:
    X, y, names = clouds(300, 30, 3)
    task = _training.check(X, y, names)
    fold, _ = _training.folds(y, 5)
    grid = np.logspace(-6, 5, 45)
    whole = _solver.Path(_design.Design(task, fold), grid, np.arange(5))
    whole.whole()
    quick = _solver.Path(_design.Design(task, fold), grid, np.arange(5))
    found = quick.search()
    assert found == whole.best and 0 < found < 44
    assert len(quick.solved) <= 14


def test_class_weights_are_scikit_learns() -> None:
    X, y, names = clouds(600, 20, 3)
    keep = (y > 0) | (np.arange(600) % 7 == 0)
    X, y = X[keep], y[keep]
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    peer = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=5000).fit(Z, y)
    head = logreg.fit(Examples(X, y), names, strengths=[0.1], class_weight="balanced").head
    assert head.probabilities(head(X)) == pytest.approx(peer.predict_proba(Z), abs=2e-3)
    plain = logreg.fit(Examples(X, y), names, strengths=[0.1]).head
    assert np.abs(plain.probabilities(plain(X)) - peer.predict_proba(Z)).max() > 0.05


def test_several_labels_per_image_are_as_many_binary_fits() -> None:
    X, y, _ = clouds(500, 15, 4)
    targets = np.stack([y % 2, y > 1, np.arange(500) % 9 == 0], axis=1).astype(np.int64)
    fitted = logreg.fit(Examples(X, targets), ["odd", "high", "rare"], strengths=[0.05])
    assert fitted.head.activation == "sigmoid"
    p = fitted.head.probabilities(fitted.head(X))
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    for c in range(3):
        peer = LogisticRegression(C=0.05, tol=1e-8).fit(Z, targets[:, c])
        assert p[:, c] == pytest.approx(peer.predict_proba(Z)[:, 1], abs=2e-3)
    searched = logreg.fit(Examples(X, targets), ["odd", "high", "rare"])
    assert searched.info["converged"] and len(searched.info["cross_validation"]["log_loss"]) > 3


def test_rows_read_in_blocks_give_the_same_head(tmp_path: Path) -> None:
    X, y, names = clouds(3000, 24, 3)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    held, streamed = (logreg.fit(Examples(x, y), names).head for x in (X, mapped))
    assert streamed.probabilities(streamed(X)) == pytest.approx(held.probabilities(held(X)), abs=2e-3)


class Slices:
    """Features that can only be sliced, and remember the largest slice."""

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.shape, self.most = X, X.shape, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        part = self.X[rows]
        self.most = max(self.most, len(part))
        return part


def test_a_stream_is_never_read_whole() -> None:
    X, y, names = clouds(20_000, 64, 8)
    stream = Slices(X)
    fitted = logreg.fit(Examples(stream, y), names, strengths=[1e-3], folds=2)
    assert 0 < stream.most <= 70_000_000 / 4 / 64 and fitted.info["converged"]
    held = logreg.fit(Examples(X, y), names, strengths=[1e-3]).head
    assert (fitted.head(X).argmax(axis=1) == held(X).argmax(axis=1)).mean() > 0.999


def test_threads_and_blocks_change_no_answer() -> None:
    X, y, names = clouds(20_000, 48, 4)
    design = _design.Design(_training.check(X, y, names), np.arange(20_000) % 3)
    A = np.random.default_rng(0).normal(size=(4, 20, design.size)) * 0.1
    member = np.arange(20) % 4 - 1
    assert A[..., 0].size * X.size > _moments.THREADED
    split = design.visit(A, member)
    for p in (0, 1, 18):
        plain = design.visit(A[:, [p]], member[[p]])  # in one block, by one thread
        assert split.loss[p] == pytest.approx(plain.loss[0], rel=1e-12)
        assert split.gradient[:, p] == pytest.approx(plain.gradient[:, 0], rel=1e-9, abs=1e-8)
        assert split.held[p] == pytest.approx(plain.held[0], rel=1e-12)
        assert (plain.held[0] > 0) == (member[p] >= 0)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_pass_has_the_gradient_of_its_loss(classes: int) -> None:
    X, y, names = clouds(200, 12, classes)
    design = _design.Design(_training.check(X, y, names), np.full(200, -1))
    rng = np.random.default_rng(0)
    A, along = (rng.normal(size=(design.columns, 1, design.size)) * 0.3 for _ in range(2))
    up, down = (design.visit(A + step * along, np.array([-1])).loss[0] for step in (1e-5, -1e-5))
    slope = (design.visit(A, np.array([-1])).gradient * along).sum()
    assert (up - down) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_the_same_seed_gives_the_same_head() -> None:
    X, y, names = clouds(300, 40, 3)
    first, second = (logreg.fit(Examples(X, y), names, seed=3) for _ in range(2))
    assert (first.head.weight == second.head.weight).all() and (first.head.bias == second.head.bias).all()


def test_a_solver_that_is_stopped_short_says_so() -> None:
    X, y, names = clouds(200, 20, 3)
    design = _design.Design(_training.check(X, y, names), np.full(200, -1))
    info: dict[str, Any] = {"notes": []}
    logreg._last(design, 1.0, None, info, most=1)
    assert not info["converged"] and info["relative_gap"] > logreg.GAP
    assert any("relative gap of" in note and "not converged" in note for note in info["notes"])


def test_calibration_lowers_the_held_out_loss_and_folds_into_the_head() -> None:
    X, y, names = clouds(120, 60, 3)
    plain = logreg.fit(Examples(X, y), names, strengths=[100.0])
    fitted = logreg.fit(Examples(X, y), names, strengths=[100.0], calibrate=True)
    figures = fitted.info["calibration"]
    assert figures["temperature"] > 1 and figures["ece_after"] < figures["ece_before"]
    assert fitted.head.weight * figures["temperature"] == pytest.approx(plain.head.weight, abs=5e-3)
    assert np.abs(plain.head.weight).max() > 0.5
    assert (fitted.head(X).argmax(axis=1) == plain.head(X).argmax(axis=1)).mean() > 0.99


def test_a_threshold_that_reaches_an_accuracy_says_what_it_answers() -> None:
    X, y, names = clouds(500, 20, 3)
    fitted = logreg.fit(Examples(X, y), names, reject=0.95)
    figures = fitted.info["rejection"]
    assert figures["accuracy"] >= 0.95 > figures["accuracy_without"]
    assert 0.1 < figures["coverage"] < 1 and fitted.head.threshold == figures["threshold"]
    given = logreg.fit(Examples(X, y), names, threshold=0.6)
    assert given.head.threshold == 0.6 and given.info["rejection"]["coverage"] > figures["coverage"]
    with pytest.raises(HeadError, match="no threshold reaches"):
        X, y, names = clouds(60, 5, 3, apart=0.0)
        logreg.fit(Examples(X, y), names, reject=0.999)


def test_photographs_are_told_apart_and_sgd_comes_near(groups: Path) -> None:
    from featx.heads import linear

    arrays = np.load(groups)
    X, y, train = arrays["X"], arrays["y"], arrays["train"]
    examples, names = Examples(X[train], y[train]), [str(i) for i in range(20)]
    heads = [logreg.fit(examples, names).head, linear.fit(examples, names, epochs=40).head]
    exact, sgd = ((head(X[~train]).argmax(axis=1) == y[~train]).mean() for head in heads)
    assert exact >= 0.7 and abs(sgd - exact) <= 0.05


@pytest.mark.parametrize("kind", ["classes", "binary", "labels", "streamed", "wide"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_makes_the_same_passes_as_numpy(kind: str, dtype: type) -> None:
    """The code of the GPU, on the CPU: losses, gradients, curvature and held-out losses."""
    rows, size, classes = (70, 90, 4) if kind == "wide" else (700, 20, 2 if kind == "binary" else 5)
    X, y, names = clouds(rows, size, classes)
    rng = np.random.default_rng(0)
    if kind == "labels":
        y = (rng.random((rows, classes)) < 0.3).astype(np.int64)
    task = _training.check(Slices(X) if kind == "streamed" else X, y, names)
    fold, weights, scored = rng.integers(-1, 3, rows), rng.uniform(0.5, 2, rows), rng.random(rows) < 0.7
    numpy = _design.Design(task, fold, weights, scored=scored)
    torch = _design.Design(task, fold, weights, scored=scored, torch_device="cpu")
    A = (rng.normal(size=(numpy.columns, 6, numpy.size)) / 10).astype(dtype)
    member = np.array([-1, 0, 1, 2, -1, 0])
    one, other = numpy.visit(A, member), torch.visit(A, member)
    rel = 1e-12 if dtype is np.float64 else 2e-5
    for name in ("loss", "held", "curvature"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=rel), name
    assert other.gradient.dtype == dtype and np.abs(one.gradient).max() > 1
    np.testing.assert_allclose(other.gradient, one.gradient, atol=rel * np.abs(one.gradient).max())
    along = rng.normal(size=A.shape)
    products = [_hessian.Hessian(design, A, member).times(along.astype(np.float32)) for design in (numpy, torch)]
    near, far = (numpy.visit(A.astype(np.float64) + step * along, member).gradient for step in (-1e-5, 1e-5))
    for product in products:
        np.testing.assert_allclose(product, (far - near) / 2e-5, atol=1e-4 * np.abs(product).max())


def test_a_search_by_torchs_passes_is_numpys() -> None:
    X, y, names = clouds(900, 40, 5)
    task, fold = _training.check(X, y, names), np.arange(900) % 5
    designs = [_design.Design(task, fold, torch_device=device) for device in ("", "cpu")]
    usual, other = (_solver.Path(design, np.array(logreg.STRENGTHS), np.arange(5)) for design in designs)
    assert usual.search() == other.search() and sorted(usual.solved) == sorted(other.solved)
    for i in usual.solved:
        assert other.solved[i].converged.all() and other.held(i) == pytest.approx(usual.held(i), rel=1e-4)
    (weight, _), (same, _) = (logreg._last(design, 0.01, None, {"notes": []}) for design in designs)
    assert np.abs(same - weight).max() < 1e-3 * np.abs(weight).max()
    logits = [d.logits(p.solved[usual.best].A, fold >= 0) for d, p in zip(designs, (usual, other), strict=True)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-2)
    assert logits[0].std() > 0.1


@pytest.mark.gpu
def test_a_fit_on_the_gpu_is_the_cpus() -> None:
    if not has_cuda():
        pytest.skip("no CUDA device here: the solver's passes on a GPU are untested on this machine")
    X, y, names = clouds(900, 40, 5)
    cpu, gpu = (logreg.fit(Examples(X, y), names, device=device) for device in ("cpu", "cuda"))
    assert gpu.info["strength"] == cpu.info["strength"] and gpu.info["converged"]
    assert np.abs(gpu.head.weight - cpu.head.weight).max() < 1e-3 * np.abs(cpu.head.weight).max()


def test_a_device_that_is_not_there_is_refused() -> None:
    X, y, names = clouds(60, 5, 2)
    with pytest.raises(FeatxError, match="device is auto, cpu, cuda or cuda:N, not 'gpu'"):
        logreg.fit(Examples(X, y), names, device="gpu")


def test_a_single_class_that_may_apply_or_not_is_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    X = rng.normal(size=(60, 6)).astype(np.float32)
    y = (X[:, 0] + 0.5 * rng.normal(size=60) > 0).astype(np.int64)
    head = logreg.fit(Examples(X, y[:, None]), ["defect"], strengths=(0.3,)).head
    assert head.activation == "sigmoid" and head.weight.shape == (1, 6)
    peer = LogisticRegression(C=0.3, tol=1e-8).fit((X - X.mean(axis=0)) / X.std(axis=0), y)
    wanted = peer.decision_function((X - X.mean(axis=0)) / X.std(axis=0))
    np.testing.assert_allclose(head(X)[:, 0], wanted, atol=2e-3)
