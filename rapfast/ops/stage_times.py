"""How long each stage of a call takes on the GPU."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from rapfast.ops.color_net import Network, NetworkInput
from rapfast.ops.render import render

STAGES = ("project", "color", "bin", "blend", "composite")
_STAGES_AS_RUN = ("project", "bin", "color", "blend", "composite")


def stage_times(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    colors: Tensor | None,  # [N, D] or [N, K, 3]; None: of the network
    viewmats: Tensor,  # [C, 4, 4]
    Ks: Tensor,  # [C, 3, 3]
    width: int,
    height: int,
    sh_degree: int | None = None,
    *,
    antialiased: bool = False,
    network: Network | None = None,
    network_input: NetworkInput | None = None,
    repeats: int = 9,
) -> dict[str, float]:
    """Milliseconds that each stage of one call takes on the GPU, the median of ``repeats`` calls, for a plain
    pinhole render of colours. Time in which the GPU waits for the host counts to the stage that waits.

    Spherical harmonics and given colours of up to four channels are made while Gaussians are projected: their
    time is part of ``project`` and ``color`` is next to nothing. So is the counting of tiles, which used to be
    part of ``bin``."""
    batched = [tensor[None].contiguous() for tensor in (means, quats, scales)]
    colors = None if colors is None else colors[None].contiguous()
    opacities, viewmats, Ks = (tensor[None].contiguous() for tensor in (opacities, viewmats, Ks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(STAGES) + 1)]
    stream = torch.cuda.current_stream(means.device)
    for event in events:
        event.record(stream)  # creates it

    def run() -> list[float]:
        render(
            *batched, None, opacities, colors, viewmats, Ks, None, width, height, camera_model="pinhole",
            antialiased=antialiased, eps2d=0.3, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
            sh_degree=sh_degree, render_mode="RGB", alpha_cap=0.999, stage_events=events, network=network,
            network_input=network_input,
        )  # fmt: skip
        events[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False)]

    for _ in range(3):
        run()
    runs = [run() for _ in range(repeats)]
    medians = {
        name: statistics.median(times) for name, times in zip(_STAGES_AS_RUN, zip(*runs, strict=True), strict=True)
    }
    return {name: medians[name] for name in STAGES}
