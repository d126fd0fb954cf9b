"""Stage 2, color: what each record looks like from its camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rapfast.reference.project import Records


def color(
    records: Records,
    means: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    *,
    sh_degree: int | None = None,
    render_mode: str = "RGB",
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of every record: colour, then depth where the mode has it.

    Args:
        means: [B, N, 3].
        colors: [B, N, D] or [B, C, N, D]; with sh_degree, coefficients [B, N, K, 3] or
            [B, C, N, K, 3] of which the first (sh_degree + 1)^2 are read. Not read at all in modes
            "D" and "ED".
        viewmats: [B, C, 4, 4].
        sh_degree: 0 to 4: the colour is max(SH(direction from camera to Gaussian) + 0.5, 0).

    Returns:
        channels [M, D'], opacities [M], n_invalid [B, C] int64. A record with a non-finite colour
        (before the clamp at 0) draws nothing (colour 0, opacity 0) and is counted.
    """
    b, c, n = records.batch_ids, records.camera_ids, records.gaussian_ids
    n_invalid = torch.zeros_like(records.n_invalid)
    if render_mode in ("D", "ED"):
        return records.depths[:, None], records.opacities, n_invalid

    per_camera = colors.dim() == means.dim() + (sh_degree is not None) + 1
    values = colors[b, c, n] if per_camera else colors[b, n]  # [M, D] or [M, K, 3]
    if sh_degree is None:
        ok = values.detach().isfinite().all(-1)
        rgb = torch.where(ok[:, None], values, 0)
    else:
        values = values[:, : (sh_degree + 1) ** 2]
        # A view that sees nothing may be singular: the identity in its place keeps 1 / det finite.
        seeing = torch.zeros_like(n_invalid, dtype=torch.bool)
        seeing[b, c] = True
        eye = torch.eye(4, dtype=viewmats.dtype, device=viewmats.device)
        campos = camera_positions(torch.where(seeing[..., None, None], viewmats, eye))
        dirs = means[b, n] - campos[b, c]
        with torch.no_grad():
            ok = spherical_harmonics(sh_degree, dirs, values).isfinite().all(-1)
        # Coefficients, not results, are replaced: 0 * NaN would reach the direction's gradient.
        rgb = spherical_harmonics(sh_degree, dirs, torch.where(ok[:, None, None], values, 0))
        rgb = torch.where(ok[:, None], (rgb + 0.5).clamp(min=0), 0)
    opacities = torch.where(ok, records.opacities, 0)
    n_invalid.index_put_((b, c), (~ok).long(), accumulate=True)
    if render_mode in ("RGB+D", "RGB+ED"):
        rgb = torch.cat([rgb, records.depths[:, None]], -1)
    return rgb, opacities, n_invalid


def camera_positions(viewmats: Tensor) -> Tensor:
    """World positions [..., 3] of cameras [..., 4, 4]: -R^-1 t, where R need not be a rotation."""
    r0, r1, r2 = viewmats[..., :3, :3].unbind(-2)
    t0, t1, t2 = viewmats[..., :3, 3, None].unbind(-2)
    cross = torch.linalg.cross
    det = (r0 * cross(r1, r2)).sum(-1, keepdim=True)
    return -(t0 * cross(r1, r2) + t1 * cross(r2, r0) + t2 * cross(r0, r1)) / det


def spherical_harmonics(degree: int, dirs: Tensor, coeffs: Tensor) -> Tensor:
    """Coefficients [..., K, 3] times real spherical harmonics at dirs [..., 3], summed: [..., 3].

    Directions may have any length; one of length 0 stays (0, 0, 0). Bases are ordered by degree l,
    then order -l..l, with the Condon-Shortley sign, as in 3D Gaussian splatting files.
    """
    norm = torch.linalg.vector_norm(dirs, dim=-1, keepdim=True)
    dirs = dirs / torch.where(norm > 0, norm, 1)
    bases = torch.stack(_sh_bases(degree, *dirs.unbind(-1)), -1)
    return (bases[..., None] * coeffs[..., : (degree + 1) ** 2, :]).sum(-2)


def _sh_bases(degree: int, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """The (degree + 1)^2 real spherical harmonics at unit vectors, written as polynomials."""

    def norm(ratio: float) -> float:
        return math.sqrt(ratio / math.pi)

    xx, yy, zz = x * x, y * y, z * z
    bases = [torch.full_like(x, norm(1 / 4))]
    if degree >= 1:
        bases += [-norm(3 / 4) * y, norm(3 / 4) * z, -norm(3 / 4) * x]
    if degree >= 2:
        bases += [
            norm(15 / 4) * x * y,
            -norm(15 / 4) * y * z,
            norm(5 / 16) * (3 * zz - 1),
            -norm(15 / 4) * x * z,
            norm(15 / 16) * (xx - yy),
        ]
    if degree >= 3:
        bases += [
            -norm(35 / 32) * y * (3 * xx - yy),
            norm(105 / 4) * x * y * z,
            -norm(21 / 32) * y * (5 * zz - 1),
            norm(7 / 16) * z * (5 * zz - 3),
            -norm(21 / 32) * x * (5 * zz - 1),
            norm(105 / 16) * z * (xx - yy),
            -norm(35 / 32) * x * (xx - 3 * yy),
        ]
    if degree >= 4:
        bases += [
            norm(315 / 16) * x * y * (xx - yy),
            -norm(315 / 32) * y * z * (3 * xx - yy),
            norm(45 / 16) * x * y * (7 * zz - 1),
            -norm(45 / 32) * y * z * (7 * zz - 3),
            norm(9 / 256) * (35 * zz * zz - 30 * zz + 3),
            -norm(45 / 32) * x * z * (7 * zz - 3),
            norm(45 / 64) * (xx - yy) * (7 * zz - 1),
            -norm(315 / 32) * x * z * (xx - 3 * yy),
            norm(315 / 256) * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ]
    return bases
