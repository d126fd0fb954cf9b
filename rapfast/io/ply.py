"""Scenes in PLY files: INRIA's 3DGS layout and RAP's.

INRIA (Kerbl et al. 2023): x y z nx ny nz f_dc_0..2 f_rest_* opacity scale_0..2 rot_0..3 as floats, with
f_rest channel-major ([N, 3, K-1]), the opacity a logit, scales logarithms, the quaternion w x y z.
RAP: the same with f_intr_0..47 in place of f_dc and f_rest, column f_intr_{c*16+k} = intrinsic[:, k, c].

The file is mapped, checked against its size before anything is allocated, and converted in blocks of rows, so
that loading takes the memory of the scene and little more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from ..scene import SH_DEGREE_OF_COUNT, Scene
from .activations import activate_, log_of, logit_of
from .atomic import atomic_path
from .files import PathLike, open_regular
from .ply_header import PlyElement, PlyHeader, read_header

#: Rows converted at a time: about 4 MiB of a degree-3 scene, which stays in the cache while columns are picked.
_BLOCK_ROWS = 16384

_GEOMETRY = ["x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def load_ply(path: PathLike) -> Scene:
    """Load a scene from an INRIA or RAP PLY file.

    Args:
        path: binary (either byte order) or ASCII PLY. Properties may be of any scalar type and in any order;
            properties that the layout does not know (nx, ny, nz, ...) and elements other than vertex are skipped.

    Returns:
        Scene: float32 on the CPU, after activation (scales = exp, opacities = sigmoid, quaternions normalised;
        a zero quaternion stays zero). `sh` [N,K,3] of the degree that the number of f_rest columns says, or
        `intrinsic` [N,16,3] for RAP's layout. A file of 0 vertices gives a scene of 0 Gaussians.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a PLY; the sentence says where and what. A truncation names its byte.

    Bytes behind the last element are ignored with a warning.
    """
    header = read_header(path)
    vertex = _vertex_element(header)
    n = vertex.count
    colour = _colour_columns(header, vertex)

    out = {name: torch.empty(shape, dtype=torch.float32, device="cpu") for name, shape in _shapes(n, colour).items()}
    rest = len(colour) // 3 - 1  # coefficients per channel behind the first (INRIA)
    start = 0
    for rows in _blocks(header, vertex, _GEOMETRY + colour):
        stop = start + len(rows)
        out["means"][start:stop] = torch.from_numpy(rows[:, 0:3])
        out["opacities"][start:stop] = torch.from_numpy(rows[:, 3])
        out["scales"][start:stop] = torch.from_numpy(rows[:, 4:7])
        out["quats"][start:stop] = torch.from_numpy(rows[:, 7:11])
        columns = torch.from_numpy(rows[:, 11:])
        if "intrinsic" in out:
            out["intrinsic"][start:stop] = columns.reshape(len(rows), 3, 16).transpose(1, 2)
        else:
            out["sh"][start:stop, 0] = columns[:, :3]
            out["sh"][start:stop, 1:] = columns[:, 3:].reshape(len(rows), 3, rest).transpose(1, 2)
        start = stop
    activate_(out["quats"], out["scales"], out["opacities"])
    return Scene(**out)


def save_ply(scene: Scene, path: PathLike) -> None:
    """Write a scene as a binary little-endian PLY that INRIA's and other viewers (or RAP) read.

    Args:
        scene: with `sh` it is written in INRIA's layout, with `intrinsic` in RAP's. Any device, any floating
            dtype; values are stored as float32.
        path: replaced in one step (see `atomic_path`).

    Raises:
        TypeError: `scene` is not a Scene.
        ValueError: the scene has neither or both of `sh` and `intrinsic`; a scale is negative or an opacity is
            outside 0..1, for which logarithm and logit do not exist.
        OSError: the target cannot be written, or the disk is full; what was there before is kept.

    Scales of 0 and opacities of 0 and 1, whose logarithm and logit are infinite, are written as -110, -110 and
    30: finite in every reader, and exactly 0, 0 and 1 again after activation in float32. Other values come back
    within a relative 1e-5. NaN is written as NaN.
    """
    if not isinstance(scene, Scene):
        raise TypeError(f"scene must be a rapfast.Scene, got a {type(scene).__name__}")
    if (scene.sh is None) == (scene.intrinsic is None):
        both = "both" if scene.sh is not None else "neither"
        raise ValueError(
            f"scene must have either sh (INRIA layout) or intrinsic (RAP layout) to be written, it has {both}"
        )
    check_ranges(scene, path)

    colour_count = scene.sh.shape[1] * 3 if scene.sh is not None else 48
    if scene.sh is not None:
        colour = ["f_dc_0", "f_dc_1", "f_dc_2"] + [f"f_rest_{i}" for i in range(colour_count - 3)]
    else:
        colour = [f"f_intr_{i}" for i in range(48)]
    names = ["x", "y", "z", "nx", "ny", "nz", *colour, *_GEOMETRY[3:]]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(scene)}"]
    lines += [f"property float {name}" for name in names] + ["end_header", ""]

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(lines).encode("ascii"))
        for start in range(0, len(scene), _BLOCK_ROWS):
            part = scene.select(slice(start, start + _BLOCK_ROWS)).to("cpu")
            rows = torch.zeros((len(part), len(names)), dtype=torch.float32, device="cpu")
            rows[:, 0:3] = part.means
            end = 6 + colour_count
            if part.sh is not None:
                rows[:, 6:9] = part.sh[:, 0]
                rows[:, 9:end] = part.sh[:, 1:].transpose(1, 2).reshape(len(part), -1)
            else:
                rows[:, 6:end] = part.intrinsic.transpose(1, 2).reshape(len(part), -1)
            rows[:, end] = logit_of(part.opacities)
            rows[:, end + 1 : end + 4] = log_of(part.scales)
            rows[:, end + 4 :] = part.quats
            file.write(rows.numpy().astype("<f4", copy=False).data)


def check_ranges(scene: Scene, path: PathLike) -> None:
    """Refuse scales and opacities that have no logarithm and logit, naming the first."""
    for name, tensor, bad, rule in (
        ("scales", scene.scales, (scene.scales < 0).any(dim=1), "must not be negative"),
        ("opacities", scene.opacities, (scene.opacities < 0) | (scene.opacities > 1), "must be within 0..1"),
    ):
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"{path}: {name} {rule} to be written: {int(bad.sum()):,} of {len(scene):,} Gaussians are not, "
                f"the first is number {first} with {tensor[first].tolist()}"
            )


def _vertex_element(header: PlyHeader) -> PlyElement:
    """The vertex element, once it is known that it holds a scene."""
    path = header.path
    vertex = header.elements.get("vertex")
    if vertex is None:
        raise ValueError(f"{path}: has no vertex element, only {', '.join(header.elements) or 'nothing'}")
    if header.is_compressed:
        raise ValueError(f"{path}: is a compressed PLY; load it with rapfast.load_scene")
    missing = [name for name in _GEOMETRY if name not in vertex.properties]
    if missing:
        raise ValueError(f"{path}: is not a Gaussian scene: the vertex element has no property {', '.join(missing)}")
    if header.format != "ascii" and header.data_offset + header.data_size < header.file_size:
        extra = header.file_size - header.data_offset - header.data_size
        warnings.warn(f"{path}: ignoring {extra:,} bytes behind the last element", stacklevel=3)
    return vertex


def _colour_columns(header: PlyHeader, vertex: PlyElement) -> list[str]:
    """Names of the colour columns in the order in which `load_ply` takes them apart."""
    path, properties = header.path, vertex.properties
    prefixes = {p: sum(name.startswith(p) for name in properties) for p in ("f_dc_", "f_rest_", "f_intr_")}
    if prefixes["f_intr_"]:
        if prefixes["f_dc_"] or prefixes["f_rest_"]:
            raise ValueError(f"{path}: has both f_intr (RAP) and f_dc/f_rest (INRIA) columns")
        names = [f"f_intr_{i}" for i in range(48)]
        if prefixes["f_intr_"] != 48 or any(name not in properties for name in names):
            raise ValueError(f"{path}: must have f_intr_0..47, got {prefixes['f_intr_']} f_intr columns")
        return names
    base = ["f_dc_0", "f_dc_1", "f_dc_2"]
    if any(name not in properties for name in base):
        raise ValueError(f"{path}: has no colour: neither f_dc_0..2 (INRIA) nor f_intr_0..47 (RAP)")
    count = prefixes["f_rest_"]
    names = [f"f_rest_{i}" for i in range(count)]
    if count % 3 or count // 3 + 1 not in SH_DEGREE_OF_COUNT or any(name not in properties for name in names):
        raise ValueError(
            f"{path}: must have f_rest_0..k with 0, 9, 24, 45 or 72 columns (SH degree 0 to 4), got {count}"
        )
    return base + names


def _shapes(n: int, colour: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    if colour[0].startswith("f_intr_"):
        shapes["intrinsic"] = (n, 16, 3)
    else:
        shapes["sh"] = (n, len(colour) // 3, 3)
    return shapes


def _blocks(header: PlyHeader, vertex: PlyElement, names: list[str]) -> Iterator[np.ndarray]:
    """The named columns of the vertex element as float32 [rows, len(names)], block by block."""
    if vertex.count == 0:
        return
    if header.format == "ascii":
        table = _ascii_rows(header, vertex)
        order = [list(vertex.properties).index(name) for name in names]
        for start in range(0, vertex.count, _BLOCK_ROWS):
            with np.errstate(over="ignore"):  # beyond float32's range is infinity, which the renderer culls
                yield table[start : start + _BLOCK_ROWS, order].astype(np.float32)
        return

    codes = list(vertex.properties.values())
    uniform = len(set(codes)) == 1
    if uniform:
        dtype = np.dtype(header.byte_order + codes[0])
        shape: tuple[int, ...] = (vertex.count, len(codes))
    else:
        dtype = np.dtype([(f"c{i}", header.byte_order + code) for i, code in enumerate(codes)])
        shape = (vertex.count,)
    order = [list(vertex.properties).index(name) for name in names]
    try:
        mapped = np.memmap(header.path, dtype=dtype, mode="r", offset=vertex.offset, shape=shape)
    except ValueError as error:  # the file shrank since its header was read
        raise ValueError(f"{header.path}: could not be mapped: {error}") from None
    for start in range(0, vertex.count, _BLOCK_ROWS):
        block = mapped[start : start + _BLOCK_ROWS]
        with np.errstate(over="ignore", invalid="ignore"):
            if uniform:
                yield np.ascontiguousarray(block[:, order], dtype=np.float32)
            else:
                rows = np.empty((len(block), len(names)), dtype=np.float32)
                for column, index in enumerate(order):
                    rows[:, column] = block[f"c{index}"]
                yield rows


def _ascii_rows(header: PlyHeader, vertex: PlyElement) -> np.ndarray:
    """The vertex element of an ASCII file as float64 [count, properties]."""
    skipped = 0
    for element in header.elements.values():
        if element is vertex:
            break
        skipped += element.count
    with open_regular(header.path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "input contained no data" is an error of ours below
        file.seek(header.data_offset)
        try:
            table = np.loadtxt(
                file,
                dtype=np.float64,
                comments=None,
                skiprows=skipped,
                max_rows=vertex.count,
                ndmin=2,
                encoding="latin1",
            )
        except (ValueError, OverflowError) as error:
            reason = str(error).split(";")[0]  # numpy goes on with advice on its own arguments
            raise ValueError(f"{header.path}: the vertex element cannot be read as ASCII numbers: {reason}") from None
    if table.shape != (vertex.count, len(vertex.properties)):
        raise ValueError(
            f"{header.path}: the vertex element must have {vertex.count:,} rows of {len(vertex.properties)} values, "
            f"the file ends at byte {header.file_size:,} after {table.shape[0]:,} rows of {table.shape[1]}"
        )
    return table
