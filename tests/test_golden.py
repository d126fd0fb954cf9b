"""Pictures kept in tests/golden/, so that a change of what is drawn is seen as one.

`python tests/test_golden.py` draws them anew: look at them before they are committed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rapfast import PostProcess, rasterization

FOLDER = Path(__file__).parent / "golden"
WIDTH, HEIGHT = 96, 64
NAMES = ["pinhole", "fisheye", "ortho_antialiased", "depth"]


def shell(n: int = 700) -> tuple[Tensor, ...]:
    """Flat ellipsoids on a wavy sphere, shiny through degree 2 harmonics, and a floor of needles.

    Formulas only, no random numbers: the same scene with every version of every library.
    """
    k = torch.arange(n, dtype=torch.float64)
    height = 1 - 2 * (k + 0.5) / n
    angle = k * math.pi * (3 - math.sqrt(5))  # the golden angle spreads points evenly
    radius = (1 - height**2).sqrt() * (1 + 0.15 * torch.sin(5 * angle + 4 * height))
    means = torch.stack([radius * angle.cos(), -0.9 * height, radius * angle.sin()], -1)
    quats = torch.stack([(angle / 2).cos(), 0.3 * (3 * k).sin(), -(angle / 2).sin(), 0.3 * (5 * k).cos()], -1)
    scales = torch.stack([0.09 + 0.04 * (7 * k).sin(), 0.05 + 0.02 * k.sin(), torch.full_like(k, 0.012)], -1)
    opacities = 0.55 + 0.4 * (11 * k).sin()
    sh = torch.zeros(n, 9, 3, dtype=torch.float64)
    for channel in range(3):
        sh[:, 0, channel] = 1.2 * torch.sin(2 * height + 2.1 * channel)
        sh[:, 1:, channel] = 0.25 * torch.sin(torch.arange(8) * 1.7 + channel + k[:, None])
    floor = torch.arange(120, dtype=torch.float64)
    means = torch.cat([means, torch.stack([3 * (2.4 * floor).sin(), 1.2 + 0 * floor, 3 * (1.7 * floor).cos()], -1)])
    quats = torch.cat([quats, torch.stack([floor.cos(), 0 * floor, floor.sin(), 0 * floor], -1)])
    scales = torch.cat([scales, torch.tensor([[0.35, 0.01, 0.02]], dtype=torch.float64).repeat(120, 1)])
    opacities = torch.cat([opacities, torch.full_like(floor, 0.9)])
    sh = torch.cat([sh, torch.zeros(120, 9, 3, dtype=torch.float64)])
    return means, quats, scales, opacities, sh


def draw(name: str, device: torch.device | str = "cpu", backend: str = "rapfast") -> np.ndarray:
    """uint8 [H, W, 3], or [H, W] for depth."""
    means, quats, scales, opacities, sh = (x.float().to(device) for x in shell())
    turn = 0.5
    viewmat = torch.tensor(
        [
            [math.cos(turn), 0, math.sin(turn), 0],
            [0, 1, 0, 0],
            [-math.sin(turn), 0, math.cos(turn), 3.2],
            [0, 0, 0, 1],
        ]
    )
    focal = {"fisheye": 55.0, "ortho_antialiased": 22.0}.get(name, 80.0)
    K = torch.tensor([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])
    shade = torch.linspace(0.2, 0.9, HEIGHT)[:, None, None].expand(HEIGHT, WIDTH, 3)
    depth = name == "depth"
    picture, alphas, _ = rasterization(
        means,
        quats,
        scales,
        opacities,
        sh,
        viewmat[None].to(device),
        K[None].to(device),
        WIDTH,
        HEIGHT,
        sh_degree=2,
        camera_model={"fisheye": "fisheye", "ortho_antialiased": "ortho"}.get(name, "pinhole"),
        rasterize_mode="antialiased" if name == "ortho_antialiased" else "classic",
        backgrounds=None if depth else shade[None].contiguous().to(device),
        render_mode="ED" if depth else "RGB",
        postprocess=None if depth else PostProcess(clamp=(0, 1), dtype=torch.uint8),
        backend=backend,
    )
    if depth:  # 1 to 6 units, white to black; where nothing was drawn: black
        near = ((6 - picture) / 5).clamp(0, 1) * (alphas > 0.5)
        return (255 * near[0, :, :, 0] + 0.5).to(torch.uint8).cpu().numpy()
    return picture[0].cpu().numpy()


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_picture_is_the_kept_one(name, backend, device):
    """Within one grey level, but for the few pixels in which rounding moved a cut or a stop."""
    kept = np.asarray(Image.open(FOLDER / f"{name}.png")).astype(int)
    drawn = draw(name, device, backend).astype(int)
    assert drawn.shape == kept.shape
    difference = np.abs(drawn - kept)
    if name == "depth":  # at a silhouette a pixel may change between drawn and not drawn
        assert (difference > 1).mean() <= 0.004
    else:
        assert difference.max() <= 6
        assert (difference > 1).mean() <= 0.002
    assert (difference > 0).mean() <= 0.02


def test_pictures_show_something():
    """Not a folder of black images: contrast, colour, and each unlike the others."""
    pictures = {name: np.asarray(Image.open(FOLDER / f"{name}.png")).astype(float) for name in NAMES}
    assert sorted(path.stem for path in FOLDER.glob("*.png")) == sorted(NAMES)
    for name, picture in pictures.items():
        assert picture.std() > 30, name
        if name != "depth":
            assert np.abs(picture[..., 0] - picture[..., 2]).mean() > 5, name
    assert np.abs(pictures["pinhole"] - pictures["fisheye"]).mean() > 10


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in NAMES:
        Image.fromarray(draw(each)).save(FOLDER / f"{each}.png", optimize=True)
        print(FOLDER / f"{each}.png")
