"""RapScene.render against colours made slowly, one Gaussian at a time, and drawn by the float64 reference."""

from __future__ import annotations

import pytest
import torch
from appearance_scenes import (
    HEIGHT,
    WIDTH,
    make_appearance,
    net_state,
    slow_color,
    slow_projection,
    slow_sh,
)
from scenes import assert_same
from torch import Tensor

from rapfast import PostProcess, Scene, rasterization, reference
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene

APPEARANCE = make_appearance(n=70, c=4, n_maps=2)
STATE = net_state()
WEIGHTS = [0.3, 1.7, 0.0, 1.0]
MAP_IDS = [1, 0, 0, 1]
C, N = 4, 70


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def map_net() -> FeatureMapNet:
    torch.manual_seed(0)
    return FeatureMapNet().double().eval().requires_grad_(False)


@pytest.fixture
def rap(map_net) -> RapScene:
    a = APPEARANCE
    scene = Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=a.intrinsic)
    return RapScene(scene, a.box_coord, map_net, ColorNet.from_state_dict(STATE))


def render(rap: RapScene, views: slice | list[int] = slice(None), **changes):
    a = APPEARANCE
    arguments = {
        "viewmats": a.viewmats[views],
        "Ks": a.Ks[views],
        "width": WIDTH,
        "height": HEIGHT,
        "feature_maps": a.maps,
        "map_ids": torch.tensor(MAP_IDS)[views],
        "view_weights": torch.tensor(WEIGHTS, dtype=torch.float64)[views],
    }
    arguments = {
        k: v.to(rap.scene.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()
    }
    return rap.render(**(arguments | changes))


def draw(colors: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Given colours [C, N, 3] by the reference in float64."""
    a = APPEARANCE
    options = {"rasterize_mode": "antialiased"} | options
    arguments = a.means, a.quats, a.scales, a.opacities, colors, a.viewmats, a.Ks, WIDTH, HEIGHT
    return rasterization(*arguments, backend="reference", **options)[:2]


@pytest.fixture(scope="module")
def slow_colors() -> Tensor:
    rows = [[slow_color(STATE, APPEARANCE, MAP_IDS[c], c, WEIGHTS[c], n) for n in range(N)] for c in range(C)]
    return torch.tensor(rows, dtype=torch.float64)


def test_pixels_are_the_contracts(rap, slow_colors):
    backgrounds = torch.rand(C, 3, dtype=torch.float64)
    want, want_alphas = draw(slow_colors, backgrounds=backgrounds)
    got, alphas, meta = render(rap, backgrounds=backgrounds)
    assert got.shape == (C, HEIGHT, WIDTH, 3)
    assert float(want.std()) > 0.1, "there must be something to see"
    assert float((got - want).abs().max()) < 1e-10
    assert float((alphas - want_alphas).abs().max()) < 1e-12
    assert meta["n_cameras"] == C
    assert 0 < len(meta["gaussian_ids"]) < C * N, "some Gaussians are seen and some are not"
    reference_pixels = render(rap, backgrounds=backgrounds, backend="reference")[0]
    assert float((reference_pixels - want).abs().max()) < 1e-10


def test_the_first_views_weight_for_all_is_another_picture(rap, slow_colors):
    """The seeds' error. With weights that differ it must show in each view but the first."""
    right = render(rap)[0]
    wrong = render(rap, view_weights=[WEIGHTS[0]] * C)[0]
    assert_same(wrong[0], right[0])
    for c in range(1, C):
        assert float((wrong[c] - right[c]).abs().max()) > 1e-2
    assert float((right - draw(slow_colors)[0]).abs().max()) < 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        {"map_ids": [MAP_IDS[0]] * C},
        {"feature_maps": APPEARANCE.maps.flip(0)},
        {"Ks": APPEARANCE.Ks[:1].expand(C, 3, 3)},
        {"viewmats": APPEARANCE.viewmats[:1].expand(C, 4, 4)},
    ],
)
def test_every_views_own_inputs_are_used(rap, changes):
    right, wrong = render(rap)[0], render(rap, **changes)[0]
    assert float((wrong[1] - right[1]).abs().max()) > 1e-2


def test_a_view_in_a_batch_is_the_view_alone(rap):
    rap = rap.to(torch.float32)
    together, alphas, _ = render(rap)
    for c in range(C):
        alone, alpha, _ = render(rap, [c])
        assert_same(alone[0], together[c])
        assert_same(alpha[0], alphas[c])
    order = [2, 0, 3, 1]
    assert_same(render(rap, order)[0], together[order])
    error = (together - render(rap.to(torch.float64))[0]).abs().max()
    assert float(error) < 1e-2, "float32 is the same picture"


