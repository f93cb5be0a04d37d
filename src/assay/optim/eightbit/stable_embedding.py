"""An embedding whose gradients and state behave well enough for 8-bit optimizers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.optim.eightbit.quantized import use_32bit


class StableEmbedding(nn.Embedding):
    """``nn.Embedding`` with Xavier-uniform weights, normalized rows, and an optimizer state of 32 bits.

    ``output = LayerNorm(weight[input])``, computed in float32 at least and given in the weight's dtype. Add embeddings
    of positions afterwards. The row ``padding_idx`` starts at zero and gets no gradient; its output is the
    normalization's bias.

    The weight is marked by ``use_32bit``; copying and loading keep the mark, ``fully_shard`` does not.

    Shapes: input (*) of integers, output (*, embedding_dim). State: ``weight``, ``norm.weight``, ``norm.bias``.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, device, dtype: as in
            ``nn.Embedding``.
        sparse: sparse gradients of the weight; Assay's optimizers refuse them, 8-bit ones too.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861, section 2.3.

    >>> import torch
    >>> from assay.nn import StableEmbedding
    >>> StableEmbedding(100, 16)(torch.tensor([[3, 5]])).shape
    torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            device=device,
            dtype=dtype,
        )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.norm = nn.LayerNorm(embedding_dim, device=device, dtype=wide)
        use_32bit(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        use_32bit(self.weight)  # a copied parameter has lost the mark

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        wide = torch.promote_types(rows.dtype, torch.float32)
        norm = self.norm
        scale, shift = norm.weight.to(wide), norm.bias.to(wide)
        return F.layer_norm(rows.to(wide), norm.normalized_shape, scale, shift, norm.eps).to(self.weight.dtype)
