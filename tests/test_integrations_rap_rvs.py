"""RAP's renderers by name: constructor, methods, files, spawned process, and how they get into RAP's modules."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from PIL import Image

from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene, load_rap
from rapfast.integrations.rap import install_rvs as reexported
from rapfast.integrations.rap_rvs import CLASSES, install_rvs, uninstall_rvs
from rapfast.rvs import PoseSampler, bounding_box
from rapfast.rvs.output import to_pixels
from rapfast.rvs.references import ReferenceMaps
from rapfast.rvs.renderers import (
    GaussianRenderer,
    GaussianRendererWithAttempts,
    GaussianRendererWithBrisqueAttempts,
    read_camera,
)
from rapfast.rvs.synthesis import RandomViewSynthesizer

M = 5
SIZE = (20, 37)
A = make_appearance(n=40, c=M, n_maps=1)
POSES = torch.linalg.inv(A.viewmats)[:, :3].float()
IMAGES = torch.rand(M, 3, 34, 36, generator=torch.Generator().manual_seed(0))
KINDS = {
    "plain": GaussianRenderer,
    "attempts": GaussianRendererWithAttempts,
    "brisque": GaussianRendererWithBrisqueAttempts,
}
THRESHOLD = 45.0
RIGHT = np.pi / 2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A trained scene's folder."""
    torch.manual_seed(0)
    tensors = [t.float() for t in (A.means, A.quats, A.scales, A.opacities)]
    scene = Scene(*tensors, intrinsic=A.intrinsic.float())
    box_coord = A.box_coord.float()
    box_coord[:, 2] = torch.tensor([HEIGHT, WIDTH])
    state = {name: value.float() for name, value in net_state().items()}
    rap = RapScene(scene, box_coord, FeatureMapNet().eval(), ColorNet.from_state_dict(state).float(), iteration=7)
    folder = tmp_path_factory.mktemp("model")
    rap.save(folder)
    return folder


def arguments(model: Path, **changes: Any) -> tuple[Any, ...]:
    configs = {
        "model_path": str(model), "rvs_trans": 0.3, "rvs_rotation": 10.0, "d_max": 0.1, "max_attempts": 3,
        "brisque_threshold": THRESHOLD, "vis_rvs": False, "device": "cpu", "rvs_refresh_rate": 2,
    }  # fmt: skip
    dataset = SimpleNamespace(poses=POSES.reshape(M, 12), images=IMAGES)
    camera = SimpleNamespace(K=A.Ks[0], image_width=WIDTH, image_height=HEIGHT)
    return SimpleNamespace(**configs | changes), camera, SIZE, SimpleNamespace(dataset=dataset), 4


def make(kind: str, model: Path, **changes: Any) -> Any:
    renderer = KINDS[kind](*arguments(model, **changes))
    renderer.load_gaussians()
    return renderer


@functools.lru_cache
def loaded(model: Path) -> tuple[RapScene, ReferenceMaps]:
    scene = load_rap(model)
    return scene, ReferenceMaps(scene, IMAGES)


def expected(kind: str, model: Path, weights: Any = (0.0, 2.0), indexes: Any = None, look: Any = None) -> Any:
    """By the core, spelled out."""
    scene, maps = loaded(model)
    views = RandomViewSynthesizer(scene, A.Ks[0], (HEIGHT, WIDTH), maps, SIZE, on_pictures=look)
    sampler = PoseSampler(0.3, 10.0, box=bounding_box(POSES, 0.1))
    if kind == "plain":
        return views.perturbed(POSES, sampler, None, weights, indexes)
    if kind == "attempts":
        return views.with_attempts(POSES, sampler, 3, None, weights, indexes)
    return views.with_brisque(POSES, sampler, 3, THRESHOLD, None, weights, indexes)


@pytest.mark.parametrize("kind", KINDS)
def test_render_set_gives_poses_and_images(kind, model):
    np.random.seed(1)
    views = expected(kind, model)
    state = np.random.get_state()
    np.random.seed(1)
    poses, images = make(kind, model).render_set("train")
    assert poses.shape == (M, 3, 4)
    assert poses.dtype == torch.float64
    assert images.shape == (M, 3, *SIZE)
    assert images.dtype == torch.float32
    assert torch.equal(poses, views.poses)
    assert torch.equal(images, views.images)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), state, strict=True))


