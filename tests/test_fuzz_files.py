"""Damaged files of every format: the result is an object or a sentence, never another exception or a big allocation.

A reader may accept a damaged file (a flipped bit in a float is a float) but must then return something whole. The
address space is limited while it reads, so that a count believed from a header fails the test.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_files import (
    inria_entry,
    one_colmap_image,
    pinhole_line,
    pinhole_record,
    transforms,
    write_colmap_binary,
    write_colmap_text,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rapfast import Cameras, Scene, load_ply, load_scene, save_ply

ROOM = 512 << 20  # bytes of address space beyond what the process has; the files are a few kilobytes

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def survives(read: Callable[[], object]) -> None:
    """Run a reader; anything but an object, a ValueError or an OSError with a sentence fails the test."""
    with warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("ignore")
        try:
            result = read()
        except (ValueError, OSError) as error:
            assert len(str(error)) > 10
            return
    if isinstance(result, Scene):
        assert result.means.shape == (len(result), 3)
    else:
        assert isinstance(result, list)
        assert all(len(group) and bool(torch.isfinite(group.viewmats).all()) for group in result)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that truncates, overwrites, removes, repeats or inserts bytes."""
    kind = draw(st.sampled_from(["truncate", "flip", "flip", "integers", "remove", "repeat", "insert"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    length = draw(st.integers(1, 40))
    junk = draw(st.binary(min_size=1, max_size=24))
    bits = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4))
    extreme = draw(
        st.sampled_from([b"\xff" * 8, b"\xff" * 4, b"\x00" * 8, struct.pack("<Q", 1 << 40), b"\xff\xff\xff\x7f"])
    )

    def damage(data: bytes) -> bytes:
        at = int(where * (len(data) + 1))
        if kind == "truncate":
            return data[:at]
        if kind == "flip":
            changed = bytearray(data)
            for place, bit in bits if data else []:
                changed[int(place * len(data))] ^= 1 << bit
            return bytes(changed)
        if kind == "integers":
            return data[:at] + extreme + data[at + len(extreme) :]
        if kind == "remove":
            return data[:at] + data[at + length :]
        if kind == "repeat":
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        return data[:at] + junk + data[at:]

    return damage


def scene(n: int = 4, degree: int = 1) -> Scene:
    g = torch.Generator().manual_seed(2)
    return Scene(
        torch.randn(n, 3, generator=g), torch.randn(n, 4, generator=g), torch.rand(n, 3, generator=g),
        torch.rand(n, generator=g), torch.randn(n, (degree + 1) ** 2, 3, generator=g),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- PLY -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ply(folder: Path) -> bytes:
    save_ply(scene(), folder / "good.ply")
    return (folder / "good.ply").read_bytes()


@fuzz
@given(damage=damages())
def test_damaged_ply(folder: Path, ply: bytes, damage: Callable[[bytes], bytes]) -> None:
    (folder / "a.ply").write_bytes(damage(ply))
    survives(lambda: load_ply(folder / "a.ply"))


HEADER_WORDS = """
    ply format ascii binary_big_endian 1.0 element vertex face property list float double uchar x f_rest_9 f_intr_0
    end_header comment 0 4 -1 999999999999 999999999999999999999999999999 1e5
"""
WORDS = st.sampled_from([*HEADER_WORDS.split(), "", "\t"])


@fuzz
@given(
    line=st.integers(0, 40), words=st.lists(WORDS, max_size=4), mode=st.sampled_from(["insert", "replace", "delete"])
)
def test_mutated_ply_header(folder: Path, ply: bytes, line: int, words: list[str], mode: str) -> None:
    head, body = ply.split(b"end_header\n", 1)
    lines = (head + b"end_header").split(b"\n")
    line = min(line, len(lines) - 1)
    new = [] if mode == "delete" else [" ".join(words).encode()]
    lines[line : line + (mode != "insert")] = new
    (folder / "a.ply").write_bytes(b"\n".join(lines) + b"\n" + body)
    survives(lambda: load_ply(folder / "a.ply"))


@fuzz
@given(damage=damages())
def test_damaged_ascii_ply(folder: Path, ply: bytes, damage: Callable[[bytes], bytes]) -> None:
    head, body = ply.split(b"end_header\n", 1)
    rows = np.frombuffer(body, "<f4").reshape(4, -1)
    text = "\n".join(" ".join(f"{v:.3g}" for v in row) for row in rows).encode()
    good = head.replace(b"binary_little_endian", b"ascii") + b"end_header\n" + text
    (folder / "a.ply").write_bytes(damage(good))
    survives(lambda: load_ply(folder / "a.ply"))


# --- compressed scenes -----------------------------------------------------------------------------------------------


class Files(dict):
    """File contents by name, of which a failure's report shows the names only."""

    def __repr__(self) -> str:
        return f"Files of {', '.join(self)}"


@pytest.fixture(scope="module")
def compressed(folder: Path) -> Files:
    """A good file of each format. Loading each once compiles the library's loops before memory is limited."""
    gsply = pytest.importorskip("gsply", reason="needs pip install 'rapfast[formats]'")
    pytest.importorskip("zstandard")
    pytest.importorskip("imagecodecs")
    from sog_files import bundle, sog_parts

    from rapfast import save_scene

    files = Files()
    for name in ("a.compressed.ply", "a.spz"):
        save_scene(scene(300), folder / name)
        files[name] = (folder / name).read_bytes()
    gsply.write_spz(folder / "a4.spz", gsply.read_spz(folder / "a.spz"), version=4)
    files["a4.spz"] = (folder / "a4.spz").read_bytes()
    meta, pictures, _ = sog_parts(30, 1)
    files["a.sog"] = bundle(meta, pictures)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        load_scene(folder / name)
    return files


@pytest.mark.parametrize("name", ["a.compressed.ply", "a.spz", "a4.spz", "a.sog"])
@fuzz
@given(damage=damages())
def test_damaged_compressed_scene(folder: Path, compressed: Files, name: str, damage: Callable[[bytes], bytes]) -> None:
    (folder / "b").write_bytes(damage(compressed[name]))
    survives(lambda: load_scene(folder / "b"))


@fuzz
@given(damage=damages())
def test_damaged_spz_within_its_gzip(folder: Path, compressed: Files, damage: Callable[[bytes], bytes]) -> None:
    (folder / "b").write_bytes(gzip.compress(damage(gzip.decompress(compressed["a.spz"])), compresslevel=1))
    survives(lambda: load_scene(folder / "b"))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**9, 2**63, -(2**31), 1e308, float("nan"), "a", ""]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "files", "frames"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def replaced(content: object, path: list[float], value: object) -> object:
    """A copy of nested JSON with the value at a place chosen by fractions replaced."""
    if not path or not isinstance(content, list | dict) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[int(path[0] * len(keys))]
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[key] = replaced(content[key], path[1:], value)
    return copy


PLACES = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5)


