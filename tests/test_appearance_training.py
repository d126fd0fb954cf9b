"""Gradients through the colour stage: finite differences, plain torch, and what a training loop relies on."""

from __future__ import annotations

from collections import UserList
from dataclasses import replace
from typing import Any

import pytest
import torch
from network_scenes import (
    CPU32,
    CPU64,
    CUDA16,
    CUDA32,
    FORMS,
    WIDTHS,
    Appearance,
    Form,
    Widths,
    color_net,
    embedding_scene,
    make_appearance,
    rap_scene,
    to,
)
from scenes import HEIGHT, WIDTH
from torch import Tensor

from rapfast import ops
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene, net_outputs_bwd, sample_features
from rapfast.appearance.color_records import NetColors
from rapfast.appearance.features import view_directions
from rapfast.appearance.net_outputs import NetInputs, net_outputs
from rapfast.ops.autograd import _Linked
from rapfast.ops.bin import tile_grid
from rapfast.ops.project import image_ids

pytestmark = pytest.mark.usefixtures("one_thread")

N, C = 60, 3
MAP_IDS, WEIGHTS = [0, 1, 1], [0.4, 1.0, 1.7]
A = make_appearance(n=N, c=C)
TINY: Widths = {"encoder": (123, 9, 6), "decoder": (54, 8, 5), "color_decoder": (8, 7, 3)}
"""With four frequencies: finite differences of ten are rough."""
SH: Widths = {"encoder": (159, 32, 20), "decoder": (68, 30, 12)}
GEOMETRY = ("means", "quats", "scales", "opacities", "intrinsic")


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def trained(
    form: Form, widths: Widths = WIDTHS["RAP"], config: dict[str, Any] | None = None, a: Appearance = A
) -> tuple[RapScene, dict[str, Tensor]]:
    """A scene whose every tensor requires a gradient, with the tensors of a call, by name."""
    scene = rap_scene(a, color_net(form, widths), form, config)
    leaves = {name: leaf(getattr(scene.scene, name)) for name in GEOMETRY}
    for name in GEOMETRY:
        setattr(scene.scene, name, leaves[name])
    scene.box_coord = leaves["box_coord"] = leaf(scene.box_coord)
    a = to(a, form)
    leaves |= {name: leaf(getattr(a, name)) for name in ("viewmats", "Ks", "maps")}
    leaves["view_weights"] = leaf(torch.tensor(WEIGHTS, dtype=form.dtype))
    g = torch.Generator().manual_seed(1)
    leaves["backgrounds"] = leaf(torch.rand(C, 3, generator=g).to(form.device, form.dtype))
    scene.color_net.requires_grad_()
    return scene, leaves | dict(scene.color_net.named_parameters())


def draw(scene: RapScene, leaves: dict[str, Tensor], form: Form, views: slice = slice(None), **options: Any):
    if options.get("backend") != "reference":
        options["precision"] = form.precision
    options = {"feature_maps": leaves["maps"], "map_ids": MAP_IDS[views], "view_weights": leaves["view_weights"][views],
               "backgrounds": leaves["backgrounds"][views]} | options  # fmt: skip
    return scene.render(leaves["viewmats"][views], leaves["Ks"][views], WIDTH, HEIGHT, **options)


def loss_of(images: Tensor, alphas: Tensor, views: slice = slice(None)) -> Tensor:
    """Sees every channel of every pixel, and of a view the same whatever views are beside it."""
    g = torch.Generator().manual_seed(7)
    v = torch.randn((C, *images.shape[1:]), generator=g, dtype=torch.float64)[views].to(images)
    return (images * v).sum() + alphas.sum()


def gradients(leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}


def error_of(got: Tensor, want: Tensor, half: bool) -> float:
    """Of a gradient, relative: its largest error to its largest entry; with half precision, where some ReLUs open and
    close differently, by norms."""
    got, want = (x.detach().cpu().double() for x in (got, want))
    assert got.isfinite().all()
    assert want.any(), "there is nothing to compare"
    return float((got - want).norm() / want.norm() if half else (got - want).abs().max() / want.abs().max())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, half: bool = False) -> None:
    assert got.keys() == want.keys()
    errors = {name: error_of(got[name], expected, half) for name, expected in want.items()}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{wrong}, allowed {tolerance}"


# ------------------------------------------------------------------------------------------------- the network alone


