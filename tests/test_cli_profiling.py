"""`rapfast profile`, `compare`, `bench` and `tune`, from the command line, and who reads what `tune` wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cli_runs import fails, files, run, write_cameras, write_scene

import rapfast
from rapfast import tuning
from rapfast.cli import bench as bench_command
from rapfast.profiling import current, quick, records


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    write_cameras(tmp_path)
    return write_scene(tmp_path)


def words(scene: Path, out: str, *more: object, device: object = "cpu") -> list[object]:
    cameras = scene.parent / "cameras.json"
    return ["render", scene, "--cameras", cameras, "--out", scene.parent / out, "--device", device, *more]


# --- profile ---------------------------------------------------------------------------------------------------------


def test_a_profiled_command_does_what_it_does_alone(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words(scene, "alone")) == 0
    path = scene.parent / "p.json"
    assert run("profile", "--json", path, "--repeats", 3, "--warmups", 1, "--", *words(scene, "profiled")) == 0
    out = capsys.readouterr().out
    names = files(scene.parent / "alone")
    assert len(names) == 3 and files(scene.parent / "profiled") == names
    for name in names:
        assert (scene.parent / "profiled" / name).read_bytes() == (scene.parent / "alone" / name).read_bytes()
    assert "sums of 3 runs" in out and "blend" in out and "thread rapfast-writer" in out and f"-> {path}" in out
    content = records.load(path)
    assert content["runs"] == 3 and content["command"][:2] == ["rapfast", "render"]
    by_path = {tuple(s["path"]): s for s in content["sections"]}
    assert by_path["render",]["calls"] == 3 and by_path["render", "draw"]["counts"] == {"views": 9}
    assert by_path["write",]["calls"] == 9 and by_path["write",]["thread"] == "rapfast-writer"
    assert {"load scene", "draw", "download"} <= {p[1] for p in by_path if len(p) == 2}
    total = sum(by_path["render", name]["host_ms"]["total"] for name in ("load scene", "draw", "download"))
    assert total <= by_path["render",]["host_ms"]["total"]
    assert current() is None


def test_repeats_time_the_work_alone_and_write_beside_it(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are thrown away are removed outside of what is timed, and lie on the disk that the user chose."""
    import tempfile

    from rapfast.cli.render import Render

    seen: list[Path] = []
    timed: list[bool] = []
    work, leave = Render.run, tempfile.TemporaryDirectory.__exit__

    def watch(self: tempfile.TemporaryDirectory[str], *error: object) -> None:
        timed.append(current() is not None and bool(current()._stack()))
        leave(self, *error)

    monkeypatch.setattr(Render, "run", lambda self: (seen.append(self.out), work(self))[1])
    monkeypatch.setattr(tempfile.TemporaryDirectory, "__exit__", watch)
    assert run("profile", "--repeats", 2, "--warmups", 1, "--", *words(scene, "deep/out")) == 0
    assert timed == [False, False]
    assert [out == scene.parent / "deep" / "out" for out in seen] == [False, True, False]
    assert all(scene.parent in out.parents for out in seen)
    assert not list(scene.parent.rglob(".rapfast-profile-*"))


def test_a_profile_with_a_trace(scene: Path) -> None:
    trace = scene.parent / "trace.json"
    assert run("profile", "--no-memory", "--trace", trace, "--", *words(scene, "out")) == 0
    names = {event.get("name") for event in json.loads(trace.read_bytes())["traceEvents"]}
    assert {"load scene", "draw", "blend"} <= names


