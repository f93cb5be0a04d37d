"""Linear recurrences along time: :func:`linear_scan`, and the selective scan of Mamba, :func:`selective_scan`.

Both run as operators of their own (``assay::linear_scan``, ``assay::selective_scan``), opaque to ``torch.compile`` and
``torch.export``; a native kernel registers itself for its device on them, and nothing else changes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay._operators import opaque

BACKENDS = ("auto", "sequential")
# Below this many elements a step costs more to start than to compute, and steps of several chunks go together.
SMALL_STEP = {"cpu": 2**11}
SMALL_STEP_ELSEWHERE = 2**20
# Numbers of state per example that a selective scan holds at once, for all the steps of a block.
BLOCK = {"cpu": 2**16}
BLOCK_ELSEWHERE = 2**24


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial: Tensor | None = None,
    reverse: bool = False,
    dim: int = 1,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """All states of an elementwise linear recurrence, in linear memory and with gradients of every order::

        h_t = a_t * h_{t-1} + b_t,   h_0 = initial        (reverse: h_t = a_t * h_{t+1} + b_t)

    Large steps are taken one after the other. Small ones are cut into chunks of ``chunk_size`` that advance side by
    side, each from 0 and with the running product of its a, and are then joined by the states between them: about
    ``chunk_size + L / chunk_size`` operations for L steps. Nothing is divided, so nothing overflows.

    Args:
        a, b: real or complex, of shapes that broadcast to one another; float16 and bfloat16 are computed in float32.
        initial: shape of one step of the result, without ``dim``; None means 0.
        reverse: run from the last step to the first.
        dim: the axis of time.
        chunk_size: >= 1, or None to choose.
        backend: "auto", or "sequential" for a plain loop under autograd, the oracle of the tests.

    Returns:
        Tensor of the broadcast shape.

    Raises:
        ValueError: an argument out of range.

    Source: G. E. Blelloch, Prefix Sums and Their Applications, 1990.

    >>> import torch
    >>> from assay.nn.functional import linear_scan
    >>> linear_scan(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 1.0, 3.0]]))
    tensor([[1.0000, 1.5000, 3.0000]])
    """
    _check(chunk_size, backend)
    dtype = torch.promote_types(a.dtype, b.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    a, b = (x.to(exact).movedim(dim, 0) for x in torch.broadcast_tensors(a, b))
    in_range("dim", dim, b.shape[0] > 0, "an axis of at least one step")
    start = b.new_zeros(b.shape[1:]) if initial is None else initial.to(exact).expand(b.shape[1:])
    states = _linear(a, b, start, chunk_size, reverse, backend)
    return states.movedim(0, dim).to(dtype)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space model whose step size, input and output weights depend on the input (S6), per channel d::

        delta' = softplus(delta + delta_bias)    if delta_softplus, else delta + delta_bias
        h_t    = exp(delta'_t A_d) * h_{t-1} + delta'_t u_t B_t,   h_0 = initial_state       (N numbers)
        y_t    = C_t . h_t + D_d u_t,   times silu(z_t) if z is given

    The arguments are those of ``mamba_ssm``'s ``selective_scan_fn``. States are held for ``chunk_size`` steps at a time
    and recomputed in the backward pass from those between the chunks, so no tensor of batch * L * channels * N is ever
    made. Everything is computed in float32 (float64 in float64) and returned as ``u`` came.

    Args:
        u, delta, z: shape (batch, channels, L), with L >= 1.
        A: shape (channels, N), below 0 for a state that decays.
        B, C: shape (channels, N) for constant weights, (batch, N, L), or (batch, G, N, L) for G groups of
            neighbouring channels.
        D, delta_bias: shape (channels,).
        initial_state: shape (batch, channels, N); None means 0.
        return_last_state: return (y, h_L), h_L in the precision of the states.
        chunk_size: >= 1, or None to choose.
        backend: "auto", or "sequential" for a plain loop under autograd over states that are all kept.

    Raises:
        ValueError: an argument out of range.

    Source: A. Gu, T. Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv 2312.00752.

    >>> import torch
    >>> from assay.nn.functional import selective_scan
    >>> u, delta, weights = torch.ones(1, 1, 3), torch.full((1, 1, 3), 0.5), torch.ones(1, 1, 3)
    >>> selective_scan(u, delta, torch.zeros(1, 1), weights, weights)  # with A = 0 a sum of delta * u
    tensor([[[0.5000, 1.0000, 1.5000]]])
    """
    _check(chunk_size, backend)
    in_range("u", tuple(u.shape), u.dim() == 3 and u.shape[2] > 0, "shape (batch, channels, L), L >= 1")
    batch, channels, length = u.shape
    exact = torch.promote_types(u.dtype, torch.float32)
    inputs, step = u.to(exact), delta.to(exact)
    if delta_bias is not None:
        step = step + delta_bias.to(exact)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    state = u.new_zeros(batch, channels, A.shape[1], dtype=exact) if initial_state is None else initial_state.to(exact)
    weights = [_by_time("B", B.to(exact), batch, channels, length), _by_time("C", C.to(exact), batch, channels, length)]
    arguments = (inputs.permute(2, 0, 1), step.permute(2, 0, 1), A.to(exact), *weights, state)
    if backend == "auto":
        y, last, _ = _selective_scan(*arguments, chunk_size or _block(arguments[2], u.device))
    else:
        y, last = _composed(*arguments, backend=backend)
    y = y.permute(1, 2, 0)
    if D is not None:
        y = torch.addcmul(y, D.to(exact)[:, None], inputs)
    if z is not None:
        y = y * F.silu(z.to(exact))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _check(chunk_size: int | None, backend: str) -> None:
    in_range("chunk_size", chunk_size, chunk_size is None or chunk_size >= 1, "an integer >= 1, or None")
    in_range("backend", backend, backend in BACKENDS, " or ".join(map(repr, BACKENDS)))


