"""rasterization's gradients on a GPU: against those of the CPU in float64, and against themselves.

Where float32 decides a pixel otherwise than float64, gradients differ by what that pixel gives, so they are compared by
sums and norms; tests/test_gradients_gsplat.py compares with gsplat's.
"""

from __future__ import annotations

import gc
import sys
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from gradients import Bounds, compare, gradients, random_like
from reference_scenes import CAMERA_MODELS, PARAMETERS, one_gaussian
from scenes import assert_same, covariances, make_scene
from test_gradients_rasterization import CASES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rapfast import PostProcess, ops, rasterization
from rapfast.ops import autograd_cuda, render_bwd

pytestmark = pytest.mark.cuda

BOUNDS = Bounds(sum=1e-3, norm=5e-4, worst=1e-2)
SAME = Bounds(sum=2e-5, norm=1e-5, worst=2e-4)  # the same kernels, sums in another order
WIDTH, HEIGHT = 155, 90


def crowd(n: int = 1500, c: int = 3, *, scale: float = 0.6, **form: Any) -> dict[str, Tensor]:
    """Inputs of rasterization() on the CPU, float64."""
    scene = make_scene(n, c, width=WIDTH, height=HEIGHT, **form)
    scene.scales.mul_(scale)
    return scene._asdict()


def both(inputs: dict[str, Tensor], *, bounds: Bounds = BOUNDS, **options: Any) -> set[str]:
    """Compares the GPU's gradients with the CPU's in float64."""
    options = {"width": WIDTH, "height": HEIGHT} | options
    want, weights = gradients(inputs, "cpu", torch.float64, **options)
    got, _ = gradients(inputs, "cuda", weights=weights, **options)
    return compare(got, want, bounds)


# ----------------------------------------------------------------------------------------- the CPU's


@pytest.mark.parametrize(("camera_model", "render_mode", "rasterize_mode", "sh_degree", "packed", "background"), CASES)
@pytest.mark.parametrize("with_covars", [False, True])
def test_every_gradient_is_the_cpus(
    camera_model: str, render_mode: str, rasterize_mode: str, sh_degree: int | None, packed: bool, background: str,
    with_covars: bool,
) -> None:  # fmt: skip
    bases = None if sh_degree is None else (sh_degree + 1) ** 2 + 1
    inputs = crowd(sh_degree=sh_degree, n_bases=bases)
    if camera_model == "ortho":
        inputs["Ks"][..., :2, :2] *= 0.25
    inputs["opacities"][:100] = 1.3  # reaches the cap
    if background != "none":
        inputs["backgrounds"] = torch.rand((3, 3) if background == "color" else (3, HEIGHT, WIDTH, 3)).double()
    if with_covars:
        inputs["covars"] = covariances(make_scene(1500, 3, width=WIDTH, height=HEIGHT, sh_degree=sh_degree)) * 0.36
    compared = both(
        inputs, camera_model=camera_model, render_mode=render_mode, rasterize_mode=rasterize_mode, sh_degree=sh_degree,
        packed=packed,
    )  # fmt: skip
    wanted = {"means", "opacities", "viewmats", "Ks", "means2d", "absgrad"}
    wanted |= {"covars"} if with_covars else {"quats", "scales"}
    if render_mode not in ("D", "ED"):
        wanted |= {"colors"} | (set() if background == "none" else {"backgrounds"})
    assert compared == wanted


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8, 17, 32, 33, 67])
@pytest.mark.parametrize(("per_camera", "absgrad"), [(False, True), (True, False)])
def test_any_number_of_channels(channels: int, per_camera: bool, absgrad: bool) -> None:
    inputs = crowd(700, 2, channels=channels, per_camera=per_camera)
    both(inputs, absgrad=absgrad, render_mode="RGB+D" if channels % 2 else "RGB")


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("n_bases", [25, 27])  # rows at 4 bytes and, twenty-eight aside, at 16
def test_harmonics_of_each_camera(sh_degree: int, n_bases: int) -> None:
    both(crowd(600, 2, sh_degree=sh_degree, n_bases=n_bases, per_camera=True), sh_degree=sh_degree)


