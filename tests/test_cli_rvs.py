"""`rapfast rvs` as a user meets it: what lies in the folder, whatever happened on the way."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cli_runs import fails, files, run
from PIL import Image

from rapfast import Cameras, PostProcess, load_rap, procedural
from rapfast.media import read_image, write_png
from rapfast.rvs import FarFrom, PoseSampler, lens_grid
from rapfast.rvs.brisque import Brisque

VIEWS = 9
SIZE = (64, 36)


@pytest.fixture(scope="module", autouse=True)
def models_are_read_once():
    """Half of a small set's time is the reading of its model's 57 MB."""
    kept = functools.cache(load_rap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rapfast.cli.rvs.load_rap", kept)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A model, three poses, and their images as references in refs/ and as training images in images/."""
    folder = tmp_path_factory.mktemp("demo")
    lit = procedural.lit_room(3500)
    scene = procedural.appearance_room(lit=lit)
    scene.save(folder / "model")
    cameras = procedural.room_cameras(3, *SIZE)
    cameras.names = ["a/0001.jpg", "a/0002.jpg", "b/0001.jpg"]
    cameras.save(folder / "cameras.json")
    for hour, name in zip(("day", "evening", "night"), cameras.names, strict=True):
        (image,) = lit.images(cameras[:1], hour)
        for path in (folder / "refs" / f"{hour}.png", folder / "images" / name.replace(".jpg", ".png")):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, image.permute(1, 2, 0).numpy())
    return folder


