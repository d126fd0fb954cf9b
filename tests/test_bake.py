"""Baked scenes: harmonics in place of the colour network, against the network itself."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from scenes import assert_same
from torch import Tensor

from rapfast import Cameras, Scene, load_ply, rasterization, save_ply
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.appearance.bake import BakeReport, bake, sphere_directions
from rapfast.reference import spherical_harmonics

bake_module = importlib.import_module("rapfast.appearance.bake")

C, N = 4, 70
A = make_appearance(n=N, c=C, n_maps=2)
WEIGHT = 1.7


def faint_state() -> dict[str, Tensor]:
    """Weights whose colours are about 0.2 to 0.9: those of a picture, which no viewer clamps."""
    state = net_state()
    state["color_decoder.lin1.weight"] = state["color_decoder.lin1.weight"] * 0.05
    state["color_decoder.lin1.bias"] = torch.tensor([0.5, 0.6, 0.4], dtype=torch.float64)
    return state


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def map_net() -> FeatureMapNet:
    torch.manual_seed(0)
    return FeatureMapNet().eval().requires_grad_(False)


def make(map_net: FeatureMapNet, state: dict[str, Tensor], **config) -> RapScene:
    scene = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=A.intrinsic)
    return RapScene(scene, A.box_coord, map_net, ColorNet.from_state_dict(state), config)


@pytest.fixture
def rap(map_net) -> RapScene:
    return make(map_net, faint_state())


def cameras(view: int) -> Cameras:
    return Cameras(A.viewmats[view : view + 1], A.Ks[view : view + 1], WIDTH, HEIGHT)


def baked(rap: RapScene, **changes) -> tuple[Scene, BakeReport]:
    arguments = {"camera": cameras(1), "weight": WEIGHT, "feature_map": A.maps[0]} | changes
    return bake(rap, **arguments, return_report=True)


def draw(scene: Scene) -> Tensor:
    """All views of an ordinary scene, as any viewer with antialiasing shows them."""
    geometry = scene.means, scene.quats, scene.scales, scene.opacities
    options = {"sh_degree": scene.sh_degree, "rasterize_mode": "antialiased", "backend": "reference"}
    return rasterization(*geometry, scene.sh, A.viewmats, A.Ks, WIDTH, HEIGHT, **options)[0]


def fixed_appearance(rap: RapScene) -> Tensor:
    """All views with view 1's appearance: what the baked scene approximates."""
    decoded = rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT)
    return rap.render(A.viewmats, A.Ks, WIDTH, HEIGHT, decoded=decoded)[0]


def test_pictures_of_all_views(rap):
    want = fixed_appearance(rap)
    scene, report = baked(rap)
    assert scene.sh_degree == 3
    assert scene.intrinsic is None
    assert_same(scene.means, rap.scene.means)
    error = draw(scene) - want
    assert report.negative == 0
    # A pixel's error is a sum of the colours' errors with weights that sum to at most 1.
    assert 0 < float(error.abs().max()) < report.worst < 0.01
    assert float(error.square().mean().sqrt()) < report.rms
    flat = draw(baked(rap, sh_degree=0)[0]) - want
    assert float(flat.abs().max()) > 3 * float(error.abs().max()), "the colours change with the direction"


def test_another_weight_map_or_camera_is_another_scene(rap):
    scene = baked(rap)[0]
    for changes in ({"weight": 0.3}, {"feature_map": A.maps[1]}, {"camera": cameras(2)}):
        other = baked(rap, **changes)[0]
        assert float((other.sh - scene.sh).abs().max()) > 0.02


def test_the_error_is_what_the_report_says(map_net):
    rap = make(map_net, net_state())  # colours of both signs
    decoded = rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT)
    directions = torch.nn.functional.normalize(torch.randn(1500, 3, dtype=torch.float64), dim=1)
    pairs = decoded[:, None].expand(-1, 1500, -1).flatten(0, 1)
    colors = rap.color_net.head(pairs, directions.repeat(N, 1)).unflatten(0, (N, 1500))
    worst = []
    for degree in range(5):
        scene, report = baked(rap, sh_degree=degree)
        assert scene.sh.shape == (N, (degree + 1) ** 2, 3)
        basis = bake_module._basis(degree, directions)
        fitted = basis @ scene.sh + 0.5
        rms, shown = ((x - colors).square().mean().sqrt() for x in (fitted, fitted.clamp(min=0)))
        assert report.rms == pytest.approx(float(rms), rel=0.02)
        assert report.shown_rms == pytest.approx(float(shown), rel=0.02)
        assert report.negative == pytest.approx(float((colors < 0).double().mean()), abs=0.005)
        assert report.worst == pytest.approx(float((fitted - colors).abs().max()), rel=0.35)
        assert report.rms < report.worst
        assert report.shown_rms > 10 * report.rms, "negative colours are what a viewer cannot show"
        worst.append(report.rms)
    assert worst == sorted(worst, reverse=True)
    assert worst[3] < 0.05 * worst[0]