@pytest.mark.parametrize(("sh_degree", "n_bases"), [(0, 1), (0, 16), (1, 4), (2, 16), (3, 16), (3, 20)])
def test_harmonics_of_fewer_degrees_than_are_stored(sh_degree: int, n_bases: int) -> None:
    both(crowd(600, 2, sh_degree=sh_degree, n_bases=n_bases), sh_degree=sh_degree, packed=False)


@pytest.mark.parametrize("packed", [True, False])
def test_batch_dimensions(packed: bool) -> None:
    inputs = crowd(300, 2, batch=(3, 2), sh_degree=2)
    inputs["backgrounds"] = torch.rand(3, 2, 2, 3, dtype=torch.float64)
    both(inputs, sh_degree=2, packed=packed, render_mode="RGB+ED")


@pytest.mark.parametrize("n_cameras", [65, 130])
def test_more_cameras_than_one_launch_takes(n_cameras: int) -> None:
    inputs = crowd(400, n_cameras, sh_degree=1)
    both(inputs, sh_degree=1, width=64, height=48)


@pytest.mark.parametrize(
    "post",
    [
        PostProcess(clamp=(0.1, 0.6), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), layout="CHW"),
        PostProcess(size=(41, 200), clamp=(0.0, 1.0), dtype=torch.float32),
        PostProcess(size=(200, 33), layout="CHW"),
    ],
    ids=str,
)
@pytest.mark.parametrize("background", ["color", "image"])
def test_postprocess(post: PostProcess, background: str) -> None:
    inputs = crowd(500, 2, sh_degree=1)
    inputs["backgrounds"] = torch.rand((2, 3) if background == "color" else (2, HEIGHT, WIDTH, 3)).double()
    both(inputs, sh_degree=1, postprocess=post)


def test_many_large_gaussians() -> None:
    """Windows that all cells are reached by, pixels that end early, lists longer than a window."""
    inputs = crowd(2500, 1, scale=3.0)
    inputs["opacities"][::3] = 0.99
    both(inputs, packed=False)


# ------------------------------------------------------------------------------------------ itself


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED", "D"])
def test_pixels_are_the_same_with_and_without_a_graph(packed: bool, render_mode: str) -> None:
    inputs = {k: x.float().cuda() for k, x in crowd(2000, 9, sh_degree=2).items()}
    inputs["backgrounds"] = torch.rand(9, 3, device="cuda")
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 2, "packed": packed, "render_mode": render_mode}
    images, alphas, meta = rasterization(**inputs, **options)
    got = rasterization(**{k: x.clone().requires_grad_() for k, x in inputs.items()}, **options)
    assert_same(got[0].detach(), images)
    assert_same(got[1].detach(), alphas)
    assert list(got[2]) == list(meta)
    for key, value in meta.items():
        if isinstance(value, Tensor):
            assert_same(got[2][key].detach(), value)
        else:
            assert got[2][key] == value


def test_the_gradient_of_a_batch_is_the_sum_of_its_views() -> None:
    inputs = crowd(2000, 5, sh_degree=3)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 3, "packed": False}
    together, weights = gradients(inputs, "cuda", **options)
    parts = []
    for c in range(5):
        view = {name: inputs[name][c : c + 1] for name in ("viewmats", "Ks")}
        parts.append(gradients(inputs | view, "cuda", weights=[w[c : c + 1] for w in weights], **options)[0])
    want = {
        name: torch.cat([part[name] for part in parts])
        if name in ("viewmats", "Ks", "means2d", "absgrad")
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in together
    }
    compare(together, want, SAME)


