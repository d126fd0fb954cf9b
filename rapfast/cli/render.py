"""`rapfast render`: a scene and cameras to pictures, and to a film."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from .. import media
from ..cameras import Cameras
from ..io import load_scene
from ..postprocess import PostProcess
from ..profiling import count, section
from ..rasterization import rasterization
from ..scene import Scene
from . import views
from .common import Command, check_batch, parse_background, parse_device, parse_size, tuned
from .output import BackgroundWriter, file_stems, prepare_folder
from .progress import Progress

Mode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
Background = tuple[float, float, float] | np.ndarray


@dataclass(kw_only=True)
class Render(Command):
    """Render views of a scene to PNG files, and to an MP4 with --video.

    By example:

    rapfast render guitar.ply --orbit 24 --out pictures
      24 views on a circle around the scene; no camera file needed.

    rapfast render scene.ply --cameras sparse/0 --out pictures
      every view of a COLMAP model; transforms.json, cameras.json and poses in .npz work alike.

    rapfast render scene.ply --cameras transforms.json --size 640x360 --mode RGB+ED --out pictures
      at another size, with a depth map NAME.depth.png beside each picture.

    rapfast render scene.ply --cameras orbit:120 --video --background white --out film
      a film film/video.mp4 as well.

    Pictures are named after the cameras' images. Cameras of several image sizes are rendered one size after the other
    (and filmed in one file each). Depth maps are 16-bit PNG in thousandths of a scene unit (millimetres for metres),
    0 where there is nothing, up to 65.535 units; --depth npy writes float32 arrays in scene units instead.
    """

    scene: Annotated[Path, tyro.conf.arg(metavar="SCENE"), tyro.conf.Positional]
    """Scene file: .ply, .compressed.ply, .spz, .sog."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the pictures; made where it does not exist."""

    cameras: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Camera file or COLMAP folder, or orbit:N."""

    orbit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Make N cameras on a circle around the scene."""

    up: Literal["-y", "y", "z", "-z", "x", "-x"] | None = None
    """Axis that points up, for an orbit; default: -y. Captures through COLMAP are mostly -y, rooms of `rapfast demo`
    z."""

    elevation: float | None = None
    """Degrees the orbit looks down by; default: 15."""

    distance: float | None = None
    """Distance of the orbit: 1 (the default) fits the bulk of the scene, 0.5 is twice as near."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """WIDTHxHEIGHT in pixels. Default: as the cameras say, 854x480 for an orbit."""

    mode: Mode = "RGB"
    """Colour, depth (D: summed, ED: expected), or both."""

    batch: int | None = None
    """Views rendered in one call; changes no pixel. Default: what `rapfast tune` found for the scene, else 8."""

    tuning: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of `rapfast tune`. Default: the one beside the scene."""

    video: bool = False
    """Write an MP4 as well."""

    fps: float | None = None
    """Frames per second of the film, with --video; default: 30."""

    background: Annotated[str, tyro.conf.arg(metavar="COLOUR|FILE")] = "black"
    """R,G,B in 0..1, black, white, or a picture (stretched to the views' size)."""

    depth: Literal["png", "npy"] | None = None
    """File format of depth maps, with a --mode that has them; default: png."""

    antialiased: bool = False
    """For scenes trained with the antialiased mode (Mip-Splatting)."""

    near: float = 0.01
    """Gaussians nearer than this are not drawn, scene units."""

    far: float = 1e10
    """Gaussians farther than this are not drawn, scene units."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:NUMBER."""

    backend: Literal["rapfast", "gsplat", "reference"] = "rapfast"
    """Renderer; gsplat needs a GPU and `pip install gsplat`, reference is slow."""

    overwrite: bool = False
    """Write into a folder that is not empty; files of the same name are replaced."""

    def run(self) -> None:
        """Check everything that can be checked, then render."""
        size = parse_size(self.size) if self.size else None
        check_batch(self.batch, self.tuning)
        if self.distance is not None and not 0 < self.distance < float("inf"):
            raise ValueError(f"--distance must be above 0, got {self.distance:g}")
        if self.elevation is not None and not -90 < self.elevation < 90:
            raise ValueError(f"--elevation must be above -90 and below 90 degrees, got {self.elevation:g}")
        if not self.near <= self.far:  # NaN is neither
            raise ValueError(f"--near must not exceed --far, got {self.near:g} and {self.far:g}")
        if self.fps is not None and not self.video:
            raise ValueError(f"--fps {self.fps:g} needs --video, the film that it is of")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"--fps must be above 0 and at most 1000, got {self.fps:g}")
        if self.video and "RGB" not in self.mode:
            raise ValueError(f"--video needs colours, and --mode {self.mode} has none")
        if self.depth is not None and self.mode == "RGB":
            raise ValueError(f"--depth {self.depth} needs depth maps, and --mode {self.mode} has none: give RGB+ED")
        if self.video:
            media.require_av()
        device = parse_device(self.device)
        if self.backend == "gsplat" and device.type != "cuda":
            raise ValueError(
                f"--backend gsplat needs a GPU, and --device {self.device} means the CPU: use --backend rapfast or "
                "reference"
            )
        background = parse_background(self.background)
        count = self._orbit_count()
        for name in ("up", "elevation", "distance"):
            if count is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} needs an orbit: give --orbit N, or --cameras orbit:N")
        groups = None if count else views.load_cameras(self.cameras, size)
        with section("load scene"):
            scene = load_scene(self.scene)
        if scene.sh is None and "RGB" in self.mode:
            raise ValueError(
                f"{self.scene}: has no colours (spherical harmonics); only --mode D and ED can be rendered"
            )
        if groups is None:
            elevation = 15.0 if self.elevation is None else self.elevation
            groups = [views.orbit(scene, count, size or (854, 480), self.up or "-y", elevation, self.distance or 1.0)]
        folder = prepare_folder(self.out, self.overwrite)
        stems = iter(file_stems([name for group in groups for name in group.names or [None] * len(group)]))
        with section("upload scene"):
            scene = scene.to(device)
        busy, beyond = 0.0, 0
        with Progress("rendering", sum(map(len, groups))) as progress, BackgroundWriter() as writer:
            for group in groups:
                size = group.width, group.height
                views_at_once, max_memory = tuned(self.scene, device, *size, len(scene), self.batch, self.tuning)
                options = self.options(background, max_memory if self.backend == "rapfast" else None)
                with self._film(folder, group, len(groups) > 1) as film:
                    for batch in render_batches(scene, group, options, views_at_once):
                        busy += batch.seconds
                        for image, depth in zip(batch.images, batch.depths, strict=True):
                            beyond += self._write(writer, folder / next(stems), image, depth)
                            if film:
                                with section("film"):
                                    film.add(image)
                            progress.advance()
        if beyond:
            print(
                f"note: {beyond} depths beyond 65.535 units are 65.535 in the files; try --depth npy", file=sys.stderr
            )
        print(f"{progress.summary()} ({progress.done / max(busy, 1e-9):.1f} without files) -> {folder}")

    def _write(self, writer: BackgroundWriter, stem: Path, image: np.ndarray | None, depth: np.ndarray | None) -> int:
        """Queue the files of one view; the number of its depths that a 16-bit PNG cannot hold."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        if image is not None:
            writer.add(media.write_png, f"{stem}.png", image)
        if depth is None:
            return 0
        if self.depth == "npy":
            writer.add(media.write_depth_npy, f"{stem}.depth.npy", depth)
            return 0
        writer.add(media.write_depth_png, f"{stem}.depth.png", depth)
        return media.depths_beyond_png(depth)

    def _orbit_count(self) -> int | None:
        """N where an orbit is asked for, None where cameras come from a file."""
        if (self.cameras is None) == (self.orbit is None):
            raise ValueError(
                "give either --cameras FILE or --orbit N" + (", not both" if self.orbit is not None else "")
            )
        count = self.orbit if self.orbit is not None else views.orbit_count(self.cameras)
        if count is not None and count < 1:
            raise ValueError(f"--orbit must be at least 1 view, got {count}")
        return count

    def options(self, background: Background, max_memory: int | None = None) -> Options:
        """The renderer's options among this command's."""
        return Options(self.mode, background, self.antialiased, self.near, self.far, self.backend, max_memory)

    @contextlib.contextmanager
    def _film(self, folder: Path, group: Cameras, several: bool) -> Iterator[media.VideoWriter | None]:
        if not self.video:
            yield None
            return
        name = f"video_{group.width}x{group.height}.mp4" if several else "video.mp4"
        with media.VideoWriter(folder / name, group.width, group.height, self.fps or 30.0) as film:
            if film.padded:
                print(f"note: {name} is padded to even sides, as H.264 needs", file=sys.stderr)
            yield film


@dataclass(frozen=True)
class Options:
    """What render_batches passes on to rasterization()."""

    mode: Mode = "RGB"
    background: Background = (0.0, 0.0, 0.0)
    antialiased: bool = False
    near: float = 0.01
    far: float = 1e10
    backend: str = "rapfast"
    max_memory: int | None = None


@dataclass(frozen=True)
class Batch:
    """Some rendered views: for each its picture [H, W, 3] uint8 and its depth [H, W] float32 in scene units, None for
    what the mode does not have; and the seconds that rendering them took."""

    images: Sequence[np.ndarray | None]
    depths: Sequence[np.ndarray | None]
    seconds: float


def render_batches(scene: Scene, cameras: Cameras, options: Options, batch: int) -> Iterator[Batch]:
    """Render all cameras, in order, `batch` of them in each call of rasterization()."""
    color, depth = "RGB" in options.mode, options.mode != "RGB"
    # gsplat has no post-processing, and takes no background with packed=True.
    by_gsplat = options.backend == "gsplat"
    # Bytes come straight out of the composite where no depth shares the image with the colours.
    post = PostProcess(clamp=(0.0, 1.0), dtype=None if depth else torch.uint8) if color and not by_gsplat else None
    plate = _plate(options.background, cameras, scene.device) if color else None
    for first in range(0, len(cameras), batch):
        part = cameras[first : first + batch].to(scene.device)
        start = time.perf_counter()
        with torch.inference_mode(), section("draw"):
            count("views", len(part))
            out, _, _ = rasterization(
                scene.means, scene.quats, scene.scales, scene.opacities,
                scene.sh if color else torch.zeros_like(scene.means), part.viewmats, part.Ks, part.width, part.height,
                near_plane=options.near, far_plane=options.far, sh_degree=scene.sh_degree if color else None,
                backgrounds=None if plate is None else plate.expand(len(part), *plate.shape[1:]),
                render_mode=options.mode, rasterize_mode="antialiased" if options.antialiased else "classic",
                packed=not by_gsplat, backend=options.backend, postprocess=post, max_memory=options.max_memory,
            )  # fmt: skip
        with section("download"):
            pixels = out.cpu().numpy()
        nothing = [None] * len(part)
        images = media.to_uint8(pixels[..., :3]) if color else nothing  # which clamps
        yield Batch(images, pixels[..., -1] if depth else nothing, time.perf_counter() - start)


def _plate(background: Background, cameras: Cameras, device: torch.device) -> torch.Tensor:
    """The background as rasterization() takes it for one camera, [1, 3] or [1, H, W, 3]."""
    if isinstance(background, tuple):
        return torch.tensor([background], dtype=torch.float32, device=device)
    image = torch.from_numpy(np.array(background)).permute(2, 0, 1)[None]
    size = (cameras.height, cameras.width)
    if tuple(image.shape[2:]) != size:
        image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)
    return image.permute(0, 2, 3, 1).contiguous().to(device)
