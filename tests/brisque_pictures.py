"""Pictures to score: renders of the procedural room, whole and spoilt, and what the ``brisque`` package gives them.

``python tests/brisque_pictures.py`` scores all pictures with the package, with ``--draw`` after drawing the renders
anew; both go into tests/golden/. It needs ``pip install brisque==0.2.0 numpy==1.26.4 scipy==1.11.4 scikit-image==0.22.0
opencv-python-headless==4.10.0.84`` (from NumPy 2.4 on, that package's ``score`` raises).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
RENDERS = GOLDEN / "brisque_renders.npz"
SCORES = GOLDEN / "brisque_scores.json"


def renders() -> np.ndarray:
    """[4, 112, 160, 3] float32: the room at its own colours, unclamped, as kept in tests/golden/."""
    with np.load(RENDERS) as file:
        return file["renders"].astype(np.float32)


def pictures() -> dict[str, np.ndarray]:
    """Each [H, W, 3], float32 but for two of float64, by name."""
    found: dict[str, np.ndarray] = {}
    room = renders()
    for index, image in enumerate(room):
        found[f"render {index}"] = image
        found[f"odd size {index}"] = np.ascontiguousarray(image[3 : 3 + 97 - 4 * index, 5 : 5 + 131 - 2 * index])
        found[f"noise {index}"] = _noise(image, 0.02 * (index + 1), seed=index)
        found[f"blur {index}"] = _blur(image, passes=1 + 2 * index)
        found[f"jpeg {index}"] = _jpeg(image, coarseness=(4, 12, 30, 60)[index])
        found[f"grey {index}"] = np.repeat(image.mean(2, keepdims=True), 3, 2).astype(np.float32)
    found["beyond 0..1"] = (2.2 * room[0] - 0.4).astype(np.float32)
    found["double"] = room[1].astype(np.float64) ** 1.5
    found["eight bits"] = np.rint(np.clip(room[2], 0, 1) * 255) / 255
    found["on black"] = room[3] * _disk(room[3])
    found["on white"] = room[3] * _disk(room[3]) + (1 - _disk(room[3]))
    found["clipped"] = np.clip(1.8 * room[0], 0, 1)
    found["blur and noise"] = _noise(_blur(room[1], 4), 0.03, seed=9)
    found["half contrast"] = (0.5 + 0.05 * (room[2] - 0.5)).astype(np.float32)
    found["smallest"] = np.ascontiguousarray(room[0][40:56, 60:76])
    found["narrow"] = np.ascontiguousarray(room[1][:, 40:59])
    return found


def _noise(image: np.ndarray, amount: float, seed: int) -> np.ndarray:
    uniform = np.random.Generator(np.random.PCG64(seed)).random(image.shape, dtype=np.float32)
    return image + np.float32(amount) * (2 * uniform - 1)


def _blur(image: np.ndarray, passes: int) -> np.ndarray:
    """1 2 1 in both directions, with the borders repeated."""
    for _ in range(passes):
        for axis in (0, 1):
            padded = np.pad(image, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
            low, middle, high = (np.take(padded, range(k, k + image.shape[axis]), axis) for k in range(3))
            image = np.float32(0.25) * (low + 2 * middle + high)
    return image


def _jpeg(image: np.ndarray, coarseness: int) -> np.ndarray:
    """What JPEG does, without its files: 8 x 8 blocks, cosine transform, coarser steps for higher frequencies."""
    k = np.arange(8)
    cosine = np.sqrt(2 / 8) * np.cos(np.pi * (2 * k[None, :] + 1) * k[:, None] / 16)
    cosine[0] /= np.sqrt(2)
    steps = coarseness / 255 * (1 + 0.5 * (k[:, None] + k[None, :]))[:, None, :, None]
    height, width, _ = image.shape
    blocks = image.astype(np.float64).reshape(height // 8, 8, width // 8, 8, 3).transpose(0, 2, 1, 3, 4)
    transformed = np.einsum("ki,abijc,lj->abklc", cosine, blocks, cosine)
    steps = steps.reshape(1, 1, 8, 8, 1)
    blocks = np.einsum("ki,abklc,lj->abijc", cosine, np.rint(transformed / steps) * steps, cosine)
    pixels = blocks.transpose(0, 2, 1, 3, 4).reshape(image.shape)
    return (np.rint(np.clip(pixels, 0, 1) * 255) / 255).astype(np.float32)


def _disk(image: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return ((y - 55) ** 2 + (x - 80) ** 2 < 45**2)[..., None].astype(np.float32)


def package_score() -> Callable[[np.ndarray], float]:
    """The package's own score of one picture; ImportError where it is not installed."""
    from brisque import BRISQUE

    return BRISQUE(url=False).score


def _draw() -> np.ndarray:
    import torch

    import rapfast
    from rapfast import procedural

    scene = procedural.room(100_000, seed=0)
    cameras = procedural.room_cameras(4, 320, 224, seed=3)
    with torch.no_grad():
        images, _, _ = rapfast.rasterization(
            scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks, 320, 224,
            sh_degree=scene.sh_degree, postprocess=rapfast.PostProcess(size=(112, 160)),
        )  # fmt: skip
    return images.numpy()


def main() -> None:
    if "--draw" in sys.argv[1:]:
        np.savez_compressed(RENDERS, renders=_draw().astype(np.float16))
    score = package_score()
    scores = {name: score(image) for name, image in pictures().items()}
    names = ("brisque", "numpy", "scipy", "scikit-image", "opencv-python-headless", "libsvm-official")
    versions = {name: version(name) for name in names}
    SCORES.write_text(json.dumps({"versions": versions, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
