"""docs/claims.md: what it is made of, made-up records with known answers, and that its benchmarks run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "claims.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import claims, report, report_runs, training  # noqa: E402

MACHINE = {
    "gpu": {"name": "NVIDIA H200", "driver": "580"}, "cpu": {"name": "CPU", "cores": 16},
    "versions": {"rapfast": "0.1.0", "torch": "2.11.0", "cuda": "13.0"},
}  # fmt: skip


def write_run(folder: Path, day: str, records: list[dict[str, Any]], gpu: str | None = "NVIDIA H200") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = {**MACHINE, "gpu": gpu and {**MACHINE["gpu"], "name": gpu}}
    benchmarks = [{"extra_info": record} for record in records]
    data = {"machine_info": machine, "commit_info": {"id": "0123456789"}, "datetime": day, "benchmarks": benchmarks}
    (folder / f"{day}.json").write_text(json.dumps(data))


def record(direction: str, case: str, backend: str, batch: int, **more: Any) -> dict[str, Any]:
    return {"direction": direction, "case": case, "backend": backend, "batch": batch, **more}


def claim(name: str, way: str, batch: int, ms: float, **more: Any) -> dict[str, Any]:
    return record("claim", "case", way, batch, claim=name, ms=ms, **more)


def known_records() -> list[dict[str, Any]]:
    found = [
        record("fwd", "room-500k-854x480", "rapfast", b, ms_per_view=0.05, peak_mib=10 + 20 * b) for b in (1, 8, 32)
    ]
    found += [
        record("fwd", "room-500k-854x480", n, 8, ms_per_view=ms) for n, ms in (("gsplat", 0.2), ("gsplat-loop", 1.2))
    ]
    times = {"rap-eager": 11.0, "rap-compiled": 9.0, "rapfast": 0.9, "rapfast-maps": 0.3}
    found += [record("rap-loop", "rap-room-500k-854x480", name, 8, ms_per_view=ms) for name, ms in times.items()]
    for what, ways in (("upload", (4.0, 4.0, 2.0, 1.0)), ("download", (1.61, 1.0))):
        names = ("pageable", "pageable-non_blocking", "pinned", "pinned-non_blocking")
        names = names if what == "upload" else ("per-tensor", "batched")
        found += [
            record("transfer", f"{what}-427x240", n, 8, ms=ms, returns_ms=ms / 10)
            for n, ms in zip(names, ways, strict=True)
        ]
    found += [claim("calls", "rapfast-maps", b, 0.8 / b, calls=-(-100 // b), views=100) for b in (1, 8)]
    found += [claim("loading", way, 1, ms) for way, ms in (("1-worker", 9.0), ("4-workers-pinned", 3.0))]
    found += [claim("batches", way, 16, ms) for way, ms in (("loop", 1.517), ("batch", 0.1))]
    found += [claim("cache", way, 8, ms) for way, ms in (("rendered", 0.2), ("cached", 0.05), ("cached-on-disk", 0.1))]
    for way, ms in (
        ("rap-eager", 12.0),
        ("rap-compiled", 10.0),
        ("rapfast", 7.0),
        ("rapfast-dataset", 6.0),
        ("none", 5.0),
    ):
        found.append(claim("epoch", way, 8, ms))
    found += [record("augment", "avatar", mode, 3, seconds=s) for mode, s in (("subprocess", 60.0), ("batch", 6.0))]
    return found  # fmt: skip


def test_answers_of_known_records(tmp_path: Path) -> None:
    write_run(tmp_path, "2026-01-02", known_records())
    evidence = claims.Evidence(tmp_path)
    answers = {c.name: c.answer(evidence) for c in claims.CLAIMS}
    assert answers == {
        "views": (
            "RAP's loop with gsplat's batch 1.10 times, rapfast 10.0",
            "as planned less, with rapfast more",
        ),
        "calls": ("13 calls for 100 views", "13"),
        "memory": ("20.0 MiB a view, 0 % off a line at most", "holds"),
        "loading": ("3.00 times", "holds"),
        "uploads": ("the flag alone 1.00 times, with pinned memory 4.00", "in some cases"),
        "downloads": ("1.61 times", "holds"),
        "batches": ("15.2 times, by what is batched", "holds"),
        "cache": ("a view found: 2.00 to 4.00 times; fresh poses are never found", "1 for fresh poses"),
        "epoch": ("40.0 % less time", "15-30 %: more; 30-50 %: holds"),
        "avatars": ("10.0 times for 3 to 3 sets", "holds"),
    }
    made = claims.blocks(tmp_path)
    # 11 ms, of which the rasterizer alone saves 1.2 - 0.2
    assert "| RAP's loop, if only that is changed (by subtraction, from two runs) | 1.10 |" in made["views"]
    assert "| 8 | 13 | 0.100 | 8.00 |" in made["calls"]
    assert "| rapfast-dataset, batch of 8 | 6.00 | 17 % | 40 % |" in made["epoch"]
    assert "| 3 | 600 | 115 | 5.2 | 114.8 | 5.23 | 60.0 | 6.00 | 10.0 |" in made["avatars"]
    # (1.61 - 1) / 8 of 11 ms
    assert "| 427x240, 8 views | 1.61 | 1.00 | 1.61 | 1.007 |" in made["downloads"]


def test_of_each_claim_the_newest_run_counts(tmp_path: Path) -> None:
    write_run(tmp_path, "2026-01-02", known_records())
    write_run(
        tmp_path, "2026-02-02", [claim("loading", w, 1, ms) for w, ms in (("1-worker", 9.0), ("4-workers-pinned", 1.5))]
    )
    write_run(tmp_path, "2026-03-02", [claim("loading", w, 1, 1.0) for w in ("1-worker", "4-workers-pinned")], gpu=None)
    evidence = claims.Evidence(tmp_path)
    assert claims.loading_answer(evidence) == ("6.00 times", "more")
    assert claims.epochs_answer(evidence) == ("40.0 % less time", "15-30 %: more; 30-50 %: holds")


def test_runs_of_another_gpu_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path, "2026-01-02", known_records())
    other = [claim("loading", way, 1, 1.0) for way in ("1-worker", "4-workers-pinned")]
    write_run(tmp_path, "2026-02-02", other, gpu="NVIDIA A100")
    assert claims.loading_answer(claims.Evidence(tmp_path)) == ("3.00 times", "holds")
    assert claims.Evidence(tmp_path / "nothing").runs == []


def test_verdicts() -> None:
    assert claims.verdict([2, 5], 2, 5) == "holds"
    assert (claims.verdict([6], 2, 5), claims.verdict([1, 1.9], 2, 5)) == ("more", "less")
    assert claims.verdict([1, 3], 2, 5) == "in some cases"
    assert claims.verdict([1, 17], 3.96, 3.96) == "less or more, by the case"


def test_the_report_writes_the_document_and_says_what_is_missing(tmp_path: Path) -> None:
    for path, marks in {
        "docs/benchmarks.md": report.DOCS_MARKERS, "docs/performance.md": report.FLOORS_MARKERS,
        "README.md": report.README_MARKERS,
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"{marks[0]}\n{marks[1]}\n")
    document = tmp_path / "docs" / "claims.md"
    document.write_text((ROOT / "docs" / "claims.md").read_text(encoding="utf-8"))
    results = tmp_path / "bench" / "results"
    write_run(results, "2026-01-02", [claim("calls", "rapfast-maps", 8, 0.1, calls=13, views=100)])
    # a run of claims alone is a run, though of no table of the other documents
    assert report_runs.read_run(results / "2026-01-02.json").records == {}
    write_run(results, "2026-01-03", [record("fwd", "room-500k-854x480", "rapfast", 8, ms_per_view=0.05, peak_mib=1.0,
                                             visible_share=0.1, intersections_per_view=1.0)])  # fmt: skip
    report.main(["--root", str(tmp_path), "--no-plots"])
    text = document.read_text(encoding="utf-8")
    assert "13 calls for 100 views" in text and text.count("**no committed run has it yet**") == len(claims.CLAIMS) - 1
    once = text
    report.main(["--root", str(tmp_path), "--no-plots"])
    assert document.read_text(encoding="utf-8") == once


def test_the_document_has_a_place_for_every_claim() -> None:
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    for name in ("summary", *(c.name for c in claims.CLAIMS)):
        for marker in claims.markers(name):
            assert text.count(marker) == 1, marker
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == [c.title for c in claims.CLAIMS]
    for name, block in claims.blocks(ROOT / "bench" / "results").items():
        assert block in text, f"{name}: run python bench/report.py"
    for figure in (
        "3.96x",
        "1.61x",
        "15.17x",
        "2-4x",
        "2-5x",
        "15-30 %",
        "30-50 %",
        "5-22x",
        "12-13",
        "linear",
        "1.5-2x",
    ):
        assert figure in text, figure


def test_its_arithmetic() -> None:
    """Of the document's prose, which no run fills in."""
    text = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())

    def share(saved: float, times: float) -> float:
        return 100 * saved / (1 - 1 / times)

    def whole(value: float) -> int:
        return int(value + 0.5)

    for low, high, times in ((0.15, 0.3, 1.61), (0.3, 0.5, 2), (0.3, 0.5, 5)):
        assert f"{whole(share(low, times))} to {whole(share(high, times))} %" in text
    assert f"save {share(0.15, 1.61) * (1 - 1 / 2):.0f} to {share(0.3, 1.61) * (1 - 1 / 5):.0f} %" in text
    assert f"{100 * (1 - 1 / 1.3):.0f} to {100 * (1 - 1 / 1.5):.0f} % less time" in text
    assert (
        f"take {claims.by_its_stages(3):.1f} s including it and {claims.by_its_stages(3) - claims.LOAD_S:.1f} without"
        in text
    )
    assert f"differ by {175 - 115} s, where the model takes {claims.LOAD_S}" in text
    slow = claims.LOAD_S + claims.INFER_S + 120
    assert f"200 against {slow:.0f} s, and ten would take {slow + 9 * 8:.0f} s, {2000 / (slow + 72):.1f} times" in text
    for n, (each, one, ratio) in claims.SAID.items():
        assert claims.by_its_stages(n) == pytest.approx(one, rel=0.01) and each == 200 * n
        assert each / one == pytest.approx(ratio, rel=0.025)


