"""Comparing measurements: bounds against what is known, made-up runs with and without a regression, files, the plot."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from rapfast.profiling import compare, records
from rapfast.profiling.statistics import Sample, ratio, sample, student_t, summary

MACHINE = {"cpu": {"name": "Some CPU"}, "gpu": {"name": "Some GPU"}, "versions": {}}


def noisy(ms: float, n: int, spread: float = 0.02, seed: int = 0) -> list[float]:
    rng = random.Random(f"{ms} {n} {seed}")
    return [ms * math.exp(rng.gauss(0, spread)) for _ in range(n)]


def times(values: list[float], runs: int) -> dict[str, Any]:
    of_runs = values if len(values) == runs else [sum(values)] + [0.0] * (runs - 1)
    return {"total": sum(values), "median": statistics.median(values), "min": min(values), "max": max(values),
            "runs": of_runs, "samples": values}  # fmt: skip


def profile(path: Path, sections: dict[str, list[float]], runs: int = 1, rise_mib: float | None = None) -> Path:
    memory = None if rise_mib is None else {"gpu": {"peak": 1 << 30, "rise": int(rise_mib * 2**20), "after": 0}}
    content = {
        "format": records.FORMAT, "time": "2026-01-02T03:04:05+00:00", "command": ["rapfast"], "device": "cuda:0",
        "runs": runs, "machine": MACHINE,
        "sections": [
            {"thread": "main", "path": name.split("/"), "calls": len(values), "host_ms": times(values, runs),
             "gpu_ms": None, "memory": memory, "counts": {}}
            for name, values in sections.items()
        ],
    }  # fmt: skip
    assert records.why_not(content) is None
    path.write_text(json.dumps(content))
    return path


def benchmark(path: Path, found: dict[str, list[float]], with_data: bool = True, peak: float | None = None) -> Path:
    """Milliseconds, as pytest-benchmark writes them."""
    entries = []
    for name, values in found.items():
        low, median, high = statistics.quantiles([ms / 1e3 for ms in values], n=4)
        stats: dict[str, Any] = {"median": median, "iqr": high - low, "rounds": len(values)}
        if with_data:
            stats["data"] = [ms / 1e3 for ms in values]
        extra = {} if peak is None else {"peak_mib": peak, "device": "cuda"}
        entries.append({"fullname": f"bench/test_x.py::{name}", "stats": stats, "extra_info": extra})
    path.write_text(json.dumps({"machine_info": MACHINE, "benchmarks": entries}))
    return path


def verdicts(before: Path, after: Path, **options: Any) -> dict[str, str]:
    found = compare.compare(compare.read(before), compare.read(after), **options)
    return {f"{row.name} {row.unit}": row.verdict for row in found.rows}


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),  # of published tables
    [(0.975, 1, 12.706), (0.995, 1, 63.657), (0.975, 2, 4.303), (0.995, 2, 9.925), (0.975, 3, 3.182),
     (0.995, 3, 5.841), (0.975, 5, 2.571), (0.995, 5, 4.032), (0.975, 10, 2.228), (0.995, 10, 3.169),
     (0.995, 30, 2.750), (0.995, 31, 2.744), (0.9995, 3, 12.924), (0.9995, 10, 4.587), (0.975, 1000, 1.962)],
)  # fmt: skip
def test_students_t(p: float, freedom: float, expected: float) -> None:
    assert student_t(p, freedom) == pytest.approx(expected, rel=2e-4)


def test_bounds_hold_the_truth_as_often_as_they_say() -> None:
    """Of 400 made-up comparisons with a true ratio of 1.2, 95 % bounds hold it in 91 to 99 %."""
    for n, seed in ((4, 1), (30, 2)):
        rng = random.Random(seed)
        held = 0
        for _ in range(400):
            first, second = ([math.exp(rng.gauss(m, 0.05)) for _ in range(n)] for m in (0, math.log(1.2)))
            found = ratio(sample(first), sample(second), confidence=0.95)
            held += found.low <= 1.2 <= found.high
        assert 0.91 <= held / 400 <= 0.99, (n, held)


def test_of_many_things_that_did_not_change_none_is_flagged(tmp_path: Path) -> None:
    """200 benchmarks on a machine that disturbs every round by half: at 0.8 all bounds hold in four of five
    comparisons, and a real regression among them is found."""

    def run(path: Path, rng: random.Random, **more: list[float]) -> Path:
        values = {f"x{i}": [math.exp(rng.gauss(0, 0.5)) for _ in range(12)] for i in range(200)}
        return benchmark(path, values | more)

    flagged, rng = 0, random.Random(0)
    for _ in range(10):
        a, b = (run(tmp_path / name, rng, slow=noisy(ms, 12)) for name, ms in (("a.json", 1.0), ("b.json", 1.3)))
        found = verdicts(a, b, threshold=0.0, confidence=0.8)
        assert found.pop("bench/test_x.py::slow ms") == "slower"
        flagged += set(found.values()) != {"same"}
    assert flagged <= 5
    # where each thing stands alone, some are flagged in every comparison
    first, second = compare.read(a), compare.read(b)
    alone = [ratio(first.samples[key], second.samples[key], 0.8) for key in first.samples]
    assert sum(found.low > 1 or found.high < 1 for found in alone) > 10


def test_one_disturbed_measurement_hides_nothing() -> None:
    first, second = noisy(1.0, 20), noisy(1.2, 20)
    second[7] *= 50
    found = ratio(sample(first), sample(second))
    assert 1.15 < found.low < 1.2 < found.high < 1.26


def test_what_is_known_from_a_summary_is_near_what_the_data_say() -> None:
    values = noisy(3.0, 41)
    low, median, high = statistics.quantiles(values, n=4)
    of_summary, of_data = summary(median, high - low, 41), sample(values)
    assert of_summary.median == of_data.median and of_summary.spread == pytest.approx(of_data.spread, rel=0.05)
    assert ratio(Sample(1.0, None, 1), of_data).low is None
    assert ratio(Sample(2.0, 0.0, 3), Sample(3.0, 0.0, 3)) == (1.5, 1.5, 1.5)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_regression_is_told_from_noise(tmp_path: Path) -> None:
    before = profile(tmp_path / "a.json", {"x": noisy(10, 9), "y": noisy(10, 9), "z": noisy(10, 9), "n": [9.0, 11.0]})
    after = {"x": noisy(13, 9, seed=1), "y": noisy(10.1, 9, seed=1), "z": noisy(7, 9, seed=1), "n": [12.0, 13.0]}
    found = verdicts(before, profile(tmp_path / "b.json", after))
    # n is 25 % slower, but two measurements of such spread may be anything
    assert found == {"x ms": "slower", "y ms": "same", "z ms": "faster", "n ms": "same"}
    assert verdicts(before, tmp_path / "b.json", threshold=0.5) == dict.fromkeys(found, "same")
    assert set(verdicts(before, before).values()) == {"same"}


def test_repeated_profiles_are_compared_by_their_runs(tmp_path: Path) -> None:
    a = profile(tmp_path / "a.json", {"x": noisy(10, 5)}, runs=5)
    b = profile(tmp_path / "b.json", {"x": noisy(15, 5)}, runs=5)
    found = compare.read(a).samples["x", compare.TIME]
    assert found.n == 5
    assert verdicts(a, b) == {"x ms": "slower"}


def test_single_measurements_are_not_judged(tmp_path: Path) -> None:
    a, b = (profile(tmp_path / f"{i}.json", {"x": [ms]}) for i, ms in enumerate((1.0, 5.0)))
    found = compare.compare(compare.read(a), compare.read(b))
    assert [row.verdict for row in found.rows] == ["unknown"] and not found.regressions
    assert any("were measured once in a file, so nothing tells a change from noise" in s
               for s in compare.sentences(found))  # fmt: skip


def test_more_memory_is_a_regression(tmp_path: Path) -> None:
    a, b = (profile(tmp_path / f"{m}.json", {"x": noisy(10, 9)}, rise_mib=m) for m in (100, 120))
    assert verdicts(a, b) == {"x ms": "same", "x MiB": "more"}
    assert verdicts(b, a)["x MiB"] == "less"
    a, b = (benchmark(tmp_path / f"{m}.json", {"x": noisy(10, 9)}, peak=m) for m in (100.0, 103.0))
    assert verdicts(a, b)["bench/test_x.py::x MiB"] == "same"


@pytest.mark.parametrize("with_data", [True, False])
def test_runs_of_pytest_benchmark(tmp_path: Path, with_data: bool) -> None:
    a = benchmark(tmp_path / "a.json", {"x": noisy(10, 20), "y": noisy(0.01, 20), "gone": noisy(1, 20)}, with_data)
    b = benchmark(tmp_path / "b.json", {"x": noisy(12, 20), "y": noisy(0.02, 20), "new": noisy(1, 20)}, with_data)
    assert verdicts(a, b, min_ms=1.0) == {"bench/test_x.py::x ms": "slower"}
    found = compare.compare(compare.read(a), compare.read(b))
    assert [row.verdict for row in found.rows] == ["slower", "slower"]
    assert found.only_before == ["bench/test_x.py::gone"] and found.only_after == ["bench/test_x.py::new"]
    said = " ".join(compare.sentences(found))
    assert "only in" in said and "2 slower" in said
    assert compare.read(a).machine == "Some GPU"


def test_what_pytest_benchmark_really_writes_is_read() -> None:
    results = sorted((Path(__file__).parents[1] / "bench" / "results").glob("nvidia-h200-*.json"))
    if not results:
        pytest.skip("bench/results is part of the repository")
    found = compare.read(results[0])
    assert found.kind == "pytest-benchmark" and found.machine == "NVIDIA H200" and len(found.samples) > 10


# --- files -----------------------------------------------------------------------------------------------------------


def one_benchmark(median: str = "0.1", iqr: str = "0.01", rounds: str = "3", data: str = "[]") -> str:
    stats = f'{{"median": {median}, "iqr": {iqr}, "rounds": {rounds}, "data": {data}}}'
    return f'{{"benchmarks": [{{"fullname": "x", "stats": {stats}}}]}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": "rapfast profile 1"', "not valid JSON"),
        ("[]", "is neither a profile of rapfast"),
        ('{"format": "other"}', "is neither a profile of rapfast"),
        ('{"format": "rapfast profile 7"}', "is no profile of this version"),
        ('{"benchmarks": 3}', '"benchmarks" must be an array'),
        ('{"benchmarks": [{"fullname": "x"}]}', "is not as pytest-benchmark writes it: KeyError: 'stats'"),
        ('{"benchmarks": [{"fullname": "x", "stats": {"median": "a"}}]}', "benchmarks[0] is not as"),
        ('{"benchmarks": []}', "holds no time above 0"),
        (
            one_benchmark(median="NaN"),
            "benchmarks[0] is not as pytest-benchmark writes it: ValueError: stats.median must",
        ),
        (one_benchmark(data="[0.1, Infinity]"), "stats.data must be finite"),
        (one_benchmark(data="[0.1, NaN, 0.2]"), "stats.data must be finite"),
        (one_benchmark(iqr="1" + 400 * "0"), "stats.iqr must be finite"),
        (one_benchmark(rounds="1.5"), "stats.rounds must be a whole number"),
        ('{"benchmarks": [{"fullname": 3, "stats": {}}]}', "fullname must be a string, got 3"),
        (
            '{"format": "rapfast profile 1", "time": "", "command": [], "device": "", "runs": 1, "sections": [], '
            '"machine": {"gpu": "x"}}',
            "names neither a GPU nor a processor",
        ),
    ],
)
def test_files_that_cannot_be_compared(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        compare.read(path)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_plot(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib, of the extra bench")
    a = profile(tmp_path / "a.json", {"x": noisy(10, 9), "a/b": noisy(1, 9)}, rise_mib=10)
    b = profile(tmp_path / "b.json", {"x": noisy(14, 9), "a/b": noisy(1, 9, seed=2)}, rise_mib=10)
    found = compare.compare(compare.read(a), compare.read(b))
    path = tmp_path / f"plot.{ending}"
    compare.plot(found, path, 0.05)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(data) > 5000
    if ending == "svg":
        assert compare.COLORS["slower"].encode() in data
