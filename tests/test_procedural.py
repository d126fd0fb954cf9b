"""The procedural room: the same every time, closed, lit, and made of flat Gaussians."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from rapfast import procedural, rasterization
from rapfast.procedural import layout, lighting
from rapfast.procedural import patches as P


@pytest.fixture(scope="module")
def small():
    return procedural.surface(30_000, 0)


@pytest.fixture(scope="module")
def scene(small):
    return procedural.to_scene(small, procedural.light(small))


def digest(scene) -> str:
    return hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in (scene.means, scene.quats, scene.scales, scene.opacities, scene.sh))
    ).hexdigest()


def test_same_seed_same_bits_other_seed_other_room(scene):
    assert digest(procedural.room(30_000, 0)) == digest(scene)
    assert not np.array_equal(procedural.surface(30_000, 1).points, scene.means.numpy())


@pytest.mark.parametrize("n", [30_001, 61_234])
def test_exactly_as_many_as_asked_for(n):
    assert len(procedural.surface(n, 3)) == n


def test_too_few_is_refused():
    with pytest.raises(ValueError, match=r"n_gaussians must be at least \d+ for this room, got 100"):
        procedural.room(100)


def test_scene_is_valid_and_flat(scene):
    assert scene.sh.shape == (30_000, 16, 3) and scene.sh.dtype == torch.float32
    assert bool(scene.valid().all())
    assert torch.allclose(scene.quats.norm(dim=1), torch.ones(len(scene)), atol=1e-5)
    ratio = scene.scales[:, 2] / scene.scales[:, :2].amax(1)
    assert float(ratio.median()) < 0.1  # one thin axis
    assert float(scene.scales[:, :2].max()) < 1.0


def test_thin_axis_is_the_normal(small, scene):
    w, x, y, z = scene.quats.double().T
    third = torch.stack(
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1
    )  # third column of the rotation
    assert np.abs((third.numpy() * small.normals).sum(1) - 1).max() < 1e-5


def test_normals_point_into_the_room(small):
    """The walls, floor and ceiling are seen from inside: their elements face the middle."""
    low, high = small.room
    for axis in range(3):
        for side, sign in ((low, 1.0), (high, -1.0)):
            on = (np.abs(small.points[:, axis] - side[axis]) < 1e-6) & (small.emitter == 0)
            on &= ((small.points >= low - 1e-6) & (small.points <= high + 1e-6)).all(1)
            flat = on & (np.abs(small.normals[:, axis]) > 0.99)
            assert flat.sum() > 100
            # What touches the outer planes and looks away is the back of a moulding or reveal: nearly nothing.
            assert (small.normals[flat, axis] * sign > 0).mean() > 0.97


def test_no_holes_and_no_grid_from_inside():
    """At the demo's size of the room, the background must not show through, from any of the chosen places."""
    made = procedural.surface(200_000, 0)
    scene = procedural.to_scene(made, np.zeros((len(made), 1, 3)))
    cameras = procedural.room_cameras(8, 427, 240)
    _, alphas, _ = rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks,
        427, 240, sh_degree=0,
    )  # fmt: skip
    assert float(alphas.min()) > 0.85
    assert float((alphas < 0.95).float().mean()) < 0.002


def test_degrees_one_to_three_matter(small, scene):
    glossy = torch.from_numpy((small.gloss > 0.3) & (small.emitter == 0))
    cameras = procedural.room_cameras(2, 160, 90)
    render = lambda degree: rasterization(  # noqa: E731
        scene.means,
        scene.quats,
        scene.scales,
        scene.opacities,
        scene.sh,
        cameras.viewmats,
        cameras.Ks,
        160,
        90,
        sh_degree=degree,
    )[0]
    assert float(scene.sh[glossy, 1:].abs().mean()) > 0.003
    assert float((render(3) - render(0)).abs().max()) > 0.08


def test_matte_colours_do_not_depend_on_the_direction(small, scene):
    sh = scene.sh.numpy()
    matte = (small.gloss == 0) & (small.emitter == 0)
    assert (sh[matte, 1:] == 0).all()
    colour = 0.5 + 0.28209479177387814 * sh[matte, 0]
    assert colour.min() >= -1e-5 and colour.max() <= 1 + 1e-5
    assert 0.25 < colour.mean() < 0.75


def test_sh_basis_is_orthonormal():
    n = 20_000
    z = 1 - 2 * (np.arange(n) + 0.5) / n
    a = np.pi * (1 + 5**0.5) * (np.arange(n) + 0.5)
    d = np.stack([np.sqrt(1 - z * z) * np.cos(a), np.sqrt(1 - z * z) * np.sin(a), z], 1)
    basis = lighting.sh_basis(d)
    assert np.abs(basis.T @ basis * 4 * np.pi / n - np.eye(16)).max() < 1e-3


def test_sh_basis_is_the_renderers():
    """One Gaussian in the middle of the picture, each coefficient alone: the renderer sees the colour that the fit
    intends.
    """
    cameras = procedural.room_cameras(1, 33, 33)
    eye = torch.linalg.inv(cameras.viewmats[0])[:3, 3]
    forward = cameras.viewmats[0, 2, :3]
    direction = forward.double().numpy()[None]
    sh = torch.zeros(1, 16, 3)
    sh[0, :, 0] = torch.linspace(-0.3, 0.4, 16)
    cameras.Ks[:, :2, 2] = 16.5
    out, _, _ = rasterization(
        (eye + 2 * forward)[None], torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 1.0), torch.tensor([0.9]), sh,
        cameras.viewmats, cameras.Ks, 33, 33, sh_degree=3,
    )  # fmt: skip
    wanted = 0.9 * max(0.0, 0.5 + float(lighting.sh_basis(direction)[0] @ sh[0, :, 0].double().numpy()))
    assert float(out[0, 16, 16, 0]) == pytest.approx(wanted, rel=1e-3)


