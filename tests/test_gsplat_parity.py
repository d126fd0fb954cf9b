"""The same picture and the same meta as gsplat 1.5.3 on a GPU.

gsplat is compiled with fast math, so its numbers carry a few more roundings than rapfast's: 2e-5 of the largest value
covers them. Where they decide something (a cut at 1/255, a stop, a radius rounded up) a pixel or a Gaussian may come
out otherwise. Those lie in a boundary band: at most PIXEL_BAND of the pixels and RECORD_BAND of the records.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scenes import Scene, assert_same, covariances, make_scene
from torch import Tensor

from rapfast import rasterization

pytestmark = pytest.mark.cuda

TOLERANCE = 2e-5  # of the largest value
PIXEL_BAND = 2e-3
RECORD_BAND = 2e-3
MIN_PSNR = 60.0
SIZES = {"small": (300, 2, (75, 41)), "medium": (20_000, 4, (320, 200))}  # Gaussians, cameras, pixels


@pytest.fixture(scope="module")
def gsplat() -> ModuleType:
    """gsplat 1.5.3, compiled; the first use of a fresh install compiles for minutes."""
    module = pytest.importorskip("gsplat", reason="needs gsplat (the extra 'bench')")
    if module.__version__ != "1.5.3":
        pytest.skip(f"compares with gsplat 1.5.3, found {module.__version__}")
    try:
        module.rasterization(**arguments(make_scene(4, 1, dtype=torch.float32, device="cuda")), width=16, height=16)
        torch.cuda.synchronize()
    except Exception as error:  # its compilation raises what it likes
        pytest.skip(f"gsplat does not run here: {type(error).__name__}: {str(error)[:200]}")
    return module


def arguments(scene: Scene, **options: Any) -> dict[str, Any]:
    return {**scene._asdict(), **options}


def scene_of(size: str, **options: Any) -> tuple[Scene, tuple[int, int]]:
    n, c, (width, height) = SIZES[size]
    scene = make_scene(n, c, width=width, height=height, dtype=torch.float32, device="cuda", **options)
    scene.scales.mul_(1.0 if n < 1000 else 0.25)
    return scene, (width, height)


def assert_same_picture(got: Tensor, want: Tensor, what: str) -> None:
    """Images [..., H, W, D] within the tolerance outside the band, and at least 60 dB in all."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert bool(got.isfinite().all()) and bool(want.isfinite().all())
    scale = max(1.0, float(want.abs().max()))
    error = (got.double() - want.double()).abs().amax(-1).flatten() / scale
    beyond, allowed = int((error > TOLERANCE).sum()), math.ceil(PIXEL_BAND * error.numel())
    assert beyond <= allowed, f"{what}: {beyond} of {error.numel()} pixels differ by more than {TOLERANCE}"
    mse = float(((got.double() - want.double()) / scale).square().mean())
    psnr = math.inf if mse == 0 else -10 * math.log10(mse)
    assert psnr >= MIN_PSNR, f"{what}: {psnr:.1f} dB"


def assert_parity(gsplat: ModuleType, scene: Scene, size: tuple[int, int], **options: Any) -> tuple[Any, Any]:
    """Colours and alphas; returns both metas."""
    sizes = {"width": size[0], "height": size[1]}
    got, got_alphas, meta = rasterization(**arguments(scene, **sizes, **options))
    want, want_alphas, want_meta = gsplat.rasterization(**arguments(scene, **sizes, **options))
    mode = options.get("render_mode", "RGB")
    if mode.endswith("ED"):  # a quotient by a small alpha: the accumulated depth is what is computed
        got, want = got.clone(), want.clone()
        got[..., -1:] *= got_alphas
        want[..., -1:] *= want_alphas
    if mode in ("RGB+D", "RGB+ED"):  # depth has its own scale
        assert_same_picture(got[..., :-1], want[..., :-1], "colours")
        assert_same_picture(got[..., -1:], want[..., -1:], "depth")
    else:
        assert_same_picture(got, want, mode)
    assert_same_picture(got_alphas, want_alphas, "alphas")
    assert bool(want_alphas.any())
    return meta, want_meta


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("render_mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_models_and_modes(gsplat, camera_model, rasterize_mode, render_mode, size):
    scene, pixels = scene_of(size, sh_degree=3)
    assert_parity(
        gsplat, scene, pixels, sh_degree=3, camera_model=camera_model, rasterize_mode=rasterize_mode,
        render_mode=render_mode,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3, 4])
def test_sh_degrees(gsplat, sh_degree, size):
    scene, pixels = scene_of(size, sh_degree=4)
    assert_parity(gsplat, scene, pixels, sh_degree=sh_degree, packed=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 32, 40])
