"""Stage 1: every Gaussian into every camera, keeping the visible pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import RECORD_FIELDS, address, define, native, native_arguments

CAMERA_MODELS = {"pinhole": 0, "ortho": 1, "fisheye": 2}

# Rows that may be allocated for records before their number is known. Untouched pages cost nothing,
# so up to here every pair has its row; past it a second pass is cheaper than the address space.
_FREE_CAPACITY = 1 << 24


class Records(NamedTuple):
    """The visible pairs, ordered by image, then by Gaussian."""

    records: Tensor  # [M, 8] see RECORD_FIELDS
    radii: Tensor  # [M, 2] int32, pixels
    gaussian_ids: Tensor  # [M] int32, index within the scene
    image_offsets: Tensor  # [I + 1] int64, first record of each image
    n_invalid: Tensor  # [I] int64, Gaussians culled as non-finite or degenerate


def _allocate(means: Tensor, viewmats: Tensor, capacity: int) -> Records:
    n_images = viewmats.shape[0] * viewmats.shape[1]
    return Records(
        records=means.new_empty((capacity, len(RECORD_FIELDS))),
        radii=means.new_empty((capacity, 2), dtype=torch.int32),
        gaussian_ids=means.new_empty((capacity,), dtype=torch.int32),
        image_offsets=means.new_empty((n_images + 1,), dtype=torch.int64),
        n_invalid=means.new_empty((n_images,), dtype=torch.int64),
    )


def _fake(
    means, quats, scales, covars, opacities, viewmats, Ks, width, height, camera_model, antialiased,
    eps2d, near_plane, far_plane, radius_clip, capacity,
):  # fmt: skip
    return tuple(_allocate(means, viewmats, capacity))


def _cpu(
    means, quats, scales, covars, opacities, viewmats, Ks, width, height, camera_model, antialiased,
    eps2d, near_plane, far_plane, radius_clip, capacity,
):  # fmt: skip
    out = _allocate(means, viewmats, capacity)
    native.project(
        **native_arguments(means),
        n_scenes=means.shape[0],
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        capacity=capacity,
        width=width,
        height=height,
        camera_model=camera_model,
        antialiased=antialiased,
        eps2d=eps2d,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        means=address(means),
        quats=address(quats),
        scales=address(scales),
        covars=address(covars),
        opacities=address(opacities),
        viewmats=address(viewmats),
        Ks=address(Ks),
        **{name: address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


project_op = define(
    "project(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, "
    "Tensor Ks, int width, int height, int camera_model, bool antialiased, float eps2d, float near_plane, "
    "float far_plane, float radius_clip, int capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cpu,
    _fake,
)


def project(
    means: Tensor,  # [B, N, 3]
    quats: Tensor | None,  # [B, N, 4]
    scales: Tensor | None,  # [B, N, 3]
    covars: Tensor | None,  # [B, N, 3, 3]
    opacities: Tensor,  # [B, N]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    width: int,
    height: int,
    *,
    camera_model: str = "pinhole",
    antialiased: bool = False,
    eps2d: float = 0.3,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    capacity: int | None = None,
) -> Records:
    """Projects all Gaussians of each scene into all its cameras (EWA) and keeps the visible pairs.

    ``capacity`` is the number of records to make room for at first; with too little room the stage runs a
    second time, and the records are the same for every value.
    """
    n_pairs = viewmats.shape[0] * viewmats.shape[1] * means.shape[1]
    if capacity is None:
        capacity = min(n_pairs, max(_FREE_CAPACITY, n_pairs // 4))

    def run(room: int) -> Records:
        return Records(*project_op(
            means, quats, scales, covars, opacities, viewmats, Ks, width, height,
            CAMERA_MODELS[camera_model], antialiased, eps2d, near_plane, far_plane, radius_clip, room,
        ))  # fmt: skip

    out = run(capacity)
    n_records = int(out.image_offsets[-1])
    if n_records > capacity:
        out = run(n_records)
    return out._replace(
        records=out.records[:n_records],
        radii=out.radii[:n_records],
        gaussian_ids=out.gaussian_ids[:n_records],
    )
