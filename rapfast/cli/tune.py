"""`rapfast tune`: the batch and the memory that render a scene the fastest here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from .. import tuning
from .._version import __version__
from ..cameras import Cameras
from ..io import load_scene
from ..io.atomic import check_writable
from ..postprocess import PostProcess
from ..rasterization import rasterization
from . import views
from .common import Command, parse_device, parse_size

BATCHES = {"cpu": 16, "cuda": 64}
"""The most views tried in one call."""


@dataclass(kw_only=True)
class Tune(Command):
    """Find how many views of a scene to render in one call, and in how much memory.

    By example:

    rapfast tune scene.ply --size 854x480
      tries 1, 2, 4 ... views, then bounds on the memory of the best, prints both curves and writes
      scene.ply.tuning.json, which `rapfast render scene.ply` reads from then on.

    rapfast tune output/church --cameras data/church/sparse/0 --size 854x480
      a RAP model (for `rapfast rvs`): its views are of the given cameras; feature maps are there already.

    rapfast tune scene.ply --size 1920x1080 --max-memory 2
      nothing that takes more than 2 GiB.

    A file holds an entry for each GPU and image size; the same again replaces it. No pixel depends on it, and --batch
    given to a command goes before it.
    """

    scene: Annotated[Path, tyro.conf.arg(metavar="SCENE"), tyro.conf.Positional]
    """Scene file, or the folder of a trained RAP scene."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """WIDTHxHEIGHT in pixels. Default: as the cameras say, 854x480 for an orbit."""

    cameras: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Camera file or COLMAP folder, or orbit:N. Default: orbit:32, which sees more of a room from outside than cameras
    in it do."""

    up: Literal["-y", "y", "z", "-z", "x", "-x"] = "-y"
    """Axis that points up, for an orbit."""

    max_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """The most views to try in one call; default: 64 on a GPU, 16 on the CPU."""

    max_memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """The most memory that a call may take above the scene, GiB. Default: what there is."""

    seconds: float = 0.6
    """Time for each choice; more is surer."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write to. Default: beside the scene, where the other commands look."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:NUMBER."""

    def run(self) -> None:
        """Measure, print, write."""
        from ..profiling.batch_search import search

        size = parse_size(self.size) if self.size else None
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"--max-batch must be at least 1, got {self.max_batch}")
        for name in ("max_memory", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, got {value:g}")
        device = parse_device(self.device)
        target = check_writable(tuning.path_for(self.scene) if self.out is None else self.out)
        if target.exists():
            tuning.read(target)  # what is there must be such a file before a minute is spent
        n, cameras, draw = self._renderer(size, device)
        most = self.max_batch or BATCHES[device.type]
        print(f"{n:,} Gaussians at {cameras.width}x{cameras.height} on {tuning.device_name(device)}")
        print(f"{'views':>6} {'memory':>12} {'ms per view':>12} {'from':>9} {'to':>9} {'takes':>12}")
        scale: list[float] = []

        def show(point: Any) -> None:
            scale.append(point.ms_per_view)
            bound = "any" if point.max_memory is None else f"{point.max_memory / 2**20:,.0f} MiB"
            takes = "" if point.peak is None else f"{point.peak / 2**20:,.0f} MiB"
            bar = "█" * max(1, round(30 * point.ms_per_view / max(scale)))
            numbers = f"{point.ms_per_view:>12.4g} {point.low:>9.4g} {point.high:>9.4g} {takes:>12}"
            print(f"{point.batch:>6} {bound:>12} {numbers}  {bar}", flush=True)

        max_bytes = None if self.max_memory is None else int(self.max_memory * 2**30)
        found = search(draw, device, _powers(most), max_bytes, self.seconds, show)
        if found.stopped:
            print(f"note: {found.stopped}")
        best = found.best
        entry = tuning.Tuning(
            tuning.device_name(device), cameras.width, cameras.height, n, best.batch, best.max_memory,
            round(best.ms_per_view, 6), datetime.now(timezone.utc).isoformat(timespec="seconds"),
            {"rapfast": __version__, "torch": torch.__version__},
        )  # fmt: skip
        tuning.save(target, entry)
        bound = "" if best.max_memory is None else f", in at most {best.max_memory / 2**20:,.0f} MiB"
        calls = f"{best.batch} view{'' if best.batch == 1 else 's'} in a call"
        print(f"best: {calls}{bound} ({1e3 / best.ms_per_view:,.0f} views per second) -> {target}")

    def _renderer(
        self, size: tuple[int, int] | None, device: torch.device
    ) -> tuple[int, Cameras, Callable[[int, int | None], Any]]:
        """The number of Gaussians, the cameras, and what draws some of them and copies them to the host."""
        if self.scene.is_dir():
            from ..appearance import load_rap

            model = load_rap(self.scene)
            scene = model.scene
        else:
            model, scene = None, load_scene(self.scene)
            if scene.sh is None:
                raise ValueError(f"{self.scene}: has no colours (spherical harmonics), so it cannot be rendered")
        cameras = self._cameras(scene, size).to(device)
        post = PostProcess(clamp=(0.0, 1.0), dtype=torch.uint8)

        @cache  # the choice of cameras is not what is measured
        def part(batch: int) -> Cameras:
            return cameras[[i % len(cameras) for i in range(batch)]]

        if model is None:
            scene = scene.to(device)

            def draw(batch: int, max_memory: int | None) -> Any:
                with torch.inference_mode():
                    of = part(batch)
                    out, _, _ = rasterization(
                        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, of.viewmats, of.Ks,
                        of.width, of.height, sh_degree=scene.sh_degree, postprocess=post, max_memory=max_memory,
                    )  # fmt: skip
                    return out.cpu()

            return len(scene), cameras, draw

        model = model.to(device)
        seeded = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, cameras.height, cameras.width, generator=seeded, device="cpu")
        maps = model.feature_maps(image.to(device))

        def draw(batch: int, max_memory: int | None) -> Any:
            with torch.no_grad():
                of = part(batch)
                out, _, _ = model.render(
                    of.viewmats, of.Ks, of.width, of.height, feature_maps=maps, map_ids=[0] * batch, view_weights=1.0,
                    postprocess=post, max_memory=max_memory,
                )  # fmt: skip
                return out.cpu()

        return len(model), cameras, draw

    def _cameras(self, scene: Any, size: tuple[int, int] | None) -> Cameras:
        text = "orbit:32" if self.cameras is None else self.cameras
        count = views.orbit_count(text)
        if count is not None:
            if count < 1:
                raise ValueError(f"--cameras orbit:N must be at least 1 view, got {count}")
            return views.orbit(scene, count, size or (854, 480), self.up, 15.0, 1.0)
        groups = views.load_cameras(text, size)
        if len(groups) > 1:
            sizes = ", ".join(f"{group.width}x{group.height}" for group in groups[:5])
            raise ValueError(f"{text}: images differ in size ({sizes}): give --size WxH, and tune each size by itself")
        return groups[0]


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... and the most itself."""
    return sorted({*(1 << i for i in range(most.bit_length())), most})
