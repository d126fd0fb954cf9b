"""Pose sampling for random-view synthesis: against loops that draw and compute one pose at a time, bit by bit."""

from __future__ import annotations

import math
import pickle
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pose_samples import assert_same_state, generators, some_poses

from rapfast.rvs import (
    FarFrom,
    PoseSampler,
    SpeculativeDraws,
    bounding_box,
    draw_weights,
    filters,
    lens_grid,
    sample_kept,
    world_to_camera,
)
from rapfast.rvs.filters import TurnsInPlace, nearest_centre

KINDS = ("default", "xz_plane", "uniform_sphere")


# --- the loops, one pose and one number at a time ------------------------------------------------------------------


def matrix_x(t: float) -> np.ndarray:
    c, s = np.cos(t), np.sin(t)
    return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]], dtype=np.float32)


def matrix_y(t: float) -> np.ndarray:
    c, s = np.cos(t), np.sin(t)
    return np.array([[c, 0, -s, 0], [0, 1, 0, 0], [s, 0, c, 0], [0, 0, 0, 1]], dtype=np.float32)


def matrix_z(t: float) -> np.ndarray:
    c, s = np.cos(t), np.sin(t)
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float32)


def loop_pose(rng: Any, pose: np.ndarray, x: float, a: float, kind: str, box: np.ndarray | None = None) -> np.ndarray:
    full = np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])
    if kind == "uniform_sphere":
        angle = rng.uniform(-a, a)
        axis = rng.randn(3)
        axis = axis / np.linalg.norm(axis)
        radius, azimuth, polar = rng.uniform(0, x), rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        t = angle / 180 * np.pi
        full[:3, :3] = (np.eye(3) + np.sin(t) * cross + (1 - np.cos(t)) * cross @ cross) @ full[:3, :3]
        sphere = [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)]
        full[:3, 3] += radius * np.array(sphere)
    else:
        theta, phi, psi = rng.uniform(-a, a, 3)
        dx, dy, dz = rng.uniform(-x, x, 3)
        if kind == "xz_plane":
            phi, psi, dy = 0.0, 0.0, 0.0
        full = matrix_x(phi / 180 * np.pi) @ full
        full = matrix_y(theta / 180 * np.pi) @ full
        full = matrix_z(psi / 180 * np.pi) @ full
        full[:3, 3] += np.array([dx, dy, dz])
    if box is not None:
        for i in range(3):
            full[i, 3] = min(max(full[i, 3], box[0][i]), box[1][i])
    return full[:3]


# --- numpy's generators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 150])
@pytest.mark.parametrize("boxed", [False, True])
def test_poses_are_those_of_the_loop(kind: str, n: int, boxed: bool) -> None:
    poses = some_poses(n, seed=n, dtype=np.float32 if n == 7 else np.float64)
    box = np.array([[-2.0, -1.0, -2.5], [1.0, 2.0, 0.5]]) if boxed else None
    ours, theirs = generators(5, normals=n % 2)
    got = PoseSampler(0.7, 25.0, kind, box).sample(poses, ours)
    expected = np.array([loop_pose(theirs, pose, 0.7, 25.0, kind, box) for pose in poses]).reshape(-1, 3, 4)
    assert got.dtype == np.float64 and got.shape == (n, 3, 4) and got.flags.c_contiguous
    if kind == "uniform_sphere":  # its formula has no one rounding: the numbers are compared bit by bit below
        np.testing.assert_allclose(got, expected, rtol=0, atol=4e-15)
    else:
        np.testing.assert_array_equal(got, expected)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_is_bitwise_its_poses_alone(kind: str) -> None:
    poses, (ours, theirs) = some_poses(65), generators(8, normals=1)
    sampler = PoseSampler(0.3, 170.0, kind)
    alone = np.concatenate([sampler.sample(pose[None], theirs) for pose in poses])
    np.testing.assert_array_equal(sampler.sample(poses, ours), alone)
    assert_same_state(ours, theirs)


