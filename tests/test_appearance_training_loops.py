"""Training through the colour stage as programs do it: compiled, with fused optimizers, under the caller's TF32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from network_scenes import CPU64, CUDA32, FORMS, Form, Widths, color_net, embedding_scene
from scenes import HEIGHT, WIDTH
from test_appearance_training import MAP_IDS, WEIGHTS, A, C, assert_close, draw, gradients, loss_of, trained
from torch import Tensor

from rapfast.appearance import net_outputs_bwd
from rapfast.appearance.color_records import uncompiled_on_gpu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.cuda
def test_matrices_of_the_strict_precision_are_not_tf32() -> None:
    """Whatever the caller has switched on; and his switch is back afterwards."""
    matmul = torch.backends.cuda.matmul
    results = []
    for switch in (False, True):
        before, matmul.allow_tf32 = matmul.allow_tf32, switch
        try:
            scene, leaves = trained(CUDA32)
            results.append(gradients(leaves, loss_of(*draw(scene, leaves, CUDA32)[:2])))
            assert matmul.allow_tf32 == switch
        finally:
            matmul.allow_tf32 = before
    assert_close(results[1], results[0], 2e-5)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a switch of torch 2.9")
def test_the_switch_of_tf32_is_left_as_it_was() -> None:
    """Whichever of torch's settings the caller uses: what matmul has from a wider one it still has from there."""
    matmul = torch.backends.cuda.matmul
    try:
        for own in ("none", "ieee", "tf32"):
            for wide in ("none", "tf32", "ieee", "none"):
                torch.backends.fp32_precision, matmul.fp32_precision = wide, own
                for in_tf32 in (False, True):
                    with net_outputs_bwd._matmuls(torch.device("cuda"), in_tf32=in_tf32):
                        assert matmul.fp32_precision == ("tf32" if in_tf32 else "ieee")
                    assert matmul.fp32_precision == (wide if own == "none" else own)
        torch.backends.fp32_precision, matmul.fp32_precision = "tf32", "none"
        assert net_outputs_bwd.callers_tf32()[1], "torch's older switch raises here"
        with net_outputs_bwd._matmuls(torch.device("cuda"), in_tf32=False):
            pass
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
        with ThreadPoolExecutor(1) as other:
            with net_outputs_bwd._matmuls(torch.device("cuda"), in_tf32=True):
                asked = other.submit(net_outputs_bwd.callers_tf32)
                with pytest.raises(TooSlow):
                    asked.result(0.05)
            assert not asked.result()[1], "the caller's, not the backward's"
    finally:
        torch.backends.fp32_precision, matmul.fp32_precision = "none", "none"


def test_whole_graphs_are_compiled() -> None:
    """Without a break, whatever the number of records; also where no gradient is wanted."""
    scene, leaves = trained(CPU64, {"encoder": (159, 24, 20), "decoder": (68, 33), "color_decoder": (36, 3)})
    scene.feature_map_net = None

    def loss(leaves: dict[str, Tensor], mode: str) -> Tensor:
        images, alphas, _ = draw(scene, leaves, CPU64, render_mode=mode, packed=False)
        return images.square().sum() + alphas.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for mode in ("RGB", "RGB+ED"):
        want = gradients(leaves, loss(leaves, mode))
        assert_close(gradients(leaves, compiled(leaves, mode)), want, 1e-12)
    with torch.no_grad():
        assert float((compiled(leaves, "RGB") - loss(leaves, "RGB")).abs()) < 1e-8


