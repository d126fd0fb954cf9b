"""Camera files: every format against hand-written files of one known camera, and a sentence for every bad one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_files import (
    CENTER,
    FOCAL,
    QUATERNION,
    SIZE,
    TRANSLATION,
    inria_entry,
    one_colmap_image,
    pinhole_line,
    pinhole_record,
    project,
    rotate,
    transforms,
    world_to_camera,
    write_colmap_binary,
    write_colmap_text,
    write_json,
)

from rapfast import Cameras

K = np.array([[FOCAL[0], 0, CENTER[0]], [0, FOCAL[1], CENTER[1]], [0, 0, 1]])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["colmap text", "colmap binary", "nerfstudio", "inria", "npz", "npz viewmats", "npy", "txt"])
def known_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict]:
    """The camera of `camera_files` in each format, and the arguments that the format needs besides."""
    pose = np.linalg.inv(world_to_camera())
    size = {"width": SIZE[0], "height": SIZE[1]}
    if request.param == "colmap text":
        return write_colmap_text(tmp_path / "m", one_colmap_image(), [pinhole_line()]), {}
    if request.param == "colmap binary":
        return write_colmap_binary(tmp_path / "m", one_colmap_image(), [pinhole_record()]), {}
    if request.param == "nerfstudio":
        return write_json(tmp_path / "transforms.json", transforms()), {}
    if request.param == "inria":
        return write_json(tmp_path / "cameras.json", [inria_entry()]), {}
    if request.param == "npz":
        np.savez_compressed(tmp_path / "a.npz", poses=pose[None, :3], Ks=K, **size, other=np.zeros(3))
        return tmp_path / "a.npz", {}
    if request.param == "npz viewmats":
        np.savez(tmp_path / "a.npz", viewmats=np.asfortranarray(world_to_camera()[None]), Ks=K[None], **size)
        return tmp_path / "a.npz", {}
    if request.param == "npy":
        np.save(tmp_path / "a.npy", pose[None])
        return tmp_path / "a.npy", {"Ks": K, **size}
    np.savetxt(tmp_path / "a.txt", pose[:3].reshape(1, 12))
    return tmp_path / "a.txt", {"Ks": torch.from_numpy(K), **size}


def test_one_camera_in_every_format_is_the_same_camera(known_file: tuple[Path, dict]) -> None:
    path, arguments = known_file
    cameras = Cameras.from_file(path, **arguments)
    assert len(cameras) == 1
    assert (cameras.width, cameras.height) == SIZE
    assert cameras.viewmats.dtype == cameras.Ks.dtype == torch.float32
    np.testing.assert_allclose(cameras.viewmats[0], world_to_camera(), atol=2e-7)
    np.testing.assert_allclose(cameras.Ks[0], K, rtol=1e-7)
    # The centre by COLMAP's formula, -R^T t, and a pixel by hand, so that the fixture itself cannot be wrong.
    conjugate = QUATERNION * [1, -1, -1, -1]
    np.testing.assert_allclose(cameras.centers[0], -rotate(conjugate, TRANSLATION), atol=1e-6)
    point = (0.4, -0.2, 1.1)
    x, y, z = rotate(QUATERNION, np.array(point)) + TRANSLATION
    expected = (FOCAL[0] * x / z + CENTER[0], FOCAL[1] * y / z + CENTER[1])
    np.testing.assert_allclose(project(cameras, point), expected, rtol=1e-5)


def test_classmethods_by_name(tmp_path: Path) -> None:
    a = Cameras.from_colmap(write_colmap_text(tmp_path / "m", one_colmap_image(), [pinhole_line()]))
    b = Cameras.from_transforms(write_json(tmp_path / "t.json", transforms()))
    c = Cameras.from_inria_json(write_json(tmp_path / "c.json", [inria_entry()]))
    for other in (b, c):
        torch.testing.assert_close(other.viewmats, a.viewmats, rtol=0, atol=2e-7)
        torch.testing.assert_close(other.Ks, a.Ks)
    assert a.names == c.names == ["a.png"]
    assert b.names == ["images/a.png"]


def test_colmap_is_found_in_usual_folders_and_sorted_by_name(tmp_path: Path) -> None:
    images = [(name, QUATERNION, TRANSLATION + i, 7) for i, name in enumerate(["b c.png", "a.png", "d/e.png"])]
    write_colmap_text(tmp_path / "sparse" / "0", images, [pinhole_line(), pinhole_line(8)], points="")
    cameras = Cameras.from_file(tmp_path)
    assert cameras.names == ["a.png", "b c.png", "d/e.png"]
    np.testing.assert_allclose(cameras.viewmats[:, 0, 3], TRANSLATION[0] + np.array([1, 0, 2]), rtol=1e-6)
    # binary wins where both are there, and a single file of a model stands for it
    write_colmap_binary(tmp_path / "sparse" / "0", one_colmap_image("only.png"), [pinhole_record()], points=0)
    assert Cameras.from_file(tmp_path / "sparse").names == ["only.png"]
    assert Cameras.from_file(tmp_path / "sparse" / "0" / "cameras.txt").names == ["only.png"]


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("SIMPLE_PINHOLE", [500, 320, 240], (500, 500, 320, 240)),
        ("PINHOLE", [500, 510, 320, 240], (500, 510, 320, 240)),
        ("SIMPLE_RADIAL", [500, 320, 240, 0], (500, 500, 320, 240)),
        ("RADIAL", [500, 320, 240, 0, 0], (500, 500, 320, 240)),
        ("OPENCV", [500, 510, 320, 240, 0, 0, 0, 0], (500, 510, 320, 240)),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_colmap_models(tmp_path: Path, model: str, params: list[float], expected: tuple, binary: bool) -> None:
    if binary:
        write_colmap_binary(tmp_path, one_colmap_image(), [(7, model, 640, 480, params)])
    else:
        write_colmap_text(tmp_path, one_colmap_image(), [f"7 {model} 640 480 " + " ".join(map(str, params))])
    k = Cameras.from_file(tmp_path).Ks[0]
    assert (k[0, 0], k[1, 1], k[0, 2], k[1, 2]) == expected
    if model.endswith(("RADIAL", "OPENCV")):
        params = [*params[:-1], 0.01]
        if binary:
            write_colmap_binary(tmp_path, one_colmap_image(), [(7, model, 640, 480, params)])
        else:
            write_colmap_text(tmp_path, one_colmap_image(), [f"7 {model} 640 480 " + " ".join(map(str, params))])
        with pytest.raises(ValueError, match=rf"{model} has distortion .*0\.01.*undistort"):
            Cameras.from_file(tmp_path)


def test_blender_looks_along_minus_z_and_takes_sizes_from_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "train").mkdir()
    image.new("RGB", (200, 100)).save(tmp_path / "train" / "r_0.png")
    content = {
        "camera_angle_x": math.pi / 2,
        "frames": [{"file_path": "./train/r_0", "rotation": 0.1, "transform_matrix": np.eye(4).tolist()}],
    }
    cameras = Cameras.from_file(write_json(tmp_path / "transforms_train.json", content))
    assert (cameras.width, cameras.height) == (200, 100)
    np.testing.assert_allclose(cameras.Ks[0], [[100, 0, 100], [0, 100, 50], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(project(cameras, (0, 0, -2)), (100, 50), atol=1e-4)
    np.testing.assert_allclose(project(cameras, (1, 0.5, -2)), (150, 25), atol=1e-4)  # x right, y up
    (tmp_path / "train" / "r_0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="the header of .*r_0.png cannot be read"):
        Cameras.from_file(tmp_path / "transforms_train.json")
    (tmp_path / "train" / "r_0.png").unlink()
    with pytest.raises(ValueError, match=r"frame 0 \('\./train/r_0'\): has no w and h, and there is no image file"):
        Cameras.from_file(tmp_path / "transforms_train.json")


def test_per_frame_intrinsics_and_groups(tmp_path: Path) -> None:
    content = transforms()
    frame = content["frames"][0]
    content["frames"] = [
        {**frame, "file_path": "0"},
        {**frame, "file_path": "1", "w": 320, "h": 240, "fl_x": 200, "fl_y": 201, "cx": 161, "cy": 119},
        {**frame, "file_path": "2", "fl_x": 300},
    ]
    path = write_json(tmp_path / "transforms.json", content)
    with pytest.raises(ValueError, match=r"images differ in size \(640x480 \(2\), 320x240 \(1\)\); Cameras\.groups"):
        Cameras.from_file(path)
    big, small = Cameras.groups(path)
    assert (big.indices, small.indices) == ([0, 2], [1])
    assert (small.width, small.height, small.names) == (320, 240, ["1"])
    np.testing.assert_allclose(small.Ks[0], [[200, 0, 161], [0, 201, 119], [0, 0, 1]])
    assert big.Ks[:, 0, 0].tolist() == [FOCAL[0], 300]
    assert big[1].indices == [2]


def test_nerfstudio_defaults(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    k = Cameras.from_file(write_json(path, transforms(fl_y=None, cx=None, cy=None))).Ks[0]
    np.testing.assert_allclose(k, [[FOCAL[0], 0, 320], [0, FOCAL[0], 240], [0, 0, 1]])
    k = Cameras.from_file(
        write_json(path, transforms(fl_x=None, fl_y=None, camera_angle_x=1.0, camera_angle_y=0.5))
    ).Ks[0]
    np.testing.assert_allclose((k[0, 0], k[1, 1]), (320 / math.tan(0.5), 240 / math.tan(0.25)), rtol=1e-6)


def test_inria_puts_the_principal_point_in_the_middle(tmp_path: Path) -> None:
    k = Cameras.from_file(write_json(tmp_path / "c.json", [inria_entry(cx=None, cy=None)])).Ks[0]
    assert (k[0, 2], k[1, 2]) == (320, 240)


def test_txt_of_one_matrix_and_of_many_lines(tmp_path: Path) -> None:
    arguments = {"Ks": K, "width": 640, "height": 480}
    pose = np.linalg.inv(world_to_camera())
    for content in (pose, pose[:3], pose.reshape(1, 16)):
        np.savetxt(tmp_path / "a.txt", content)
        np.testing.assert_allclose(Cameras.from_file(tmp_path / "a.txt", **arguments).poses[0], pose, atol=1e-6)
    np.savetxt(tmp_path / "a.txt", np.stack([pose[:3].ravel()] * 3))
    assert len(Cameras.from_file(tmp_path / "a.txt", **arguments)) == 3


# --- bad files -------------------------------------------------------------------------------------------------------

POSE = np.linalg.inv(world_to_camera()).tolist()
SKEWED = [[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
MIRRORED = [[-1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def with_pose(matrix: object) -> dict:
    return transforms(frames=[{"file_path": "a", "transform_matrix": matrix}])


BAD_JSON = {
    "not json": ("{", r"not valid JSON"),
    "not utf-8": (b"\xff\xfe", r"not valid JSON"),
    "deep": ("[" * 100_000, r"nested too deeply|not valid JSON"),
    "number": (3, r"is neither a list of cameras \(INRIA\) nor an object with 'frames'"),
    "object": ({"a": 1}, r"is neither a list"),
    "no cameras": ([], r"has no cameras"),
    "no frames": (transforms(frames=[]), r"has no frames"),
    "frames object": (transforms(frames={}), r"must be an object with a list 'frames'"),
    "frame text": (transforms(frames=["a"]), r"frame 0 must be an object, got 'a'"),
    "file_path": (transforms(frames=[{"file_path": 3}]), r"frame 0: file_path must be text, got 3"),
    "no matrix": (transforms(frames=[{"file_path": "a"}]), r"frame 0 \('a'\): has no transform_matrix"),
    "ragged": (
        with_pose([[1, 0, 0], [0]]),
        r"transform_matrix must be 4x4 or 3x4 numbers in nested lists, got a list of 2",
    ),
    "text in matrix": (with_pose([["1"] * 4] * 4), r"transform_matrix must be a number, got '1'"),
    "bool in matrix": (with_pose([[True] * 4] * 4), r"must be a number, got True"),
    "nan": (
        '{"w":1,"h":1,"fl_x":1,"frames":[{"transform_matrix":[[NaN,0,0,0],[0,1,0,0],[0,0,1,0]]}]}',
        r"must be finite, got nan",
    ),
    "huge": (with_pose([[1e40, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), r"camera matrix must be finite and below 1e30"),
    "huge int": (
        with_pose([[10**400, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
        r"must be finite, got an integer over 1e30|valid JSON",
    ),
    "scaled": (with_pose(SKEWED), r"must hold a rotation, R R\^T is off the identity by 3"),
    "mirrored": (with_pose(MIRRORED), r"must hold a rotation, it mirrors"),
    "singular": (with_pose([[0, 0, 0, 0]] * 3), r"must hold a rotation"),
    "last row": (with_pose([*POSE[:3], [0, 0, 0, 2]]), r"last row of the camera matrix must be 0 0 0 1"),
    "fl_x": (transforms(fl_x=-5), r"frame 0 \('images/a.png'\): fl_x must be positive, got -5"),
    "fl_x text": (transforms(fl_x="5"), r"fl_x must be a number, got '5'"),
    "fl_x tiny": (transforms(fl_x=1e-60), r"focal length fx must be positive"),
    "no focal": (transforms(fl_x=None, fl_y=None), r"has neither fl_x nor camera_angle_x"),
    "angle": (
        transforms(fl_x=None, fl_y=None, camera_angle_x=4),
        r"camera_angle_x must be within 0\.\.pi radians, got 4",
    ),
    "w": (transforms(w=0), r"width must be within 1\.\.65536, got 0"),
    "w half": (transforms(w=10.5), r"w must be a whole number, got 10\.5"),
    "w huge": (transforms(w=10**9), r"width must be within 1\.\.65536, got 1000000000"),
    "k1": (transforms(k1=0.1), r"k1 = 0\.1 is lens distortion, .* undistort"),
    "fisheye": (transforms(camera_model="OPENCV_FISHEYE"), r"camera_model 'OPENCV_FISHEYE' is not supported"),
    "is_fisheye": (transforms(is_fisheye=True), r"is_fisheye is set"),
    "entry": ([3], r"entry 0 must be an object, got 3"),
    "keys": ([inria_entry(fx=None, rotation=None)], r"entry 0 \('a.png'\): has no rotation, fx"),
    "fx": ([inria_entry(), inria_entry(fx=0)], r"entry 1 \('a.png'\): focal length fx must be positive, got 0"),
    "position": ([inria_entry(position=[1, 2])], r"position must be 3 numbers in nested lists, got a list of 2"),
    "rotation": ([inria_entry(rotation=[[1, 0, 0]] * 3)], r"must hold a rotation"),
    "height": ([inria_entry(height=-3)], r"height must be within 1\.\.65536, got -3"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(tmp_path: Path, name: str) -> None:
    content, message = BAD_JSON[name]
    path = tmp_path / "c.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        Cameras.from_file(path)
    assert str(caught.value).startswith(str(path))


ZERO = np.zeros(4)
BAD_COLMAP = {
    "camera id": ([("a", QUATERNION, TRANSLATION, 9)], [pinhole_line()], r"line 2 \('a'\): refers to camera 9"),
    "zero quaternion": ([("a", ZERO, TRANSLATION, 7)], [pinhole_line()], r"the quaternion must not be zero"),
    "nan": ([("a", QUATERNION, TRANSLATION * math.nan, 7)], [pinhole_line()], r"camera matrix must be finite"),
    "model": (
        one_colmap_image(),
        ["7 FUNNY 1 1 1"],
        r"line 3: unknown camera model 'FUNNY'; supported: SIMPLE_PINHOLE",
    ),
    "fisheye": (one_colmap_image(), ["7 FOV 1 1 1 1 1 1 1"], r"camera model FOV is not supported, .* undistort"),
    "count": (one_colmap_image(), ["7 PINHOLE 9 9 1 1 1"], r"camera model PINHOLE has 4 parameters, got 3"),
    "word": (one_colmap_image(), ["7 PINHOLE 9 9 1 1 1 x"], r"expected a number, got 'x'"),
    "width": (one_colmap_image(), ["7 PINHOLE 9.5 9 1 1 1 1"], r"expected a whole number, got '9\.5'"),
    "zero width": (one_colmap_image(), ["7 PINHOLE 0 9 1 1 1 1"], r"width must be within 1\.\.65536, got 0"),
    "focal": (one_colmap_image(), ["7 PINHOLE 9 9 0 1 1 1"], r"focal length fx must be positive, got 0"),
    "twice": (one_colmap_image(), [pinhole_line(), pinhole_line()], r"camera 7 appears twice"),
    "short": (one_colmap_image(), ["7 PINHOLE 9"], r"expected 'CAMERA_ID MODEL WIDTH HEIGHT PARAMS\.\.\.'"),
    "no images": ([], [pinhole_line()], r"has no registered image"),
}


@pytest.mark.parametrize("name", BAD_COLMAP)
def test_bad_colmap_text(tmp_path: Path, name: str) -> None:
    images, cameras, message = BAD_COLMAP[name]
    with pytest.raises(ValueError, match=message) as caught:
        Cameras.from_file(write_colmap_text(tmp_path, images, cameras))
    assert str(caught.value).startswith(str(tmp_path))


def test_bad_colmap_binary(tmp_path: Path) -> None:
    def expect(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Cameras.from_colmap(tmp_path)

    write_colmap_binary(tmp_path, one_colmap_image(), [pinhole_record()])
    cameras, images = (tmp_path / "cameras.bin").read_bytes(), (tmp_path / "images.bin").read_bytes()
    (tmp_path / "images.bin").write_bytes(b"\xff" * 8 + images[8:])
    expect(r"images\.bin: truncated at byte \d+: it cannot hold 18,446,744,073,709,551,615 images")
    (tmp_path / "images.bin").write_bytes(images[:-1])
    expect(r"images\.bin: truncated at byte \d+: it cannot hold 2 2D points")
    (tmp_path / "images.bin").write_bytes(images[:40])
    expect(r"images\.bin: truncated at byte 40")
    (tmp_path / "images.bin").write_bytes(images[:72] + b"a name that goes on and on")
    expect(r"images\.bin: truncated at byte 98: an image name has no end")
    (tmp_path / "cameras.bin").write_bytes(cameras[:12] + b"\x63" + cameras[13:])
    expect(r"cameras\.bin: camera 7: unknown camera model number 99")
    (tmp_path / "cameras.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"cameras\.txt: no such file"):
        Cameras.from_colmap(tmp_path)
    with pytest.raises(ValueError, match="holds no COLMAP model"):
        Cameras.from_file(tmp_path)


def test_bad_pose_files(tmp_path: Path) -> None:
    arguments = {"Ks": K, "width": 640, "height": 480}
    good = np.linalg.inv(world_to_camera())[None]

    def expect(name: str, message: str, **given: object) -> None:
        with pytest.raises(ValueError, match=message):
            Cameras.from_file(tmp_path / name, **given)

    np.save(tmp_path / "a.npy", good)
    expect("a.npy", r"a\.npy: holds no Ks; pass it")
    expect("a.npy", r"holds no height; pass it", Ks=K, width=640)
    np.save(tmp_path / "a.npy", good * 2)
    expect("a.npy", r"a\.npy: pose 0: last row", **arguments)
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    expect("a.npy", r"the array must be poses \[M,3,4\] or \[M,4,4\], got \[2, 3\]", **arguments)
    np.save(tmp_path / "a.npy", np.zeros((0, 3, 4)))
    expect("a.npy", r"a\.npy: .*(holds no poses|not a readable)", **arguments)
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    expect("a.npy", r"not a readable \.npy file", **arguments)
    np.save(tmp_path / "a.npy", np.full((1, 3, 4), "x"))
    expect("a.npy", r"the array must hold numbers, got dtype <U1", **arguments)
    header = (tmp_path / "a.npy").read_bytes()
    np.save(tmp_path / "a.npy", good)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(1, 4, 4)", b"(9999999999, 4, 4)"[:9]).replace(b"(1, 4", b"(9, 4"))
    expect("a.npy", r"not a readable \.npy file", **arguments)
    assert header != data

    np.savez(tmp_path / "a.npz", poses=good, viewmats=good)
    expect("a.npz", r"must hold one of the arrays poses, camtoworlds, viewmats, got poses, viewmats")
    np.savez(tmp_path / "a.npz", a=good)
    expect("a.npz", r"must hold one of the arrays .* got none")
    np.savez(tmp_path / "a.npz", poses=good, Ks=K, width=640, height=480)
    expect("a.npz", r"holds width of its own, the argument width must not be given", width=640)
    np.savez(tmp_path / "a.npz", poses=good, Ks=K, width=640.5, height=480)
    expect("a.npz", r"width must be one whole number, got float64")
    np.savez(tmp_path / "a.npz", poses=np.array([None]), Ks=K, width=640, height=480)
    expect("a.npz", r"not a readable \.npz file: poses of shape .* object does not fit")
    (tmp_path / "a.npz").write_bytes(b"PK nonsense")
    expect("a.npz", r"not a readable \.npz file")

    for content, message in (
        ("", r"must have 12 or 16 numbers"),
        ("1 2 3\n", r"got \[1, 3\]"),
        ("1 b\n", r"not a text file of poses"),
    ):
        (tmp_path / "a.txt").write_text(content)
        expect("a.txt", message, **arguments)
    (tmp_path / "a.obj").write_text("")
    expect("a.obj", r"is no camera file known here")
    expect("a.obj", r"Ks, width and height are for pose files", width=3)
    write_json(tmp_path / "transforms.json", transforms())
    write_json(tmp_path / "cameras.json", [inria_entry()])
    expect(".", r"holds transforms\.json and cameras\.json; name the one to read")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Cameras.from_file(tmp_path / "none")
