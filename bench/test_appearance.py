"""RAP's appearance path against RAP's own loop, timed after the pixels were checked.

New reference images ("rapfast", "rap-eager", "rap-compiled"): each view's feature maps are made in the call. "-maps":
they are there already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.appearance import CASES, Workload, color_work, exact, n_views, pictures, renderer, strict, workload
from bench.baselines.rap_loop import tf32
from bench.measure import graph_mib, peak_mib, psnr, rounds_for, seconds, stage_ms

_BY_NAME = {case.name: case for cases in CASES.values() for case in cases}

MIN_PSNR = {"fp16": 45.0, "fp32": 60.0}
"""dB, of rapfast against RAP's loop without TF32: by default with networks in half precision, and strictly."""

MIN_BASELINE_PSNR = 25.0
"""dB, of RAP's loop with TF32, which moves points on the projected map, against itself without."""


class _Truth:
    """The pictures by RAP's loop without TF32, of one case, path and batch at a time."""

    of: Any = None
    images: Tensor | None = None

    def get(self, work: Workload, path: str, batch: int) -> Tensor:
        if self.of != (work.case.name, path, batch):
            self.images = None  # its memory is wanted for the next
            self.images = exact(work, path, batch)
            self.of = work.case.name, path, batch
        return self.images


_truth = _Truth()


def test_appearance(
    benchmark: Any, case_name: str, path: str, device: str, batch: int, backend: str, scale: str, max_rounds: int
) -> None:
    with torch.no_grad(), tf32(True):
        work = workload(_BY_NAME[case_name], device)
        _measure(benchmark, work, device, path, batch, backend, scale, max_rounds)


def _measure(
    benchmark: Any, work: Workload, device: str, path: str, batch: int, backend: str, scale: str, max_rounds: int
) -> None:
    render = renderer(work, path, batch, backend)
    agreement = _checked(pictures(path, render()), work, device, path, batch, backend)
    strictly = None
    if (path, backend, device) == ("rap", "rapfast", "cuda"):
        strictly = psnr(strict(work, batch), _truth.get(work, path, batch))
        assert strictly >= MIN_PSNR["fp32"], f"rapfast's fp32 is {strictly:.1f} dB from RAP's loop: not worth timing"

    call = _emptied(render)
    if backend.startswith("rapfast"):
        call()  # after a few images of a size their network is captured as a graph
    first = seconds(call, device)
    warmups, rounds = rounds_for(first, device, max_rounds)
    if backend.startswith("rap-"):
        # a round is itself a loop over the views, and takes most of a second
        warmups, rounds = 1, min(max_rounds, 8 if batch <= 8 else 3)
    peak = peak_mib(call, device)
    stages = _stages(work, batch, device) if (path, backend) == ("rap", "rapfast") else None
    benchmark.pedantic(call, warmup_rounds=warmups, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    records = float(work.geometry.statistics.visible_share[:batch].mean()) * len(work.rap)
    color = color_work(work.rap.color_net, records, value_size=2 if device == "cuda" else 4)
    benchmark.extra_info.update(
        case=work.case.name,
        backend=backend,
        batch=batch,
        direction=path,
        ms_per_view=1e3 * benchmark.stats.stats.median / n_views(work, path, batch, backend),
        peak_mib=peak,
        n_gaussians=len(work.rap),
        width=work.geometry.cameras.width,
        height=work.geometry.cameras.height,
        channels=3,
        visible_share=records / len(work.rap),
        intersections_per_view=float(work.geometry.statistics.intersections[:batch].double().mean()),
        stages=stages,
        graph_mib=graph_mib(device) if backend == "rapfast" else 0.0,
        prepared=_prepared(work) if backend == "rapfast" else None,
        color_work={**color._asdict(), "floor_ms": color.floor_ms},
        psnr_db=agreement,
        psnr_strict_db=strictly,
        psnr_against="rap-eager without TF32",
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else None,
        timer="cuda events" if device == "cuda" else "perf_counter",
        warmup_rounds=warmups,
        scale=scale,
    )


def _checked(drawn: Tensor, work: Workload, device: str, path: str, batch: int, backend: str) -> float:
    agreement = psnr(drawn, _truth.get(work, path, len(drawn)))
    least = MIN_BASELINE_PSNR if backend.startswith("rap-") else MIN_PSNR["fp16" if device == "cuda" else "fp32"]
    assert agreement >= least, f"{backend} is {agreement:.1f} dB from RAP's loop without TF32: not worth timing"
    return agreement


def _emptied(render: Callable[[], Any]) -> Callable[[], None]:
    """The call without its result; of a loop's views none is kept longer than until the next."""

    def call() -> None:
        drawn = render()
        if not isinstance(drawn, Tensor):
            deque(drawn, maxlen=0)

    return call


def _stages(work: Workload, batch: int, device: str) -> dict[str, float] | None:
    """Milliseconds per view of rapfast's stages, and of the feature maps before them; None on the CPU."""
    if device != "cuda":
        return None
    images = work.images[:batch]

    def call() -> None:
        work.rap.render(**work.views(batch), feature_maps=work.rap.feature_maps(images))

    return stage_ms(call, batch, device, repeats=9)


def _prepared(work: Workload) -> dict[str, float]:
    """What rapfast keeps of the scene's colour network from the first render on, and how long that took to make."""
    prepared = work.rap.prepare()
    return {"mib": prepared.n_bytes / 2**20, "ms": 1e3 * prepared.seconds}
