"""What the plans this project began with claim beyond rendering: loading, batches, epochs, caches, calls.

docs/claims.md sets these records beside the claims. Times are the host's, from a queue that is empty to one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import appearance, training
from bench.appearance import CASES, workload
from bench.baselines.rap_loop import tf32
from bench.conftest import device_of, scale_of
from bench.measure import rounds_for, seconds
from rapfast import Cameras, PostProcess
from rapfast.appearance import RapScene
from rapfast.profiling import Profiler
from rapfast.rvs import PoseSampler, RandomViewDataset, RandomViewSynthesizer, ViewCache, view_keys, view_settings

SIZES = {
    "full": {"pictures": 128, "network": (240, 427), "batches": (8, 32), "case": "rap-room-500k-854x480", "views": 32,
             "calls": 100},
    "reduced": {"pictures": 24, "network": (60, 107), "batches": (8,), "case": "rap-room-25k-107x60", "views": 2,
                "calls": 10},
}  # fmt: skip


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return device_of(pytestconfig)


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> dict[str, Any]:
    return SIZES[scale_of(pytestconfig)]


@pytest.fixture(autouse=True)
def as_rap_multiplies() -> Iterator[None]:
    with tf32(True):
        yield


def _measure(
    benchmark: Any, call: Callable[[], Any], device: str, max_rounds: int, units: int, most: int = 20, **info: Any
) -> None:
    """Times a call that makes so many ``units``; ``info`` names it: claim, case, backend, batch."""

    def done() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    done()
    warmups, rounds = rounds_for(seconds(done, device), device, min(max_rounds, most))
    benchmark.pedantic(done, warmup_rounds=min(warmups, 2), rounds=rounds)
    if benchmark.stats is not None:
        ms = 1e3 * benchmark.stats.stats.median / units
        benchmark.extra_info.update(direction="claim", ms=ms, device=device, timer="perf_counter", **info)


# --- reading pictures: 2-4x ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, Any]) -> list[Path]:
    return training.write_pictures(tmp_path_factory.mktemp("pictures"), sizes["pictures"])


@pytest.mark.parametrize("way", list(training.LOADING))
@pytest.mark.parametrize("batch", [1, 8])
def test_loading(
    benchmark: Any, way: str, batch: int, pictures: list[Path], sizes: dict[str, Any], device: str, max_rounds: int
) -> None:
    """An epoch of PNGs through torch's loader to the device, workers there already."""
    batches = training.loader(pictures, sizes["network"], way, batch)
    expected = training.Pictures(pictures, sizes["network"])
    first = next(iter(batches))
    assert torch.equal(first, torch.stack([expected[i] for i in range(batch)]))

    def epoch() -> None:
        for images in batches:
            images.to(device, non_blocking=images.is_pinned())

    width, height = training.PICTURE_SIZE
    case = f"png-{width}x{height}"
    _measure(
        benchmark,
        epoch,
        device,
        max_rounds,
        len(pictures),
        most=5,
        claim="loading",
        case=case,
        backend=way,
        batch=batch,
    )


# --- batches of images: 15.17x ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loop", "batch"])
@pytest.mark.parametrize("what", ["normalise-64x64", "normalise", "regressor"])
@pytest.mark.parametrize("at", [0, 1])
def test_batches(
    benchmark: Any, way: str, what: str, at: int, sizes: dict[str, Any], device: str, max_rounds: int
) -> None:
    """The same images one by one and as one batch, on the device."""
    if at >= len(sizes["batches"]):
        pytest.skip("the reduced scale has one batch")
    n = sizes["batches"][at]
    height, width = (64, 64) if what.endswith("64x64") else sizes["network"]
    images = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (training.IMAGENET_MEAN, training.IMAGENET_STD))

    def run(images: Tensor) -> Tensor:
        return (images.clamp(0, 1) - mean) / std

    if what == "regressor":
        run = training.Trainer(device, small=device == "cpu").model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(run(images), torch.cat([run(one) for one in images.split(1)]), rtol=0.05, atol=0.02)
        call = (lambda: [run(one) for one in images.split(1)]) if way == "loop" else lambda: run(images)
        case = what if what.endswith("64x64") else f"{what}-{width}x{height}"
        _measure(benchmark, call, device, max_rounds, n, claim="batches", case=case, backend=way, batch=n)


# --- random views: calls, epochs, caches -----------------------------------------------------------------------------


def _work(sizes: dict[str, Any], device: str) -> appearance.Workload:
    case = next(case for cases in CASES.values() for case in cases if case.name == sizes["case"])
    return workload(case, device)


def _synthesizer(work: appearance.Workload, batch: int, **more: Any) -> RandomViewSynthesizer:
    cameras = work.geometry.cameras
    return RandomViewSynthesizer(
        work.rap, work.K, (cameras.height, cameras.width), work.maps("rapfast", len(work.images)),
        work.case.network_size, batch_size=batch, **more,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8, 16, 32])
