"""The colour stage of a differentiable call: a network's colours of the visible records.

On the CPU they are made between projection and tiling. On the GPU one native call has made them already, and the same
functions tell autograd of what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rapfast.appearance.net_outputs import NetInputs, net_outputs
from rapfast.ops._library import RECORD_FIELDS, uncompiled
from rapfast.ops.color_net import Network, NetworkInput
from rapfast.ops.project import Records
from rapfast.reference.color import camera_positions, spherical_harmonics
from rapfast.scene import SH_DEGREE_OF_COUNT

_DEPTH, _OPACITY = RECORD_FIELDS.index("depth"), RECORD_FIELDS.index("opacity")


@dataclass(frozen=True, eq=False)
class NetColors:
    """A `rapfast.ops.autograd.ColorStage`.

    Attributes:
        inputs: a network and what it is fed.
        render_mode: of the call.
        make_network: the network and its input in the form of a native call, whose outputs are colours.
        harmonics: whether the network puts out coefficients of spherical harmonics, 3 k + c.
    """

    inputs: NetInputs
    render_mode: str
    make_network: Callable[[], tuple[Network, NetworkInput]]
    harmonics: bool = False
    n_channels: int = 3

    def __call__(self, projected: Records) -> tuple[Tensor, Tensor, Tensor]:
        records, n_invalid = projected.records, projected.n_invalid
        depths = records[:, _DEPTH : _DEPTH + 1]
        if self.render_mode in ("D", "ED"):
            return depths.contiguous(), records, n_invalid
        values = net_outputs(self.inputs, projected.gaussian_ids, projected.image_offsets)
        # Before anything is computed of them: behind a mask an infinity would still reach the gradient.
        good = values.isfinite().all(1)
        colors = torch.where(good[:, None], values, 0)
        images = _images(projected.gaussian_ids, projected.image_offsets)
        if self.harmonics:
            colors = self._evaluated(colors, projected.gaussian_ids, projected.image_offsets)
            good = good & colors.isfinite().all(1)
            colors = torch.where(good[:, None], colors, 0)
        opacities = torch.where(good, records[:, _OPACITY], 0)[:, None]
        records = torch.cat([records[:, :_OPACITY], opacities, records[:, _OPACITY + 1 :]], 1)
        n_invalid = n_invalid.index_add(0, images, (~good).long())
        if self.render_mode != "RGB":
            colors = torch.cat([colors, depths], 1)
        return colors, records, n_invalid

    def network(self) -> tuple[Network, NetworkInput]:
        return self.make_network()

    def link(self, gaussian_ids: Tensor, image_offsets: Tensor) -> Tensor:
        if not self.harmonics:
            return net_outputs(self.inputs, gaussian_ids, image_offsets, with_values=False)
        # What the clamp lets through and where the directions lead depends on the coefficients.
        values = net_outputs(self.inputs, gaussian_ids, image_offsets)
        values = torch.where(values.isfinite().all(1, keepdim=True), values, 0)
        return self._evaluated(values, gaussian_ids, image_offsets)

    def _evaluated(self, coefficients: Tensor, gaussian_ids: Tensor, image_offsets: Tensor) -> Tensor:
        """The harmonics in the directions in which the views see the records, as colours."""
        viewmats = self.inputs.viewmats
        # A view that sees nothing may be singular: the identity in its place keeps 1 / det finite.
        eye = torch.eye(4, dtype=viewmats.dtype, device=viewmats.device)
        viewmats = torch.where((image_offsets.diff() > 0)[:, None, None], viewmats, eye)
        coefficients = coefficients.unflatten(1, (-1, 3))
        directions = self.inputs.means[gaussian_ids.long()]
        directions = directions - camera_positions(viewmats)[_images(gaussian_ids, image_offsets)]
        colors = spherical_harmonics(SH_DEGREE_OF_COUNT[coefficients.shape[1]], directions, coefficients)
        return torch.where(colors.isfinite(), (colors + 0.5).clamp(min=0), colors)


def uncompiled_on_gpu(render: Callable[..., Any]) -> Callable[..., Any]:
    """A scene's ``render`` with a break in a compiler's graph around its calls on a GPU, which look at numbers and
    addresses that no compiler knows. Around all of a call: what is traced of it, `check_weights` above all, looks at
    nothing, and what is left would take that for numbers."""

    @wraps(render)
    def call(scene: Any, *views: Any, **options: Any) -> Any:
        on_gpu = scene.scene.means.is_cuda and options.get("backend", "rapfast") == "rapfast"
        return (uncompiled(render) if on_gpu and is_compiling() else render)(scene, *views, **options)

    return call


def _images(gaussian_ids: Tensor, image_offsets: Tensor) -> Tensor:
    """[M] the view of each record."""
    views = torch.arange(image_offsets.shape[0] - 1, device=image_offsets.device)
    return torch.repeat_interleave(views, image_offsets.diff(), output_size=gaussian_ids.shape[0])
