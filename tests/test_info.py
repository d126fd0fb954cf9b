"""rapfast.info: what it collects, and the sentences about what is missing."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

import rapfast
from rapfast import info
from rapfast._native import _C


@pytest.fixture(scope="module")
def collected() -> dict[str, Any]:
    return info.collect()


def test_collect_is_json(collected: dict[str, Any]) -> None:
    assert json.loads(json.dumps(collected)) == collected


def test_collect_tells_the_truth(collected: dict[str, Any]) -> None:
    assert collected["rapfast"] == rapfast.__version__
    # torch adds its build, such as +cu130, to one of the two or to both
    assert collected["packages"]["torch"]["version"].split("+")[0] == torch.__version__.split("+")[0]
    assert collected["cpu"]["threads"] == torch.get_num_threads()
    assert collected["cpu"]["cores"] >= 1
    assert collected["build"] == _C.build_info()


def test_every_gpu_or_the_reason_why_there_is_none(collected: dict[str, Any]) -> None:
    cuda = collected["cuda"]
    if cuda["devices"]:
        assert cuda["reason"] is None
        assert all(device["memory"] > 0 for device in cuda["devices"])
    else:
        assert cuda["reason"].endswith(".")
        assert cuda["reason"] in collected["missing"]


@pytest.mark.cuda
def test_devices_are_those_of_torch(collected: dict[str, Any]) -> None:
    devices = collected["cuda"]["devices"]
    assert len(devices) == torch.cuda.device_count()
    for device in devices:
        properties = torch.cuda.get_device_properties(device["ordinal"])
        assert device["name"] == properties.name
        assert device["compute_capability"] == [properties.major, properties.minor]
        assert device["memory"] == properties.total_memory


def test_build_info_is_complete() -> None:
    build = _C.build_info()
    assert set(build) == {
        "version", "compiler", "build_type", "cpu_arch", "cpu_flags",
        "cuda", "cuda_archs", "cuda_stages",
    }  # fmt: skip
    assert "-ffp-contract=off" in build["cpu_flags"]
    assert bool(build["cuda_archs"]) == (build["cuda"] is not None)


def test_this_cpu_runs_this_build() -> None:
    assert _C.cpu_supported() is True
    assert _C.cpu_missing() == []


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "av":
            raise info.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(info.metadata, "version", version)
    collected = info.collect()
    assert collected["packages"]["av"] == {"version": None, "extra": "video"}
    assert "av is not installed (MP4 output): pip install 'rapfast[video]'." in collected["missing"]
    assert "not installed (extra: video)" in info.format_text(collected)


GPU = {
    "ordinal": 0,
    "name": "Some GPU",
    "compute_capability": (9, 0),
    "memory": 80 * 2**30,
    "multiprocessors": 132,
}


def with_gpu(monkeypatch: pytest.MonkeyPatch, archs: list[str], stages: list[str]) -> dict[str, Any]:
    """collect() as it would be with one GPU and a build for `archs`."""
    build = {**_C.build_info(), "cuda": "13.0", "cuda_archs": archs, "cuda_stages": stages}

    class Native:
        build_info = staticmethod(lambda: build)
        cuda_devices = staticmethod(
            lambda: {
                "devices": [deepcopy(GPU)],
                "reason": None,
                "driver": "13.0",
                "runtime": "13.0",
            }
        )

    monkeypatch.setattr(info, "_C", Native)
    return info.collect()


def test_text_shows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    text = info.format_text(with_gpu(monkeypatch, ["80", "90"], ["project"]))
    assert "Some GPU, compute capability 9.0, 80.0 GiB" in text
    assert "13.0 for 80 90" in text


def test_gpu_outside_the_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = with_gpu(monkeypatch, ["100", "120"], ["project"])["missing"]
    assert any("reinstall with RAPFAST_CUDA_ARCHS=90." in sentence for sentence in missing)
    missing = with_gpu(monkeypatch, ["80"], ["project"])["missing"]
    assert not any("RAPFAST_CUDA_ARCHS" in sentence for sentence in missing)


def test_build_without_cuda_stages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = with_gpu(monkeypatch, ["90"], [])["missing"]
    assert any("renders on the CPU only" in sentence for sentence in missing)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["90"], True),
        ((9, 0), ["80", "90"], True),
        ((8, 9), ["80", "90"], True),  # machine code of the same major version
        ((8, 0), ["86"], False),  # but not of a later minor one
        ((12, 0), ["80", "90"], True),  # PTX of the last
        ((7, 5), ["80", "90"], False),
        ((9, 0), ["80", "100"], False),  # between two: PTX only of 100
        ((10, 3), ["100", "120"], True),
        ((9, 0), ["90a"], True),
        ((12, 0), ["90a"], False),  # "a" is for that one architecture
        ((10, 3), ["100f"], True),
        ((12, 0), ["100f"], False),
        ((9, 0), [], False),
    ],
)
def test_runs_on(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    assert info.runs_on(capability, archs) is runs


def test_text_has_a_line_for_everything(collected: dict[str, Any]) -> None:
    lines = info.format_text(collected).splitlines()
    labels = {line[:12].strip() for line in lines}
    assert {"rapfast", "python", "torch", "built with", "CPU", "CUDA build"} <= labels
    for sentence in collected["missing"]:
        assert f"  {sentence}" in lines
