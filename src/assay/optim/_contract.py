"""What every optimizer of the family satisfies, on one page.

``test_contract.py`` finds the optimizers through the cards and runs :data:`CHECKS` over all of them. A new optimizer
writes nothing for it; one whose constructor needs more than parameters puts ``EXAMPLE = {"Name": {option: value}}``
into its test file.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.optim import _rule

Make = Callable[..., torch.optim.Optimizer]
SHAPES = [(7, 5), (7,), (), (4, 3, 2, 2), (0, 3), (2, _rule.SMALL), (_rule.PIECE + 5,)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    """Parameters of all kinds: matrices, vectors, a scalar, kernels in both layouts, an empty one, large ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    tensors.append(torch.randn(6, 4, 8, 8, generator=generator, dtype=dtype).to(memory_format=torch.channels_last))
    return [nn.Parameter(tensor) for tensor in tensors]


def gradients(params: list[nn.Parameter], steps: int, seed: int = 1) -> Iterator[int]:
    """Give every parameter a new gradient, ``steps`` times; yields the number of the step from 0."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        yield step


def walk(make: Make, params: list[nn.Parameter], steps: int = 4, **options: Any) -> list[nn.Parameter]:
    optimizer = make(params, **options)
    for _ in gradients(params, steps):
        optimizer.step()
    return params


def same(ones: list[nn.Parameter], others: list[nn.Parameter], **close: float) -> None:
    torch.testing.assert_close([p.detach() for p in ones], [p.detach() for p in others], **(close or EXACT))


EXACT = {"rtol": 0.0, "atol": 0.0}


class Twice(torch.optim.SGD):
    """Asks for the loss of a step twice, as some optimizers do: what an objective remembers must not notice."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


def knows(make: Make, option: str) -> None:
    """Skip a check of an option that this optimizer does not have."""
    if option not in inspect.signature(make).parameters:
        pytest.skip(f"no option {option!r}")


def lists_equal_the_loop_bitwise(make: Make) -> None:
    knows(make, "foreach")
    loop = walk(make, parameters(), foreach=False)
    same(walk(make, parameters()), loop)
    same(walk(make, parameters(), foreach=True), loop)


def compiled_is_close_and_a_new_rate_compiles_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    knows(make, "compile")
    # Another backend than the default: what is tested is the graph, and C++ would cost a minute an optimizer.
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    _rule._compiled.cache_clear()
    torch._dynamo.reset()
    params, loop = parameters(), parameters()
    optimizer, reference = make(params, compile=True), make(loop, foreach=False)
    graphs = []
    for step, _ in zip(gradients(params, 4), gradients(loop, 4), strict=True):
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 0.01 / (step + 1)
            one.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    same(params, loop, rtol=1e-12, atol=1e-12)
    assert graphs[1] == graphs[-1] > 0, f"graphs after each step: {graphs}"
    _rule._compiled.cache_clear()


def resuming_from_a_state_dict_is_bit_exact(make: Make) -> None:
    whole = walk(make, parameters(), steps=6)
    params = parameters()
    optimizer = make(params)
    for step in gradients(params, 6):
        if step == 3:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = make(params)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
        optimizer.step()
    same(params, whole)


def copies_go_on_alike(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    for _ in gradients(params, 2):
        optimizer.step()
    others = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    for p, o in [(params, optimizer), *others]:
        for _ in gradients(p, 2, seed=2):
            o.step()
    for p, _ in others:
        same(p, params)


def gradients_are_not_written(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    for _ in gradients(params, 2):
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def without_a_gradient_nothing_moves(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    for _ in gradients(params, 1):
        params[0].grad = None
        before = params[0].detach().clone()
        optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()


def groups_keep_their_own_options(make: Make) -> None:
    first, second = parameters(seed=3), parameters(seed=4)
    together = make([{"params": first, "lr": 0.0}])
    together.add_param_group({"params": second, "lr": 1e-3})
    before = [p.detach().clone() for p in first]
    for _ in gradients(first + second, 3):
        together.step()
    assert all(torch.equal(p, q) for p, q in zip(first, before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(second, parameters(seed=4), strict=True) if p.numel())


def rates_may_be_tensors_and_schedulers_drive_them(make: Make) -> None:
    same(walk(make, parameters(), lr=torch.tensor(0.01)), walk(make, parameters(), lr=0.01), rtol=1e-6, atol=1e-7)
    params = parameters()
    optimizer = make(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    for step in gradients(params, 2):
        before = [p.detach().clone() for p in params]
        optimizer.step()
        scheduler.step()
        moved = any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert moved == (step == 0)


def ascent_is_descent_on_the_negative(make: Make) -> None:
    knows(make, "maximize")
    up, down = parameters(), parameters()
    ascending, descending = make(up, maximize=True), make(down)
    for _ in gradients(up, 3):
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        ascending.step()
        descending.step()
    same(up, down)


def a_closure_is_called_with_gradients_on(make: Make) -> None:
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 13.0
    assert p.grad is not None


def bfloat16_stays_finite_and_bfloat16(make: Make) -> None:
    # bfloat16 only: in float16 the usual eps of 1e-8 is zero, for torch's optimizers as well.
    params = walk(make, parameters(torch.bfloat16), steps=3)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in params)


def bad_input_is_refused_by_name(make: Make) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="speed"):
        make([p], speed=1)
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"lr = .* out of range"):
            make([p], lr=value)
    with pytest.raises(ValueError, match=r"lr = -1 .* out of range"):
        make([p]).add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1})
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        make([p]).step()


def parameters_may_come_from_a_generator(make: Make) -> None:
    model = nn.Linear(3, 2)
    make(model.parameters())
    make(model.named_parameters())


CHECKS = [
    lists_equal_the_loop_bitwise,
    compiled_is_close_and_a_new_rate_compiles_nothing,
    resuming_from_a_state_dict_is_bit_exact,
    copies_go_on_alike,
    gradients_are_not_written,
    without_a_gradient_nothing_moves,
    groups_keep_their_own_options,
    rates_may_be_tensors_and_schedulers_drive_them,
    ascent_is_descent_on_the_negative,
    a_closure_is_called_with_gradients_on,
    bfloat16_stays_finite_and_bfloat16,
    bad_input_is_refused_by_name,
    parameters_may_come_from_a_generator,
]
