"""Adam, SGD and Lion with a state of eight bits a number instead of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from assay.compress._blockwise import QuantizedState, dequantize_blockwise, dynamic_map, quantize_blockwise
from assay.optim._rule import at_least_zero, below_one
from assay.optim.eightbit.quantized import QuantizedOptimizer, use_32bit
from assay.optim.eightbit.stable_embedding import StableEmbedding

__all__ = [
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "QuantizedState",
    "SGD8bit",
    "StableEmbedding",
    "dequantize_blockwise",
    "dynamic_map",
    "quantize_blockwise",
    "use_32bit",
]


class AdamW8bit(QuantizedOptimizer):
    """AdamW whose two averages are kept in eight bits a number: 2.03 bytes a parameter in place of 8.

    With g_t the gradient at step t = 1, 2, ... of a parameter p; m and v are decoded, and coded again at the end ::

        m = beta1 * m + (1 - beta1) * g_t                    v = beta2 * v + (1 - beta2) * g_t^2
        p = (1 - lr * weight_decay) * p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        codes of x, for each block of block_size elements:   absmax = max |x|,  the value of a map nearest to x / absmax

    The step itself takes m and v as they are before they are coded. The map is ``assay.compress.quant.dynamic_map``,
    for v that without a sign. An m other than 0 is never coded as 0, so that no code has another sign than its number.

    What stays in 32 bits: parameters of fewer than ``min_8bit_size`` elements, those marked by ``use_32bit`` (as the
    weight of a ``StableEmbedding`` is), and groups with ``optim_bits=32``. There it is ``torch.optim.AdamW``.

    All arithmetic is in float32 (float64 for such parameters). An element of a parameter kept in eight bits whose
    gradient is not finite stays as it is, with its state. A sharded parameter has blocks in each process's shard.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        block_size: elements that share a scale, >= 1.
        min_8bit_size: number of elements from which a parameter's state is kept in eight bits, >= 0.
        amsgrad: divide by the largest v so far, a third average of eight bits.
        maximize: ascend.
        foreach: for what stays in 32 bits: None runs small tensors as lists, True all that may be, False none.
        optim_bits: 8 or 32.
        nonzero_v: a v above 0 is never coded as 0, so that no element takes a step of m / eps. False as in the paper.
        stochastic_rounding: code to one of the two values around a number by chance, so that its mean is right; also
            write back parameters in bfloat16 and float16 so. For tests that must repeat, seed torch.
        compile: run through ``torch.compile``; the first steps compile, a new ``lr`` does not.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient, a complex parameter, or a ``block_size`` that is not the state's.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.optim import AdamW8bit
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    >>> model(torch.ones(4, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> {name: x.nbytes for name, x in optimizer.state[model.weight].items()}
    {'step': 4, 'exp_avg': 4096, 'exp_avg_absmax': 64, 'exp_avg_sq': 4096, 'exp_avg_sq_absmax': 64}
    """

    slots = ("exp_avg", "exp_avg_sq")
    signed = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        optim_bits: int = 8,
        nonzero_v: bool = False,
        stochastic_rounding: bool = False,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size, "amsgrad": amsgrad}
        defaults |= {"optim_bits": optim_bits, "nonzero_v": nonzero_v, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return (*cls.slots, "max_exp_avg_sq") if options["amsgrad"] else cls.slots

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        QuantizedOptimizer.check(options)
        at_least_zero(options, "eps", "weight_decay")
        below_one(options, "betas")

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, *largest: Any, lr: Any, t: Any, betas: tuple[float, float], eps: float,
        weight_decay: float, amsgrad: bool,
    ) -> None:  # fmt: skip
        beta1, beta2 = betas
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if amsgrad:
            v = largest[0].copy_(largest[0].maximum(v))
        p.mul_(1 - lr * weight_decay)
        p.sub_(m.div(v.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)).mul_(lr / (1 - beta1**t)))


class Adam8bit(AdamW8bit):
    """Adam with a state of eight bits a number: :class:`AdamW8bit` whose ``weight_decay`` is 0 unless given.

    The decay is decoupled here as well. The arguments, what they mean and what is raised are AdamW8bit's.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.optim import Adam8bit
    >>> optimizer = Adam8bit(torch.nn.Linear(64, 64).parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        optim_bits: int = 8,
        nonzero_v: bool = False,
        stochastic_rounding: bool = False,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, block_size=block_size, min_8bit_size=min_8bit_size, amsgrad=amsgrad,
            maximize=maximize, foreach=foreach, optim_bits=optim_bits, nonzero_v=nonzero_v,
            stochastic_rounding=stochastic_rounding, compile=compile, fused=fused,
        )  # fmt: skip


class SGD8bit(QuantizedOptimizer):
    """SGD whose momentum is kept in eight bits a number: 1.02 bytes a parameter in place of 4.

    With g_t the gradient at step t = 1, 2, ... of a parameter p; b is decoded, and coded again at the end ::

        g = g_t + weight_decay * p
        b = g  if t = 1,  else  momentum * b + (1 - dampening) * g
        p = p - lr * b                                       (nesterov: g + momentum * b in place of b)

    How b is coded, and what stays in 32 bits, says :class:`AdamW8bit`. In 32 bits it is ``torch.optim.SGD``. Without
    momentum there is no state.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: part of the gradient, >= 0.
        nesterov: look one momentum step ahead; wants momentum above 0 and no dampening.
        block_size, min_8bit_size, maximize, foreach, optim_bits, stochastic_rounding, compile, fused: as in
            :class:`AdamW8bit`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient, a complex parameter, or a ``block_size`` that is not the state's.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.optim import SGD8bit
    >>> optimizer = SGD8bit(torch.nn.Linear(64, 64).parameters(), lr=0.1)
    """

    slots = ("momentum_buffer",)
    signed = {"momentum_buffer": True}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        optim_bits: int = 8,
        stochastic_rounding: bool = False,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        defaults |= {"nesterov": nesterov, "block_size": block_size, "min_8bit_size": min_8bit_size}
        defaults |= {"optim_bits": optim_bits, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.slots if options["momentum"] else ()

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        QuantizedOptimizer.check(options)
        at_least_zero(options, "weight_decay")
        below_one(options, "momentum")
        if not 0 <= options["dampening"] <= 1:
            raise ValueError(f"dampening = {options['dampening']!r} is out of range: [0, 1]")
        if options["nesterov"] and (not options["momentum"] or options["dampening"]):
            raise ValueError("nesterov = True is out of range: it wants momentum above 0 and no dampening")

    @staticmethod
    def rule(
        p: Any, g: Any, *buffer: Any, lr: Any, t: Any, momentum: float, dampening: float, weight_decay: float,
        nesterov: bool,
    ) -> None:  # fmt: skip
        if weight_decay:
            g = g.add(p, alpha=weight_decay)
        if momentum:
            b = buffer[0].mul_(momentum).add_(g.mul(1 - dampening * (t > 1)))
            g = b.mul(momentum).add_(g) if nesterov else b
        p.sub_(g.mul(lr))


class Lion8bit(QuantizedOptimizer):
    """Lion, the sign of an average, with that average in eight bits a number: 1.02 bytes a parameter in place of 4.

    With g_t the gradient at step t of a parameter p; m is decoded, and coded again at the end ::

        p = (1 - lr * weight_decay) * p - lr * sign(beta1 * m + (1 - beta1) * g_t)
        m = beta2 * m + (1 - beta2) * g_t

    How m is coded, and what stays in 32 bits, says :class:`AdamW8bit`.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the average in the sign and of the one that is kept, each in [0, 1).
        weight_decay: decoupled decay, >= 0.
        block_size, min_8bit_size, maximize, foreach, optim_bits, stochastic_rounding, compile, fused: as in
            :class:`AdamW8bit`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient, a complex parameter, or a ``block_size`` that is not the state's.

    Source: X. Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675; the codes
    T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.optim import Lion8bit
    >>> optimizer = Lion8bit(torch.nn.Linear(64, 64).parameters(), lr=1e-4, weight_decay=0.1)
    """

    slots = ("exp_avg",)
    signed = {"exp_avg": True}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        optim_bits: int = 8,
        stochastic_rounding: bool = False,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size}
        defaults |= {"optim_bits": optim_bits, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        QuantizedOptimizer.check(options)
        at_least_zero(options, "weight_decay")
        below_one(options, "betas")

    @staticmethod
    def rule(p: Any, g: Any, m: Any, *, lr: Any, t: Any, betas: tuple[float, float], weight_decay: float) -> None:
        p.mul_(1 - lr * weight_decay).sub_(m.lerp(g, 1 - betas[0]).sign_().mul_(lr))
        m.lerp_(g, 1 - betas[1])
