"""RAP's calls: its cameras in, its dictionaries out, against RapScene.render and colours made slowly."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state, slow_color, slow_projection, slow_sh
from scenes import assert_same
from torch import Tensor

from rapfast import Cameras, Scene, rasterization
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.appearance.rap_calls import render, render_batch

C, N = 4, 70
A = make_appearance(n=N, c=C, n_maps=2)
STATE = net_state()
WEIGHTS = [0.3, 1.7, 0.0, 1.0]
MAP_IDS = [1, 0, 0, 1]
PIPE = SimpleNamespace(debug=True, compute_cov3D_python=False, convert_SHs_python=False)
IMAGE = torch.zeros(3, 40, 40)
BACKGROUND = torch.tensor([0.2, 0.5, 0.9])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def map_net() -> FeatureMapNet:
    torch.manual_seed(0)
    return FeatureMapNet().eval().requires_grad_(False)


@pytest.fixture
def rap(map_net) -> RapScene:
    """float64, so that slow formulas can be compared; the feature-map network stays float32."""
    scene = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=A.intrinsic)
    return RapScene(scene, A.box_coord, map_net, ColorNet.from_state_dict(STATE))


def camera(view: int, width: int = WIDTH, height: int = HEIGHT, **changes: Any) -> SimpleNamespace:
    """As RAP has it: the matrix transposed, intrinsics as K."""
    attributes = {
        "world_view_transform": A.viewmats[view].T,
        "K": A.Ks[view],
        "image_width": width,
        "image_height": height,
        "colornet_inter_weight": WEIGHTS[view],
    }
    return SimpleNamespace(**(attributes | changes))


CAMERAS = [camera(view) for view in range(C)]


def batch(rap: RapScene, cameras: Any = CAMERAS, **changes: Any) -> list[dict[str, Any]]:
    arguments = {"feature_maps": A.maps, "map_ids": MAP_IDS[: len(cameras)]} | changes
    return render_batch(rap, cameras, PIPE, BACKGROUND, **arguments)


def single(rap: RapScene, view: int, *args: Any, **changes: Any) -> dict[str, Any]:
    arguments = {"feature_map": A.maps[MAP_IDS[view]]} | changes
    return render(rap, CAMERAS[view], PIPE, BACKGROUND, *args, **arguments)


def draw(colors: Tensor, view: int, **changes: Any) -> Tensor:
    """[3, H, W] of given colours by the float64 reference."""
    arguments = {
        "means": A.means,
        "quats": A.quats,
        "scales": A.scales,
        "opacities": A.opacities,
        "colors": colors,
        "viewmats": A.viewmats[view][None],
        "Ks": A.Ks[view][None],
        "width": WIDTH,
        "height": HEIGHT,
        "backgrounds": BACKGROUND.double()[None],
        "rasterize_mode": "antialiased",
    }
    return rasterization(**(arguments | changes), backend="reference")[0][0].permute(2, 0, 1)


def colors_of(view: int, weight: float) -> Tensor:
    return torch.tensor([slow_color(STATE, A, MAP_IDS[view], view, weight, n) for n in range(N)], dtype=torch.float64)


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def slow_colors() -> list[Tensor]:
    return [colors_of(view, WEIGHTS[view]) for view in range(C)]


def test_pictures_are_the_contracts(rap, slow_colors):
    results = batch(rap)
    assert len(results) == C
    for view, result in enumerate(results):
        assert list(result) == ["render", "viewspace_points", "visibility_filter", "radii", "depth"]
        assert result["render"].shape == (3, HEIGHT, WIDTH)
        assert result["depth"] is None
        assert furthest(result["render"], draw(slow_colors[view], view)) < 1e-10


def test_entries_of_the_gaussians(rap):
    """Per view those of gsplat's meta, which the renderer's own tests hold to gsplat."""
    arguments = {"feature_maps": A.maps, "map_ids": MAP_IDS, "view_weights": WEIGHTS, "packed": False}
    meta = rap.render(A.viewmats, A.Ks, WIDTH, HEIGHT, **arguments)[2]
    for view, result in enumerate(batch(rap)):
        radii = meta["radii"][view].max(-1).values
        assert result["radii"].dtype == torch.int32
        assert_same(result["radii"], radii)
        assert_same(result["visibility_filter"], radii > 0)
        assert_same(result["viewspace_points"], meta["means2d"][view])
        assert 0 < int(result["visibility_filter"].sum()) < N
        assert {**result}["radii"].shape == (N,), "a copy of the dictionary has the entries, too"


def test_a_batch_is_the_loop_bit_by_bit(rap):
    rap = rap.to(torch.float32)
    maps = A.maps.float()
    together = batch(rap, feature_maps=maps, with_depth=True)
    for view in range(C):
        alone = single(rap, view, feature_map=maps[MAP_IDS[view]], with_depth=True)
        for name in ("render", "viewspace_points", "visibility_filter", "radii", "depth"):
            assert_same(alone[name], together[view][name])


def test_every_view_has_its_own_weight(rap):
    right = batch(rap)
    wrong = batch(rap, view_weights=WEIGHTS[0])  # the seeds' error
    assert_same(wrong[0]["render"], right[0]["render"])
    for view in range(1, C):
        assert furthest(wrong[view]["render"], right[view]["render"]) > 1e-2
    for weights in (WEIGHTS, torch.tensor(WEIGHTS)):
        got = batch(rap, [camera(view, colornet_inter_weight=9.0) for view in range(C)], view_weights=weights)
        for view in range(C):
            assert furthest(got[view]["render"], right[view]["render"]) < 1e-6


def test_where_a_weight_is_found(rap):
    bare = camera(1)
    del bare.colornet_inter_weight
    maps = {"feature_maps": A.maps[:1], "map_ids": None}

    def picture(cameras: list[Any], **changes: Any) -> Tensor:
        return batch(rap, cameras, **maps, **changes)[0]["render"]

    assert_same(picture([bare]), picture([bare], view_weights=1.0))
    rap.colornet_inter_weight = 0.5
    assert_same(picture([bare]), picture([bare], view_weights=0.5))
    assert_same(picture([camera(1)]), picture([bare], view_weights=[WEIGHTS[1]]))
    assert furthest(picture([camera(1)]), picture([bare])) > 1e-2


def test_mixed_sizes_in_the_callers_order(rap):
    sizes = [(WIDTH, HEIGHT), (40, 30), (WIDTH, HEIGHT), (40, 30)]
    calls = []

    class Counted(RapScene):
        def render(self, viewmats, *args, **kwargs):
            calls.append(len(viewmats))
            return super().render(viewmats, *args, **kwargs)

    counted = Counted(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net)
    cameras = [camera(view, *size) for view, size in enumerate(sizes)]
    results = batch(counted, cameras)
    assert calls == [2, 2], "one call for each size"
    for view, (width, height) in enumerate(sizes):
        assert results[view]["render"].shape == (3, height, width)
        alone = render(rap, cameras[view], PIPE, BACKGROUND, feature_map=A.maps[MAP_IDS[view]])
        assert_same(results[view]["render"], alone["render"])
        assert_same(results[view]["radii"], alone["radii"])


def test_no_cameras(rap):
    assert batch(rap, []) == []
    for maps in ([], A.maps[:0], A.maps):
        assert batch(rap, [], feature_maps=maps) == []
    assert batch(rap, [], feature_maps=None, images=[IMAGE]) == []


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"precision": "banana"}, ValueError, "precision must be one of 'fp16', 'fp32', None, got 'banana'"),
        ({"backend": "x"}, ValueError, "backend must be one of 'rapfast', .*, got 'x'"),
        ({"rap_compatible": 1}, TypeError, "rap_compatible must be True or False"),
        ({"feature_maps": "banana"}, TypeError, "feature_maps must be a tensor .* got str 'banana'"),
        ({"feature_maps": torch.tensor(1.0)}, ValueError, "feature_maps must be floating point"),
        ({"feature_maps": [IMAGE]}, ValueError, r"feature_maps\[0\] must be floating point \[48, h, w\]"),
        ({"feature_maps": None, "images": "x"}, TypeError, "images must be a tensor or a sequence of tensors"),
        ({"images": [IMAGE]}, ValueError, r"images \(image\) must be None where feature_maps"),
    ],
)
def test_bad_arguments_without_cameras(rap, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        batch(rap, [], **changes)


def test_options_are_checked_where_no_network_runs(rap):
    single(rap, 0, store_cache=True)
    given = {"override_colors": torch.rand(N, 3, dtype=torch.float64), "feature_map": None}
    for changes in (given, {"use_cache": True, "scaling_modifier": 1.1, "feature_map": None}):
        single(rap, 0, **changes)
        with pytest.raises(ValueError, match="precision must be one of 'fp16', 'fp32', None, got 'banana'"):
            single(rap, 0, precision="banana", **changes)
        with pytest.raises(NotImplementedError, match='precision must be "fp32" or None on cpu, got "fp16"'):
            single(rap, 0, precision="fp16", **changes)
        with pytest.raises(NotImplementedError, match="precision='fp32' is not supported by backend=\"reference\""):
            single(rap, 0, precision="fp32", backend="reference", **changes)
        with pytest.raises(ValueError, match="backend must be one of"):
            single(rap, 0, backend="x", **changes)


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
def test_autocast_changes_nothing(rap, backend):
    rap = rap.to(torch.float32)
    image = torch.rand(3, 33, 36)
    calls = [
        {},
        {"scaling_modifier": 1.1},
        {"other_viewpoint_camera": CAMERAS[2]},
        {"means_transform": torch.eye(3, 4) * 1.1},
        {"store_cache": True},
        {"use_cache": True, "image": None},
        {"use_cache": True, "image": None, "scaling_modifier": 1.1},
    ]
    for changes in calls:
        arguments = {"feature_map": None, "image": image, "backend": backend} | changes
        want = single(rap, 1, **arguments)["render"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = single(rap, 1, **arguments)["render"]
        assert_same(got, want)
    want = batch(rap, feature_maps=None, images=[image], map_ids=None, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = batch(rap, feature_maps=None, images=[image], map_ids=None, backend=backend)
    assert_same(got[2]["render"], want[2]["render"])


def test_each_image_is_run_through_the_network_once(rap):
    seen = []

    class Counted(RapScene):
        def feature_maps(self, images):
            seen.append(len(images))
            return super().feature_maps(images)

    counted = Counted(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net)
    images = [torch.rand(3, 33, 36), torch.rand(3, 33, 36) ** 2]
    cameras = [camera(view, original_image=images[MAP_IDS[view]]) for view in range(C)]
    results = render_batch(counted, cameras, PIPE, BACKGROUND)
    assert seen == [2]
    maps = rap.feature_maps(images)
    for view, result in enumerate(results):
        assert_same(result["render"], single(rap, view, feature_map=maps[MAP_IDS[view]])["render"])
    shared = render_batch(counted, CAMERAS, PIPE, BACKGROUND, images=torch.stack(images), map_ids=MAP_IDS)
    assert_same(shared[2]["render"], results[2]["render"])
    assert_same(single(rap, 1, feature_map=None, image=images[MAP_IDS[1]])["render"], results[1]["render"])
    small = [images[0], torch.rand(3, 40, 33)]
    mixed = render_batch(counted, CAMERAS[:2], PIPE, BACKGROUND, images=small)
    assert_same(mixed[0]["render"], single(rap, 0, feature_map=maps[0])["render"])
    assert seen == [2, 2, 2]


def test_full_precision_is_that_of_the_feature_maps_too(rap):
    asked = []

    class Watched(FeatureMapNet):
        def feature_maps(self, images, *, precision=None):
            asked.append(precision)
            return super().feature_maps(images, precision=precision)

    net = Watched()
    net.load_state_dict(rap.feature_map_net.state_dict())
    scene = RapScene(rap.scene, rap.box_coord, net.requires_grad_(False), rap.color_net).to(torch.float32)
    images = [torch.rand(3, 33, 36)]
    default = render_batch(scene, CAMERAS, PIPE, BACKGROUND, images=images)
    strict = render_batch(scene, CAMERAS, PIPE, BACKGROUND, images=images, precision="fp32")
    assert asked == [None, "fp32"]
    assert_same(strict[1]["render"], default[1]["render"])  # on the CPU they are the same
    one = render(scene, CAMERAS[1], PIPE, BACKGROUND, image=images[0], precision="fp32")
    assert_same(one["render"], strict[1]["render"])
    with pytest.raises(NotImplementedError, match='precision must be "fp32" or None on cpu, got "fp16"'):
        render_batch(scene, CAMERAS, PIPE, BACKGROUND, images=images, precision="fp16")


def test_an_image_met_twice_in_other_memory_is_another_image(rap):
    """Views of one tensor that begin at the same place but differ in shape must not be taken for one another."""
    strip = torch.rand(3, 33, 72)
    wide, narrow = strip, strip[:, :, :36]
    assert wide.data_ptr() == narrow.data_ptr()
    results = render_batch(rap, CAMERAS[:2], PIPE, BACKGROUND, images=[wide, narrow])
    maps = rap.feature_maps([wide, narrow])
    for view in range(2):
        assert_same(results[view]["render"], single(rap, view, feature_map=maps[view])["render"])


def test_rapfasts_own_cameras(rap):
    cameras = Cameras(A.viewmats.float(), A.Ks.float(), WIDTH, HEIGHT)
    want = batch(rap, view_weights=1.0)
    assert_same(torch.stack([r["render"] for r in batch(rap, cameras)]), torch.stack([r["render"] for r in want]))
    mixed = batch(rap, [cameras[[0, 1]], camera(2), cameras[3]], view_weights=1.0, map_ids=MAP_IDS)
    assert_same(mixed[3]["render"], want[3]["render"])
    assert_same(mixed[2]["render"], want[2]["render"])
    one = render(rap, cameras[1], PIPE, BACKGROUND, feature_map=A.maps[MAP_IDS[1]])
    assert_same(one["render"], want[1]["render"])


def test_gradients_of_rapfasts_own_cameras(rap):
    """They flow to the poses, by every call and backend."""
    viewmats = A.viewmats.clone().requires_grad_()
    Ks = A.Ks.clone().requires_grad_()
    posed = Cameras(viewmats, Ks, WIDTH, HEIGHT)
    colors = rap.render(
        viewmats, Ks, WIDTH, HEIGHT, feature_maps=A.maps, map_ids=MAP_IDS,
        backgrounds=BACKGROUND.double().expand(C, 3), backend="reference",
    )[0]  # fmt: skip
    wanted = torch.autograd.grad(colors.square().sum(), (viewmats, Ks))
    assert all(want.abs().amax((1, 2)).min() > 1 for want in wanted)
    for backend in ("reference", "rapfast"):
        results = batch(rap, posed, view_weights=1.0, backend=backend)
        singles = [render(rap, posed[i], PIPE, BACKGROUND, feature_map=A.maps[MAP_IDS[i]]) for i in range(C)]
        for drawn in (results, singles):
            got = torch.autograd.grad(sum(result["render"].square().sum() for result in drawn), (viewmats, Ks))
            for gradient, want in zip(got, wanted, strict=True):
                assert float((gradient - want).abs().max() / want.abs().max()) < 1e-10
    with torch.no_grad():
        assert not batch(rap, posed)[0]["render"].requires_grad


TRANSFORM = torch.tensor([[1.0, 0.02, 0.0, 0.05], [-0.02, 1.0, 0.01, 0.0], [0.0, -0.01, 0.98, -0.03]]).double()


@pytest.mark.parametrize("harmonics", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        "plain",
        "deblurring",
        "another camera",
        "scales",
        "given colours",
        "stored",
        "stored and moved",
        "cached",
        "cached and moved",
    ],
)
def test_gradients_of_every_call_are_those_of_plain_torch(rap, call, harmonics):
    """RAP's arguments with a graph behind the picture: to all that was given, and to viewspace_points."""
    results = []
    for backend in ("reference", "rapfast"):
        geometry = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=A.intrinsic)
        scene = RapScene(
            geometry, A.box_coord, rap.feature_map_net, rap.color_net, {"use_colors_precomp": not harmonics}
        )
        leaves = {name: getattr(scene.scene, name).clone() for name in ("means", "quats", "opacities", "intrinsic")}
        leaves |= {"viewmat": A.viewmats[1].clone(), "other": A.viewmats[2].clone(), "map": A.maps[0].clone(),
                   "transform": TRANSFORM.clone(), "weight": torch.tensor(1.4, dtype=torch.float64),
                   "colors": torch.rand(N, 3, generator=torch.Generator().manual_seed(3)).double()}  # fmt: skip
        for name, x in leaves.items():
            x.requires_grad_()
            if hasattr(scene.scene, name):
                setattr(scene.scene, name, x)
        cameras = {name: Cameras(leaves[name][None], A.Ks[:1], WIDTH, HEIGHT) for name in ("viewmat", "other")}
        fed = {"feature_map": leaves["map"], "view_weight": leaves["weight"]}
        options = {
            "plain": fed,
            "deblurring": fed | {"means_transform": leaves["transform"]},
            "another camera": fed | {"other_viewpoint_camera": cameras["other"], "with_depth": True},
            "scales": fed | {"scaling_modifier": 1.3},
            "given colours": {"override_colors": leaves["colors"], "with_depth": True},
            "stored": fed | {"store_cache": True},
            "stored and moved": fed | {"store_cache": True, "means_transform": leaves["transform"]},
            "cached": {"use_cache": True},
            "cached and moved": {"use_cache": True, "means_transform": leaves["transform"]},
        }[call]
        if "use_cache" in options:
            render(scene, cameras["other"], PIPE, BACKGROUND, **fed, store_cache=True, backend=backend)
        result = render(scene, cameras["viewmat"], PIPE, BACKGROUND, **options, backend=backend)
        loss = result["render"].square().sum()
        if "with_depth" in options:
            loss = loss + result["depth"].sum()
        names = list(leaves)
        watched = [leaves[name] for name in names]
        if backend == "rapfast":
            loss.backward(retain_graph=True)
            points = result["viewspace_points"]
            assert points.shape == points.grad.shape == (N, 2)
            assert points.grad[~result["visibility_filter"]].count_nonzero() == 0
            assert points.grad[result["visibility_filter"]].any()
            with torch.no_grad():
                without = render(scene, cameras["viewmat"], PIPE, BACKGROUND, **options)
            assert furthest(result["render"].detach(), without["render"]) < 1e-11
        found = torch.autograd.grad(loss, watched, allow_unused=True)
        results.append({name: x for name, x in zip(names, found, strict=True) if x is not None and x.any()})
    want, got = results
    assert got.keys() == want.keys()
    assert ("transform" in want) == ("means_transform" in options)
    assert ("weight" in want) == ("intrinsic" in want) == (call != "given colours")
    for name, gradient in want.items():
        assert float((got[name] - gradient).abs().max() / gradient.abs().max()) < 1e-9, name


