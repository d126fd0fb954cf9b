"""The native call: in parts, for the caller that splits it, as an operator, and past it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from renderer_scenes import (
    RASTER_OPTIONS,
    SETTINGS,
    SIZE,
    assert_all_same,
    cuda_scene,
    native_arguments,
    native_render,
)
from scenes import HEIGHT, WIDTH, assert_same, flat
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from rapfast import PostProcess, ops, rasterization
from rapfast.ops import state as native_state
from rapfast.ops.split import TooLarge

# Parts of a call, for the caller that splits it.

BAND_SIZE = (50, 75)  # 5 rows of tiles, the last of 11 pixels


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"render_mode": "RGB+ED"}, {"render_mode": "D"}, {"kind": "image"}], ids=str)
@pytest.mark.parametrize("cuts", [(0, 5), (0, 1, 5), (0, 2, 3, 4, 5), (0, 4, 5)], ids=str)
def test_bands_of_tile_rows_make_the_whole(cuts, options):
    """Bit by bit, with all that is kept of pixels. Records are the whole view's."""
    options = dict(options)
    width, height = BAND_SIZE
    scene = flat(cuda_scene(600, 2, sh_degree=2, width=width, height=height))
    background = torch.rand(2, height, width, 3, device="cuda") if options.pop("kind", None) else None
    settings = {**SETTINGS, "keep_state": True, **options}

    def draw(rows: slice, **more: Any) -> Any:
        arguments = native_arguments(scene)[:8]
        own = None if background is None else background[:, rows].contiguous()
        return ops.render(*arguments, own, *BAND_SIZE, **settings, **more)

    whole = draw(slice(None))
    bands = [
        draw(slice(16 * first, 16 * end), tile_rows=(first, end - first))
        for first, end in zip(cuts, cuts[1:], strict=False)
    ]
    assert_same(torch.cat([band.images for band in bands], 1), whole.images)
    assert_same(torch.cat([band.alphas for band in bands], 1), whole.alphas)
    for parts, want in zip(zip(*map(ops.state_pixels, bands), strict=True), ops.state_pixels(whole), strict=True):
        assert_same(torch.cat(parts, 1), want)
    for band in bands:
        assert band.n_records == whole.n_records
        assert_all_same(ops.state_records(band), ops.state_records(whole))

    def n_listed(rendered: Any) -> int:
        sizes = rendered.sizes
        n_tiles = sizes.n_images * -(-sizes.width // 16) * sizes.n_tile_rows
        return int(native_state.state_part(rendered.state, sizes, "tile_offsets", torch.int64, n_tiles + 1)[-1])

    assert sum(map(n_listed, bands)) == n_listed(whole)


@pytest.mark.cuda
def test_rows_that_are_not_there_are_refused():
    scene = flat(cuda_scene(20, 1, sh_degree=2))
    for rows in ((-1, 2), (0, 4), (3, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"tile_rows must be \(first, count\) of 3 rows of tiles, got "):
            ops.render(*native_arguments(scene), tile_rows=rows, **SETTINGS)
    with pytest.raises(ValueError, match="postprocess.size must be None with tile_rows"):
        ops.render(*native_arguments(scene), tile_rows=(0, 1), postprocess=PostProcess(size=(3, 3)), **SETTINGS)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "post", [None, PostProcess(dtype=torch.float16), PostProcess(layout="CHW", size=(9, 8))], ids=str
)
def test_outputs_in_memory_of_the_callers(post):
    scene = flat(cuda_scene(300, 2, sh_degree=2))
    want = ops.render(*native_arguments(scene), postprocess=post, **SETTINGS)
    images = torch.empty((4, *want.images.shape[1:]), dtype=want.images.dtype, device="cuda")
    height, width = (HEIGHT, WIDTH) if post is None or post.size is None else post.size
    alphas = torch.empty((4, height, width, 1), device="cuda")
    for x in (images, alphas):
        x.fill_(7)
    got = ops.render(*native_arguments(scene), postprocess=post, out=(images[1:3], alphas[1:3]), **SETTINGS)
    assert got.images.data_ptr() == images[1].data_ptr()
    assert_all_same((images[1:3], got.alphas), (want.images, want.alphas))
    for x in (images, alphas):
        assert (x[0] == 7).all() and (x[3] == 7).all()


@pytest.mark.cuda
def test_a_call_that_would_take_too_much_allocates_nothing(monkeypatch):
    """It tells what it would take, which is what it takes."""
    monkeypatch.setattr(native_render, "_learnt", type(native_render._learnt)())
    scene = flat(cuda_scene(3000, 4, sh_degree=2))
    settings = {**SETTINGS, "postprocess": PostProcess(dtype=torch.uint8)}
    wanted = []
    for _ in range(2):  # by a guess; with the room known
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with pytest.raises(TooLarge, match=r"the call needs \d+ bytes, more than 1000") as caught:
            ops.render(*native_arguments(scene), max_bytes=1000, **settings)
        assert torch.cuda.max_memory_allocated() == before
        wanted.append(caught.value.n_bytes)
        ops.render(*native_arguments(scene), **settings)
    torch.cuda.reset_peak_memory_stats()
    rendered = ops.render(*native_arguments(scene), max_bytes=wanted[-1], **settings)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert abs(used - wanted[-1]) <= 512 * 8  # each allocation is rounded up
    assert (rendered.images != 0).any()
    with pytest.raises(TooLarge):
        ops.render(*native_arguments(scene), max_bytes=wanted[-1] - 1, **settings)


@pytest.mark.cuda
def test_too_much_is_known_after_one_overflow(monkeypatch):
    """What a call turned out to need is remembered where it is refused."""
    monkeypatch.setattr(native_render, "_learnt", type(native_render._learnt)())
    scene = flat(cuda_scene(3000, 4, sh_degree=2))
    scene.scales.add_(1.0)  # more intersections than the first guess
    with pytest.raises(TooLarge) as probe:
        ops.render(*native_arguments(scene), max_bytes=1, **SETTINGS)
    guess = probe.value.n_bytes
    with pytest.raises(TooLarge) as first:
        ops.render(*native_arguments(scene), max_bytes=guess, **SETTINGS)
    assert first.value.n_bytes > guess
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(TooLarge) as second:
        ops.render(*native_arguments(scene), max_bytes=guess, **SETTINGS)
    assert second.value.n_bytes == first.value.n_bytes
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.cuda
def test_as_many_regions_as_a_call_draws_and_more():
    """8192x4096 pixels are 4096 regions: the last size that is drawn at once. The next comes in bands, without
    gradients."""
    scene = cuda_scene(50, 1, sh_degree=0, width=8192, height=4096)
    scene = scene._replace(means=scene.means * 0.2)  # within the image: what is beyond depends on where its edge is
    images, alphas, _ = rasterization(*scene, 8192, 4096, sh_degree=0)
    assert float(alphas.sum()) > 0 and bool(images.isfinite().all())
    larger = rasterization(*scene, 8192, 4112, sh_degree=0)
    assert_all_same((larger[0][:, :4096], larger[1][:, :4096]), (images, alphas))
    leaf = scene.means.clone().requires_grad_()
    assert_same(rasterization(leaf, *scene[1:], 8192, 4096, sh_degree=0)[0], images)
    with pytest.raises(TooLarge, match="8192x4112 pixels are 4160 regions of 128x64, and a native call draws at"):
        rasterization(leaf, *scene[1:], 8192, 4112, sh_degree=0)


# The operator, the shorter way past it, and graphs that calls are launched by.


@pytest.mark.cuda
@pytest.mark.parametrize("options", RASTER_OPTIONS.values(), ids=RASTER_OPTIONS.keys())
def test_calls_that_come_again(options, monkeypatch):
    """A loop's calls become graphs; each draws the bits of a call that is none. Cameras and values change, and so do
    the camera tensors, results kept for a while, and what the memory held."""
    plans = []
    plan = native_render._plan
    monkeypatch.setattr(native_render, "_plan", lambda *form: plans.append(plan(*form)) or plans[-1])
    options = dict(options)
    shape = {"batch": options.pop("batch", ()), "channels": options.pop("channels", 3)}
    kind, size = options.pop("kind", None), (320, 200)  # large enough for blocks of their own in torch's allocator
    scene = cuda_scene(6_000, 2, sh_degree=options.get("sh_degree"), width=size[0], height=size[1], **shape)
    if kind is not None:
        options["backgrounds"] = torch.rand((2, size[1], size[0], 3) if kind == "image" else (2, 3), device="cuda")
    opacities = scene.opacities.clone()
    cameras = []
    for k in range(40):
        viewmats = scene.viewmats.clone()
        viewmats[..., 0, 3] += 0.01 * k
        cameras.append({"viewmats": viewmats, "Ks": scene.Ks.clone()})

    def draw(k: int) -> Any:
        scene.opacities.copy_(opacities * 0.99**k)
        return rasterization(*scene._replace(**cameras[k]), *size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(native_render, "_plan", plan.__wrapped__)  # always a new one, which has no graph
        wants = [draw(k)[:2] for k in range(40)]
    for k, want in enumerate(wants):
        got = draw(k)
        assert_all_same(got[:2], want)
        if k == 20:
            kept = got  # the next ones lie elsewhere
    assert_all_same(kept[:2], wants[20])
    assert_same(kept[2]["n_invalid"], got[2]["n_invalid"])
    assert sum(p.n_graphs for p in {id(p): p for p in plans}.values()) > 0


class Seen(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass, as tracers and quantisers make them."""


def test_who_watches():
    plain = torch.ones(2)
    watched: list[bool] = []

    def look(x: Tensor) -> Tensor:
        watched.append(native_render.is_watched((x, None)))
        return x + 1

    look(plain)
    look(torch.nn.Parameter(plain))
    with torch.no_grad(), torch.inference_mode(), torch.device("cpu"):
        look(plain)
    assert not any(watched)
    watched.clear()
    with Seen():
        look(plain)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(plain))
    look(plain.as_subclass(Labelled))
    torch.func.vmap(look)(plain)
    torch.func.grad(lambda x: look(x).sum())(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(look, (plain,), check_trace=False)
    make_fx(look)(plain)
    assert len(watched) == 7 and all(watched)


@pytest.mark.cuda
def test_whoever_watches_sees_the_operator():
    """A plain call goes past torch's dispatcher, and draws the same."""
    scene = cuda_scene(sh_degree=2)
    want = rasterization(*scene, *SIZE, sh_degree=2)
    with Seen() as seen:
        got = rasterization(*scene, *SIZE, sh_degree=2)
    assert "rapfast::render" in seen.names
    assert_all_same(got[:2], want[:2])
    assert_same(got[2]["means2d"], want[2]["means2d"])


@pytest.mark.cuda
@pytest.mark.parametrize("fixed_room", [False, True])
def test_opcheck_of_the_operator(fixed_room, monkeypatch):
    scene = flat(cuda_scene(100, 2, sh_degree=2))
    calls: list[tuple[Any, ...]] = []
    operator = native_render.render_op

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(native_render, "is_watched", lambda tensors: True)
    monkeypatch.setattr(native_render, "render_op", record)
    ops.render(*native_arguments(scene), **SETTINGS)
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, calls[-1], strict=True)) | {"fixed_room": fixed_room}
    torch.library.opcheck(operator, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))
