"""What a measurement has to say of the machine it was made on."""

from __future__ import annotations

import subprocess
from importlib import metadata
from typing import Any

import torch

from rapfast import info


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, GPU and versions as JSON types: {cpu: {name, cores, threads, arch}, gpu: None or {name,
    compute_capability, memory_gib, multiprocessors, driver}, versions: {rapfast, python, torch, numpy, gsplat, cuda}}.

    The GPU is the device, None where that is the CPU. Nothing in it names the host.
    """
    known = info.collect()
    versions = {"rapfast": known["rapfast"], "python": known["python"]}
    versions |= {name: version(name) for name in ("torch", "numpy", "gsplat")}
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver_version(),
        }
    cpu = {key: known["cpu"][key] for key in ("name", "cores", "threads", "arch")}
    return {"cpu": cpu, "gpu": gpu, "versions": {**versions, "cuda": torch.version.cuda}}


def name_of(machine: dict[str, Any]) -> str:
    """The GPU's name, else the processor's, of what `describe` returned."""
    return (machine.get("gpu") or machine["cpu"])["name"]


def version(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None
