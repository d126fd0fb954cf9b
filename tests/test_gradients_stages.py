"""Each backward operator against autograd through the reference's stage, in float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from scenes import HEIGHT, WIDTH, assert_same, covariances, flat, flatten_ids, make_scene, reference_records
from torch import Tensor

from rapfast import PostProcess, ops, reference
from rapfast.ops import autograd_cuda
from rapfast.ops.bin import Tiles, tile_grid
from rapfast.ops.blend_bwd import blend_bwd
from rapfast.ops.color import DEPTH_CHANNELS
from rapfast.ops.color_bwd import color_bwd
from rapfast.ops.composite_bwd import composite_bwd
from rapfast.ops.project import CAMERA_MODELS
from rapfast.ops.project_bwd import project_bwd

color_stage = importlib.import_module("rapfast.reference.color").color


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_gradient(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    """Entry by entry, relative to the entry, with a floor far below a typical one."""
    assert got.shape == want.shape and bool(got.isfinite().all())
    assert float(want.abs().max()) > 0, "there is nothing to compare"
    floor = 1e-3 * want.abs().mean()
    worst = float(((got - want).abs() / want.abs().clamp(min=float(floor))).max())
    assert worst <= tolerance, f"differs by {worst} of the gradient, allowed {tolerance}"


# ------------------------------------------------------------------------------------------ project


@pytest.mark.parametrize("layout", ["records", "packed", "dense"])
@pytest.mark.parametrize("camera_model", list(CAMERA_MODELS))
@pytest.mark.parametrize("antialiased", [False, True])
def test_project(camera_model: str, antialiased: bool, layout: str) -> None:
    scene = flat(make_scene(200, 3, batch=(2,)))
    if camera_model == "ortho":
        scene.Ks[..., :2, :2] *= 0.2
    with_covars = layout == "packed"
    shape = (None, None, covariances(scene)) if with_covars else (scene.quats, scene.scales, None)
    inputs = (scene.means, *shape, scene.opacities, scene.viewmats, scene.Ks)
    options = {"camera_model": camera_model, "antialiased": antialiased}
    projected = ops.project(*inputs, WIDTH, HEIGHT, **options)
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    means, quats, scales, covars, *rest = leaves
    want = reference.project(
        means, quats, scales, *rest, WIDTH, HEIGHT, covars=covars, camera_model=camera_model,
        rasterize_mode="antialiased" if antialiased else "classic",
    )  # fmt: skip
    assert torch.equal(want.gaussian_ids, projected.gaussian_ids.long()) and len(want.depths) > 300

    v = random(len(want.depths), 8)
    v[:, 7] = 0  # the compensation is no output of the reference
    outputs = (want.means2d, want.conics, want.opacities, want.depths)
    gradients = torch.autograd.grad(
        sum((x * g).sum() for x, g in zip(outputs, (v[:, :2], v[:, 2:5], v[:, 5], v[:, 6]), strict=True)),
        [x for x in leaves if x is not None],
    )
    v_means2d, v_records = None, v.clone()
    if layout != "records":
        v_means2d, v_records[:, :2] = v[:, :2].contiguous(), torch.nan  # not read
    if layout == "dense":
        dense = torch.full((6, 200, 2), torch.nan, dtype=torch.float64)
        dense[want.batch_ids * 3 + want.camera_ids, want.gaussian_ids] = v_means2d
        v_means2d = dense
    got = project_bwd(
        *inputs, projected.gaussian_ids, projected.image_offsets, v_records, v_means2d, WIDTH, HEIGHT,
        camera_model=CAMERA_MODELS[camera_model], antialiased=antialiased, eps2d=0.3,
        wanted=[x is not None for x in inputs],
    )  # fmt: skip
    for found, expected in zip((x for x in got if x.numel()), gradients, strict=True):
        assert_gradient(found, expected)


def test_project_gives_only_what_is_wanted() -> None:
    scene = flat(make_scene(50, 2))
    inputs = (scene.means, scene.quats, scene.scales, None, scene.opacities, scene.viewmats, scene.Ks)
    projected = ops.project(*inputs, WIDTH, HEIGHT)
    v = random(*projected.records.shape)
    run = {"camera_model": 0, "antialiased": False, "eps2d": 0.3}
    records = (projected.gaussian_ids, projected.image_offsets, v, None)
    everything = project_bwd(*inputs, *records, WIDTH, HEIGHT, **run, wanted=[x is not None for x in inputs])
    for wanted in range(7):
        if inputs[wanted] is None:
            continue
        one = project_bwd(*inputs, *records, WIDTH, HEIGHT, **run, wanted=[i == wanted for i in range(7)])
        assert_same(one[wanted], everything[wanted])
        assert all(x.numel() == 0 for i, x in enumerate(one) if i != wanted)


# -------------------------------------------------------------------------------------------- color


@pytest.mark.parametrize("render_mode", ["RGB", "RGB+D", "D"])
@pytest.mark.parametrize("per_camera", [False, True])
@pytest.mark.parametrize("sh_degree", [None, 0, 1, 2, 3, 4])
def test_color(sh_degree: int | None, per_camera: bool, render_mode: str) -> None:
    bases = None if sh_degree is None else (sh_degree + 1) ** 2 + 2
    scene = make_scene(150, 3, batch=(2,), channels=5, sh_degree=sh_degree, n_bases=bases, per_camera=per_camera)
    scene = flat(scene)
    scene.viewmats[:, 1, :3, :3] *= 1.3  # no rotation
    projected = ops.project(*scene[:3], None, scene.opacities, scene.viewmats, scene.Ks, WIDTH, HEIGHT)
    projected.records[5, 5] = 0  # taken out
    leaves = [x.clone().requires_grad_() for x in (scene.means, scene.viewmats, scene.colors)]
    means, viewmats, colors = leaves
    records = reference_records(projected, 3)
    depths = records.depths.clone().requires_grad_()
    channels, _, _ = color_stage(
        records._replace(depths=depths), means, colors, viewmats, sh_degree=sh_degree, render_mode=render_mode
    )
    v = random(*channels.shape)
    kept = torch.ones_like(v)
    with_depth = render_mode != "RGB"
    kept[5, : v.shape[1] - with_depth] = 0
    want = torch.autograd.grad((channels * v * kept).sum(), [*leaves, depths], allow_unused=True)
    got = color_bwd(
        scene.means, scene.viewmats, scene.colors, projected.gaussian_ids, projected.image_offsets, projected.records,
        v, sh_degree=-1 if sh_degree is None else sh_degree, depth_channel=DEPTH_CHANNELS[render_mode],
        wanted=[True] * 4,
    )  # fmt: skip
    for found, expected in zip(got, want, strict=True):
        if expected is None or sh_degree == 0 and found.shape in (scene.means.shape, scene.viewmats.shape):
            assert found.count_nonzero() == 0
        else:
            assert_gradient(found, expected)


def test_a_clamped_color_passes_no_gradient() -> None:
    scene = flat(make_scene(60, 1, sh_degree=0))
    scene.colors[:, :30, 0, 1] = -50.0
    projected = ops.project(*scene[:3], None, scene.opacities, scene.viewmats, scene.Ks, WIDTH, HEIGHT)
    v = torch.ones(len(projected.records), 3, dtype=torch.float64)
    got = color_bwd(
        scene.means, scene.viewmats, scene.colors, projected.gaussian_ids, projected.image_offsets, projected.records,
        v, sh_degree=0, depth_channel=0, wanted=[True] * 4,
    )  # fmt: skip
    seen = projected.gaussian_ids.long()
    clamped = seen[seen < 30]
    assert len(clamped) > 5
    assert got.colors[0, clamped, 0, 1].count_nonzero() == 0
    assert (got.colors[0, clamped, 0, 0] > 0).all() and (got.colors[0, seen[seen >= 30]] > 0).all()


# -------------------------------------------------------------------------------------------- blend


def blend_inputs(
    channels: int, n: int = 300, width: int = WIDTH, height: int = HEIGHT, size: float = 1.0
) -> tuple[Any, ...]:
    """Records, their colours and tile lists, of two cameras."""
    scene = flat(make_scene(n, 2, channels=channels, width=width, height=height))
    scene = scene._replace(scales=scene.scales * size)
    scene.opacities[:, ::5] = 1.2  # reaches the cap
    projected = ops.project(*scene[:3], None, scene.opacities, scene.viewmats, scene.Ks, width, height)
    colors = ops.color(scene.means, scene.viewmats, scene.Ks, scene.colors, projected, width, height, sh_degree=None)
    return projected, colors, ops.bin(projected, width, height)


@pytest.mark.parametrize("alpha_cap", [0.999, 0.6])
@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_blend(channels: int, alpha_cap: float) -> None:
    projected, colors, tiles = blend_inputs(channels)
    ids, offsets = flatten_ids(projected, tiles), tiles.tile_offsets[:-1].reshape(2, *tile_grid(WIDTH, HEIGHT)[::-1])
    r = projected.records
    leaves = [x.clone().requires_grad_() for x in (r[:, :2], r[:, 2:5], r[:, 5], colors)]
    want_abs = torch.zeros_like(leaves[0])
    image, alphas = reference.blend(
        *leaves, ids.int(), offsets.int(), WIDTH, HEIGHT, alpha_cap=alpha_cap, absgrad=want_abs
    )
    v_image, v_alphas = random(*image.shape), random(*alphas.shape)
    ((image * v_image).sum() + (alphas * v_alphas).sum()).backward()
    got = blend_bwd(r, colors, projected.image_offsets, tiles, v_image, v_alphas, alpha_cap=alpha_cap, absgrad=True)
    assert_gradient(got.records[:, :2], leaves[0].grad)
    assert_gradient(got.records[:, 2:5], leaves[1].grad)
    assert_gradient(got.records[:, 5], leaves[2].grad)
    assert_gradient(got.record_colors, leaves[3].grad)
    assert_gradient(got.means2d_abs, want_abs)
    assert got.records[:, 6:].count_nonzero() == 0
    without = blend_bwd(r, colors, projected.image_offsets, tiles, v_image, v_alphas, alpha_cap=alpha_cap)
    assert_same(without.records, got.records)
    assert_same(without.record_colors, got.record_colors)
    assert without.means2d_abs.shape == (0, 2)


def test_blend_is_the_same_with_more_channels_and_in_other_windows() -> None:
    """Partial sums are kept for a window of tiles at a time; with many channels the windows are smaller."""
    width, height, wide = 160, 144, 60
    projected, colors, tiles = blend_inputs(3, n=3500, width=width, height=height, size=4.0)
    assert len(tiles.tile_records) * (6 + wide) * 8 > 1.2 * (64 << 20)
    v_image, v_alphas = random(2, height, width, 3), random(2, height, width, 1)
    narrow = blend_bwd(projected.records, colors, projected.image_offsets, tiles, v_image, v_alphas, alpha_cap=0.999)
    pad = (0, wide - 3)
    got = blend_bwd(
        projected.records, torch.nn.functional.pad(colors, pad, value=0.5), projected.image_offsets, tiles,
        torch.nn.functional.pad(v_image, pad), v_alphas, alpha_cap=0.999,
    )  # fmt: skip
    assert_same(got.records, narrow.records)
    assert_same(got.record_colors[:, :3].contiguous(), narrow.record_colors)
    assert got.record_colors[:, 3:].count_nonzero() == 0


def test_misses_of_a_needle_give_no_nan() -> None:
    """a dx overflows next to the mean, and dx^2 far from it."""
    records = torch.tensor([[8.5, 8.5, 3e38, 0.0, 0.1, 0.5, 1.0, 1.0], [1e30, 8.5, 1e-3, 0.0, 0.1, 0.5, 1.0, 1.0]])
    offsets, tiles = torch.tensor([0, 2]), Tiles(torch.tensor([0, 2]), torch.tensor([0, 1]).int())
    ones = torch.ones(1, 16, 16, 2), torch.ones(1, 16, 16, 1)
    got = blend_bwd(records, torch.ones(2, 2), offsets, tiles, *ones, alpha_cap=0.999, absgrad=True)
    assert all(bool(x.isfinite().all()) for x in got)
    assert got.records[0, 5] > 0 and got.records[1].count_nonzero() == 0


# ---------------------------------------------------------------------------------------- composite

POSTPROCESSES = [
    None,
    PostProcess(clamp=(0.2, 0.8)),
    PostProcess(size=(23, 31)),
    PostProcess(size=(90, 100), clamp=(0.1, 0.9), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), layout="CHW"),
    PostProcess(size=(1, 200)),
]


@pytest.mark.parametrize("background", ["none", "color", "image"])
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED", "ED", "RGB+D"])
@pytest.mark.parametrize("post", POSTPROCESSES, ids=str)
def test_composite(post: PostProcess | None, render_mode: str, background: str) -> None:
    n_colors = 0 if render_mode == "ED" else 3
    if post is not None and n_colors == 0 and post.mean is not None:
        post = PostProcess(size=post.size, layout=post.layout)
    channels = n_colors + (render_mode != "RGB")
    colors = torch.rand(2, HEIGHT, WIDTH, channels, dtype=torch.float64).requires_grad_()
    alphas = torch.rand(2, HEIGHT, WIDTH, 1, dtype=torch.float64)
    alphas[0, :5] = 0  # where the divisor is the smallest
    alphas.requires_grad_()
    shape = {"none": None, "color": (2, n_colors), "image": (2, HEIGHT, WIDTH, n_colors)}[background]
    backgrounds = None if shape is None or n_colors == 0 else torch.rand(shape, dtype=torch.float64).requires_grad_()
    out, out_alphas = reference.composite(
        colors, alphas, backgrounds=backgrounds, render_mode=render_mode, postprocess=post
    )
    v_out, v_alphas = random(*out.shape), random(*out_alphas.shape)
    leaves = [x for x in (colors, alphas, backgrounds) if x is not None]
    want = torch.autograd.grad((out * v_out).sum() + (out_alphas * v_alphas).sum(), leaves)
    chw = post is not None and post.layout == "CHW"
    std = None if post is None or post.std is None else colors.new_tensor(post.std)
    got = composite_bwd(
        colors.detach(), alphas.detach(), None if backgrounds is None else backgrounds.detach(), std, v_out,
        v_alphas.permute(0, 2, 3, 1).contiguous() if chw else v_alphas, n_color_channels=n_colors,
        expected_depth=render_mode.endswith("ED"), clamp=None if post is None else post.clamp, channels_first=chw,
        with_backgrounds=backgrounds is not None,
    )  # fmt: skip
    for found, expected in zip((x for x in got if x.numel()), want, strict=True):
        assert_gradient(found, expected)


# --------------------------------------------------------------------------------------- operators


def backward_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each backward operator, of several forms."""
    samples: dict[str, list[tuple[Any, ...]]] = {"project": [], "color": [], "blend": [], "composite": []}
    for sh, dtype in ((False, torch.float32), (True, torch.float64)):
        s = flat(make_scene(100, 2, batch=(2,), sh_degree=1 if sh else None, dtype=dtype))
        shape = (s.quats, s.scales, None) if sh else (None, None, covariances(s))
        inputs = (s.means, *shape, s.opacities, s.viewmats, s.Ks)
        r = ops.project(*inputs, WIDTH, HEIGHT)
        v = torch.randn(r.records.shape, dtype=dtype)
        v_means2d = torch.randn(4, 100, 2, dtype=dtype) if sh else None
        wanted = [x is not None for x in inputs[:-1]] + [sh]
        size = (WIDTH, HEIGHT)
        records = (r.gaussian_ids, r.image_offsets)
        samples["project"].append((*inputs, *records, v, v_means2d, *size, 0, sh, 0.3, wanted))
        v_colors = torch.randn(len(r.records), 4 if sh else 3, dtype=dtype)
        form = (1, False, 1) if sh else (-1, False, 0)
        color = (s.means, s.viewmats, s.colors, *records, r.records, v_colors, *form, [True, sh, True, True])
        samples["color"].append(color)
        tiles = ops.bin(r, *size)
        images = (
            torch.randn(4, HEIGHT, WIDTH, v_colors.shape[1], dtype=dtype),
            torch.randn(4, HEIGHT, WIDTH, 1, dtype=dtype),
        )
        samples["blend"].append((r.records, v_colors, r.image_offsets, *tiles, *images, *size, 0.999, sh))
        background = torch.rand(4, 3, dtype=dtype)
        out = torch.randn(4, images[0].shape[-1], 20, 30, dtype=dtype), torch.randn(4, 20, 30, 1, dtype=dtype)
        samples["composite"].append((*images, background, background[0], *out, 3, sh, 0.0, 1.0, True, True))
        samples["composite"].append((*images, None, None, *images, 3, False, None, None, False, False))
    return samples


@pytest.mark.parametrize("name", ["project", "color", "blend", "composite"])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.rapfast, f"{name}_bwd").default
    for arguments in backward_samples()[name]:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["project", "color", "blend", "composite"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    op = getattr(torch.ops.rapfast, f"{name}_bwd").default
    before = torch.get_num_threads()
    try:
        for arguments in backward_samples()[name]:
            torch.set_num_threads(1)
            want = op(*arguments)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                for got, expected in zip(op(*arguments), want, strict=True):
                    assert_same(got, expected)
    finally:
        torch.set_num_threads(before)


def test_the_state_of_another_run_is_refused() -> None:
    """What saved tensors come back as is up to hooks: a checkpoint's are those of a second run."""
    means2d, link = torch.rand(3, 2, requires_grad=True), torch.rand(3, 8, requires_grad=True)
    state = torch.zeros(100, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.new_zeros(len(x) + 8)):
        made = torch.rand(1, 4, 4, 3), torch.rand(1, 4, 4, 1), state, None, None
        images, _ = autograd_cuda._Pixels.apply(means2d, link, made, None)
        with pytest.raises(RuntimeError, match="kept 100 bytes for its backward, which finds 108"):
            images.sum().backward()
