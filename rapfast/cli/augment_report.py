"""What `rapfast augment` tells: progress, the plan of a dry run, the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from ..augment.difficulties import DRAWN, ParameterSet
from ..augment.job import Summary
from ..augment.output import OutputFolder, film_path
from ..augment.provider import Provider
from ..augment.viewpoints import drawn_viewpoint, set_seed
from .common import sentence
from .progress import Progress

_DOING = {"precompute": "precomputing", "render": "rendering"}


class FrameProgress:
    """A bar for each video and step, on stderr; silent where that is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._of: tuple[str, str] | None = None

    def __enter__(self) -> FrameProgress:
        return self

    def update(self, video: str, step: str, done: int, total: int) -> None:
        """So many of so many frames are done."""
        if self._of != (video, step):
            self._end()
            self._of = video, step
            self._bar = Progress(f"{_DOING[step]} {video}", total, "frames").__enter__()
        self._bar.advance(done - self._bar.done)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = self._of = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Columns as wide as they must be; the first `left` aligned left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, (head, *rows)))


def plan_table(
    folder: OutputFolder, videos: Sequence[str], sets: Sequence[ParameterSet], seed: int, provider: Provider,
    overwrite: bool,
) -> str:  # fmt: skip
    """What would be rendered and from where; videos that cannot be read say why."""
    rows, notes, n_new = [], [], 0
    for video in videos:
        try:
            provider.check_video(video)
            missing = None
        except Exception as error:
            missing = "cannot"
            notes.append(f"{video}: {sentence(error)}")
        for s in sets:
            there = (s.name, video) in folder.films and not overwrite
            state = "there" if there else missing or "to render"
            n_new += state == "to render"
            values = ["-"] * len(DRAWN)  # where the provider makes cameras of its own
            if provider.draws_cameras:
                drawn = drawn_viewpoint(s.difficulty, set_seed(seed, s.difficulty_name, s.draw, video))
                places = {name: 3 if name in ("distance", "focal") else 1 for name in DRAWN}
                values = [f"{drawn[name]:.{places[name]}f}" for name in DRAWN]
            film = film_path(folder.root, s.name, video).relative_to(folder.root).as_posix()
            rows.append([video, s.name, state, *values, film])
    head = ["video", "set", "state", *DRAWN, "film"]
    lines = [table(head, rows, left=3), *notes]
    lines.append(f"{n_new} of {len(rows)} films would be rendered into {folder.root}; nothing was written")
    return "\n".join(lines)


def summary_lines(summary: Summary, folder: OutputFolder) -> list[str]:
    """The table of films, how often each step was done, and where the time went."""
    head = ["video", "set", "state", "frames", "seconds", "frames/s", "kB"]
    rows = []
    for film in summary.films:
        made = film.state == "made"
        seconds, rate = (f"{film.seconds:.2f}", f"{film.frames / film.seconds:.1f}") if made else ("", "")
        kilobytes = f"{film.n_bytes / 1e3:.0f}"
        rows.append([film.video, film.set_name, film.state, str(film.frames), seconds, rate, kilobytes])
    lines = [table(head, rows, left=3)] if rows else []
    c, s = summary.counts, summary.seconds
    if c.films:
        lines.append(
            f"loaded {_count(c.models, 'model')} and {_count(c.videos, 'video')}, deformed "
            f"{_count(c.deforms, 'frame')}, rendered {_count(c.rasterized, 'image')}, wrote {_count(c.films, 'film')}"
        )
        lines.append(
            f"{s.total:.1f} s: model {s.load_model:.1f}, videos {s.load_video:.1f}, precomputing {s.precompute:.1f}, "
            f"rendering {s.render:.1f}, finishing films {s.finish:.1f}"
        )
    keys = [(film.set_name, film.video) for film in summary.films]
    made = [folder.films[key] for key in keys if key in folder.films]
    if any(film["width"] % 2 or film["height"] % 2 for film in made):
        lines.append("note: films are padded to even sides by repeating the last pixel, as H.264 needs")
    for video, placement in summary.placement.items():
        if placement["disk"]:
            lines.append(f"note: {placement['disk']} frames of {video} did not fit in memory and were kept on disk")
    lines += [f"failed: {sentence(failure.error)}" for failure in summary.failures[1:]]
    lines.append(f"-> {folder.params}")
    return lines


def failure_sentence(summary: Summary) -> str:
    """The reason of the first video that failed; those of the others are among the lines."""
    first, others = summary.failures[0], len(summary.failures) - 1
    return sentence(first.error) + (f" (and {_count(others, 'other video')} failed, see above)" if others else "")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