def _by_time(name: str, weights: Tensor, batch: int, channels: int, length: int) -> Tensor:
    """B or C as (L, batch, G, N)."""
    if weights.dim() == 2:
        return weights.expand(length, batch, *weights.shape)
    if weights.dim() == 3:
        weights = weights[:, None]
    good = weights.dim() == 4 and channels % weights.shape[1] == 0
    in_range(name, tuple(weights.shape), good, "shape (channels, N), (batch, N, L) or (batch, G, N, L), G | channels")
    return weights.permute(3, 0, 1, 2)


# --- h_t = a_t h_{t-1} + b_t, time first ------------------------------------------------------------------------------


def _linear(a: Tensor, b: Tensor, start: Tensor, chunk: int | None, reverse: bool, backend: str) -> Tensor:
    if backend == "auto":
        return _linear_scan(a, b, start, chunk or 0, reverse)
    pairs = list(zip(a.unbind(0), b.unbind(0), strict=True))
    states, state = [], start
    for a_t, b_t in reversed(pairs) if reverse else pairs:
        state = a_t * state + b_t
        states.append(state)
    return torch.stack(states[::-1] if reverse else states)


@opaque("linear_scan")
def _linear_scan(a: Tensor, b: Tensor, start: Tensor, chunk: int, reverse: bool) -> Tensor:
    states = b.clone(memory_format=torch.contiguous_format)
    _advance(a, states, start, chunk, reverse)
    return states


