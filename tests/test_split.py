"""Calls that are split over views and bands of tile rows: the same pixels, the same meta, within the memory given."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from network_scenes import CPU32, color_net, embedding_scene, make_appearance, rap_scene, to
from scenes import HEIGHT, WIDTH, assert_same, covariances, make_scene
from torch import Tensor

from rapfast import PostProcess, _call, rasterization
from rapfast.ops import split
from rapfast.ops.project import Records


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each group that split calls of the test render."""
    sizes: list[int] = []
    add = split._Outputs.add

    def noted(self: split._Outputs, views: split.Views) -> None:
        sizes.append(len(views.n_invalid))
        add(self, views)

    monkeypatch.setattr(split._Outputs, "add", noted)
    return sizes


def assert_same_call(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    """Images, alphas and every entry of meta, bit by bit."""
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    assert list(got[2]) == list(want[2])
    for name, value in want[2].items():
        if isinstance(value, Tensor):
            assert_same(got[2][name], value)
        else:
            assert got[2][name] == value


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scenes": {"scene": {"batch": (3,), "c": 3}},
    "scenes in two dimensions": {"scene": {"batch": (2, 2), "c": 2}},
    "colours per camera": {"scene": {"per_camera": True, "channels": 5}},
    "colours per camera of scenes": {"scene": {"per_camera": True, "batch": (2,), "c": 3}},
    "harmonics": {"scene": {"sh_degree": 2}, "sh_degree": 2, "packed": False},
    "expected depth": {"render_mode": "RGB+ED"},
    "depth alone": {"render_mode": "D"},
    "antialiased": {"rasterize_mode": "antialiased"},
    "background": {"background": "color"},
    "background images": {"background": "image", "render_mode": "RGB+D"},
    "covariances": {"covars": True},
    "small, channels first": {"postprocess": PostProcess(size=(21, 30), layout="CHW", dtype=torch.uint8)},
    "normalised": {"postprocess": PostProcess(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))},
}


def make_call(form: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32) -> partial[Any]:
    options = dict(form)
    # many Gaussians in few pixels: images are small beside what makes them
    scene = make_scene(3000, **{"c": 5, **options.pop("scene", {})}, dtype=dtype, device=device)
    kind = options.pop("background", None)
    if kind:
        image = (HEIGHT, WIDTH) if kind == "image" else ()
        g = torch.Generator().manual_seed(5)
        shape = (*scene.Ks.shape[:-2], *image, scene.colors.shape[-1])
        options["backgrounds"] = torch.rand(shape, generator=g).to(scene.means)
    if options.pop("covars", False):
        options["covars"] = covariances(scene)
    return partial(rasterization, *scene, WIDTH, HEIGHT, **options)


def least_memory(call: Callable[..., Any]) -> int:
    """What the call needs at least: it tells with each try how much more."""
    budget = 1
    for _ in range(50):
        try:
            call(max_memory=budget)
        except ValueError as error:
            said = re.fullmatch(
                r"max_memory must be at least (\d+) bytes to render one (view|row of tiles) at a time of \d+ views, "
                rf"got {budget}",
                str(error),
            )
            assert said and int(said[1]) > budget, str(error)
            budget = int(said[1])
        else:
            return budget
    raise AssertionError(f"{budget} is not enough after 50 tries")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_groups_of_views_give_the_same_pixels_and_meta(form, groups, device):
    call = make_call(form, device)
    want = call()
    n = want[2]["n_invalid"].numel()
    assert_same_call(call(max_memory=1 << 40), want)
    assert not groups
    least = least_memory(call)
    del groups[:]
    assert_same_call(call(max_memory=least), want)
    assert sum(groups) == n and len(groups) > 1


def test_float64_is_split_too(groups):
    call = make_call({"render_mode": "RGB+ED"}, torch.device("cpu"), torch.float64)
    want = call()
    least = least_memory(call)
    del groups[:]
    assert_same_call(call(max_memory=least), want)
    assert sum(groups) == 5 and len(groups) > 1


def test_more_memory_makes_larger_groups(groups):
    call = make_call({"scene": {"batch": (3,), "c": 4}}, torch.device("cpu"))
    want = call()
    budget, sizes = least_memory(call), []
    while not sizes or sizes[-1]:
        del groups[:]
        assert_same_call(call(max_memory=budget), want)
        assert sum(groups) in (0, 12)
        sizes.append(list(groups))
        budget = budget * 9 // 8
    assert len(sizes[0]) > 3
    assert any(size[:2] == [4, 4] for size in sizes)  # scenes are not torn where they fit
    assert sorted(map(len, sizes), reverse=True) == list(map(len, sizes))


