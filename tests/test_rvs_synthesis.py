"""What `RandomViewSynthesizer` does ahead of its batches: that it changes no bit, fails in its turn and stays small."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from torch import Tensor

from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.rvs import FeatureMapCache, PoseSampler, RandomViewSynthesizer, ReferenceMaps, synthesis

pytestmark = pytest.mark.usefixtures("one_thread")

M, BATCH = 11, 3
A = make_appearance(n=60, c=4, n_maps=M)
IMAGES = torch.rand(M, 3, 33, 36, generator=torch.Generator().manual_seed(1))
INDEXES = [3, 0, 0, 7, 10, 2, 2, 5, 1, 3, 9]
WEIGHTS = np.linspace(0.0, 2.0, M)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def make_poses() -> np.ndarray:
    base = torch.linalg.inv(A.viewmats)[:, :3].numpy()
    poses = base[np.arange(M) % len(base)].copy()
    poses[:, :, 3] += np.random.RandomState(5).uniform(-0.1, 0.1, (M, 3))
    return poses


POSES = make_poses()


@pytest.fixture(scope="module")
def scenes() -> dict[str, RapScene]:
    torch.manual_seed(0)
    box_coord = A.box_coord.clone()
    box_coord[:, 2] = torch.tensor([HEIGHT, WIDTH])
    geometry = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=A.intrinsic)
    own = RapScene(
        geometry,
        box_coord,
        FeatureMapNet().eval().requires_grad_(False),
        ColorNet.from_state_dict(net_state()),
    )
    made = {"cpu": own.to("cpu", torch.float32)}
    if torch.cuda.is_available():
        made["cuda"] = own.to("cuda", torch.float32)
    return made


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where it gains nothing."""
    monkeypatch.setattr(synthesis, "_makes_ahead", lambda device: True)


def synthesizer(scene: RapScene, references: Any, **changes: Any) -> RandomViewSynthesizer:
    arguments = {"size": (24, 31), "batch_size": BATCH} | changes
    return RandomViewSynthesizer(scene, A.Ks[0], (HEIGHT, WIDTH), references, **arguments)


def rendered(views: RandomViewSynthesizer) -> Tensor:
    return views.render(POSES, WEIGHTS, INDEXES).images.cpu()


def one_by_one(scene: RapScene, references: Any) -> Tensor:
    """Each view in a call of its own, in which nothing can be ahead."""
    views = synthesizer(scene, references)
    return torch.cat(
        [views.render(POSES[i : i + 1], WEIGHTS[i : i + 1], INDEXES[i : i + 1]).images.cpu() for i in range(M)]
    )


class Watched(RandomViewSynthesizer):
    """Says when a batch is rendered, and may fail in it."""

    log: list[Any]
    fails: Any = None  # (number of the batch, exception)

    def draw(self, viewmats, *rest):
        batch = sum(1 for name, *_ in self.log if name == "draw")
        self.log.append(("draw", len(viewmats)))
        if self.fails is not None and batch == self.fails[0]:
            raise self.fails[1]
        return super().draw(viewmats, *rest)


def watched(scene: RapScene, maps: Tensor, **changes: Any) -> Watched:
    """With references that are a function; `changes` are its `fails_at` (ids to exceptions) and the class's."""
    fails_at = changes.pop("fails_at", {})
    log: list[Any] = []

    def references(ids: list[int]) -> list[Tensor]:
        log.append(("maps", list(ids)))
        for wanted, errors in fails_at.items():
            if list(wanted) == ids and errors:
                raise errors.pop(0)
        return [maps[i].clone() for i in ids]

    views = Watched(scene, A.Ks[0], (HEIGHT, WIDTH), references, (24, 31), batch_size=BATCH, **changes)
    views.log = log
    return views


# --- the order of things ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ahead")
def test_the_next_batchs_maps_are_asked_for_before_a_batch_renders(scenes):
    maps = A.maps.float()
    views = watched(scenes["cpu"], maps)
    assert torch.equal(rendered(views), one_by_one(scenes["cpu"], maps))
    expected = [("maps", [0, 3]), ("maps", [2, 7, 10]), ("draw", 3), ("maps", [1, 2, 5]), ("draw", 3),
                ("maps", [3, 9]), ("draw", 3), ("draw", 2)]  # fmt: skip
    assert views.log == expected


def test_on_a_cpu_and_with_maps_that_are_there_nothing_is_ahead(scenes, monkeypatch):
    maps = A.maps.float()
    views = watched(scenes["cpu"], maps)
    rendered(views)
    assert [name for name, _ in views.log] == ["maps", "draw"] * 4
    monkeypatch.setattr(synthesis, "_makes_ahead", lambda device: True)
    asked: list[list[int]] = []
    views = synthesizer(scenes["cpu"], maps)
    monkeypatch.setattr(views, "maps", lambda ids: asked.append(ids) or [maps[i] for i in ids])
    rendered(views)
    assert asked == [[0, 3], [2, 7, 10], [1, 2, 5], [3, 9]]