def test_least_squares_cannot_be_improved(rap):
    """In the directions of the fit, any other coefficients are worse."""
    decoded = rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT)
    directions = sphere_directions(bake_module.N_DIRECTIONS)
    colors = torch.stack([rap.color_net.head(decoded, d.expand(N, 3)) for d in directions], 1)
    basis = bake_module._basis(3, directions)
    want = torch.linalg.lstsq(basis.expand(N, -1, -1), colors - 0.5).solution
    assert float((baked(rap)[0].sh - want).abs().max()) < 1e-12


def test_colours_linear_in_the_direction_are_exact(map_net):
    """A colour head of one layer: a constant and a slope, which degree 1 holds exactly."""
    state = net_state({"encoder": (159, 64, 48), "decoder": (96, 48), "color_decoder": (51, 3)})
    rap = make(map_net, state)
    for degree in (1, 3):
        scene, report = baked(rap, sh_degree=degree)
        assert report.worst < 1e-12
        directions = torch.randn(N, 3, dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
        decoded = rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT)
        shown = spherical_harmonics(degree, directions, scene.sh) + 0.5
        assert float((shown - rap.color_net.head(decoded, directions)).abs().max()) < 1e-12
    assert baked(rap, sh_degree=0)[1].rms > 0.1


def test_networks_of_harmonics_are_copied(map_net):
    state = {name: value for name, value in net_state().items() if not name.startswith("color_")}
    rap = make(map_net, state, use_colors_precomp=False)
    scene, report = baked(rap)
    assert_same(scene.sh, rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT).unflatten(1, (16, 3)))
    assert report == BakeReport(0.0, 0.0, 0.0, 0.0)
    assert float((draw(scene) - fixed_appearance(rap)).abs().max()) < 1e-10
    with pytest.raises(ValueError, match="sh_degree must be 3, what the network puts out, got 2"):
        baked(rap, sh_degree=2)


def test_the_same_bits_again_and_in_other_chunks(rap, monkeypatch):
    rap = rap.to(torch.float32)
    arguments = {"feature_map": A.maps[0].float(), "camera": cameras(1)}
    scene, report = baked(rap, **arguments)
    again, report_again = baked(rap, **arguments)
    assert_same(again.sh, scene.sh)
    assert report_again == report
    monkeypatch.setattr(bake_module, "_VALUES", 5 * bake_module.N_DIRECTIONS * 48)
    chunks = bake_module._chunks(rap.color_net, N)
    assert len(chunks) == 14
    small, report_small = baked(rap, **arguments)
    assert float((small.sh - scene.sh).abs().max()) < 1e-5
    assert report_small.rms == pytest.approx(report.rms, rel=1e-3)


def test_the_same_bits_under_autocast(rap):
    rap = rap.to(torch.float32)
    image = torch.rand(3, 33, 36)
    for reference in ({"feature_map": A.maps[0].float()}, {"feature_map": None, "image": image}):
        scene, report = baked(rap, **reference)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under, report_under = baked(rap, **reference)
        assert scene.sh.dtype == torch.float32
        assert_same(under.sh, scene.sh)
        assert report_under == report


def test_single_precision_loses_nothing_in_the_fit(rap):
    """What a float32 scene's harmonics are off is their own rounding, not that of sums over directions."""
    decoded = rap.decode(A.viewmats[1], A.Ks[1], A.maps[0], WEIGHT).float()
    net = rap.to(torch.float32).color_net
    want = bake_module._fit(copy.deepcopy(net).double(), decoded.double(), 3)
    assert_same(bake_module._fit(net, decoded, 3), want.float())


