"""The operators as torch sees them: schema, shapes without running, outputs of their own storage."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from network_scenes import CPU32, CPU64, CUDA16, CUDA32, WIDTHS, color_net, make_appearance, to
from scenes import HEIGHT, WIDTH, assert_same, covariances, flat, make_scene
from torch import Tensor

from rapfast import PostProcess, ops, rasterization
from rapfast._native import _C
from rapfast.appearance.fused import map_pixels, prepare
from rapfast.ops import state
from rapfast.ops._library import RECORD_FIELDS, TILE_SIZE
from rapfast.ops.bin import tile_grid
from rapfast.ops.color_net import operator_arguments
from rapfast.ops.composite import PIXEL_TYPES

NAMES = ["project", "color", "color_net", "bin", "blend", "composite"]


def samples(name: str, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of one operator, of several forms."""
    if name == "color_net":
        return network_samples(device)
    out: list[tuple[Any, ...]] = []
    for sh, dtype in ((False, torch.float32), (True, torch.float32)) + (
        ((False, torch.float64),) if device.type == "cpu" else ()
    ):
        s = flat(make_scene(100, 2, batch=(2,), sh_degree=1 if sh else None, dtype=dtype, device=device))
        grid = tile_grid(WIDTH, HEIGHT)
        shape = (s.quats, s.scales, None) if sh else (None, None, covariances(s))
        project = (s.means, *shape, s.opacities, s.viewmats, s.Ks, WIDTH, HEIGHT, 0, sh, 0.3, 0.01, 1e10, 0.0, 400)
        if name == "project":
            out.append(project)
            continue
        # Rows past the last record are cut off, as the stage functions do.
        r = ops.project(s.means, *shape, s.opacities, s.viewmats, s.Ks, WIDTH, HEIGHT, antialiased=sh)
        color = (
            s.means, s.viewmats, s.Ks, s.colors, r.gaussian_ids, r.image_offsets, r.records, r.n_invalid,
            WIDTH, HEIGHT, 1 if sh else -1, False, 1,
        )  # fmt: skip
        if name == "color":
            out.append(color)
            continue
        if name == "bin":
            out.append((r.records, r.radii, r.image_offsets, *grid, 0, 10_000))
            continue
        colors = ops.color(
            s.means, s.viewmats, s.Ks, s.colors, r, WIDTH, HEIGHT, sh_degree=1 if sh else None, render_mode="RGB+D"
        )
        tiles = ops.bin(r, WIDTH, HEIGHT)
        blend = (r.records, colors, r.image_offsets, *tiles, WIDTH, HEIGHT, 0.999)
        if name == "blend":
            out.append(blend)
            continue
        image, alphas = torch.ops.rapfast.blend(*blend)
        mean = torch.tensor([0.1, 0.2, 0.3], dtype=dtype, device=device)
        background = torch.rand(4, 3, dtype=dtype, device=device)
        out.append((image, alphas, background, mean, mean, 3, True, 0.0, 1.0, 20, 30, True, PIXEL_TYPES[torch.float16]))
        out.append((image, alphas, None, None, None, 3, False, None, None, HEIGHT, WIDTH, False, PIXEL_TYPES[None]))
    return out


