"""Trains a scene's appearance through the render: two lightings, each view with its own weight.

    python examples/fit_appearance.py --out two_lightings.png

The Gaussians of the procedural room are given, their colours are not: intrinsic features, places on the maps, the
feature-map network and the colour network are trained from scratch on pictures of the room by day and at night.
Every view of a batch has one of the lights, by a reference image taken from elsewhere in it, and a weight of its own
between 0 and 1.5: weight 0 shows the room in grey light, 1 in the reference image's, and what is between and beyond
lies on that line. All views of a batch are one call. What is printed: PSNR on views and reference images never seen,
and for comparison with the other light's reference images. (`fit_appearance_room.py` makes the room that comes with
rapfast, of four lightings, by regressing colours without a renderer.) Ctrl-C ends the training, and the picture shows
what was learnt by then.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapfast import Cameras, Scene, media, procedural
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.io.atomic import check_writable

HOURS = ("day", "night")
HIGHEST = 1.5
SHOWN = (0.0, 0.5, 1.0, 1.5)
REFERENCE = (96, 54)


@dataclass
class Views:
    """Cameras and what they see under weight 0 and, hour by hour, under weight 1: `grey` [C, H, W, 3] and `lit`
    [hours, C, H, W, 3]."""

    cameras: Cameras
    grey: Tensor
    lit: Tensor

    def under(self, hours: Tensor, views: Tensor, weights: Tensor) -> Tensor:
        """[B, H, W, 3] in hours [B], of views [B], under weights [B]."""
        grey = self.grey[views]
        return grey + weights[:, None, None, None].to(grey) * (self.lit[hours, views] - grey)

    def references(self) -> Tensor:
        """[hours, C, 3, h, w] in the size of reference images."""
        images = self.lit.flatten(0, 1).permute(0, 3, 1, 2).clamp(0, 1)
        return F.interpolate(images, REFERENCE[::-1], mode="area").unflatten(0, self.lit.shape[:2])


def make_views(lit: procedural.LitRoom, cameras: Cameras, device: torch.device) -> Views:
    def seen(hour: str | list[float]) -> Tensor:
        pictures = [lit.images(cameras[k : k + 8], hour) for k in range(0, len(cameras), 8)]
        return torch.cat(pictures).permute(0, 2, 3, 1).to(device)

    placed = Cameras(cameras.viewmats.to(device), cameras.Ks.to(device), cameras.width, cameras.height)
    return Views(placed, seen([0.0, 0.0, 0.0, 0.0]), torch.stack([seen(hour) for hour in HOURS]))


def untrained(room: Scene, device: torch.device) -> RapScene:
    """The room's Gaussians with an appearance that knows nothing."""
    n = len(room)
    means = room.means
    # Places that change with the position, on maps 0 and 1; and windows for map 2 as large as a picture.
    at = torch.tanh(means[:, [0, 1, 1, 2]] / 3).unflatten(1, (2, 2))
    window = torch.tensor([480.0, 854.0]).expand(n, 1, 2)
    intrinsic = nn.Parameter(0.1 * torch.randn(n, 16, 3))
    geometry = Scene(means, room.quats, room.scales, room.opacities, intrinsic=intrinsic)
    net = FeatureMapNet(pair_bias=False)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    scene = RapScene(geometry, torch.cat([at, window], 1), net, ColorNet()).to(device)
    scene.scene.intrinsic = nn.Parameter(scene.scene.intrinsic.detach())
    scene.box_coord = nn.Parameter(scene.box_coord.detach())
    scene.feature_map_net.requires_grad_()
    scene.color_net.requires_grad_()
    return scene


