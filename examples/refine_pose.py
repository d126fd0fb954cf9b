"""Finds where a picture was taken, from a wrong guess, by gradient descent through the render.

    python examples/refine_pose.py --out refined_pose.png

The scene is the procedural room in RAP's format, under the light of a reference image taken elsewhere. The guess is
--metres and --degrees off, in a random direction and about a random axis. What is descended is the mean absolute
difference between the picture and the render of the guess, on small pictures first, whose differences reach further.
The plot shows the pictures, before and after, and how far the pose is off at each step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast import Cameras, procedural
from rapfast.appearance import RapScene
from rapfast.io.atomic import atomic_path, check_writable


class Pose(torch.nn.Module):
    """A camera near `start` [4, 4] (world to camera): its axes turned by `turn` (radians) and its centre moved by
    `move` (metres), both 0 at first and seen from the camera."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.turn = torch.nn.Parameter(torch.zeros_like(start[:3, 0]))
        self.move = torch.nn.Parameter(torch.zeros_like(start[:3, 0]))

    def forward(self) -> Tensor:
        return moved(self.start, self.turn, self.move)


def moved(viewmat: Tensor, turn: Tensor, move: Tensor) -> Tensor:
    x, y, z = turn
    zero = torch.zeros_like(x)
    rotation = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3))
    rigid = torch.cat([rotation, move[:, None]], 1)
    return torch.cat([rigid, viewmat[3:]]) @ viewmat


def errors(viewmat: Tensor, truth: Tensor) -> tuple[float, float]:
    """Millimetres between the centres and degrees between the axes of two cameras."""
    a, b = (torch.linalg.inv(m.detach().double()) for m in (viewmat, truth))
    # |R1 - R2| = sqrt(8) sin(angle / 2), which is accurate for small angles too.
    chord = (a[:3, :3] - b[:3, :3]).norm() / 8**0.5
    return 1e3 * float((a[:3, 3] - b[:3, 3]).norm()), float(torch.rad2deg(2 * torch.asin(chord.clamp(max=1))))


def refine(
    scene: RapScene, maps: Tensor, picture: Tensor, camera: Cameras, start: Tensor, options: argparse.Namespace
) -> tuple[Tensor, list[tuple[float, float]]]:
    """The pose found from `start`, and the errors of every step. `picture` [H, W, 3] has the size of `camera`, whose
    pose is looked at for the errors alone."""
    pose, path = Pose(start), []
    for level, shrink in enumerate(options.shrink):
        size = camera.resize(camera.width // shrink, camera.height // shrink)
        target = F.interpolate(picture.permute(2, 0, 1)[None], (size.height, size.width), mode="area")[0]
        target = target.permute(1, 2, 0)
        rate = options.rate / 2**level
        optimizer = torch.optim.Adam([{"params": pose.turn, "lr": rate}, {"params": pose.move, "lr": 2 * rate}])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.03 ** (1 / options.steps))
        for _ in range(options.steps):
            viewmat = pose()
            path.append(errors(viewmat, camera.viewmats[0]))
            image, _, _ = scene.render(viewmat[None], size.Ks, size.width, size.height, feature_maps=maps)
            loss = (image[0] - target).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{size.width}x{size.height}: {path[-1][0]:8.3f} mm, {path[-1][1]:.4f} degrees off")
    found = pose().detach()
    return found, [*path, errors(found, camera.viewmats[0])]


def plot(path: Path, pictures: list[Tensor], found: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1))
    picture, before, after = pictures
    for column, (title, image) in enumerate((("the picture", picture), ("the guess", before), ("refined", after))):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(image.clamp(0, 1).cpu().numpy())
        axis.set_title(title)
        axis.axis("off")
    difference = torch.cat([(image - picture).abs().mean(-1) for image in (before, after)], 1)
    axis = figure.add_subplot(grid[1, 0])
    axis.imshow(difference.cpu().numpy(), cmap="magma", vmin=0, vmax=0.5)
    axis.set_title("difference, before and after")
    axis.axis("off")
    for column, (values, unit, goal) in enumerate(zip(zip(*found, strict=True), ("mm", "degrees"), (1.0, 0.1),
                                                      strict=True)):  # fmt: skip
        axis = figure.add_subplot(grid[1, column + 1])
        axis.plot(values, color="#3a6ea5")
        axis.axhline(goal, color="#888888", linewidth=1, linestyle="--")
        axis.set(title=f"off by {values[-1]:.3g} {unit}", xlabel="step", ylabel=unit, yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("refined_pose.png"), help="the plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller scene and smaller pictures, for two CPU cores")
    for name, full, quick in SIZES:
        parser.add_argument(f"--{name}", type=int, help=f"default {full}, with --quick {quick}")
    parser.add_argument("--metres", type=float, default=0.05, help="how far the guess is off")
    parser.add_argument("--degrees", type=float, default=2.0)
    parser.add_argument("--hour", default="evening", help="light of the picture: day, evening, overcast or night")
    parser.add_argument("--place", type=int, default=0, help="which of the room's viewpoints, 0 to 7")
    parser.add_argument("--shrink", type=int, nargs="+", default=[4, 2, 1], help="1 / size, in turn")
    parser.add_argument("--rate", type=float, default=4e-3, help="radians a step at first; twice that in metres")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, full, quick in SIZES:
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(f"the plot needs matplotlib ({error}): pip install matplotlib")

    try:
        check_writable(options.out)
    except OSError as error:
        parser.error(f"--out {error}")

    device = torch.device(options.device)
    lit = procedural.lit_room(options.gaussians, options.seed)
    scene = procedural.appearance_room(lit=lit).to(device)
    camera = procedural.room_cameras(8, options.width, options.height)[[options.place]]
    elsewhere = procedural.room_cameras(9, 384, 216)[[8]]
    with torch.no_grad():
        maps = scene.feature_maps(procedural.as_references(lit.images(elsewhere, options.hour)).to(device))
        camera = Cameras(camera.viewmats.to(device), camera.Ks.to(device), camera.width, camera.height)

        def picture_from(viewmat: Tensor) -> Tensor:
            return scene.render(viewmat[None], camera.Ks, camera.width, camera.height, feature_maps=maps)[0][0]

        picture = picture_from(camera.viewmats[0])
        turn, move = F.normalize(torch.randn(2, 3, generator=torch.Generator().manual_seed(options.seed))).to(device)
        start = moved(camera.viewmats[0], turn * options.degrees * torch.pi / 180, move * options.metres)
        before = picture_from(start)
    begin = time.perf_counter()
    found, path = refine(scene, maps, picture, camera, start, options)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        plot(options.out, [picture, before, picture_from(found)], path)
    print(f"guess:   {path[0][0]:8.3f} mm, {path[0][1]:.4f} degrees off")
    print(f"refined: {path[-1][0]:8.3f} mm, {path[-1][1]:.4f} degrees off")
    print(f"{len(path) - 1} steps in {seconds:.1f} s, {1e3 * seconds / (len(path) - 1):.2f} ms a step")
    print(f"{options.out}: the plot")


SIZES = (("gaussians", 60_000, 8000), ("width", 854, 214), ("height", 480, 120), ("steps", 150, 100))

if __name__ == "__main__":
    main()
