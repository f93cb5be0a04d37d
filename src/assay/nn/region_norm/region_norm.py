"""Region normalization: hole and valid pixels of an image each by their own statistics."""

from __future__ import annotations

from assay.nn.region_norm.generator import InpaintingGenerator
from assay.nn.region_norm.layers import RegionNormB, RegionNormL, region_norm

__all__ = ["InpaintingGenerator", "RegionNormB", "RegionNormL", "region_norm"]
