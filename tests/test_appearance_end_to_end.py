"""RapScene.render from feature maps to pixels, in every precision and on every device, against the plain networks and
the plain renderer in float64."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, slow_projection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from network_scenes import (
    CPU32,
    CPU64,
    CUDA16,
    CUDA32,
    FAST_FORMS,
    FORMS,
    WIDTHS,
    Appearance,
    Form,
    color_net,
    make_appearance,
    psnr,
    rap_scene,
)
from scenes import assert_close_outside_band, assert_same
from torch import Tensor

from rapfast import PostProcess
from rapfast.appearance import RapScene

N, C = 200, 4
APPEARANCE = make_appearance(N, C, n_maps=3)
MAP_IDS = [2, 0, 1, 0]
WEIGHTS = [0.3, 1.7, 0.0, 1.0]
BACKGROUNDS = torch.rand(C, 3, generator=torch.Generator().manual_seed(8)).double()
SH_WIDTHS = {"encoder": (159, 128, 96, 64, 48), "decoder": (96, 48, 48, 48)}
SH_CONFIG = {"use_colors_precomp": False}
STD = (0.229, 0.224, 0.225)


pytestmark = pytest.mark.usefixtures("one_thread")


def rap(form: Form, a: Appearance = APPEARANCE, widths: str = "RAP") -> RapScene:
    if widths == "SH":
        return rap_scene(a, color_net(form, SH_WIDTHS), form, SH_CONFIG)
    return rap_scene(a, color_net(form, WIDTHS[widths]), form)


def render(
    scene: RapScene, form: Form, views: list[int] | None = None, a: Appearance = APPEARANCE, **changes: Any
) -> tuple[Tensor, Tensor, Any]:
    """Given tensors go to the form's device, and but for maps and weights to its dtype."""
    views = list(range(C)) if views is None else views
    arguments: dict[str, Any] = {
        "viewmats": a.viewmats[views],
        "Ks": a.Ks[views],
        "feature_maps": a.maps,
        "map_ids": [MAP_IDS[c] for c in views],
        "view_weights": [WEIGHTS[c] for c in views],
    }
    if changes.get("backend", "rapfast") == "rapfast":
        arguments["precision"] = form.precision
    arguments |= changes
    for name in ("viewmats", "Ks", "backgrounds", "decoded"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].to(form.device, form.dtype)
    maps = arguments["feature_maps"]
    if isinstance(maps, Tensor):
        arguments["feature_maps"] = maps.to(form.device)
    elif maps is not None:
        arguments["feature_maps"] = [m.to(form.device) for m in maps]
    return scene.render(width=WIDTH, height=HEIGHT, **arguments)


def reference_pair(a: Appearance = APPEARANCE, widths: str = "RAP", **options: Any) -> tuple[Tensor, Tensor]:
    """Pictures by the plain code in float32 and in float64."""
    return tuple(render(rap(f, a, widths), f, a=a, backend="reference", **options)[0] for f in (CPU32, CPU64))


@lru_cache(maxsize=8)
def cached_pair(widths: str = "RAP", render_mode: str = "RGB") -> tuple[Tensor, Tensor]:
    backgrounds = BACKGROUNDS if render_mode.startswith("RGB") else None
    return reference_pair(widths=widths, render_mode=render_mode, backgrounds=backgrounds)


def assert_pictures(got: Tensor, references: tuple[Tensor, Tensor], form: Form) -> None:
    """Against the plain code in float32 and float64: the same in float64, hardly worse than it in float32, and in fp16
    45 dB, for colours of order 1."""
    single, exact = references
    got = got.cpu()
    assert got.shape == exact.shape
    if got.numel() == 0:  # the colours of D and ED
        return
    if form.half:
        assert bool(got.isfinite().all())
        size = max(1.0, float(exact.square().mean().sqrt()))
        assert psnr(got / size, exact / size) >= 45
    elif form.dtype == torch.float64:
        assert float((got - exact).abs().max()) <= 1e-10 * max(1.0, float(exact.abs().max()))
    else:
        assert_close_outside_band(got, single, exact)