def test_weight_zero_shows_no_reference_image(rap):
    zero = render(rap, view_weights=0.0)[0]
    assert_same(render(rap, view_weights=0.0, map_ids=[0] * C)[0], zero)
    assert float((render(rap, view_weights=1e-3)[0] - zero).abs().max()) > 0


def test_maps_shared_by_number_order_or_list(rap):
    want = render(rap)[0]
    chosen = APPEARANCE.maps[MAP_IDS]
    assert_same(render(rap, feature_maps=chosen, map_ids=None)[0], want)
    assert_same(render(rap, feature_maps=list(APPEARANCE.maps), map_ids=MAP_IDS)[0], want)
    assert_same(
        render(rap, feature_maps=APPEARANCE.maps[:1], map_ids=None)[0],
        render(rap, map_ids=torch.zeros(C, dtype=torch.int32))[0],
    )


def test_reference_images_of_several_sizes(rap):
    images = [torch.rand(3, 40, 36, dtype=torch.float64), torch.rand(3, 33, 52, dtype=torch.float64) ** 3]
    maps = rap.feature_maps(images)
    assert [tuple(m.shape) for m in maps] == [(48, 20, 18), (48, 17, 26)]
    assert_same(rap.feature_maps(images[1][None])[0], maps[1])
    got = render(rap, feature_maps=maps)[0]
    for c in range(C):
        alone = render(rap, [c], feature_maps=maps[MAP_IDS[c]][None], map_ids=None)[0]
        assert_same(alone[0], got[c])
    assert float((got[1] - render(rap, feature_maps=maps, map_ids=[1] * C)[0][1]).abs().max()) > 1e-3


@pytest.mark.parametrize("n_inside", [0, 1, 2])
def test_few_gaussians_on_the_projected_map(rap, n_inside):
    """View 0's windows shrunk to nothing but for n_inside of them."""
    inside = [n for n in range(N) if slow_projection(APPEARANCE, 0, n) is not None]
    boxes = APPEARANCE.box_coord.clone()
    boxes[[n for n in range(N) if n not in inside[:n_inside]], 2] = 1e-9
    few = APPEARANCE._replace(box_coord=boxes)
    scene = RapScene(rap.scene, boxes, rap.feature_map_net, rap.color_net)
    want = torch.tensor([[slow_color(STATE, few, 1, 0, 0.3, n) for n in range(N)]], dtype=torch.float64)
    a = APPEARANCE
    arguments = a.means, a.quats, a.scales, a.opacities, want, a.viewmats[:1], a.Ks[:1], WIDTH, HEIGHT
    want = rasterization(*arguments, backend="reference", rasterize_mode="antialiased")[0]
    assert float((render(scene, [0])[0] - want).abs().max()) < 1e-10
    if n_inside == 1:
        with pytest.raises(IndexError, match="exactly one Gaussian"):
            render(scene, [0], rap_compatible=True)
    else:
        assert_same(render(scene, [0], rap_compatible=True)[0], render(scene, [0])[0])


def test_raps_error_counts_the_unseen_too(rap):
    """Two Gaussians on the map, one of them too faint to be drawn: RAP counts both and goes on."""
    inside = [n for n in range(N) if slow_projection(APPEARANCE, 0, n) is not None]
    boxes, opacities = APPEARANCE.box_coord.clone(), APPEARANCE.opacities.clone()
    boxes[[n for n in range(N) if n not in inside[:2]], 2] = 1e-9
    opacities[inside[0]] = 0.0
    geometry = Scene(rap.scene.means, rap.scene.quats, rap.scene.scales, opacities, intrinsic=rap.scene.intrinsic)
    scene = RapScene(geometry, boxes, rap.feature_map_net, rap.color_net)
    assert render(scene, [0], rap_compatible=True)[0].isfinite().all()


