"""RAP's appearance: what a Gaussian looks like, given a reference image, a view and a weight.

Plain torch, any floating dtype: readable, slow, and what faster code is tested against.
"""

from rapfast.appearance.feature_map_net import FeatureMapNet

__all__ = ["FeatureMapNet"]