def test_a_file_for_any_viewer(rap, tmp_path):
    scene = baked(rap)[0]
    save_ply(scene, tmp_path / "baked.ply")
    back = load_ply(tmp_path / "baked.ply").to(torch.float64)
    assert back.sh_degree == 3
    assert float((draw(back) - draw(scene)).abs().max()) < 1e-4


def test_what_a_camera_brings(rap):
    image = torch.rand(3, 33, 36)
    map_of_image = rap.feature_maps([image])[0]
    camera = SimpleNamespace(
        world_view_transform=A.viewmats[1].T, K=A.Ks[1], image_width=WIDTH, image_height=HEIGHT,
        original_image=image, colornet_inter_weight=0.4,
    )  # fmt: skip
    want = bake(rap, cameras(1), 0.4, feature_map=map_of_image)
    assert isinstance(want, Scene)
    assert_same(bake(rap, camera).sh, want.sh)
    assert_same(bake(rap, cameras(1), 0.4, image=image).sh, want.sh)
    assert float((bake(rap, camera, 1.0).sh - want.sh).abs().max()) > 1e-3


def test_features_that_are_not_finite_and_no_gaussians(rap, map_net):
    broken = A.intrinsic.clone()
    broken[:3] = float("nan")
    scene = Scene(A.means, A.quats, A.scales, A.opacities, intrinsic=broken)
    with_nan = RapScene(scene, A.box_coord, map_net, rap.color_net)
    got, report = baked(with_nan)
    assert got.sh[:3].isnan().all()
    assert float((got.sh[3:] - baked(rap)[0].sh[3:]).abs().max()) < 1e-12
    assert 0 < report.rms < 0.01
    nobody = RapScene(rap.scene.select(slice(0, 0)), rap.box_coord[:0], map_net, rap.color_net)
    scene, report = baked(nobody)
    assert scene.sh.shape == (0, 16, 3)
    assert report.rms == 0.0


def test_directions_are_even():
    """No direction is further from the nearest of n than about the radius of a cap of 1/n of the sphere."""
    directions = sphere_directions(128)
    assert float((directions.norm(dim=1) - 1).abs().max()) < 1e-12
    assert float(directions.mean(0).abs().max()) < 0.01
    probes = torch.nn.functional.normalize(torch.randn(5000, 3, dtype=torch.float64), dim=1)
    nearest = (probes @ directions.T).max(1).values.clamp(max=1).arccos()
    cap = 2 / 128**0.5  # radius of a cap with 1/128 of the sphere's area
    assert cap < float(nearest.max()) < 1.6 * cap
    turned = sphere_directions(128, turn=bake_module._GOLDEN_ANGLE / 2)
    assert float((turned @ directions.T).max()) < 1 - 1e-6, "the directions that measure are none of the fit's"


@pytest.mark.cuda
def test_the_gpu_bakes_the_same(rap):
    want, want_report = baked(rap)
    gpu = rap.to("cuda", torch.float32)
    scene, report = baked(gpu, feature_map=A.maps[0].float().cuda())
    again = baked(gpu, feature_map=A.maps[0].float().cuda())[0]
    assert_same(again.sh, scene.sh)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda"):
            assert_same(baked(gpu, feature_map=A.maps[0].float().cuda())[0].sh, scene.sh)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((scene.sh.cpu() - want.sh).abs().max()) < 1e-3
    assert report.rms == pytest.approx(want_report.rms, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"sh_degree": 5}, ValueError, "sh_degree must be between 0 and 4, got 5"),
        ({"sh_degree": 2.0}, TypeError, "sh_degree must be a whole number"),
        ({"image": torch.zeros(3, 40, 40)}, ValueError, r"images \(image\) must be None where feature_maps"),
        ({"feature_map": None}, ValueError, "camera must carry its reference image"),
        ({"feature_map": torch.zeros(40, 5, 5)}, ValueError, r"feature_maps\[0\] must be floating point \[48, h, w\]"),
        ({"weight": float("inf")}, ValueError, "view_weights must be finite"),
        ({"camera": Cameras(A.viewmats, A.Ks, WIDTH, HEIGHT)}, ValueError, "camera must be one camera, got .* of 4"),
        ({"camera": 3}, TypeError, "camera must be a rapfast.Cameras or have the attributes"),
    ],
)
def test_bad_arguments(rap, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        baked(rap, **changes)
