"""Calls in CUDA graphs of the caller: the bits of an eager call, and NaN where there is too little room."""

from __future__ import annotations

import math

import pytest
import torch
from network_scenes import CUDA16, CUDA32, color_net, make_appearance, rap_scene
from renderer_scenes import (
    RASTER_OPTIONS,
    SETTINGS,
    SIZE,
    assert_all_same,
    assert_poisoned,
    cuda_scene,
    direct,
    fitted,
    native_arguments,
    native_render,
)
from scenes import HEIGHT, WIDTH, assert_same, flat, make_scene
from torch import Tensor

from rapfast import PostProcess, ops, rasterization


@pytest.mark.cuda
def test_renderer_in_a_graph_of_the_callers():
    """With other work before and behind it; the cameras are computed in the graph."""
    scene = cuda_scene(sh_degree=2)
    renderer = fitted(scene)
    shift = torch.zeros(3, device="cuda")

    def work() -> tuple[Tensor, Tensor]:
        viewmats = scene.viewmats.clone()
        viewmats[:, :3, 3] += shift
        images, alphas = renderer.render(viewmats, scene.Ks)
        return images * 2, alphas + 1

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, alphas = work()
    for k in range(3):
        shift.fill_(0.1 * k)
        graph.replay()
        want = work()
        assert_all_same((images, alphas), want)
        assert_all_same((want[0] / 2,), direct(scene._replace(viewmats=shifted(scene.viewmats, 0.1 * k)))[:1])
    renderer.check()
    shift.fill_(0)
    scene.scales.fill_(3.0)  # each on many more tiles than there is room for
    graph.replay()
    assert int(renderer.overflow)
    assert_poisoned(images)


@pytest.mark.cuda
def test_room_for_many_views_serves_fewer():
    """Scratch of every number of views fits in that of the most: `ops.render` refuses where it does not."""
    scene = cuda_scene(c=33, sh_degree=2)
    renderer = fitted(scene)
    for c in (*range(1, 5), 15, 16, 17, 32, 33):
        assert_all_same(renderer.render(scene.viewmats[:c], scene.Ks[:c]), direct(scene, c))
    renderer.check()


def shifted(viewmats: Tensor, by: float) -> Tensor:
    out = viewmats.clone()
    out[:, :3, 3] += by
    return out


@pytest.mark.cuda
@pytest.mark.parametrize("options", RASTER_OPTIONS.values(), ids=RASTER_OPTIONS.keys())
def test_rasterization_in_a_graph(options):
    """Its replays are the eager call's bits, and its meta that of the last replay, at every look."""
    options = dict(options)
    shape = {"batch": options.pop("batch", ()), "channels": options.pop("channels", 3)}
    kind = options.pop("kind", None)
    scene = cuda_scene(400, 2, sh_degree=options.get("sh_degree"), **shape)
    scene.means[..., 0, 0] = math.nan
    if kind is not None:
        options["backgrounds"] = torch.rand((2, HEIGHT, WIDTH, 3) if kind == "image" else (2, 3), device="cuda")
    rasterization(*scene, *SIZE, **options)  # shows how much room is needed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, alphas, meta = rasterization(*scene, *SIZE, **options)
        with pytest.raises(RuntimeError, match="look after a replay"):
            meta["radii"]
    seen = None
    for k in range(3):
        scene.viewmats[..., 0, 3] += 0.05 * k
        graph.replay()
        want = rasterization(*scene, *SIZE, **options)
        assert_all_same((images, alphas), want[:2])
        assert int(meta["overflowed"]) == 0
        assert meta["n_invalid"].tolist() == want[2]["n_invalid"].tolist() != [0, 0]
        for key, value in want[2].items():
            if isinstance(value, Tensor):
                assert_same(meta[key], value)
        assert seen is None or k < 2 or not torch.equal(seen, meta["means2d"])
        seen = meta["means2d"].clone()


@pytest.mark.cuda
def test_a_plan_that_gives_way_disturbs_no_capture():
    """More forms of call than are kept, each with graphs of its own: the oldest's are destroyed while another is
    captured."""
    scene = cuda_scene(400, 1, sh_degree=1)
    native_render._plan.cache_clear()
    most = native_render._plan.cache_info().maxsize
    for width in range(40, 40 + most):
        for _ in range(6):
            rasterization(*scene, width, 30, sh_degree=1)
    graph, size = torch.cuda.CUDAGraph(), (40 + most - 1, 30)
    with torch.cuda.graph(graph):  # a plan with fixed room, where there are as many as are kept
        images = rasterization(*scene, *size, sh_degree=1)[0]
    graph.replay()
    assert native_render._plan.cache_info().currsize == most
    assert_same(images, rasterization(*scene, *size, sh_degree=1)[0])


