"""Forward and backward: to every parameter of the scene, with and without the cameras, after the gradients were
compared. `bwd` has the gradients of the viewmats too, `bwd-scene` has not."""

from __future__ import annotations

from typing import Any

import torch

from bench import floors
from bench.cases import CASES, Case, workload
from bench.measure import Arguments, peak_mib, rounds_for, seconds, step_ms, wait
from bench.measure import gradients as gradients_of

PARAMETERS = ("means", "quats", "scales", "opacities", "colors")

MAX_ERROR = 1e-2
"""Most that the absolute differences of an input's gradient may sum up to, of its absolute values. Both backends err in
float32, and decide single pixels otherwise."""

_BY_NAME = {case.name: case for cases in CASES.values() for case in cases}


class _Truth:
    """gsplat's gradients, of one case and direction at a time, on the CPU: a GPU may have no room for both."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] | None = None
        self.gradients: dict[str, torch.Tensor] = {}


_truth = _Truth()


def _errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {}
    for name, expected in want.items():
        expected, value = expected.to(got[name].device), got[name]
        if name == "viewmats":  # gsplat inverts all of it, so that its last row gets some too
            expected, value = expected[..., :3, :], value[..., :3, :]
        found[name] = float((value - expected).abs().double().sum() / expected.abs().double().sum())
    return found


def test_backward(
    benchmark: Any, case_name: str, direction: str, device: str, batch: int, backend: str, scale: str, max_rounds: int
) -> None:
    case = _BY_NAME[case_name]
    arguments = dict(workload(case, device).arguments(batch))
    wanted = [*PARAMETERS, *(["viewmats"] if direction == "bwd" else [])]
    for name in wanted:
        arguments[name] = arguments[name].detach().clone().requires_grad_()
    _measure(benchmark, case, arguments, wanted, direction, device, batch, backend, scale, max_rounds)


def _measure(
    benchmark: Any, case: Case, arguments: Arguments, wanted: list[str], direction: str, device: str, batch: int,
    backend: str, scale: str, max_rounds: int,
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, case.height, case.width, case.channels or 3)
    upstream = torch.randn(shape, generator=generator, device=device)

    def call() -> dict[str, torch.Tensor]:
        return gradients_of(backend, arguments, wanted, upstream)

    drawn = call()
    wait(device)
    errors, of = None, (case.name, direction, device, batch)
    if backend == "gsplat":
        _truth.of, _truth.gradients = of, {name: x.cpu() for name, x in drawn.items()}
    elif _truth.of == of:
        errors = _errors(drawn, _truth.gradients)
        too_far = {name: error for name, error in errors.items() if not error <= MAX_ERROR}
        assert not too_far, f"{backend}'s gradients are not gsplat's, of which they miss these shares: {errors}"
    del drawn

    first = seconds(call, device)
    warmups, rounds = rounds_for(first, device, max_rounds)
    peak = peak_mib(call, device)
    steps, launches = step_ms(call, batch) if backend == "rapfast" and device == "cuda" else (None, None)
    counts = None
    if steps is not None and direction == "bwd":
        with torch.no_grad():
            counts = floors.count(arguments)._asdict()
    benchmark.pedantic(call, warmup_rounds=warmups, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info.update(
        case=case.name,
        backend=backend,
        batch=batch,
        direction=direction,
        ms_per_view=1e3 * benchmark.stats.stats.median / batch,
        peak_mib=peak,
        n_gaussians=len(arguments["means"]),
        width=case.width,
        height=case.height,
        channels=case.channels or 3,
        work=counts,
        steps=steps,
        launches=launches,
        errors=errors,
        errors_against=None if errors is None else "gsplat",
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else None,
        timer="cuda events" if device == "cuda" else "perf_counter",
        warmup_rounds=warmups,
        scale=scale,
    )
