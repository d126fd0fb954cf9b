"""Stage 5, composite: background, expected depth and post-processing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenes import assert_close64, assert_same, make_scene, skip_unsupported
from torch import Tensor

from rapfast import PostProcess, ops, rasterization, reference

MODES = ["RGB", "D", "ED", "RGB+D", "RGB+ED"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def blended(
    mode: str = "RGB",
    n_images: int = 2,
    height: int = 13,
    width: int = 22,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Blended colours and alphas as the blend stage leaves them; alpha is 0 in places."""
    g = torch.Generator().manual_seed(2)
    d = {"RGB": channels, "D": 1, "ED": 1}.get(mode, channels + 1)
    alphas = torch.rand(n_images, height, width, 1, generator=g, dtype=torch.float64)
    alphas = (1.3 * alphas - 0.3).clamp(min=0)
    colors = 1.5 * torch.rand(n_images, height, width, d, generator=g, dtype=torch.float64) * alphas
    return colors.to(dtype).to(device), alphas.to(dtype).to(device)


def backgrounds_of(kind: str | None, colors: Tensor, mode: str) -> Tensor | None:
    g = torch.Generator().manual_seed(3)
    d = colors.shape[-1] - (mode != "RGB")
    shape = {None: None, "color": (d,), "image": (*colors.shape[1:3], d)}[kind]
    if shape is None or d == 0:
        return None
    return torch.rand(colors.shape[0], *shape, generator=g, dtype=torch.float64).to(colors)


def both(
    mode: str, inputs: tuple[Tensor, Tensor], backgrounds: Tensor | None, post: PostProcess | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    n_color = inputs[0].shape[-1] - (mode != "RGB")
    got = ops.composite(
        *inputs, n_color_channels=n_color, backgrounds=backgrounds,
        expected_depth=mode.endswith("ED"), postprocess=post,
    )  # fmt: skip
    want = reference.composite(*inputs, backgrounds=backgrounds, render_mode=mode, postprocess=post)
    return got, want


POSTS = [
    None,
    PostProcess(),
    PostProcess(clamp=(0.1, 0.8)),
    PostProcess(size=(7, 11)),
    PostProcess(size=(40, 9), layout="CHW"),
    PostProcess(size=(13, 30)),
    PostProcess(size=(1, 1)),
    PostProcess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
    PostProcess(std=(0.2, 0.3, 0.4), layout="CHW"),
    PostProcess(size=(26, 44), clamp=(0.0, 1.0), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), layout="CHW"),
]


@pytest.mark.parametrize("post", POSTS, ids=str)
@pytest.mark.parametrize("kind", [None, "color", "image"])
@pytest.mark.parametrize("mode", MODES)
def test_float64_equals_reference(mode, kind, post, device):
    skip_unsupported(device, torch.float64)
    if post is not None and mode in ("D", "ED") and (post.mean or post.std):
        post = PostProcess(size=post.size, clamp=post.clamp, layout=post.layout)
    inputs = blended(mode, dtype=torch.float64, device=device)
    got, want = both(mode, inputs, backgrounds_of(kind, inputs[0], mode), post)
    # Expected depth divides by as little as 1e-10; both do the same division.
    assert_close64(got[0], want[0], 1e-12)
    assert_close64(got[1], want[1], 1e-12)


@pytest.mark.parametrize("post", POSTS, ids=str)
@pytest.mark.parametrize("kind", [None, "color", "image"])
def test_float32_errs_as_little_as_the_reference(kind, post, device):
    inputs = blended("RGB+ED", device=device)
    doubles = tuple(x.double() for x in inputs)
    backgrounds = backgrounds_of(kind, inputs[0], "RGB+ED")
    got, own = both("RGB+ED", inputs, backgrounds, post)
    _, true = both("RGB+ED", doubles, None if backgrounds is None else backgrounds.double(), post)
    for x, y, z in zip(got, own, true, strict=True):
        assert x.dtype == torch.float32
        bound = float((y.double() - z).abs().max())
        assert float((x.double() - z).abs().max()) <= max(2 * bound, 5e-7)


