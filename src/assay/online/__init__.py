"""Online learning: convex sets, learners that play a game in rounds, environments to play against, regret."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
