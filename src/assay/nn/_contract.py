"""What every layer of the family satisfies, on one page.

A room puts its small layers into the list ``EXAMPLES`` of its test file; ``test_contract.py`` runs :data:`CHECKS`
over all of them and refuses a public layer that is in no list. That list is all that a new layer writes for it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from assay.nn._swap import swap

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Example:
    """A layer class with its arguments and an input: ``Example(partial(Layer, 6, num_groups=3), (4, 6, 3, 4))``.

    ``shape`` has the examples first; override :meth:`input` for other than random numbers. ``replaces`` is a torch
    layer that ``swap`` can exchange for this one, given the keywords of ``make``. ``forward(layer, x)``, a function of
    the test file, makes one tensor of the input into one of output where the layer takes or returns more than that.

    The flags are for layers that by design break a rule: ``gradient`` and ``second_gradient`` whose backward pass is
    not the derivative of the forward pass, or cannot be differentiated again; ``stateless`` without tensors, so that
    they take neither device nor dtype; ``apart`` whose output for an example depends on the batch in evaluation too;
    ``graph`` which cannot be traced as one graph. ``bfloat16`` is the error allowed under autocast.
    """

    make: partial[nn.Module]
    shape: tuple[int, ...]
    replaces: nn.Module | None = None
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    gradient: bool = True
    second_gradient: bool = True
    stateless: bool = False
    apart: bool = True
    graph: bool = True
    bfloat16: float = 0.03

    def __str__(self) -> str:
        arguments = [*map(str, self.make.args), *(f"{name}={value}" for name, value in self.make.keywords.items())]
        return f"{getattr(self.make.func, '__name__', '')}({', '.join(arguments)})"

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return 2 * torch.randn(self.shape, dtype=dtype) + 0.5

    def build(self, **factory: Any) -> nn.Module:
        return self.wrap(self.make() if self.stateless else self.make(**factory))

    def wrap(self, layer: nn.Module) -> nn.Module:
        return layer if self.forward is None else Called(layer, self.forward)

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A layer that has seen a batch, its parameters no longer at their special first values."""
        torch.manual_seed(0)
        layer = self.build(dtype=dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            layer(self.input(dtype))
        return layer


class Called(nn.Module):
    """A layer that is called through a function of the layer and its input."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def step(layer: Callable[..., Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Output of a forward pass, and the gradients of a loss on it with respect to the input and the parameters."""
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum() + output.sin().sum(), [x, *parameters])]


def same_layers(one: nn.Module, other: nn.Module, x: Tensor, **close: float) -> None:
    """Equal output and gradients in training and evaluation, and equal state afterwards."""
    for training in (True, False):
        one.train(training)
        other.train(training)
        steps = (step(layer, x, list(layer.parameters())) for layer in (one, other))
        torch.testing.assert_close(*steps, **close)
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **close)


def keeps_dtype_and_device(example: Example) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = example.layer(dtype)
        tensors = [*layer.parameters(), *layer.buffers(), layer(example.input(dtype))]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
        assert all(tensor.isfinite().all() for tensor in tensors)
    meta = example.build(device="meta")
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])


def refuses_unknown_arguments(example: Example) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        example.make(no_such_argument=1)


def evaluates_each_example_by_itself(example: Example) -> None:
    layer, x = example.layer().eval(), example.input()
    before, untouched = copy.deepcopy(layer.state_dict()), x.clone()
    whole = layer(x)
    torch.testing.assert_close(layer(x), whole, rtol=0, atol=0)
    if example.apart:
        torch.testing.assert_close(torch.cat([layer(x[i : i + 1]) for i in range(len(x))]), whole, **CLOSE)
    assert layer(x[:0]).shape == (0, *whole.shape[1:])
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(x, untouched, rtol=0, atol=0)


def trains_on_no_example(example: Example) -> None:
    layer = example.layer()
    layer(example.input()[:0].requires_grad_()).sum().backward()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


def modes(example: Example) -> list[bool]:
    """Training and evaluation; training alone where they compute the same."""
    layer, x = example.layer(), example.input()
    same = torch.equal(copy.deepcopy(layer).train()(x), copy.deepcopy(layer).eval()(x))
    return [True] if same else [True, False]


def has_the_right_gradients(example: Example) -> None:
    for training in modes(example) if example.gradient else ():
        layer = example.layer().train(training)
        names = [name for name, _ in layer.named_parameters()]

        def call(x: Tensor, *values: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            # A copy for each call: the state that one call leaves must not change the next.
            return functional_call(copy.deepcopy(layer), dict(zip(names, values, strict=True)), (x,))

        inputs = (example.input().requires_grad_(), *(p.detach().requires_grad_() for p in layer.parameters()))
        torch.autograd.gradcheck(call, inputs)
        if example.second_gradient:
            # Fast: along random directions, not entry by entry.
            torch.autograd.gradgradcheck(call, inputs, atol=1e-4, fast_mode=True)


def survives_saving_and_copying(example: Example) -> None:
    layer, fresh, file = example.layer(), example.build(dtype=torch.float64), io.BytesIO()
    fresh.load_state_dict(layer.state_dict())
    torch.save(layer, file)
    file.seek(0)
    for other in (fresh, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        same_layers(copy.deepcopy(layer), other, example.input(), rtol=0, atol=0)


def compiles_to_one_graph(example: Example) -> None:
    if not example.graph:
        pytest.skip("cannot be traced as one graph")
    torch._dynamo.reset()
    layer = example.layer()
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    for _ in range(2):
        same_layers(layer, compiled, example.input(), **CLOSE)


def exports(example: Example) -> None:
    if not example.graph:
        pytest.skip("cannot be traced as one graph")
    layer, x = example.layer().eval(), example.input()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x[:-1]), layer(x[:-1]), **CLOSE)


def runs_under_autocast(example: Example) -> None:
    layer, x = example.layer(torch.float32), example.input(torch.float32).requires_grad_()
    for training in (True, False):
        exact = copy.deepcopy(layer).train(training)(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer.train(training)(x.bfloat16())
        output.float().square().sum().backward()
        torch.testing.assert_close(output.float(), exact, rtol=example.bfloat16, atol=example.bfloat16)
        tensors = [*layer.buffers(), *(p.grad for p in layer.parameters() if p.grad is not None)]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32}


def swaps_into_a_model(example: Example) -> None:
    if example.replaces is None:
        pytest.skip("stands for no torch layer")
    model = nn.Sequential(example.wrap(copy.deepcopy(example.replaces)), nn.Tanh()).double()
    shape, x = model(example.input()).shape, example.input()
    swap(model, type(example.replaces), example.make.func, **example.make.keywords)
    assert type(model[0] if example.forward is None else model[0].layer) is type(example.make())
    before = model(x)
    assert before.shape == shape
    optimizer = torch.optim.SGD([*model.parameters(), x.requires_grad_()], lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


CHECKS = (
    keeps_dtype_and_device,
    refuses_unknown_arguments,
    evaluates_each_example_by_itself,
    trains_on_no_example,
    has_the_right_gradients,
    survives_saving_and_copying,
    compiles_to_one_graph,
    exports,
    runs_under_autocast,
    swaps_into_a_model,
)
