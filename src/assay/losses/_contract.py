"""What every loss of the family satisfies, on one page.

A room puts example calls of its losses into the list ``EXAMPLES`` of its test file; ``test_contract.py`` runs
:data:`CHECKS` over all of them and refuses a public loss (a function with ``reduction``) that is in no list. That
list, with an oracle from the paper in plain loops, is all that a new loss writes for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "sum": Tensor.sum}


@dataclass(frozen=True)
class Example:
    """A call ``loss(input, target, **options)``, and the numbers that the paper's formula gives for it.

    ``make()`` returns (input, target) with the examples along the first dimension of both, drawn from torch's global
    generator; ``oracle(input, target, **options)`` the loss of each example as a list of floats, in plain loops.
    ``ignored(target)`` is the target with its first example marked as ignored (by ``options`` or by the loss). Further
    flags: ``by_example`` is for losses whose examples do not see each other; ``extremes`` for those whose input may be
    any real number; ``reductions`` says what each word for ``reduction`` makes of the losses of the examples.
    """

    loss: Callable[..., Tensor]
    make: Callable[[], tuple[Tensor, Tensor]]
    oracle: Callable[..., list[float]]
    options: Mapping[str, Any] = field(default_factory=dict)
    ignored: Callable[[Tensor], Tensor] | None = None
    by_example: bool = True
    extremes: bool = True
    reductions: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=lambda: PLAIN)

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.loss.__name__}(input, target{options})"

    def data(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in self.make())

    def call(self, input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return self.loss(input, target, **self.options, reduction=reduction)


@dataclass(frozen=True)
class Exempt:
    """A public loss of another form than ``loss(input, target)``, and why; its room tests it by itself."""

    loss: Callable[..., Tensor]
    why: str


@dataclass(frozen=True)
class Memory:
    """A loss with a memory: ``make(**options)`` is the module, ``step(module, k, logits)`` its loss in step k.

    ``logits()`` is an input for any step.
    """

    make: Callable[..., nn.Module]
    step: Callable[[nn.Module, int, Tensor], Tensor]
    logits: Callable[[], Tensor]
    name: str = ""

    def __str__(self) -> str:
        return self.name or getattr(self.make, "__name__", "")

    def run(self, module: nn.Module, steps: range) -> list[Tensor]:
        return [self.step(module, k, self.draw(k)).detach() for k in steps]

    def draw(self, k: int) -> Tensor:
        torch.manual_seed(k)
        return self.logits()


def equals_the_formula(example: Example) -> None:
    input, target = example.data()
    expected = torch.tensor(example.oracle(input, target, **example.options), dtype=torch.float64)
    torch.testing.assert_close(example.call(input, target, "none"), expected, **CLOSE)


def reduces_consistently(example: Example) -> None:
    input, target = example.data()
    losses = example.call(input, target, "none")
    assert losses.shape == input.shape[:1]
    for reduction, reduced in example.reductions.items():
        torch.testing.assert_close(example.call(input, target, reduction), reduced(losses), **CLOSE)
    assert torch.equal(example.loss(input, target, **example.options), example.call(input, target, "mean"))
    with pytest.raises(ValueError, match="reduction = 'average' is out of range"):
        example.call(input, target, "average")


def has_the_right_gradients(example: Example) -> None:
    input, target = example.data()
    for reduction in ("none", "mean"):
        torch.autograd.gradcheck(lambda x, r=reduction: example.call(x, target, r), input.requires_grad_())


def leaves_its_arguments_alone(example: Example) -> None:
    arguments = example.data()
    before = [tensor.clone() for tensor in arguments]
    example.call(arguments[0].requires_grad_(), arguments[1]).backward()
    for tensor, copy in zip(arguments, before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)


def survives_extreme_inputs(example: Example) -> None:
    if not example.extremes:
        pytest.skip("its input is bounded")
    for scale in (1e4, -1e4):
        for dtype in (torch.float32, torch.float64):
            input, target = example.data(dtype)
            for extreme in (scale * input.sign(), torch.full_like(input, scale)):
                loss = example.call(extreme.requires_grad_(), target)
                assert loss.isfinite() and torch.autograd.grad(loss, extreme)[0].isfinite().all()


def keeps_dtype(example: Example) -> None:
    exact = example.call(*example.data(torch.float64), "none")
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        input, target = example.data(dtype)
        losses = example.call(input.requires_grad_(), target, "none")
        example.call(input, target).backward()
        assert losses.dtype == input.grad.dtype == dtype and input.grad.isfinite().all()
        torch.testing.assert_close(losses.double(), exact, rtol=close, atol=close)


def does_not_depend_on_the_order(example: Example) -> None:
    input, target = example.data()
    order = torch.randperm(len(input))
    losses = example.call(input, target, "none")
    if example.by_example:
        torch.testing.assert_close(example.call(input[order], target[order], "none"), losses[order], **CLOSE)
        torch.testing.assert_close(example.call(input[:2], target[:2], "none"), losses[:2], **CLOSE)
    torch.testing.assert_close(example.call(input[order], target[order]), example.call(input, target), **CLOSE)


def ignores_what_is_marked(example: Example) -> None:
    if example.ignored is None:
        pytest.skip("offers no ignore_index or mask")
    input, target = example.data()
    marked, rest = example.ignored(target), example.call(input[1:], target[1:])
    changed = input.clone()
    changed[0] = torch.randn_like(changed[0])
    for x in (input, changed):
        torch.testing.assert_close(example.call(x.requires_grad_(), marked), rest, **CLOSE)
        assert not torch.autograd.grad(example.call(x, marked), x)[0][0].any()
        assert example.call(x, marked, "none")[0] == 0


def names_what_does_not_fit(example: Example) -> None:
    input, target = example.data()
    with pytest.raises(ValueError, match=r"shape = .* is out of range"):
        example.call(input, target[:-1])
    with pytest.raises(TypeError, match="no_such_argument"):
        example.loss(input, target, no_such_argument=1)


def compiles(example: Example) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(example.call, backend="aot_eager", fullgraph=True)
    outcomes = []
    for call in (example.call, compiled):
        input, target = example.data()
        loss = call(input.requires_grad_(), target)
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, input)])
    torch.testing.assert_close(*outcomes, **CLOSE)


CHECKS = (
    equals_the_formula,
    reduces_consistently,
    has_the_right_gradients,
    leaves_its_arguments_alone,
    survives_extreme_inputs,
    keeps_dtype,
    does_not_depend_on_the_order,
    ignores_what_is_marked,
    names_what_does_not_fit,
    compiles,
)


def resumes_exactly(memory: Memory) -> None:
    module, fresh, file = memory.make(), memory.make(), io.BytesIO()
    memory.run(module, range(4))
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    ones, others = (memory.run(m, range(4, 8)) for m in (module, fresh))
    torch.testing.assert_close(ones, others, rtol=0, atol=0)


def remembers_numbers_not_graphs(memory: Memory) -> None:
    module = memory.make()
    logits = memory.draw(0).requires_grad_()
    memory.step(module, 0, logits).backward()
    again = memory.draw(0).requires_grad_()
    memory.step(module, 0, again).backward()  # a graph kept from the first step would be gone by now
    assert again.grad is not None and not any(buffer.requires_grad for buffer in module.buffers())


def learns_nothing_in_evaluation(memory: Memory) -> None:
    module = memory.make()
    memory.run(module, range(4))
    before = {name: value.clone() for name, value in module.named_buffers()}
    memory.run(module.eval(), range(4, 8))
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


def refuses_unknown_options(memory: Memory) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        memory.make(no_such_argument=1)


MEMORY_CHECKS = (
    resumes_exactly,
    remembers_numbers_not_graphs,
    learns_nothing_in_evaluation,
    refuses_unknown_options,
)