def test_viewspace_points_have_the_gradient_by_pixels(rap):
    """Each view's own, as the whole call's means2d has it."""
    rap.scene.means = rap.scene.means.clone().requires_grad_()
    results = batch(rap, view_weights=1.0)
    sum(result["render"].square().sum() for result in results).backward()
    colors, _, meta = rap.render(
        A.viewmats, A.Ks, WIDTH, HEIGHT, feature_maps=A.maps, map_ids=MAP_IDS, packed=False,
        backgrounds=BACKGROUND.double().expand(C, 3),
    )  # fmt: skip
    meta["means2d"].retain_grad()
    colors.square().sum().backward()
    for view, result in enumerate(results):
        want = meta["means2d"].grad[view]
        assert want.any()
        assert float((result["viewspace_points"].grad - want).abs().max() / want.abs().max()) < 1e-12


def test_a_weight_that_is_trained(rap):
    """On the scene or a camera, as RAP names it."""
    own = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    its = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    rap.colornet_inter_weight = own
    cameras = [camera(i, colornet_inter_weight=w) for i, w in enumerate((None, its, 0.5, None))]
    results = batch(rap, cameras)
    want = batch(rap, view_weights=[0.7, 1.3, 0.5, 0.7])
    for x, y in zip(results, want, strict=True):
        assert float((x["render"] - y["render"]).detach().abs().max()) < 1e-12
    results[1]["render"].sum().backward(retain_graph=True)
    assert its.grad.any() and not own.grad.any()
    results[0]["render"].sum().backward()
    assert own.grad.any()


