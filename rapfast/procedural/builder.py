"""The builder that furniture is described to: local frames, boxes, tubes, balls; patches for the eye, occluders for
the light.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from . import patches as P
from .patches import Box, Lamp, Material, Patch, Window

ALL = "+x -x +y -y +z -z"


@dataclass
class Builder:
    """Collects patches, occluders, windows and lamps; `frame` sets the local coordinates in which the next ones are
    given.
    """

    rng: np.random.Generator
    patches: list[Patch] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    spheres: list[tuple[float, float, float, float]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)
    _offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    _yaw: float = 0.0

    @contextmanager
    def frame(self, at: tuple[float, float, float], yaw: float = 0.0) -> Iterator[None]:
        """Local coordinates: turned by yaw (radians, about z), then moved to `at`, within the current frame."""
        before = self._offset, self._yaw
        self._offset, self._yaw = self.point(at), self._yaw + yaw
        yield
        self._offset, self._yaw = before

    def point(self, p: tuple[float, float, float]) -> np.ndarray:
        """A local point in room coordinates."""
        c, s = np.cos(self._yaw), np.sin(self._yaw)
        return self._offset + np.array([c * p[0] - s * p[1], s * p[0] + c * p[1], p[2]])

    def patch(self, shape, size, material: Material, spacing, **options) -> None:
        """Add one patch given in local coordinates."""
        spacing = (spacing, spacing) if isinstance(spacing, float) else spacing
        self.patches.append(Patch(P.placed(shape, self._offset, self._yaw), size, material, spacing, **options))

    def shade(self, lo, hi) -> None:
        """Add an occluder box without patches."""
        lo, hi = np.asarray(lo, float), np.asarray(hi, float)
        self.boxes.append(Box(self.point((lo + hi) / 2), (hi - lo) / 2, self._yaw))

    def box(
        self,
        lo,
        hi,
        material: Material,
        spacing: float = 0.025,
        faces: str = ALL,
        round: float = 0.0,
        puff: float = 0.0,
        pitch: float = 0.0,
        yaw: float = 0.0,
        shade: bool = True,
        stretch: float = 2.0,
    ) -> None:
        """A box from lo to hi, its texture running along the longer side of every face; `round` is the radius of its
        edges.

        `stretch`: cells are this much longer along the texture than across (sharp boxes only).
        """
        lo, hi = np.asarray(lo, float), np.asarray(hi, float)
        centre, half = (lo + hi) / 2, (hi - lo) / 2
        du, dv = self.rng.uniform(0, 9, 2)
        for name in faces.split():
            shape, size = P.face(name, half)
            if round:
                shape, cells = P.rounded(shape, half, round, puff), (spacing, spacing)
            else:
                cells = (spacing * stretch, spacing) if size[0] >= size[1] else (spacing, spacing * stretch)
            base = material.colour
            colour = (
                (lambda u, v, f=base: f(u + du, v + dv))
                if size[0] >= size[1]
                else (lambda u, v, f=base: f(v + du, u + dv))
            )
            self.patch(
                P.placed(shape, centre, yaw, pitch), size, replace(material, colour=colour), cells, crisp=not round
            )
        if shade:
            self.boxes.append(Box(self.point(centre), half, self._yaw + yaw))

    def lathe(
        self, at, radius, height, length: float, widest: float, material: Material, spacing, crisp: bool = False
    ) -> None:
        """A surface of revolution standing at `at`; radius(v) and height(v) for v in 0..length, `widest` its largest
        radius.
        """
        around = 2 * np.pi * widest
        self.patch(P.placed(P.lathe(radius, height, around), at), (around, length), material, spacing, crisp=crisp)

    def tube(
        self, at, radius: float, height: float, material: Material, spacing=0.012, top: float | None = None
    ) -> None:
        """An upright tube or cone; `top` is its upper radius."""
        end = radius if top is None else top
        self.lathe(
            at,
            lambda v: radius + (end - radius) * v / height,
            lambda v: v,
            height,
            max(radius, end),
            material,
            spacing,
            crisp=True,
        )

    def stalk(self, base: np.ndarray, along: np.ndarray, radius: float, material: Material, spacing: float) -> None:
        """A thin tube from `base` to `base + along`."""
        length = float(np.linalg.norm(along))

        def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            ring = np.stack([radius * np.cos(u / radius), radius * np.sin(u / radius), 0 * u], 1)
            return base + ring + (v / length)[:, None] * along

        self.patch(shape, (2 * np.pi * radius, length), material, (1.5 * radius, spacing), crisp=False)

    def disk(self, at, radius: float, material: Material, spacing: float = 0.02) -> None:
        """A horizontal disk facing up."""
        self.patch(P.placed(P.disk(radius, 0.0), at), (2 * radius, 2 * radius), material, spacing, crisp=False)

    def ball(
        self, at, radius: float, material: Material, spacing: float = 0.015, squash: float = 1.0, shade: bool = True
    ) -> None:
        """A sphere (a cube's faces blown up: no crowded poles), flattened by `squash`."""
        half = np.full(3, radius)
        for name in ALL.split():
            shape, size = P.face(name, half)
            bent = P.rounded(shape, half, radius)
            self.patch(
                lambda u, v, f=bent: f(u, v) * [1, 1, squash] + np.asarray(at, float),
                size,
                material,
                spacing,
                crisp=False,
            )
        if shade:
            self.spheres.append((*self.point(at), radius * min(1.0, squash)))
