"""ColorNet and what is fed to it, against the contract's formulas evaluated one Gaussian at a time."""

from __future__ import annotations

import math

import pytest
import torch
from appearance_scenes import (
    Appearance,
    make_appearance,
    net_state,
    slow_color,
    slow_features,
    slow_projection,
    slow_sh,
)
from torch import Tensor

from rapfast.appearance import ColorNet, positional_encoding, sample_features, view_directions
from rapfast.appearance.features import map_coordinates

SCENE = make_appearance()
STATE = net_state()
N = len(SCENE.means)


def assert_equal64(got: Tensor, want: list[list[float]], tolerance: float = 1e-11) -> None:
    expected = torch.tensor(want, dtype=torch.float64)
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def features(s: Appearance, map_id: int, view: int, **options: bool) -> Tensor:
    return sample_features(s.maps[map_id], s.means, s.box_coord, s.viewmats[view], s.Ks[view], **options)


def test_positional_encoding():
    x = torch.tensor([[0.3, -1.7, 2.0]], dtype=torch.float64)
    got = positional_encoding(x, 2)
    point = x[0].tolist()
    want = [*point]
    for k in (1, 2):
        want += [math.sin(k * p) for p in point] + [math.cos(k * p) for p in point]
    assert_equal64(got, [want], 1e-15)
    assert positional_encoding(x).shape == (1, 63)
    assert positional_encoding(x, 0).tolist() == x.tolist()


def test_view_directions():
    got = view_directions(SCENE.means, SCENE.viewmats[1])
    center = torch.linalg.inv(SCENE.viewmats[1])[:3, 3]
    assert torch.allclose(got, (SCENE.means - center) / ((SCENE.means - center).norm(dim=1, keepdim=True) + 1e-5))
    assert view_directions(center[None], SCENE.viewmats[1]).abs().max() < 1e-9  # no 0 / 0 at the camera itself


def test_sampled_features():
    n_valid = []
    for view in range(3):
        for map_id in range(2):
            got = features(SCENE, map_id, view)
            assert_equal64(got, [slow_features(SCENE, map_id, view, n) for n in range(N)])
        n_valid.append(sum(slow_projection(SCENE, view, n) is not None for n in range(N)))
        coordinates, valid = map_coordinates(SCENE.means, SCENE.box_coord[:, 2], SCENE.viewmats[view], SCENE.Ks[view])
        assert int(valid.sum()) == n_valid[-1]
        assert not coordinates[~valid].any()
    assert all(5 < count < N - 5 for count in n_valid), "both sides of the test must be met"
    assert not torch.equal(features(SCENE, 0, 0)[:, 32:], features(SCENE, 0, 1)[:, 32:])
    assert torch.equal(features(SCENE, 0, 0)[:, :32], features(SCENE, 0, 1)[:, :32])


def test_validity_is_strict_on_all_sides():
    """fx = fy = 1, c = 0: x = X / (Z + 0.01). Windows are chosen to end exactly on the point."""
    K = torch.eye(3, dtype=torch.float64)
    z = 0.99  # z + 0.01 is exactly 1
    rows = [[3.0, 2, z], [0, 2, z], [3, 0, z], [3, 2, -1.5], [3, 2, z], [3, 2, z], [3, 2, math.nan]]
    points = torch.tensor(rows, dtype=torch.float64)
    boxes = torch.tensor([[4.0, 8], [4, 8], [4, 8], [4, 8], [2, 8], [4, 3], [4, 8]])
    eye = torch.eye(4, dtype=torch.float64)
    coordinates, valid = map_coordinates(points.double(), boxes.double(), eye, K)
    assert valid.tolist() == [True] + [False] * 6
    assert torch.allclose(coordinates[0], torch.tensor([3 / 4 - 1, 2 / 2 - 1], dtype=torch.float64))
    assert not coordinates[1:].any()
    # behind the camera with z + 0.01 still positive: excluded by z > 0 alone
    point = torch.tensor([[0.001, 0.001, -0.005]], dtype=torch.float64)
    assert not map_coordinates(point, boxes[:1].double(), eye, K)[1].any()
    degenerate = torch.tensor([[0.0, 0.0], [-1, 5], [math.nan, 5], [math.inf, math.inf]], dtype=torch.float64)
    got, valid = map_coordinates(points[:1].double().expand(4, 3), degenerate, eye, K)
    assert valid.tolist() == [False, False, False, True]
    assert got.isfinite().all()