def test_a_cache_that_would_cut_off_a_gradient(rap):
    with torch.no_grad():
        render(rap, camera(0), PIPE, BACKGROUND, feature_map=A.maps[0], store_cache=True)
    viewmats = A.viewmats[1:2].clone().requires_grad_()
    posed = Cameras(viewmats, A.Ks[1:2], WIDTH, HEIGHT)
    render(rap, posed, PIPE, BACKGROUND, use_cache=True)["render"].sum().backward()
    assert viewmats.grad.any(), "a pose, of which the cache was not made"
    rap.color_net.encoder.requires_grad_()
    with pytest.raises(RuntimeError, match="takes a cache that was stored in one"):
        render(rap, posed, PIPE, BACKGROUND, use_cache=True)


def test_fields_of_view_in_place_of_K(rap):
    K = torch.tensor([[60.0, 0, WIDTH / 2], [0, 50.0, HEIGHT / 2], [0, 0, 1]], dtype=torch.float64)
    angles = {"FoVx": 2 * math.atan(WIDTH / 120), "FoVy": 2 * math.atan(HEIGHT / 100)}
    want = batch(rap, [camera(0, K=K)])[0]["render"]
    assert furthest(batch(rap, [camera(0, K=None, **angles)])[0]["render"], want) < 1e-12
    assert_same(batch(rap, [camera(0, K=lambda: K)])[0]["render"], want)


