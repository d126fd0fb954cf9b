"""Stage 2, color: spherical harmonics, given colours and the depth channel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenes import (
    HEIGHT,
    WIDTH,
    Scene,
    assert_close64,
    assert_same,
    flat,
    make_scene,
    reference_records,
    skip_unsupported,
)
from torch import Tensor

from rapfast import ops, reference
from rapfast.ops.project import Records

RENDER_MODES = ["RGB", "D", "ED", "RGB+D", "RGB+ED"]


def project(s: Scene) -> Records:
    return ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, WIDTH, HEIGHT)


def color_op(s: Scene, **options: Any) -> tuple[Tensor, Records]:
    """Colours of the records, and the records, which the stage may change."""
    s = flat(s)
    records = project(s)
    return ops.color(s.means, s.viewmats, s.Ks, s.colors, records, WIDTH, HEIGHT, **options), records


def color_reference(s: Scene, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    s = flat(s)
    records = reference_records(project(s), s.viewmats.shape[1])
    return reference.color(records, s.means, s.colors, s.viewmats, **options)


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("extra", [0, 3], ids=["K exact", "K larger"])
@pytest.mark.parametrize("degree", range(5))
def test_sh_equals_reference(degree, extra, per_camera, device):
    skip_unsupported(device, torch.float64)
    scene = make_scene(
        300, 3, batch=(2,), sh_degree=degree, n_bases=(degree + 1) ** 2 + extra,
        per_camera=per_camera, device=device,
    )  # fmt: skip
    got, records = color_op(scene, sh_degree=degree)
    want, opacities, _ = color_reference(scene, sh_degree=degree)
    assert got.shape[0] > 100
    assert float(got.amin()) == 0.0 or degree == 0  # some are clamped
    assert_close64(got, want)
    assert_same(records.records[:, 5], opacities)


@pytest.mark.parametrize("degree", range(5))
def test_float32_sh_errs_as_little_as_the_reference(degree, device):
    scene = make_scene(2000, 3, sh_degree=degree, dtype=torch.float32, device=device)
    got, records = color_op(scene, sh_degree=degree)
    own, _, _ = color_reference(scene, sh_degree=degree)
    r = reference_records(records, 3)
    s = flat(scene.to(torch.float64))
    true, _, _ = reference.color(r, s.means, s.colors, s.viewmats, sh_degree=degree)
    bound = float((own.double() - true).abs().max())
    assert float((got.double() - true).abs().max()) <= max(2 * bound, 1e-6)


def test_sh_by_hand(device):
    """Degree 1 seen along +z, +y and +x: INRIA's order and signs (y, z, x with -, +, -)."""
    c0, c1 = 0.5 / math.sqrt(math.pi), math.sqrt(3 / (4 * math.pi))
    coeffs = torch.zeros(1, 1, 4, 3)
    coeffs[..., 0, :] = torch.tensor([0.3, 0.2, 0.1])
    coeffs[..., 1, 0] = 0.05  # y, in red
    coeffs[..., 2, 1] = 0.06  # z, in green
    coeffs[..., 3, 2] = 0.07  # x, in blue
    s = make_scene(1, 1, batch=(1,), sh_degree=1, dtype=torch.float32)
    s = s._replace(
        opacities=torch.ones(1, 1),
        colors=coeffs,
        Ks=torch.tensor([[[[30.0, 0, WIDTH / 2], [0, 30, HEIGHT / 2], [0, 0, 1]]]]),
    )
    z = torch.tensor([0.0, 0, 1])
    base = 0.5 + c0 * torch.tensor([0.3, 0.2, 0.1])
    for direction, expected in [
        ((0.0, 0.0, 1.0), [0, c1 * 0.06, 0]),
        ((0.0, 1.0, 0.0), [-c1 * 0.05, 0, 0]),
        ((1.0, 0.0, 0.0), [0, 0, -c1 * 0.07]),
    ]:
        # A camera at (1, 2, 3) that looks along `direction` at a Gaussian 2 units away.
        forward = torch.tensor(direction)
        right = torch.tensor([1.0, 0, 0]) if direction != (1.0, 0.0, 0.0) else -z
        R = torch.stack([right, torch.linalg.cross(forward, right), forward])
        eye = torch.tensor([1.0, 2, 3])
        viewmat = torch.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = R, -R @ eye
        view = s._replace(means=(eye + 2 * forward)[None, None], viewmats=viewmat[None, None])
        got, _ = color_op(Scene(*(x.to(device) for x in view)), sh_degree=1)
        torch.testing.assert_close(got.cpu(), (base + torch.tensor(expected))[None], atol=1e-6, rtol=0)


