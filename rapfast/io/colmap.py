"""Cameras of a COLMAP model: cameras and images, binary or text.

Formats: https://colmap.github.io/format.html. A pose there is world-to-camera in OpenCV axes, which is what
the renderer takes. 2D points are skipped, points3D is not read.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from .files import PathLike, check_regular, open_regular, shorten
from .views import View, make_view, pinhole, rotation_of

# Model id -> name, number of parameters, how many of them are not distortion (None: not a pinhole at heart).
_MODELS: dict[int, tuple[str, int, int | None]] = {
    0: ("SIMPLE_PINHOLE", 3, 3),
    1: ("PINHOLE", 4, 4),
    2: ("SIMPLE_RADIAL", 4, 3),
    3: ("RADIAL", 5, 3),
    4: ("OPENCV", 8, 4),
    5: ("OPENCV_FISHEYE", 8, None),
    6: ("FULL_OPENCV", 12, 4),
    7: ("FOV", 5, None),
    8: ("SIMPLE_RADIAL_FISHEYE", 4, None),
    9: ("RADIAL_FISHEYE", 5, None),
    10: ("THIN_PRISM_FISHEYE", 12, None),
    11: ("RAD_TAN_THIN_PRISM_FISHEYE", 16, None),
}
_BY_NAME = {name: (name, count, plain) for name, count, plain in _MODELS.values()}
_SUPPORTED = ", ".join(name for name, _, plain in _MODELS.values() if plain is not None)


class _Intrinsics:
    """Intrinsics and size of one COLMAP camera."""

    def __init__(self, where: str, model: tuple[str, int, int | None], size: tuple[int, int], params: list[float]):
        name, count, plain = model
        if plain is None:
            raise ValueError(
                f"{where}: camera model {name} is not supported, only {_SUPPORTED}; undistort the images first"
            )
        if len(params) != count:
            raise ValueError(f"{where}: camera model {name} has {count} parameters, got {len(params)}")
        if any(value != 0 for value in params[plain:]):
            raise ValueError(
                f"{where}: camera model {name} has distortion {params[plain:]}, which is not rendered; "
                "undistort the images first (colmap image_undistorter)"
            )
        fx, fy, cx, cy = params[:4] if plain == 4 else (params[0], params[0], params[1], params[2])
        self.matrix = pinhole(fx, fy, cx, cy)
        self.size = size


def is_model(folder: Path) -> bool:
    """Whether `folder` holds cameras and images of a COLMAP model."""
    return any((folder / f"cameras.{e}").is_file() and (folder / f"images.{e}").is_file() for e in ("bin", "txt"))


def read_model(folder: PathLike) -> list[View]:
    """Views of the model in `folder` (cameras.bin and images.bin, else cameras.txt and images.txt), by image name.

    Raises:
        OSError: a file cannot be read.
        ValueError: the model is damaged, has no image, or a camera has distortion or is no pinhole.
    """
    folder = Path(folder)
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    if binary:
        views = _read_images_binary(folder / "images.bin", _read_cameras_binary(folder / "cameras.bin"))
    else:
        check_regular(folder / "cameras.txt")
        views = _read_images_text(folder / "images.txt", _read_cameras_text(folder / "cameras.txt"))
    if not views:
        raise ValueError(f"{folder}: the COLMAP model has no registered image")
    return sorted(views, key=lambda view: view.name)


class _Bytes:
    """A cursor over a binary file that refuses to step past the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self.data = file.read()
        self.position = 0

    def take(self, layout: str) -> tuple:
        size = struct.calcsize(layout)
        self.need(size)
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return values

    def need(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise ValueError(
                f"{self.path}: truncated at byte {len(self.data):,}: "
                f"{size:,} bytes needed from byte {self.position:,} on"
            )

    def count(self, what: str, record: int) -> int:
        """A uint64 count of records of at least `record` bytes each, checked before anything is allocated."""
        (count,) = self.take("<Q")
        if count * record > len(self.data) - self.position:
            raise ValueError(f"{self.path}: truncated at byte {len(self.data):,}: it cannot hold {count:,} {what}")
        return count

    def name(self) -> str:
        end = self.data.find(b"\0", self.position)
        if end < 0:
            raise ValueError(f"{self.path}: truncated at byte {len(self.data):,}: an image name has no end")
        raw = self.data[self.position : end]
        self.position = end + 1
        return raw.decode("utf-8", errors="replace")


def _read_cameras_binary(path: Path) -> dict[int, _Intrinsics]:
    file = _Bytes(path)
    cameras: dict[int, _Intrinsics] = {}
    for index in range(file.count("cameras", 48)):
        camera_id, model_id, width, height = file.take("<iiQQ")
        where = f"{path}: camera {camera_id}"
        if model_id not in _MODELS:
            raise ValueError(
                f"{where}: unknown camera model number {model_id} (record {index}); supported: {_SUPPORTED}"
            )
        model = _MODELS[model_id]
        params = list(file.take(f"<{model[1]}d"))
        if camera_id in cameras:
            raise ValueError(f"{where}: appears twice")
        cameras[camera_id] = _Intrinsics(where, model, (width, height), params)
    return cameras


def _read_images_binary(path: Path, cameras: dict[int, _Intrinsics]) -> list[View]:
    file = _Bytes(path)
    views = []
    for _ in range(file.count("images", 73)):
        image_id, *pose, camera_id = file.take("<i7di")
        name = file.name()
        points = file.count("2D points", 24)
        file.position += 24 * points
        views.append(_view(f"{path}: image {image_id} ({shorten(name)})", name, pose, camera_id, cameras))
    return views


def _read_cameras_text(path: Path) -> dict[int, _Intrinsics]:
    cameras: dict[int, _Intrinsics] = {}
    for number, line in _text_lines(path):
        words = line.split()
        where = f"{path}: line {number}"
        if not words:
            continue
        if len(words) < 5:
            raise ValueError(f"{where}: expected 'CAMERA_ID MODEL WIDTH HEIGHT PARAMS...', got {shorten(line)}")
        if words[1] not in _BY_NAME:
            raise ValueError(f"{where}: unknown camera model {shorten(words[1])}; supported: {_SUPPORTED}")
        camera_id, width, height = (_int(where, word) for word in (words[0], words[2], words[3]))
        if camera_id in cameras:
            raise ValueError(f"{where}: camera {camera_id} appears twice")
        params = [_float(where, word) for word in words[4:]]
        cameras[camera_id] = _Intrinsics(where, _BY_NAME[words[1]], (width, height), params)
    return cameras


def _read_images_text(path: Path, cameras: dict[int, _Intrinsics]) -> list[View]:
    views = []
    is_points_line = False  # every image has two lines, the second (2D points) may be empty
    for number, line in _text_lines(path):
        if is_points_line:
            is_points_line = False
            continue
        if not line.strip():
            continue
        is_points_line = True
        words = line.strip().split(maxsplit=9)
        where = f"{path}: line {number}"
        if len(words) != 10:
            raise ValueError(f"{where}: expected 'IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME', got {shorten(line)}")
        pose = [_float(where, word) for word in words[1:8]]
        views.append(_view(f"{where} ({shorten(words[9])})", words[9], pose, _int(where, words[8]), cameras))
    return views


def _view(where: str, name: str, pose: list[float], camera_id: int, cameras: dict[int, _Intrinsics]) -> View:
    if camera_id not in cameras:
        raise ValueError(f"{where}: refers to camera {camera_id}, which the cameras file does not have")
    camera = cameras[camera_id]
    matrix = np.empty((3, 4))
    matrix[:, :3] = rotation_of(where, np.array(pose[:4]))
    matrix[:, 3] = pose[4:]
    return make_view(where, name, matrix, camera.matrix, camera.size, inverted=False)


def _text_lines(path: Path):
    """Numbered lines without comments; COLMAP writes UTF-8."""
    with open_regular(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.lstrip().startswith(b"#"):
                continue
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path}: line {number}: is not UTF-8 text") from None


def _int(where: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{where}: expected a whole number, got {shorten(word)}") from None


def _float(where: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {shorten(word)}") from None
