"""Frames x cameras as batches of scenes: rasterize, refine, composite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast.rasterization import rasterization

from .assets import Frames
from .provider import Identity, Provider


class Features(NamedTuple):
    """What the rasterizer draws of F frames in S sets, the same bit by bit in every mode and batch."""

    features: Tensor  # [F, S, H, W, D], premultiplied
    alphas: Tensor  # [F, S, H, W, 1]


class FrameRenderer:
    """Renders the frames of one video.

    A frame is a scene, with the cameras of all sets. The identity's colours are read where they are by all scenes
    (`rapfast.rasterization` takes an expanded tensor so); its opacities, 4 bytes of a Gaussian's 172, are laid out once
    for as many frames as a batch may have.

    Args:
        provider: for its refiner and its settings of the rasterizer.
        identity: on the device.
        size: (width, height) of the images, pixels.
        frames: most frames of a batch.
    """

    def __init__(self, provider: Provider, identity: Identity, size: tuple[int, int], frames: int) -> None:
        self._provider, self._identity, self._size = provider, identity, size
        self._opacities = identity.opacities.expand(frames, -1).contiguous()
        self.refined = 0
        """Images that went through the refiner, those that filled a batch up not counted."""

    def rasterize(self, frames: Frames, viewmats: Tensor, Ks: Tensor) -> Features:
        """viewmats [F, S, 4, 4] and Ks [F, S, 3, 3] of the frames, float32 on the device."""
        colors = self._identity.colors
        features, alphas, _ = rasterization(
            frames.means, frames.quats, frames.scales, self._opacities[: len(frames)],
            colors.expand(len(frames), *colors.shape), viewmats, Ks, *self._size,
            near_plane=self._provider.near_plane, sh_degree=self._identity.sh_degree,
            alpha_cap=self._provider.alpha_cap,
        )  # fmt: skip
        return Features(features, alphas)

    def pictures(self, drawn: Features, backgrounds: Tensor, seeds: Sequence[int]) -> Tensor:
        """The finished frames [F, S, 3, H, W], white at 1: refined, then composited over `backgrounds` [F, H, W, 3].
        `seeds` are F x S numbers for the refiner's noise."""
        colors, alphas = (t.movedim(-1, 2) for t in drawn)
        if self._provider.refines:
            flat = self._refine(colors.flatten(0, 1), alphas.flatten(0, 1), seeds)
            return self._provider.composite(
                flat.view(*colors.shape[:2], *flat.shape[1:]), alphas, backgrounds, premultiplied=False
            )
        return self._provider.composite(colors[:, :, :3], alphas, backgrounds, premultiplied=True)

    def _refine(self, features: Tensor, alphas: Tensor, seeds: Sequence[int]) -> Tensor:
        """In batches of one size, the last filled up with zeros."""
        size, made = self._provider.refine_batch, []
        for first in range(0, len(features), size):
            part, part_alphas, part_seeds = (x[first : first + size] for x in (features, alphas, seeds))
            n = len(part)
            if n < size:
                part, part_alphas = (torch.cat([x, x.new_zeros((size - n, *x.shape[1:]))]) for x in (part, part_alphas))
                part_seeds = [*part_seeds, *[0] * (size - n)]
            refined = self._provider.refine(part, part_alphas, part_seeds)
            wanted = (size, 3, *features.shape[2:])
            if not isinstance(refined, Tensor) or refined.shape != wanted:
                raise ValueError(f"refine must return [{', '.join(map(str, wanted))}], got {check.describe(refined)}")
            made.append(refined[:n])
            self.refined += n
        return torch.cat(made)
