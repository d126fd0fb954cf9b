"""Stage 1, project: 3D Gaussians to 2D Gaussians, keeping what each view can see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.reference.constants import ALPHA_CUT, FISHEYE_EPS, FOV_MARGIN, INT32_MAX, MAX_EXTEND


class Records(NamedTuple):
    """What project() keeps: one row per visible (image, Gaussian) pair, by image, then Gaussian."""

    batch_ids: Tensor  # [M] int64
    camera_ids: Tensor  # [M] int64
    gaussian_ids: Tensor  # [M] int64
    radii: Tensor  # [M, 2] int32, half sides in pixels of the box that bounds alpha >= 1/255
    means2d: Tensor  # [M, 2] pixels
    depths: Tensor  # [M] z in camera space
    conics: Tensor  # [M, 3] xx, xy, yy of the inverse of the blurred 2D covariance, 1/pixel^2
    opacities: Tensor  # [M] compensated when antialiased
    n_invalid: Tensor  # [B, C] int64, Gaussians dropped as invalid (not merely unseen)


def project(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    eps2d: float = 0.3,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    rasterize_mode: str = "classic",
    camera_model: str = "pinhole",
    covars: Tensor | None = None,
) -> Records:
    """Splat every Gaussian into every view of its scene and keep the visible pairs.

    Args:
        means: [B, N, 3] world positions.
        quats: [B, N, 4] wxyz, of any nonzero length; unused when covars is given.
        scales: [B, N, 3] standard deviations along the rotated axes; unused when covars is given.
        opacities: [B, N].
        viewmats: [B, C, 4, 4] world to camera, x right, y down, z forward.
        Ks: [B, C, 3, 3] intrinsics in pixels. The skew Ks[..., 0, 1] is not used.
        eps2d: pixel^2 added to the diagonal of the 2D covariance.
        near_plane, far_plane: a Gaussian is kept where near <= z <= far.
        radius_clip: pixels; a Gaussian whose both radii are at most this is dropped.
        rasterize_mode: "classic", or "antialiased": opacity times sqrt(det before / after blur).
        camera_model: "pinhole", "ortho" or "fisheye" (equidistant).
        covars: [B, N, 3, 3] world covariances in place of quats and scales; only the upper triangle
            is read.

    Returns:
        Records. Differentiable in every floating input.

    EWA splatting: Zwicker et al. 2001. Opacity-aware bounds: Radl et al. 2024 (arXiv 2402.00525),
    section B.2. Antialiasing: Yu et al. 2024 (arXiv 2311.16493).
    """
    view_ok = usable_views(viewmats, Ks)
    n_invalid = torch.full_like(view_ok, means.shape[1], dtype=torch.int64)
    # The first part has no rows: it gives the columns their types when there is no usable view.
    ids, xs = n_invalid.new_zeros(0), means.reshape(-1)[:0]
    parts = [(ids, ids, ids, ids.int().view(0, 2), xs.view(0, 2), xs, xs.view(0, 3), xs)]
    for b, c in torch.nonzero(view_ok).tolist():
        viewmat, K = viewmats[b, c], Ks[b, c]
        shape = (None, None, covars[b]) if covars is not None else (quats[b], scales[b], None)
        gaussians = (means[b], *shape, opacities[b])
        options = (width, height, eps2d, rasterize_mode, camera_model)
        with torch.no_grad():  # decide ...
            ids = torch.nonzero(_usable_gaussians(*gaussians))[:, 0]
            n_unusable = means.shape[1] - len(ids)
            z = _to_camera(means[b, ids], viewmat)[:, 2]
            ids = ids[(z >= near_plane) & (z <= far_plane)]
            s = _splat(*_take(gaussians, ids), viewmat, K, *options)
            radii, seen, invalid = _visibility(s, width, height, radius_clip)
            n_invalid[b, c] = n_unusable + invalid.sum()
            ids, radii = ids[seen], radii[seen]
        # ... then compute, with a graph, what was decided to be seen
        s = _splat(*_take(gaussians, ids), viewmat, K, *options)
        images = (torch.full_like(ids, b), torch.full_like(ids, c))
        parts.append((*images, ids, radii, s.means2d, s.depths, s.conics, s.opacities))
    return Records(*(torch.cat(column) for column in zip(*parts, strict=True)), n_invalid)


def _take(tensors: tuple[Tensor | None, ...], ids: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[ids] for x in tensors)


def usable_views(viewmats: Tensor, Ks: Tensor) -> Tensor:
    """[B, C] bool: rows 0..2 of viewmat and K finite, 3x3 block invertible, focal lengths > 0."""
    with torch.no_grad():
        r0, r1, r2 = viewmats[..., :3, :3].unbind(-2)
        det = (r0 * torch.linalg.cross(r1, r2)).sum(-1)
        finite = viewmats[..., :3, :].isfinite().all(-1).all(-1) & Ks.isfinite().all(-1).all(-1)
        return finite & (det != 0) & det.isfinite() & (Ks[..., 0, 0] > 0) & (Ks[..., 1, 1] > 0)


def _usable_gaussians(
    means: Tensor,  # [N, 3]
    quats: Tensor | None,  # [N, 4]
    scales: Tensor | None,  # [N, 3]
    covars: Tensor | None,  # [N, 3, 3]
    opacities: Tensor,  # [N]
) -> Tensor:
    """[N] bool: every number that is read is finite, and the quaternion has a length."""
    ok = means.isfinite().all(-1) & opacities.isfinite()
    if covars is not None:
        return ok & _symmetric(covars).isfinite().all(-1).all(-1)
    norm2 = (quats * quats).sum(-1)
    return ok & scales.isfinite().all(-1) & norm2.isfinite() & (norm2 > 0)


class Splats(NamedTuple):
    """2D Gaussians of one view, before anything is culled."""

    depths: Tensor  # [n]
    means2d: Tensor  # [n, 2]
    covs2d: Tensor  # [n, 3] xx, xy, yy, blurred
    dets: Tensor  # [n] of covs2d
    conics: Tensor  # [n, 3]
    opacities: Tensor  # [n]


def _splat(
    means: Tensor,  # [n, 3]
    quats: Tensor | None,  # [n, 4]
    scales: Tensor | None,  # [n, 3]
    covars: Tensor | None,  # [n, 3, 3]
    opacities: Tensor,  # [n]
    viewmat: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]
    width: int,
    height: int,
    eps2d: float,
    rasterize_mode: str,
    camera_model: str,
) -> Splats:
    """The 2D Gaussian of each 3D Gaussian in one view."""
    covs = _symmetric(covars) if covars is not None else _covariance(quats, scales)
    R = viewmat[:3, :3]
    means_c = _to_camera(means, viewmat)
    covs_c = _matmul(_matmul(R, covs), R.T)
    means2d, J = _CAMERAS[camera_model](means_c, K, width, height)
    covs2d = _matmul(_matmul(J, covs_c), J.transpose(-1, -2))

    xx, xy, yy = covs2d[:, 0, 0], covs2d[:, 0, 1], covs2d[:, 1, 1]
    det_sharp = xx * yy - xy * xy
    xx, yy = xx + eps2d, yy + eps2d
    det = xx * yy - xy * xy
    inv_det = 1 / det
    conics = torch.stack([yy * inv_det, -xy * inv_det, xx * inv_det], -1)
    if rasterize_mode == "antialiased":
        # the blur widens the Gaussian, so its peak is lowered to keep its integral
        opacities = opacities * (det_sharp / det).clamp(min=0).sqrt()
    return Splats(means_c[:, 2], means2d, torch.stack([xx, xy, yy], -1), det, conics, opacities)


def _visibility(s: Splats, width: int, height: int, radius_clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Radii of the bounding box [n, 2] int32, whether it is seen [n] and whether invalid [n]."""
    finite = torch.cat([s.means2d, s.covs2d, s.dets[:, None]], -1).isfinite().all(-1)
    solid = finite & (s.dets > 0) & (s.opacities >= ALPHA_CUT)
    # alpha >= 1/255 where the Mahalanobis distance is at most sqrt(2 ln(255 opacity))
    extend = (2 * torch.log(s.opacities / ALPHA_CUT)).sqrt().clamp(max=MAX_EXTEND)
    radii = torch.ceil(extend[:, None] * s.covs2d[:, [0, 2]].sqrt())
    # fails where there is no ellipse: a negative-definite covariance (the root), or one whose
    # inverse overflows
    bounded = torch.cat([radii, s.conics], -1).isfinite().all(-1)
    size = radii.new_tensor([width, height])
    on_image = ((s.means2d + radii > 0) & (s.means2d - radii < size)).all(-1)
    seen = solid & bounded & on_image & (radii > radius_clip).any(-1)
    # saturate through float64, where INT32_MAX is exact
    radii = radii.nan_to_num(0).double().clamp(max=INT32_MAX).int()
    return radii, seen, ~finite


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for small matrices, summed in index order: bits do not depend on how many there are."""
    return sum(a[..., :, k, None] * b[..., None, k, :] for k in range(a.shape[-1]))


def _to_camera(means: Tensor, viewmat: Tensor) -> Tensor:
    """World positions [n, 3] in camera space [n, 3]."""
    return _matmul(viewmat[:3, :3], means[..., None])[..., 0] + viewmat[:3, 3]


def _symmetric(covars: Tensor) -> Tensor:
    """[n, 3, 3] built of the upper triangle alone."""
    rows, cols = torch.triu_indices(3, 3)
    mirror = [0, 1, 2, 1, 3, 4, 2, 4, 5]  # of xx, xy, xz, yy, yz, zz
    return covars[..., rows, cols][..., mirror].reshape(covars.shape)


def _covariance(quats: Tensor, scales: Tensor) -> Tensor:
    """R(q) S S^T R(q)^T, [n, 3, 3], of quaternions [n, 4] wxyz and standard deviations [n, 3]."""
    w, x, y, z = (quats / quats.square().sum(-1, keepdim=True).sqrt()).unbind(-1)
    row_x = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y))
    row_y = (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x))
    row_z = (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    rotation = torch.stack([*row_x, *row_y, *row_z], -1).reshape(*quats.shape[:-1], 3, 3)
    half = rotation * scales[..., None, :]
    return _matmul(half, half.transpose(-1, -2))


def _intrinsics(K: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return K[0, 0], K[1, 1], K[0, 2], K[1, 2]


def _pinhole(means_c: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Pixel positions [n, 2] and their Jacobian [n, 2, 3] for x' = fx x / z + cx."""
    x, y, z = means_c.unbind(-1)
    fx, fy, cx, cy = _intrinsics(K)
    # Far outside the field of view the linearisation explodes, so the Jacobian is taken at the
    # (widened) edge of the view. The mean itself is not moved.
    margin_x, margin_y = FOV_MARGIN * 0.5 * width / fx, FOV_MARGIN * 0.5 * height / fy
    tx = z * (x / z).clamp(min=-(cx / fx + margin_x), max=(width - cx) / fx + margin_x)
    ty = z * (y / z).clamp(min=-(cy / fy + margin_y), max=(height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * tx / (z * z), zero, fy / z, -fy * ty / (z * z)], -1)
    return torch.stack([fx * x / z + cx, fy * y / z + cy], -1), J.reshape(-1, 2, 3)


