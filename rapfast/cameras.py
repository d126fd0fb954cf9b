"""Cameras: where the views are taken from, and the readers and paths that make them.

Conventions: world-to-camera matrices with OpenCV axes (x right, y down, z forward), intrinsics in pixels, the
image's corner at 0 and pixel centres at +0.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import camera_paths as paths
from .io import colmap, inria, nerfstudio, poses
from .io.atomic import atomic_write
from .io.files import PathLike, check_regular, load_json
from .io.views import MAX_SIDE, View, pinhole


@dataclass(eq=False)
class Cameras:
    """C pinhole cameras of one image size.

    Attributes:
        viewmats: [C, 4, 4] world-to-camera, rigid, floating dtype (float32 on the CPU from every constructor here).
        Ks: [C, 3, 3] intrinsics in pixels, dtype and device of `viewmats`, fx and fy positive.
        width, height: image size in pixels, 1..65536.
        names: C image names, or None.
        indices: C positions in the file the cameras came from (see `groups`), or None.

    Raises:
        TypeError, ValueError: a field has the wrong type, shape, dtype or device; a matrix is not finite or its
            rotation block is singular; a focal length is not positive. The sentence names the camera.
    """

    viewmats: torch.Tensor
    Ks: torch.Tensor
    width: int
    height: int
    names: list[str] | None = None
    indices: list[int] | None = None

    def __post_init__(self) -> None:
        for name, side in (("viewmats", 4), ("Ks", 3)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating-point tensor [C,{side},{side}], got {got}")
            if value.ndim != 3 or tuple(value.shape[1:]) != (side, side):
                raise ValueError(f"{name} must be [C,{side},{side}], got {list(value.shape)}")
        viewmats, Ks = self.viewmats, self.Ks
        if Ks.shape[0] != len(viewmats) or Ks.dtype != viewmats.dtype or Ks.device != viewmats.device:
            raise ValueError(
                f"Ks must be [{len(viewmats)},3,3] {viewmats.dtype} on {viewmats.device} as viewmats are, "
                f"got {list(Ks.shape)} {Ks.dtype} on {Ks.device}"
            )
        self.width, self.height = _side("width", self.width), _side("height", self.height)
        for name in ("names", "indices"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, list(value))
                if len(value) != len(self):
                    raise ValueError(f"{name} must have one entry per camera, {len(self)}, got {len(value)}")
        self._check_values()

    def _check_values(self) -> None:
        viewmats, Ks = self.viewmats.detach().cpu().double(), self.Ks.detach().cpu().double()
        for name, matrices in (("viewmats", viewmats), ("Ks", Ks)):
            for index in _failing(torch.isfinite(matrices).flatten(1).all(dim=1)):
                raise ValueError(f"{name}[{index}] must be finite, got {matrices[index].tolist()}")
        for index in _failing(torch.linalg.det(viewmats[:, :3, :3]) != 0):
            raise ValueError(f"viewmats[{index}] must be invertible, its 3x3 block is singular")
        for index in _failing((Ks[:, 0, 0] > 0) & (Ks[:, 1, 1] > 0)):
            focal = (float(Ks[index, 0, 0]), float(Ks[index, 1, 1]))
            raise ValueError(f"Ks[{index}] must have positive focal lengths, got fx, fy = {focal}")

    # --- reading -------------------------------------------------------------------------------------------------

    @classmethod
    def from_file(
        cls, path: PathLike, *, Ks: Any = None, width: int | None = None, height: int | None = None
    ) -> Cameras:
        """Read cameras of any supported kind, recognised by what `path` is and holds.

        Args:
            path: a folder with a COLMAP model (in itself, 0, sparse/0 or sparse), transforms.json or cameras.json; a
                .json of nerfstudio's or INRIA's form; or poses in .npz, .npy or .txt (see `rapfast.io.poses`).
            Ks: [3,3] or [M,3,3] intrinsics in pixels, for pose files that hold none.
            width, height: image size in pixels, for pose files that hold none.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is of no known kind or damaged, or its images differ in size (use `groups`).
        """
        return cls._one_size(_read(path, Ks, width, height), path)

    @classmethod
    def groups(
        cls, path: PathLike, *, Ks: Any = None, width: int | None = None, height: int | None = None
    ) -> list[Cameras]:
        """As `from_file`, for files whose images differ in size: one `Cameras` per size, by first appearance.

        `indices` of each says where its cameras stood in the file's order.
        """
        return cls._by_size(_read(path, Ks, width, height))

    @classmethod
    def from_colmap(cls, folder: PathLike) -> Cameras:
        """Read a COLMAP model (binary before text), ordered by image name; distorted cameras are refused."""
        return cls._one_size(colmap.read_model(folder), folder)

    @classmethod
    def from_transforms(cls, path: PathLike) -> Cameras:
        """Read a nerfstudio, instant-ngp or NeRF transforms.json (see `rapfast.io.nerfstudio`)."""
        return cls._one_size(nerfstudio.read_transforms(path), path)

    @classmethod
    def from_inria_json(cls, path: PathLike) -> Cameras:
        """Read an INRIA cameras.json (see `rapfast.io.inria`)."""
        return cls._one_size(inria.read_cameras_json(path), path)

    @classmethod
    def from_poses(
        cls, poses_c2w: Any, Ks: Any, width: int, height: int, names: Sequence[str] | None = None
    ) -> Cameras:
        """Make cameras of camera-to-world poses with OpenCV axes.

        Args:
            poses_c2w: [M,3,4] or [M,4,4] tensor or array of numbers; inverted in float64.
            Ks: [3,3] for all, or [M,3,3].
            width, height: pixels.
            names: M image names.
        """
        matrices = _numbers("poses", poses_c2w)
        if matrices.ndim != 3 or matrices.shape[1:] not in ((3, 4), (4, 4)):
            raise ValueError(f"poses must be [M,3,4] or [M,4,4] camera-to-world, got {list(matrices.shape)}")
        names = list(names) if names is not None else None
        if names is not None and len(names) != len(matrices):
            raise ValueError(f"names must have one entry per pose, {len(matrices)}, got {len(names)}")
        size = (_side("width", width), _side("height", height))
        intrinsics = _intrinsics("Ks", Ks, len(matrices))
        views = poses.views_of("poses", matrices, intrinsics, size, inverted=True, names=names)
        return cls._from_views(views, size)

    # --- making --------------------------------------------------------------------------------------------------

    @classmethod
    def look_at(
        cls, eyes: Any, targets: Any, up: Any = (0.0, 0.0, 1.0), *,
        width: int = 854, height: int = 480, fov_y: float = 50.0,
    ) -> Cameras:  # fmt: skip
        """Cameras at `eyes` that look at `targets` with `up` upwards in the picture.

        Args:
            eyes, targets: [3] or [C,3], broadcast against each other, world units.
            up: [3] or [C,3], need not be of unit length nor orthogonal to the view. +z by default; captures in
                COLMAP's frame are often upright with (0, -1, 0).
            width, height: pixels.
            fov_y: vertical field of view in degrees, 0..180; pixels are square, the principal point is the middle.

        Raises:
            ValueError: an eye is its target, or `up` is parallel to the view; names the camera.
        """
        width, height = _side("width", width), _side("height", height)
        eyes, targets, up = (_numbers(n, v) for n, v in (("eyes", eyes), ("targets", targets), ("up", up)))
        matrices = paths.look_at(eyes, targets, up)
        K = field_of_view(fov_y, width, height)
        views = poses.views_of("look_at", matrices, K, (width, height), inverted=True, names=None)
        return cls._from_views(views, (width, height))

    @classmethod
    def orbit(
        cls, center: Any, radius: float, n: int, *, elevation: float = 20.0, start: float = 0.0, turns: float = 1.0,
        up: Any = (0.0, 0.0, 1.0), width: int = 854, height: int = 480, fov_y: float = 50.0,
    ) -> Cameras:  # fmt: skip
        """`n` cameras on a circle, all looking at `center`; the last is one step before the first again.

        Args:
            center: [3] world units.
            radius: distance to the centre, world units.
            n: number of cameras, >= 1.
            elevation: degrees above the plane orthogonal to `up`, within -90..90 exclusive.
            start: azimuth of the first camera in degrees.
            turns: how far round to go; negative turns the other way.
            up, width, height, fov_y: as in `look_at`.
        """
        center, up = _numbers("center", center), _numbers("up", up)
        eyes = paths.orbit_eyes(center, radius, n, up, elevation=elevation, start=start, turns=turns)
        return cls.look_at(eyes, center, up, width=width, height=height, fov_y=fov_y)

    def interpolate(self, n: int, *, smooth: bool = False, closed: bool = False) -> Cameras:
        """`n` cameras evenly spaced in time along the path through these.

        Rotations are interpolated by slerp the shorter way round, intrinsics linearly, centres linearly or with
        `smooth` by a Catmull-Rom spline. An open path includes both ends (n = 1 gives the first camera); a `closed`
        one returns to the first camera and leaves it out at the end.
        """
        paths.check_count("n", n)
        if not len(self):
            raise ValueError("interpolate needs at least one camera, there are none")
        pose = torch.linalg.inv(self.viewmats.detach().cpu().double()).numpy()
        K = self.Ks.detach().cpu().double().numpy()
        matrices, Ks = paths.interpolate(pose, K, n, smooth=smooth, closed=closed)
        size = (self.width, self.height)
        views = poses.views_of("interpolate", matrices, Ks, size, inverted=True, names=None)
        return self._from_views(views, size).to(self.viewmats.device, self.viewmats.dtype)

    def resize(self, width: int, height: int) -> Cameras:
        """The same views at another image size; the intrinsics are scaled (exact, as pixels begin at 0)."""
        width, height = _side("width", width), _side("height", height)
        factor = torch.tensor([width / self.width, height / self.height, 1.0], dtype=torch.float64, device="cpu")
        Ks = (self.Ks.double() * factor.to(self.Ks.device)[None, :, None]).to(self.Ks.dtype)
        return Cameras(self.viewmats, Ks, width, height, self.names, self.indices)

    def save(self, path: PathLike) -> None:
        """Write INRIA's cameras.json in one step (see `rapfast.io.atomic_path`); ValueError for skew."""
        for index in _failing(self.Ks[:, 0, 1] == 0):
            raise ValueError(f"Ks[{index}] has skew {float(self.Ks[index, 0, 1]):g}, which cameras.json cannot hold")
        names = self.names or [f"{i:05d}" for i in range(len(self))]
        viewmats, Ks = self.viewmats.detach().cpu().double().numpy(), self.Ks.detach().cpu().double().numpy()
        views = [View(names[i], viewmats[i], Ks[i], self.width, self.height) for i in range(len(self))]
        atomic_write(path, (json.dumps(inria.entries_of(views), indent=1) + "\n").encode())

    # --- parts ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """C, the number of cameras."""
        return int(self.viewmats.shape[0])

    def __getitem__(self, index: int | slice | Sequence[int]) -> Cameras:
        """Some of the cameras, always as `Cameras`: an int gives one, a slice or a list of ints several."""
        everything = range(len(self))
        if isinstance(index, slice):
            chosen = list(everything[index])
        elif isinstance(index, Sequence) and not isinstance(index, str | bytes):
            chosen = [everything[i] for i in index]
        else:
            chosen = [everything[index]]
        rows = torch.tensor(chosen, dtype=torch.int64, device=self.viewmats.device)
        names = [self.names[i] for i in chosen] if self.names is not None else None
        indices = [self.indices[i] for i in chosen] if self.indices is not None else None
        return Cameras(self.viewmats[rows], self.Ks[rows], self.width, self.height, names, indices)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cameras:
        """The same cameras on another device or in another floating dtype."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        viewmats, Ks = (t.to(device=device, dtype=dtype) for t in (self.viewmats, self.Ks))
        return Cameras(viewmats, Ks, self.width, self.height, self.names, self.indices)

    @property
    def poses(self) -> torch.Tensor:
        """[C,4,4] camera-to-world matrices, inverted in float64."""
        return torch.linalg.inv(self.viewmats.double()).to(self.viewmats.dtype)

    @property
    def centers(self) -> torch.Tensor:
        """[C,3] camera centres in world coordinates."""
        return self.poses[:, :3, 3]

    def __repr__(self) -> str:
        return f"Cameras({len(self)} of {self.width}x{self.height}, {self.viewmats.dtype}, {self.viewmats.device})"

    # --- views to cameras ----------------------------------------------------------------------------------------

    @classmethod
    def _from_views(cls, views: list[View], size: tuple[int, int], indices: list[int] | None = None) -> Cameras:
        viewmats = np.array([view.world_to_camera for view in views]).reshape(-1, 4, 4)
        Ks = np.array([view.intrinsics for view in views]).reshape(-1, 3, 3)
        tensors = [torch.from_numpy(a.astype(np.float32)) for a in (viewmats, Ks)]
        return cls(*tensors, *size, names=[view.name for view in views], indices=indices)

    @classmethod
    def _by_size(cls, views: list[View]) -> list[Cameras]:
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, view in enumerate(views):
            sizes.setdefault((view.width, view.height), []).append(index)
        return [cls._from_views([views[i] for i in chosen], size, chosen) for size, chosen in sizes.items()]

    @classmethod
    def _one_size(cls, views: list[View], path: PathLike) -> Cameras:
        groups = cls._by_size(views)
        if len(groups) > 1:
            sizes = ", ".join(f"{g.width}x{g.height} ({len(g)})" for g in groups[:5])
            raise ValueError(
                f"{path}: images differ in size ({sizes}{', ...' if len(groups) > 5 else ''}); "
                "Cameras.groups reads them as one Cameras per size"
            )
        return groups[0]


def field_of_view(fov_y: float, width: int, height: int) -> np.ndarray:
    """[3,3] float64 intrinsics of square pixels for a vertical field of view in degrees, principal point centred."""
    if not isinstance(fov_y, int | float) or not 0 < fov_y < 180:
        raise ValueError(f"fov_y must be within 0..180 degrees exclusive, got {fov_y!r}")
    focal = 0.5 * height / math.tan(math.radians(fov_y) / 2)
    return pinhole(focal, focal, width / 2, height / 2)


def _read(path: PathLike, Ks: Any, width: int | None, height: int | None) -> list[View]:
    """Views of a camera file or folder of any kind; the intrinsics arguments are for pose files only."""
    if not Path(path).is_dir():
        path = check_regular(path)
        if path.suffix.lower() in (".npz", ".npy", ".txt") and path.name not in ("cameras.txt", "images.txt"):
            return _read_poses(path, Ks, width, height)
    if Ks is not None or width is not None or height is not None:
        raise ValueError(f"{path}: Ks, width and height are for pose files (.npz, .npy, .txt); this file has its own")
    if Path(path).is_dir():
        return _read_folder(Path(path))
    if path.name in ("cameras.bin", "cameras.txt", "images.bin", "images.txt"):
        return colmap.read_model(path.parent)
    if path.suffix.lower() == ".json":
        content = load_json(path)
        if isinstance(content, list):
            return inria.views_of(content, path)
        if isinstance(content, dict) and "frames" in content:
            return nerfstudio.views_of(content, path)
        raise ValueError(f"{path}: is neither a list of cameras (INRIA) nor an object with 'frames' (nerfstudio)")
    raise ValueError(
        f"{path}: is no camera file known here: a COLMAP folder, transforms.json, cameras.json, "
        "or poses in .npz, .npy or .txt"
    )


def _read_folder(folder: Path) -> list[View]:
    models = [f for f in (folder, folder / "0", folder / "sparse" / "0", folder / "sparse") if colmap.is_model(f)]
    if models:
        return colmap.read_model(models[0])
    files = [folder / name for name in ("transforms.json", "cameras.json") if (folder / name).is_file()]
    if len(files) == 1:
        return _read(files[0], None, None, None)
    if files:
        raise ValueError(f"{folder}: holds transforms.json and cameras.json; name the one to read")
    raise ValueError(
        f"{folder}: holds no COLMAP model (cameras and images, .bin or .txt), transforms.json or cameras.json"
    )


def _read_poses(path: Path, Ks: Any, width: int | None, height: int | None) -> list[View]:
    content = poses.read_poses(path)
    given = {"Ks": Ks, "width": width, "height": height}
    for key, value in given.items():
        stored = getattr(content, key)
        if value is not None and stored is not None:
            raise ValueError(f"{path}: holds {key} of its own, the argument {key} must not be given")
        if value is None and stored is None:
            raise ValueError(f"{path}: holds no {key}; pass it: Cameras.from_file(path, Ks=..., width=..., height=...)")
        given[key] = stored if value is None else value
    where = str(path)
    size = (_side(f"{where}: width", given["width"]), _side(f"{where}: height", given["height"]))
    intrinsics = _intrinsics(f"{where}: Ks", given["Ks"], len(content.matrices))
    return poses.views_of(where, content.matrices, intrinsics, size, inverted=content.inverted, names=None)


def _failing(good: torch.Tensor) -> list[int]:
    """The first position at which `good` [C] is False, as a list of one or none."""
    return (~good).nonzero()[:1, 0].tolist()


def _side(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number of pixels, got {value!r}")
    if not 1 <= value <= MAX_SIDE:
        raise ValueError(f"{name} must be within 1..{MAX_SIDE}, got {value}")
    return int(value)


def _numbers(name: str, value: Any) -> np.ndarray:
    """Tensor, array or nested sequence of numbers as float64 on the CPU."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().cpu().float().numpy()
    try:
        result = np.asarray(value)
    except ValueError:
        result = np.asarray(None)
    if result.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {type(value).__name__} of {result.dtype}")
    return result.astype(np.float64)


def _intrinsics(name: str, value: Any, count: int) -> np.ndarray:
    Ks = _numbers(name, value)
    if Ks.shape not in ((3, 3), (count, 3, 3)):
        raise ValueError(f"{name} must be [3,3] or [{count},3,3], got {list(Ks.shape)}")
    return Ks
