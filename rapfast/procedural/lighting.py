"""Baked lighting: what each surface element looks like from every direction, as spherical harmonics.

Diffuse light comes from the sun through the window, the sky through the window, the bounce off the sunlit floor, the
lamps, and an ambient term dimmed by nearby objects. Shadows are rays against the surface's boxes and spheres.
Elements take different sample rays by their place in a 3x3 tile of their grid and the sum is averaged over the 3x3
neighbours, so few rays give smooth shading. Glossy elements also mirror window, lamps and room; the mirror part is
what makes the coefficients of degree 1 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .patches import Surface

Vec3 = tuple[float, float, float]


@dataclass(frozen=True)
class Lighting:
    """One state of the light; colours are linear RGB radiance or irradiance in one common, arbitrary unit.

    sun_direction: towards the sun (need not be unit length), y > 0 to shine in. sun: irradiance facing the sun. sky,
    ground: radiance outside the window, above and below the horizon. view: brightness factor of the landscape. lamp:
    intensity of each lamp. glow: brightness factor of lampshades. ambient: radiance inside the room, far from any
    object. exposure: scale before the tone curve.
    """

    sun_direction: Vec3 = (0.28, 0.80, 0.56)
    sun: Vec3 = (15.0, 12.3, 8.8)
    sky: Vec3 = (2.9, 3.3, 3.8)
    ground: Vec3 = (0.75, 0.85, 0.55)
    view: Vec3 = (1.9, 1.95, 1.95)
    lamp: Vec3 = (0.34, 0.24, 0.13)
    glow: Vec3 = (1.5, 1.4, 1.25)
    ambient: Vec3 = (0.37, 0.36, 0.355)
    exposure: float = 1.05


DAY = Lighting()
EVENING = Lighting(
    sun_direction=(0.55, 0.85, 0.30),
    sun=(7.0, 3.9, 1.7),
    sky=(1.4, 1.1, 1.0),
    ground=(0.45, 0.35, 0.22),
    view=(1.5, 1.05, 0.75),
    lamp=(0.75, 0.52, 0.28),
    glow=(2.4, 2.1, 1.6),
    ambient=(0.26, 0.22, 0.19),
    exposure=1.15,
)
OVERCAST = Lighting(
    sun=(0.0, 0.0, 0.0),
    sky=(3.0, 3.2, 3.4),
    ground=(0.9, 0.95, 0.8),
    view=(1.3, 1.4, 1.5),
    ambient=(0.40, 0.41, 0.43),
    exposure=1.1,
)
NIGHT = Lighting(
    sun=(0.0, 0.0, 0.0),
    sky=(0.03, 0.045, 0.09),
    ground=(0.01, 0.01, 0.02),
    view=(0.03, 0.045, 0.09),
    lamp=(1.5, 1.0, 0.52),
    glow=(3.0, 2.5, 1.8),
    ambient=(0.20, 0.145, 0.095),
    exposure=1.15,
)

SH_COUNT = 16  # degree 3
_BLOCK = 1024  # rays tested together: few enough to lie close together, enough to hide numpy's overhead
_LIFT = 0.012  # rays start this far above their element, metres


def light(surface: Surface, lighting: Lighting = DAY) -> np.ndarray:
    """Spherical harmonics [n, 16, 3] (float32) of the display colour of every element under `lighting`.

    The colour of an element seen along the unit direction d (from the camera to it) is sum_k sh[k] Y_k(d) + 0.5, the
    convention of rasterization(); it has been through exposure, tone curve and the sRGB transfer function.
    """
    irradiance = _diffuse(surface, lighting)
    radiance = surface.albedo * irradiance
    for code, factor in ((1, lighting.view), (2, lighting.glow)):
        own = surface.emitter == code
        radiance[own] = surface.albedo[own] * np.asarray(factor)
    sh = np.zeros((len(surface), SH_COUNT, 3), np.float32)
    glossy = (surface.gloss > 0) & (surface.emitter == 0)
    sh[~glossy, 0] = (display(radiance[~glossy], lighting.exposure) - 0.5) / sh_basis(np.zeros((1, 3)))[0, 0]
    _fit_glossy(sh, np.nonzero(glossy)[0], surface, lighting, radiance)
    return sh


def display(radiance: np.ndarray, exposure: float) -> np.ndarray:
    """Linear radiance to display values in 0..1: Narkowicz's fit of the ACES film curve, then the sRGB transfer
    function.
    """
    x = radiance * radiance.dtype.type(0.62 * exposure)
    x = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


def sh_basis(d: np.ndarray) -> np.ndarray:
    """Real spherical harmonics of degree 0 to 3 [n, 16] of unit vectors d [n, 3], with the signs 3D Gaussian
    splatting uses.
    """
    x, y, z = d.T
    xx, yy, zz = x * x, y * y, z * z
    return np.stack(
        [
            np.full_like(x, 0.28209479177387814),
            -0.4886025119029199 * y,
            0.4886025119029199 * z,
            -0.4886025119029199 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ],
        1,
    )


# Shadows -------------------------------------------------------------------------------------------------------------


def _nearest(surface: Surface, origin: np.ndarray, direction: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Distance [n] along unit rays to the first occluder, or `reach` [n] where nothing is nearer.

    An occluder that holds the ray's start is passed over: rounded furniture lies within its box. Rays are taken in
    blocks, and occluders outside a block's bounds are skipped, so callers order their rays by place.
    """
    origin, direction, near = (np.ascontiguousarray(a, np.float32) for a in (origin, direction, reach))
    near = near.copy()
    groups = _box_groups(surface)
    for first in range(0, len(near), _BLOCK):
        part = slice(first, first + _BLOCK)
        near[part] = _nearest_block(
            groups, surface.spheres.astype(np.float32), origin[part].T, direction[part].T, near[part]
        )
    return near