def test_maps_that_lie_in_one_piece_are_handed_over_so(scenes, monkeypatch):
    maps = A.maps.float()
    views = synthesizer(scenes["cpu"], maps)
    handed: list[Any] = []
    whole = RapScene.render
    monkeypatch.setattr(
        RapScene, "render", lambda self, *args, **options: handed.append(options["feature_maps"]) or whole(
            self, *args, **options)
    )  # fmt: skip
    images = views.render(POSES, WEIGHTS).images
    assert [part.data_ptr() for part in handed] == [maps[i].data_ptr() for i in (0, 3, 6, 9)]
    assert torch.equal(images, synthesizer(scenes["cpu"], list(maps)).render(POSES, WEIGHTS).images)
    assert views.maps([]) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["plain", "attempts", "brisque"])
def test_every_way_gives_the_bits_of_single_views(way, device, scenes, ahead):
    scene = scenes[device]
    sampler, made = PoseSampler(0.4, 25.0), []
    for batch_size in (1, BATCH, 16):
        np.random.seed(4)
        views = synthesizer(scene, ReferenceMaps(scene, IMAGES), batch_size=batch_size)
        if way == "plain":
            made.append(views.perturbed(POSES, sampler, indexes=INDEXES))
        elif way == "attempts":
            made.append(views.with_attempts(POSES, sampler, 2, indexes=INDEXES))
        else:
            made.append(views.with_brisque(POSES, sampler, 3, 42.0, indexes=INDEXES))
    for other in made[1:]:
        assert torch.equal(made[0].images, other.images)
        assert torch.equal(made[0].poses, other.poses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", [0, 2, 100], ids=["none", "two", "all"])
def test_maps_from_a_cache_are_the_same_however_full_it_is(kept, device, scenes, ahead):
    """Maps that leave the device for the host, and come back, while others render."""
    scene = scenes[device]
    expected = one_by_one(scene, scene.feature_maps(IMAGES.to(device)))
    size = 48 * 17 * 18 * (2 if device == "cuda" else 4)
    for host in (0, 3, 100):
        cache = FeatureMapCache(scene, gpu_bytes=kept * size, pinned_bytes=host * size)
        for by_number in (True, False):
            views = synthesizer(scene, ReferenceMaps(scene, IMAGES, cache=cache, by_number=by_number))
            for _ in range(3):
                assert torch.equal(rendered(views), expected)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_reference_that_fails_is_raised_once_and_in_its_turn(device, scenes, ahead):
    error, finished = ValueError("image 5 is torn"), []
    maps = A.maps.float().to(device)
    views = watched(scenes[device], maps, fails_at={(1, 2, 5): [error, AssertionError("asked twice")]})
    views.on_progress = finished.append
    with pytest.raises(ValueError, match="image 5 is torn") as caught:
        rendered(views)
    assert caught.value is error
    assert finished == [3, 3]  # those before it are finished
    views = synthesizer(scenes[device], maps)
    assert torch.equal(rendered(views), one_by_one(scenes[device], maps))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_fails_leaves_nothing_behind(device, scenes, ahead):
    scene, maps = scenes[device], A.maps.float().to(device)
    views = watched(scene, maps)
    views.fails = 1, RuntimeError("the kernel is on fire")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="on fire"):
            rendered(views)
    assert [name for name, _ in views.log] == ["maps", "maps", "draw", "maps", "draw"]
    views.fails = None
    assert torch.equal(rendered(views), one_by_one(scene, maps))


