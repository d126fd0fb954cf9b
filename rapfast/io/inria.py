"""Cameras in the cameras.json that INRIA's 3DGS training writes, and viewers read.

A list of objects with position [3] (the camera's centre), rotation [3][3] (camera-to-world, OpenCV axes), fx, fy,
width and height. The format puts the principal point in the middle; where ours is not there we add cx and cy,
which other readers ignore, and read them back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .files import PathLike, array, check_regular, integer, load_json, number, shorten
from .views import View, make_view, pinhole


def read_cameras_json(path: PathLike) -> list[View]:
    """Views of a cameras.json in the file's order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or an entry is damaged; names the entry and the value.
    """
    path = check_regular(path)
    return views_of(load_json(path), path)


def views_of(content: Any, path: Path) -> list[View]:
    """The same from parsed JSON; `path` is for messages."""
    if not isinstance(content, list):
        raise ValueError(f"{path}: must be a list of cameras, got {shorten(content)}")
    if not content:
        raise ValueError(f"{path}: has no cameras")
    views = []
    for index, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: entry {index} must be an object, got {shorten(entry)}")
        name = entry.get("img_name", f"{index:05d}")
        where = f"{path}: entry {index} ({shorten(name)})"
        missing = [key for key in ("position", "rotation", "fx", "fy", "width", "height") if key not in entry]
        if missing:
            raise ValueError(f"{where}: has no {', '.join(missing)}")
        matrix = np.empty((3, 4))
        matrix[:, :3] = array(entry["rotation"], ((3, 3),), f"{where}: rotation")
        matrix[:, 3] = array(entry["position"], ((3,),), f"{where}: position")
        fx, fy = (number(entry[key], f"{where}: {key}") for key in ("fx", "fy"))
        width, height = (integer(entry[key], f"{where}: {key}") for key in ("width", "height"))
        cx = number(entry["cx"], f"{where}: cx") if "cx" in entry else width / 2
        cy = number(entry["cy"], f"{where}: cy") if "cy" in entry else height / 2
        views.append(make_view(where, str(name), matrix, pinhole(fx, fy, cx, cy), (width, height), inverted=True))
    return views


def entries_of(views: list[View]) -> list[dict[str, Any]]:
    """JSON-ready entries for `views`, the inverse of `views_of`."""
    entries = []
    for index, view in enumerate(views):
        pose = np.linalg.inv(view.world_to_camera)
        k = view.intrinsics
        entry: dict[str, Any] = {
            "id": index,
            "img_name": view.name,
            "width": view.width,
            "height": view.height,
            "position": pose[:3, 3].tolist(),
            "rotation": pose[:3, :3].tolist(),
            "fy": float(k[1, 1]),
            "fx": float(k[0, 0]),
        }
        if (k[0, 2], k[1, 2]) != (view.width / 2, view.height / 2):
            entry["cx"], entry["cy"] = float(k[0, 2]), float(k[1, 2])
        entries.append(entry)
    return entries