def test_spherical_harmonics(rap):
    state = {name: value for name, value in STATE.items() if not name.startswith("color_")}
    net = ColorNet.from_state_dict(state)
    scene = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, net, {"use_colors_precomp": False})
    rows = [[slow_sh(state, APPEARANCE, MAP_IDS[c], c, WEIGHTS[c], n) for n in range(N)] for c in range(C)]
    coefficients = torch.tensor(rows, dtype=torch.float64).reshape(C, N, 16, 3)
    want = draw(coefficients, sh_degree=3)[0]
    assert float((render(scene)[0] - want).abs().max()) < 1e-10
    assert float((render(scene, backend="reference")[0] - want).abs().max()) < 1e-10
    directions = APPEARANCE.means - reference.camera_positions(APPEARANCE.viewmats[0])
    raw = reference.spherical_harmonics(3, directions, coefficients[0]) + 0.5
    assert bool((raw < 0).any()) and bool((raw > 0).any()), "the clamp must be met"


def test_decoded_features_keep_one_views_appearance(rap, slow_colors):
    """RAP's cache: view 1's appearance everywhere, each view's own direction."""
    decoded = rap.decode(APPEARANCE.viewmats[1], APPEARANCE.Ks[1], APPEARANCE.maps[MAP_IDS[1]], WEIGHTS[1])
    assert decoded.shape == (N, 48)
    own = {"feature_maps": None, "map_ids": None, "view_weights": None}
    got = render(rap, decoded=decoded, **own)[0]
    center = [torch.linalg.inv(view)[:3, 3] for view in APPEARANCE.viewmats]
    rows = []
    for c in range(C):
        offset = APPEARANCE.means - center[c]
        x = torch.cat([decoded, offset / (offset.norm(dim=1, keepdim=True) + 1e-5)], 1)
        x = torch.relu(x @ STATE["color_decoder.lin0.weight"].T + STATE["color_decoder.lin0.bias"])
        rows.append(x @ STATE["color_decoder.lin1.weight"].T + STATE["color_decoder.lin1.bias"])
    want = torch.stack(rows)
    assert float((want[1] - slow_colors[1]).abs().max()) < 1e-10
    assert float((got - draw(want)[0]).abs().max()) < 1e-10
    assert float((got[0] - render(rap)[0][0]).abs().max()) > 1e-2, "another view's own appearance differs"
    several = torch.stack([decoded * scale for scale in (1.0, 0.5, 0.0, 2.0)])
    each = render(rap, decoded=several, **own)[0]
    for c in range(C):
        assert_same(render(rap, [c], decoded=several[c], **own)[0][0], each[c])
    assert_same(each[0], got[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, r"feature_maps must be None where decoded is given, got float64 \[2, 48"),
        ({"feature_maps": None}, r"map_ids must be None where decoded is given"),
        ({"feature_maps": None, "map_ids": None}, r"view_weights must be None where decoded is given"),
        (
            {"feature_maps": None, "map_ids": None, "view_weights": None, "decoded": torch.zeros(70, 47).double()},
            r"decoded must be float64 \[70, 48\] or \[4, 70, 48\] on cpu \(as the scene\), got float64 \[70, 47\]",
        ),
    ],
)
def test_bad_decoded_features(rap, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        render(rap, **({"decoded": torch.zeros(70, 48).double()} | changes))


def test_bad_arguments_of_decode(rap):
    a = APPEARANCE
    with pytest.raises(ValueError, match=r"viewmat must be float64 \[4, 4\]"):
        rap.decode(a.viewmats, a.Ks[0], a.maps[0])
    with pytest.raises(ValueError, match=r"feature_map must be floating point \[48, h, w\]"):
        rap.decode(a.viewmats[0], a.Ks[0], a.maps)
    with pytest.raises(ValueError, match="view_weights must be finite"):
        rap.decode(a.viewmats[0], a.Ks[0], a.maps[0], float("inf"))


def test_depth_and_postprocess(rap, slow_colors):
    want = draw(slow_colors, render_mode="RGB+D")[0]
    got = render(rap, render_mode="RGB+D")[0]
    assert got.shape == (C, HEIGHT, WIDTH, 4)
    assert float((got - want).abs().max()) < 1e-10
    assert_same(render(rap, render_mode="D")[0], got[..., 3:])
    post = PostProcess(size=(20, 30), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layout="CHW")
    small = render(rap, postprocess=post)[0]
    want = draw(slow_colors, postprocess=post)[0]
    assert small.shape == (C, 3, 20, 30)
    assert float((small - want).abs().max()) < 1e-9


def test_training_mode_and_limits_are_passed_on(rap, slow_colors):
    classic = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, rap.color_net, {"antialiasing": False})
    want = draw(slow_colors, rasterize_mode="classic")[0]
    assert float((render(classic)[0] - want).abs().max()) < 1e-10
    assert float((render(rap, rasterize_mode="classic")[0] - want).abs().max()) < 1e-10
    assert float((render(rap)[0] - want).abs().max()) > 1e-4
    limits = {"near_plane": 1.5, "far_plane": 3.0, "radius_clip": 2.0, "eps2d": 0.1}
    assert float((render(rap, **limits)[0] - draw(slow_colors, **limits)[0]).abs().max()) < 1e-10