def records(a: Appearance = A) -> tuple[Tensor, Tensor]:
    """gaussian_ids and image_offsets of what the views see."""
    found = ops.project(*(x[None] for x in a[:3]), None, *(x[None] for x in a[3:6]), WIDTH, HEIGHT)
    return found.gaussian_ids, found.image_offsets


def net_inputs(form: Form, net: ColorNet, kind: str, a: Appearance = A, **changes: Any) -> NetInputs:
    a = to(a, form)
    weights = torch.tensor(WEIGHTS, dtype=form.dtype)
    inputs = NetInputs(
        net.weights(), a.means, a.viewmats, a.Ks, a.intrinsic, weights, kind, half=form.half, coord_scale=1.3
    )
    if kind == "maps":
        inputs = replace(inputs, maps=list(a.maps), map_ids=MAP_IDS, box_coord=a.box_coord)
    return replace(inputs, **changes)


FEEDS = ["maps", "embedding", "decoded for all views", "decoded for each view", "decode"]


def fed(form: Form, feed: str, widths: Widths, a: Appearance = A, **options: Any) -> NetInputs:
    n_out = widths["decoder"][-1]
    g = torch.Generator().manual_seed(4)
    if feed.startswith("decoded"):
        shape = (len(a.means), n_out) if feed == "decoded for all views" else (C, len(a.means), n_out)
        features = torch.randn(shape, generator=g, dtype=torch.float64).to(form.device, form.dtype)
        return net_inputs(form, color_net(form, widths, **options), "features", a, features=features, part="head")
    net = color_net(form, widths, **options)
    if feed == "embedding":
        features = torch.randn((C, net.n_appearance), generator=g, dtype=torch.float64).to(form.device, form.dtype)
        return net_inputs(form, net, "embedding", a, features=features)
    return net_inputs(form, net, "maps", a, part="decode" if feed == "decode" else "all")


def tensors_of(inputs: NetInputs) -> dict[str, Tensor]:
    names = ("means", "viewmats", "Ks", "intrinsic", "view_weights", "box_coord", "features")
    found = {name: getattr(inputs, name) for name in names if getattr(inputs, name) is not None}
    found |= {f"map {i}": m for i, m in enumerate(inputs.maps)}
    for block in ("encoder", "decoder", "color_decoder"):
        for i, pair in enumerate(getattr(inputs.weights, block)):
            found |= dict(zip((f"{block}.{i}.weight", f"{block}.{i}.bias"), pair, strict=True))
    return found


def with_tensors(inputs: NetInputs, tensors: dict[str, Tensor]) -> NetInputs:
    blocks = {
        block: [(tensors[f"{block}.{i}.weight"], tensors[f"{block}.{i}.bias"])
                for i in range(len(getattr(inputs.weights, block)))]
        for block in ("encoder", "decoder", "color_decoder")
    }  # fmt: skip
    maps = [tensors[f"map {i}"] for i in range(len(inputs.maps))]
    plain = {name: x for name, x in tensors.items() if hasattr(inputs, name)}
    return replace(inputs, weights=inputs.weights._replace(**blocks), maps=maps, **plain)


def plain_outputs(inputs: NetInputs, net: ColorNet, ids: Tensor, offsets: Tensor) -> Tensor:
    """The same by the modules of rapfast.appearance, view by view."""
    parts = []
    for view in range(C):
        rows = ids[offsets[view] : offsets[view + 1]].long()
        means, viewmat = inputs.means[rows], inputs.viewmats[view]
        if inputs.part == "head":
            features = inputs.features if inputs.features.dim() == 2 else inputs.features[view]
            decoded = inputs.view_weights[view] * features[rows]
        else:
            a = inputs.features[view] if inputs.kind == "embedding" else sample_features(
                inputs.maps[inputs.map_ids[view]], means, inputs.box_coord[rows], viewmat, inputs.Ks[view],
                coord_scale=inputs.coord_scale,
            )  # fmt: skip
            decoded = net.decode(means, a, inputs.intrinsic[rows], inputs.view_weights[view])
        parts.append(decoded if inputs.part == "decode" else net.head(decoded, view_directions(means, viewmat)))
    return torch.cat(parts)


