"""The compressed formats, decoded and encoded by gsply behind checks of our own.

gsply decodes in compiled loops without bounds checks and allocates what a header says. Here every count is held
against the bytes that are there before gsply sees the file, and whatever it raises becomes a sentence.

Formats: https://github.com/playcanvas/splat-transform (compressed PLY, SOG) and https://github.com/nianticlabs/spz.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..scene import Scene
from .activations import activate_, log_of, logit_of
from .atomic import atomic_path
from .files import PathLike, check_regular, open_regular, read_capped
from .ply_header import PlyElement, read_header

_CHUNK = 256  # Gaussians per chunk of a compressed PLY
_CHUNK_NAMES = [
    f"{end}_{axis}"
    for axes in (("x", "y", "z"), ("scale_x", "scale_y", "scale_z"), ("r", "g", "b"))
    for end in ("min", "max")
    for axis in axes
]
_PACKED_NAMES = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]

_SPZ_MAGIC = b"NGSP"
_SPZ_HEADER = struct.Struct("<4sIIBBBB")  # magic, version, count, SH degree, fractional bits, flags, reserved/streams
_SPZ_EXTENSIONS = 0x2  # flag: records of vendors follow

#: Files are read whole by gsply; a compressed scene of this size would hold over 200 million Gaussians.
MAX_FILE_BYTES = 4 << 30


def load_compressed_ply(path: PathLike) -> Scene:
    """Load SuperSplat's compressed PLY (chunks of 256 with bounds, 16 bytes a Gaussian, optional 8-bit SH)."""
    gsply = _gsply(path)
    header = read_header(path)
    path = header.path
    names = list(header.elements)
    if header.format != "binary_little_endian" or names not in (["chunk", "vertex"], ["chunk", "vertex", "sh"]):
        raise ValueError(
            f"{path}: a compressed PLY must be binary_little_endian with elements chunk, vertex and perhaps sh, "
            f"got {header.format} with {', '.join(names)}"
        )
    chunk, vertex, sh = header.elements["chunk"], header.elements["vertex"], header.elements.get("sh")
    _expect(path, chunk, _CHUNK_NAMES, "f4")
    _expect(path, vertex, _PACKED_NAMES, "u4")
    chunks = -(-vertex.count // _CHUNK)
    if chunk.count != chunks:
        raise ValueError(f"{path}: must have {chunks:,} chunks for {vertex.count:,} Gaussians, got {chunk.count:,}")
    if sh is not None:
        if len(sh.properties) not in (9, 24, 45) or sh.count != vertex.count:
            raise ValueError(
                f"{path}: element sh must have {vertex.count:,} rows of 9, 24 or 45 columns, got {sh.count:,} rows of "
                f"{len(sh.properties)}"
            )
        _expect(path, sh, [f"f_rest_{i}" for i in range(len(sh.properties))], "u1")
    if header.data_offset + header.data_size < header.file_size:
        extra = header.file_size - header.data_offset - header.data_size
        warnings.warn(f"{path}: ignoring {extra:,} bytes behind the last element", stacklevel=3)
    if vertex.count == 0:
        return _empty(sh and len(sh.properties) // 3)

    with open_regular(path) as file:
        file.seek(header.data_offset)
        body = file.read(header.data_size)
    if len(body) != header.data_size:
        raise ValueError(f"{path}: truncated while it was read")
    # A header in gsply's own words: it then sees nothing that was not checked above.
    canonical = "\n".join(_compressed_header(header.elements.values())).encode()
    data = _decode(path, "compressed PLY", lambda: gsply.decompress_from_bytes(canonical + body))
    return _scene(path, data, vertex.count, sh and len(sh.properties) // 3)


def load_spz(path: PathLike) -> Scene:
    """Load Niantic's SPZ, version 2 and 3 (gzip) or 4 (zstd), turned into the frame of training's PLY."""
    gsply = _gsply(path)
    path = check_regular(path)
    raw = read_capped(path, MAX_FILE_BYTES, "an SPZ file")
    if raw[:4] == _SPZ_MAGIC:
        count, degree, flags = _check_spz_zstd(path, raw)
    else:
        count, degree, flags = _check_spz_gzip(path, raw)
    if flags & _SPZ_EXTENSIONS:
        warnings.warn(f"{path}: ignoring the vendor extensions of this SPZ file", stacklevel=3)
    coefficients = (degree + 1) ** 2 - 1
    if count == 0:
        return _empty(coefficients)
    data = _decode(path, "SPZ", lambda: gsply.read_spz(path))
    return _half_turn(_scene(path, data, count, coefficients))


def load_sog(path: PathLike) -> Scene:
    """Load PlayCanvas's SOG: a .sog bundle, or the folder or meta.json of an unbundled one."""
    _gsply(path)
    from . import sog  # needs gsply's own extras, which are looked for there

    data, count, coefficients = sog.read(Path(path), _decode)
    if count == 0:
        return _empty(coefficients)
    return _scene(Path(path), data, count, coefficients)


def save_compressed_ply(scene: Scene, path: PathLike) -> None:
    """Write SuperSplat's compressed PLY. Gaussians are put in Morton order, so that chunks are small in space."""
    gsply = _gsply(path)
    _check_encodable(scene, path)
    scene = scene.to("cpu", torch.float32).select(morton_order(scene.means.cpu()))
    arrays = _arrays(scene)
    means = arrays.pop("means")
    payload = _decode(Path(path), "compressed PLY", lambda: gsply.compress_to_bytes(means, **arrays))
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload)


def save_spz(scene: Scene, path: PathLike) -> None:
    """Write SPZ version 3. Positions keep 12 fractional bits, fewer where the scene reaches beyond +-2048 units;
    log scales are clipped to -10..5.9 and SH coefficients beyond the first to +-1, as the format does."""
    gsply = _gsply(path)
    _check_encodable(scene, path)
    scene = _half_turn(scene.to("cpu", torch.float32))
    reach = float(scene.means.abs().max())
    bits = 12 if reach < 2047 else 22 - math.frexp(reach)[1]  # 24-bit fixed point: reach * 2^bits < 2^23
    if bits < 1:
        raise ValueError(f"{path}: SPZ holds coordinates up to 2^21, the scene reaches {reach:g}")
    arrays = _arrays(scene)
    data = gsply.GSData.from_arrays(arrays.pop("means"), **arrays, format="ply")
    with atomic_path(path) as temporary:
        _decode(Path(path), "SPZ", lambda: gsply.write_spz(temporary, data, version=3, fractional_bits=bits))


def morton_order(means: torch.Tensor) -> torch.Tensor:
    """[N] int64 permutation that sorts points [N,3] along a Z-order curve of 21 bits per axis."""
    low, high = means.amin(dim=0), means.amax(dim=0)
    cells = (means - low).double() / (high - low).clamp(min=1e-30).double() * ((1 << 21) - 1)
    code = torch.zeros(len(means), dtype=torch.int64, device="cpu")
    for axis in range(3):
        bits = cells[:, axis].to(torch.int64)
        for shift, mask in (
            (32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F),
            (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249),
        ):  # fmt: skip
            bits = (bits | (bits << shift)) & mask
        code |= bits << axis
    return torch.argsort(code, stable=True)


def check_density(path: Path, count: int, size: int) -> None:
    """Refuse counts that no real file of this size holds: every format spends several bytes on a Gaussian."""
    if count > size + 65536:
        raise ValueError(f"{path}: claims {count:,} Gaussians in {size:,} bytes")


def _gsply(path: PathLike) -> Any:
    try:
        import gsply

        if getattr(gsply, "__file__", None) is None:
            # numba's cache keeps the folder after pip uninstall, and Python imports that as a namespace package
            raise ModuleNotFoundError("gsply")
    except ModuleNotFoundError:
        raise ImportError(f"{path}: compressed scene formats need gsply: pip install 'rapfast[formats]'") from None
    except Exception as error:  # noqa: BLE001 - numba refuses some numpy versions and unwritable caches in its own ways
        raise ImportError(f"{path}: compressed scene formats need gsply, which does not load here: {error}") from error
    return gsply


def _decode(path: Path, kind: str, call: Callable[[], Any]) -> Any:
    """Run a call into gsply; what it raises beyond OSError and ImportError becomes a ValueError naming the file."""
    try:
        return call()
    except ImportError as error:
        raise ImportError(f"{path}: {error}; pip install 'rapfast[formats]'") from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - a library's failure on a damaged file can be of any type
        raise ValueError(f"{path}: {kind} failed: {type(error).__name__}: {str(error)[:200]}") from error


def _expect(path: Path, element: PlyElement, names: list[str], code: str) -> None:
    if element.properties != dict.fromkeys(names, code) or list(element.properties) != names:
        raise ValueError(f"{path}: element {element.name} must have the {code} properties {', '.join(names)}")


def _compressed_header(elements: Any) -> list[str]:
    types = {"f4": "float", "u4": "uint", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0"]
    for element in elements:
        lines.append(f"element {element.name} {element.count}")
        lines += [f"property {types[code]} {name}" for name, code in element.properties.items()]
    return [*lines, "end_header", ""]


def _check_spz_header(path: Path, head: bytes, versions: tuple[int, ...], size: int) -> tuple[int, int, int, int]:
    if len(head) < _SPZ_HEADER.size:
        raise ValueError(f"{path}: truncated: an SPZ header takes {_SPZ_HEADER.size} bytes, got {len(head)}")
    magic, version, count, degree, bits, flags, _ = _SPZ_HEADER.unpack(head[: _SPZ_HEADER.size])
    if magic != _SPZ_MAGIC:
        raise ValueError(f"{path}: is compressed but not an SPZ file: it begins with {magic!r}")
    if version not in versions:
        raise ValueError(f"{path}: SPZ version {version} is not supported here, only {', '.join(map(str, versions))}")
    if degree > 3:
        raise ValueError(f"{path}: SPZ of SH degree {degree} is not supported, only 0 to 3")
    if not 1 <= bits <= 24:
        raise ValueError(f"{path}: SPZ fractional bits must be 1..24, got {bits}")
    check_density(path, count, size)
    rotation = 3 if version == 2 else 4
    return count, degree, flags, count * (9 + 1 + 3 + 3 + rotation + 3 * ((degree + 1) ** 2 - 1))


def _check_spz_gzip(path: Path, raw: bytes) -> tuple[int, int, int]:
    """Count, SH degree and flags of a gzip SPZ, once its stream is known to unpack to the size the header says."""
    engine = zlib.decompressobj(wbits=31)
    try:
        head = engine.decompress(raw, _SPZ_HEADER.size)
        count, degree, flags, body = _check_spz_header(path, head, (2, 3), len(raw))
        total, limit = len(head), _SPZ_HEADER.size + body + (1 << 20)  # a MiB of extensions at most
        while not engine.eof and total <= limit:
            piece = engine.decompress(engine.unconsumed_tail, 1 << 20)
            if not piece:
                break
            total += len(piece)
    except zlib.error as error:
        raise ValueError(f"{path}: damaged gzip stream: {error}") from None
    if not engine.eof and total <= limit:
        raise ValueError(f"{path}: truncated at byte {len(raw):,}: the gzip stream does not end")
    if total > limit or total < _SPZ_HEADER.size + body or engine.unused_data:
        raise ValueError(
            f"{path}: SPZ of {count:,} Gaussians must unpack to {_SPZ_HEADER.size + body:,} bytes and end there"
        )
    return count, degree, flags


def _check_spz_zstd(path: Path, raw: bytes) -> tuple[int, int, int]:
    """The same for version 4, whose table of contents gsply checks; here what the zstd frames themselves claim."""
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{path}: SPZ version 4 needs zstandard: pip install 'rapfast[formats]'") from None
    count, degree, flags, body = _check_spz_header(path, raw, (4,), len(raw))
    if len(raw) < 32:
        raise ValueError(f"{path}: truncated: an SPZ 4 header takes 32 bytes, got {len(raw)}")
    streams, toc = raw[15], struct.unpack_from("<I", raw, 16)[0]
    position = toc + 16 * streams
    if toc < 32 or position > len(raw):
        raise ValueError(f"{path}: truncated at byte {len(raw):,}: the table of contents does not fit")
    unpacked = 0
    for index in range(streams):
        packed, size = struct.unpack_from("<QQ", raw, toc + 16 * index)
        if packed > len(raw) - position:
            raise ValueError(f"{path}: truncated at byte {len(raw):,}: stream {index} needs {packed:,} bytes")
        try:
            claimed = zstandard.frame_content_size(raw[position : position + packed])
        except zstandard.ZstdError as error:
            raise ValueError(f"{path}: stream {index} is not zstd: {error}") from None
        if claimed not in (size, -1):
            raise ValueError(f"{path}: stream {index} claims {claimed:,} bytes, the table of contents {size:,}")
        position += packed
        unpacked += size
    if unpacked != body:
        raise ValueError(f"{path}: SPZ of {count:,} Gaussians must unpack to {body:,} bytes, got {unpacked:,}")
    return count, degree, flags


def _scene(path: Path, data: Any, count: int, coefficients: int | None) -> Scene:
    """A Scene of gsply's arrays (logarithms and logits), which are checked for shape and copied."""
    coefficients = coefficients or 0
    shapes = {"means": (count, 3), "quats": (count, 4), "scales": (count, 3), "opacities": (count,), "sh0": (count, 3)}
    if coefficients:
        shapes["shN"] = (count, coefficients, 3)
    arrays = {}
    for name, shape in shapes.items():
        values = np.asarray(getattr(data, name))
        if values.size != math.prod(shape):
            raise ValueError(f"{path}: decoded {name} must be {list(shape)}, gsply gave {list(values.shape)}")
        arrays[name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
    sh = arrays.pop("sh0")[:, None]
    if coefficients:
        sh = torch.cat([sh, arrays.pop("shN")], dim=1)
    activate_(arrays["quats"], arrays["scales"], arrays["opacities"])
    return Scene(**arrays, sh=sh)


def _empty(coefficients: int | None) -> Scene:
    return Scene(
        torch.zeros(0, 3, device="cpu"),
        torch.zeros(0, 4, device="cpu"),
        torch.zeros(0, 3, device="cpu"),
        torch.zeros(0, device="cpu"),
        torch.zeros(0, (coefficients or 0) + 1, 3, device="cpu"),
    )


def _check_encodable(scene: Scene, path: PathLike) -> None:
    if scene.sh is None or scene.intrinsic is not None:
        raise ValueError(f"{path}: compressed formats hold spherical harmonics only; write a .ply")
    if scene.sh_degree > 3:
        raise ValueError(f"{path}: compressed formats hold SH degree 0 to 3, the scene has 4")
    if len(scene) == 0:
        raise ValueError(f"{path}: compressed formats cannot hold a scene of 0 Gaussians; write a .ply")
    bad = int((~scene.valid()).sum())
    if bad:
        raise ValueError(
            f"{path}: {bad:,} of {len(scene):,} Gaussians are not finite, or have a zero quaternion, a negative scale "
            "or an opacity outside 0..1, which compressed formats cannot hold; "
            "scene.select(scene.valid()) leaves them out"
        )


def _arrays(scene: Scene) -> dict[str, np.ndarray | None]:
    """gsply's arrays of a float32 CPU scene: logarithms, logits, and SH split into the first and the others."""
    sh = scene.sh.contiguous()
    return {
        "means": scene.means.contiguous().numpy(),
        "scales": log_of(scene.scales).contiguous().numpy(),
        "quats": torch.nn.functional.normalize(scene.quats.double(), dim=1).float().numpy(),
        "opacities": logit_of(scene.opacities).contiguous().numpy(),
        "sh0": sh[:, 0].contiguous().numpy(),
        "shN": sh[:, 1:].contiguous().numpy() if sh.shape[1] > 1 else None,
    }


def _half_turn(scene: Scene) -> Scene:
    """The scene turned by half a turn about x: y -> -y, z -> -z, between SPZ's axes (y up) and training's (y down).

    The same map both ways. A quaternion (w, x, y, z) becomes (w, x, -y, -z); the real spherical harmonic of degree
    l and order m changes sign by its parity in y (odd for m < 0) and in z (that of l - |m|).
    """
    flip = torch.tensor([1.0, -1.0, -1.0], device="cpu")
    signs = [
        (-1.0 if m < 0 else 1.0) * (-1.0) ** (degree - abs(m))
        for degree in range(scene.sh_degree + 1)
        for m in range(-degree, degree + 1)
    ]
    return Scene(
        means=scene.means * flip,
        quats=scene.quats * torch.tensor([1.0, 1.0, -1.0, -1.0], device="cpu"),
        scales=scene.scales,
        opacities=scene.opacities,
        sh=scene.sh * torch.tensor(signs, device="cpu")[None, :, None],
    )
