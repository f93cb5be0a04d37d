"""The grid on which the tokens of an image stand."""

from __future__ import annotations

import math

from assay._checks import in_range


def grid(tokens: int, hw: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of N tokens: as given, if they fit, or of a square."""
    if hw is None:
        side = math.isqrt(tokens)
        hw = (side, side)
    in_range("hw", hw, hw[0] * hw[1] == tokens, f"(H, W) with H W = N = {tokens}")
    return hw
