"""Poses as plain numbers: .npz, .npy and .txt files.

- .npz: `poses` (or `camtoworlds`) [M,3,4] or [M,4,4] camera-to-world, or `viewmats` [M,4,4] world-to-camera; and
  optionally `Ks` [3,3] or [M,3,3], `width`, `height`. Other arrays are not read.
- .npy: camera-to-world [M,3,4] or [M,4,4].
- .txt: one pose per line, 12 or 16 numbers, camera-to-world row by row (KITTI's form); or one 3x4 or 4x4 matrix.
All axes OpenCV. Pickles are never loaded.
"""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import PathLike, check_regular, open_regular
from .views import View, make_view

#: One array of a pose file; a million poses take 128 MB.
MAX_ARRAY_BYTES = 256 << 20

_POSE_KEYS = ("poses", "camtoworlds", "viewmats")


@dataclass
class PoseFile:
    """What a pose file holds; the intrinsics may be absent."""

    matrices: np.ndarray  # [M, 3 or 4, 4] float64
    inverted: bool  # True where `matrices` are camera-to-world
    Ks: np.ndarray | None = None  # [3,3] or [M,3,3]
    width: int | None = None
    height: int | None = None


def read_poses(path: PathLike) -> PoseFile:
    """Read a .npz, .npy or .txt pose file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, holds no pose, or an array is of the wrong shape or dtype.
    """
    path = check_regular(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".npy":
        return PoseFile(_poses(path, "the array", _read_npy(path)), inverted=True)
    if suffix == ".txt":
        return PoseFile(_read_text(path), inverted=True)
    raise ValueError(f"{path}: poses are read from .npz, .npy or .txt, got {suffix or 'no ending'}")


def views_of(
    where: str, matrices: np.ndarray, Ks: np.ndarray, size: tuple[int, int], *, inverted: bool, names: list[str] | None
) -> list[View]:
    """Check poses [M,3|4,4] and intrinsics [3,3] or [M,3,3] and make views of them, named by number by default."""
    count = len(matrices)
    if Ks.ndim == 2:
        Ks = np.broadcast_to(Ks, (count, 3, 3))
    views = []
    for index in range(count):
        name = names[index] if names is not None else f"{index:05d}"
        views.append(make_view(f"{where}: pose {index}", name, matrices[index], Ks[index], size, inverted=inverted))
    return views


def _read_npy(path: Path) -> np.ndarray:
    try:
        # Mapping checks the shape in the header against the size of the file before anything is allocated.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - numpy parses the header as Python, and raises what that raises
        raise ValueError(f"{path}: not a readable .npy file: {_line(error)}") from None
    if not isinstance(mapped, np.ndarray):
        raise ValueError(f"{path}: is not an .npy file but an archive; name it .npz")
    if mapped.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"{path}: an array of {mapped.nbytes:,} bytes is over the limit of {MAX_ARRAY_BYTES:,}")
    return _plain(path, "the array", mapped)


def _read_npz(path: Path) -> PoseFile:
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            arrays = {
                key: _read_member(archive, key)
                for key in (*_POSE_KEYS, "Ks", "width", "height")
                if f"{key}.npy" in members
            }
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile and numpy raise many types on damaged files
        raise ValueError(f"{path}: not a readable .npz file: {_line(error)}") from None
    keys = [key for key in _POSE_KEYS if key in arrays]
    if len(keys) != 1:
        raise ValueError(
            f"{path}: must hold one of the arrays {', '.join(_POSE_KEYS)}, got {', '.join(keys) or 'none'}"
        )
    result = PoseFile(_poses(path, keys[0], _plain(path, keys[0], arrays[keys[0]])), inverted=keys[0] != "viewmats")
    if "Ks" in arrays:
        result.Ks = _plain(path, "Ks", arrays["Ks"])
    result.width = _whole(path, "width", arrays)
    result.height = _whole(path, "height", arrays)
    return result


def _read_member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an .npz, its header checked against the member's size first."""
    info = archive.getinfo(f"{key}.npy")
    if info.file_size > MAX_ARRAY_BYTES:
        raise ValueError(f"{key} of {info.file_size:,} bytes is over the limit of {MAX_ARRAY_BYTES:,}")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{key} is of the unknown .npy version {version}")
        shape, fortran, dtype = read(file)
        count = 1
        for side in shape:
            count *= side
        if dtype.hasobject or any(side < 0 for side in shape) or count * dtype.itemsize > info.file_size:
            raise ValueError(f"{key} of shape {shape} and dtype {dtype} does not fit its {info.file_size:,} bytes")
        data = file.read(count * dtype.itemsize)
    flat = np.frombuffer(data, dtype=dtype, count=count)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_text(path: Path) -> np.ndarray:
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty file is an error of ours below
        try:
            table = np.loadtxt(file, dtype=np.float64, ndmin=2, encoding="utf-8")
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: not a text file of poses: {_line(error)}") from None
    if table.shape in ((3, 4), (4, 4)):
        return table[None]
    if table.shape[0] and table.shape[1] in (12, 16):
        return table.reshape(len(table), -1, 4)
    raise ValueError(f"{path}: must have 12 or 16 numbers a line (or one 3x4 or 4x4 matrix), got {list(table.shape)}")


def _plain(path: Path, what: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {what} must hold numbers, got dtype {values.dtype}")
    return values.astype(np.float64)


def _poses(path: Path, what: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 3 or values.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{path}: {what} must be poses [M,3,4] or [M,4,4], got {list(values.shape)}")
    if not len(values):
        raise ValueError(f"{path}: {what} holds no poses")
    return values


def _whole(path: Path, key: str, arrays: dict[str, np.ndarray]) -> int | None:
    if key not in arrays:
        return None
    value = arrays[key]
    if value.size != 1 or value.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key} must be one whole number, got {value.dtype} {list(value.shape)}")
    return int(value.reshape(()))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