def test_coord_scale_divides_the_learned_coordinates(rap):
    doubled = APPEARANCE.box_coord.clone()
    doubled[:, :2] *= 2
    scene = RapScene(rap.scene, doubled, rap.feature_map_net, rap.color_net, {"coord_scale": 2})
    assert_same(render(scene)[0], render(rap)[0])


def test_views_that_see_nothing_and_cameras_that_are_none(rap):
    viewmats = APPEARANCE.viewmats.clone()
    viewmats[1, 2, 3] -= 100.0  # all Gaussians behind it
    viewmats[2, :3, :3] = 0.0
    backgrounds = torch.rand(C, 3, dtype=torch.float64)
    images, alphas, meta = render(rap, viewmats=viewmats, backgrounds=backgrounds)
    right = render(rap, backgrounds=backgrounds)[0]
    assert meta["n_invalid"].tolist() == [0, 0, N, 0]
    assert not alphas[1:3].any()
    assert torch.equal(images[1:3], backgrounds[1:3, None, None].expand(2, HEIGHT, WIDTH, 3))
    assert_same(images[[0, 3]], right[[0, 3]])
    nobody = RapScene(rap.scene.select(slice(0, 0)), rap.box_coord[:0], rap.feature_map_net, rap.color_net)
    assert not render(nobody)[1].any()