@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [((1, 1), (5, 7)), ((1, 17), (3, 4)), ((480, 854), (240, 427)), ((17, 33), (1, 1)), ((5, 6), (15, 18))],
    ids=str,
)
def test_resize_is_torchs(size_in, size_out, device):
    colors, alphas = blended(height=size_in[0], width=size_in[1], n_images=1, device=device)
    got, got_alphas = ops.composite(colors, alphas, n_color_channels=3, postprocess=PostProcess(size=size_out))
    for x, y in ((got, colors), (got_alphas, alphas)):
        want = F.interpolate(y.permute(0, 3, 1, 2), size_out, mode="bilinear", align_corners=False)
        torch.testing.assert_close(x, want.permute(0, 2, 3, 1), atol=2e-6, rtol=0)


@DTYPES
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("size", [None, (7, 30)])
def test_float16_equals_torchs_rounding(size, layout, dtype, device):
    """Exactly torch's .half() of the same float picture, over its whole range."""
    skip_unsupported(device, dtype)
    colors, alphas = blended(dtype=dtype, device=device)
    # Subnormals, halfway cases, the largest half and what lies beyond it, infinities and NaN.
    special = [0.0, -0.0, 6e-8, 2e-8, 3e-5, 6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519.99, 65520]
    special += [1e6, -1e6, math.inf, -math.inf, math.nan, 1e-20, -1e-45]
    colors.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)
    as_float, _ = ops.composite(
        colors, alphas, n_color_channels=3, postprocess=PostProcess(size=size, layout=layout, dtype=torch.float32)
    )
    assert as_float.dtype == torch.float32
    as_half, half_alphas = ops.composite(
        colors, alphas, n_color_channels=3, postprocess=PostProcess(size=size, layout=layout, dtype=torch.float16)
    )
    assert_same(as_half, as_float.half())
    assert half_alphas.dtype == dtype


