"""Stage 1: every Gaussian into every camera, keeping the visible pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import (
    RECORD_FIELDS,
    address,
    aligned,
    cpu_arguments,
    cuda_arguments,
    define,
    native,
    scratch,
)

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


def input_arguments(
    means, quats, scales, covars, opacities, viewmats, Ks, width, height, camera_model, antialiased,
    eps2d, near_plane, far_plane, radius_clip,
):  # fmt: skip
    """The inputs of the project stage as the native module takes them."""
    return {
        "n_scenes": means.shape[0],
        "n_cameras": viewmats.shape[1],
        "n_gaussians": means.shape[1],
        "width": width,
        "height": height,
        "camera_model": camera_model,
        "antialiased": antialiased,
        "eps2d": eps2d,
        "near_plane": near_plane,
        "far_plane": far_plane,
        "radius_clip": radius_clip,
        "means": address(means),
        "quats": address(quats),
        "scales": address(scales),
        "covars": address(covars),
        "opacities": address(opacities),
        "viewmats": address(viewmats),
        "Ks": address(Ks),
    }


def _outputs(out: Records) -> dict[str, int]:
    return {name: address(tensor) for name, tensor in out._asdict().items()}


def _cpu(*inputs):
    means, viewmats, capacity = inputs[0], inputs[5], inputs[-1]
    out = _allocate(means, viewmats, capacity)
    native.project(**cpu_arguments(means), **input_arguments(*inputs[:-1]), capacity=capacity, **_outputs(out))
    return tuple(out)


def _cuda(means, quats, *inputs):
    viewmats, capacity = inputs[3], inputs[-1]
    quats = aligned(quats)
    out = _allocate(means, viewmats, capacity)
    n_images = viewmats.shape[0] * viewmats.shape[1]
    size = native.project_scratch_size(
        n_images=n_images, n_gaussians=means.shape[1], capacity=capacity, device=means.device.index
    )
    room, counts = scratch(means, size), means.new_empty((2,), dtype=torch.int64)
    native.project_cuda(
        **cuda_arguments(means),
        **input_arguments(means, quats, *inputs[:-1]),
        capacity=capacity,
        scratch=address(room),
        counts=address(counts),
        **_outputs(out),
    )
    return tuple(out)


project_op = define(
    "project(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, "
    "Tensor Ks, int width, int height, int camera_model, bool antialiased, float eps2d, float near_plane, "
    "float far_plane, float radius_clip, int capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def _visible_fake(
    means, quats, scales, covars, opacities, viewmats, Ks, width, height, camera_model, antialiased, eps2d, near_plane,
    far_plane, radius_clip,
):  # fmt: skip
    return tuple(_allocate(means, viewmats, torch.library.get_ctx().new_dynamic_size()))


def _visible(*inputs):
    return tuple(_with_room(inputs, None))


# As many rows as there are records: what a compiler can trace, since no size is read in between.
project_visible_op = define(
    "project_visible(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, "
    "Tensor Ks, int width, int height, int camera_model, bool antialiased, float eps2d, float near_plane, "
    "float far_plane, float radius_clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_visible_fake,
    cpu=_visible,
    cuda=_visible,
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
    inputs = (
        means, quats, scales, covars, opacities, viewmats, Ks, width, height, CAMERA_MODELS[camera_model], antialiased,
        eps2d, near_plane, far_plane, radius_clip,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return Records(*project_visible_op(*inputs))
    return _with_room(inputs, capacity)


def _with_room(inputs: tuple[Any, ...], capacity: int | None) -> Records:
    means, viewmats = inputs[0], inputs[5]
    n_pairs = viewmats.shape[0] * viewmats.shape[1] * means.shape[1]
    if capacity is None:
        free = _FREE_CAPACITY if means.device.type == "cpu" else 0
        capacity = min(n_pairs, max(free, n_pairs // 4))
    out = Records(*project_op(*inputs, capacity))
    n_records = int(out.image_offsets[-1])
    if n_records > capacity:
        out = Records(*project_op(*inputs, n_records))
    out = out._replace(
        records=out.records[:n_records],
        radii=out.radii[:n_records],
        gaussian_ids=out.gaussian_ids[:n_records],
    )
    return out if means.device.type == "cpu" else without_dead(out)


def image_ids(records: Records) -> Tensor:
    """[M] int64, the image of each record."""
    counts = records.image_offsets.diff()
    images = torch.arange(counts.shape[0], device=counts.device)
    return torch.repeat_interleave(images, counts, output_size=records.records.shape[0])


def without_dead(records: Records) -> Records:
    """The visible records alone. On the GPU a pair that passes the cheap frustum test and not the full one keeps
    its row, with radii 0, until somebody looks."""
    visible = records.radii[:, 0] > 0
    counts = torch.bincount(image_ids(records)[visible], minlength=records.n_invalid.shape[0])
    offsets = torch.zeros_like(records.image_offsets)
    torch.cumsum(counts, 0, out=offsets[1:])
    return Records(
        records=records.records[visible],
        radii=records.radii[visible],
        gaussian_ids=records.gaussian_ids[visible],
        image_offsets=offsets,
        n_invalid=records.n_invalid,
    )
