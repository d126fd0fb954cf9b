"""What the tests of the command line share: a small scene and cameras as files, and running a command."""

from __future__ import annotations

from pathlib import Path

import torch

from rapfast import Cameras, save_ply
from rapfast.cli import main
from rapfast.scene import Scene


def blob(n: int = 400, seed: int = 0) -> Scene:
    """A small coloured ball of Gaussians at (1, 2, 3) with a few floaters far away."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=g) * 0.3 + torch.tensor([1.0, 2.0, 3.0])
    means[:5] += 500.0
    return Scene(
        means, torch.randn(n, 4, generator=g), torch.rand(n, 3, generator=g) * 0.1 + 0.02,
        torch.rand(n, generator=g) * 0.5 + 0.45, torch.randn(n, 4, 3, generator=g) * 0.5,
    )  # fmt: skip


def write_scene(folder: Path) -> Path:
    """blob() as a file."""
    save_ply(blob(), folder / "blob.ply")
    return folder / "blob.ply"


def write_cameras(folder: Path) -> Path:
    """Three cameras of 48x32 around blob(), two of them with folders in their names."""
    cameras = Cameras.look_at([[1, -1, 3.5], [3, 0, 4], [1, 5, 3.2]], [1.0, 2.0, 3.0], width=48, height=32)
    cameras.names = ["left/0001.jpg", "right/0001.jpg", "0003"]
    cameras.save(folder / "cameras.json")
    return folder / "cameras.json"


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def files(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fails(capsys, *arguments, status: int = 2) -> str:
    """Run a command that must fail in one sentence; returns the sentence."""
    capsys.readouterr()
    assert run(*arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("rapfast: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err
