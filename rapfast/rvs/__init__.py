"""Random-view synthesis: poses around the training views, drawn as RAP draws them."""

from __future__ import annotations

from .draws import Guess, SpeculativeDraws, ViewEnd
from .filters import FarFrom, lens_grid, sample_kept
from .poses import PoseSampler, bounding_box, draw_weights, world_to_camera

__all__ = [
    "FarFrom",
    "Guess",
    "PoseSampler",
    "SpeculativeDraws",
    "ViewEnd",
    "bounding_box",
    "draw_weights",
    "lens_grid",
    "sample_kept",
    "world_to_camera",
]
