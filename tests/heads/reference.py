"""scikit-learn's own optimum, by newton-cg to a gradient of 1e-9: what featx's heads are measured against."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression


def optimum(Z: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight `[C, D]` and bias `[C]` for rows Z `float64 [N, D]`; two classes get a row of zeros and one."""
    model = LogisticRegression(C=strength, solver="newton-cg", tol=1e-9, max_iter=5000).fit(Z, y)
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    return np.concatenate([0 * model.coef_, model.coef_]), np.array([0.0, model.intercept_[0]])


def cross_validated(Z: np.ndarray, y: np.ndarray, fold: np.ndarray, strength: float) -> float:
    """Log-loss per row, each answered by the optimum that had not seen its fold."""
    total = 0.0
    for k in range(fold.max() + 1):
        weight, bias = optimum(Z[fold != k], y[fold != k], strength)
        logits = Z[fold == k] @ weight.T + bias
        total += (logsumexp(logits, axis=1) - logits[np.arange(len(logits)), y[fold == k]]).sum()
    return total / len(y)
