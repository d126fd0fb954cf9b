"""Where views' pictures go: buffers of the host, and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rapfast.rvs.output import PictureWriter, ViewBuffer, to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.cuda
def test_a_buffer_waits_for_its_copies():
    parts = [torch.full((3, 3, 200, 300), float(i), device="cuda") for i in range(9)]
    for destination in ("cpu", "pinned"):
        buffer = ViewBuffer(26, (3, 200, 300), torch.float32, torch.device("cuda"), destination)
        for i, part in enumerate(parts):
            places = range(3 * i, min(3 * i + 3, 26))
            buffer.put(places, part[: len(places)] * 1.0)
        result = buffer.finish()
        assert result[:, 0, 0, 0].tolist() == [float(i // 3) for i in range(26)]
        assert result.device.type == "cpu"


def test_a_buffer_takes_places_with_gaps():
    buffer = ViewBuffer(6, (2,), torch.float32, torch.device("cpu"))
    buffer.put([1, 2, 5], torch.tensor([[1.0, 1], [2, 2], [5, 5]]))
    buffer.put([0, 3, 4], torch.tensor([[0.0, 0], [3, 3], [4, 4]]))
    assert buffer.finish()[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_pixels_are_rounded_and_clamped():
    colors = torch.tensor([-0.1, 0.0, 0.5 / 255, 0.49 / 255, 100.5 / 255, 254.49 / 255, 1.0, 7.0, -np.inf, np.inf])
    pictures = colors.double().expand(3, 1, len(colors))
    assert to_pixels(pictures)[0, :, 1].tolist() == [0, 0, 1, 0, 101, 254, 255, 255, 0, 255]


def test_written_jpegs_decode_to_pillows_own(tmp_path):
    from PIL import Image

    pixels = torch.randint(0, 256, (5, 20, 33, 3), dtype=torch.uint8)
    with PictureWriter(tmp_path / "a" / "b", threads=2, waiting=1) as writer:
        for i, one in enumerate(pixels):
            writer.put(f"{i}", one)
    for i, one in enumerate(pixels):
        Image.fromarray(one.numpy()).save(tmp_path / "expected.jpg", quality=100)
        got, want = (np.asarray(Image.open(tmp_path / name)) for name in (f"a/b/{i}.jpg", "expected.jpg"))
        assert np.array_equal(got, want)
    assert len(list((tmp_path / "a" / "b").iterdir())) == 5


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "0.jpg").mkdir()
    with pytest.raises(OSError, match=r"0\.jpg"), PictureWriter(tmp_path) as writer:
        writer.put("0", torch.zeros(4, 4, 3, dtype=torch.uint8))
