"""Films and their folder: what is decoded, killed and taken up, locked, full; and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_videos import (
    FRAMES,
    CountingProvider,
    make_films,
    psnr,
    read_film,
)
from cli_runs import fails, files, run
from PIL import Image

from rapfast.augment import (
    DIFFICULTIES,
    AugmentationJob,
    FilmOptions,
    OutputFolder,
    film_path,
    parameter_sets,
    params_path,
)
from rapfast.augment.output import TakenError
from rapfast.io.folders import lock_folder
from rapfast.media import VideoWriter
from rapfast.rvs.hashes import file_fingerprint

av = pytest.importorskip("av")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--provider", "synthetic", "--provider_args", "gaussians=3000", "width=64", "height=48", "refiner=false")
FILM = "{0}/{1}/render_fixed_viewpoint/{1}/{1}_fixed_viewpoint_video.mp4"


def augment(out: Path, *words, frames: int = 5, videos=("demo",), batch: bool = True) -> int:
    mode = ("--batch",) if batch else ()
    return run("augment", *mode, *SMALL, f"frames={frames}", "--video_list", *videos, "--output_root", out,
               "--encoder_threads", 1, "--device", "cpu", *words)  # fmt: skip


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------- films


def test_a_film_decodes_to_the_rendered_frames(tmp_path):
    """Within the codec's error: against the PNGs of the same pictures."""
    make_films(tmp_path, CountingProvider(128, 96), names=("medium",), films=FilmOptions(10, threads=1, pngs=True))
    path = film_path(tmp_path, "medium", "v")
    frames = read_film(path)
    pictures = [np.asarray(Image.open(path.parent / "frames" / f"{f:06d}.png")) for f in range(FRAMES)]
    assert len(frames) == FRAMES and frames[0].shape == pictures[0].shape == (96, 128, 3)
    for f in range(FRAMES):
        own = psnr(frames[f], pictures[f])
        assert own > 30, (f, own)
        others = [psnr(frames[f], pictures[k]) for k in range(FRAMES) if k != f]
        assert own > max(others) + 3, (f, own, others)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 25 and (stream.width, stream.height) == (128, 96)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)


def test_a_film_says_where_its_chroma_lies(tmp_path):
    """`to_yuv420` has it between the pixels, and players take it to be at the left where nothing is said."""
    from av.bitstream import BitStreamFilterContext

    make_films(tmp_path, CountingProvider(), names=("easy",))
    av.logging.set_level(av.logging.INFO)
    try:
        with av.open(str(film_path(tmp_path, "easy", "v"))) as container, av.logging.Capture() as logs:
            stream = container.streams.video[0]
            BitStreamFilterContext("trace_headers", stream).filter(next(container.demux(stream)))
    finally:
        av.logging.set_level(None)
    (said,) = (line for _, _, line in logs if "chroma_sample_loc_type_top_field" in line)
    assert said.strip().endswith("= 1")


