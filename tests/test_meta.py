"""meta: gsplat 1.5.3's keys, shapes, dtypes and values, made when asked for and from this call alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from scenes import (
    HEIGHT,
    WIDTH,
    Scene,
    assert_close64,
    assert_same,
    covariances,
    make_scene,
    skip_unsupported,
)

from rapfast import rasterization

KEYS = [
    "batch_ids", "camera_ids", "gaussian_ids", "radii", "means2d", "depths", "conics", "opacities", "tile_width",
    "tile_height", "tiles_per_gauss", "isect_ids", "flatten_ids", "isect_offsets", "width", "height", "tile_size",
    "n_batches", "n_cameras", "n_invalid",
]  # fmt: skip


def meta_of(scene: Scene, **options: Any) -> dict[str, Any]:
    return rasterization(*scene, WIDTH, HEIGHT, **options)[2]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_keys_shapes_and_dtypes(packed, batch, device):
    n, c = 100, 2
    meta = meta_of(make_scene(n, c, batch=batch, dtype=torch.float32, device=device), packed=packed)
    assert list(meta) == KEYS
    rows = (len(meta["radii"]),) if packed else (*batch, c, n)
    n_isects = int(meta["tiles_per_gauss"].sum())
    want = {
        "radii": (torch.int32, (*rows, 2)),
        "means2d": (torch.float32, (*rows, 2)),
        "depths": (torch.float32, rows),
        "conics": (torch.float32, (*rows, 3)),
        "opacities": (torch.float32, rows),
        "tiles_per_gauss": (torch.int32, rows),
        "isect_ids": (torch.int64, (n_isects,)),
        "flatten_ids": (torch.int32, (n_isects,)),
        "isect_offsets": (torch.int32, (*batch, c, 3, 5)),
        "n_invalid": (torch.int64, (*batch, c)),
    }
    if packed:
        want.update(dict.fromkeys(("batch_ids", "camera_ids", "gaussian_ids"), (torch.int64, rows)))
    for key, (dtype, shape) in want.items():
        assert meta[key].dtype == dtype, key
        assert tuple(meta[key].shape) == shape, key
        assert meta[key].device.type == device.type, key
        assert meta[key].is_contiguous(), key
    if not packed:
        assert meta["batch_ids"] is meta["camera_ids"] is meta["gaussian_ids"] is None
    assert (meta["tile_width"], meta["tile_height"], meta["tile_size"]) == (5, 3, 16)
    assert (meta["width"], meta["height"], meta["n_cameras"]) == (WIDTH, HEIGHT, c)
    assert meta["n_batches"] == torch.Size(batch).numel()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rasterize_mode": "antialiased", "render_mode": "RGB+ED"},
        {"camera_model": "ortho", "near_plane": -5.0},
        {"camera_model": "fisheye", "radius_clip": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch", [(), (2, 2)], ids=str)
def test_values_equal_the_references(batch, packed, options, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(150, 2, batch=batch)
    scene.means.view(-1, 3)[5] = float("nan")
    scene.colors.view(-1, 3)[9] = float("inf")
    scene = scene.to(device)
    got = meta_of(scene, packed=packed, **options)
    want = meta_of(scene, packed=packed, backend="reference", **options)
    assert list(got) == list(want) == KEYS
    for key in KEYS:
        if not isinstance(want[key], torch.Tensor):
            assert got[key] == want[key], key
        elif want[key].dtype.is_floating_point:
            assert_close64(got[key], want[key])
        else:
            assert_same(got[key], want[key])


def test_dense_is_packed_put_in_its_places(device):
    scene = make_scene(100, 3, batch=(2,), dtype=torch.float32, device=device)
    packed, dense = meta_of(scene, packed=True), meta_of(scene, packed=False)
    place = (packed["batch_ids"], packed["camera_ids"], packed["gaussian_ids"])
    for key in ("radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss"):
        assert_same(dense[key][place], packed[key])
        rest = dense[key].clone()
        rest[place] = 0
        assert not rest.any(), key
    assert_same(dense["isect_ids"], packed["isect_ids"])
    assert_same(dense["isect_offsets"], packed["isect_offsets"])
    b, c, n = (x[packed["flatten_ids"].long()] for x in place)
    assert_same(dense["flatten_ids"].long(), (b * 3 + c) * 100 + n)


def test_intersections_equal_gsplats_own(device):
    """gsplat's torch implementation of tile intersection, fed with what meta says of the Gaussians."""
    torch_impl = pytest.importorskip("gsplat.cuda._torch_impl", reason="needs gsplat (the extra 'bench')")
    meta = meta_of(make_scene(120, 2, dtype=torch.float32, device=device), packed=False)
    cpu = {key: meta[key].cpu() for key in ("means2d", "radii", "depths")}
    tiles_per_gauss, isect_ids, flatten_ids = torch_impl._isect_tiles(
        cpu["means2d"], cpu["radii"], cpu["depths"], 16, 5, 3
    )
    assert_same(meta["tiles_per_gauss"].cpu(), tiles_per_gauss)
    assert_same(meta["isect_ids"].cpu(), isect_ids)
    assert_same(meta["flatten_ids"].cpu(), flatten_ids)
    assert_same(meta["isect_offsets"].cpu(), torch_impl._isect_offset_encode(isect_ids, 2, 5, 3))