@pytest.mark.parametrize("what", ["maps", "decoded", "decoded per view", "embedding"])
def test_networks_get_their_views(what, groups):
    a = make_appearance(n=2000, c=5, n_maps=2)
    views = to(a, CPU32)
    cameras = views.viewmats, views.Ks, WIDTH, HEIGHT
    weights = [0.0, 0.5, 1.0, 1.5, 2.0]
    g = torch.Generator().manual_seed(3)
    if what == "embedding":
        net = color_net(CPU32, {"encoder": (111 + 24, 96, 48), "decoder": (96, 64, 40), "color_decoder": (43, 32, 3)})
        embeddings = torch.randn(5, 24, generator=g)
        scene = embedding_scene(a, net, CPU32)
        draw = partial(scene.render, *cameras, embeddings=embeddings, view_weights=weights)
    else:
        net = color_net(CPU32)
        scene = rap_scene(a, net, CPU32)
        if what == "maps":
            given = {"feature_maps": views.maps, "map_ids": [0, 1, 1, 0, 1], "view_weights": weights}
        else:
            lead = (5,) if what == "decoded per view" else ()
            given = {"decoded": torch.randn(*lead, 2000, net.decoder.widths[-1], generator=g)}
        draw = partial(scene.render, *cameras, **given)
    want = draw()
    assert not groups
    least = least_memory(draw)
    del groups[:]
    assert_same_call(draw(max_memory=least), want)
    assert sum(groups) == 5 and len(groups) > 1


# --- the rules, with a renderer that needs what it is told ------------------------------------------------------------


