"""Stage 2 by a colour network: colours of records, and a network's numbers for all Gaussians of a view, against the
plain torch network in float64."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, slow_color, slow_features
from network_scenes import (
    CPU32,
    CUDA16,
    FAST_FORMS,
    FORMS,
    WIDTHS,
    Appearance,
    Form,
    assert_colors,
    color_net,
    make_appearance,
    near_border,
    net_state,
    to,
)
from scenes import assert_same
from torch import Tensor

from rapfast import ops, reference
from rapfast.appearance import ColorNet
from rapfast.appearance.features import map_coordinates, sample_features, view_directions
from rapfast.appearance.fused import map_pixels, prepare
from rapfast.ops.project import Records

N, C = 150, 4
APPEARANCE = make_appearance(N, C, n_maps=3)
MAP_IDS = [2, 0, 1, 0]
WEIGHTS = [0.3, 1.7, 0.0, 1.0]
HEADLESS = {"encoder": (159, 128, 48), "decoder": (96, 64, 48)}


pytestmark = pytest.mark.usefixtures("one_thread")


class Views(NamedTuple):
    """What the views of one call are coloured from, float64."""

    a: Appearance = APPEARANCE
    map_ids: tuple[int, ...] = tuple(MAP_IDS)
    weights: tuple[float, ...] = tuple(WEIGHTS)
    maps: tuple[Tensor, ...] = tuple(APPEARANCE.maps)
    coord_scale: float = 1.0


def project(a: Appearance, form: Form) -> Records:
    a = to(a, form)
    geometry = (x[None].contiguous() for x in (a.means, a.quats, a.scales))
    return ops.project(*geometry, None, a.opacities[None], a.viewmats[None], a.Ks[None], WIDTH, HEIGHT)


def maps_input(v: Views, form: Form) -> ops.NetworkInput:
    dtype = torch.float16 if form.half else form.dtype
    pixels, places = map_pixels([m.to(form.device) for m in v.maps], v.map_ids, dtype)
    weights = torch.tensor(v.weights, dtype=torch.float64)
    boxes = v.a.box_coord.to(form.device, form.dtype)
    return ops.NetworkInput("maps", weights, pixels, torch.tensor(places, dtype=torch.int64), boxes, v.coord_scale)


def run(
    v: Views, net: ColorNet, form: Form, given: ops.NetworkInput | None = None, records: Records | None = None,
    render_mode: str = "RGB", **options: Any,
) -> tuple[Tensor, Records]:  # fmt: skip
    """Colours of the records, and the records, which the stage may change."""
    a = to(v.a, form)
    network = prepare(net, a.means, a.intrinsic, half=form.half, **options).network
    records = project(v.a, form) if records is None else records
    given = maps_input(v, form) if given is None else given
    colors = ops.color_net(
        a.means[None], a.viewmats[None], a.Ks[None], records, WIDTH, HEIGHT, network, given, render_mode=render_mode
    )
    return colors, records


def outputs(v: Views, net: ColorNet, form: Form, view: int, **options: Any) -> Tensor:
    """A raw network's numbers for all Gaussians of one view."""
    a = to(v.a, form)
    network = prepare(net, a.means, a.intrinsic, half=form.half, output="raw", **options).network
    one = v._replace(map_ids=v.map_ids[view : view + 1], weights=v.weights[view : view + 1])
    cameras = a.viewmats[None, view : view + 1].contiguous(), a.Ks[None, view : view + 1].contiguous()
    return ops.network_outputs(a.means[None], *cameras, network, maps_input(one, form))


def features64(v: Views, view: int) -> Tensor:
    a = v.a
    return sample_features(
        v.maps[v.map_ids[view]].double(), a.means, a.box_coord, a.viewmats[view], a.Ks[view], coord_scale=v.coord_scale
    )


def all_colors64(v: Views, net: ColorNet) -> Tensor:
    """[C, N, 3] by the plain network."""
    net, a = net.cpu().double(), v.a
    return torch.stack([
        net.colors(a.means, features64(v, c), a.intrinsic, a.viewmats[c], v.weights[c]) for c in range(len(v.weights))
    ])  # fmt: skip


