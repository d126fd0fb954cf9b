"""Compressed scenes: recognised by content, decoded to the right values, and refused before a library sees lies."""

from __future__ import annotations

import builtins
import gzip
import importlib.machinery
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rapfast import Scene, load_ply, load_scene, save_ply, save_scene
from rapfast.io import detect_format
from rapfast.io.compressed import morton_order

formats = pytest.importorskip("gsply", reason="needs pip install 'rapfast[formats]'")


def small_scene(n: int = 300, degree: int = 3) -> Scene:
    g = torch.Generator().manual_seed(5)
    return Scene(
        torch.randn(n, 3, generator=g),
        torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1),
        torch.exp(torch.randn(n, 3, generator=g) - 3),
        torch.rand(n, generator=g),
        torch.randn(n, (degree + 1) ** 2, 3, generator=g) * 0.2,
    )


def assert_close(a: Scene, b: Scene, means: float, scales: float, quats: float, opacities: float, sh: float) -> None:
    """Largest deviations: absolute, but relative for the scales; quaternions up to sign."""
    assert len(a) == len(b)
    assert float((a.means - b.means).abs().max()) < means
    assert float((a.scales / b.scales - 1).abs().max()) < scales
    sign = torch.sign((a.quats * b.quats).sum(dim=1, keepdim=True))
    assert float((a.quats - b.quats * sign).abs().max()) < quats
    assert float((a.opacities - b.opacities).abs().max()) < opacities
    assert float((a.sh - b.sh).abs().max()) < sh


# --- the real thing --------------------------------------------------------------------------------------------------


def capture() -> Path:
    folder = os.environ.get("RAPFAST_TEST_DATA")
    if not folder:
        pytest.skip("RAPFAST_TEST_DATA does not name the folder of guitar.compressed.ply, which is not ours to ship")
    path = Path(folder) / "guitar.compressed.ply"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


def test_a_real_capture_has_plausible_values(tmp_path: Path) -> None:
    scene = load_scene(capture())
    assert len(scene) == 90_854
    assert scene.sh_degree == 0
    assert bool(scene.valid().all())
    assert 1e-4 < float(scene.scales.median()) < 0.1  # linear: as logarithms they would be negative
    assert float(scene.scales.max()) < 1
    assert 0.003 < float(scene.opacities.min()) < float(scene.opacities.max()) <= 1
    torch.testing.assert_close(scene.quats.norm(dim=1), torch.ones(len(scene)))
    colours = scene.sh[:, 0] * 0.28209479 + 0.5
    assert -0.5 < float(colours.min()) < float(colours.max()) < 2
    save_scene(scene, tmp_path / "a.ply")
    assert torch.equal(load_scene(tmp_path / "a.ply").means, scene.means)


# --- compressed PLY --------------------------------------------------------------------------------------------------

CHUNK = [f"{e}_{a}" for g in ("x y z", "scale_x scale_y scale_z", "r g b") for e in ("min", "max") for a in g.split()]
PACKED = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]


def compressed_ply(vertices: int, chunks: int, sh: int = 0, names: list[str] = CHUNK, packed: str = "uint") -> bytes:
    lines = ["ply", "format binary_little_endian 1.0", f"element chunk {chunks}"]
    lines += [f"property float {n}" for n in names]
    lines += [f"element vertex {vertices}", *(f"property {packed} {n}" for n in PACKED)]
    if sh:
        lines += [f"element sh {vertices}", *(f"property uchar f_rest_{i}" for i in range(sh))]
    return "\n".join([*lines, "end_header", ""]).encode()


