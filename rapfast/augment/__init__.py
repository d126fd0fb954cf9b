"""Avatar augmentation: load once, precompute, render every parameter set.

A `Provider` is an avatar system (GUAVA, or what lies on a disk), a `ParameterSet` what a film's camera is drawn from;
`AugmentationJob` renders videos x sets into an `OutputFolder`. docs/augmentation.md begins at the beginning.
"""

from .assets import Budget, FrameAssets, Frames, FrameShapes
from .compositing import composite, to_yuv420
from .difficulties import DIFFICULTIES, Difficulty, ParameterSet, parameter_sets, read_difficulties
from .films import FilmOptions
from .job import AugmentationJob, Counts, Summary, VideoError
from .output import OutputFolder, film_path, params_path
from .provider import Identity, Motion, Provider, Video, Viewpoint, load_provider
from .rendering import Features, FrameRenderer
from .viewpoints import drawn_viewpoint, film_cameras, fixed_viewpoint, set_seed

__all__ = [
    "DIFFICULTIES",
    "AugmentationJob",
    "Budget",
    "Counts",
    "Difficulty",
    "Features",
    "FilmOptions",
    "FrameAssets",
    "FrameRenderer",
    "FrameShapes",
    "Frames",
    "Identity",
    "Motion",
    "OutputFolder",
    "ParameterSet",
    "Provider",
    "Summary",
    "Video",
    "VideoError",
    "Viewpoint",
    "composite",
    "drawn_viewpoint",
    "film_cameras",
    "film_path",
    "fixed_viewpoint",
    "load_provider",
    "parameter_sets",
    "params_path",
    "read_difficulties",
    "set_seed",
    "to_yuv420",
]
