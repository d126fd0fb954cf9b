"""The files of a trained RAP scene, read and written without running anything that is in them.

<model>/cfg_args
<model>/ckpts_point_cloud/iteration_<i>/point_cloud.ply
                                        map_generator.pth
                                        color_net.pth
                                        other_attributes_dict.pth
"""

from __future__ import annotations

import ast
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapfast.io.atomic import atomic_path, atomic_write
from rapfast.io.files import PathLike, check_regular, read_capped
from rapfast.io.ply import save_ply
from rapfast.scene import Scene

CHECKPOINTS = "ckpts_point_cloud"
MAP_FILE, COLOR_FILE, OTHER_FILE = "map_generator.pth", "color_net.pth", "other_attributes_dict.pth"

_MAX_CONFIG_BYTES = 1 << 20


def read_config(path: PathLike) -> dict[str, Any]:
    """cfg_args, a text `Namespace(name=value, ...)`, as a dict. Values that are no literals stay text.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text.
    """
    data = read_capped(path, _MAX_CONFIG_BYTES, "a cfg_args file")
    try:
        call = ast.parse(data.decode("utf-8").strip(), mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: is not a text Namespace(name=value, ...): {error}") from None
    plain = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Namespace"
    if not plain or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"{path}: is not a text Namespace(name=value, ...)")
    config = {}
    for keyword in call.keywords:
        try:
            config[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError):
            config[keyword.arg] = ast.unparse(keyword.value)
    return config


def find_iteration(model_path: PathLike, iteration: int | None) -> tuple[Path, int]:
    """The folder of one iteration (None: the largest) and its number.

    Raises:
        FileNotFoundError: there is none; the sentence lists those that there are.
    """
    folder = Path(model_path) / CHECKPOINTS
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, a trained RAP scene has one")
    matches = (re.fullmatch(r"iteration_(\d{1,18})", path.name) for path in folder.iterdir() if path.is_dir())
    found = {int(match[1]): folder / match[0] for match in matches if match}
    if not found:
        raise FileNotFoundError(f"{folder}: holds no folder iteration_<number>")
    number = max(found) if iteration is None else iteration
    if number not in found:
        raise FileNotFoundError(f"{folder}: iteration {iteration} is not there, only {sorted(found)}")
    return found[number], number


def load_tensors(path: PathLike) -> dict[str, Any]:
    """A dict saved by `torch.save`, on the CPU. Only tensors and plain values are read (weights_only=True).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, holds objects of other kinds, or no dict.
    """
    path = check_regular(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make zipfile, pickle and torch raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be read by torch.load with weights_only=True: {reason}") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: must hold a dict of names, got a {type(content).__name__}")
    return dict(content)


def box_coordinates(attributes: Mapping[str, Any], n: int, source: PathLike) -> Tensor:
    """[N, 3, 2] of `other_attributes_dict.pth` or of a live model, from `box_coord`, or from `box_coord1` and
    `box_coord2`: the [N, 2, 2] one of the two holds rows 0 and 1, the [N, 2] one row 2. Gradients reach them.

    Raises:
        ValueError: the entries are missing or of other shapes.
    """
    if "box_coord" in attributes:
        return _entry(attributes, "box_coord", ((n, 3, 2),), source)
    names = ("box_coord1", "box_coord2")
    if any(name not in attributes for name in names):
        raise ValueError(
            f"{source}: must have box_coord [{n}, 3, 2], or box_coord1 and box_coord2, got {sorted(attributes)}"
        )
    parts = [_entry(attributes, name, ((n, 2), (n, 2, 2)), source) for name in names]
    learned, window = sorted(parts, key=torch.Tensor.dim, reverse=True)
    if learned.dim() == window.dim():
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"{source}: box_coord1 and box_coord2 must be [{n}, 2] and [{n}, 2, 2], got {shapes}")
    return torch.cat([learned, window[:, None]], dim=1)


def split_like(box_coord: Tensor, attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    """box_coord [N, 3, 2] as the entries that `attributes` had: the inverse of `box_coordinates`."""
    if "box_coord1" not in attributes or "box_coord" in attributes:
        return {"box_coord": box_coord}
    parts = {2: box_coord[:, 2], 3: box_coord[:, :2]}
    return {name: parts[attributes[name].dim()].contiguous() for name in ("box_coord1", "box_coord2")}


def _entry(attributes: Mapping[str, Any], name: str, shapes: Iterable[tuple[int, ...]], source: PathLike) -> Tensor:
    value = attributes[name]
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{source}: {name} must be a floating-point tensor {wanted}, got a {type(value).__name__}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{source}: {name} must be {wanted} as point_cloud.ply says, got {list(value.shape)}")
    return value


def save_model(
    model_path: PathLike,
    iteration: int,
    config: Mapping[str, Any],
    scene: Scene,
    files: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write a scene's folder `iteration_<iteration>` in one step, and cfg_args where there is none yet.

    All files are written to a folder of another name, which is renamed at the end, so a reader that takes the
    largest iteration never meets half of one.

    Raises:
        FileExistsError: the iteration is there already.
        ValueError: the model's cfg_args says something else than `config`.
        OSError: the files cannot be written; nothing of them stays.
    """
    model = Path(model_path)
    target = model / CHECKPOINTS / f"iteration_{iteration}"
    if target.exists():
        raise FileExistsError(f"{target}: exists already; choose another iteration")
    config_path = model / "cfg_args"
    if config_path.exists() and read_config(config_path) != dict(config):
        raise ValueError(f"{config_path}: is of another scene; choose an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(6)}-{target.name}")
    temporary.mkdir()
    try:
        save_ply(scene, temporary / "point_cloud.ply")
        for name, content in files.items():
            with atomic_path(temporary / name) as path:
                torch.save(dict(content), path)
        if not config_path.exists():
            text = ", ".join(f"{name}={value!r}" for name, value in config.items())
            atomic_write(config_path, f"Namespace({text})".encode())
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(f"{target}: exists already; choose another iteration") from None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
