"""What surrounds random-view synthesis in a training epoch: reading pictures, a pose regressor, its steps.

RAP's regressor is an EfficientNet whose feature maps of two sizes feed transformer encoders, one for the translation
and one for the rotation. The one here has these parts with about as many operations, untrained and from its
description alone: it stands for what an epoch computes besides rendering, not for RAP's accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.baselines.rap_loop import IMAGENET_MEAN, IMAGENET_STD

# (expansion, channels, blocks, stride, kernel) of EfficientNet-B0's stages (Tan and Le, 2019, table 1)
_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class _Block(nn.Module):
    """A mobile inverted bottleneck, without squeeze and excitation."""

    def __init__(self, before: int, after: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = before * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU()]
        layers += [
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.SiLU(), nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after),
        ]  # fmt: skip
        self.layers = nn.Sequential(*layers)
        self.keeps = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.keeps else self.layers(x)


class PoseRegressor(nn.Module):
    """Pictures [B, 3, h, w] -> poses [B, 12].

    Args:
        width: of the transformers. depth: their layers. scale: of the convolutions' channels.
    """

    def __init__(self, width: int = 256, depth: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        channels = max(8, int(32 * scale))
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.stages = nn.ModuleList()
        for expansion, n_channels, blocks, stride, kernel in _STAGES:
            after = max(8, int(n_channels * scale))
            stage: list[nn.Module] = []
            for i in range(blocks):
                stage.append(_Block(channels, after, expansion, stride if i == 0 else 1, kernel))
                channels = after
            self.stages.append(nn.Sequential(*stage))
        of_translation, of_rotation = (max(8, int(n * scale)) for n in (112, 320))
        self.branches = nn.ModuleList(
            _Branch(n, width, depth, out) for n, out in ((of_translation, 3), (of_rotation, 9))
        )

    def forward(self, images: Tensor) -> Tensor:
        x, kept = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        return torch.cat([self.branches[0](kept[4]), self.branches[1](kept[6])], dim=1)


class _Branch(nn.Module):
    """A transformer encoder over a feature map's pixels, whose extra token tells the answer."""

    def __init__(self, channels: int, width: int, depth: int, n_out: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_out))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


class Trainer:
    """Steps of a regressor on a device, in mixed precision as RAP trains (float16 on a GPU, bfloat16 on the CPU)."""

    def __init__(self, device: str, small: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = PoseRegressor(32, 1, 0.25) if small else PoseRegressor()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.scaler = torch.amp.GradScaler("cuda", enabled=device == "cuda")
        self.dtype = torch.float16 if device == "cuda" else torch.bfloat16

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
        """One step for each batch of images [B, 3, h, w] and poses [B, 12]; the number of images."""
        n = 0
        for images, poses in batches:
            images, poses = (x.to(self.device, non_blocking=True) for x in (images, poses))
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, self.dtype):
                loss = (self.model(images).float() - poses).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            n += len(images)
        return n


# --- reading pictures ------------------------------------------------------------------------------------------------

PICTURE_SIZE = (640, 480)
"""(width, height) of the files, as in 7Scenes."""


class Pictures(Dataset):
    """PNG files as a regressor is fed with them: decoded, resized, normalised float32 [3, h, w]."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = list(paths), size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        with Image.open(self.paths[i]) as file:
            picture = file.convert("RGB").resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (pixels / 255 - self.mean) / self.std


def write_pictures(folder: Path, n: int) -> list[Path]:
    """n seeded pictures: smooth shapes with a camera's noise, which compress about as photographs do."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    width, height = PICTURE_SIZE
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-3, 4, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:04d}.png")
        Image.fromarray(noisy).save(paths[-1], compress_level=4)
    return paths


LOADING = {"inline": (0, False), "1-worker": (1, False), "1-worker-pinned": (1, True), "4-workers": (4, False),
           "4-workers-pinned": (4, True)}  # fmt: skip
"""By name the number of workers and whether what they hand over is page-locked; RAP had the second, then the last."""


def loader(paths: Sequence[Path], size: tuple[int, int], way: str, batch: int) -> DataLoader:
    workers, pinned = LOADING[way]
    pinned = pinned and torch.cuda.is_available()
    return DataLoader(
        Pictures(paths, size), batch, num_workers=workers, pin_memory=pinned, persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
