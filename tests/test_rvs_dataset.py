"""Random views as a dataset: what the batches are, that nothing but the arguments decides them, and how it all ends."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from torch import Tensor
from torch.utils.data import DataLoader

from rapfast import Cameras, PostProcess
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.rvs import FarFrom, PoseSampler, RandomViewDataset, sample_kept, world_to_camera
from rapfast.scene import Scene

SAMPLER = PoseSampler(0.2, 10.0)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hang ends the run and says where it was."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert workers() == []


def workers() -> list[object]:
    """Threads and processes that render views."""
    both = [*threading.enumerate(), *multiprocessing.active_children()]
    return [one for one in both if one.name == "rapfast-views"]


@pytest.fixture(scope="module")
def appearance():
    return make_appearance(n=150, c=4, n_maps=2)


@pytest.fixture(scope="module")
def scene(appearance) -> RapScene:
    a = appearance
    torch.manual_seed(1)
    geometry = Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=a.intrinsic)
    net = FeatureMapNet().eval().requires_grad_(False)
    return RapScene(geometry.to(torch.float32), a.box_coord.float(), net, ColorNet.from_state_dict(net_state()).float())


@pytest.fixture(scope="module")
def cameras(appearance) -> Cameras:
    return Cameras(appearance.viewmats.float(), appearance.Ks.float(), WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def given(appearance) -> dict:
    return {"feature_maps": appearance.maps.float(), "map_ids": [0, 1, 1, 0], "batch_size": 3, "views_per_epoch": 7}


@pytest.fixture
def make(scene, cameras, given):
    """RandomViewDataset of the small scene, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda sampler=SAMPLER, **more: stack.enter_context(
            RandomViewDataset(scene, cameras, sampler, **given | more)
        )


def epochs(views: RandomViewDataset, n: int) -> list[dict[str, Tensor]]:
    return [batch for _ in range(n) for batch in views]


def assert_same_batches(got: list[dict[str, Tensor]], want: list[dict[str, Tensor]]) -> None:
    assert len(got) == len(want)
    for one, two in zip(got, want, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), name