def drawn(scene: RapScene, cameras: Cameras, views: Tensor, maps: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """[B, H, W, 3] of views [B], each under a weight [B] and by one, chosen [B], of the maps of R reference images."""
    images, _, _ = scene.render(
        cameras.viewmats[views], cameras.Ks[views], cameras.width, cameras.height,
        feature_maps=maps, map_ids=chosen, view_weights=weights,
    )  # fmt: skip
    return images


def train(scene: RapScene, views: Views, options: argparse.Namespace) -> list[float]:
    """The loss of every step, until Ctrl-C is pressed."""
    optimizer = torch.optim.Adam([
        {"params": [scene.scene.intrinsic], "lr": 2e-2},
        {"params": [scene.box_coord], "lr": 1e-3},
        {"params": scene.color_net.parameters(), "lr": 3e-3},
        {"params": scene.feature_map_net.parameters(), "lr": 1e-3},
    ])  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=options.steps, pct_start=0.1)
    references, losses = views.references(), []
    try:
        for step in range(options.steps):
            hours = torch.randint(len(HOURS), (options.batch,))
            places = torch.randint(len(views.cameras), (options.batch,))
            weights = HIGHEST * torch.rand(options.batch)
            taken = references[torch.arange(len(HOURS)), torch.randint(len(views.cameras), (len(HOURS),))]
            images = drawn(scene, views.cameras, places, scene.feature_maps(taken), hours, weights)
            loss = (images - views.under(hours, places, weights)).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % max(options.steps // 10, 1) == 0:
                print(f"step {step + 1}: loss {sum(losses[-20:]) / len(losses[-20:]):.4f}")
    except KeyboardInterrupt:
        if not losses:
            raise
        print(f"interrupted: {len(losses)} of {options.steps} steps were made")
    return losses


@torch.no_grad()
def test(scene: RapScene, views: Views, references: Tensor, swapped: bool = False) -> float:
    """PSNR over all views, hours and shown weights; `swapped`: with the other hour's reference images."""
    errors = []
    for k in range(len(HOURS)):
        places = torch.arange(len(views.cameras))
        maps, hours = scene.feature_maps(references[(k + swapped) % len(HOURS)]), torch.full_like(places, k)
        for weight in SHOWN:
            weights = torch.full((len(places),), weight)
            images = drawn(scene, views.cameras, places, maps, places, weights)
            errors.append((images - views.under(hours, places, weights)).square().mean((1, 2, 3)))
    return float((-10 * torch.cat(errors).log10()).mean())


@torch.no_grad()
def picture(path: Path, scene: RapScene, views: Views, references: Tensor) -> None:
    """Rows: an hour's reference image, and a view under each weight, drawn and as it should be."""
    tiles = []
    for k in range(len(HOURS)):
        n = len(SHOWN)
        places, hours, weights = torch.zeros(n, dtype=torch.long), torch.full((n,), k), torch.tensor(SHOWN)
        got = drawn(scene, views.cameras, places, scene.feature_maps(references[k, -1:]), places, weights)
        size = views.cameras.height, views.cameras.width
        reference = F.interpolate(references[k, -1:], size)[0].permute(1, 2, 0)
        tiles += [reference, *got, torch.ones_like(reference), *views.under(hours, places, weights)]
    sheet = [(255 * tile.clamp(0, 1) + 0.5).to(torch.uint8).cpu().numpy() for tile in tiles]
    media.write_png(path, media.contact_sheet(sheet, columns=1 + len(SHOWN)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("two_lightings.png"), help="the picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, for two CPU cores")
    for name, full, quick, what in SIZES:
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default {full}, with --quick {quick}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, full, quick, _ in SIZES:
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")

    try:
        check_writable(options.out)
    except OSError as error:
        parser.error(f"--out {error}")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    lit = procedural.lit_room(options.gaussians, options.seed)
    size = options.width, options.height
    views = make_views(lit, procedural.room_orbit(options.views, *size), device)
    others = make_views(lit, procedural.room_cameras(8, *size), device)
    references = others.references().roll(1, 1)  # each view's from another place
    scene = untrained(lit.scene, device)
    before = test(scene, others, references)
    begin = time.perf_counter()
    losses = train(scene, views, options)
    seconds = time.perf_counter() - begin
    each = 1e3 * seconds / len(losses)
    print(f"{len(losses)} steps of {options.batch} views in {seconds:.1f} s, {each:.1f} ms a step")
    after, swapped = test(scene, others, references), test(scene, others, references, swapped=True)
    print(
        f"PSNR of views never seen: {before:.2f} dB before, {after:.2f} dB after; with the other light's reference "
        f"images {swapped:.2f} dB"
    )
    picture(options.out, scene, others, references)
    weights = ", ".join(map(str, SHOWN))
    print(f"{options.out}: reference images at the left, weights {weights}, and below them what they should be")


SIZES = (
    ("gaussians", 60_000, 5000, "of the room"),
    ("width", 427, 96, "of the pictures, pixels"),
    ("height", 240, 54, "of the pictures, pixels"),
    ("views", 64, 16, "that are trained on"),
    ("batch", 8, 4, "views a step"),
    ("steps", 3000, 200, "of Adam"),
)

if __name__ == "__main__":
    main()
