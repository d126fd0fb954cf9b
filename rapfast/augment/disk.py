"""A provider that reads sequences from files: what an avatar system has made, rendered without it.

{tracked_root}/{video}/
    identity.safetensors     opacities [N] or [N, 1]; colors [N, D], or sh [N, K, 3]. Or identity.ply, INRIA's
    motion.safetensors       means [F, N, 3], quats [F, N, 4] wxyz, scales [F, N, 3] or, of all frames, [N, 3]
    motion/000000.safetensors ...    instead: a file for each frame, means [N, 3], quats [N, 4], scales [N, 3]
    background.mp4, background.png or backgrounds/000000.png ...    of the images' size
    cameras.json             the camera to start from, in any form that `rapfast.Cameras.from_file` reads; the first
    video.json               optional: {"fps": 30, "target": [x, y, z]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.cameras import Cameras
from rapfast.io import load_scene
from rapfast.io.files import array, check_regular, load_json, number
from rapfast.media import read_image, require_av

from .provider import Identity, Motion, Provider, Video, Viewpoint

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


class DiskProvider(Provider):
    """Videos in folders, as this module's first lines say. It has no refiner: derive from it to add one.

    Args:
        tracked_root: folder of the videos' folders.
        near_plane, alpha_cap: of the rasterizer; INRIA's are 0.2 and 0.99.
    """

    def __init__(self, tracked_root: str, near_plane: float = 0.01, alpha_cap: float = 0.999) -> None:
        self.root = Path(tracked_root)
        self.near_plane = check.number("near_plane", near_plane, 0.0, what="a depth of at least 0")
        self.alpha_cap = check.number("alpha_cap", alpha_cap, 1 / 255, 0.9999, "above 1/255 and below 1")

    def check_video(self, name: str) -> None:
        """That its files are there, and that the first background is of the images' size: by headers alone."""
        folder = self._folder(name)
        check_regular(_identity_file(folder))
        motion = _motion_place(folder)
        if motion.is_dir():
            _numbered(motion, (".safetensors",))
        else:
            check_regular(motion)
        cameras = Cameras.from_file(_camera_file(folder))
        background, size = _background_place(folder), (cameras.height, cameras.width)
        if background.is_dir():
            background = _numbered(background, IMAGES)[0]
        found = _film_size(background) if background.suffix == ".mp4" else _image_size(background)
        if found != size:
            raise _wrong_size(background, found, size)

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        if folder.is_dir():
            return folder
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: there is no such folder of tracked videos")
        known = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "") if known else "none"
        raise FileNotFoundError(f"{folder}: there is no such video; {self.root} has {shown}")

    def load_video(self, name: str) -> Video:
        return _DiskVideo(self._folder(name))


class _DiskVideo(Video):
    def __init__(self, folder: Path) -> None:
        self.identity = read_identity(folder)
        self._motion = _open_motion(folder, len(self.identity.opacities))
        self.n_frames = self._motion.n_frames
        self.fps, target = _read_settings(folder)
        cameras = Cameras.from_file(_camera_file(folder))
        if target is None:  # where the person is at first
            target = self._motion.read(0).means.median(0).values.double().numpy()
        self.viewpoint = Viewpoint(cameras.viewmats[0], cameras.Ks[0], cameras.width, cameras.height, target)
        self._backgrounds = _open_backgrounds(folder, self.n_frames, (cameras.height, cameras.width))

    def deform(self, frame: int, target: Any) -> Motion:
        return self._motion.read(frame)

    def background(self, frame: int, target: Any) -> Tensor:
        return self._backgrounds.read(frame)

    def close(self) -> None:
        self._backgrounds.close()


