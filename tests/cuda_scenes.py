"""What the tests of a GPU alone share: one render with all that it tells, and ways to call it."""

from __future__ import annotations

from typing import Any

import torch
from renderer_scenes import SIZE
from scenes import (
    Scene,
    flat,
)
from torch import Tensor

from rapfast import PostProcess, ops, rasterization

DEVICE = torch.device("cuda", 0)
META_KEYS = ("n_invalid", "radii", "means2d", "depths", "conics", "opacities", "tiles_per_gauss")
ON_CUDA: dict[str, Any] = {"dtype": torch.float32, "device": DEVICE}


def render_all(scene: Scene, size: tuple[int, int] = SIZE, **options: Any) -> list[Tensor]:
    """Images, alphas and what meta says, dense."""
    colors, alphas, meta = rasterization(*scene, *size, **{"packed": False, **options})
    return [colors, alphas, *(meta[key] for key in META_KEYS)]


def render(scene: Scene, size: tuple[int, int] = SIZE, **options: Any) -> Any:
    """The operator's own call: its result tells capacities and keeps the state."""
    settings: dict[str, Any] = {
        "camera_model": "pinhole", "antialiased": False, "eps2d": 0.3, "near_plane": 0.01, "far_plane": 1e10,
        "radius_clip": 0.0, "sh_degree": None, "render_mode": "RGB", "alpha_cap": 0.999, **options,
    }  # fmt: skip
    s = flat(scene)
    backgrounds = settings.pop("backgrounds", None)
    return ops.render(
        s.means, s.quats, s.scales, None, s.opacities, s.colors, s.viewmats, s.Ks, backgrounds, *size, **settings
    )


def random_backgrounds(scene: Scene, kind: str | None, channels: int = 3, size: tuple[int, int] = SIZE) -> Any:
    if kind is None:
        return None
    g = torch.Generator().manual_seed(5)
    image = (size[1], size[0]) if kind == "image" else ()
    return torch.rand(*scene.Ks.shape[:-2], *image, channels, generator=g).to(scene.means)


BATCH_OPTIONS: dict[str, dict[str, Any]] = {
    "sh": {"sh_degree": 3},
    "sh antialiased image": {"sh_degree": 2, "rasterize_mode": "antialiased", "kind": "image"},
    "sh expected depth": {"sh_degree": 3, "render_mode": "RGB+ED", "kind": "color"},
    "depth": {"render_mode": "D"},
    "expected depth": {"render_mode": "ED", "rasterize_mode": "antialiased"},
    "ortho": {"camera_model": "ortho", "render_mode": "RGB+D"},
    "fisheye": {"camera_model": "fisheye", "render_mode": "RGB+D"},
    "halves": {"sh_degree": 1, "kind": "color", "postprocess": PostProcess(size=(17, 40), dtype=torch.float16)},
    "bytes": {"kind": "image", "postprocess": PostProcess(layout="CHW", dtype=torch.uint8)},
    **{f"{d} channels": {"channels": d, "kind": "color"} for d in (1, 2, 3, 4, 7, 32, 40)},
    "5 channels and depth": {"channels": 5, "render_mode": "RGB+ED", "kind": "image", "rasterize_mode": "antialiased"},
}
