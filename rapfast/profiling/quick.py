"""`rapfast bench quick`: in under a minute, without data, what this machine makes of copies, batches and stages.

Everything is timed by the host's clock from the call until the device is done, each round a call of a section, so the
result is a profile as any other and `rapfast compare` reads it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rapfast.profiling import Profiler, section
from rapfast.profiling.machine import name_of
from rapfast.profiling.transfers import Case, prepare

if TYPE_CHECKING:
    from rich.table import Table

    from rapfast.appearance import RapScene
    from rapfast.cameras import Cameras
    from rapfast.scene import Scene

SECONDS = 0.8
"""For the rounds of one line, where they are many."""

ROUNDS = (5, 60)
"""At least, whose spread `rapfast compare` needs, and at most."""

SLOW_SECONDS, SLOW_ROUNDS = 1.0, 2
"""A call that takes longer, on a machine with other work, has the fewest rounds that have a spread: all is to take less
than a minute."""


class Line(NamedTuple):
    """One thing that is timed.

    Attributes:
        group, name: what it is. call: does it, and returns whatever is to be alive until the clock is read.
        units: how many views, images or sections a call makes; times are told of one.
        against: the name of the group's line that this one is compared with.
        inside: whether the sections of the call are wanted too. Looking at them takes time.
    """

    group: str
    name: str
    call: Callable[[], Any]
    units: int = 1
    against: str | None = None
    inside: bool = False


class Setup(NamedTuple):
    """How large the work is on a device."""

    n_gaussians: int
    width: int
    height: int
    batches: tuple[int, ...]  # the last one is looped over as well
    reference_size: tuple[int, int]  # (width, height)


SETUPS = {
    "cpu": Setup(20_000, 427, 240, (1, 4, 8), (96, 54)),
    "cuda": Setup(100_000, 854, 480, (1, 8, 32), (854, 480)),
}

COPY_VIEWS, COPY_SIZE = 32, (240, 427)


def measure(
    device: torch.device, progress: Callable[[str], None] = lambda group: None
) -> tuple[dict[str, Any], list[Line]]:
    """Time every line.

    Args:
        device: the CPU or a CUDA device, which must be the current one.
        progress: is told the name of each group when it is begun.

    Returns:
        the profile's record (`records`), whose sections are group and name; and the lines.
    """
    lines: list[Line] = []
    profiler, group = Profiler(device, nvtx=False), None
    waiting = _lines(device)
    with torch.no_grad(), profiler:
        while True:
            with profiler.paused():  # what a line needs is made here, and is none
                line = next(waiting, None)
            if line is None:
                break
            if line.group != group:
                group = line.group
                progress(group)
            _time(line, device, profiler)
            lines.append(line)
    record = profiler.record(["rapfast", "bench", "quick"])
    # a group is no measurement: its calls are its lines, warm-ups between their rounds
    record["sections"] = [found for found in record["sections"] if len(found["path"]) > 1]
    return record, lines


def _time(line: Line, device: torch.device, profiler: Profiler) -> None:
    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        made = line.call()
        _wait(device)
        took = time.perf_counter() - start
        del made
        return took

    with profiler.paused():
        first = once()
        if first < SECONDS:
            first = once()  # the first has loaded or learnt something
    with section(line.group):
        for _ in range(_rounds(first)):
            _wait(device)
            with section(line.name), contextlib.nullcontext() if line.inside else profiler.paused():
                made = line.call()
                _wait(device)
            del made


def _rounds(first: float) -> int:
    """Of a line whose call takes so many seconds."""
    if first > SLOW_SECONDS:
        return SLOW_ROUNDS
    least, most = ROUNDS
    return min(most, max(least, round(SECONDS / max(first, 1e-6))))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _lines(device: torch.device) -> Iterator[Line]:
    """Made one after the other: what a group needs is in memory while it is measured alone."""
    setup = SETUPS[device.type]
    if device.type == "cuda":
        yield from _copies()
    yield from _images(device)
    scene, rap, cameras, images = _room(setup, device)
    yield from _batches(scene, cameras, setup)
    yield from _colours(rap, cameras, images, setup.batches[1])
    yield from _stages(scene, cameras, setup.batches[1])
    yield Line("profiler", "1000 sections, none is running", _sections, 1000)
    yield Line("profiler", "1000 sections, one is running", _sections, 1000, inside=True)


# --- copies between host and GPU -------------------------------------------------------------------------------------


def _copies() -> Iterator[Line]:
    names = {
        "pageable": "ordinary memory",
        "pageable-non_blocking": "ordinary memory, non_blocking",
        "pinned": "pinned memory",
        "pinned-non_blocking": "pinned memory, non_blocking",
    }
    for what, group in (("upload", "upload"), ("upload-work", "upload and work, 8 batches")):
        for way, name in names.items():
            case = prepare(Case(what, COPY_SIZE, COPY_VIEWS, way))
            yield Line(group, name, case.call, COPY_VIEWS * (8 if what != "upload" else 1), names["pageable"])
    case = prepare(Case("upload-work", COPY_SIZE, COPY_VIEWS, "pinned-own-stream"))
    yield Line("upload and work, 8 batches", "pinned, stream of its own", case.call, COPY_VIEWS * 8, names["pageable"])
    for way, name in (
        ("per-tensor", "one by one"),
        ("batched", "as one batch"),
        ("batched-kept", "as one batch, to kept memory"),
        ("batched-pinned", "as one batch, to pinned memory"),
    ):
        case = prepare(Case("download", COPY_SIZE, COPY_VIEWS, way))
        yield Line("download", name, case.call, COPY_VIEWS, "one by one")


# --- batches of images -----------------------------------------------------------------------------------------------


def _images(device: torch.device) -> Iterator[Line]:
    """Normalisation, as before every training step: small operations, whose cost is in being launched."""
    images = torch.rand(COPY_VIEWS, 3, 60, 107, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def normalise(batch: Tensor) -> Tensor:
        return (batch.clamp(0, 1) - mean) / std

    group = f"normalise {COPY_VIEWS} images of 107x60"
    yield Line(group, "one by one", lambda: [normalise(image) for image in images], COPY_VIEWS, "one by one")
    yield Line(group, "as one batch", lambda: normalise(images), COPY_VIEWS, "one by one")


# --- rendering -------------------------------------------------------------------------------------------------------


def _room(setup: Setup, device: torch.device) -> tuple[Scene, RapScene, Cameras, Tensor]:
    """The procedural room with fixed colours and with RAP's, cameras in it, reference images."""
    from rapfast import procedural

    lit = procedural.lit_room(setup.n_gaussians)
    cameras = procedural.room_cameras(max(setup.batches), setup.width, setup.height)
    at = procedural.room_cameras(setup.batches[1], *setup.reference_size)
    images = procedural.as_references(lit.images(at, "evening"))
    return lit.under("day").to(device), procedural.appearance_room(lit=lit).to(device), cameras.to(device), images