# Pictures


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", [*WIDTHS, "SH"])
def test_pictures_equal_the_reference(widths, form):
    references = cached_pair(widths)
    assert 0.1 < float(references[1].std()) < 2, "colours of order 1, and something to see"
    got, alphas, meta = render(rap(form, widths=widths), form, backgrounds=BACKGROUNDS)
    assert_pictures(got, references, form)
    assert alphas.shape == (C, HEIGHT, WIDTH, 1) and bool((alphas > 0.5).any())
    assert meta["n_invalid"].tolist() == [0] * C
    assert 0 < len(meta["gaussian_ids"]) < C * N


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("render_mode", ["D", "ED", "RGB+D", "RGB+ED"])
def test_depth_modes(render_mode, form):
    got = render(
        rap(form), form, render_mode=render_mode, backgrounds=BACKGROUNDS if render_mode.startswith("RGB") else None
    )[0]
    references = cached_pair("RAP", render_mode)
    assert_pictures(got[..., :-1], tuple(r[..., :-1] for r in references), form)
    # Depth knows nothing of the network: it is as exact in fp16.
    exact = form._replace(half=False)
    assert_pictures(got[..., -1:], tuple(r[..., -1:] for r in references), exact)


def test_the_bounds_tell_a_wrong_picture():
    """The seeds' error, the first view's weight for all, is far beyond fp16's bound; so are another's maps."""
    loose = CPU32._replace(half=True)
    references = cached_pair()
    scene = rap(CPU32)
    right = render(scene, CPU32, backgrounds=BACKGROUNDS)[0]
    assert_pictures(right, references, loose)
    for changes in (
        {"view_weights": [WEIGHTS[0]] * C},
        {"map_ids": MAP_IDS[::-1]},
        {"feature_maps": APPEARANCE.maps[:, [*range(16, 48), *range(16)]]},
        {"Ks": APPEARANCE.Ks.flip(0)},
    ):
        wrong = render(scene, CPU32, backgrounds=BACKGROUNDS, **changes)[0]
        with pytest.raises(AssertionError):
            assert_pictures(wrong, references, loose)
    first_for_all = render(scene, CPU32, backgrounds=BACKGROUNDS, view_weights=[WEIGHTS[0]] * C)[0]
    assert_same(first_for_all[0], right[0])
    for c in range(1, C):
        assert psnr(first_for_all[c], right[c]) < 40


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_inside", [0, 1, 2])
def test_few_gaussians_on_the_projected_map(n_inside, form):
    inside = [n for n in range(N) if slow_projection(APPEARANCE, 1, n) is not None][:n_inside]
    boxes = APPEARANCE.box_coord.clone()
    boxes[[n for n in range(N) if n not in inside], 2] = 1e-9
    few = APPEARANCE._replace(box_coord=boxes)
    references = reference_pair(few, views=[1])
    scene = rap(form, few)
    assert_pictures(render(scene, form, [1])[0], references, form)
    if n_inside == 1:
        with pytest.raises(IndexError, match="exactly one Gaussian"):
            render(scene, form, [1], rap_compatible=True)
    else:
        assert_same(render(scene, form, [1], rap_compatible=True)[0], render(scene, form, [1])[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", ["RAP", "SH"])
def test_decoded_features(widths, form):
    """decode's numbers are the plain decoder's, and rendered from them view 1's appearance is in every view."""
    a, scene, plain = APPEARANCE, rap(form, widths=widths), rap(CPU64, widths=widths)
    view = a.viewmats[1].to(form.device, form.dtype), a.Ks[1].to(form.device, form.dtype)
    decoded = scene.decode(*view, a.maps[0].to(form.device), WEIGHTS[1], precision=form.precision)
    want = plain.decode(a.viewmats[1], a.Ks[1], a.maps[0], WEIGHTS[1], backend="reference")
    error = (decoded.cpu().double() - want).abs() / max(1.0, float(want.abs().max()))
    if form.half:
        assert float(error.flatten().sort().values[int(0.999 * error.numel())]) < 2e-2
    else:
        assert float(error.max()) < (1e-10 if form.dtype == torch.float64 else 1e-5)
    own = {"feature_maps": None, "map_ids": None, "view_weights": None, "backgrounds": BACKGROUNDS}
    references = tuple(
        render(rap(f, widths=widths), f, decoded=want, backend="reference", **own)[0] for f in (CPU32, CPU64)
    )
    assert_pictures(render(scene, form, decoded=want, **own)[0], references, form)
    several = torch.stack([want * scale for scale in (1.0, 0.5, 0.0, 2.0)])
    each = render(scene, form, decoded=several, **own)[0]
    for c in range(C):
        alone = render(scene, form, [c], decoded=several[c], **(own | {"backgrounds": BACKGROUNDS[c : c + 1]}))[0]
        assert_same(alone[0], each[c])


@pytest.mark.parametrize("form", FORMS)
def test_postprocess(form):
    post = PostProcess(size=(20, 30), mean=(0.485, 0.456, 0.406), std=STD, layout="CHW")
    references = reference_pair(postprocess=post, backgrounds=BACKGROUNDS)
    got = render(rap(form), form, postprocess=post, backgrounds=BACKGROUNDS)[0].cpu()
    assert got.shape == (C, 3, 20, 30)
    std = torch.tensor(STD)[:, None, None]
    bounded = [(x * std).permute(0, 2, 3, 1).contiguous() for x in (got, *references)]
    assert_pictures(bounded[0], (bounded[1], bounded[2]), form)


@pytest.mark.parametrize("form", FORMS)
def test_limits_and_modes_are_passed_on(form):
    options = {"near_plane": 1.5, "far_plane": 3.0, "radius_clip": 2.0, "eps2d": 0.1, "rasterize_mode": "classic"}
    references = reference_pair(**options)
    assert_pictures(render(rap(form), form, **options)[0], references, form)


widths_to_256 = st.lists(
    st.sampled_from([1, 2, 15, 16, 17, 48, 64, 100, 128, 129, 200, 255, 256]), min_size=1, max_size=3
)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(encoder=widths_to_256, decoder=widths_to_256, head=widths_to_256, seed=st.integers(0, 1000))
@pytest.mark.parametrize("form", FORMS)
def test_networks_of_any_widths(encoder, decoder, head, seed, form):
    widths = {
        "encoder": (159, *encoder),
        "decoder": (encoder[-1] + 48, *decoder),
        "color_decoder": (decoder[-1] + 3, *head, 3),
    }
    a = make_appearance(60, 2, n_maps=3)
    nets = {f: color_net(f, widths, seed) for f in (CPU32, CPU64, form)}
    single, exact = (
        render(rap_scene(a, nets[f], f), f, [0, 1], a, backend="reference")[0] for f in (CPU32, CPU64)
    )  # fmt: skip
    got = render(rap_scene(a, nets[form], form), form, [0, 1], a)[0]
    assert_pictures(got, (single, exact), form)


# Maps


def layouts(maps: Tensor) -> dict[str, Any]:
    """The same numbers in other memory."""
    r, channels, h, w = maps.shape
    pixels = maps.permute(0, 2, 3, 1)
    channels_last = maps.contiguous(memory_format=torch.channels_last)
    room = maps.new_zeros(1 + maps.numel())
    misaligned = room[1:].view(r, h, w, channels)
    misaligned.copy_(pixels)
    wide = maps.new_full((r, h + 2, w + 3, channels + 5), math.nan)
    wide[:, 1 : h + 1, 2 : w + 2, 4 : channels + 4] = pixels
    return {
        "contiguous": maps.contiguous(),
        "channels-last": channels_last,
        "list": list(channels_last),
        "tuple of both": tuple(m.contiguous() if i % 2 else m for i, m in enumerate(channels_last)),
        "misaligned": misaligned.permute(0, 3, 1, 2),
        "sliced": wide[:, 1 : h + 1, 2 : w + 2, 4 : channels + 4].permute(0, 3, 1, 2),
        "every second": channels_last.repeat_interleave(2, 0)[::2],
    }


@pytest.mark.parametrize("form", FAST_FORMS)
def test_maps_of_any_layout_and_dtype(form):
    """The same numbers give the same bits, wherever they lie."""
    scene, maps = rap(form), APPEARANCE.maps.half()
    want = render(scene, form, feature_maps=maps)[0]
    for dtype in (torch.float16, torch.float32, torch.float64):
        for name, given_maps in layouts(maps.to(form.device, dtype)).items():
            got = render(scene, form, feature_maps=given_maps)[0]
            assert torch.equal(got, want), f"{name}, {dtype}"
    assert not torch.equal(render(scene, form, feature_maps=maps.bfloat16())[0], want)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_maps_shared_by_number_order_or_list(form):
    scene, maps = rap(form), APPEARANCE.maps
    want = render(scene, form)[0]
    assert_same(render(scene, form, feature_maps=maps[MAP_IDS], map_ids=None)[0], want)
    assert_same(render(scene, form, map_ids=torch.tensor(MAP_IDS))[0], want)
    assert_same(render(scene, form, view_weights=torch.tensor(WEIGHTS, dtype=torch.float64))[0], want)
    other = [1, 0, 2]
    assert_same(render(scene, form, feature_maps=maps[other], map_ids=[other.index(k) for k in MAP_IDS])[0], want)
    unused = torch.cat([maps, torch.full_like(maps, math.nan)])
    assert_same(render(scene, form, feature_maps=unused)[0], want)
    one = render(scene, form, feature_maps=maps[:1], map_ids=None)[0]
    assert_same(render(scene, form, map_ids=[0] * C)[0], one)
    assert not torch.equal(one, want)


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_several_sizes(form):
    """One of them of a single pixel, one of a single row."""
    g = torch.Generator().manual_seed(6)
    maps = [(2 * torch.rand(48, h, w, generator=g) - 1).double() for h, w in ((1, 1), (1, 40), (31, 20))]
    references = reference_pair(feature_maps=maps)
    scene = rap(form)
    got = render(scene, form, feature_maps=maps)[0]
    assert_pictures(got, references, form)
    if form.dtype == torch.float32:
        for c in range(C):
            alone = render(scene, form, [c], feature_maps=maps[MAP_IDS[c]][None], map_ids=None)[0]
            assert_same(alone[0], got[c])
    pixel = render(scene, form, feature_maps=maps[:1], map_ids=None)[0]
    spread = render(scene, form, feature_maps=maps[0].expand(1, 48, 5, 3), map_ids=None)[0]
    limit = {torch.float64: 1e-10, torch.float32: 1e-2 if form.half else 1e-5}[form.dtype]
    assert float((pixel - spread).abs().max()) < limit, "a map of one colour is a pixel of it"


# Exact bits


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("widths", ["RAP", "widest", "SH"])
def test_a_view_in_a_batch_is_the_view_alone(widths, form):
    scene = rap(form, widths=widths)
    together, alphas, _ = render(scene, form)
    for c in range(C):
        alone, alpha, _ = render(scene, form, [c])
        assert_same(alone[0], together[c])
        assert_same(alpha[0], alphas[c])
    order = [2, 0, 3, 1, 1, 0]
    assert_same(render(scene, form, order)[0], together[order])
    assert_same(render(scene, form)[0], together)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_order_of_gaussians_does_not_matter(form):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    fixed = ("viewmats", "Ks", "maps")
    fields = {name: getattr(APPEARANCE, name)[order] for name in Appearance._fields if name not in fixed}
    shuffled = APPEARANCE._replace(**fields)
    assert_same(render(rap(form, shuffled), form)[0], render(rap(form), form)[0])


@pytest.mark.parametrize("form", FAST_FORMS)
def test_weight_zero_shows_no_reference_image(form):
    scene = rap(form)
    zero = render(scene, form, view_weights=0.0)[0]
    assert_same(render(scene, form, view_weights=0.0, map_ids=[1] * C)[0], zero)
    assert_same(render(scene, form, view_weights=0.0, feature_maps=100 * APPEARANCE.maps[:, :, :2])[0], zero)
    assert_same(render(scene, form)[0][2], zero[2])  # its own weight is 0
    assert float((render(scene, form, view_weights=0.05)[0] - zero).abs().max()) > 1e-3


@pytest.mark.parametrize("form", FAST_FORMS)
def test_threads_change_nothing(form):
    scene, results = rap(form), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(render(scene, form)[0])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("form", FAST_FORMS)
def test_a_network_changed_in_place_is_seen(form):
    scene = rap(form)
    before = render(scene, form)[0]
    other = color_net(form, seed=77)
    scene.color_net.load_state_dict(other.state_dict())
    after = render(scene, form)[0]
    assert_same(after, render(rap_scene(APPEARANCE, other, form), form)[0])
    assert float((after - before).abs().max()) > 0.1
    with torch.no_grad():
        scene.scene.intrinsic[:] = 0
    assert float((render(scene, form)[0] - after).abs().max()) > 0.01


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=pytest.mark.cuda, id=str(f.precision)) for f in (CUDA32, CUDA16)]
)
def test_on_another_stream(form):
    """Maps and networks made there, on memory that is NaN until then."""
    want = render(rap(form), form)[0]
    stream = torch.cuda.Stream()
    for _ in range(3):
        poison = [torch.full((1 << k,), math.nan, device="cuda") for k in range(8, 20)]
        torch.cuda.synchronize()
        del poison
        with torch.cuda.stream(stream):
            got = render(rap(form), form, feature_maps=APPEARANCE.maps.to("cuda", non_blocking=True).clone())[0]
        stream.synchronize()
        assert_same(got, want)


