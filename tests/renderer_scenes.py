"""Scenes, renderers and native calls of the tests of Renderer, of CUDA graphs and of calls in parts."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from scenes import HEIGHT, WIDTH, Scene, assert_same, make_scene
from torch import Tensor

import rapfast
from rapfast import PostProcess, Renderer, rasterization

SIZE = (WIDTH, HEIGHT)
LONG_SLEEP = 2_000_000_000  # clock cycles, about 1.1 seconds

SETTINGS: dict[str, Any] = {
    "camera_model": "pinhole", "antialiased": False, "eps2d": 0.3, "near_plane": 0.01, "far_plane": 1e10,
    "radius_clip": 0.0, "sh_degree": 2, "render_mode": "RGB", "alpha_cap": 0.999,
}  # fmt: skip

RASTER_OPTIONS: dict[str, dict[str, Any]] = {
    "sh": {"sh_degree": 2},
    "depth": {"sh_degree": 2, "render_mode": "RGB+ED", "packed": False},
    "background": {"sh_degree": 2, "kind": "image", "rasterize_mode": "antialiased"},
    "post": {
        "sh_degree": 2,
        "kind": "color",
        "postprocess": PostProcess(size=(20, 31), mean=(0.1,) * 3, std=(2.0,) * 3),
    },
    "batched": {"sh_degree": 1, "batch": (2,)},
    "channels": {"channels": 7},
}

native_render = importlib.import_module("rapfast.ops.render")  # the package's attribute is the function


def gaussians(scene: Scene, sh: bool = True) -> rapfast.Scene:
    return rapfast.Scene(*scene[:4], sh=scene.colors if sh else None)


def fitted(scene: Scene, **options: Any) -> Renderer:
    renderer = Renderer(gaussians(scene), len(scene.viewmats), *SIZE, **options)
    renderer.fit(scene.viewmats, scene.Ks)
    return renderer


def moved(scene: Scene, seed: int) -> Scene:
    """The same Gaussians seen by other cameras."""
    other = make_scene(1, len(scene.viewmats), seed=seed, dtype=scene.means.dtype, device=scene.means.device)
    return scene._replace(viewmats=other.viewmats, Ks=other.Ks)


def copies(tensors: Any) -> list[Tensor]:
    return [x.clone() for x in tensors]


def assert_all_same(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert_same(x, y)


def cuda_scene(n: int = 500, c: int = 3, **options: Any) -> Scene:
    return make_scene(n, c, dtype=torch.float32, device="cuda", **options)


def direct(scene: Scene, c: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The first c views by `rasterization`."""
    options = {"sh_degree": 2, **options}
    if options.get("backgrounds") is not None:
        options["backgrounds"] = options["backgrounds"][:c]
    return rasterization(*scene[:5], scene.viewmats[:c], scene.Ks[:c], *SIZE, **options)[:2]


def native_arguments(s: Scene) -> tuple[Any, ...]:
    return s.means, s.quats, s.scales, None, s.opacities, s.colors, s.viewmats, s.Ks, None, *SIZE


def assert_poisoned(x: Tensor) -> None:
    assert x.isnan().all() if x.is_floating_point() else not x.any()
