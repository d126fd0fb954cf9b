"""Fingerprints of what decides a picture: tensors, scenes, networks, and the software and device that run them.

All are BLAKE2b (RFC 7693) of 16 bytes in hex. Each part is hashed with its kind and length, so that no two lists of
parts share their bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rapfast import _version, info
from rapfast._native import _C
from rapfast.appearance import RapScene
from rapfast.appearance.net_outputs_bwd import callers_tf32

SIZE = 16  # bytes: two of 2^32 different inputs share a fingerprint with a chance of 3e-20


def fingerprint(*parts: Any) -> str:
    """Of bytes, strings, tensors, arrays, None, bools, numbers, and tuples, lists and dicts of these.

    Tensors count with dtype and shape, not with their device or memory layout; floats with all their bits.

    Raises:
        TypeError: a part is of another type.
    """
    state = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        _add(state, part)
    return state.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Of a file's bytes alone; the same as `bytes_fingerprint` of what it holds."""
    with open(path, "rb") as file:
        state = hashlib.blake2b(digest_size=SIZE)
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def bytes_fingerprint(data: bytes | memoryview) -> str:
    """BLAKE2b-128 of the bytes themselves, as `b2sum -l 128` prints it."""
    return hashlib.blake2b(data, digest_size=SIZE).hexdigest()


def scene_fingerprint(scene: RapScene) -> str:
    """Of all tensors of a scene, the weights of its networks, and its settings (cfg_args)."""
    geometry = scene.scene
    tensors = {name: getattr(geometry, name) for name in ("means", "quats", "scales", "opacities", "sh", "intrinsic")}
    networks = [_state(net) for net in (scene.feature_map_net, scene.color_net)]
    return fingerprint("RapScene", tensors, scene.box_coord, networks, repr(sorted(scene.config.items())))


def network_fingerprint(net: nn.Module) -> str:
    """Of a network's class and state dict."""
    return fingerprint(type(net).__name__, _state(net))


def software(device: torch.device) -> dict[str, str | int]:
    """What else decides the bits: versions, the build, the device, and on the CPU the number of threads, by which
    torch splits the sums of the feature-map network."""
    found: dict[str, str | int] = {
        "rapfast": _version.__version__,
        "native_module": _native_module(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["device"] = torch.cuda.get_device_name(device)
        convolutions, products = callers_tf32()
        found["tf32"] = int(convolutions) + 2 * int(products)
    else:
        found["device"] = info.cpu_name()
        found["threads"] = torch.get_num_threads()
    return found


@functools.cache
def _native_module() -> str:
    """Of the compiled kernels: a build from other sources has another one, under the same version number too."""
    return file_fingerprint(Path(_C.__file__))


def _state(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.state_dict())


def _add(state: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        part = part.detach().cpu().contiguous()
        _header(state, "tensor", f"{part.dtype}{list(part.shape)}")
        if part.numel():
            state.update(part.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, np.ndarray) and part.dtype.kind in "biuf":
        _header(state, "array", f"{part.dtype.str}{list(part.shape)}")
        state.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    elif isinstance(part, bytes | str):
        data = part.encode() if isinstance(part, str) else part
        _header(state, type(part).__name__, str(len(data)))
        state.update(data)
    elif isinstance(part, tuple | list):
        _header(state, "list", str(len(part)))
        for item in part:
            _add(state, item)
    elif isinstance(part, Mapping):
        _header(state, "dict", str(len(part)))
        for name in sorted(part):
            _add(state, name)
            _add(state, part[name])
    elif part is None or isinstance(part, bool | int):
        _header(state, type(part).__name__, repr(part))
    elif isinstance(part, float):
        _header(state, "float", part.hex())
    else:
        raise TypeError(f"a fingerprint takes bytes, text, numbers and tensors, got a {type(part).__name__}")


def _header(state: Any, kind: str, text: str) -> None:
    state.update(f"{kind}:{text};".encode())
