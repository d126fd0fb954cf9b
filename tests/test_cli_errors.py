"""The command line given what it cannot use: one sentence on stderr, status 2, and no half-written file."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_runs import blob, fails, files, run, write_cameras, write_scene
from PIL import Image

from rapfast import save_ply


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def camera_file(tmp_path):
    return write_cameras(tmp_path)


def test_wrong_options_are_one_sentence(tmp_path, scene_file, camera_file, capsys):
    cases = [
        (["--cameras", camera_file, "--size", "big"], "--size must be WIDTHxHEIGHT"),
        (["--cameras", camera_file, "--size", "0x10"], "--size must be WIDTHxHEIGHT"),
        (["--cameras", camera_file, "--size", "70000x10"], "1 to 65536"),
        (["--cameras", camera_file, "--batch", 0], "--batch must be at least 1, got 0"),
        (["--cameras", camera_file, "--mode", "ED", "--video"], "--video needs colours"),
        (["--cameras", camera_file, "--fps", 25], "--fps 25 needs --video"),
        (["--cameras", camera_file, "--up", "z"], "--up needs an orbit: give --orbit N, or --cameras orbit:N"),
        (["--cameras", camera_file, "--elevation", 15], "--elevation needs an orbit"),
        (["--cameras", camera_file, "--distance", 1], "--distance needs an orbit"),
        (["--cameras", camera_file, "--depth", "npy"], "--depth npy needs depth maps, and --mode RGB has none"),
        (["--cameras", camera_file, "--depth", "png"], "--depth png needs depth maps, and --mode RGB has none"),
        (["--cameras", camera_file, "--background", "red"], "--background must be R,G,B"),
        (["--cameras", camera_file, "--background", "1,2,3"], "--background must be R,G,B"),
        (["--cameras", camera_file, "--background", "a,b,c"], "--background must be R,G,B"),
        (["--cameras", camera_file, "--background", scene_file], "is not a picture"),
        (["--cameras", camera_file, "--device", "tpu"], "--device must be auto, cpu, cuda"),
        (
            ["--cameras", camera_file, "--backend", "gsplat", "--device", "cpu"],
            "--backend gsplat needs a GPU, and --device",
        ),
        (["--cameras", camera_file, "--video", "--fps", 0], "--fps must be above 0"),
        (["--cameras", camera_file, "--near", 2, "--far", 1], "--near must not exceed --far, got 2 and 1"),
        (["--cameras", camera_file, "--near", "nan"], "--near must not exceed --far, got nan and"),
        (["--cameras", tmp_path / "no.json"], "no file or folder"),
        (["--cameras", scene_file], "blob.ply"),
        (["--cameras", camera_file, "--orbit", 3], "not both"),
        ([], "give either --cameras FILE or --orbit N"),
        (["--orbit", 0], "--orbit must be at least 1"),
        (["--cameras", "orbit:0"], "--orbit must be at least 1"),
        (["--orbit", 2, "--elevation", 90], "--elevation must be above -90 and below 90 degrees, got 90"),
        (["--cameras", "orbit:x"], "--cameras orbit:N needs the number of views, as orbit:24, got 'orbit:x'"),
        (["--cameras", "orbit"], "--cameras orbit:N needs the number of views"),
        (["--orbit", 2, "--distance", -1], "--distance"),
    ]
    for index, (options, words) in enumerate(cases):
        out = tmp_path / f"out{index}"
        assert words in fails(capsys, "render", scene_file, "--out", out, *options), options
        assert not out.exists() or files(out) == [], options


def test_choices_are_listed(tmp_path, scene_file, camera_file, capsys):
    for option, value in (("--backend", "magic"), ("--mode", "RGBA"), ("--up", "north"), ("--depth", "exr")):
        assert run("render", scene_file, "--cameras", camera_file, "--out", tmp_path / "o", option, value) == 2
        assert value in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu(tmp_path, scene_file, camera_file, capsys):
    for device in ("cuda", "cuda:1"):
        text = fails(
            capsys, "render", scene_file, "--cameras", camera_file, "--out", tmp_path / "o", "--device", device
        )
        assert "sees no CUDA device" in text and "--device cpu" in text
    words = ("render", scene_file, "--cameras", camera_file, "--out", tmp_path / "p", "--backend", "gsplat")
    assert "--backend gsplat needs a GPU, and --device auto means the CPU: use" in fails(capsys, *words)
    assert not (tmp_path / "p").exists()


def test_bad_scene_files(tmp_path, camera_file, capsys):
    (tmp_path / "words.ply").write_text("hello")
    (tmp_path / "cut.ply").write_bytes(
        b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nproperty float x\nend_header\n"
    )
    (tmp_path / "none").mkdir()
    for name in ("missing.ply", "words.ply", "cut.ply", "none", "words.ply/inside.ply"):
        text = fails(capsys, "render", tmp_path / name, "--cameras", camera_file, "--out", tmp_path / "o")
        assert name.split("/")[0] in text
    assert not (tmp_path / "o").exists()


def test_scene_without_colours(tmp_path, camera_file, capsys):
    scene = blob()
    scene.sh = None
    scene.intrinsic = torch.zeros(len(scene), 16, 3)
    save_ply(scene, tmp_path / "rap.ply")
    assert "has no colours" in fails(
        capsys, "render", tmp_path / "rap.ply", "--cameras", camera_file, "--out", tmp_path / "o"
    )
    assert run("render", tmp_path / "rap.ply", "--cameras", camera_file, "--out", tmp_path / "d", "--mode", "ED") == 0


def test_output_that_exists_is_kept(tmp_path, scene_file, camera_file, capsys):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["render", scene_file, "--cameras", camera_file, "--out", out]
    assert run(*arguments) == 0  # an empty folder is fine
    (out / "0003.png").write_bytes(b"mine")
    assert "--overwrite" in fails(capsys, *arguments)
    assert (out / "0003.png").read_bytes() == b"mine"
    assert run(*arguments, "--overwrite") == 0
    assert Image.open(out / "0003.png").size == (48, 32)


def test_output_that_cannot_be(tmp_path, scene_file, camera_file, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/full", "/dev/full/out", "/proc/rapfast"):
        text = fails(capsys, "render", scene_file, "--cameras", camera_file, "--out", out)
        assert str(out) in text
    assert "file" in fails(capsys, "demo", "--out", tmp_path / "file", "--views", 1, "--no-video")


def limited(code_limit: str, *arguments) -> subprocess.CompletedProcess:
    """Run the command in a process that sets a limit first; a limit on file size fails writes as a full disk does."""
    code = f"import resource, sys; {code_limit}; from rapfast.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_full_disk(tmp_path, scene_file):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))"
    done = limited(limit, "render", scene_file, "--orbit", 3, "--size", "200x150", "--out", tmp_path / "o")
    assert done.returncode == 2 and done.stderr.startswith("rapfast: ") and done.stderr.count("\n") == 1
    assert "could not be written" in done.stderr and files(tmp_path / "o") == []
    done = limited(limit, "convert", scene_file, tmp_path / "copy.ply")
    assert done.returncode == 2 and "could not be written" in done.stderr and not (tmp_path / "copy.ply").exists()


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert run("render", tmp_path / "no.ply", "--orbit", 1, "--out", tmp_path / "o", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_cleanly(tmp_path, scene_file):
    pytest.importorskip("av", reason="needs PyAV: pip install 'rapfast[video]'")
    out = tmp_path / "o"
    process = subprocess.Popen(
        [sys.executable, "-m", "rapfast.cli", "render", str(scene_file), "--orbit", "5000", "--size", "160x120",
         "--batch", "2", "--video", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in its background has SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while (
        not (out.is_dir() and any(out.glob("orbit_*.png"))) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip() == "interrupted; finished files are kept, none is half-written"
    left = files(out)
    assert left and all(name.startswith("orbit_") for name in left)  # no film, no temporary file
    for name in left:
        Image.open(out / name).load()
