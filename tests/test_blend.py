"""Stage 4, blend: gsplat's alpha cap, cut and stop, and every pixel against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenes import (
    ALPHA_CUT,
    HEIGHT,
    T_STOP,
    WIDTH,
    Scene,
    assert_close64,
    assert_close_outside_band,
    assert_same,
    flat,
    flatten_ids,
    make_scene,
    reference_records,
    skip_unsupported,
    spots,
)
from torch import Tensor

from rapfast import ops, rasterization, reference
from rapfast.ops.bin import Tiles, tile_grid
from rapfast.ops.project import Records


def stages(s: Scene, size: tuple[int, int], **options: Any) -> tuple[Records, Tensor, Tiles]:
    s = flat(s)
    records = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, *size, **options)
    colors = ops.color(s.means, s.viewmats, s.Ks, s.colors, records, *size, sh_degree=None)
    return records, colors, ops.bin(records, *size)


def blend_reference(
    records: Records, colors: Tensor, tiles: Tiles, size: tuple[int, int], **options: Any
) -> tuple[Tensor, Tensor]:
    r = reference_records(records, 1)
    grid = tile_grid(*size)
    offsets = tiles.tile_offsets[:-1].reshape(-1, grid[1], grid[0])
    return reference.blend(
        r.means2d, r.conics, r.opacities, colors, flatten_ids(records, tiles), offsets, *size, **options
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (16, 16), (17, 33), (WIDTH, HEIGHT)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_float64_equals_reference(channels, size, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(500, 2, batch=(2,), channels=channels, width=size[0], height=size[1], device=device)
    inputs = stages(scene, size)
    colors, alphas = ops.blend(*inputs, *size)
    want_colors, want_alphas = blend_reference(*inputs, size)
    assert colors.shape == (4, size[1], size[0], channels)
    assert_close64(colors, want_colors)
    assert_close64(alphas, want_alphas)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 31, 32, 33, 512])
def test_channel_counts(channels, device):
    """Every channel of a many-channel picture is the picture of that channel, bit by bit."""
    scene = make_scene(200, 1, channels=channels, width=40, height=24, dtype=torch.float32, device=device)
    records, colors, tiles = stages(scene, (40, 24))
    image, alphas = ops.blend(records, colors, tiles, 40, 24)
    picked = sorted({0, channels // 2, channels - 1})
    for d in picked:
        one, one_alphas = ops.blend(records, colors[:, d : d + 1].contiguous(), tiles, 40, 24)
        assert_same(image[..., d : d + 1].contiguous(), one)
        assert_same(alphas, one_alphas)
    own, _ = blend_reference(records, colors, tiles, (40, 24))
    doubled = records._replace(records=records.records.double())
    true, _ = blend_reference(doubled, colors.double(), tiles, (40, 24))
    assert_close_outside_band(image, own, true)


@pytest.mark.parametrize("opaque", [False, True])
def test_float32_errs_as_little_as_the_reference(opaque, device):
    """Also for a stack of opaque Gaussians, where most pixels stop early."""
    size = (90, 52)
    scene = make_scene(1500, 2, width=size[0], height=size[1], dtype=torch.float32)
    if opaque:
        scene.opacities[:] = 1.0
    records, colors, tiles = stages(scene.to(device), size)
    image, alphas = ops.blend(records, colors, tiles, *size)
    own = torch.cat(blend_reference(records, colors, tiles, size), -1)
    doubled = records._replace(records=records.records.double())
    true = torch.cat(blend_reference(doubled, colors.double(), tiles, size), -1)
    assert_close_outside_band(torch.cat([image, alphas], -1), own, true)
    # alpha below 1 always: a pixel stops before the Gaussian that would make it opaque
    assert float(alphas.min()) >= 0 and float(alphas.max()) < 1 - 0.9 * T_STOP
    if opaque:
        assert float((alphas > 0.99).float().mean()) > 0.5


@pytest.mark.parametrize("alpha_cap", [0.005, 0.5, 0.99, 0.9999])
def test_alpha_cap_is_an_argument(alpha_cap, device):
    skip_unsupported(device, torch.float64)
    inputs = stages(make_scene(500, 1, device=device), (WIDTH, HEIGHT))
    inputs[0].records[:, 5] *= 2  # opacities beyond 1 reach every cap
    colors, alphas = ops.blend(*inputs, WIDTH, HEIGHT, alpha_cap=alpha_cap)
    want_colors, want_alphas = blend_reference(*inputs, (WIDTH, HEIGHT), alpha_cap=alpha_cap)
    assert_close64(colors, want_colors)
    assert_close64(alphas, want_alphas)


# gsplat's semantics with Gaussians so wide that they are flat: alpha = opacity in every pixel.


def flat_spots(opacities: list[float], colors: list[tuple[float, ...]], dtype: torch.dtype, device) -> Scene:
    n = len(opacities)
    depths = [1.0 + k for k in range(n)]
    return spots([(8, 8)] * n, [1e6] * n, opacities, depths, colors, dtype=dtype, device=device)


def center(scene: Scene, **options: Any) -> tuple[list[float], float]:
    """Colour and alpha of the middle pixel."""
    colors, alphas, _ = rasterization(*scene, 16, 16, camera_model="ortho", **options)
    return colors[0, 8, 8].tolist(), alphas[0, 8, 8, 0].item()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
def test_alpha_is_capped_at_0_999(dtype, device):
    skip_unsupported(device, dtype)
    color, alpha = center(flat_spots([1.0], [(2.0,)], dtype, device))
    assert alpha == pytest.approx(0.999, abs=1e-6)
    assert color == pytest.approx([2 * 0.999], abs=1e-5)
    color, alpha = center(flat_spots([7.0], [(2.0,)], dtype, device))  # opacity above 1
    assert alpha == pytest.approx(0.999, abs=1e-6)
    color, alpha = center(flat_spots([1.0], [(2.0,)], dtype, device), alpha_cap=0.99)
    assert alpha == pytest.approx(0.99, abs=1e-6)


@DTYPES
@pytest.mark.parametrize(("factor", "drawn"), [(0.999, False), (1.001, True)])
def test_contributions_under_one_grey_level_are_cut(factor, drawn, dtype, device):
    """Through the fall-off, not the opacity: alpha = opacity exp(-sigma) just under and over 1/255."""
    skip_unsupported(device, dtype)
    variance = 16.0
    # The pixel centre lies d from the Gaussian's: opacity exp(-d^2 / (2 variance)) = factor / 255.
    d = math.sqrt(-2 * variance * math.log(factor * ALPHA_CUT / 0.7))
    s = spots([(8.5 - d, 8.5)], [math.sqrt(variance - 0.3)], [0.7], [1.0], [(1.0,)], dtype=dtype, device=device)
    color, alpha = center(s)
    assert alpha == (pytest.approx(factor * ALPHA_CUT, rel=1e-4) if drawn else 0.0)
    assert color == [pytest.approx(alpha, rel=1e-4)]


@DTYPES
def test_the_gaussian_that_would_stop_a_pixel_is_excluded(dtype, device):
    """0.1 x 0.01 x 0.1 = 1e-4 x (1 -/+ eps): with it the transmittance would reach 1e-4."""
    skip_unsupported(device, dtype)
    under = flat_spots([0.9, 0.99, 0.9001], [(1.0,), (1.0,), (1.0,)], dtype, device)
    color, alpha = center(under)
    assert alpha == pytest.approx(1 - 0.1 * 0.01, abs=1e-6)
    over = flat_spots([0.9, 0.99, 0.8999], [(1.0,), (1.0,), (1.0,)], dtype, device)
    color, alpha = center(over)
    assert alpha == pytest.approx(1 - 0.1 * 0.01 * 0.1001, abs=1e-6)


@DTYPES
def test_nothing_is_drawn_behind_the_stop(dtype, device):
    """A pixel that stopped stays stopped, though a fainter Gaussian behind would still fit."""
    skip_unsupported(device, dtype)
    s = flat_spots([0.99, 0.98, 0.9, 0.01], [(0.0,), (0.0,), (5.0,), (1000.0,)], dtype, device)
    color, alpha = center(s)
    assert color == [0.0]
    assert alpha == pytest.approx(1 - 0.01 * 0.02, abs=1e-6)


@DTYPES
def test_front_to_back_by_hand(dtype, device):
    skip_unsupported(device, dtype)
    s = flat_spots([0.5, 0.25, 0.8], [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], dtype, device)
    color, alpha = center(s)
    assert color == pytest.approx([0.5, 0.5 * 0.25, 0.5 * 0.75 * 0.8], abs=1e-6)
    assert alpha == pytest.approx(1 - 0.5 * 0.75 * 0.2, abs=1e-6)


@DTYPES
def test_opaque_stack(dtype, device):
    """Ten thousand opaque Gaussians at one place: the first is seen, the second reaches the stop."""
    skip_unsupported(device, dtype)
    n = 10_000
    s = spots([(8, 8)] * n, [1e6] * n, [1.0] * n, [1.0 + 1e-3 * k for k in range(n)], [(1.0, 2.0)] * n,
              dtype=dtype, device=device)  # fmt: skip
    color, alpha = center(s)
    assert alpha == pytest.approx(0.999, abs=1e-6)
    assert color == pytest.approx([0.999, 1.998], abs=1e-5)


@DTYPES
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 2.0])
def test_antialiased_compensation(sigma, dtype, device):
    """A dot smaller than a pixel fades by sqrt(det / det blurred); a classic one does not."""
    skip_unsupported(device, dtype)
    s = spots([(8.5, 8.5)], [sigma], [0.8], [1.0], [(1.0,)], dtype=dtype, device=device)
    _, classic = center(s)
    assert classic == pytest.approx(0.8, rel=1e-5)
    _, antialiased = center(s, rasterize_mode="antialiased")
    expected = 0.8 * sigma**2 / (sigma**2 + 0.3)
    assert antialiased == (pytest.approx(expected, rel=1e-4) if expected > ALPHA_CUT else 0.0)


@DTYPES
def test_fall_off_by_hand(dtype, device):
    """One Gaussian, every pixel: alpha = opacity exp(-((x - cx)^2 + (y - cy)^2) / (2 (s^2 + 0.3)))."""
    skip_unsupported(device, dtype)
    s = spots([(6.2, 9.7)], [1.5], [0.9], [1.0], [(1.0,)], dtype=dtype, device=device)
    _, alphas, _ = rasterization(*s, 16, 16, camera_model="ortho")
    p = torch.arange(16, dtype=torch.float64) + 0.5
    r2 = (p - 6.2) ** 2 + ((p - 9.7) ** 2)[:, None]
    want = 0.9 * torch.exp(-r2 / (2 * (1.5**2 + 0.3)))
    want[want < ALPHA_CUT] = 0
    torch.testing.assert_close(alphas[0, :, :, 0].double().cpu(), want, atol=1e-6, rtol=0)


def test_indefinite_conics_draw_nothing_where_sigma_is_negative(device):
    """Rounding may leave a conic that is not positive definite: sigma < 0 is skipped."""
    skip_unsupported(device, torch.float64)
    records, colors, tiles = stages(make_scene(200, 1, device=device), (WIDTH, HEIGHT))
    records.records[::3, 3] *= 3
    tiles = ops.bin(records, WIDTH, HEIGHT)
    image, alphas = ops.blend(records, colors, tiles, WIDTH, HEIGHT)
    want, want_alphas = blend_reference(records, colors, tiles, (WIDTH, HEIGHT))
    assert_close64(image, want)
    assert_close64(alphas, want_alphas)


@DTYPES
def test_absurd_opacities_end_somewhere(dtype, device):
    """1e38 exp(-sigma) is below 1/255 from sigma = 93 on: the far end of the row, sigma = 119, stays empty."""
    skip_unsupported(device, dtype)
    s = spots([(0.5, 8.5)], [0.8], [1e38], [1.0], [(1.0,)], dtype=dtype, device=device)
    _, alphas, meta = rasterization(*s, 16, 16, camera_model="ortho")
    assert alphas[0, 8, 0, 0].item() == pytest.approx(0.999, abs=1e-6)
    assert alphas[0, 8, 15, 0].item() == 0.0
    assert meta["radii"].tolist() == [[4, 4]]  # the bounds stay at 3.33 sigma


def test_no_records_no_light(device):
    records, colors, tiles = stages(
        make_scene(10, 2, dtype=torch.float32, device=device), (WIDTH, HEIGHT), near_plane=1e9
    )
    image, alphas = ops.blend(records, colors, tiles, WIDTH, HEIGHT)
    assert image.shape == (2, HEIGHT, WIDTH, 3) and not image.any()
    assert alphas.shape == (2, HEIGHT, WIDTH, 1) and not alphas.any()