class Bands:
    """Renders from images that are there; `bytes_per_view` and `bytes_per_row` are what it claims to need."""

    def __init__(self, n: int, height: int, per_view: int, per_row: int | None, into: bool = False) -> None:
        self.images, self.alphas = torch.rand(n, height, 6, 3), torch.rand(n, height, 6, 1)
        self.per_view, self.per_row, self.calls = per_view, per_row, []
        band = None if per_row is None else self.band
        make_outputs = self.make_outputs if into else None
        self.renderer = split.Renderer(
            self.whole, band, self.finish, output_bytes=100, blended_bytes=10, make_outputs=make_outputs
        )
        self.made: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def _check(n_bytes: int | None, limit: int | None) -> None:
        if n_bytes is None or (limit is not None and n_bytes > limit):
            raise split.TooLarge(f"{n_bytes} bytes", n_bytes)

    def _views(self, first: int, count: int, rows: slice) -> split.Views:
        empty = torch.zeros(0)
        records = Records(
            records=torch.full((2 * count, 8), float(first)),
            radii=torch.ones(2 * count, 2),
            gaussian_ids=torch.arange(2 * count),
            image_offsets=2 * torch.arange(count + 1),
            n_invalid=empty,
        )
        n_invalid = torch.arange(first, first + count)
        views = slice(first, first + count)
        records = records._replace(n_invalid=n_invalid)
        return split.Views(self.images[views, rows], self.alphas[views, rows], n_invalid, lambda: records, 7 * count)

    def make_outputs(self, n: int) -> tuple[Tensor, Tensor]:
        self.made.append((torch.zeros(n, *self.images.shape[1:]), torch.zeros(n, *self.alphas.shape[1:])))
        return self.made[-1]

    def whole(self, part: split.Inputs, out: tuple[Tensor, Tensor] | None, limit: int | None) -> split.Views:
        count, first = part.n_images, int(part.viewmats.flatten(0, 1)[0, 0, 0])
        self.calls.append((first, count, limit))
        self._check(self.per_view * count if self.per_view else None, limit)
        views = self._views(first, count, slice(None))
        if out is None:
            return views
        out[0].copy_(views.images)
        out[1].copy_(views.alphas)
        return views._replace(images=out[0], alphas=out[1])

    def band(self, part: split.Inputs, rows: tuple[int, int], limit: int | None) -> split.Views:
        first, count = rows
        view = int(part.viewmats[0, 0, 0, 0])
        self.calls.append((view, (first, count), limit))
        self._check(self.per_row * count, limit)
        return self._views(view, 1, slice(16 * first, 16 * (first + count)))

    def finish(self, part: split.Inputs, blended: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        assert blended.shape[0] == alphas.shape[0] == part.n_images == 1
        return 2 * blended, alphas

    def render(self, max_memory: int | None = None) -> split.Views:
        n = len(self.images)
        viewmats = torch.arange(float(n)).reshape(1, n, 1, 1).expand(1, n, 4, 4)
        nothing = torch.zeros(1, 1)
        inputs = split.Inputs(nothing, None, None, None, nothing, None, viewmats, viewmats, None, per_camera=False)
        return split.render(self.renderer, inputs, self.images.shape[1], max_memory)


def test_what_is_kept_and_put_out_counts():
    fake = Bands(8, 20, per_view=50, per_row=None)
    views = fake.render(max_memory=8 * 100 + 120)
    assert fake.calls == [(0, 8, 920)] and views.images.shape[0] == 8
    fake.calls.clear()
    fake = Bands(8, 20, per_view=200, per_row=None)
    fake.render(max_memory=8 * 100 + 450)
    assert [call for call in fake.calls if call[1] <= 2] == [(0, 2, 450), (2, 2, 436), (4, 2, 422), (6, 2, 408)]
    assert fake.calls[:2] == [(0, 8, 1250), (0, 4, 450)]


def test_groups_are_written_where_they_belong():
    fake = Bands(5, 20, per_view=200, per_row=None, into=True)
    views = fake.render(max_memory=5 * 100 + 220)
    assert len(fake.made) == 1 and views.images is fake.made[0][0] and views.alphas is fake.made[0][1]
    assert_same(views.images, fake.images)
    assert_same(views.alphas, fake.alphas)
    # a group's own outputs are counted by itself: 720 - 300, then 14 less that are kept of two views
    assert [call for call in fake.calls if call[1] <= 2] == [(0, 2, 420), (2, 2, 406), (4, 1, 292)]


@pytest.mark.parametrize("into", [False, True])
def test_groups_are_joined_in_order(into):
    fake = Bands(5, 20, per_view=200, per_row=None, into=into)
    views = fake.render(max_memory=5 * 100 + 460 - 200 * into)
    assert_same(views.images, fake.images)
    assert_same(views.alphas, fake.alphas)
    assert views.n_invalid.tolist() == [0, 1, 2, 3, 4]
    records = views.make_records()
    assert records.image_offsets.tolist() == [0, 2, 4, 6, 8, 10]
    assert records.records[:, 0].tolist() == [0, 0, 0, 0, 2, 2, 2, 2, 4, 4]
    assert records.n_invalid.tolist() == [0, 1, 2, 3, 4] and len(records.gaussian_ids) == len(records.radii) == 10
    assert views.n_kept == 35


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("height", [16, 33, 100])
def test_a_view_that_does_not_fit_is_drawn_in_bands(height, into):
    fake = Bands(2, height, per_view=10_000, per_row=40, into=into)
    n_rows = -(-height // 16)
    room = 2 * 100 + 10 + 130
    if n_rows == 1:
        with pytest.raises(ValueError, match="max_memory must be at least 10210 bytes to render one row of tiles"):
            fake.render(max_memory=room)
        return
    views = fake.render(max_memory=room)
    assert_same(views.images, 2 * fake.images)
    assert_same(views.alphas, fake.alphas)
    bands = [call[1] for call in fake.calls if isinstance(call[1], tuple) and call[0] == 0]
    drawn = [band for band in bands if 40 * band[1] <= 130]
    assert sum(count for _, count in drawn) == n_rows and [first for first, _ in drawn] == sorted({f for f, _ in drawn})
    assert views.make_records().image_offsets.tolist() == [0, 2, 4]  # of whole views, not of bands


def test_the_least_memory_is_told_for_bands_and_views():
    with pytest.raises(
        ValueError, match=r"at least 250 bytes to render one row of tiles at a time of 2 views, got 220"
    ):
        Bands(2, 64, per_view=10_000, per_row=40).render(max_memory=220)
    with pytest.raises(ValueError, match=r"at least 10200 bytes to render one view at a time of 2 views, got 220"):
        Bands(2, 64, per_view=10_000, per_row=None).render(max_memory=220)


def test_too_large_for_an_index_is_split_without_being_asked():
    fake = Bands(2, 64, per_view=0, per_row=1)
    assert_same(fake.render().images, 2 * fake.images)
    with pytest.raises(split.TooLarge):
        Bands(2, 64, per_view=0, per_row=None).render()


def test_large_batches_are_split_into_groups_of_eight_and_no_less():
    fake = Bands(40, 20, per_view=100, per_row=None)
    fake.renderer = fake.renderer._replace(comfortable=1200)
    assert_same(fake.render().images, fake.images)
    assert [call for call in fake.calls if call[1] <= 10] == [(i, 10, 1200) for i in range(0, 40, 10)]
    fake = Bands(40, 20, per_view=1000, per_row=None)
    fake.renderer = fake.renderer._replace(comfortable=1200)
    fake.render()
    assert [call[1:] for call in fake.calls if call[1] <= 8] == [(8, None)] * 5


# --- arguments --------------------------------------------------------------------------------------------------------


def test_max_memory_is_checked():
    call = make_call({}, torch.device("cpu"))
    with pytest.raises(TypeError, match="max_memory must be a whole number, got str '2 GB'"):
        call(max_memory="2 GB")
    with pytest.raises(TypeError, match="max_memory must be a whole number, got bool True"):
        call(max_memory=True)
    with pytest.raises(ValueError, match="max_memory must be between 1 and .* bytes, got 0"):
        call(max_memory=0)
    for backend in ("gsplat", "reference"):
        with pytest.raises(NotImplementedError, match=f'max_memory=5 is not supported by backend="{backend}"'):
            call(max_memory=5, backend=backend)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes asked for during a call above those before it, without what the allocator rounds up."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def large_call(n: int = 60_000, c: int = 12, **options: Any) -> partial[Any]:
    scene = make_scene(n, c, width=400, height=300, dtype=torch.float32, device="cuda")
    scene = scene._replace(scales=0.3 * scene.scales)
    return partial(rasterization, *scene, 400, 300, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.7, 0.4, 0.25])
@pytest.mark.parametrize(
    "options",
    [{}, {"render_mode": "RGB+ED"}, {"postprocess": PostProcess(size=(150, 200), layout="CHW", dtype=torch.float16)}],
    ids=["plain", "expected depth", "small"],
)
def test_memory_is_kept_to_and_pixels_stay(options, share, groups):
    call = large_call(**options)
    want = call()
    peak = peak_bytes(call)
    least = least_memory(call)
    budget = max(int(share * peak), least)
    assert budget < 0.8 * peak
    for _ in range(2):  # with nothing learnt of groups, and with it
        del groups[:]
        assert peak_bytes(lambda: call(max_memory=budget)) <= budget
        assert sum(groups) == 12 and len(groups) > 1
    assert_same_call(call(max_memory=budget), want)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["RGB", "ED", "RGB+ED"])
