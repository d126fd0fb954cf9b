"""rasterization's gradients on the CPU: against the reference, finite differences, and themselves."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from rasterization_losses import assert_gradient, leaves_of, loss_of, weights_like
from reference_scenes import CAMERA_MODELS, PARAMETERS, make_scene, one_gaussian
from scenes import assert_same
from scenes import make_scene as make_crowd
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from rapfast import PostProcess, rasterization

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")


# --------------------------------------------------------------------------------- the reference's

CASES = [
    # camera model, render mode, rasterize mode, SH degree, packed, background
    ("pinhole", "RGB", "classic", 3, True, "color"),
    ("pinhole", "RGB+ED", "antialiased", 4, False, "image"),
    ("pinhole", "D", "classic", None, False, "none"),
    ("pinhole", "ED", "antialiased", 1, True, "color"),
    ("ortho", "RGB+D", "classic", None, True, "image"),
    ("ortho", "RGB", "antialiased", 2, False, "none"),
    ("ortho", "ED", "classic", None, True, "none"),
    ("fisheye", "RGB+ED", "classic", 2, True, "color"),
    ("fisheye", "RGB", "antialiased", None, False, "image"),
    ("fisheye", "RGB+D", "antialiased", 0, False, "none"),
]


@pytest.mark.parametrize(("camera_model", "render_mode", "rasterize_mode", "sh_degree", "packed", "background"), CASES)
@pytest.mark.parametrize("with_covars", [False, True])
def test_every_gradient_is_the_references(
    camera_model: str, render_mode: str, rasterize_mode: str, sh_degree: int | None, packed: bool, background: str,
    with_covars: bool,
) -> None:  # fmt: skip
    scene = make_scene(40, 2, sh_degree, seed=21, camera_model=camera_model)
    scene["opacities"][:4] = 1.3  # reaches the cap
    more = []
    if background != "none":
        shape = (2, 3) if background == "color" else (2, scene["height"], scene["width"], 3)
        scene["backgrounds"] = torch.rand(shape, dtype=torch.float64)
        more.append("backgrounds")
    if with_covars:
        half = torch.randn(40, 3, 3, dtype=torch.float64) * 0.12
        scene["covars"] = half @ half.mT
        more.append("covars")
    options = {"render_mode": render_mode, "rasterize_mode": rasterize_mode, "packed": packed, "absgrad": True}
    results = []
    for backend in ("reference", "rapfast"):
        leaves = leaves_of(scene, *more)
        images, alphas, meta = rasterization(**(scene | leaves), **options, backend=backend)
        meta["means2d"].retain_grad()
        loss_of(images, alphas).backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        results.append(gradients | {"means2d": meta["means2d"].grad, "absgrad": meta["means2d"].absgrad})
    want, got = results
    unused = {"quats", "scales"} if with_covars else set()
    if render_mode in ("D", "ED"):
        unused |= {"colors", "backgrounds"}
    for name, expected in want.items():
        if name in unused:
            assert got[name] is None or got[name].count_nonzero() == 0, name
        else:
            assert_gradient(got[name], expected, 1e-8, name)


@pytest.mark.parametrize("render_mode", RENDER_MODES)
def test_batch_dimensions(render_mode: str) -> None:
    scenes = [make_scene(20, 2, 1, seed=seed) for seed in (1, 2, 3, 4, 5, 6)]
    stacked = {k: torch.stack([s[k] for s in scenes]).unflatten(0, (3, 2)) for k in PARAMETERS}
    backgrounds = torch.rand(3, 2, 2, 3, dtype=torch.float64)
    scene = scenes[0] | stacked | {"backgrounds": backgrounds, "render_mode": render_mode, "packed": False}
    results = []
    for backend in ("reference", "rapfast"):
        leaves = leaves_of(scene, "backgrounds")
        images, alphas, meta = rasterization(**(scene | leaves), backend=backend)
        meta["means2d"].retain_grad()
        assert meta["means2d"].shape == (3, 2, 2, 20, 2)
        loss_of(images, alphas).backward()
        results.append({k: x.grad for k, x in leaves.items()} | {"means2d": meta["means2d"].grad})
    for name, want in results[0].items():
        if want is None or not want.any():
            assert results[1][name] is None or not results[1][name].any(), name
        else:
            assert_gradient(results[1][name], want, 1e-8, name)


@pytest.mark.parametrize(
    "post",
    [
        PostProcess(clamp=(0.1, 0.6), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), layout="CHW"),
        PostProcess(size=(9, 30), clamp=(0.0, 1.0), dtype=torch.float32),
        PostProcess(size=(40, 11), layout="CHW", dtype=torch.float16),
    ],
    ids=str,
)
def test_postprocess(post: PostProcess) -> None:
    scene = make_scene(40, 2, 2, seed=22) | {"backgrounds": torch.rand(2, 3, dtype=torch.float64)}
    results = []
    for backend in ("reference", "rapfast"):
        leaves = leaves_of(scene, "backgrounds")
        images, alphas, _ = rasterization(**(scene | leaves), postprocess=post, backend=backend)
        loss_of(images.double(), alphas).backward()
        results.append({k: x.grad for k, x in leaves.items()})
    tolerance = 1e-8 if post.dtype is None else 1e-5 if post.dtype == torch.float32 else 2e-2
    for name, want in results[0].items():
        assert_gradient(results[1][name], want, tolerance, name)


def test_images_of_bytes_have_no_gradient_and_their_alphas_do() -> None:
    scene = make_scene(20, 1, seed=23)
    scene["opacities"].requires_grad_()
    images, alphas, _ = rasterization(**scene, postprocess=PostProcess(dtype=torch.uint8))
    assert not images.requires_grad and alphas.requires_grad
    alphas.sum().backward()
    assert scene["opacities"].grad.sum() > 0


@pytest.mark.parametrize("channels", [1, 2, 7, 33])
@pytest.mark.parametrize("per_camera", [False, True])
def test_any_number_of_channels(channels: int, per_camera: bool) -> None:
    scene = make_scene(25, 2, channels=channels, seed=24)
    if per_camera:
        scene["colors"] = torch.rand(2, 25, channels, dtype=torch.float64)
    results = []
    for backend in ("reference", "rapfast"):
        leaves = leaves_of(scene)
        images, alphas, _ = rasterization(**(scene | leaves), backend=backend)
        loss_of(images, alphas).backward()
        results.append({k: x.grad for k, x in leaves.items()})
    for name, want in results[0].items():
        assert_gradient(results[1][name], want, 1e-8, name)


# ------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize(
    ("camera_model", "rasterize_mode", "sh_degree", "with_covars"),
    [
        ("pinhole", "classic", 1, False),
        ("pinhole", "antialiased", 4, False),
        ("ortho", "classic", None, False),
        ("fisheye", "antialiased", 2, False),
        ("pinhole", "antialiased", None, True),
    ],
)
def test_gradcheck_of_every_input(
    camera_model: str, rasterize_mode: str, sh_degree: int | None, with_covars: bool
) -> None:
    scene = make_scene(3, 2, sh_degree, width=9, height=7, seed=10, camera_model=camera_model)
    scene["means"][1:, :2] *= 0.3
    scene["scales"] *= 1.5
    if camera_model != "ortho":  # past the Jacobian's clamp, reaching into the image
        scene["means"][0] = torch.tensor([2.6, 0.3, 2.5])
        scene["scales"][0] = torch.tensor([1.0, 0.8, 0.6])
    scene["backgrounds"] = torch.full((2, 3), 0.3, dtype=torch.float64)
    names = [*PARAMETERS, "backgrounds"]
    if with_covars:
        half = torch.randn(3, 3, 3, dtype=torch.float64) * 0.3
        scene["covars"] = half @ half.mT + 0.05 * torch.eye(3, dtype=torch.float64)
        names = [name for name in names if name not in ("quats", "scales")] + ["covars"]

    def render(*leaves: Tensor) -> Tensor:
        arguments = scene | dict(zip(names, leaves, strict=True))
        images, alphas, _ = rasterization(**arguments, rasterize_mode=rasterize_mode, render_mode="RGB+ED")
        return torch.cat([images, alphas], -1)

    leaves = [scene[name].clone().requires_grad_() for name in names]
    image = render(*leaves)
    assert (image[..., -1] > 0.02).double().mean() > 0.3
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(3, *image.shape, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: (weights * render(*leaves)).sum((1, 2, 3, 4)), leaves, eps=1e-6, atol=1e-5, rtol=1e-5
    )
    for name, grad in zip(names, torch.autograd.grad((weights[0] * image).sum(), leaves), strict=True):
        assert grad.abs().max() > 1e-2, name


# ------------------------------------------------------------------------------------------ float32


@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
def test_float32_errs_no_more_than_the_reference_in_float32(rasterize_mode: str) -> None:
    crowd = make_crowd(150, 2, sh_degree=3)._asdict()
    options = {"width": 75, "height": 41, "sh_degree": 3, "rasterize_mode": rasterize_mode, "render_mode": "RGB+ED"}
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "rapfast")):
        leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in crowd.items()}
        images, alphas, _ = rasterization(**leaves, **options, backend=backend)
        loss_of(images, alphas).backward()
        results.append({k: x.grad.double() for k, x in leaves.items()})
    for name, want in results[0].items():
        scale = float(want.abs().max())
        own, error = (((r[name] - want).abs() / scale).flatten() for r in results[1:])
        # The few Gaussians of a pixel whose decision falls the other way are seen by the largest errors alone.
        assert float(error.mean()) <= max(2 * float(own.mean()), 1e-6), name
        assert float(error.quantile(0.95)) <= max(2 * float(own.quantile(0.95)), 2e-6), name
        assert float(error.max()) <= max(2 * float(own.max()), 1e-3), name


# ------------------------------------------------------------------------------------- itself


def test_pixels_are_the_same_with_and_without_a_graph() -> None:
    for dtype in (torch.float32, torch.float64):
        scene = make_scene(60, 2, 2, seed=25, dtype=dtype) | {"render_mode": "RGB+ED"}
        scene["backgrounds"] = torch.rand(2, 3, dtype=dtype)
        images, alphas, meta = rasterization(**scene)
        leaves = leaves_of(scene)
        with_graph = rasterization(**(scene | leaves))
        assert_same(with_graph[0].detach(), images)
        assert_same(with_graph[1].detach(), alphas)
        assert list(with_graph[2]) == list(meta)
        for key, value in meta.items():
            if isinstance(value, Tensor):
                assert_same(with_graph[2][key].detach(), value)
            else:
                assert with_graph[2][key] == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_batch_is_the_sum_of_its_views(dtype: torch.dtype) -> None:
    scene = make_scene(50, 4, 2, seed=26, dtype=dtype)
    leaves = leaves_of(scene)
    images, alphas, _ = rasterization(**(scene | leaves))
    v_images, v_alphas = weights_like(images, alphas)
    torch.autograd.backward((images, alphas), (v_images, v_alphas))
    single = leaves_of(scene)
    for c in range(4):
        view = {"viewmats": single["viewmats"][c : c + 1], "Ks": single["Ks"][c : c + 1]}
        images, alphas, _ = rasterization(**(scene | single | view))
        torch.autograd.backward((images, alphas), (v_images[c : c + 1], v_alphas[c : c + 1]))
    for name, leaf in leaves.items():
        if name in ("viewmats", "Ks"):  # each view's own
            assert_same(leaf.grad, single[name].grad)
        else:
            assert_gradient(leaf.grad, single[name].grad, 1e-3 if dtype == torch.float32 else 1e-9, name)


def test_bits_do_not_depend_on_threads_and_repeat() -> None:
    scene = make_crowd(3000, 3, sh_degree=1, dtype=torch.float32)._asdict()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            leaves = leaves_of(scene)
            images, alphas, _ = rasterization(**leaves, width=75, height=41, sh_degree=1)
            loss_of(images, alphas).backward()
            results.append([x.grad for x in leaves.values()])
    finally:
        torch.set_num_threads(before)
    for gradients in zip(*results, strict=True):
        assert_same(gradients[1], gradients[0])
        assert_same(gradients[2], gradients[0])


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
@pytest.mark.parametrize("sh_degree", [None, 3])
def test_what_moves_no_pixel_has_no_gradient(camera_model: str, sh_degree: int | None) -> None:
    """The world shifted with its cameras; scaled with them (but for orthographic ones); longer quaternions."""
    scene = make_scene(60, 3, sh_degree, seed=35, camera_model=camera_model)
    leaves = leaves_of(scene)
    loss_of(*rasterization(**(scene | leaves), rasterize_mode="antialiased")[:2]).backward()
    g = {name: leaf.grad for name, leaf in leaves.items()}
    R, t = scene["viewmats"][:, :3, :3], scene["viewmats"][:, :3, 3]
    v_t = g["viewmats"][:, :3, 3]
    shift = torch.einsum("cij,ci->j", R, v_t)  # t = -R c, so dt = -R dc
    assert_gradient(g["means"].sum(0), shift, 1e-9)
    if camera_model == "pinhole":
        terms = (g["means"] * scene["means"]).sum(), (g["scales"] * scene["scales"]).sum(), (v_t * t).sum()
        assert abs(sum(terms)) < 1e-9 * sum(abs(x) for x in terms)
    along = (g["quats"] * scene["quats"]).sum(-1).abs()
    assert (along <= 1e-12 * g["quats"].norm(dim=-1) * scene["quats"].norm(dim=-1)).all()
    assert g["viewmats"][:, 3].count_nonzero() == 0
    assert g["Ks"][:, [0, 1, 2, 2, 2], [1, 0, 0, 1, 2]].count_nonzero() == 0


def test_order_of_gaussians_and_length_of_quaternions() -> None:
    scene = make_scene(40, 2, 2, seed=36)
    order = torch.randperm(40)
    results = []
    for change in (lambda x: x, lambda x: x[order]):
        arguments = scene | {name: change(scene[name]) for name in PARAMETERS[:5]}
        arguments["quats"] = arguments["quats"] * (1 if len(results) == 0 else -4)
        leaves = leaves_of(arguments)
        loss_of(*rasterization(**(arguments | leaves))[:2]).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in PARAMETERS:
        want = results[0][name][order] if name in PARAMETERS[:5] else results[0][name]
        assert_gradient(results[1][name], want / -4 if name == "quats" else want, 1e-9, name)


@pytest.mark.parametrize("name", [*PARAMETERS, "backgrounds", "covars"])
def test_one_input_alone(name: str) -> None:
    """Its gradient is the one that it has among others; nothing else gets one."""
    scene = make_scene(30, 2, 1, seed=27) | {"backgrounds": torch.rand(2, 3, dtype=torch.float64)}
    if name == "covars":
        half = torch.randn(30, 3, 3, dtype=torch.float64) * 0.15
        scene["covars"] = half @ half.mT
    everything = leaves_of(scene, "backgrounds", *(["covars"] if name == "covars" else []))
    loss_of(*rasterization(**(scene | everything))[:2]).backward()
    leaf = scene[name].clone().requires_grad_()
    loss_of(*rasterization(**(scene | {name: leaf}))[:2]).backward()
    assert leaf.grad.any()
    assert_same(leaf.grad, everything[name].grad)


def test_computed_and_strided_inputs() -> None:
    """Activations of parameters, views of larger tensors and expanded ones, as training code has them."""
    scene = make_scene(30, 2, 1, seed=28)
    results = []
    for backend in ("reference", "rapfast"):
        wide = torch.cat([scene["means"], scene["quats"]], -1).requires_grad_()
        logits = torch.logit(scene["opacities"]).requires_grad_()
        logs = scene["scales"].log().mT.contiguous().requires_grad_()
        K = scene["Ks"][0].clone().requires_grad_()
        inputs = {
            "means": wide[:, :3],
            "quats": wide[:, 3:],
            "opacities": torch.sigmoid(logits),
            "scales": logs.exp().mT,
            "Ks": K.expand(2, 3, 3),
        }
        images, alphas, _ = rasterization(**(scene | inputs), backend=backend)
        results.append(torch.autograd.grad(loss_of(images, alphas), (wide, logits, logs, K)))
    for want, got in zip(*results, strict=True):
        assert_gradient(got, want, 1e-8)


def test_backward_runs_again_on_a_retained_graph_and_only_there() -> None:
    scene = make_scene(20, 1, 1, seed=29)
    leaves = leaves_of(scene)
    images, alphas, _ = rasterization(**(scene | leaves))
    loss = loss_of(images, alphas)
    loss.backward(retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        assert_same(leaf.grad, 2 * first[name])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    images, _, _ = rasterization(**(scene | leaves))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(images.sum(), leaves["means"], create_graph=True)


def test_an_input_changed_in_place_before_backward_is_an_error() -> None:
    scene = make_scene(10, 1, 1, seed=30)
    leaf = scene["means"].clone().requires_grad_()
    means = leaf * 1
    images, _, _ = rasterization(**(scene | {"means": means}))
    means += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        images.sum().backward()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("mode", "sh_degree"), [("RGB", 1), ("RGB+ED", None), ("D", 2)])
def test_whole_graphs_are_compiled(packed: bool, mode: str, sh_degree: int | None) -> None:
    """Without a break and to the same bits, whatever the number of records; also where no gradient is wanted."""
    scene = make_scene(30, 2, sh_degree, seed=33)
    options = {"packed": packed, "render_mode": mode}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        images, alphas, meta = rasterization(**(scene | leaves), **options)
        return images.square().sum() + alphas.sum() + 1e-3 * meta["means2d"].square().sum()

    torch._dynamo.reset()  # the forms before are of the same code, of which only so many are kept
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (30, 10):
        scene["opacities"][n:] = 0  # fewer records
        results = []
        for run in (loss, compiled):
            leaves = leaves_of(scene)
            run(leaves).backward()
            results.append([x.grad for x in leaves.values() if x.grad is not None])
        assert len(results[0]) >= 6
        for want, got in zip(*results, strict=True):
            assert_same(got, want)
    with torch.no_grad():
        assert_same(compiled(leaves), loss(leaves))


def test_forward_mode_is_refused() -> None:
    """Not dropped: a tangent of zero would pass for an answer."""
    scene = make_scene(20, 1, 1, seed=33)

    def drawn(means: Tensor) -> Tensor:
        return rasterization(**(scene | {"means": means}))[0].sum()

    with pytest.raises(NotImplementedError, match="means carries a tangent of forward-mode differentiation"):
        torch.func.jvp(drawn, (scene["means"],), (torch.ones_like(scene["means"]),))
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="means carries a tangent"):
        drawn(fwAD.make_dual(scene["means"], torch.ones_like(scene["means"])))


@pytest.mark.parametrize("packed", [True, False])
def test_memory_goes_with_the_outputs(packed: bool) -> None:
    """Nothing waits for the garbage collector: no cycle runs through the graph, and meta keeps no image."""
    scene = make_scene(30, 2, 1, seed=32)
    leaves = leaves_of(scene)
    gc.collect()
    gc.disable()
    try:
        images, alphas, meta = rasterization(
            **(scene | leaves), render_mode="RGB+ED", packed=packed, absgrad=True, sparse_grad=packed
        )
        meta["means2d"].retain_grad()
        (images.sum() + alphas.sum()).backward()
        kept = weakref.ref(images), weakref.ref(meta["means2d"]), weakref.ref(meta["means2d"].absgrad)
        del images, alphas
        assert kept[0]() is None
        del meta
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


def test_autocast_leaves_gradients_alone() -> None:
    scene = make_scene(20, 1, 1, seed=31, dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        leaves = leaves_of(scene)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            images, alphas, _ = rasterization(**(scene | leaves), render_mode="RGB+ED")
        assert images.dtype == torch.float32
        loss_of(images, alphas).backward()
        gradients.append([x.grad for x in leaves.values()])
    for got, want in zip(*gradients, strict=True):
        assert_same(got, want)


# ---------------------------------------------------------------------------------- degenerate input


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sh_degree", [None, 2])
def test_nothing_is_seen(n: int, packed: bool, sh_degree: int | None) -> None:
    scene = make_scene(n, 2, sh_degree)
    scene["means"] *= torch.tensor([1.0, 1.0, -1.0])
    leaves = leaves_of(scene)
    images, alphas, meta = rasterization(**(scene | leaves), packed=packed, render_mode="RGB+ED", absgrad=True)
    meta["means2d"].retain_grad()
    assert images.count_nonzero() == 0
    (images.sum() + alphas.sum()).backward()
    assert meta["means2d"].grad.shape == meta["means2d"].shape
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape and leaf.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("camera_model", CAMERA_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invalid_gaussians_and_views_get_zero_gradients(dtype: torch.dtype, camera_model: str) -> None:
    big = torch.finfo(dtype).max ** 0.75
    scene = make_scene(30, 3, 1, seed=7, dtype=dtype, camera_model=camera_model)
    bad = [
        ("means", (0, torch.nan)),
        ("means", (2, torch.inf)),
        ("quats", (slice(None), 0.0)),
        ("quats", (1, torch.nan)),
        ("quats", (slice(None), big)),
        ("scales", (0, torch.inf)),
        ("scales", (slice(None), big)),
        ("opacities", ((), torch.nan)),
        ("opacities", ((), -torch.inf)),
        ("colors", ((0, 0), torch.nan)),
        ("colors", ((3, 2), -torch.inf)),
        ("opacities", ((), 0.0)),
        ("opacities", ((), -1.0)),
        ("means", (2, -5.0)),
    ]
    scene["means"][:11, :2] *= 0.2  # seen, so that a bad colour is looked at
    for n, (name, (index, value)) in enumerate(bad):
        scene[name][n][index] = value
    scene["viewmats"][1, 1, :3] = 0.0  # singular: this view sees nothing
    clean = scene | {name: scene[name][len(bad) :] for name in PARAMETERS[:5]}
    results = []
    for arguments in (scene, clean):
        leaves = leaves_of(arguments)
        images, alphas, _ = rasterization(**(arguments | leaves), render_mode="RGB+ED", rasterize_mode="antialiased")
        loss_of(images, alphas).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    got, want = results
    for name in PARAMETERS[:5]:
        assert got[name][: len(bad)].count_nonzero() == 0, name
        assert_same(got[name][len(bad) :].clone(), want[name])
    for name in ("viewmats", "Ks"):
        assert got[name][1].count_nonzero() == 0 and got[name][[0, 2]].any(), name
        assert_gradient(got[name], want[name], 1e-4 if dtype == torch.float32 else 1e-10, name)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"scales": [[0.0, 0.0, 0.0]]}, "point"),
        ({"scales": [[0.1, 0.0, 0.0]]}, "needle"),
        ({"scales": [[1e-16, 1.0, 1.0]], "eps2d": 0.0}, "conic near overflow"),
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gaussians_give_finite_gradients(
    dtype: torch.dtype, camera_model: str, changes: dict[str, Any], label: str
) -> None:
    scene = one_gaussian(camera_model=camera_model, sh_degree=2)
    scene["colors"] = torch.full((1, 9, 3), 0.1)
    scene |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in changes.items()}
    for name in PARAMETERS:
        scene[name] = scene[name].to(dtype)
    for mode in ("classic", "antialiased"):
        leaves = leaves_of(scene)
        images, alphas, meta = rasterization(
            **(scene | leaves), rasterize_mode=mode, render_mode="RGB+ED", absgrad=True
        )
        meta["means2d"].retain_grad()
        (images.sum() + alphas.sum()).backward()
        if label == "conic near overflow" and dtype == torch.float32:
            continue  # d conic / d covariance is conic^2, which has no float32 value
        assert meta["means2d"].grad.isfinite().all() and meta["means2d"].absgrad.isfinite().all()
        for name, leaf in leaves.items():
            assert leaf.grad.isfinite().all(), name


def test_alpha_cap_passes_no_gradient() -> None:
    scene = one_gaussian(opacities=torch.tensor([1.5]).double().requires_grad_())
    images, _, _ = rasterization(**scene)
    capped, below = images[0, 8, 8].sum(), images[0, 8, 11].sum()
    assert torch.autograd.grad(capped, scene["opacities"], retain_graph=True)[0].item() == 0
    assert torch.autograd.grad(below, scene["opacities"])[0].item() > 0


def test_alpha_exactly_at_the_cap_passes_its_gradient() -> None:
    scene = one_gaussian(opacities=torch.tensor([0.75]).double().requires_grad_())
    images, _, _ = rasterization(**scene, alpha_cap=0.75)  # exp(-0) in the pixel of the mean
    (gradient,) = torch.autograd.grad(images[0, 8, 8].sum(), scene["opacities"])
    assert gradient.item() == pytest.approx(1.75)


# ------------------------------------------------------------------------------------- empty pixels


@pytest.mark.parametrize("render_mode", ["RGB", "RGB+D"])
def test_what_divides_by_the_alpha_of_an_empty_pixel_harms_no_gradient(render_mode: str) -> None:
    """0 / 0 in pixels that a mask leaves out afterwards: their gradients are NaN, and nobody draws there."""
    scene = make_scene(n=5, width=32, height=24)
    leaves = leaves_of(scene)
    leaves["scales"] = (scene["scales"].detach() / 4).requires_grad_()
    images, alphas, _ = rasterization(**(scene | leaves), render_mode=render_mode)
    empty = alphas == 0
    assert empty.any() and not empty.all()
    torch.where(empty, 0, images[..., -1:] / alphas).sum().backward()
    got = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    assert all(x.isfinite().all() for x in got.values()) and got["means"].any()
    again = leaves_of(scene | {"scales": leaves["scales"]})
    images, alphas, _ = rasterization(**(scene | again), render_mode=render_mode)
    (images[..., -1:] / torch.where(empty, 1, alphas)).masked_fill(empty, 0).sum().backward()
    for name, gradient in got.items():
        assert_same(gradient, again[name].grad)
