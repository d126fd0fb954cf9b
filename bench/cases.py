"""What is measured: the cases, and the arguments with which a renderer is called for each."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from bench import scenes
from rapfast import Cameras, Scene

GARDEN_VARIABLE = "RAPFAST_GARDEN"
SH_DEGREE = 3


class Case(NamedTuple):
    """One scene at one image size."""

    name: str
    scene: str  # "room", "outdoor", "garden", "pile" or "curtain"
    n: int  # Gaussians; the garden has as many as its file gives
    width: int
    height: int
    batches: tuple[int, ...] = (1, 8, 32)
    channels: int = 0  # of given colours; 0: spherical harmonics
    sh_degree: int = SH_DEGREE
    render_mode: str = "RGB"
    antialiased: bool = False
    with_loop: bool = True  # of single calls of gsplat, beside a batch of 8
    with_reference: bool = False  # the plain-torch reference is measured too, for one view
    cpu_only: bool = False

    @property
    def counted_batch(self) -> int:
        """The batch whose work is counted and whose kernels are timed one by one: see floors.py."""
        return 8 if 8 in self.batches else max(self.batches)


CPU_CASE = Case("cpu-room200k-427x240", "room", 200_000, 427, 240, (1,), with_reference=True, cpu_only=True)
CPU_THREADS = 2

FULL = (
    Case("room-200k-854x480", "room", 200_000, 854, 480, with_reference=True),
    Case("channels32-200k-512x512", "room", 200_000, 512, 512, channels=32),
    Case("room-500k-854x480", "room", 500_000, 854, 480, (1, 2, 4, 8, 16, 32)),
    # for time against pixels
    Case("room-500k-427x240", "room", 500_000, 427, 240, (8,)),
    Case("room-500k-1708x960", "room", 500_000, 1708, 960, (8,)),
    Case("room-1.5M-854x480", "room", 1_500_000, 854, 480),
    # gsplat 1.5.3 indexes N x batch x 48 coefficients with 32 bits: at 2.8 M its batch of 32 is drawn wrong.
    Case("outdoor-1297x840", "outdoor", 2_780_000, 1297, 840),
    Case("outdoor-1920x1080", "outdoor", 2_780_000, 1920, 1080),
    Case("garden-1297x840", "garden", 2_794_625, 1297, 840),
    Case("garden-1920x1080", "garden", 2_794_625, 1920, 1080),
    # from the room of 500 k one thing at a time
    Case("antialiased-500k-854x480", "room", 500_000, 854, 480, (8,), antialiased=True, with_loop=False),
    Case("sh0-500k-854x480", "room", 500_000, 854, 480, (8,), sh_degree=0, with_loop=False),
    Case("depth-500k-854x480", "room", 500_000, 854, 480, (8,), render_mode="RGB+ED", with_loop=False),
    Case("channels32-500k-854x480", "room", 500_000, 854, 480, (8,), channels=32, with_loop=False),
    Case("pile-500k-854x480", "pile", 500_000, 854, 480, (8,), with_loop=False),
    Case("curtain-2k-854x480", "curtain", 2_000, 854, 480, (8,), with_loop=False),
    # 8 x 6 M x 48 coefficients are above 2^31 and below 2^32, up to which gsplat 1.5.3 draws them right
    Case("room-6M-1920x1080", "room", 6_000_000, 1920, 1080, (8,), with_loop=False),
    CPU_CASE,
)

# Every path, in seconds on two cores; small enough that the reference can tell each time whether the pixels are right.
REDUCED = (
    Case("room-20k-214x120", "room", 20_000, 214, 120, (1, 4), with_reference=True),
    Case("channels32-20k-128x128", "room", 20_000, 128, 128, (1, 4), channels=32),
    Case("room-50k-214x120", "room", 50_000, 214, 120, (1, 4)),
    Case("room-150k-214x120", "room", 150_000, 214, 120, (1, 4)),
    Case("outdoor-40k-217x140", "outdoor", 40_000, 217, 140, (1, 4)),
    Case("outdoor-40k-320x180", "outdoor", 40_000, 320, 180, (1, 4)),
    Case("antialiased-50k-214x120", "room", 50_000, 214, 120, (4,), antialiased=True),
    Case("sh0-50k-214x120", "room", 50_000, 214, 120, (4,), sh_degree=0),
    Case("depth-50k-214x120", "room", 50_000, 214, 120, (4,), render_mode="RGB+ED"),
    Case("channels32-50k-214x120", "room", 50_000, 214, 120, (4,), channels=32),
    Case("pile-50k-214x120", "pile", 50_000, 214, 120, (4,)),
    Case("curtain-200-214x120", "curtain", 200, 214, 120, (4,)),
    CPU_CASE,
)

CASES = {"full": FULL, "reduced": REDUCED}

# Of these the backward is measured, in one batch.
BACKWARD = {
    "full": (
        "room-200k-854x480", "room-500k-854x480", "room-1.5M-854x480", "outdoor-1297x840", "outdoor-1920x1080",
        "garden-1297x840", "garden-1920x1080", "channels32-200k-512x512",
    ),
    "reduced": ("room-20k-214x120", "channels32-20k-128x128"),
}  # fmt: skip
BACKWARD_BATCH = {"full": 8, "reduced": 4}


def garden_path() -> str | None:
    """The file that RAPFAST_GARDEN names, None where it names nothing.

    Raises:
        FileNotFoundError: the variable is set and there is no such file.
    """
    path = os.environ.get(GARDEN_VARIABLE)
    if not path:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{GARDEN_VARIABLE} must name gsplat's test_garden.npz, got {path!r}, which is no file")
    return path


class Workload(NamedTuple):
    """A case's data on one device."""

    case: Case
    scene: Scene
    colors: torch.Tensor  # [N, 16, 3] or [N, channels]
    cameras: Cameras  # as many as the largest batch

    @property
    def statistics(self) -> scenes.Statistics:
        """What the views cost, of each camera; counted on the CPU at the first look."""
        return _statistics(self.case)

    def arguments(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of ``rasterization`` for the first ``batch`` views; the background is black, none."""
        scene, case = self.scene, self.case
        return {
            "means": scene.means,
            "quats": scene.quats,
            "scales": scene.scales,
            "opacities": scene.opacities,
            "colors": self.colors,
            "viewmats": self.cameras.viewmats[:batch],
            "Ks": self.cameras.Ks[:batch],
            "width": case.width,
            "height": case.height,
            "sh_degree": None if case.channels else case.sh_degree,
            "render_mode": case.render_mode,
            "rasterize_mode": "antialiased" if case.antialiased else "classic",
            "packed": False,
        }


@lru_cache(maxsize=1)
def _scene(name: str, n: int) -> Scene:
    if name == "garden":
        return scenes.garden(_known_garden())
    return {"room": scenes.room, "outdoor": scenes.outdoor, "pile": scenes.pile, "curtain": scenes.curtain}[name](n)


def _cameras(case: Case) -> Cameras:
    n = max(case.batches)
    if case.scene == "garden":
        return scenes.garden_cameras(_known_garden(), n, case.width, case.height)
    make = {"room": scenes.room_cameras, "outdoor": scenes.outdoor_cameras}.get(case.scene, scenes.pile_cameras)
    return make(n, case.width, case.height)


def _known_garden() -> str:
    path = garden_path()
    if path is None:
        raise FileNotFoundError(f"{GARDEN_VARIABLE} must name gsplat's test_garden.npz, it is not set")
    return path


@lru_cache(maxsize=1)
def workload(case: Case, device: str) -> Workload:
    """The case on ``device``. One is kept at a time: the large ones take a GiB."""
    scene, cameras = _scene(case.scene, case.n).to(device), _cameras(case).to(device)
    if case.channels:
        generator = torch.Generator().manual_seed(0)
        colors = torch.rand(len(scene), case.channels, generator=generator).to(device)
    else:
        colors = scene.sh[:, : (case.sh_degree + 1) ** 2].contiguous()
    return Workload(case, scene, colors, cameras)


@lru_cache(maxsize=1)
def _statistics(case: Case) -> scenes.Statistics:
    return scenes.statistics(_scene(case.scene, case.n), _cameras(case))
