"""A furnished room made of Gaussians, from a seed: something good to look at, test and demonstrate with, without any
download.

    scene = rapfast.procedural.room()
    cameras = rapfast.procedural.room_orbit(120, 854, 480)

Geometry and materials (`layout.surface`) are made first and lit afterwards (`lighting.light`), so the same room can
be had under several lightings; and with RAP's appearance (`appearance_room`), its light that of a reference image.
Coordinates are metres, z up, the floor at z = 0, the window in the wall y = 2.7.
"""

from __future__ import annotations

from .appearance import AppearanceFit, LitRoom, appearance_room, as_references, lit_room, load_fit
from .layout import surface
from .lighting import DAY, EVENING, NIGHT, OVERCAST, Lighting, light
from .patches import Surface
from .scenes import room, to_scene
from .views import room_cameras, room_orbit

__all__ = [
    "DAY",
    "EVENING",
    "NIGHT",
    "OVERCAST",
    "AppearanceFit",
    "Lighting",
    "LitRoom",
    "Surface",
    "appearance_room",
    "as_references",
    "light",
    "lit_room",
    "load_fit",
    "room",
    "room_cameras",
    "room_orbit",
    "surface",
    "to_scene",
]
