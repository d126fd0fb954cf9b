"""RAP's appearance: what a Gaussian looks like, given a reference image, a view and a weight.

The modules are plain torch in any floating dtype: readable, slow, and what the fused colour stage is tested against.
"""

from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.embedding_scene import EmbeddingScene
from rapfast.appearance.feature_map_net import FeatureMapNet
from rapfast.appearance.features import positional_encoding, sample_features, view_directions
from rapfast.appearance.rap_scene import RapScene, load_rap

__all__ = [
    "ColorNet",
    "EmbeddingScene",
    "FeatureMapNet",
    "RapScene",
    "load_rap",
    "positional_encoding",
    "sample_features",
    "view_directions",
]
