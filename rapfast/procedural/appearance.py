"""The room as a scene in RAP's format: its colours come from a reference image, a view and a weight.

    scene = rapfast.procedural.appearance_room(60_000)
    maps = scene.feature_maps(references)            # reference images [R, 3, 108, 192] of the room
    scene.render(viewmats, Ks, 854, 480, feature_maps=maps, map_ids=[0], view_weights=[1.0])

Under weight 1 the room has the light of the reference image, under 0 the flat `NEUTRAL` light, and 2 takes it as far
again beyond. The networks were fitted once (`appearance_fit`, examples/fit_appearance_room.py) and lie beside this
file. Nothing in them belongs to one Gaussian: a Gaussian's own features are principal components of its harmonics
under the five lightings, and its places on the maps a function of its position, so any number of Gaussians and any
seed of the room will do.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..appearance import ColorNet, FeatureMapNet, RapScene
from ..cameras import Cameras
from ..io.atomic import atomic_write
from ..io.files import PathLike, check_regular
from ..rasterization import rasterization
from ..scene import Scene
from .layout import surface
from .lighting import DAY, EVENING, NIGHT, OVERCAST, Lighting, light
from .scenes import to_scene

REFERENCE_SIZE = (192, 108)
"""Width and height of the reference images that the networks were fitted to, pixels. See `as_references`."""

WINDOW = (480.0, 854.0)
"""Least height and width, pixels, of the windows that map 2 fills; Gaussians off it read zeros, as in RAP."""

NEUTRAL = Lighting(
    sun=(0.0, 0.0, 0.0),
    sky=(1.3, 1.3, 1.3),
    ground=(0.6, 0.6, 0.6),
    view=(0.7, 0.7, 0.7),
    lamp=(0.20, 0.18, 0.16),
    glow=(1.2, 1.2, 1.2),
    ambient=(0.42, 0.42, 0.42),
    exposure=0.8,
)
"""Grey light from everywhere: what weight 0 shows."""

# The presets expose every hour alike, as a camera's automatic would, which hides from the picture how bright the hour
# is. Here night is dark and an overcast day dull and blue.
LIGHTINGS: dict[str, Lighting] = {
    "day": DAY,
    "evening": replace(EVENING, view=(1.5, 0.95, 0.60), ambient=(0.27, 0.20, 0.15), exposure=1.0),
    "overcast": replace(
        OVERCAST,
        sky=(2.0, 2.35, 2.9),
        ground=(0.6, 0.7, 0.7),
        view=(0.9, 1.05, 1.25),
        lamp=(0.0, 0.0, 0.0),
        glow=(0.5, 0.5, 0.5),
        ambient=(0.25, 0.28, 0.33),
        exposure=0.8,
    ),
    "night": replace(NIGHT, lamp=(1.3, 0.8, 0.36), ambient=(0.09, 0.065, 0.05), exposure=0.85),
}
"""The lightings of the reference images, by name."""

_FILE = "appearance_room.npz"
_CONFIG = {"sh_degree": 3, "map_num": 3, "coord_scale": 1.0, "use_colors_precomp": True, "antialiasing": True}


@dataclass(eq=False)
class LitRoom:
    """The room under every lighting at once.

    scene: the geometry, with the harmonics of NEUTRAL. normals: [N, 3]. sh: [5, N, 16, 3] under NEUTRAL and under
    each of LIGHTINGS in their order. All float32 on the CPU.
    """

    scene: Scene
    normals: Tensor
    sh: Tensor

    def under(self, hour: str | Sequence[float]) -> Scene:
        """The room as an ordinary scene under one of LIGHTINGS, or under a blend of them.

        hour: a name; or the share of each of LIGHTINGS, in their order, what lacks to 1 being NEUTRAL's. Blends are
        of displayed colours, so a picture under a blend is the blend of the pictures.
        """
        shares = torch.tensor(shares_of(hour), dtype=torch.float32, device="cpu")
        return replace(self.scene, sh=torch.einsum("k,knsc->nsc", shares, self.sh))

    def images(self, cameras: Cameras, hour: str | Sequence[float]) -> Tensor:
        """Pictures [C, 3, H, W] in 0..1 of the room under `hour`, rendered from its own harmonics."""
        scene = self.under(hour)
        colors, _, _ = rasterization(
            scene.means, scene.quats, scene.scales, scene.opacities, scene.sh, cameras.viewmats, cameras.Ks,
            cameras.width, cameras.height, sh_degree=3, rasterize_mode="antialiased",
        )  # fmt: skip
        return colors.clamp(0, 1).permute(0, 3, 1, 2).contiguous()


def shares_of(hour: str | Sequence[float]) -> list[float]:
    """Shares [5] of NEUTRAL and of LIGHTINGS; ValueError for an unknown name or another number of shares."""
    if isinstance(hour, str):
        if hour not in LIGHTINGS:
            raise ValueError(f"hour must be one of {', '.join(LIGHTINGS)}, got {hour!r}")
        return [0.0] + [float(hour == name) for name in LIGHTINGS]
    shares = [float(share) for share in hour]
    if len(shares) != len(LIGHTINGS):
        raise ValueError(f"hour must hold {len(LIGHTINGS)} shares, one of each lighting, got {len(shares)}")
    return [1.0 - sum(shares), *shares]


def lit_room(n_gaussians: int = 200_000, seed: int = 0) -> LitRoom:
    """The furnished room (see `room`) under NEUTRAL and all LIGHTINGS. 20 s for 200 000 Gaussians on two cores."""
    made = surface(n_gaussians, seed)
    sh = [light(made, lighting) for lighting in (NEUTRAL, *LIGHTINGS.values())]
    return LitRoom(to_scene(made, sh[0]), torch.from_numpy(made.normals).float(), torch.from_numpy(np.stack(sh)))


def as_references(images: Tensor) -> Tensor:
    """Pictures [R, 3, H, W] of any size as reference images [R, 3, 108, 192], by averaging over areas."""
    return F.interpolate(images, size=REFERENCE_SIZE[::-1], mode="area")


@dataclass(eq=False)
class AppearanceFit:
    """What was fitted: all of the scene that its geometry and lightings do not say.

    layers: weights of FeatureMapNet that `seeded_map_net` does not make, by name. color_net: its state dict.
    mean [240] and basis [240, 48]: a Gaussian's features are (harmonics [240] - mean) @ basis. box: [4, 4], from
    (X / 4 m, 1) to (x, y) on map 0 and on map 1, by 0.95 tanh. seed: of the map network.
    """

    layers: dict[str, Tensor]
    color_net: dict[str, Tensor]
    mean: Tensor
    basis: Tensor
    box: Tensor
    seed: int

    def save(self, path: PathLike) -> None:
        """Write an .npz, weights as float16 over the largest of their tensor. Saving what was loaded changes nothing.

        Raises:
            OSError: it cannot be written.
        """
        arrays: dict[str, Any] = {"seed": np.int64(self.seed)}
        for name, tensor in self._tensors().items():
            halves, scale = _as_halves(tensor)
            arrays |= {name: halves.numpy(), f"{name}:scale": np.float32(scale)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        atomic_write(path, buffer.getvalue())

    def rounded(self) -> AppearanceFit:
        """As it comes back from a file."""
        return _fit_of({name: _round(value) for name, value in self._tensors().items()}, self.seed)

    def _tensors(self) -> dict[str, Tensor]:
        nets = {"layers": self.layers, "color_net": self.color_net}
        flat = {f"{net}/{name}": value for net, state in nets.items() for name, value in state.items()}
        return flat | {"mean": self.mean, "basis": self.basis, "box": self.box}


def load_fit(path: PathLike | None = None) -> AppearanceFit:
    """The fit in a file that `AppearanceFit.save` wrote; None: the one that comes with rapfast.

    Raises:
        OSError: it cannot be read. ValueError: it is no such file.
    """
    if path is None:
        return _own_fit()
    return _read_fit(check_regular(path).read_bytes(), str(path))


@cache
def _own_fit() -> AppearanceFit:
    return _read_fit(resources.files(__package__).joinpath(_FILE).read_bytes(), _FILE)


def _read_fit(data: bytes, source: str) -> AppearanceFit:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            scales = {name[: -len(":scale")]: float(file[name]) for name in file.files if name.endswith(":scale")}
            tensors = {name: torch.from_numpy(file[name].astype(np.float32)) * scale for name, scale in scales.items()}
            return _fit_of(tensors, int(file["seed"]))
    except Exception as error:  # damaged bytes make zipfile and numpy raise nearly anything
        raise ValueError(f"{source}: is not a fit of the room's appearance: {error}") from None


def _fit_of(tensors: Mapping[str, Tensor], seed: int) -> AppearanceFit:
    part = lambda net: {n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{net}/")}  # noqa: E731
    return AppearanceFit(part("layers"), part("color_net"), tensors["mean"], tensors["basis"], tensors["box"], seed)


def _as_halves(tensor: Tensor) -> tuple[Tensor, float]:
    scale = float(tensor.detach().abs().max()) or 1.0
    return (tensor.detach() / scale).half(), scale


def _round(tensor: Tensor) -> Tensor:
    halves, scale = _as_halves(tensor)
    return halves.float() * scale


def seeded_map_net(seed: int) -> FeatureMapNet:
    """A FeatureMapNet whose convolutions are drawn from U(-b, b), b = sqrt(6 / inputs) (He et al. 2015), the stem's
    smoothed.

    RandomState's uniform numbers are the same on every machine and in every version of NumPy, so what is fitted on
    top of such a network need not carry it along.
    """
    net = FeatureMapNet(pair_bias=False)
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 4:
                # A transposed convolution of stride 2 and size 2 puts one of its taps into each pixel.
                inputs = p.shape[0] if name.startswith("decoder") and ".conv." not in name else p[0].numel()
                bound = math.sqrt(6 / inputs)
                p.copy_(torch.from_numpy(draw.uniform(-bound, bound, tuple(p.shape))))
            elif name.startswith("decoder") and p.dim() == 1 and ".conv." not in name:
                p.zero_()
        net.final_conv.bias.zero_()
        # The stem's picture must be smooth for the carrier in it to be told from it (appearance_fit).
        stem = net.encoder[0].weight
        side = torch.tensor([0.0545, 0.2442, 0.4026, 0.2442, 0.0545], device="cpu")  # a Gaussian of one pixel
        smooth = F.conv2d(stem.flatten(0, 1)[:, None], torch.outer(side, side)[None, None], padding=2).view_as(stem)
        stem.copy_(smooth * (math.sqrt(2 / 147) / smooth.std()))
    return net.eval().requires_grad_(False)


def intrinsic_features(lit: LitRoom, fit: AppearanceFit) -> Tensor:
    """[N, 16, 3]: principal components of each Gaussian's harmonics under the five lightings."""
    rows = lit.sh.permute(1, 0, 2, 3).flatten(1)
    return ((rows - fit.mean) @ fit.basis).unflatten(1, (16, 3)).contiguous()