@_linear_scan.register_fake
def _(a: Tensor, b: Tensor, start: Tensor, chunk: int, reverse: bool) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, start, ctx.chunk, ctx.reverse = inputs
    ctx.save_for_backward(a, start, output)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same recurrence the other way: g_t = grad_t + a_{t+1} g_{t+1} is the gradient of b_t."""
    a, start, states = ctx.saved_tensors
    a, edge = a.conj(), torch.zeros_like(a[:1])
    if ctx.reverse:
        shifted, before, first = torch.cat([edge, a[:-1]]), torch.cat([states[1:], start[None]]), -1
    else:
        shifted, before, first = torch.cat([a[1:], edge]), torch.cat([start[None], states[:-1]]), 0
    g = _linear_scan(shifted, grad, torch.zeros_like(start), ctx.chunk, not ctx.reverse)
    return g * before.conj(), g, a[first] * g[first], None, None


_linear_scan.register_autograd(_linear_backward, setup_context=_linear_context)


def _advance(a: Tensor, b: Tensor, start: Tensor, chunk: int = 0, reverse: bool = False) -> None:
    """Overwrite ``b``, contiguous, by the states."""
    steps = len(b)
    if chunk == 0:
        small = math.prod(b.shape[1:]) <= SMALL_STEP.get(b.device.type, SMALL_STEP_ELSEWHERE)
        chunk = round(math.sqrt(steps)) if small else 1
    together = steps // chunk * chunk if 1 < chunk < steps else 0
    if together:
        part = slice(steps - together, steps) if reverse else slice(together)
        start = _advance_together(a[part], b[part], start, chunk, reverse)
        a, b = (a[:-together], b[:-together]) if reverse else (a[together:], b[together:])
    all_a, all_b = a.unbind(0), b.unbind(0)
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        start = all_b[t].addcmul_(all_a[t], start)


def _advance_together(a: Tensor, b: Tensor, start: Tensor, chunk: int, reverse: bool) -> Tensor:
    """All chunks side by side; returns the last state."""
    shape = (len(b) // chunk, chunk, *b.shape[1:])
    states, product = b.view(shape), a.reshape(shape).clone(memory_format=torch.contiguous_format)
    in_states, in_product = states.unbind(1), product.unbind(1)
    order = range(chunk)[::-1] if reverse else range(chunk)
    for before, now in itertools.pairwise(order):
        in_states[now].addcmul_(in_product[now], in_states[before])
        in_product[now].mul_(in_product[before])
    begins = torch.empty_like(in_states[0])
    ends, factors, entries = in_states[order[-1]].unbind(0), in_product[order[-1]].unbind(0), begins.unbind(0)
    for k in reversed(range(shape[0])) if reverse else range(shape[0]):
        entries[k].copy_(start)
        start = torch.addcmul(ends[k], factors[k], start)
    states.addcmul_(product, begins[:, None])
    return start


# --- The selective scan, time first: u, delta (L, batch, D), A (D, N), B, C (L, batch, G, N), state (batch, D, N) -----

_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _composed(*arguments: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The formula written down, all states kept: for second derivatives, and as oracle."""
    u, delta, A, B, C, state = arguments
    with torch.autocast(u.device.type, enabled=False):
        inputs = _each(delta * u, B.shape[2])[..., None] * B[:, :, :, None, :]
        decay = torch.exp(delta[..., None] * A)
        states = _linear(decay, inputs.flatten(2, 3), state, None, False, backend)
        y = (states.unflatten(2, (B.shape[2], -1)) * C[:, :, :, None, :]).sum(-1).flatten(2)
    return y, states[-1]


