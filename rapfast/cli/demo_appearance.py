"""`rapfast demo --appearance`: the room in the light of reference images, under weights from 0 to 2."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import media, procedural
from ..postprocess import PostProcess
from ..procedural.appearance import LIGHTINGS
from ..profiling import count, section
from .common import typed
from .output import BackgroundWriter
from .progress import Progress

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)

_PANEL = 320  # widest panel of the strip, pixels


def appearance_demo(
    folder: Path, rows: int, size: tuple[int, int], n: int, seed: int, batch: int, device: torch.device, save: bool
) -> None:
    """Write `appearance.png`, a row for each of `rows` views: its reference image, then the view under WEIGHTS.

    Also written: each picture of its own, row_<r>_reference_<hour>.png and row_<r>_weight_<w>.png; with `save` the
    model in RAP's format and the cameras.
    """
    width, height = size
    start = time.perf_counter()
    with section("make scene"), typed("n_gaussians", "--gaussians"):
        lit = procedural.lit_room(n, seed)
    scene = procedural.appearance_room(lit=lit)
    print(
        f"a room of {len(scene):,} Gaussians under {len(lit.sh)} lightings, made in {time.perf_counter() - start:.1f} s"
    )
    cameras = procedural.room_cameras(rows, width, height, seed)
    if save:
        scene.save(folder / "model")
        cameras.save(folder / "cameras.json")
    hours = [list(LIGHTINGS)[row % len(LIGHTINGS)] for row in range(rows)]
    references = _references(lit, hours, width, height, seed)
    scene = scene.to(device)
    maps = scene.feature_maps(procedural.as_references(references).to(device))

    jobs = [(row, weight) for row in range(rows) for weight in WEIGHTS]
    strip = [_panel(media.to_uint8(image.permute(1, 2, 0).numpy())) for image in references]
    strip = [[image] for image in strip]
    digits = len(str(rows - 1))
    with Progress("rendering", len(jobs)) as progress, BackgroundWriter() as writer:
        for row, hour in enumerate(hours):
            image = references[row].permute(1, 2, 0).numpy()
            writer.add(media.write_png, folder / f"row_{row:0{digits}d}_reference_{hour}.png", image)
        for first in range(0, len(jobs), batch):
            chosen, weights = zip(*jobs[first : first + batch], strict=True)
            for row, weight, image in zip(chosen, weights, _render(scene, cameras, maps, chosen, weights), strict=True):
                writer.add(media.write_png, folder / f"row_{row:0{digits}d}_weight_{weight:.1f}.png", image)
                strip[row].append(_panel(image))
            progress.advance(len(chosen))
        writer.add(media.write_png, folder / "appearance.png", _labelled(strip, hours))
    print(f"{progress.summary()} -> {folder / 'appearance.png'}")


def _references(lit: procedural.LitRoom, hours: Sequence[str], width: int, height: int, seed: int) -> torch.Tensor:
    """[R, 3, H, W] in 0..1, each from another place than the view beside it."""
    cameras = procedural.room_cameras(len(hours) + 3, width, height, seed)
    return torch.cat([lit.images(cameras[row + 3 : row + 4], hour) for row, hour in enumerate(hours)])


def _render(scene, cameras, maps: torch.Tensor, rows: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """uint8 [C, H, W, 3] of views `rows` under their own reference images and `weights`."""
    rows = list(rows)
    with torch.no_grad(), section("draw"):
        count("views", len(rows))
        images, _, _ = scene.render(
            cameras.viewmats[rows].to(maps.device), cameras.Ks[rows].to(maps.device), cameras.width, cameras.height,
            feature_maps=maps, map_ids=rows, view_weights=list(weights),
            postprocess=PostProcess(clamp=(0.0, 1.0), dtype=torch.uint8),
        )  # fmt: skip
    with section("download"):
        return images.cpu().numpy()


def _panel(image: np.ndarray) -> np.ndarray:
    """The picture at most _PANEL wide."""
    from PIL import Image

    height, width = image.shape[:2]
    if width <= _PANEL:
        return image
    small = Image.fromarray(image).resize((_PANEL, max(1, round(height * _PANEL / width))), Image.Resampling.BOX)
    return np.asarray(small)


def _labelled(rows: Sequence[Sequence[np.ndarray]], hours: Sequence[str]) -> np.ndarray:
    """The rows as a sheet, uint8 [H, W, 3], with what each column shows above and the hour at the left."""
    from PIL import Image, ImageDraw

    gap, margin = 6, 64
    sheet = media.contact_sheet([image for row in rows for image in row], columns=len(rows[0]), gap=gap)
    height, width = rows[0][0].shape[:2]
    picture = Image.new("RGB", (sheet.shape[1] + margin, sheet.shape[0] + 18), "white")
    picture.paste(Image.fromarray(sheet), (margin, 18))
    draw = ImageDraw.Draw(picture)
    for column, text in enumerate(["reference image", *(f"weight {weight:g}" for weight in WEIGHTS)]):
        draw.text((margin + gap + column * (width + gap), 5), text, fill="black")
    for row, hour in enumerate(hours):
        draw.text((6, 18 + gap + row * (height + gap) + height // 2 - 5), hour, fill="black")
    return np.asarray(picture)
