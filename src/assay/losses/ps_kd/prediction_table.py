"""One row of class probabilities for each training example: dense or its largest entries, in memory or in a file."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from assay._distributed import rows_by_rank


class PredictionTable(nn.Module):
    """P in R^{num_samples x num_classes}, read and written by row; the rows not yet written are known as such.

    With ``topk`` a row keeps its ``topk`` largest entries and their classes; what is missing to 1 is spread evenly over
    the other classes when the row is read. With ``file`` the entries live in a file mapped into memory (the classes of
    ``topk`` in a second one beside it) and only the pages in use take memory,
    once for all processes of a machine. A file that exists is overwritten.

    The table stays on its device and in its dtype when the module that holds it is moved or cast: it is data, not
    computation.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        topk: int | None = None,
        file: Path | None = None,
    ) -> None:
        super().__init__()
        self.num_samples, self.num_classes, self.topk = num_samples, num_classes, topk
        shape = (num_samples, topk or num_classes)
        self.register_buffer("written", torch.zeros(num_samples, dtype=torch.bool, device=device))
        self.register_buffer("values", _storage(shape, dtype, device, file))
        if topk:
            beside = file and file.with_name(f"{file.name}.classes")
            kind = torch.int16 if num_classes <= 2**15 else torch.int32
            self.register_buffer("classes", _storage(shape, kind, device, beside))

    written: Tensor
    values: Tensor
    classes: Tensor

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, num_classes) in float32 or float64, and whether they were ever written (n,), on the table's device.

        A row that was never written has no meaning.
        """
        rows, known = self.values[indices], self.written[indices]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.topk:
            rest = (1 - rows.sum(1, keepdim=True)).clamp(min=0) / max(1, self.num_classes - self.topk)
            classes = self.classes[indices].long() * known.unsqueeze(1)  # an unwritten row of a file may hold anything
            rows = rest.repeat(1, self.num_classes).scatter(1, classes, rows)
        if self.values.dtype not in (torch.float32, torch.float64):
            # 11 bits and fewer: a row's rounded entries miss 1 by more than the caller's arithmetic would.
            rows = rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        return rows, known

    @torch.no_grad()
    def write(self, indices: Tensor, rows: Tensor) -> None:
        """Replace rows (n, num_classes); of an index that occurs twice the last one stays.

        In a process group all processes call this together, with any number of rows each, and all write all of them:
        in the order of ranks, so that every process holds the same table.
        """
        parts = [rows.to(self.values.dtype)]
        if self.topk:
            top = rows.topk(self.topk, dim=1)
            parts = [top.values.to(self.values.dtype), top.indices]
        indices, *parts = (torch.cat(rows_by_rank(part)) for part in (indices.to(rows.device), *parts))
        indices = indices.to(self.values.device)
        kept = _last_of_each(indices)
        for buffer, part in zip((self.values, self.classes) if self.topk else (self.values,), parts, strict=True):
            buffer[indices[kept]] = part.to(buffer.device)[kept].to(buffer.dtype)
        self.written[indices] = True

    def _apply(self, fn: object, recurse: bool = True) -> PredictionTable:
        return self


def _storage(shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str, file: Path | None) -> Tensor:
    if file is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _last_of_each(indices: Tensor) -> Tensor:
    """Positions of the last occurrence of every index: writing with duplicates is not deterministic in torch."""
    _, group = indices.unique(return_inverse=True)
    order = torch.arange(len(indices), device=indices.device)
    return order.new_zeros(len(indices)).scatter_reduce(0, group, order, "amax", include_self=False)[group].unique()