def test_lightings_differ_and_share_the_geometry(small, scene):
    names = ("DAY", "EVENING", "OVERCAST", "NIGHT")
    mean = {}
    inside = small.emitter == 0
    for name in names:
        sh = scene.sh.numpy() if name == "DAY" else procedural.light(small, getattr(procedural, name))
        assert sh.shape == (len(small), 16, 3) and np.isfinite(sh).all()
        mean[name] = (0.5 + 0.2821 * sh[inside, 0]).mean(0)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(mean[one] - mean[other]).max() > 0.02, (one, other)
    assert mean["NIGHT"][0] / mean["NIGHT"][2] > mean["OVERCAST"][0] / mean["OVERCAST"][2]  # lamps are warm


def test_sun_falls_through_the_window_and_not_through_the_wall(small):
    sun = lighting._unit(np.asarray(lighting.DAY.sun_direction))
    w = small.windows[0]
    pane = np.array([w.x[0] + 0.4, w.y, w.z[0] + 0.4])
    wall = np.array([-2.6, w.y, 1.2])
    for target, expected in ((pane, True), (wall, False)):
        origin = (target - 1.0 * sun)[None]
        assert lighting._through_window(small, origin, sun[None])[0] == expected


def test_shadow_rays_agree_with_one_box_at_a_time():
    rng = np.random.default_rng(0)
    turned = P.Box(np.array([0.2, -0.1, 0.3]), np.array([0.5, 0.2, 0.4]), 0.6)
    patch = P.Patch(
        P.plane((0, 0, 0), (1, 0, 0), (0, 1, 0)), (1.0, 1.0), P.Material(lambda u, v: np.ones((len(u), 3))), (1.0, 1.0)
    )
    empty = P.sample([patch], 1.0)
    empty.boxes = [turned]
    origin = rng.uniform(-2, 2, (1500, 3))
    direction = lighting._unit(rng.normal(size=(1500, 3)))
    near = lighting._nearest(empty, origin, direction, np.full(1500, 4.0))
    # March along the rays instead.
    t = np.arange(0.0, 4.0, 0.02)
    p = origin[:, None] + t[None, :, None] * direction[:, None] - turned.centre
    c, s = np.cos(0.6), np.sin(0.6)
    local = np.stack([c * p[..., 0] + s * p[..., 1], c * p[..., 1] - s * p[..., 0], p[..., 2]], -1)
    hit = (np.abs(local) < turned.half - 0.004).all(-1)
    outside = ~hit[:, 0]
    first = np.where(hit.any(1), t[hit.argmax(1)], 4.0)
    clear = outside & ((hit.sum(1) > 2) | ~hit.any(1)) & (first < 3.9) | (outside & ~hit.any(1) & (near > 3.99))
    assert clear.sum() > 250 and (hit.any(1) & outside).sum() > 25
    assert np.abs(near - first)[clear].max() < 0.03


def test_cameras_stand_in_the_room_and_not_in_furniture(small):
    low, high = small.room
    cameras = [procedural.room_cameras(40, 64, 36, seed=5), procedural.room_orbit(60, 64, 36)]
    for group in cameras:
        eyes = torch.linalg.inv(group.viewmats.double())[:, :3, 3].numpy()
        assert ((eyes > low + 0.1) & (eyes < high - 0.1)).all()
        rest = small.emitter == 0
        nearest = np.array([np.linalg.norm(small.points[rest] - eye, axis=1).min() for eye in eyes])
        assert nearest.min() > 0.15
        assert torch.allclose(torch.linalg.det(group.viewmats[:, :3, :3]), torch.ones(len(group)), atol=1e-5)
        assert group.viewmats[:, 1, 2].max() < 0  # the picture's y axis points down: upright
        assert (group.width, group.height, len(group.names)) == (64, 36, len(group))


def test_the_orbit_is_smooth_and_closed():
    eyes = torch.linalg.inv(procedural.room_orbit(120, 64, 36).viewmats.double())[:, :3, 3]
    steps = (eyes.roll(-1, 0) - eyes).norm(dim=1)
    assert float(steps.max()) < 0.15 and float(steps.max() / steps.min()) < 3


def test_patch_counts_what_it_makes():
    patch = P.Patch(
        P.plane((0, 0, 0), (1, 0, 0), (0, 1, 0)),
        (2.0, 1.0),
        P.Material(lambda u, v: np.ones((len(u), 3))),
        (0.1, 0.07),
        breaks=((0.5,), ()),
    )
    holed = P.Patch(patch.shape, patch.size, patch.material, patch.spacing, holes=((0.5, 1.0, 0.2, 0.6),))
    for p in (patch, holed):
        made = P.sample([p], 0.9)
        assert len(made) == p.count(0.9) and P.refine(made, 7).points.shape == (len(made) + 7, 3)
        assert np.allclose(made.normals, [0, 0, 1])
    assert not (
        (made.points[:, 0] > 0.5) & (made.points[:, 0] < 1.0) & (made.points[:, 1] > 0.2) & (made.points[:, 1] < 0.6)
    ).any()
    with pytest.raises(ValueError, match="extra must be at most"):
        P.refine(made, len(made) + 1)


def test_room_constants_agree():
    assert layout.LOW[1] < layout.HIGH[1] == layout._WINDOW.y