def rows(batches: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([batch[name] for batch in batches])


def count_views(monkeypatch) -> list[int]:
    """Numbers of views of the renders to come."""
    counted: list[int] = []
    render = RapScene.render

    def counting(self, viewmats, *args, **options):
        counted.append(len(viewmats))
        return render(self, viewmats, *args, **options)

    monkeypatch.setattr(RapScene, "render", counting)
    return counted


# --- what the batches are -----------------------------------------------------------------------------------------


def test_a_batch_is_what_it_says(make, scene, cameras, given):
    post = PostProcess(size=(20, 30), clamp=(0.0, 1.0), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    views = make(postprocess=post, weights=(0.5, 1.5), background=(0.1, 0.2, 0.3))
    batches = list(views)
    assert [len(batch["image"]) for batch in batches] == [3, 3, 1] and len(views) == 3
    chw = PostProcess(size=post.size, clamp=post.clamp, mean=post.mean, std=post.std, layout="CHW")
    # Cameras differ in their intrinsics, and batches do not say which it was: the picture tells.
    for batch in batches:
        assert {name: (t.dtype, t.shape[1:]) for name, t in batch.items()} == {
            "image": (torch.float32, (3, 20, 30)),
            "pose": (torch.float32, (3, 4)),
            "weight": (torch.float32, ()),
            "reference": (torch.int64, ()),
        }
        for image, pose, weight, reference in zip(*batch.values(), strict=True):
            assert 0.5 <= weight <= 1.5
            same = [k for k in range(4) if given["map_ids"][k] == reference]
            images, _, _ = scene.render(
                world_to_camera(pose[None].double()).expand(len(same), 4, 4), cameras.Ks[same], WIDTH, HEIGHT,
                feature_maps=given["feature_maps"], map_ids=[int(reference)] * len(same),
                view_weights=[float(weight)] * len(same), backgrounds=torch.tensor([[0.1, 0.2, 0.3]] * len(same)),
                postprocess=chw,
            )  # fmt: skip
            # The pose and the weight have been rounded to float32 behind the render.
            assert min(float((image - one).abs().max()) for one in images) < 1e-3
    assert float(rows(batches, "image").std()) > 0.1


def test_poses_are_around_the_cameras_and_each_camera_has_its_turn(make, cameras):
    still = make(PoseSampler(0.0, 0.0), views_per_epoch=8, batch_size=8)
    (batch,) = still
    want = cameras.poses[:, :3]
    nearest = [int((want - pose).abs().amax((1, 2)).argmin()) for pose in batch["pose"]]
    assert sorted(nearest[:4]) == sorted(nearest[4:]) == [0, 1, 2, 3]
    assert torch.allclose(batch["pose"], want[nearest], atol=1e-6)
    assert batch["reference"].tolist() == [[0, 1, 1, 0][k] for k in nearest]
    assert len({tuple(next(iter(still))["pose"][:, 0, 3].tolist()) for _ in range(3)}) > 1  # the order changes


def test_views_and_weights_are_random(make):
    batches = epochs(make(views_per_epoch=40, batch_size=20), 2)
    assert len(rows(batches, "pose").flatten(1).unique(dim=0)) == 80
    weights = rows(batches, "weight")
    assert len(weights.unique()) == 80 and 0 <= weights.min() < 0.3 and 1.7 < weights.max() <= 2


def test_a_function_as_sampler(make, cameras):
    box = cameras.poses[:, :3]

    def away(poses: Tensor, rng: torch.Generator) -> Tensor:
        return sample_kept(PoseSampler(1.0, 0.0), poses, FarFrom(box, 0.3), rng=rng)[0]

    poses = rows(list(make(away, views_per_epoch=20)), "pose")
    assert FarFrom(box, 0.299)(poses).all()


def test_feature_maps_of_images_kept_or_not_or_given(make, scene, monkeypatch):
    images = torch.rand(2, 3, 34, 40)
    made: list[int] = []
    feature_maps = FeatureMapNet.feature_maps
    monkeypatch.setattr(
        FeatureMapNet,
        "feature_maps",
        lambda self, given, **options: made.append(len(given)) or feature_maps(self, given, **options),
    )
    maps = scene.feature_maps(images)
    want = epochs(make(feature_maps=maps), 2)
    made.clear()
    assert_same_batches(epochs(make(feature_maps=None, images=images), 2), want)
    assert sum(made) == 2
    made.clear()
    views = make(feature_maps=None, images=list(images), map_bytes=maps[0].nbytes)
    assert_same_batches(epochs(views, 2), want)
    assert sum(made) > 3  # one is kept, the other made for each batch with it
    bytes_ = (255 * images + 0.5).to(torch.uint8)
    maps = scene.feature_maps(bytes_.float() / 255)
    want = epochs(make(feature_maps=maps), 2)
    assert_same_batches(epochs(make(feature_maps=None, images=bytes_), 2), want)
    assert_same_batches(epochs(make(feature_maps=None, images=LoadedWhenUsed(bytes_)), 2), want)
    assert_same_batches(epochs(make(feature_maps=lambda numbers: [maps[k] for k in numbers]), 2), want)


class LoadedWhenUsed(Sequence):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        assert threading.current_thread().name == "rapfast-views"
        return self.images[index]


# --- nothing but the arguments decides them -----------------------------------------------------------------------


def test_the_same_twice_at_any_depth_and_speed(make):
    want = epochs(make(), 3)
    assert_same_batches(epochs(make(), 3), want)
    for depth in (2, 4, 5, 9, 40):
        assert_same_batches(epochs(make(depth=depth), 3), want)
    slow, views = [], make(depth=1)
    for _ in range(3):
        for batch in views:
            time.sleep(0.02)
            slow.append(batch)
    assert_same_batches(slow, want)
    other = epochs(make(seed=1), 3)
    assert not torch.equal(rows(other, "pose"), rows(want, "pose"))
    assert not torch.equal(rows(want[:3], "pose"), rows(want[3:6], "pose"))


def test_an_epoch_can_be_chosen(make):
    want = epochs(make(), 4)
    views = make()
    views.epoch = 3
    assert_same_batches(list(views), want[9:])
    assert views.epoch == 4
    views.epoch = 1
    assert_same_batches(epochs(views, 2), want[3:9])


def test_a_loop_left_early_is_an_epoch(make):
    want = epochs(make(), 3)
    views = make()
    assert_same_batches([next(iter(views))], want[:1])
    got = []
    for batch in views:
        got.append(batch)
        if len(got) == 2:
            break
    assert_same_batches(got, want[3:5])
    assert_same_batches(list(views), want[6:])


def test_the_views_of_an_epoch_come_again_in_another_order(make, monkeypatch):
    counted = count_views(monkeypatch)
    views = make(refresh_every=3)
    by_epoch = [list(views) for _ in range(5)]
    views.close()
    # Two generations; the background may have begun the sixth epoch, which is of the second.
    assert sum(counted) == 14
    found = []
    for batches in by_epoch:
        poses = rows(batches, "pose").flatten(1).tolist()
        images, weights = rows(batches, "image"), rows(batches, "weight")
        order = sorted(range(7), key=poses.__getitem__)
        found.append((order, images[order], weights[order], [poses[k] for k in order]))
    for epoch, start in ((1, 0), (2, 0), (4, 3)):
        assert found[epoch][0] != found[start][0]
        assert found[epoch][3] == found[start][3]
        assert torch.equal(found[epoch][1], found[start][1]) and torch.equal(found[epoch][2], found[start][2])
    assert found[3][3] != found[0][3]
    assert found[1][0] != found[2][0]


def test_replays_do_not_depend_on_where_one_begins(make):
    want = epochs(make(refresh_every=3), 3)
    views = make(refresh_every=3)
    views.epoch = 2
    assert_same_batches(list(views), want[6:])
    views.epoch = 1
    first = next(iter(views))  # and left: what was rendered is kept
    assert_same_batches([first], want[3:4])
    views.epoch = 0
    assert_same_batches(epochs(views, 3), want)


def test_memory_of_replays(make):
    assert make().replayed_bytes == 0
    per_view = 4 * (3 * HEIGHT * WIDTH + 12 + 1) + 8
    assert make(refresh_every=2).replayed_bytes == 7 * per_view
    with pytest.raises(ValueError, match="more than replay_bytes=1000: allow more"):
        make(refresh_every=2, replay_bytes=1000)


# --- ahead, but not far -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_back_pressure(make, monkeypatch, depth):
    counted = count_views(monkeypatch)
    views = iter(make(depth=depth, views_per_epoch=300, batch_size=1))
    for taken in (1, 2):
        next(views)
        deadline = time.monotonic() + 30
        while len(counted) < taken + depth:
            assert time.monotonic() < deadline, "it does not render ahead"
            time.sleep(0.005)
        time.sleep(0.1)
        assert len(counted) == taken + depth


@pytest.mark.parametrize("depth", [4, 7])
def test_deeper_ones_render_half_of_it_at_once(make, monkeypatch, depth):
    counted, half = count_views(monkeypatch), depth // 2
    views = iter(make(depth=depth, views_per_epoch=600, batch_size=2))
    for taken in range(1, 9):
        next(views)
        groups = (taken + depth) // half  # as many as there is room for
        deadline = time.monotonic() + 30
        while len(counted) < groups:
            assert time.monotonic() < deadline, "it does not render ahead"
            time.sleep(0.005)
        time.sleep(0.03)
        assert counted == [2 * half] * groups


def test_the_next_epoch_begins_before_its_loop(make, monkeypatch):
    counted = count_views(monkeypatch)
    views = make(depth=2)
    list(views)
    deadline = time.monotonic() + 30
    while len(counted) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    thread = workers()
    list(views)
    assert workers() == thread and len(thread) == 1


# --- how it ends --------------------------------------------------------------------------------------------------


def test_left_by_break_exception_and_close(make):
    views = make()
    for _ in views:
        break
    assert workers() == []
    with pytest.raises(ZeroDivisionError):
        for _ in views:
            1 / 0  # noqa: B018
    assert workers() == []
    loop = iter(views)
    next(loop)
    assert len(workers()) == 1
    views.close()
    assert workers() == []
    with pytest.raises(RuntimeError, match="has ended: it was closed"):
        next(loop)
    assert len(list(views)) == 3
    views.close()
    views.close()


def test_left_to_the_garbage_collection(scene, cameras, given):
    views = RandomViewDataset(scene, cameras, SAMPLER, **given)
    list(views)
    assert len(workers()) == 1
    del views
    gc.collect()
    assert workers() == []
    loop = iter(RandomViewDataset(scene, cameras, SAMPLER, **given))
    next(loop)
    circle = [loop]
    circle.append(circle)
    del loop, circle
    gc.collect()
    assert workers() == []


def test_a_second_loop_ends_the_first(make):
    views = make()
    first, second = iter(views), iter(views)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another has begun"):
        next(first)
    assert len(list(second)) == 2


def test_a_loop_that_is_over_does_not_end_the_next(make):
    views = make()
    want = epochs(make(), 2)
    first = iter(views)
    got = [next(first) for _ in range(3)]
    second = iter(views)
    got.append(next(second))
    assert next(first, None) is None
    assert_same_batches(got + list(second), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forks_copy_ends_nothing(make):
    views = make(where="process", batch_size=1)
    loop = iter(views)
    next(loop)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            loop.close()
            views.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(loop)) == 6


class FailsAt:
    """Draws poses; fails in the given call."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self, poses: Tensor, rng: torch.Generator) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise LookupError("no more poses today")
        return SAMPLER.sample(poses, rng)


def test_errors_are_raised_in_the_loop(make):
    with make() as views:
        want = epochs(views, 3)
    views = make(FailsAt(2))
    assert_same_batches(list(views), want[:3])
    with pytest.raises(RuntimeError, match="no more poses today") as caught:
        list(views)
    assert isinstance(caught.value.__cause__, LookupError)
    assert "in __call__" in str(caught.value) and 'raise LookupError("no more poses today")' in str(caught.value)
    assert workers() == []
    assert_same_batches(list(views), want[6:])  # it may go on


def test_out_of_memory_halves_what_is_rendered_at_once(make, monkeypatch):
    with make(batch_size=7) as views:
        want = epochs(views, 2)
    render, tried = RapScene.render, []

    def small(self, viewmats, *args, **options):
        tried.append(len(viewmats))
        if len(viewmats) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory, as if")
        return render(self, viewmats, *args, **options)

    monkeypatch.setattr(RapScene, "render", small)
    with pytest.warns(RuntimeWarning, match="ran out of memory") as told:
        assert_same_batches(list(make(batch_size=7)), want[:1])
    assert [str(one.message).split()[-5] for one in told] == ["3", "1"]
    assert tried[:9] == [7, 3, *[1] * 7]
    views = make(batch_size=7)
    with pytest.warns(RuntimeWarning):
        assert_same_batches(epochs(views, 2), want)
    with pytest.raises(RuntimeError, match="out of memory, as if"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(RapScene, "render", lambda *_, **__: small(None, [0, 0, 0]))
        list(make())


@pytest.mark.parametrize(
    ("sampler", "sentence"),
    [
        (lambda poses, rng: poses[:2], "must give one pose for each of 7, got 2"),
        (lambda poses, rng: poses * torch.nan, r"the sampler's poses\[0\] must be finite"),
    ],
)
def test_what_a_sampler_gives_is_checked(make, sampler, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        list(make(sampler))


# --- in another process -------------------------------------------------------------------------------------------


def test_process(make):
    with make(refresh_every=2) as views:
        want = epochs(views, 4)
    views = make(FailsAt(3), refresh_every=2, where="process", depth=2)
    assert_same_batches(epochs(views, 4), want)
    assert [type(one).__name__ for one in workers()] == ["SpawnProcess"]
    with pytest.raises(RuntimeError, match="no more poses today") as caught:
        list(views)
    assert "in __call__" in str(caught.value)
    assert workers() == []


def test_process_that_is_killed(make):
    views = make(where="process", views_per_epoch=3000)
    with pytest.raises(RuntimeError, match="has died with exit code -9"):
        for _ in views:
            workers()[0].kill()


def test_what_cannot_go_to_a_process(make):
    with pytest.raises(TypeError, match='where="process" sends scene, sampler .* pickled'):
        next(iter(make(lambda poses, rng: poses, where="process")))


@pytest.mark.parametrize(
    ("end", "code"),
    [("raise SystemExit(7)", 7), pytest.param("os.kill(os.getpid(), signal.SIGKILL)", -9, marks=pytest.mark.slow)],
)
def test_interpreter_exit(end, code):
    """A script that ends while loops are open, in a thread and in a process."""
    script = """
        import os
        import signal
        import sys
        sys.path.insert(0, {tests!r})
        import test_rvs_dataset as t
        a = t.make_appearance(n=150, c=4, n_maps=2)
        scene, cameras = t.scene.__wrapped__(a), t.cameras.__wrapped__(a)
        kept = []
        for where in ("thread", "process"):
            views = t.RandomViewDataset(scene, cameras, t.SAMPLER, **t.given.__wrapped__(a), where=where)
            kept.append((views, iter(views)))
            next(kept[-1][1])
        print("rendered", *[one.pid for one in t.workers() if hasattr(one, "pid")], flush=True)
        {end}
    """
    script = textwrap.dedent(script).format(tests=str(Path(__file__).parent), end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    pid = int(done.stdout.split()[1])
    deadline = time.monotonic() + 30  # after a kill, its process has yet to see that it is alone
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        pytest.fail("the process that renders is still there")


# --- DataLoader, arguments ----------------------------------------------------------------------------------------


def test_in_a_data_loader(make, monkeypatch):
    want = epochs(make(), 2)
    loader = DataLoader(make(), batch_size=None, num_workers=0)
    assert len(loader) == 3
    assert_same_batches([batch for _ in range(2) for batch in loader], want)
    monkeypatch.setattr("rapfast.rvs.dataset.get_worker_info", lambda: "a worker's")  # a real one takes 5 s to end
    with pytest.raises(RuntimeError, match="use it in a DataLoader with num_workers=0"):
        next(iter(make()))
    with pytest.raises(TypeError, match="RandomViewDataset cannot be pickled"):  # as where workers are spawned
        pickle.dumps(make())


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"sampler": 3}, TypeError, "sampler must be a PoseSampler or a function, got int 3"),
        ({"batch_size": 0}, ValueError, "batch_size must be between 1 and"),
        ({"views_per_epoch": 0}, ValueError, "views_per_epoch must be between 1 and"),
        ({"depth": 0}, ValueError, "depth must be between 1 and"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be between 1 and"),
        ({"seed": -1}, ValueError, "seed must be between 0 and"),
        ({"weights": (2, 1)}, ValueError, "weights must be two finite numbers, low <= high"),
        ({"postprocess": 3}, TypeError, "postprocess must be a PostProcess or None, got int 3"),
        ({"background": (1, 2)}, ValueError, "background must be three numbers, got 2"),
        ({"where": "gpu"}, ValueError, 'where must be "thread", "stream", "process" or a device, got str \'gpu\''),
        ({"where": "stream"}, ValueError, 'where="stream" needs a scene on a GPU, it is on cpu'),
        ({"device": "meta"}, ValueError, "device must be the CPU or a CUDA device, got meta"),
        ({"map_ids": None}, ValueError, "map_ids must be given where 2 feature maps meet 4 views"),
        ({"map_ids": [0, 1, 2, 0]}, ValueError, r"map_ids\[2\] must be between 0 and 1"),
        ({"feature_maps": lambda k: [], "map_ids": None}, ValueError, "map_ids must be given where feature_maps is a"),
        ({"feature_maps": None}, ValueError, "either images or feature_maps must be given"),
        ({"images": torch.rand(2, 3, 40, 40)}, ValueError, "either images or feature_maps must be given, and not both"),
        ({"feature_maps": None, "images": [torch.rand(40, 40)]}, TypeError, r"images\[0\] must be a floating-point"),
        ({"feature_maps": None, "images": []}, TypeError, "images must be a tensor .* at least one, got list"),
        ({"precision": "fp16"}, NotImplementedError, "that is for a GPU"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
    ],
)
def test_wrong_arguments(make, wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        make(**wrong)


def test_neither_a_scene_nor_cameras(scene, cameras, given):
    with pytest.raises(TypeError, match="scene must be a RapScene, got None"):
        RandomViewDataset(None, cameras, SAMPLER, **given)
    with pytest.raises(TypeError, match="cameras must be a Cameras of at least one view"):
        RandomViewDataset(scene, cameras[:0], SAMPLER, **given)


# --- on GPUs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(scene, cameras, given):
    moved = scene.to("cuda")
    options = given | {"feature_maps": given["feature_maps"].cuda(), "views_per_epoch": 16, "batch_size": 4}
    return lambda **more: RandomViewDataset(moved, cameras, SAMPLER, **options | more)


def plain(views: RandomViewDataset, n: int) -> list[dict[str, Tensor]]:
    with views:
        return [{name: tensor.cpu() for name, tensor in batch.items()} for batch in epochs(views, n)]


@pytest.mark.cuda
def test_gpu_everywhere_the_same(on_gpu):
    want = plain(on_gpu(), 4)
    assert float(rows(want, "image").std()) > 0.1
    for more in ({"where": "stream", "depth": 7}, {"where": "process"}, {"device": "cpu"}, {"where": "cuda:0"}):
        assert_same_batches(plain(on_gpu(**more), 4), want)
    replayed = plain(on_gpu(refresh_every=2), 4)
    assert_same_batches(plain(on_gpu(refresh_every=2, where="process", device="cpu"), 4), replayed)
    assert_same_batches(replayed[:4], want[:4])


def assert_late_reader_sees_all(on_gpu, stream, **options):
    """One that is busy on a stream of its own, and drops each batch at once."""
    want = [batch["image"].double().sum() for batch in plain(on_gpu(), 6)]
    busy = torch.randn(4096, 4096, device=stream.device)
    sums = []
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with on_gpu(depth=1, **options) as views, torch.cuda.stream(stream):
        for _ in range(6):
            for batch in views:
                for _ in range(10):
                    torch.mm(busy, busy)
                sums.append(batch["image"].double().sum())
                del batch
    stream.synchronize()
    assert torch.allclose(torch.stack(sums).cpu(), torch.stack(want), rtol=1e-12)


@pytest.mark.cuda
def test_gpu_batches_are_whole_on_any_stream_and_memory_is_not_reused_early(on_gpu):
    """A consumer that lags behind on a stream of its own, and drops each batch at once, reads what was rendered."""
    assert_late_reader_sees_all(on_gpu, torch.cuda.Stream(priority=-1))


@pytest.mark.cuda
def test_gpu_scene_of_the_cpu(make):
    with make(where="cuda", device="cuda", precision="fp32") as views:
        got = list(views)
    assert got[0]["image"].is_cuda and got[0]["reference"].is_cuda
    want = list(make())
    assert torch.equal(rows(got, "pose").cpu(), rows(want, "pose"))
    assert float((rows(got, "image").cpu() - rows(want, "image")).abs().max()) < 1e-3


@pytest.fixture
def two_gpus() -> tuple[torch.device, torch.device]:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
    return torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.cuda
def test_gpu_another_one(on_gpu, two_gpus):
    """A copy of the scene on the second GPU renders what the first would, and hands it over there or here."""
    here, there = two_gpus
    want = plain(on_gpu(), 4)
    assert float(rows(want, "image").std()) > 0.1
    for more, device in (
        ({"where": there}, here),
        ({"where": "cuda:1", "device": "cuda:1", "depth": 5}, there),
        ({"where": there, "device": "cpu"}, torch.device("cpu")),
        ({"device": there}, there),
        ({"where": "process", "device": there}, there),
    ):
        views = on_gpu(**more)
        assert {tensor.device for tensor in next(iter(views)).values()} == {device}, more
        views.epoch = 0
        assert_same_batches(plain(views, 4), want)
    replayed = plain(on_gpu(refresh_every=2), 4)
    assert_same_batches(plain(on_gpu(refresh_every=2, where=there), 4), replayed)
    assert torch.cuda.current_device() == 0


@pytest.mark.cuda
def test_gpu_another_one_makes_the_maps_of_images_there(on_gpu, two_gpus, scene, cameras):
    _, there = two_gpus
    images = torch.rand(2, 3, 40, 56, device="cuda:0")
    given = {"images": images, "feature_maps": None}
    want = plain(on_gpu(**given), 2)
    assert_same_batches(plain(on_gpu(**given, where=there), 2), want)
    with RandomViewDataset(scene, cameras, SAMPLER, images=images, map_ids=[0, 1, 1, 0], where=there) as views:
        assert {tensor.device.type for batch in views for tensor in batch.values()} == {"cpu"}


@pytest.mark.cuda
def test_gpu_another_ones_batches_are_whole_when_read_late(on_gpu, two_gpus):
    """As above for one GPU: work in front of the consumer's stream, and batches dropped at once."""
    here, there = two_gpus
    assert_late_reader_sees_all(on_gpu, torch.cuda.Stream(here), where=there)


# --- the example --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_example_pose_errors_fall(tmp_path):
    pytest.importorskip("matplotlib", reason="the example plots with matplotlib")
    script = Path(__file__).parents[1] / "examples" / "train_pose_regressor.py"
    command = [sys.executable, str(script), "--quick", "--device", "cpu", "--out", str(tmp_path / "plot.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    errors = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words[:2] == ["median", "error"]:
            errors[words[2]] = float(words[4]), float(words[6])
    for before, after in zip(errors["before"], errors["after"], strict=True):
        assert after < 0.75 * before
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
