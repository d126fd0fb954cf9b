"""`rapfast convert`: a scene file to another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..io import load_scene, save_scene
from .common import Command


@dataclass(kw_only=True)
class Convert(Command):
    """Write a scene file in another format, chosen by the ending of its name.

    By example:

    rapfast convert scene.compressed.ply scene.ply
      any supported format to the PLY that other tools read.

    rapfast convert scene.ply scene.spz
      about a tenth of the size, with a little loss.

    Compressed formats need pip install 'rapfast[formats]'.
    """

    source: Annotated[Path, tyro.conf.arg(metavar="IN"), tyro.conf.Positional]
    """Scene to read: .ply, .compressed.ply, .spz, .sog."""

    target: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """File to write: .ply, .compressed.ply or .spz."""

    overwrite: bool = False
    """Replace a file that is there."""

    def run(self) -> None:
        """Read, write, say what came of it."""
        if self.target.exists() and not self.overwrite:
            raise ValueError(f"{self.target}: exists; name another file or give --overwrite")
        scene = load_scene(self.source)
        save_scene(scene, self.target)
        before, after = (_megabytes(path) for path in (self.source, self.target))
        print(f"{len(scene):,} Gaussians: {self.source} ({before}) -> {self.target} ({after})")


def _megabytes(path: Path) -> str:
    size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
