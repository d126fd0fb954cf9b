"""The stages as ``torch.library`` operators: each checks nothing the caller has checked, allocates its
outputs, calls the native module, and tells torch its output shapes without running.

Tensors given to these operators are contiguous, on one device and of one floating dtype;
:func:`rapfast.rasterization` sees to that. ``M`` counts records, the visible (image, Gaussian) pairs; image
``i`` is camera ``i % C`` of scene ``i // C``.
"""

from rapfast.ops.autograd import render_with_grad
from rapfast.ops.bin import bin
from rapfast.ops.blend import blend
from rapfast.ops.color import color
from rapfast.ops.color_net import Network, NetworkInput, color_net, network_outputs
from rapfast.ops.composite import composite
from rapfast.ops.project import Records, project
from rapfast.ops.render import render
from rapfast.ops.state import state_pixels, state_records

__all__ = [
    "Network",
    "NetworkInput",
    "Records",
    "bin",
    "blend",
    "color",
    "color_net",
    "composite",
    "network_outputs",
    "project",
    "render",
    "render_with_grad",
    "state_pixels",
    "state_records",
]