def test_packed_and_dense_are_the_same() -> None:
    inputs = crowd(1000, 3, sh_degree=1)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1}
    packed, weights = gradients(inputs, "cuda", packed=True, **options)
    dense, _ = gradients(inputs, "cuda", packed=False, weights=weights, **options)
    *_, meta = rasterization(**{k: x.float().cuda() for k, x in inputs.items()}, **options)
    cameras, ids = meta["camera_ids"].cpu(), meta["gaussian_ids"].cpu()
    assert 500 < len(ids) < 3000
    for name in ("means2d", "absgrad"):
        dense[name], rest = dense[name][cameras, ids], dense[name].clone()
        rest[cameras, ids] = 0
        assert not rest.any()
    compare(packed, dense, SAME)


@pytest.mark.parametrize("name", [*PARAMETERS, "backgrounds", "covars"])
def test_one_input_alone(name: str) -> None:
    """Its gradient is the one that it has among others; nothing else gets one."""
    inputs = crowd(500, 2, sh_degree=1) | {"backgrounds": torch.rand(2, 3, dtype=torch.float64)}
    if name == "covars":
        inputs["covars"] = covariances(make_scene(500, 2, width=WIDTH, height=HEIGHT, sh_degree=1)) * 0.36
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1}
    everything, weights = gradients(inputs, "cuda", **options)
    on_gpu = {k: x.float().cuda() for k, x in inputs.items()}
    leaf = on_gpu[name].clone().requires_grad_()
    images, alphas, meta = rasterization(**(on_gpu | {name: leaf}), **options)
    assert meta["means2d"].requires_grad == (name not in ("backgrounds",))
    torch.autograd.backward((images, alphas), [w.to(images) for w in weights]) if alphas.requires_grad else (
        images.backward(weights[0].to(images))
    )
    compare({name: leaf.grad.double().cpu()}, {name: everything[name]}, SAME)


def test_computed_and_strided_inputs() -> None:
    """Activations of parameters, views of larger tensors and expanded ones, as training code has them."""
    inputs = crowd(600, 2, sh_degree=1)

    def found(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        s = {k: x.to(device, dtype) for k, x in inputs.items()}
        leaves = {
            "wide": torch.cat([s["means"], s["quats"]], -1).requires_grad_(),
            "logits": torch.logit(s["opacities"], eps=1e-3).requires_grad_(),
            "logs": s["scales"].log().mT.contiguous().requires_grad_(),
            "K": s["Ks"][0].clone().requires_grad_(),
            "dc": s["colors"][:, :1].clone().requires_grad_(),
            "rest": s["colors"][:, 1:].clone().requires_grad_(),
        }
        images, alphas, _ = rasterization(
            leaves["wide"][:, :3], leaves["wide"][:, 3:], leaves["logs"].exp().mT, torch.sigmoid(leaves["logits"]),
            torch.cat([leaves["dc"], leaves["rest"]], 1), s["viewmats"], leaves["K"].expand(2, 3, 3), WIDTH, HEIGHT,
            sh_degree=1,
        )  # fmt: skip
        v_images, v_alphas = random_like(images, alphas)
        ((images * v_images).sum() + (alphas * v_alphas).sum()).backward()
        return {k: x.grad.double().cpu() for k, x in leaves.items()}

    compare(found("cuda", torch.float32), found("cpu", torch.float64), BOUNDS)


def test_gradients_of_one_output_alone() -> None:
    inputs = crowd(500, 2)
    for which in (0, 1):
        grads = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            leaves = {k: x.detach().to(device, dtype).requires_grad_() for k, x in inputs.items()}
            output = rasterization(**leaves, width=WIDTH, height=HEIGHT)[which]
            (output * random_like(output)[0]).sum().backward()
            grads.append({k: None if x.grad is None else x.grad.double().cpu() for k, x in leaves.items()})
        compare(grads[1], grads[0], BOUNDS)


def test_backward_runs_again_on_a_retained_graph_and_only_there() -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(500, 2, sh_degree=1).items()}
    images, alphas, _ = rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1)
    loss = images.square().sum() + alphas.sum()
    loss.backward(retain_graph=True)
    first = {name: leaf.grad.double().cpu() for name, leaf in leaves.items()}
    loss.backward()
    compare({name: leaf.grad.double().cpu() / 2 for name, leaf in leaves.items()}, first, SAME)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    images, _, _ = rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(images.sum(), leaves["means"], create_graph=True)


