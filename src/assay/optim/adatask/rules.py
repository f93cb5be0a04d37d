"""What a gradient and its history make of a step: the three adaptive optimizers, before the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Base:
    """``update(g, *slots, t, group)`` renews the slots and returns the direction; tensors, or lists of them as one."""

    slots: tuple[str, ...]
    update: Callable[..., Any]


def adam(g: Any, m: Any, v: Any, *, t: int, group: dict[str, Any]) -> Any:
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return over_root(m, v.div(1 - beta2**t), group).div_(1 - beta1**t)


def rmsprop(g: Any, v: Any, *, t: int, group: dict[str, Any]) -> Any:
    v.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
    return over_root(g, v, group)


def adagrad(g: Any, v: Any, *, t: int, group: dict[str, Any]) -> Any:
    v.addcmul_(g, g)
    return over_root(g, v, group)


def over_root(x: Any, v: Any, group: dict[str, Any]) -> Any:
    """x / (sqrt(v) + eps)"""
    return v.sqrt().add_(group["eps"]).reciprocal_().mul_(x)


BASES = {
    "adam": Base(("exp_avg", "exp_avg_sq"), adam),
    "rmsprop": Base(("square_avg",), rmsprop),
    "adagrad": Base(("square_sum",), adagrad),
}
