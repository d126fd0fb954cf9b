"""The colour stage of a differentiable call: colours of the visible records, between projection and tiling.

Values come from a network or are picked from given ones; what is done with them is the same for all: spherical
harmonics where they are coefficients, records whose colour is not finite taken out, depth in the last channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rapfast.appearance.net_outputs import NetInputs, net_outputs
from rapfast.ops._library import RECORD_FIELDS
from rapfast.ops.project import Records, image_ids
from rapfast.reference.color import camera_positions, spherical_harmonics
from rapfast.scene import SH_DEGREE_OF_COUNT

_DEPTH, _OPACITY = RECORD_FIELDS.index("depth"), RECORD_FIELDS.index("opacity")


@dataclass(frozen=True, eq=False)
class RecordColors:
    """A `rapfast.ops.autograd.ColorStage`.

    Attributes:
        values: a network and its inputs; or colours or coefficients [N, F] or [C, N, F] themselves.
        render_mode: of the call.
        drawn_from: where values are coefficients [.., 3 K]: means [N, 3] and viewmats [C, 4, 4], in whose directions
            the harmonics are evaluated.
    """

    values: NetInputs | Tensor
    render_mode: str
    drawn_from: tuple[Tensor, Tensor] | None = None
    n_channels: int = 3

    def __call__(self, projected: Records) -> tuple[Tensor, Tensor, Tensor]:
        records, n_invalid = projected.records, projected.n_invalid
        depths = records[:, _DEPTH : _DEPTH + 1]
        if self.render_mode in ("D", "ED"):
            return depths.contiguous(), records, n_invalid
        images, ids = image_ids(projected), projected.gaussian_ids.long()
        values = self._values(projected, images, ids)
        # Before anything is computed of them: behind a mask an infinity would still reach the gradient.
        good = values.isfinite().all(1)
        colors = torch.where(good[:, None], values, 0)
        if self.drawn_from is not None:
            colors = self._harmonics(colors, images, ids, projected.image_offsets)
            good = good & colors.isfinite().all(1)
            colors = torch.where(good[:, None], colors, 0)
        opacities = torch.where(good, records[:, _OPACITY], 0)[:, None]
        records = torch.cat([records[:, :_OPACITY], opacities, records[:, _OPACITY + 1 :]], 1)
        n_invalid = n_invalid.index_add(0, images, (~good).long())
        if self.render_mode != "RGB":
            colors = torch.cat([colors, depths], 1)
        return colors, records, n_invalid

    def _values(self, projected: Records, images: Tensor, ids: Tensor) -> Tensor:
        if isinstance(self.values, NetInputs):
            return net_outputs(self.values, projected.gaussian_ids, projected.image_offsets)
        if self.values.dim() == 2:
            return self.values[ids]
        return self.values.flatten(0, 1)[images * self.values.shape[1] + ids]

    def _harmonics(self, coefficients: Tensor, images: Tensor, ids: Tensor, image_offsets: Tensor) -> Tensor:
        means, viewmats = self.drawn_from
        # A view that sees nothing may be singular: the identity in its place keeps 1 / det finite.
        seeing = image_offsets.diff() > 0
        eye = torch.eye(4, dtype=viewmats.dtype, device=viewmats.device)
        viewmats = torch.where(seeing[:, None, None], viewmats, eye)
        coefficients = coefficients.unflatten(1, (-1, 3))
        degree = SH_DEGREE_OF_COUNT[coefficients.shape[1]]
        colors = spherical_harmonics(degree, means[ids] - camera_positions(viewmats)[images], coefficients)
        return torch.where(colors.isfinite(), (colors + 0.5).clamp(min=0), colors)
