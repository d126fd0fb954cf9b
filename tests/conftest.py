"""What every test gets: the marks' rules, a device fixture, fixed seeds, a bounded thread count."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from rapfast._native import _C

# Programs that tests start are no workers of this run: pytest-benchmark measures nothing in one.
os.environ.pop("PYTEST_XDIST_WORKER", None)

# Results never depend on the thread count; more threads than this only crowd a shared machine.
MAX_TORCH_THREADS = 4


def why_no_cuda() -> str | None:
    """The sentence that tells why tests marked cuda cannot run here; None where they can."""
    build = _C.build_info()
    if build["cuda"] is None:
        return _C.cuda_devices()["reason"]
    if not build["cuda_stages"]:
        return "this build has no CUDA stages, only the device query"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(torch.get_num_threads(), MAX_TORCH_THREADS))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked cuda is skipped where it cannot run, or fails under RAPFAST_REQUIRE_CUDA=1."""
    if item.get_closest_marker("cuda") is None:
        return
    reason = why_no_cuda()
    if reason is None:
        return
    if os.environ.get("RAPFAST_REQUIRE_CUDA") == "1":
        pytest.fail(f"RAPFAST_REQUIRE_CUDA=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small operations, which a second thread only slows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the test runs on."""
    return torch.device(request.param)