@pytest.mark.cuda
def test_overflow_of_rasterization_in_a_graph():
    """The room is what was learnt. Views that want more are NaN and counted as such, until they fit again."""
    scene = cuda_scene(20_000, 2, sh_degree=2)
    learnt = native_render._learnt
    native_render._learnt = type(learnt)()
    try:
        away = scene.viewmats.clone()
        away[:, 2, 3] -= 100
        near, viewmats = scene.viewmats.clone(), scene.viewmats
        viewmats.copy_(away)
        for _ in range(2 * native_render._Learnt._WINDOW):
            rasterization(*scene, *SIZE, sh_degree=2)  # the room shrinks to nearly nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images, alphas, meta = rasterization(*scene, *SIZE, sh_degree=2)
        for k in range(2):
            viewmats.copy_(near)
            graph.replay()
            assert images.isnan().all() and alphas.isnan().all()
            assert int(meta["overflowed"]) == 1
            assert meta["n_invalid"].tolist() == [0, 0] and len(meta["gaussian_ids"]) == 0
            assert not meta["isect_offsets"].any()
            viewmats.copy_(away)
            graph.replay()
            assert not images.any() and not alphas.any() and int(meta["overflowed"]) == 0, k
    finally:
        native_render._learnt = learnt


@pytest.mark.cuda
def test_a_capacity_given_to_the_operator():
    """In a graph it need not be learnt."""
    scene = cuda_scene(1000, 2, sh_degree=2)
    s = flat(scene)
    want = ops.render(*native_arguments(s), keep_state=True, **SETTINGS)
    counts = want.n_records, want.n_intersections
    for capacities, drawn in ((counts, True), ((counts[0], counts[1] - 1), False)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.render(*native_arguments(s), keep_state=True, capacities=capacities, **SETTINGS)
        graph.replay()
        assert (got.n_records, got.n_intersections) == (-1, -1)
        assert got.status.tolist() == [*counts, not drawn]
        transmittances, last_ids = ops.state_pixels(got)
        if drawn:
            assert_all_same((got.images, got.alphas), (want.images, want.alphas))
            assert_all_same(ops.state_pixels(got), ops.state_pixels(want))
            assert_all_same(ops.state_records(got), ops.state_records(want))
        else:
            for x in (got.images, got.alphas, transmittances, last_ids, got.n_invalid):
                assert_poisoned(x)
            assert len(ops.state_records(got).records) == 0


@pytest.mark.cuda
def test_what_a_graph_cannot_do_is_a_sentence():
    scene = cuda_scene(60, 2, sh_degree=2)
    post = PostProcess(mean=(0.125, 0.25, 0.375), std=(0.5, 0.625, 0.75))  # numbers of no other test
    renderer = fitted(scene)
    unseen = make_scene(61, 2, sh_degree=2, width=33, height=35, dtype=torch.float32, device="cuda")
    rasterization(*scene, *SIZE, sh_degree=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="no call has shown how much room 2 images of 33x35 pixels of 61 "):
            rasterization(*unseen, 33, 35, sh_degree=2)
        with pytest.raises(RuntimeError, match="numbers .0.125, 0.25, 0.375. of postprocess are not on cuda:0 yet"):
            rasterization(*scene, *SIZE, sh_degree=2, postprocess=post)
        for name, call in (
            ("fit", lambda: renderer.fit(scene.viewmats, scene.Ks)),
            ("check", renderer.check),
            ("capture", renderer.capture),
        ):
            with pytest.raises(RuntimeError, match=f"{name} cannot be called while a CUDA graph is captured"):
                call()
        images, _ = renderer.render(scene.viewmats, scene.Ks)
    graph.replay()
    assert_same(images, direct(scene)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("form", [CUDA16, CUDA32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("c", [2, 130])
def test_colour_network_in_a_graph(c, form):
    """130 views are more than one launch takes as its arguments. Maps and cameras may change, weights are kept."""
    a = make_appearance(150, c)
    scene = rap_scene(a, color_net(form), form)
    cameras = [x.float().cuda() for x in (a.viewmats, a.Ks)]
    maps = a.maps.to("cuda", torch.float16 if form.half else torch.float32)
    options = {"map_ids": [i % 2 for i in range(c)], "view_weights": [0.5 + i / c for i in range(c)]}
    options["precision"] = form.precision
    with torch.no_grad():
        scene.render(*cameras, *SIZE, feature_maps=maps, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images, alphas, meta = scene.render(*cameras, *SIZE, feature_maps=maps, **options)
        for _ in range(3):
            cameras[0][:, 0, 3] += 0.1
            maps.mul_(0.7)
            graph.replay()
            want = scene.render(*cameras, *SIZE, feature_maps=maps, **options)
            assert_all_same((images, alphas), want[:2])
            assert int(meta["overflowed"]) == 0