def test_what_profile_refuses(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a command behind --" in fails(capsys, "profile")
    assert "give a command behind --" in fails(capsys, "profile", "render", scene, "--out", "o")
    said = fails(capsys, "profile", "--warmups", 9, "--trace", scene.parent / "no" / "t.json", "--", *words(scene, "o"))
    assert "no/t.json: cannot be written" in said
    said = fails(capsys, "profile", "--warmups", 9, "--trace", scene.parent / "t.txt", "--", *words(scene, "o"))
    assert "rapfast: --trace must be a file .json or .json.gz" in said
    assert "'info' is not profiled" in fails(capsys, "profile", "--", "info")
    assert "'tune' is not profiled" in fails(capsys, "profile", "--", "tune", scene)
    assert "--repeats must be at least 1, got 0" in fails(capsys, "profile", "--repeats", 0, "--", *words(scene, "o"))
    said = fails(capsys, "profile", "--json", scene.parent / "no" / "p.json", "--", *words(scene, "o"))
    assert "the folder" in said and "does not exist" in said
    assert "there is no file" in fails(capsys, "profile", "--", "render", scene, "--cameras", "no", "--out", "o")
    assert run("profile", "--", "render", "--nonsense") == 2
    assert current() is None and not (scene.parent / "o").exists()


# --- compare ---------------------------------------------------------------------------------------------------------


def profile(path: Path, ms: float) -> Path:
    values = [ms * (1 + 0.01 * i) for i in range(-4, 5)]
    times = {"total": sum(values), "median": ms, "min": values[0], "max": values[-1], "runs": [sum(values)]}
    section = {"thread": "main", "path": ["draw"], "calls": 9, "gpu_ms": None, "memory": None, "counts": {},
               "host_ms": {**times, "samples": values}}  # fmt: skip
    content = {"format": records.FORMAT, "time": "", "command": [], "device": "cpu", "runs": 1,
               "machine": {"cpu": {"name": "CPU"}}, "sections": [section]}  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_compare_tells_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, slower = profile(tmp_path / "a.json", 10.0), profile(tmp_path / "b.json", 13.0)
    assert run("compare", before, slower) == 3
    out = capsys.readouterr().out
    assert "slower" in out and "1.300" in out and out.endswith("1 slower\n")
    assert run("compare", slower, before) == 0
    assert "1 faster" in capsys.readouterr().out
    assert run("compare", before, before) == 0
    assert run("compare", before, slower, "--threshold", 0.5) == 0
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib, of the extra bench")
    assert run("compare", before, slower, "--plot", tmp_path / "c.svg") == 3
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


def test_what_compare_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = profile(tmp_path / "a.json", 10.0), tmp_path / "bad.json"
    bad.write_text("{}")
    assert "is neither a profile of rapfast" in fails(capsys, "compare", good, bad)
    assert "no such file" in fails(capsys, "compare", good, tmp_path / "absent.json")
    assert "--threshold must be" in fails(capsys, "compare", good, good, "--threshold", -1)
    assert "--confidence must be" in fails(capsys, "compare", good, good, "--confidence", 1)
    assert "--plot must end in .svg, .png or .pdf" in fails(capsys, "compare", good, good, "--plot", "x.gif")
    said = fails(capsys, "compare", good, good, "--min-ms", 100)
    assert "share nothing that was measured and takes --min-ms 100 or longer" in said
    for value in (-1, "nan", "inf"):
        assert "--min-ms must be a number of at least 0" in fails(capsys, "compare", good, good, "--min-ms", value)
    results = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json"))
    if results:
        assert "a profile and" in fails(capsys, "compare", good, results[0])


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_quick_look(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup = quick.Setup(4_000, 64, 48, (1, 2, 3), (48, 32))
    monkeypatch.setitem(quick.SETUPS, "cpu", setup)
    monkeypatch.setattr(quick, "SECONDS", 0.02)
    path = tmp_path / "quick.json"
    assert run("bench", "quick", "--device", "cpu", "--json", path) == 0
    captured = capsys.readouterr()
    assert "no GPU: copies between host and GPU are left out" in captured.err
    assert "one call of 3 views" in captured.out and "times faster" in captured.out and "blend" in captured.out
    content = records.load(path)
    groups = {s["path"][0] for s in content["sections"]}
    assert any(group.startswith("render") for group in groups) and any("reference images" in g for g in groups)
    for section in content["sections"]:
        assert len(section["path"]) > 1, "neither a group nor what was made for it is a measurement"
        if len(section["path"]) == 2:  # a line; what is inside it may be many sections
            assert 5 <= section["calls"] <= 60, section["path"]
    assert run("compare", path, path) == 0
    assert "takes nothing behind --" in fails(capsys, "bench", "quick", "--", "-k", "x")


def test_a_slow_machine_has_fewer_rounds_of_a_quick_look() -> None:
    assert [quick._rounds(seconds) for seconds in (6.0, 0.9, 0.1, 1e-5, 0.0)] == [2, 5, 8, 60, 60]


@pytest.mark.cuda
def test_a_quick_look_at_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quick.json"
    assert run("bench", "quick", "--json", path) == 0
    out = capsys.readouterr().out
    seconds = int(out.split("measured in ")[1].split(" s")[0])
    assert seconds < 60
    groups = {s["path"][0] for s in records.load(path)["sections"]}
    assert {"upload", "download", "upload and work, 8 batches"} <= groups


def test_the_suite_is_the_repositorys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_command, "ROOT", tmp_path)
    said = fails(capsys, "bench")
    assert "is part of rapfast's repository" in said and "`rapfast bench quick`" in said


def test_the_suite_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (bench_command.ROOT / "bench" / "conftest.py").is_file():
        pytest.skip("bench/ is part of the repository, not of the source distribution")
    pytest.importorskip("pytest_benchmark")
    seen: list[list[str]] = []

    target = tmp_path / "run.json"

    def fake(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        (option,) = [word for word in command if word.startswith("--benchmark-json=")]
        file = Path(option.partition("=")[2])
        assert file.parent == tmp_path and file != target and file.suffix == ".json"
        if "stop" in command:  # as pytest does at Ctrl-C: the file is empty
            raise KeyboardInterrupt
        if "collect" not in command:
            file.write_text(f"run {len(seen)}")
        return subprocess.CompletedProcess(command, 1 if {"fail", "collect"} & set(command) else 0)

    monkeypatch.setattr(subprocess, "run", fake)
    suite = ["bench", "--device", "cpu", "--json", target]
    assert run(*suite, "--", "-k", "room", "--rounds", "1") == 0
    command = [word for word in seen[0] if not word.startswith("--benchmark-json=")]
    assert command == [
        sys.executable, "-m", "pytest", "bench", "--device", "cpu", "-k", "room", "--rounds", "1",
    ]  # fmt: skip
    assert target.read_text() == "run 1"
    assert run(*suite, "--", "collect") == 1 and target.read_text() == "run 1"  # nothing was measured
    assert run(*suite, "--", "stop") == 130 and target.read_text() == "run 1"
    assert run(*suite, "--", "fail") == 1 and target.read_text() == "run 4"  # some benchmark failed, others did not
    assert files(tmp_path) == ["run.json"]


def test_the_suite_takes_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "parse_device", lambda text: torch.device(text))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran on another GPU"))
    said = fails(capsys, "bench", "--device", "cuda:1")
    assert "--device cuda:1: the suite measures the first GPU" in said


# --- tune ------------------------------------------------------------------------------------------------------------


def test_what_tune_finds_is_what_render_does(
    scene: Path, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    assert run(*words(scene, "before", device=device)) == 0
    options = ["--cameras", scene.parent / "cameras.json", "--device", device, "--max-batch", 3, "--seconds", 0.01]
    assert run("tune", scene, *options) == 0
    out = capsys.readouterr().out
    path = tuning.path_for(scene)
    (entry,) = tuning.read(path)
    assert f"best: {entry.batch} view{'s' * (entry.batch > 1)} in a call" in out and f"-> {path}" in out
    assert (entry.width, entry.height, entry.n_gaussians) == (48, 32, 400)
    assert entry.device == tuning.device_name(device)
    assert entry.versions["rapfast"] == rapfast.__version__
    assert [line.split()[0] for line in out.splitlines() if "█" in line][:3] == ["1", "2", "3"]

    assert run(*words(scene, "after", device=device)) == 0
    assert f"note: batches of {entry.batch}" in capsys.readouterr().err
    assert run(*words(scene, "given", "--batch", 1, device=device)) == 0
    assert "note" not in capsys.readouterr().err
    for name in files(scene.parent / "before"):
        for folder in ("after", "given"):
            assert (scene.parent / folder / name).read_bytes() == (scene.parent / "before" / name).read_bytes()


def test_one_view_is_one_view(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", scene, "--device", "cpu", "--size", "20x10", "--max-batch", 1, "--seconds", 0.001) == 0
    assert "best: 1 view in a call" in capsys.readouterr().out


def test_a_bound_on_memory_reaches_the_renderer(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rapfast.cli import render

    seen = []

    def watch(*arguments: object, **options: object) -> object:
        seen.append((arguments[5].shape[0], options["max_memory"]))
        return rapfast.rasterization(*arguments, **options)

    monkeypatch.setattr(render, "rasterization", watch)
    device = tuning.device_name(torch.device("cpu"))
    file = scene.parent / "other.json"
    tuning.save(file, tuning.Tuning(device, 48, 32, 400, 2, 5_000_000, 1.0))
    assert run(*words(scene, "out", "--tuning", file)) == 0
    assert seen == [(2, 5_000_000), (1, 5_000_000)]


def test_what_tune_and_its_readers_refuse(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-memory must be a number above 0" in fails(capsys, "tune", scene, "--max-memory", 0)
    assert "--cameras orbit:N needs the number of views" in fails(capsys, "tune", scene, "--cameras", "orbit:")
    assert "--max-batch must be at least 1" in fails(capsys, "tune", scene, "--max-batch", 0)
    assert "does not exist" in fails(capsys, "tune", scene, "--out", scene.parent / "no" / "t.json")
    file = scene.parent / "t.json"
    file.write_text("{}")
    assert "is no file of `rapfast tune`" in fails(capsys, "tune", scene, "--out", file)
    assert "is no file of `rapfast tune`" in fails(capsys, *words(scene, "o", "--tuning", file))
    assert "--batch or --tuning, not both" in fails(capsys, *words(scene, "o", "--tuning", file, "--batch", 2))
    shutil.copy(file, tuning.path_for(scene))
    assert "is no file of `rapfast tune`" in fails(capsys, *words(scene, "o"))
    assert run(*words(scene, "o", "--batch", 2, "--overwrite")) == 0
    assert zipfile.is_zipfile(scene) is False  # the scene was not touched


@pytest.mark.usefixtures("one_thread")
def test_a_rap_model_is_tuned_for_rvs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--appearance", "--save-scene", "--gaussians", 4000, "--views", 2, "--size", "48x32"]
    assert run(*words, "--device", "cpu", "--out", tmp_path / "demo") == 0
    model, cameras = tmp_path / "demo" / "model", tmp_path / "demo" / "cameras.json"
    options = ["--cameras", cameras, "--device", "cpu", "--max-batch", 2, "--seconds", 0.01]
    assert run("tune", model, *options) == 0
    (entry,) = tuning.read(model / "tuning.json")
    references = sorted((tmp_path / "demo").glob("row_*_reference_*.png"))
    rvs = ["rvs", model, "--poses", cameras, "--views", 4, "--device", "cpu", "--reference", *references]
    capsys.readouterr()
    assert run("profile", "--json", tmp_path / "p.json", "--", *rvs, "--out", tmp_path / "tuned") == 0
    assert f"batches of {entry.batch}" in capsys.readouterr().err
    sections = {tuple(s["path"]): s for s in records.load(tmp_path / "p.json")["sections"]}
    assert sections["rvs", "draw"]["calls"] == -(-4 // entry.batch)
    assert {"load scene", "draw poses", "draw", "download", "manifest"} <= {p[1] for p in sections if len(p) == 2}
    assert ("rvs", "draw", "map cache") in sections
    assert run(*rvs, "--batch", 3, "--out", tmp_path / "given") == 0
    for name in files(tmp_path / "given"):
        if name != ".rvs.lock":
            assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes(), name