@pytest.mark.cuda
def test_precisions_differ_and_fp16_is_the_default():
    scene = rap(CUDA16)
    half = render(scene, CUDA16)[0]
    assert_same(render(scene, CUDA16, precision=None)[0], half)
    full = render(scene, CUDA32)[0]
    assert 45 < psnr(half, full) < 120
    arguments = {"view_weights": WEIGHTS}
    assert_same(render(scene, CUDA16, **arguments)[0], half)
    assert scene.prepare().network.half and not scene.prepare("fp32").network.half


# What is not finite


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gaussians_that_are_not_finite_are_not_drawn(value, form):
    """The picture is that of a scene without them."""
    bad = [0, 7, 8, 60]
    intrinsic = APPEARANCE.intrinsic.clone()
    intrinsic[bad, 3, 1] = value
    scene = rap(form, APPEARANCE._replace(intrinsic=intrinsic))
    got, _, meta = render(scene, form, backgrounds=BACKGROUNDS)
    rest = [n for n in range(N) if n not in bad]
    fixed = ("viewmats", "Ks", "maps")
    without = APPEARANCE._replace(
        **{name: getattr(APPEARANCE, name)[rest] for name in Appearance._fields if name not in fixed}
    )
    want = render(rap(form, without), form, backgrounds=BACKGROUNDS)[0]
    assert float((got - want).abs().max()) <= (1e-12 if form.dtype == torch.float64 else 0.0)
    whole = render(rap(form), form)[2]
    seen = torch.isin(whole["gaussian_ids"].cpu(), torch.tensor(bad))
    counts = torch.bincount(whole["camera_ids"].cpu()[seen].long(), minlength=C)
    assert int(counts.sum()) > 0
    assert meta["n_invalid"].tolist() == counts.tolist()
    assert render(scene, form, render_mode="D")[2]["n_invalid"].tolist() == [0] * C