def test_colors_that_are_not_finite_are_counted_not_drawn(rap):
    intrinsic = APPEARANCE.intrinsic.clone()
    intrinsic[:5] = float("nan")
    a = APPEARANCE
    scene = RapScene(
        Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=intrinsic),
        a.box_coord,
        rap.feature_map_net,
        rap.color_net,
    )
    images, _, meta = render(scene)
    assert images.isfinite().all()
    assert int(meta["n_invalid"].sum()) > 0
    without = rap.scene.select(slice(5, None))
    rest = RapScene(without, a.box_coord[5:], rap.feature_map_net, rap.color_net)
    assert float((render(rest)[0] - images).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"map_ids": [0, 1, 2, 0]}, ValueError, r"map_ids\[2\] must be between 0 and 1, got 2"),
        ({"map_ids": [0, 1, -1, 0]}, ValueError, r"map_ids\[2\] must be between 0 and 1, got -1"),
        ({"map_ids": [0, 1]}, ValueError, "map_ids must hold one number for each of 4 views, got 2"),
        ({"map_ids": torch.zeros(4)}, ValueError, r"map_ids must be whole numbers \[4\], got float32 \[4\] on cpu"),
        ({"map_ids": None}, ValueError, "map_ids must be given where 2 feature maps meet 4 views"),
        ({"map_ids": 1}, TypeError, r"map_ids must be whole numbers \[4\], got int 1"),
        ({"view_weights": [1.0, 1.0]}, ValueError, r"view_weights must hold one number for each of 4 views, got 2"),
        ({"view_weights": torch.ones(4, 1)}, ValueError, r"view_weights must be floating point \[4\]"),
        ({"view_weights": [1.0, float("nan"), 1.0, 1.0]}, ValueError, r"view_weights\[1\] must be a number, got nan"),
        ({"view_weights": torch.tensor([1.0, float("inf"), 1, 1])}, ValueError, "view_weights must be finite"),
        ({"view_weights": "1"}, TypeError, "view_weights must be a number, got str '1'"),
        (
            {"feature_maps": torch.zeros(2, 32, 9, 13)},
            ValueError,
            r"feature_maps must be .*\[R, 48, h, w\].* \[2, 32, 9",
        ),
        ({"feature_maps": torch.zeros(48, 9, 13)}, ValueError, r"feature_maps must be .*got float32 \[48, 9, 13\]"),
        ({"feature_maps": torch.zeros(0, 48, 9, 13)}, ValueError, r"feature_maps must be .*got float32 \[0, 48"),
        ({"feature_maps": [torch.zeros(48, 9, 9), torch.zeros(47, 9, 9)]}, ValueError, r"feature_maps\[1\] must be"),
        ({"feature_maps": None}, TypeError, "feature_maps must be a tensor"),
        ({"viewmats": torch.eye(4).expand(4, 4, 4)}, TypeError, r"viewmats must be float64 \[C, 4, 4\] on cpu"),
        ({"Ks": torch.eye(3).double()[None]}, ValueError, r"Ks must be float64 \[4, 3, 3\]"),
        ({"width": 0}, ValueError, "width must be between 1 and"),
        ({"near_plane": 2.0, "far_plane": 1.0}, ValueError, "near_plane must not exceed far_plane"),
        ({"eps2d": -1.0}, ValueError, "eps2d must be"),
        ({"render_mode": "RGBD"}, ValueError, "render_mode must be one of"),
        ({"rasterize_mode": "sharp"}, ValueError, "rasterize_mode must be one of"),
        ({"backend": "vulkan"}, ValueError, "backend must be one of"),
        ({"backgrounds": torch.zeros(1, 3).double()}, ValueError, r"backgrounds must be float64 \[4, 3\]"),
        ({"rap_compatible": 1}, TypeError, "rap_compatible must be True or False"),
    ],
)
def test_bad_arguments_are_sentences(rap, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        render(rap, **changes)


def test_parts_that_do_not_fit(rap):
    a, nets = APPEARANCE, (rap.feature_map_net, rap.color_net)
    with pytest.raises(ValueError, match="scene must have intrinsic features"):
        RapScene(Scene(a.means, a.quats, a.scales, a.opacities), a.box_coord, *nets)
    with pytest.raises(ValueError, match=r"box_coord must be float64 \[70, 3, 2\]"):
        RapScene(rap.scene, a.box_coord[:5], *nets)
    with pytest.raises(ValueError, match="color_net must be torch.float64 on cpu"):
        RapScene(rap.scene, a.box_coord, nets[0], ColorNet())
    narrow = net_state({"encoder": (158, 48), "decoder": (96, 48), "color_decoder": (51, 3)})
    with pytest.raises(ValueError, match="48 appearance and 48 intrinsic features, got 47 and 48"):
        RapScene(rap.scene, a.box_coord, nets[0], ColorNet.from_state_dict(narrow))
    headless = {name: value for name, value in STATE.items() if not name.startswith("color_")}
    with pytest.raises(ValueError, match="must have a colour head with 3 outputs"):
        RapScene(rap.scene, a.box_coord, nets[0], ColorNet.from_state_dict(headless))
    for name in ("use_decode_with_pos", "use_okmap"):
        with pytest.raises(NotImplementedError, match=f"{name}=True in cfg_args"):
            RapScene(rap.scene, a.box_coord, *nets, {name: True})
        RapScene(rap.scene, a.box_coord, *nets, {name: False})
    with pytest.raises(NotImplementedError, match="map_num=2"):
        RapScene(rap.scene, a.box_coord, *nets, {"map_num": 2})


def test_other_hidden_widths(rap):
    state = net_state({"encoder": (159, 256, 20), "decoder": (68, 30), "color_decoder": (33, 3)})
    scene = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, ColorNet.from_state_dict(state))
    rows = [[slow_color(state, APPEARANCE, 1, 0, 0.3, n) for n in range(N)]] * C
    want = draw(torch.tensor(rows, dtype=torch.float64))[0]
    assert float((render(scene, [0])[0] - want[:1]).abs().max()) < 1e-10


@pytest.mark.cuda
def test_the_gpu_draws_the_same(rap):
    want = render(rap)[0]
    gpu = rap.to("cuda", torch.float32)
    a = APPEARANCE
    arguments = {
        "viewmats": a.viewmats.float().cuda(),
        "Ks": a.Ks.float().cuda(),
        "feature_maps": a.maps.float().cuda(),
        "view_weights": WEIGHTS,
    }
    together = render(gpu, **arguments)[0]
    assert float((together.cpu() - want).abs().mean()) < 1e-3
    for c in range(C):
        own = {name: value[c : c + 1] for name, value in arguments.items() if name != "feature_maps"}
        alone = render(gpu, [c], feature_maps=arguments["feature_maps"], **own)[0]
        assert_same(alone[0], together[c])
    images = torch.rand(11, 3, 64, 80, device="cuda")
    maps = gpu.feature_maps(images)
    for i in (0, 5, 10):
        assert_same(gpu.feature_maps(images[i : i + 1])[0], maps[i])
