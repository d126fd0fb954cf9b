"""Writes are whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rapfast.io import atomic_path, atomic_write


def test_new_and_replaced_content(tmp_path: Path) -> None:
    target = tmp_path / "picture.tar.png"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("picture.tar.png")
        assert not target.exists()
        temporary.write_bytes(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("error", [RuntimeError("render failed"), KeyboardInterrupt()])
def test_an_exception_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_permissions_are_kept_or_the_defaults(tmp_path: Path) -> None:
    target = tmp_path / "a"
    mask = os.umask(0o027)
    try:
        atomic_write(target, b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    atomic_write(target, b"x")
    assert stat.S_IMODE(target.stat().st_mode) == 0o604


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(real)
    atomic_write(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_long_names_fit(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250 + ".png")
    atomic_write(target, b"x")
    assert target.read_bytes() == b"x"


def test_unwritable_targets_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/a\.ply: cannot be written: the folder .*none does not exist"):
        atomic_write(tmp_path / "none" / "a.ply", b"")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        atomic_write(tmp_path, b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        atomic_write(tmp_path / "file" / "a", b"")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(tmp_path / "fifo", b"")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    with pytest.raises(TypeError, match="path must be"):
        atomic_write(3, b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        atomic_write("a\0b", b"")


def test_read_only_targets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.access` is answered here, since root, who runs containers, may write anywhere."""
    target = tmp_path / "a"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target)
    with pytest.raises(PermissionError, match="a: cannot be written: the file is read-only"):
        atomic_write(target, b"new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="b: cannot be written: the folder .* is read-only"):
        atomic_write(tmp_path / "b", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert target.read_bytes() == b"old"


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """A file-size limit makes writes fail in the middle as a full disk does."""
    target = tmp_path / "scene.ply"
    target.write_bytes(b"old")
    script = (
        "import resource, sys, torch, rapfast\n"
        "n = 4000\n"
        "ones = lambda *shape: torch.ones(n, *shape)\n"
        "scene = rapfast.Scene(ones(3), ones(4), ones(3), ones(), ones(1, 3))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    rapfast.save_ply(scene, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "scene.ply: could not be written: File too large; what was there before is kept" in done.stdout
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["scene.ply"]