def test_compressed_ply_by_hand(tmp_path: Path) -> None:
    """One Gaussian whose bits are put together from the format's description."""
    bounds = [-1, -2, -3, 1, 2, 3, -8, -8, -8, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    position = (2047 << 21) | (0 << 11) | 2047
    rotation = (1 << 30) | (1023 << 20) | (512 << 10) | 512  # x largest; w = sqrt(1/2), y and z about 0
    scale = (0 << 21) | (1023 << 11) | 0
    color = (255 << 24) | (0 << 16) | (51 << 8) | 102
    rest = bytes([128] * 9)
    body = struct.pack("<18f4I", *bounds, position, rotation, scale, color) + rest
    path = tmp_path / "a.ply"
    path.write_bytes(compressed_ply(1, 1, 9) + body)
    assert detect_format(path) == "compressed.ply"
    scene = load_scene(path)
    torch.testing.assert_close(scene.means, torch.tensor([[1.0, -2.0, 3.0]]))
    torch.testing.assert_close(scene.scales, torch.tensor([[np.exp(-8.0), 1.0, np.exp(-8.0)]], dtype=torch.float32))
    torch.testing.assert_close(scene.quats, torch.tensor([[0.5**0.5, 0.5**0.5, 0, 0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(scene.opacities, torch.tensor([0.4]))
    colour = scene.sh[0, 0] * 0.28209479 + 0.5
    torch.testing.assert_close(colour, torch.tensor([1.0, 0.0, 0.2]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scene.sh[0, 1:], torch.full((3, 3), 0.5 / 32))


@pytest.mark.parametrize("degree", range(4))
def test_compressed_ply_round_trip(tmp_path: Path, degree: int) -> None:
    scene = small_scene(300, degree)
    path = tmp_path / "a.compressed.ply"
    save_scene(scene, path)
    sorted_scene = scene.select(morton_order(scene.means))
    assert_close(load_scene(path), sorted_scene, means=0.005, scales=0.005, quats=0.002, opacities=0.003, sh=0.04)


def test_morton_order_keeps_neighbours_together() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    shuffled = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    ordered = shuffled[morton_order(shuffled)]
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, grid.tolist()))
    assert bool((ordered[:64] < 4).all())  # the first eighth is the first octant
    assert morton_order(torch.ones(3, 3)).tolist() == [0, 1, 2]


BAD_COMPRESSED = {
    "few chunks": (compressed_ply(257, 1) + bytes(72 + 257 * 16), r"must have 2 chunks for 257 Gaussians, got 1"),
    "short": (
        compressed_ply(256, 1) + bytes(72 + 256 * 16 - 1),
        r"truncated at byte [\d,]+: element vertex needs 256 x 16",
    ),
    "absurd": (compressed_ply(10**15, 10**15 // 256), r"truncated at byte"),
    "names": (
        compressed_ply(1, 1, names=CHUNK[:12]) + bytes(200),
        r"element chunk must have the f4 properties min_x, ",
    ),
    "types": (compressed_ply(1, 1, packed="int") + bytes(200), r"element vertex must have the u4 properties packed_"),
    "sh": (
        compressed_ply(1, 1, 10) + bytes(98),
        r"element sh must have 1 rows of 9, 24 or 45 columns, got 1 rows of 10",
    ),
    "order": (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty uint packed_position\nend_header\n",
        r"must be binary_little_endian with elements chunk, vertex and perhaps sh, got .* with vertex",
    ),
}


@pytest.mark.parametrize("name", BAD_COMPRESSED)
def test_bad_compressed_ply(tmp_path: Path, name: str) -> None:
    content, message = BAD_COMPRESSED[name]
    path = tmp_path / "a.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_scene(path)
    assert str(caught.value).startswith(str(path))


def test_compressed_ply_without_gaussians_or_with_a_tail(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(compressed_ply(0, 0, 24))
    assert load_scene(path).sh.shape == (0, 9, 3)
    path.write_bytes(compressed_ply(1, 1) + bytes(72 + 16 + 5))
    with pytest.warns(UserWarning, match="ignoring 5 bytes"):
        assert len(load_scene(path)) == 1


# --- SPZ -------------------------------------------------------------------------------------------------------------


def spz_payload(
    n: int, version: int = 2, degree: int = 1, bits: int = 12, magic: bytes = b"NGSP", flags: int = 0
) -> bytes:
    """One repeated Gaussian by the format's description: position (1, 2, -3), byte values that are easy to undo."""
    positions = b"".join(struct.pack("<i", int(v * 2**bits))[:3] for v in (1, 2, -3)) * n
    sh = bytes(range(128, 128 + 3 * ((degree + 1) ** 2 - 1))) * n
    rotations = bytes([255, 128, 128] if version == 2 else [0, 0, 0, 0b11000000]) * n
    body = positions + bytes([51]) * n + bytes([255, 0, 128]) * n + bytes([160, 144, 0]) * n + rotations + sh
    return struct.pack("<4sIIBBBB", magic, version, n, degree, bits, flags, 0) + body


@pytest.mark.parametrize("version", [2, 3])
def test_spz_by_hand(tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.spz"
    path.write_bytes(gzip.compress(spz_payload(3, version)))
    assert detect_format(path) == "spz"
    scene = load_scene(path)
    assert scene.means[2].tolist() == [1, -2, 3]  # y up, z backwards -> y down, z forward
    torch.testing.assert_close(scene.opacities, torch.full((3,), 0.2))
    torch.testing.assert_close(scene.scales[0], torch.exp(torch.tensor([0.0, -1.0, -10.0])))
    expected = [0, 1, 0, 0] if version == 2 else [1, 0, 0, 0]
    torch.testing.assert_close(scene.quats[0], torch.tensor(expected, dtype=torch.float32), atol=0.005, rtol=0)
    torch.testing.assert_close(scene.sh[0, 0], torch.tensor([0.5, -0.5, 128 / 255 - 0.5]) / 0.15)
    # degree 1 in the order y, z, x: the first two turn round
    rows = torch.arange(9.0).reshape(3, 3) / 128
    torch.testing.assert_close(scene.sh[0, 1:], rows * torch.tensor([[-1.0], [-1.0], [1.0]]))


def test_half_turn_is_a_rotation_of_the_whole_scene() -> None:
    """Colour, shape and place, evaluated by formulas of their own: turning the scene turns what it evaluates to."""
    from rapfast.io.compressed import _half_turn

    scene = small_scene(20, 3).to(dtype=torch.float64)
    turned = _half_turn(scene)
    turn = torch.diag(torch.tensor([1.0, -1, -1], dtype=torch.float64))

    def covariance(s: Scene) -> torch.Tensor:
        w, x, y, z = s.quats.unbind(1)
        rotation = torch.stack(
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
             2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
             2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=1).reshape(-1, 3, 3)  # fmt: skip
        m = rotation * s.scales[:, None, :]
        return m @ m.transpose(1, 2)

    def basis(d: torch.Tensor) -> torch.Tensor:
        """Real spherical harmonics up to degree 3 without their constants, in the usual order."""
        x, y, z = d.unbind(1)
        return torch.stack(
            [torch.ones_like(x), y, z, x, x * y, y * z, 2 * z * z - x * x - y * y, x * z, x * x - y * y,
             y * (3 * x * x - y * y), x * y * z, y * (4 * z * z - x * x - y * y),
             z * (2 * z * z - 3 * x * x - 3 * y * y),
             x * (4 * z * z - x * x - y * y), z * (x * x - y * y), x * (x * x - 3 * y * y)], dim=1)  # fmt: skip

    torch.testing.assert_close(turned.means, scene.means @ turn)
    torch.testing.assert_close(covariance(turned), turn @ covariance(scene) @ turn)
    directions = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    before = (basis(directions)[:, :, None] * scene.sh).sum(dim=1)
    after = (basis(directions @ turn)[:, :, None] * turned.sh).sum(dim=1)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("degree", range(4))
def test_spz_round_trip(tmp_path: Path, degree: int) -> None:
    scene = small_scene(200, degree)
    save_scene(scene, tmp_path / "a.spz")
    assert_close(load_scene(tmp_path / "a.spz"), scene, means=2e-4, scales=0.04, quats=0.004, opacities=0.003, sh=0.02)
    assert detect_format(tmp_path / "a.spz") == "spz"


def test_spz_of_a_wide_scene_spends_fewer_fractional_bits(tmp_path: Path) -> None:
    scene = small_scene(10, 0)
    scene.means[3] = torch.tensor([30_000.0, -30_000.0, 1.0])
    save_scene(scene, tmp_path / "a.spz")
    torch.testing.assert_close(load_scene(tmp_path / "a.spz").means, scene.means, atol=2.0**-7, rtol=0)
    scene.means[3, 0] = 3e6
    with pytest.raises(ValueError, match=r"SPZ holds coordinates up to 2\^21, the scene reaches 3e\+06"):
        save_scene(scene, tmp_path / "a.spz")


def test_spz_4(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    path = tmp_path / "a.spz"
    save_scene(small_scene(50, 1), path)
    formats.write_spz(path, formats.read_spz(path), version=4)
    assert path.read_bytes()[:4] == b"NGSP"
    assert_close(load_scene(path), small_scene(50, 1), means=2e-4, scales=0.04, quats=0.004, opacities=0.003, sh=0.02)
    data = path.read_bytes()
    for damaged, message in (
        (data[:20], r"truncated: an SPZ 4 header takes 32 bytes, got 20"),
        (data[:40], r"truncated at byte 40: the table of contents does not fit"),
        (data[:-1], r"truncated at byte [\d,]+: stream 5 needs \d+ bytes"),
        (data[:8] + struct.pack("<I", 51) + data[12:], r"SPZ of 51 Gaussians must unpack to [\d,]+ bytes, got"),
        (
            data[:40] + struct.pack("<Q", 1 << 40) + data[48:],
            r"stream 0 claims 450 bytes, the table of contents 1,099,",
        ),
        (data[:8] + b"\xff" * 4 + data[12:], r"claims 4,294,967,295 Gaussians in [\d,]+ bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_scene(path)


BAD_SPZ = {
    "not spz": (
        gzip.compress(spz_payload(1, magic=b"NGSQ")),
        r"is compressed but not an SPZ file: it begins with b'NGSQ'",
    ),
    "gzip of nothing": (gzip.compress(b""), r"truncated: an SPZ header takes 16 bytes, got 0"),
    "version": (gzip.compress(spz_payload(1, version=1)), r"SPZ version 1 is not supported here, only 2, 3"),
    "degree": (gzip.compress(spz_payload(1, degree=4)), r"SPZ of SH degree 4 is not supported"),
    "bits": (
        gzip.compress(spz_payload(1)[:13] + b"\x20" + spz_payload(1)[14:]),
        r"fractional bits must be 1\.\.24, got 32",
    ),
    "short": (gzip.compress(spz_payload(3)[:-1]), r"SPZ of 3 Gaussians must unpack to 100 bytes and end there"),
    "bomb": (gzip.compress(spz_payload(3) + bytes(1 << 24)), r"SPZ of 3 Gaussians must unpack to 100 bytes"),
    "count": (
        gzip.compress(b"NGSP" + struct.pack("<IIBBBB", 2, 2**32 - 1, 0, 12, 0, 0)),
        r"claims 4,294,967,295 Gaussians",
    ),
    "two members": (gzip.compress(spz_payload(3)) * 2, r"must unpack to 100 bytes and end there"),
    "truncated": (gzip.compress(spz_payload(300))[:-12], r"truncated at byte \d+: the gzip stream does not end"),
    "damaged": (b"\x1f\x8b" + bytes(40), r"damaged gzip stream"),
}


@pytest.mark.parametrize("name", BAD_SPZ)
def test_bad_spz(tmp_path: Path, name: str) -> None:
    content, message = BAD_SPZ[name]
    path = tmp_path / "a.spz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_scene(path)
    assert str(caught.value).startswith(str(path))


def test_spz_without_gaussians_and_with_extensions(tmp_path: Path) -> None:
    path = tmp_path / "a.spz"
    path.write_bytes(gzip.compress(spz_payload(0, degree=2)))
    assert load_scene(path).sh.shape == (0, 9, 3)
    path.write_bytes(gzip.compress(spz_payload(1, flags=2) + bytes(20)))
    with pytest.warns(UserWarning, match="ignoring the vendor extensions"):
        assert len(load_scene(path)) == 1


# --- SOG -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sog():  # noqa: ANN201
    pytest.importorskip("imagecodecs")
    pytest.importorskip("PIL")
    import sog_files

    return sog_files


@pytest.mark.parametrize("bands", range(4))
def test_sog_by_hand(tmp_path: Path, sog, bands: int) -> None:  # noqa: ANN001
    meta, pictures, values = sog.sog_parts(11, bands)
    path = tmp_path / "a.sog"
    path.write_bytes(sog.bundle(meta, pictures))
    assert detect_format(path) == "sog"
    folder = tmp_path / "unbundled"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    for source in (path, folder, folder / "meta.json"):
        scene = load_scene(source)
        np.testing.assert_allclose(scene.means, values["means"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scene.scales, np.exp(values["log_scales"]), rtol=1e-5)
        np.testing.assert_allclose(scene.opacities, values["opacities"], atol=2e-6)
        np.testing.assert_allclose(scene.quats, values["quats"], atol=1e-6)
        np.testing.assert_allclose(scene.sh[:, 0], values["sh0"], rtol=1e-6, atol=1e-6)
        assert scene.sh_degree == bands
        if bands:
            np.testing.assert_allclose(scene.sh[:, 1:], values["shN"], rtol=1e-6, atol=1e-6)


def test_bad_sog(tmp_path: Path, sog) -> None:  # noqa: ANN001
    path = tmp_path / "a.sog"
    good, pictures, _ = sog.sog_parts(5, 1)

    def expect(message: str, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_scene(path)
        assert str(caught.value).startswith(str(path))

    def changed(part: str | None = None, **replace: object) -> bytes:
        meta = json.loads(json.dumps(good))
        (meta[part] if part else meta).update(replace)
        return sog.bundle(meta, pictures)

    expect(r"meta\.json must be SOG of version 2", changed(version=3))
    expect(r"count must be a number, got None", changed(count=None))
    expect(r"the count must not be negative, got -5", changed(count=-5))
    expect(r"claims 1,000,000,000 Gaussians in [\d,]+ bytes", changed(count=10**9))
    expect(r"means_l\.webp of 4x2 pixels cannot hold 9 Gaussians", changed(count=9))
    expect(r"scales\.codebook must hold 256 numbers, got a list of 3", changed("scales", codebook=[1, 2, 3]))
    expect(r"sh0\.codebook must be a number, got 'x'", changed("sh0", codebook=["x"] * 256))
    expect(r"means\.mins must be 3 numbers", changed("means", mins=[0, 0]))
    expect(r"shN\.bands must be 1, 2 or 3, got 4", changed("shN", bands=4))
    expect(r"shN_centroids\.webp of 192x2 pixels is no palette", changed("shN", bands=2))
    expect(r"shN\.count must be within 0\.\.65536", changed("shN", count=-1))
    expect(r"quats\.files must be plain names, got '\.\./q\.webp'", changed("quats", files=["../q.webp"]))
    expect(r"quats\.files must name 1 files, got None", changed("quats", files=None))
    expect(r"must hold 'q\.webp' once, it does 0 times", changed("quats", files=["q.webp"]))
    expect(r"must have an object quats, got 3", changed(quats=3))
    expect(r"meta\.json is not usable", sog.bundle("{", pictures))
    expect(r"meta\.json must be SOG", sog.bundle("[]", pictures))
    expect(r"quats\.webp is not a WebP picture", sog.bundle(good, {**pictures, "quats.webp": b"x" * 40}))
    expect(
        r"(SOG failed|not a readable WebP)", sog.bundle(good, {**pictures, "quats.webp": pictures["quats.webp"][:-9]})
    )
    expect(r"is no scene file known here", sog.bundle(good, pictures)[:200])
    big = sog.bundle(good, {**pictures, "bomb": b""})
    huge = big.replace(
        struct.pack("<II", 0, 0) + struct.pack("<H", 4), struct.pack("<II", 0, 0xFFFFFF00) + struct.pack("<H", 4)
    )
    assert huge != big
    expect(r"claims far more content|damaged", huge)


# --- which format ----------------------------------------------------------------------------------------------------


def test_the_name_does_not_matter_for_reading(tmp_path: Path) -> None:
    save_ply(small_scene(3, 1), tmp_path / "a.spz")
    assert detect_format(tmp_path / "a.spz") == "ply"
    assert torch.equal(load_scene(tmp_path / "a.spz").means, load_ply(tmp_path / "a.spz").means)


def test_unknown_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.splat"
    path.write_bytes(bytes(32))
    with pytest.raises(
        ValueError, match=r"a\.splat: is no scene file known here \(first bytes b'.*scenes are read from \.ply"
    ):
        load_scene(path)
    (tmp_path / "none.spz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none\.spz: is an empty file; scenes are read from \.ply"):
        load_scene(tmp_path / "none.spz")
    with pytest.raises(ValueError, match=r"is a folder without a SOG meta\.json"):
        load_scene(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_scene(tmp_path / "none.ply")
    for name in ("a.sog", "a.splat", "ply"):
        with pytest.raises(ValueError, match=r"scenes are written as \.ply, \.compressed\.ply or \.spz"):
            save_scene(small_scene(3), tmp_path / name)
    with pytest.raises(TypeError, match="scene must be a rapfast.Scene"):
        save_scene(None, path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.compressed.ply", "a.spz"])
def test_what_compressed_formats_cannot_hold(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    scene = small_scene(4, 4)
    with pytest.raises(ValueError, match="SH degree 0 to 3, the scene has 4"):
        save_scene(scene, path)
    scene = small_scene(4, 0)
    scene.means[1, 2] = torch.nan
    scene.quats[3] = 0
    with pytest.raises(ValueError, match=r"2 of 4 Gaussians are not finite.*scene\.select\(scene\.valid\(\)\)"):
        save_scene(scene, path)
    with pytest.raises(ValueError, match="cannot hold a scene of 0 Gaussians"):
        save_scene(small_scene(0, 0), path)
    scene.sh, scene.intrinsic = None, torch.zeros(4, 16, 3)
    with pytest.raises(ValueError, match="hold spherical harmonics only"):
        save_scene(scene, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.spz"
    path.write_bytes(gzip.compress(spz_payload(1)))
    real = builtins.__import__
    failure: Exception = ModuleNotFoundError("no gsply")

    def without_gsply(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "gsply":
            raise failure
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gsply)
    with pytest.raises(
        ImportError, match=r"a\.spz: compressed scene formats need gsply: pip install 'rapfast\[formats\]'"
    ):
        load_scene(path)
    failure = RuntimeError("cannot cache function")
    with pytest.raises(ImportError, match=r"need gsply, which does not load here: cannot cache function"):
        load_scene(path)


def test_what_uninstalling_leaves_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of numba's cache alone is imported without an error, as a namespace package."""
    (tmp_path / "gsply" / "__pycache__").mkdir(parents=True)
    spec = importlib.machinery.PathFinder.find_spec("gsply", [str(tmp_path)])
    assert spec is not None and spec.origin is None
    monkeypatch.setitem(sys.modules, "gsply", importlib.util.module_from_spec(spec))
    path = tmp_path / "a.spz"
    path.write_bytes(gzip.compress(spz_payload(1)))
    with pytest.raises(ImportError, match=r"a\.spz: compressed scene formats need gsply: pip install 'rapfast"):
        load_scene(path)
