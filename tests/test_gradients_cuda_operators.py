"""rasterization's gradients on a GPU by way of operators: what torch.compile and other watchers see."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from gradients import compare, gradients
from test_gradients_cuda import HEIGHT, SAME, WIDTH, crowd
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rapfast import rasterization
from rapfast.ops import autograd_cuda, render_bwd

pytestmark = pytest.mark.cuda

OPERATORS = "render_kept", "pixels_bwd", "gaussians_bwd"


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """Makes calls go by way of operators, and returns where their arguments are going to be."""
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in OPERATORS}

    def recorder(name: str) -> Any:
        op = getattr(torch.ops.rapfast, name).default

        def record(*arguments: Any) -> Any:
            calls[name].append(arguments)
            return op(*arguments)

        return record

    for module in (sys.modules["rapfast.ops.autograd"], render_bwd):
        monkeypatch.setattr(module, "is_watched", lambda tensors: True)
    for name in OPERATORS:
        for module in (autograd_cuda, render_bwd):
            if hasattr(module, name + "_op"):
                monkeypatch.setattr(module, name + "_op", recorder(name))
    return calls


@pytest.mark.parametrize("mode", ["RGB", "RGB+ED", "D"])
@pytest.mark.parametrize("packed", [True, False])
def test_operators_give_what_direct_calls_give(packed: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = crowd(700, 2, batch=(2,), sh_degree=1)
    options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1, "packed": packed, "render_mode": mode}
    want, weights = gradients(inputs, "cuda", **options, absgrad=False)
    calls = watched(monkeypatch)
    got, _ = gradients(inputs, "cuda", weights=weights, **options, absgrad=False)
    assert all(calls.values())
    compare(got, want, SAME)
    calls = {name: len(arguments) for name, arguments in calls.items()}
    assert calls == dict.fromkeys(OPERATORS, 1)


def test_sparse_gradients_where_somebody_watches() -> None:
    inputs = {k: x.float().cuda() for k, x in crowd(400, 2, sh_degree=1).items()}
    inputs["means"][::3, 2] -= 50  # behind the cameras
    found = []
    for watches in (False, True):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        with FlopCounterMode(display=False) if watches else contextlib.nullcontext():
            images, alphas, _ = rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1, sparse_grad=True)
            (images.square().sum() + alphas.sum()).backward()
        assert leaves["means"].grad.layout == torch.sparse_coo
        found.append({k: x.grad.to_dense().double().cpu() for k, x in leaves.items()})
    compare(found[1], found[0], SAME)


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)  # the schema test runs an operator twice and compares
    try:
        calls = watched(monkeypatch)
        options = {"width": WIDTH, "height": HEIGHT, "sh_degree": 1, "packed": packed, "absgrad": False}
        gradients(crowd(300, 2, sh_degree=1), "cuda", **options)
        for name, samples in calls.items():
            assert samples, name
            for arguments in samples:
                op = getattr(torch.ops.rapfast, name).default
                # The state has memory that nobody writes, which two calls leave as they found it.
                utils = ("test_schema", "test_faketensor") if name != "render_kept" else ("test_faketensor",)
                torch.library.opcheck(op, arguments, test_utils=utils)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["RGB", "RGB+ED"])
@pytest.mark.parametrize("packed", [True, False])
def test_whole_graphs_are_compiled(packed: bool, mode: str) -> None:
    """Forward and backward without a break, whatever the number of records; also where no gradient is wanted."""
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(700, 2, sh_degree=1).items()}
    weights = torch.rand(2, HEIGHT, WIDTH, 4 if "D" in mode else 3, device="cuda")

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        images, alphas, meta = rasterization(
            **leaves, width=WIDTH, height=HEIGHT, sh_degree=1, packed=packed, render_mode=mode
        )
        return (images * weights).sum() + alphas.square().sum() + 1e-3 * meta["means2d"].square().sum()

    torch._dynamo.reset()  # the forms before are of the same code, of which only so many are kept
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (700, 300):
        with torch.no_grad():
            leaves["opacities"][n:] = 0  # fewer records
        want, got = (
            dict(zip(leaves, torch.autograd.grad(run(leaves), list(leaves.values())), strict=True))
            for run in (loss, compiled)
        )
        compare({k: x.double().cpu() for k, x in got.items()}, {k: x.double().cpu() for k, x in want.items()}, SAME)
    with torch.no_grad():
        assert torch.equal(compiled(leaves), loss(leaves))


def test_what_a_compiled_call_cannot_say() -> None:
    leaves = {k: x.float().cuda().requires_grad_() for k, x in crowd(50, 1, sh_degree=1).items()}

    def conics(**options: Any) -> Tensor:
        return rasterization(**leaves, width=WIDTH, height=HEIGHT, sh_degree=1, **options)[2]["conics"]

    with pytest.raises(Exception, match="of meta only means2d is there"):
        torch.compile(conics, backend="aot_eager", fullgraph=True)()
    with pytest.raises(Exception, match="sparse_grad must be False inside torch.compile on a GPU"):
        torch.compile(conics, backend="aot_eager", fullgraph=True)(sparse_grad=True)