def rows_of(table: Tensor, records: Records) -> Tensor:
    """The records' rows of a table [C, N, ...]."""
    counts = records.image_offsets.diff().cpu()
    images = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return table[images, records.gaussian_ids.cpu().long()]


def borders(v: Views) -> Tensor:
    return torch.stack([near_border(v.a, c) for c in range(len(v.weights))])


def without_bias(net: ColorNet) -> ColorNet:
    state = net.state_dict()
    return ColorNet.from_state_dict(state | {"encoder.lin1.bias": torch.zeros_like(state["encoder.lin1.bias"])})


# Against the plain network


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_colors_equal_the_plain_network(widths, form):
    net = color_net(form, widths)
    got, records = run(Views(), net, form)
    assert len(got) > 200
    want = rows_of(all_colors64(Views(), net), records)
    assert float(want.std()) > 0.1, "there must be something to see"
    assert_colors(got, want, form, rows_of(borders(Views()), records))
    assert records.n_invalid.tolist() == [0] * C


@pytest.mark.parametrize("form", FORMS)
def test_colors_equal_a_slow_reading(form):
    """The formulas in Python's floats, one record of each view."""
    net = color_net(form)
    got, records = run(Views(), net, form)
    state = {name: value.cpu().double() for name, value in net.state_dict().items()}
    for c, begin in enumerate(records.image_offsets[:-1].tolist()):
        n = int(records.gaussian_ids[begin])
        want = slow_color(state, APPEARANCE, MAP_IDS[c], c, WEIGHTS[c], n)
        assert_colors(got[begin : begin + 1], torch.tensor([want], dtype=torch.float64), form)


def test_the_bounds_tell_a_wrong_network():
    """The checks of this file fail on the errors they are for: fp16's bound is the widest of them."""
    loose = CPU32._replace(half=True)
    net = color_net(CPU32)
    v, records = Views(), project(APPEARANCE, CPU32)
    want = rows_of(all_colors64(v, net), records)
    wrong = {
        "first view's weight for all": all_colors64(v._replace(weights=(WEIGHTS[0],) * C), net),
        "maps swapped": all_colors64(v._replace(maps=v.maps[::-1]), net),
        "maps of a reference image swapped": all_colors64(
            v._replace(maps=tuple(m[[*range(16, 32), *range(16), *range(32, 48)]] for m in v.maps)), net
        ),
        "first view's camera for all": all_colors64(
            v._replace(a=v.a._replace(viewmats=v.a.viewmats[:1].expand(C, 4, 4))), net
        ),
        "a layer without its bias": all_colors64(v, without_bias(net)),
        "boxes' height and width swapped": all_colors64(
            v._replace(a=v.a._replace(box_coord=torch.cat([v.a.box_coord[:, :2], v.a.box_coord[:, 2:].flip(-1)], 1))),
            net,
        ),
        "half a pixel aside": all_colors64(
            v._replace(a=v.a._replace(box_coord=torch.cat([v.a.box_coord[:, :2] + 1 / 13, v.a.box_coord[:, 2:]], 1))),
            net,
        ),
    }
    assert_colors(want.half(), want, loose)
    for what, colors in wrong.items():
        with pytest.raises(AssertionError):
            assert_colors(rows_of(colors, records), want, loose)
            pytest.fail(what)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("render_mode", ["RGB+D", "RGB+ED"])
def test_depth_stands_behind_the_color(render_mode, form):
    net = color_net(form)
    plain, _ = run(Views(), net, form)
    got, records = run(Views(), net, form, render_mode=render_mode)
    assert_same(got[:, :3].contiguous(), plain)
    assert_same(got[:, 3].contiguous(), records.records[:, 6].contiguous())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degree", range(5))
def test_spherical_harmonics(degree, form):
    count = (degree + 1) ** 2
    net = color_net(form, {"encoder": (159, 96, 40), "decoder": (88, 64, 3 * count)})
    got, records = run(Views(), net, form, output="sh", sh_degree=degree)
    plain, a = net.cpu().double(), APPEARANCE
    views = []
    for c in range(C):
        coefficients = plain.sh(a.means, features64(Views(), c), a.intrinsic, WEIGHTS[c])
        toward = a.means - reference.camera_positions(a.viewmats[c])
        views.append((reference.spherical_harmonics(degree, toward, coefficients) + 0.5).clamp(min=0))
    want = rows_of(torch.stack(views), records)
    assert bool((want == 0).any()) and bool((want > 0.5).any()), "the clamp must be met"
    assert_colors(got, want, form, rows_of(borders(Views()), records))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 16, 31, 48, 80])