def test_calls(benchmark: Any, batch: int, sizes: dict[str, Any], device: str, max_rounds: int) -> None:
    """100 views (10 at the reduced scale), feature maps there, in calls of a batch: how many calls, how long."""
    work, n = _work(sizes, device), sizes["calls"]
    views = _synthesizer(work, batch)
    ids = [i % len(work.images) for i in range(n)]
    poses, weights = work.poses.numpy()[ids], np.array(work.view_weights)[ids]
    with Profiler(device, stages=False, nvtx=False) as profiler:
        views.render(poses, weights, ids)
    (draw,) = [node for node in profiler.nodes() if node.path[-1] == "draw"]
    assert draw.counts["views"] == n and draw.calls == -(-n // batch)
    _measure(
        benchmark, lambda: views.render(poses, weights, ids), device, max_rounds, n, claim="calls",
        case=work.case.name, backend="rapfast-maps", batch=batch, calls=draw.calls, views=n,
    )  # fmt: skip


def _dataset(work: appearance.Workload, rap: RapScene, batch: int) -> RandomViewDataset:
    cameras = work.geometry.cameras
    views = Cameras(cameras.viewmats.cpu(), cameras.Ks.cpu(), cameras.width, cameras.height)
    post = PostProcess(size=work.case.network_size, mean=training.IMAGENET_MEAN, std=training.IMAGENET_STD)
    return RandomViewDataset(rap, views, PoseSampler(0.2, 10.0), images=work.images, batch_size=batch, postprocess=post)


SYNTHESIS = ("none", "rap-eager", "rap-compiled", "rapfast", "rapfast-dataset")


@pytest.mark.parametrize("way", SYNTHESIS)
@pytest.mark.parametrize("batch", [1, 8])
def test_epoch(benchmark: Any, way: str, batch: int, sizes: dict[str, Any], device: str, max_rounds: int) -> None:
    """An epoch with new random views: one is made for each training image, then steps for batches of training images
    and of views take turns. "none": the training images alone, twice, with no synthesis.

    RAP's loop hands over tensors on the CPU, as RAP does; rapfast pinned ones; its dataset renders during the steps.
    """
    if way.startswith("rap-") and device == "cpu":
        pytest.skip("RAP's loop draws with gsplat, which runs on CUDA devices alone")
    work, n = _work(sizes, device), sizes["views"]
    trainer = training.Trainer(device, small=device == "cpu")
    seeded = torch.Generator().manual_seed(1)
    real = torch.randn(n, 3, *work.case.network_size, generator=seeded)
    real = real.pin_memory() if device == "cuda" else real
    targets = work.poses[:n].flatten(1).float()

    def batches(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(images.split(batch), targets.split(batch), strict=True)

    if way == "rapfast-dataset":
        dataset = _dataset(work, work.rap, batch)

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            return ((made["image"], made["pose"].flatten(1).float()) for made in dataset)
    elif way == "none":

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            return batches(real)
    else:
        render = appearance.renderer(work, "rap-loop", n if way.startswith("rap-") else min(8, n), way)

        def views() -> Iterator[tuple[Tensor, Tensor]]:
            with torch.no_grad():
                made = render()
                made = made if isinstance(made, Tensor) else torch.stack(list(made))
            return batches(made[:n])

    def epoch() -> None:
        turns = (part for pair in zip(batches(real), views(), strict=True) for part in pair)
        assert trainer.epoch(turns) == 2 * n

    try:
        _measure(
            benchmark, epoch, device, max_rounds, n, most=8, claim="epoch", case=work.case.name, backend=way,
            batch=batch, parameters=sum(p.numel() for p in trainer.model.parameters()),
        )  # fmt: skip
    finally:
        if way == "rapfast-dataset":
            dataset.close()


@pytest.mark.parametrize("way", ["rendered", "cached", "cached-on-disk"])
def test_cache(benchmark: Any, way: str, sizes: dict[str, Any], device: str, max_rounds: int, tmp_path: Path) -> None:
    """Views whose poses did not change, to the CPU: rendered anew with feature maps there, or found in a cache."""
    work, n = _work(sizes, device), sizes["views"]
    views = _synthesizer(work, min(8, n))
    poses, weights = work.poses.numpy()[:n], np.array(work.view_weights[:n])
    cameras = work.geometry.cameras
    settings = view_settings(work.rap, cameras.width, cameras.height, postprocess=views._finished)
    keys = view_keys(settings, poses, work.K.double().numpy(), weights, [str(i) for i in range(n)])
    made = views.render(poses, weights).images
    cache = ViewCache(tmp_path / "views")
    cache.store(keys, made)
    cache.flush()
    found, _ = cache.render(keys, lambda missing: pytest.fail("a view was not found"))
    assert torch.equal(torch.stack(found), made)

    def fetch() -> None:
        nonlocal cache
        if way == "cached-on-disk":  # as another run finds it
            cache.close()
            cache = ViewCache(tmp_path / "views")
        assert all(one is not None for one in cache.fetch(keys))

    call = (lambda: views.render(poses, weights)) if way == "rendered" else fetch
    _measure(benchmark, call, device, max_rounds, n, claim="cache", case=work.case.name, backend=way, batch=n)
    cache.close()