def test_the_global_generator_is_the_default() -> None:
    poses, before = some_poses(4), np.random.get_state()
    try:
        np.random.seed(11)
        got, weights = PoseSampler(0.2, 10.0).sample(poses), draw_weights(4)
        after = np.random.get_state()
        np.random.seed(11)
        np.testing.assert_array_equal(got, [loop_pose(np.random, pose, 0.2, 10.0, "default") for pose in poses])
        np.testing.assert_array_equal(weights, [np.random.uniform(0, 2) for _ in poses])
        assert all(np.array_equal(a, b) for a, b in zip(after, np.random.get_state(), strict=True))
    finally:
        np.random.set_state(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, (0, 2), (0.5, 0.5)])
def test_numbers_and_weights_are_drawn_in_turn(kind: str, weights: tuple[float, float] | None) -> None:
    ours, theirs = generators(3)
    numbers, drawn = PoseSampler(1.5, 40.0, kind).draw(31, ours, weights=weights)
    rows, expected_weights = [], []
    for _ in range(31):
        if kind == "uniform_sphere":
            row = [theirs.uniform(-40, 40), *theirs.randn(3), theirs.uniform(0, 1.5)]
            rows.append([*row, theirs.uniform(0, 2 * np.pi), theirs.uniform(0, np.pi)])
        else:
            rows.append([*theirs.uniform(-40, 40, 3), *theirs.uniform(-1.5, 1.5, 3)])
        if weights is not None:
            expected_weights.append(theirs.uniform(*weights))
    np.testing.assert_array_equal(numbers, rows)
    if weights is None:
        assert drawn is None
    else:
        np.testing.assert_array_equal(drawn, expected_weights)
    assert_same_state(ours, theirs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(0, 1e6), st.floats(0, 1e4), st.integers(0, 9), st.integers(0, 2**32 - 1),
    st.sampled_from(("default", "xz_plane")),
)  # fmt: skip
def test_poses_are_those_of_the_loop_for_any_range(x: float, a: float, n: int, seed: int, kind: str) -> None:
    poses, (ours, theirs) = some_poses(n, seed % 1000), generators(seed)
    got = PoseSampler(x, a, kind).sample(poses, ours)
    np.testing.assert_array_equal(got, np.reshape([loop_pose(theirs, p, x, a, kind) for p in poses], (-1, 3, 4)))
    assert_same_state(ours, theirs)


def test_ranges_of_zero_draw_and_move_nothing() -> None:
    poses = some_poses(5)
    for kind in KINDS:
        ours, theirs = generators(1)
        got = PoseSampler(0.0, 0.0, kind).sample(poses, ours)
        np.testing.assert_array_equal(got, poses)
        for _ in poses:
            loop_pose(theirs, poses[0], 1.0, 1.0, kind)
        assert_same_state(ours, theirs)


def test_the_senses_of_rotation_and_their_order() -> None:
    pose = np.concatenate([np.eye(3), [[1.0], [2.0], [3.0]]], 1)[None]
    cases = {
        (90, 0, 0): [-3, 2, 1],  # theta: Ry, x' = -z, z' = x
        (0, 90, 0): [1, -3, 2],  # phi: Rx, y' = -z, z' = y
        (0, 0, 90): [-2, 1, 3],  # psi: Rz, x' = -y, y' = x
        (90, 90, 0): [-2, -3, 1],  # Rx first, then Ry
        (90, 0, 90): [-2, -3, 1],  # Ry first, then Rz
        (0, 90, 90): [3, 1, 2],  # Rx first, then Rz
    }
    sampler = PoseSampler(1.0, 90.0)
    for angles, centre in cases.items():
        numbers = np.array([[*angles, 0.0, 0.0, 0.0]], dtype=np.float64)
        np.testing.assert_allclose(sampler.apply(pose, numbers)[0, :, 3], centre, atol=1e-6)
        np.testing.assert_allclose(sampler.apply(pose, torch.from_numpy(numbers))[0, :, 3], centre, atol=1e-12)
    plane = PoseSampler(1.0, 90.0, "xz_plane").apply(pose, [[90.0, 45.0, 45.0, 10.0, 20.0, 30.0]])
    np.testing.assert_allclose(plane[0, :, 3], [7, 2, 31], atol=1e-6)
    # About its own centre, by 90 degrees about z; then 2 m along +y (azimuth and polar angle 90 degrees).
    sphere = PoseSampler(5.0, 90.0, "uniform_sphere")
    numbers = [[90.0, 0.0, 0.0, 7.0, 2.0, np.pi / 2, np.pi / 2]]
    for given_numbers in (numbers, torch.tensor(numbers, dtype=torch.float64)):
        got = np.asarray(sampler_result := sphere.apply(pose, given_numbers))
        assert type(sampler_result) is (torch.Tensor if isinstance(given_numbers, torch.Tensor) else np.ndarray)
        np.testing.assert_allclose(got[0], [[0, -1, 0, 1], [1, 0, 0, 4], [0, 0, 1, 3]], atol=1e-12)