def test_given_colors(gsplat, channels, per_camera, packed):
    scene, pixels = scene_of("medium", channels=channels, per_camera=per_camera)
    assert_parity(gsplat, scene, pixels, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_per_camera_sh(gsplat, packed):
    scene, pixels = scene_of("medium", sh_degree=2, per_camera=True)
    assert_parity(gsplat, scene, pixels, sh_degree=2, packed=packed)


@pytest.mark.parametrize("render_mode", ["RGB", "RGB+D", "RGB+ED"])
@pytest.mark.parametrize("channels", [3, 32])
def test_backgrounds(gsplat, channels, render_mode):
    scene, pixels = scene_of("medium", channels=channels)
    backgrounds = torch.rand(scene.viewmats.shape[0], channels, device="cuda")
    assert_parity(gsplat, scene, pixels, backgrounds=backgrounds, render_mode=render_mode, packed=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_covars(gsplat, camera_model, size):
    scene, pixels = scene_of(size)
    covars = covariances(scene)
    assert_parity(gsplat, scene, pixels, covars=covars, camera_model=camera_model, packed=False)


@pytest.mark.parametrize("sh_degree", [None, 2])
@pytest.mark.parametrize("batch", [(1,), (2,), (2, 3)], ids=str)
def test_batch_dimensions(gsplat, batch, sh_degree):
    """packed=False: packed, gsplat reads the first scene's opacities for all."""
    scene, pixels = scene_of("small", batch=batch, sh_degree=sh_degree)
    meta, want = assert_parity(gsplat, scene, pixels, sh_degree=sh_degree, packed=False)
    for key in ("n_batches", "n_cameras", "tile_width", "tile_height", "width", "height", "tile_size"):
        assert meta[key] == want[key], key
    for key in ("radii", "means2d", "depths", "conics", "tiles_per_gauss", "isect_offsets"):
        assert meta[key].shape == want[key].shape and meta[key].dtype == want[key].dtype, key


@pytest.mark.parametrize(
    "options",
    [
        {"radius_clip": 3.0},
        {"eps2d": 0.05},
        {"near_plane": 1.5, "far_plane": 3.0},
        {"eps2d": 1.0, "rasterize_mode": "antialiased"},
    ],
    ids=str,
)
def test_settings(gsplat, options):
    scene, pixels = scene_of("medium")
    assert_parity(gsplat, scene, pixels, **options)


def test_opaque_gaussians(gsplat):
    """Alphas at the cap, pixels that stop early."""
    scene, pixels = scene_of("medium", sh_degree=1)
    scene.opacities.fill_(1.0)
    assert_parity(gsplat, scene, pixels, sh_degree=1)


# meta.


def assert_mostly_close(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | None = None) -> None:
    """Relative to ``scale`` (by default the value itself, at least 1) but for RECORD_BAND of the entries."""
    scale = want.abs().clamp(min=1) if scale is None else scale
    beyond = ((got - want).abs() > tolerance * scale).reshape(len(got), -1).any(1)
    assert int(beyond.sum()) <= math.ceil(RECORD_BAND * len(got)), f"{what}: {int(beyond.sum())} of {len(got)} differ"


def assert_records_close(got: dict[str, Tensor], want: dict[str, Tensor], antialiased: bool) -> None:
    """Per visible Gaussian, the same ones in the same order."""
    n = len(got["radii"])
    jump = (got["radii"] - want["radii"]).abs()
    differ = int((jump > 0).any(1).sum())
    assert differ <= math.ceil(RECORD_BAND * n), f"radii: {differ} of {n} differ"
    # Next to a box's last tile a unit of the radius is a row of tiles: nothing where radii and means agree.
    same = (jump == 0).all(1)
    tiles = (got["tiles_per_gauss"] != want["tiles_per_gauss"]) & same
    assert int(tiles.sum()) <= math.ceil(RECORD_BAND * n), f"tiles_per_gauss: {int(tiles.sum())} of {n} differ"
    assert_mostly_close(got["means2d"], want["means2d"], 1e-5, "means2d")
    assert_mostly_close(got["depths"], want["depths"], 5e-6, "depths")
    # A thin ellipse's determinant loses digits: relative to the conic's own size.
    size = want["conics"][:, [0, 2]].amax(1, keepdim=True)
    assert_mostly_close(got["conics"], want["conics"], 1e-3, "conics", size)
    assert_mostly_close(got["opacities"], want["opacities"], 1e-3 if antialiased else 1e-6, "opacities")


RECORD_KEYS = ("radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss")
META_CASES = pytest.mark.parametrize(
    ("camera_model", "rasterize_mode"),
    [("pinhole", "classic"), ("pinhole", "antialiased"), ("ortho", "classic"), ("fisheye", "classic")],
)


@META_CASES
@pytest.mark.parametrize("size", SIZES)
def test_dense_meta(gsplat, size, camera_model, rasterize_mode):
    scene, pixels = scene_of(size)
    options = {"packed": False, "camera_model": camera_model, "rasterize_mode": rasterize_mode}
    got, want = assert_parity(gsplat, scene, pixels, **options)
    assert set(want) <= set(got)
    for key in ("batch_ids", "camera_ids", "gaussian_ids"):
        assert got[key] is None and want[key] is None, key
    for key in RECORD_KEYS:
        assert got[key].shape == want[key].shape and got[key].dtype == want[key].dtype, key
    seen, want_seen = (meta["radii"].amin(-1) > 0 for meta in (got, want))
    flips = int((seen != want_seen).sum())
    assert flips <= math.ceil(RECORD_BAND * int(want_seen.sum())), f"{flips} Gaussians are visible in one alone"
    both = seen & want_seen
    assert int(both.sum()) > 100
    assert_records_close(
        {key: got[key][both] for key in RECORD_KEYS},
        {key: want[key][both] for key in RECORD_KEYS},
        rasterize_mode == "antialiased",
    )
    assert_lists_alike(got, want)


@META_CASES
@pytest.mark.parametrize("size", SIZES)
def test_packed_meta(gsplat, size, camera_model, rasterize_mode):
    scene, pixels = scene_of(size)
    options = {"packed": True, "camera_model": camera_model, "rasterize_mode": rasterize_mode}
    got, want = assert_parity(gsplat, scene, pixels, **options)
    assert set(want) <= set(got)
    for key in ("batch_ids", "camera_ids", "gaussian_ids", *RECORD_KEYS):
        assert got[key].dtype == want[key].dtype and got[key].shape[1:] == want[key].shape[1:], key
    assert not got["batch_ids"].any() and not want["batch_ids"].any()
    n = scene.means.shape[0]
    places, want_places = (meta["camera_ids"].long() * n + meta["gaussian_ids"].long() for meta in (got, want))
    assert bool((places.diff() > 0).all()) and bool((want_places.diff() > 0).all()), "ordered by camera, then Gaussian"
    in_both = torch.isin(places, want_places)
    want_in_both = torch.isin(want_places, places)
    flips = int((~in_both).sum() + (~want_in_both).sum())
    assert flips <= math.ceil(RECORD_BAND * len(want_places)), f"{flips} records are in one alone"
    assert_same(places[in_both], want_places[want_in_both])
    assert_records_close(
        {key: got[key][in_both] for key in RECORD_KEYS},
        {key: want[key][want_in_both] for key in RECORD_KEYS},
        rasterize_mode == "antialiased",
    )
    assert_lists_alike(got, want)


def assert_lists_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    """As many Gaussians a tile as gsplat has, and, where all lists are of one length, the same ones."""
    for key in ("isect_ids", "flatten_ids", "isect_offsets"):
        assert got[key].dtype == want[key].dtype, key
    assert got["isect_offsets"].shape == want["isect_offsets"].shape
    total, want_total = len(got["flatten_ids"]), len(want["flatten_ids"])
    assert abs(total - want_total) <= math.ceil(RECORD_BAND * want_total)
    off = (got["isect_offsets"] - want["isect_offsets"]).abs().max()
    assert int(off) <= math.ceil(RECORD_BAND * want_total)
    if total == want_total and int(off) == 0:
        assert_same(got["isect_ids"] >> 32, want["isect_ids"] >> 32)
        # Depths equal to rounding may be sorted either way.
        differ = got["flatten_ids"] != want["flatten_ids"]
        assert int(differ.sum()) <= math.ceil(RECORD_BAND * total)


# Called through rapfast, and the scene of the benchmarks.


@pytest.mark.parametrize("packed", [False, True])
def test_the_gsplat_backend_is_gsplat(gsplat, packed):
    scene, (width, height) = scene_of("small", sh_degree=2)
    options = {"width": width, "height": height, "sh_degree": 2, "packed": packed, "render_mode": "RGB+ED"}
    got = rasterization(**arguments(scene, **options), backend="gsplat")
    want = gsplat.rasterization(**arguments(scene, **options))
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    assert set(got[2]) == set(want[2])


@pytest.mark.parametrize("size", [(1297, 840), (1920, 1080)], ids=str)
def test_garden(gsplat, size, monkeypatch):
    """2.8 million Gaussians of a real capture, tiled, where RAPFAST_GARDEN names gsplat's test_garden.npz."""
    path = os.environ.get("RAPFAST_GARDEN")
    if not path:
        pytest.skip("needs RAPFAST_GARDEN, the path of gsplat's test_garden.npz")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from bench import scenes as bench_scenes

    garden = bench_scenes.garden(path).to("cuda")
    cameras = bench_scenes.garden_cameras(path, 3, *size)
    views = cameras.viewmats.cuda(), cameras.Ks.cuda()
    scene = Scene(garden.means, garden.quats, garden.scales, garden.opacities, garden.sh, *views)
    got, want = assert_parity(gsplat, scene, size, sh_degree=3, packed=True)
    differ = abs(len(got["gaussian_ids"]) - len(want["gaussian_ids"]))
    assert differ <= RECORD_BAND * len(want["gaussian_ids"])
