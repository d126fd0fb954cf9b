"""Time per view against the number of Gaussians, the batch and the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.report import Appearance, Run

COLORS = {"rapfast": "#c1440e", "gsplat": "#3b6ea5", "gsplat-loop": "#8fb0d0"}
APPEARANCE_COLORS = {
    "rap-eager": "#8fb0d0",
    "rap-compiled": "#3b6ea5",
    "rapfast": "#c1440e",
    "rapfast-maps": "#e39a6f",
}
Points = dict[str, list[tuple[float, float]]]


def plot(run: Run, path: Path) -> bool:
    """Draws a run's panels side by side into an SVG file; False where no panel has two points.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    return _draw(_panels(run), COLORS, path, {"ylim": (0, None)})


def plot_appearance(rows: list[Appearance], path: Path) -> bool:
    """The same for RAP's loop and rapfast against the number of Gaussians, one panel for each path and batch."""
    titles = {"rap": "render", "rap-loop": "to the CPU"}
    panels: dict[tuple[str, int], Points] = {}
    for row in rows:
        points = panels.setdefault((row.path, row.batch), {name: [] for name in APPEARANCE_COLORS})
        for backend in APPEARANCE_COLORS:
            if (ms := row.ms(backend)) is not None:
                points[backend].append((row.by_backend[backend]["n_gaussians"], ms))
    drawn = [(f"{titles[p]}, batch of {b}", "Gaussians", points) for (p, b), points in panels.items()]
    return _draw(drawn, APPEARANCE_COLORS, path, {"yscale": "log"})


def _draw(panels: list[tuple[str, str, Points]], colors: dict[str, str], path: Path, y_axis: dict[str, Any]) -> bool:
    panels = [(title, x, points) for title, x, points in panels if any(len(p) > 1 for p in points.values())]
    if not panels:
        return False
    from rapfast.io.atomic import atomic_path
    from rapfast.profiling.plotting import pyplot

    plt = pyplot()
    # the salt: the same run gives the same file
    style = {"svg.hashsalt": "rapfast", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False)
        for axis, (title, x, points) in zip(axes[0], panels, strict=True):
            for backend, values in points.items():
                if values:
                    axis.plot(*zip(*sorted(values), strict=True), "o-", color=colors[backend], label=backend, ms=4)
            places = sorted({value for values in points.values() for value, _ in values})
            axis.set(title=title, xlabel=x, ylabel="ms per view", xscale="log", **y_axis)
            axis.set_xticks(places, [_short(place) for place in places])
            axis.set_xticks([], minor=True)
            if "yscale" in y_axis:
                axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.2)
        handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False)
        figure.tight_layout(rect=(0, 0.08, 1, 1))  # above the legend, which would hide lines inside a panel
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)
    return True


def _short(value: float) -> str:
    """200k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _panels(run: Run) -> list[tuple[str, str, Points]]:
    """(title, x axis, points by backend), each of one series of cases in which one quantity changes."""
    forward = {key: info for key, info in run.records.items() if info["channels"] == 3 and key[1] in COLORS}
    rooms = {key: info for key, info in forward.items() if key[0].startswith("room-")}
    if not rooms:
        return []
    # the middle room is the one whose batch and size are varied
    by_n = sorted({(info["n_gaussians"], key[0]) for key, info in rooms.items() if len(run.batches(key[0])) > 1})
    middle_n, middle = by_n[len(by_n) // 2]
    size = next((info["width"], info["height"]) for key, info in rooms.items() if key[0] == middle)
    batch = 8 if 8 in run.batches(middle) else max(run.batches(middle))

    def chosen(records: dict[Any, Any], x: Any, keep: Any) -> Points:
        points: Points = {name: [] for name in COLORS}
        for (case, backend, n), info in records.items():
            if keep(case, n, info):
                points[backend].append((x(n, info), info["ms_per_view"]))
        return points

    return [
        (
            f"room, batch of {batch}",
            "Gaussians",
            chosen(
                rooms,
                lambda n, i: i["n_gaussians"],
                lambda c, n, i: n == batch and (i["width"], i["height"]) == size,
            ),
        ),
        (middle, "views in a batch", chosen(rooms, lambda n, i: n, lambda c, n, i: c == middle)),
        (
            f"room of {middle_n:,}, batch of {batch}",
            "pixels",
            chosen(
                rooms,
                lambda n, i: i["width"] * i["height"],
                lambda c, n, i: n == batch and i["n_gaussians"] == middle_n,
            ),
        ),
        (
            f"outdoor, batch of {batch}",
            "pixels",
            chosen(
                {key: info for key, info in forward.items() if key[0].startswith("outdoor-")},
                lambda n, i: i["width"] * i["height"],
                lambda c, n, i: n == batch,
            ),
        ),
    ]