def test_an_embedding_of_the_view(length, form):
    g = torch.Generator().manual_seed(length)
    embeddings = torch.randn(C, length, generator=g).double()
    net = color_net(form, {"encoder": (111 + length, 64, 48), "decoder": (96, 48), "color_decoder": (51, 48, 3)})
    given = ops.NetworkInput(
        "embedding", torch.tensor(WEIGHTS, dtype=torch.float64), features=embeddings.to(form.device, form.dtype)
    )
    got, records = run(Views(), net, form, given)
    plain, a = net.cpu().double(), APPEARANCE
    want = torch.stack([plain.colors(a.means, embeddings[c], a.intrinsic, a.viewmats[c], WEIGHTS[c]) for c in range(C)])
    assert_colors(got, rows_of(want, records), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_camera", [False, True], ids=["shared", "per camera"])
def test_the_head_on_given_features(per_camera, form):
    net = color_net(form, {"encoder": (159, 20), "decoder": (68, 37), "color_decoder": (40, 30, 3)})
    g = torch.Generator().manual_seed(3)
    decoded = torch.randn(*([C] if per_camera else []), N, 37, generator=g).double()
    given = ops.NetworkInput(
        "features", torch.ones(C, dtype=torch.float64), features=decoded.to(form.device, form.dtype)
    )
    got, records = run(Views(), net, form, given, part="head")
    plain, a = net.cpu().double(), APPEARANCE
    each = decoded.expand(C, N, 37)
    want = torch.stack([plain.head(each[c], view_directions(a.means, a.viewmats[c])) for c in range(C)])
    assert_colors(got, rows_of(want, records), form)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_position_or_own_features(form):
    """The base is then a layer's biases, or there is none."""
    nets = {
        "no position": ({"encoder": (96, 64, 48), "decoder": (96, 48), "color_decoder": (51, 3)}, APPEARANCE),
        "position alone": (
            {"encoder": (111, 64, 48), "decoder": (48, 48), "color_decoder": (51, 3)},
            APPEARANCE._replace(intrinsic=APPEARANCE.intrinsic[:, :0]),
        ),
        "neither": (
            {"encoder": (48, 64, 48), "decoder": (48, 48), "color_decoder": (51, 3)},
            APPEARANCE._replace(intrinsic=APPEARANCE.intrinsic[:, :0]),
        ),
    }
    for name, (widths, a) in nets.items():
        net = color_net(form, widths, n_frequencies=10 if name == "position alone" else None)
        v = Views(a)
        got, records = run(v, net, form)
        assert_colors(got, rows_of(all_colors64(v, net), records), form, rows_of(borders(v), records))


# Stage by stage: what is sampled, decoded, seen


def sampler() -> ColorNet:
    """A network that puts out what it is fed: single layers, the identity on the appearance."""
    state = net_state({"encoder": (159, 48), "decoder": (96, 48)})
    state = {name: torch.zeros_like(value) for name, value in state.items()}
    state["encoder.lin0.weight"][:, 63:111] = torch.eye(48)
    state["decoder.lin0.weight"][:, :48] = torch.eye(48)
    return ColorNet.from_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(9, 13), (1, 1), (1, 7), (6, 1), (2, 2), (40, 31)])