def test_matrices_are_rounded_to_float32() -> None:
    poses, numbers = some_poses(50), np.random.default_rng(0).uniform(-30, 30, (50, 6))
    got = PoseSampler(30.0, 30.0).apply(poses, numbers)
    exact = PoseSampler(30.0, 30.0).apply(poses, torch.from_numpy(numbers)).numpy()
    error = np.abs(got - exact).max((1, 2))
    assert (error > 1e-10).all() and (error < 2e-6).all()
    assert (got[:, :, :3] != got[:, :, :3].astype(np.float32)).any()  # the products are not


def test_the_clamp_is_the_training_box_grown() -> None:
    training = some_poses(20, seed=3)
    box = bounding_box(training, 0.25)
    np.testing.assert_array_equal(box[0], training[:, :, 3].min(0) - 0.25)
    np.testing.assert_array_equal(box[1], training[:, :, 3].max(0) + 0.25)
    np.testing.assert_array_equal(bounding_box(training, [0, 1, 2])[1] - training[:, :, 3].max(0), [0, 1, 2])
    for kind in KINDS:
        free, boxed = (PoseSampler(9.0, 5.0, kind, b).sample(training, np.random.RandomState(0)) for b in (None, box))
        np.testing.assert_array_equal(boxed[:, :, :3], free[:, :, :3])
        np.testing.assert_array_equal(boxed[:, :, 3], np.clip(free[:, :, 3], box[0], box[1]))
        assert (boxed != free).any() and (boxed[:, :, 3] == free[:, :, 3]).any()


def test_tensors_and_4x4_poses_are_read_alike_and_left_alone() -> None:
    poses = some_poses(6, dtype=np.float32)
    full = np.concatenate([poses, np.tile(np.array([0, 0, 0, 1], np.float32), (6, 1, 1))], 1)
    kept = poses.copy()
    sampler = PoseSampler(0.5, 20.0)
    expected = sampler.sample(poses, np.random.RandomState(0))
    for value in (torch.from_numpy(poses), full, torch.from_numpy(full), poses.tolist(), poses[:, :, ::-1][:, :, ::-1]):
        np.testing.assert_array_equal(sampler.sample(value, np.random.RandomState(0)), expected)
    np.testing.assert_array_equal(poses, kept)


def test_a_sampler_goes_to_another_process() -> None:
    sampler = PoseSampler(0.5, 20.0, "uniform_sphere", bounding_box(some_poses(3)))
    copy = pickle.loads(pickle.dumps(sampler))
    a, b = (s.sample(some_poses(4), np.random.RandomState(2)) for s in (sampler, copy))
    np.testing.assert_array_equal(a, b)


# --- world to camera -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_world_to_camera_is_the_float32_inverse_one_by_one(n: int) -> None:
    poses = PoseSampler(2.0, 180.0).sample(some_poses(n), np.random.RandomState(1))
    got = world_to_camera(poses)
    assert got.dtype == np.float32 and got.shape == (n, 4, 4)
    for pose, matrix in zip(poses, got, strict=True):
        full = np.eye(4, dtype=np.float32)
        full[:3] = pose
        np.testing.assert_array_equal(matrix, np.linalg.inv(full))
        np.testing.assert_allclose(matrix @ full, np.eye(4), atol=5e-6)
    tensor = world_to_camera(torch.from_numpy(poses))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor, got)


