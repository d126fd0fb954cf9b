"""RAP's appearance: what a Gaussian looks like, given a reference image, a view and a weight.

Plain torch, any floating dtype: readable, slow, and what faster code is tested against.
"""

from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.feature_map_net import FeatureMapNet
from rapfast.appearance.features import positional_encoding, sample_features, view_directions
from rapfast.appearance.rap_scene import RapScene, load_rap

__all__ = [
    "ColorNet",
    "FeatureMapNet",
    "RapScene",
    "load_rap",
    "positional_encoding",
    "sample_features",
    "view_directions",
]
