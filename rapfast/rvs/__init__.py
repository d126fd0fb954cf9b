"""Random-view synthesis: views around the training views, drawn as RAP draws them, rendered in batches."""

from __future__ import annotations

from .brisque import Brisque
from .brisque_loop import SyntheticViews
from .dataset import RandomViewDataset
from .draws import Guess, SpeculativeDraws, ViewEnd
from .filters import FarFrom, lens_grid, sample_kept
from .map_cache import FeatureMapCache, image_key
from .poses import PoseSampler, bounding_box, draw_weights, world_to_camera
from .references import ReferenceMaps
from .synthesis import RandomViewSynthesizer
from .view_cache import ViewCache, view_keys, view_settings

__all__ = [
    "Brisque",
    "FarFrom",
    "FeatureMapCache",
    "Guess",
    "PoseSampler",
    "RandomViewDataset",
    "RandomViewSynthesizer",
    "ReferenceMaps",
    "SpeculativeDraws",
    "SyntheticViews",
    "ViewCache",
    "ViewEnd",
    "bounding_box",
    "draw_weights",
    "image_key",
    "lens_grid",
    "sample_kept",
    "view_keys",
    "view_settings",
    "world_to_camera",
]
