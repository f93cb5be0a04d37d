"""PerpGrad: any optimizer with gradients orthogonal to the weights, and what shows that it is wanted.

A classifier that fits its training data can lower cross-entropy by growing its weights along themselves, which scales
all logits and changes no prediction: *naive loss minimization*. It ends where exp(z) of the right class swallows the
others in floating point (*softmax collapse*) and the gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.optim._wrapper import WrappedOptimizer
from assay.optim.perpgrad.projection import alignment, project_

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from assay.bench.recipe import Recipe, Run

Exclude = Callable[[Tensor], bool] | Iterable[Tensor]


def orthogonalize_grad_(params: Iterable[Tensor] | Tensor, *, rescale: bool = True, eps: float = 1e-30) -> None:
    """Take from every gradient, in place, its part along its own weight; by default it keeps its length.

    For each parameter by itself, whatever its shape, with w and g the flattened parameter and its ``.grad`` ::

        g_perp = g - <w, g> / (<w, w> + eps) * w
        g_perp = g_perp * ||g|| / (||g_perp|| + eps)                     if rescale
        g_perp = 0                                                       if ||g_perp|| <= 1e-6 ||g||  (float64: 1e-12)

    The last line is for a gradient parallel to its weight, such as every one-element tensor has: what is left of it is
    rounding, which rescaling would blow up. A weight of zeros leaves its gradient as it is.

    Call it after backward, with accumulated gradients at the last one, under AMP before or after ``unscale_``, before
    or after clipping by the norm (with ``rescale`` the norms are the same). It may also be a hook of the optimizer:
    ``optimizer.register_step_pre_hook(lambda *_: orthogonalize_grad_(model.parameters()))``, if that is stepped
    without a closure.

    Sums are taken in float32 at least. Sharded parameters (``DTensor``) are projected whole: their sums go over all
    shards. Nothing is read back from the device.

    Args:
        params: parameters, or one; without a gradient, or with a sparse or complex one, they are left alone.
        rescale: give the projected gradient the length that it had; False is the paper's formula.
        eps: added to both denominators, >= 0 and finite.

    Raises:
        ValueError: eps out of range.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697, Definition 7.

    >>> import torch
    >>> from assay.optim import orthogonalize_grad_
    >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    >>> w.grad = torch.tensor([3.0, 4.0])
    >>> orthogonalize_grad_([w])
    >>> w.grad
    tensor([0., 5.])
    """
    _check_eps(eps)
    project_([params] if isinstance(params, Tensor) else params, rescale, eps)


class PerpGrad(WrappedOptimizer):
    """Any optimizer, given gradients that are orthogonal to their weights.

    Before each step of ``optimizer`` the gradients are changed by :func:`orthogonalize_grad_`::

        g <- orthogonalize(w, g)  for every parameter w with gradient g;  then the step of optimizer

    Momentum is not projected again, and the optimizer's own weight decay still acts (the paper sets it to 0). Groups,
    state and checkpoints are the optimizer's own, so schedulers, scalers and checkpoints may be given either of the
    two; hooks registered here are the optimizer's as well and see the projected gradients.

    ``step(closure)`` evaluates the closure once, projects, and steps without it; it returns the closure's loss.

    Args:
        optimizer: any optimizer whose ``step`` needs no closure.
        rescale: give each projected gradient the length that it had; False is the paper's formula.
        eps: added to the denominators, >= 0 and finite.
        exclude: parameters whose gradients stay as they are: a function of a parameter that says so, asked at every
            step, or a collection of parameters. None: no parameter. To pickle the optimizer give a named function.

    Raises:
        ValueError: eps out of range.
        TypeError: ``optimizer`` is none, or ``exclude`` neither a function nor a collection of parameters.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697.

    >>> import torch
    >>> from assay.optim import PerpGrad
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
    >>> model(torch.ones(4, 2)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        rescale: bool = True,
        eps: float = 1e-30,
        exclude: Exclude | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer = {optimizer!r} is out of range: an optimizer that exists")
        _check_eps(eps)
        # Not among the groups' options: eps there is the optimizer's.
        self.rescale, self.eps, self.exclude = rescale, eps, _exclusion(exclude)
        super().__init__(None, optimizer, {}, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        orthogonalize_grad_(self._projected(), rescale=self.rescale, eps=self.eps)
        self.base.step()
        return loss

    def _projected(self) -> Iterator[nn.Parameter]:
        if self.exclude is None:
            return self.parameters()
        if callable(self.exclude):
            return (p for p in self.parameters() if not self.exclude(p))
        left_out = set(map(id, self.exclude))
        return (p for p in self.parameters() if id(p) not in left_out)

    # A hook is called once, by the base, however it was registered.

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        return self.base.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.base.register_load_state_dict_post_hook(hook, prepend)


def nlm_alignment(params: nn.Module | Iterable[Any] | Tensor) -> dict[str, Tensor] | Tensor:
    """|cos(w, -g)| of each parameter w and its gradient g: near 1, training mostly scales the weights.

    Flattened, each parameter by itself: ``|<w, g>| / (||w|| ||g||)``, and 0 where one of the two is zero. Sums are
    taken in float32 at least, over all shards of a ``DTensor``. Parameters without a gradient, or with a sparse or
    complex one, are left out.

    Args:
        params: a module or pairs (name, parameter), as ``model.named_parameters()`` gives; or parameters; or one.

    Returns:
        With names a dict of 0-d tensors; of parameters a tensor of shape (n,), in their order; of one a 0-d tensor.

    Raises:
        ValueError: a single parameter has no gradient to measure.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697, section 4.

    >>> import torch
    >>> from assay.optim import nlm_alignment
    >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    >>> w.grad = torch.tensor([-3.0, 4.0])
    >>> nlm_alignment({"w": w}.items())
    {'w': tensor(0.6000)}
    """
    if isinstance(params, Tensor):
        alone = alignment([params])
        if not alone:
            raise ValueError("params = a tensor is out of range: one with a dense, real gradient")
        return alone[0]
    items = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    if items and isinstance(items[0], tuple):
        found = alignment([p for _, p in items])
        return {name: found[i] for i, (name, _) in enumerate(items) if i in found}
    found = alignment(items)
    values = [found[i] for i in sorted(found)]
    return torch.stack([value.to(values[0].device) for value in values]) if values else torch.zeros(0)


@torch.no_grad()
def softmax_collapse_fraction(logits: Tensor, target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Share of the examples whose cross-entropy is exactly 0 in ``dtype``: nothing is left to learn from them.

    With all numbers rounded to ``dtype`` and m = max_k logits_k ::

        collapsed  if  sum_k exp(logits_k - m) = exp(logits_target - m)

    Args:
        logits: shape (..., C), floating.
        target: classes 0 to C - 1, shape (...), integers.
        dtype: floating; what the loss is computed in.

    Returns:
        The share, 0-d, in float32.

    Raises:
        ValueError: shapes that do not fit or hold no example, or a dtype that is not floating.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697, section 3.

    >>> import torch
    >>> from assay.losses import softmax_collapse_fraction
    >>> softmax_collapse_fraction(torch.tensor([[0.0, 30.0], [0.0, 10.0]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    if logits.dim() < 1 or not logits.numel():
        raise ValueError(f"logits.shape = {tuple(logits.shape)} is out of range: (..., C), with at least one example")
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target.shape = {tuple(target.shape)} is out of range: {tuple(logits.shape[:-1])}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype} is out of range: a floating dtype")
    z = logits.to(dtype)
    exp = (z - z.amax(-1, keepdim=True)).exp()
    right = exp.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    return (exp.sum(-1) == right).float().mean()


def apply(
    recipe: Recipe, *, lr: float | None = None, weight_decay: float | None = None, rescale: bool = True
) -> Recipe:
    """PerpGrad around the recipe's own optimizer, with this learning rate and weight decay where they are given."""
    options = {name: x for name, x in (("lr", lr), ("weight_decay", weight_decay)) if x is not None}
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r} is out of range: >= 0 and finite")

    def update(run: Run) -> PerpGrad:
        optimizer = recipe.update(run)
        for group in optimizer.param_groups:
            if missing := options.keys() - group.keys():
                raise ValueError(f"perpgrad: {type(optimizer).__name__} has no option {', '.join(sorted(missing))}")
            group.update(options)
        return PerpGrad(optimizer, rescale=rescale)

    return replace(recipe, update=update)


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps = {eps!r} is out of range: >= 0 and finite")


def _exclusion(exclude: Exclude | None) -> Callable[[Tensor], bool] | list[Tensor] | None:
    if exclude is None or callable(exclude):
        return exclude
    listed = None if isinstance(exclude, Tensor) or not isinstance(exclude, Iterable) else list(exclude)
    if listed is None or not all(isinstance(p, Tensor) for p in listed):
        raise TypeError("exclude is out of range: a function of a parameter, or a collection of parameters")
    return listed


__all__ = ["PerpGrad", "apply", "nlm_alignment", "orthogonalize_grad_", "softmax_collapse_fraction"]
