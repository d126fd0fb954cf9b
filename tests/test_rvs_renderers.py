"""Random-view synthesis in batches against a loop over views that is written from the description of RAP's."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from torch import Tensor

from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.rvs import PoseSampler
from rapfast.rvs.brisque import Brisque
from rapfast.rvs.map_cache import FeatureMapCache
from rapfast.rvs.references import ReferenceMaps
from rapfast.rvs.synthesis import RandomViewSynthesizer

M, N = 11, 60
BATCHES = (1, 3, 8, 16)
SIZE = (24, 31)
X, DEGREES = 0.4, 25.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKGROUND = (0.3, 0.1, 0.6)
A = make_appearance(n=N, c=4, n_maps=M)
INDEXES = [int(i) for i in np.random.RandomState(3).permutation(M)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def map_net() -> FeatureMapNet:
    torch.manual_seed(0)
    return FeatureMapNet().eval().requires_grad_(False)


def make_scene(map_net: FeatureMapNet, sparse: bool = False) -> RapScene:
    """float64. `sparse`: all windows on the projected map but a few are empty, so that sometimes one point is valid."""
    box_coord = A.box_coord.clone()
    if sparse:
        box_coord[4:, 2] = 0.0
    else:
        box_coord[:, 2] = torch.tensor([HEIGHT, WIDTH])
    scene = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=A.intrinsic)
    state = net_state()
    state = {name: value * (0.3 if "color_decoder.lin1" in name else 1.0) for name, value in state.items()}
    return RapScene(scene, box_coord, map_net, ColorNet.from_state_dict(state))


@pytest.fixture(scope="module")
def scene(map_net) -> RapScene:
    return make_scene(map_net)


@pytest.fixture(scope="module")
def sparse(map_net) -> RapScene:
    return make_scene(map_net, sparse=True)


def given_poses() -> np.ndarray:
    turns = np.random.RandomState(5)
    base = torch.linalg.inv(A.viewmats)[:, :3].numpy()
    poses = base[np.arange(M) % len(base)].copy()
    poses[:, :, 3] += turns.uniform(-0.1, 0.1, (M, 3))
    return poses


POSES = given_poses()


def synthesizer(scene: RapScene, **changes: Any) -> RandomViewSynthesizer:
    arguments = {"references": A.maps, "size": SIZE, "background": BACKGROUND} | changes
    return RandomViewSynthesizer(scene, A.Ks[0], (HEIGHT, WIDTH), **arguments)


# --- the loop --------------------------------------------------------------------------------------------------------


def perturb(pose: np.ndarray, box: np.ndarray | None = None) -> np.ndarray:
    """RAP's default sampler for one pose [3, 4]."""
    theta, phi, psi = np.random.uniform(-DEGREES, DEGREES, 3) / 180.0 * np.pi
    move = np.random.uniform(-X, X, 3)
    rx = np.array([[1, 0, 0, 0], [0, np.cos(phi), -np.sin(phi), 0], [0, np.sin(phi), np.cos(phi), 0], [0, 0, 0, 1]])
    ry = np.array(
        [[np.cos(theta), 0, -np.sin(theta), 0], [0, 1, 0, 0], [np.sin(theta), 0, np.cos(theta), 0], [0, 0, 0, 1]]
    )
    rz = np.array([[np.cos(psi), -np.sin(psi), 0, 0], [np.sin(psi), np.cos(psi), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    result = np.vstack([pose, [0.0, 0.0, 0.0, 1.0]])
    for matrix in (rx, ry, rz):
        result = matrix.astype(np.float32) @ result
    result = result[:3]
    result[:, 3] += move
    if box is not None:
        result[:, 3] = np.clip(result[:, 3], box[0], box[1])
    return result


def world_to_camera(pose: np.ndarray) -> Tensor:
    matrix = np.vstack([pose, [0.0, 0.0, 0.0, 1.0]]).astype(np.float32)
    return torch.from_numpy(np.linalg.inv(matrix)).double()


def valid_points(scene: RapScene, pose: np.ndarray) -> int:
    matrix, K = world_to_camera(pose).numpy(), A.Ks[0].numpy()
    count = 0
    for point, (b0, b1) in zip(A.means.numpy(), scene.box_coord[:, 2].numpy(), strict=True):
        u, v, z = K @ (matrix[:3, :3] @ point + matrix[:3, 3])
        count += bool(0 < u / (z + 1e-2) < b1 and 0 < v / (z + 1e-2) < b0 and z > 0)
    return count


class Cached(NamedTuple):
    decoded: Tensor


def picture(
    scene: RapScene, pose: np.ndarray, map_id: int, weight: float, cached: Cached | None = None, strict: bool = True
) -> tuple[Tensor, Cached]:
    """[3, h, w] of one view in plain torch, before normalisation, and what the next may take over."""
    if strict and cached is None and valid_points(scene, pose) == 1:
        raise IndexError
    viewmat = world_to_camera(pose)
    decoded = (
        scene.decode(viewmat, A.Ks[0], A.maps[map_id], weight, backend="reference") if cached is None else cached[0]
    )
    color, _, _ = scene.render(
        viewmat[None], A.Ks[:1], WIDTH, HEIGHT, decoded=decoded, packed=False, backend="reference",
        backgrounds=torch.tensor([BACKGROUND], dtype=torch.float64),
    )  # fmt: skip
    resized = F.interpolate(color.permute(0, 3, 1, 2), SIZE, mode="bilinear", align_corners=False)
    return resized[0], Cached(decoded)


def loop_plain(scene: RapScene) -> tuple[Any, ...]:
    poses = [perturb(pose) for pose in POSES]
    weights = [np.random.uniform(0, 2) for _ in poses]
    pictures = [picture(scene, *view, strict=False)[0] for view in zip(poses, INDEXES, weights, strict=True)]
    return poses, weights, pictures


def loop_attempts(scene: RapScene, max_attempts: int, with_weights: bool = True) -> tuple[Any, ...]:
    results = []
    for pose, map_id in zip(POSES, INDEXES, strict=True):
        for attempt in range(1, max_attempts + 1):
            new = perturb(pose)
            weight = np.random.uniform(0, 2) if with_weights else 1.0
            try:
                shown, _ = picture(scene, new, map_id, weight)
            except IndexError:
                continue
            results.append((new, weight, shown, attempt, True))
            break
        else:
            shown, _ = picture(scene, pose, map_id, weight, strict=False)
            results.append((pose, weight, shown, max_attempts, False))
    return tuple(zip(*results, strict=True))


def loop_brisque(scene: RapScene, max_attempts: int, threshold: float, with_weights: bool = True) -> tuple[Any, ...]:
    brisque = Brisque()
    results = []
    for pose, map_id in zip(POSES, INDEXES, strict=True):
        best, best_pose, best_picture, cached, accepted, attempts = np.inf, pose, None, None, False, 0
        while attempts < max_attempts:
            attempts += 1
            new = perturb(pose)
            try:
                shown, cached = picture(scene, new, map_id, 1.0, cached)
            except IndexError:
                continue
            score = float(brisque.score(shown.permute(1, 2, 0)[None].float()))
            if score < best:
                best, best_pose, best_picture = score, new, shown
            if score < threshold:
                accepted = True
                break
        weight = 1.0
        if with_weights or best_picture is None:
            weight = np.random.uniform(0, 2) if with_weights else 1.0
            best_picture, _ = picture(scene, best_pose, map_id, weight, strict=False)
        results.append((best_pose, weight, best_picture, attempts, accepted, best))
    return tuple(zip(*results, strict=True))


def same_state(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def compare(views: Any, expected: tuple[Any, ...], mean: Any = MEAN, std: Any = STD) -> None:
    poses, weights, pictures, *rest = expected
    assert views.poses.dtype == torch.float64
    assert np.array_equal(views.poses.numpy(), np.stack(poses))
    assert views.weights.tolist() == list(weights)
    pictures = torch.stack(pictures)
    assert views.images.dtype == torch.float32
    assert views.images.shape == pictures.shape
    shown = views.images.double() * torch.tensor(std).double()[:, None, None]
    shown += torch.tensor(mean).double()[:, None, None]
    assert float((shown - pictures).abs().max()) < 1e-5
    for got, want in zip((views.attempts, views.accepted), rest, strict=False):
        assert got.tolist() == list(want)


SAMPLER = PoseSampler(X, DEGREES)
THRESHOLD = 42.0
SEED = 8
WAYS = ("plain", "attempts", "brisque")


def run(way: str, views: RandomViewSynthesizer, weights: Any = (0.0, 2.0), rng: Any = None) -> Any:
    if way == "plain":
        return views.perturbed(POSES, SAMPLER, rng, weights, INDEXES)
    if way == "attempts":
        return views.with_attempts(POSES, SAMPLER, 2, rng, weights, INDEXES)
    return views.with_brisque(POSES, SAMPLER, 4, THRESHOLD, rng, weights, INDEXES)


def loop(way: str, scene: RapScene, with_weights: bool = True) -> tuple[Any, ...]:
    if way == "plain":
        return loop_plain(scene)
    return loop_attempts(scene, 2, with_weights) if way == "attempts" else loop_brisque(
        scene, 4, THRESHOLD, with_weights
    )  # fmt: skip


@pytest.fixture(scope="module")
def loops(scene, sparse) -> dict[Any, Any]:
    """(expected results, generator state behind them) of each loop, made when asked for."""
    scenes, made = {"dense": scene, "sparse": sparse}, {}

    def get(way: str, which: str, with_weights: bool = True) -> Any:
        key = way, which, with_weights
        if key not in made:
            np.random.seed(SEED)
            made[key] = loop(way, scenes[which], with_weights), np.random.get_state()
        return made[key]

    return get


# --- batched is the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("which", ["dense", "sparse"])
@pytest.mark.parametrize("way", WAYS)
def test_any_batch_gives_the_loops_views_and_generator(way, which, batch_size, loops, scene, sparse):
    expected, state = loops(way, which)
    np.random.seed(SEED)
    views = run(way, synthesizer(scene if which == "dense" else sparse, batch_size=batch_size))
    assert same_state(np.random.get_state(), state)
    compare(views, expected)


def test_the_loops_meet_every_outcome(loops):
    """Otherwise the test above would prove less than it says."""
    _, _, _, attempts, accepted = loops("attempts", "sparse")[0]
    assert {(1, True), (2, True), (2, False)} <= set(zip(attempts, accepted, strict=True))
    _, _, _, attempts, accepted, best = loops("brisque", "dense")[0]
    assert {1, 4} <= set(attempts)
    assert len({n for n, good in zip(attempts, accepted, strict=True) if good}) > 1
    assert not all(accepted)
    assert np.inf in loops("brisque", "sparse")[0][5]


@pytest.mark.parametrize("which", ["dense", "sparse"])
@pytest.mark.parametrize("way", ["attempts", "brisque"])
def test_without_appearance_augmentation_no_weight_is_drawn(way, which, loops, scene, sparse):
    """By BRISQUE the best attempt's own picture comes back, in the colours of the first."""
    expected, state = loops(way, which, False)
    np.random.seed(SEED)
    views = run(way, synthesizer(scene if which == "dense" else sparse, batch_size=3), None)
    assert same_state(np.random.get_state(), state)
    compare(views, expected)
    assert set(views.weights.tolist()) == {1.0}


def test_an_attempts_own_picture_is_not_its_pose_in_full(scene):
    """The cached colours can be seen: rendering the best pose anew gives another picture."""
    np.random.seed(SEED)
    single = synthesizer(scene.to(torch.float32), references=A.maps.float())
    views = run("brisque", single, None)
    later = views.attempts > 1
    again = single.render(views.poses, None, INDEXES)
    assert float((again.images - views.images)[later].abs().max()) > 1e-3
    assert torch.equal(again.images[~later], views.images[~later])


@pytest.mark.parametrize("way", WAYS)
def test_one_weight_for_a_batch_fails_the_comparison(way, loops, scene):
    """The known error of batching: the first view's weight for all of them."""

    class FirstWeight(RandomViewSynthesizer):
        def draw(self, viewmats, ids, weights, *rest):
            return super().draw(viewmats, ids, [weights[0]] * len(weights), *rest)

    expected, _ = loops(way, "dense")
    np.random.seed(SEED)
    views = run(way, FirstWeight(scene, A.Ks[0], (HEIGHT, WIDTH), A.maps, SIZE, background=BACKGROUND))
    with pytest.raises(AssertionError):
        compare(views, expected)


@pytest.mark.parametrize("way", WAYS)
def test_float32_images_are_bitwise_those_of_single_views(way, scene):
    single = scene.to(torch.float32)
    made = []
    for batch_size in (1, 4, 16):
        np.random.seed(2)
        made.append(run(way, synthesizer(single, references=A.maps.float(), batch_size=batch_size)))
    for other in made[1:]:
        assert torch.equal(made[0].images, other.images)
        assert torch.equal(made[0].poses, other.poses)
        assert torch.equal(made[0].weights, other.weights)


def test_a_random_state_serves_instead_of_the_global_generator(loops, sparse):
    expected, state = loops("attempts", "sparse")
    rng = np.random.RandomState(SEED)
    before = np.random.get_state()
    compare(run("attempts", synthesizer(sparse), rng=rng), expected)
    assert same_state(rng.get_state(), state)
    assert same_state(np.random.get_state(), before)


def test_a_torch_generator_draws_again_what_failed(sparse):
    views = synthesizer(sparse)
    first = run("attempts", views, rng=torch.Generator().manual_seed(1))
    assert set(zip(first.attempts.tolist(), first.accepted.tolist(), strict=True)) >= {(1, True), (2, True)}
    failed = [valid_points(sparse, pose) == 1 for pose in first.poses.numpy()]
    assert not any(np.array(failed) & first.accepted.numpy())
    again = run("attempts", views, rng=torch.Generator().manual_seed(1))
    assert torch.equal(first.images, again.images)
    with pytest.raises(NotImplementedError, match=r"torch.Generator as rng"):
        run("brisque", views, rng=torch.Generator())


def test_one_point_counts_all_gaussians(sparse, scene):
    rng = np.random.RandomState(0)
    poses = SAMPLER.sample(np.concatenate([POSES] * 6), rng)
    counts = np.array([valid_points(sparse, pose) for pose in poses])
    assert {0, 1, 2} <= set(counts.tolist())
    assert np.array_equal(synthesizer(sparse).one_point(poses), counts == 1)
    assert not synthesizer(scene).one_point(poses).any()
    assert synthesizer(scene).one_point(poses[:0]).shape == (0,)


def test_one_point_looks_beyond_its_sample(monkeypatch, sparse):
    """With a sample of 7 of 60 Gaussians the valid ones are mostly outside it."""
    poses = SAMPLER.sample(np.concatenate([POSES] * 6), np.random.RandomState(0))
    expected = synthesizer(sparse).one_point(poses)
    monkeypatch.setattr("rapfast.rvs.synthesis.SAMPLE", 7)
    assert np.array_equal(synthesizer(sparse).one_point(poses), expected)


# --- memory ----------------------------------------------------------------------------------------------------------


class Tight(RandomViewSynthesizer):
    """Has memory for `room` views at a time."""

    room = 3
    error: Any = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def draw(self, viewmats, *rest):
        if len(viewmats) > self.room:
            raise self.error
        return super().draw(viewmats, *rest)


def tight(scene: RapScene, batch_size: int = 8) -> Tight:
    return Tight(scene, A.Ks[0], (HEIGHT, WIDTH), A.maps, SIZE, background=BACKGROUND, batch_size=batch_size)


@pytest.mark.parametrize("way", WAYS)
def test_out_of_memory_halves_the_batch_and_says_so(way, loops, scene):
    expected, state = loops(way, "dense")
    np.random.seed(SEED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        views = run(way, tight(scene))
    compare(views, expected)
    assert same_state(np.random.get_state(), state)
    said = [str(warning.message) for warning in caught if "memory ran out" in str(warning.message)]
    assert said[0].startswith("memory ran out with")
    assert said[-1].endswith("from here on 2 are rendered at a time") or said[-1].endswith("3 are rendered at a time")
    if way == "plain":
        assert len(said) == 2  # 8, 4, 2


def test_our_own_out_of_memory_counts_and_a_single_view_is_an_error(scene):
    views = tight(scene, 2)
    views.room, views.error = 0, RuntimeError("allocating 12 bytes on cuda:0: out of memory")
    with pytest.warns(RuntimeWarning, match="memory ran out"), pytest.raises(RuntimeError, match="allocating 12 bytes"):
        run("plain", views)


@pytest.mark.parametrize("way", WAYS)
def test_any_other_failure_is_an_error(way, scene):
    views = tight(scene)
    views.error = RuntimeError("the kernel is on fire")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="on fire"):
            run(way, views)


# --- from pixels to the tensor ---------------------------------------------------------------------------------------


def test_half_size_is_the_mean_of_two_by_two(scene):
    views = RandomViewSynthesizer(scene, A.Ks[0], (40, 74), A.maps, mean=None, std=None, background=BACKGROUND)
    full = views.render(POSES).images
    halves = RandomViewSynthesizer(
        scene, A.Ks[0], (40, 74), A.maps, (20, 37), mean=None, std=None, background=BACKGROUND
    )
    expected = full.unflatten(2, (20, 2)).unflatten(4, (37, 2)).mean((3, 5))
    torch.testing.assert_close(halves.render(POSES).images, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [(0.0, 2.0), None])
@pytest.mark.parametrize("way", WAYS)
def test_looking_at_the_pictures_does_not_change_the_images(way, weights, scene):
    single = scene.to(torch.float32)
    seen: list[tuple[Tensor, Any]] = []
    made = []
    for show in (None, lambda pictures, about: seen.extend(zip(pictures, about, strict=True))):
        np.random.seed(4)
        made.append(run(way, synthesizer(single, references=A.maps.float(), on_pictures=show), weights))
    assert torch.equal(made[0].images, made[1].images)
    kept = [(picture, about) for picture, about in seen if not about.refused]
    assert [about.view for _, about in kept] == list(range(M))
    shown = torch.stack([picture for picture, _ in kept])
    expected = (shown - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(expected, made[1].images)
    refused = [about for _, about in seen if about.refused]
    if way == "brisque":
        assert [about.score for _, about in kept] == made[1].scores.tolist()
        missed = made[1].attempts.sum() - made[1].accepted.sum()
        assert len(refused) == missed
        assert all(about.score >= THRESHOLD for about in refused)
    else:
        assert not refused


def test_half_precision_images_and_progress(scene):
    told: list[int] = []
    full = synthesizer(scene).render(POSES)
    half = synthesizer(scene, dtype=torch.float16, on_progress=told.append, batch_size=4).render(POSES)
    assert half.images.dtype == torch.float16
    torch.testing.assert_close(half.images, full.images.half())
    assert told == [4, 4, 3]


def test_no_views_at_all(scene):
    for way in ("perturbed", "with_attempts", "with_brisque"):
        arguments = {"with_attempts": (3,), "with_brisque": (3, 40.0)}.get(way, ())
        views = getattr(synthesizer(scene), way)(POSES[:0], SAMPLER, *arguments)
        assert views.images.shape == (0, 3, *SIZE)
        assert views.poses.shape == (0, 3, 4)


@pytest.mark.cuda
@pytest.mark.parametrize("destination", ["cpu", "pinned", "device"])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_every_destination_and_batch_gives_the_same_bits(way, destination, scene):
    there = scene.to("cuda", torch.float32)
    maps = A.maps.cuda().half()
    made = []
    for batch_size in (1, 3, 8, 16):
        np.random.seed(2)
        views = synthesizer(there, references=maps, batch_size=batch_size, destination=destination)
        made.append(run(way, views))
        assert made[-1].images.is_pinned() == (destination == "pinned")
        assert made[-1].images.is_cuda == (destination == "device")
    np.random.seed(2)
    expected = run(way, synthesizer(there, references=maps, destination="device")).images.cpu()
    for one in made:
        assert torch.equal(one.images.cpu(), expected)


@pytest.mark.cuda
def test_strict_precision_on_a_gpu_follows_the_loop(loops, scene):
    there = scene.to("cuda", torch.float32)
    for way in ("plain", "attempts"):
        expected, state = loops(way, "dense")
        np.random.seed(SEED)
        views = run(way, synthesizer(there, references=A.maps.float().cuda(), precision="fp32"))
        assert same_state(np.random.get_state(), state)
        compare(views, expected)


# --- reference images ------------------------------------------------------------------------------------------------


def test_reference_maps_are_made_by_number_and_kept(scene, monkeypatch):
    images = [torch.rand(3, 40, 50), torch.randint(0, 256, (3, 34, 36), dtype=torch.uint8), torch.rand(3, 40, 50)]
    whole = RapScene.feature_maps
    made: list[int] = []

    def counted(self, pictures, **options):
        made.append(len(pictures))
        return whole(self, pictures, **options)

    monkeypatch.setattr(RapScene, "feature_maps", counted)
    maps = ReferenceMaps(scene, images, cache=FeatureMapCache(scene))
    first = maps([2, 1, 2])
    assert torch.equal(first[0], whole(scene, [images[2]])[0])
    assert torch.equal(first[1], whole(scene, [images[1].float() / 255])[0])
    assert first[0] is first[2]
    assert sum(made) == 2
    assert torch.equal(maps([1])[0], first[1])
    assert sum(made) == 2
    assert maps([]) == []
    # A cache finds an image by its content, whatever its number.
    again = ReferenceMaps(scene, images[::-1], cache=maps.cache)([1])
    assert torch.equal(again[0], first[1])
    assert sum(made) == 2


def test_a_cache_of_another_scene_is_refused(scene, sparse):
    with pytest.raises(ValueError, match="cache must be of the scene"):
        ReferenceMaps(scene, [], cache=FeatureMapCache(sparse))
    with pytest.raises(ValueError, match="cache must be of the scene and the precision"):
        ReferenceMaps(scene, [], "fp32", FeatureMapCache(scene))


def test_views_by_reference_images_and_by_their_maps_are_the_same(scene):
    images = torch.rand(M, 3, 33, 34)
    maps = scene.feature_maps(images)
    by_image = synthesizer(scene, references=ReferenceMaps(scene, images.__getitem__)).render(POSES, None, INDEXES)
    assert torch.equal(by_image.images, synthesizer(scene, references=maps).render(POSES, None, INDEXES).images)


@pytest.mark.parametrize(
    ("images", "error", "sentence"),
    [
        (7, TypeError, "images must be a tensor"),
        ([torch.rand(40, 50, 3)], TypeError, r"reference image 0 must be a tensor \[3, H, W\]"),
        ([torch.ones(3, 40, 50, dtype=torch.int64)], TypeError, "floating point in 0..1 or uint8"),
        ([torch.rand(3, 40, 50) * 2 - 1], ValueError, r"raw RGB in 0..1 \(not normalised\)"),
        ([], IndexError, "there are 0 reference images, number 0"),
    ],
)
def test_reference_images_that_do_not_fit_are_named(images, error, sentence, scene):
    with pytest.raises(error, match=sentence):
        ReferenceMaps(scene, images)([0])


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"size": 7}, ValueError, "size must be"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"destination": "disk"}, ValueError, "destination must be one of"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be torch.float32 or torch.float16"),
        ({"background": (1.0, 2.0)}, ValueError, r"background must be a colour \[3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, error, sentence, scene):
    with pytest.raises(error, match=sentence):
        synthesizer(scene, **changes)
    with pytest.raises(TypeError, match="scene must be a RapScene"):
        RandomViewSynthesizer(None, A.Ks[0], (HEIGHT, WIDTH), A.maps)
    with pytest.raises(ValueError, match="K must be"):
        RandomViewSynthesizer(scene, A.Ks, (HEIGHT, WIDTH), A.maps)


def test_calls_that_do_not_fit_are_named(scene):
    views = synthesizer(scene)
    with pytest.raises(ValueError, match="indexes must hold one number for each of 11 poses, got 2"):
        views.render(POSES, None, [0, 1])
    with pytest.raises(IndexError, match="feature maps of 11 reference images, number 11"):
        views.render(POSES[:1], None, [11])
    with pytest.raises(ValueError, match="weights must be finite"):
        views.render(POSES, float("nan"))
