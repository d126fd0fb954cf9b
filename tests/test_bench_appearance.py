"""The appearance benchmark: that RAP's loop is what it claims to be, its work and records, and the report of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance

import rapfast
from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.rvs import RandomViewSynthesizer

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "appearance.py").is_file():
    pytest.skip("bench/ is part of the repository, not of the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import appearance, measure, report, report_runs, test_appearance  # noqa: E402
from bench.baselines.rap_loop import Camera, MapGenerator, Networks, RapLoop, ToNetworkInput, tf32  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The work is small, and a second thread delays it where others run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the baseline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 52), (33, 35)])
def test_the_baselines_maps_are_the_references(size: tuple[int, int]) -> None:
    states, _ = appearance.network_states()
    mine = MapGenerator().double()
    mine.load_state_dict(states)
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    maps = torch.cat([mine.train()(image[None]) for image in images])
    expected = FeatureMapNet.from_state_dict(states).double().feature_maps(images)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def both() -> tuple[RapLoop, RapScene, Any]:
    """RAP's loop and the reference of one scene, float64, and its data."""
    s = make_appearance()
    states = appearance.network_states(seed=3)
    geometry = s.means, s.quats, s.scales, s.opacities
    rasterize = partial(rapfast.rasterization, backend="reference")
    loop = RapLoop(*geometry, s.intrinsic, s.box_coord, Networks.load(*states, s.means), rasterize)
    scene = RapScene(
        Scene(*geometry, None, s.intrinsic),
        s.box_coord,
        FeatureMapNet.from_state_dict(states[0]).double(),
        ColorNet.from_state_dict(states[1]).double(),
    )
    return loop, scene, s


@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_the_baselines_pictures_are_the_references(both: tuple[RapLoop, RapScene, Any], weight: float) -> None:
    loop, scene, s = both
    images = torch.rand(3, 3, 40, 52, dtype=torch.float64)
    background = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected, _, meta = scene.render(
        s.viewmats, s.Ks, WIDTH, HEIGHT, feature_maps=scene.feature_maps(images), view_weights=weight, packed=False,
        backgrounds=background.expand(3, 3), rasterize_mode="antialiased", backend="reference",
    )  # fmt: skip
    assert float(expected.std()) > 0.02
    for i in range(3):
        camera = Camera.make(torch.linalg.inv(s.viewmats[i])[:3], s.Ks[i], WIDTH, HEIGHT, s.means)
        from_image = loop.render(camera, background, images[i], view_weight=weight)
        torch.testing.assert_close(from_image["render"].permute(1, 2, 0), expected[i], rtol=0, atol=1e-5)
        maps = loop.feature_maps(images[i])
        from_maps = loop.render(camera, background, maps=maps, view_weight=weight)
        assert torch.equal(from_maps["render"], from_image["render"])
        assert torch.equal(from_image["radii"], meta["radii"][i].amax(-1))
        assert torch.equal(from_image["visibility_filter"], from_image["radii"] > 0)


def test_the_loop_ends_with_a_normalised_image_of_the_networks_size() -> None:
    image = torch.rand(3, 8, 12, dtype=torch.float64)
    small = ToNetworkInput((4, 6), image)(image)
    means = image.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))  # at half size bilinear is the mean of 2 x 2
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(small, (means - mean) / std)


def test_tf32_is_put_back() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for allowed in (True, False):
        with pytest.raises(RuntimeError, match="inside"), tf32(allowed):
            assert [flag.allow_tf32 for flag in flags] == [allowed, allowed]
            raise RuntimeError("inside")
        assert [flag.allow_tf32 for flag in flags] == before


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_work_of_raps_network() -> None:
    net = ColorNet()
    work = appearance.color_work(net, 30_000)
    # base rows of 128 + 48, 12 taps of 16, then mean, box, index and colour; 48 -> 128 -> 96 -> 64 -> 48 -> 48, with
    # the direction -> 48, -> 3
    assert work.bytes == 30_000 * (2 * (176 + 192) + 4 * 13) + 2 * 32_544
    assert work.operations == 2 * 30_000 * 32_544
    assert work.floor_ms == pytest.approx(1e3 * work.bytes / 4.25e12)
    # a network without memory traffic to speak of is bound by its operations
    wide = ColorNet((159, 256, 256, 256, 48), (96, 256, 256, 48), (51, 256, 3))
    work = appearance.color_work(wide, 30_000)
    assert work.floor_ms == pytest.approx(1e3 * work.operations / 790e12)


