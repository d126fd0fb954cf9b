"""EmbeddingScene: a network fed one vector per view, in every precision, against the plain code in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, net_state, slow_color
from network_scenes import (
    CPU32,
    CPU64,
    FAST_FORMS,
    FORMS,
    Form,
    color_net,
    embedding_scene,
    make_appearance,
    psnr,
)
from scenes import assert_close_outside_band, assert_same
from torch import Tensor

from rapfast import PostProcess, Scene, rasterization
from rapfast.appearance import ColorNet, EmbeddingScene

N, C = 120, 4
APPEARANCE = make_appearance(N, C)
WEIGHTS = [0.3, 1.7, 0.0, 1.0]
LENGTHS = [1, 24, 32, 48, 100]


pytestmark = pytest.mark.usefixtures("one_thread")


def widths(length: int) -> dict[str, tuple[int, ...]]:
    return {"encoder": (111 + length, 96, 48), "decoder": (96, 64, 40), "color_decoder": (43, 32, 3)}


def embeddings_of(length: int) -> Tensor:
    return torch.randn(C, length, generator=torch.Generator().manual_seed(length)).double()


def made(form: Form, length: int = 32) -> EmbeddingScene:
    return embedding_scene(APPEARANCE, color_net(form, widths(length)), form)


def render(scene: EmbeddingScene, form: Form, views: list[int] | None = None, **changes: Any):
    views = list(range(C)) if views is None else views
    arguments: dict[str, Any] = {
        "viewmats": APPEARANCE.viewmats[views],
        "Ks": APPEARANCE.Ks[views],
        "embeddings": embeddings_of(scene.color_net.n_appearance)[views],
        "view_weights": [WEIGHTS[c] for c in views],
    }
    if changes.get("backend", "rapfast") == "rapfast":
        arguments["precision"] = form.precision
    arguments |= changes
    for name in ("viewmats", "Ks", "embeddings", "backgrounds"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].to(form.device, form.dtype)
    return scene.render(width=WIDTH, height=HEIGHT, **arguments)


def assert_pictures(got: Tensor, references: list[Tensor], form: Form) -> None:
    single, exact = references
    got = got.cpu()
    if form.half:
        assert psnr(got, exact) >= 45
    elif form.dtype == torch.float64:
        assert float((got - exact).abs().max()) <= 1e-10
    else:
        assert_close_outside_band(got, single, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_pictures_equal_the_reference(length, form):
    backgrounds = torch.rand(C, 3, dtype=torch.float64)
    references = [
        render(made(f, length), f, backgrounds=backgrounds, backend="reference")[0] for f in (CPU32, CPU64)
    ]  # fmt: skip
    got, alphas, meta = render(made(form, length), form, backgrounds=backgrounds)
    assert 0.1 < float(references[1].std()) < 2
    assert_pictures(got, references, form)
    assert alphas.shape == (C, HEIGHT, WIDTH, 1) and meta["n_cameras"] == C
    wrong = render(made(form, length), form, backgrounds=backgrounds, view_weights=[WEIGHTS[0]] * C)[0]
    with pytest.raises(AssertionError):
        assert_pictures(wrong, references, form)


def test_pictures_of_a_slow_reading():
    """The formulas in Python's floats for every Gaussian of one view, drawn by the float64 reference."""
    a, net = APPEARANCE, color_net(CPU64, widths(5))
    vector = embeddings_of(5)[1]
    state = net.state_dict()
    rows = [slow_color(state, a, 0, 1, WEIGHTS[1], n, vector.tolist()) for n in range(N)]
    colors = torch.tensor([rows], dtype=torch.float64)
    want = rasterization(
        a.means, a.quats, a.scales, a.opacities, colors, a.viewmats[1:2], a.Ks[1:2], WIDTH, HEIGHT,
        rasterize_mode="antialiased", backend="reference",
    )[0]  # fmt: skip
    for backend in ("rapfast", "reference"):
        assert float((render(made(CPU64, 5), CPU64, [1], backend=backend)[0] - want).abs().max()) < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("render_mode", ["D", "ED", "RGB+D", "RGB+ED"])
