"""A provider that needs no data: a procedural person who talks and gestures before a moving studio.

It is the demo, the test and the benchmark of `rapfast.augment`: 150 k Gaussians of 32 channels, a background that
differs in every frame, and a refiner, a small convolution with fixed random weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rapfast import _check as check
from rapfast.cameras import Cameras
from rapfast.procedural.person import Person, person
from rapfast.procedural.person_motion import PersonMotion

from .provider import Identity, Motion, Provider, Video, Viewpoint

OPACITY = 0.985


class SyntheticProvider(Provider):
    """Any name is a video; videos of different names differ in how the person moves.

    Args:
        frames, gaussians, channels: of a video. The first three channels are RGB, the others feed the refiner.
        width, height: of the images, pixels.
        fps: frames per second.
        refiner: whether there is one; False: the rendered colours are shown.
        seed: of the refiner's weights, and of the hair.
    """

    refine_batch = 4

    def __init__(
        self, frames: int = 137, gaussians: int = 150_000, channels: int = 32, width: int = 512, height: int = 512,
        fps: float = 30.0, refiner: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.frames = check.integer("frames", frames, 1, 1 << 24)
        self.gaussians = check.integer("gaussians", gaussians, 2000, 1 << 28)
        self.channels = check.integer("channels", channels, 3, 1024)
        self.width = check.integer("width", width, 16, 1 << 16, " pixels")
        self.height = check.integer("height", height, 16, 1 << 16, " pixels")
        self.fps = check.number("fps", fps, 1.0, 1000.0, "a frame rate within 1..1000")
        self.refiner = check.flag("refiner", refiner)
        self.seed = check.integer("seed", seed, 0, (1 << 31) - 1)
        self._network: _Refiner | None = None
        self._figure: Person | None = None
        self._device = torch.device("cpu")

    def load_model(self, device: torch.device) -> None:
        self._device = device
        self._network = _Refiner(self.channels, self.seed).to(device).requires_grad_(False)
        self._figure = person(self.gaussians, self.seed)

    def load_video(self, name: str) -> Video:
        return _SyntheticVideo(self, self._figure, name, self._device)

    def refine(self, features: Tensor, alphas: Tensor, seeds: Sequence[int]) -> Tensor:
        return self._network(features, alphas, seeds)

    @property
    def refines(self) -> bool:
        return self.refiner

    def describe(self) -> dict[str, Any]:
        names = ("frames", "gaussians", "channels", "width", "height", "fps", "refiner", "seed")
        return {name: getattr(self, name) for name in names}


class _SyntheticVideo(Video):
    def __init__(self, provider: SyntheticProvider, figure: Person, name: str, device: torch.device) -> None:
        self.n_frames, self.fps = provider.frames, provider.fps
        self._size = provider.width, provider.height
        self._device = device
        self._motion = PersonMotion(figure, device)
        # Where in the person's endless motion this video begins.
        self._begin = np.random.RandomState(np.frombuffer(name.encode(), np.uint8).tolist()).uniform(0.0, 60.0)
        colors = torch.from_numpy(_features(figure, provider.channels, provider.seed)).to(device)
        self.identity = Identity(torch.full((len(colors),), OPACITY, device=device), colors)
        target = (0.0, 0.0, 1.30)
        base = Cameras.look_at([(0.0, -1.9, 1.36)], target, width=self._size[0], height=self._size[1], fov_y=32.0)
        self.viewpoint = Viewpoint(base.viewmats[0], base.Ks[0], *self._size, target)

    def target(self, frame: int) -> float:
        return self._begin + frame / self.fps

    def deform(self, frame: int, target: float) -> Motion:
        means, quats = self._motion.at(target)
        return Motion(means, quats, self._motion.scales)

    def background(self, frame: int, target: float) -> Tensor:
        return studio(target, *self._size, self._device)


def studio(seconds: float, width: int, height: int, device: torch.device) -> Tensor:
    """A newsroom's wall at a time, uint8 [height, width, 3]: drifting lights, a slow band, a running ticker."""
    y = torch.linspace(0, 1, height, device=device)[:, None]
    x = torch.linspace(0, width / height, width, device=device)[None, :]
    top, bottom = (torch.tensor(c, device=device) for c in ((0.10, 0.16, 0.28), (0.20, 0.30, 0.44)))
    picture = top + (bottom - top) * y[..., None].expand(-1, width, -1)
    slant = torch.sin(2 * math.pi * (1.3 * x + 0.6 * y - 0.10 * seconds))
    picture = picture + 0.06 * torch.sigmoid(8 * slant)[..., None] * torch.tensor((0.5, 0.9, 1.4), device=device)
    for k in range(9):
        cx = (0.13 + 0.137 * k + (0.012 + 0.006 * (k % 4)) * seconds) % 1.3 * width / height - 0.15
        cy = 0.16 + 0.07 * (k * 5 % 9) + 0.03 * math.sin(0.5 * seconds + 2 * k)
        radius = 0.035 + 0.012 * (k * 7 % 5)
        disk = ((radius**2 - (x - cx) ** 2 - (y - cy) ** 2) * (60 / radius)).clamp_(0, 1)
        warm = torch.tensor(((1.0, 0.78, 0.45), (0.45, 0.75, 1.0), (0.85, 0.55, 0.9))[k % 3], device=device)
        picture.addcmul_(disk[..., None], warm, value=0.13)
    ticker = ((y > 0.90) & (y < 0.965)).expand(-1, width)
    words = torch.sin(37 * (x + 0.22 * seconds)) * torch.sin(15.1 * (x + 0.22 * seconds) + 1.0)
    dashes = ticker & (words > 0.12) & ((y > 0.918) & (y < 0.947))
    picture = torch.where(ticker[..., None], torch.tensor((0.62, 0.10, 0.13), device=device), picture)
    picture = torch.where(dashes[..., None], torch.tensor((0.95, 0.95, 0.95), device=device), picture)
    return (255 * picture.clamp(0, 1) + 0.5).to(torch.uint8)


def _features(figure: Person, channels: int, seed: int) -> np.ndarray:
    """[N, channels] float32: display RGB, then waves of position and normal such as a network might have learnt."""
    state = np.random.RandomState(seed)
    inputs = np.concatenate([figure.points * 6.0, figure.normals], 1)
    waves = np.sin(inputs @ state.normal(0.0, 1.5, (6, channels - 3)) + state.uniform(0, 2 * np.pi, channels - 3))
    return np.concatenate([figure.colours, 0.5 * waves], 1).astype(np.float32)


class _Refiner(nn.Module):
    """Straight RGB of premultiplied features: the colours, divided by alpha, and a little texture by two convolutions
    of the features and of noise. The weights are drawn by a seed and nobody has trained them."""

    def __init__(self, channels: int, seed: int, hidden: int = 16, strength: float = 0.025) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, 3, 3, padding=1)
        self.strength = strength
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.second):
            fan_in = layer.weight[0].numel()
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * (2.0 / fan_in) ** 0.5
            layer.bias.data.zero_()

    def forward(self, features: Tensor, alphas: Tensor, seeds: Sequence[int]) -> Tensor:
        straight = features / alphas.clamp(min=1e-4)
        noise = torch.stack([_noise(seed, alphas.shape[1:], alphas.device) for seed in seeds])
        texture = self.second(torch.relu(self.first(torch.cat([straight, noise], 1))))
        return (straight[:, :3] + self.strength * torch.tanh(texture)).clamp(0, 1)


def _noise(seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