def test_sampled_features(size, form):
    """All Gaussians, those beyond a map's border and outside the projected one among them."""
    a = make_appearance(400, 2, n_maps=1, map_size=size)
    v = Views(a, (0, 0), (1.0, 1.5), tuple(a.maps))
    net = sampler().to(form.device, form.dtype)
    for view in range(2):
        got = outputs(v, net, form, view)
        want = v.weights[view] * features64(v, view)
        inside = map_coordinates(a.means, a.box_coord[:, 2], a.viewmats[view], a.Ks[view])[1]
        assert 50 < int(inside.sum()) < 350
        keep = ~near_border(a, view) if form.half else torch.ones(400, dtype=torch.bool)
        assert int(keep.sum()) > 390
        error = (got.cpu().double() - want)[keep].abs().max()
        # fp16: maps and what is fed are rounded, and a place in float32 is up to 1e-5 of a pixel aside.
        assert float(error) <= (2e-3 if form.half else 1e-6 if form.dtype == torch.float32 else 1e-12)
        assert not got.cpu()[keep & ~inside, 32:].any()
        slow = torch.tensor(slow_features(a, 0, view, 7), dtype=torch.float64)
        assert float((want[7] / v.weights[view] - slow).abs().max()) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_the_projected_maps_border_is_strict(form):
    """x, y = 0 and z <= 0 are outside; a hair further on is inside."""
    a = make_appearance(8, 1, n_maps=1)
    means = [[0, 1, 2], [1e-6, 1, 2], [1, 0, 2], [1, 1e-6, 2], [1, 1, 0], [1, 1, -0.005], [-1, -1, -2], [1, 1, 1e-6]]
    a = a._replace(
        means=torch.tensor(means, dtype=torch.float64),
        viewmats=torch.eye(4, dtype=torch.float64)[None],
        Ks=torch.eye(3, dtype=torch.float64)[None],
        maps=torch.ones_like(a.maps),
    )
    a.box_coord[:, 2] = 1e6
    v = Views(a, (0,), (1.0,), tuple(a.maps))
    got = outputs(v, sampler().to(form.device, form.dtype), form, 0)
    assert got[:, 47].tolist() == pytest.approx([0, 1, 0, 1, 0, 0, 0, 1])
    a.box_coord[:, 2] = torch.tensor([1 / 2.01, 1e6])  # y = 1 / 2.01: below its window's height by rounding or not
    a.box_coord[3, 2, 0] = 1.0
    got = outputs(v, sampler().to(form.device, form.dtype), form, 0)
    assert got[[0, 2, 3, 4, 5, 6, 7], 47].tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("form", FORMS)
