"""Cameras as RAP and 3DGS describe them, read attribute by attribute.

Read of an object `camera`:

    world_view_transform  [4, 4] world to camera, OpenCV axes, transposed as in 3DGS or as it is (see `read_cameras`)
    image_width, image_height  pixels of the picture to render
    K                     [3, 3] intrinsics in pixels, or a method that returns them; where it is absent:
    FoVx, FoVy            radians; the principal point is then the middle of the picture
    original_image        [3, H, W] in 0..1, the reference image; only where none is given otherwise
    colornet_inter_weight the view's weight; only where none is given otherwise, and it may be absent

A `rapfast.Cameras` stands for its C views in their order; it has no images and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.cameras import Cameras

LAYOUTS = ("transposed", "plain")

_AFFINE = (0.0, 0.0, 0.0, 1.0)
_TOLERANCE = 1e-5
"""What may be left of (0, 0, 0, 1) by an inversion in float32."""


class View(NamedTuple):
    """One view to render, in the scene's dtype and on its device."""

    name: str  # as error sentences call it
    camera: Any  # where its image and weight may be found
    viewmat: Tensor  # [4, 4] world to camera
    K: Tensor  # [3, 3] pixels
    width: int
    height: int


def read_cameras(cameras: Any, like: Tensor, layout: str | None = None) -> list[View]:
    """The views of a sequence of cameras, or of one `rapfast.Cameras`.

    Args:
        cameras: a `rapfast.Cameras`, or a sequence whose items are those or objects with the attributes above.
        like: dtype and device of the results.
        layout: of `world_view_transform`: "transposed" (3DGS: the translation is its last row), "plain" (it is its
            last column), None: seen from where (0, 0, 0, 1) stands.

    Raises:
        TypeError, ValueError: naming the camera, the attribute, what was expected and what came.
    """
    if isinstance(cameras, Cameras):
        return _read_all([("cameras", cameras)], like, layout)
    if isinstance(cameras, (str, bytes)) or not isinstance(cameras, Sequence):
        raise TypeError(f"cameras must be a rapfast.Cameras or a sequence of cameras, got a {type(cameras).__name__}")
    return _read_all([(f"cameras[{i}]", camera) for i, camera in enumerate(cameras)], like, layout)


def read_camera(camera: Any, like: Tensor, layout: str | None = None, name: str = "camera") -> View:
    """One view, of an object with the attributes above or of a `rapfast.Cameras` of one camera."""
    if isinstance(camera, Cameras) and len(camera) != 1:
        raise ValueError(f"{name} must be one camera, got a rapfast.Cameras of {len(camera)}")
    (view,) = _read_all([(name, camera)], like, layout)
    return view._replace(name=name)


def _read_all(named: Sequence[tuple[str, Any]], like: Tensor, layout: str | None) -> list[View]:
    if layout is not None:
        check.choice("viewmat_layout", layout, LAYOUTS)
    views: list[View] = []
    as_given = []  # places of the views whose matrix is still as their camera has it
    for name, camera in named:
        if isinstance(camera, Cameras):
            viewmats, Ks = (matrices.detach().to(like.device, like.dtype) for matrices in (camera.viewmats, camera.Ks))
            for i, (viewmat, K) in enumerate(zip(viewmats, Ks, strict=True)):
                views.append(View(f"{name}[{i}]", None, viewmat, K, camera.width, camera.height))
        else:
            as_given.append(len(views))
            views.append(_read(camera, like, name))
    for i, is_transposed in zip(as_given, _transposed([views[i] for i in as_given], layout), strict=True):
        if is_transposed:
            views[i] = views[i]._replace(viewmat=views[i].viewmat.T)
    return views


def reference_image(view: View) -> Tensor:
    """[3, H, W] of the view's own camera.

    Raises:
        ValueError: its camera carries none.
    """
    image = getattr(view.camera, "original_image", None)
    if image is None:
        raise ValueError(
            f"{view.name} must carry its reference image as original_image [3, H, W] in 0..1; give images or "
            "feature_maps otherwise"
        )
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(
            f"{view.name}.original_image must be floating point [3, H, W] in 0..1, got {check.describe(image)}"
        )
    return image