def test_matrices_in_either_layout(rap):
    want = batch(rap)[0]["render"]
    plain = camera(0, world_view_transform=A.viewmats[0])
    assert_same(batch(rap, [plain])[0]["render"], want)
    assert_same(batch(rap, [plain], viewmat_layout="plain")[0]["render"], want)
    turned = A.viewmats[0].clone()
    turned[:3, 3] = 0.0
    ambiguous = camera(0, world_view_transform=turned.T)
    with pytest.raises(ValueError, match=r"cameras\[0\].world_view_transform has no translation .* viewmat_layout"):
        batch(rap, [ambiguous])
    want = batch(rap, [ambiguous], viewmat_layout="transposed")[0]["render"]
    assert furthest(want, batch(rap, [ambiguous], viewmat_layout="plain")[0]["render"]) > 1e-2
    assert_same(batch(rap, [ambiguous, CAMERAS[1]])[0]["render"], want)
    upright = camera(0, world_view_transform=torch.eye(4))
    assert batch(rap, [upright])[0]["render"].isfinite().all()


def test_depth_is_not_divided_by_alpha(rap, slow_colors):
    arguments = A.means, A.quats, A.scales, A.opacities, slow_colors[0], A.viewmats[:1], A.Ks[:1], WIDTH, HEIGHT
    options = {"rasterize_mode": "antialiased", "backend": "reference"}
    want = rasterization(*arguments, **options, render_mode="RGB+D")[0][0, ..., 3]
    expected = rasterization(*arguments, **options, render_mode="RGB+ED")[0][0, ..., 3]
    result = single(rap, 0, with_depth=True)
    assert result["depth"].shape == (1, HEIGHT, WIDTH)
    assert furthest(result["depth"][0], want) < 1e-10
    assert furthest(want, expected) > 0.1
    assert_same(result["render"], single(rap, 0)["render"])


