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
    as_given = []  # places of the views whose matrices are still as their camera has them
    for name, camera in named:
        if isinstance(camera, Cameras):
            viewmats, Ks = (matrices.to(like.device, like.dtype) for matrices in (camera.viewmats, camera.Ks))
            for i, (viewmat, K) in enumerate(zip(viewmats, Ks, strict=True)):
                views.append(View(f"{name}[{i}]", None, viewmat, K, camera.width, camera.height))
        else:
            as_given.append(len(views))
            views.append(_read(camera, name))
    if as_given:
        # Together, so that matrices on the CPU are one transfer and matrices on the GPU one wait.
        given = [views[i] for i in as_given]
        matrices = _stacked([view.viewmat for view in given], like)
        turned = _transposed([view.name for view in given], matrices, layout)
        matrices, Ks = (t.to(like.device, like.dtype) for t in (matrices, _stacked([view.K for view in given], like)))
        for i, matrix, K, is_turned in zip(as_given, matrices, Ks, turned, strict=True):
            views[i] = views[i]._replace(viewmat=matrix.T if is_turned else matrix, K=K)
    return views


def _stacked(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1:
        tensors = [tensor.to(like.device, like.dtype) for tensor in tensors]
    return torch.stack(list(tensors))


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


def _read(camera: Any, name: str) -> View:
    matrix = _matrix(f"{name}.world_view_transform", _attribute(camera, "world_view_transform", name), 4)
    size = [
        check.integer(f"{name}.{side}", _attribute(camera, side, name), 1, check.MAX_IMAGE_SIZE, " pixels")
        for side in ("image_width", "image_height")
    ]
    K = getattr(camera, "K", None)
    if K is not None:
        K = _matrix(f"{name}.K", K() if callable(K) else K, 3)
    else:
        K = _intrinsics(camera, name, *size)
    return View(name, camera, matrix, K, *size)


def _attribute(camera: Any, attribute: str, name: str) -> Any:
    value = getattr(camera, attribute, None)
    if value is None:
        raise TypeError(
            f"{name} must be a rapfast.Cameras or have the attributes world_view_transform, image_width, image_height "
            f"and K (or FoVx and FoVy), got a {type(camera).__name__} without {attribute}"
        )
    return value


def _matrix(name: str, value: Any, side: int) -> Tensor:
    try:
        matrix = check.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers [{side}, {side}], got {check.describe(value)}") from None
    if tuple(matrix.shape) != (side, side) or not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point [{side}, {side}], got {check.describe(matrix)}")
    return matrix


def _intrinsics(camera: Any, name: str, width: int, height: int) -> Tensor:
    """[3, 3] float64 of the fields of view: the focal length is half the side over the tangent of half the angle."""
    K = torch.eye(3, dtype=torch.float64, device="cpu")
    for axis, (attribute, side) in enumerate((("FoVx", width), ("FoVy", height))):
        angle = check.number(f"{name}.{attribute}", _attribute(camera, attribute, name), what="an angle in radians")
        if not 0 < angle < math.pi:
            raise ValueError(f"{name}.{attribute} must be an angle between 0 and pi radians, got {angle}")
        K[axis, axis] = side / (2 * math.tan(angle / 2))
        K[axis, 2] = side / 2
    return K


def _transposed(names: Sequence[str], matrices: Tensor, layout: str | None) -> list[bool]:
    """Whether each of matrices [C, 4, 4] has to be transposed to be world to camera."""
    if layout is not None:
        return [layout == "transposed"] * len(names)
    matrices = matrices.detach().cpu().double()
    affine = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device="cpu")
    in_row, in_column = ((part - affine).abs().amax(-1).tolist() for part in (matrices[:, 3], matrices[:, :, 3]))
    verdicts: list[bool | None] = []
    for name, matrix, row, column in zip(names, matrices, in_row, in_column, strict=True):
        if not min(row, column) <= _TOLERANCE or row != row:
            raise ValueError(
                f"{name}.world_view_transform must have (0, 0, 0, 1) as its last column (transposed, as 3DGS has it) "
                f"or last row, got {matrix.tolist()}"
            )
        if row != column:
            verdicts.append(column < row)
        else:  # there is no translation, and nothing tells a rotation from its inverse
            verdicts.append(None)
    known = set(verdicts) - {None}
    for i, verdict in enumerate(verdicts):
        if verdict is not None:
            continue
        if torch.equal(matrices[i], matrices[i].T):
            verdicts[i] = False
        elif len(known) == 1:
            (verdicts[i],) = known
        else:
            raise ValueError(
                f"{names[i]}.world_view_transform has no translation and may be read either way: give "
                'viewmat_layout="transposed" (as 3DGS has it) or "plain"'
            )
    return verdicts  # type: ignore[return-value]