def test_the_judge_hears_one_weight_for_all_views() -> None:
    work = appearance.workload(appearance.REDUCED[0], "cpu")
    with torch.no_grad():
        truth = appearance.exact(work, "rap", 2)
        right = appearance.pictures("rap", appearance.renderer(work, "rap", 2, "rapfast")())
        wrong = work._replace(view_weights=work.view_weights[:1] * 2)
        drawn = appearance.pictures("rap", appearance.renderer(wrong, "rap", 2, "rapfast")())
    assert measure.psnr(right, truth) >= test_appearance.MIN_PSNR["fp32"]
    assert measure.psnr(drawn[:1], truth[:1]) >= test_appearance.MIN_PSNR["fp32"]
    assert measure.psnr(drawn, truth) < test_appearance.MIN_PSNR["fp16"]


def test_the_whole_loop_is_the_synthesizers_and_makes_its_maps_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    work = appearance.workload(appearance.REDUCED[0], "cpu")
    made: list[int] = []
    calls: list[int] = []
    make, render = RapScene.feature_maps, RandomViewSynthesizer.render

    def counted(self: RapScene, images: Any, **options: Any) -> Any:
        made.append(len(images))
        return make(self, images, **options)

    def watched(self: RandomViewSynthesizer, poses: Any, *rest: Any) -> Any:
        calls.append(len(poses))
        return render(self, poses, *rest)

    with torch.no_grad():
        maps = work.maps("rapfast", 2)
        monkeypatch.setattr(RapScene, "feature_maps", counted)
        monkeypatch.setattr(RandomViewSynthesizer, "render", watched)
        anew = appearance.renderer(work, "rap-loop", 1, "rapfast")
        pictures = [anew() for _ in range(3)]
        assert sum(made) == 3 * len(work.images) == 3 * 2
        there = appearance.renderer(work, "rap-loop", 1, "rapfast-maps")
        pictures += [there(), appearance.renderer(work, "rap-loop", 2, "rapfast")()]
        assert sum(made) == 4 * 2
    assert calls == [2] * 5
    assert all(torch.equal(other, pictures[0]) for other in pictures) and maps.shape[0] == 2


def test_cases_are_those_of_the_targets() -> None:
    assert [(c.geometry.n, c.geometry.width, c.geometry.height) for c in appearance.FULL] == [
        (n, 854, 480) for n in (200_000, 500_000, 1_500_000)
    ]
    for case in appearance.FULL:
        assert dict(case.batches)["rap-loop"] == (8, 32) and case.network_size == (240, 427)
    assert set(report.RAP_LOOPS) | set(report.APPEARANCE_BARS) <= set(appearance.backends(32, "cuda"))
    assert set(appearance.BASELINES) <= set(appearance.backends(8, "cuda"))