def test_world_to_camera_refuses_what_has_no_inverse() -> None:
    singular = some_poses(3)
    singular[1, :, 1] = 0.0
    with pytest.raises(ValueError, match=r"poses\[1\] has no inverse, its rotation block is singular"):
        world_to_camera(singular)
    singular[2, 0, 3] = 1e39
    with pytest.raises(ValueError, match=r"poses\[2\] does not fit into float32"):
        world_to_camera(singular)


# --- attempts ahead of their outcome -------------------------------------------------------------------------------


def verdict(pose: np.ndarray, percent: int) -> bool:
    """As good as random, but the same for the same bits."""
    return zlib.crc32(pose.tobytes()) % 100 < percent


def loop_attempts(
    rng: Any, poses: np.ndarray, sampler: PoseSampler, max_attempts: int, weights: Any, final_weights: Any, percent: int
) -> list[tuple[Any, ...]]:
    ends = []
    for view, pose in enumerate(poses):
        weight = final = None
        attempts = 0
        accepted = False
        while not accepted and attempts < max_attempts:
            new = loop_pose(rng, pose, sampler.translation, sampler.rotation, sampler.kind)
            weight = rng.uniform(*weights) if weights is not None else None
            accepted = verdict(new, percent)
            attempts += 1
        if final_weights is not None:
            final = rng.uniform(*final_weights)
        ends.append((view, attempts, accepted, new.tobytes(), weight, final))
    return ends


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 12), st.integers(1, 5), st.sampled_from((0, 20, 60, 95, 100)), st.sampled_from(KINDS[:2]),
    st.integers(0, 2**32),
)  # fmt: skip
def test_attempts_ahead_are_those_of_the_loop(
    views: int, max_attempts: int, percent: int, kind: str, schedule: int
) -> None:
    random = Random(schedule)
    sampler, seed = PoseSampler(0.5, 30.0, kind), random.randrange(1000)
    weights, final_weights = (random.choice([None, (0, 2)]) for _ in range(2))
    poses, (ours, theirs) = some_poses(views, seed), generators(seed, normals=seed % 2)
    got, queue = [], []
    with SpeculativeDraws(sampler, poses, max_attempts, ours, weights=weights, final_weights=final_weights) as draws:
        while not draws.done:
            if random.random() < 0.5 or not queue:  # batches may overtake outcomes, and be settled in parts
                guess = draws.guess(random.randint(1, 9), random.randint(1, max_attempts))
                assert guess.poses.shape == (len(guess), 3, 4)
                queue += [verdict(pose, percent) for pose in guess.poses]
            count = random.randint(0, len(queue))
            outcomes, queue = queue[:count], queue[count:]
            got += draws.settle(outcomes)
            if draws.open != len(queue):
                assert draws.open == 0
                queue = []
        assert draws.position == (views, 0) and len(draws.guess(3)) == 0
    expected = loop_attempts(theirs, poses, sampler, max_attempts, weights, final_weights, percent)
    fields = [(e.view, e.attempts, e.accepted, e.pose.tobytes(), e.weight, e.final_weight) for e in got]
    assert fields == expected
    assert_same_state(ours, theirs)


