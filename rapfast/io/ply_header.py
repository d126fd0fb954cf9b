"""The header of a PLY file, read under suspicion.

Follows Greg Turk's description of the format (1994) for headers; of the body only fixed-size scalar
properties are supported, which is all that Gaussian scenes use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .files import PathLike, open_regular, shorten

#: A scene of SH degree 4 needs 3 KiB; a header that goes on and on is an attack or not a header.
MAX_HEADER_BYTES = 64 << 10

#: PLY's scalar types, old and new names -> numpy's type code without byte order.
SCALAR_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip

_FORMATS = ("ascii", "binary_little_endian", "binary_big_endian")


@dataclass
class PlyElement:
    """One `element` of the header: `count` records of `stride` bytes, the first at byte `offset` (binary only)."""

    name: str
    count: int
    properties: dict[str, str]  # name -> numpy type code, in file order
    offset: int = 0

    @property
    def stride(self) -> int:
        return sum(int(code[1]) for code in self.properties.values())


@dataclass
class PlyHeader:
    """What the header says, checked against the size of the file."""

    path: Path
    format: str  # one of "ascii", "binary_little_endian", "binary_big_endian"
    elements: dict[str, PlyElement]  # in file order
    data_offset: int  # first byte after end_header's line
    file_size: int  # bytes
    data_size: int  # bytes that the elements take (binary), 0 for ascii

    @property
    def byte_order(self) -> str:
        return ">" if self.format == "binary_big_endian" else "<"

    @property
    def is_compressed(self) -> bool:
        """Whether this is SuperSplat's compressed PLY (packed integers and chunk bounds)."""
        vertex = self.elements.get("vertex")
        return vertex is not None and "packed_position" in vertex.properties


def read_header(path: PathLike) -> PlyHeader:
    """Read and check the header of a PLY file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a PLY file; a header over 64 KiB, without end or not UTF-8; list, duplicate or
            unknown-typed properties; duplicate elements; a bad count; or elements that need more bytes than the
            file has, in which case the sentence names the byte at which the file ends.
    """
    with open_regular(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(MAX_HEADER_BYTES)
    path = Path(path)
    lines, data_offset = _header_lines(path, start, file_size)
    format_name, elements = _parse(path, lines)

    header = PlyHeader(path, format_name, elements, data_offset, file_size, 0)
    position = data_offset
    for element in elements.values():
        element.offset = position
        # A row of ASCII takes at least one digit and one separator per value; the last separator may be absent.
        minimum = element.count * (element.stride if format_name != "ascii" else 2 * len(element.properties))
        position += minimum
        if position - (format_name == "ascii") > file_size:
            if format_name == "ascii":
                raise ValueError(
                    f"{path}: truncated: element {element.name} of {element.count:,} rows x "
                    f"{len(element.properties)} values cannot fit, the file ends at byte {file_size:,}"
                )
            raise ValueError(
                f"{path}: truncated at byte {file_size:,}: element {element.name} needs {element.count:,} x "
                f"{element.stride} bytes from byte {element.offset:,} on, up to byte {position:,}"
            )
    if format_name != "ascii":
        header.data_size = position - data_offset
    return header


def _header_lines(path: Path, start: bytes, file_size: int) -> tuple[list[str], int]:
    """The header's lines without their endings (LF or CRLF), and the offset of the first byte behind it."""
    if start[:3] != b"ply" or start[3:4] not in (b"\n", b"\r"):
        raise ValueError(f"{path}: not a PLY file: it must begin with a line 'ply', got {start[:16]!r}")
    lines: list[str] = []
    position = 0
    while True:
        end = start.find(b"\n", position)
        if end < 0:
            if file_size > MAX_HEADER_BYTES:
                raise ValueError(f"{path}: no end_header within the first {MAX_HEADER_BYTES:,} bytes")
            raise ValueError(f"{path}: truncated at byte {file_size:,}: the header has no end_header line")
        raw = start[position:end]
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: header is not UTF-8 at byte {position + error.start:,}") from None
        position = end + 1
        if line.strip() == "end_header":
            return lines, position
        lines.append(line)


def _parse(path: Path, lines: list[str]) -> tuple[str, dict[str, PlyElement]]:
    format_name: str | None = None
    elements: dict[str, PlyElement] = {}
    current: PlyElement | None = None
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        where = f"{path}: header line {number} ({shorten(line)})"
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format":
            if format_name is not None:
                raise ValueError(f"{where}: a second format line")
            if len(words) != 3 or words[1] not in _FORMATS or words[2] != "1.0":
                raise ValueError(f"{where}: the format must be one of {', '.join(_FORMATS)}, version 1.0")
            format_name = words[1]
        elif words[0] == "element":
            if len(words) != 3:
                raise ValueError(f"{where}: expected 'element NAME COUNT'")
            # isdecimal also takes other scripts' digits, and 10^18 records exceed any file.
            if not (words[2].isascii() and words[2].isdecimal() and len(words[2]) <= 18):
                raise ValueError(f"{where}: the count must be a whole number >= 0, got {shorten(words[2])}")
            if words[1] in elements:
                raise ValueError(f"{where}: a second element {shorten(words[1])}")
            current = elements[words[1]] = PlyElement(words[1], int(words[2]), {})
        elif words[0] == "property":
            if current is None:
                raise ValueError(f"{where}: a property before any element")
            if len(words) > 1 and words[1] == "list":
                raise ValueError(f"{where}: list properties are not supported")
            if len(words) != 3:
                raise ValueError(f"{where}: expected 'property TYPE NAME'")
            if words[1] not in SCALAR_TYPES:
                raise ValueError(f"{where}: unknown type {shorten(words[1])}, expected {', '.join(SCALAR_TYPES)}")
            if words[2] in current.properties:
                raise ValueError(f"{where}: a second property {shorten(words[2])} in element {current.name}")
            current.properties[words[2]] = SCALAR_TYPES[words[1]]
        else:
            raise ValueError(f"{where}: expected format, comment, obj_info, element, property or end_header")
    if format_name is None:
        raise ValueError(f"{path}: the header has no format line")
    return format_name, elements
