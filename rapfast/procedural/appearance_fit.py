"""How the room's appearance is fitted: regressions against per-Gaussian colours, no gradient through a renderer.

1. A Gaussian's features: principal components of its harmonics under the five lightings.
2. The light of a picture as four numbers, its code: shares of the lightings, scaled so that the mean squared error of
   a code is that of the Gaussians' colours. The last layers of the map network are solved, by linear least squares, to
   put the code of the reference image everywhere into its maps. Norms hide a picture's brightness from all later
   layers, so it is read off a carrier (`_Carrier`).
3. ColorNet and the places on the maps learn, by Adam, the colour of random Gaussians from random directions under
   random reference images and weights w of U(0, 2): neutral + w (lit - neutral), clamped to 0..1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..appearance import ColorNet, FeatureMapNet
from ..cameras import Cameras
from .appearance import (
    LIGHTINGS,
    REFERENCE_SIZE,
    AppearanceFit,
    LitRoom,
    as_references,
    lit_room,
    map_places,
    seeded_map_net,
)
from .lighting import sh_basis
from .views import room_cameras, room_orbit

N_CODE = len(LIGHTINGS)
_C0 = 0.28209479177387814  # the harmonic of degree 0


@dataclass(frozen=True)
class FitReport:
    """What a fit is worth on reference images from places that it has not seen.

    color_error: root mean square error of the Gaussians' colours (0..1) under weight 1, over held-out reference
    images, random Gaussians and directions. neutral_error: the same where every reference image is ignored. by_hour:
    color_error for each of LIGHTINGS. seconds: time taken.
    """

    color_error: float
    neutral_error: float
    by_hour: dict[str, float]
    seconds: float


def fit_appearance(
    n_gaussians: int = 40_000,
    seed: int = 0,
    *,
    other_rooms: Sequence[int] = (10_000, 120_000),
    n_views: int = 56,
    n_references: int = 240,
    steps: int = 700,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[AppearanceFit, FitReport]:
    """Fit the appearance of the room; about two minutes on two free CPU cores.

    Args:
        n_gaussians: of the room that is fitted; the result serves any other number.
        seed: of the room and of everything drawn. The same seed, machine, torch and number of threads give the same
            weights bit by bit.
        other_rooms: numbers of Gaussians of coarser and finer rooms, of which a share of the reference images is
            taken, so that the sharpness of a picture does not matter.
        n_views: viewpoints in each room, of which the reference images are taken; up to 8 others are held out.
        n_references: reference images to learn from. steps: of Adam, each on 8 images with 1024 Gaussians.
        progress: takes a line now and then.
    """
    start = time.perf_counter()

    def tell(line: str) -> None:
        progress(f"{time.perf_counter() - start:6.1f} s  {line}")

    draw = torch.Generator().manual_seed(seed)
    lit = lit_room(n_gaussians, seed)
    mean, basis = _components(lit.sh.permute(1, 0, 2, 3).flatten(1))
    features = (lit.sh.permute(1, 0, 2, 3).flatten(1) - mean) @ basis
    tell(f"{n_gaussians:,} Gaussians under {1 + N_CODE} lightings")

    pictures = _pictures(lit, _training_cameras(n_views, seed))
    for i, count in enumerate(other_rooms, 1):
        pictures = torch.cat([pictures, _pictures(lit_room(count, seed), _training_cameras(n_views, seed + i))], 1)
    shares = _draw_shares(n_references, draw)
    seen = torch.randint(pictures.shape[1], (n_references,), generator=draw)
    images = torch.einsum("rk,rkchw->rchw", shares, pictures[:, seen].transpose(0, 1))
    metric = _code_metric(lit)
    net = seeded_map_net(seed)
    with torch.no_grad():
        carrier = _Carrier(net, images, draw)
        quality = carrier.solve(shares[:, 1:] @ metric)
        layers = {name: value for name, value in net.state_dict().items() if name.startswith(_Carrier.fitted)}
        layers = {name: value for name, value in layers.items() if "running_" not in name and "batches" not in name}
        half = AppearanceFit(layers, {}, mean, basis, torch.zeros(4, 4), seed).rounded()
        net.load_state_dict(net.state_dict() | half.layers)  # what is shipped, so that ColorNet learns from it
        maps = net.feature_maps(images)
    tell(f"maps of {n_references} reference images tell {quality:.1%} of the light")

    learner = _Learner(lit, features, draw)
    color_net, box = learner.fit(maps, shares, steps, tell)
    fit = AppearanceFit(half.layers, dict(color_net.state_dict()), mean, basis, box, seed).rounded()

    held_out = _pictures(lit, room_cameras(min(8, n_views), *REFERENCE_SIZE))
    errors = {}
    for k, hour in enumerate(LIGHTINGS, 1):
        shares = F.one_hot(torch.full((held_out.shape[1],), k), 1 + N_CODE).float()
        errors[hour] = learner.error(fit, net.feature_maps(held_out[k]), shares)
    color_error, neutral_error = (math.sqrt(np.mean([e[i] ** 2 for e in errors.values()])) for i in (0, 1))
    by_hour = {hour: e[0] for hour, e in errors.items()}
    return fit, FitReport(color_error, neutral_error, by_hour, time.perf_counter() - start)


# Data ----------------------------------------------------------------------------------------------------------------


def _training_cameras(n: int, seed: int) -> list[Cameras]:
    """n viewpoints; the first eight of `room_cameras`, chosen by hand, are held out."""
    around = n // 4
    return [room_cameras(8 + n - around, *REFERENCE_SIZE, seed=seed + 1)[8:], room_orbit(around, *REFERENCE_SIZE)]


def _pictures(lit: LitRoom, cameras: Cameras | list[Cameras]) -> Tensor:
    """[5, C, 3, 108, 192]: pictures under each lighting, rendered at twice the size and reduced."""
    groups = cameras if isinstance(cameras, list) else [cameras]
    groups = [group.resize(2 * group.width, 2 * group.height) for group in groups]
    one = np.eye(1 + N_CODE)[:, 1:]
    return torch.stack([torch.cat([as_references(lit.images(group, row)) for group in groups]) for row in one])


def _draw_shares(n: int, draw: torch.Generator) -> Tensor:
    """[n, 5] shares of the lightings: one alone for half of the images, else blends of mostly two or three."""
    raw = -torch.log(1 - torch.rand(n, 1 + N_CODE, generator=draw))
    blends = raw**2 / (raw**2).sum(1, keepdim=True)
    pure = F.one_hot(torch.randint(1 + N_CODE, (n,), generator=draw), 1 + N_CODE).float()
    return torch.where(torch.rand(n, 1, generator=draw) < 0.5, pure, blends)


def _components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [240] and basis [240, 48] of the principal components of rows [N, 240], which come out with deviations
    near 1, small ones less.
    """
    rows = rows.double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values[-48:].flip(0), vectors[:, -48:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean.float(), (vectors / torch.sqrt(values + 0.003 * values[0])).float()


def _code_metric(lit: LitRoom) -> Tensor:
    """[4, 4]: shares @ this is a code; squared distances of codes are mean squared distances of colours, in units of
    the mean square of what a lighting changes.
    """
    change = (lit.sh[1:, :, 0] - lit.sh[0, :, 0]).flatten(1).double() * _C0
    gram = change @ change.T / change.shape[1]
    return (torch.linalg.cholesky(gram) / gram.diagonal().mean().sqrt()).float()


def _least_squares(x: Tensor, y: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Weights and offset of the damped linear fit of y [n, m] to x [n, k], in units of the columns' deviations."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6 * x.std()
    z = ((x - mean) / deviation).double()
    gram = z.T @ z / len(z) + damping * torch.eye(z.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, z.T @ (y - y.mean(0)).double() / len(z)).float() / deviation[:, None]
    return weights, y.mean(0) - mean @ weights


# Feature maps --------------------------------------------------------------------------------------------------------


class _Carrier:
    """The last layers of a FeatureMapNet, set so that each place of the maps tells the light of the whole picture.

    Every norm subtracts a channel's mean over the picture and divides by its deviation, so a channel made of the
    picture alone comes out the same whether the picture is bright or dim. Therefore a carrier of fixed amplitude A, a
    chequerboard of +1 and -1, is added to a channel b of the stem: behind the norm its amplitude is
    A / sqrt(A^2 + var b), at every pixel, and shrinks as the picture gets brighter or its contrast higher. The next
    convolution filters the carrier back out of 63 such channels (second differences along both axes: the stem's own
    picture is smooth), combines the amplitudes to units u . code + o, and keeps them small against the norm's
    eps, which then leaves their size alone. Each unit comes with both signs: after the ReLU the two add up to its
    magnitude on white and black squares alike, and the last layer reads the code from these magnitudes.

    The chequerboard is the transposed convolution of a constant, and the constant a norm with weight 0 and bias 1,
    since this step runs twice and reads its own output. Channel numbers: 63 of the step's output is the constant, 62
    of the transposed convolution's the carrier, and 63 of the first convolution's the carrier alone.
    """

    fitted = ("decoder.6.", "decoder.7.", "final_conv.")
    amplitude = 1.5  # of the carrier, in deviations of the channel
    deep = 0.5  # deviation of what the deeper layers add to a channel, in deviations of the channel
    shift = 4.0  # added before the first ReLU, so that it passes nearly everything
    small = 1e-4  # scale of the units, beside sqrt(eps) = 3e-3
    units = 31  # pairs
    lift = 2.5  # of the first units, in units of the code

    def __init__(self, net: FeatureMapNet, images: Tensor, draw: torch.Generator) -> None:
        self.net, self.draw = net, draw
        self.up, self.pair, self.final = net.decoder[6], net.decoder[7].conv, net.final_conv
        self.square = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        second = torch.tensor([1.0, -2.0, 1.0]) / 4
        self.filter = torch.outer(second, second)
        # What lies before the last step does not change: the decoder's state, layer 1 and the stem of each image.
        before = [self._before(part) for part in images.split(8)]
        self.x, self.layer1, self.stem = (torch.cat(parts) for parts in zip(*before, strict=True))
        # 24 places in each image, away from the border, where the padding disturbs.
        h, w = self.stem.shape[2:]
        rows = torch.randint(2, h - 2, (len(images), 24), generator=draw)
        self.places = rows * w + torch.randint(2, w - 2, (len(images), 24), generator=draw)
        self.signs = 1.0 - 2.0 * ((self.places // w + self.places % w) % 2)

    def _before(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, decoder = self.net.encoder, self.net.decoder
        stem = e[0](images)
        layer1 = e[4](e[3](torch.relu(e[1](stem))))
        layer2 = e[5](layer1)
        layer3 = e[6](layer2)
        x = e[7](layer3)
        for step, skip in ((0, layer3), (2, layer2), (4, layer1)):
            x = decoder[step + 1](torch.cat([F.interpolate(decoder[step](x), size=skip.shape[2:]), skip], 1))
        return x, layer1, stem

    def _uniform(self, *shape: int) -> Tensor:
        """Random numbers of variance 1."""
        return (2 * torch.rand(*shape, generator=self.draw) - 1) * math.sqrt(3)

    def solve(self, codes: Tensor) -> float:
        """Set the layers for images with codes [R, 4]; returns the share of the codes' variance that maps tell."""
        up, (conv0, norm0, _, conv1, norm1, _) = self.up, self.pair
        up.weight.copy_((self._uniform(64, 64, 1, 1) / 8).expand_as(up.weight))
        up.weight[:, 62] = 0
        up.weight[63, 62] = self.square
        up.bias.zero_()
        deviation = self.stem.std((2, 3)).mean(0)
        conv0.weight.zero_()
        # The deeper layers' channels are ReLUs of unit variance: their mean square is a half.
        conv0.weight[:, :62] = (
            self._uniform(64, 62, 3, 3) * (self.deep * deviation / math.sqrt(62 * 9 / 2))[:, None, None, None]
        )
        conv0.weight[range(63), range(64, 127), 1, 1] = 1.0
        conv0.weight[63] = 0
        conv0.weight[:, 62, 1, 1] = self.amplitude * deviation
        norm0.weight.fill_(1)
        norm0.bias.fill_(self.shift)
        conv1.weight.zero_()
        norm1.weight.fill_(1)
        norm1.bias.zero_()
        norm1.weight[62:], norm1.bias[62:] = 0, 1

        at_places = codes[:, None].expand(-1, self.places.shape[1], -1).flatten(0, 1)
        amplitudes = self._at_places(self._amplitudes) * self.signs.flatten()[:, None]
        weights, offset = _least_squares(amplitudes[:, :63], at_places, 1e-3)
        # The first units are the code itself, lifted so far that it keeps its sign; the others bend somewhere.
        direction, lift = F.normalize(self._uniform(self.units, N_CODE), dim=1), self._uniform(self.units)
        direction[:N_CODE], lift[:N_CODE] = torch.eye(N_CODE), self.lift
        unit = torch.cat([direction @ weights.T, (direction @ offset + lift)[:, None] / amplitudes[:, 63].mean()], 1)
        conv1.weight[: self.units] = self.small * unit[:, :, None, None] * self.filter
        conv1.weight[self.units : 2 * self.units] = -conv1.weight[: self.units]

        out = self._at_places(lambda *before: self._step(*before))
        weights, offset = _least_squares(out[:, :62], at_places, 1e-4)
        spread = F.normalize(self._uniform(48, N_CODE), dim=1)
        self.final.weight.zero_()
        self.final.weight[:, :62, 0, 0] = spread @ weights.T
        self.final.bias.copy_(spread @ offset)
        error = out[:, :62] @ weights + offset - at_places
        return 1.0 - float(error.square().mean() / (at_places - at_places.mean(0)).square().mean())

    def _joined(self, x: Tensor, layer1: Tensor, stem: Tensor) -> Tensor:
        """What goes into the pair of convolutions the second time."""
        x = self.pair(torch.cat([F.interpolate(self.up(x), size=layer1.shape[2:]), layer1], 1))
        return torch.cat([F.interpolate(self.up(x), size=stem.shape[2:]), stem], 1)

    def _step(self, x: Tensor, layer1: Tensor, stem: Tensor) -> Tensor:
        return self.pair(self._joined(x, layer1, stem))

    def _amplitudes(self, x: Tensor, layer1: Tensor, stem: Tensor) -> Tensor:
        """Carriers [r, 64, h, w] behind the first norm of the pair, still with the chequerboard's signs."""
        y = self.pair[:3](self._joined(x, layer1, stem))
        return F.conv2d(y, self.filter.expand(64, 1, 3, 3), padding=1, groups=64)

    def _at_places(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Values [R * 24, 64] of maps [R, 64, h, w] at each image's places."""
        parts = []
        before = (self.x.split(8), self.layer1.split(8), self.stem.split(8), self.places.split(8))
        for *inputs, places in zip(*before, strict=True):
            values = function(*inputs).flatten(2)
            parts.append(values.gather(2, places[:, None].expand(-1, values.shape[1], -1)).transpose(1, 2))
        return torch.cat(parts).flatten(0, 1)


# Colours -------------------------------------------------------------------------------------------------------------


class _Learner:
    """Random Gaussians seen from random places in random light, and ColorNet learning their colours."""

    def __init__(self, lit: LitRoom, features: Tensor, draw: torch.Generator) -> None:
        self.lit, self.features, self.draw = lit, features, draw
        self.means = lit.scene.means

    def _batch(self, shares: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gaussians [r, n], directions [r, n, 3], and their colours [r, n, 3] neutral and under shares [r, 5]."""
        r = len(shares)
        ids = torch.randint(len(self.means), (r, n), generator=self.draw)
        low, high = torch.tensor([-3.2, -2.5, 0.5]), torch.tensor([3.2, 2.5, 2.0])
        eye = low + (high - low) * torch.rand(r, n, 3, generator=self.draw)
        d = F.normalize(self.means[ids] - eye, dim=-1)
        # Only fronts are seen.
        normals = self.lit.normals[ids]
        d = d - 2 * ((d * normals).sum(-1, keepdim=True)).clamp(min=0) * normals
        y = torch.from_numpy(sh_basis(d.flatten(0, 1).numpy())).float().view(r, n, 16)
        sh = self.lit.sh[:, ids]
        neutral = torch.einsum("rns,rnsc->rnc", y, sh[0]) + 0.5
        lit = torch.einsum("rns,rnsc->rnc", y, torch.einsum("rk,krnsc->rnsc", shares, sh)) + 0.5
        return ids, d, neutral, lit

    def _appearance(self, maps: Tensor, ids: Tensor, box: Tensor) -> Tensor:
        """What `sample_features` would read: maps 0 and 1 at the Gaussian's places, map 2 anywhere or nowhere."""
        r, n = ids.shape
        places = map_places(self.means[ids.flatten()], box).view(r, n, 2, 2)
        anywhere = 2 * torch.rand(r, n, 2, generator=self.draw) - 1
        grid = [places[:, :, 0], places[:, :, 1], anywhere]
        read = [
            F.grid_sample(m, g[:, :, None], padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)
            for m, g in zip(maps.split(16, 1), grid, strict=True)
        ]
        read[2] = read[2] * (torch.rand(r, n, 1, generator=self.draw) < 0.75)
        return torch.cat(read, -1)

    def _colors(self, net: ColorNet, ids: Tensor, d: Tensor, appearance: Tensor, weights: Tensor) -> Tensor:
        chosen = ids.flatten()
        weight = weights[:, None].expand_as(ids).flatten()
        decoded = net.decode(self.means[chosen], appearance.flatten(0, 1), self.features[chosen], weight)
        return net.head(decoded, d.flatten(0, 1)).view(*ids.shape, 3)

    def fit(self, maps: Tensor, shares: Tensor, steps: int, progress: Callable[[str], None]) -> tuple[ColorNet, Tensor]:
        """ColorNet and the box [4, 4]."""
        net = ColorNet()
        for name, p in net.named_parameters():
            inputs = dict(net.named_modules())[name.rsplit(".", 1)[0]].in_features
            bound = math.sqrt(3 / inputs) if name.endswith("weight") else 0.0
            p.data.copy_((2 * torch.rand(p.shape, generator=self.draw) - 1) * bound)
        net.color_decoder.lin1.bias.data.fill_(0.45)
        box = (torch.rand(4, 4, generator=self.draw) - 0.5).requires_grad_()
        # Waves shorter than half a metre would be learnt for the Gaussians of this room alone: their weights stay 0.
        first = net.encoder.lin0.weight
        smooth = torch.ones_like(first)
        smooth[:, 3 + 6 * 4 : 63] = 0
        first.data.mul_(smooth)
        first.register_hook(lambda gradient: gradient * smooth)
        optimizer = torch.optim.Adam([*net.parameters(), box], lr=4e-3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
        running = 0.0
        for step in range(1, steps + 1):
            chosen = torch.randint(len(maps), (8,), generator=self.draw)
            weights = 2 * torch.rand(8, generator=self.draw)
            ids, d, neutral, lit = self._batch(shares[chosen], 1024)
            wanted = (neutral + weights[:, None, None] * (lit - neutral)).clamp(0, 1)
            got = self._colors(net, ids, d, self._appearance(maps[chosen], ids, box), weights)
            loss = (got - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            running = 0.95 * running + 0.05 * loss.item()
            if step % max(1, steps // 8) == 0:
                progress(f"step {step}: colours off by {math.sqrt(running / (1 - 0.95**step)):.4f}")
        return net.requires_grad_(False), box.detach()

    @torch.no_grad()
    def error(self, fit: AppearanceFit, maps: Tensor, shares: Tensor) -> tuple[float, float]:
        """Root mean square errors under weight 1: of the fit, and of the neutral colours."""
        net = ColorNet.from_state_dict(fit.color_net)
        ids, d, neutral, lit = self._batch(shares, 4096)
        got = self._colors(net, ids, d, self._appearance(maps, ids, fit.box), torch.ones(len(maps)))
        wanted = lit.clamp(0, 1)
        return float((got - wanted).square().mean().sqrt()), float((neutral - wanted).square().mean().sqrt())