def test_planes_are_the_same_film_as_pixels(tmp_path):
    """Flat pictures, so that nothing hangs on how chroma is made smaller."""
    from rapfast.augment import to_yuv420

    colours = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.6, 0.9], [0.5, 0.5, 0.5]])
    for name in ("pixels", "planes"):
        with VideoWriter(tmp_path / f"{name}.mp4", 32, 32, fps=30, quality=1) as film:
            for c in colours:
                picture = c.view(3, 1, 1).expand(3, 32, 32)
                if name == "pixels":
                    film.add(picture.permute(1, 2, 0).numpy())
                else:
                    film.add_yuv(to_yuv420(picture).numpy())
    one, other = read_film(tmp_path / "pixels.mp4"), read_film(tmp_path / "planes.mp4")
    for a, b, c in zip(one, other, colours, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2 and np.abs(b - 255 * c.numpy()).max() <= 4
    with (
        pytest.raises(ValueError, match=r"planes must be uint8 \[48,32\], got uint8 \[32, 32\]"),
        VideoWriter(tmp_path / "x.mp4", 32, 32) as film,
    ):
        film.add_yuv(np.zeros((32, 32), np.uint8))


def test_a_killed_process_leaves_a_playable_film(tmp_path):
    code = f"""
import os, signal, numpy as np
from rapfast.media import VideoWriter
x = np.random.default_rng(0).integers(0, 256, (96, 64), np.uint8)
with VideoWriter({str(tmp_path / "film.mp4")!r}, 64, 64, fps=10, threads=1, preset="ultrafast", fragmented=True) as f:
    for k in range(60):
        f.add_yuv(np.roll(x, k, 1))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith("-film.mp4") and 30 <= len(read_film(left)) <= 60
    with VideoWriter(tmp_path / "film.mp4", 64, 64, fps=10, fragmented=True) as film:
        for _ in range(25):
            film.add_yuv(np.zeros((96, 64), np.uint8))
    assert len(read_film(tmp_path / "film.mp4")) == 25
    with av.open(str(tmp_path / "film.mp4")) as container:
        if av.library_versions["libavformat"] >= (62,):
            assert container.streams.video[0].frames == 25  # an ordinary MP4


# ---------------------------------------------------------------------------- killed and taken up


def test_killed_by_force_and_taken_up_again(tmp_path):
    """With -9 while the second video is rendered: the first stays, the command finishes the rest."""
    assert augment(tmp_path / "whole", "--difficulties", "easy", "hard", videos=("a", "b"), frames=24) == 0
    words = [sys.executable, "-m", "rapfast.cli", "augment", "--batch", *SMALL, "frames=24", "--video_list", "a", "b",
             "--difficulties", "easy", "hard", "--output_root", str(tmp_path / "out"), "--encoder_threads", "1",
             "--device", "cpu"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL)
    second = film_path(tmp_path / "out", "easy", "b").parent
    try:
        deadline = time.monotonic() + 120
        while not (second.is_dir() and list(second.glob(".*.mp4"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = film_path(tmp_path / "out", "easy", "a")
    before = first.stat().st_mtime_ns, first.read_bytes()
    assert not film_path(tmp_path / "out", "easy", "b").exists()
    assert augment(tmp_path / "out", "--difficulties", "easy", "hard", videos=("a", "b"), frames=24) == 0
    assert before == (first.stat().st_mtime_ns, first.read_bytes())
    for name in ("easy", "hard"):
        for video in "ab":
            one, other = (film_path(tmp_path / folder, name, video) for folder in ("whole", "out"))
            assert one.read_bytes() == other.read_bytes()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_film_that_was_finished_and_not_noted_is_made_again(tmp_path):
    """Killed between the film's last name and the note of it."""
    make_films(tmp_path, CountingProvider(), names=("easy",))
    params = params_path(tmp_path)
    content = json.loads(params.read_text())
    film = content["sets"].pop("easy")["v"]
    params.write_text(json.dumps(content))
    (tmp_path / ".rapfast_augment.jsonl").write_text('{"begun": ["easy", "v"]}\n{"set": "easy", "vi')
    summary = make_films(tmp_path, CountingProvider(), names=("easy",))
    assert [f.state for f in summary.films] == ["made"]
    assert json.loads(params.read_text())["sets"]["easy"]["v"] == film


def test_a_line_after_a_torn_one_is_not_lost(tmp_path):
    """Killed while a line was written, and killed again after the next film was begun and renamed."""
    make_films(tmp_path, CountingProvider(), names=("easy",))
    journal = tmp_path / ".rapfast_augment.jsonl"
    journal.write_text('{"set": "easy", "vi')
    job = AugmentationJob(CountingProvider(), parameter_sets(["easy", "hard"], DIFFICULTIES), torch.device("cpu"),
                          films=FilmOptions(threads=1))  # fmt: skip
    with job.folder(tmp_path) as folder:
        folder.begin(("hard", "v"), frames=False).write_bytes(b"not noted")
        left = journal.read_bytes()
    content = json.loads(params_path(tmp_path).read_text())
    params_path(tmp_path).write_text(json.dumps(content | {"unfinished": []}))
    journal.write_bytes(left)
    assert [f.state for f in make_films(tmp_path, CountingProvider()).films] == ["kept", "made"]


def test_overwriting_some_films_keeps_what_is_known_of_others(tmp_path):
    make_films(tmp_path, CountingProvider(), ("a", "b"))
    before = json.loads(params_path(tmp_path).read_text())["sets"]
    summary = make_films(tmp_path, CountingProvider(), ("a",), overwrite=True)
    assert [f.state for f in summary.films] == ["made", "made"]
    assert json.loads(params_path(tmp_path).read_text())["sets"] == before
    # killed while it overwrites: the films that it was to make are made, whatever was known of them
    (tmp_path / ".rapfast_augment.jsonl").write_text('{"begun": ["easy", "a"]}\n')
    assert [f.state for f in make_films(tmp_path, CountingProvider(), ("a", "b")).films].count("made") == 1


def test_frames_of_a_longer_film_are_cleared_away(tmp_path):
    make_films(tmp_path, CountingProvider(), names=("easy",), films=FilmOptions(threads=1, pngs=True))
    frames = film_path(tmp_path, "easy", "v").parent / "frames"
    for name in (f"{FRAMES:06d}.png", "000200.png", "mine.png"):
        (frames / name).write_bytes(b"old")
    make_films(tmp_path, CountingProvider(), names=("easy",), films=FilmOptions(threads=1, pngs=True), overwrite=True)
    assert files(frames) == [*(f"{k:06d}.png" for k in range(FRAMES)), "mine.png"]


@pytest.mark.parametrize("film", ["null", '{"blake2b": "0"}', "[]"])
def test_a_damaged_parameter_file_is_told(tmp_path, film):
    make_films(tmp_path, CountingProvider(), names=("easy",))
    content = json.loads(params_path(tmp_path).read_text())
    content["sets"]["easy"]["v"] = json.loads(film)
    params_path(tmp_path).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"augmentation_params.json: is damaged; name another folder or"):
        make_films(tmp_path, CountingProvider(), names=("easy",))


