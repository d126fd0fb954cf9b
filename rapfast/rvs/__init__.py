"""Random-view synthesis: views around the training views, drawn as RAP draws them, rendered in batches."""

from __future__ import annotations

from .brisque_loop import SyntheticViews
from .dataset import RandomViewDataset
from .draws import Guess, SpeculativeDraws, ViewEnd
from .filters import FarFrom, lens_grid, sample_kept
from .poses import PoseSampler, bounding_box, draw_weights, world_to_camera
from .references import ReferenceMaps
from .synthesis import RandomViewSynthesizer

__all__ = [
    "FarFrom",
    "Guess",
    "PoseSampler",
    "RandomViewDataset",
    "RandomViewSynthesizer",
    "ReferenceMaps",
    "SpeculativeDraws",
    "SyntheticViews",
    "ViewEnd",
    "bounding_box",
    "draw_weights",
    "lens_grid",
    "sample_kept",
    "world_to_camera",
]
