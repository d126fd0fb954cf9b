"""rapfast: batched rendering of 3D Gaussian scenes.

    from rapfast import rasterization   # gsplat.rasterization's arguments and outputs

``import rapfast`` loads torch, numpy and the native module, nothing else.
"""

from rapfast._version import __version__
from rapfast.appearance import RapScene, load_rap
from rapfast.cameras import Cameras
from rapfast.io import load_ply, load_scene, save_ply, save_scene
from rapfast.postprocess import PostProcess
from rapfast.rasterization import rasterization
from rapfast.renderer import Renderer
from rapfast.scene import Scene

__all__ = [
    "Cameras",
    "PostProcess",
    "RapScene",
    "Renderer",
    "Scene",
    "__version__",
    "load_ply",
    "load_rap",
    "load_scene",
    "rasterization",
    "save_ply",
    "save_scene",
]