def test_the_regressor_and_the_pictures(tmp_path: Path) -> None:
    model = training.PoseRegressor(32, 1, 0.25)
    assert model(torch.rand(2, 3, 60, 107)).shape == (2, 12)
    n = sum(p.numel() for p in training.PoseRegressor().parameters())
    assert 5e6 < n < 2e7
    trainer = training.Trainer("cpu", small=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.epoch([(torch.rand(2, 3, 60, 107), torch.rand(2, 12))]) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    paths = training.write_pictures(tmp_path, 2)
    assert all(200_000 < path.stat().st_size < 921_600 for path in paths)  # compressed, and not to nothing
    picture = training.Pictures(paths, (60, 107))[1]
    assert picture.shape == (3, 60, 107) and picture.dtype == torch.float32 and 0.5 < float(picture.std()) < 2


def test_the_benchmarks_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_claims.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "--device",
        "cpu",
    ]
    command += ["--rounds", "1", f"--benchmark-json={path}", "-k", "calls or cache or epoch-8 or 8-none or batches"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
    by_claim = {name: [r for r in records if r["claim"] == name] for name in ("calls", "cache", "batches", "epoch")}
    assert {r["batch"]: r["calls"] for r in by_claim["calls"]} == {1: 10, 8: 2, 16: 1, 32: 1}
    assert {r["backend"] for r in by_claim["cache"]} == {"rendered", "cached", "cached-on-disk"}
    assert len(by_claim["batches"]) == 6 and by_claim["epoch"]
    assert all(r["ms"] > 0 for r in records)