@pytest.mark.parametrize("has_other_room", [False, True])
def test_a_call_that_a_checkpoint_runs_again(has_other_room: bool) -> None:
    """Its state is laid out by the room that calls of its sizes have learnt, which may have changed since."""
    inputs = {k: x.float().cuda() for k, x in crowd(500, 2, sh_degree=1).items()}

    def draw(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        return rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1)[:2]

    found = []
    for run in (draw, partial(checkpoint, draw, use_reentrant=False, determinism_check="none")):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        images, alphas = run(**leaves)
        loss = images.square().sum() + alphas.sum()
        if run is not draw and has_other_room:
            for learnt in sys.modules["rapfast.ops.render"]._learnt.values():
                learnt.grow((learnt.capacities[0] + 4096, learnt.capacities[1] + 4096))
            with pytest.raises(RuntimeError, match="outside of the checkpoint"):
                loss.backward()
            return
        loss.backward()
        found.append({k: x.grad.double().cpu() for k, x in leaves.items()})
    compare(found[1], found[0], SAME)


def test_an_input_changed_in_place_before_backward_is_an_error() -> None:
    inputs = {k: x.float().cuda() for k, x in crowd(50, 1).items()}
    means = inputs["means"].clone().requires_grad_() * 1
    images, _, _ = rasterization(**(inputs | {"means": means}), width=WIDTH, height=HEIGHT)
    means += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        images.sum().backward()


def test_images_may_be_changed_in_place() -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(200, 2).items()}
    images, _, _ = rasterization(**leaves, width=WIDTH, height=HEIGHT)
    images.mul_(2).clamp_(0.1, 0.9)
    images.sum().backward()
    assert leaves["means"].grad.any()


@pytest.mark.parametrize("packed", [True, False])
def test_entries_of_meta_are_differentiable(packed: bool) -> None:
    inputs = crowd(400, 2)
    grads = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = {k: x.detach().to(device, dtype).requires_grad_() for k, x in inputs.items()}
        *_, meta = rasterization(**leaves, width=WIDTH, height=HEIGHT, packed=packed, rasterize_mode="antialiased")
        entries = [meta[key] for key in ("means2d", "conics", "opacities", "depths")]
        sum((x * w).sum() for x, w in zip(entries, random_like(*entries), strict=True)).backward()
        grads.append({k: x.grad for k, x in leaves.items()})
    grads = [{k: None if x is None else x.double().cpu() for k, x in g.items()} for g in grads]
    compare(grads[1], grads[0], BOUNDS)


@pytest.mark.parametrize("packed", [True, False])
def test_entries_of_meta_are_of_the_graph_wherever_they_are_looked_at_first(packed: bool) -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(400, 2).items()}
    found = []
    for looked_at in ((), ("radii",), ("depths", "means2d")):
        *_, meta = rasterization(**leaves, width=WIDTH, height=HEIGHT, packed=packed)
        with torch.no_grad():
            assert all(meta[key].isfinite().all() for key in looked_at)
        loss = meta["depths"].square().sum() + meta["conics"].sum() + meta["means2d"].sum()
        found.append(torch.autograd.grad(loss, [leaves[name] for name in ("means", "quats", "scales", "viewmats")]))
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            assert_same(a, b)  # nothing here is added by atomics


def test_meta_and_images_together() -> None:
    """Depths of meta add to what the blend gives the records."""
    inputs = crowd(400, 2, sh_degree=1)
    grads = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = {k: x.detach().to(device, dtype).requires_grad_() for k, x in inputs.items()}
        images, _, meta = rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1, render_mode="RGB+D")
        ((images * random_like(images)[0]).sum() + 10 * meta["depths"].square().sum()).backward()
        grads.append({k: x.grad.double().cpu() for k, x in leaves.items()})
    compare(grads[1], grads[0], BOUNDS)


