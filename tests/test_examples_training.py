"""The examples that train through the render, with settings so small that little is to be learnt."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG"


def run(name: str, *arguments: str, device: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--quick", "--device", device, *arguments]
    # One thread: many small operations, on a machine whose cores may be others' as well.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["fit_scene.py", "fit_appearance.py"])
def test_ctrl_c_keeps_what_is_learnt(name: str, tmp_path: Path) -> None:
    if name == "fit_scene.py":
        pytest.importorskip("gsplat", reason="the strategy is gsplat's")
    out = tmp_path / "made"
    command = [
        sys.executable, "-u", str(EXAMPLES / name), "--quick", "--device", "cpu", "--out", str(out), "--gaussians",
        "4000", "--width", "48", "--height", "27", "--views", "8", "--batch", "1", "--steps", "200",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background has it ignored
    ) as done:  # fmt: skip
        line = ""
        while "step" not in line:
            assert (line := done.stdout.readline()), done.stderr.read()
        done.send_signal(signal.SIGINT)
        text, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    (made,) = numbers(r"interrupted: (\d+) of 200 steps were made", text)
    assert 20 <= made < 200
    numbers(r"PSNR .* ([\d.]+) dB after", text)
    picture = out / "pictures.png" if name == "fit_scene.py" else out
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["fit_appearance.py", "refine_pose.py"])
def test_where_nothing_can_be_written_nothing_is_begun(name: str, tmp_path: Path) -> None:
    if name == "refine_pose.py":
        pytest.importorskip("matplotlib", reason="the example plots with matplotlib")
    out = tmp_path / "missing" / "picture.png"
    done = subprocess.run([sys.executable, str(EXAMPLES / name), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out" in done.stderr and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text}"
    return [float(x) for x in found.groups()]


def test_a_pose_is_refined(tmp_path: Path, device) -> None:
    out = tmp_path / "pose.png"
    pytest.importorskip("matplotlib", reason="the example plots with matplotlib")
    text = run(
        "refine_pose.py", "--out", str(out), "--gaussians", "4000", "--width", "128", "--height", "72",
        "--metres", "0.02", "--degrees", "0.8", "--steps", "45", "--shrink", "2", "1", device=device.type,
    )  # fmt: skip
    before = numbers(r"guess: +([\d.]+) mm, ([\d.]+) degrees", text)
    after = numbers(r"refined: +([\d.]+) mm, ([\d.]+) degrees", text)
    assert before == [20.0, 0.8]
    assert after[0] < 1.0 and after[1] < 0.1
    assert out.read_bytes().startswith(PNG)


def test_a_scene_is_fitted_with_gsplats_strategy(tmp_path: Path, device) -> None:
    pytest.importorskip("gsplat", reason="the strategy is gsplat's")
    text = run(
        "fit_scene.py", "--out", str(tmp_path), "--gaussians", "4000", "--points", "600", "--width", "64", "--height",
        "36", "--views", "8", "--steps", "60", "--grow", "2e-3", device=device.type,
    )  # fmt: skip
    before, after = numbers(r"rapfast: PSNR of 2 held-out views ([\d.]+) dB before, ([\d.]+) dB after", text)
    (n,) = numbers(r"(\d+) Gaussians\n.*pictures.png", text)
    assert after > before + 2
    assert n > 600, "the strategy has grown some"
    assert (tmp_path / "pictures.png").read_bytes().startswith(PNG)
    assert (tmp_path / "rapfast.ply").stat().st_size > 600 * 62 * 4


def test_an_appearance_is_trained(tmp_path: Path, device) -> None:
    out = tmp_path / "two.png"
    text = run(
        "fit_appearance.py", "--out", str(out), "--gaussians", "4000", "--width", "48", "--height", "27", "--views",
        "4", "--batch", "3", "--steps", "25", device=device.type,
    )  # fmt: skip
    before, after = numbers(r"never seen: ([\d.]+) dB before, ([\d.]+) dB after", text)
    assert after > before + 3
    assert out.read_bytes().startswith(PNG)