def _each(x: Tensor, groups: int) -> Tensor:
    """(L, batch, D) as (L, batch, G, D / G)."""
    return x.unflatten(2, (groups, x.shape[2] // groups))


def _block(A: Tensor, device: torch.device) -> int:
    """Steps whose states are held at once: a number that does not depend on the batch, for exported programs."""
    return max(16, BLOCK.get(device.type, BLOCK_ELSEWHERE) // max(1, A.numel()))


def _spans(steps: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, steps)) for i in range(0, steps, chunk)]


def _states(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decay factors and states of one block; ``inputs`` is delta * u."""
    decay = (delta[..., None] * A).exp_()
    states = (_each(inputs, B.shape[2])[..., None] * B[:, :, :, None, :]).view(decay.shape)
    _advance(decay, states, state)
    return decay, states


@opaque("selective_scan")
def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state, and the states at the beginning of the blocks."""
    u, delta, B, C = (x.contiguous() for x in (u, delta, B, C))
    blocks = _spans(len(u), chunk)
    y, begins = torch.empty_like(u), state.new_empty(len(blocks), *state.shape)
    with torch.autocast(u.device.type, enabled=False):
        for i, block in enumerate(blocks):
            begins[i] = state
            _, states = _states(delta[block], delta[block] * u[block], A, B[block], state)
            grouped = states.unflatten(2, (B.shape[2], -1))
            y[block] = (grouped @ C[block][..., None]).view(states.shape[:3])
            state = states[-1]
    return y, state.clone(), begins


@_selective_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-u.shape[0] // chunk)
    return u.new_empty(u.shape), state.new_empty(state.shape), state.new_empty(blocks, *state.shape)


@opaque("selective_scan_backward")
def _selective_scan_backward(
    grad: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    begins: Tensor,
    chunk: int,
) -> _Six:
    """Block by block from the last: the states again, then their gradients backwards in time."""
    grad, u, delta, B, C = (x.contiguous() for x in (grad, u, delta, B, C))
    grad_u, grad_delta, grad_A, grad_B, grad_C = (torch.empty_like(x) for x in (u, delta, A, B, C))
    grad_A.zero_()
    carried, groups = grad_state.clone(), B.shape[2]
    with torch.autocast(u.device.type, enabled=False):
        for i, block in reversed(list(enumerate(_spans(len(u), chunk)))):
            inputs = delta[block] * u[block]
            decay, states = _states(delta[block], inputs, A, B[block], begins[i])
            weights, per_y = B[block], _each(grad[block], groups)
            g = (per_y[..., None] * C[block][:, :, :, None, :]).view(decay.shape)
            grad_C[block] = (per_y[..., None, :] @ states.unflatten(2, (groups, -1))).squeeze(-2)
            g[-1] += carried
            _advance(decay[1:], g[:-1], g[-1], reverse=True)
            carried = decay[0] * g[0]
            grouped = g.unflatten(2, (groups, -1))
            grad_B[block] = (_each(inputs, groups)[..., None, :] @ grouped).squeeze(-2)
            per_input = (grouped @ weights[..., None]).view(inputs.shape)
            # What is left of g is the gradient of delta * A.
            decay.mul_(g)
            decay[0].mul_(begins[i])
            decay[1:].mul_(states[:-1])
            grad_u[block] = per_input * delta[block]
            grad_delta[block] = torch.mul(decay, A, out=g).sum(-1).addcmul_(per_input, u[block])
            grad_A += decay.mul_(delta[block][..., None]).sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, carried


@_selective_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    begins: Tensor,
    chunk: int,
) -> _Six:
    like = [x.new_empty(x.shape) for x in (u, delta, A, B, C, grad_state)]
    return like[0], like[1], like[2], like[3], like[4], like[5]


def _selective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _selective_backward(ctx: Any, grad: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, begins = ctx.saved_tensors
    if not torch.is_grad_enabled():
        u, delta, A, B, C, _ = tensors
        return (*_selective_scan_backward(grad, grad_state, u, delta, A, B, C, begins, ctx.chunk), None)
    # A second derivative is asked for. As views, the arguments do not lead to one another.
    tensors = [x.view_as(x) for x in tensors]
    wanted = [x for x in tensors if x.requires_grad]
    grads = torch.autograd.grad(_composed(*tensors), wanted, [grad, grad_state], create_graph=True)
    found = iter(grads)
    return (*(next(found) if x.requires_grad else None for x in tensors), None)


_selective_scan.register_autograd(_selective_backward, setup_context=_selective_context)