@pytest.mark.parametrize("background", [False, True])
def test_one_view_is_drawn_in_bands(mode, background, monkeypatch):
    scene = make_scene(3000, 1, width=200, height=333, dtype=torch.float32, device="cuda")
    scene = scene._replace(scales=4 * scene.scales)  # most of the memory is that of tile lists: bands save it
    call = partial(rasterization, *scene, 200, 333, render_mode=mode)
    if background:
        if mode == "ED":
            pytest.skip("depth has no background")
        call = partial(call, backgrounds=torch.rand(1, 333, 200, 3, device="cuda"))
    call = partial(call, postprocess=PostProcess(size=(100, 77)))
    want = call()
    rows: list[tuple[int, int]] = []
    render = _call.ops.render

    def noted(*arguments: Any, **options: Any) -> Any:
        rendered = render(*arguments, **options)
        if options.get("tile_rows"):
            rows.append(options["tile_rows"])
        return rendered

    monkeypatch.setattr(_call.ops, "render", noted)
    least = least_memory(call)
    del rows[:]
    assert_same_call(call(max_memory=least), want)
    assert len(rows) > 1 and sum(count for _, count in rows) == 21
    assert peak_bytes(lambda: call(max_memory=least)) <= least


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_large_batches_are_split_by_default(groups, monkeypatch):
    call = large_call(c=24)
    want = call()
    assert not groups
    monkeypatch.setattr(_call, "_COMFORTABLE", 1 << 20)
    got = call()
    assert groups == [8] * 3
    assert_same_call(got, want)
    del groups[:]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # its room is what it is
        captured = call()[0]
    graph.replay()
    assert_same(captured, want[0])
    assert not groups
    message = "max_memory must be None while a CUDA graph is captured, got 5"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(max_memory=5)


