"""Where the caller has set torch's default device: what the host reads lies in the host's memory all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_scenes import CPU32, CUDA16, Form, color_net, embedding_scene, make_appearance, rap_scene, to
from scenes import HEIGHT, WIDTH, assert_same
from scenes import make_scene as make_crowd
from torch import Tensor

from rapfast import Cameras, load_scene, procedural, rasterization, save_scene
from rapfast.appearance import RapScene
from rapfast.appearance.rap_calls import render_batch
from rapfast.rvs import PoseSampler, RandomViewDataset, RandomViewSynthesizer

pytestmark = pytest.mark.usefixtures("one_thread")

A = make_appearance(n=60, c=3)
FORMS = [pytest.param(CPU32, id="cpu"), pytest.param(CUDA16, id="cuda", marks=pytest.mark.cuda)]


def of_network(form: Form) -> tuple[RapScene, tuple[Any, ...], dict[str, Any]]:
    a = to(A, form)
    options = {"feature_maps": list(a.maps), "map_ids": [0, 1, 1], "view_weights": [0.4, 1.0, 1.7]}
    return rap_scene(A, color_net(form), form), (a.viewmats, a.Ks, WIDTH, HEIGHT), options


Call = Callable[[], list[Tensor]]


def plain(form: Form, _: Path) -> Call:
    scene = make_crowd(40, 2, dtype=torch.float32).to(form.device)

    def call() -> list[Tensor]:
        images, alphas, meta = rasterization(*scene, WIDTH, HEIGHT)
        return [images, alphas, meta["means2d"]]

    return call


def gradients(form: Form, _: Path) -> Call:
    scene = [x.requires_grad_() for x in make_crowd(40, 2, dtype=torch.float32).to(form.device)]

    def call() -> list[Tensor]:
        images, alphas, _ = rasterization(*scene, WIDTH, HEIGHT)
        return [images.detach(), *torch.autograd.grad(images.square().sum() + alphas.sum(), scene)]

    return call


def network(form: Form, _: Path) -> Call:
    scene, cameras, options = of_network(form)
    return lambda: list(scene.render(*cameras, **options)[:2])


def trained_network(form: Form, _: Path) -> Call:
    scene, cameras, options = of_network(form)
    leaves = [scene.scene.opacities.requires_grad_(), *scene.color_net.requires_grad_().parameters()]

    def call() -> list[Tensor]:
        images = scene.render(*cameras, **options)[0]
        return [images.detach(), *torch.autograd.grad(images.sum(), leaves)]

    return call


def embedding(form: Form, _: Path) -> Call:
    widths = {"encoder": (143, 32, 20), "decoder": (68, 30, 12), "color_decoder": (15, 3)}
    scene, a = embedding_scene(A, color_net(form, widths), form), to(A, form)
    options = {"embeddings": torch.ones(3, 32, device=form.device), "view_weights": [1.0, 0.5, 0.2]}
    return lambda: [scene.render(a.viewmats, a.Ks, WIDTH, HEIGHT, **options)[0]]


def raps_dictionaries(form: Form, _: Path) -> Call:
    scene, (viewmats, Ks, *size), options = of_network(form)
    cameras, black = Cameras(viewmats, Ks, *size), torch.zeros(3, device=form.device)

    def call() -> list[Tensor]:
        found = render_batch(scene, cameras, None, black, **options)
        return [x[name] for x in found for name in ("render", "radii", "viewspace_points")]

    return call


def files(_: Form, folder: Path) -> Call:
    room, cameras = procedural.room(4000, 0), procedural.room_orbit(3, 64, 36)

    def call() -> list[Tensor]:
        save_scene(room, folder / "room.ply")
        cameras.resize(32, 18).save(folder / "cameras.json")
        scene, loaded = load_scene(folder / "room.ply"), Cameras.from_file(folder / "cameras.json")
        return [scene.means, scene.sh, loaded.viewmats, loaded.Ks]

    return call


def random_views(form: Form, _: Path) -> Call:
    scene, (viewmats, Ks, width, height), _ = of_network(form)
    maps, poses = list(to(A, form).maps), A.viewmats.inverse().numpy()

    def call() -> list[Tensor]:
        views = RandomViewSynthesizer(scene, Ks[0].cpu(), (height, width), maps, (32, 32))
        return [views.render(poses, np.ones(3), [0, 1, 0]).images]

    return call


def dataset(form: Form, _: Path) -> Call:
    scene, (viewmats, Ks, width, height), _ = of_network(form)
    cameras, maps = Cameras(viewmats.cpu(), Ks.cpu(), width, height), list(to(A, form).maps)
    cameras = Cameras(cameras.viewmats, cameras.Ks[:1].expand(3, 3, 3).contiguous(), width, height)

    def call() -> list[Tensor]:
        made = RandomViewDataset(scene, cameras, PoseSampler(0.1, 5.0), feature_maps=[maps[0], *maps], batch_size=2)
        try:
            items = list(made)
        finally:
            made.close()
        return [item[name] for item in items for name in ("image", "pose", "weight", "reference")]

    return call


CALLS = [plain, gradients, network, trained_network, embedding, raps_dictionaries, files, random_views, dataset]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_default_device_changes_nothing(make: Callable[[Form, Path], Call], form: Form, tmp_path: Path) -> None:
    want, call = make(form, tmp_path)(), make(form, tmp_path)
    with torch.device("meta"):
        got = call()
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.device == y.device and x.shape == y.shape
        if form.device.type == "cpu":  # on a GPU sums of gradients are made in any order
            assert_same(x.detach(), y.detach())
