"""`rapfast demo`: the procedural room as pictures, a contact sheet and a film."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .. import media, procedural
from ..io import save_scene
from ..profiling import section
from .common import Command, installed, parse_device, parse_size, typed
from .output import BackgroundWriter, prepare_folder
from .progress import Progress
from .render import Options, render_batches


@dataclass(kw_only=True)
class Demo(Command):
    """Make a furnished room of Gaussians and render it to pictures, a contact sheet and a film.

    By example:

    rapfast demo --out demo
      demo/contact_sheet.png, demo/view_0.png ..., demo/orbit.mp4

    rapfast demo --out demo --size 1280x720 --gaussians 500000 --seed 7
      larger, finer, and with other books on the shelf.

    rapfast demo --out demo --save-scene
      also demo/room.ply and demo/cameras.json; then
      rapfast render demo/room.ply --cameras demo/cameras.json --out again

    rapfast demo --out demo --appearance
      demo/appearance.png: the light of reference images, a row for each view, under weights from 0 (none of it)
      by 1 (as it is) to 2 (exaggerated)
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the results; made where it does not exist."""

    size: Annotated[str, tyro.conf.arg(metavar="WxH")] = "854x480"
    """WIDTHxHEIGHT in pixels."""

    appearance: bool = False
    """Show RAP's appearance instead: views in the light of reference images, under five weights; no film."""

    views: int = 8
    """Number of pictures; with --appearance of rows."""

    frames: int = 96
    """Number of frames of the film."""

    fps: float = 24.0
    """Frames per second of the film."""

    gaussians: int = 200_000
    """Number of Gaussians in the room."""

    seed: int = 0
    """Seed of the room."""

    batch: int = 8
    """Views rendered in one call."""

    no_video: bool = False
    """Leave the film out."""

    save_scene: bool = False
    """Write the room and its cameras as files for `rapfast render`; with --appearance, a model in RAP's format."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:NUMBER."""

    overwrite: bool = False
    """Write into a folder that is not empty; files of the same name are replaced."""

    def run(self) -> None:
        """Make the room, render, write."""
        width, height = parse_size(self.size)
        for name in ("views", "frames", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"--fps must be above 0 and at most 1000, got {self.fps:g}")
        device = parse_device(self.device)
        if self.appearance:
            from .demo_appearance import appearance_demo

            folder, size = prepare_folder(self.out, self.overwrite), (width, height)
            appearance_demo(folder, self.views, size, self.gaussians, self.seed, self.batch, device, self.save_scene)
            return
        film = not self.no_video and installed("av")
        if not film and not self.no_video:
            print("note: no film, as PyAV is not installed: pip install 'rapfast[video]'", file=sys.stderr)
        folder = prepare_folder(self.out, self.overwrite)
        start = time.perf_counter()
        with section("make scene"), typed("n_gaussians", "--gaussians"):
            made = procedural.room(self.gaussians, self.seed)
        print(f"a room of {len(made):,} Gaussians, made in {time.perf_counter() - start:.1f} s")
        cameras = procedural.room_cameras(self.views, width, height, self.seed)
        if self.save_scene:
            save_scene(made, folder / "room.ply")
            cameras.save(folder / "cameras.json")
        scene, options = made.to(device), Options()

        pictures, digits = [], len(str(self.views - 1))
        with Progress("rendering", self.views) as progress, BackgroundWriter() as writer:
            for batch in render_batches(scene, cameras, options, self.batch):
                for image in batch.images:
                    writer.add(media.write_png, folder / f"view_{len(pictures):0{digits}d}.png", image)
                    pictures.append(image)
                progress.advance(len(batch.images))
            writer.add(media.write_png, folder / "contact_sheet.png", media.contact_sheet(pictures))
        print(f"{progress.summary()} -> {folder / 'contact_sheet.png'}")
        if not film:
            return
        path = procedural.room_orbit(self.frames, width, height)
        with (
            Progress("filming", self.frames, "frames") as progress,
            media.VideoWriter(folder / "orbit.mp4", width, height, self.fps) as video,
        ):
            if video.padded:
                print("note: orbit.mp4 is padded to even sides, as H.264 needs", file=sys.stderr)
            for batch in render_batches(scene, path, options, self.batch):
                with section("film"):
                    for image in batch.images:
                        video.add(image)
                progress.advance(len(batch.images))
        print(f"{progress.summary()} -> {folder / 'orbit.mp4'}")