@fuzz
@given(place=PLACES, value=JSON_VALUES)
def test_mutated_sog_meta(folder: Path, compressed: Files, place: list[float], value: object) -> None:
    from sog_files import bundle, sog_parts

    meta, pictures, _ = sog_parts(5, 1)
    (folder / "b").write_bytes(bundle(json.dumps(replaced(meta, place, value)), pictures))
    survives(lambda: load_scene(folder / "b"))


# --- cameras ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
@fuzz
@given(damage=damages())
def test_damaged_colmap_binary(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    model = write_colmap_binary(folder / "binary", one_colmap_image() * 2, [pinhole_record()])
    (model / name).write_bytes(damage((model / name).read_bytes()))
    survives(lambda: Cameras.groups(model))


@pytest.mark.parametrize("name", ["cameras.txt", "images.txt"])
@fuzz
@given(damage=damages())
def test_damaged_colmap_text(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    model = write_colmap_text(folder / "text", one_colmap_image() * 2, [pinhole_line()])
    (model / name).write_bytes(damage((model / name).read_bytes()))
    survives(lambda: Cameras.groups(model))


@pytest.mark.parametrize("content", [transforms(), [inria_entry(), inria_entry()]], ids=["nerfstudio", "inria"])
@fuzz
@given(place=PLACES, value=JSON_VALUES)
def test_mutated_camera_json(folder: Path, content: object, place: list[float], value: object) -> None:
    (folder / "c.json").write_text(json.dumps(replaced(content, place, value)))
    survives(lambda: Cameras.groups(folder / "c.json"))


@fuzz
@given(damage=damages())
def test_damaged_camera_json(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / "c.json").write_bytes(damage(json.dumps(transforms()).encode()))
    survives(lambda: Cameras.groups(folder / "c.json"))


@pytest.mark.parametrize("suffix", ["npy", "npz", "txt"])
@fuzz
@given(damage=damages())
def test_damaged_poses(folder: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = folder / f"p.{suffix}"
    poses = np.tile(np.eye(4)[:3], (3, 1, 1))
    arguments: dict = {"Ks": np.eye(3), "width": 4, "height": 4}
    if suffix == "npy":
        np.save(path, poses)
    elif suffix == "npz":
        np.savez(path, poses=poses, **arguments)
        arguments = {}
    else:
        np.savetxt(path, poses.reshape(3, 12), fmt="%g")
    path.write_bytes(damage(path.read_bytes()))
    survives(lambda: Cameras.groups(path, **arguments))


@fuzz
@given(
    data=st.binary(max_size=200), name=st.sampled_from(["a.ply", "a.spz", "a.sog", "a.npz", "a.npy", "a.json", "a.txt"])
)
def test_arbitrary_bytes(folder: Path, data: bytes, name: str) -> None:
    (folder / name).write_bytes(data)
    survives(lambda: load_scene(folder / name))
    survives(lambda: Cameras.groups(folder / name))
    os.unlink(folder / name)
