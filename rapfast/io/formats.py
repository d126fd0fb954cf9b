"""Scenes in any supported file format: which one it is, and the way in and out.

PLY is read and written by `rapfast.io.ply`. The compressed formats (SuperSplat's compressed PLY, Niantic's SPZ,
PlayCanvas's SOG) are decoded by the library gsply (MIT), an optional dependency. Its compiled loops do not check
array bounds and its readers believe their headers, so `rapfast.io.compressed` checks every count and size first.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from ..scene import Scene
from . import compressed
from .files import PathLike, check_regular, open_regular
from .ply import load_ply, save_ply
from .ply_header import read_header

_KNOWN = ".ply (INRIA, RAP, SuperSplat compressed), .spz, and .sog or a folder with a SOG meta.json"


def detect_format(path: PathLike) -> str:
    """What kind of scene `path` holds, by its first bytes: "ply", "compressed.ply", "spz" or "sog".

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of them, or a PLY whose header is damaged.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        if (Path(path) / "meta.json").is_file():
            return "sog"
        raise ValueError(f"{path}: is a folder without a SOG meta.json; scenes are read from {_KNOWN}")
    path = check_regular(path)
    with open_regular(path) as file:
        magic = file.read(4)
    if not magic:
        raise ValueError(f"{path}: is an empty file; scenes are read from {_KNOWN}")
    if magic[:3] == b"ply":
        return "compressed.ply" if read_header(path).is_compressed else "ply"
    if magic[:2] == b"\x1f\x8b" or magic == b"NGSP":
        return "spz"
    if magic == b"PK\x03\x04" and zipfile.is_zipfile(path):
        return "sog"
    if path.name == "meta.json":
        return "sog"
    raise ValueError(f"{path}: is no scene file known here (first bytes {magic!r}); scenes are read from {_KNOWN}")


def load_scene(path: PathLike) -> Scene:
    """Load a scene of any supported format, recognised by content and not by name.

    Args:
        path: a PLY of INRIA's or RAP's layout; SuperSplat's compressed PLY; .spz of version 2 to 4; .sog, or the
            folder or meta.json of an unbundled SOG. All but the first need `pip install 'rapfast[formats]'`.

    Returns:
        Scene: float32 on the CPU, after activation, in the axes of the PLY that 3DGS training writes. SPZ stores
        y up and z backwards and is turned into that frame (a half turn about x), spherical harmonics included.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of no supported format, or damaged; the sentence names the file.
        ImportError: the format needs the extra `formats`.
    """
    kind = detect_format(path)
    if kind == "ply":
        return load_ply(path)
    if kind == "compressed.ply":
        return compressed.load_compressed_ply(path)
    if kind == "spz":
        return compressed.load_spz(path)
    return compressed.load_sog(path)


def save_scene(scene: Scene, path: PathLike) -> None:
    """Write a scene in the format that the name's ending says, in one step (see `atomic_path`).

    Args:
        scene: the scene; the compressed formats need `sh` of degree 0 to 3 and only `Scene.valid` Gaussians.
        path: *.compressed.ply (SuperSplat's, 11-bit positions within chunks of 256), *.ply (full precision) or
            *.spz (24-bit positions).

    Raises:
        TypeError, ValueError: the scene cannot be written in this format, or the ending says none.
        ImportError: the format needs the extra `formats`.
        OSError: the target cannot be written; what was there before is kept.
    """
    if not isinstance(scene, Scene):
        raise TypeError(f"scene must be a rapfast.Scene, got a {type(scene).__name__}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got a {type(path).__name__}")
    name = Path(path).name.lower()
    if name.endswith(".compressed.ply"):
        compressed.save_compressed_ply(scene, path)
    elif name.endswith(".ply"):
        save_ply(scene, path)
    elif name.endswith(".spz"):
        compressed.save_spz(scene, path)
    else:
        raise ValueError(f"{path}: scenes are written as .ply, .compressed.ply or .spz; the name must end so")
