"""Cameras of a transforms.json: nerfstudio's, instant-ngp's and the original NeRF's (Blender).

Conventions (https://docs.nerf.studio/quickstart/data_conventions.html): transform_matrix is camera-to-world with
OpenGL axes (y up, looking along -z); intrinsics are pixels, global or per frame. Poses are taken as written:
`applied_transform`, `scale`, `offset` and the like describe how they were made, and are not undone.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import PathLike, array, check_regular, integer, load_json, number, shorten
from .views import View, make_view, pinhole

_PINHOLE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_IMAGE_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".webp")


def read_transforms(path: PathLike) -> list[View]:
    """Views of a transforms.json in the file's order.

    A frame's own value wins over the file's. The focal length comes from fl_x (and fl_y, else fl_x), or from
    camera_angle_x (and camera_angle_y); cx and cy default to the middle; w and h default to the size that the
    header of the image file says, where that file is there.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or a frame is damaged or has distortion; names the frame and the value.
    """
    path = check_regular(path)
    return views_of(load_json(path), path)


def views_of(content: Any, path: Path) -> list[View]:
    """The same from parsed JSON; `path` is for messages and for finding the images."""
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
        raise ValueError(f"{path}: must be an object with a list 'frames'")
    if not content["frames"]:
        raise ValueError(f"{path}: has no frames")
    views = []
    for index, frame in enumerate(content["frames"]):
        if not isinstance(frame, dict):
            raise ValueError(f"{path}: frame {index} must be an object, got {shorten(frame)}")
        name = frame.get("file_path", f"{index:05d}")
        if not isinstance(name, str):
            raise ValueError(f"{path}: frame {index}: file_path must be text, got {shorten(name)}")
        where = f"{path}: frame {index} ({shorten(name)})"
        views.append(_view(where, name, frame, ChainMap(frame, content), path.parent))
    return views


def _view(where: str, name: str, frame: dict, settings: Mapping, folder: Path) -> View:
    """`settings` is the file's values overlaid by the frame's."""
    _refuse_distortion(where, settings)
    if "transform_matrix" not in frame:
        raise ValueError(f"{where}: has no transform_matrix")
    matrix = array(frame["transform_matrix"], ((4, 4), (3, 4)), f"{where}: transform_matrix").copy()
    matrix[:3, 1:3] *= -1  # OpenGL's camera axes to OpenCV's: y and z turn round

    width, height = _size(where, settings, name, folder)
    fx = _focal(where, settings, "x", width)
    fy = _focal(where, settings, "y", height)
    if fx is None:
        raise ValueError(f"{where}: has neither fl_x nor camera_angle_x")
    cx = number(settings["cx"], f"{where}: cx") if "cx" in settings else width / 2
    cy = number(settings["cy"], f"{where}: cy") if "cy" in settings else height / 2
    intrinsics = pinhole(fx, fx if fy is None else fy, cx, cy)
    return make_view(where, name, matrix, intrinsics, (width, height), inverted=True)


def _refuse_distortion(where: str, settings: Mapping) -> None:
    model = settings.get("camera_model", "PINHOLE")
    if model not in _PINHOLE_MODELS:
        raise ValueError(f"{where}: camera_model {shorten(model)} is not supported, only {', '.join(_PINHOLE_MODELS)}")
    if settings.get("is_fisheye"):
        raise ValueError(f"{where}: is_fisheye is set, only pinhole cameras are read")
    for key in _DISTORTION:
        if key in settings and number(settings[key], f"{where}: {key}") != 0:
            raise ValueError(
                f"{where}: {key} = {shorten(settings[key])} is lens distortion, which is not rendered; "
                "undistort the images first"
            )


def _focal(where: str, settings: Mapping, axis: str, side: int) -> float | None:
    key, angle_key = f"fl_{axis}", f"camera_angle_{axis}"
    if key in settings:
        focal = number(settings[key], f"{where}: {key}")
        if focal <= 0:
            raise ValueError(f"{where}: {key} must be positive, got {focal:g}")
        return focal
    if axis == "y" and "fl_x" in settings:
        return None  # square pixels; an angle must not overrule a focal length
    if angle_key in settings:
        angle = number(settings[angle_key], f"{where}: {angle_key}")
        if not 0 < angle < math.pi:
            raise ValueError(f"{where}: {angle_key} must be within 0..pi radians, got {angle:g}")
        return 0.5 * side / math.tan(0.5 * angle)
    return None


def _size(where: str, settings: Mapping, name: str, folder: Path) -> tuple[int, int]:
    if "w" in settings and "h" in settings:
        return integer(settings["w"], f"{where}: w"), integer(settings["h"], f"{where}: h")
    for suffix in _IMAGE_SUFFIXES:
        candidate = folder / (name + suffix)
        if "\0" not in name and len(name) < 4096 and candidate.is_file():
            return _image_size(where, candidate)
    raise ValueError(f"{where}: has no w and h, and there is no image file beside the JSON to take them from")


def _image_size(where: str, path: Path) -> tuple[int, int]:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            f"{where}: has no w and h; reading them from {path} needs Pillow: pip install pillow"
        ) from None
    try:
        with Image.open(path) as image:  # reads the header only
            return image.size
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise anything on a damaged file
        raise ValueError(f"{where}: has no w and h, and the header of {path} cannot be read: {error}") from None
