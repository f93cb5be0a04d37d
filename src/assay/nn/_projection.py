"""The small head that maps features to the space in which they are compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Features to embeddings for metric learning, distillation and retrieval.

    With ``hidden_features``, in plain maths ::

        e = W2 relu(batch_norm(W1 x)) + b2,   then e / ||e|| if ``normalize``

    and without, one linear layer. Shapes (..., in_features) to (..., out_features).

    Args:
        in_features, out_features: at least 1.
        hidden_features: width of the hidden layer; None: no hidden layer.
        normalize: whether embeddings have unit length.

    Raises:
        ValueError: a width below 1.

    Example:
        >>> import torch
        >>> from assay.nn import ProjectionHead
        >>> head = ProjectionHead(64, 16, hidden_features=32)
        >>> embeddings = head(torch.randn(5, 64))
        >>> embeddings.shape, torch.allclose(embeddings.norm(dim=1), torch.ones(5))
        (torch.Size([5, 16]), True)
    """

    def __init__(
        self, in_features: int, out_features: int, *, hidden_features: int | None = None, normalize: bool = True
    ) -> None:
        super().__init__()
        widths = {"in_features": in_features, "out_features": out_features, "hidden_features": hidden_features}
        for name, width in widths.items():
            if width is not None and width < 1:
                raise ValueError(f"{name} = {width!r} is out of range: an integer >= 1")
        self.normalize = normalize
        self.hidden = (
            nn.Sequential(
                nn.Linear(in_features, hidden_features, bias=False), nn.BatchNorm1d(hidden_features), nn.ReLU()
            )
            if hidden_features
            else nn.Identity()
        )
        self.out = nn.Linear(hidden_features or in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.hidden(input.flatten(0, -2)).unflatten(0, input.shape[:-1])
        embeddings = self.out(hidden)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings
