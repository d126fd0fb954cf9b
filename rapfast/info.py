"""What is installed, what was built, what the machine has and what is missing: ``rapfast info``."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from rapfast._native import _C
from rapfast._version import __version__

# Distributions that rapfast can use, and the pip extra that installs each; None: always installed.
PACKAGES: dict[str, str | None] = {
    "torch": None,
    "numpy": None,
    "pillow": None,
    "tyro": None,
    "rich": None,
    "av": "video",
    "safetensors": "augment",
    "gsply": "formats",
    "gsplat": "bench",
    "pytest": "test",
    "pytest-benchmark": "test",
    "hypothesis": "test",
}
# What an absent package means to a user.
PURPOSE = {
    "av": "MP4 output",
    "safetensors": "sequences on disk for `rapfast augment`",
    "gsply": "reading .spz, SOG and compressed PLY scenes",
    "gsplat": "backend='gsplat' and the comparison benchmarks",
}


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether code compiled for ``archs``, with PTX of the last, runs on a compute capability.

    Machine code for X.Y runs on X.Z with Z >= Y; PTX for X.Y runs on everything from X.Y on. An
    architecture with the suffix "a" runs on exactly that one, one with "f" on its own family.
    """
    target = 10 * capability[0] + capability[1]
    for arch in archs:
        number = int(arch.rstrip("af"))
        same_family = number <= target and number // 10 == target // 10
        if target == number or (same_family and not arch.endswith("a")):
            return True
    return bool(archs) and archs[-1].isdigit() and target >= int(archs[-1])


def _missing(packages: dict[str, Any], build: dict[str, Any], cuda: dict[str, Any]) -> list[str]:
    """One sentence for each thing that is not there, with the way to get it."""
    sentences = [
        f"{name} is not installed ({PURPOSE[name]}): pip install 'rapfast[{entry['extra']}]'."
        for name, entry in packages.items()
        if entry["version"] is None and name in PURPOSE
    ]
    if not cuda["devices"]:
        sentences.append(cuda["reason"])
    elif not build["cuda_stages"]:
        sentences.append("This version renders on the CPU only: it has no CUDA stages yet.")
    elif torch.version.cuda is None:
        sentences.append(f"torch {torch.__version__} is a CPU build: install a CUDA build of it to use the GPU.")
    for device in cuda["devices"]:
        if not device["runs"]:
            major, minor = device["compute_capability"]
            sentences.append(
                f"{device['name']} (compute capability {major}.{minor}) is not among the "
                f"architectures built for: reinstall with RAPFAST_CUDA_ARCHS={major}{minor}."
            )
    return sentences


def collect() -> dict[str, Any]:
    """Everything ``rapfast info`` shows, as plain JSON types.

    Keys: rapfast, python, executable, platform (str); packages {name: {version, extra}}; build
    (what CMake was told); cpu {name, cores, threads, arch}; cuda {devices, reason, driver, runtime,
    torch}, each device {ordinal, name, compute_capability [major, minor], memory (bytes),
    multiprocessors, runs}; missing, a list of sentences.

    It asks the CUDA driver for its devices, which initialises the driver: not to be called before a
    fork whose child uses CUDA.
    """
    build = dict(_C.build_info())
    packages = {name: {"version": _version_of(name), "extra": extra} for name, extra in PACKAGES.items()}
    cuda = dict(_C.cuda_devices())
    for device in cuda["devices"]:
        device["compute_capability"] = list(device["compute_capability"])
        device["runs"] = runs_on(tuple(device["compute_capability"]), build["cuda_archs"])
    cuda["torch"] = torch.version.cuda
    return {
        "rapfast": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "build": build,
        "cpu": {
            "name": cpu_name(),
            "cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "arch": build["cpu_arch"],
        },
        "cuda": cuda,
        "missing": _missing(packages, build, cuda),
    }


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def format_text(info: dict[str, Any]) -> str:
    """``collect()``'s answer as a text of some twenty lines, label and value."""
    build, cpu, cuda = info["build"], info["cpu"], info["cuda"]
    rows: list[tuple[str, str]] = [
        ("rapfast", info["rapfast"]),
        ("python", f"{info['python']} ({info['executable']})"),
        ("platform", info["platform"]),
    ]
    for name, entry in info["packages"].items():
        absent = f"not installed (extra: {entry['extra']})" if entry["extra"] else "not installed"
        rows.append((name, entry["version"] or absent))

    rows.append(("built with", f"{build['compiler']}, {build['build_type']}"))
    rows.append(("CPU flags", build["cpu_flags"]))
    if build["cuda"] is None:
        rows.append(("CUDA build", "none"))
    else:
        stages = ", ".join(build["cuda_stages"]) or "none (the CPU renders)"
        rows.append(("CUDA build", f"{build['cuda']} for {' '.join(build['cuda_archs'])}"))
        rows.append(("CUDA stages", stages))

    threads = f"{cpu['threads']} threads" if cpu["threads"] != 1 else "1 thread"
    rows.append(("CPU", f"{cpu['name']}, {cpu['cores']} cores, {threads}, built for {cpu['arch']}"))
    if cuda["driver"] is not None:
        rows.append(("CUDA driver", f"runs CUDA {cuda['driver']} and older"))
    for device in cuda["devices"]:
        capability = ".".join(map(str, device["compute_capability"]))
        text = f"{device['name']}, compute capability {capability}, {_gibibytes(device['memory'])}"
        rows.append((f"GPU {device['ordinal']}", text))
    if not cuda["devices"]:
        rows.append(("GPU", "none"))

    width = max(len(label) for label, _ in rows) + 2
    lines = [f"{label:<{width}}{value}" for label, value in rows]
    if info["missing"]:
        lines += ["", "missing"] + [f"  {sentence}" for sentence in info["missing"]]
    return "\n".join(lines)
