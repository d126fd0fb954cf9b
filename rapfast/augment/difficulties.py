"""How far a parameter set may take the camera: the ranges of easy, medium and hard, and those of a file.

Nothing of the kind was published with GUAVA; these are rapfast's own. A difficulty is a name and a range for each
parameter, from which `rapfast.augment.viewpoints` draws.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rapfast.io.files import PathLike, load_json, number, shorten

Range = tuple[float, float]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True)
class Difficulty:
    """Ranges (low, high) that one value each is drawn from, uniformly, for a set's fixed viewpoint; and how much the
    camera shakes.

    Attributes:
        yaw: degrees around the target, about the camera's own vertical; positive: to the camera's right.
        pitch: degrees around the target, about the camera's own horizontal; positive: up, looking down.
        roll: degrees about the line of sight; positive: the picture turns counter-clockwise.
        distance: metres added to the distance from the target; positive: away from it.
        focal: factor of the focal length; above 1: nearer.
        jitter_angle: degrees, jitter_shift: metres; the most that each axis is off in a frame. Both change smoothly,
            as those of a camera in the hand.
    """

    yaw: Range = (0.0, 0.0)
    pitch: Range = (0.0, 0.0)
    roll: Range = (0.0, 0.0)
    distance: Range = (0.0, 0.0)
    focal: Range = (1.0, 1.0)
    jitter_angle: float = 0.0
    jitter_shift: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


DRAWN = ("yaw", "pitch", "roll", "distance", "focal")
"""Parameters of which a set draws one value, in the order of drawing."""

_WITHIN = {"yaw": (-180.0, 180.0), "pitch": (-80.0, 80.0), "roll": (-180.0, 180.0), "distance": (-1e3, 1e3),
           "focal": (0.05, 20.0), "jitter_angle": (0.0, 45.0), "jitter_shift": (0.0, 1e3)}  # fmt: skip

DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty((-10, 10), (-5, 5), (-1, 1), (-0.05, 0.05), (0.97, 1.03), 0.0, 0.0),
    "medium": Difficulty((-25, 25), (-10, 10), (-3, 3), (-0.15, 0.15), (0.92, 1.08), 0.2, 0.005),
    "hard": Difficulty((-45, 45), (-18, 18), (-6, 6), (-0.3, 0.3), (0.85, 1.15), 0.5, 0.012),
}


@dataclass(frozen=True)
class ParameterSet:
    """One set of camera parameters: what a film is made with. `name` is its folder, `draw` its number among the sets
    of one difficulty. What is drawn depends on the difficulty's name and the number, not on the folder."""

    name: str
    difficulty_name: str
    difficulty: Difficulty
    draw: int = 0


def parameter_sets(names: Sequence[str], known: Mapping[str, Difficulty], draws: int = 1) -> list[ParameterSet]:
    """`draws` sets of each difficulty named: easy, or with several draws easy_00, easy_01, ...

    Raises:
        ValueError: a name is not known or comes twice.
    """
    sets, digits = [], max(2, len(str(draws - 1)))
    for name in names:
        if name not in known:
            raise ValueError(f"difficulty must be one of {', '.join(known)}, got {name!r}")
        for draw in range(draws):
            folder = name if draws == 1 else f"{name}_{draw:0{digits}d}"
            sets.append(ParameterSet(folder, name, known[name], draw))
    twice = [s.name for i, s in enumerate(sets) if s.name in {other.name for other in sets[:i]}]
    if twice:
        raise ValueError(f"difficulties must not come twice, got {twice[0]!r} again")
    return sets


def read_difficulties(path: PathLike) -> dict[str, Difficulty]:
    """The difficulties of a JSON file, an object of objects:

        {"studio": {"yaw": [-60, 60], "pitch": 10, "focal": [0.9, 1.1], "jitter_angle": 0.3}}

    A number r stands for the range -r to r, of focal for 1 / (1 + r) to 1 + r. What is left out does not vary.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the difficulty, the parameter and the value.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: must be an object of difficulties, got {shorten(content)}")
    return {name: difficulty_of(name, ranges, str(path)) for name, ranges in content.items()}


def difficulty_of(name: str, ranges: Any, where: str) -> Difficulty:
    """One difficulty from parsed JSON; `where` is for messages."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a difficulty's name becomes a folder: letters, digits and _ . + -, got {name!r}")
    where = f"{where}: {name}"
    if not isinstance(ranges, dict):
        raise ValueError(f"{where}: must be an object of ranges, got {shorten(ranges)}")
    names = [f.name for f in fields(Difficulty)]
    unknown = [key for key in ranges if key not in names]
    if unknown:
        raise ValueError(f"{where}: has no parameter {unknown[0]!r}; there are {', '.join(names)}")
    values = {key: _range(key, value, f"{where}: {key}") for key, value in ranges.items()}
    return Difficulty(**values)


def _range(key: str, value: Any, where: str) -> Range | float:
    low, high = _WITHIN[key]
    if key.startswith("jitter"):
        return _within(number(value, where), low, high, where)
    if isinstance(value, list) and len(value) == 2:
        first, last = (_within(number(v, where), low, high, where) for v in value)
    elif isinstance(value, list):
        raise ValueError(f"{where} must be a number or [low, high], got {shorten(value)}")
    else:
        r = number(value, where)
        if r < 0:
            raise ValueError(f"{where} must be a number >= 0 or [low, high], got {r:g}")
        first, last = (1 / (1 + r), 1 + r) if key == "focal" else (-r, r)
        first, last = (_within(v, low, high, where) for v in (first, last))
    if first > last:
        raise ValueError(f"{where} must be [low, high], got [{first:g}, {last:g}]")
    return first, last


def _within(value: float, low: float, high: float, where: str) -> float:
    if not low <= value <= high:
        raise ValueError(f"{where} must be within {low:g}..{high:g}, got {value:g}")
    return value