def test_float16_of_every_exponent(device):
    """Every 997th float32 bit pattern, NaN excepted."""
    bits = torch.arange(-(2**31), 2**31, 99_991, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()]
    values = values[: len(values) // 100 * 100].reshape(1, -1, 100, 1).to(device)
    got, _ = ops.composite(
        values, torch.zeros_like(values), n_color_channels=1, postprocess=PostProcess(dtype=torch.float16)
    )
    assert_same(got, values.half())


@DTYPES
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_uint8_equals_torchs(layout, dtype, device):
    skip_unsupported(device, dtype)
    colors, alphas = blended(dtype=dtype, device=device)
    levels = torch.arange(-3, 260, dtype=dtype) / 255
    special = torch.cat([levels, levels + 0.5 / 255, torch.tensor([-1e9, 1e9, math.inf, -math.inf], dtype=dtype)])
    colors.view(-1)[: len(special)] = special
    got, _ = ops.composite(
        colors, alphas, n_color_channels=3, postprocess=PostProcess(dtype=torch.uint8, layout=layout)
    )
    want = (255 * colors + 0.5).clamp(0, 255).to(torch.uint8)
    assert_same(got, want.permute(0, 3, 1, 2).contiguous() if layout == "CHW" else want)


def test_uint8_of_nan_is_black(device):
    colors, alphas = blended(device=device)
    colors[0, 0, 0] = math.nan
    got, _ = ops.composite(colors, alphas, n_color_channels=3, postprocess=PostProcess(dtype=torch.uint8))
    assert got[0, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode, layout, device):
    inputs = blended(mode, device=device)
    d = inputs[0].shape[-1]
    (colors, alphas), _ = both(mode, inputs, None, PostProcess(size=(9, 5), layout=layout))
    assert colors.shape == ((2, d, 9, 5) if layout == "CHW" else (2, 9, 5, d))
    assert alphas.shape == ((2, 1, 9, 5) if layout == "CHW" else (2, 9, 5, 1))


def test_depth_has_no_background_clamp_or_normalisation(device):
    colors, alphas = blended("RGB+D", device=device)
    colors[..., 3] *= 10
    post = PostProcess(clamp=(0.2, 0.3), mean=(1.0,) * 3, std=(2.0,) * 3)
    got, _ = ops.composite(
        colors, alphas, n_color_channels=3, backgrounds=torch.ones(2, 3, device=device), postprocess=post
    )
    assert_same(got[..., 3], colors[..., 3])
    assert float(got[..., :3].max()) < 0


def test_expected_depth_where_nothing_was_drawn(device):
    """0 / max(0, 1e-10) is 0, not NaN."""
    zeros = torch.zeros(1, 2, 2, 1, device=device)
    got, _ = ops.composite(zeros, zeros, n_color_channels=0, expected_depth=True)
    assert_same(got, zeros)


@pytest.mark.parametrize("kind", ["color", "image"])
def test_nan_background_shows_only_in_its_image(kind, device):
    """A background that is not finite is the caller's: its own pixels become NaN, no other image's."""
    scene = make_scene(50, 2, dtype=torch.float32, device=device)
    shape = (2, 3) if kind == "color" else (2, 41, 75, 3)
    backgrounds = torch.rand(shape, device=device)
    want, _, _ = rasterization(*scene, 75, 41, backgrounds=backgrounds)
    if kind == "color":
        backgrounds[1, 2] = math.nan
    else:
        backgrounds[1, 5, 6, 2] = math.nan
    got, alphas, meta = rasterization(*scene, 75, 41, backgrounds=backgrounds)
    expected = torch.zeros_like(got, dtype=torch.bool)
    if kind == "color":
        expected[1, :, :, 2] = True
    else:
        expected[1, 5, 6, 2] = True
    assert_same(got.isnan(), expected)
    assert_same(got[~expected], want[~expected])
    assert bool(alphas.isfinite().all()) and meta["n_invalid"].tolist() == [0, 0]


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"size": (0, 4)}, "postprocess.size"),
    ({"size": (4,)}, "postprocess.size"),
    ({"size": (4.0, 4)}, "postprocess.size"),
    ({"size": 4}, "postprocess.size"),
    ({"size": (True, 4)}, "postprocess.size"),
    ({"size": (4, 1 << 21)}, "postprocess.size"),
    ({"clamp": (1.0, 0.0)}, "postprocess.clamp"),
    ({"clamp": (math.nan, 1.0)}, "postprocess.clamp"),
    ({"clamp": (0.0,)}, "postprocess.clamp"),
    ({"clamp": 1.0}, "postprocess.clamp"),
    ({"mean": (math.nan,) * 3}, "postprocess.mean"),
    ({"mean": 0.5}, "postprocess.mean"),
    ({"mean": ("a", "b", "c")}, "postprocess.mean"),
    ({"std": (0.0, 1.0, 1.0)}, "postprocess.std"),
    ({"std": (-1.0, 1.0, 1.0)}, "postprocess.std"),
    ({"std": (math.inf, 1.0, 1.0)}, "postprocess.std"),
    ({"layout": "NHWC"}, "postprocess.layout"),
    ({"layout": None}, "postprocess.layout"),
    ({"dtype": torch.bfloat16}, "postprocess.dtype"),
    ({"dtype": torch.int32}, "postprocess.dtype"),
    ({"dtype": "uint8"}, "postprocess.dtype"),
    ({"dtype": torch.uint8, "mean": (0.5,) * 3}, "postprocess.dtype"),
]


@pytest.mark.parametrize(("fields", "name"), BAD_FIELDS, ids=str)
def test_bad_fields_are_named(fields, name):
    with pytest.raises((TypeError, ValueError), match=name):
        PostProcess(**fields)


def test_fields_become_tuples():
    """So that equal settings are equal and hashable, however they were written."""
    post = PostProcess(size=[4, 5], clamp=[0, 1], mean=[0.5] * 3, std=[1.0] * 3)
    assert post == PostProcess(size=(4, 5), clamp=(0, 1), mean=(0.5,) * 3, std=(1.0,) * 3)
    assert isinstance(hash(post), int)


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
def test_settings_that_do_not_fit_the_call_are_named(backend):
    scene = make_scene(5, 1, dtype=torch.float32)

    def render(post: Any, **options: Any) -> None:
        rasterization(*scene, 16, 16, backend=backend, postprocess=post, **options)

    with pytest.raises(ValueError, match=r"postprocess\.mean must have one number per colour channel \(3"):
        render(PostProcess(mean=(0.5,)))
    with pytest.raises(ValueError, match=r"postprocess\.std must have one number per colour channel \(0"):
        render(PostProcess(std=(0.5,) * 3), render_mode="ED")
    with pytest.raises(ValueError, match=r"uint8 holds colours alone, got render_mode RGB\+ED"):
        render(PostProcess(dtype=torch.uint8), render_mode="RGB+ED")
    with pytest.raises(TypeError, match=r"postprocess must be a rapfast.PostProcess or None, got dict"):
        render({"size": (4, 4)})
