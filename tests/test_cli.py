"""The command as a user meets it: exit status, what it says, and what lies in the folder afterwards."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import blob, fails, files, run, write_cameras, write_scene
from PIL import Image

import rapfast
from rapfast import Cameras, PostProcess, load_ply, procedural, rasterization, save_ply
from rapfast.cli import output, render, views
from rapfast.cli.common import installed, parse_size, sentence


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def camera_file(tmp_path):
    return write_cameras(tmp_path)


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["render"], ["demo"], ["convert"], ["info"]])
def test_help_teaches_by_examples(capsys, command):
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert f"rapfast {command[0] if command else 'demo'} " in text or "rapfast info" in text
    assert "usage: rapfast" in text


def test_unknown_options_and_commands_are_refused(capsys):
    for arguments in (["paint"], [], ["render"], ["info", "--colour"], ["demo", "--out", "x", "--views", "many"]):
        assert run(*arguments) == 2
        assert capsys.readouterr().err


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"rapfast {rapfast.__version__}\n"
    assert run("info", "--version") == 2 == run("--version", "info")


def test_the_package_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "rapfast", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rapfast {rapfast.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "rapfast", "paint"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "paint" in done.stderr


def test_module_runs_and_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m rapfast.cli info | head -1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("rapfast") and done.stderr == ""


# info ----------------------------------------------------------------------------------------------------------------


def test_info(capsys):
    assert run("info") == 0
    assert torch.__version__.split("+")[0] in capsys.readouterr().out
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"rapfast", "packages", "cuda", "missing"} <= set(found)


# render --------------------------------------------------------------------------------------------------------------


def test_pictures_are_what_the_renderer_makes(tmp_path, scene_file, camera_file, capsys):
    out = tmp_path / "out"
    assert (
        run(
            "render",
            scene_file,
            "--cameras",
            camera_file,
            "--out",
            out,
            "--batch",
            2,
            "--background",
            "0.2,0.4,0.6",
            "--device",
            "cpu",
        )
        == 0
    )
    assert "3 views in" in capsys.readouterr().out
    assert files(out) == ["0003.png", "left/0001.png", "right/0001.png"]
    scene, cameras = load_ply(scene_file), Cameras.from_file(camera_file)
    want, _, _ = rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks, 48, 32,
        sh_degree=1, backgrounds=torch.tensor([[0.2, 0.4, 0.6]]).expand(3, 3),
        postprocess=PostProcess(clamp=(0.0, 1.0), dtype=torch.uint8),
    )  # fmt: skip
    for name, picture in zip(("left/0001", "right/0001", "0003"), want, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), picture.numpy())
    assert want.float().std() > 10


def test_batch_size_does_not_change_a_byte(tmp_path, scene_file):
    for batch in (1, 5):
        assert (
            run("render", scene_file, "--orbit", 5, "--size", "40x30", "--out", tmp_path / str(batch), "--batch", batch)
            == 0
        )
    for name in files(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


def test_orbit_sees_the_scene_in_the_middle(tmp_path, scene_file):
    assert (
        run("render", scene_file, "--cameras", "orbit:4", "--size", "64x64", "--out", tmp_path / "o", "--up", "z") == 0
    )
    assert files(tmp_path / "o") == [f"orbit_{k:04d}.png" for k in range(4)]
    for name in files(tmp_path / "o"):
        light = np.asarray(Image.open(tmp_path / "o" / name), float).sum(2) > 30
        y, x = np.nonzero(light)
        assert 0.03 < light.mean() < 0.9 and abs(x.mean() - 31.5) < 10 and abs(y.mean() - 31.5) < 10
        assert not light[0].all() and not light[:, 0].all()


@pytest.mark.parametrize("mode", ["D", "ED", "RGB+D", "RGB+ED"])
@pytest.mark.parametrize("form", ["png", "npy"])
def test_depth_maps(tmp_path, scene_file, camera_file, mode, form):
    out = tmp_path / "out"
    options = ["--mode", mode, "--depth", form, "--device", "cpu"]
    assert run("render", scene_file, "--cameras", camera_file, "--out", out, *options) == 0
    scene, cameras = load_ply(scene_file), Cameras.from_file(camera_file)
    want, _, _ = rasterization(
        scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks, 48, 32,
        sh_degree=1, render_mode=mode,
    )  # fmt: skip
    colour = [f"{s}.png" for s in ("0003", "left/0001", "right/0001")] if "RGB" in mode else []
    assert files(out) == sorted(colour + [f"{s}.depth.{form}" for s in ("0003", "left/0001", "right/0001")])
    depth = want[2, ..., -1].double().numpy()
    if form == "npy":
        assert np.array_equal(np.load(out / "0003.depth.npy"), depth.astype(np.float32))
    else:
        assert np.array_equal(np.asarray(Image.open(out / "0003.depth.png")), np.rint(depth * 1000).clip(0, 65535))
    assert 1.0 < depth.max() < 65
    if colour:
        assert (
            np.abs(np.asarray(Image.open(out / "0003.png"), float) - 255 * want[2, ..., :3].clamp(0, 1).numpy()).max()
            <= 0.51
        )


def test_depths_that_a_png_cannot_hold_are_told(tmp_path, scene_file, capsys):
    Cameras.look_at([[1.0, -90.0, 3.0]], [1.0, 2.0, 3.0], width=48, height=32).save(tmp_path / "far.json")
    assert run("render", scene_file, "--cameras", tmp_path / "far.json", "--mode", "ED", "--out", tmp_path / "o") == 0
    deepest = np.asarray(Image.open(tmp_path / "o" / "00000.depth.png"))
    assert (
        f"{(deepest == 65535).sum()} depths beyond 65.535 units" in capsys.readouterr().err and deepest.max() == 65535
    )


def test_size_scales_the_intrinsics(tmp_path, scene_file, camera_file):
    assert run("render", scene_file, "--cameras", camera_file, "--out", tmp_path / "a", "--size", "96x64") == 0
    assert run("render", scene_file, "--cameras", camera_file, "--out", tmp_path / "b") == 0
    large, small = (np.asarray(Image.open(tmp_path / k / "0003.png"), float) for k in "ab")
    assert large.shape == (64, 96, 3)
    assert np.abs(large.reshape(32, 2, 48, 2, 3).mean((1, 3)) - small).mean() < 4


def test_mixed_sizes_keep_their_names(tmp_path, scene_file):
    one = Cameras.look_at([[1, -1, 3.5], [3, 0, 4]], [1.0, 2.0, 3.0], width=48, height=32)
    two = Cameras.look_at([[1, 5, 3.2]], [1.0, 2.0, 3.0], width=31, height=21)
    one.names, two.names = ["a", "c"], ["b"]
    one.save(tmp_path / "1.json")
    two.save(tmp_path / "2.json")
    first, second = (json.loads((tmp_path / f"{k}.json").read_text()) for k in (1, 2))
    (tmp_path / "all.json").write_text(json.dumps([first[0], second[0], first[1]]))
    pytest.importorskip("av")
    assert run("render", scene_file, "--cameras", tmp_path / "all.json", "--out", tmp_path / "o", "--video") == 0
    assert files(tmp_path / "o") == ["a.png", "b.png", "c.png", "video_31x21.mp4", "video_48x32.mp4"]
    assert Image.open(tmp_path / "o" / "b.png").size == (31, 21)
    assert Image.open(tmp_path / "o" / "c.png").size == (48, 32)


def test_video_has_every_view(tmp_path, scene_file, capsys):
    av = pytest.importorskip("av")
    assert (
        run("render", scene_file, "--orbit", 6, "--size", "41x30", "--video", "--fps", 12, "--out", tmp_path / "o") == 0
    )
    assert "padded" in capsys.readouterr().err
    with av.open(str(tmp_path / "o" / "video.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 6 and film.streams.video[0].average_rate == 12


def test_picture_as_background(tmp_path, scene_file, camera_file):
    plate = np.zeros((16, 24, 3), np.uint8)
    plate[:, 12:] = (0, 200, 0)
    Image.fromarray(plate).save(tmp_path / "plate.png")
    far = Cameras.look_at([[1.0, -90.0, 3.0]], [1.0, 2.0, 3.0], width=48, height=32)
    far.save(tmp_path / "far.json")
    assert (
        run(
            "render",
            scene_file,
            "--cameras",
            tmp_path / "far.json",
            "--background",
            tmp_path / "plate.png",
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    picture = np.asarray(Image.open(tmp_path / "o" / "00000.png"))
    assert picture[2, 2].tolist() == [0, 0, 0] and picture[2, 45].tolist() == [0, 200, 0]


def test_reference_backend_agrees(tmp_path, scene_file, camera_file):
    for backend in ("rapfast", "reference"):
        assert (
            run(
                "render",
                scene_file,
                "--cameras",
                camera_file,
                "--out",
                tmp_path / backend,
                "--backend",
                backend,
                "--antialiased",
            )
            == 0
        )
    a, b = (np.asarray(Image.open(tmp_path / k / "0003.png"), float) for k in ("rapfast", "reference"))
    assert np.abs(a - b).max() <= 2


def test_near_and_far_cut(tmp_path, scene_file, camera_file):
    assert run("render", scene_file, "--cameras", camera_file, "--out", tmp_path / "o", "--far", "0.02") == 0
    assert not np.asarray(Image.open(tmp_path / "o" / "0003.png")).any()


# convert -------------------------------------------------------------------------------------------------------------


def test_convert_there_and_back(tmp_path, scene_file, capsys):
    pytest.importorskip("gsply")
    near = blob()
    near.means[:5] -= 500.0
    save_ply(near, tmp_path / "a.ply")
    assert run("convert", tmp_path / "a.ply", tmp_path / "a.spz") == 0
    assert run("convert", tmp_path / "a.spz", tmp_path / "b.ply") == 0
    assert "400 Gaussians" in capsys.readouterr().out
    back = load_ply(tmp_path / "b.ply")
    assert (tmp_path / "a.spz").stat().st_size < (tmp_path / "a.ply").stat().st_size / 2
    assert float((back.means - near.means).abs().max()) < 1e-3


def test_convert_refuses(tmp_path, scene_file, capsys):
    assert "must end so" in fails(capsys, "convert", scene_file, tmp_path / "a.obj")
    assert "missing.ply" in fails(capsys, "convert", tmp_path / "missing.ply", tmp_path / "a.ply")
    (tmp_path / "b.ply").write_bytes(b"mine")
    assert "--overwrite" in fails(capsys, "convert", scene_file, tmp_path / "b.ply")
    assert (tmp_path / "b.ply").read_bytes() == b"mine"
    assert (
        run("convert", scene_file, tmp_path / "b.ply", "--overwrite") == 0 and len(load_ply(tmp_path / "b.ply")) == 400
    )
    assert "nowhere" in fails(capsys, "convert", scene_file, tmp_path / "nowhere" / "a.ply")


# demo ----------------------------------------------------------------------------------------------------------------


def test_demo_small(tmp_path, capsys):
    pytest.importorskip("av")
    out = tmp_path / "demo"
    options = ["--size", "97x54", "--gaussians", 6000, "--views", 3, "--frames", 5]
    assert run("demo", "--out", out, *options, "--save-scene") == 0
    assert files(out) == [
        "cameras.json",
        "contact_sheet.png",
        "orbit.mp4",
        "room.ply",
        "view_0.png",
        "view_1.png",
        "view_2.png",
    ]
    captured = capsys.readouterr()
    assert "6,000 Gaussians" in captured.out and "padded" in captured.err
    assert Image.open(out / "view_2.png").size == (97, 54)
    assert "--overwrite" in fails(capsys, "demo", "--out", out, *options)
    # The files lead on to the same picture through `render`: PLY stores logarithms and logits, so up to rounding.
    assert run("render", out / "room.ply", "--cameras", out / "cameras.json", "--out", tmp_path / "again") == 0
    one, two = (np.asarray(Image.open(p), float) for p in (out / "view_0.png", tmp_path / "again" / "room_0000.png"))
    assert np.abs(one - two).mean() < 0.1 and one.std() > 20


def test_demo_refuses(tmp_path, capsys):
    for options, words in (
        (["--views", 0], "--views must be at least 1"), (["--size", "x"], "--size"),
        (["--gaussians", 10], "--gaussians must be at least"),
        (["--seed", -1], "--seed"), (["--frames", 0], "--frames"),
    ):  # fmt: skip
        text = fails(capsys, "demo", "--out", tmp_path / "o", "--no-video", *options)
        assert words in text and "n_gaussians" not in text


def test_demo_without_video(tmp_path):
    assert run("demo", "--out", tmp_path / "o", "--size", "64x36", "--gaussians", 5000, "--views", 1, "--no-video") == 0
    assert files(tmp_path / "o") == ["contact_sheet.png", "view_0.png"]


# Parts ---------------------------------------------------------------------------------------------------------------


def test_names_stay_inside_the_folder_and_apart():
    names = ["a/b.jpg", "../../etc/passwd", "/abs/x.png", "a/b.png", None, "C:\\pics\\y.tif", "..", "A/B.jpg"]
    stems = output.file_stems(names)
    assert stems == ["a/b", "etc/passwd", "abs/x", "a/b_2", "view_0004", "pics/y", "view_0006", "A/B_3"]


def test_writer_reports_the_first_error():
    done = []

    def bad():
        raise OSError(28, "a.png: could not be written: No space left on device")

    with pytest.raises(OSError, match="No space"), output.BackgroundWriter(ahead=2) as writer:
        writer.add(done.append, 1)
        writer.add(bad)
        for k in range(20):
            writer.add(done.append, k)
    assert done == [1]


@pytest.mark.parametrize("text, size", [("854x480", (854, 480)), (" 1 X 1 ", (1, 1)), ("65536×2", (65536, 2))])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_sentences_have_no_decoration():
    assert sentence(OSError(2, "No such file or directory", "a.ply")) == "a.ply: No such file or directory"
    assert sentence(ValueError("two\nlines")) == "two lines"
    assert sentence(KeyError()) == "KeyError"


def test_a_folder_without_code_is_no_package(tmp_path, monkeypatch, capsys):
    """As caches leave one behind after pip uninstall: Python finds it, as a namespace package."""
    (tmp_path / "left_over" / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    left_over, find = importlib.util.find_spec("left_over"), importlib.util.find_spec
    assert left_over is not None and not installed("left_over")
    assert installed("json") and not installed("no_such_package")
    uninstalled = ("av", "pytest_benchmark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: left_over if name in uninstalled else find(name))
    small = ("--size", "64x36", "--gaussians", 5000, "--views", 1, "--frames", 1, "--device", "cpu")
    assert run("demo", "--out", tmp_path / "o", *small) == 0
    assert "note: no film, as PyAV is not installed" in capsys.readouterr().err
    assert files(tmp_path / "o") == ["contact_sheet.png", "view_0.png"]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "conftest.py").write_text("")
    monkeypatch.setattr("rapfast.cli.bench.ROOT", tmp_path)
    assert "the benchmark suite needs pytest_benchmark: pip install" in fails(capsys, "bench", "--device", "cpu")


def test_centre_ignores_floaters():
    centre, radius = views.centre_and_radius(blob())
    assert np.abs(centre - [1, 2, 3]).max() < 0.3 and 0.5 < radius < 2.0
    nothing = blob().select(slice(0, 0))
    with pytest.raises(ValueError, match="no valid Gaussian"):
        views.centre_and_radius(nothing)


def test_room_scene_orbits(tmp_path):
    """The room's own file works with the orbit as well, with z up."""
    save_ply(procedural.room(5000), tmp_path / "room.ply")
    assert (
        run(
            "render",
            tmp_path / "room.ply",
            "--orbit",
            2,
            "--up",
            "z",
            "--distance",
            0.4,
            "--size",
            "64x36",
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    assert os.path.getsize(tmp_path / "o" / "orbit_0000.png") > 500


@pytest.mark.parametrize("mode", ["RGB", "RGB+ED", "ED"])
def test_gsplat_is_asked_for_what_it_has(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no post-processing, and no background with packed=True: here the reference stands in for it."""
    met = []

    def stand_in(*scene: Any, backend: str, postprocess: Any, packed: bool, **options: Any) -> Any:
        met.append((backend, postprocess, packed))
        return rasterization(*scene, backend="reference", packed=packed, **options)

    scene, cameras = procedural.room(4000, 0), procedural.room_orbit(2, 48, 32)
    options = render.Options(mode, background=(0.2, 0.4, 0.6))
    want = list(render.render_batches(scene, cameras, options, 2))
    monkeypatch.setattr(render, "rasterization", stand_in)
    got = list(render.render_batches(scene, cameras, replace(options, backend="gsplat"), 2))
    assert met == [("gsplat", None, False)]
    for x, y in zip((*got[0].images, *got[0].depths), (*want[0].images, *want[0].depths), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and float(np.mean(np.abs(x.astype(float) - y) > 1)) < 0.01