@pytest.mark.cuda
def test_meta_of_a_split_call_does_not_hold_its_images(monkeypatch):
    call = large_call(c=24)
    monkeypatch.setattr(_call, "_COMFORTABLE", 1 << 20)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    images, alphas, meta = call()
    with_images = torch.cuda.memory_allocated() - before
    size = images.nbytes + alphas.nbytes
    del images, alphas
    torch.cuda.synchronize()
    assert with_images - (torch.cuda.memory_allocated() - before) >= size
    assert int(meta["radii"].shape[0]) > 0


@pytest.mark.cuda
@pytest.mark.slow
def test_more_pairs_than_an_index_has_bits_for():
    """600 views of 4 M Gaussians are 2.4e9 pairs; few of them are seen."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU of 40 GiB")
    n, c = 4_000_000, 600
    g = torch.Generator(device="cuda").manual_seed(0)
    means = 40 * torch.rand(n, 3, generator=g, device="cuda") - 20
    quats = torch.randn(n, 4, generator=g, device="cuda")
    scales = torch.full((n, 3), 0.01, device="cuda")
    opacities = torch.rand(n, generator=g, device="cuda")
    colors = torch.rand(n, 3, generator=g, device="cuda")
    turn = torch.linspace(0, 6.28, c, device="cuda")
    viewmats = torch.eye(4, device="cuda").repeat(c, 1, 1)
    viewmats[:, 0, 0] = viewmats[:, 2, 2] = turn.cos()
    viewmats[:, 0, 2], viewmats[:, 2, 0] = turn.sin(), -turn.sin()
    Ks = torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]], device="cuda").repeat(c, 1, 1)
    call = partial(rasterization, means, quats, scales, opacities, colors, width=64, height=48, far_plane=6.0)
    images, alphas, meta = call(viewmats=viewmats, Ks=Ks)
    assert images.shape == (c, 48, 64, 3) and float(alphas.mean()) > 0.01
    for i in (0, 299, 599):
        alone = call(viewmats=viewmats[i : i + 1], Ks=Ks[i : i + 1])
        assert_same(images[i], alone[0][0])
        assert_same(alphas[i], alone[1][0])
        rows = meta["camera_ids"] == i
        assert_same(meta["gaussian_ids"][rows], alone[2]["gaussian_ids"])


@pytest.mark.cuda
@pytest.mark.slow
def test_more_intersections_than_an_index_has_bits_for():
    """Two views of 90 k Gaussians that cover 160 x 160 tiles each: 2.3e9 intersections in each view."""
    if torch.cuda.get_device_properties(0).total_memory < 100 << 30:
        pytest.skip("needs a GPU of 100 GiB")
    n, size = 90_000, 2560
    g = torch.Generator(device="cuda").manual_seed(0)
    means = torch.rand(n, 3, generator=g, device="cuda") - 0.5
    means[:, 2] += 5
    quats = torch.tensor([[1.0, 0, 0, 0]], device="cuda").repeat(n, 1)
    scales = torch.full((n, 3), 30.0, device="cuda")
    opacities = torch.full((n,), 0.3, device="cuda")
    colors = torch.rand(n, 3, generator=g, device="cuda")
    viewmats = torch.eye(4, device="cuda").repeat(2, 1, 1)
    viewmats[1, 0, 3] = 0.3
    Ks = torch.tensor([[2000.0, 0, size / 2], [0, 2000, size / 2], [0, 0, 1]], device="cuda").repeat(2, 1, 1)
    images, _, meta = rasterization(means, quats, scales, opacities, colors, viewmats, Ks, size, size)
    assert int(meta["tiles_per_gauss"].double().sum()) > 2 * (1 << 31)
    # pixels end before the nearest hundred, which are few enough for one call
    nearest = means[:, 2].argsort()[:100].sort().values
    few = (tensor[nearest] for tensor in (means, quats, scales, opacities, colors))
    assert_same(images, rasterization(*few, viewmats, Ks, size, size)[0])
