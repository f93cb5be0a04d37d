"""Normalized LR+GD: gradient descent on the logistic loss, divided by how wrong the model is on average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.optim._rule import NOT_OPTIONS, at_least_zero
from assay.optim.normalized_lr.perceptrons import PerceptronResult, batch_perceptron, perceptron

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run
    from assay.optim.normalized_lr.classifier import NormalizedLogisticClassifier

__all__ = [
    "NormalizedLRGD",
    "NormalizedLogisticClassifier",
    "PerceptronResult",
    "batch_perceptron",
    "normalized_logistic",
    "normalized_lr_scale",
    "perceptron",
]

FAR = 40.0
"""A margin from which softplus(-m) and sigmoid(-m) are both exp(-m), to the last bit of float64."""


def __getattr__(name: str) -> Any:
    # Importing scikit-learn costs about a second, which the users of the optimizer need not spend.
    if name == "NormalizedLogisticClassifier":
        from assay.optim.normalized_lr.classifier import NormalizedLogisticClassifier

        return NormalizedLogisticClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def normalized_lr_scale(margins: Tensor) -> Tensor:
    """How much longer than the logistic loss's gradient the step of Normalized LR+GD is: 1 / its mean error.

    With margins m_i = y_i g(a_i), labels y_i in {-1, +1}, and n examples ::

        beta = 1 / mean_i sigmoid(-m_i)                                         in [1, inf)

    Multiply the mean logistic loss by it, for any optimizer. Where all margins are beyond some 700 (90 in float32) beta
    is inf; :func:`normalized_logistic` is the product of the two, and stays finite.

    Args:
        margins: (n,), floating point, n >= 1.

    Returns:
        beta as a 0-d tensor without a gradient, in float32 at least.

    Raises:
        ValueError: margins of another shape, or not floating point.

    Source: A. Tyurin, From Logistic Regression to the Perceptron Algorithm, AAAI 2025, arXiv 2412.08424.

    >>> import torch
    >>> from assay.optim import normalized_lr_scale
    >>> normalized_lr_scale(torch.zeros(5))
    tensor(2.)
    """
    return 1 / torch.sigmoid(-_precise(margins).detach()).mean()


def normalized_logistic(margins: Tensor) -> Tensor:
    """Logistic loss whose gradient is an average over the examples, weighted by how wrong they are.

    With margins m_i = y_i g(a_i), labels y_i in {-1, +1}, n examples, and beta a constant in the gradient ::

        p_i  = sigmoid(-m_i)                     beta = 1 / mean_i p_i
        loss = beta * mean_i log(1 + exp(-m_i))
        d loss / d m_i = - p_i / sum_j p_j

    ``torch.optim.SGD(lr=gamma)`` on it is Normalized LR+GD. The gradient's weights are positive and sum to 1 whatever
    the margins are: an ever better fit does not make it vanish. The value is at least 1 and no measure of progress;
    count the examples with m_i <= 0 for that. All is computed as ratios that neither overflow nor become 0 / 0, in
    float32 at least.

    Args:
        margins: (n,), floating point, n >= 1. For two logits z the margin is z[label] - z[1 - label].

    Returns:
        The loss as a 0-d tensor, in the dtype of the margins (float32 under autocast).

    Raises:
        ValueError: margins of another shape, or not floating point.

    Source: A. Tyurin, From Logistic Regression to the Perceptron Algorithm, AAAI 2025, arXiv 2412.08424.

    >>> import torch
    >>> from assay.losses import normalized_logistic
    >>> margins = torch.tensor([1000.0, 1001.0], requires_grad=True)  # the gradient of the logistic loss would be zero
    >>> normalized_logistic(margins).backward()
    >>> margins.grad
    tensor([-0.7311, -0.2689])
    """
    m = _precise(margins)
    # softplus(-m) / p, with p held constant. Of the two forms the one not taken must stay finite, for its gradient.
    near, far = m.clamp(max=FAR), (m.detach() - m).exp()
    ratios = torch.where(m < FAR, -F.logsigmoid(near) / torch.sigmoid(-near).detach(), far)
    loss = torch.dot(_weights(m.detach()), ratios)
    return loss if torch.is_autocast_enabled(margins.device.type) else loss.to(margins.dtype)


class NormalizedLRGD(torch.optim.Optimizer):
    """Normalized LR+GD: a linear classifier moves to the average of its examples, weighted by how wrong it is on them.

    With rows a_i, labels y_i in {-1, +1} and margins m_i = y_i <a_i, theta> of all n examples ::

        p_i   = sigmoid(-m_i)
        theta = theta + lr * (sum_i p_i y_i a_i) / (sum_i p_i)

    which is a step of ``lr * beta`` down the gradient of mean_i log(1 + exp(-m_i)), with beta = 1 / mean_i p_i. From
    theta = 0 and on separable data of margin mu, with R the largest norm of a row, all examples are right after at most
    R^2 / mu^2 + 2 log(2n - 1) / (lr mu^2) steps; for a step without beta the first term is n R^2 / mu^2. No step is
    longer than lr * R.

    ``step(closure)`` calls the closure once; it returns the margins, shape (n,), and does *not* call backward. The
    optimizer asks for their gradient itself: ``p.grad`` is neither read nor written, and there is no state. A parameter
    on which the margins do not depend stays. ``step`` returns the margins, detached, as they were before the step.

    Args:
        params: parameters, or groups of them with an ``lr`` and ``eps`` of their own. Start them at zero.
        lr: gamma, >= 0; a number or a tensor of one element. The larger, the better the bound; use float64 from 100 on.
        eps: added to mean_i p_i in beta, >= 0. At 0, the paper's, steps never fade.

    Raises:
        ValueError: an argument out of range; margins of another shape than (n,), or not floating point.
        RuntimeError: a step without a closure; margins without a gradient; parameters that are sharded.

    Source: A. Tyurin, From Logistic Regression to the Perceptron Algorithm, AAAI 2025, arXiv 2412.08424.

    >>> import torch
    >>> from assay.optim import NormalizedLRGD
    >>> X = torch.tensor([[1.0, -1.0], [-1.0, -4.0]], dtype=torch.float64)
    >>> y = torch.tensor([1, -1])
    >>> theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> optimizer = NormalizedLRGD([theta], lr=100.0)
    >>> steps = 0
    >>> while not (y * (X @ theta) > 0).all():
    ...     margins = optimizer.step(lambda: y * (X @ theta))
    ...     steps += 1
    >>> steps, theta.tolist()
    (2, [200.0, 50.0])
    """

    def __init__(self, params: Any, lr: float | Tensor = 100.0, *, eps: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with an ``lr`` and ``eps`` of their own; other options and values out of range are refused."""
        if unknown := param_group.keys() - self.defaults.keys() - NOT_OPTIONS:
            raise TypeError(f"NormalizedLRGD has no option {', '.join(map(repr, sorted(unknown)))}")
        options = {**self.defaults, **param_group}
        if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
            shape = tuple(options["lr"].shape)
            raise ValueError(f"lr of shape {shape} is out of range: a number >= 0 or a tensor of one element")
        at_least_zero(options, "lr", "eps")
        super().add_param_group(param_group)
        if any(hasattr(p, "to_local") for p in self.param_groups[-1]["params"]):
            raise RuntimeError("NormalizedLRGD does not support sharded parameters: a linear model needs no shards")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One update; ``closure()`` returns the margins of all examples, and so does this, detached."""
        if closure is None:
            raise RuntimeError("NormalizedLRGD needs the margins: call step(closure) with a closure that returns them")
        with torch.enable_grad():
            margins = closure()
        errors = _precise(margins).detach()
        if not margins.requires_grad:
            raise RuntimeError("the margins that the closure returned carry no gradient: none depends on a parameter")
        chosen = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        weights = _weights(errors).to(margins.dtype)
        directions = torch.autograd.grad(margins, [p for _, p in chosen], weights, allow_unused=True)
        for (group, p), direction in zip(chosen, directions, strict=True):
            if direction is not None:
                p.add_(direction.mul(_rate(group, errors)))
        return margins.detach()


def _precise(margins: Tensor) -> Tensor:
    """The margins in float32 at least."""
    if margins.dim() != 1 or not len(margins):
        raise ValueError(f"margins.shape = {tuple(margins.shape)} is out of range: (n,) with n >= 1")
    if not margins.is_floating_point():
        raise ValueError(f"margins.dtype = {margins.dtype} is out of range: floating point")
    return margins.to(torch.promote_types(margins.dtype, torch.float32))


def _weights(margins: Tensor) -> Tensor:
    """p_i / sum_j p_j, also where every p underflows."""
    return torch.softmax(F.logsigmoid(-margins), 0)


def _rate(group: dict[str, Any], margins: Tensor) -> Any:
    """gamma, times mean(p) / (mean(p) + eps)."""
    if not group["eps"]:
        return group["lr"]
    mean = torch.sigmoid(-margins).mean()
    return group["lr"] * (mean / (mean + group["eps"]))


def apply(recipe: Recipe) -> Recipe:
    """The normalized logistic loss as a run's objective, where there are two classes."""

    def objective(run: Run) -> Objective:
        if run.task.classes != 2:
            raise ValueError("normalized-lr needs a classification task of two classes")

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            logits = model(batch.input)
            return normalized_logistic((2 * batch.target - 1) * (logits[:, 1] - logits[:, 0]))

        return loss

    return replace(recipe, objective=objective)
