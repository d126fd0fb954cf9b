"""The reference's postprocess."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from reference_scenes import make_scene

from rapfast import reference


def post(**fields: Any) -> SimpleNamespace:
    defaults = dict.fromkeys(("size", "clamp", "mean", "std", "dtype")) | {"layout": "HWC"}
    return SimpleNamespace(**(defaults | fields))


def test_postprocess_order_and_channels() -> None:
    colors = torch.tensor([[[[-1.0, 0.5, 8.0], [3.0, 0.7, 4.0]]]]).double()  # [1, 1, 2, 2 + depth]
    alphas = torch.tensor([[[[0.5], [0.25]]]]).double()
    clamped = post(clamp=(0.0, 1.0), mean=(0.5, 0.1), std=(2.0, 4.0))
    out, out_alphas = reference.composite(colors, alphas, render_mode="RGB+ED", postprocess=clamped)
    expected = torch.tensor([[[[-0.25, 0.1, 16.0], [0.25, 0.15, 16.0]]]]).double()
    torch.testing.assert_close(out, expected)
    assert torch.equal(out_alphas, alphas)
    # clamp comes before the resize: halving is the mean of the clamped pixels
    out, out_alphas = reference.composite(
        colors, alphas, render_mode="RGB+D", postprocess=post(clamp=(0.0, 1.0), size=(1, 1))
    )
    torch.testing.assert_close(out, torch.tensor([[[[0.5, 0.6, 6.0]]]]).double())
    assert out_alphas.tolist() == [[[[0.375]]]]


def test_resize_is_bilinear_between_pixel_centres() -> None:
    ramp = torch.arange(4.0).double()[None, None, :, None]  # 4 pixels of one row
    out, _ = reference.composite(ramp, ramp, postprocess=post(size=(1, 8)))
    assert out[0, 0, :, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    out, _ = reference.composite(ramp, ramp, postprocess=post(size=(2, 2)))
    assert out[0, :, :, 0].tolist() == [[0.5, 2.5]] * 2
    # 4 to 1 takes the two pixels about the centre, not all four: there is no antialiasing
    ramp[..., 0, :] = 100
    assert reference.composite(ramp, ramp, postprocess=post(size=(1, 1)))[0].item() == 1.5


def test_layout_and_dtypes() -> None:
    colors, alphas = torch.rand(2, 3, 4, 3).double(), torch.rand(2, 3, 4, 1).double()
    out, out_alphas = reference.composite(colors, alphas, postprocess=post(layout="CHW"))
    assert torch.equal(out, colors.permute(0, 3, 1, 2)) and out.is_contiguous()
    assert torch.equal(out_alphas, alphas.permute(0, 3, 1, 2))
    for dtype in (torch.float32, torch.float16):
        out, out_alphas = reference.composite(colors, alphas, postprocess=post(dtype=dtype))
        assert torch.equal(out, colors.to(dtype)) and out_alphas.dtype == torch.float64
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.5 / 255, 1.0, 7.0]).double().reshape(1, 1, 6, 1)
    out, _ = reference.composite(values, values, postprocess=post(dtype=torch.uint8))
    assert out.dtype == torch.uint8 and out.flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_rasterization_postprocesses_every_view() -> None:
    scene = make_scene(10, n_cameras=2, seed=18)
    small = post(size=(6, 7), layout="CHW", dtype=torch.float16)
    colors, alphas, _ = reference.rasterization(**scene, postprocess=small)
    assert colors.shape == (2, 3, 6, 7) and colors.dtype == torch.float16
    assert alphas.shape == (2, 1, 6, 7) and alphas.dtype == torch.float64
