"""Pictures and films on disk: PNG, 16-bit depth PNG, H.264 MP4, contact sheets.

Everything goes through `rapfast.io.atomic_path`: a file under its final name is a finished file. Pillow and PyAV are
imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .io.atomic import atomic_path
from .io.files import PathLike

#: Depth PNGs hold scene units times this, so millimetres where the scene is in metres.
DEPTH_STEPS_PER_UNIT = 1000.0
_DEEPEST = 65535


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Colours in 0..1 to bytes, trunc(clamp(255 x + 0.5, 0, 255)) as PostProcess does; bytes come back as they are."""
    if image.dtype == np.uint8:
        return image
    return np.clip(255.0 * np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0) + 0.5, 0.0, 255.0).astype(np.uint8)


def read_image(path: PathLike) -> np.ndarray:
    """An image file as float32 [H, W, 3] in 0..1; an alpha channel is dropped.

    Raises OSError where it cannot be read, ValueError where it is no picture that Pillow knows.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 255.0
    except UnidentifiedImageError:
        raise ValueError(f"{os.fspath(path)}: is not a picture that can be read") from None


def write_png(path: PathLike, image: np.ndarray) -> None:
    """Write [H, W, 3] (or [H, W] grey) as an 8-bit PNG; uint8, or floating in 0..1.

    Raises ValueError for another shape, OSError where the file cannot be written.
    """
    from PIL import Image

    image = _checked(image, "image")
    picture = Image.fromarray(np.ascontiguousarray(to_uint8(image)))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=4)


def depths_beyond_png(depth: np.ndarray) -> int:
    """How many finite depths are beyond what write_depth_png can hold, 65.535 units."""
    return int((np.isfinite(depth) & (depth * DEPTH_STEPS_PER_UNIT > _DEEPEST + 0.5)).sum())


def write_depth_png(path: PathLike, depth: np.ndarray) -> None:
    """Write depth [H, W] in scene units as a 16-bit grey PNG in thousandths (millimetres for a scene in metres).

    0 means nothing there (also written for what is not finite). Depths beyond 65.535 units are written as 65535.
    """
    from PIL import Image

    if depth.ndim != 2:
        raise ValueError(f"depth must be [H,W], got {list(depth.shape)}")
    steps = np.nan_to_num(depth.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) * DEPTH_STEPS_PER_UNIT
    picture = Image.fromarray(np.clip(np.rint(steps), 0, _DEEPEST).astype(np.uint16))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=4)


def write_depth_npy(path: PathLike, depth: np.ndarray) -> None:
    """Write depth [H, W] in scene units as a float32 .npy array."""
    if depth.ndim != 2:
        raise ValueError(f"depth must be [H,W], got {list(depth.shape)}")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, depth.astype(np.float32))


class VideoWriter:
    """An H.264 MP4 (yuv420p, plays everywhere), encoded frame by frame.

        with VideoWriter("orbit.mp4", 854, 480, fps=30) as video:
            video.add(frame)  # uint8 [480, 854, 3]

    H.264 needs even sides: an odd one is padded by repeating its last pixel, and `padded` says so. The file appears
    under its name when the `with` block ends without an error; otherwise nothing is left.

    Args:
        quality: x264's constant rate factor; lower is better and larger.
        preset: x264's, from "ultrafast" to "veryslow".
        threads: of the encoder, which share the frames; None: as many as it likes.
        reproducible: the same frames, options and `threads` give the same file, byte for byte, on one machine. x264's
            macroblock tree is left out for it: under load, its results were seen to vary.
        fragmented: write a second at a time, so that what a killed process leaves can be played up to its last whole
            second (under its temporary name). A finished file is an ordinary MP4 where PyAV has FFmpeg 8 or newer, else
            it stays in fragments.
        chroma_between: the planes of `add_yuv` have their chroma in the middle of four pixels, and the file says so;
            else it says nothing, and players take it to be at the left two.

    Raises:
        ImportError: PyAV is absent.
        ValueError: a size or frame rate that is not positive.
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: PathLike, width: int, height: int, fps: float = 30.0, quality: int = 20, *,
        preset: str = "veryfast", threads: int | None = None, fragmented: bool = False, reproducible: bool = False,
        chroma_between: bool = False,
    ) -> None:  # fmt: skip
        if width < 1 or height < 1:
            raise ValueError(f"width and height must be at least 1, got {width}x{height}")
        if not 0 < fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {fps}")
        require_av()
        self.path, self.width, self.height = Path(path), width, height
        self.padded = bool(width % 2 or height % 2)
        self.frames = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._quality, self._preset, self._threads = quality, preset, threads
        self._fragmented, self._reproducible, self._chroma_between = fragmented, reproducible, chroma_between

    def __enter__(self) -> VideoWriter:
        import av

        self._place = atomic_path(self.path)
        self._temporary = self._place.__enter__()
        try:
            muxing, coding = {"movflags": "+faststart"}, {"crf": str(self._quality), "preset": self._preset}
            x264 = [*["mbtree=0"] * self._reproducible, *["chromaloc=1"] * self._chroma_between]
            if x264:
                coding["x264-params"] = ":".join(x264)
            if self._fragmented:
                muxing = {"movflags": _fragments(av), "flush_packets": "1"}
                coding["g"] = str(max(1, round(self._fps)))  # a fragment begins with a key frame
            self._container = av.open(str(self._temporary), "w", format="mp4", options=muxing)
            self._stream = self._container.add_stream("libx264", rate=self._fps, options=coding)
            if self._threads is not None:
                self._stream.codec_context.thread_count = self._threads
                self._stream.codec_context.thread_type = "FRAME"  # slices would cost quality, and share less evenly
            self._stream.width, self._stream.height = self.width + self.width % 2, self.height + self.height % 2
            self._stream.pix_fmt = "yuv420p"
            # BT.709 with limited range, and said so in the file: players otherwise guess, and colours shift.
            context = self._stream.codec_context
            context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1
        except BaseException as error:
            self._place.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def add(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 or floating in 0..1, [height, width, 3]."""
        import av

        if frame.shape != (self.height, self.width, 3):
            raise ValueError(f"frame must be [{self.height},{self.width},3], got {list(frame.shape)}")
        pixels = to_uint8(frame)
        if self.padded:
            pixels = np.pad(pixels, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        self._encode(
            picture.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709", dst_color_range="MPEG")
        )

    def add_yuv(self, planes: np.ndarray) -> None:
        """Append one frame given as yuv420p, uint8 [3/2 h, w] with the planes one after the other, of even sides h and
        w: the film's, padded where they are odd. BT.709, limited range."""
        import av

        height, width = self.height + self.height % 2, self.width + self.width % 2
        if planes.shape != (height * 3 // 2, width) or planes.dtype != np.uint8:
            raise ValueError(
                f"planes must be uint8 [{height * 3 // 2},{width}], got {planes.dtype} {list(planes.shape)}"
            )
        self._encode(av.VideoFrame.from_ndarray(planes, format="yuv420p"))

    def _encode(self, picture: Any) -> None:
        picture.pts, picture.time_base = self.frames, 1 / self._fps
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.frames == 0:
                    raise ValueError(f"{self.path}: a film needs at least one frame")
                for packet in self._stream.encode():
                    self._container.mux(packet)
            self._container.close()
        except BaseException as late:
            if kind is None:
                self._place.__exit__(type(late), late, late.__traceback__)
                raise
        self._place.__exit__(kind, error, trace)


def _fragments(av: Any) -> str:
    """The muxer's flags for a file that can be played while it grows; the first of them is FFmpeg 8's."""
    if av.library_versions["libavformat"] >= (62,):
        return "hybrid_fragmented"
    return "frag_keyframe+empty_moov+default_base_moof"


def require_av() -> None:
    """Raise ImportError with the remedy where PyAV is absent."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise ImportError("writing MP4 needs PyAV: pip install 'rapfast[video]'") from None


def contact_sheet(
    images: Sequence[np.ndarray], columns: int | None = None, gap: int = 6, background: int = 255
) -> np.ndarray:
    """Pictures of one size on a grid with thin gaps, uint8 [H, W, 3].

    columns: by default those that bring the sheet closest to 4:3 without empty cells where that is possible.
    """
    if not images:
        raise ValueError("images must hold at least one picture")
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or len(images[0].shape) != 3 or images[0].shape[2] != 3:
        raise ValueError(f"images must all be [H,W,3] of one size, got {sorted(list(s) for s in shapes)}")
    height, width = images[0].shape[:2]
    n = len(images)
    if columns is None:

        def cost(c: int) -> tuple[int, float]:
            rows = -(-n // c)
            return rows * c - n, abs(np.log(c * width / (rows * height) / (4 / 3)))

        columns = min(range(1, n + 1), key=cost) if n <= 3 else min(range(2, max(3, n // 2 + 1)), key=cost)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), background, np.uint8)
    for k, image in enumerate(images):
        y, x = gap + (k // columns) * (height + gap), gap + (k % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = to_uint8(image)
    return sheet


def _checked(image: np.ndarray, name: str) -> np.ndarray:
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise ValueError(f"{name} must be [H,W,3] or [H,W] with at least one pixel, got {list(image.shape)}")
    return image
