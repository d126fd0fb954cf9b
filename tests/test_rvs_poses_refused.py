"""What samplers of poses refuse, and in which sentences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pose_samples import assert_same_state, generators, some_poses

from rapfast.rvs import (
    FarFrom,
    PoseSampler,
    SpeculativeDraws,
    bounding_box,
    draw_weights,
    lens_grid,
    world_to_camera,
)

BAD_ROW = np.concatenate([some_poses(2), np.ones((2, 1, 4))], 1)
NAN_POSES = some_poses(3) * np.array([1.0, 1.0, math.nan])[:, None, None]
SAMPLER, ONE = PoseSampler(1, 1), some_poses(1)
RefuseCase = tuple[Any, type[Exception], str]
REFUSED: list[RefuseCase] = [
    (lambda: PoseSampler(1, 1, "sphere"), ValueError, "kind must be one of 'default', 'xz_plane', 'uniform_sphere'"),
    (lambda: PoseSampler(-1, 1), ValueError, "translation must be a range in metres, 0..1e.09, got -1"),
    (lambda: PoseSampler(1, math.nan), ValueError, "rotation must be a range in degrees, 0..1e.09, got nan"),
    (lambda: PoseSampler(1, "9"), TypeError, "rotation must be a range in degrees, 0..1e.09, got str '9'"),
    (lambda: PoseSampler(1, 1, "default", np.zeros((3, 2))), ValueError, r"box must be finite \[2,3\]"),
    (lambda: PoseSampler(1, 1, "default", [[0, 0, 1], [1, 1, 0]]), ValueError, r"box must be finite \[2,3\]"),
    (lambda: SAMPLER.sample(np.eye(4)), ValueError, r"poses must be \[M,3,4\] or \[M,4,4\] .* got \[4, 4\]"),
    (lambda: SAMPLER.sample(BAD_ROW), ValueError, r"poses\[0\] must have 0 0 0 1 as its last row"),
    (lambda: SAMPLER.sample(NAN_POSES), ValueError, r"poses\[2\] must be finite, it has NaN or infinity"),
    (lambda: SAMPLER.sample([[1], [2, 3]]), ValueError, "poses must be one array of numbers"),
    (lambda: SAMPLER.sample("ab"), TypeError, "poses must hold real numbers, got str"),
    (lambda: SAMPLER.sample(some_poses(2) * 1j), TypeError, "poses must hold real numbers, got ndarray"),
    (
        lambda: SAMPLER.sample(torch.zeros(1, 3, 4, requires_grad=True)),
        NotImplementedError, r"poses requires a gradient, which no sampler gives it: pass poses\.detach\(\)",
    ),
    (
        lambda: SAMPLER.sample(ONE, np.random.default_rng(0)),
        TypeError, r"rng must be None .*, a numpy\.random\.RandomState or a torch\.Generator, got Generator",
    ),
    (lambda: SAMPLER.sample(ONE, 5), TypeError, "rng must be None .* got int"),
    (lambda: SAMPLER.draw(-1), ValueError, "n must be between 0 and"),
    (lambda: SAMPLER.draw(1, weights=(2, 0)), ValueError, "weights must be two finite numbers, low <= high"),
    (lambda: SAMPLER.apply(some_poses(2), np.zeros((2, 7))), ValueError, r"numbers must be \[2, 6\] of draw"),
    (
        lambda: SAMPLER.apply(some_poses(2), torch.zeros(2, 6)),
        ValueError, r"numbers must be float64 \[2, 6\] of draw\(\), got float32 \[2, 6\] on cpu",
    ),
    (lambda: draw_weights(2, limits=(0, math.inf)), ValueError, "limits must be two finite numbers"),
    (lambda: bounding_box(np.zeros((0, 3, 4))), ValueError, "bounding_box needs at least one pose, got none"),
    (lambda: bounding_box(ONE, -1), ValueError, "grow must be a finite number of metres >= 0"),
    (lambda: world_to_camera(NAN_POSES), ValueError, r"poses\[2\] must be finite"),
    (lambda: SpeculativeDraws(None, ONE, 3), TypeError, "sampler must be a PoseSampler, got None"),
    (lambda: SpeculativeDraws(SAMPLER, ONE, 0), ValueError, "max_attempts must be between 1"),
    (lambda: SpeculativeDraws(SAMPLER, ONE, 1, torch.Generator()), TypeError, "rng must be None"),
    (lambda: SpeculativeDraws(SAMPLER, ONE, 2).guess(1, 3), ValueError, "expected must be between 1"),
    (lambda: SpeculativeDraws(SAMPLER, ONE, 2).settle([True]), ValueError, "at most 0 outcomes"),
    (lambda: SpeculativeDraws(SAMPLER, ONE, 2).settle([0.5]), TypeError, "a list of True and False"),
    (lambda: FarFrom(ONE), ValueError, r"FarFrom needs min_distance \(metres\), min_angle"),
    (lambda: FarFrom(ONE, -1), ValueError, "min_distance must be a number of metres >= 0, got -1"),
    (lambda: FarFrom(ONE, None, 181), ValueError, r"min_angle must be an angle of 0\.\.180 degrees, got 181"),
    (lambda: FarFrom(NAN_POSES, 1), ValueError, r"others\[2\] must be finite"),
    (lambda: lens_grid(some_poses(2), 0), ValueError, "step must be a number of metres > 0, or three, got 0"),
    (lambda: lens_grid(some_poses(2), (1, 2)), ValueError, r"step must be a number of metres > 0, or three, got \(1"),
    (lambda: lens_grid(some_poses(9), 1e-3), ValueError, "points, more than 16777216: take a larger step"),
    (
        lambda: lens_grid(some_poses(2), 1, min_distance=2, max_distance=1),
        ValueError, "max_distance must be a number of metres >= min_distance",
    ),
    (lambda: lens_grid(some_poses(2), 1, rotation=-1), ValueError, "rotation must be a range in degrees"),
    (lambda: lens_grid(some_poses(2), 1, rng="seed"), TypeError, "rng must be None"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,sentence", REFUSED, ids=range(len(REFUSED)))
def test_bad_arguments_are_refused_by_sentences(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_refused_arguments_draw_nothing() -> None:
    ours, theirs = generators(0)
    for poses in (NAN_POSES, np.zeros((2, 2, 4))):
        with pytest.raises(ValueError):
            PoseSampler(1, 1).sample(poses, ours)
    assert_same_state(ours, theirs)