def test_attempts_ahead_with_normal_numbers() -> None:
    """Where normal numbers are drawn their store is taken back too."""
    sampler, poses = PoseSampler(0.5, 30.0, "uniform_sphere"), some_poses(40)
    ours, theirs = generators(4, normals=1)
    expected = []
    for _ in poses:
        attempts, weight = 0, 2.0
        while weight >= 0.8 and attempts < 3:  # the outcome is the weight's
            loop_pose(theirs, poses[0], 0.5, 30.0, "uniform_sphere")
            attempts, weight = attempts + 1, theirs.uniform(0, 2)
        expected.append((attempts, weight, theirs.uniform(5, 6)))
    got = []
    with SpeculativeDraws(sampler, poses, 3, ours, weights=(0, 2), final_weights=(5, 6)) as draws:
        while not draws.done:
            got += draws.settle(draws.guess(5, expected=2).weights < 0.8)
    assert [(e.attempts, e.weight, e.final_weight) for e in got] == expected
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("settled", range(7))
def test_leaving_takes_the_generator_back_to_what_is_settled(settled: int) -> None:
    sampler, poses = PoseSampler(0.5, 30.0), some_poses(10)
    ours, theirs = generators(6)
    with (
        pytest.raises(KeyError),
        SpeculativeDraws(sampler, poses, 2, ours, weights=(0, 2), final_weights=(0, 2)) as draws,
    ):
        draws.guess(4)
        draws.guess(6)
        draws.settle([True] * settled)
        assert draws.position == (settled, 0) and draws.open == 10 - settled
        raise KeyError
    theirs.uniform(size=8 * settled)
    assert_same_state(ours, theirs)


def test_a_guess_says_what_it_assumes() -> None:
    with SpeculativeDraws(
        PoseSampler(1, 1), some_poses(3), 4, np.random.RandomState(0), final_weights=(0, 2)
    ) as draws:  # fmt: skip
        guess = draws.guess(5, expected=2)
        assert guess.views.tolist() == [0, 0, 1, 1, 2] and guess.attempts.tolist() == [0, 1, 0, 1, 0]
        assert guess.ends.tolist() == [False, True, False, True, False] and guess.weights is None
        assert (np.isnan(guess.final_weights) == ~guess.ends).all()
        assert draws.settle([False, False, True]) == []  # view 0 goes on, against the guess: the third is ignored
        assert draws.position == (0, 2) and draws.open == 0
        guess = draws.guess(9)
        assert guess.views.tolist() == [0, 1, 2] and guess.attempts.tolist() == [2, 0, 0]
        ended = draws.settle(np.array([False]))
        assert ended == [] and draws.position == (0, 3)
        ended = draws.settle([bool(i) for i in np.zeros(len(draws.guess(1)))])
        assert [(e.view, e.attempts, e.accepted) for e in ended] == [(0, 4, False)] and draws.position == (1, 0)


# --- filters -------------------------------------------------------------------------------------------------------


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.acos(np.clip((np.trace(a[:, :3].T @ b[:, :3]) - 1) / 2, -1, 1)))


