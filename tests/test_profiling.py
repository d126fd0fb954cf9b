"""The profiler: times against known sleeps and kernels, nesting, threads, memory, its cost, and the JSON's schema."""

from __future__ import annotations

import copy
import gzip
import json
import statistics
import threading
import time
import timeit
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import blob
from test_split import least_memory

import rapfast
from rapfast import Cameras
from rapfast.profiling import Profiler, count, current, memory, records, section
from rapfast.profiling.table import table

SLEEP = 0.02
"""Seconds."""


class Clock:
    """Milliseconds that blocks take by the test's own clock: a section is no shorter than what is timed inside it and
    no longer than what is timed around it, however busy the machine is."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms.append(1e3 * (time.perf_counter() - start))


def by_path(profiler: Profiler) -> dict[tuple[str, ...], Any]:
    return {node.path: node for node in profiler.nodes()}


def cameras(n: int = 3) -> Cameras:
    eyes = [[1 + 2 * i, -1.0, 3.5] for i in range(n)]
    return Cameras.look_at(eyes, [1.0, 2.0, 3.0], width=48, height=32)


def draw(device: str = "cpu", **options: Any) -> torch.Tensor:
    scene, views = blob().to(device), cameras().to(device)
    return rapfast.rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, views.viewmats, views.Ks, 48, 32,
        sh_degree=1, **options,
    )[0]  # fmt: skip


# --- times -----------------------------------------------------------------------------------------------------------


def test_times_are_those_of_sleeps() -> None:
    around, inside = ({name: Clock() for name in ("outer", "first", "second")} for _ in range(2))
    with Profiler("cpu") as profiler:
        for _ in range(5):
            with around["outer"](), section("outer"), inside["outer"]():
                with around["first"](), section("first"), inside["first"]():
                    time.sleep(SLEEP)
                with around["second"](), section("second"), inside["second"]():
                    time.sleep(2 * SLEEP)
    found = by_path(profiler)
    assert list(found) == [("outer",), ("outer", "first"), ("outer", "second")]
    for path, n in ((("outer", "first"), 1), (("outer", "second"), 2), (("outer",), 3)):
        node = found[path]
        assert node.calls == node.host.calls == 5 and node.gpu.calls == 0
        assert len(node.host.samples) == 5
        assert node.host.smallest >= 1e3 * n * SLEEP - 0.1  # no sleep is shorter than asked for
        bounds = zip(inside[path[-1]].ms, node.host.samples, around[path[-1]].ms, strict=True)
        for least, measured, most in bounds:
            assert least <= measured <= most
        assert node.host.total == pytest.approx(sum(node.host.samples))
    assert found["outer",].host.total >= found["outer", "first"].host.total + found["outer", "second"].host.total


def test_a_section_is_also_a_decorator() -> None:
    @section("named")
    def add(a: int, *, b: int) -> int:
        """Adds."""
        count("sums", 2)
        return a + b

    assert add.__name__ == "add" and add.__doc__ == "Adds."
    assert add(1, b=2) == 3
    with Profiler("cpu") as profiler:
        assert [add(i, b=1) for i in range(4)] == [1, 2, 3, 4]
    node = by_path(profiler)["named",]
    assert node.calls == 4 and node.counts == {"sums": 8}

    def later():
        yield 1

    with pytest.raises(TypeError, match="returns before its body runs"):
        section("named")(later)


def test_exceptions_close_sections() -> None:
    with Profiler("cpu") as profiler:
        with pytest.raises(KeyError), section("outer"), section("inner"):
            raise KeyError("gone")
        with profiler.section("after"):
            pass
    assert list(by_path(profiler)) == [("outer",), ("outer", "inner"), ("after",)]
    assert current() is None


def test_one_profiler_runs_at_a_time() -> None:
    with Profiler("cpu") as first:
        assert current() is first
        with pytest.raises(RuntimeError, match="a profiler is running already"), Profiler("cpu"):
            pass
        assert current() is first
    with Profiler("cpu", enabled=False) as off, section("nothing"):
        assert current() is None
    assert off.nodes() == []
    with pytest.raises(ValueError, match="device must be a CPU or CUDA device, got meta"):
        Profiler("meta")
    with pytest.raises(ValueError, match=r"trace must be a file \.json or \.json\.gz, got 'trace.txt'"):
        Profiler("cpu", trace="trace.txt")


def test_paused_sections_are_not_looked_at() -> None:
    with Profiler("cpu") as profiler, section("outer"):
        with profiler.paused(), section("inner"):
            pass
        with section("seen"):
            pass
        with profiler.paused():
            with profiler.paused(), section("deep"):
                pass
            with section("still"):
                pass
        with Profiler("cpu", enabled=False).paused(), section("also seen"):
            pass
    assert list(by_path(profiler)) == [("outer",), ("outer", "seen"), ("outer", "also seen")]
    assert current() is None


def test_runs_are_added_up_one_by_one() -> None:
    around = Clock()
    with Profiler("cpu") as profiler:
        for n in (1, 3):
            with around(), profiler.run(), section("work"):
                for _ in range(n):
                    with section("step"):
                        time.sleep(SLEEP / 4)
            with section("step"):  # between runs: of none of them
                time.sleep(SLEEP)
    assert profiler.n_runs == 2
    for n, ms, most in zip((1, 3), profiler.run_ms("step"), around.ms, strict=True):
        assert 250 * n * SLEEP - 0.1 <= ms <= most
    found = by_path(profiler)
    assert found["work", "step"].calls == 4 and found["step",].calls == 2
    assert profiler.runs_of(found["step",].host) == [0.0, 0.0]
    assert profiler.run_ms("nothing") == [0.0, 0.0]


def test_without_runs_all_is_one() -> None:
    with Profiler("cpu") as profiler:
        for _ in range(2):
            with section("step"):
                pass
    assert profiler.n_runs == 1 and profiler.run_ms("step") == [by_path(profiler)["step",].host.total]


def test_of_many_calls_some_samples_are_kept() -> None:
    with Profiler("cpu") as profiler:
        for _ in range(5000):
            with section("short"):
                pass
    host = by_path(profiler)["short",].host
    assert host.calls == 5000 and 500 <= len(host.samples) <= 1024
    assert host.smallest <= min(host.samples) and host.largest >= max(host.samples)


@pytest.mark.parametrize("profiled", [False, True])
def test_sections_do_not_stop_a_compiler(profiled: bool) -> None:
    @section("outside")
    def twice(x: torch.Tensor) -> torch.Tensor:
        with section("inside"):
            count("calls")
            return 2 * x

    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    with Profiler("cpu", enabled=profiled) as profiler:
        assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert profiler.nodes() == []


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_have_their_own_sections() -> None:
    together, around = threading.Barrier(3), Clock()

    def work(_: int) -> None:
        together.wait()
        with section("theirs"):
            time.sleep(SLEEP)

    with Profiler("cpu") as profiler, around(), section("mine"), ThreadPoolExecutor(3, "pool") as pool:
        list(pool.map(work, range(3)))
    found = {(node.thread, node.path): node for node in profiler.nodes()}
    assert list(found) == [("main", ("mine",)), ("pool", ("theirs",))]
    theirs = found["pool", ("theirs",)]
    # side by side: none of theirs is in mine, which holds any one of them and no more than passed
    assert theirs.calls == 3 and theirs.host.total >= 3e3 * SLEEP - 0.3
    assert theirs.host.largest <= found["main", ("mine",)].host.total <= around.ms[0]


def test_a_section_that_outlives_the_block_is_dropped() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        with section("late"):
            begun.set()
            ended.wait(10)
        with section("later"):
            pass

    thread = threading.Thread(target=work)
    with Profiler("cpu") as profiler:
        thread.start()
        begun.wait(10)
    ended.set()
    thread.join()
    assert [(node.path, node.calls) for node in profiler.nodes()] == [(("late",), 0)]
    assert records.why_not(profiler.record()) is None


def test_many_threads_count_exactly() -> None:
    def work(_: int) -> None:
        for _ in range(200):
            with section("step"):
                count("things", 3)

    with Profiler("cpu", memory=False) as profiler, ThreadPoolExecutor(8, "pool") as pool:
        list(pool.map(work, range(8)))
    (node,) = profiler.nodes()
    assert node.calls == 1600 and node.counts == {"things": 4800}


def test_a_profiler_may_end_between_two_steps_of_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from rapfast.profiling import profiler as module

    def meanwhile() -> bool:  # as another thread's paused() does while this one counts
        module._current = None
        return False

    with Profiler("cpu"), section("outer"):
        monkeypatch.setattr(torch.compiler, "is_compiling", meanwhile)
        count("things")
    assert current() is None


# --- cost ------------------------------------------------------------------------------------------------------------


def _ns(statement: str) -> float:
    """Of the fastest of many repetitions, which nothing disturbed."""
    setup = "from rapfast.profiling import section\n@section('f')\ndef f(): pass\ndef g(): pass"
    return 1e9 * min(timeit.repeat(statement, setup, number=2000, repeat=25)) / 2000


def test_off_it_costs_next_to_nothing() -> None:
    """Bounds are ten times what two slow cores need; a stage takes at least tens of microseconds."""
    assert _ns("with section('x'): pass") < 2500
    assert _ns("f()") - _ns("g()") < 1500


def test_on_it_costs_microseconds() -> None:
    with Profiler("cpu"):
        assert _ns("with section('x'): pass") < 60_000


# --- memory ----------------------------------------------------------------------------------------------------------

MIB = 2**20


@pytest.mark.skipif(
    memory.host_bytes() is None or not memory.reset_host_peak(), reason="the system does not tell of a process's peaks"
)
def test_peaks_of_host_memory_are_each_sections_own() -> None:
    def touch(mib: int) -> None:
        torch.ones(mib * MIB // 4).sum()

    memory.release_free_pages()
    with Profiler("cpu", memory=True) as profiler, section("outer"):
        with section("small"):
            touch(64)
        memory.release_free_pages()  # else a part of them may still be there beside the next section's
        with section("large"):
            touch(192)
        with section("none"):
            pass
    rise = {node.path[-1]: node.memory["host"]["rise"] / MIB for node in profiler.nodes()}
    assert 60 <= rise["small"] <= 100 and 188 <= rise["large"] <= 230 and rise["none"] <= 8
    assert rise["large"] - 1 <= rise["outer"] <= 240
    for node in profiler.nodes():
        assert node.memory["host"]["peak"] >= node.memory["host"]["after"]


@pytest.mark.cuda
def test_peaks_of_gpu_memory_are_exact() -> None:
    def touch(mib: int) -> torch.Tensor:
        return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")

    torch.cuda.synchronize()
    with Profiler("cuda", memory=True) as profiler, section("outer"):
        with section("small"):
            touch(64)
        kept = touch(32)
        with section("large"):
            touch(192)
    found = {node.path[-1]: node.memory["gpu"] for node in profiler.nodes()}
    assert {name: use["rise"] // MIB for name, use in found.items()} == {"outer": 224, "small": 64, "large": 192}
    assert found["outer"]["after"] - found["small"]["after"] == kept.nbytes


# --- rapfast's own stages --------------------------------------------------------------------------------------------

STAGES = {"project", "color", "bin", "blend", "composite"}


def test_stages_report_and_change_no_pixel() -> None:
    plain = draw()
    with Profiler("cpu") as profiler, section("call"):
        profiled = draw()
    assert torch.equal(plain, profiled)
    found = by_path(profiler)
    assert {path[1] for path in found if path[:1] == ("call",) and len(path) == 2} == STAGES
    assert sum(found["call", name].host.total for name in STAGES) <= found["call",].host.total


@pytest.mark.cuda
@pytest.mark.parametrize("split", [False, True])
def test_stages_of_a_native_call(split: bool) -> None:
    max_memory = least_memory(partial(draw, "cuda")) if split else None
    plain = draw("cuda", max_memory=max_memory)
    with Profiler("cuda") as profiler:
        for _ in range(3):
            with profiler.run(), section("call"):
                profiled = draw("cuda", max_memory=max_memory)
    assert torch.equal(plain, profiled)
    found = by_path(profiler)
    assert {path[1] for path in found if path[:1] == ("call",) and len(path) == 2} >= STAGES
    for name in STAGES:
        assert all(ms > 0 for ms in profiler.run_ms(name)), name
    assert (found["call", "project"].gpu.calls > 3) == split
    inside = sum(found["call", name].gpu.total for name in STAGES)
    assert 0 < inside <= found["call",].gpu.total * 1.01 + 0.1
    with Profiler("cuda", stages=False) as profiler, section("call"):
        draw("cuda")
    assert not {path[-1] for path in by_path(profiler)} & {"project", "bin", "blend"}


@pytest.mark.cuda
def test_gpu_times_are_those_of_kernels() -> None:
    """Against CUDA events of torch's own, of a kernel that spins for a known number of cycles: 5 %, or 50 us."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    expected = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        expected.append(begin.elapsed_time(end))
    with Profiler("cuda") as profiler:
        for _ in range(5):
            with section("spin"):
                torch.cuda._sleep(cycles)
        with section("nothing"):
            pass
    found = by_path(profiler)
    ms = statistics.median(expected)
    assert statistics.median(found["spin",].gpu.samples) == pytest.approx(ms, rel=0.05, abs=0.05)
    assert found["spin",].host.largest < ms / 2  # the host does not wait for a kernel
    assert found["nothing",].gpu.largest < 0.5


