"""Pictures, depth maps and films: what is written is what was given, and nothing half-written stays."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rapfast import media


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / max(width - 1, 1), y / max(height - 1, 1), (x + y) / (width + height)], 2).astype(np.float32)


def test_png_keeps_every_byte(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    media.write_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    media.write_png(tmp_path / "grey.png", image[..., 0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), image[..., 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "grey.png"]


def test_floating_colours_round_as_postprocess_does():
    values = np.array([-1.0, 0.0, 0.5 / 255, 0.499 / 255, 0.5, 1.0, 2.0, np.nan, np.inf], np.float32)
    assert media.to_uint8(values).tolist() == [0, 0, 1, 0, 128, 255, 255, 0, 255]


@pytest.mark.parametrize("shape", [(4, 4, 4), (0, 4, 3), (4,), (2, 4, 4, 3)])
def test_png_of_another_shape_is_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="image must be"):
        media.write_png(tmp_path / "a.png", np.zeros(shape, np.uint8))
    assert not list(tmp_path.iterdir())


def test_depth_png_is_millimetres(tmp_path):
    depth = np.array([[0.0, 1.2344], [65.535, 70.0], [np.nan, np.inf]], np.float32)
    media.write_depth_png(tmp_path / "d.png", depth)
    assert media.depths_beyond_png(depth) == 1
    assert np.asarray(Image.open(tmp_path / "d.png")).tolist() == [[0, 1234], [65535, 65535], [0, 0]]
    with pytest.raises(ValueError, match=r"depth must be \[H,W\]"):
        media.write_depth_png(tmp_path / "e.png", depth[..., None])


def test_depth_npy_is_exact(tmp_path):
    depth = np.random.default_rng(0).random((5, 7), np.float32) * 100
    media.write_depth_npy(tmp_path / "d.npy", depth)
    assert np.array_equal(np.load(tmp_path / "d.npy"), depth)


def test_read_image_says_what_is_wrong(tmp_path):
    media.write_png(tmp_path / "a.png", gradient(6, 9))
    assert np.abs(media.read_image(tmp_path / "a.png") - gradient(6, 9)).max() <= 0.5 / 255 + 1e-6
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="is not a picture"):
        media.read_image(tmp_path / "b.png")


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (1, 1), (2, 3)])
def test_film_has_every_frame_and_pads_odd_sides(tmp_path, size):
    av = pytest.importorskip("av")
    width, height = size
    frames = [np.roll(gradient(height, width), 3 * k, 1) for k in range(7)]
    with media.VideoWriter(tmp_path / "film.mp4", width, height, fps=24) as film:
        assert not (tmp_path / "film.mp4").exists()
        for frame in frames:
            film.add(frame)
    assert film.padded == bool(width % 2 or height % 2)
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (width + width % 2, height + height % 2)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 24
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert len(decoded) == 7
    if min(size) > 8:
        for frame, back in zip(frames, decoded, strict=True):  # lossy, and half the colour resolution: close on average
            assert np.abs(back[:height, :width].astype(float) - media.to_uint8(frame)).mean() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_film_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(RuntimeError, match="stop"), media.VideoWriter(tmp_path / "a.mp4", 32, 32) as film:
        film.add(gradient(32, 32))
        raise RuntimeError("stop")
    with (
        pytest.raises(ValueError, match=r"frame must be \[32,32,3\]"),
        media.VideoWriter(tmp_path / "a.mp4", 32, 32) as film,
    ):
        film.add(gradient(31, 32))
    with pytest.raises(ValueError, match="at least one frame"), media.VideoWriter(tmp_path / "a.mp4", 32, 32):
        pass
    with pytest.raises(ValueError, match="fps"):
        media.VideoWriter(tmp_path / "a.mp4", 32, 32, fps=0)
    with pytest.raises(ValueError, match="width and height"):
        media.VideoWriter(tmp_path / "a.mp4", 0, 32)
    assert not list(tmp_path.iterdir())


def test_film_keeps_the_old_one_when_it_fails(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), media.VideoWriter(tmp_path / "a.mp4", 32, 32) as film:
        film.add(gradient(32, 32))
        raise KeyboardInterrupt
    assert (tmp_path / "a.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk: the same error from the same calls."""
    code = f"""
import resource, numpy as np
from rapfast import media
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).random((96, 128, 3))
def film():
    with media.VideoWriter({str(tmp_path / "a.mp4")!r}, 128, 96) as video:
        for _ in range(40):
            video.add(np.random.default_rng(0).random((96, 128, 3)))
for write in (film, lambda: media.write_png({str(tmp_path / "a.png")!r}, noise)):
    try:
        write()
    except OSError as error:
        print(error)
"""
    pytest.importorskip("av")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be written") == 2
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_sentence_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'rapfast\[video\]'"):
        media.VideoWriter(tmp_path / "a.mp4", 32, 32)


@pytest.mark.parametrize("n", range(1, 17))
def test_contact_sheet_shows_every_picture_once(n):
    images = [np.full((9, 16, 3), 10 + k, np.uint8) for k in range(n)]
    sheet = media.contact_sheet(images, gap=2, background=0)
    assert [int((sheet == 10 + k).all(2).sum()) for k in range(n)] == [9 * 16] * n
    assert (sheet[:2] == 0).all() and (sheet[:, :2] == 0).all() and (sheet[-2:] == 0).all()
    assert media.contact_sheet(images, columns=1, gap=0).shape == (9 * n, 16, 3)


def test_contact_sheet_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="at least one"):
        media.contact_sheet([])
    with pytest.raises(ValueError, match="one size"):
        media.contact_sheet([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)])
    with pytest.raises(ValueError, match="columns"):
        media.contact_sheet([np.zeros((2, 2, 3), np.uint8)], columns=0)
