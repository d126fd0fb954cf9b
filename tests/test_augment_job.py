"""The job: everything camera-independent once, the same pixels in every mode and batch, alpha applied once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_videos import (
    CHANNELS,
    FRAMES,
    HEIGHT,
    WIDTH,
    CountingProvider,
    RefiningProvider,
    make_films,
    psnr,
    read_film,
)
from PIL import Image

from rapfast import rasterization
from rapfast.augment import (
    DIFFICULTIES,
    AugmentationJob,
    Budget,
    FilmOptions,
    FrameAssets,
    FrameShapes,
    Motion,
    composite,
    film_cameras,
    film_path,
    fixed_viewpoint,
    parameter_sets,
    params_path,
    set_seed,
    to_yuv420,
)
from rapfast.augment.films import Films
from rapfast.augment.rendering import Features

pytest.importorskip("av")

ROOT = Path(__file__).resolve().parents[1]


class Watched:
    """What the rasterizer drew, by (video, set) and frame."""

    def __init__(self) -> None:
        self.features: dict[tuple[str, str], dict[int, torch.Tensor]] = {}

    def __call__(self, video, sets, first, drawn: Features) -> None:
        for f in range(len(drawn.features)):
            for s, one in enumerate(sets):
                both = torch.cat([drawn.features[f, s], drawn.alphas[f, s]], -1).cpu().clone()
                self.features.setdefault((video, one.name), {})[first + f] = both


# --------------------------------------------------------------------------------- once and for all


@pytest.mark.parametrize("names", [("easy",), ("easy", "medium", "hard")], ids=len)
def test_what_knows_no_camera_happens_once(tmp_path, names):
    provider = RefiningProvider()
    summary = make_films(tmp_path, provider, ("a", "b"), names, views=4, sets_together=2)
    each = {("target", f): 2 for f in range(FRAMES)} | {("deform", f): 2 for f in range(FRAMES)}
    each |= {("background", f): 2 for f in range(FRAMES)} | {"model": 1, ("video", "a"): 1, ("video", "b"): 1}
    calls = dict(provider.calls)
    assert calls.pop("refine") > 0 and calls.pop("close") == 2
    assert calls == each  # of two videos
    images = 2 * FRAMES * len(names)
    counts = summary.counts
    assert (counts.models, counts.videos) == (1, 2)
    assert (counts.targets, counts.deforms, counts.backgrounds) == (2 * FRAMES,) * 3
    assert (counts.rasterized, counts.refined, counts.composited) == (images,) * 3
    assert (counts.camera_paths, counts.films) == (2 * len(names),) * 2
    assert not summary.failures and {film.state for film in summary.films} == {"made"}


def test_a_second_run_does_nothing(tmp_path):
    make_films(tmp_path, CountingProvider())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.mp4")}
    provider = CountingProvider()
    summary = make_films(tmp_path, provider)
    assert not provider.calls and summary.counts.models == 0
    assert [film.state for film in summary.films] == ["kept", "kept"]
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.mp4")}
    summary = make_films(tmp_path, provider, names=("easy", "medium", "hard"))  # a set more
    assert [film.state for film in summary.films] == ["kept", "kept", "made"]
    assert set(json.loads(params_path(tmp_path).read_text())["sets"]) == {"easy", "medium", "hard"}


# ------------------------------------------------------------------------------------- equal pixels


def test_sets_together_and_one_by_one_are_bitwise_equal_before_the_refiner(tmp_path):
    together, alone = Watched(), Watched()
    names = ("easy", "medium", "hard")
    make_films(tmp_path / "a", RefiningProvider(), names=names, views=7, watch=together)
    for name in names:
        make_films(tmp_path / name, RefiningProvider(), names=(name,), views=2, watch=alone)
    assert set(together.features) == set(alone.features) == {("v", name) for name in names}
    for key, frames in together.features.items():
        assert sorted(frames) == list(range(FRAMES))
        for frame, drawn in frames.items():
            assert torch.equal(drawn, alone.features[key][frame]), (key, frame)
    for name in names:
        paths = [film_path(tmp_path / folder, name, "v") for folder in ("a", name)]
        one, other = map(read_film, paths)
        assert len(one) == len(other) == FRAMES
        assert min(psnr(a, b) for a, b in zip(one, other, strict=True)) > 45


@pytest.mark.cuda
def test_on_a_gpu_too(tmp_path):
    together, alone, host = Watched(), Watched(), Watched()
    names = ("easy", "medium", "hard")
    make_films(tmp_path / "a", RefiningProvider(), names=names, views=7, watch=together, device="cuda")
    frame_bytes = FrameShapes(300, HEIGHT, WIDTH, torch.uint8).n_bytes
    budget = Budget(device=2 * frame_bytes, host=2 * frame_bytes, disk_dir=tmp_path)
    for name in names:
        summary = make_films(
            tmp_path / name, RefiningProvider(), names=(name,), views=2, watch=alone, device="cuda", budget=budget
        )
        # torch rounds page-locked tensors up to powers of two: two frames' bytes hold one.
        assert summary.placement["v"] == {"device": 2, "host": 1, "disk": 4}
    make_films(tmp_path / "cpu", RefiningProvider(), names=names, watch=host)
    for key, frames in together.features.items():
        for frame, drawn in frames.items():
            assert torch.equal(drawn, alone.features[key][frame]), (key, frame)
            assert (drawn - host.features[key][frame]).abs().median() < 1e-5
    for name in names:
        gpu, cpu = (read_film(film_path(tmp_path / folder, name, "v")) for folder in ("a", "cpu"))
        assert min(psnr(a, b) for a, b in zip(gpu, cpu, strict=True)) > 38
        alone_too = read_film(film_path(tmp_path / name, name, "v"))
        assert min(psnr(a, b) for a, b in zip(gpu, alone_too, strict=True)) > 45


@pytest.mark.cuda
def test_films_repeat_on_a_gpu(tmp_path):
    """Without a refiner to the last byte, however many sets there are and wherever frames are kept."""
    names, size = ("easy", "medium", "hard"), FrameShapes(300, HEIGHT, WIDTH, torch.uint8).n_bytes
    make_films(tmp_path / "a", CountingProvider(), names=names, device="cuda")
    for name in names:
        budget = Budget(device=0, host=4 * size, disk_dir=tmp_path)
        make_films(tmp_path / name, CountingProvider(), names=(name,), views=2, device="cuda", budget=budget)
        assert film_path(tmp_path / "a", name, "v").read_bytes() == film_path(tmp_path / name, name, "v").read_bytes()


def test_the_features_are_those_of_the_frame_and_its_camera(tmp_path):
    """Each image against a call of its own with matrices made here."""
    watched, provider = Watched(), CountingProvider()
    make_films(tmp_path, provider, names=("hard",), views=3, watch=watched)
    video = provider.load_video("v")
    viewmats, Ks = fixed_viewpoint(video.viewpoint, DIFFICULTIES["hard"], FRAMES, 25.0, set_seed(0, "hard", 0, "v"))
    again = film_cameras(params_path(tmp_path), "hard", "v")
    for frame in range(FRAMES):
        motion = video.deform(frame, video.target(frame))
        view, K = (torch.from_numpy(x[frame]).float()[None] for x in (viewmats, Ks))
        assert torch.equal(again.viewmats[frame], view[0]) and torch.equal(again.Ks[frame], K[0])
        features, alphas, _ = rasterization(
            motion.means, motion.quats, motion.scales, video.identity.opacities, video.identity.colors, view, K,
            WIDTH, HEIGHT,
        )  # fmt: skip
        assert torch.equal(watched.features["v", "hard"][frame], torch.cat([features[0], alphas[0]], -1))


# ----------------------------------------------------------------------------------- the composite


def test_alpha_is_applied_once():
    g = torch.Generator().manual_seed(0)
    straight, alphas = torch.rand(2, 3, 3, 4, 5, generator=g), torch.rand(2, 3, 1, 4, 5, generator=g)
    behind = torch.randint(0, 256, (2, 4, 5, 3), generator=g, dtype=torch.uint8)
    plate = behind.permute(0, 3, 1, 2)[:, None].double() / 255
    expected = straight.double() * alphas + plate * (1 - alphas.double())
    refined = composite(straight, alphas, behind, premultiplied=False)
    assert (refined - expected).abs().max() < 1e-6
    drawn = composite(straight * alphas, alphas, behind, premultiplied=True)
    assert (drawn - expected).abs().max() < 1e-6
    twice = straight.double() * alphas.double() ** 2 + plate * (1 - alphas.double())
    assert (refined - twice).abs().max() > 0.05
    opaque = composite(straight, torch.ones_like(alphas), behind, premultiplied=False)
    assert torch.equal(opaque, straight)
    nothing = composite(torch.zeros_like(straight), torch.zeros_like(alphas), behind.float() / 255, premultiplied=True)
    assert torch.equal(nothing, (behind.float() / 255).permute(0, 3, 1, 2)[:, None].expand_as(nothing))


@pytest.mark.parametrize("kind", [CountingProvider, RefiningProvider])
def test_frames_are_composited_over_their_own_background(tmp_path, kind):
    """The PNGs of a film against the composite worked out here from what the rasterizer drew."""
    watched, provider = Watched(), kind()
    options = FilmOptions(threads=1, pngs=True)
    make_films(tmp_path, provider, names=("medium",), views=4, watch=watched, films=options)
    from rapfast.augment.viewpoints import frame_seed

    frames = film_path(tmp_path, "medium", "v").parent / "frames"
    for f in range(FRAMES):
        drawn = watched.features["v", "medium"][f]
        features, alpha = drawn[..., :CHANNELS].permute(2, 0, 1), drawn[..., CHANNELS]
        plate = (30 * f + 10) / 255
        if provider.refines:
            seeds = [frame_seed(set_seed(0, "medium", 0, "v"), f)] * 3
            picture = provider.refine(features.expand(3, -1, -1, -1), alpha.expand(3, 1, -1, -1), seeds)[0] * alpha
        else:
            picture = features[:3]
        expected = (255 * (picture + plate * (1 - alpha)) + 0.5).clamp(0, 255).permute(1, 2, 0).numpy()
        found = np.asarray(Image.open(frames / f"{f:06d}.png"))
        assert np.abs(found - np.floor(expected)).max() <= 1, f


def test_yuv_of_known_colours():
    colours = {(1, 1, 1): (235, 128, 128), (0, 0, 0): (16, 128, 128), (1, 0, 0): (63, 102, 240),
               (0, 1, 0): (173, 42, 26), (0, 0, 1): (32, 240, 118)}  # fmt: skip
    for rgb, planes in colours.items():
        picture = torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1).expand(3, 4, 6)
        found = to_yuv420(picture).flatten()
        assert len(found) == 36 and found.dtype == torch.uint8
        assert tuple(found[[0, 24, 30]].tolist()) == planes
        assert (found[:24] == planes[0]).all() and (found[24:30] == planes[1]).all() and (found[30:] == planes[2]).all()
    odd = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    assert torch.equal(to_yuv420(odd), to_yuv420(padded)) and to_yuv420(odd).shape == (2, 9, 8)
    assert to_yuv420(torch.full((3, 2, 2), float("nan"))).tolist() == [[16, 16], [16, 16], [128, 128]]


# -------------------------------------------------------------------------------- memory and places


def frames_in(assets: FrameAssets, size: int) -> list[tuple[int, int]]:
    return [(frames.first, len(frames)) for frames in assets.batches(size)]


def filled(budget: Budget, device: torch.device, n_frames: int = 7) -> FrameAssets:
    assets = FrameAssets(n_frames, FrameShapes(10, 4, 6, torch.uint8), device, budget)
    for f in range(n_frames):
        motion = Motion(torch.full((10, 3), float(f)), torch.full((10, 4), f + 0.25), torch.full((10, 3), f + 0.5))
        assets.put(f, motion, torch.full((4, 6, 3), f, dtype=torch.uint8))
    return assets


def test_frames_have_their_place_in_the_budget(tmp_path, device):
    size = FrameShapes(10, 4, 6, torch.uint8).n_bytes
    assert size == 10 * 4 * (3 + 4 + 3) + 4 * 6 * 3
    on_gpu = device.type == "cuda"
    for budget, placement in (
        (Budget(8 * size, 0, None), (7, 0, 0)) if on_gpu else (Budget(0, 8 * size, None), (7, 0, 0)),
        (Budget(2 * size, 3 * size, tmp_path), (2, 2, 3) if on_gpu else (3, 0, 4)),  # page-locked: powers of two
        (Budget(0, 0, tmp_path), (0, 0, 7)),
    ):
        assets = filled(budget, device)
        assert tuple(assets.placement.values()) == placement
        for batch in (1, 2, 7):
            seen = []
            for frames in assets.batches(batch):
                assert len(frames) <= batch and frames.means.device.type == device.type
                for f in range(len(frames)):
                    number = frames.first + f
                    assert (frames.means[f] == number).all() and (frames.quats[f] == number + 0.25).all()
                    assert (frames.scales[f] == number + 0.5).all() and (frames.backgrounds[f] == number).all()
                    seen.append(number)
            assert seen == list(range(7))
        assert not list(tmp_path.iterdir())  # the files have no names
    with pytest.raises(ValueError, match=r"7 frames of 472 bytes do not fit in a budget of 472 bytes: allow more"):
        filled(Budget(0, size, None), device)


def test_page_locked_frames_are_counted_as_torch_rounds_them_up():
    from rapfast.augment.assets import _pinned_frames

    shapes = FrameShapes(1000, 4, 6, torch.uint8)

    def taken(count: int) -> int:
        sizes = (count * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.fields().values())
        return sum(1 << (size - 1).bit_length() for size in sizes if size)

    for budget in (0, 1, 40_000, 70_000, 100_000, 1_000_000, 5_000_001):
        count = _pinned_frames(shapes, budget)
        assert taken(count) <= budget < taken(count + 1)


@pytest.mark.parametrize("version", [1, 2])
def test_host_memory_is_what_the_jobs_control_group_leaves(tmp_path, version):
    """A batch system ends a process that takes more, however much the machine has."""
    from rapfast.augment.assets import _free_host_bytes

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\nBuffers: 1 kB\n")
    assert _free_host_bytes(tmp_path) == 8_000_000 << 10
    if version == 2:
        write("proc/self/cgroup", "0::/slurm/job_7/step\n")
        place, limit, used, stat = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file 300\n"
        unlimited = "max"
    else:
        write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/slurm/job_7/step\n")
        place, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        stat, unlimited = "inactive_file 1\ntotal_inactive_file 300\n", str(2**63 - 4096)
    for name, most in (("slurm/job_7/step", unlimited), ("slurm/job_7", "5000"), ("slurm", "9000")):
        write(f"{place}/{name}/{limit}", most)
        write(f"{place}/{name}/{used}", "2000")
        write(f"{place}/{name}/memory.stat", f"anon 7\n{stat}")
    assert _free_host_bytes(tmp_path) == 5000 - 2000 + 300
    write(f"{place}/slurm/job_7/{used}", "6000")
    assert _free_host_bytes(tmp_path) == 0


def test_frames_in_memory_are_not_copied():
    assets = filled(Budget(0, 1 << 20, None), torch.device("cpu"))
    first, second = list(assets.batches(4))
    assert first.means.data_ptr() + first.means.nbytes == second.means.data_ptr()


def test_films_do_not_depend_on_where_frames_are(tmp_path):
    size = FrameShapes(300, HEIGHT, WIDTH, torch.uint8).n_bytes
    make_films(tmp_path / "a", CountingProvider())
    summary = make_films(tmp_path / "b", CountingProvider(), budget=Budget(0, 3 * size, tmp_path), views=2)
    assert summary.placement["v"] == {"device": 3, "host": 0, "disk": 4}
    for name in ("easy", "hard"):
        assert film_path(tmp_path / "a", name, "v").read_bytes() == film_path(tmp_path / "b", name, "v").read_bytes()


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path):
    code = f"""