@pytest.mark.parametrize("kind", ["attempts", "brisque"])
def test_render_perturbed_imgs_draws_and_returns_poses(kind, model):
    indexes = [3, 0, 0, 1, 4]
    np.random.seed(2)
    views = expected(kind, model, indexes=indexes)
    np.random.seed(2)
    result = make(kind, model).render_perturbed_imgs("train", POSES, indexes, True, batch_size=2)
    assert torch.equal(result[0], views.poses)
    assert torch.equal(result[1], views.images)


def test_the_plain_renderer_takes_drawn_poses_and_returns_images_only(model):
    np.random.seed(3)
    views = expected("plain", model)
    np.random.seed(3)
    renderer = make("plain", model)
    drawn = PoseSampler(0.3, 10.0, box=bounding_box(POSES, 0.1)).sample(POSES)
    images = renderer.render_perturbed_imgs("train", drawn, disable_tqdm=True, batch_size=3)
    assert torch.equal(images, views.images)


@pytest.mark.parametrize("kind", KINDS)
def test_without_appearance_augmentation(kind, model):
    np.random.seed(4)
    views = expected(kind, model, None)
    np.random.seed(4)
    poses, images = make(kind, model, appearance_augmentation=False).render_set("train")
    assert torch.equal(poses, views.poses)
    assert torch.equal(images, views.images)


@pytest.mark.parametrize("kind", KINDS)
def test_jpegs_are_raps(kind, model):
    """Their names, and pixels that are those of Pillow's own file of the picture."""
    renderer = make(kind, model, vis_rvs=True)
    renderer.epoch = 6
    np.random.seed(5)
    _, images = renderer.render_set(kind)
    np.random.seed(5)
    pictures: dict[str, torch.Tensor] = {}

    def look(made: torch.Tensor, about: list[Any]) -> None:
        for pixels, (view, score, refused) in zip(to_pixels(made), about, strict=True):
            verdict = "" if score is None else f"_{'deny' if refused else 'acc'}_{score:.2f}"
            pictures[f"{view:05d}{verdict}.jpg"] = pixels

    views = expected(kind, model, look=look)
    assert torch.equal(images, views.images)
    folder = model / kind / "ours_6" / "virtual_renders"
    assert {path.name for path in folder.iterdir()} == set(pictures)
    if kind == "brisque":
        assert len(pictures) == int((views.attempts + ~views.accepted).sum()) > M
    else:
        assert set(pictures) == {f"{i:05d}.jpg" for i in range(M)}
    for name, pixels in pictures.items():
        Image.fromarray(pixels.numpy()).save(folder.parent / "pillow.jpg", quality=100)
        got, want = (np.asarray(Image.open(path)) for path in (folder / name, folder.parent / "pillow.jpg"))
        assert np.array_equal(got, want)


def test_what_goes_wrong_in_the_process_is_raised_by_the_queue(model, tmp_path):
    renderer = GaussianRenderer(*arguments(tmp_path / "nowhere"))
    renderer.start()
    try:
        with pytest.raises(RuntimeError, match=r"(?s)the renderer's process failed:.*nowhere"):
            renderer.queue.get(timeout=60)
    finally:
        renderer.stop()