def _box_groups(surface: Surface) -> list[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes of one yaw together: yaw, centres [b, 3] and halves [b, 3] in the turned frame, world bounds [2, b, 3]."""
    groups = []
    for yaw in sorted({box.yaw for box in surface.boxes}):
        boxes = [box for box in surface.boxes if box.yaw == yaw]
        centre, half = np.array([box.centre for box in boxes]), np.array([box.half for box in boxes])
        c, s = np.cos(yaw), np.sin(yaw)
        bound = half if yaw == 0 else np.stack([np.hypot(half[:, 0], half[:, 1])] * 2 + [half[:, 2]], 1)
        local = np.stack([c * centre[:, 0] + s * centre[:, 1], c * centre[:, 1] - s * centre[:, 0], centre[:, 2]], 1)
        shrunk = np.maximum(half - 0.004, 0.002)
        groups.append(
            (yaw, local.astype(np.float32), shrunk.astype(np.float32), np.stack([centre - bound, centre + bound]))
        )
    return groups


def _nearest_block(groups: list, spheres: np.ndarray, o: np.ndarray, d: np.ndarray, near: np.ndarray) -> np.ndarray:
    """As _nearest, for o and d [3, n]."""
    end = o + d * near
    low, high = np.minimum(o, end).min(1), np.maximum(o, end).max(1)
    for yaw, centre, half, bounds in groups:
        met = ((bounds[1] >= low) & (bounds[0] <= high)).all(1)
        if not met.any():
            continue
        start, ray = o, d
        if yaw:
            c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
            start, ray = (
                np.stack([c * o[0] + s * o[1], c * o[1] - s * o[0], o[2]]),
                np.stack([c * d[0] + s * d[1], c * d[1] - s * d[0], d[2]]),
            )
        inverse = 1 / np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
        enter, leave = np.float32(-np.inf), np.float32(np.inf)
        for k in range(3):
            middle = centre[met, k, None] * inverse[k] - start[k] * inverse[k]  # [boxes, n]
            span = half[met, k, None] * np.abs(inverse[k])
            enter, leave = np.maximum(enter, middle - span), np.minimum(leave, middle + span)
        near = np.minimum(near, np.where((enter > 0) & (enter < leave), enter, np.float32(np.inf)).min(0))
    met = (spheres[:, :3] + spheres[:, 3:] >= low).all(1) & (spheres[:, :3] - spheres[:, 3:] <= high).all(1)
    for sphere in spheres[met]:
        v = o - sphere[:3, None]
        b, c = (v * d).sum(0), (v * v).sum(0) - sphere[3] ** 2
        root = b * b - c
        t = -b - np.sqrt(np.maximum(root, 0))
        near = np.where((root > 0) & (t > 0) & (t < near), t, near)
    return near


def _visible(surface: Surface, origin: np.ndarray, direction: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Bool [n]: nothing stands between origin and origin + reach direction."""
    return _nearest(surface, origin, direction, reach) >= reach.astype(np.float32)


def _through_window(surface: Surface, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Bool [n]: the ray leaves the room through glass, clear of the bars and of the depth of the wall."""
    out = np.zeros(len(origin), bool)
    for w in surface.windows:
        clear = direction[:, 1] > 1e-3
        for y in (w.y, w.y + w.depth):
            t = (y - origin[:, 1]) / np.where(clear, direction[:, 1], 1)
            x, z = origin[:, 0] + t * direction[:, 0], origin[:, 2] + t * direction[:, 2]
            clear = clear & (x > w.x[0]) & (x < w.x[1]) & (z > w.z[0]) & (z < w.z[1])
        column = (x - w.x[0]) / (w.x[1] - w.x[0]) * w.panes[0]
        bar = np.abs(column - np.round(column)) * (w.x[1] - w.x[0]) / w.panes[0] < w.bar / 2
        cross = np.abs(z - w.z[0] - 0.66 * (w.z[1] - w.z[0])) < w.bar / 2
        out |= clear & ~bar & ~cross
    return out


# Diffuse light -------------------------------------------------------------------------------------------------------


def _stratified(k: int, n: int) -> np.ndarray:
    """The first n points of a two-dimensional low-discrepancy sequence, from the k-th of nine interleaved ones [n,
    2].
    """
    i = np.arange(n) * 9 + k + 0.5
    return np.stack([i / (9 * n), (i * 0.6180339887498949) % 1.0], 1)


def _diffuse(s: Surface, lighting: Lighting) -> np.ndarray:
    """Irradiance over pi, [n, 3], smoothed over the 3x3 neighbours of each element."""
    total = np.zeros((len(s), 3))
    ordinary = s.emitter == 0
    cell = np.floor(s.points / 0.6).astype(np.int64) + 64
    place = (cell[:, 0] * 128 + cell[:, 1]) * 128 + cell[:, 2]
    for k in range(9):
        for back in (False, True):  # the light that arrives on the back of a translucent element shines through
            chosen = np.nonzero(ordinary & (s.phase == k) & ((s.translucency > 0) | (not back)))[0]
            if len(chosen) == 0:
                continue
            chosen = chosen[np.argsort(place[chosen], kind="stable")]
            normal = -s.normals[chosen] if back else s.normals[chosen]
            origin = s.points[chosen] + _LIFT * normal
            got = _sun(s, lighting, origin, normal, k) + _sky(s, lighting, origin, normal, k)
            got += (
                _bounce(s, lighting, origin, normal)
                + _lamps(s, lighting, origin, normal, k)
                + _ambient(s, lighting, origin, normal, k)
            )
            share = s.translucency[chosen] if back else 1 - 0.5 * s.translucency[chosen]
            total[chosen] += got * share[:, None]
    return total[s.neighbours].mean(1)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _sun_rays(lighting: Lighting, k: int, n: int) -> np.ndarray:
    """Directions [n, 3] towards the sun's disk, drawn larger than the real one for soft edges."""
    centre = _unit(np.asarray(lighting.sun_direction, float))
    a = _unit(np.cross(centre, [0.0, 0.0, 1.0]))
    b = np.cross(centre, a)
    p = _stratified(k, n)
    r, angle = 0.014 * np.sqrt(p[:, :1]), 2 * np.pi * p[:, 1:]
    return _unit(centre + r * (np.cos(angle) * a + np.sin(angle) * b))


def _sun(s: Surface, lighting: Lighting, origin: np.ndarray, normal: np.ndarray, k: int) -> np.ndarray:
    got = np.zeros(len(origin))
    if not any(lighting.sun):
        return got[:, None] * np.zeros(3)
    for d in _sun_rays(lighting, k, 2):
        cosine = normal @ d
        lit = np.nonzero((cosine > 0) & _through_window(s, origin, np.broadcast_to(d, origin.shape)))[0]
        seen = _visible(s, origin[lit], np.broadcast_to(d, (len(lit), 3)), np.full(len(lit), 20.0))
        got[lit[seen]] += cosine[lit[seen]] / 2
    return got[:, None] * np.asarray(lighting.sun) / np.pi


def _sky(s: Surface, lighting: Lighting, origin: np.ndarray, normal: np.ndarray, k: int) -> np.ndarray:
    got = np.zeros((len(origin), 3))
    for w in s.windows:
        p, n = _stratified(k, 2), 2
        area = (w.x[1] - w.x[0]) * (w.z[1] - w.z[0]) / n
        for a, b in p:
            target = np.array([w.x[0] + a * (w.x[1] - w.x[0]), w.y, w.z[0] + b * (w.z[1] - w.z[0])])
            to = target - origin
            squared = (to * to).sum(1)
            d = to / np.sqrt(squared)[:, None].clip(1e-6)
            weight = np.clip((d * normal).sum(1), 0, None) * np.clip(d[:, 1], 0, None) * area / (squared + 0.04) / np.pi
            lit = np.nonzero(weight > 1e-5)[0]
            seen = lit[_visible(s, origin[lit], d[lit], np.sqrt(squared[lit]) - 0.05)]
            up = np.clip(d[seen, 2] * 4 + 0.5, 0, 1)[:, None]
            got[seen] += weight[seen, None] * (np.asarray(lighting.sky) * up + np.asarray(lighting.ground) * (1 - up))
    return got


def _bounce(s: Surface, lighting: Lighting, origin: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Light off the patches of sun on the floor, each a small warm source facing up; no shadows, it is soft light."""
    got = np.zeros((len(origin), 3))
    sun = _unit(np.asarray(lighting.sun_direction, float))
    for w in s.windows:
        for a in (0.17, 0.5, 0.83):
            for b in (0.25, 0.75):
                pane = np.array([w.x[0] + a * (w.x[1] - w.x[0]), w.y, w.z[0] + b * (w.z[1] - w.z[0])])
                spot = pane - sun * pane[2] / max(sun[2], 1e-3)
                spot[:2] = np.clip(spot[:2], s.room[0][:2], s.room[1][:2])
                power = (
                    (w.x[1] - w.x[0]) * (w.z[1] - w.z[0]) / 6 * max(sun[1], 0.0)
                )  # flux through a sixth of the window
                to = spot - origin
                squared = (to * to).sum(1) + 0.30**2
                d = to / np.sqrt(squared)[:, None]
                form = np.clip((d * normal).sum(1), 0, None) * np.clip(-d[:, 2], 0, None) / (np.pi * squared)
                got += (form * power)[:, None] * np.asarray(lighting.sun) * np.array([0.36, 0.28, 0.20]) / np.pi
    return got


def _lamps(s: Surface, lighting: Lighting, origin: np.ndarray, normal: np.ndarray, k: int) -> np.ndarray:
    got = np.zeros((len(origin), 3))
    for lamp in s.lamps:
        for a, b in _stratified(k, 1):
            z, angle = 2 * a - 1, 2 * np.pi * b
            r = np.sqrt(1 - z * z)
            to = lamp.position + lamp.radius * np.array([r * np.cos(angle), r * np.sin(angle), z]) - origin
            squared = (to * to).sum(1)
            d = to / np.sqrt(squared)[:, None].clip(1e-6)
            # Free above and below the shade, dimmed through it; d points to the lamp, so light leaving downwards has
            # d_z > 0.
            rise = np.clip((np.abs(d[:, 2]) - 0.45) / 0.2, 0, 1)
            leave = lamp.side + (np.where(d[:, 2] > 0, lamp.down, lamp.up) - lamp.side) * rise
            weight = np.clip((d * normal).sum(1), 0, None) * leave / (squared + 0.06)
            lit = np.nonzero(weight > 1e-3)[0]
            seen = lit[_visible(s, origin[lit], d[lit], np.sqrt(squared[lit]))]
            got[seen] += weight[seen, None] * np.asarray(lighting.lamp)
    return got


def _ambient(s: Surface, lighting: Lighting, origin: np.ndarray, normal: np.ndarray, k: int) -> np.ndarray:
    """Light from all around, less where something stands within 1.3 m; warmer from below, brighter towards the
    window.
    """
    side = _unit(np.cross(normal, np.where(np.abs(normal[:, 2:]) < 0.9, [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])))
    up = np.cross(normal, side)
    low, high = s.room
    reach = np.float32(1.3)
    got = np.zeros((len(origin), 3))
    rays = _stratified(k, 3)
    for a, b in rays:
        r, angle = np.sqrt(a), 2 * np.pi * b  # cosine-weighted
        d = r * np.cos(angle) * side + r * np.sin(angle) * up + np.sqrt(1 - a) * normal
        near = _nearest(s, origin, d, np.full(len(origin), reach))
        with np.errstate(divide="ignore", invalid="ignore"):
            shell = np.where(
                d > 0, (high - origin) / d, (low - origin) / d
            )  # the room's own walls, at three quarters of the effect
        shell = np.nanmin(np.where(np.abs(d) < 1e-6, np.inf, shell), 1)
        openness = np.minimum(0.10 + 0.90 * (near / reach) ** 0.8, 0.45 + 0.55 * np.clip(shell / reach, 0, 1) ** 0.8)
        warm = np.clip(-d[:, 2], 0, 1)[:, None] * np.array([0.10, 0.02, -0.10])
        got += (openness[:, None] * (1 + warm) / len(rays)) * np.asarray(lighting.ambient)
    toward = (origin[:, 1] - low[1]) / (high[1] - low[1])
    return got * (0.80 + 0.35 * toward)[:, None]


# Mirror part ---------------------------------------------------------------------------------------------------------


def _fit_glossy(
    sh: np.ndarray, chosen: np.ndarray, s: Surface, lighting: Lighting, radiance: np.ndarray, directions: int = 48
) -> None:
    """Fit SH to diffuse + mirror for elements `chosen`, in place.

    The colour is only seen from above the surface; below it is continued by mirroring in the tangent plane, which
    keeps the function smooth, so that sixteen coefficients describe the visible half well.
    """
    i = np.arange(directions) + 0.5
    z, angle = 1 - 2 * i / directions, np.pi * (1 + 5**0.5) * i
    r = np.sqrt(1 - z * z)
    d = np.stack([r * np.cos(angle), r * np.sin(angle), z], 1)  # camera to element
    inverse = np.linalg.pinv(sh_basis(d)).astype(np.float32)  # [16, directions]
    d = d.astype(np.float32)
    for first in range(0, len(chosen), 2048):
        part = chosen[first : first + 2048]
        normal, point = s.normals[part].astype(np.float32), s.points[part].astype(np.float32)
        facing = normal @ d.T  # [n, directions]
        # The mirrored ray: of d seen from above (facing < 0), d - 2 (d.n) n; of d from below its image in the plane
        # is d itself.
        mirrored = d - (2 * np.minimum(facing, 0))[:, :, None] * normal[:, None]
        fresnel = s.gloss[part, None].astype(np.float32) * (0.045 + 0.42 * (1 - np.abs(facing)) ** 4)
        colour = radiance[part, None].astype(np.float32) + fresnel[:, :, None] * _surroundings(
            s, lighting, point, mirrored, s.roughness[part]
        )
        sh[part] = inverse @ (display(colour, np.float32(lighting.exposure)) - np.float32(0.5))


def _surroundings(
    s: Surface, lighting: Lighting, point: np.ndarray, d: np.ndarray, roughness: np.ndarray
) -> np.ndarray:
    """Blurred radiance [n, m, 3] that arrives at points [n, 3] from directions d [n, m, 3]: room, window, lamps."""
    up = d[..., 2:] * 0.5 + 0.5
    out = np.asarray(lighting.ambient, np.float32) * (0.55 + 0.35 * up)
    blur = roughness[:, None].astype(np.float32)
    for w in s.windows:
        t = (w.y - point[:, None, 1]) / np.maximum(d[..., 1], 1e-3)
        x, z = point[:, None, 0] + t * d[..., 0], point[:, None, 2] + t * d[..., 2]
        soft = np.maximum(blur * t, 0.02)
        inside = _edge(x, w.x, soft) * _edge(z, w.z, soft) * (d[..., 1] > 1e-3)
        out = out + inside[..., None] * (
            np.asarray(lighting.view, np.float32) * 0.6 + np.asarray(lighting.sky, np.float32) * 0.5
        )
    for lamp in s.lamps:
        to = lamp.position.astype(np.float32) - point
        distance = np.linalg.norm(to, axis=1, keepdims=True)
        cosine = (d @ (to / distance)[:, :, None])[..., 0]
        size = np.maximum(blur, 0.12)
        out = (
            out
            + (np.exp((cosine - 1) / (size * size)) * (0.02 / (size * size)))[..., None]
            * np.asarray(lighting.lamp, np.float32)
            * 4
        )
    return out


def _edge(x: np.ndarray, span: tuple[float, float], soft: np.ndarray) -> np.ndarray:
    """1 inside the span, 0 outside, blurred by `soft`."""
    return np.clip((x - span[0]) / soft + 0.5, 0, 1) * np.clip((span[1] - x) / soft + 0.5, 0, 1)
