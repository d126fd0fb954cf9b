"""Fits Gaussians to posed pictures, with gsplat's own densification driving rapfast.

    python examples/fit_scene.py --out fitted_room                         # rapfast
    python examples/fit_scene.py --out fitted_room --backend gsplat rapfast # on a GPU: both, and what each takes

The pictures are renders of the procedural room from a closed path and from its viewpoints; every eighth is held out.
The fit begins at a cloud of points as photogrammetry gives one: some of the room's, moved by a few centimetres, with
colours of degree 0. `gsplat.DefaultStrategy` (or, on a GPU, `MCMCStrategy`) reads what `rapfast.rasterization` returns
as it reads gsplat's own. What is printed: PSNR of the held-out views before and after, and the time of the steps.
`fitted_room/` gets the scene, and `pictures.png`: held-out views, the cloud as it begins, and the fit of each backend.
Ctrl-C ends the fit with the step at hand, and what has been fitted by then is kept.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rapfast
from rapfast import Cameras, Scene, media, procedural

RATES = {"means": 1.6e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 2.5e-3 / 20}
"""Adam's for each parameter, those of the positions for a scene of radius 1 (Kerbl et al. 2023)."""

RADIUS = 4.0  # metres
HELD_OUT = 8


def make_pictures(options: argparse.Namespace, device: torch.device) -> tuple[Scene, Cameras, Tensor]:
    """The room, cameras in it, and what they see [C, H, W, 3]."""
    room = procedural.room(options.gaussians, options.seed).to(device)
    size = options.width, options.height
    path, places = procedural.room_orbit(options.views, *size), procedural.room_cameras(options.views // 2, *size)
    cameras = Cameras(
        torch.cat([path.viewmats, places.viewmats]).to(device), torch.cat([path.Ks, places.Ks]).to(device), *size
    )
    with torch.no_grad():
        pictures = [
            rapfast.rasterization(
                room.means, room.quats, room.scales, room.opacities, room.sh, viewmats, Ks, *size, sh_degree=3,
                rasterize_mode="antialiased",
            )[0].clamp(0, 1)
            for viewmats, Ks in zip(cameras.viewmats.split(8), cameras.Ks.split(8), strict=True)
        ]  # fmt: skip
    return room, cameras, torch.cat(pictures)


def make_cloud(room: Scene, n: int, seed: int) -> torch.nn.ParameterDict:
    """n points of the room, a few centimetres off, as Gaussians as wide as the way to their neighbours."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(room), generator=g)[:n].to(room.device)
    means = room.means[chosen] + 0.02 * torch.randn(len(chosen), 3, generator=g).to(room.device)
    nearest = [torch.cdist(part, means).topk(4, largest=False).values[:, 1:] for part in means.split(1024)]
    width = torch.cat(nearest).mean(1)
    sh = torch.zeros(len(chosen), 16, 3, device=room.device)
    sh[:, 0] = room.sh[chosen, 0]
    return torch.nn.ParameterDict({
        "means": means,
        "scales": width.clamp(1e-3, 0.5).log()[:, None].repeat(1, 3),
        "quats": F.normalize(torch.randn(len(chosen), 4, generator=g)).to(room.device),
        "opacities": torch.full((len(chosen),), 0.1, device=room.device).logit(),
        "sh0": sh[:, :1],
        "shN": sh[:, 1:],
    })  # fmt: skip


def draw(
    splats: torch.nn.ParameterDict, viewmats: Tensor, Ks: Tensor, cameras: Cameras, backend: str, **options: object
) -> tuple[Tensor, Tensor, dict]:
    colors = torch.cat([splats["sh0"], splats["shN"]], 1)
    return rapfast.rasterization(
        splats["means"], splats["quats"], splats["scales"].exp(), splats["opacities"].sigmoid(), colors, viewmats, Ks,
        cameras.width, cameras.height, backend=backend, **options,
    )  # fmt: skip


@torch.no_grad()
def views_of(splats: torch.nn.ParameterDict, cameras: Cameras, backend: str) -> Tensor:
    """[C, H, W, 3] of all cameras, in 0..1."""
    parts = zip(cameras.viewmats.split(8), cameras.Ks.split(8), strict=True)
    return torch.cat([draw(splats, *part, cameras, backend, sh_degree=3)[0].clamp(0, 1) for part in parts])


def psnr(images: Tensor, pictures: Tensor) -> float:
    """Decibels, the mean over the views."""
    return float((-10 * (images - pictures).square().mean((1, 2, 3)).log10()).mean())


def make_strategy(name: str, steps: int, n_most: int, grow: float) -> tuple[object, dict]:
    """gsplat's strategy and its state: refinement in the first half of the steps."""
    from gsplat import DefaultStrategy, MCMCStrategy

    every = max(steps // 70, 20)
    timing = {"refine_start_iter": steps // 15, "refine_stop_iter": steps // 2, "refine_every": every}
    if name == "mcmc":
        strategy = MCMCStrategy(cap_max=n_most, **timing)
        return strategy, strategy.initialize_state()
    strategy = DefaultStrategy(grow_grad2d=grow, reset_every=max(steps // 3, 1000), **timing)
    return strategy, strategy.initialize_state(scene_scale=RADIUS)


def fit(
    splats: torch.nn.ParameterDict, cameras: Cameras, pictures: Tensor, backend: str, options: argparse.Namespace
) -> tuple[int, float]:
    """Fits `splats` in place; returns how many steps there were, and the seconds that they took."""
    optimizers = {
        name: torch.optim.Adam([{"params": value, "lr": RATES[name] * (RADIUS if name == "means" else 1)}], eps=1e-15)
        for name, value in splats.items()
    }
    fall = 0.01 ** (1 / options.steps)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers["means"], fall)
    strategy, state = make_strategy(options.strategy, options.steps, options.gaussians, options.grow)
    strategy.check_sanity(splats, optimizers)
    chosen = torch.Generator().manual_seed(options.seed)
    synchronize(pictures.device)
    begin = time.perf_counter()
    for step in until_interrupted(options.steps):
        views = torch.randint(len(cameras), (options.batch,), generator=chosen).to(pictures.device)
        degree = min(3, 4 * step // options.steps)
        images, _, meta = draw(
            splats, cameras.viewmats[views], cameras.Ks[views], cameras, backend, sh_degree=degree, packed=False
        )
        if options.strategy == "default":
            strategy.step_pre_backward(splats, optimizers, state, step, meta)
        loss = (images - pictures[views]).abs().mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedule.step()
        more = {"lr": schedule.get_last_lr()[0]} if options.strategy == "mcmc" else {"packed": False}
        strategy.step_post_backward(splats, optimizers, state, step, meta, **more)
        if (step + 1) % max(options.steps // 10, 1) == 0:
            print(f"  {backend}, step {step + 1}: loss {loss.item():.4f}, {len(splats['means'])} Gaussians")
    synchronize(pictures.device)
    return step + 1, time.perf_counter() - begin


def until_interrupted(steps: int) -> Iterator[int]:
    """0, 1, ... `steps` - 1, or up to the one during which Ctrl-C is pressed: in the middle of a step the parameters
    may be of different lengths. Pressed once more, it ends the program."""
    pressed = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        for step in range(steps):
            yield step
            if pressed:
                print(f"interrupted: {step + 1} of {steps} steps were made")
                return
    finally:
        signal.signal(signal.SIGINT, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_scene(splats: torch.nn.ParameterDict) -> Scene:
    tensors = {name: value.detach().cpu() for name, value in splats.items()}
    return Scene(
        tensors["means"], F.normalize(tensors["quats"]), tensors["scales"].exp(), tensors["opacities"].sigmoid(),
        torch.cat([tensors["sh0"], tensors["shN"]], 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fitted_room"), help="folder for the scene and the picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", default=["rapfast"], choices=("rapfast", "gsplat", "reference"))
    parser.add_argument("--strategy", default="default", choices=("default", "mcmc"), help="mcmc needs a GPU")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer, for two CPU cores")
    for name, full, quick, what in SIZES:
        parser.add_argument(f"--{name}", type=type(full), help=f"{what}; default {full}, with --quick {quick}")
    parser.add_argument("--batch", type=int, default=1, help="views a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, full, quick, _ in SIZES:
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")

    try:
        import gsplat  # noqa: F401
    except ImportError as error:
        parser.error(f"the strategy is gsplat's ({error}): pip install 'rapfast[bench]'")
    device = torch.device(options.device)
    if device.type != "cuda" and (options.strategy == "mcmc" or "gsplat" in options.backend):
        parser.error(f"--strategy mcmc and --backend gsplat need a GPU, got --device {device}")
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    room, cameras, pictures = make_pictures(options, device)
    held_out = torch.arange(len(cameras), device=device) % HELD_OUT == 0
    train, test = (
        Cameras(cameras.viewmats[rows], cameras.Ks[rows], cameras.width, cameras.height)
        for rows in (~held_out, held_out)
    )
    shown = [0, len(test) - 1]
    rows = [pictures[held_out][shown]]
    for backend in options.backend:
        splats = make_cloud(room, options.points, options.seed)
        before = views_of(splats, test, backend)
        steps, seconds = fit(splats, train, pictures[~held_out], backend, options)
        after = views_of(splats, test, backend)
        rows += [before[shown], after[shown]] if len(rows) == 1 else [after[shown]]
        print(
            f"{backend}: PSNR of {len(test)} held-out views {psnr(before, pictures[held_out]):.2f} dB before, "
            f"{psnr(after, pictures[held_out]):.2f} dB after {steps} steps in {seconds:.1f} s "
            f"({1e3 * seconds / steps:.2f} ms a step), {len(splats['means'])} Gaussians"
        )
        rapfast.save_ply(as_scene(splats), options.out / f"{backend}.ply")
        if steps < options.steps:
            break
    sheet = [(255 * image + 0.5).to(torch.uint8).cpu().numpy() for k in range(len(shown)) for image in
             (row[k] for row in rows)]  # fmt: skip
    media.write_png(options.out / "pictures.png", media.contact_sheet(sheet, columns=len(rows)))
    print(f"{options.out}: the scene, and pictures.png with held-out views, the cloud and the fit")


SIZES = (
    ("gaussians", 200_000, 8000, "of the room"),
    ("points", 40_000, 2000, "of the cloud"),
    ("width", 854, 160, "pixels"),
    ("height", 480, 90, "pixels"),
    ("views", 96, 24, "on the path; half as many more about the room"),
    ("steps", 7000, 600, "of the optimizers"),
    ("grow", 4e-4, 1e-3, "gradient by image position above which DefaultStrategy grows a Gaussian"),
)

if __name__ == "__main__":
    main()