@pytest.mark.parametrize("n_valid", [0, 1, 2])
def test_few_gaussians_on_the_map(n_valid):
    inside = [n for n in range(N) if slow_projection(SCENE, 0, n) is not None]
    outside = [n for n in range(N) if n not in inside]
    rows = torch.tensor(sorted(outside[:9] + inside[:n_valid]))
    few = SCENE._replace(**{name: getattr(SCENE, name)[rows] for name in ("means", "box_coord", "intrinsic")})
    want = [slow_features(SCENE, 1, 0, int(n)) for n in rows]
    assert_equal64(features(few, 1, 0), want)
    if n_valid == 1:
        with pytest.raises(IndexError, match="exactly one Gaussian"):
            features(few, 1, 0, rap_compatible=True)
    else:
        assert_equal64(features(few, 1, 0, rap_compatible=True), want)
    assert features(few._replace(means=few.means[:0], box_coord=few.box_coord[:0]), 1, 0).shape == (0, 48)


@pytest.mark.parametrize("weight", [0.0, 0.37, 1.0, 2.0])
def test_colors(weight):
    net = ColorNet.from_state_dict(STATE)
    assert (net.n_appearance, net.n_intrinsic) == (48, 48)
    got = net.colors(SCENE.means, features(SCENE, 1, 2), SCENE.intrinsic, SCENE.viewmats[2], weight)
    picked = range(0, N, 5)
    assert_equal64(got[::5], [slow_color(STATE, SCENE, 1, 2, weight, n) for n in picked])
    if weight == 0:
        other = net.colors(SCENE.means, features(SCENE, 0, 1), SCENE.intrinsic, SCENE.viewmats[2], weight)
        assert torch.equal(got, other), "at weight 0 no reference image can be seen"
    as_rows = net(
        SCENE.means, features(SCENE, 1, 2), SCENE.intrinsic.flatten(1), SCENE.viewmats[2], torch.full((N,), weight)
    )
    assert torch.allclose(as_rows, got, rtol=1e-6, atol=1e-6)


def test_everything_that_is_fed_is_seen():
    """The negative controls of the test above: each of these changes must change the colours."""
    net = ColorNet.from_state_dict(STATE)
    base = (SCENE.means, features(SCENE, 1, 2), SCENE.intrinsic, SCENE.viewmats[2], 0.5)
    colors = net.colors(*base)
    changes = [
        (4, 1.5),
        (3, SCENE.viewmats[1]),
        (2, SCENE.intrinsic.transpose(1, 2).reshape(N, 16, 3)),
        (1, features(SCENE, 0, 2)),
        (1, features(SCENE, 1, 2).roll(16, 1)),
        (0, SCENE.means + 0.01),
    ]
    for place, value in changes:
        changed = net.colors(*base[:place], value, *base[place + 1 :])
        assert float((changed - colors).abs().mean()) > 1e-3 * float(colors.abs().mean()), place


def test_sh_output():
    state = {name: value for name, value in STATE.items() if not name.startswith("color_")}
    net = ColorNet.from_state_dict(state)
    got = net.sh(SCENE.means, features(SCENE, 0, 1), SCENE.intrinsic, 1.3)
    assert got.shape == (N, 16, 3)
    assert_equal64(got[:6].flatten(1), [slow_sh(state, SCENE, 0, 1, 1.3, n) for n in range(6)])
    with pytest.raises(ValueError, match="color_decoder is missing"):
        net.colors(SCENE.means, features(SCENE, 0, 1), SCENE.intrinsic, SCENE.viewmats[1])
    narrow = ColorNet.from_state_dict(net_state({"encoder": (63 + 5 + 4, 8), "decoder": (12, 10)}))
    with pytest.raises(ValueError, match="3, 12, 27, 48 or 75 outputs to be read as SH, got 10"):
        narrow.sh(SCENE.means, torch.zeros(N, 5).double(), torch.zeros(N, 4).double())


def test_other_widths_and_a_plain_embedding():
    widths = {"encoder": (63 + 20 + 48, 32, 7), "decoder": (7 + 48, 11), "color_decoder": (14, 9, 256, 3)}
    state = net_state(widths)
    net = ColorNet.from_state_dict(state)
    assert (net.n_appearance, net.n_intrinsic) == (20, 48)
    embedding = torch.linspace(-1, 1, 20, dtype=torch.float64)
    got = net.colors(SCENE.means, embedding, SCENE.intrinsic, SCENE.viewmats[0], 0.8)
    assert_equal64(got[::9], [slow_color(state, SCENE, 0, 0, 0.8, n, embedding.tolist()) for n in range(0, N, 9)])
    rows = net.colors(SCENE.means, embedding.expand(N, 20), SCENE.intrinsic, SCENE.viewmats[0], 0.8)
    assert torch.equal(rows, got)
    no_position = ColorNet.from_state_dict(net_state({"encoder": (9, 5), "decoder": (9, 3)}), n_frequencies=None)
    assert (no_position.n_appearance, no_position.n_intrinsic) == (5, 4)
    a, own = torch.randn(N, 5).double(), torch.randn(N, 4).double()
    assert torch.equal(no_position.sh(SCENE.means, a, own), no_position.sh(SCENE.means + 1, a, own))


