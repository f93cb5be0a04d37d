"""MambaMixer: selective mixing of tokens and of channels, joined by learned averages of all earlier outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._scan import selective_scan
from assay.nn._ssm import SelectiveSSM, first_step_sizes_


class EarlyFeatureAverage(nn.Module):
    """A learned weighted sum of earlier outputs, one number per output: what MambaMixer has for a residual path::

        x = sum_i weight_token_i * tokens_i + sum_i weight_channel_i * channels_i

    Args:
        n_token, n_channel: how many outputs of token and of channel mixers there are, >= 1.
        init: which weights are 1 at first, the others 0: the "last" of both kinds, or only the "last channel".

    Raises:
        ValueError: an argument out of range; on input, another number of outputs.

    Source: A. Behrouz, M. Santacatterina, R. Zabih, MambaMixer, 2024, arXiv 2403.19888.

    >>> import torch
    >>> from assay.nn import EarlyFeatureAverage
    >>> x = torch.ones(1, 2)
    >>> EarlyFeatureAverage(2, 1)([x, 2 * x], [3 * x]).tolist()  # 2 x + 3 x
    [[5.0, 5.0]]
    """

    def __init__(
        self,
        n_token: int,
        n_channel: int,
        init: str = "last",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("n_token", n_token), ("n_channel", n_channel)):
            in_range(name, value, value >= 1, "an integer >= 1")
        in_range("init", init, init in ("last", "last channel"), "'last' or 'last channel'")
        self.n_token, self.n_channel, self.init = n_token, n_channel, init
        self.weight_token = nn.Parameter(torch.empty(n_token, device=device, dtype=dtype))
        self.weight_channel = nn.Parameter(torch.empty(n_channel, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weights of ``init``."""
        self.weight_token.zero_()
        self.weight_channel.zero_()
        self.weight_channel[-1] = 1
        if self.init == "last":
            self.weight_token[-1] = 1

    def forward(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> Tensor:
        in_range("tokens", len(tokens), len(tokens) == self.n_token, f"n_token = {self.n_token} outputs")
        in_range("channels", len(channels), len(channels) == self.n_channel, f"n_channel = {self.n_channel} outputs")
        outputs = [*tokens, *channels]
        weights = [*self.weight_token.to(outputs[0].dtype), *self.weight_channel.to(outputs[0].dtype)]
        total = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            total = torch.addcmul(total, weight, output)
        return total

    def extra_repr(self) -> str:
        return f"{self.n_token}, {self.n_channel}, init={self.init!r}"


class MambaMixerBlock(nn.Module):
    """Block l = ``index`` of a MambaMixer: a selective token mixer, then a selective channel mixer::

        x_tok^l = sum_{i<l}  alpha_i y_tok^i + sum_{i<l} beta_i  y_ch^i      y_tok^l = token_mixer(norm(x_tok^l))
        x_ch^l  = sum_{i<=l} theta_i y_tok^i + sum_{i<l} gamma_i y_ch^i      y_ch^l  = channel_mixer(norm(x_ch^l))

    The token mixer is a :class:`SelectiveSSM` along the tokens. The channel mixer is one along the channels: it takes
    the transposed (batch, d_model, num_tokens), in which a channel is a step of a sequence and its values at all tokens
    are that step's features. Channels have no order, so it runs both ways. At first the token mixer reads the last
    channel output, and the channel mixer that plus the token mixer's.

    Called with the two sequences of earlier outputs y^0 ... y^{l-1}, of shape (batch, num_tokens, d_model); returns
    (y_tok^l, y_ch^l).

    Args:
        d_model: channels of a token, >= 1.
        num_tokens: length of the sequence, fixed, >= 1.
        index: l >= 1.
        d_state, d_conv, expand: of both mixers, see :class:`SelectiveSSM`.
        token_bidirectional, channel_bidirectional: whether a mixer also runs from the last step to the first.
        norm: makes a layer from ``d_model``.
        drop_path: probability, in [0, 1), that a mixer's output is left out for an example in training.
        residual: add a mixer's input to its output.
        token_mixer: makes the token mixer, where it is to be another.

    Raises:
        ValueError: an argument out of range.

    Source: A. Behrouz, M. Santacatterina, R. Zabih, MambaMixer, 2024, arXiv 2403.19888.

    >>> import torch
    >>> from assay.nn import MambaMixerBlock
    >>> x = torch.randn(2, 6, 8)
    >>> tokens, channels = MambaMixerBlock(8, 6, 1)([x], [x])
    >>> tokens.shape, channels.shape
    (torch.Size([2, 6, 8]), torch.Size([2, 6, 8]))
    """

    def __init__(
        self,
        d_model: int,
        num_tokens: int,
        index: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        token_bidirectional: bool = False,
        channel_bidirectional: bool = True,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        residual: bool = False,
        token_mixer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("num_tokens", num_tokens, num_tokens >= 1, "an integer >= 1")
        in_range("index", index, index >= 1, "an integer >= 1")
        in_range("drop_path", drop_path, 0 <= drop_path < 1, "[0, 1)")
        own = token_mixer is not None
        in_range(
            "token_bidirectional", token_bidirectional, not (own and token_bidirectional), "False with token_mixer"
        )
        self.num_tokens, self.index, self.drop_path, self.residual = num_tokens, index, drop_path, residual
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand, **factory}
        self.token_average = EarlyFeatureAverage(index, index, "last channel", **factory)
        self.token_norm = norm(d_model, **factory)
        if token_mixer is None:
            self.token_mixer: nn.Module = SelectiveSSM(d_model, bidirectional=token_bidirectional, **sizes)
        else:
            self.token_mixer = token_mixer(**factory)
        self.channel_average = EarlyFeatureAverage(index + 1, index, **factory)
        self.channel_norm = norm(d_model, **factory)
        self.channel_mixer: nn.Module = SelectiveSSM(num_tokens, bidirectional=channel_bidirectional, **sizes)

    def forward(self, tokens: Sequence[Tensor], channels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = self.token_average(tokens, channels)
        by_token = self._out(x, self.token_mixer(self.token_norm(x)))
        x = self.channel_average([*tokens, by_token], channels)
        mixed = self.channel_mixer(self.channel_norm(x).transpose(1, 2)).transpose(1, 2)
        return by_token, self._out(x, mixed)

    def _out(self, x: Tensor, mixed: Tensor) -> Tensor:
        if self.training and self.drop_path > 0:
            kept = torch.empty_like(mixed[:, :1, :1]).bernoulli_(1 - self.drop_path)
            mixed = mixed * (kept / (1 - self.drop_path))
        return x + mixed if self.residual else mixed

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, index={self.index}, drop_path={self.drop_path}, residual={self.residual}"


class MambaMixer(nn.Module):
    """A stack of :class:`MambaMixerBlock`, in which every mixer reads a learned average of all outputs before it.

    Shapes (batch, num_tokens, d_model) to the same; the output is that of the last channel mixer.

    Args:
        depth: number of blocks, >= 1.
        d_model, num_tokens, options: of the blocks.

    Raises:
        ValueError: an argument out of range.

    Source: A. Behrouz, M. Santacatterina, R. Zabih, MambaMixer, 2024, arXiv 2403.19888.

    >>> import torch
    >>> from assay.nn import MambaMixer
    >>> MambaMixer(2, 8, 6)(torch.randn(3, 6, 8)).shape
    torch.Size([3, 6, 8])
    """

    def __init__(self, depth: int, d_model: int, num_tokens: int, **options: Any) -> None:
        super().__init__()
        in_range("depth", depth, depth >= 1, "an integer >= 1")
        self.blocks = nn.ModuleList(MambaMixerBlock(d_model, num_tokens, i + 1, **options) for i in range(depth))

    def forward(self, input: Tensor) -> Tensor:
        tokens, channels = [input], [input]
        for block in self.blocks:
            by_token, by_channel = block(tokens, channels)
            tokens.append(by_token)
            channels.append(by_channel)
        return channels[-1]


class TSM2(nn.Module):
    """Forecast several series by mixing time steps from the past on, and variates both ways.

    Each series is brought to mean 0 and variance 1 over its lookback, with a learned scale and shift per variate
    (reversible instance normalization); a :class:`MambaMixer` takes time steps as tokens and variates as channels; a
    linear map takes the lookback of each variate to its horizon, and the normalization is undone.

    Shapes (batch, n_variates, lookback) to (batch, n_variates, horizon); ``static``, of shape (batch, n_static), are
    further channels that do not change in time.

    Args:
        lookback, horizon, n_variates: >= 1.
        depth: number of blocks, >= 1.
        n_static: static covariates, >= 0.
        eps: added to the variance, > 0.
        options: of :class:`MambaMixerBlock`.

    Raises:
        ValueError: an argument out of range, or static covariates that do not fit.

    Source: A. Behrouz, M. Santacatterina, R. Zabih, MambaMixer, 2024, arXiv 2403.19888.

    >>> import torch
    >>> from assay.nn import TSM2
    >>> TSM2(lookback=16, horizon=4, n_variates=3)(torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        depth: int = 2,
        n_static: int = 0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("lookback", lookback), ("horizon", horizon), ("n_variates", n_variates)):
            in_range(name, value, value >= 1, "an integer >= 1")
        in_range("n_static", n_static, n_static >= 0, "an integer >= 0")
        in_range("eps", eps, eps > 0, "> 0")
        self.n_variates, self.n_static, self.eps = n_variates, n_static, eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = nn.Parameter(torch.ones(n_variates, 1, **factory))
        self.shift = nn.Parameter(torch.zeros(n_variates, 1, **factory))
        self.mixer = MambaMixer(depth, n_variates + n_static, lookback, **options, **factory)
        self.head = nn.Linear(lookback, horizon, **factory)

    def forward(self, input: Tensor, static: Tensor | None = None) -> Tensor:
        given = 0 if static is None else static.shape[-1]
        in_range("static", given, given == self.n_static, f"n_static = {self.n_static} covariates")
        var, mean = torch.var_mean(input, 2, correction=0, keepdim=True)
        deviation = (var + self.eps).sqrt()
        x = (input - mean) / deviation * self.scale + self.shift
        if static is not None:
            x = torch.cat([x, static[..., None].expand(-1, -1, x.shape[2]).to(x.dtype)], 1)
        x = self.mixer(x.transpose(1, 2)).transpose(1, 2)[:, : self.n_variates]
        # A scale that passes 0 on its way must not be divided by.
        scale = torch.where(self.scale.abs() < self.eps, self.eps, self.scale)
        return ((self.head(x) - self.shift) / scale * deviation + mean).to(input.dtype)

    def extra_repr(self) -> str:
        return f"n_variates={self.n_variates}, n_static={self.n_static}, eps={self.eps}"


class CrossScan(nn.Module):
    """The token mixer of ViM2: an image's tokens (batch, height * width, d_model) scanned along rows and columns, both
    ways, each with step sizes and weights of its own; a depthwise 2-d convolution before, a gate behind."""

    def __init__(
        self,
        d_model: int,
        size: tuple[int, int],
        *,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("d_conv", d_conv, d_conv % 2 == 1, "an odd number")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, rank = expand * d_model, math.ceil(d_model / 16)
        self.size, self.inner, self.d_state, self.dt_rank = size, inner, d_state, rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False, **factory)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, **factory)
        self.x_proj = nn.Parameter(torch.empty(4, rank + 2 * d_state, inner, **factory))
        self.dt_proj = nn.Parameter(torch.empty(4, inner, rank, **factory))
        self.dt_bias = nn.Parameter(torch.empty(4 * inner, **factory))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1, **factory).log().repeat(4 * inner, 1))
        self.D = nn.Parameter(torch.ones(4 * inner, **factory))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_norm = nn.LayerNorm(inner, **factory)
        self.out_proj = nn.Linear(inner, d_model, bias=False, **factory)
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(rank**-0.5), rank**-0.5)
        first_step_sizes_(self.dt_bias)

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.size
        x, gate = self.in_proj(input).chunk(2, -1)
        image = F.silu(self.conv2d(x.transpose(1, 2).unflatten(2, (height, width))))
        rows, columns = image.flatten(2), image.transpose(2, 3).flatten(2)
        x = torch.stack([rows, columns, rows.flip(2), columns.flip(2)], 1)  # (batch, 4, inner, L)
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = (self.x_proj @ x).split(sizes, 2)
        delta = (self.dt_proj @ dt).flatten(1, 2)
        A, D = -torch.exp(self.A_log), self.D
        y = selective_scan(x.flatten(1, 2), delta, A, B, C, D, None, self.dt_bias, True)
        assert isinstance(y, Tensor)
        y = y.unflatten(1, (4, self.inner))
        rows, columns = y[:, 0] + y[:, 2].flip(2), y[:, 1] + y[:, 3].flip(2)
        y = rows + columns.unflatten(2, (width, height)).transpose(2, 3).flatten(2)
        return self.out_proj(self.out_norm(y.transpose(1, 2)) * F.silu(gate))


class ViM2(nn.Module):
    """Classify images by selective mixing of patches and of channels, in stages that halve the image.

    Patches of ``patch_size`` pixels become tokens; each stage is a :class:`MambaMixer` that scans rows and
    columns, both ways; between stages 2x2 tokens become one of the next width; the mean of the last ones is classified.

    Shapes (batch, in_channels, image_size, image_size) to (batch, num_classes).

    Args:
        image_size: height and width of the images, a multiple of ``patch_size * 2 ** (stages - 1)``.
        num_classes, in_channels, patch_size: >= 1.
        depths, widths: blocks and channels of each stage.
        d_state, d_conv, expand: of the token mixers (``d_conv`` is odd); ``d_state`` and ``expand`` of the others too.
        options: of :class:`MambaMixerBlock`.

    Raises:
        ValueError: an argument out of range.

    Source: A. Behrouz, M. Santacatterina, R. Zabih, MambaMixer, 2024, arXiv 2403.19888.

    >>> import torch
    >>> from assay.nn import ViM2
    >>> ViM2(16, 10, depths=(1, 1), widths=(8, 16))(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        in_range("depths", depths, len(depths) == len(widths) >= 1, "as many as widths, at least one")
        multiple = patch_size * 2 ** (len(depths) - 1)
        in_range("image_size", image_size, image_size % multiple == 0, f"a multiple of {multiple}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {"d_state": d_state, "expand": expand}
        inputs, step, side = in_channels, patch_size, image_size
        self.embed, self.stages = nn.ModuleList(), nn.ModuleList()
        for depth, width in zip(depths, widths, strict=True):
            side //= step
            self.embed.append(nn.Conv2d(inputs, width, step, step, **factory))

            def scan(width: int = width, side: int = side, **factory: Any) -> nn.Module:
                return CrossScan(width, (side, side), d_conv=d_conv, **sizes, **factory)

            self.stages.append(MambaMixer(depth, width, side**2, token_mixer=scan, **sizes, **options, **factory))
            inputs, step = width, 2
        self.norm = nn.LayerNorm(inputs, **factory)
        self.head = nn.Linear(inputs, num_classes, **factory)

    def forward(self, input: Tensor) -> Tensor:
        image = input
        for embed, stage in zip(self.embed, self.stages, strict=True):
            image = embed(image)
            tokens = stage(image.flatten(2).transpose(1, 2))
            image = tokens.transpose(1, 2).unflatten(2, image.shape[2:])
        return self.head(self.norm(image.flatten(2).transpose(1, 2)).mean(1))
