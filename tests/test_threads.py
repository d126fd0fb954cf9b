"""Results do not depend on threads: their number, several callers at once, forked and spawned processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from scenes import HEIGHT, WIDTH, Scene, assert_same, make_scene
from torch import Tensor

from rapfast import PostProcess, rasterization

OPTIONS = {"sh_degree": 2, "render_mode": "RGB+ED", "postprocess": PostProcess(size=(30, 50))}


def example(seed: int = 0, n: int = 3000, c: int = 3) -> Scene:
    """More Gaussians than one work item of a stage takes."""
    return make_scene(n, c, sh_degree=2, seed=seed, dtype=torch.float32)


def render(scene: Scene) -> list[Tensor]:
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT, **OPTIONS)
    return [colors, alphas, meta["n_invalid"], meta["radii"], meta["means2d"], meta["conics"], meta["gaussian_ids"]]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_number_of_threads(n, restore_threads):
    scene = example()
    torch.set_num_threads(1)
    want = render(scene)
    torch.set_num_threads(n)
    for _ in range(3):
        for got, expected in zip(render(scene), want, strict=True):
            assert_same(got, expected)


def test_fewer_work_items_than_threads(restore_threads):
    scene = make_scene(1, 1, sh_degree=2, dtype=torch.float32)
    scene.means[:] = 0
    torch.set_num_threads(1)
    want = rasterization(*scene, 1, 1, sh_degree=2)[0]
    torch.set_num_threads(8)
    assert_same(rasterization(*scene, 1, 1, sh_degree=2)[0], want)


def test_growing_and_shrinking_the_pool(restore_threads):
    scene = example(n=500)
    torch.set_num_threads(1)
    want = render(scene)
    for n in (7, 2, 9, 1, 4, 12, 3):
        torch.set_num_threads(n)
        for got, expected in zip(render(scene), want, strict=True):
            assert_same(got, expected)


def test_several_callers_at_once():
    """Python threads, each with a scene of its own, that start together."""
    scenes = [example(seed=k, n=800) for k in range(6)]
    want = [render(scene) for scene in scenes]
    barrier = threading.Barrier(len(scenes))

    def work(k: int) -> list[list[Tensor]]:
        barrier.wait()
        return [render(scenes[k]) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(len(scenes)) as executor:
        for k, results in enumerate(executor.map(work, range(len(scenes)))):
            for result in results:
                for got, expected in zip(result, want[k], strict=True):
                    assert_same(got, expected)


def test_one_meta_read_by_several_threads():
    """Entries made at the same moment by several readers are equal."""
    scene = example()
    want = dict(rasterization(*scene, WIDTH, HEIGHT, sh_degree=2)[2])
    meta = rasterization(*scene, WIDTH, HEIGHT, sh_degree=2)[2]
    barrier = threading.Barrier(4)

    def work(_: int) -> dict[str, Tensor]:
        barrier.wait()
        return dict(meta)

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for read in executor.map(work, range(4)):
            for key, value in want.items():
                if isinstance(value, Tensor):
                    assert_same(read[key], value)


def in_child(connection: multiprocessing.connection.Connection, threads: int) -> None:
    """Renders and sends the picture as bytes, which need no shared memory of torch."""
    torch.set_num_threads(threads)
    connection.send([x.numpy().tobytes() for x in render(example(n=500))])
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("warm", [True, False], ids=["pool running", "pool unused"])
def test_processes(method, warm, restore_threads):
    """A forked child has none of its parent's threads; the parent goes on as before."""
    if method == "spawn" and not warm:
        pytest.skip("a spawned process never sees its parent's pool")
    want = [x.numpy().tobytes() for x in render(example(n=500))]
    if warm:
        torch.set_num_threads(4)
        render(example(n=500))
    # One thread per child: torch's own OpenMP pool does not survive a fork, and its kernels may be used by meta.
    context = multiprocessing.get_context(method)
    children = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=in_child, args=(theirs, 3 if method == "spawn" else 1))
        child.start()
        theirs.close()
        children.append((child, ours))
    for child, ours in children:
        assert ours.poll(120), "the child neither answered nor died"
        assert ours.recv() == want
        child.join(30)
        assert child.exitcode == 0
    for got, expected in zip(render(example(n=500)), want, strict=True):
        assert got.numpy().tobytes() == expected


def test_fork_with_threads_in_the_child():
    """The child's pool is a new one, of several threads. No torch kernel runs there, ours alone do."""
    scene = example(n=500)
    render(scene)
    want = rasterization(*scene, WIDTH, HEIGHT, sh_degree=2)[0].numpy().tobytes()
    threads = torch.get_num_threads()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            picture = rasterization(*scene, WIDTH, HEIGHT, sh_degree=2)[0].numpy().tobytes()
            os.write(write, b"same" if picture == want and torch.get_num_threads() == threads else b"differs")
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    answer = os.read(read, 16)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    assert (answer, os.waitstatus_to_exitcode(status)) == (b"same", 0)


def test_many_threads_fork_while_rendering():
    """A fork in the middle of another thread's call: the child starts afresh, the parent's call ends."""
    scene = example(n=2000)
    want = render(scene)
    stop = threading.Event()
    failures: list[str] = []

    def keep_rendering() -> None:
        while not stop.is_set():
            for got, expected in zip(render(scene), want, strict=True):
                if not torch.equal(got, expected):
                    failures.append("a call in the parent gave other bits")

    thread = threading.Thread(target=keep_rendering)
    thread.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    small = make_scene(50, 1, dtype=torch.float32, width=20, height=20)
                    torch.set_num_threads(1)
                    rasterization(*small, 20, 20)
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        thread.join()
    assert not failures
