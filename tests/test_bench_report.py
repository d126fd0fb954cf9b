"""bench/report.py: from made-up runs to tables, plots and the files that are kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "report.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from test_bench import work  # noqa: E402

from bench import floors, report, report_runs  # noqa: E402


def _record(case: str, backend: str, batch: int, ms: float, **more: Any) -> dict[str, Any]:
    size = (1708, 960) if "1708x960" in case else (854, 480)
    info = {
        "case": case, "backend": backend, "batch": batch, "direction": "fwd", "ms_per_view": ms,
        "peak_mib": 100.0 * batch, "n_gaussians": 200_000 if "200k" in case else 500_000,
        "width": size[0], "height": size[1], "channels": 3,
        "visible_share": 0.06, "intersections_per_view": 80_400.0, "stages": None, "threads": 2, **more,
    }  # fmt: skip
    return {"extra_info": info}


def _gpu_run(time: str = "2026-01-02T03:04:05+00:00", faster: float = 4.0) -> dict[str, Any]:
    stages = {"project": 0.01, "color": 0.01, "bin": 0.015, "blend": 0.03, "composite": 0.005}
    benchmarks = []
    for case in ("room-200k-854x480", "room-500k-854x480"):
        for batch, ms in ((1, 0.4), (8, 0.28), (32, 0.22)):
            benchmarks += [_record(case, "gsplat", batch, ms)]
            benchmarks += [_record(case, "rapfast", batch, ms / faster, peak_mib=5.5 * batch, stages=stages)]
    benchmarks += [_record("room-500k-854x480", "gsplat-loop", 8, 1.07)]
    benchmarks += [_record("room-500k-1708x960", b, 8, ms) for b, ms in (("gsplat", 0.6), ("rapfast", 0.2))]
    benchmarks += [_record(report.CPU_CASE, b, 1, ms) for b, ms in (("reference", 3000), ("rapfast", 60))]
    versions = {"rapfast": "0.1.0", "torch": "2.11.0", "gsplat": "1.5.3", "cuda": "13.0", "numpy": "2.0"}
    return {
        "machine_info": {
            "gpu": {"name": "NVIDIA H200", "driver": "580.65"},
            "cpu": {"name": "Fast(R) CPU @ 3GHz", "cores": 16},
            "versions": versions,
            "scale": "full",
        },
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": time,
        "benchmarks": benchmarks,
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with what the report reads and writes."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(_gpu_run()))
    marked = {"docs/benchmarks.md": report.DOCS_MARKERS, "docs/performance.md": report.FLOORS_MARKERS}
    for path, markers in {**marked, "README.md": report.README_MARKERS}.items():
        (tmp_path / path).write_text(f"before\n\n{markers[0]}\nold table\n{markers[1]}\n\nafter\n")
    return tmp_path


def _report(repository: Path, *arguments: str) -> int:
    return report.main(["--root", str(repository), *arguments])


def test_save_names_the_file_by_machine_and_day(repository: Path) -> None:
    assert _report(repository, "save", str(repository / "run.json")) == 0
    assert _report(repository, "save", str(repository / "run.json")) == 0
    names = sorted(path.name for path in (repository / "bench" / "results").iterdir())
    assert names == ["nvidia-h200-2026-01-02-2.json", "nvidia-h200-2026-01-02.json"]
    saved = json.loads((repository / "bench" / "results" / names[0]).read_text())
    assert saved == _gpu_run()


def test_a_cpu_run_is_named_by_its_processor(repository: Path) -> None:
    data = _gpu_run()
    data["machine_info"]["gpu"] = None
    (repository / "run.json").write_text(json.dumps(data))
    assert _report(repository, "save", str(repository / "run.json")) == 0
    assert [p.name for p in (repository / "bench" / "results").iterdir()] == ["fast-cpu-3ghz-2026-01-02.json"]


def test_a_suite_that_was_run_in_parts_is_kept_as_one(repository: Path) -> None:
    whole = json.loads((repository / "run.json").read_text())
    both = {"room-200k-854x480", "room-500k-854x480"}

    def part(name: str, cases: set[str], backends: set[str], ms: float, hour: int) -> str:
        chosen = []
        for benchmark in copy.deepcopy(whole["benchmarks"]):
            info = benchmark["extra_info"]
            if info["case"] not in cases or info["batch"] != 8 or info["backend"] not in backends:
                continue
            chosen.append(benchmark)
            benchmark["fullname"], info["ms_per_view"] = f"test_forward[{info['case']}-{info['backend']}]", ms
        data = whole | {"benchmarks": chosen, "datetime": f"2026-01-02T0{hour}:00:00+00:00"}
        (repository / name).write_text(json.dumps(data))
        return str(repository / name)

    one = part("one.json", {"room-500k-854x480"}, {"gsplat", "rapfast"}, 1.0, 3)
    two = part("two.json", both, {"gsplat", "gsplat-loop", "rapfast"}, 2.0, 4)
    assert _report(repository, "save", one, two) == 0
    (kept,) = (repository / "bench" / "results").iterdir()
    run = report_runs.read_run(kept)
    # a loop of the second process is not set beside calls of the first
    assert {key: info["ms_per_view"] for key, info in run.records.items()} == {
        ("room-500k-854x480", "gsplat", 8): 1.0, ("room-500k-854x480", "rapfast", 8): 1.0,
        ("room-200k-854x480", "gsplat", 8): 2.0, ("room-200k-854x480", "rapfast", 8): 2.0,
    }  # fmt: skip
    assert run.time == "2026-01-02T04:00:00+00:00"
    parts = json.loads(kept.read_text())["parts"]
    assert [(p["file"], p["benchmarks"]) for p in parts] == [("one.json", 2), ("two.json", 2)]


@pytest.mark.parametrize(("field", "what"), [("machine_info", "machine or versions"), ("commit_info", "commit")])
def test_parts_of_another_kind_are_refused(
    repository: Path, field: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((repository / "run.json").read_text())
    (repository / "other.json").write_text(json.dumps(data | {field: data[field] | {"id": "another"}}))
    assert _report(repository, "save", str(repository / "run.json"), str(repository / "other.json")) == 1
    assert f"other.json is of another {what} than" in capsys.readouterr().err
    assert not list((repository / "bench" / "results").iterdir())


def test_report_writes_the_tables(repository: Path) -> None:
    _report(repository, "save", str(repository / "run.json"))
    assert _report(repository, "--no-plots") == 0
    readme = (repository / "README.md").read_text()
    assert readme.startswith("before\n\n<!-- benchmark table -->") and readme.endswith("-->\n\nafter\n")
    assert "old table" not in readme
    assert "| ms per view, batch of 8 | gsplat 1.5.3 | rapfast | times faster |" in readme
    assert "| room-500k-854x480 | 0.280 | 0.070 | 4.00 |" in readme
    assert "1708x960" not in readme  # measured for the plot alone
    assert "60.0 ms (bar 250 ms: met), 50.0 times the float32 reference, 3,000 ms (bar 20: met)" in readme

    docs = (repository / "docs" / "benchmarks.md").read_text()
    assert "### NVIDIA H200" in docs and "driver 580.65, CUDA 13.0" in docs and "(0123456789)" in docs
    assert "| room-500k-854x480 | 8 | 6.0 % | 0.080 M | 0.280 | 1.07 | 0.070 | 4.00 | 800 | 44.0 |" in docs
    assert "| room-200k-854x480 | 1 | 6.0 % | 0.080 M | 0.400 | – | 0.100 | 4.00 | 100 | 5.50 |" in docs
    assert "| room-200k-854x480 | 8 | 0.010 | 0.010 | 0.015 | 0.030 | 0.005 |" in docs
    before = docs
    assert _report(repository, "--no-plots") == 0
    assert (repository / "docs" / "benchmarks.md").read_text() == before


def test_steps_in_the_other_order_have_the_floors_of_their_work() -> None:
    info = {"work": work()._asdict(), "steps": {"group": 0.002, "sort": 0.004, "deal": 0.001}}
    lines = report.floors_table(info).splitlines()
    emit, depth = (floors.floors(work())[name] for name in ("emit", "depth"))
    (group,) = [line for line in lines if line.startswith("| bin: group |")]
    (sort,) = [line for line in lines if line.startswith("| bin: sort |")]
    assert f"| {emit.us:.3f} | bytes | 2.00 |" in group and f"| {depth.us:.3f} | bytes | 4.00 |" in sort
    assert not any("bin: emit" in line or "bin: depth" in line for line in lines)


def test_floors_stand_beside_what_was_measured(repository: Path) -> None:
    data = _gpu_run()
    counted = work(intersections=150_500.0)
    steps = {"prepare": 0.0003, "cull": 0.0035, "record": 0.002, "tally": 0.0001, "depth": 0.01, "blend": 0.032}
    for record in data["benchmarks"]:
        info = record["extra_info"]
        if (info["case"], info["backend"], info["batch"]) == ("room-500k-854x480", "rapfast", 8):
            info |= {"work": counted._asdict(), "steps": steps, "launches": 35.0, "gpu_idle": 0.0123}
    (repository / "run.json").write_text(json.dumps(data))
    before = (repository / "docs" / "performance.md").read_text()
    _report(repository, "save", str(repository / "run.json"))
    assert _report(repository, "--no-plots") == 0
    docs = (repository / "docs" / "performance.md").read_text()
    assert "### room-500k-854x480, batch of 8" in docs and "### room-200k" not in docs and "old table" not in docs
    cull = floors.floors(counted)["cull"]
    assert f"| project: cull | 2.81 | 30.0 | 0 | {cull.us:.3f} | operations | 3.50 | {3.5 / cull.us:.2f} |" in docs
    assert "| project: prepare | – | – | – | – | – | 0.300 | – |" in docs
    assert "| bin: tally | – | – | – | – | – | 0.100 | – |" in docs
    emit = floors.floors(counted)["emit"]
    assert f"| bin: emit | {emit.bytes / 1e6:.2f} | {emit.operations / 1e6:.2f} | 0 | {emit.us:.3f} | bytes" in docs
    assert "bin: group" not in docs
    # the stage's own time, which the record has beside its kernels'
    assert "| **blend** |" in docs and "| operations | 30.0 | " in docs
    assert "| 14.0 | 1.2 % | 47.9 | 70.0 |" in docs  # 35 launches of 3.2 us, the kernels, the call
    # a run that counted nothing leaves the file as it is
    for path in (repository / "bench" / "results").iterdir():
        path.unlink()
    (repository / "run.json").write_text(json.dumps(_gpu_run()))
    (repository / "docs" / "performance.md").write_text(before)
    _report(repository, "save", str(repository / "run.json"))
    assert _report(repository, "--no-plots") == 0
    assert (repository / "docs" / "performance.md").read_text() == before


def test_ratios_are_the_rows_of_the_readme(repository: Path) -> None:
    run = report_runs.read_run(repository / "run.json")
    assert dict(report.claimed_ratios(run)) == pytest.approx({"room-200k-854x480": 4.0, "room-500k-854x480": 4.0})
    _report(repository, "save", str(repository / "run.json"))
    _report(repository, "--no-plots")
    rows = [line for line in (repository / "README.md").read_text().splitlines() if line.startswith("| room-")]
    assert len(rows) == len(report.claimed_ratios(run))


def test_ratios_run_where_they_are_asked_for_and_say_what_they_need() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--device", "cpu"]
    everything = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert everything.returncode == 0 and "test_ratios" not in everything.stdout, everything.stdout
    if torch.cuda.is_available():
        return  # they would run: minutes of it are not for here
    asked = [*command, "-m", "ratios", "-k", "room-200k"]
    env = {**os.environ, "RAPFAST_REQUIRE_CUDA": "1"}
    done = subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RAPFAST_REQUIRE_CUDA=1, but torch sees no GPU" in done.stdout, done.stdout


def test_the_newest_run_of_a_machine_counts_whole(repository: Path) -> None:
    results = repository / "bench" / "results"
    (results / "z.json").write_text(json.dumps(_gpu_run("2026-01-01T00:00:00+00:00", faster=2.0)))
    (results / "a.json").write_text(json.dumps(_gpu_run("2026-01-03T00:00:00+00:00", faster=5.0)))
    runs = report_runs.newest_runs(results)
    assert len(runs) == 1 and runs[0].ratio("room-200k-854x480", 8, "gsplat") == pytest.approx(5.0)


def test_what_the_newest_run_did_not_measure_is_of_the_one_before_and_marked(repository: Path) -> None:
    results, newer = repository / "bench" / "results", _gpu_run("2026-01-03T00:00:00+00:00", faster=5.0)
    newer["commit_info"] = {"id": "fedcba9876543210"}
    # of the newer run's batch of 8 at 200 k gsplat is missing: what is there is not set beside the older one's
    newer["benchmarks"] = [
        b for b in newer["benchmarks"]
        if (b["extra_info"]["case"], b["extra_info"]["batch"]) == ("room-500k-854x480", 8)
        or (b["extra_info"]["case"], b["extra_info"]["backend"]) == ("room-200k-854x480", "rapfast")
    ]  # fmt: skip
    (results / "newer.json").write_text(json.dumps(newer))
    (results / "older.json").write_text(json.dumps(_gpu_run()))
    (run,) = report_runs.newest_runs(results)
    assert run.ratio("room-500k-854x480", 8, "gsplat") == pytest.approx(5.0)
    assert run.ratio("room-500k-854x480", 1, "gsplat") == pytest.approx(4.0)
    assert run.ratio("room-200k-854x480", 8, "gsplat") is None
    assert run.mark("room-500k-854x480", 8) == "" and run.mark("room-500k-854x480", 1) == " [1]"
    assert _report(repository, "--no-plots") == 0
    docs = (repository / "docs" / "benchmarks.md").read_text()
    assert "| room-500k-854x480 | 8 |" in docs and "| room-500k-854x480 [1] | 1 |" in docs and "(fedcba9876)" in docs
    assert "Measured in earlier runs alone: [1] rapfast 0123456789, 2026-01-02." in docs
    readme = (repository / "README.md").read_text()
    assert "threads; rapfast 0123456789, 2026-01-02), room of 200 k" in readme and "[1]" not in readme


def test_missed_bars_are_called_missed(repository: Path) -> None:
    data = _gpu_run()
    for record in data["benchmarks"]:
        if (record["extra_info"]["case"], record["extra_info"]["backend"]) == (report.CPU_CASE, "rapfast"):
            record["extra_info"]["ms_per_view"] = 300.0
    (repository / "run.json").write_text(json.dumps(data))
    sentence = report.cpu_sentence(report_runs.read_run(repository / "run.json"))
    assert "300 ms (bar 250 ms: missed), 10.0 times the float32 reference, 3,000 ms (bar 20: missed)" in sentence


def test_problems_are_told_in_sentences(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(repository) == 1
    assert "holds no run: python bench/report.py save RUN.json puts one there" in capsys.readouterr().err
    _report(repository, "save", str(repository / "run.json"))
    (repository / "README.md").write_text("no markers")
    assert _report(repository, "--no-plots") == 1
    assert "README.md must hold the lines <!-- benchmark table --> and" in capsys.readouterr().err
    assert (repository / "README.md").read_text() == "no markers"
    assert "NVIDIA H200" in (repository / "docs" / "benchmarks.md").read_text()  # the rest was written
    (repository / "run.json").write_text('{"benchmarks": []}')
    assert _report(repository, "save", str(repository / "run.json")) == 1
    assert "run.json: not a run of this suite: 'machine_info' is missing" in capsys.readouterr().err


def test_plots_show_time_against_gaussians_batch_and_pixels(repository: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib, of the extra bench")
    _report(repository, "save", str(repository / "run.json"))
    assert _report(repository) == 0
    path = repository / "docs" / "benchmarks-nvidia-h200.svg"
    drawn = path.read_bytes()
    assert b"<svg" in drawn
    assert "(benchmarks-nvidia-h200.svg)" in (repository / "docs" / "benchmarks.md").read_text()
    path.unlink()
    assert _report(repository) == 0
    assert path.read_bytes() == drawn