def test_another_cameras_rasterization(rap, slow_colors):
    """The first camera's colours, its direction and projection included, as the second sees them."""
    other = camera(2, 40, 30, world_view_transform=A.viewmats[2])
    result = single(rap, 1, other_viewpoint_camera=other)
    want = draw(slow_colors[1], 2, width=40, height=30)
    assert result["render"].shape == (3, 30, 40)
    assert furthest(result["render"], want) < 1e-10
    assert furthest(draw(slow_colors[2], 2, width=40, height=30), want) > 1e-2
    assert furthest(single(rap, 1, other_viewpoint_camera=CAMERAS[1])["render"], single(rap, 1)["render"]) < 1e-10


def test_another_cameras_rasterization_of_harmonics(rap):
    state = {name: value for name, value in STATE.items() if not name.startswith("color_")}
    scene = RapScene(
        rap.scene, rap.box_coord, rap.feature_map_net, ColorNet.from_state_dict(state), {"use_colors_precomp": False}
    )
    rows = [slow_sh(state, A, MAP_IDS[1], 1, WEIGHTS[1], n) for n in range(N)]
    coefficients = torch.tensor(rows, dtype=torch.float64).reshape(N, 16, 3)
    got = single(scene, 1, other_viewpoint_camera=CAMERAS[2])["render"]
    assert furthest(got, draw(coefficients, 2, sh_degree=3)) < 1e-10


