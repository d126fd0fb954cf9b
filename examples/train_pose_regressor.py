"""Trains a small network to tell a camera's pose from its picture, on random views rendered while it trains.

    python examples/train_pose_regressor.py --out pose_regressor.png

The scene is the procedural room in RAP's format: each view has a pose of its own and the light of one of four
reference images, from none of it to twice as much, so that the network learns the place and not the hour. Gradients
are accumulated over --accumulate batches under mixed precision (bfloat16 on the CPU, float16 with loss scaling on a
GPU). The plot shows the loss and the median errors on views that are not trained on. `--quick` is for two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapfast import Cameras, PostProcess, procedural
from rapfast.io.atomic import atomic_path
from rapfast.procedural.appearance import LIGHTINGS
from rapfast.rvs import PoseSampler, RandomViewDataset

MOVE, TURN = 0.6, 12.0  # metres and degrees around the one viewpoint
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PoseRegressor(nn.Module):
    """Pictures [B, 3, h, w] -> translations [B, 3] and rotations [B, 3, 3], camera to world.

    It says how far a picture's pose is from `origin` [3, 4]. Rotations are given by two columns, which are made
    orthonormal (Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", CVPR 2019).
    """

    def __init__(self, origin: Tensor, width: int, height: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 24, 32, 48, 64, 64)
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
            width, height = -(-width // 2), -(-height // 2)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * width * height, 128), nn.ReLU())
        self.head = nn.Linear(128, 9)
        nn.init.zeros_(self.head.weight)  # so it begins by saying `origin`
        nn.init.zeros_(self.head.bias)
        self.register_buffer("origin", origin)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        offset = self.head(self.layers(images)).float()
        x, y = (offset[:, 3:].unflatten(1, (2, 3)) + torch.eye(3, device=offset.device)[:2]).unbind(1)
        x = F.normalize(x, dim=1)
        y = F.normalize(y - (x * y).sum(1, keepdim=True) * x, dim=1)
        rotation = torch.stack([x, y, torch.linalg.cross(x, y)], dim=2) @ self.origin[:, :3]
        return self.origin[:, 3] + MOVE * offset[:, :3], rotation


def pose_loss(translation: Tensor, rotation: Tensor, pose: Tensor) -> Tensor:
    """Of float32 predictions for poses [B, 3, 4]: both parts are of order 1 at the beginning."""
    moved = (translation - pose[:, :, 3]).square().sum(1) / MOVE**2
    turned = (rotation - pose[:, :, :3]).square().sum((1, 2)) / (2 * torch.tensor(TURN).deg2rad() ** 2)
    return (moved + turned).mean()


@torch.no_grad()
def median_errors(model: PoseRegressor, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Metres and degrees."""
    metres, degrees = [], []
    for batch in batches:
        translation, rotation = model(batch["image"])
        metres.append((translation - batch["pose"][:, :, 3]).norm(dim=1))
        # |R1 - R2| = sqrt(8) sin(angle / 2), which is accurate for small angles too.
        chord = (rotation - batch["pose"][:, :, :3]).flatten(1).norm(dim=1)
        degrees.append(torch.rad2deg(2 * torch.asin((chord / 8**0.5).clamp(max=1))))
    return float(torch.cat(metres).median()), float(torch.cat(degrees).median())


def make_views(options: argparse.Namespace, device: torch.device) -> tuple[RandomViewDataset, list[dict[str, Tensor]]]:
    """The views to train on, and the batches of others to test with."""
    lit = procedural.lit_room(options.gaussians, options.seed)
    scene = procedural.appearance_room(lit=lit).to(device)
    place = procedural.room_cameras(1, options.width, options.height)
    references = torch.cat([lit.images(place.resize(192, 108), hour) for hour in LIGHTINGS])
    around = Cameras(place.viewmats.repeat(4, 1, 1), place.Ks.repeat(4, 1, 1), place.width, place.height)
    sampler = PoseSampler(MOVE, TURN, "uniform_sphere")
    given = {
        "images": references.to(device),  # as many as cameras, so each camera has its own
        "batch_size": options.batch,
        "postprocess": PostProcess(clamp=(0.0, 1.0), mean=MEAN, std=STD),
        "where": options.where,
    }
    views = RandomViewDataset(
        scene, around, sampler, views_per_epoch=options.views, refresh_every=options.refresh, seed=options.seed, **given
    )
    with RandomViewDataset(scene, around, sampler, views_per_epoch=256, seed=options.seed + 1, **given) as others:
        return views, list(others)


def train(
    model: PoseRegressor, views: RandomViewDataset, tests: list[dict[str, Tensor]], options: argparse.Namespace
) -> tuple[list[float], list[tuple[float, float]]]:
    """The loss of every step, and the median errors before and after each epoch."""
    device = model.origin.device
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    steps = options.epochs * -(-len(views) // options.accumulate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps)
    losses, errors = [], [median_errors(model, tests)]
    for epoch in range(options.epochs):
        begin, summed = time.perf_counter(), torch.zeros((), device=device)
        for i, batch in enumerate(views):
            with torch.autocast(device.type, half):
                translation, rotation = model(batch["image"])
            # An epoch's last step may have fewer batches.
            parts = min(options.accumulate, len(views) - i // options.accumulate * options.accumulate)
            loss = pose_loss(translation, rotation, batch["pose"]) / parts
            scaler.scale(loss).backward()
            summed += loss.detach()
            if (i + 1) % options.accumulate == 0 or i + 1 == len(views):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(float(summed))
                summed.zero_()
        seconds = time.perf_counter() - begin
        errors.append(median_errors(model, tests))
        print(
            f"epoch {epoch + 1:3}: loss {losses[-1]:.3f}, median error {errors[-1][0]:.3f} m and {errors[-1][1]:.2f} "
            f"degrees, {options.views / seconds:.0f} views/s"
        )
    return losses, errors


def above_rendering(device: torch.device) -> contextlib.AbstractContextManager:
    """A GPU's rendering has CUDA's lowest priority, which is the default stream's too: a stream that goes first."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device, priority=-1)
    stream.wait_stream(torch.cuda.current_stream(device))  # where the model and the test views were made
    return torch.cuda.stream(stream)


def plot(path: Path, losses: list[float], errors: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    axes[0].plot(range(1, len(losses) + 1), losses, color="#3a6ea5", linewidth=1)
    axes[0].set(title="Loss in training", xlabel="step", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    for axis, values, unit in zip(axes[1:], zip(*errors, strict=True), ("metres", "degrees"), strict=True):
        axis.plot(values, color="#3a6ea5", marker="o", markersize=3)
        axis.set(title="Median error on unseen views", xlabel="epoch", ylabel=unit, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.axhline(values[0], color="#888888", linewidth=1, linestyle="--")
        axis.annotate(
            "always the same pose", (len(values) - 1, values[0]), (0, -4), textcoords="offset points",
            ha="right", va="top", color="#666666", fontsize=8,
        )  # fmt: skip
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pose_regressor.png"), help="the plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--where", default="thread", help='who renders: "thread", "process" or a device such as cuda:1')
    parser.add_argument("--quick", action="store_true", help="a smaller scene, smaller pictures, fewer views")
    for name, full, quick in SIZES:
        parser.add_argument(f"--{name}", type=type(full), help=f"default {full}, with --quick {quick}")
    parser.add_argument("--accumulate", type=int, default=2, help="batches for each step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, full, quick in SIZES:
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(f"the plot needs matplotlib ({error}): pip install matplotlib")

    begin = time.perf_counter()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    views, tests = make_views(options, device)
    origin = torch.linalg.inv(procedural.room_cameras(1).viewmats[0])[:3]
    model = PoseRegressor(origin, options.width, options.height).to(device)
    with views, above_rendering(device):
        losses, errors = train(model, views, tests, options)
    plot(options.out, losses, errors)
    for when, (metres, degrees) in (("before", errors[0]), ("after", errors[-1])):
        print(f"median error {when} training: {metres:.3f} m, {degrees:.2f} degrees")
    print(f"{options.out}: the plot; {time.perf_counter() - begin:.0f} s in all")


SIZES = (
    ("gaussians", 60_000, 5000),
    ("width", 192, 96),
    ("height", 108, 54),
    ("views", 1024, 320),
    ("batch", 16, 16),
    ("epochs", 40, 12),
    ("refresh", 1, 2),
    ("rate", 2e-3, 3e-3),
)


if __name__ == "__main__":
    main()