def test_a_changed_film_is_made_again(tmp_path, capsys):
    make_films(tmp_path, CountingProvider(), films=FilmOptions(threads=1, pngs=True))
    good = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".mp4", ".png")}
    film_path(tmp_path, "easy", "v").write_bytes(b"mp4")
    (film_path(tmp_path, "hard", "v").parent / "frames" / "000002.png").unlink()
    provider = CountingProvider()
    summary = make_films(tmp_path, provider, films=FilmOptions(threads=1, pngs=True))
    assert [f.state for f in summary.films] == ["made", "made"] and provider.calls["model"] == 1
    assert capsys.readouterr().err.count("is not what was written (its checksum differs): rendered again") == 2
    assert good == {p: p.read_bytes() for p in good}


def test_other_settings_are_refused(tmp_path):
    make_films(tmp_path, CountingProvider(), names=("easy",))
    with pytest.raises(ValueError, match="holds films made with other settings: seed was 0 and is 1; name another"):
        make_films(tmp_path, CountingProvider(), names=("easy",), seed=1)
    easy = DIFFICULTIES["easy"]
    try:
        DIFFICULTIES["easy"] = DIFFICULTIES["hard"]
        with pytest.raises(ValueError, match=r"other settings: easy was {\"yaw\": \[-10, 10\]"):
            make_films(tmp_path, CountingProvider(), names=("easy",))
    finally:
        DIFFICULTIES["easy"] = easy
    before = film_path(tmp_path, "easy", "v").read_bytes()
    assert make_films(tmp_path, CountingProvider(), names=("easy",), seed=1, overwrite=True).counts.films == 1
    assert film_path(tmp_path, "easy", "v").read_bytes() != before


