"""Avatar augmentation as the benchmark runs it: the synthetic person under N parameter sets, in each mode.

"batch" is the command `rapfast augment --batch` from start to end, with Python's start, torch's import and the first
use of the GPU; "subprocess" is one such command for each set, which is what `rapfast augment` runs without --batch.
"job" is `AugmentationJob.run` in a process that has done it before: what a further set costs is read off it.
"job-refiner" is the same with the refiner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rapfast.augment import DIFFICULTIES, AugmentationJob, Summary, film_path, parameter_sets
from rapfast.augment.synthetic import SyntheticProvider

ROOT = Path(__file__).resolve().parent.parent
VIDEO = "demo"
MODES = ("subprocess", "batch", "job", "job-refiner")


class Case(NamedTuple):
    name: str
    frames: int
    gaussians: int
    side: int  # pixels
    channels: int
    sets: tuple[int, ...]

    def arguments(self, refiner: bool = False) -> dict[str, Any]:
        """Of the synthetic provider."""
        return {"frames": self.frames, "gaussians": self.gaussians, "channels": self.channels, "width": self.side,
                "height": self.side, "refiner": refiner}  # fmt: skip


CASES = {
    "full": Case("avatar-150k-512x512", 137, 150_000, 512, 32, (1, 3, 10)),
    "reduced": Case("avatar-5k-64x64", 6, 5_000, 64, 32, (1, 3)),
}


def parts(n: int) -> dict[str, Any]:
    """How N sets are named: N draws of hard, the widest."""
    return {"difficulties": ("hard",), "sets": n}


def run_command(case: Case, mode: str, n: int, device: str, out: Path) -> None:
    """The command line, or one for each set, into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    named = [f"{k}={str(v).lower()}" for k, v in case.arguments().items()]
    words = ["--provider", "synthetic", "--provider_args", *named, "--video_list", VIDEO, "--output_root", str(out),
             "--difficulties", *parts(n)["difficulties"], "--sets", str(n), "--device", device]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = [["--only", s.name] for s in parameter_sets(parts(n)["difficulties"], DIFFICULTIES, n)]
    for only in alone if mode == "subprocess" else [[]]:
        done = subprocess.run(
            [sys.executable, "-m", "rapfast.cli", "augment", "--batch", *words, *only],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"rapfast augment ended with {done.returncode}: {done.stderr.strip()[-2000:]}")


def run_job(case: Case, mode: str, n: int, device: str, out: Path) -> Summary:
    """The same in this process, into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    provider = SyntheticProvider(**case.arguments(refiner=mode == "job-refiner"))
    sets = parameter_sets(parts(n)["difficulties"], DIFFICULTIES, n)
    job = AugmentationJob(provider, sets, torch.device(device))
    with job.folder(out) as folder:
        return job.run([VIDEO], folder)


def films(case: Case, n: int, out: Path) -> list[bytes]:
    """Of each set. Raises where one does not have all frames."""
    import av

    found = []
    for s in parameter_sets(parts(n)["difficulties"], DIFFICULTIES, n):
        path = film_path(out, s.name, VIDEO)
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.demux(video=0)) - 1  # the last packet flushes
        if frames != case.frames:
            raise RuntimeError(f"{path} has {frames} frames instead of {case.frames}")
        found.append(path.read_bytes())
    return found