@pytest.mark.parametrize("feed", FEEDS)
def test_finite_differences(feed: str) -> None:
    a = make_appearance(n=14, c=C, map_size=(3, 4))
    ids, offsets = records(a)
    assert len(ids) > 10
    inputs = fed(CPU64, feed, TINY, a, n_frequencies=4)
    tensors = tensors_of(inputs)
    n_checked = 0
    for name, tensor in tensors.items():

        def outputs(x: Tensor, name: str = name) -> Tensor:
            return net_outputs(with_tensors(inputs, tensors | {name: x}), ids, offsets)

        met = torch.autograd.grad(outputs(x := leaf(tensor)).square().sum(), x)[0].any()
        assert torch.autograd.gradcheck(outputs, (leaf(tensor),), fast_mode=tensor.numel() > 100), name
        n_checked += bool(met)
    unmet = {"maps": 0, "embedding": 1, "decode": 4}.get(feed, 2 + 8)
    assert n_checked == len(tensors) - unmet, "those with a gradient"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("feed", FEEDS)
def test_every_gradient_is_that_of_plain_torch(form: Form, feed: str) -> None:
    ids, offsets = records()
    g = torch.Generator().manual_seed(8)
    results = []
    for plain, f in ((True, CPU64), (False, form)):
        inputs = fed(f, feed, WIDTHS["RAP"])
        leaves = {name: leaf(x) for name, x in tensors_of(inputs).items()}
        inputs = with_tensors(inputs, leaves)
        if not plain:
            got = net_outputs(inputs, ids.to(f.device), offsets.to(f.device))
        else:
            net = color_net(f)
            for name, x in leaves.items():
                block, _, rest = name.partition(".")
                if rest:
                    i, kind = rest.split(".")
                    setattr(net.get_submodule(f"{block}.lin{i}"), kind, torch.nn.Parameter(x))
            want = got = plain_outputs(inputs, net, ids, offsets)
            leaves |= {name.replace(".lin", "."): p for name, p in net.named_parameters()}
        if feed == "decode":  # no direction is met
            leaves = {name: x for name, x in leaves.items() if not name.startswith("color_decoder")}
        v = torch.randn(got.shape, generator=g.manual_seed(8), dtype=torch.float64).to(got)
        results.append({name: x for name, x in gradients(leaves, (got * v).sum()).items() if x.any()})
    tolerance = 1e-11 if form.dtype == torch.float64 else 5e-3 if form.half else 1e-4
    furthest = float((got.cpu().double() - want).detach().abs().max())
    assert furthest < (0.15 if form.half else 5 * tolerance)
    assert_close(results[1], results[0], tolerance, form.half)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 16, 17):
        monkeypatch.setattr(net_outputs_bwd, "_CHUNK", chunk)
        scene, leaves = trained(CPU64)
        results.append(gradients(leaves, loss_of(*draw(scene, leaves, CPU64)[:2])))
    assert_close(results[1], results[0], 1e-12)


# ------------------------------------------------------------------------------------------------------ whole renders