def test_absgrad_adds_up_over_backwards() -> None:
    inputs = {k: x.float().cuda().requires_grad_() for k, x in crowd(400, 2).items()}
    images, _, meta = rasterization(**inputs, width=WIDTH, height=HEIGHT, packed=False, absgrad=True)
    assert meta["means2d"].absgrad.count_nonzero() == 0 and not meta["means2d"].absgrad.requires_grad
    images.square().sum().backward(retain_graph=True)
    once = meta["means2d"].absgrad.double().cpu()
    images.square().sum().backward()
    compare({"absgrad": meta["means2d"].absgrad.double().cpu()}, {"absgrad": 2 * once}, SAME)


@pytest.mark.parametrize("sh_degree", [None, 2])
def test_sparse_gradients(sh_degree: int | None) -> None:
    inputs = {k: x.float().cuda() for k, x in crowd(400, 2, sh_degree=sh_degree).items()}
    inputs["means"][::3, 2] -= 50  # behind the cameras
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": sh_degree}
    found = []
    for sparse in (False, True):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        images, alphas, meta = rasterization(**leaves, **options, sparse_grad=sparse)
        (images.square().sum() + alphas.sum()).backward()
        found.append({k: x.grad for k, x in leaves.items()})
    visible = meta["gaussian_ids"].unique()
    assert 0 < len(visible) < 400
    for name in ("means", "quats", "scales"):
        grad = found[1][name]
        assert grad.layout == torch.sparse_coo and torch.equal(grad._indices()[0], visible)
        found[1][name] = grad.to_dense()
    dense, sparse = ({k: x.double().cpu() for k, x in f.items()} for f in found)
    compare(sparse, dense, SAME)


# ----------------------------------------------------------------------------------- deterministic


@pytest.mark.parametrize(("channels", "absgrad"), [(3, True), (4, False), (8, True), (40, True), (64, False)])
def test_deterministic_gradients_repeat_bit_by_bit(channels: int, absgrad: bool) -> None:
    inputs = crowd(2500, 4, channels=channels)
    options = {"width": WIDTH, "height": HEIGHT, "packed": False, "absgrad": absgrad}
    default, weights = gradients(inputs, "cuda", **options)
    torch.use_deterministic_algorithms(True)
    try:
        found = [gradients(inputs, "cuda", weights=weights, **options)[0] for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        for name, x in other.items():
            assert_same(x, found[0][name])
    compare(default, found[0], SAME)


# ---------------------------------------------------------------------------- streams and devices


def test_on_a_stream_of_its_own() -> None:
    inputs = crowd(1500, 3, sh_degree=2)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 2, "packed": False, "render_mode": "RGB+ED"}
    want, weights = gradients(inputs, "cuda", **options)
    stream, busy = torch.cuda.Stream(), torch.rand(2048, 2048, device="cuda")
    for _ in range(3):
        for _ in range(10):
            busy = (busy @ busy).clamp(0, 1)
        with torch.cuda.stream(stream):
            got, _ = gradients(inputs, "cuda", weights=weights, **options)
        stream.synchronize()
        compare(got, want, SAME)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one() -> None:
    inputs = crowd(800, 2, sh_degree=1)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1}
    want, weights = gradients(inputs, "cuda:0", **options)
    got, _ = gradients(inputs, "cuda:1", weights=weights, **options)
    assert torch.cuda.current_device() == 0
    compare(got, want, SAME)


def test_autocast_leaves_gradients_alone() -> None:
    inputs = crowd(500, 2, sh_degree=1)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1, "render_mode": "RGB+ED"}
    want, weights = gradients(inputs, "cuda", **options)
    with torch.autocast("cuda", dtype=torch.float16):
        got, _ = gradients(inputs, "cuda", weights=weights, **options)
    compare(got, want, SAME)


