"""Many small tensors under the name of one: Tensor's methods over torch's list operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_LISTED = "abs add addcdiv addcmul clamp_max clamp_min cos copy div erf exp lerp log maximum minimum mul neg pow"
_LISTED += " reciprocal round rsqrt sigmoid sign sin sqrt sub tanh trunc zero"


class Many:
    """A list of tensors that a rule may treat as one: ``m.lerp_(g, 0.1)`` is ``torch._foreach_lerp_``.

    Each operator does to every tensor what Tensor's method of that name does, so a rule gives the same bits on a
    ``Many`` as on its tensors one after the other. Only methods are offered, no functions of torch.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    @property
    def ndim(self) -> int:
        """The largest number of dimensions among the tensors."""
        return max(x.dim() for x in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def addcmul_(self, one: Many, other: Many, *, value: float = 1) -> Many:
        torch._foreach_addcmul_(self.tensors, one.tensors, other.tensors, value)
        return self

    def addcmul(self, one: Many, other: Many, *, value: float = 1) -> Many:
        return Many(torch._foreach_addcmul(self.tensors, one.tensors, other.tensors, value))

    def addcdiv_(self, one: Many, other: Many, *, value: float = 1) -> Many:
        torch._foreach_addcdiv_(self.tensors, one.tensors, other.tensors, value)
        return self

    def clone(self) -> Many:
        return Many(x.clone() for x in self.tensors)

    def to(self, *args: Any, **kwargs: Any) -> Many:
        return Many(x.to(*args, **kwargs) for x in self.tensors)

    def __getattr__(self, name: str) -> Any:
        if name.removesuffix("_") not in _LISTED.split():
            raise AttributeError(f"{name}: no list operator of this name; write it into assay.optim._many.Many")
        operator, in_place = getattr(torch, f"_foreach_{name}"), name.endswith("_")

        def method(*args: Any, **kwargs: Any) -> Many:
            found = operator(self.tensors, *map(_plain, args), **kwargs)
            return self if in_place else Many(found)

        return method

    def __mul__(self, other: Any) -> Many:
        return self.mul(other)

    def __add__(self, other: Any) -> Many:
        return self.add(other)

    def __sub__(self, other: Any) -> Many:
        return self.sub(other)

    def __truediv__(self, other: Any) -> Many:
        return self.div(other)

    def __neg__(self) -> Many:
        return self.neg()

    __rmul__ = __mul__
    __radd__ = __add__


def _plain(value: Any) -> Any:
    return value.tensors if isinstance(value, Many) else value