CASES = {
    "RGB": ({}, {}),
    "RGB+ED, dense": ({}, {"render_mode": "RGB+ED", "packed": False}),
    "RGB+D, classic": ({"antialiasing": False}, {"render_mode": "RGB+D"}),
    "harmonics": ({"use_colors_precomp": False}, {"packed": False}),
    "depth alone": ({}, {"render_mode": "ED", "backgrounds": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_renders_gradients_are_those_of_plain_torch(case: str) -> None:
    config, options = CASES[case]
    results = []
    for backend in ("reference", "rapfast"):
        scene, leaves = trained(CPU64, SH if case == "harmonics" else WIDTHS["RAP"], config)
        images, alphas, meta = draw(scene, leaves, CPU64, **options, backend=backend)
        meta["means2d"].retain_grad()
        found = gradients(leaves | {"means2d": meta["means2d"]}, loss_of(images, alphas))
        results.append({name: x for name, x in found.items() if x.any()} | {"images": images.detach()})
    assert_close(results[1], results[0], 1e-9)
    assert len(results[0]) == (8 if case == "depth alone" else len(leaves) + 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_render_is_what_it_is_without_gradients(form: Form) -> None:
    for widths, config in ((WIDTHS["RAP"], {}), (SH, {"use_colors_precomp": False})):
        scene, leaves = trained(form, widths, config)
        got = draw(scene, leaves, form, render_mode="RGB+D")
        with torch.no_grad():
            want = draw(scene, leaves, form, render_mode="RGB+D")
        assert got[0].requires_grad and not want[0].requires_grad
        tolerance = 1e-11 if form.dtype == torch.float64 else 1e-2 if form.half else 2e-5
        for x, y in zip(got[:2], want[:2], strict=True):
            assert float((x - y).detach().abs().max()) <= tolerance * float(y.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_a_batchs_gradient_is_the_sum_of_its_views(form: Form) -> None:
    scene, leaves = trained(form)
    together = gradients(leaves, loss_of(*draw(scene, leaves, form)[:2]))
    apart = []
    for view in range(C):
        views = slice(view, view + 1)
        apart.append(gradients(leaves, loss_of(*draw(scene, leaves, form, views)[:2], views)))
    assert all(float(x["view_weights"][view].abs()) > 0.1 for view, x in enumerate(apart))
    summed = {name: sum(x[name] for x in apart) for name in together}
    assert_close(together, summed, 1e-11 if form.dtype == torch.float64 else 1e-3 if form.half else 2e-5)
    # A loss of one view alone has no gradient by the others' weights and cameras.
    images, alphas, _ = draw(scene, leaves, form)
    one = gradients(leaves, images[1].sum() + alphas[1].sum())
    for name in ("view_weights", "viewmats", "Ks", "backgrounds"):
        assert one[name][1].any() and not one[name][[0, 2]].any(), name


@pytest.mark.cuda
@pytest.mark.parametrize("form", [pytest.param(CUDA32, id="fp32"), pytest.param(CUDA16, id="fp16")])
@pytest.mark.parametrize("harmonics", [False, True])
def test_gradients_on_the_gpu_err_no_more_than_the_cpus_in_float32(form: Form, harmonics: bool) -> None:
    """Against float64, which decides differently here and there what a pixel draws."""
    widths, config = (SH, {"use_colors_precomp": False}) if harmonics else (WIDTHS["RAP"], {})
    results = []
    for f in (CPU64, CPU32, form):
        scene, leaves = trained(f, widths, config)
        images, alphas, meta = draw(scene, leaves, f, packed=False)
        results.append(gradients(leaves | {"means2d": meta["means2d"]}, loss_of(images, alphas)))
    truth, cpu, gpu = results
    assert gpu.keys() == truth.keys()
    for name, want in truth.items():
        allowed = 3 * error_of(cpu[name], want, form.half) + (5e-2 if form.half else 1e-4)
        error = error_of(gpu[name], want, form.half)
        print(f"{name}: {error:.1e}, on the CPU {error_of(cpu[name], want, form.half):.1e}")
        assert error <= allowed, f"{name} errs by {error:.1e}, allowed {allowed:.1e}"


def test_maps_in_any_sequence_are_seen_to_be_trained() -> None:
    scene = rap_scene(A, color_net(CPU32), CPU32)
    maps = [leaf(m) for m in to(A, CPU32).maps]
    options = {"map_ids": MAP_IDS, "view_weights": WEIGHTS}
    a = to(A, CPU32)
    images = scene.render(a.viewmats, a.Ks, WIDTH, HEIGHT, feature_maps=UserList(maps), **options)[0]
    assert all(v.any() for v in torch.autograd.grad(images.sum(), maps))


def test_an_embeddings_gradients_are_those_of_plain_torch() -> None:
    widths = {"encoder": (143, 32, 20), "decoder": (68, 30, 12), "color_decoder": (15, 3)}
    results = []
    for backend in ("reference", "rapfast"):
        scene = embedding_scene(A, color_net(CPU64, widths), CPU64)
        leaves = {"embeddings": torch.randn(C, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
        leaves |= {name: getattr(scene.scene, name) for name in GEOMETRY}
        leaves |= {"viewmats": A.viewmats, "view_weights": torch.tensor(WEIGHTS, dtype=torch.float64)}
        leaves = {name: leaf(x) for name, x in leaves.items()}
        for name in GEOMETRY:
            setattr(scene.scene, name, leaves[name])
        leaves |= dict(scene.color_net.requires_grad_().named_parameters())
        images, alphas, _ = scene.render(
            leaves["viewmats"], A.Ks, WIDTH, HEIGHT, embeddings=leaves["embeddings"],
            view_weights=leaves["view_weights"], backend=backend,
        )  # fmt: skip
        results.append(gradients(leaves, loss_of(images, alphas)))
    assert_close(results[1], results[0], 1e-10)


def test_the_feature_map_network_is_trained() -> None:
    """Through the render to the UNet's weights and the reference images, whose norms are per image."""
    images = torch.rand(2, 3, 33, 34, dtype=torch.float64)
    results = []
    for backend in ("reference", "rapfast"):
        torch.manual_seed(0)
        scene, leaves = trained(CPU64)
        scene.feature_map_net = FeatureMapNet().double()
        pictures = leaf(images)
        maps = scene.feature_maps(pictures)
        drawn = draw(scene, leaves, CPU64, feature_maps=maps, backend=backend)
        watched = {"images": pictures} | dict(scene.feature_map_net.named_parameters())
        # Biases in front of a norm change nothing.
        watched = {name: x for name, x in watched.items() if not name.endswith(("conv.0.bias", "conv.3.bias"))}
        results.append(gradients(watched, loss_of(*drawn[:2])))
    assert len(results[0]) > 60
    assert_close(results[1], results[0], 1e-8)


def test_decoded_features_are_trained() -> None:
    """decode() and render(decoded=...) are one graph."""
    results = []
    for backend in ("reference", "rapfast"):
        scene, leaves = trained(CPU64)
        decoded = scene.decode(
            leaves["viewmats"][0], leaves["Ks"][0], leaves["maps"][1], leaves["view_weights"][1], backend=backend
        )
        given = {"feature_maps": None, "map_ids": None, "view_weights": None, "decoded": decoded}
        found = gradients(leaves, loss_of(*draw(scene, leaves, CPU64, **given, backend=backend)[:2]))
        results.append({name: x for name, x in found.items() if x.any()})
    assert len(results[0]) == len(leaves)
    assert_close(results[1], results[0], 1e-9)


def test_some_inputs_alone() -> None:
    """Poses are refined with the network kept from call to call; each input alone has the gradient that it has among
    all."""
    scene, leaves = trained(CPU64)
    want = gradients(leaves, loss_of(*draw(scene, leaves, CPU64)[:2]))
    for name in leaves:
        for x in leaves.values():
            x.requires_grad_(False)
        leaves[name].requires_grad_()
        got = gradients({name: leaves[name]}, loss_of(*draw(scene, leaves, CPU64)[:2]))
        assert_close(got, {name: want[name]}, 1e-10)


def test_nothing_is_visible() -> None:
    scene, leaves = trained(CPU64)
    away = leaves["viewmats"].detach().clone()
    away[:, 2, 3] -= 1e4
    images, alphas, _ = draw(scene, leaves | {"viewmats": leaf(away)}, CPU64)
    assert not alphas.any()
    found = gradients(leaves, loss_of(images, alphas))
    for name, gradient in found.items():
        assert gradient.any() == (name == "backgrounds"), name
    empty = make_appearance(n=N, c=C)
    empty = Appearance(*(x[:0] if len(x) == N else x for x in empty))
    scene, leaves = trained(CPU64, a=empty)
    found = gradients(leaves, loss_of(*draw(scene, leaves, CPU64)[:2]))
    assert not any(gradient.any() for name, gradient in found.items() if name != "backgrounds")
    scene, leaves = trained(CPU64)
    images, alphas, _ = draw(scene, leaves, CPU64, slice(0))
    found = gradients(leaves, images.sum() + alphas.sum())
    assert not any(gradient.any() for gradient in found.values()), "there are no views"


def test_what_cannot_be_coloured_takes_no_gradient_with_it() -> None:
    """Gaussians and cameras that are not finite are culled, and all gradients are finite."""
    scene, leaves = trained(CPU64)
    with torch.no_grad():
        leaves["intrinsic"][3, 4, 1] = float("nan")
        leaves["box_coord"][5, 0, 0] = float("nan")
        leaves["box_coord"][6, 2, 0] = float("inf")
        leaves["means"][7] = float("nan")
        leaves["viewmats"][2] = 0
    images, alphas, meta = draw(scene, leaves, CPU64)
    assert int(meta["n_invalid"].sum()) > N
    found = gradients(leaves, loss_of(images, alphas))
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    assert not found["viewmats"][2].any() and not found["intrinsic"][3].any()


def test_autocast_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        scene, leaves = trained(CPU32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            images, alphas, _ = draw(scene, leaves, CPU32)
            assert images.dtype == torch.float32
            results.append(gradients(leaves, loss_of(images.float(), alphas)))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


def samples(name: str, form: Form) -> list[tuple[Any, ...]]:
    """Arguments of one operator."""
    a = to(A, form)
    geometry = (*(x[None] for x in a[:3]), None, *(x[None] for x in a[3:6]))
    if name == "project_visible":
        return [(*geometry, WIDTH, HEIGHT, 0, True, 0.3, 0.01, 1e10, 0.0)]
    found = ops.project(*geometry, WIDTH, HEIGHT)
    if name == "bin_all":
        return [(found.records, found.radii, found.image_offsets, *tile_grid(WIDTH, HEIGHT), 0)]
    out = []
    for feed in FEEDS:
        inputs = fed(form, feed, WIDTHS["RAP"])
        w = inputs.weights
        parameters = [x for block in w[:3] for pair in block for x in pair]
        net_form = [len(w.encoder), len(w.decoder), len(w.color_decoder), 10,
                    {"maps": 0, "embedding": 1, "features": 2}[inputs.kind],
                    ("all", "decode", "head").index(inputs.part), int(form.half)]  # fmt: skip
        arguments = (
            found.gaussian_ids, found.image_offsets, inputs.means, inputs.viewmats, inputs.Ks, inputs.intrinsic,
            inputs.box_coord, inputs.features, inputs.view_weights, parameters, list(inputs.maps),
            list(inputs.map_ids), net_form, 1.3,
        )  # fmt: skip
        if name == "net_outputs":
            out.append(arguments)
            continue
        v = torch.randn(len(image_ids(found)), 48 if feed == "decode" else 3, dtype=form.dtype, device=form.device)
        n_inputs = 7 + len(parameters) + len(inputs.maps)
        out += [(v, *arguments, [bool(k % step) for k in range(1, n_inputs + 1)]) for step in (2, 1 << 20)]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["project_visible", "bin_all", "net_outputs", "net_outputs_bwd"])
def test_opcheck(name: str, form: Form) -> None:
    op = getattr(torch.ops.rapfast, name).default
    for arguments in samples(name, form):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_sentences() -> None:
    scene, leaves = trained(CPU64)
    with pytest.raises(NotImplementedError, match="max_memory=1000 is not supported where a gradient is wanted"):
        draw(scene, leaves, CPU64, max_memory=1000)
    with pytest.raises(ValueError, match="view_weights must be finite"):
        draw(scene, leaves, CPU64, view_weights=leaf(torch.tensor([1.0, float("inf"), 1.0])))
    with pytest.raises(ValueError, match="backgrounds must|backgrounds .* got float64"):
        draw(scene, leaves, CPU64, backgrounds=leaf(torch.rand(C, 4, dtype=torch.float64)))
    images, _, _ = draw(scene, leaves, CPU64)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(images.sum(), leaves["maps"], create_graph=True)
    images, _, _ = draw(scene, leaves, CPU64)
    with torch.no_grad():
        leaves["decoder.lin0.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        images.sum().backward()


@pytest.mark.parametrize("harmonics", [False, True])
def test_a_whole_calls_link_has_the_records_gradients(harmonics: bool) -> None:
    """On a GPU one call makes the colours, and gradients of records come as rows of which theirs is a part."""
    scene, leaves = trained(CPU64, SH if harmonics else WIDTHS["RAP"], {"use_colors_precomp": not harmonics})
    fed = list(leaves["maps"]), MAP_IDS, leaves["view_weights"]
    inputs = scene._net_inputs("all", leaves["viewmats"], leaves["Ks"], *fed, False)
    stage = NetColors(inputs, "RGB", lambda: pytest.fail("no native call is made"), harmonics)
    geometry = (*(x[None] for x in A[:3]), None, *(x[None] for x in A[3:6]))
    found = ops.project(*geometry, WIDTH, HEIGHT)
    colors, _, _ = stage(found)
    rows = torch.randn(len(colors), 8, dtype=torch.float64)
    want = gradients(leaves, (colors * rows[:, 4:7]).sum())
    link = leaf(torch.zeros(()).double()).expand(len(colors), 8)
    linked = _Linked.apply(link, stage.link(found.gaussian_ids, found.image_offsets))
    assert linked.shape == (len(colors), 8)
    assert_close(gradients(leaves, (linked * rows).sum()), want, 1e-12)
    assert (
        float(torch.autograd.grad((_Linked.apply(link, colors.detach()) * rows).sum(), link)[0].sub(rows).abs().max())
        == 0
    )
