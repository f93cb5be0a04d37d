"""Normalized LR+GD as a scikit-learn classifier."""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from assay.optim.normalized_lr.normalized_lr import NormalizedLRGD


class NormalizedLogisticClassifier(ClassifierMixin, BaseEstimator):
    """A linear classifier of two classes by Normalized LR+GD, which stops when it is right on all training examples.

    With rows a_i, labels y_i = +1 for the second of the sorted classes and -1 for the first, from theta = 0 ::

        p_i   = sigmoid(-y_i <a_i, theta>)
        theta = theta + lr * (sum_i p_i y_i a_i) / (sum_i p_i)       until y_i <a_i, theta> > 0 for all i

    It finds *a* separating plane, in few steps also where one class is rare, not the one of largest margin; nor are its
    outputs probabilities. Data that no plane separates use all ``max_iter`` steps, with a ``ConvergenceWarning``.
    All is computed in float64.

    Args:
        lr: gamma, in (0, inf); the number of steps falls with it, towards that of the normalized batch perceptron.
        max_iter: most steps, >= 1.
        fit_intercept: append a feature that is always 1. Without it the plane goes through 0.

    Attributes:
        coef_: (1, d); ``intercept_``: (1,), 0 without ``fit_intercept``.
        classes_: the two labels, sorted.
        n_iter_: steps taken.
        solved_: whether all training examples are right.

    Raises:
        ValueError: in ``fit``, an argument out of range; data that are not finite, or not of exactly two classes.

    Source: A. Tyurin, From Logistic Regression to the Perceptron Algorithm, AAAI 2025, arXiv 2412.08424.

    >>> from assay.linear_model import NormalizedLogisticClassifier
    >>> X, y = [[0.5, -1.0]] + 999 * [[-0.5, -1.0]], ["rare"] + 999 * ["common"]
    >>> classifier = NormalizedLogisticClassifier().fit(X, y)
    >>> classifier.n_iter_, classifier.solved_, classifier.score(X, y)
    (2, True, 1.0)
    """

    coef_: np.ndarray
    intercept_: np.ndarray
    classes_: np.ndarray
    n_iter_: int
    solved_: bool

    def __init__(self, lr: float = 100.0, max_iter: int = 1000, fit_intercept: bool = False) -> None:
        self.lr = lr
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any) -> NormalizedLogisticClassifier:
        """Learn from rows X (n, d) and their labels y (n,), of two classes."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr = {self.lr!r} is out of range: (0, inf)")
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ValueError(f"max_iter = {self.max_iter!r} is out of range: an integer >= 1")
        X, y = validate_data(self, X, y, dtype=np.float64)
        signs = self._signs(y)
        rows = np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X
        theta = self._descend(torch.from_numpy(signs[:, None] * rows))
        self.coef_ = theta[None, : X.shape[1]].copy()
        self.intercept_ = theta[X.shape[1] :].copy() if self.fit_intercept else np.zeros(1)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """<a, theta> for every row of X, shape (n,); positive for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: Any) -> np.ndarray:
        """The class of every row of X, shape (n,)."""
        second = self.decision_function(X) > 0  # first, for it refuses a classifier that is not fitted
        return self.classes_[second.astype(int)]

    def _signs(self, y: np.ndarray) -> np.ndarray:
        """-1 and +1 for the two classes."""
        check_classification_targets(y)
        if (kind := type_of_target(y, input_name="y")) != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}: two are needed")
        return 2.0 * index - 1.0

    def _descend(self, signed: torch.Tensor) -> np.ndarray:
        theta = torch.zeros(signed.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = NormalizedLRGD([theta], self.lr)
        self.n_iter_, self.solved_ = 0, False
        while not self.solved_ and self.n_iter_ < self.max_iter:
            optimizer.step(lambda: signed @ theta)
            self.n_iter_ += 1
            self.solved_ = bool((signed @ theta.detach() > 0).all())
        if not self.solved_:
            message = f"some training examples are still wrong after max_iter = {self.max_iter} steps"
            warnings.warn(f"{message}; perhaps no plane separates them", ConvergenceWarning, stacklevel=3)
        return theta.detach().numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
