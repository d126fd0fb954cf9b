"""Where a run's time and memory go.

    from rapfast.profiling import Profiler, section

    with Profiler(memory=True) as profiler:
        with section("load"):
            scene = rapfast.load_scene("scene.ply")
        ...
    profiler.print_table()
    profiler.save("profile.json", command=["my", "program"])

`section` acts on whichever profiler is running, and does next to nothing where none is: rapfast's own stages carry it.
The rest, which a program that is not profiled does not load: `records` (the JSON), `table`, `compare`, `quick`,
`transfers`, `machine`.
"""

from __future__ import annotations

from rapfast.profiling.profiler import Profiler, count, current, native_stages, section

__all__ = ["Profiler", "count", "current", "native_stages", "section"]