def test_a_captured_call_that_wants_gradients_is_refused() -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(50, 1).items()}
    rasterization(**leaves, width=WIDTH, height=HEIGHT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="means requires a gradient, for which a count"):
        rasterization(**leaves, width=WIDTH, height=HEIGHT)


@pytest.mark.parametrize("packed", [True, False])
def test_memory_goes_with_the_outputs(packed: bool) -> None:
    """Nothing waits for the garbage collector: no cycle runs through the graph, and meta keeps no image."""
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(300, 2, sh_degree=1).items()}
    gc.collect()
    gc.disable()
    try:
        images, alphas, meta = rasterization(
            **leaves, width=WIDTH, height=HEIGHT, sh_degree=1, render_mode="RGB+ED", packed=packed, absgrad=True,
            sparse_grad=packed,
        )  # fmt: skip
        meta["means2d"].retain_grad()
        (images.sum() + alphas.sum()).backward()
        kept = weakref.ref(images), weakref.ref(meta["means2d"]), weakref.ref(meta["means2d"].absgrad)
        del images, alphas
        assert kept[0]() is None
        del meta
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------- degenerate input


@pytest.mark.parametrize(("n", "c"), [(0, 2), (5, 2), (5, 0), (600, 3)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sh_degree", [None, 2])
def test_nothing_is_seen(n: int, c: int, packed: bool, sh_degree: int | None) -> None:
    leaves = {k: x.float().cuda() for k, x in crowd(max(n, 1), max(c, 1), sh_degree=sh_degree).items()}
    leaves = {k: (x[:n] if k in PARAMETERS[:5] else x[:c]).clone().requires_grad_() for k, x in leaves.items()}
    with torch.no_grad():
        leaves["means"][..., 2] -= 50
    images, alphas, meta = rasterization(
        **leaves, width=33, height=20, sh_degree=sh_degree, packed=packed, render_mode="RGB+ED", absgrad=True
    )
    meta["means2d"].retain_grad()
    assert images.count_nonzero() == 0
    (images.sum() + alphas.sum()).backward()
    assert meta["means2d"].grad.shape == meta["means2d"].shape
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape and leaf.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("channels", [3, 40])
def test_nothing_is_seen_deterministically(channels: int, packed: bool) -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(5, 2, channels=channels).items()}
    with torch.no_grad():
        leaves["means"][..., 2] -= 50
    torch.use_deterministic_algorithms(True)
    try:
        images, alphas, meta = rasterization(**leaves, width=33, height=20, packed=packed, absgrad=True)
        meta["means2d"].retain_grad()
        (images.sum() + alphas.sum() + meta["depths"].sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert meta["means2d"].grad.shape == meta["means2d"].absgrad.shape == meta["means2d"].shape
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape and leaf.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
@pytest.mark.parametrize("sh_degree", [None, 1])
def test_invalid_gaussians_and_views_get_zero_gradients(camera_model: str, sh_degree: int | None) -> None:
    big = torch.finfo(torch.float32).max ** 0.75
    inputs = {k: x.float() for k, x in crowd(300, 3, sh_degree=sh_degree).items()}
    if camera_model == "ortho":
        inputs["Ks"][..., :2, :2] *= 0.25
    bad = [
        ("means", (0, torch.nan)), ("means", (2, torch.inf)), ("quats", (slice(None), 0.0)), ("quats", (1, torch.nan)),
        ("quats", (slice(None), big)), ("scales", (0, torch.inf)), ("scales", (slice(None), big)),
        ("opacities", ((), torch.nan)), ("opacities", ((), -torch.inf)), ("colors", (0, torch.nan)),
        ("colors", (-1, -torch.inf)), ("opacities", ((), 0.0)), ("opacities", ((), -1.0)), ("means", (2, -50.0)),
    ]  # fmt: skip
    inputs["means"][:11, :2] *= 0.2  # seen, so that a bad colour is looked at
    for n, (name, (index, value)) in enumerate(bad):
        inputs[name][n][index] = value
    inputs["viewmats"][1, 1, :3] = 0.0  # singular: this view sees nothing
    clean = inputs | {name: inputs[name][len(bad) :] for name in PARAMETERS[:5]}
    options = {
        "width": WIDTH, "height": HEIGHT, "sh_degree": sh_degree, "camera_model": camera_model, "packed": False,
        "render_mode": "RGB+ED", "rasterize_mode": "antialiased",
    }  # fmt: skip
    want, weights = gradients(clean, "cuda", **options)
    got, _ = gradients(inputs, "cuda", weights=weights, **options)
    for name in (*PARAMETERS[:5], "means2d", "absgrad"):
        rows = got[name].movedim(1, 0) if name in ("means2d", "absgrad") else got[name]
        assert rows[: len(bad)].count_nonzero() == 0, name
        got[name] = got[name][:, len(bad) :] if name in ("means2d", "absgrad") else got[name][len(bad) :]
    for name in ("viewmats", "Ks"):
        assert got[name][1].count_nonzero() == 0 and got[name][[0, 2]].any(), name
    compare(got, want, SAME)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"scales": [[0.0, 0.0, 0.0]]}, "point"),
        ({"scales": [[0.1, 0.0, 0.0]]}, "needle"),
        ({"scales": [[0.0, 0.0, 0.0]], "eps2d": 0.0}, "no area"),
        ({"scales": [[1e4, 1e4, 1e4]]}, "huge"),
        ({"means": [[0.0, 0.0, 0.0]], "near_plane": 0.0}, "at the camera"),
        ({"means": [[0.0, 0.0, 1e-30]], "near_plane": 0.0}, "just before the camera"),
        ({"means": [[1e3, 0.0, 0.02]], "scales": [[1e3, 1.0, 1.0]]}, "far to the side"),
        ({"opacities": [1e30]}, "opacity far above 1"),
        ({"quats": [[1e-15, 0.0, 0.0, 0.0]]}, "short quaternion"),
        ({"quats": [[-2.0, 0.0, 0.0, 0.0]]}, "long quaternion"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
def test_degenerate_gaussians_give_finite_gradients(camera_model: str, changes: dict[str, Any], label: str) -> None:
    scene = one_gaussian(camera_model=camera_model, sh_degree=2)
    scene["colors"] = torch.full((1, 9, 3), 0.1)
    scene |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in changes.items()}
    inputs = {name: scene.pop(name) for name in PARAMETERS}
    for mode in ("classic", "antialiased"):
        found, _ = gradients(inputs, "cuda", **scene, rasterize_mode=mode, render_mode="RGB+ED")
        for name, x in found.items():
            assert x.isfinite().all(), f"{name} of {label}: {x}"