@pytest.mark.usefixtures("ahead")
def test_where_memory_runs_out_ahead_the_maps_are_made_in_their_turn(scenes):
    maps = A.maps.float()
    views = watched(scenes["cpu"], maps, fails_at={(1, 2, 5): [torch.cuda.OutOfMemoryError("CUDA out of memory.")]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rendered(views), one_by_one(scenes["cpu"], maps))
    assert [entry for entry in views.log if entry[1] == [1, 2, 5]] == [("maps", [1, 2, 5])] * 2


@pytest.mark.usefixtures("ahead")
def test_where_it_runs_out_in_their_turn_too_the_batch_is_halved(scenes):
    errors = [torch.cuda.OutOfMemoryError("CUDA out of memory.") for _ in range(2)]
    maps = A.maps.float()
    views = watched(scenes["cpu"], maps, fails_at={(1, 2, 5): errors})
    with pytest.warns(RuntimeWarning, match="memory ran out with 3 views at a time: from here on 1"):
        assert torch.equal(rendered(views), one_by_one(scenes["cpu"], maps))


@pytest.mark.usefixtures("ahead")
def test_a_halved_batch_does_not_hold_the_maps_of_the_next(scenes):
    """Nor are there ever more than two batches' maps."""
    maps, alive, most = A.maps.float(), [], []

    def references(ids: list[int]) -> list[Tensor]:
        made = [maps[i].clone() for i in ids]
        alive.extend(weakref.ref(one) for one in made)
        gc.collect()
        most.append(sum(1 for ref in alive if ref() is not None))
        return made

    class Tight(RandomViewSynthesizer):
        def draw(self, viewmats, *rest):
            if len(viewmats) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().draw(viewmats, *rest)

    views = Tight(scenes["cpu"], A.Ks[0], (HEIGHT, WIDTH), references, (24, 31), batch_size=4)
    with pytest.warns(RuntimeWarning, match="from here on 2"):
        assert torch.equal(rendered(views), one_by_one(scenes["cpu"], maps))
    assert max(most[2:]) <= 4 and max(most) <= 8
    assert not any(ref() is not None for ref in alive)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_maps(scenes) -> Iterator[Any]:
    """References whose maps take the GPU long, on the stream that is current, and which are zero until then."""
    maps = A.maps.float().cuda()

    def references(ids: list[int]) -> list[Tensor]:
        made = [torch.zeros_like(maps[i]) for i in ids]
        torch.cuda._sleep(20_000_000)
        for one, i in zip(made, ids, strict=True):
            one.copy_(maps[i])
        return made

    yield references


@pytest.mark.cuda
def test_rendering_waits_for_maps_that_are_late(slow_maps, scenes):
    expected = one_by_one(scenes["cuda"], A.maps.float().cuda())
    for destination in ("device", "pinned", "cpu"):
        assert torch.equal(rendered(synthesizer(scenes["cuda"], slow_maps, destination=destination)), expected)


@pytest.mark.cuda
def test_it_follows_the_callers_stream(slow_maps, scenes):
    expected = one_by_one(scenes["cuda"], A.maps.float().cuda())
    mine = torch.cuda.Stream()
    with torch.cuda.stream(mine):
        torch.cuda._sleep(20_000_000)
        late = A.maps.float().cuda() * 1.0
        views = synthesizer(scenes["cuda"], lambda ids: [late[i] * 1.0 for i in ids], destination="device")
        images = views.render(POSES, WEIGHTS, INDEXES).images
    mine.synchronize()
    assert torch.equal(images.cpu(), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("destination", ["device", "pinned", "cpu"])
def test_no_copy_stops_the_host(destination, scenes):
    """torch raises where one of its calls waits for the GPU (the wait for a batch's counts is the native module's)."""
    scene = scenes["cuda"]
    for images in (IMAGES.cuda(), IMAGES):
        references = ReferenceMaps(scene, images, cache=FeatureMapCache(scene, gpu_bytes=0), by_number=True)
        views = synthesizer(scene, references, destination=destination)
        for _ in range(4):
            expected = rendered(views)  # values are looked at, graphs captured
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = views.render(POSES, WEIGHTS, INDEXES).images
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(made.cpu(), expected)


@pytest.mark.cuda
def test_a_failure_waits_for_what_is_under_way(scenes):
    """Where the exception arrives, copies and maps begun before it are done."""
    maps = A.maps.float().cuda()
    views = watched(scenes["cuda"], maps, destination="pinned")
    views.fails = 2, RuntimeError("the kernel is on fire")
    streams: list[torch.cuda.Stream] = []
    whole = views.buffer
    views.buffer = lambda count: streams.append((made := whole(count))._stream) or made
    with pytest.raises(RuntimeError, match="on fire"):
        rendered(views)
    assert len(streams) == 1 and streams[0].query()


# --- references by number --------------------------------------------------------------------------------------------


def test_images_by_number_are_not_hashed(scenes, monkeypatch):
    scene = scenes["cpu"]
    expected = scene.feature_maps(IMAGES)
    monkeypatch.setattr("rapfast.rvs.references.image_key", lambda image: pytest.fail("hashed"))
    first = ReferenceMaps(scene, IMAGES)
    assert all(torch.equal(one, expected[i]) for one, i in zip(first([4, 2]), (4, 2), strict=True))
    # Two may share a cache: their numbers are not the same images.
    second = ReferenceMaps(scene, IMAGES.flip(0), cache=first.cache, by_number=True)
    assert torch.equal(second([4])[0], expected[M - 1 - 4])
    assert torch.equal(first([4])[0], expected[4])
    assert first.cache.stats.device_hits == 1


def test_by_number_is_refused_for_a_folder(scenes, tmp_path):
    cache = FeatureMapCache(scenes["cpu"], disk_dir=tmp_path)
    with pytest.raises(ValueError, match="by_number must be False for a cache with a folder"):
        ReferenceMaps(scenes["cpu"], IMAGES, cache=cache, by_number=True)
    with pytest.raises(TypeError, match="by_number must be True or False, got int 1"):
        ReferenceMaps(scenes["cpu"], IMAGES, by_number=1)
    assert ReferenceMaps(scenes["cpu"], IMAGES, cache=cache)([0])[0].shape == (48, 17, 18)


def test_every_new_image_of_a_call_is_looked_at(scenes):
    images = [IMAGES[0], (IMAGES[1] * 255).to(torch.uint8), IMAGES[2].double(), IMAGES[3] * 2 - 1]
    maps = ReferenceMaps(scenes["cpu"], images)
    with pytest.raises(ValueError, match=r"reference image 3 must be raw RGB in 0..1 \(not normalised\), got values"):
        maps([0, 1, 2, 3])
    assert len(maps([0, 1])) == 2
