"""Parameter sets: what is drawn for a camera, where it then stands, and difficulties from files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rapfast import Cameras
from rapfast.augment import (
    DIFFICULTIES,
    Difficulty,
    Viewpoint,
    drawn_viewpoint,
    fixed_viewpoint,
    parameter_sets,
    read_difficulties,
    set_seed,
)
from rapfast.augment.viewpoints import frame_seed

TARGET = np.array([0.3, 0.2, 1.1])
EYE = np.array([0.3, -1.8, 1.1])


def view() -> Viewpoint:
    camera = Cameras.look_at([EYE], TARGET, width=64, height=48, fov_y=40.0)
    return Viewpoint(camera.viewmats[0], camera.Ks[0], 64, 48, TARGET)


def pose(**values: float) -> tuple[np.ndarray, np.ndarray]:
    """Camera-to-world and K of a set that draws exactly these values."""
    ranges = {name: (value, value) for name, value in values.items()}
    viewmats, Ks = fixed_viewpoint(view(), Difficulty(**ranges), 3, 30.0, [1])
    assert np.array_equal(viewmats[0], viewmats[2]) and np.array_equal(Ks[0], Ks[2])  # fixed
    return np.linalg.inv(viewmats[0]), Ks[0]


def test_nothing_drawn_is_the_base_camera():
    found, K = pose()
    assert np.allclose(np.linalg.inv(found), view().viewmat, atol=1e-9) and np.array_equal(K, view().K)


def test_each_parameter_moves_the_camera_as_told():
    """x is right, z up, the camera looks along +y at a target two metres away."""
    right, _ = pose(yaw=90.0)
    assert np.allclose(right[:3, 3], TARGET + [2, 0, 0], atol=1e-6)
    assert np.allclose(right[:3, 2], [-1, 0, 0], atol=1e-6)  # still looks at the target
    above, _ = pose(pitch=30.0)
    up = [0, -2 * np.cos(np.radians(30)), 1]
    assert np.allclose(above[:3, 3], TARGET + up, atol=1e-6)
    assert np.allclose(above[:3, 2], -np.array(up) / 2, atol=1e-6)
    away, _ = pose(distance=0.5)
    assert np.allclose(away[:3, 3], TARGET + [0, -2.5, 0], atol=1e-6)
    rolled, _ = pose(roll=90.0)
    assert np.allclose(rolled[:3, 3], EYE, atol=1e-6) and np.allclose(rolled[:3, 0], [0, 0, -1], atol=1e-6)
    _, K = pose(focal=1.5)
    assert np.allclose(K[[0, 1], [0, 1]], 1.5 * view().K[[0, 1], [0, 1]]) and np.array_equal(K[:2, 2], view().K[:2, 2])


def test_the_target_stays_where_it_is_in_the_picture():
    viewmats, Ks = fixed_viewpoint(view(), Difficulty((-40, 40), (-20, 20), (0, 0), (-0.3, 0.3)), 1, 30.0, [5])
    pixel = Ks[0] @ (viewmats[0] @ [*TARGET, 1])[:3]
    assert np.allclose(pixel[:2] / pixel[2], [32, 24], atol=1e-3)


def test_jitter_is_smooth_and_bounded():
    still, _ = fixed_viewpoint(view(), Difficulty(), 300, 30.0, [9])
    shaken, _ = fixed_viewpoint(view(), Difficulty(jitter_angle=0.5, jitter_shift=0.01), 300, 30.0, [9])
    steps = still[0] @ np.linalg.inv(shaken)  # what the hand does in the camera's axes
    shifts = steps[:, :3, 3]
    angles = np.degrees(np.arccos(np.clip((np.trace(steps[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert 0.003 < np.abs(shifts).max() <= 0.01 + 1e-9
    assert 0.2 < angles.max() <= 0.5 * np.sqrt(3) * 1.01
    assert np.abs(np.diff(shifts, axis=0)).max() < 0.002 and np.abs(np.diff(angles)).max() < 0.2
    other, _ = fixed_viewpoint(view(), Difficulty(jitter_angle=0.5, jitter_shift=0.01), 300, 30.0, [10])
    assert not np.allclose(other, shaken)


@pytest.mark.parametrize("name", list(DIFFICULTIES))
def test_draws_fill_the_ranges_and_no_more(name):
    difficulty = DIFFICULTIES[name]
    draws = [drawn_viewpoint(difficulty, set_seed(0, name, k, "v")) for k in range(300)]
    for parameter, (low, high) in ((p, getattr(difficulty, p)) for p in draws[0]):
        values = [draw[parameter] for draw in draws]
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high


def test_draws_depend_on_seed_set_and_video_alone():
    first = drawn_viewpoint(DIFFICULTIES["easy"], set_seed(0, "easy", 0, "v"))
    assert first == drawn_viewpoint(DIFFICULTIES["easy"], set_seed(0, "easy", 0, "v"))
    # frozen: films of a seed stay what they are from version to version
    assert first == {
        "yaw": 7.63403593719643, "pitch": -3.898209375102727, "roll": -0.7273832137429039,
        "distance": 0.03395570009866915, "focal": 0.9726398577901194,
    }  # fmt: skip
    for words in (set_seed(1, "easy", 0, "v"), set_seed(0, "hard", 0, "v"), set_seed(0, "easy", 1, "v"),
                  set_seed(0, "easy", 0, "w"), set_seed(1 << 63, "easy", 0, "v")):  # fmt: skip
        assert drawn_viewpoint(DIFFICULTIES["easy"], words) != first
    seeds = {frame_seed(set_seed(0, "easy", 0, v), f) for v in "vw" for f in range(100)}
    assert len(seeds) == 200 and all(0 <= s < 1 << 63 for s in seeds)


def test_harder_is_wider():
    sizes = [[high - low for low, high in (getattr(d, p) for p in ("yaw", "pitch", "roll", "distance", "focal"))]
             for d in DIFFICULTIES.values()]  # fmt: skip
    assert all(a < b for easier, harder in zip(sizes, sizes[1:], strict=False)
               for a, b in zip(easier, harder, strict=True))  # fmt: skip


def test_parameter_sets():
    sets = parameter_sets(["easy", "hard"], DIFFICULTIES, 2)
    assert [s.name for s in sets] == ["easy_00", "easy_01", "hard_00", "hard_01"]
    assert [(s.difficulty_name, s.draw) for s in sets] == [("easy", 0), ("easy", 1), ("hard", 0), ("hard", 1)]
    assert [s.name for s in parameter_sets(["hard"], DIFFICULTIES)] == ["hard"]
    with pytest.raises(ValueError, match="difficulties must not come twice, got 'easy' again"):
        parameter_sets(["easy", "easy"], DIFFICULTIES)
    with pytest.raises(ValueError, match="difficulty must be one of easy, medium, hard, got 'x'"):
        parameter_sets(["x"], DIFFICULTIES)


def test_difficulties_of_a_file(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"a": {"yaw": 30, "focal": 0.25, "jitter_angle": 1}, "b": {"pitch": [-5, 0]}}))
    found = read_difficulties(path)
    assert found["a"] == Difficulty(yaw=(-30, 30), focal=(0.8, 1.25), jitter_angle=1.0)
    assert found["b"] == Difficulty(pitch=(-5.0, 0.0))
    assert read_difficulties_of(tmp_path, found["a"].as_json()) == found["a"]


def read_difficulties_of(folder, ranges):
    (folder / "again.json").write_text(json.dumps({"x": ranges}))
    return read_difficulties(folder / "again.json")["x"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "must be an object of difficulties, got a list of 0"),
        ({"a/b": {}}, "a difficulty's name becomes a folder: .*, got 'a/b'"),
        ({"a": 3}, "a: must be an object of ranges, got 3"),
        ({"a": {"tilt": 3}}, "a: has no parameter 'tilt'; there are yaw, pitch"),
        ({"a": {"yaw": [5, -5]}}, r"a: yaw must be \[low, high\], got \[5, -5\]"),
        ({"a": {"yaw": -5}}, r"a: yaw must be a number >= 0 or \[low, high\], got -5"),
        ({"a": {"yaw": [1, 2, 3]}}, r"a: yaw must be a number or \[low, high\], got a list of 3"),
        ({"a": {"pitch": 90}}, "a: pitch must be within -80..80, got -90"),
        ({"a": {"focal": [0, 1]}}, "a: focal must be within 0.05..20, got 0"),
        ({"a": {"jitter_shift": -1}}, "a: jitter_shift must be within 0..1000, got -1"),
        ({"a": {"yaw": "wide"}}, "a: yaw must be a number, got 'wide'"),
    ],
)
def test_bad_files_are_told(tmp_path, content, sentence):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        read_difficulties(path)


def test_bad_viewpoints_are_told():
    good = view()
    with pytest.raises(ValueError, match="target must lie in front of the camera, got a point 1 behind it"):
        Viewpoint(good.viewmat, good.K, 64, 48, EYE - [0, 1, 0])
    with pytest.raises(ValueError, match=r"viewmat must be \[4, 4\] finite numbers, got ndarray float64 \[3, 4\]"):
        Viewpoint(good.viewmat[:3], good.K, 64, 48, TARGET)
    with pytest.raises(ValueError, match="distance -1.95 brings the camera, 2 from its target, to it or beyond"):
        pose(distance=-1.95)
