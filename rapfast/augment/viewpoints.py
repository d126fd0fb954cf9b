"""The camera generator: a fixed viewpoint drawn within a difficulty's ranges, and the shake of a hand around it.

What a set draws depends on the seed, the set and the video alone, by a generator of its own
(`numpy.random.RandomState(MT19937(SeedSequence(...)))`, whose stream numpy has frozen): neither the order of sets nor
the number of videos changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rapfast.cameras import Cameras
from rapfast.io.files import PathLike, load_json

from .difficulties import DRAWN, Difficulty, difficulty_of
from .provider import Viewpoint

_SWAYS = (0.37, 0.93, 1.71)
"""Hertz. No two are in a ratio of small numbers, so that the shake does not repeat within a film."""

_SWAY_SHARES = (0.5, 0.3, 0.2)


def set_seed(seed: int, name: str, draw: int, video: str) -> list[int]:
    """Words for a SeedSequence, of a seed, a difficulty's name and draw, and a video."""
    return [seed, draw, *_words(name), *_words(video)]


def frame_seed(words: Sequence[int], frame: int) -> int:
    """A seed below 2^63 for the refiner's noise in a frame of a set."""
    digest = hashlib.blake2b(repr((list(words), frame)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def drawn_viewpoint(difficulty: Difficulty, seed: Sequence[int]) -> dict[str, float]:
    """The values of `DRAWN`, degrees, metres and a factor."""
    return _draw(difficulty, seed)[0]


def fixed_viewpoint(
    viewpoint: Viewpoint, difficulty: Difficulty, n_frames: int, fps: float, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """World-to-camera matrices [F, 4, 4] and intrinsics [F, 3, 3], float64, of a set's film.

    In the base camera's axes, with t the target there: the camera is turned about t by yaw (about y), then pitch (about
    its new x), then moved away from t along the line between them, then rolled about its own z. In frame f it is also
    turned in place and shifted along its own axes by the jitter, each axis the sum of three sines of 0.37, 0.93 and
    1.71 Hz with shares 0.5, 0.3 and 0.2 of the range and drawn phases.
    """
    values, state = _draw(difficulty, seed)
    base = np.linalg.inv(viewpoint.viewmat)
    t = (viewpoint.viewmat @ [*viewpoint.target, 1.0])[:3]
    # Positive yaw moves the camera to its right, so its x axis turns away from its z axis.
    turn = _about_y(-values["yaw"]) @ _about_x(-values["pitch"])
    away = turn @ -t
    length = float(np.linalg.norm(away))
    if length + values["distance"] <= 0.05 * length:
        raise ValueError(
            f"distance {values['distance']:g} brings the camera, {length:g} from its target, to it or beyond: the "
            "difficulty's range must fit the video's scale"
        )
    pose = np.eye(4)
    pose[:3, :3] = turn @ _about_z(values["roll"])
    pose[:3, 3] = t + away * (1 + values["distance"] / length)
    poses = base @ pose @ _shake(difficulty, n_frames, fps, state)
    K = viewpoint.K.copy()
    K[0, 0] *= values["focal"]
    K[1, 1] *= values["focal"]
    return np.linalg.inv(poses), np.tile(K, (n_frames, 1, 1))


def film_cameras(params: PathLike, set_name: str, video: str) -> Cameras:
    """The cameras of a film's frames, made again from augmentation_params.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such film, or the provider made its cameras in a way of its own.
    """
    content = load_json(params)
    try:
        film = content["sets"][set_name][video]
        ranges, seed = content["difficulties"][film["difficulty"]], content["settings"]["seed"]
        view = Viewpoint(**{name: film["base"][name] for name in ("viewmat", "K", "target")},
                         width=film["width"], height=film["height"])  # fmt: skip
        fixed, n_frames, fps = film["fixed_viewpoint"], film["frames"], film["fps"]
    except (KeyError, TypeError):
        raise ValueError(f"{params}: holds no film of the set {set_name} and the video {video}") from None
    if not fixed:
        raise ValueError(f"{params}: the provider made the cameras of {video} itself")
    words = set_seed(seed, film["difficulty"], film["draw"], video)
    difficulty = difficulty_of(film["difficulty"], ranges, str(params))
    viewmats, Ks = fixed_viewpoint(view, difficulty, n_frames, fps, words)
    return Cameras(torch.from_numpy(viewmats).float(), torch.from_numpy(Ks).float(), view.width, view.height)


def _draw(difficulty: Difficulty, seed: Sequence[int]) -> tuple[dict[str, float], np.random.RandomState]:
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seed))))
    return {name: float(state.uniform(*getattr(difficulty, name))) for name in DRAWN}, state


def _shake(difficulty: Difficulty, n_frames: int, fps: float, state: np.random.RandomState) -> np.ndarray:
    """[F, 4, 4]: what the hand does in the camera's own axes."""
    phases = state.uniform(0.0, 2.0 * np.pi, (6, len(_SWAYS)))
    seconds = np.arange(n_frames)[:, None, None] / fps
    waves = np.sin(2.0 * np.pi * np.array(_SWAYS) * seconds + phases) @ np.array(_SWAY_SHARES)  # [F, 6]
    angles, shifts = waves[:, :3] * difficulty.jitter_angle, waves[:, 3:] * difficulty.jitter_shift
    out = np.tile(np.eye(4), (n_frames, 1, 1))
    for i, (x, y, z) in enumerate(angles):
        out[i, :3, :3] = _about_y(y) @ _about_x(x) @ _about_z(z)
    out[:, :3, 3] = shifts
    return out


def _about_x(degrees: float) -> np.ndarray:
    c, s = _circle(degrees)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _about_y(degrees: float) -> np.ndarray:
    c, s = _circle(degrees)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _about_z(degrees: float) -> np.ndarray:
    c, s = _circle(degrees)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _circle(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def _words(text: str) -> Any:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.frombuffer(digest, "<u4").tolist()
