"""The renderer in plain torch: the specification, slow and obvious.

Every other backend is tested against this package. It follows gsplat 1.5.3's semantics
(docs/numerics.md lists each threshold and each difference) and reads as the data flows, one file a
stage:

    project -> color -> bin_tiles -> blend -> composite, called in that order by rasterization()

Any floating dtype (float64 is the truth of the tests), any device, differentiable by autograd.
Discrete decisions (cull, tile, cut, stop) carry no gradient. They are taken first, without a graph;
the differentiable formulas then run on the survivors alone, so what was culled for being degenerate
can put no NaN into an output or a gradient.

Letters in shapes: B scenes, C cameras per scene, I = B * C images (image b * C + c), N Gaussians,
K SH bases, M records (visible (image, Gaussian) pairs, by image, then Gaussian), R rows (M when
packed, I * N when dense), S intersections (tile, row), D channels, H x W pixels. The pixel in row
i, column j is centred at (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rapfast.reference.bin import bin_tiles
from rapfast.reference.blend import blend
from rapfast.reference.color import camera_positions, color, spherical_harmonics
from rapfast.reference.composite import composite
from rapfast.reference.constants import ALPHA_CAP, TILE
from rapfast.reference.project import Records, project, usable_views

if TYPE_CHECKING:
    from rapfast.postprocess import PostProcess

__all__ = [
    "Records",
    "bin_tiles",
    "blend",
    "camera_positions",
    "color",
    "composite",
    "project",
    "rasterization",
    "spherical_harmonics",
    "usable_views",
]


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
    camera_model: str = "pinhole",
    covars: Tensor | None = None,
    absgrad: bool = False,
    alpha_cap: float = ALPHA_CAP,
    postprocess: PostProcess | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render Gaussians [..., N] into cameras [..., C], where `...` are scenes.

    Arguments are checked by rapfast.rasterization, not here.

    Args:
        means, quats, scales, opacities, covars: [..., N, 3], [..., N, 4], [..., N, 3], [..., N],
            [..., N, 3, 3] as in project(), all of one floating dtype on one device.
        viewmats, Ks: [..., C, 4, 4] and [..., C, 3, 3] as in project().
        colors: [..., N, D] or [..., C, N, D]; with sh_degree coefficients [..., N, K, 3] or
            [..., C, N, K, 3]; as in color().
        render_mode: "RGB", "D" (accumulated z), "ED" (expected z: accumulated z / alpha), "RGB+D",
            "RGB+ED".
        packed: the layout of meta: [M, ...] per record, or [..., C, N, ...] with 0 where culled.
        backgrounds: [..., C, Dc] or [..., C, H, W, Dc], as in composite(); so is postprocess.
        alpha_cap: upper bound of a single alpha.
        absgrad: backward also adds to meta["means2d"].absgrad, per pixel, the absolute gradients.

    Returns:
        colors [..., C, H, W, D'], alphas [..., C, H, W, 1], and meta with gsplat 1.5.3's keys and
        n_invalid [..., C] int64. blend() reads meta["means2d"] itself: its retain_grad() works.
    """
    scenes, C, N = means.shape[:-2], viewmats.shape[-3], means.shape[-2]
    B = math.prod(scenes)
    n_images = B * C

    def flat(x: Tensor | None, keep: int) -> Tensor | None:
        """One batch dimension in front of the last `keep`."""
        return None if x is None else x.reshape(B, *x.shape[x.dim() - keep :])

    means, viewmats, Ks = flat(means, 2), flat(viewmats, 3), flat(Ks, 3)
    colors = flat(colors, colors.dim() - len(scenes))
    records = project(
        means,
        flat(quats, 2),
        flat(scales, 2),
        flat(opacities, 1),
        viewmats,
        Ks,
        width,
        height,
        eps2d=eps2d,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        rasterize_mode=rasterize_mode,
        camera_model=camera_model,
        covars=flat(covars, 3),
    )
    channels, opac, n_colorless = color(records, means, colors, viewmats, sh_degree=sh_degree, render_mode=render_mode)

    b, c, n, radii, means2d, depths, conics, _, n_invalid = records
    image_ids = b * C + c
    if not packed:  # one row for every (image, Gaussian), 0 where culled

        def dense(x: Tensor) -> Tensor:
            rows = x.new_zeros(n_images * N, *x.shape[1:]).index_copy(0, image_ids * N + n, x)
            return rows.reshape(*scenes, C, N, *x.shape[1:])

        radii, means2d, conics = dense(radii), dense(means2d), dense(conics)
        depths, opac = dense(depths), dense(opac)
        channels = dense(channels).reshape(n_images * N, channels.shape[-1])
        image_ids = torch.arange(n_images, device=means.device).repeat_interleave(N)
    if absgrad:
        means2d.absgrad = torch.zeros_like(means2d)
    rows2d = means2d.reshape(-1, 2)
    tiles_per_gauss, isect_ids, flatten_ids, isect_offsets = bin_tiles(
        rows2d, radii.reshape(-1, 2), depths.reshape(-1), image_ids, n_images, width, height
    )
    image, alphas = blend(
        rows2d,
        conics.reshape(-1, 3),
        opac.reshape(-1),
        channels,
        flatten_ids,
        isect_offsets,
        width,
        height,
        alpha_cap=alpha_cap,
        absgrad=means2d.absgrad.view(-1, 2) if absgrad else None,
    )
    if backgrounds is not None:
        backgrounds = backgrounds.reshape(n_images, *backgrounds.shape[len(scenes) + 1 :])
    image, alphas = composite(image, alphas, backgrounds=backgrounds, render_mode=render_mode, postprocess=postprocess)
    meta = {
        "batch_ids": b if packed else None,
        "camera_ids": c if packed else None,
        "gaussian_ids": n if packed else None,
        "radii": radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opac,
        "tile_width": isect_offsets.shape[2],
        "tile_height": isect_offsets.shape[1],
        "tiles_per_gauss": tiles_per_gauss.reshape(radii.shape[:-1]),
        "isect_ids": isect_ids,
        "flatten_ids": flatten_ids,
        "isect_offsets": isect_offsets.reshape(*scenes, C, *isect_offsets.shape[1:]),
        "width": width,
        "height": height,
        "tile_size": TILE,
        "n_batches": B,
        "n_cameras": C,
        "n_invalid": (n_invalid + n_colorless).reshape(*scenes, C),
    }
    image, alphas = (x.reshape(*scenes, C, *x.shape[1:]) for x in (image, alphas))
    return image, alphas, meta