import resource, torch
from rapfast.augment import Budget, FrameAssets, FrameShapes
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
FrameAssets(1000, FrameShapes(10, 4, 6, torch.uint8), torch.device("cpu"), Budget(0, 0, {str(tmp_path)!r}))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert f"{tmp_path}: has no room for 120,000 bytes of frames: File too large" in last, done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ errors


class Broken(CountingProvider):
    """`what` of the frame 3 of the video "bad" is wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def load_video(self, name):
        video = super().load_video(name)
        if name != "bad":
            return video
        good_deform, good_background = video.deform, video.background
        if self.what == "deform":
            video.deform = lambda f, t: good_deform(f, t) if f != 3 else Motion(*[torch.zeros(9, 3)] * 3)
        elif self.what == "size":
            video.background = lambda f, t: good_background(f, t) if f != 3 else torch.zeros(48, 65, 3)
        elif self.what == "missing":
            video.background = lambda f, t: None
        elif self.what == "fps":
            video.fps = -1.0
        elif self.what == "own error":
            video.deform = lambda f, t: good_deform(f, {}["xyz"] if f == 3 else t)
        elif self.what == "json":
            video.target = lambda f: json.loads("{")
        elif self.what == "no video":
            return {"frames": []}
        return video


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("deform", r"video bad: frame 3: means must be a floating tensor \[300, 3\], got float32 \[9, 3\] on cpu"),
        ("size", r"video bad: frame 3: background must be \[48, 64, 3\], uint8 or floating .*, got float32 \[48, 65"),
        ("missing", r"video bad: frame 0: background must be a tensor \[48, 64, 3\], .*, got None"),
        ("fps", r"video bad: fps must be above 0 and at most 1000, got -1.0"),
        ("own error", r"video bad: frame 3: KeyError: 'xyz'"),
        ("json", r"video bad: frame 0: Expecting property name"),
        ("no video", r"video bad: load_video must return a Video, got a dict without n_frames"),
    ],
)
def test_a_bad_video_is_told_and_the_others_are_made(tmp_path, what, sentence):
    summary = make_films(tmp_path, Broken(what), ("a", "bad", "b"))
    assert [f.video for f in summary.failures] == ["bad"]
    with pytest.raises(ValueError, match=sentence):
        raise summary.failures[0].error
    assert {(f.video, f.set_name) for f in summary.films} == {(v, s) for v in "ab" for s in ("easy", "hard")}
    assert not film_path(tmp_path, "easy", "bad").exists()


def test_a_job_runs_again(tmp_path):
    """Each run has a summary of its own; the model stays loaded."""
    provider = CountingProvider()
    job = AugmentationJob(provider, parameter_sets(["easy"], DIFFICULTIES), torch.device("cpu"),
                          films=FilmOptions(threads=1))  # fmt: skip
    for k in range(2):
        with job.folder(tmp_path / str(k)) as folder:
            summary = job.run(["v"], folder)
        assert len(summary.films) == summary.counts.films == summary.counts.videos == 1
        assert summary.counts.models == (0 if k else 1) and provider.calls["model"] == 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("refine_batch", 0, "provider.refine_batch must be"),
        ("near_plane", -1.0, "provider.near_plane must be"),
        ("alpha_cap", 1.5, "provider.alpha_cap must be"),
        ("describe", lambda: {"net": torch.zeros(1)}, "describe must return a dictionary that JSON can hold"),
        ("describe", lambda: None, "describe must return a dictionary that JSON can hold"),
    ],
)
def test_bad_providers_are_told(tmp_path, name, value, sentence):
    provider = CountingProvider()
    setattr(provider, name, value)
    with pytest.raises((TypeError, ValueError), match=sentence):
        make_films(tmp_path, provider)
    with pytest.raises(TypeError, match="provider must be a rapfast.augment.Provider, got None"):
        make_films(tmp_path, None)


def test_a_refiner_of_another_shape_is_told(tmp_path):
    class Wrong(CountingProvider):
        def refine(self, features, alphas, seeds):
            return features[:, :4]

    with pytest.raises(ValueError, match=r"refine must return \[3, 3, 48, 64\], got float32 \[3, 4, 48, 64\] on cpu"):
        make_films(tmp_path, Wrong())
    assert not list(tmp_path.rglob("*.mp4"))


def test_cameras_can_be_the_providers_own(tmp_path):
    class Still(CountingProvider):
        shape = (FRAMES, 4, 4)

        def cameras(self, viewpoint, difficulty, n_frames, fps, seed):
            assert (n_frames, fps) == (FRAMES, 25.0) and difficulty in DIFFICULTIES.values()
            return np.broadcast_to(viewpoint.viewmat, self.shape), np.tile(viewpoint.K, (n_frames, 1, 1))

    watched, provider = Watched(), Still()
    make_films(tmp_path, provider, watch=watched)
    for frame in range(FRAMES):
        assert torch.equal(watched.features["v", "easy"][frame], watched.features["v", "hard"][frame])
    assert json.loads(params_path(tmp_path).read_text())["sets"]["easy"]["v"]["viewpoint"] is None  # none was drawn
    with pytest.raises(ValueError, match="the provider made the cameras of v itself"):
        film_cameras(params_path(tmp_path), "easy", "v")
    with pytest.raises(ValueError, match="holds no film of the set medium and the video v"):
        film_cameras(params_path(tmp_path), "medium", "v")
    provider.shape = (2, 4, 4)
    summary = make_films(tmp_path / "b", provider)
    with pytest.raises(ValueError, match=r"video v: cameras must return finite .* \[7, 4, 4\], got"):
        raise summary.failures[0].error


def test_composite_and_writer_can_be_others(tmp_path):
    class Inverting(CountingProvider):
        def composite(self, pictures, alphas, backgrounds, *, premultiplied):
            return 1 - super().composite(pictures, alphas, backgrounds, premultiplied=premultiplied)

    added = {}

    class Collecting(Films):
        def add(self, planes, pixels=None):
            added.setdefault("planes", []).append(planes.clone())
            super().add(planes, pixels)

    make_films(tmp_path / "a", CountingProvider(), names=("easy",), views=3, writer=Collecting)
    plain = torch.cat(added.pop("planes"))
    make_films(tmp_path / "b", Inverting(), names=("easy",), views=3, writer=Collecting)
    inverted = torch.cat(added.pop("planes"))
    assert plain.shape == (FRAMES, 1, HEIGHT * 3 // 2, WIDTH)
    luma = plain[:, :, :HEIGHT].int() + inverted[:, :, :HEIGHT].int()
    assert (luma - 251).abs().max() <= 1  # 16 + 235


def test_odd_sizes_are_padded_or_refused(tmp_path):
    make_films(tmp_path / "a", CountingProvider(33, 27), names=("easy",))
    frames = read_film(film_path(tmp_path / "a", "easy", "v"))
    assert frames[0].shape == (28, 34, 3)
    summary = make_films(tmp_path / "b", CountingProvider(33, 27), names=("easy",), pad=False)
    with pytest.raises(ValueError, match="video v: the images are 33x27 and H.264 needs even sides: pad them"):
        raise summary.failures[0].error
