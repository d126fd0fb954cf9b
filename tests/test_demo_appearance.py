"""`rapfast demo --appearance` as a user meets it."""

from __future__ import annotations

import numpy as np
from cli_runs import fails, files, run
from PIL import Image

from rapfast import Cameras, load_rap

SMALL = ["--appearance", "--size", "96x54", "--gaussians", 5000, "--views", 2, "--batch", 3, "--device", "cpu"]


def test_strip_and_single_pictures(tmp_path, capsys):
    out = tmp_path / "demo"
    assert run("demo", "--out", out, *SMALL, "--save-scene") == 0
    weights = ("0.0", "0.5", "1.0", "1.5", "2.0")
    singles = [f"row_{row}_weight_{weight}.png" for row in (0, 1) for weight in weights]
    model = "model/ckpts_point_cloud/iteration_30000"
    assert [name for name in files(out) if "model" not in name] == sorted(
        ["appearance.png", "cameras.json", "row_0_reference_day.png", "row_1_reference_evening.png", *singles]
    )
    assert (out / model / "point_cloud.ply").is_file()
    assert "5,000 Gaussians" in capsys.readouterr().out
    picture = {name: np.asarray(Image.open(out / name), float) for name in singles}
    assert all(image.shape == (54, 96, 3) and image.std() > 15 for image in picture.values())
    # Day brightens the picture with the weight, step by step; evening warms it.
    bright = [picture[f"row_0_weight_{w}.png"].mean() for w in weights]
    warm = [(lambda p: (p[..., 0] - p[..., 2]).mean())(picture[f"row_1_weight_{w}.png"]) for w in weights]
    for values in (bright, warm):
        assert all(later > earlier for earlier, later in zip(values, values[1:], strict=False)), values
    # The strip: a reference image and five weights in each row, with room for words.
    strip = np.asarray(Image.open(out / "appearance.png"), float)
    assert strip.shape[0] > 2 * 54 and strip.shape[1] > 6 * 96
    reference = np.asarray(Image.open(out / "row_1_reference_evening.png"), float)
    y, x = 18 + 6 + 54 + 6, 64 + 6
    assert np.array_equal(strip[y : y + 54, x : x + 96], reference)
    assert np.array_equal(strip[y : y + 54, x + 5 * 102 : x + 5 * 102 + 96], picture["row_1_weight_2.0.png"])
    assert (strip[:, :64] < 128).any()  # the hours' names
    # What is saved is the scene that was shown.
    assert len(load_rap(out / "model")) == 5000 and len(Cameras.from_file(out / "cameras.json")) == 2


def test_it_refuses_as_the_demo_does(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert "--overwrite" in fails(capsys, "demo", "--out", tmp_path / "full", *SMALL)
    for options, words in (
        (["--gaussians", 3000], "rapfast: --gaussians must be at least 3425 for this room, got 3000"),
        (["--views", 0], "--views must be at least 1"),
    ):
        assert words in fails(capsys, "demo", "--out", tmp_path / "o", *SMALL, *options)
    assert files(tmp_path / "full") == ["mine.txt"]
