"""Cameras as an object: paths, scaling, cutting, saving, and what its constructors refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_files import CENTER, FOCAL, project, world_to_camera

from rapfast import Cameras

K = np.array([[FOCAL[0], 0, CENTER[0]], [0, FOCAL[1], CENTER[1]], [0, 0, 1]])


def test_poses_of_tensors() -> None:
    pose = torch.from_numpy(np.linalg.inv(world_to_camera()))
    cameras = Cameras.from_poses(pose[None, :3].expand(4, 3, 4), torch.from_numpy(K), 640, 480, names=list("abcd"))
    np.testing.assert_allclose(cameras.viewmats[3], world_to_camera(), atol=2e-7)
    assert cameras.names == list("abcd")
    assert len(Cameras.from_poses(torch.zeros(0, 3, 4), K, 640, 480)) == 0
    for poses, Ks, message in (
        (pose, K, r"poses must be \[M,3,4\] or \[M,4,4\] camera-to-world, got \[4, 4\]"),
        (pose[None], K[None, :2], r"Ks must be \[3,3\] or \[1,3,3\], got \[1, 2, 3\]"),
        (pose[None] * math.nan, K, r"pose 0: camera matrix must be finite"),
        (pose[None], -K, r"pose 0: focal length fx must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Cameras.from_poses(poses, Ks, 640, 480)
    with pytest.raises(ValueError, match="names must have one entry per pose, 1, got 2"):
        Cameras.from_poses(pose[None], K, 640, 480, names=["a", "b"])
    with pytest.raises(TypeError, match="poses must hold real numbers"):
        Cameras.from_poses("abc", K, 640, 480)
    with pytest.raises(TypeError, match=r"width must be a whole number of pixels, got 640\.0"):
        Cameras.from_poses(pose[None], K, 640.0, 480)  # type: ignore[arg-type]


def test_look_at_points_the_middle_of_the_picture_at_the_target() -> None:
    cameras = Cameras.look_at([[1, 2, 3], [0, -5, 1]], [0.5, 0, 1], width=200, height=100, fov_y=90)
    for index in range(2):
        np.testing.assert_allclose(project(cameras, (0.5, 0, 1), index), (100, 50), atol=1e-3)
        assert project(cameras, (0.5, 0, 1.2), index)[1] < 50  # up in the world is up in the picture
    assert cameras.Ks[0, 1, 1] == pytest.approx(50)  # 90 degrees over 100 pixels
    np.testing.assert_allclose(cameras.centers[1], [0, -5, 1], atol=1e-6)
    rotation = cameras.viewmats[0, :3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(rotation) == pytest.approx(1, abs=1e-6)
    # from the side: +x of the world is to the right for a camera that looks along +y
    assert project(Cameras.look_at([0, -3, 0], [0, 0, 0]), (1, 0, 0))[0] > 427


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0, 0], [0, 0, 0]), r"eyes\[0\] must differ from targets\[0\]"),
        (([0, 0, 1], [0, 0, 0]), r"up must not be zero or parallel to the view, got \[0\.0, 0\.0, 1\.0\] for camera 0"),
        (([1, 0, 0], [0, 0, 0], [0, 0, 0]), r"up must not be zero or parallel"),
        (([math.inf, 0, 0], [0, 0, 0]), r"eyes must be finite, got inf"),
        (([1, 0], [0, 0, 0]), r"eyes must be \[3\] or \[C,3\], got \[2\]"),
        ((np.ones((2, 3)), np.zeros((3, 3))), r"eyes, targets and up must agree in C"),
    ],
)
def test_bad_look_at(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cameras.look_at(*arguments)


def test_orbit_goes_round() -> None:
    cameras = Cameras.orbit([1, 2, 3], 5.0, 12, elevation=30, start=90)
    offsets = cameras.centers - torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(offsets.norm(dim=1), torch.full((12,), 5.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(offsets[:, 2], torch.full((12,), 2.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(offsets[0, :2], torch.tensor([0, 5 * math.cos(math.pi / 6)]), rtol=0, atol=1e-5)
    torch.testing.assert_close(offsets[6, :2], -offsets[0, :2], rtol=0, atol=1e-5)
    for index in range(12):
        np.testing.assert_allclose(project(cameras, (1, 2, 3), index), (427, 240), atol=1e-2)
    assert torch.allclose(
        Cameras.orbit([0, 0, 0], 1.0, 1, up=(0, -1, 0), elevation=90 - 1e-3).centers,
        torch.tensor([0, -1.0, 0]),
        atol=1e-4,
    )
    for arguments, message in (
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"radius": math.nan}, "radius must be a finite number"),
        ({"elevation": 90.0}, "elevation must be within"),
        ({"fov_y": 180.0}, "fov_y must be within"),
        ({"width": 0}, r"width must be within 1\.\.65536, got 0"),
        ({"up": [0, 0, 0]}, "up must be finite and not zero"),
    ):
        with pytest.raises(ValueError, match=message):
            Cameras.orbit(**{"center": [0, 0, 0], "radius": 1.0, "n": 3, **arguments})
    with pytest.raises(TypeError, match=r"n must be a whole number, got 2\.5"):
        Cameras.orbit([0, 0, 0], 1.0, 2.5)  # type: ignore[arg-type]


def test_interpolation_hits_the_keys_and_turns_evenly() -> None:
    keys = Cameras.orbit([0, 0, 0], 3.0, 4, elevation=0)
    keys.Ks[:, 0, 0] = torch.tensor([100.0, 200, 300, 400])
    path = keys.interpolate(7)  # a key at every second camera
    torch.testing.assert_close(path.viewmats[::2], keys.viewmats, atol=1e-5, rtol=0)
    torch.testing.assert_close(path.Ks[:, 0, 0], torch.linspace(100, 400, 7))
    for index in range(6):  # 90 degrees between keys, so 45 between neighbours
        relative = path.viewmats[index, :3, :3] @ path.viewmats[index + 1, :3, :3].T
        assert math.degrees(math.acos((float(relative.trace()) - 1) / 2)) == pytest.approx(45, abs=0.05)
    torch.testing.assert_close(path.centers[1], (keys.centers[0] + keys.centers[1]) / 2, atol=1e-5, rtol=0)

    smooth = keys.interpolate(8, smooth=True, closed=True)
    torch.testing.assert_close(smooth.viewmats[::2], keys.viewmats, atol=1e-5, rtol=0)
    # Catmull-Rom at the middle of a segment: (-p0 + 9 p1 + 9 p2 - p3) / 16
    c = keys.centers
    torch.testing.assert_close(smooth.centers[1], (-c[3] + 9 * c[0] + 9 * c[1] - c[2]) / 16, atol=1e-5, rtol=0)
    assert torch.equal(keys[2].interpolate(3).viewmats, keys[2].interpolate(1).viewmats.expand(3, 4, 4))
    torch.testing.assert_close(keys.interpolate(1).viewmats, keys[:1].viewmats, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        keys.interpolate(0)
    with pytest.raises(ValueError, match="interpolate needs at least one camera"):
        keys[:0].interpolate(3)


def test_resize_moves_pixels_in_proportion() -> None:
    cameras = Cameras.look_at([3, 1, 2], [0, 0, 0], width=200, height=100)
    small = cameras.resize(50, 75)
    u, v = project(cameras, (0.3, 0.2, -0.4))
    np.testing.assert_allclose(project(small, (0.3, 0.2, -0.4)), (u / 4, v * 0.75), rtol=1e-5)
    assert (small.width, small.height) == (50, 75)
    with pytest.raises(ValueError, match="height must be within"):
        cameras.resize(10, 0)


def test_indexing_keeps_names_and_indices() -> None:
    eyes = torch.eye(3) * 3 + torch.tensor([0.5, 0.25, 0])
    base = Cameras.look_at(eyes, [0, 0, 0])
    cameras = Cameras(base.viewmats, base.Ks, 854, 480, names=["a", "b", "c"], indices=[4, 5, 9])
    assert cameras[-1].names == ["c"]
    assert len(cameras[1]) == 1
    assert cameras[[2, 0]].indices == [9, 4]
    assert torch.equal(cameras[::2].viewmats, cameras.viewmats[::2])
    assert len(cameras[3:]) == 0
    assert len(list(cameras)) == 3
    with pytest.raises(IndexError):
        cameras[3]
    assert cameras.to(torch.float64).viewmats.dtype == torch.float64
    assert "3 of 854x480" in repr(cameras)


@pytest.mark.parametrize(
    ("replace", "error", "message"),
    [
        ({"viewmats": np.eye(4)[None]}, TypeError, r"viewmats must be a floating-point tensor \[C,4,4\], got ndarray"),
        ({"viewmats": torch.eye(4)}, ValueError, r"viewmats must be \[C,4,4\], got \[4, 4\]"),
        ({"viewmats": torch.zeros(1, 4, 4)}, ValueError, r"viewmats\[0\] must be invertible"),
        ({"viewmats": torch.full((1, 4, 4), math.nan)}, ValueError, r"viewmats\[0\] must be finite"),
        ({"Ks": torch.eye(3).expand(2, 3, 3)}, ValueError, r"Ks must be \[1,3,3\] torch\.float32 on cpu"),
        ({"Ks": torch.eye(3, dtype=torch.float64)[None]}, ValueError, r"got \[1, 3, 3\] torch\.float64"),
        (
            {"Ks": -torch.eye(3)[None]},
            ValueError,
            r"Ks\[0\] must have positive focal lengths, got fx, fy = \(-1\.0, -1\.0\)",
        ),
        ({"width": 0}, ValueError, r"width must be within 1\.\.65536, got 0"),
        ({"height": 1.5}, TypeError, r"height must be a whole number of pixels, got 1\.5"),
        ({"height": True}, TypeError, r"height must be a whole number of pixels"),
        ({"names": ["a", "b"]}, ValueError, r"names must have one entry per camera, 1, got 2"),
    ],
)
def test_bad_fields(replace: dict, error: type[Exception], message: str) -> None:
    good = {"viewmats": torch.eye(4)[None], "Ks": torch.eye(3)[None], "width": 3, "height": 2}
    assert len(Cameras(**good)) == 1
    with pytest.raises(error, match=message):
        Cameras(**{**good, **replace})


def test_saved_cameras_come_back(tmp_path: Path) -> None:
    cameras = Cameras.orbit([1, 2, 3], 4.0, 5, elevation=-30, width=100, height=80)
    cameras.Ks[:, 0, 2] += 3
    cameras.save(tmp_path / "c.json")
    again = Cameras.from_file(tmp_path / "c.json")
    torch.testing.assert_close(again.viewmats, cameras.viewmats, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.Ks, cameras.Ks)
    assert again.names == cameras.names
    entry = json.loads((tmp_path / "c.json").read_text())[0]
    assert set(entry) == {"id", "img_name", "width", "height", "position", "rotation", "fx", "fy", "cx", "cy"}
    cameras.Ks[2, 0, 1] = 0.5
    with pytest.raises(ValueError, match=r"Ks\[2\] has skew 0\.5"):
        cameras.save(tmp_path / "c.json")
