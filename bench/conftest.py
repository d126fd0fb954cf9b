"""Options, which benchmarks there are, and what the JSON says of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import appearance
from bench.cases import BACKWARD, BACKWARD_BATCH, CASES, GARDEN_VARIABLE, Case, garden_path
from bench.measure import cuda_clock, why_not
from rapfast.profiling import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rapfast")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    group.addoption("--scale", choices=("full", "reduced"), help="default: full on a GPU, reduced on the CPU")
    group.addoption("--rounds", type=int, default=50, help="at most so many rounds a benchmark")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ratios: the README's ratios less a tenth; runs with -m ratios alone, on a GPU")
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {config.getoption('--rounds')}")
    if device_of(config) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    try:
        garden_path()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ratios are no benchmarks: they run where they are asked for."""
    if "ratios" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("ratios")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("ratios")]


def device_of(config: pytest.Config) -> str:
    chosen = config.getoption("--device")
    if chosen != "auto":
        return chosen
    return "cuda" if torch.cuda.is_available() else "cpu"


def scale_of(config: pytest.Config) -> str:
    return config.getoption("--scale") or ("full" if device_of(config) == "cuda" else "reduced")


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> str:
    return scale_of(pytestconfig)


@pytest.fixture(scope="session")
def max_rounds(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("--rounds")


def _backends(case: Case, batch: int, device: str) -> list[str]:
    """In order of running: what the others are compared with comes first."""
    if device == "cpu":
        return ["reference", "rapfast"] if case.with_reference and batch == 1 else ["rapfast"]
    names = ["gsplat", "gsplat-loop", "rapfast"] if batch == 8 and case.with_loop else ["gsplat", "rapfast"]
    return [*names, "reference"] if case.with_reference and batch == 1 else names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each case, batch and backend, those that are compared side by side."""
    if "backend" not in metafunc.fixturenames:
        return
    if "direction" in metafunc.fixturenames:
        names, parameters = ("case_name", "direction", "device", "batch", "backend"), _backward(metafunc.config)
    elif "path" in metafunc.fixturenames:
        names, parameters = ("case_name", "path", "device", "batch", "backend"), _appearance(metafunc.config)
    else:
        names, parameters = ("case_name", "device", "batch", "backend"), _forward(metafunc.config)
    metafunc.parametrize(names, parameters)


def _forward(config: pytest.Config) -> list[Any]:
    parameters = []
    for case in CASES[scale_of(config)]:
        device = "cpu" if case.cpu_only else device_of(config)
        for batch in case.batches:
            for backend in _backends(case, batch, device):
                reason = why_not(backend, device)
                if case.scene == "garden" and garden_path() is None:
                    reason = f"{GARDEN_VARIABLE} is not set: it names gsplat's test_garden.npz"
                parameters.append(_parameter((case.name,), device, batch, backend, reason))
    return parameters


def _backward(config: pytest.Config) -> list[Any]:
    parameters, device, scale = [], device_of(config), scale_of(config)
    for case in CASES[scale]:
        if case.name not in BACKWARD[scale]:
            continue
        for direction in ("bwd", "bwd-scene"):
            for backend in ["gsplat", "rapfast"] if device == "cuda" else ["rapfast"]:
                reason = why_not(backend, device)
                if case.scene == "garden" and garden_path() is None:
                    reason = f"{GARDEN_VARIABLE} is not set: it names gsplat's test_garden.npz"
                parameters.append(_parameter((case.name, direction), device, BACKWARD_BATCH[scale], backend, reason))
    return parameters


def _appearance(config: pytest.Config) -> list[Any]:
    parameters, device = [], device_of(config)
    for case in appearance.CASES[scale_of(config)]:
        for path, batches in case.batches:
            for batch in batches:
                for backend in appearance.backends(batch, device):
                    needs = "gsplat" if backend.startswith("rap-") else backend.removesuffix("-maps")
                    parameters.append(_parameter((case.name, path), device, batch, backend, why_not(needs, device)))
    return parameters


def _parameter(what: tuple[str, ...], device: str, batch: int, backend: str, reason: str | None) -> Any:
    """One benchmark, skipped where there is a reason."""
    timer = {"timer": cuda_clock} if device == "cuda" else {}
    marks = [pytest.mark.benchmark(group=f"{' '.join(what)} batch {batch}", **timer)]
    if reason:
        marks.append(pytest.mark.skip(reason=reason))
    name = f"{'-'.join(what)}-b{batch}-{backend}"
    return pytest.param(*what, device, batch, backend, marks=marks, id=name)


# --- the JSON's machine_info and commit_info -------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True, hookwrapper=True)  # before pytest-benchmark's, which is a wrapper too
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Of a run that is interrupted all that was measured is kept: the benchmark that was under way has no round, over
    which pytest-benchmark stumbles when it writes the others."""
    running = getattr(session.config, "_benchmarksession", None)
    if running is not None:
        running.benchmarks = [benchmark for benchmark in running.benchmarks if benchmark.stats.data]
    yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Names GPU and software, and leaves out what tells the host rather than the machine."""
    for key in ("node", "release", "processor", "python_build", "python_compiler"):
        machine_info.pop(key, None)
    machine_info.update(machine.describe(torch.device(device_of(config))), scale=scale_of(config))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """RAPFAST_COMMIT names the commit where the files came without their repository."""
    named = os.environ.get("RAPFAST_COMMIT")
    if named:  # of a repository that lies around the files, and of its times, nothing is kept
        commit_info.clear()
        commit_info.update(id=named, dirty=False)
    commit_info["project"] = "rapfast"
