"""GUAVA's dictionaries: its Gaussian assets and its cameras, whose matrices are transposed.

GUAVA keeps a frame's Gaussians and a camera as dictionaries of batched tensors. These functions
take what is needed out of them, so that a provider around its code is a few lines (docs/augmentation.md has one). The
rasterizer there is INRIA's: near plane `NEAR_PLANE` and alpha cap `ALPHA_CAP`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.cameras import Cameras

from .provider import Identity, Motion, Viewpoint

NEAR_PLANE, ALPHA_CAP = 0.2, 0.99

ZNEAR, ZFAR = 0.01, 100.0
"""Of the projection matrix, which the pixels do not depend on."""

ASSETS = {"xyz": 3, "rotation": 4, "scaling": 3, "opacity": 1, "features_color": None}
"""Assets and the size of their last dimension."""


def identity_of(assets: Mapping[str, Any], index: int = 0) -> Identity:
    """Opacities and colours of entry `index` of the batch. They are the same in every frame.

    Raises:
        ValueError, TypeError: an asset is missing or of another shape; names it.
    """
    found = _assets(assets, ("opacity", "features_color"), index)
    return Identity(found["opacity"][:, 0].contiguous(), found["features_color"].contiguous())


def motion_of(assets: Mapping[str, Any], index: int = 0) -> Motion:
    """Means, rotations (w x y z) and scales of entry `index` of the batch.

    Raises:
        ValueError, TypeError: an asset is missing or of another shape; names it.
    """
    found = _assets(assets, ("xyz", "rotation", "scaling"), index)
    return Motion(found["xyz"], found["rotation"], found["scaling"])


def cameras_of(camera: Mapping[str, Any]) -> Cameras:
    """Cameras of a camera dictionary, one for each entry of its batch.

    `world_view_transform` [B, 4, 4] is the transposed world-to-camera matrix, `full_proj_transform` that times the
    transposed projection, from which focal lengths and principal point are taken; `tanfovx` and `tanfovy` must agree
    with it. INRIA's pixel p lies at (ndc + 1) / 2 x size - 1/2, which is our p + 0.5: the middle of the image is at
    width / 2.

    Raises:
        ValueError, TypeError: an entry is missing, of another shape, or they contradict each other.
    """
    needed = ("world_view_transform", "full_proj_transform", "tanfovx", "tanfovy", "image_height", "image_width")
    missing = [name for name in needed if name not in camera]
    if missing:
        raise ValueError(f"camera must hold {', '.join(needed)}; {', '.join(missing)} is missing")
    world_view, full = (_matrices(camera[name], name) for name in needed[:2])
    if len(world_view) != len(full):
        raise ValueError(f"full_proj_transform must have {len(world_view)} matrices, got {len(full)}")
    height, width = (_size(camera[name], name) for name in needed[4:])
    projections = (np.linalg.inv(world_view) @ full).transpose(0, 2, 1)  # [B, 4, 4], acting on columns
    Ks = np.zeros((len(world_view), 3, 3))
    Ks[:, 0, 0], Ks[:, 1, 1] = projections[:, 0, 0] * width / 2, projections[:, 1, 1] * height / 2
    Ks[:, 0, 2], Ks[:, 1, 2] = (1 + projections[:, 0, 2]) * width / 2, (1 + projections[:, 1, 2]) * height / 2
    Ks[:, 2, 2] = 1
    for name, focal, size in (("tanfovx", Ks[:, 0, 0], width), ("tanfovy", Ks[:, 1, 1], height)):
        tangents = _numbers(camera[name], name).reshape(-1)
        if len(tangents) not in (1, len(Ks)) or not np.allclose(size / (2 * focal), tangents, rtol=1e-3, atol=0):
            raise ValueError(
                f"{name} must be the tangent of half the field of view that full_proj_transform has, "
                f"{size / (2 * focal[0]):g}, got {tangents[0]:g}"
            )
    viewmats = world_view.transpose(0, 2, 1)
    return Cameras(torch.from_numpy(viewmats).float(), torch.from_numpy(Ks).float(), width, height)


def camera_dictionary(viewmats: Any, Ks: Any, width: int, height: int) -> dict[str, Any]:
    """The inverse of `cameras_of`: GUAVA's dictionary for world-to-camera matrices [B, 4, 4] and intrinsics
    [B, 3, 3], float32 on the CPU, for what of its code asks for one."""
    views, intrinsics = _matrices(viewmats, "viewmats"), _numbers(Ks, "Ks")
    if intrinsics.shape != (len(views), 3, 3):
        raise ValueError(f"Ks must be [{len(views)}, 3, 3], got {list(intrinsics.shape)}")
    projections = np.zeros((len(views), 4, 4))
    projections[:, 0, 0], projections[:, 1, 1] = 2 * intrinsics[:, 0, 0] / width, 2 * intrinsics[:, 1, 1] / height
    projections[:, 0, 2] = 2 * intrinsics[:, 0, 2] / width - 1
    projections[:, 1, 2] = 2 * intrinsics[:, 1, 2] / height - 1
    projections[:, 2, 2], projections[:, 2, 3] = ZFAR / (ZFAR - ZNEAR), -ZFAR * ZNEAR / (ZFAR - ZNEAR)
    projections[:, 3, 2] = 1
    world_view = views.transpose(0, 2, 1)
    made = {
        "world_view_transform": world_view,
        "full_proj_transform": world_view @ projections.transpose(0, 2, 1),
        "tanfovx": width / (2 * intrinsics[:, 0, 0]),
        "tanfovy": height / (2 * intrinsics[:, 1, 1]),
        "camera_center": np.linalg.inv(views)[:, :3, 3],
    }
    found: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(v)).float() for name, v in made.items()}
    return found | {"image_height": height, "image_width": width}


def viewpoint_of(camera: Mapping[str, Any], target: Sequence[float] | Tensor, index: int = 0) -> Viewpoint:
    """The camera to start from: entry `index` of a camera dictionary, and the point to turn around, such as the head
    of the first frame."""
    cameras = cameras_of(camera)
    target = target.detach().cpu().numpy() if isinstance(target, Tensor) else target
    return Viewpoint(cameras.viewmats[index], cameras.Ks[index], cameras.width, cameras.height, np.asarray(target))


def _assets(assets: Mapping[str, Any], names: Sequence[str], index: int) -> dict[str, Tensor]:
    found = {}
    for name in names:
        if name not in assets:
            raise ValueError(f"assets must hold {', '.join(names)}; {name} is missing")
        tensor, width = assets[name], ASSETS[name]
        good = isinstance(tensor, Tensor) and tensor.dim() == 3 and width in (None, tensor.shape[2])
        if not good:
            raise ValueError(f"{name} must be a tensor [B, N, {width or 'D'}], got {check.describe(tensor)}")
        if not -len(tensor) <= index < len(tensor):
            raise ValueError(f"index must be one of the {len(tensor)} entries of {name}, got {index}")
        found[name] = tensor[index].detach().float()
    return found


def _numbers(value: Any, name: str) -> np.ndarray:
    value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    found = np.asarray(value, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite")
    return found


def _matrices(value: Any, name: str) -> np.ndarray:
    found = _numbers(value, name)
    if found.ndim not in (2, 3) or found.shape[-2:] != (4, 4):
        raise ValueError(f"{name} must be [B, 4, 4], got {list(found.shape)}")
    return found.reshape(-1, 4, 4)


def _size(value: Any, name: str) -> int:
    sizes = {int(x) for x in _numbers(value, name).reshape(-1)}
    if len(sizes) != 1:
        raise ValueError(f"{name} must be one size for all cameras, got {sorted(sizes)}")
    return check.integer(name, sizes.pop(), 1, check.MAX_IMAGE_SIZE, " pixels")