def command(demo, out, **changes) -> list[str]:
    """The words of a command; a change to None leaves an option out."""
    options = {
        "poses": demo / "cameras.json", "reference": demo / "refs", "views": VIEWS, "out": out, "batch": 4, "seed": 5,
        "device": "cpu",
    } | changes  # fmt: skip
    words = ["rvs", str(demo / "model")]
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """A set that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(*command(demo, out)) == 0
    return out


def content(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


# What is in a set ----------------------------------------------------------------------------------------------------


def test_help_teaches_by_examples(capsys):
    assert run("rvs", "--help") == 0
    text = capsys.readouterr().out
    assert "rapfast rvs output/church --poses" in text and "usage: rapfast rvs" in text


def test_pictures_are_those_of_their_manifest(demo, whole):
    found = manifest(whole)
    names = [f"view_{i:06d}.png" for i in range(VIEWS)]
    assert files(whole) == sorted([".rvs.lock", "cameras.json", "manifest.json", *names])
    assert [view["file"] for view in found["views"]] == names and (whole / ".rvs.lock").read_bytes() == b""
    scene = load_rap(demo / "model")
    cameras = Cameras.from_file(whole / "cameras.json")
    assert len(cameras) == VIEWS and cameras.names[3] == "view_000003"
    given = Cameras.from_file(demo / "cameras.json")
    weights = [view["weight"] for view in found["views"]]
    assert len(set(weights)) == VIEWS and all(0 <= w <= 2 for w in weights)
    assert len({view["reference"] for view in found["views"]}) > 1
    for i, view in enumerate(found["views"]):
        assert view["index"] == i and view["around"] == given.names[i % 3]
        image = torch.from_numpy(read_image(demo / "refs" / view["reference"])).permute(2, 0, 1)
        pose = np.eye(4, dtype=np.float32)
        pose[:3] = np.array(view["pose"])
        viewmat = torch.from_numpy(np.linalg.inv(pose))[None]
        assert np.allclose(viewmat, cameras.viewmats[i : i + 1], atol=1e-5)
        K = torch.tensor(view["K"])[None]
        assert torch.equal(K, given.Ks[i % 3 : i % 3 + 1])
        want, _, _ = scene.render(
            viewmat, K, *SIZE, feature_maps=scene.feature_maps(image[None]), view_weights=[view["weight"]],
            postprocess=PostProcess(dtype=torch.uint8),
        )  # fmt: skip
        assert np.array_equal(np.asarray(Image.open(whole / view["file"])), want[0].numpy())
        assert want.float().std() > 5


def test_poses_are_rap_s_samplers_around_the_given_ones(demo, whole, tmp_path):
    given = torch.linalg.inv(Cameras.from_file(demo / "cameras.json").viewmats.double())[:, :3].numpy()
    for kind, name, options in (
        ("xz", "xz_plane", {"distance": 0.5, "angle": 3}),
        ("sphere", "uniform_sphere", {"d_max": 0.01, "distance": 2}),
        ("uniform", "uniform_sphere", {}),
    ):
        out = tmp_path / kind
        assert run(*command(demo, out, sampler=kind, views=4, weights=(1, 1), **options)) == 0
        got = np.array([view["pose"] for view in manifest(out)["views"]])
        sampler = PoseSampler(options.get("distance", 0.2), options.get("angle", 10.0), name)
        for i in range(4):
            rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((5, i))))
            rng.randint(3), rng.uniform(1, 1)
            want = sampler.sample(given[i % 3][None], rng)[0]
            if "d_max" in options:
                centres = given[:, :, 3]
                want[:, 3] = np.clip(want[:, 3], centres.min(0) - 0.01, centres.max(0) + 0.01)
            assert np.array_equal(got[i], want)
        assert {view["weight"] for view in manifest(out)["views"]} == {1.0}


def test_the_batch_changes_no_byte_and_the_seed_all(demo, whole, tmp_path):
    assert run(*command(demo, tmp_path / "one", batch=1)) == 0
    assert content(tmp_path / "one") == content(whole)
    assert run(*command(demo, tmp_path / "other", seed=6)) == 0
    others = content(tmp_path / "other")
    assert all(others[name] != data for name, data in content(whole).items() if name != ".rvs.lock")


def test_sizes_and_formats(demo, whole, tmp_path):
    out = tmp_path / "o"
    assert run(*command(demo, out, views=2, size="128x72", resize="64x36", format="jpeg", quality=100)) == 0
    found = manifest(out)
    assert (found["width"], found["height"]) == SIZE and found["settings"]["format"] == "jpeg 100"
    assert [view["file"] for view in found["views"]] == ["view_000000.jpg", "view_000001.jpg"]
    # The same views rendered at the saved size, by the same intrinsics: alike, and not the same.
    for view, plain in zip(found["views"], manifest(whole)["views"], strict=False):
        assert np.allclose(view["K"], plain["K"]) and view["pose"] == plain["pose"]
        a, b = (np.asarray(Image.open(f), float) for f in (out / view["file"], whole / plain["file"]))
        assert a.shape == b.shape and 0 < np.abs(a - b).mean() < 12
    assert Cameras.from_file(out / "cameras.json").width == SIZE[0]


def test_brisque_takes_the_first_below_the_threshold_or_the_best(demo, tmp_path):
    def verdicts(name, **options):
        out = tmp_path / name
        assert run(*command(demo, out, views=4, **options)) == 0
        return manifest(out)["views"]

    every = verdicts("plain")
    easy = verdicts("easy", brisque=1000)
    assert [view["attempt"] for view in easy] == [0] * 4
    assert [view["pose"] for view in easy] == [view["pose"] for view in every]
    assert [view["blake2b"] for view in easy] == [view["blake2b"] for view in every]
    hard = verdicts("hard", brisque=-1000, attempts=3, batch=3)
    scene, given = load_rap(demo / "model"), Cameras.from_file(demo / "cameras.json")
    poses = torch.linalg.inv(given.viewmats.double())[:, :3].numpy()
    chosen = []
    for i, view in enumerate(hard):
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((5, i))))
        rng.randint(3), rng.uniform(0, 2)
        tried = np.concatenate([PoseSampler(0.2, 10.0).sample(poses[i % 3][None], rng) for _ in range(3)])
        full = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
        full[:, :3] = tried
        image = torch.from_numpy(read_image(demo / "refs" / view["reference"])).permute(2, 0, 1)
        pictures, _, _ = scene.render(
            torch.from_numpy(np.stack([np.linalg.inv(m) for m in full])), given.Ks[[i % 3] * 3], *SIZE,
            feature_maps=scene.feature_maps(image[None]),
        )  # fmt: skip
        scores = Brisque().score(pictures).numpy()
        assert view["attempt"] == scores.argmin() and view["brisque"] == scores.min()
        assert np.array_equal(view["pose"], tried[scores.argmin()])
        chosen.append(view["attempt"])
        # A threshold just above this attempt's score is met by it, if no earlier attempt is below.
    assert any(chosen)
    middle = sorted(view["brisque"] for view in hard)[1] + 1e-9
    for view in verdicts("middle", brisque=middle, attempts=3):
        assert (view["brisque"] < middle) == (hard[view["index"]]["brisque"] < middle)


def own_generator(index: int) -> np.random.RandomState:
    """Of view `index` under seed 5, behind its reference image and its weight."""
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((5, index))))
    rng.randint(3), rng.uniform(0, 2)
    return rng


def given_poses(demo) -> np.ndarray:
    return torch.linalg.inv(Cameras.from_file(demo / "cameras.json").viewmats.double())[:, :3].numpy()


def poses_of(folder) -> np.ndarray:
    return np.array([view["pose"] for view in manifest(folder)["views"]])


def test_lens_places_views_on_a_grid(demo, tmp_path, capsys):
    out = tmp_path / "grown"
    options = {"sampler": "lens", "step": 0.5, "d_max": 0.3, "distance": 0.9, "angle": 4, "views": 5}
    assert run(*command(demo, out, **options)) == 0
    given = given_poses(demo)
    grid = lens_grid(given, 0.5, margin=0.3, max_distance=0.9)
    assert f"the grid has {len(grid)} points" in capsys.readouterr().out and len(grid) > 5
    options["views"] = len(grid) + 2
    assert run(*command(demo, out, **options)) == 0
    assert run(*command(demo, tmp_path / "whole", **options, batch=3)) == 0
    assert content(out) == content(tmp_path / "whole")
    got, names = poses_of(out), Cameras.from_file(demo / "cameras.json").names
    order = [int(np.abs(grid[:, :, 3] - pose[:, 3]).max(1).argmin()) for pose in got]
    assert sorted(order[: len(grid)]) == list(range(len(grid))) != order[: len(grid)] and order[-2:] == order[:2]
    for i, view in enumerate(manifest(out)["views"]):
        point = grid[order[i]]
        nearest = np.linalg.norm(given[:, :, 3] - point[:, 3], axis=1).argmin()
        assert view["around"] == names[nearest] and np.array_equal(point[:, :3], given[nearest, :, :3])
        want = PoseSampler(0.0, 4.0).sample(point[None], own_generator(i))[0]
        assert np.array_equal(got[i][:, :3], want[:, :3]) and np.array_equal(got[i][:, 3], point[:, 3])
    settings = manifest(out)["settings"]
    assert {name: settings[name] for name in options if name != "views"} == {
        name: value for name, value in options.items() if name != "views"
    }
    assert "--step 0.5" in " ".join(manifest(out)["command"])
    text = fails(capsys, *command(demo, out, **options | {"step": 0.4}))
    assert "step was 0.5 and is 0.4" in text
    other = tmp_path / "other"
    assert run(*command(demo, other, **options | {"views": 5, "seed": 6})) == 0
    assert not np.array_equal(poses_of(other)[:, :, 3], got[:5, :, 3])


@pytest.mark.parametrize("minima", [{"min_distance": 0.5}, {"min_distance": 0.6, "min_angle": 12}])
def test_poses_keep_away_from_the_validation_poses(demo, whole, tmp_path, capsys, minima):
    given, out = given_poses(demo), tmp_path / "away"
    options = minima | {"validation_poses": demo / "cameras.json"}
    assert run(*command(demo, out, views=6, **options)) == 0
    far = FarFrom(given, **minima)
    got, drawn = poses_of(out), 0
    assert far(got).all() and not far(poses_of(whole)[:6]).all()
    for i, pose in enumerate(got):
        rng = own_generator(i)
        while True:
            want, drawn = PoseSampler(0.2, 10.0).sample(given[i % 3][None], rng), drawn + 1
            if far(want).all():
                break
        assert np.array_equal(pose, want[0])
    assert drawn > len(got)
    settings = manifest(out)["settings"]
    assert [settings.get(name) for name in ("min_distance", "min_angle")] == [
        minima.get(name) for name in ("min_distance", "min_angle")
    ]
    words = fails(capsys, *command(demo, out, views=6, **options | {"min_distance": 0.1}))
    assert f"min_distance was {minima['min_distance']} and is 0.1" in words
    few = json.loads((demo / "cameras.json").read_text())[:2]
    (tmp_path / "few.json").write_text(json.dumps(few))
    words = fails(capsys, *command(demo, out, views=6, **options | {"validation_poses": tmp_path / "few.json"}))
    assert "validation_poses was" in words
    # The same poses in another file are the same; the set is whole already.
    shutil.copy(demo / "cameras.json", tmp_path / "same.json")
    before = (out / "view_000003.png").read_bytes()
    assert run(*command(demo, out, views=6, **options | {"validation_poses": tmp_path / "same.json"})) == 0
    assert "6 of 6 views are there already" in capsys.readouterr().out
    assert (out / "view_000003.png").read_bytes() == before


def test_every_pose_that_brisque_judges_is_far_enough(demo, tmp_path):
    options = {"validation_poses": demo / "cameras.json", "min_distance": 0.5, "brisque": -1000, "attempts": 3}
    assert run(*command(demo, tmp_path / "o", views=3, **options)) == 0
    given = given_poses(demo)
    far = FarFrom(given, 0.5)
    for i, view in enumerate(manifest(tmp_path / "o")["views"]):
        rng, accepted = own_generator(i), []
        while len(accepted) < 3:
            pose = PoseSampler(0.2, 10.0).sample(given[i % 3][None], rng)
            accepted += [pose[0]] if far(pose).all() else []
        assert np.array_equal(view["pose"], accepted[view["attempt"]])


def test_what_no_pose_can_keep_is_a_sentence(demo, tmp_path, capsys):
    options = {"validation_poses": demo / "cameras.json", "min_distance": 5}
    words = fails(capsys, *command(demo, tmp_path / "o", **options))
    assert "view 0: 1000 poses were drawn around 'a/0001.jpg', and none is far enough" in words
    assert "lower --min-distance" in words
    words = fails(capsys, *command(demo, tmp_path / "p", sampler="lens", step=0.5, **options))
    assert "--sampler lens: no point of the grid is far enough from the validation poses" in words
    words = fails(capsys, *command(demo, tmp_path / "p", sampler="lens", step=50, distance=0, d_max=1))
    assert "--sampler lens: no point of the grid is within --distance of a given pose" in words
    words = fails(capsys, *command(demo, tmp_path / "p", sampler="lens", step=1e-7))
    assert "--sampler lens: step 1e-07 makes a grid of" in words
    assert not (tmp_path / "p").exists()


# References ----------------------------------------------------------------------------------------------------------


def test_a_view_takes_the_image_of_its_pose_where_names_tell(demo, tmp_path, capsys):
    for name, reference in (("given", demo / "images"), ("found", None)):
        assert run(*command(demo, tmp_path / name, views=4, reference=reference)) == 0
        found = manifest(tmp_path / name)
        assert found["reference_of_a_view"] == "that of its pose"
        names = [view["reference"].rpartition(".")[0] for view in found["views"]]
        assert names == ["a/0001", "a/0002", "b/0001", "a/0001"]
    assert files(tmp_path / "given") == files(tmp_path / "found")
    for name in files(tmp_path / "given"):
        if name.startswith("view"):
            assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "found" / name).read_bytes()


def test_reference_size_scales_by_areas(demo, whole, tmp_path):
    big = tmp_path / "big.png"
    image = np.asarray(Image.open(demo / "refs" / "day.png"))
    Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(big)
    for name, options in (
        ("a", {"reference": big, "reference_size": "64x36"}),
        ("b", {"reference": demo / "refs/day.png"}),
    ):
        assert run(*command(demo, tmp_path / name, views=2, **options)) == 0
    a, b = ([view["blake2b"] for view in manifest(tmp_path / name)["views"]] for name in "ab")
    assert a == b


def test_missing_references_are_a_sentence(demo, tmp_path, capsys):
    moved = tmp_path / "moved.json"
    shutil.copy(demo / "cameras.json", moved)
    text = fails(capsys, *command(demo, tmp_path / "o", reference=None, poses=moved))
    assert "--reference: none given" in text and "'a/0001.jpg' and 2 more" in text and str(tmp_path) in text
    (tmp_path / "empty").mkdir()
    for reference, words in (
        (tmp_path / "none.png", "no such image or folder"),
        (tmp_path / "empty", "holds no images"),
    ):
        assert words in fails(capsys, *command(demo, tmp_path / "o", reference=reference))
    (tmp_path / "words.png").write_text("hello")
    assert "words.png: is not a picture" in fails(
        capsys, *command(demo, tmp_path / "o", reference=tmp_path / "words.png")
    )
    assert not (tmp_path / "o").exists() or not any("view" in name for name in files(tmp_path / "o"))


# Interrupted, repeated, disturbed ------------------------------------------------------------------------------------


def test_killed_and_given_again_it_ends_the_same(demo, tmp_path, capsys):
    views, out = 40, tmp_path / "killed"
    words = command(demo, out, views=views, batch=2)
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    for _ in range(2):
        there = len(list(out.glob("view_*.png"))) if out.is_dir() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "rapfast.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(list(out.glob("view_*.png"))) < there + 5 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # its threads stop one by one
        if process.poll() is None and not (out / "manifest.json").exists():
            # While it lives, nobody else may write.
            before = content(out)
            assert f"process {process.pid} is writing this set" in fails(capsys, *words)
            assert content(out) == before
        process.kill()
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
        assert (out / "progress.jsonl").exists() and not (out / "manifest.json").exists()
    there = len(list(out.glob("view_*.png")))
    assert 10 <= there < views
    capsys.readouterr()
    assert run(*words) == 0
    assert "views are there already" in capsys.readouterr().out
    assert run(*command(demo, tmp_path / "whole", views=views)) == 0
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("limit", [1500, 4000])
def test_a_full_disk_is_a_sentence_and_the_set_goes_on_later(demo, whole, tmp_path, limit):
    """A limit on the size of files fails writes as a full disk does: the pictures', then the journal's."""
    out = tmp_path / "o"
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); "
    code += "from rapfast.cli import main; sys.exit(main(sys.argv[1:]))"
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", code, *command(demo, out)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("rapfast: ") and done.stderr.count("\n") == 1, done.stderr
    assert "could not be written" in done.stderr and not (out / "manifest.json").exists()
    assert run(*command(demo, out)) == 0
    assert content(out) == content(whole)


def half_done(whole, tmp_path):
    """The folder as a kill in the middle of writing leaves it."""
    out = copied(whole, tmp_path)
    found = manifest(out)
    lines = [{"format": found["format"], "settings": found["settings"]}, *found["views"][:4]]
    text = "".join(json.dumps(line) + "\n" for line in lines) + json.dumps(found["views"][4])[:70]
    (out / "progress.jsonl").write_text(text)
    for name in ("manifest.json", "cameras.json", *(f"view_{i:06d}.png" for i in range(6, VIEWS))):
        (out / name).unlink()
    for name in (".0123456789ab-view_000006.png", ".00112233445f-manifest.json"):
        (out / name).write_bytes(b"half of")
    (out / ".rvs.lock").write_text("1234\n")
    return out


def test_what_a_kill_leaves_is_taken_up(demo, whole, tmp_path, capsys):
    out = half_done(whole, tmp_path)
    assert run(*command(demo, out)) == 0
    assert "4 of 9 views are there already" in capsys.readouterr().out
    assert content(out) == content(whole)


def test_a_kill_after_the_manifest_was_written(demo, whole, tmp_path):
    out = copied(whole, tmp_path)
    found = manifest(out)
    (out / "progress.jsonl").write_text(json.dumps({"format": found["format"], "settings": found["settings"]}) + "\n")
    assert run(*command(demo, out)) == 0
    assert content(out) == content(whole)


def test_pictures_that_changed_are_rendered_again(demo, whole, tmp_path, capsys):
    out = copied(whole, tmp_path)
    data = bytearray((out / "view_000003.png").read_bytes())
    data[len(data) // 2] ^= 16
    (out / "view_000003.png").write_bytes(data)
    (out / "view_000005.png").write_bytes(data[:50])
    (out / "view_000007.png").unlink()
    assert run(*command(demo, out)) == 0
    captured = capsys.readouterr()
    assert "view_000003.png is not what was written" in captured.err and "view_000005.png" in captured.err
    assert "view_000007" not in captured.err and "3 views in" in captured.out
    assert content(out) == content(whole)
    assert run(*command(demo, out)) == 0
    assert "9 of 9 views are there already" in capsys.readouterr().out and content(out) == content(whole)


def test_more_views_extend_a_set(demo, whole, tmp_path, capsys):
    out = tmp_path / "grown"
    assert run(*command(demo, out, views=4)) == 0
    assert run(*command(demo, out)) == 0
    assert content(out) == content(whole)
    assert "holds 9 views, more than --views 4" in fails(capsys, *command(demo, out, views=4))


def test_another_set_is_refused_and_nothing_of_it_touched(demo, whole, tmp_path, capsys):
    out = copied(whole, tmp_path)
    before = content(out)
    for options, words in (
        ({"seed": 4}, "seed was 5 and is 4"),
        ({"sampler": "xz", "angle": 1}, "sampler was 'default' and is 'xz_plane', angle was 10.0 and is 1.0"),
        ({"size": "32x18"}, "size was [64, 36] and is [32, 18]"),
    ):
        text = fails(capsys, *command(demo, out, **options))
        assert words in text and "--overwrite" in text
        assert content(out) == before
    assert run(*command(demo, out, seed=4, views=3, overwrite=True)) == 0
    assert files(out) == [".rvs.lock", "cameras.json", "manifest.json", *(f"view_{i:06d}.png" for i in range(3))]
    assert manifest(out)["settings"]["seed"] == 4


def test_foreign_files_are_kept(demo, tmp_path, capsys):
    out = tmp_path / "o"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "holds 'thesis.txt', which is none of this command's" in fails(capsys, *command(demo, out))
    assert run(*command(demo, out, views=1, overwrite=True)) == 0
    assert (out / "thesis.txt").read_text() == "mine" and (out / "view_000000.png").exists()
    other = tmp_path / "p"
    other.mkdir()
    (other / "view_000000.png").write_bytes(b"whose?")
    assert "nothing that says what they show" in fails(capsys, *command(demo, other))
    (other / "manifest.json").write_text("{}")
    assert "no manifest of this command" in fails(capsys, *command(demo, other))
    assert (other / "view_000000.png").read_bytes() == b"whose?"


def test_a_locked_folder_is_refused_and_a_freed_one_taken(demo, whole, tmp_path, capsys):
    out = half_done(whole, tmp_path)
    with open(out / ".rvs.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = content(out)
        assert "process 1234 is writing this set" in fails(capsys, *command(demo, out))
        assert content(out) == before
    assert run(*command(demo, out)) == 0


# --cache -------------------------------------------------------------------------------------------------------------


def test_a_cache_gives_the_same_bytes_and_says_how_much_it_did(demo, whole, tmp_path, capsys):
    def go(name: str, **options) -> str:
        capsys.readouterr()
        assert run(*command(demo, tmp_path / name, cache=tmp_path / "cache", **options)) == 0
        assert content(tmp_path / name) == content(whole)
        captured = capsys.readouterr()
        return captured.out + captured.err

    text = go("first")
    assert "rendered views: 0 of 9 found (0 %)" in text and "on disk" in text
    text = go("second", batch=3)
    assert "rendered views: 9 of 9 found (100 %)" in text
    assert "feature maps: 0 of 0 found" in text  # nothing was rendered
    text = go("third", refresh="always")
    assert "rendered views: 0 of 9 found" in text and "0 in host memory, 3 on disk" in text
    for shard in (tmp_path / "cache" / "views").glob("*.npz"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    text = go("fourth")
    assert text.count("note: ") == 1 and "is damaged" in text and "rendered views: 0 of 9 found" in text


# Wrong options -------------------------------------------------------------------------------------------------------


def test_wrong_options_are_one_sentence(demo, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options, words in (
        ({"views": 0}, "--views must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"attempts": 0}, "--attempts must be at least 1"),
        ({"attempts": 8}, "--attempts needs --brisque"),
        ({"quality": 95}, "--quality 95 needs --format jpeg, got png"),
        ({"refresh": "always"}, "--refresh needs --cache"),
        ({"refresh": "changed"}, "--refresh needs --cache"),
        ({"seed": -1}, "--seed must be within"),
        ({"quality": 101, "format": "jpeg"}, "--quality must be within 1..100"),
        ({"distance": -1}, "--distance must be a number >= 0"),
        ({"angle": "nan"}, "--angle must be a number >= 0"),
        ({"d_max": "inf"}, "--d-max must be a number >= 0"),
        ({"min_distance": -1}, "--min-distance must be a number >= 0"),
        ({"min_angle": 181}, "--min-angle must be within 0..180 degrees"),
        ({"min_angle": 3}, "--min-angle needs --validation-poses"),
        ({"min_distance": 0.1}, "--min-distance needs --validation-poses"),
        ({"validation_poses": demo / "cameras.json"}, "--validation-poses needs --min-distance, --min-angle or both"),
        ({"validation_poses": tmp_path / "no", "min_angle": 3}, "--validation-poses: there is no file or folder"),
        ({"sampler": "lens"}, "--sampler lens needs --step"),
        ({"step": 0.5}, "--step is for --sampler lens, got --sampler default"),
        ({"sampler": "lens", "step": 0}, "--step must be a number > 0"),
        ({"weights": (2, 0)}, "--weights must be two finite numbers, low <= high"),
        ({"size": "big"}, "--size must be WIDTHxHEIGHT"),
        ({"resize": "0x3"}, "--resize must be WIDTHxHEIGHT"),
        ({"reference_size": "9"}, "--reference-size must be WIDTHxHEIGHT"),
        ({"brisque": "nan"}, "--brisque must be a finite score"),
        ({"brisque": 40, "resize": "15x36"}, "--brisque needs pictures of at least 16x16"),
        ({"poses": tmp_path / "no.json"}, "--poses: there is no file or folder"),
        ({"poses": demo / "refs" / "day.png"}, "no camera file known here"),
        ({"out": tmp_path / "file"}, "it is a file"),
        ({"device": "tpu"}, "--device must be auto"),
        ({"iteration": 7}, "iteration 7 is not there"),
    ):
        assert words in fails(capsys, *command(demo, **({"out": tmp_path / "o"} | options))), options
    assert "no such folder" in fails(capsys, *command(demo, tmp_path / "o")[:1], tmp_path, *command(demo, tmp_path)[2:])
    assert not (tmp_path / "o").exists()


def test_poses_of_several_sizes(demo, tmp_path, capsys):
    entries = json.loads((demo / "cameras.json").read_text())
    entries[1] |= {"width": 128, "height": 72, "fx": entries[1]["fx"] * 2, "fy": entries[1]["fy"] * 2}
    poses = tmp_path / "mixed.json"
    poses.write_text(json.dumps(entries))
    assert "64x36, 128x72" in fails(capsys, *command(demo, tmp_path / "o", poses=poses))
    assert run(*command(demo, tmp_path / "o", poses=poses, size="64x36", views=3)) == 0
    assert [view["around"] for view in manifest(tmp_path / "o")["views"]] == ["a/0001.jpg", "a/0002.jpg", "b/0001.jpg"]