def box_coordinates(means: Tensor, fit: AppearanceFit) -> Tensor:
    """[N, 3, 2]: places on maps 0 and 1 that change smoothly with the position, and windows for map 2 of once to
    one and a half times WINDOW, the higher up the larger.
    """
    places = map_places(means, fit.box)
    grow = 1.0 + 0.5 * torch.sigmoid(means[:, 2:] - 1.2)
    return torch.cat([places, (grow * means.new_tensor(WINDOW))[:, None]], 1).contiguous()


def map_places(means: Tensor, box: Tensor) -> Tensor:
    """(x, y) [n, 2, 2] on maps 0 and 1."""
    at = torch.cat([means / 4.0, torch.ones_like(means[:, :1])], 1)
    return 0.95 * torch.tanh(at @ box).unflatten(1, (2, 2))


def appearance_room(
    n_gaussians: int = 200_000, seed: int = 0, *, lit: LitRoom | None = None, fit: AppearanceFit | None = None
) -> RapScene:
    """The furnished room with RAP's appearance: float32 on the CPU, networks of RAP's sizes.

    Args:
        n_gaussians, seed: as in `room`.
        lit: what `lit_room(n_gaussians, seed)` made, where it is there already.
        fit: the fitted networks; None: those that come with rapfast.

    Reference images are pictures of the room 192 pixels wide and 108 high (`as_references`), seen from anywhere
    inside, under any of LIGHTINGS or a blend of them (`LitRoom.images`).
    """
    lit = lit_room(n_gaussians, seed) if lit is None else lit
    fit = load_fit() if fit is None else fit
    net = seeded_map_net(fit.seed)
    net.load_state_dict(net.state_dict() | fit.layers)
    scene = replace(lit.scene, sh=None, intrinsic=intrinsic_features(lit, fit))
    boxes = box_coordinates(scene.means, fit)
    return RapScene(scene, boxes, net, ColorNet.from_state_dict(fit.color_net), dict(_CONFIG), iteration=30_000)