@pytest.mark.parametrize(
    ("camera", "K"),
    [
        ({"K": torch.eye(3)[None], "width": 8, "height": 6}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (SimpleNamespace(fx=5.0, fy=6, cx=3, cy=2.5, width=8, height=6), [[5, 0, 3], [0, 6, 2.5], [0, 0, 1]]),
        ([{"FoVx": RIGHT, "FoVy": RIGHT, "image_width": 8, "image_height": 6}], [[4, 0, 4], [0, 3, 3], [0, 0, 1]]),
    ],
)  # fmt: skip
def test_cameras_are_read_as_they_come(camera, K):
    got, height, width = read_camera(camera)
    torch.testing.assert_close(got, torch.tensor(K, dtype=torch.float64))
    assert (height, width) == (6, 8)


def test_what_is_missing_or_wrong_is_named(model):
    with pytest.raises(TypeError, match=r"configs must have rvs_trans \(the range of the moves in metres\)"):
        configs, *rest = arguments(model)
        del configs.rvs_trans
        GaussianRenderer(configs, *rest)
    with pytest.raises(TypeError, match="brisque_threshold"):
        configs, *rest = arguments(model)
        del configs.brisque_threshold
        GaussianRendererWithBrisqueAttempts(configs, *rest)
    GaussianRendererWithAttempts(configs, *rest)
    with pytest.raises(TypeError, match="cam_params must have image_width or width"):
        GaussianRenderer(configs, SimpleNamespace(K=torch.eye(3)), *rest[1:])
    with pytest.raises(ValueError, match=r"hw must be \(height, width\)"):
        GaussianRenderer(configs, rest[0], (1, 2, 3), *rest[2:])
    with pytest.raises(RuntimeError, match="load_gaussians must be called"):
        GaussianRenderer(*arguments(model)).render_set("train")
    renderer = make("plain", model)
    renderer.dl = SimpleNamespace(images=IMAGES)
    with pytest.raises(TypeError, match="dataset must have poses"):
        renderer.render_set("train")


# --- in RAP's modules ------------------------------------------------------------------------------------------------

RAP = """
class GaussianRenderer:
    "theirs"
class GaussianRendererWithAttempts(GaussianRenderer):
    "theirs"
class GaussianRendererWithBrisqueAttempts(GaussianRenderer):
    "theirs"
"""


@pytest.fixture
def rap(monkeypatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    """RAP's module, one that imports it with a star, and one that imports a class by another name."""
    modules = []
    for name, code in (
        ("rap_nvs", RAP),
        ("rap_train", "from rap_nvs import *"),
        ("rap_other", "from rap_nvs import GaussianRendererWithAttempts as Mine"),
    ):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(code, module.__dict__)
        modules.append(module)
    return tuple(modules)


def test_all_three_are_swapped_wherever_they_were_imported(rap):
    nvs, train, other = rap
    theirs = {name: getattr(nvs, name) for name in CLASSES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = install_rvs(nvs)
    for name in CLASSES:
        assert getattr(nvs, name) is getattr(train, name) is made[name]
        assert issubclass(made[name], KINDS[{3: "brisque", 2: "attempts", 1: "plain"}[CLASSES.index(name) + 1]])
    assert other.Mine is made["GaussianRendererWithAttempts"]
    again = install_rvs(nvs, values={"kind": "xz_plane"})
    assert train.GaussianRenderer is again["GaussianRenderer"] is not made["GaussianRenderer"]
    uninstall_rvs(nvs)
    uninstall_rvs(nvs)
    for name in CLASSES:
        assert getattr(nvs, name) is getattr(train, name) is theirs[name]
    assert other.Mine is theirs["GaussianRendererWithAttempts"]
    assert reexported is install_rvs


def test_the_process_renders_set_after_set_by_the_names_and_values_given(rap, model):
    nvs, train, _ = rap
    install_rvs(nvs, names={"translation": "how_far"}, values={"appearance_augmentation": False, "seed": 5})
    configs, *rest = arguments(model, how_far=0.3, epochs=8)
    del configs.rvs_trans
    renderer = train.GaussianRendererWithAttempts(configs, *rest)
    renderer.start()
    try:
        sets = [renderer.queue.get(timeout=60) for _ in range(2)]  # of epochs 4 and 6
        np.random.seed(5)
        for poses, images in sets:
            views = expected("attempts", model, None)
            assert torch.equal(poses, views.poses)
            torch.testing.assert_close(images, views.images, atol=5e-5, rtol=0)  # it has more threads
    finally:
        renderer.stop()
    assert renderer.epoch == 8
    assert not renderer.is_alive()
    del configs.how_far
    with pytest.raises(TypeError, match="configs must have how_far"):
        train.GaussianRendererWithAttempts(configs, *rest)


def test_classes_made_of_raps_own_are_pointed_out(rap):
    nvs, _, _ = rap
    kept = type("Special", (nvs.GaussianRenderer,), {})
    with pytest.warns(RuntimeWarning, match="Special is made of GaussianRenderer as it was"):
        install_rvs(nvs)
    assert not issubclass(kept, GaussianRenderer)


def test_a_wrong_module_or_role_is_named(rap):
    with pytest.raises(TypeError, match="module must be RAP's module of the renderers, got"):
        install_rvs("rap_nvs")
    with pytest.raises(TypeError, match="it has no GaussianRenderer"):
        install_rvs(types)
    with pytest.raises(ValueError, match="values must have keys of model_path, .*, got 'speed'"):
        install_rvs(rap[0], values={"speed": 9})