@pytest.mark.parametrize(
    "distance,angle,both", [(1.5, None, False), (None, 60, False), (2.0, 90, False), (0.9, 40, True)]
)
def test_far_from_is_the_test_of_all_pairs(
    distance: float | None, angle: float | None, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poses, others = some_poses(60, seed=1), some_poses(8, seed=2)
    expected = []
    for pose in poses:
        refused = False
        for other in others:
            near = [np.linalg.norm(pose[:, 3] - other[:, 3]) < distance] if distance is not None else []
            near += [angle_between(pose, other) < angle] if angle is not None else []
            refused |= bool(any(near) if both else all(near))
        expected.append(not refused)
    far = FarFrom(others, distance, angle, both=both)
    got = far(poses)
    assert isinstance(got, np.ndarray) and got.tolist() == expected and 5 < sum(expected) < 55
    assert far(torch.from_numpy(poses)).tolist() == expected
    monkeypatch.setattr(filters, "PAIRS_AT_ONCE", 20)
    assert far(poses).tolist() == expected and [bool(far(pose[None])[0]) for pose in poses] == expected


def test_far_from_at_the_limits() -> None:
    pose = some_poses(1)
    turned = PoseSampler(0.0, 1.0, "uniform_sphere").apply(pose, [[0.5, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    moved = pose + np.array([0.0, 0.0, 0.0, 3.0])
    assert FarFrom(pose, 0.0, 0.0, both=True)(pose).tolist() == [True]  # exactly the minimum passes
    assert FarFrom(pose, min_distance=1e-9)(pose).tolist() == [False]
    assert FarFrom(pose, min_angle=0.499999)(turned).tolist() == [True]
    assert FarFrom(pose, min_angle=0.500001)(turned).tolist() == [False]
    assert FarFrom(pose, 1.0, 10.0)(np.concatenate([pose, turned, moved])).tolist() == [False, False, True]
    assert FarFrom(pose, 1.0, 10.0, both=True)(moved).tolist() == [False]
    assert FarFrom(np.zeros((0, 3, 4)), 1.0)(pose).tolist() == [True]
    assert FarFrom(pose, 1.0)(np.zeros((0, 3, 4))).shape == (0,)


@pytest.mark.parametrize("max_attempts", [1, 2, 60])
@pytest.mark.parametrize("distance", [0.0, 1.0, 1.6])
def test_sample_kept_is_the_loop_view_by_view(max_attempts: int, distance: float) -> None:
    poses, keep = some_poses(30), FarFrom(some_poses(30), distance, 15.0 if distance else 0.0, both=True)
    sampler, (ours, theirs) = PoseSampler(0.9, 40.0), generators(9)
    got, kept = sample_kept(sampler, poses, keep, max_attempts, ours)
    for i, pose in enumerate(poses):
        for _ in range(max_attempts):
            new = loop_pose(theirs, pose, 0.9, 40.0, "default")
            good = bool(keep(new[None])[0])
            if good:
                break
        np.testing.assert_array_equal(got[i], new if good else pose)
        assert kept[i] == good
    assert_same_state(ours, theirs)
    assert kept.any() and kept.all() == (distance == 0.0 or (distance == 1.0 and max_attempts == 60))


def test_sample_kept_of_a_torch_generator() -> None:
    poses, keep = some_poses(200), FarFrom(some_poses(200), 1.0, 20.0)
    sampler = PoseSampler(0.9, 40.0)
    got, kept = sample_kept(sampler, poses, keep, 60, torch.Generator().manual_seed(1))
    again, _ = sample_kept(sampler, poses, keep, 60, torch.Generator().manual_seed(1))
    assert isinstance(got, torch.Tensor) and torch.equal(got, again)
    assert bool(kept.all()) and bool(keep(got).all())
    got, kept = sample_kept(sampler, poses, lambda p: np.zeros(len(p), bool), 3, torch.Generator())
    assert not bool(kept.any()) and np.array_equal(got, poses)
    with pytest.raises(TypeError, match=r"keep must return bool \[16\] for 16 poses, got float64 \[16\]"):
        sample_kept(sampler, poses, lambda p: np.zeros(len(p)), 3, np.random.RandomState())


# --- grids ---------------------------------------------------------------------------------------------------------


def test_a_grid_fills_the_box_and_looks_as_the_nearest_pose() -> None:
    training = some_poses(12, seed=4)
    training[:2, :, 3] = [[0.0, 0.0, 0.0], [3.0, 2.0, 0.5]]
    training[2:, :, 3] = np.random.default_rng(0).uniform([0, 0, 0], [3, 2, 0.5], (10, 3))
    grid = lens_grid(training, (1.0, 0.8, 0.6))
    centres = [[x, y, 0.25] for x in (0, 1, 2, 3) for y in (0.2, 1.0, 1.8)]
    np.testing.assert_allclose(grid[:, :, 3], centres, atol=1e-12)
    for pose in grid:
        nearest = np.linalg.norm(training[:, :, 3] - pose[:, 3], axis=1).argmin()
        np.testing.assert_array_equal(pose[:, :3], training[nearest, :, :3])
    np.testing.assert_allclose(lens_grid(training, 1.0, margin=0.5)[:, :, 3].min(0), [-0.5, -0.5, -0.25], atol=1e-12)
    near = lens_grid(training, 0.2, min_distance=0.3, max_distance=0.6)
    distances = np.linalg.norm(near[:, None, :, 3] - training[None, :, :, 3], axis=2).min(1)
    assert 0.3 <= distances.min() < 0.32 and 0.58 < distances.max() <= 0.6 and len(near) < len(lens_grid(training, 0.2))
    assert lens_grid(training, 0.2, min_distance=90.0).shape == (0, 3, 4)
    np.testing.assert_array_equal(lens_grid(training[:1], 1.0), training[:1])


def test_a_grid_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    training = some_poses(30)
    whole = lens_grid(training, 0.7)
    monkeypatch.setattr(filters, "PAIRS_AT_ONCE", 100)
    np.testing.assert_array_equal(lens_grid(training, 0.7), whole)


def test_a_grid_turns_in_place() -> None:
    training = some_poses(5)
    plain, (ours, theirs) = lens_grid(training, 1.5), generators(2)
    turned = lens_grid(training, 1.5, rotation=15.0, rng=ours)
    np.testing.assert_array_equal(turned[:, :, 3], plain[:, :, 3])
    for before, after in zip(plain, turned, strict=True):
        theta, phi, psi = (theirs.uniform(-15, 15) / 180 * np.pi for _ in range(3))
        product = before[:, :3]
        for matrix in (matrix_x(phi), matrix_y(theta), matrix_z(psi)):
            product = matrix[:3, :3].astype(np.float64) @ product
        np.testing.assert_allclose(after[:, :3], product, rtol=0, atol=1e-15)
    assert_same_state(ours, theirs)
    lens_grid(training, 1.5, rng=ours)
    assert_same_state(ours, theirs)  # nothing to turn, nothing drawn
    tensors = [lens_grid(training, 1.5, rotation=15.0, rng=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*tensors) and np.array_equal(tensors[0][:, :, 3], plain[:, :, 3])
    angles = [angle_between(a, b) for a, b in zip(plain, tensors[0].numpy(), strict=True)]
    assert 10 < max(angles) < 15 * math.sqrt(3) and min(angles) > 0
    assert isinstance(lens_grid(training, 1.5, rng=torch.Generator()), torch.Tensor)


# --- torch.Generator -----------------------------------------------------------------------------------------------


def check_torch_mode(device: str) -> None:
    n, poses = 20_000, some_poses(1).repeat(20_000, 0)
    for kind in KINDS:
        sampler = PoseSampler(0.5, 30.0, kind)
        numbers, weights = sampler.draw(n, torch.Generator(device).manual_seed(5), weights=(0, 2))
        assert numbers.device.type == weights.device.type == device and numbers.dtype == weights.dtype == torch.float64
        columns = [numbers[:, i].cpu() for i in range(numbers.shape[1])] + [weights.cpu()]
        limits = [(-30.0, 30.0)] * 3 + [(-0.5, 0.5)] * 3 + [(0.0, 2.0)]
        if kind == "uniform_sphere":
            for normal in columns[1:4]:
                assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
            columns = columns[:1] + columns[4:]
            limits = [(-30.0, 30.0), (0.0, 0.5), (0.0, 2 * math.pi), (0.0, math.pi), (0.0, 2.0)]
        for column, (low, high) in zip(columns, limits, strict=True):
            # Kolmogorov-Smirnov: the bound is passed by chance once in 10^8.
            sorted_column = column.sort().values
            assert low <= float(sorted_column[0]) and float(sorted_column[-1]) <= high
            steps = torch.arange(1, n + 1, dtype=torch.float64) / n
            assert float(((sorted_column - low) / (high - low) - steps).abs().max()) < 3.1 / math.sqrt(n)
        pair = torch.corrcoef(torch.stack(columns))
        assert float((pair - torch.eye(len(columns))).abs().max()) < 0.05
        got = sampler.sample(poses, torch.Generator(device).manual_seed(6))
        assert got.device.type == device and got.dtype == torch.float64
        assert torch.equal(got, sampler.sample(poses, torch.Generator(device).manual_seed(6)))
        assert not torch.equal(got, sampler.sample(poses, torch.Generator(device).manual_seed(7)))
        drawn = sampler.draw(n, torch.Generator(device).manual_seed(6))[0]
        assert torch.equal(got[17:18], sampler.apply(poses[17:18], drawn[17:18]))  # no bit from the batch's size
        np.testing.assert_allclose(got[:99].cpu(), sampler.apply(poses[:99], drawn[:99].cpu().numpy()), atol=2e-6)
    box = bounding_box(some_poses(9), 0.1)
    boxed = PoseSampler(5.0, 30.0, "default", box).sample(some_poses(9), torch.Generator(device).manual_seed(1)).cpu()
    assert (boxed[:, :, 3] >= torch.tensor(box[0])).all() and (boxed[:, :, 3] <= torch.tensor(box[1])).all()
    weights = draw_weights(5, torch.Generator(device).manual_seed(1), (1, 3))
    assert weights.device.type == device and ((weights >= 1) & (weights < 3)).all()
    assert PoseSampler(1.0, 1.0).sample(np.zeros((0, 3, 4)), torch.Generator(device)).shape == (0, 3, 4)


def test_torch_mode() -> None:
    check_torch_mode("cpu")


@pytest.mark.cuda
def test_torch_mode_on_a_gpu() -> None:
    check_torch_mode("cuda")
    poses = PoseSampler(1.0, 30.0).sample(some_poses(20), torch.Generator("cuda").manual_seed(1))
    np.testing.assert_array_equal(world_to_camera(poses).cpu(), world_to_camera(poses.cpu().numpy()))
    far = FarFrom(some_poses(20), 0.5, 10.0)
    assert far(poses).is_cuda and far(poses).tolist() == far(poses.cpu().numpy()).tolist()
    kept, mask = sample_kept(PoseSampler(1.0, 30.0), some_poses(20), far, 9, torch.Generator("cuda").manual_seed(1))
    assert kept.is_cuda and far(kept).tolist() == mask.tolist()
    assert lens_grid(some_poses(5), 1.0, rotation=5.0, rng=torch.Generator("cuda")).is_cuda


# --- turns in place, and the nearest centre ------------------------------------------------------------------------


def test_turns_in_place_keep_the_centres() -> None:
    rng = np.random.RandomState(3)
    poses = PoseSampler(2.0, 180.0).sample(np.tile(np.eye(3, 4), (7, 1, 1)), rng)
    turns = TurnsInPlace(20.0)
    got = turns.sample(poses, np.random.RandomState(1))
    angles = np.random.RandomState(1).uniform(-20.0, 20.0, (7, 3))
    assert np.array_equal(turns.draw(7, np.random.RandomState(1))[0], angles)
    assert np.array_equal(got[:, :, 3], poses[:, :, 3])
    want = PoseSampler(0.0, 20.0).apply(poses, np.pad(angles, ((0, 0), (0, 3))))
    assert np.array_equal(got[:, :, :3], want[:, :, :3]) and not np.array_equal(got[:, :, :3], poses[:, :, :3])
    one_by_one = np.random.RandomState(1)
    assert np.array_equal(np.concatenate([turns.sample(pose[None], one_by_one) for pose in poses]), got)
    drawn = turns.sample(poses, torch.Generator().manual_seed(2))
    assert isinstance(drawn, torch.Tensor) and torch.equal(drawn[:, :, 3], torch.from_numpy(poses[:, :, 3]))
    trace = (drawn[:, :, :3] * torch.from_numpy(poses[:, :, :3])).sum((1, 2))
    turned = torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
    assert 3 < float(turned.max()) < 20 * 3**0.5 and len(turned.unique()) == 7
    assert np.allclose(TurnsInPlace(0.0).sample(poses, rng), poses)
    with pytest.raises(ValueError, match="rotation must be a range in degrees"):
        TurnsInPlace(-1.0)


def test_nearest_centre_takes_the_first_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    centres = np.array([[0.0, 0, 0], [2, 0, 0], [2, 0, 0], [0, 5, 0]])
    points = np.array([[1.9, 0, 0], [1.0, 0, 0], [0, 4, 3]])
    for at_once in (1 << 20, 4):
        monkeypatch.setattr(filters, "PAIRS_AT_ONCE", at_once)
        index, distance = nearest_centre(points, centres)
        assert index.tolist() == [1, 0, 3] and np.allclose(distance, [0.1, 1.0, 10**0.5])