def test_a_film_of_somebody_else_is_left_alone(tmp_path):
    path = film_path(tmp_path, "easy", "v")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="is there already, and augmentation_params.json does not say how it was made"):
        make_films(tmp_path, CountingProvider(), names=("easy",))
    assert path.read_bytes() == b"precious"
    make_films(tmp_path, CountingProvider(), names=("easy",), overwrite=True)
    assert len(read_film(path)) == FRAMES


def test_the_file_tells_all(tmp_path):
    make_films(tmp_path, CountingProvider(), films=FilmOptions(threads=1, pngs=True))
    content = json.loads(params_path(tmp_path).read_text())
    assert content["difficulties"]["hard"] == DIFFICULTIES["hard"].as_json() and content["unfinished"] == []
    for name in ("easy", "hard"):
        film, path = content["sets"][name]["v"], film_path(tmp_path, name, "v")
        assert film["file"] == FILM.format(name, "v") and path == tmp_path / film["file"]
        assert film["blake2b"] == file_fingerprint(path) and film["bytes"] == path.stat().st_size
        assert (film["frames"], film["fps"], film["width"], film["height"]) == (FRAMES, 25.0, 64, 48)
        low, high = DIFFICULTIES[name].yaw
        assert low <= film["viewpoint"]["yaw"] <= high
    names = [".rapfast_augment.lock", "augmentation_params.json", "easy", "hard"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


# --------------------------------------------------------------------------------- two at one time


def test_two_jobs_on_one_folder(tmp_path):
    job = AugmentationJob(CountingProvider(), parameter_sets(["easy"], DIFFICULTIES), torch.device("cpu"))
    with OutputFolder(tmp_path, job.settings(), {}):
        with pytest.raises(BlockingIOError, match=rf"{tmp_path}: process {os.getpid()} is writing here; wait for it"):
            make_films(tmp_path, CountingProvider())
        # shards have files of their own, and keep off each other's films
        parts = (OutputFolder(tmp_path, job.settings(), {}, part_id=k) for k in (1, 2))
        with next(parts) as one, next(parts) as two:
            one.begin(("easy", "v"), frames=False)
            with pytest.raises(BlockingIOError, match="another process is writing this film"):
                two.begin(("easy", "v"), frames=False)
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [
        "augmentation_params.json", "augmentation_params_part1.json", "augmentation_params_part2.json"
    ]  # fmt: skip


def shard(root: Path, part_id: int, provider: CountingProvider, videos, **options):
    """What a shard of the sets easy and hard does."""
    job = AugmentationJob(provider, parameter_sets(["easy", "hard"], DIFFICULTIES), torch.device("cpu"),
                          films=FilmOptions(threads=1), **options)  # fmt: skip
    with job.folder(root, part_id=part_id) as folder:
        return job.run(videos, folder)


@pytest.mark.parametrize("sets_together", [1, 16])
def test_a_shard_makes_what_another_does_not_hold(tmp_path, sets_together):
    alone = {(f.set_name, f.video): f for f in make_films(tmp_path / "alone", CountingProvider(), ("a", "b")).films}
    root, job = tmp_path / "out", AugmentationJob(CountingProvider(), parameter_sets(["easy"], DIFFICULTIES), CPU)
    with OutputFolder(root, job.settings(), {}, part_id=1) as other:
        other.begin(("easy", "a"), frames=False)
        summary = shard(root, 2, CountingProvider(), ("a", "b"), sets_together=sets_together)
        made = {(f.set_name, f.video) for f in summary.films}
        assert made == set(alone) - {("easy", "a")} and not film_path(root, "easy", "a").exists()
        for set_name, video in made:
            path = film_path(root, set_name, video)
            assert path.read_bytes() == film_path(tmp_path / "alone", set_name, video).read_bytes()
        assert [f.video for f in summary.failures] == ["a"]
        told = str(summary.failures[0].error)
        assert told.startswith(f"video a: {film_path(root, 'easy', 'a').parent}: another process is writing this film;")
        with pytest.raises(TakenError):  # as of a film that is finished after it was looked for
            other.begin(("hard", "b"), frames=False)
        os.close(lock_folder(film_path(root, "hard", "b").parent, "this film"))  # and nobody holds it now
        other.leave(("easy", "a"))
        again = shard(root, 2, CountingProvider(), ("a", "b"))
        assert not again.failures and again.counts.films == 1 and film_path(root, "easy", "a").exists()


def test_a_shard_loads_nothing_for_what_another_made(tmp_path):
    shard(tmp_path, 1, CountingProvider(), ("a",))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.mp4")}
    provider = CountingProvider()
    summary = shard(tmp_path, 2, provider, ("a", "b"))
    assert [f.video for f in summary.films] == ["b", "b"] and provider.calls["video", "a"] == 0
    assert [f.video for f in summary.failures] == ["a"] and len(before) == 2
    told = str(summary.failures[0].error)
    assert "augmentation_params_part2.json does not say how it was made, so it may be another shard's" in told
    assert told.endswith("(and 1 more of its films likewise)")
    assert before == {p: p.read_bytes() for p in before}


def test_a_shard_that_could_not_make_all_ends_with_2(tmp_path, capsys):
    words = ("--difficulties", "easy", "--part_id")
    assert augment(tmp_path, *words, 1, videos=("a",)) == 0
    for batch in (True, False):
        capsys.readouterr()
        assert augment(tmp_path, *words, 2, videos=("a", "b" + str(batch)), batch=batch) == 2
        assert film_path(tmp_path, "easy", "b" + str(batch)).exists()
        told = capsys.readouterr().err.splitlines()[-1]
        assert "video a: " in told and "it may be another shard's: give each shard videos of its own" in told


def test_a_full_disk_keeps_what_is_there(tmp_path):
    """A limit on the size of files stands in for a full disk: the same error from the same calls."""
    words = ["augment", "--batch", "--provider", "synthetic", "--provider_args", "gaussians=3000", "width=160",
             "height=120", "refiner=false", "frames=6", "--video_list", "demo", "--output_root", str(tmp_path),
             "--encoder_threads", "1", "--device", "cpu", "--quality", "0"]  # fmt: skip
    assert run(*words, "--difficulties", "easy") == 0
    kept = film_path(tmp_path, "easy", "demo").read_bytes()
    limit = len(kept) // 2
    assert limit > 2 * params_path(tmp_path).stat().st_size
    code = f"""
import resource, sys
from rapfast.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.exit(main({words!r}))
"""
    done = python(code)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "could not be written: File too large" in last and "_fixed_viewpoint_video.mp4" in last, done.stderr
    assert film_path(tmp_path, "easy", "demo").read_bytes() == kept
    assert list(tmp_path.rglob("*.mp4")) == [film_path(tmp_path, "easy", "demo")]
    assert run(*words) == 0
    assert film_path(tmp_path, "easy", "demo").read_bytes() == kept
    assert len(list(tmp_path.rglob("*.mp4"))) == 3


# ---------------------------------------------------------------------------------------- commands


def test_the_tree_and_both_modes(tmp_path, capsys):
    """One process per set against the batch: the same films, byte for byte."""
    assert augment(tmp_path / "batch", "--difficulties", "easy", "hard") == 0
    out = capsys.readouterr().out
    assert "loaded 1 model and 1 video, deformed 5 frames, rendered 10 images, wrote 2 films" in out
    assert augment(tmp_path / "single", "--difficulties", "easy", "hard", batch=False) == 0
    captured = capsys.readouterr()
    assert "one process for each video and set" in captured.err and captured.out.count("made") == 2
    wanted = ["augmentation_params.json", FILM.format("easy", "demo"), FILM.format("hard", "demo")]
    for folder in ("batch", "single"):
        assert [f for f in files(tmp_path / folder) if not f.startswith(".")] == wanted
    for name in wanted[1:]:
        assert (tmp_path / "batch" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    one, other = (json.loads(params_path(tmp_path / f).read_text()) for f in ("batch", "single"))
    assert one == other
    assert augment(tmp_path / "single", "--difficulties", "easy", "hard", batch=False) == 0
    assert capsys.readouterr().out.count("kept") == 2
    (tmp_path / "names.txt").write_text("-dash\n")  # as an identifier may begin
    words = ("--difficulties", "easy", "--video_list_file", tmp_path / "names.txt")
    assert augment(tmp_path / "single", *words, videos=("demo",), batch=False) == 0
    assert film_path(tmp_path / "single", "easy", "-dash").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert augment(tmp_path / "out", "--dry_run", "--sets", "2") == 0
    out = capsys.readouterr().out
    assert "6 of 6 films would be rendered" in out and FILM.format("hard_01", "demo") in out
    assert not (tmp_path / "out").exists()
    assert augment(tmp_path / "out", "--difficulties", "easy") == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert augment(tmp_path / "out", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "2 of 3 films would be rendered" in out and out.count(" there ") == 1
    assert files(tmp_path) == before


def test_sets_files_and_parts(tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"studio": {"yaw": [-60, -50], "pitch": 3, "focal": 0.1}}')
    (tmp_path / "videos.txt").write_text("# two\na\n\n b \na\n")
    words = ("--difficulties_file", tmp_path / "mine.json", "--video_list_file", tmp_path / "videos.txt",
             "--sets", 2, "--part_id", 7, "--only", "studio_01")  # fmt: skip
    code = run("augment", "--batch", *SMALL, "frames=3", "--output_root", tmp_path / "out", "--encoder_threads", 1,
               "--device", "cpu", "--save_frame_png", *words)  # fmt: skip
    assert code == 0
    content = json.loads((tmp_path / "out" / "augmentation_params_part7.json").read_text())
    assert list(content["sets"]) == ["studio_01"] and list(content["sets"]["studio_01"]) == ["a", "b"]
    assert content["difficulties"]["studio"]["pitch"] == [-3, 3] and -60 <= yaw_of(content, "a") <= -50
    assert yaw_of(content, "a") != yaw_of(content, "b")
    frames = film_path(tmp_path / "out", "studio_01", "b").parent / "frames"
    assert files(frames) == [f"{k:06d}.png" for k in range(3)]


def test_what_a_provider_was_made_with_is_compared(tmp_path, monkeypatch, capsys):
    """Without a `describe` of its own its arguments are, and another folder of videos is told."""
    code = """
from augment_videos import CountingProvider
class Mine(CountingProvider):
    def __init__(self, tracked_root="here", strength=1):
        super().__init__()
class Described(Mine):
    def describe(self):
        return {"seed": 5}
"""
    (tmp_path / "mine_of_tests.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    def go(name, *words):
        return ("augment", "--batch", "--provider", f"mine_of_tests:{name}", "--video_list", "v", "--device", "cpu",
                "--encoder_threads", 1, "--difficulties", "easy", "--output_root", tmp_path / name, *words)  # fmt: skip

    assert run(*go("Mine", "--tracked_root", "one", "--provider_args", "strength=2")) == 0
    assert "provider.strength was 2 and is 3" in fails(capsys, *go("Mine", "--provider_args", "strength=3"))
    assert run(*go("Mine", "--tracked_root", "two", "--provider_args", "strength=2")) == 0
    assert "note: films that are there were made of the videos in one, and are kept" in capsys.readouterr().err
    assert run(*go("Described")) == 0  # its own seed is not the job's
    settings = json.loads(params_path(tmp_path / "Described").read_text())["settings"]
    assert (settings["seed"], settings["provider.seed"]) == (0, 5)
    assert "seed was 0 and is 1" in fails(capsys, *go("Described", "--seed", 1))
    sys.modules.pop("mine_of_tests", None)


def yaw_of(content, video):
    return content["sets"]["studio_01"][video]["viewpoint"]["yaw"]


def test_errors_are_sentences(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ("--output_root", tmp_path / "out")
    base = ("augment", "--batch", *out, "--device", "cpu")
    synthetic, video = ("--provider", "synthetic"), ("--video_list", "a")
    for words, sentence in [
        (video, "--tracked_root must name the folder of the tracked videos; to try the command"),
        (synthetic, "give videos: --video_list NAME ..., or --video_list_file"),
        ((*synthetic, "--video_list_file", "nope"), "--video_list_file: there is no file 'nope'"),
        ((*synthetic, "--video_list_file", "."), "--video_list_file must be a file, got the folder '.'"),
        ((*synthetic, *video, "--difficulties_file", "nope.json"), "--difficulties_file: there is no file 'nope.json'"),
        ((*synthetic, "--video_list", "a/b"), "a video's name must be a folder's name"),
        ((*synthetic, *video, "--difficulties", "simple"),
         "--difficulties: difficulty must be one of easy, medium, hard, got 'simple'"),
        (("--provider", "nothing", *video), "--provider must be disk, synthetic or MODULE:OBJECT, got"),
        (("--provider", "no_such_module:X", *video), "--provider no_such_module:X: no_such_module cannot be"),
        (("--provider", "rapfast.augment:Nothing", *video), "rapfast.augment has no Nothing"),
        (("--provider", "rapfast.augment:DIFFICULTIES", *video), "must be a rapfast.augment.Provider"),
        ((*synthetic, *video, "--provider_args", "frame=3"),
         "provider synthetic has no argument 'frame'; it takes frames, gaussians"),
        ((*synthetic, *video, "--provider_args", "frames"), "--provider_args must be KEY=VALUE"),
        ((*synthetic, *video, "--tracked_root", "x"), "reads no files: leave out"),
        ((*synthetic, *video, "--gpu_memory", "8 pints"), "--gpu_memory must be a number of"),
        ((*synthetic, *video, "--gpu_memory", "8GiB"), "--gpu_memory is of a GPU, and --device cpu has none"),
        ((*synthetic, *video, "--asset_dir", tmp_path / "no"), "--asset_dir must be a folder, and "),
        ((*synthetic, *video, "--preset", "quick"), "--preset must be one of ultrafast"),
        (("--tracked_root", tmp_path / "no", *video), "there is no such folder of tracked videos"),
    ]:  # fmt: skip
        assert sentence in fails(capsys, *base, *words), words
    (tmp_path / "tracked" / "b").mkdir(parents=True)
    error = fails(capsys, *base, "--tracked_root", "tracked", "--video_list", "a")
    assert "tracked/a: there is no such video; tracked has b" in error
    error = fails(capsys, *base, "--tracked_root", "tracked", "--video_list", "b")
    assert "video b: tracked/b/identity.safetensors: no such file" in error
    assert run(*base, "--tracked_root", "tracked", "--video_list", "a", "b") == 2
    told = capsys.readouterr()
    assert "failed: video b: tracked/b/identity.safetensors: no such file" in told.out
    assert "video a: tracked/a: there is no such video; tracked has b (and 1 other video failed, see above)" in told.err


def test_a_provider_of_ones_own_from_the_current_folder(tmp_path, monkeypatch, capsys):
    """The example of docs/augmentation.md, as it stands there."""
    text = (ROOT / "docs" / "augmentation.md").read_text()
    code = text.split("```python\n# my_avatar.py\n")[1].split("```")[0]
    (tmp_path / "my_avatar.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for batch in (True, False):
        mode = ("--batch",) if batch else ()
        assert run("augment", *mode, "--provider", "my_avatar:Balls", "--video_list", "x", "--output_root",
                   f"out{int(batch)}", "--difficulties", "easy", "--device", "cpu") == 0  # fmt: skip
    assert len(read_film(film_path(Path("out1"), "easy", "x"))) == 60
    assert film_path(Path("out1"), "easy", "x").read_bytes() == film_path(Path("out0"), "easy", "x").read_bytes()
    sys.modules.pop("my_avatar", None)
    shutil.rmtree("out0")