def test_cached_decoder_output_gives_the_same_colors():
    net = ColorNet.from_state_dict(STATE)
    a = features(SCENE, 0, 0)
    cache = net.decode(SCENE.means, a, SCENE.intrinsic, 0.7)
    assert cache.shape == (N, 48)
    again = net.head(cache, view_directions(SCENE.means, SCENE.viewmats[0]))
    assert torch.equal(again, net.colors(SCENE.means, a, SCENE.intrinsic, SCENE.viewmats[0], 0.7))


def test_gradients_reach_every_input():
    widths = {"encoder": (3 + 48 + 3, 8, 4), "decoder": (7, 5), "color_decoder": (8, 3)}
    net = ColorNet.from_state_dict(net_state(widths), n_frequencies=0)
    s, n = make_appearance(n=2, map_size=(2, 2)), 2

    def run(means: Tensor, maps: Tensor, boxes: Tensor, intrinsic: Tensor, weight: Tensor) -> Tensor:
        a = sample_features(maps, means, boxes, s.viewmats[0], s.Ks[0])
        return net.colors(means, a, intrinsic, s.viewmats[0], weight)

    inputs = s.means, s.maps[0], s.box_coord * 0.7, torch.rand(n, 1, 3).double(), torch.tensor(0.6).double()
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-5)
    # Gaussians that miss the map, one of them at an infinite quotient, must not put NaN into a gradient.
    means = s.means.clone()
    means[0] = -(s.viewmats[0, :3, :3].T @ s.viewmats[0, :3, 3]) - 0.01 * s.viewmats[0, 2, :3]
    means = means.requires_grad_()
    run(means, *inputs[1:]).sum().backward()
    assert means.grad.isfinite().all()


def test_float32_is_near_float64():
    net = ColorNet.from_state_dict({name: value.float() for name, value in STATE.items()})
    s = Appearance(*(x.float() for x in SCENE))
    got = net.colors(s.means, features(s, 0, 1), s.intrinsic, s.viewmats[1], 1.2)
    assert got.dtype == torch.float32
    want = ColorNet.from_state_dict(STATE)
    want = want.colors(SCENE.means, features(SCENE, 0, 1), SCENE.intrinsic, SCENE.viewmats[1], 1.2)
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    half = sample_features(s.maps[0].half(), s.means, s.box_coord, s.viewmats[1], s.Ks[1])
    assert half.dtype == torch.float32
    assert torch.allclose(half, features(s, 0, 1), atol=1e-3)


def test_names_and_prefix():
    assert set(ColorNet().state_dict()) == set(STATE)
    assert {name: value.shape for name, value in ColorNet().state_dict().items()} == {
        name: value.shape for name, value in STATE.items()
    }
    for prefix in ("_orig_mod.", ""):
        net = ColorNet.from_state_dict({prefix + name: value for name, value in STATE.items()})
        assert all(torch.equal(net.state_dict()[name], STATE[name]) for name in STATE)
    assert not any(p.requires_grad for p in net.parameters())
    ColorNet.from_state_dict(STATE | {"mask_decoder.lin0.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ({"decoder.lin1.bias": None}, ["color_net.pth: does not fit", "decoder.lin1.bias [48] is missing"]),
        ({"encoder.lin2.weight": None}, ["encoder.lin2.weight [64, 96] is missing"]),
        ({name: None for name in STATE if "encoder." in name}, ["encoder.lin0.weight [out, in] is missing"]),
        ({"encoder.lin1.weight": torch.zeros(96, 100)}, ["encoder.lin1.weight must be [96, 128], got [96, 100]"]),
        ({"decoder.lin0.weight": torch.zeros(48, 40)}, ["decoder must take at least the encoder's 48 outputs, got 40"]),
        ({"encoder.lin0.weight": torch.zeros(128, 110)}, ["at least 111 inputs (63 of the position, 48 intrinsic)"]),
        ({"color_decoder.lin0.weight": torch.zeros(48, 50)}, ["color_decoder must take 51 inputs", "got 50"]),
        ({"skip.weight": torch.zeros(2)}, ["skip.weight [2] is not part of the network"]),
    ],
)  # fmt: skip
def test_bad_state_dicts(change, sentences):
    state = {name: value for name, value in (STATE | change).items() if value is not None}
    with pytest.raises(ValueError) as error:
        ColorNet.from_state_dict(state, "color_net.pth")
    for sentence in sentences:
        assert sentence in str(error.value)