@pytest.mark.parametrize("form", FORMS)
def test_maps_that_are_not_finite(form):
    maps = APPEARANCE.maps.clone()
    maps[0] = math.nan  # of views 1 and 3
    scene = rap(form)
    want, _, whole = render(scene, form, backgrounds=BACKGROUNDS)
    got, alphas, meta = render(scene, form, feature_maps=maps, backgrounds=BACKGROUNDS)
    counts = torch.bincount(whole["camera_ids"].long(), minlength=C).tolist()
    assert meta["n_invalid"].tolist() == [0, counts[1], 0, counts[3]]
    assert not alphas[[1, 3]].any()
    empty = BACKGROUNDS[[1, 3], None, None].to(got).expand(2, HEIGHT, WIDTH, 3)
    assert torch.equal(got[[1, 3]], empty)
    assert_same(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_is_not_finite(form):
    scene = rap(form)
    with torch.no_grad():
        scene.color_net.encoder.lin1.weight[5, 5] = math.nan
    got, alphas, meta = render(scene, form)
    assert int(meta["n_invalid"].sum()) > 100 and not alphas.any() and not got.any()


# Bad input


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_bad_arguments(device):
    form = CPU32 if device == "cpu" else CUDA32
    scene, maps = rap(form), APPEARANCE.maps.float().to(form.device)
    for changes, error, sentence in (
        ({"feature_maps": maps[:, :32]}, ValueError, r"feature_maps must be .*\[R, 48, h, w\] on .* \[3, 32, 9, 13\]"),
        ({"feature_maps": maps.int()}, ValueError, "feature_maps must be floating point"),
        ({"feature_maps": [maps[0], maps[1][:, :0]]}, ValueError, r"feature_maps\[1\] must be .* with no side 0"),
        (
            {"feature_maps": maps[:1, :, :1, :1].expand(1, 48, 7000, 7000), "map_ids": None},
            ValueError,
            "2\\^31 numbers",
        ),
        ({"map_ids": [0, 1, 2, 3]}, ValueError, r"map_ids\[3\] must be between 0 and 2, got 3"),
        ({"map_ids": [0, 1, 2, -1]}, ValueError, r"map_ids\[3\] must be between 0 and 2, got -1"),
        ({"map_ids": [0, 1, 2]}, ValueError, "one number for each of 4 views, got 3"),
        ({"map_ids": [0, 1, 2, 1.5]}, TypeError, r"map_ids\[3\] must be a whole number"),
        ({"view_weights": WEIGHTS[:3]}, ValueError, "one number for each of 4 views, got 3"),
        ({"view_weights": [1, 1, 1, math.inf]}, ValueError, "view_weights must be finite"),
        ({"view_weights": torch.tensor([1, 1, 1, math.nan])}, ValueError, "view_weights must be finite"),
        ({"view_weights": math.nan}, ValueError, "view_weights must be"),
        ({"view_weights": torch.ones(C, dtype=torch.int64)}, ValueError, "view_weights must be floating point"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
        ({"precision": "fp32", "backend": "reference"}, NotImplementedError, "precision='fp32' is not supported by"),
        ({"postprocess": PostProcess(mean=(0.1,), std=(1.0,))}, ValueError, "one number per colour channel"),
        ({"backgrounds": torch.zeros(C, 4)}, ValueError, r"backgrounds must be float32 \[4, 3\]"),
    ):
        with pytest.raises(error, match=sentence):
            render(scene, form, **changes)
    other = "cpu" if device == "cuda" else "meta"
    with pytest.raises(ValueError, match=f"feature_maps must be floating point .* on {form.device.type}"):
        scene.render(
            APPEARANCE.viewmats.to(form.device, form.dtype), APPEARANCE.Ks.to(form.device, form.dtype), WIDTH, HEIGHT,
            feature_maps=maps.to(other), map_ids=MAP_IDS,
        )  # fmt: skip
    render(scene, form)


def test_half_precision_is_for_a_gpu():
    with pytest.raises(NotImplementedError, match='precision must be "fp32" or None on cpu, got "fp16"'):
        render(rap(CPU32), CPU32, precision="fp16")
    with pytest.raises(ValueError, match='precision must be None for a float64 scene, got "fp32"'):
        render(rap(CPU64), CPU64, precision="fp32")


@pytest.mark.parametrize("form", FAST_FORMS)
def test_networks_too_wide_or_too_deep_have_the_reference(form):
    for widths in ((159, 300, 48), (159, *[16] * 18, 48)):
        net = color_net(form, {"encoder": widths, "decoder": (96, 48), "color_decoder": (51, 3)})
        scene = rap_scene(APPEARANCE, net, form)
        with pytest.raises(NotImplementedError, match="color_net must be at most 256 wide and 16 layers deep"):
            render(scene, form)
        assert render(scene, form, backend="reference")[0].isfinite().all()


@pytest.mark.cuda
def test_beyond_float16_is_an_error_that_says_what():
    scene = rap(CUDA16)
    with torch.no_grad():
        scene.color_net.encoder.lin1.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"must stay within float16's 65504 .* and weights does not"):
        render(scene, CUDA16)
    assert render(scene, CUDA32)[0].isfinite().all()
