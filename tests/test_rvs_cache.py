"""Caches of feature maps and of rendered views: what is found is what was kept, and nothing damaged is."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from rapfast import PostProcess, RapScene
from rapfast.appearance import ColorNet, FeatureMapNet
from rapfast.rvs.hashes import fingerprint, scene_fingerprint
from rapfast.rvs.map_cache import FeatureMapCache, image_key
from rapfast.rvs.view_cache import ViewCache, ViewKey, rotation_angles, view_keys, view_settings
from rapfast.scene import Scene

POST = PostProcess(dtype=torch.uint8)


def make_scene(n: int = 50) -> RapScene:
    g = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g)

    torch.manual_seed(4)
    nets = FeatureMapNet().eval().requires_grad_(False), ColorNet().requires_grad_(False)
    scene = Scene(
        rand(n, 3) * 2 - 1, rand(n, 4) + 0.1, rand(n, 3) * 0.3 + 0.05, rand(n) * 0.8 + 0.1, intrinsic=rand(n, 16, 3)
    )
    return RapScene(scene, rand(n, 3, 2) * 40 + 0.1, *nets)


@pytest.fixture(scope="module")
def scene() -> RapScene:
    return make_scene()


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return list(torch.rand(5, 3, 24, 40, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def maps(scene, images) -> list[torch.Tensor]:
    return [scene.feature_maps([image])[0] for image in images]


MAP_BYTES = 48 * 12 * 20 * 4


def counts(cache: FeatureMapCache) -> tuple[int, int, int, int]:
    s = cache.stats
    return s.device_hits, s.host_hits, s.disk_hits, s.misses


# Fingerprints --------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_apart_what_differs():
    a = torch.arange(6.0)
    parts = [
        a, a.view(2, 3), a.double(), a.int(), a + 0.0001, a.numpy(), [a[:3], a[3:]], [a[:2], a[2:]], "ab", b"ab",
        ["a", "b"], ["ab", ""], {"a": "b"}, None, 0, False, 0.0, -0.0, [], {}, "", [None], [[]], (0, 1), 10, "10",
    ]  # fmt: skip
    seen = [fingerprint(part) for part in parts]
    assert len(set(seen)) == len(parts)
    assert fingerprint("a", "b") != fingerprint("ab")
    # Memory does not count, values do.
    assert fingerprint(a.view(2, 3).T) == fingerprint(a.view(2, 3).T.contiguous()) != fingerprint(a.view(3, 2))
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor([1.0]))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="got a object"):
        fingerprint(object())


def test_scene_fingerprint_sees_every_tensor():
    first = make_scene()
    before = scene_fingerprint(first)
    assert before == scene_fingerprint(make_scene())
    tensors = [
        first.scene.means, first.scene.quats, first.scene.scales, first.scene.opacities, first.scene.intrinsic,
        first.box_coord, first.feature_map_net.encoder[0].weight, first.feature_map_net.final_conv.bias,
        first.color_net.encoder.lin0.weight, first.color_net.color_decoder.lin1.bias,
    ]  # fmt: skip
    for tensor in tensors:
        value = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = value + 1
        assert scene_fingerprint(first) != before
        tensor.view(-1)[-1] = value
    assert scene_fingerprint(first) == before
    first.config["antialiasing"] = False
    assert scene_fingerprint(first) != before


# Feature maps --------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_scene_in_the_form_that_is_read_in_place(scene, images, maps):
    cache = FeatureMapCache(scene)
    got = cache.get([images[1], images[0], images[1]])
    assert counts(cache) == (1, 0, 0, 2)
    for one, want in zip(got, (maps[1], maps[0], maps[1]), strict=True):
        assert torch.equal(one, want)
        assert one.permute(1, 2, 0).is_contiguous() and one.untyped_storage().nbytes() == MAP_BYTES
    assert got[0] is got[2]
    again = cache.get(torch.stack(images[:2]))
    assert counts(cache) == (3, 0, 0, 2) and cache.gpu_bytes == 2 * MAP_BYTES
    assert again[0] is got[1] and cache.stats.hit_rate == 3 / 5
    assert cache.stats.sentence().startswith("feature maps: 3 of 5 found (60 %): 3 on the device")
    colors, _, _ = scene.render(torch.eye(4)[None], torch.eye(3)[None] * 20, 24, 16, feature_maps=again, map_ids=[1])
    assert colors.shape == (1, 16, 24, 3)


def test_tiers_and_their_budgets(tmp_path, scene, images, maps):
    cache = FeatureMapCache(
        scene, gpu_bytes=2 * MAP_BYTES + 1, pinned_bytes=MAP_BYTES, disk_dir=tmp_path / "m", disk_bytes=1 << 20
    )
    for i in range(4):  # least recently used first: 0 is on disk alone, 1 in host memory, 2 and 3 on the device
        cache.get([images[i]])
    assert (cache.gpu_bytes, cache.pinned_bytes) == (2 * MAP_BYTES, MAP_BYTES)
    assert len(list((tmp_path / "m").iterdir())) == 4 and counts(cache) == (0, 0, 0, 4)
    assert torch.equal(cache.get([images[3]])[0], maps[3]) and counts(cache) == (1, 0, 0, 4)
    assert torch.equal(cache.get([images[1]])[0], maps[1]) and counts(cache) == (1, 1, 0, 4)
    got = cache.get([images[0]])[0]
    assert torch.equal(got, maps[0]) and counts(cache) == (1, 1, 1, 4)
    assert got.permute(1, 2, 0).is_contiguous()
    assert (cache.gpu_bytes, cache.pinned_bytes) == (2 * MAP_BYTES, MAP_BYTES)
    # One call may ask for more than the budget holds.
    assert all(torch.equal(a, b) for a, b in zip(cache.get(images), maps, strict=True))
    assert cache.gpu_bytes <= cache._device.budget and cache.pinned_bytes <= MAP_BYTES
    # Another process finds the files; under a smaller budget the oldest go when one is added.
    other = FeatureMapCache(scene, disk_dir=tmp_path / "m", disk_bytes=cache.disk_bytes)
    assert other.disk_bytes == cache.disk_bytes == sum(p.stat().st_size for p in (tmp_path / "m").iterdir())
    assert all(torch.equal(a, b) for a, b in zip(other.get(images), maps, strict=True))
    assert counts(other) == (0, 0, 5, 0)
    other.get([images[0] * 0.5])
    assert other.disk_bytes <= cache.disk_bytes and len(list((tmp_path / "m").iterdir())) == 5


def test_no_budget_keeps_nothing_and_still_answers(scene, images, maps):
    cache = FeatureMapCache(scene, gpu_bytes=0)
    for _ in range(2):
        assert torch.equal(cache.get(images[:1])[0], maps[0])
    assert counts(cache) == (0, 0, 0, 2) and cache.gpu_bytes == cache.pinned_bytes == cache.disk_bytes == 0
    cache = FeatureMapCache(scene, gpu_bytes=0, pinned_bytes=10 * MAP_BYTES)
    for _ in range(2):
        assert torch.equal(cache.get(images[:1])[0], maps[0])
    assert counts(cache) == (0, 1, 0, 1)


def test_keys_in_place_of_images(scene, images, maps):
    cache = FeatureMapCache(scene)
    loaded = []

    def load(key):
        loaded.append(key)
        return images[key]

    got = cache.get(keys=[3, 1, 3], load=load)
    assert loaded == [3, 1] and torch.equal(got[2], maps[3]) and torch.equal(got[1], maps[1])
    assert cache.get(keys=[1])[0] is got[1] and loaded == [3, 1]
    with pytest.raises(KeyError, match=r"keys\[0\] is 2, whose map is not in the cache"):
        cache.get(keys=[2])
    cache.get(images[:1], keys=["by name"])
    assert torch.equal(cache.get(keys=["by name"])[0], maps[0])
    assert image_key(images[0]) == image_key(images[0].clone()) != image_key(images[1])


def test_changed_weights_make_new_maps(images):
    scene = make_scene()
    cache = FeatureMapCache(scene)
    before = cache.get(images[:1])[0]
    with torch.no_grad():
        scene.feature_map_net.final_conv.bias.add_(1.0)
    after = cache.get(images[:1])[0]
    assert torch.equal(after, scene.feature_maps(images[:1])[0]) and not torch.equal(after, before)
    assert counts(cache) == (0, 0, 0, 2)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "words"])
def test_a_damaged_map_is_made_again(tmp_path, scene, images, maps, damage):
    FeatureMapCache(scene, disk_dir=tmp_path).get(images[:2])
    cache = FeatureMapCache(scene, disk_dir=tmp_path)
    path = tmp_path / f"map_{sorted(p.stem[4:] for p in tmp_path.iterdir())[0]}.npz"
    harm(path, damage)
    with pytest.warns(UserWarning, match=f"{path.name}: is damaged .* made again"):
        got = cache.get(images[:2])
    assert all(torch.equal(a, b) for a, b in zip(got, maps, strict=False))
    assert counts(cache) == (0, 0, 1, 1) and cache.stats.corrupt == 1
    fresh = FeatureMapCache(scene, disk_dir=tmp_path)
    fresh.get(images[:2])
    assert counts(fresh) == (0, 0, 2, 0) and fresh.disk_bytes == cache.disk_bytes


def harm(path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes({"flip": data, "cut": data[:-100], "empty": b"", "words": b"hello"}[damage])


def test_map_cache_refuses_what_it_cannot_use(scene, images):
    for arguments, words in (
        ({"gpu_bytes": -1}, "gpu_bytes must be between 0"),
        ({"pinned_bytes": 1.5}, "pinned_bytes must be a whole number"),
        ({"precision": "fp8"}, "precision must be one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            FeatureMapCache(scene, **arguments)
    with pytest.raises(TypeError, match="scene must be a RapScene"):
        FeatureMapCache(nn.Identity())
    cache = FeatureMapCache(scene)
    for arguments, words in (
        ({}, "needs images, or keys"),
        ({"images": images, "load": print}, "load must be None"),
        ({"images": images, "keys": [1]}, "one key for each of 5 images, got 1"),
        ({"images": [torch.rand(3, 40)]}, r"image must be a tensor \[3, H, W\]"),
        ({"images": [torch.rand(4, 40, 40)]}, r"images\[0\] must be \[3, H, W\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            cache.get(**arguments)


# Views ---------------------------------------------------------------------------------------------------------------


def pose(x: float = 0.0, degrees: float = 0.0) -> np.ndarray:
    angle = np.radians(degrees)
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0, x], [s, c, 0, 0], [0, 0, 1, 0]], dtype=np.float64)


def keys_of(n: int, start: int = 0, **changes) -> list[ViewKey]:
    given = {"settings": "s", "Ks": np.eye(3), "weights": np.full(n, 0.5), "references": ["r"] * n} | changes
    return view_keys(poses=np.stack([pose(float(start + i)) for i in range(n)]), **given)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fill(folder, n: int = 10, **options) -> tuple[list[ViewKey], torch.Tensor]:
    keys, images = keys_of(n), pictures(n)
    with ViewCache(folder, **options) as cache:
        cache.store(keys, images)
    return keys, images


def equal(found, images) -> list[bool]:
    return [f is not None and torch.equal(f.image, image) for f, image in zip(found, images, strict=True)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_views_come_back_bit_by_bit(tmp_path, dtype):
    keys, images = keys_of(10), pictures(10) if dtype == torch.uint8 else pictures(10).to(dtype) / 255
    with ViewCache(tmp_path, shard_views=4) as cache:
        cache.store(keys, images)
        assert len(list(tmp_path.glob("*.npz"))) == 2  # two are not a shard yet, and found all the same
        assert len(cache) == 10 and all(equal(cache.fetch(keys), images))
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.glob("*.json"))) == 3
    cache = ViewCache(tmp_path)
    found = cache.fetch(keys)
    assert all(equal(found, images)) and found[3].image.dtype == dtype and np.array_equal(found[3].pose, keys[3].pose)
    assert (cache.stats.hits, cache.stats.misses, len(cache)) == (10, 0, 10)
    assert cache.n_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.npz"))
    found[0].image.zero_()  # what is handed out is the caller's
    assert all(equal(cache.fetch(keys), images))


def test_anything_that_decides_the_pixels_is_in_the_key(tmp_path):
    fill(tmp_path, 1)
    cache = ViewCache(tmp_path)
    K = np.eye(3)
    K[0, 2] = 1e-12
    for change in (
        {"settings": "t"}, {"Ks": K}, {"weights": np.array([0.5 + 1e-15])}, {"references": ["q"]}, {"start": 1e-15},
    ):  # fmt: skip
        assert cache.fetch(keys_of(1, **change)) == [None], change
    assert cache.fetch(keys_of(1))[0] is not None
    assert (cache.stats.hits, cache.stats.misses) == (1, 5) and cache.stats.hit_rate == 1 / 6
    assert cache.stats.sentence() == "rendered views: 1 of 6 found (17 %)"


def test_settings_change_with_the_scene_the_size_and_the_rest(scene):
    settings = [
        view_settings(scene, 40, 24),
        view_settings(scene, 24, 40),
        view_settings(scene, 40, 24, postprocess=POST),
        view_settings(scene, 40, 24, postprocess=PostProcess(dtype=torch.uint8, size=(12, 20))),
        view_settings(scene, 40, 24, precision="fp32"),
        view_settings(scene, 40, 24, near_plane=0.2),
        view_settings(make_scene(51), 40, 24),
    ]
    assert len(set(settings)) == len(settings)
    assert view_settings(make_scene(), 40, 24) == settings[0]


def test_fresh_random_poses_are_never_found(tmp_path):
    rng = np.random.RandomState(0)
    with ViewCache(tmp_path) as cache:
        for _ in range(3):
            poses = np.repeat(pose()[None], 4, axis=0)
            poses[:, :, 3] += rng.uniform(-0.1, 0.1, (4, 3))
            keys = view_keys("s", poses, np.eye(3), np.ones(4), ["r"] * 4)
            _, shown = cache.render(keys, lambda missing: pictures(len(missing)))
            assert np.array_equal(np.stack(shown), poses)
        assert cache.stats.hit_rate == 0.0 and cache.stats.misses == 12


def test_render_renders_the_missing_alone(tmp_path):
    keys, images = fill(tmp_path, 6)
    asked = []

    def render(missing):
        asked.append(missing)
        return pictures(8, seed=1)[missing]

    order = [7, 0, 6, 5]
    every = keys_of(8)
    cache = ViewCache(tmp_path)
    got, poses = cache.render([every[i] for i in order], lambda m: render([order[i] for i in m]))
    assert asked == [[7, 6]]
    want = [pictures(8, seed=1)[7], images[0], pictures(8, seed=1)[6], images[5]]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(np.array_equal(p, every[i].pose) for p, i in zip(poses, order, strict=True))
    cache.render(every[6:], render)
    assert len(asked) == 1 and len(cache) == 8


def test_always_renders_and_replaces(tmp_path):
    keys, images = fill(tmp_path, 3)
    with ViewCache(tmp_path, refresh="always") as cache:
        got, _ = cache.render(keys, lambda missing: pictures(3, seed=2)[missing])
        assert cache.stats.hits == 0 and torch.equal(torch.stack(got), pictures(3, seed=2))
    assert all(equal(ViewCache(tmp_path).fetch(keys), pictures(3, seed=2)))


def test_near_views_within_both_thresholds(tmp_path):
    poses = np.stack([pose(0.0), pose(0.10), pose(0.11, 1.0), pose(5.0, 3.0)])
    keys = view_keys("s", poses, np.eye(3), np.ones(4), ["r"] * 4)
    with ViewCache(tmp_path) as cache:
        cache.store(keys, pictures(4))
    wanted = view_keys("s", poses + pose(0.06) - pose(), np.eye(3), np.ones(4), ["r"] * 4)
    cache = ViewCache(tmp_path, distance=0.07, angle=0.5)
    found = cache.fetch(wanted)
    # 0.06 lies nearest to 0.10; 0.16 to 0.10, as 0.11 is turned; 0.17 turned by 1 degree to 0.11; 5.06 to 5.0.
    assert [None if f is None else f.pose[0, 3] for f in found] == [0.10, 0.10, 0.11, 5.0]
    assert all(equal(found, pictures(4)[[1, 1, 2, 3]]))
    assert cache.stats.near_hits == 4 and cache.stats.sentence().endswith("4 of 4 found (100 %), 4 of them near by")
    turned = view_keys("s", pose(5.0, 3.4)[None], np.eye(3), np.ones(1), ["r"])
    assert cache.fetch(turned)[0].pose[0, 3] == 5.0
    for far in (pose(5.0, 3.6), pose(5.071, 3.0)):
        assert cache.fetch(view_keys("s", far[None], np.eye(3), np.ones(1), ["r"])) == [None]
    for weight, reference, settings in ((1.1, "r", "s"), (1.0, "q", "s"), (1.0, "r", "t")):
        assert cache.fetch(view_keys(settings, pose(0.01)[None], np.eye(3), [weight], [reference])) == [None]
    assert cache.fetch(keys[:1])[0].pose[0, 3] == 0.0 and cache.stats.hits == 1  # an exact one goes first
    # Views that are not on disk yet are found too; and no thresholds find no neighbour.
    cache.store(view_keys("s", pose(9.0)[None], np.eye(3), np.ones(1), ["r"]), pictures(1, seed=5))
    near = view_keys("s", pose(9.01)[None], np.eye(3), np.ones(1), ["r"])
    assert torch.equal(cache.fetch(near)[0].image, pictures(1, seed=5)[0])
    assert ViewCache(tmp_path).fetch(wanted) == [None] * 4


def test_rotation_angles_are_exact_where_small_and_large():
    angles = np.array([0.0, 1e-7, 1e-3, 1.0, 90.0, 179.9, 180.0])
    rotations = np.stack([pose(0, a)[:, :3] for a in angles])
    assert np.allclose(rotation_angles(rotations, np.eye(3)), angles, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "words", "gone"])
def test_a_damaged_shard_is_dropped_and_its_views_are_rendered_again(tmp_path, damage):
    keys, images = fill(tmp_path, 10, shard_views=5)
    path = sorted(tmp_path.glob("*.npz"))[0]
    cache = ViewCache(tmp_path)
    if damage == "gone":  # another process has dropped it
        path.unlink()
        asked = render_all(cache, keys, images)
        assert cache.stats.corrupt_shards == 0
    else:
        harm(path, damage)
        with pytest.warns(UserWarning, match=f"{path.name}: is damaged .* its 5 views are rendered again"):
            asked = render_all(cache, keys, images)
        assert cache.stats.corrupt_shards == 1
    assert asked == [[0, 1, 2, 3, 4]] and not path.exists() and not path.with_suffix(".json").exists()
    cache.close()
    assert all(equal(ViewCache(tmp_path).fetch(keys), images))


def render_all(cache, keys, images) -> list[list[int]]:
    asked = []

    def render(missing):
        asked.append(missing)
        return images[missing]

    got, _ = cache.render(keys, render)
    assert torch.equal(torch.stack(got), images)
    return asked


def test_every_flipped_bit_of_a_shard_is_seen(tmp_path):
    keys, images = fill(tmp_path, 2)
    (path,), (described,) = tmp_path.glob("*.npz"), tmp_path.glob("*.json")
    whole, text = path.read_bytes(), described.read_bytes()
    rng = np.random.RandomState(0)
    for file, content in ((path, whole), (described, text)):
        for place in rng.choice(len(content), 12, replace=False):
            bad = bytearray(content)
            bad[place] ^= 1 << rng.randint(8)
            file.write_bytes(bad)
            with pytest.warns(UserWarning, match="is damaged"):
                assert ViewCache(tmp_path).fetch(keys) == [None, None]
            path.write_bytes(whole)
            described.write_bytes(text)
    assert all(equal(ViewCache(tmp_path).fetch(keys), images))


def test_a_kill_between_the_two_files_of_a_shard_costs_its_views_alone(tmp_path):
    import os
    import time

    keys, images = fill(tmp_path, 8, shard_views=4)
    first = sorted(tmp_path.glob("*.json"))[0]
    first.unlink()
    cache = ViewCache(tmp_path)
    assert [f is not None for f in cache.fetch(keys)] == [False] * 4 + [True] * 4
    orphan = first.with_suffix(".npz")
    assert orphan.exists()  # it may be another process's, which is about to write the .json
    os.utime(orphan, (time.time() - 7200,) * 2)
    ViewCache(tmp_path)
    assert not orphan.exists() and len(list(tmp_path.glob("*.npz"))) == 1


def test_budget_of_views_drops_the_oldest(tmp_path):
    keys, images = fill(tmp_path, 8, shard_views=2)
    size = max(p.stat().st_size for p in tmp_path.glob("*.npz"))
    with ViewCache(tmp_path, shard_views=2, max_bytes=3 * size) as cache:
        cache.store(keys_of(2, start=20), pictures(2, seed=9))
        assert cache.n_bytes <= 3 * size
    cache = ViewCache(tmp_path)
    assert [f is not None for f in cache.fetch(keys)] == [False] * 4 + [True] * 4
    assert all(equal(cache.fetch(keys_of(2, start=20)), pictures(2, seed=9)))


def test_two_writers_share_a_folder(tmp_path):
    with ViewCache(tmp_path) as a, ViewCache(tmp_path) as b:
        a.store(keys_of(3), pictures(3))
        b.store(keys_of(3, start=10), pictures(3, seed=1))
        a.flush()
    cache = ViewCache(tmp_path)
    assert all(equal(cache.fetch(keys_of(3)), pictures(3)))
    assert all(equal(cache.fetch(keys_of(3, start=10)), pictures(3, seed=1)))


def test_view_cache_refuses_what_it_cannot_use(tmp_path):
    for arguments, words in (
        ({"refresh": "never"}, "refresh must be one of 'always', 'changed'"),
        ({"distance": -1}, "distance must be a number of metres >= 0"),
        ({"angle": float("nan")}, "angle must be a number of degrees"),
        ({"shard_views": 0}, "shard_views must be between 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ViewCache(tmp_path, **arguments)
    cache = ViewCache(tmp_path)
    for images in (pictures(3), torch.zeros(2), [1, 2]):
        with pytest.raises(ValueError, match=re.escape("images must be a tensor [2, ...]")):
            cache.store(keys_of(2), images)
    for arguments, words in (
        ({"Ks": np.zeros((2, 2))}, "Ks must be"),
        ({"weights": [1.0]}, r"weights must be \[2\]"),
        ({"references": ["r"]}, "references must be 2 strings"),
    ):
        with pytest.raises(ValueError, match=words):
            keys_of(2, **arguments)
    (tmp_path / "views_1.json").write_text(json.dumps({"format": "other"}))
    with pytest.warns(UserWarning, match="views_1.json: is damaged .it is no 'rapfast views 1'."):
        assert len(ViewCache(tmp_path)) == 0


def test_rendered_views_of_a_scene_are_found_bit_by_bit(tmp_path, scene, maps):
    settings = view_settings(scene, 40, 24, postprocess=POST)
    poses = np.stack([pose(0.1 * i) - pose() + pose() for i in range(3)])
    poses[:, 2, 3] = -4.0
    K = np.array([[30.0, 0, 20], [0, 30, 12], [0, 0, 1]])
    weights = np.array([0.0, 1.0, 2.0])
    keys = view_keys(settings, poses, K, weights, ["a", "b", "a"])

    def render(missing):
        full = np.tile(np.eye(4), (len(missing), 1, 1))
        full[:, :3] = poses[missing]
        viewmats = torch.linalg.inv(torch.from_numpy(full)).float()
        Ks = torch.from_numpy(K).float().expand(len(missing), 3, 3)
        ids = [[0, 1, 0][i] for i in missing]
        colors, _, _ = scene.render(
            viewmats, Ks, 40, 24, feature_maps=maps[:2], map_ids=ids, view_weights=weights[missing].tolist(),
            postprocess=POST,
        )  # fmt: skip
        return colors

    with ViewCache(tmp_path) as cache:
        first, _ = cache.render(keys, render)
    again, _ = ViewCache(tmp_path).render(keys, lambda missing: pytest.fail("nothing is missing"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert float(torch.stack(first).float().std()) > 1


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_tiers_on_a_gpu(tmp_path, precision):
    scene = make_scene().to("cuda")
    images = [torch.rand(3, 120, 214, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    want = [scene.feature_maps([image.cuda()], precision=precision)[0] for image in images]
    size = want[0].numel() * want[0].element_size()
    cache = FeatureMapCache(scene, gpu_bytes=2 * size, pinned_bytes=2 * size, disk_dir=tmp_path, precision=precision)
    for order in ([0, 1, 2, 3, 4, 5], [0, 5, 3, 3, 1, 2], [2, 4]):
        for a, i in zip(cache.get([images[i] for i in order]), order, strict=True):
            assert a.is_cuda and torch.equal(a, want[i]) and a.permute(1, 2, 0).is_contiguous()
        assert cache.gpu_bytes <= 2 * size and cache.pinned_bytes <= 2 * size
    assert cache.stats.misses == 6 and cache.stats.host_hits >= 1 and cache.stats.disk_hits >= 1
    assert all(kept.is_pinned() for kept in cache._host._kept.values())
    other = FeatureMapCache(scene, disk_dir=tmp_path, precision="fp32" if precision is None else "fp16")
    other.get(images[:1])
    assert other.stats.misses == 1  # maps of another precision are others