def test_sh_direction_of_a_scaled_camera(device):
    """The camera centre is -R^-1 t, also where R is not a rotation."""
    skip_unsupported(device, torch.float64)
    scene = make_scene(200, 2, sh_degree=3)
    scene.viewmats[0, :3, :3] *= 1.7
    scene.viewmats[1, :3, :3] += 0.1
    scene = scene.to(device)
    got, _ = color_op(scene, sh_degree=3)
    assert len(got) > 50
    assert_close64(got, color_reference(scene, sh_degree=3)[0])


def test_gaussian_at_the_camera_centre(device):
    """No direction: what depends on it is evaluated at 0, and nothing is NaN."""
    scene = make_scene(20, 1, sh_degree=4, dtype=torch.float32)
    scene.viewmats[0] = torch.eye(4)
    scene.means[3] = 0
    scene = flat(scene.to(device))
    records = ops.project(
        scene.means, scene.quats, scene.scales, None, scene.opacities, scene.viewmats, scene.Ks,
        WIDTH, HEIGHT, camera_model="ortho", near_plane=-10.0,
    )  # fmt: skip
    assert 3 in records.gaussian_ids.tolist()
    got = ops.color(scene.means, scene.viewmats, scene.Ks, scene.colors, records, WIDTH, HEIGHT, sh_degree=4)
    want, _, _ = reference.color(reference_records(records, 1), scene.means, scene.colors, scene.viewmats, sh_degree=4)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 32, 33, 512])
def test_given_colors_are_copied(channels, per_camera, device):
    scene = make_scene(150, 2, batch=(2,), channels=channels, per_camera=per_camera, dtype=torch.float32, device=device)
    got, records = color_op(scene, sh_degree=None)
    assert_same(got, color_reference(scene)[0])
    assert got.shape == (len(records.records), channels)


@pytest.mark.parametrize(("channels", "sh_degree"), [(3, None), (33, None), (3, 2)])
def test_colors_of_one_scene_for_all(channels, sh_degree, device):
    scene = make_scene(150, 2, batch=(3,), channels=channels, sh_degree=sh_degree, dtype=torch.float32, device=device)
    copied, _ = color_op(scene._replace(colors=torch.stack([scene.colors[0]] * 3)), sh_degree=sh_degree)
    one = flat(scene)
    camera = one.viewmats, one.Ks
    shared = ops.color(one.means, *camera, one.colors[:1], project(one), WIDTH, HEIGHT, sh_degree=sh_degree)
    assert_same(shared, copied)
    assert not torch.equal(copied, color_op(scene, sh_degree=sh_degree)[0])


@pytest.mark.parametrize("sh_degree", [None, 2])
@pytest.mark.parametrize("render_mode", RENDER_MODES)
def test_depth_channel(render_mode, sh_degree, device):
    """Last in RGB+D and RGB+ED, alone in D and ED: z of the record, exactly."""
    scene = make_scene(200, 2, sh_degree=sh_degree, dtype=torch.float32, device=device)
    got, records = color_op(scene, sh_degree=sh_degree, render_mode=render_mode)
    colors, _ = color_op(scene, sh_degree=sh_degree)
    depth = records.records[:, 6:7]
    want = {"RGB": colors, "D": depth, "ED": depth}.get(render_mode, torch.cat([colors, depth], 1))
    assert_same(got, want)


@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED", "D"])
@pytest.mark.parametrize("sh_degree", [None, 0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_colors(value, sh_degree, render_mode, device):
    """Such a record gets opacity 0 and colour 0 and is counted; D and ED do not read colours."""
    scene = make_scene(80, 2, sh_degree=sh_degree, dtype=torch.float32, device=device)
    seen = flat(scene)
    gaussian = int(project(seen).gaussian_ids[0])  # seen by camera 0
    scene.colors[gaussian].view(-1)[-1] = value
    got, records = color_op(scene, sh_degree=sh_degree, render_mode=render_mode)
    want, opacities, n_invalid = color_reference(scene, sh_degree=sh_degree, render_mode=render_mode)
    assert bool(got.isfinite().all())
    drawn = records.records[:, 5] > 0
    assert_same(records.records[:, 5], opacities)
    assert_same(records.n_invalid.view(1, 2), n_invalid)
    torch.testing.assert_close(got[drawn], want[drawn], atol=1e-5, rtol=0)
    if render_mode == "D":
        assert records.n_invalid.tolist() == [0, 0]
    else:
        assert records.n_invalid[0] == 1
        assert not drawn[0]


def test_coefficients_beyond_the_degree_are_not_read(device):
    scene = make_scene(80, 2, sh_degree=1, n_bases=9, dtype=torch.float32, device=device)
    want, _ = color_op(scene, sh_degree=1)
    scene.colors[:, 4:] = math.nan
    got, records = color_op(scene, sh_degree=1)
    assert_same(got, want)
    assert records.n_invalid.tolist() == [0, 0]
