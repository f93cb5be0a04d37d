"""Slow networks: kernels as functions of their coordinates, and of the features' mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range


class _Magnet(nn.Module):
    """A multiplicative filter network over a grid: what both slow networks are."""

    filters: Any
    linears: Any

    def __init__(
        self,
        size: tuple[int, ...],
        out_channels: int,
        hidden: int,
        num_layers: int,
        omega_0: float,
        alpha: float,
        beta: float,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        for name, number in (("out_channels", out_channels), ("hidden", hidden), ("num_layers", num_layers)):
            in_range(name, number, isinstance(number, int) and number >= 1, "an integer >= 1")
        in_range("size", size, min(size) >= 1, ">= 1")
        for name, value in (("omega_0", omega_0), ("alpha", alpha), ("beta", beta)):
            in_range(name, value, value > 0, "> 0")
        self.size, self.out_channels, self.hidden, self.num_layers = size, out_channels, hidden, num_layers
        self.omega_0, self.alpha, self.beta = omega_0, alpha, beta
        self.filters = nn.ModuleList(nn.Linear(len(size), hidden, **factory) for _ in range(num_layers + 1))
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden, **factory) for _ in range(num_layers))
        self.output = nn.Linear(hidden, out_channels, **factory)
        self.bias_p = nn.Parameter(torch.empty(1, 1, *size, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for layer, part in enumerate(self.filters):
            part.reset_parameters()
            gamma = torch.distributions.Gamma(self.alpha / (layer + 1), self.beta).sample(part.weight.shape)
            part.weight.mul_(2 * math.pi * self.omega_0 * gamma.to(part.weight))
            nn.init.zeros_(part.bias)
        for part in self.linears:
            nn.init.kaiming_uniform_(part.weight, nonlinearity="linear")
            nn.init.ones_(part.bias)
        nn.init.kaiming_uniform_(self.output.weight, nonlinearity="linear")
        self.output.weight.mul_(math.prod(self.size) ** -0.5)
        nn.init.zeros_(self.output.bias)
        nn.init.zeros_(self.bias_p)

    def _kernel(self, between: Callable[[int, Tensor], Tensor]) -> Tensor:
        """(1, out_channels, *size); ``between(i, h)`` is what becomes of the positions' features after layer i."""
        like = self.bias_p
        axes = [torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype) for size in self.size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (positions, dimensions)
        waves = [torch.sin(part(grid)) for part in self.filters]
        h = waves[0]
        for i, linear in enumerate(self.linears):
            h = between(i, waves[i + 1] * linear(h) + like.view(-1, 1))
        return self.output(h).T.reshape(1, self.out_channels, *self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}, out_channels={self.out_channels}, hidden={self.hidden}, num_layers={self.num_layers}"