def test_depth_and_postprocess(render_mode, form):
    post = PostProcess(size=(20, 30), layout="HWC")
    options = {"render_mode": render_mode, "postprocess": post}
    references = [render(made(f), f, backend="reference", **options)[0] for f in (CPU32, CPU64)]
    got = render(made(form), form, **options)[0]
    assert got.shape == references[1].shape
    assert_pictures(got[..., -1:], [r[..., -1:] for r in references], form._replace(half=False))
    if render_mode.startswith("RGB"):
        assert_pictures(got[..., :3], [r[..., :3] for r in references], form)


@pytest.mark.parametrize("form", FORMS)
def test_networks_without_a_position_or_without_an_embedding(form):
    cases = {
        "no position": ({"encoder": (80, 64, 48), "decoder": (96, 48), "color_decoder": (51, 16, 3)}, None, 32),
        "no embedding": ({"encoder": (111, 64, 48), "decoder": (96, 48), "color_decoder": (51, 16, 3)}, 10, 0),
        "few frequencies": ({"encoder": (77, 64, 48), "decoder": (96, 48), "color_decoder": (51, 16, 3)}, 4, 2),
    }
    for shapes, n_frequencies, length in cases.values():
        pictures = []
        for f, backend in ((CPU32, "reference"), (CPU64, "reference"), (form, "rapfast")):
            net = color_net(f, shapes, n_frequencies=n_frequencies)
            assert net.n_appearance == length
            pictures.append(render(embedding_scene(APPEARANCE, net, f), f, backend=backend)[0])
        assert_pictures(pictures[2], pictures[:2], form)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_a_view_in_a_batch_is_the_view_alone(form):
    scene = made(form)
    together = render(scene, form)[0]
    for c in range(C):
        assert_same(render(scene, form, [c])[0][0], together[c])
    order = [3, 0, 0, 2, 1]
    assert_same(render(scene, form, order)[0], together[order])


@pytest.mark.parametrize("form", FAST_FORMS)
def test_weights_scale_the_embedding(form):
    scene = made(form)
    zero = render(scene, form, view_weights=0.0)[0]
    assert_same(render(scene, form, view_weights=0.0, embeddings=embeddings_of(32).flip(0) * 9)[0], zero)
    assert_same(render(scene, form, embeddings=torch.zeros(C, 32))[0], zero)
    # Powers of two round nothing.
    doubled = render(scene, form, view_weights=[2 * w for w in WEIGHTS])[0]
    assert_same(render(scene, form, embeddings=2 * embeddings_of(32))[0], doubled)
    assert_same(render(scene, form, view_weights=None)[0], render(scene, form, view_weights=1.0)[0])
    assert_same(render(scene, form, view_weights=torch.tensor(WEIGHTS))[0], render(scene, form)[0])
    swapped = render(scene, form, embeddings=embeddings_of(32).flip(0), view_weights=1.0)[0]
    assert float((swapped - render(scene, form, view_weights=1.0)[0]).abs().max()) > 0.05


@pytest.mark.parametrize("form", FAST_FORMS)
def test_embeddings_in_any_memory(form):
    """Sliced and expanded ones, and a row that is not finite."""
    scene, embeddings = made(form), embeddings_of(32).to(form.device, form.dtype)
    want = render(scene, form)[0]
    room = torch.full((2 * C, 40), math.nan, device=form.device, dtype=form.dtype)
    room[::2, 3:35] = embeddings
    assert_same(render(scene, form, embeddings=room[::2, 3:35])[0], want)
    assert_same(render(scene, form, embeddings=embeddings.T.contiguous().T)[0], want)
    one = render(scene, form, embeddings=embeddings[:1].expand(C, 32))[0]
    assert_same(one, render(scene, form, embeddings=embeddings[:1].repeat(C, 1))[0])
    broken = embeddings.clone()
    broken[1, 4] = math.nan
    got, alphas, meta = render(scene, form, embeddings=broken)
    assert_same(got[[0, 2, 3]], want[[0, 2, 3]])
    assert not alphas[1].any() and not got[1].any()
    n_invalid = meta["n_invalid"].tolist()
    assert n_invalid[1] > 10 and n_invalid[:1] + n_invalid[2:] == [0, 0, 0]