def test_alpha_cap_passes_no_gradient() -> None:
    scene = {k: x.float().cuda() if isinstance(x, Tensor) else x for k, x in one_gaussian().items()}
    scene["opacities"] = torch.tensor([1.5], device="cuda", requires_grad=True)
    images, _, _ = rasterization(**scene)
    capped, below = images[0, 8, 8].sum(), images[0, 8, 11].sum()
    assert torch.autograd.grad(capped, scene["opacities"], retain_graph=True)[0].item() == 0
    assert torch.autograd.grad(below, scene["opacities"])[0].item() > 0


def test_nothing_is_read_back_but_the_counts() -> None:
    """One stop in a step of training: where the forward learns its counts."""
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(500, 2, sh_degree=1).items()}

    def step(packed: bool) -> None:
        images, alphas, meta = rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1, packed=packed)
        meta["means2d"].retain_grad()
        (images.square().sum() + alphas.sum()).backward()

    for packed in (True, False):
        step(packed)
        torch.cuda.set_sync_debug_mode("error")  # of torch; the native call's own wait is not torch's
        try:
            step(packed)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rows_are_as_the_native_module_has_them() -> None:
    for channels in range(1, 70):
        assert render_bwd.row_stride(channels) == ops._library.native.row_stride(channels)
    assert autograd_cuda.row_stride is render_bwd.row_stride