@pytest.fixture(scope="module")
def reduced_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "run.json"
    command = [sys.executable, "-m", "pytest", "bench/test_appearance.py", "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--rounds", "1", f"--benchmark-json={path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_records_of_a_reduced_run(reduced_run: dict[str, Any]) -> None:
    records = {(r["extra_info"]["direction"], r["extra_info"]["backend"]): r for r in reduced_run["benchmarks"]}
    backends = ("reference", "rapfast", "rapfast-maps")
    assert set(records) == {(path, backend) for path in ("rap", "rap-loop") for backend in backends}
    for record in records.values():
        info = record["extra_info"]
        assert (info["case"], info["batch"], info["n_gaussians"]) == ("rap-room-25k-107x60", 2, 25_000)
        assert info["ms_per_view"] == pytest.approx(1e3 * record["stats"]["median"] / 2)
        assert info["psnr_db"] >= test_appearance.MIN_PSNR["fp32"]
        assert info["color_work"]["records"] == pytest.approx(25_000 * info["visible_share"])


def test_the_report_reads_a_real_run(reduced_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(reduced_run))
    (section,) = {"\n".join(report.appearance_section(report_runs.read_run(path), {}))}
    assert "| case | path | batch | reference | rapfast | rapfast-maps |" in section
    assert "| rap-room-25k-107x60 | to the CPU | 2 |" in section and "bar" not in section


# --- report ----------------------------------------------------------------------------------------------------------


def _record(path: str, batch: int, backend: str, ms: float, **more: Any) -> dict[str, Any]:
    info = {
        "case": "rap-room-500k-854x480", "backend": backend, "batch": batch, "direction": path, "ms_per_view": ms,
        "peak_mib": 800.0, "n_gaussians": 500_000, "stages": None, **more,
    }  # fmt: skip
    return {"extra_info": info}


def _run(tmp_path: Path, records: list[dict[str, Any]]) -> report.Run:
    machine = {
        "gpu": {"name": "NVIDIA H200", "driver": "580.65"},
        "cpu": {"name": "CPU", "cores": 16},
        "versions": {"rapfast": "0.1.0", "torch": "2.11.0", "gsplat": "1.5.3", "cuda": "13.0"},
    }
    data = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789"},
        "datetime": "2026-01-02",
        "benchmarks": records,
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    return report_runs.read_run(path)


def _records() -> list[dict[str, Any]]:
    work = {"records": 30_000.0, "bytes": 23.64e6, "operations": 1.953e9, "floor_ms": 0.005562}
    stages = {"maps": 0.4, "project": 0.01, "color": 0.0111, "bin": 0.02, "blend": 0.03, "composite": 0.001}
    kept = {"graph_mib": 40.0, "prepared": {"mib": 168.0, "ms": 21.0}}
    found = [_record("rap", 8, "rapfast", 0.5, stages=stages, color_work=work, **kept)]
    for batch, compiled in ((8, 9.0), (32, 9.6)):
        found += [_record("rap-loop", batch, "rap-eager", 12.0), _record("rap-loop", batch, "rap-compiled", compiled)]
        found += [
            _record("rap-loop", batch, "rapfast", 0.8, graph_mib=80.0),
            _record("rap-loop", batch, "rapfast-maps", 0.3),
        ]
    found += [_record("rap-loop", 8, "rap-eager-maps", 6.0), _record("rap-loop", 8, "rap-compiled-maps", 6.6)]
    return found


def test_ratios_are_to_the_faster_of_eager_and_compiled(tmp_path: Path) -> None:
    run = _run(tmp_path, _records())
    section = "\n".join(report.appearance_section(run, {}))
    times = "12.0 | 9.00 | 6.00 | 6.60 | 0.800 | 0.300 | 11.2 | 30.0 | 20.0 | 800 | 110"
    assert f"| rap-room-500k-854x480 | to the CPU | 8 | {times} |" in section
    assert "new reference images 11.2 (rap-room-500k-854x480, batch of 8; bar 10: met, goal 15: missed)" in section
    assert "feature maps there 30.0 (rap-room-500k-854x480, batch of 8; bar 25: met, goal 40: missed)" in section
    assert "| rap-room-500k-854x480 | 8 | 0.400 | 0.010 | 0.011 | 0.020 | 0.030 | 0.001 |" in section
    assert "| rap-room-500k-854x480 | 8 | 30,000 | 23.6 | 1.95 | 5.56 | 11.1 | 2.00 | 168 | 21.0 |" in section
    assert "| room-500k-854x480 | 9.00 | 0.800 | **11.2** | 0.300 | **30.0** |" in report.readme_table([run])


def test_without_one_of_the_loops_there_is_no_ratio(tmp_path: Path) -> None:
    records = [r for r in _records() if r["extra_info"]["backend"] != "rap-compiled"]
    run = _run(tmp_path, records)
    rows = report.appearance_rows(run)
    assert all(row.ratio("rapfast") is None for row in rows) and report.appearance_verdict(rows) is None
    assert "ratio" not in report.appearance_table(rows)


def test_the_plot_is_drawn_where_n_changes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib, of the extra bench")
    from bench.plots import plot_appearance

    rows = report.appearance_rows(_run(tmp_path, _records()))
    assert not plot_appearance(rows, tmp_path / "a.svg")
    more = [{"extra_info": {**r["extra_info"], "case": "rap-room-200k", "n_gaussians": 200_000}} for r in _records()]
    rows = report.appearance_rows(_run(tmp_path, _records() + more))
    assert plot_appearance(rows, tmp_path / "a.svg") and b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_a_run_of_one_half_leaves_the_other_halfs_tables(tmp_path: Path) -> None:
    _run(tmp_path, _records())
    both = json.loads((tmp_path / "run.json").read_text())
    forward = {**_record("fwd", 8, "gsplat", 0.2)["extra_info"], "case": "room-500k", "visible_share": 0.06}
    forward |= {"intersections_per_view": 2e5, "channels": 3}
    both["benchmarks"] += [{"extra_info": forward}, {"extra_info": {**forward, "backend": "rapfast"}}]
    newer = {**both, "datetime": "2026-02-03", "benchmarks": _records()}
    results = tmp_path / "results"
    results.mkdir()
    (results / "a.json").write_text(json.dumps(both))
    assert [bool(r.records) for r in report.newest_runs(results)] == [True]
    (results / "b.json").write_text(json.dumps(newer))
    runs = report.newest_runs(results)
    assert [(r.time, bool(r.records), bool(r.appearance)) for r in runs] == [
        ("2026-01-02", True, False),
        ("2026-02-03", False, True),
    ]
    section = report.docs_section(runs, {}, {})
    assert section.count("### NVIDIA H200") == 1 and section.count("### Appearance, NVIDIA H200") == 1
    assert "2026-02-03. Milliseconds per view." in section.split("### Appearance")[1]
    assert report.readme_table(runs).count("times faster") == 2