@pytest.mark.parametrize("form", FAST_FORMS)
def test_a_changed_network_is_seen_and_a_copy_keeps_its_own(form):
    scene = made(form)
    before = render(scene, form)[0]
    copy = scene.to(form.device)
    with torch.no_grad():
        scene.color_net.decoder.lin0.bias += 0.5
    assert float((render(scene, form)[0] - before).abs().max()) > 0.01
    assert_same(render(copy, form)[0], before)
    assert len(scene) == N
    prepared = scene.prepare(form.precision)
    assert prepared is scene.prepare(form.precision) and prepared.network.half == form.half
    assert prepared.n_bytes > N * (96 + 64) * (2 if form.half else 4)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"embeddings": torch.zeros(C, 31)},
            ValueError,
            r"embeddings must be float32 \[4, 32\] on cpu \(as the scene\)",
        ),
        ({"embeddings": torch.zeros(C - 1, 32)}, ValueError, r"embeddings must be float32 \[4, 32\]"),
        ({"embeddings": torch.zeros(32)}, ValueError, r"embeddings must be float32 \[4, 32\].*got float32 \[32\]"),
        ({"embeddings": None}, TypeError, "embeddings must be"),
        ({"view_weights": [1.0]}, ValueError, "one number for each of 4 views, got 1"),
        ({"view_weights": [1, 1, math.nan, 1]}, ValueError, "view_weights"),
        ({"view_weights": math.inf}, ValueError, "view_weights must be finite"),
        ({"backend": "vulkan"}, ValueError, "backend must be one of"),
        ({"precision": "fp16"}, NotImplementedError, 'precision must be "fp32" or None on cpu'),
        ({"precision": "fp32", "backend": "reference"}, NotImplementedError, "is not supported by backend"),
        ({"render_mode": "RGBD"}, ValueError, "render_mode must be one of"),
        ({"rasterize_mode": "sharp"}, ValueError, "rasterize_mode must be one of"),
        ({"Ks": torch.eye(3)[None]}, ValueError, r"Ks must be float32 \[4, 3, 3\]"),
        ({"eps2d": -1.0}, ValueError, "eps2d must be"),
    ],
)
def test_bad_arguments_are_sentences(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        render(made(CPU32), CPU32, **changes)


@pytest.mark.parametrize("form", FORMS)
def test_no_cameras(form):
    images, alphas, _ = render(made(form), form, [])
    assert images.shape == (0, HEIGHT, WIDTH, 3) and alphas.shape == (0, HEIGHT, WIDTH, 1)


def test_parts_that_do_not_fit():
    a = APPEARANCE
    scene = Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=a.intrinsic)
    with pytest.raises(ValueError, match="scene must have intrinsic features"):
        EmbeddingScene(Scene(a.means, a.quats, a.scales, a.opacities), color_net(CPU64, widths(32)))
    with pytest.raises(ValueError, match=r"color_net must be torch.float64 on cpu \(as the scene\)"):
        EmbeddingScene(scene, color_net(CPU32, widths(32)))
    narrow = net_state({"encoder": (100, 48), "decoder": (60, 48), "color_decoder": (51, 3)})
    with pytest.raises(ValueError, match="48 intrinsic features, got 12"):
        EmbeddingScene(scene, ColorNet.from_state_dict(narrow))
    four = net_state({"encoder": (159, 48), "decoder": (96, 48), "color_decoder": (51, 4)})
    with pytest.raises(ValueError, match="a colour head with 3 outputs"):
        EmbeddingScene(scene, ColorNet.from_state_dict(four))
    headless = net_state({"encoder": (159, 48), "decoder": (96, 48)})
    with pytest.raises(ValueError, match="a colour head with 3 outputs"):
        EmbeddingScene(scene, ColorNet.from_state_dict(headless))