def read_identity(folder: Path) -> Identity:
    """Of a video's folder: identity.safetensors or identity.ply.

    Raises:
        OSError: neither is there, or it cannot be read.
        ValueError: both are, or one is damaged.
    """
    path = _identity_file(folder)
    if path.suffix == ".ply":
        scene = load_scene(path)
        if scene.sh is None:
            raise ValueError(f"{path}: has no colours (spherical harmonics)")
        return Identity(scene.opacities, scene.sh, scene.sh_degree)
    with _open_tensors(path) as file:
        names = set(file.keys())
        opacities = _tensor(file, path, "opacities")
        if opacities.dim() == 2 and opacities.shape[1] == 1:
            opacities = opacities[:, 0]
        if ("colors" in names) == ("sh" in names):
            raise ValueError(f"{path}: must hold either colors or sh, got {', '.join(sorted(names)) or 'nothing'}")
        colors = _tensor(file, path, "colors" if "colors" in names else "sh")
    degree = None
    if "sh" in names:
        degrees = {1: 0, 4: 1, 9: 2, 16: 3, 25: 4}
        if colors.dim() != 3 or colors.shape[1] not in degrees or colors.shape[2] != 3:
            raise ValueError(f"{path}: sh must be [N, K, 3], K one of 1, 4, 9, 16, 25; got {list(colors.shape)}")
        degree = degrees[colors.shape[1]]
    try:
        return Identity(opacities, colors, degree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _identity_file(folder: Path) -> Path:
    ply, packed = folder / "identity.ply", folder / "identity.safetensors"
    if ply.exists() and packed.exists():
        raise ValueError(f"{folder}: holds identity.ply and identity.safetensors; keep the one to read")
    return ply if ply.exists() else packed


# --- motion ----------------------------------------------------------------------------------------------------------


class _MotionFile:
    """All frames in one file, of which one frame at a time is read."""

    def __init__(self, path: Path, n_gaussians: int) -> None:
        self._path = path
        with _open_tensors(path) as file:
            shapes = {name: _shape(file, path, name) for name in ("means", "quats", "scales")}
        self.n_frames = shapes["means"][0] if shapes["means"] else 0
        wanted = {name: [(self.n_frames, n_gaussians, width)] for name, width in _WIDTHS.items()}
        wanted["scales"].append((n_gaussians, 3))
        for name, shape in shapes.items():
            if shape not in wanted[name] or not self.n_frames:
                raise ValueError(
                    f"{path}: {name} must be [F, {n_gaussians}, {_WIDTHS[name]}] for the identity's {n_gaussians} "
                    f"Gaussians, got {list(shape)}"
                )
        self._still_scales = len(shapes["scales"]) == 2

    def read(self, frame: int) -> Motion:
        with _open_tensors(self._path) as file:
            parts = {
                name: file.get_tensor(name) if name == "scales" and self._still_scales else file.get_slice(name)[frame]
                for name in _WIDTHS
            }
        return Motion(**{name: tensor.float() for name, tensor in parts.items()})


class _MotionFiles:
    """A file for each frame."""

    def __init__(self, folder: Path, n_gaussians: int) -> None:
        self._paths = _numbered(folder, (".safetensors",))
        self.n_frames, self._n = len(self._paths), n_gaussians

    def read(self, frame: int) -> Motion:
        path = self._paths[frame]
        with _open_tensors(path) as file:
            parts = {name: _tensor(file, path, name) for name in _WIDTHS}
        for name, tensor in parts.items():
            if tensor.shape != (self._n, _WIDTHS[name]):
                raise ValueError(
                    f"{path}: {name} must be [{self._n}, {_WIDTHS[name]}] as the identity has {self._n} Gaussians, got "
                    f"{list(tensor.shape)}"
                )
        return Motion(**parts)


_WIDTHS = {"means": 3, "quats": 4, "scales": 3}


def _open_motion(folder: Path, n_gaussians: int) -> _MotionFile | _MotionFiles:
    place = _motion_place(folder)
    return (_MotionFiles if place.is_dir() else _MotionFile)(place, n_gaussians)


def _motion_place(folder: Path) -> Path:
    """The file or the folder."""
    one, many = folder / "motion.safetensors", folder / "motion"
    if one.exists() and many.exists():
        raise ValueError(f"{folder}: holds motion.safetensors and the folder motion; keep the one to read")
    return many if many.is_dir() else one


# --- backgrounds -----------------------------------------------------------------------------------------------------


class _StillBackground:
    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._image = _image(path, size)

    def read(self, frame: int) -> Tensor:
        return self._image

    def close(self) -> None:
        pass


class _BackgroundImages:
    def __init__(self, folder: Path, n_frames: int, size: tuple[int, int]) -> None:
        self._paths, self._size = _numbered(folder, IMAGES), size
        if len(self._paths) < n_frames:
            raise ValueError(f"{folder}: has {len(self._paths)} images for {n_frames} frames")

    def read(self, frame: int) -> Tensor:
        return _image(self._paths[frame], self._size)

    def close(self) -> None:
        pass


class _BackgroundFilm:
    """Frames of a film, which are asked for in order."""

    def __init__(self, path: Path, n_frames: int, size: tuple[int, int]) -> None:
        self._path, self._size, self._n = path, size, n_frames
        self._container, stream = _open_film(path)
        if (stream.height, stream.width) != size:
            raise _wrong_size(path, (stream.height, stream.width), size)
        self._frames: Iterator[Any] = self._container.decode(stream)
        self._next = 0

    def read(self, frame: int) -> Tensor:
        if frame != self._next:
            raise RuntimeError(f"{self._path}: frames must be read in order, asked for {frame} after {self._next - 1}")
        picture = next(self._frames, None)
        if picture is None:
            raise ValueError(f"{self._path}: has {frame} frames, fewer than the motion's {self._n}")
        self._next += 1
        return torch.from_numpy(picture.to_ndarray(format="rgb24"))

    def close(self) -> None:
        self._container.close()


def _background_place(folder: Path) -> Path:
    """The film, the picture or the folder."""
    names = ("background.mp4", *(f"background{suffix}" for suffix in IMAGES), "backgrounds")
    there = [folder / name for name in names if (folder / name).exists()]
    if len(there) != 1:
        found = " and ".join(path.name for path in there)
        raise FileNotFoundError(
            f"{folder}: must hold one of background.mp4, background.png and the folder backgrounds, "
            f"{'has ' + found if there else 'has none'}"
        )
    return there[0]


def _open_backgrounds(
    folder: Path, n_frames: int, size: tuple[int, int]
) -> _StillBackground | _BackgroundImages | _BackgroundFilm:
    path = _background_place(folder)
    if path.is_dir():
        return _BackgroundImages(path, n_frames, size)
    if path.suffix == ".mp4":
        return _BackgroundFilm(path, n_frames, size)
    return _StillBackground(path, size)


def _open_film(path: Path) -> tuple[Any, Any]:
    """PyAV's container and its first stream of pictures."""
    require_av()
    import av

    try:
        container = av.open(str(check_regular(path)))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as a film: {error.strerror}") from None
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path}: holds no pictures")
    return container, container.streams.video[0]