@pytest.mark.cuda
def test_a_section_may_end_on_a_stream_that_is_ahead() -> None:
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    with Profiler("cuda") as profiler:
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        with section("across"):
            torch.cuda.set_stream(stream)
        torch.cuda.set_stream(before)
        stream.synchronize()
        profiler._read_pending(wait=False)
        assert len(profiler._pending) == 1  # its begin has not come to pass, though its end has
    assert by_path(profiler)["across",].gpu.total == 0


@pytest.mark.cuda
def test_a_captured_graph_holds_no_events() -> None:
    x = torch.ones(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with Profiler("cuda") as profiler:
        with torch.cuda.graph(graph), section("captured"):
            y = x + 1
        with section("replay"):
            graph.replay()
    assert torch.equal(y, x + 1)
    found = by_path(profiler)
    assert found["captured",].gpu.calls == 0 and found["captured",].calls == 1
    assert found["replay",].gpu.calls == 1


@pytest.mark.cuda
def test_many_gpu_sections_are_read_as_they_pass() -> None:
    with Profiler("cuda") as profiler:
        for _ in range(6000):
            with section("short"):
                pass
        assert len(profiler._pending) < 6000
    assert by_path(profiler)["short",].gpu.calls == 6000


# --- files -----------------------------------------------------------------------------------------------------------


def made(tmp_path: Path) -> Path:
    with Profiler("cpu", memory=True) as profiler:
        for _ in range(3):
            with profiler.run(), section("call"):
                count("views", 3)
                draw()
    path = tmp_path / "profile.json"
    profiler.save(path, ["rapfast", "render"])
    return path


def test_the_json_says_all(tmp_path: Path) -> None:
    content = records.load(made(tmp_path))
    assert content["format"] == records.FORMAT and content["runs"] == 3
    assert content["command"] == ["rapfast", "render"] and content["device"] == "cpu"
    assert content["machine"]["versions"]["rapfast"] == rapfast.__version__
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert content["machine"]["cpu"]["name"] and content["machine"]["gpu"] is None
    call, *inside = content["sections"]
    assert call["path"] == ["call"] and call["calls"] == 3 and call["counts"] == {"views": 9}
    assert call["host_ms"]["total"] == pytest.approx(sum(call["host_ms"]["runs"]))
    assert len(call["host_ms"]["samples"]) == 3 and call["gpu_ms"] is None
    assert {s["path"][1] for s in inside} == STAGES
    text = str(table(content).columns[0]._cells)
    assert "call" in text and "blend" in text and "rest" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="rapfast profile 9"), '"format" must be'),
        (lambda c: c.pop("runs"), '"runs" must be a whole number, got nothing'),
        (lambda c: c.update(runs=0), '"runs" must be at least 1, got 0'),
        (lambda c: c.update(machine={}), "names neither a GPU nor a processor"),
        (lambda c: c.update(sections={}), '"sections" must be an array'),
        (lambda c: c["sections"].append(3), "must be an object, got 3"),
        (lambda c: c["sections"][0].update(path=[]), '"path" must be the names'),
        (lambda c: c["sections"][0].update(calls=-1), '"calls" must be a whole number'),
        (lambda c: c["sections"][0]["host_ms"].update(total="1"), '"host_ms.total" must be a number >= 0'),
        (lambda c: c["sections"][0]["host_ms"].update(median=float("nan")), '"host_ms.median" must be a number >= 0'),
        (lambda c: c["sections"][0]["host_ms"].update(samples=[1, None]), '"host_ms.samples" must be an array'),
        (lambda c: c["sections"][0]["host_ms"].update(runs=[1.0]), "must hold one number for each of 3 runs, got 1"),
        (lambda c: c["sections"][0]["host_ms"].update(total=10**400), '"host_ms.total" must be a number >= 0'),
        (lambda c: c["sections"][0].update(counts={"views": "3"}), '"counts" must hold numbers by name'),
        (lambda c: c.update(machine={"gpu": "H200"}), "names neither a GPU nor a processor"),
        (lambda c: c["sections"][0].update(memory={"gpu": {"peak": -1, "rise": 1, "after": 0}}), "in bytes"),
        (lambda c: c["sections"][0].update(memory={"gpu": {}}), '"memory" must hold peak, rise, after in bytes'),
    ],
)
def test_damaged_profiles_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = made(tmp_path)
    content = copy.deepcopy(records.load(path))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        records.load(path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not valid JSON"):
        records.load(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ValueError, match="not valid JSON"):
        records.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must be an object"):
        records.load(path)
    with pytest.raises(FileNotFoundError):
        records.load(tmp_path / "absent.json")


def test_a_trace_for_chrome(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with Profiler("cpu", trace=path), section("my section"):
        torch.ones(8).sum()
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"my section", "aten::sum"} <= names
    with pytest.raises(FileNotFoundError), Profiler("cpu", trace=tmp_path / "no" / "trace.json"):
        pass
    assert current() is None


def test_the_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Profiler("cpu") as profiler, section("[bold]x[/]"), section("inside [0]"):
        count("things [m]", 2)
    profiler.print_table()
    out = capsys.readouterr().out
    assert "[bold]x[/]" in out and "  inside [0]" in out and "2 things [m]" in out and "rest" in out