def _read(camera: Any, like: Tensor, name: str) -> View:
    matrix = _matrix(f"{name}.world_view_transform", _attribute(camera, "world_view_transform", name), 4, like)
    size = [
        check.integer(f"{name}.{side}", _attribute(camera, side, name), 1, check.MAX_IMAGE_SIZE, " pixels")
        for side in ("image_width", "image_height")
    ]
    K = getattr(camera, "K", None)
    if K is not None:
        K = _matrix(f"{name}.K", K() if callable(K) else K, 3, like)
    else:
        K = _intrinsics(camera, name, *size).to(like.device, like.dtype)
    return View(name, camera, matrix, K, *size)


def _attribute(camera: Any, attribute: str, name: str) -> Any:
    value = getattr(camera, attribute, None)
    if value is None:
        raise TypeError(
            f"{name} must be a rapfast.Cameras or have the attributes world_view_transform, image_width, image_height "
            f"and K (or FoVx and FoVy), got a {type(camera).__name__} without {attribute}"
        )
    return value


def _matrix(name: str, value: Any, side: int, like: Tensor) -> Tensor:
    try:
        matrix = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers [{side}, {side}], got {check.describe(value)}") from None
    if tuple(matrix.shape) != (side, side) or not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point [{side}, {side}], got {check.describe(matrix)}")
    return matrix.to(like.device, like.dtype)


def _intrinsics(camera: Any, name: str, width: int, height: int) -> Tensor:
    """[3, 3] float64 of the fields of view: the focal length is half the side over the tangent of half the angle."""
    K = torch.eye(3, dtype=torch.float64)
    for axis, (attribute, side) in enumerate((("FoVx", width), ("FoVy", height))):
        angle = check.number(f"{name}.{attribute}", _attribute(camera, attribute, name), what="an angle in radians")
        if not 0 < angle < math.pi:
            raise ValueError(f"{name}.{attribute} must be an angle between 0 and pi radians, got {angle}")
        K[axis, axis] = side / (2 * math.tan(angle / 2))
        K[axis, 2] = side / 2
    return K


def _transposed(views: Sequence[View], layout: str | None) -> list[bool]:
    """Whether each matrix has to be transposed to be world to camera."""
    if layout is not None or not views:
        return [layout == "transposed"] * len(views)
    matrices = torch.stack([view.viewmat.detach() for view in views]).cpu().double()  # one wait for the device
    affine = torch.tensor(_AFFINE, dtype=torch.float64)
    row, column = ((part - affine).abs().amax(-1) for part in (matrices[:, 3], matrices[:, :, 3]))
    verdicts: list[bool | None] = []
    for view, matrix, off_row, off_column in zip(views, matrices, row.tolist(), column.tolist(), strict=True):
        if not min(off_row, off_column) <= _TOLERANCE:  # also NaN
            raise ValueError(
                f"{view.name}.world_view_transform must have (0, 0, 0, 1) as its last column (transposed, as 3DGS has "
                f"it) or last row, got {matrix.tolist()}"
            )
        if off_row != off_column:
            verdicts.append(off_column < off_row)
        else:
            # No translation, so nothing tells a rotation from its inverse, unless they are the same.
            verdicts.append(False if torch.equal(matrix, matrix.T) else None)
    known = {
        verdict for verdict, off_row, off_column in zip(verdicts, row, column, strict=True) if off_row != off_column
    }
    if None in verdicts and len(known) != 1:
        raise ValueError(
            f"{views[verdicts.index(None)].name}.world_view_transform has no translation and may be read either way: "
            'give viewmat_layout="transposed" (as 3DGS has it) or "plain"'
        )
    return [next(iter(known)) if verdict is None else verdict for verdict in verdicts]
