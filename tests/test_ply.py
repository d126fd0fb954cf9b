"""PLY scenes: layouts, activations, round trips, and a sentence for every kind of bad file."""

from __future__ import annotations

import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from rapfast import Scene, load_ply, save_ply

GEOMETRY = ["x", "y", "z", "nx", "ny", "nz"]
TAIL = ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def inria_names(degree: int) -> list[str]:
    rest = 3 * ((degree + 1) ** 2 - 1)
    return GEOMETRY + [f"f_dc_{i}" for i in range(3)] + [f"f_rest_{i}" for i in range(rest)] + TAIL


RAP_NAMES = GEOMETRY + [f"f_intr_{i}" for i in range(48)] + TAIL


def header(names: list[str], count: int | str, kind: str = "float", fmt: str = "binary_little_endian") -> bytes:
    lines = ["ply", f"format {fmt} 1.0", "comment a scene", f"element vertex {count}"]
    return "\n".join([*lines, *(f"property {kind} {n}" for n in names), "end_header", ""]).encode()


def table(names: list[str], count: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, len(names))).astype(np.float32)


def check_against(scene: Scene, names: list[str], values: np.ndarray) -> None:
    """Compare with a column-by-column reading that shares no code with the reader."""
    column = {name: values[:, i].astype(np.float64) for i, name in enumerate(names)}
    stack = lambda *keys: np.stack([column[k] for k in keys], axis=1)  # noqa: E731
    np.testing.assert_array_equal(scene.means, stack("x", "y", "z").astype(np.float32))
    np.testing.assert_allclose(scene.scales, np.exp(stack("scale_0", "scale_1", "scale_2")), rtol=1e-6)
    np.testing.assert_allclose(scene.opacities, 1 / (1 + np.exp(-column["opacity"])), rtol=1e-6)
    quats = stack("rot_0", "rot_1", "rot_2", "rot_3")
    np.testing.assert_allclose(scene.quats, quats / np.linalg.norm(quats, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    if "f_intr_0" in column:
        assert scene.sh is None
        for c in range(3):
            for k in range(16):
                np.testing.assert_array_equal(scene.intrinsic[:, k, c], column[f"f_intr_{c * 16 + k}"])
        return
    count = scene.sh.shape[1]
    for c in range(3):
        np.testing.assert_array_equal(scene.sh[:, 0, c], column[f"f_dc_{c}"])
        for k in range(1, count):
            np.testing.assert_array_equal(scene.sh[:, k, c], column[f"f_rest_{c * (count - 1) + k - 1}"])


@pytest.mark.parametrize("names", [*map(inria_names, range(5)), RAP_NAMES], ids=["0", "1", "2", "3", "4", "rap"])
def test_columns_and_activations(tmp_path: Path, names: list[str]) -> None:
    values = table(names, 9)
    path = tmp_path / "a.ply"
    path.write_bytes(header(names, 9) + values.tobytes())
    scene = load_ply(path)
    assert scene.dtype == torch.float32
    check_against(scene, names, values)


def test_more_rows_than_one_block(tmp_path: Path) -> None:
    names = inria_names(0)
    values = table(names, 40_000)
    (tmp_path / "a.ply").write_bytes(header(names, 40_000) + values.tobytes())
    check_against(load_ply(tmp_path / "a.ply"), names, values)


@pytest.mark.parametrize("names", [inria_names(1), RAP_NAMES], ids=["inria", "rap"])
@pytest.mark.parametrize("fmt", ["binary_big_endian", "ascii"])
def test_other_encodings(tmp_path: Path, names: list[str], fmt: str) -> None:
    values = table(names, 6)
    if fmt == "ascii":
        body = "\n".join(" ".join(repr(float(v)) for v in row) for row in values).encode()
    else:
        body = values.astype(">f4").tobytes()
    path = tmp_path / "a.ply"
    path.write_bytes(header(names, 6, fmt=fmt) + body)
    check_against(load_ply(path), names, values)


def test_any_order_any_type_and_unknown_columns(tmp_path: Path) -> None:
    names = inria_names(0)[::-1]
    types = {"x": "double", "y": "float64", "nx": "uchar", "f_dc_0": "short", "rot_1": "int32"}
    codes = {"double": "d", "float64": "d", "uchar": "B", "short": "h", "int32": "i"}
    lines = ["ply", "format binary_little_endian 1.0", "element vertex 2"]
    lines += [f"property {types.get(n, 'float')} {n}" for n in names] + ["property uint label", "end_header", ""]
    layout = struct.Struct("<" + "".join(codes.get(types.get(n, ""), "f") for n in names) + "I")
    rows = [[float(i % 3) + 1 + row if n != "x" else 0.1 for i, n in enumerate(names)] for row in range(2)]
    integers = {i for i, n in enumerate(names) if types.get(n) in ("uchar", "short", "int32")}
    body = b"".join(layout.pack(*(int(v) if i in integers else v for i, v in enumerate(r)), 9) for r in rows)
    path = tmp_path / "a.ply"
    path.write_bytes("\n".join(lines).encode() + body)
    check_against(load_ply(path), names, np.array(rows))


def test_other_elements_are_skipped(tmp_path: Path) -> None:
    names = inria_names(0)
    values = table(names, 3)
    before = b"ply\nformat binary_little_endian 1.0\nelement camera 2\nproperty double fov\nproperty uchar id\n"
    vertex = header(names, 3).split(b"comment a scene\n")[1].removesuffix(b"end_header\n")
    after = b"element face 4\nproperty short a\nend_header\n"
    path = tmp_path / "a.ply"
    path.write_bytes(before + vertex + after + bytes(18) + values.tobytes() + bytes(8))
    check_against(load_ply(path), names, values)


def test_windows_line_ends_and_odd_comments(tmp_path: Path) -> None:
    names = inria_names(0)
    values = table(names, 2)
    values[0, 0] = np.frombuffer(b"\n\r\n\x00", np.float32)[0]  # the body may look like text
    head = header(names, 2).replace(b"comment a scene", "comment end_header é 漢 element vertex 9\nobj_info x".encode())
    path = tmp_path / "a.ply"
    path.write_bytes(head.replace(b"\n", b"\r\n") + values.tobytes())
    check_against(load_ply(path), names, values)


@pytest.mark.parametrize("fmt", ["binary_little_endian", "binary_big_endian", "ascii"])
def test_no_gaussians(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(header(inria_names(2), 0, fmt=fmt))
    scene = load_ply(path)
    assert len(scene) == 0
    assert scene.sh.shape == (0, 9, 3)
    save_ply(scene, path)
    assert len(load_ply(path)) == 0


def test_zero_quaternions_stay_and_tiny_and_huge_ones_are_normalised(tmp_path: Path) -> None:
    names = inria_names(0)
    values = table(names, 3)
    values[:, -4:] = [[0, 0, 0, 0], [3e-38, 0, 4e-38, 0], [0, 3e38, 0, -3e38]]
    path = tmp_path / "a.ply"
    path.write_bytes(header(names, 3) + values.tobytes())
    quats = load_ply(path).quats
    assert quats[0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(quats[1], torch.tensor([0.6, 0, 0.8, 0]))
    torch.testing.assert_close(quats[2], torch.tensor([0, 0.5**0.5, 0, -(0.5**0.5)]))


def test_trailing_bytes_warn(tmp_path: Path) -> None:
    names = inria_names(0)
    path = tmp_path / "a.ply"
    path.write_bytes(header(names, 2) + table(names, 2).tobytes() + b"tail")
    with pytest.warns(UserWarning, match=r"a\.ply: ignoring 4 bytes behind the last element"):
        assert len(load_ply(path)) == 2


# --- writing ---------------------------------------------------------------------------------------------------------


def random_scene(n: int, degree: int | None, dtype: torch.dtype = torch.float32) -> Scene:
    g = torch.Generator().manual_seed(11)
    colour = {"intrinsic": torch.randn(n, 16, 3, generator=g, dtype=dtype)}
    if degree is not None:
        colour = {"sh": torch.randn(n, (degree + 1) ** 2, 3, generator=g, dtype=dtype)}
    return Scene(
        torch.randn(n, 3, generator=g, dtype=dtype) * 100,
        torch.nn.functional.normalize(torch.randn(n, 4, generator=g, dtype=dtype), dim=1),
        torch.exp(torch.randn(n, 3, generator=g, dtype=dtype) * 4),
        torch.sigmoid(torch.randn(n, generator=g, dtype=dtype) * 4),
        **colour,
    )


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4, None])
def test_round_trip(tmp_path: Path, degree: int | None) -> None:
    scene = random_scene(300, degree)
    path = tmp_path / "a.ply"
    save_ply(scene, path)
    again = load_ply(path)
    assert torch.equal(again.means, scene.means)
    assert again.sh_degree == degree
    if degree is None:
        assert torch.equal(again.intrinsic, scene.intrinsic)
    else:
        assert torch.equal(again.sh, scene.sh)
    torch.testing.assert_close(again.scales, scene.scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(again.opacities, scene.opacities, rtol=1e-5, atol=0)
    torch.testing.assert_close(again.quats, scene.quats, rtol=0, atol=3e-7)


def test_the_ends_survive(tmp_path: Path) -> None:
    scene = random_scene(4, 0)
    scene.opacities[:] = torch.tensor([0.0, 1.0, 1e-30, 1 - 2**-24])
    scene.scales[:] = torch.tensor([[0.0], [1e-38], [1e38], [1.0]])
    path = tmp_path / "a.ply"
    save_ply(scene, path)
    again = load_ply(path)
    assert again.opacities[:2].tolist() == [0.0, 1.0]
    torch.testing.assert_close(again.opacities, scene.opacities, rtol=1e-5, atol=0)
    assert again.scales[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(again.scales, scene.scales, rtol=1e-5, atol=0)
    raw = np.frombuffer(path.read_bytes()[-4 * 4 * 17 :], np.float32)
    assert np.isfinite(raw).all()


def test_non_finite_values_come_back(tmp_path: Path) -> None:
    scene = random_scene(3, 0)
    scene.means[0, 0], scene.scales[1, 1], scene.opacities[2] = math.nan, math.inf, math.nan
    save_ply(scene, tmp_path / "a.ply")
    again = load_ply(tmp_path / "a.ply")
    assert math.isnan(again.means[0, 0])
    assert math.isinf(again.scales[1, 1])
    assert math.isnan(again.opacities[2])


def test_float64_and_non_contiguous_scenes_are_written(tmp_path: Path) -> None:
    scene = random_scene(10, 1, torch.float64)
    save_ply(scene.select(slice(None, None, 3)), tmp_path / "a.ply")
    again = load_ply(tmp_path / "a.ply")
    torch.testing.assert_close(again.means, scene.means[::3].float(), rtol=0, atol=0)


def test_the_written_header_is_inrias(tmp_path: Path) -> None:
    save_ply(random_scene(2, 1), tmp_path / "a.ply")
    expected = header(inria_names(1), 2).replace(b"comment a scene\n", b"")
    assert (tmp_path / "a.ply").read_bytes().startswith(expected)
    save_ply(random_scene(2, None), tmp_path / "b.ply")
    assert (tmp_path / "b.ply").read_bytes().startswith(header(RAP_NAMES, 2).replace(b"comment a scene\n", b""))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(b"old")
    scene = random_scene(3, 0)
    scene.scales[2, 1] = -0.5
    with pytest.raises(ValueError, match=r"scales must not be negative .* 1 of 3 .* number 2"):
        save_ply(scene, path)
    scene = random_scene(3, 0)
    scene.opacities[1] = 1.5
    with pytest.raises(ValueError, match=r"opacities must be within 0\.\.1 .* number 1 with 1\.5"):
        save_ply(scene, path)
    scene.sh = None
    with pytest.raises(ValueError, match="it has neither"):
        save_ply(scene, path)
    scene.sh, scene.intrinsic = torch.zeros(3, 1, 3), torch.zeros(3, 16, 3)
    with pytest.raises(ValueError, match="it has both"):
        save_ply(scene, path)
    with pytest.raises(TypeError, match=r"scene must be a rapfast\.Scene, got a dict"):
        save_ply({}, path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


# --- bad files -------------------------------------------------------------------------------------------------------


def vertex_header(*lines: str) -> bytes:
    return "\n".join(["ply", "format binary_little_endian 1.0", "element vertex 2", *lines, "end_header", ""]).encode()


GOOD = [f"property float {n}" for n in inria_names(0)]
DROP_X = [line for line in GOOD if line != "property float x"]

BAD = {
    "empty": (b"", r"not a PLY file"),
    "png": (b"\x89PNG\r\n\x1a\n", r"not a PLY file: it must begin with a line 'ply', got b'\\x89PNG"),
    "plyx": (b"plyx\n", r"not a PLY file"),
    "no end": (header(inria_names(0), 2)[:-4], r"truncated at byte \d+: the header has no end_header line"),
    "endless": (b"ply\n" + b"comment x\n" * 10_000, r"no end_header within the first 65,536 bytes"),
    "one line": (b"ply\n" + b"x" * 70_000, r"no end_header within the first 65,536 bytes"),
    "not utf-8": (b"ply\ncomment \xff\nend_header\n", r"header is not UTF-8 at byte 12"),
    "list": (vertex_header(*GOOD, "property list uchar int a"), r"list properties are not supported"),
    "missing": (vertex_header(*DROP_X) + bytes(128), r"the vertex element has no property x"),
    "duplicate": (vertex_header(*GOOD, "property float x"), r"a second property 'x' in element vertex"),
    "unknown type": (vertex_header(*GOOD, "property half y"), r"unknown type 'half', expected char"),
    "short property": (vertex_header(*GOOD, "property float"), r"expected 'property TYPE NAME'"),
    "second vertex": (vertex_header(*GOOD, "element vertex 2", *GOOD), r"a second element 'vertex'"),
    "negative": (header(inria_names(0), -1), r"the count must be a whole number >= 0, got '-1'"),
    "fraction": (header(inria_names(0), "2.5"), r"count must be a whole number"),
    "other digits": (header(inria_names(0), "٣"), r"count must be a whole number"),
    "absurd": (
        header(inria_names(0), 10**17),
        r"truncated at byte \d+: element vertex needs 100,000,000,000,000,000 x 68",
    ),
    "longer": (header(inria_names(0), 10**19), r"count must be a whole number"),
    "short body": (
        header(inria_names(0), 2) + bytes(135),
        r"truncated at byte 562: .* 2 x 68 bytes from byte 427 .* 563",
    ),
    "no format": (b"ply\nelement vertex 0\nend_header\n", r"has no format line"),
    "two formats": (b"ply\nformat ascii 1.0\nformat ascii 1.0\nend_header\n", r"a second format line"),
    "version": (b"ply\nformat ascii 2.0\nend_header\n", r"format must be one of"),
    "keyword": (vertex_header("bogus 1"), r"header line 4 \('bogus 1'\): expected format, comment"),
    "property first": (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", r"a property before any element"),
    "no vertex": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", r"has no vertex element, only face"),
    "no element": (b"ply\nformat ascii 1.0\nend_header\n", r"has no vertex element, only nothing"),
    "points only": (
        vertex_header("property float x") + bytes(8),
        r"not a Gaussian scene: .* no property y, z, opacity",
    ),
    "no colour": (header(GEOMETRY + TAIL, 0), r"has no colour: neither f_dc_0..2 \(INRIA\) nor f_intr_0..47 \(RAP\)"),
    "odd rest": (
        header([*inria_names(0), *(f"f_rest_{i}" for i in range(10))], 0),
        r"0, 9, 24, 45 or 72 columns .* got 10",
    ),
    "gap in rest": (header([*inria_names(0), *(f"f_rest_{i}" for i in range(1, 10))], 0), r"must have f_rest_0\.\.k"),
    "short intr": (header(RAP_NAMES[:-9] + TAIL, 0), r"must have f_intr_0..47, got 47"),
    "both": (header([*RAP_NAMES, "f_dc_0"], 0), r"both f_intr \(RAP\) and f_dc/f_rest \(INRIA\)"),
    "compressed": (
        vertex_header("property uint packed_position") + bytes(8),
        r"compressed PLY; load it with rapfast.load_scene",
    ),
    "ascii short": (
        header(inria_names(0), 2, fmt="ascii") + b"1 " * 17 + b"\n" + b"1 " * 16,
        r"columns changed from 17 to 16",
    ),
    "ascii absurd": (header(inria_names(0), 10**15, fmt="ascii") + b"1 2", r"truncated: element vertex .* cannot fit"),
    "ascii words": (header(inria_names(0), 1, fmt="ascii") + b"1 " * 16 + b"x\n", r"cannot be read as ASCII numbers"),
    "ascii ragged": (
        header(inria_names(0), 2, fmt="ascii") + b"1 " * 16 + b"\n" + b"1 " * 18,
        r"columns changed from 16 to 18",
    ),
    "ascii few": (
        header(inria_names(0), 2, fmt="ascii") + b"1.00000 " * 17 + b"\n\n",
        r"must have 2 rows of 17 values, .* after 1 rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_raise_a_sentence(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_ply(path)
    assert str(caught.value).startswith(str(path))


def test_counts_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(header(inria_names(4), 10**9) + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="truncated"):
            load_ply(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ply: no such file"):
        load_ply(tmp_path / "none.ply")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        load_ply(tmp_path)
    with pytest.raises(OSError, match="/dev/zero: is not a regular file"):
        load_ply("/dev/zero")
    with pytest.raises(TypeError, match="path must be a str"):
        load_ply(12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        load_ply("a\0.ply")