def test_directions(form):
    """A head that puts out the direction it is given."""
    state = net_state({"encoder": (159, 16), "decoder": (64, 16), "color_decoder": (19, 3)})
    state = {name: torch.zeros_like(value) for name, value in state.items()}
    state["color_decoder.lin0.weight"][:, 16:] = torch.eye(3)
    got, records = run(Views(), ColorNet.from_state_dict(state).to(form.device, form.dtype), form)
    a = APPEARANCE
    want = rows_of(torch.stack([view_directions(a.means, a.viewmats[c]) for c in range(C)]), records)
    error = (got.cpu().double() - want).abs().max()
    assert float(error) <= (5e-4 if form.half else 5e-7 if form.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_outputs", [1, 3, 16, 48, 77, 256])
def test_outputs_of_any_number(n_outputs, form):
    net = color_net(form, {"encoder": (159, 64, 30), "decoder": (78, 40, n_outputs)})
    for view in (0, 1):
        got = outputs(Views(), net, form, view)
        plain, a = net.cpu().double(), APPEARANCE
        want = plain.decode(a.means, features64(Views(), view), a.intrinsic, WEIGHTS[view])
        net = net.to(form.device, form.dtype)
        assert got.shape == (N, n_outputs)
        assert_colors(got, want, form, near_border(a, view))


@pytest.mark.parametrize("form", FORMS)
def test_learned_places_are_divided_by_their_scale(form):
    net = color_net(form)
    boxes = APPEARANCE.box_coord.clone()
    boxes[:, :2] *= 4
    wider = Views(APPEARANCE._replace(box_coord=boxes), coord_scale=4.0)
    assert_same(run(wider, net, form)[0], run(Views(), net, form)[0])
    v = Views(coord_scale=1.25)
    got, records = run(v, net, form)
    assert_colors(got, rows_of(all_colors64(v, net), records), form, rows_of(borders(v), records))


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_several_sizes(form):
    g = torch.Generator().manual_seed(1)
    maps = tuple(
        (2 * torch.rand(48, h, w, generator=g) - 1).double() for h, w in ((1, 1), (30, 17), (3, 50))
    )  # fmt: skip
    net, v = color_net(form), Views(maps=maps)
    got, records = run(v, net, form)
    assert_colors(got, rows_of(all_colors64(v, net), records), form, rows_of(borders(v), records))


# A record has its bits in any company


def head_of(records: Records, count: int) -> Records:
    """The first records alone."""
    return Records(
        records.records[:count].clone(),
        records.radii[:count],
        records.gaussian_ids[:count].clone(),
        records.image_offsets.clamp(max=count),
        records.n_invalid.clone(),
    )


@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("widths", ["RAP", "widest"])
@pytest.mark.parametrize("output", ["color", "sh"])
def test_any_number_of_records(output, widths, form):
    options: dict[str, Any] = {}
    shapes = WIDTHS[widths]
    if output == "sh":
        shapes = {"encoder": shapes["encoder"], "decoder": (*shapes["decoder"][:-1], 48)}
        options = {"output": "sh", "sh_degree": 3}
    net = color_net(form, shapes)
    want, records = run(Views(), net, form, render_mode="RGB+D", **options)
    for count in (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129):
        got, _ = run(Views(), net, form, records=head_of(records, count), render_mode="RGB+D", **options)
        assert_same(got, want[:count])


@pytest.mark.parametrize("form", FAST_FORMS)
def test_any_number_of_gaussians(form):
    net = color_net(form, HEADLESS)
    want = outputs(Views(), net, form, 1)
    for count in (0, 1, 16, 31, 65):
        few = APPEARANCE._replace(
            **{name: getattr(APPEARANCE, name)[:count] for name in Appearance._fields if name not in FIXED}
        )
        got = outputs(Views(few), net, form, 1)
        assert got.shape == (count, 48)
        # The base of fewer Gaussians is another matrix product, rounded once from float64.
        assert_colors(got, want[:count].cpu().double(), form._replace(dtype=torch.float32))


FIXED = ("viewmats", "Ks", "maps")


@pytest.mark.parametrize("form", FAST_FORMS)
def test_a_view_in_a_batch_is_the_view_alone(form):
    net = color_net(form)
    want, records = run(Views(), net, form)
    offsets = records.image_offsets.tolist()
    order = [3, 1, 0, 2]
    a = APPEARANCE
    for views in ([0], [1], [2], [3], order):
        part = Views(
            a._replace(viewmats=a.viewmats[views], Ks=a.Ks[views]),
            tuple(MAP_IDS[c] for c in views),
            tuple(WEIGHTS[c] for c in views),
        )
        got, _ = run(part, net, form)
        assert_same(got, torch.cat([want[offsets[c] : offsets[c + 1]] for c in views]))


@pytest.mark.parametrize("form", FAST_FORMS)
def test_repeatable_and_without_regard_to_threads(form):
    a = make_appearance(900, 4, n_maps=3)
    v = Views(a, maps=tuple(a.maps))
    net = color_net(form)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(v, net, form, records=project(a, form))[0])
    assert len(results[0]) > 1100, "more than one thread must have work"
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("form", FORMS)
def test_no_cameras_no_gaussians_nothing_seen(form):
    net, a = color_net(form), APPEARANCE
    none = Views(a._replace(viewmats=a.viewmats[:0], Ks=a.Ks[:0]), (), ())
    assert run(none, net, form)[0].shape == (0, 3)
    few = {name: getattr(a, name)[:0] for name in Appearance._fields if name not in FIXED}
    assert run(Views(a._replace(**few)), net, form)[0].shape == (0, 3)
    away = a.viewmats.clone()
    away[[0, 2], 2, 3] -= 100
    got, records = run(Views(a._replace(viewmats=away)), net, form)
    assert records.image_offsets.diff().tolist()[::2] == [0, 0]
    everything, whole = run(Views(), net, form)
    offsets = whole.image_offsets.tolist()
    assert_same(got, torch.cat([everything[offsets[1] : offsets[2]], everything[offsets[3] :]]))