def _ortho(means_c: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Pixel positions [n, 2] and their Jacobian [n, 2, 3] for x' = fx x + cx."""
    x, y, z = means_c.unbind(-1)
    fx, fy, cx, cy = _intrinsics(K)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    J = torch.stack([fx * one, zero, zero, zero, fy * one, zero], -1)
    return torch.stack([fx * x + cx, fy * y + cy], -1), J.reshape(-1, 2, 3)


def _fisheye(means_c: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Pixel positions [n, 2] and their Jacobian [n, 2, 3] for x' = fx theta x / r + cx.

    r = |(x, y)| and tan(theta) = r / z: the equidistant fisheye.
    """
    x, y, z = means_c.unbind(-1)
    fx, fy, cx, cy = _intrinsics(K)
    # vector_norm, because its gradient at 0 is 0, not NaN
    r = torch.linalg.vector_norm(means_c[..., :2], dim=-1) + FISHEYE_EPS
    theta = torch.atan2(r, z + FISHEYE_EPS)
    x2, y2, xy = x * x + FISHEYE_EPS, y * y, x * y
    r2 = x2 + y2
    radial = z / (r2 * (r2 + z * z))  # (d theta / d r) / r^2
    around = torch.atan2(r, z) / (r * r2)  # (theta / r) / r^2
    mixed, toward = xy * (radial - around), -1 / (r2 + z * z)
    row_x = (fx * (x2 * radial + y2 * around), fx * mixed, fx * x * toward)
    row_y = (fy * mixed, fy * (y2 * radial + x2 * around), fy * y * toward)
    J = torch.stack([*row_x, *row_y], -1)
    return torch.stack([fx * x * theta / r + cx, fy * y * theta / r + cy], -1), J.reshape(-1, 2, 3)


_CAMERAS = {"pinhole": _pinhole, "ortho": _ortho, "fisheye": _fisheye}