@pytest.mark.parametrize("camera_model", ["pinhole", "ortho", "fisheye"])
def test_projection_equals_gsplats_own(camera_model, device):
    """gsplat's torch implementation of the projection, where a Gaussian is visible."""
    torch_impl = pytest.importorskip("gsplat.cuda._torch_impl", reason="needs gsplat (the extra 'bench')")
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, device=device)
    meta = meta_of(scene, packed=False, camera_model=camera_model, rasterize_mode="antialiased")
    _, means2d, depths, conics, compensations = torch_impl._fully_fused_projection(
        scene.means, covariances(scene), scene.viewmats, scene.Ks, WIDTH, HEIGHT,
        calc_compensations=True, camera_model=camera_model,
    )  # fmt: skip
    seen = (meta["radii"] > 0).all(-1)
    assert 50 < int(seen.sum()) < 400
    # gsplat's torch fisheye has another epsilon than its kernels.
    tolerance = 1e-6 if camera_model == "fisheye" else 1e-10
    assert_close64(meta["means2d"][seen], means2d[seen], tolerance)
    assert_close64(meta["depths"][seen], depths[seen], tolerance)
    assert_close64(meta["conics"][seen], conics[seen], tolerance)
    assert_close64(meta["opacities"][seen], (scene.opacities * compensations)[seen], tolerance)


def test_tile_entries_follow_the_box(device):
    """A finer tile test in the renderer changes neither radii nor the tile entries."""
    meta = meta_of(make_scene(150, 2, dtype=torch.float32, device=device))
    low = ((meta["means2d"] - meta["radii"]) / 16).floor().clamp(min=0)
    high = ((meta["means2d"] + meta["radii"]) / 16).ceil()
    high = torch.minimum(high, high.new_tensor([5, 3]))
    assert_same(meta["tiles_per_gauss"], (high - low).prod(-1).int())
    ids, offsets = meta["isect_ids"], meta["isect_offsets"].flatten().tolist()
    assert bool((ids.diff() >= 0).all())
    tile_bits = (5 * 3).bit_length()
    tiles = (ids >> (32 + tile_bits)) * 15 + ((ids >> 32) & ((1 << tile_bits) - 1))
    assert_same(torch.bincount(tiles, minlength=30).cumsum(0), torch.tensor([*offsets[1:], len(ids)], device=device))


def test_later_changes_of_the_inputs_do_not_reach_it(device):
    """An optimizer steps between the call and the first look."""
    scene = make_scene(100, 2, dtype=torch.float32, device=device)
    want = dict(meta_of(scene))
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT)
    for x in scene:
        x.fill_(float("nan"))
    colors.zero_()
    alphas.zero_()
    for key in KEYS:
        if isinstance(want[key], torch.Tensor):
            assert_same(meta[key], want[key])


def test_entries_are_made_once_and_are_the_callers(device):
    meta = meta_of(make_scene(100, 2, dtype=torch.float32, device=device))
    for key in KEYS:
        assert meta[key] is meta[key]
    # Writing into one entry changes no other.
    before = {key: meta[key].clone() for key in KEYS if isinstance(meta[key], torch.Tensor)}
    meta["means2d"].fill_(7.0)
    for key, value in before.items():
        if key != "means2d":
            assert_same(meta[key], value)


def test_one_call_keeps_nothing_of_another(device):
    scene = make_scene(100, 2, dtype=torch.float32, device=device)
    meta = meta_of(scene)
    meta_of(make_scene(80, 2, seed=9, dtype=torch.float32, device=device))
    want = meta_of(scene)
    for key in ("radii", "isect_ids", "means2d"):
        assert_same(meta[key], want[key])


READERS = {
    "dict()": dict,
    "**": lambda m: {**m},
    "update": lambda m: (d := {}).update(m) or d,
    "items": lambda m: dict(m.items()),
    "values": lambda m: dict(zip(m.keys(), m.values(), strict=True)),
    "get": lambda m: {key: m.get(key) for key in m},
    "[]": lambda m: {key: m[key] for key in m},
    "pop": lambda m: {key: m.pop(key) for key in list(m)},
    "setdefault": lambda m: {key: m.setdefault(key) for key in m},
    "popitem": lambda m: dict(m.popitem() for _ in range(len(m))),
    ".copy": lambda m: dict(m.copy()),
    "copy": lambda m: dict(copy.copy(m)),
    "deepcopy": lambda m: dict(copy.deepcopy(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "|": lambda m: m | {},
    "|, right": lambda m: {} | m,
}


@pytest.mark.parametrize("how", READERS)
def test_every_way_to_read_a_dict(how, device):
    scene = make_scene(50, 2, dtype=torch.float32, device=device)
    read = READERS[how](meta_of(scene))
    want = meta_of(scene)
    assert sorted(read) == sorted(KEYS)
    for key in KEYS:
        if isinstance(want[key], torch.Tensor):
            assert_same(read[key], want[key])
        else:
            assert read[key] == want[key]


def test_dict_behaviour(device):
    meta = meta_of(make_scene(50, 2, dtype=torch.float32, device=device))
    assert isinstance(meta, dict)
    assert len(meta) == len(meta.keys()) == len(meta.values()) == len(meta.items()) == len(KEYS)
    assert "radii" in meta and "nothing" not in meta
    assert meta.get("nothing") is None and meta.get("nothing", 3) == 3
    assert meta.pop("nothing", 4) == 4
    with pytest.raises(KeyError, match="nothing"):
        meta["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        meta.pop("nothing")
    meta["mine"] = 5
    assert meta["mine"] == 5
    del meta["mine"]
    assert "radii" in repr(meta)
    assert list(reversed(meta)) == KEYS[::-1]