@pytest.mark.parametrize("form", FAST_FORMS)
def test_nothing_behind_the_last_record_is_read_or_written(form, monkeypatch):
    """Rows behind the end: Gaussians that do not exist, records and colours that must stay as they are."""
    stage = importlib.import_module("rapfast.ops.color_net")  # the package's name of it is the function's
    made = []

    def poisoned(*inputs: Any) -> Tensor:
        out = original(*inputs)
        made.append(out.fill_(math.nan))
        return out

    original = stage._fake
    net = color_net(form)
    want, records = run(Views(), net, form)
    count, room = len(want), 100
    longer = Records(
        torch.cat([records.records, torch.full_like(records.records[:1], 7.0).expand(room, -1)]),
        torch.cat([records.radii, records.radii.new_ones(room, 2)]),
        torch.cat([records.gaussian_ids, records.gaussian_ids.new_full((room,), -(1 << 30))]),
        records.image_offsets,
        records.n_invalid.clone(),
    )
    if form.device.type == "cpu":
        monkeypatch.setattr(stage, "_fake", poisoned)  # where the stage takes its memory from
    got, longer = run(Views(), net, form, records=longer)
    assert_same(got[:count], want)
    if form.device.type == "cpu":
        assert len(made) == 1 and got[count:].isnan().all()
    else:
        assert not got[count:].any(), "made of zeros there"
    assert bool((longer.records[count:] == 7.0).all())
    assert longer.n_invalid.tolist() == [0] * C


# What is not finite


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", ["color", "sh"])
def test_a_gaussian_that_is_not_finite_is_taken_out(output, value, render_mode, form):
    options: dict[str, Any] = {"output": "sh", "sh_degree": 3} if output == "sh" else {}
    net = color_net(form, HEADLESS) if output == "sh" else color_net(form)
    want, whole = run(Views(), net, form, render_mode=render_mode, **options)
    bad = int(whole.gaussian_ids[3])
    intrinsic = APPEARANCE.intrinsic.clone()
    intrinsic[bad, 5, 1] = value
    broken = Views(APPEARANCE._replace(intrinsic=intrinsic))
    got, records = run(broken, net, form, render_mode=render_mode, **options)
    out = records.gaussian_ids == bad
    assert 0 < int(out.sum()) <= C
    assert not got[out][:, :3].any()
    assert not records.records[out, 5].any()
    offsets = records.image_offsets.tolist()
    assert records.n_invalid.tolist() == [int(out[offsets[c] : offsets[c + 1]].sum()) for c in range(C)]
    assert_same(records.records[~out], whole.records[~out])
    # The base is one product for all Gaussians: a NaN in one row leaves the others' bits alone.
    assert_same(got[~out], want[~out])
    if render_mode == "RGB+ED":
        assert_same(got[:, 3], want[:, 3])


@pytest.mark.parametrize("form", FORMS)
def test_a_map_that_is_not_finite_takes_out_its_views(form):
    net = color_net(form)
    want, whole = run(Views(), net, form)
    maps = list(APPEARANCE.maps)
    maps[0] = torch.full_like(maps[0], math.nan)  # of views 1 and 3
    got, records = run(Views(maps=tuple(maps)), net, form)
    counts = whole.image_offsets.diff().tolist()
    offsets = whole.image_offsets.tolist()
    assert records.n_invalid.tolist() == [0, counts[1], 0, counts[3]]
    for c in (1, 3):
        rows = slice(offsets[c], offsets[c + 1])
        assert not got[rows].any() and not records.records[rows, 5].any()
    for c in (0, 2):
        rows = slice(offsets[c], offsets[c + 1])
        assert_same(got[rows], want[rows])


@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_is_not_finite_takes_out_all(form):
    net = color_net(form)
    with torch.no_grad():
        net.color_decoder.lin1.bias[1] = math.nan
    got, records = run(Views(), net, form)
    assert records.n_invalid.tolist() == records.image_offsets.diff().tolist()
    assert not got.any() and not records.records[:, 5].any()


@pytest.mark.cuda
def test_beyond_float16_inside_the_network_is_taken_out():
    """Hidden values over 65504 are infinite in fp16: counted, not drawn as something else."""
    net = color_net(CUDA16)
    with torch.no_grad():
        net.encoder.lin1.weight *= 3e4
        net.encoder.lin2.weight *= 3e4
    got, records = run(Views(), net, CUDA16)
    assert bool(got.isfinite().all())
    assert int(records.n_invalid.sum()) > 0.9 * len(got)