def test_caches(rap):
    plain = single(rap, 1)["render"]
    stored = single(rap, 1, store_cache=True)["render"]
    assert furthest(stored, plain) < 1e-10
    assert_same(rap.decoded_cache, rap.decode(A.viewmats[1], A.Ks[1], A.maps[MAP_IDS[1]], WEIGHTS[1]))
    want = rap.render(A.viewmats[2:3], A.Ks[2:3], WIDTH, HEIGHT, decoded=rap.decoded_cache,
                      backgrounds=BACKGROUND.double()[None])[0][0]  # fmt: skip
    cached = single(rap, 2, use_cache=True, feature_map=None)["render"]
    assert_same(cached, want.permute(2, 0, 1))
    assert furthest(cached, single(rap, 2)["render"]) > 1e-2, "its own appearance is another"
    # With another camera the directions are the first's.
    seen = single(rap, 1, use_cache=True, feature_map=None, other_viewpoint_camera=CAMERAS[2])["render"]
    assert furthest(seen, single(rap, 1, other_viewpoint_camera=CAMERAS[2])["render"]) < 1e-10
    assert furthest(seen, cached) > 1e-3
    single(rap, 0, store_cache=True)
    assert furthest(single(rap, 2, use_cache=True, feature_map=None)["render"], cached) > 1e-2


def test_use_cache_needs_one(rap):
    with pytest.raises(RuntimeError, match="use_cache needs the cache of a call with store_cache=True"):
        single(rap, 1, use_cache=True, feature_map=None)
    rap.decoded_cache = torch.zeros(N, 48)
    with pytest.raises(TypeError, match=r"decoded_cache must be float64 \[70, 48\] on cpu \(as the scene\)"):
        single(rap, 1, use_cache=True, feature_map=None)


def test_scales_colours_and_means_given(rap, slow_colors):
    bigger = single(rap, 0, 1.5)["render"]
    assert furthest(bigger, draw(slow_colors[0], 0, scales=A.scales * 1.5)) < 1e-10
    given = torch.rand(N, 3, dtype=torch.float64)
    got = render(rap, CAMERAS[0], PIPE, BACKGROUND, override_colors=given)["render"]
    assert furthest(got, draw(given, 0)) < 1e-10
    transform = torch.eye(3, 4, dtype=torch.float64) + 0.05 * torch.randn(3, 4, dtype=torch.float64)
    moved = A.means @ transform[:, :3].T + transform[:, 3]
    got = single(rap, 0, means_transform=transform)["render"]
    assert furthest(got, draw(slow_colors[0], 0, means=moved)) < 1e-10
    assert furthest(got, single(rap, 0)["render"]) > 1e-2


def test_raps_error_with_one_gaussian_on_the_map(rap):
    inside = [n for n in range(N) if slow_projection(A, 0, n) is not None]
    boxes = A.box_coord.clone()
    boxes[[n for n in range(N) if n != inside[0]], 2] = 1e-9
    scene = RapScene(rap.scene, boxes, rap.feature_map_net, rap.color_net)
    for call in (lambda **options: batch(scene, **options), lambda **options: single(scene, 0, **options)):
        call()
        with pytest.raises(IndexError, match="exactly one Gaussian"):
            call(rap_compatible=True)
    with pytest.raises(IndexError, match="exactly one Gaussian"):
        single(scene, 0, store_cache=True, rap_compatible=True)
    single(scene, 0, store_cache=True)
    single(scene, 0, use_cache=True, feature_map=None, rap_compatible=True)  # nothing is sampled, and RAP goes on


def test_classic_scenes(rap, slow_colors):
    scene = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net, {"antialiasing": False})
    want = draw(slow_colors[1], 1, rasterize_mode="classic")
    assert furthest(single(scene, 1)["render"], want) < 1e-10
    assert furthest(single(scene, 1, other_viewpoint_camera=CAMERAS[1])["render"], want) < 1e-10
    assert furthest(single(rap, 1)["render"], want) > 1e-4
    for trained, pipe in ((scene, True), (rap, False)):
        with pytest.raises(NotImplementedError, match=f"pipe.antialiasing={pipe} is not supported"):
            render_batch(trained, CAMERAS, SimpleNamespace(antialiasing=pipe), None, feature_maps=A.maps[:1])
        render_batch(trained, CAMERAS, SimpleNamespace(antialiasing=not pipe), None, feature_maps=A.maps[:1])


@pytest.mark.parametrize("setting", ["compute_cov3D_python", "convert_SHs_python", "sharper"])
def test_settings_of_pipe_are_refused_by_name(rap, setting):
    pipe = SimpleNamespace(**{setting: True, "steps": 3})
    for call in (render_batch, render):
        cameras = CAMERAS[0] if call is render else CAMERAS
        maps = {"feature_map": A.maps[0]} if call is render else {"feature_maps": A.maps[:1]}
        with pytest.raises(NotImplementedError, match=f"pipe.{setting}=True is not supported"):
            call(rap, cameras, pipe, BACKGROUND, **maps)
        call(rap, cameras, pipe, BACKGROUND, **maps, ignored_pipe_settings=[setting])
        call(rap, cameras, None, BACKGROUND, **maps)


