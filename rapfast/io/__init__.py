"""Reading and writing files: scenes, cameras, and writes that are never half done."""

from __future__ import annotations

from .atomic import atomic_path, atomic_write
from .formats import detect_format, load_scene, save_scene
from .ply import load_ply, save_ply

__all__ = ["atomic_path", "atomic_write", "detect_format", "load_ply", "load_scene", "save_ply", "save_scene"]
