"""SOG files: what is checked of them before gsply decodes.

A SOG is a meta.json and WebP pictures of one pixel per Gaussian, in a zip (.sog) or in a folder. gsply indexes
codebooks and pixels without bounds checks, so lengths and picture sizes are verified here.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compressed import MAX_FILE_BYTES, check_density
from .files import array, check_regular, integer, read_capped, shorten

_COEFFICIENTS = {1: 3, 2: 8, 3: 15}  # SH bands -> coefficients beyond the first
_MAX_META_BYTES = 16 << 20


def read(path: Path, decode: Callable[[Path, str, Callable[[], Any]], Any]) -> tuple[Any, int, int]:
    """gsply's arrays, the number of Gaussians, and the number of SH coefficients beyond the first.

    `decode` runs a call into the library and names the file in what it raises.
    """
    try:
        import gsply.sog_reader as reader
        import imagecodecs  # noqa: F401 - the reader needs it and says so only later
    except ImportError:
        raise ImportError(f"{path}: SOG needs gsply and imagecodecs: pip install 'rapfast[formats]'") from None
    try:
        from PIL import Image  # noqa: F401
    except ImportError:
        raise ImportError(f"{path}: SOG needs Pillow: pip install pillow") from None

    if path.is_dir() or path.name == "meta.json":
        folder = path if path.is_dir() else path.parent
        load = _folder_loader(folder)
        total = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
        source: Any = folder
    else:
        source = read_capped(check_regular(path), MAX_FILE_BYTES, "a SOG file")
        load = _zip_loader(path, source)
        total = len(source)
    count, coefficients = _check(path, load, total)
    if count == 0:
        return None, 0, coefficients
    return decode(path, "SOG", lambda: reader.sogread(source)), count, coefficients


def _folder_loader(folder: Path) -> Callable[[str], bytes]:
    def load(name: str) -> bytes:
        limit = _MAX_META_BYTES if name == "meta.json" else MAX_FILE_BYTES
        return read_capped(folder / name, limit, "a part of a SOG")

    return load


def _zip_loader(path: Path, data: bytes) -> Callable[[str], bytes]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except Exception as error:  # noqa: BLE001 - zipfile raises several types on damaged archives
        raise ValueError(f"{path}: damaged zip archive: {error}") from None
    # gsply unpacks every entry. Pictures do not shrink in a zip, so honest entries are about as large as the file.
    if sum(info.file_size for info in infos) > 4 * len(data) + _MAX_META_BYTES:
        raise ValueError(f"{path}: the archive of {len(data):,} bytes claims far more content than that")
    names = [info.filename for info in infos]

    def load(name: str) -> bytes:
        if names.count(name) != 1:
            raise ValueError(f"{path}: the archive must hold {shorten(name)} once, it does {names.count(name)} times")
        try:
            return archive.read(name)
        except Exception as error:  # noqa: BLE001 - as above, and zlib's
            raise ValueError(f"{path}: {shorten(name)} in the archive is damaged: {error}") from None

    return load


def _check(path: Path, load: Callable[[str], bytes], total: int) -> tuple[int, int]:
    try:
        meta = json.loads(load("meta.json").decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: meta.json is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: meta.json is not usable: {error}") from None
    if not isinstance(meta, dict) or meta.get("version") not in (None, 2):
        raise ValueError(f"{path}: meta.json must be SOG of version 2 or of the first, without a version")
    legacy = meta.get("version") is None
    parts = {name: meta.get(name) for name in ("means", "scales", "quats", "sh0", *(("shN",) if "shN" in meta else ()))}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{path}: meta.json must have an object {name}, got {shorten(part)}")

    where = f"{path}: meta.json"
    if legacy:
        shape = parts["means"].get("shape")
        count = integer(shape[0] if isinstance(shape, list) and shape else None, f"{where}: means.shape[0]")
    else:
        count = integer(meta.get("count"), f"{where}: count")
    if count < 0:
        raise ValueError(f"{where}: the count must not be negative, got {count}")
    check_density(path, count, total)
    coefficients = _check_values(where, parts, legacy)
    for name, part in parts.items():
        files = 2 if name in ("means", "shN") else 1
        listed = part.get("files")
        if not isinstance(listed, list) or len(listed) < files or not all(isinstance(f, str) for f in listed[:files]):
            raise ValueError(f"{where}: {name}.files must name {files} files, got {shorten(listed)}")
        for index, file in enumerate(listed[:files]):
            if not file or "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
                raise ValueError(f"{where}: {name}.files must be plain names, got {shorten(file)}")
            width, height = _picture_size(path, file, load(file))
            if name == "shN" and index == 0:
                wide = [64 * c for c in _COEFFICIENTS.values()] if legacy else [64 * coefficients]
                if width not in wide or height > 1024:
                    raise ValueError(f"{path}: {file} of {width}x{height} pixels is no palette of this SOG")
                if legacy:
                    coefficients = width // 64
            elif not count <= width * height <= 4 * count + 65536:
                raise ValueError(f"{path}: {file} of {width}x{height} pixels cannot hold {count:,} Gaussians, one each")
    return count, coefficients


def _check_values(where: str, parts: dict[str, dict], legacy: bool) -> int:
    """Ranges and codebooks; returns the number of SH coefficients beyond the first (0 for legacy: its picture says)."""
    for end in ("mins", "maxs"):
        array(parts["means"].get(end), ((3,),), f"{where}: means.{end}")
        if legacy:
            array(parts["scales"].get(end), ((3,),), f"{where}: scales.{end}")
            array(parts["sh0"].get(end), ((4,),), f"{where}: sh0.{end}")
    if not legacy:
        for name in ("scales", "sh0", *(("shN",) if "shN" in parts else ())):
            codebook = parts[name].get("codebook")
            if not isinstance(codebook, list) or len(codebook) != 256:
                raise ValueError(f"{where}: {name}.codebook must hold 256 numbers, got {shorten(codebook)}")
            array(codebook, ((256,),), f"{where}: {name}.codebook")
    if "shN" not in parts or legacy:
        return 0
    bands = parts["shN"].get("bands")
    if isinstance(bands, bool) or not isinstance(bands, int) or bands not in _COEFFICIENTS:
        raise ValueError(f"{where}: shN.bands must be 1, 2 or 3, got {shorten(bands)}")
    if not 0 <= integer(parts["shN"].get("count"), f"{where}: shN.count") <= 65536:
        raise ValueError(f"{where}: shN.count must be within 0..65536, got {shorten(parts['shN']['count'])}")
    return _COEFFICIENTS[bands]


def _picture_size(path: Path, name: str, data: bytes) -> tuple[int, int]:
    from PIL import Image

    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError(f"{path}: {name} is not a WebP picture")
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            return image.size
    except Exception as error:  # noqa: BLE001 - Pillow raises several types on damaged files
        raise ValueError(f"{path}: {name} is not a readable WebP picture: {error}") from None