def _draw(scene: Scene, cameras: Cameras) -> Tensor:
    from rapfast.rasterization import rasterization

    return rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks,
        cameras.width, cameras.height, sh_degree=scene.sh_degree,
    )[0]  # fmt: skip


def _batches(scene: Scene, cameras: Cameras, setup: Setup) -> Iterator[Line]:
    most = setup.batches[-1]
    group = f"render {len(scene):,} Gaussians at {cameras.width}x{cameras.height}"
    loop, views = f"{most} calls of one view", cameras[:most]
    yield Line(group, loop, lambda: [_draw(scene, views[i : i + 1]) for i in range(most)], most, loop)
    for batch in setup.batches[1:]:
        part = cameras[:batch]
        yield Line(group, f"one call of {batch} views", lambda part=part: _draw(scene, part), batch, loop)


def _colours(rap: RapScene, cameras: Cameras, images: Tensor, batch: int) -> Iterator[Line]:
    images = images.to(rap.scene.means.device)
    maps, views = rap.feature_maps(images), cameras[:batch]

    def draw(maps: Any) -> Tensor:
        ids, weights = list(range(batch)), [1.0] * batch
        size = views.width, views.height
        return rap.render(views.viewmats, views.Ks, *size, feature_maps=maps, map_ids=ids, view_weights=weights)[0]

    group = f"colours from reference images, {batch} views"
    yield Line(group, "render, feature maps there", lambda: draw(maps), batch)
    yield Line(group, "feature maps", lambda: rap.feature_maps(images), batch)
    yield Line(group, "both", lambda: draw(rap.feature_maps(images)), batch)


def _stages(scene: Scene, cameras: Cameras, batch: int) -> Iterator[Line]:
    part = cameras[:batch]
    yield Line(f"stages of a call of {batch} views", "call", lambda: _draw(scene, part), batch, inside=True)


# --- the profiler itself ---------------------------------------------------------------------------------------------


def _sections() -> None:
    for _ in range(1000):
        with section("section"):
            pass


# --- showing ---------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any], lines: list[Line]) -> Table:
    """Every line: milliseconds of one unit, of one call, and how many times faster than the line it is held against;
    below it the sections inside it."""
    from rich.table import Table

    shown = Table(title=name_of(record["machine"]), title_justify="left", box=None, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for head in ("ms each", "ms a call", "from", "to", "times faster"):
        shown.add_column(head, justify="right")
    times = {tuple(s["path"]): s["host_ms"] or s["gpu_ms"] for s in record["sections"]}
    group = None
    for line in lines:
        if line.group != group:
            group = line.group
            shown.add_row(f"[bold]{group}[/]")
        found = times[group, line.name]
        ratio = ""
        if line.against not in (None, line.name):
            units = next(other.units for other in lines if (other.group, other.name) == (group, line.against))
            ratio = f"{times[group, line.against]['median'] / units / (found['median'] / line.units):.2f}"
        shown.add_row(f"  {line.name}", *_cells(found, line.units), ratio)
        if line.inside and line.units < 1000:
            for path, inside in times.items():
                if path[:-1] == (group, line.name):
                    shown.add_row(f"    {path[-1]}", *_cells(inside, line.units), "")
    return shown


def _cells(times: dict[str, Any], units: int) -> list[str]:
    return [f"{times['median'] / units:,.4g}", *(f"{times[key]:,.4g}" for key in ("median", "min", "max"))]
