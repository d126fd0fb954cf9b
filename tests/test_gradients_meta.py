"""What meta has of a call that wants gradients, on the CPU: entries of the graph, which gsplat's strategy uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rasterization_losses import assert_gradient, leaves_of, loss_of, weights_like
from reference_scenes import PARAMETERS, make_scene
from scenes import assert_same

from rapfast import rasterization
from rapfast.rasterization import rasterize_colored


@pytest.mark.parametrize("packed", [True, False])
def test_means2d_keeps_its_gradient_and_absgrad(packed: bool) -> None:
    scene = make_scene(12, 2, width=8, height=6, seed=11)
    scene["means"].requires_grad_()
    images, _, meta = rasterization(**scene, packed=packed, absgrad=True)
    means2d = meta["means2d"]
    assert means2d is meta["means2d"] and means2d.requires_grad and not means2d.is_leaf
    assert means2d.shape == ((len(meta["gaussian_ids"]), 2) if packed else (2, 12, 2))
    assert means2d.absgrad.shape == means2d.shape and means2d.absgrad.count_nonzero() == 0
    means2d.retain_grad()
    # sum over pixels of the absolute gradient of each pixel's own loss
    expected = torch.zeros_like(means2d)
    for pixel in images.square().sum(-1).flatten():
        (grad,) = torch.autograd.grad(pixel, means2d, retain_graph=True)
        expected += grad.abs()
    means2d.absgrad.zero_()
    images.square().sum().backward()
    assert means2d.grad.abs().sum() > 0 and not means2d.absgrad.requires_grad
    torch.testing.assert_close(means2d.absgrad, expected)
    assert (means2d.absgrad > 2 * means2d.grad.abs()).any()


def test_without_absgrad_there_is_none() -> None:
    scene = make_scene(5, 1, seed=12)
    scene["means"].requires_grad_()
    images, _, meta = rasterization(**scene)
    images.sum().backward()
    assert not hasattr(meta["means2d"], "absgrad")


@pytest.mark.parametrize("packed", [True, False])
def test_entries_of_meta_are_differentiable(packed: bool) -> None:
    scene = make_scene(15, 2, seed=13)
    results = []
    for backend in ("reference", "rapfast"):
        leaves = leaves_of(scene)
        _, _, meta = rasterization(**(scene | leaves), packed=packed, rasterize_mode="antialiased", backend=backend)
        keys = ("means2d", "conics", "opacities", "depths")
        loss = sum((meta[key] * w).sum() for key, w in zip(keys, weights_like(*(meta[k] for k in keys)), strict=True))
        used = [leaves[name] for name in PARAMETERS if name != "colors"]
        results.append(torch.autograd.grad(loss, used))
    for want, got in zip(*results, strict=True):
        assert_gradient(got, want, 1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("packed", [True, False])
def test_entries_of_meta_are_of_the_graph_wherever_they_are_looked_at_first(packed: bool, mode: Any) -> None:
    """A strategy looks at meta without gradients; a loss on the same entries comes later."""
    scene = make_scene(15, 2, seed=13)
    keys = ("means2d", "conics", "opacities", "depths")
    results = []
    for looked_at in ((), ("radii", "depths"), keys):
        leaves = leaves_of(scene)
        _, _, meta = rasterization(**(scene | leaves), packed=packed, rasterize_mode="antialiased")
        with mode():
            for key in looked_at:
                assert meta[key].isfinite().all()
        loss = sum((meta[key] * w).sum() for key, w in zip(keys, weights_like(*(meta[k] for k in keys)), strict=True))
        results.append(torch.autograd.grad(loss, [leaves[name] for name in PARAMETERS if name != "colors"]))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert_same(a, b)


def test_no_views_with_means2d_of_each() -> None:
    scene = make_scene(5, 1)
    size = {name: scene.pop(name) for name in ("width", "height")}
    leaves = leaves_of(scene)
    images, alphas, meta = rasterize_colored(
        *(leaves[name] for name in ("means", "quats", "scales", "opacities")), leaves["viewmats"][:0], leaves["Ks"][:0],
        None, *size.values(), None, colors=leaves["colors"], packed=False,
    )  # fmt: skip
    assert len(images) == len(alphas) == 0 and meta["means2d"].shape == (0, 5, 2) and meta.means2d_of_views == ()
    (images.sum() + alphas.sum() + meta["means2d"].sum()).backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("sh_degree", [None, 2])
def test_sparse_gradients(sh_degree: int | None) -> None:
    scene = make_scene(40, 2, sh_degree, seed=14)
    scene["means"][::3, 2] *= -1  # behind the cameras
    dense = leaves_of(scene)
    images, alphas, meta = rasterization(**(scene | dense))
    loss_of(images, alphas).backward()
    sparse = leaves_of(scene)
    loss_of(*rasterization(**(scene | sparse), sparse_grad=True)[:2]).backward()
    visible = meta["gaussian_ids"].unique()
    assert 0 < len(visible) < 40
    for name in PARAMETERS:
        grad = sparse[name].grad
        if name in ("means", "quats", "scales"):
            assert grad.layout == torch.sparse_coo and torch.equal(grad._indices()[0], visible)
            grad = grad.to_dense()
        assert_same(grad, dense[name].grad)
    optimizer = torch.optim.SparseAdam([sparse["means"], sparse["quats"], sparse["scales"]], lr=0.1)
    optimizer.step()
    moved = (sparse["means"] != scene["means"]).any(-1).nonzero()[:, 0]
    assert len(moved) > 20 and bool(torch.isin(moved, visible).all())


def test_gsplats_densification_strategy_drives_it() -> None:
    """DefaultStrategy retains the gradient of means2d, reads it after backward, and splits what moved."""
    strategies = pytest.importorskip("gsplat.strategy")
    scene = make_scene(60, 2, seed=15, dtype=torch.float32)
    for absgrad, packed in ((False, True), (True, False), (False, False), (True, True)):
        parameters = torch.nn.ParameterDict(
            {
                "means": scene["means"].clone(),
                "quats": scene["quats"].clone(),
                "scales": scene["scales"].log(),
                "opacities": torch.logit(scene["opacities"]),
                "colors": scene["colors"].clone(),
            }
        )
        optimizers = {name: torch.optim.Adam([p], lr=1e-3) for name, p in parameters.items()}
        strategy = strategies.DefaultStrategy(
            absgrad=absgrad, refine_start_iter=0, refine_every=3, grow_grad2d=1e-6, reset_every=10_000
        )
        strategy.check_sanity(parameters, optimizers)
        state = strategy.initialize_state(scene_scale=1.0)
        for step in range(1, 5):
            images, _, info = rasterization(
                parameters["means"],
                parameters["quats"],
                parameters["scales"].exp(),
                torch.sigmoid(parameters["opacities"]),
                parameters["colors"],
                scene["viewmats"],
                scene["Ks"],
                scene["width"],
                scene["height"],
                packed=packed,
                absgrad=absgrad,
            )
            strategy.step_pre_backward(parameters, optimizers, state, step, info)
            (images - 0.5).abs().mean().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            strategy.step_post_backward(parameters, optimizers, state, step, info, packed=packed)
        assert len(parameters["means"]) > 60
        assert all(bool(p.isfinite().all()) for p in parameters.values())