def network_samples(device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of color_net: fed by maps, an embedding and features, with every kind of output."""
    out = []
    forms = [CPU32, CPU64] if device.type == "cpu" else [CUDA32, CUDA16]
    for form in forms:
        a = to(make_appearance(100, 2), form)
        geometry = (x[None] for x in (a.means, a.quats, a.scales))
        cameras = a.viewmats[None], a.Ks[None]
        r = ops.project(*geometry, None, a.opacities[None], *cameras, WIDTH, HEIGHT)
        weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
        pixels, places = map_pixels(a.maps, [1, 0], torch.float16 if form.half else form.dtype)
        maps = ops.NetworkInput("maps", weights, pixels, torch.tensor(places), a.box_coord)
        vectors = ops.NetworkInput("embedding", weights, features=a.box_coord[:2].flatten(1).contiguous())
        decoded = ops.NetworkInput("features", weights, features=a.intrinsic.flatten(1).repeat(2, 1, 1))
        sh = {"encoder": (159, 32, 20), "decoder": (68, 30, 12)}
        short = {"encoder": (117, 130), "decoder": (178, 48), "color_decoder": (51, 3)}
        for widths, given, options, depth in (
            (WIDTHS["RAP"], maps, {}, 1),
            (sh, maps, {"output": "sh", "sh_degree": 1}, 0),
            (short, vectors, {}, 0),
            (WIDTHS["RAP"], decoded, {"part": "head"}, 1),
            (sh, maps, {"output": "raw"}, 0),
        ):
            network = prepare(color_net(form, widths), a.means, a.intrinsic, half=form.half, **options).network
            written = (None, None) if network.output == "raw" else (r.records, r.n_invalid)
            view = (a.means[None], *cameras, r.gaussian_ids, r.image_offsets, *written, WIDTH, HEIGHT, depth)
            out.append((*view, *operator_arguments(network, given)))
    return out


def tensors_in(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Tensors among the arguments, those in lists too."""
    nested = [x if isinstance(x, list) else [x] for x in arguments]
    return [x for xs in nested for x in xs if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """The schema tells what is written and what aliases; the fake implementation knows the shapes."""
    op = getattr(torch.ops.rapfast, name).default
    for arguments in samples(name, device):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_never_alias(name, device):
    """Neither each other nor an input."""
    op = getattr(torch.ops.rapfast, name)
    for arguments in samples(name, device):
        result = op(*arguments)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        storages = [x.untyped_storage().data_ptr() for x in outputs if x.numel()]
        assert len(set(storages)) == len(storages)
        assert not set(storages) & {x.untyped_storage().data_ptr() for x in tensors_in(arguments)}


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_repeatable(name, device):
    """The same arguments, the same bits, in what is written of each output."""
    if name in ("project", "bin"):
        pytest.skip("rows past the count are not written: covered by the tests of these stages")
    op = getattr(torch.ops.rapfast, name)
    for arguments in samples(name, device):
        first, second = op(*arguments), op(*arguments)
        for x, y in zip(*([r] if isinstance(r, Tensor) else r for r in (first, second)), strict=True):
            assert_same(x, y)


def test_results_of_a_call_never_alias(device):
    """Colours, alphas and inputs have storages of their own, whatever the options."""
    scene = make_scene(50, 2, dtype=torch.float32, device=device)
    background = torch.rand(2, 3, device=device)
    for post, backgrounds, mode in itertools.product(
        (None, PostProcess(), PostProcess(layout="CHW")), (None, background), ("RGB", "ED")
    ):
        colors, alphas, meta = rasterization(
            *scene, WIDTH, HEIGHT, backgrounds=backgrounds, render_mode=mode, postprocess=post
        )
        tensors = [colors, alphas, *scene, background]
        tensors += [value for value in meta.values() if isinstance(value, Tensor)]
        storages = [x.untyped_storage().data_ptr() for x in tensors]
        assert len(set(storages)) == len(storages)


def test_fake_shapes_follow_the_capacity(device):
    """What torch.compile sees of an operator whose number of results is not known beforehand."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    (arguments, *_) = samples("project", device)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        records, radii, ids, offsets, n_invalid = torch.ops.rapfast.project(*fakes[:-1], 123)
    assert records.shape == (123, len(RECORD_FIELDS)) and radii.shape == (123, 2) and ids.shape == (123,)
    assert offsets.shape == (5,) and n_invalid.shape == (4,)


@pytest.mark.parametrize("capacity", [0, 10])
def test_too_little_room_writes_no_record(capacity, device):
    """The counts tell that there is more and the rows are untouched: the caller comes again."""
    for arguments in samples("project", device):
        offsets, n_invalid = torch.ops.rapfast.project(*arguments)[3:]
        short = torch.ops.rapfast.project(*arguments[:-1], capacity)
        assert short[0].shape == (capacity, 8)
        assert_same(short[3], offsets)
        assert_same(short[4], n_invalid)
    for arguments in samples("bin", device):
        want = torch.ops.rapfast.bin(*arguments)[0]
        short = torch.ops.rapfast.bin(*arguments[:-1], capacity)
        assert short[1].shape == (capacity,)
        told = int(short[0][-1])
        assert int(want[-1]) >= told > capacity
        assert int(torch.ops.rapfast.bin(*arguments[:-1], told)[0][-1]) == int(want[-1])


def test_constants_are_the_native_modules(device):
    """Names of the record's columns, by what the project stage writes there."""
    assert TILE_SIZE == 16
    scene = flat(make_scene(1, 1, dtype=torch.float32))
    scene.means[:] = 0
    scene.quats[0, 0] = torch.tensor([1.0, 0, 0, 0])
    scene.viewmats[0, 0] = torch.eye(4)
    scene.viewmats[0, 0, 2, 3] = 2.0
    scene.scales[0, 0] = torch.tensor([0.1, 0.2, 0.3])
    scene.opacities[0] = 0.5
    s = flat(scene.to(device))
    row = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, WIDTH, HEIGHT).records[0]
    fields = dict(zip(RECORD_FIELDS, row.tolist(), strict=True))
    fx, fy, cx, cy = (float(s.Ks[0, 0, i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    sharp = (0.1 * fx / 2) ** 2, (0.2 * fy / 2) ** 2
    assert fields == pytest.approx(
        {
            "x": cx,
            "y": cy,
            "conic_a": 1 / (sharp[0] + 0.3),
            "conic_b": 0.0,
            "conic_c": 1 / (sharp[1] + 0.3),
            "opacity": 0.5,
            "depth": 2.0,
            "compensation": math.sqrt(sharp[0] * sharp[1] / ((sharp[0] + 0.3) * (sharp[1] + 0.3))),
        },
        rel=1e-5,
    )


def test_a_state_is_cut_into_its_parts():
    """The layout is the native module's, which needs no GPU to tell it."""
    if _C.build_info()["cuda"] is None:
        pytest.skip("rapfast was built without its CUDA kernels")
    sizes = state.Sizes(2, 3, 1000, 64, 40, 3, 2000, 5000, keep_state=True, first_tile_row=1, n_tile_rows=2)
    found = dict(state.layout(sizes))
    n_bytes = found.pop("size")
    begins = sorted(found.values())
    assert begins[0] == 0 and len(set(begins)) == len(begins) and begins[-1] < n_bytes
    buffer = torch.arange(n_bytes, dtype=torch.int64).to(torch.uint8)
    rendered = state.Rendered(torch.empty(0), torch.empty(0), buffer, sizes, 20, 50, 20)
    assert rendered.n_invalid.shape == (6,) and rendered.status.shape == (3,)
    transmittances, last_ids = state.state_pixels(rendered)
    assert transmittances.shape == last_ids.shape == (6, 24, 64)  # 40 - 16 rows of pixels
    assert transmittances.data_ptr() == buffer.data_ptr() + found["transmittances"]
    kept_less = state.layout(sizes._replace(keep_state=False))
    assert kept_less["size"] < n_bytes and kept_less["records"] == found["records"]