@pytest.mark.parametrize("true", [1, np.True_, np.int64(1), torch.tensor(True)])
def test_settings_of_pipe_that_stand_for_true_or_false(rap, true):
    false = type(true)(0) if not isinstance(true, Tensor) else torch.tensor(False)
    maps = {"feature_maps": A.maps[:1]}
    classic = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net, {"antialiasing": False})
    with pytest.raises(NotImplementedError, match="pipe.convert_SHs_python=True is not supported"):
        render_batch(rap, CAMERAS, SimpleNamespace(convert_SHs_python=true), None, **maps)
    with pytest.raises(NotImplementedError, match="pipe.antialiasing=False is not supported .* trained with True"):
        render_batch(rap, CAMERAS, SimpleNamespace(antialiasing=false), None, **maps)
    with pytest.raises(NotImplementedError, match="pipe.antialiasing=True is not supported .* trained with False"):
        render_batch(classic, CAMERAS, SimpleNamespace(antialiasing=true), None, **maps)
    render_batch(rap, CAMERAS, SimpleNamespace(antialiasing=true, convert_SHs_python=false), None, **maps)
    render_batch(classic, CAMERAS, SimpleNamespace(antialiasing=false), None, **maps)


@pytest.mark.parametrize("name", ["antialiasing", "compute_cov3D_python", "convert_SHs_python"])
def test_settings_of_pipe_that_are_neither(rap, name):
    with pytest.raises(TypeError, match=f"pipe.{name} must be True or False, got str 'yes'"):
        render_batch(rap, CAMERAS, SimpleNamespace(**{name: "yes"}), None, feature_maps=A.maps[:1])
    render_batch(rap, CAMERAS, SimpleNamespace(**{name: None}, mode="yes"), None, feature_maps=A.maps[:1])