class SlowNet(_Magnet):
    """A hyper-kernel: one value for each channel and place, as a smooth function of the place.

    c runs over a grid of ``size`` places in [-1, 1]^data_dim, and with learned W_i, L_i, p (one number per place)::

        h_0 = sin(W_0 c + b_0)
        h_i = sin(W_i c + b_i) * (L_i h_(i-1)) + p                  i = 1 ... num_layers
        kernel = L h_(num_layers)

    W_i starts as a linear layer's weights times 2 pi omega_0 gamma, each gamma drawn from Gamma(alpha / (i + 1), beta),
    b_i and p at 0, L scaled by 1 / sqrt(number of places).

    Args:
        data_dim: number of dimensions, >= 1.
        size: places along each of them, a number or a tuple.
        out_channels: channels of the kernel.
        hidden, num_layers: >= 1.
        omega_0, alpha, beta: > 0.

    Called without input; output (1, out_channels, *size).

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> from assay.nn.hyperzzw import SlowNet
    >>> SlowNet(2, 8, 16)().shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        data_dim: int,
        size: int | tuple[int, ...],
        out_channels: int,
        *,
        hidden: int = 64,
        num_layers: int = 2,
        omega_0: float = 1.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_range("data_dim", data_dim, isinstance(data_dim, int) and data_dim >= 1, "an integer >= 1")
        sizes = (size,) * data_dim if isinstance(size, int) else tuple(size)
        in_range("size", size, len(sizes) == data_dim, f"a number, or data_dim = {data_dim} of them")
        factory = {"device": device, "dtype": dtype}
        super().__init__(sizes, out_channels, hidden, num_layers, omega_0, alpha, beta, factory)
        self.reset_parameters()

    def forward(self) -> Tensor:
        # Waves of many radians: bfloat16 would lose their phases.
        with torch.autocast(self.bias_p.device.type, enabled=False):
            return self._kernel(lambda i, h: h)


class ContextSlowNet(_Magnet):
    """A local hyper-kernel, a function of the place and of the batch's mean feature maps.

    The network of :class:`SlowNet` in two dimensions, of which each layer i goes on with::

        context = GELU(A_2 A_1 mean over the batch of (x pooled to kernel_size x kernel_size))
        h_i     = (alpha_i * stop_gradient(h_i) + beta_i * h_i / ||h_i||) * (C_i context)

    for the norm over the places of a hidden channel; alpha_i and beta_i, learned, start at 1 and 0.1. Evaluation takes
    a running mean in place of the batch's, which becomes ``0.9 * running + 0.1 * batch`` in training. The gradient is
    not the derivative: that is the method.

    Args:
        channels: C of x (B, C, H, W) and of the kernel.
        kernel_size: of the kernel, >= 1.
        hidden, num_layers, omega_0, alpha, beta: as in :class:`SlowNet`.
        batch_stats_eval: take the batch's mean in evaluation too, as the author does.

    Output (C, 1, kernel_size, kernel_size), for a depthwise convolution.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import ContextSlowNet
    >>> ContextSlowNet(16, 5)(torch.randn(4, 16, 8, 8)).shape
    torch.Size([16, 1, 5, 5])
    """

    contexts: Any
    running_context: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        batch_stats_eval: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__((kernel_size, kernel_size), channels, hidden, num_layers, omega_0, alpha, beta, factory)
        self.batch_stats_eval = batch_stats_eval
        self.reduce, self.mix = nn.Linear(channels, hidden, **factory), nn.Linear(hidden, hidden, **factory)
        self.contexts = nn.ModuleList(nn.Linear(hidden, hidden, **factory) for _ in range(num_layers))
        self.alphas = nn.ParameterList(torch.empty(hidden, **factory) for _ in range(num_layers))
        self.betas = nn.ParameterList(torch.empty(hidden, **factory) for _ in range(num_layers))
        self.register_buffer("running_context", torch.empty(channels, kernel_size, kernel_size, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew and forget the running mean."""
        super().reset_parameters()
        self.reduce.reset_parameters()
        self.mix.reset_parameters()
        for part in self.contexts:
            nn.init.kaiming_uniform_(part.weight, nonlinearity="linear")
            nn.init.ones_(part.bias)
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            nn.init.ones_(alpha)
            nn.init.constant_(beta, 0.1)
        nn.init.zeros_(self.running_context)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            pooled = self._context(x.to(self.bias_p.dtype))
            # The mean before the linear layer, which is the same and cheaper.
            context = F.gelu(self.mix(self.reduce(pooled.flatten(1).T)))

            def between(i: int, h: Tensor) -> Tensor:
                h = self.alphas[i] * h.detach() + self.betas[i] * F.normalize(h, dim=0)
                return h * self.contexts[i](context)

            return self._kernel(between).transpose(0, 1)

    def _context(self, x: Tensor) -> Tensor:
        """Mean over the batch of the pooled maps, (C, kernel_size, kernel_size)."""
        if not (self.training or self.batch_stats_eval) or not x.shape[0]:
            return self.running_context
        pooled = F.adaptive_avg_pool2d(x, self.size[0]).mean(0)
        if self.training:
            with torch.no_grad():
                self.running_context.lerp_(pooled, 0.1)
        return pooled
