"""What the tests of avatar augmentation share: a small provider that counts its calls, and reading films."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rapfast import Cameras
from rapfast.augment import (
    DIFFICULTIES,
    AugmentationJob,
    FilmOptions,
    Identity,
    Motion,
    Provider,
    Summary,
    Video,
    Viewpoint,
    parameter_sets,
)

N, FRAMES, WIDTH, HEIGHT, CHANNELS = 300, 7, 64, 48, 5


class CountingVideo(Video):
    """A blob that turns, before a plate whose brightness tells the frame."""

    def __init__(self, calls: Counter, size: tuple[int, int]) -> None:
        g = torch.Generator().manual_seed(3)
        self._calls, self._size = calls, size
        self._points = torch.randn(N, 3, generator=g) * 0.25
        self._quats, self._scales = torch.randn(N, 4, generator=g), torch.rand(N, 3, generator=g) * 0.06 + 0.01
        self.identity = Identity(torch.rand(N, generator=g) * 0.6 + 0.3, torch.rand(N, CHANNELS, generator=g))
        self.n_frames, self.fps = FRAMES, 25.0
        camera = Cameras.look_at([(0, -2.0, 0)], (0, 0, 0), width=size[0], height=size[1], fov_y=40.0)
        self.viewpoint = Viewpoint(camera.viewmats[0], camera.Ks[0], *size, (0, 0, 0))

    def target(self, frame: int) -> float:
        self._calls["target", frame] += 1
        return 0.3 * frame

    def deform(self, frame: int, target: float) -> Motion:
        self._calls["deform", frame] += 1
        c, s = np.cos(target), np.sin(target)
        turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float32)
        return Motion(self._points @ turn.T, self._quats, self._scales)

    def background(self, frame: int, target: float) -> Tensor:
        self._calls["background", frame] += 1
        return torch.full((self._size[1], self._size[0], 3), 30 * frame + 10, dtype=torch.uint8)

    def close(self) -> None:
        self._calls["close"] += 1


class CountingProvider(Provider):
    """Counts what it is asked for in `calls`."""

    refine_batch = 3

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.calls: Counter = Counter()
        self._size = width, height

    def load_model(self, device: torch.device) -> None:
        self.calls["model"] += 1

    def load_video(self, name: str) -> Video:
        self.calls["video", name] += 1
        return CountingVideo(self.calls, self._size)


class RefiningProvider(CountingProvider):
    """The same with a refiner: a fixed convolution and noise."""

    def refine(self, features: Tensor, alphas: Tensor, seeds: Sequence[int]) -> Tensor:
        assert features.shape == (3, CHANNELS, *features.shape[2:]) and alphas.shape[:2] == (3, 1) and len(seeds) == 3
        self.calls["refine"] += 1
        weight = torch.randn(3, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1
        noise = [torch.rand(3, *features.shape[2:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        picture = torch.nn.functional.conv2d(features.cpu(), weight, padding=1) + 0.2 * torch.stack(noise)
        return (picture + 0.4).clamp(0, 1).to(features.device)


def make_films(
    root: Path, provider: Provider, videos: Sequence[str] = ("v",), names: Sequence[str] = ("easy", "hard"),
    device: str | torch.device = "cpu", **options,
) -> Summary:  # fmt: skip
    """Run a job into a folder."""
    overwrite = options.pop("overwrite", False)
    options.setdefault("films", FilmOptions(threads=1))
    job = AugmentationJob(provider, parameter_sets(names, DIFFICULTIES), torch.device(device), **options)
    with job.folder(root, overwrite=overwrite) as folder:
        return job.run(videos, folder, overwrite=overwrite)


def read_film(path: Path) -> list[np.ndarray]:
    """Its frames, uint8 [H, W, 3]."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