def test_backgrounds(rap):
    black = render_batch(rap, CAMERAS, None, None, feature_maps=A.maps[:1])
    zeros = render_batch(rap, CAMERAS, None, [0.0, 0.0, 0.0], feature_maps=A.maps[:1])
    several = torch.rand(C, 3)
    each = render_batch(rap, CAMERAS, None, several, feature_maps=A.maps[:1])
    for view in range(C):
        assert_same(black[view]["render"], zeros[view]["render"])
        alone = render(rap, CAMERAS[view], None, several[view], feature_map=A.maps[0])
        assert_same(each[view]["render"], alone["render"])


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"point_features": torch.zeros(2)}, NotImplementedError, "point_features=float32 .* is not supported"),
        ({"interp_alpha": 0.5}, NotImplementedError, "interp_alpha=0.5 is not supported"),
        ({"scaling_modifier": -1.0}, ValueError, "scaling_modifier must be a factor of at least 0, got -1"),
        ({"store_cache": True, "use_cache": True}, ValueError, "store_cache and use_cache must not both be True"),
        ({"store_cache": 1}, TypeError, "store_cache must be True or False"),
        (
            {"store_cache": True, "override_colors": torch.zeros(N, 3).double()},
            ValueError,
            "override_colors must be None where store_cache",
        ),
        (
            {"override_colors": torch.zeros(N, 4).double(), "feature_map": None},
            ValueError,
            r"override_colors must be float64 \[70, 3\]",
        ),
        (
            {"override_colors": np.zeros((N, 3)), "feature_map": None},
            TypeError,
            r"got ndarray float64 \[70, 3\]$",
        ),
        ({"means_transform": torch.eye(4).double()}, ValueError, r"means_transform must be float64 \[3, 4\]"),
        ({"image": IMAGE}, ValueError, r"images \(image\) must be None where feature_maps"),
        ({"use_cache": True}, ValueError, r"feature_map must be None where use_cache is True, got float64 \[48, 9, 13"),
        (
            {"use_cache": True, "feature_map": None, "view_weight": 1.0},
            ValueError,
            "view_weight must be None where use_cache is True, got float 1.0",
        ),
        (
            {"override_colors": torch.zeros(N, 3).double(), "feature_map": None, "image": IMAGE},
            ValueError,
            "image must be None where override_colors is given",
        ),
        ({"view_weight": float("nan")}, ValueError, "view_weights must be a number, got nan"),
        ({"with_depth": 1}, TypeError, "with_depth must be True or False"),
    ],
)
def test_bad_arguments_of_render(rap, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        single(rap, 0, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"world_view_transform": None}, TypeError, r"cameras\[1\] must be .* SimpleNamespace without world_view"),
        ({"world_view_transform": torch.eye(3)}, ValueError, r"cameras\[1\].world_view_transform must be .*\[4, 4\]"),
        ({"world_view_transform": torch.ones(4, 4)}, ValueError, r"cameras\[1\].world_view_transform must have \(0, 0"),
        ({"world_view_transform": "eye"}, TypeError, r"cameras\[1\].world_view_transform must be numbers \[4, 4\]"),
        ({"K": torch.eye(4)}, ValueError, r"cameras\[1\].K must be floating point \[3, 3\], got float32 \[4, 4\]"),
        ({"K": None}, TypeError, r"cameras\[1\] must be .* without FoVx"),
        ({"K": None, "FoVx": 4.0}, ValueError, r"cameras\[1\].FoVx must be an angle between 0 and pi radians, got 4"),
        ({"image_width": 0}, ValueError, r"cameras\[1\].image_width must be between 1 and"),
        ({"image_height": 41.5}, TypeError, r"cameras\[1\].image_height must be a whole number"),
        ({"colornet_inter_weight": "1"}, TypeError, r"cameras\[1\].colornet_inter_weight must be a number"),
        ({"colornet_inter_weight": float("nan")}, ValueError, r"cameras\[1\].colornet_inter_weight must be a number"),
        ({"colornet_inter_weight": float("inf")}, ValueError, "must be finite"),
    ],
)
def test_bad_cameras(rap, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        batch(rap, [CAMERAS[0], camera(1, **changes)])


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"cameras": CAMERAS[0]}, TypeError, "cameras must be a rapfast.Cameras or a sequence of cameras"),
        ({"bg_color": [0.0, 1.0]}, ValueError, r"bg_color must be \[3\] or \[4, 3\], one for each camera"),
        ({"bg_color": "white"}, TypeError, r"bg_color must be numbers \[3\]"),
        ({"view_weights": [1.0, 2.0]}, ValueError, "view_weights must hold one number for each of 4"),
        ({"map_ids": [0, 1, 2, 0]}, ValueError, r"map_ids\[2\] must be between 0 and 1, got 2"),
        ({"map_ids": None}, ValueError, "map_ids must be given where 2"),
        ({"feature_maps": None, "map_ids": None}, ValueError, r"cameras\[0\] must carry its reference image as orig"),
        ({"feature_maps": None}, ValueError, "map_ids must be None where each camera brings"),
        ({"feature_maps": 3}, TypeError, "feature_maps must be a tensor .* or a sequence of .*, got int 3"),
        ({"feature_maps": None, "images": 3}, TypeError, "images must be a tensor or a sequence of tensors, got int 3"),
        ({"images": [IMAGE]}, ValueError, r"images \(image\) must be None where feature_maps \(feature_map\) is given"),
        (
            {"feature_maps": None, "images": [torch.zeros(3, 40, 40), torch.zeros(4, 40, 40)]},
            ValueError,
            r"images\[1\] must be floating point \[3, H, W\] in 0..1, got float32 \[4, 40, 40\]",
        ),
        ({"viewmat_layout": "rows"}, ValueError, "viewmat_layout must be one of 'transposed', 'plain'"),
        ({"ignored_pipe_settings": "debug"}, TypeError, "ignored_pipe_settings must be a collection of names"),
        ({"backend": "vulkan"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_of_render_batch(rap, changes, error, sentence):
    arguments = {"cameras": CAMERAS, "bg_color": BACKGROUND, "feature_maps": A.maps, "map_ids": MAP_IDS} | changes
    with pytest.raises(error, match=sentence):
        render_batch(rap, pipe=PIPE, **arguments)


def test_one_camera_of_several_is_refused(rap):
    several = Cameras(A.viewmats.float(), A.Ks.float(), WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="camera must be one camera, got a rapfast.Cameras of 4"):
        render(rap, several, PIPE, BACKGROUND, feature_map=A.maps[0])
    with pytest.raises(ValueError, match=r"camera.original_image must be floating point \[3, H, W\]"):
        render(rap, camera(0, original_image=torch.zeros(40, 40, 3)), PIPE, BACKGROUND)


def test_entries_of_the_gaussians_are_made_when_asked_for(rap):
    """A caller of pictures alone pays for nothing of size C x N."""
    read = []

    class WatchedMeta(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    class Watched(RapScene):
        def render(self, *args, **kwargs):
            colors, alphas, meta = super().render(*args, **kwargs)
            return colors, alphas, WatchedMeta(meta.items())

    results = batch(Watched(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net))
    assert all(result["render"].isfinite().all() for result in results)
    assert read == []
    assert results[1]["visibility_filter"].any()
    assert read == ["radii"]


@pytest.mark.cuda
def test_the_gpu_draws_the_same(rap):
    want = batch(rap)
    gpu = rap.to("cuda", torch.float32)
    maps = A.maps.float().cuda()
    got = batch(gpu, feature_maps=maps, with_depth=True)
    for view in range(C):
        result = got[view]
        assert all(result[name].device.type == "cuda" for name in result)
        assert float((result["render"].cpu() - want[view]["render"]).abs().mean()) < 1e-2
        assert float((result["radii"].cpu() - want[view]["radii"]).abs().max()) <= 1
        alone = single(gpu, view, feature_map=maps[MAP_IDS[view]], with_depth=True)
        for name, value in result.items():
            assert_same(alone[name], value)
