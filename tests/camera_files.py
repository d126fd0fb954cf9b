"""Camera files for the tests, written by hand from the formats' descriptions: no code shared with the readers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch

from rapfast import Cameras

MODEL_IDS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "OPENCV_FISHEYE": 5}

#: A camera with nothing symmetric about it, as COLMAP has it: quaternion w x y z and translation, world to camera.
QUATERNION = np.array([0.5, -0.1, 0.7, 0.3]) / np.linalg.norm([0.5, -0.1, 0.7, 0.3])
TRANSLATION = np.array([0.3, -1.2, 2.5])
FOCAL = (410.0, 405.5)
CENTER = (312.25, 239.5)
SIZE = (640, 480)


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """v turned by the unit quaternion q: v + 2 w (u x v) + 2 u x (u x v)."""
    u = q[1:]
    return v + 2 * q[0] * np.cross(u, v) + 2 * np.cross(u, np.cross(u, v))


def world_to_camera(q: np.ndarray = QUATERNION, t: np.ndarray = TRANSLATION) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([rotate(q, axis) for axis in np.eye(3)], axis=1)
    matrix[:3, 3] = t
    return matrix


def write_colmap_text(
    folder: Path, images: list[tuple[str, np.ndarray, np.ndarray, int]], cameras: list[str], points: str = "1.5 2.5 -1"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text("# Camera list\n# CAMERA_ID, MODEL, ...\n" + "\n".join(cameras) + "\n")
    lines = ["# Image list with two lines of data per image:"]
    for index, (name, q, t, camera) in enumerate(images, start=1):
        numbers = " ".join(repr(float(v)) for v in (*q, *t))
        lines += [f"{index} {numbers} {camera} {name}", points]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_colmap_binary(
    folder: Path,
    images: list[tuple[str, np.ndarray, np.ndarray, int]],
    cameras: list[tuple[int, str, int, int, list[float]]],
    points: int = 2,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<Q", len(cameras))
    for camera_id, model, width, height, params in cameras:
        data += struct.pack(f"<iiQQ{len(params)}d", camera_id, MODEL_IDS[model], width, height, *params)
    (folder / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(images))
    for index, (name, q, t, camera) in enumerate(images, start=1):
        data += struct.pack("<i7di", index, *q, *t, camera) + name.encode() + b"\0"
        data += struct.pack("<Q", points) + struct.pack("<ddq", 1.5, 2.5, -1) * points
    (folder / "images.bin").write_bytes(data)
    return folder


def one_colmap_image(name: str = "a.png") -> list[tuple[str, np.ndarray, np.ndarray, int]]:
    return [(name, QUATERNION, TRANSLATION, 7)]


def pinhole_line(camera_id: int = 7) -> str:
    return f"{camera_id} PINHOLE {SIZE[0]} {SIZE[1]} {FOCAL[0]} {FOCAL[1]} {CENTER[0]} {CENTER[1]}"


def pinhole_record(camera_id: int = 7) -> tuple[int, str, int, int, list[float]]:
    return camera_id, "PINHOLE", SIZE[0], SIZE[1], [*FOCAL, *CENTER]


def transforms(**replace: object) -> dict:
    """A nerfstudio file of the camera above: camera-to-world, OpenGL axes."""
    pose = np.linalg.inv(world_to_camera())
    pose[:3, 1] *= -1
    pose[:3, 2] *= -1
    content = {
        "camera_model": "OPENCV", "fl_x": FOCAL[0], "fl_y": FOCAL[1], "cx": CENTER[0], "cy": CENTER[1],
        "w": SIZE[0], "h": SIZE[1], "k1": 0.0, "k2": 0, "p1": 0, "p2": 0,
        "frames": [{"file_path": "images/a.png", "transform_matrix": pose.tolist()}],
    }  # fmt: skip
    return {k: v for k, v in {**content, **replace}.items() if v is not None}


def inria_entry(**replace: object) -> dict:
    """An INRIA entry of the camera above, its principal point given (their files put it in the middle)."""
    pose = np.linalg.inv(world_to_camera())
    entry = {
        "id": 0, "img_name": "a.png", "width": SIZE[0], "height": SIZE[1], "position": pose[:3, 3].tolist(),
        "rotation": pose[:3, :3].tolist(), "fx": FOCAL[0], "fy": FOCAL[1], "cx": CENTER[0], "cy": CENTER[1],
    }  # fmt: skip
    return {k: v for k, v in {**entry, **replace}.items() if v is not None}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def project(cameras: Cameras, point: tuple[float, float, float], index: int = 0) -> tuple[float, float]:
    """Pixel of a world point."""
    p = cameras.viewmats[index].double() @ torch.tensor([*point, 1.0], dtype=torch.float64)
    u = cameras.Ks[index].double() @ (p[:3] / p[2])
    return float(u[0]), float(u[1])
