"""A profile as a table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rapfast.profiling.machine import name_of


def print_table(record: dict[str, Any], console: Console | None = None) -> None:
    """The record's sections, each below the one it is in; below them what of a section none of its own explains."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 140))  # a file has no width
    console.print(table(record))


def table(record: dict[str, Any]) -> Table:
    """The same for who prints it otherwise."""
    sections = record["sections"]
    on_gpu = any(section["gpu_ms"] for section in sections)
    kinds = [k for k in ("gpu", "host") if any(k in (section["memory"] or {}) for section in sections)]
    several = f", sums of {record['runs']} runs" if record["runs"] > 1 else ""
    found = Table(title=f"{name_of(record['machine'])}{several}", title_justify="left", box=None, pad_edge=False)
    found.add_column("section", no_wrap=True)
    for head in ("calls", "host ms", "share", "a call"):
        found.add_column(head, justify="right")
    if on_gpu:
        found.add_column("GPU ms", justify="right")
        found.add_column("GPU a call", justify="right")
    for kind in kinds:
        found.add_column(f"{'GPU' if kind == 'gpu' else 'host'} peak MiB", justify="right")
        found.add_column("rise", justify="right")
    found.add_column("counts")

    by_place = {(section["thread"], *section["path"]): section for section in sections}
    thread = "main"
    for at, section in enumerate(sections):
        place = (section["thread"], *section["path"])
        if section["thread"] != thread:
            thread = section["thread"]
            found.add_row(f"[dim]beside it, thread {escape(thread)}[/]")
        indent = "  " * (len(section["path"]) - 1 + (thread != "main"))
        cells = [indent + escape(section["path"][-1]), f"{section['calls']:,}"]
        cells += _time_cells(section["host_ms"], _total(by_place.get(place[:-1]), "host_ms"))
        if on_gpu:
            cells += _time_cells(section["gpu_ms"], None)[::2]
        for kind in kinds:
            use = (section["memory"] or {}).get(kind)
            cells += ["", ""] if use is None else [_number(use["peak"] / 2**20), _number(use["rise"] / 2**20)]
        found.add_row(*cells, escape(_counts(section)))
        _add_rest(found, sections, at, by_place, len(cells) + 1)
    return found


def _add_rest(found: Table, sections: list[dict[str, Any]], at: int, by_place: dict[Any, Any], n_cells: int) -> None:
    """Behind the last section of each one that ends here, what of its host time they leave."""
    here = sections[at]
    following = sections[at + 1] if at + 1 < len(sections) else {"thread": None, "path": []}
    for depth in range(len(here["path"]) - 1, 0, -1):
        around = (here["thread"], *here["path"][:depth])
        if (following["thread"], *following["path"][:depth]) == around or around not in by_place:
            break
        total = _total(by_place[around], "host_ms")
        inside = [_total(s, "host_ms") for p, s in by_place.items() if p[:-1] == around]
        if total and any(inside):
            rest = max(0.0, total - sum(filter(None, inside)))
            indent = "  " * (depth + (here["thread"] != "main"))
            cells = [f"{indent}[dim]rest[/]", "", f"[dim]{_number(rest)}[/]", f"[dim]{100 * rest / total:.0f} %[/]"]
            found.add_row(*cells, *[""] * (n_cells - len(cells)))


def _total(section: dict[str, Any] | None, clock: str) -> float | None:
    times = None if section is None else section[clock]
    return None if times is None else times["total"]


def _time_cells(times: dict[str, Any] | None, around: float | None) -> list[str]:
    """Total, share of what is around it, one call."""
    if times is None:
        return ["", "", ""]
    share = f"{100 * times['total'] / around:.0f} %" if around else ""
    return [_number(times["total"]), share, _number(times["median"])]


def _counts(section: dict[str, Any]) -> str:
    """Such as "24 views, 310 / s"."""
    seconds = (_total(section, "host_ms") or 0.0) / 1e3
    parts = []
    for name, n in section["counts"].items():
        rate = f", {_number(n / seconds)} / s" if seconds else ""
        parts.append(f"{n:,g} {name}{rate}")
    return "; ".join(parts)


def _number(value: float) -> str:
    """Three significant digits, and all before the point."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