@pytest.mark.parametrize("as_given", [torch.tensor, np.array])
def test_weights_are_met_in_compiled_calls(as_given) -> None:
    """Their numbers are not known while a call is traced."""
    scene, leaves = trained(CPU64, {"encoder": (159, 24, 20), "decoder": (68, 33), "color_decoder": (36, 3)})
    scene.feature_map_net = None
    widths: Widths = {"encoder": (119, 20), "decoder": (68, 9), "color_decoder": (12, 3)}
    by_embedding = embedding_scene(A, color_net(CPU64, widths), CPU64)
    embeddings = torch.rand(C, 8, dtype=torch.float64)
    cameras = A.viewmats, A.Ks, WIDTH, HEIGHT

    def by_maps(weights: Any) -> Tensor:
        return scene.render(*cameras, feature_maps=leaves["maps"], map_ids=MAP_IDS, view_weights=weights)[0]

    def by_embeddings(weights: Any) -> Tensor:
        return by_embedding.render(*cameras, embeddings=embeddings, view_weights=weights)[0]

    def decoded(weights: Any) -> Tensor:
        return scene.decode(A.viewmats[1], A.Ks[1], leaves["maps"][1], torch.as_tensor(weights)[1])

    weights = as_given(WEIGHTS, dtype=as_given(1.0).dtype)
    for call in (by_maps, by_embeddings, decoded):
        want = call(weights).detach()
        got = torch.compile(call, backend="aot_eager")(weights).detach()
        assert float((got - want).abs().max()) < 1e-6, call.__name__


def test_calls_on_a_gpu_are_not_compiled() -> None:
    """Whole calls by rapfast, and those alone."""
    met = []

    class Drawing:
        def __init__(self, is_cuda: bool) -> None:
            self.scene = SimpleNamespace(means=SimpleNamespace(is_cuda=is_cuda))

        @uncompiled_on_gpu
        def render(self, x: Tensor, *, backend: str = "rapfast") -> Tensor:
            if not torch.compiler.is_compiling():
                met.append(backend)
            return x + 1

    for is_cuda, backend, expected in (
        (True, "rapfast", ["rapfast"]), (True, "reference", []), (False, "rapfast", []),
    ):  # fmt: skip
        drawing = Drawing(is_cuda)
        met.clear()
        got = torch.compile(lambda x: 2 * drawing.render(x, backend=backend), backend="eager")(torch.ones(2))  # noqa: B023
        assert met == expected
        assert got.tolist() == [4, 4]


@pytest.mark.cuda
@pytest.mark.parametrize("given", [torch.Tensor, list])
def test_a_compiled_call_on_the_gpu_breaks_the_graph_and_is_the_same(given: type) -> None:
    scene, leaves = trained(CUDA32)
    scene.feature_map_net = None

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        options = {"view_weights": WEIGHTS} if given is list else {}
        images, alphas, _ = draw(scene, leaves, CUDA32, **options)
        return images.square().sum() + alphas.sum()

    want = gradients(leaves, loss(leaves))
    assert_close(gradients(leaves, torch.compile(loss, backend="aot_eager")(leaves)), want, 1e-4)
    with torch.no_grad():
        assert torch.equal(torch.compile(loss, backend="aot_eager")(leaves), loss(leaves))


@pytest.mark.parametrize("form", FORMS)
def test_steps_of_fused_optimizers_are_seen(form: Form) -> None:
    """Their kernels change parameters without torch's version counter moving. What is kept of a network is out of date
    all the same, for the next step as for a picture without gradients."""
    scene, leaves = trained(form)
    trainable = [scene.scene.intrinsic, *scene.color_net.parameters()]
    optimizer = torch.optim.Adam(trainable, lr=1e-2, fused=True)

    def picture() -> Tensor:
        with torch.no_grad():
            return draw(scene, leaves, form)[0]

    pictures = [picture()]
    for _ in range(2):
        images, alphas, _ = draw(scene, leaves, form)
        assert float((images.detach() - pictures[-1]).abs().max() / pictures[-1].abs().max()) < 1e-2
        loss_of(images, alphas).backward()
        optimizer.step()
        optimizer.zero_grad()
        pictures.append(picture())
        assert float((pictures[-1] - pictures[-2]).abs().max()) > 3e-2
        scene._networks.clear()
        assert torch.equal(picture(), pictures[-1])
    # A step in between makes a graph's backward wrong, and autograd says so.
    images, alphas, _ = draw(scene, leaves, form)
    loss_of(images, alphas).backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(images, alphas).backward()