def _film_size(path: Path) -> tuple[int, int]:
    container, stream = _open_film(path)
    with container:
        return stream.height, stream.width


def _image_size(path: Path) -> tuple[int, int]:
    """By its header; the pixels are not read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(check_regular(path)) as image:
            return image.height, image.width
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not a picture that can be read") from None


def _image(path: Path, size: tuple[int, int]) -> Tensor:
    pixels = read_image(check_regular(path))
    if pixels.shape[:2] != size:
        raise _wrong_size(path, pixels.shape[:2], size)
    return torch.from_numpy(np.rint(255 * pixels).astype(np.uint8))


def _wrong_size(path: Path, found: tuple[int, ...], size: tuple[int, int]) -> ValueError:
    return ValueError(
        f"{path}: is {found[1]}x{found[0]} and the camera's images are {size[1]}x{size[0]}: a background is never "
        "scaled, so make them agree"
    )


# --- the rest --------------------------------------------------------------------------------------------------------


def _camera_file(folder: Path) -> Path:
    for name in ("cameras.json", "transforms.json", "camera.npz"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder}: must hold the camera to start from, cameras.json")


def _read_settings(folder: Path) -> tuple[float | None, np.ndarray | None]:
    """fps and target of video.json, None for what is not there."""
    path = folder / "video.json"
    if not path.exists():
        return None, None
    content = load_json(path)
    unknown = sorted(set(content) - {"fps", "target"}) if isinstance(content, dict) else None
    if unknown is None or unknown:
        raise ValueError(f"{path}: must be an object with fps and target{f', not {unknown[0]}' if unknown else ''}")
    fps = number(content["fps"], f"{path}: fps") if "fps" in content else None
    target = array(content["target"], ((3,),), f"{path}: target") if "target" in content else None
    return fps, target


def _numbered(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files 000000 ... in order; ValueError where one is missing, or two are of one number."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and re.fullmatch(r"\d+", path.stem):
            other = found.setdefault(int(path.stem), path)
            if other is not path:
                raise ValueError(f"{folder}: holds {other.name} and {path.name} for one frame; keep the one to read")
    if not found:
        raise FileNotFoundError(f"{folder}: holds no files 000000{suffixes[0]}, 000001{suffixes[0]}, ...")
    missing = next((k for k in range(len(found)) if k not in found), None)
    if missing is not None:
        raise ValueError(f"{folder}: has no file {missing:06d}{suffixes[0]} among its {len(found)}")
    return [found[k] for k in range(len(found))]


def _open_tensors(path: Path) -> Any:
    path = check_regular(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading sequences needs safetensors: pip install 'rapfast[augment]'") from None
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file: {error}") from None


def _shape(file: Any, path: Path, name: str) -> tuple[int, ...]:
    if name not in file.keys():  # noqa: SIM118 it is no mapping
        raise ValueError(f"{path}: has no {name}; it holds {', '.join(sorted(file.keys())) or 'nothing'}")
    return tuple(file.get_slice(name).get_shape())


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    """In float32."""
    _shape(file, path, name)
    return file.get_tensor(name).float()
