"""RAP's appearance path: its cases, its data, and the ways to a batch of views that are compared.

A scene is bench/scenes.py's room with seeded networks of RAP's widths, untrained: He-initialised, so that every layer
passes on what it is given, with colours of about 0.5 +- 0.2. Each view has a reference image of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rapfast
from bench import cases
from bench.baselines import rap_loop
from bench.baselines.rap_loop import IMAGENET_MEAN, IMAGENET_STD, Camera, Networks, RapLoop, ToNetworkInput
from rapfast import PostProcess, Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene
from rapfast.appearance.fused import fused_layers
from rapfast.rvs import FeatureMapCache, RandomViewSynthesizer, ReferenceMaps


class Case(NamedTuple):
    """A scene and the batches in which each path is measured.

    Paths: "rap", what RAP's ``render`` does, from cameras to images on the device; "rap-loop", random-view synthesis:
    from camera-to-world poses on the CPU to what RAP's pose regressor is trained with, resized, normalised, on the CPU.
    Reference images are on the device in both.
    """

    geometry: cases.Case
    network_size: tuple[int, int]  # (height, width) of the pose regressor's input
    batches: tuple[tuple[str, tuple[int, ...]], ...]  # by path

    @property
    def name(self) -> str:
        return self.geometry.name


def _case(n: int, name: str, size: tuple[int, int], network_size: tuple[int, int], **batches: tuple[int, ...]) -> Case:
    by_path = tuple((path.replace("_", "-"), numbers) for path, numbers in batches.items())
    largest = max(max(numbers) for _, numbers in by_path)
    name = f"rap-room-{name}-{size[0]}x{size[1]}"
    return Case(cases.Case(name, "room", n, *size, batches=(largest,)), network_size, by_path)


FULL = (
    _case(200_000, "200k", (854, 480), (240, 427), rap=(8,), rap_loop=(8, 32)),
    _case(500_000, "500k", (854, 480), (240, 427), rap=(8, 32), rap_loop=(8, 32)),
    _case(1_500_000, "1.5M", (854, 480), (240, 427), rap=(8,), rap_loop=(8, 32)),
)
REDUCED = (_case(25_000, "25k", (107, 60), (30, 53), rap=(2,), rap_loop=(2,)),)
CASES = {"full": FULL, "reduced": REDUCED}

BASELINES = ("rap-eager", "rap-compiled", "rap-eager-maps", "rap-compiled-maps")


def backends(batch: int, device: str) -> tuple[str, ...]:
    """In order of running. RAP's loop with its maps given is shown beside the others in the batch of 8."""
    if device == "cpu":
        return ("reference", "rapfast", "rapfast-maps")
    return (*BASELINES[: 4 if batch == 8 else 2], "rapfast", "rapfast-maps")


# --- data ------------------------------------------------------------------------------------------------------------


def network_states(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of RAP's feature-map network and colour network, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets = rap_loop.MapGenerator(), rap_loop.ColorNet()
        for net in nets:
            for module in net.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.bias, std=0.1)
        last = nets[1].color_decoder.lin1
        with torch.no_grad():
            last.weight *= 0.2
            last.bias += 0.5
    return nets[0].state_dict(), nets[1].state_dict()


class Workload(NamedTuple):
    """A case's data on one device."""

    case: Case
    geometry: cases.Workload
    rap: RapScene
    images: Tensor  # [C, 3, H, W] float32 in 0..1, each view's reference image
    view_weights: list[float]
    loops: dict[bool, RapLoop]  # by whether it is compiled; float32
    cameras: list[Camera]
    poses: Tensor  # [C, 3, 4] float64 on the CPU, camera to world
    K: Tensor  # [3, 3] on the CPU, of all views
    kept: dict[str, Any]  # what has been made of the images so far, by name

    def views(self, batch: int, first: int = 0) -> dict[str, Any]:
        """What `RapScene.render` takes of ``batch`` views from ``first`` on, feature maps aside."""
        cameras, rows = self.geometry.cameras, slice(first, first + batch)
        return {
            "viewmats": cameras.viewmats[rows],
            "Ks": cameras.Ks[rows],
            "width": cameras.width,
            "height": cameras.height,
            "view_weights": self.view_weights[rows],
        }

    def camera(self, path: str, i: int) -> Camera:
        """RAP's camera of view ``i``."""
        if path == "rap":
            return self.cameras[i]
        size = self.geometry.cameras.width, self.geometry.cameras.height
        return Camera.make(self.poses[i], self.K, *size, self.images)

    def maps(self, backend: str, batch: int) -> Tensor:
        """Feature maps [batch, 48, h, w] of the first reference images as a backend makes them, which are then kept."""
        name = backend.removesuffix("-maps")
        if name not in self.kept:
            if name == "rapfast":
                self.kept[name] = self.rap.feature_maps(self.images)
            else:
                loop = self.loops[name == "rap-compiled"]
                self.kept[name] = torch.stack([loop.feature_maps(image) for image in self.images])
        return self.kept[name][:batch]


@lru_cache(maxsize=1)
def _compiled(device: str) -> Networks:
    """One pair for all cases: the larger network does not depend on N, and is compiled once."""
    return Networks.load(*network_states(), torch.empty(0, device=device), compiled=True)


@lru_cache(maxsize=1)
def workload(case: Case, device: str) -> Workload:
    """The case on ``device``; one is kept at a time."""
    geometry = cases.workload(case.geometry, device)
    scene, cameras, n = geometry.scene, geometry.cameras, len(geometry.scene)
    generator = torch.Generator().manual_seed(1)
    intrinsic = (2 * torch.rand(n, 16, 3, generator=generator) - 1).to(device)
    box_coord = 2 * torch.rand(n, 3, 2, generator=generator) - 1
    box_coord[:, 2] = torch.tensor([float(cameras.height), float(cameras.width)])
    box_coord = box_coord.to(device)
    coarse = torch.rand(len(cameras), 3, 30, 54, generator=generator).to(device)
    images = F.interpolate(coarse, (cameras.height, cameras.width), mode="bilinear")
    view_weights = [2 * ((0.3 + 0.618034 * i) % 1.0) for i in range(len(cameras))]  # even over 0 .. 2 for any number

    map_state, color_state = network_states()
    shape = scene.means, scene.quats, scene.scales, scene.opacities
    rap = RapScene(
        Scene(*shape, None, intrinsic),
        box_coord,
        FeatureMapNet.from_state_dict(map_state).to(device),
        ColorNet.from_state_dict(color_state).to(device),
    )
    # without a GPU the loop is the judge of the pixels alone, and draws with the plain-torch rasterizer
    rasterize = None if device == "cuda" else partial(rapfast.rasterization, backend="reference")
    networks = {False: Networks.load(map_state, color_state, scene.means)}
    if device == "cuda":
        networks[True] = _compiled(device)
    loops = {key: RapLoop(*shape, intrinsic, box_coord, nets, rasterize) for key, nets in networks.items()}
    poses, K = torch.linalg.inv(cameras.viewmats.cpu().double())[:, :3], cameras.Ks[0].cpu()
    assert (cameras.Ks == cameras.Ks[0]).all()  # a scene of RAP's has one camera
    own_cameras = [Camera.make(pose, K, cameras.width, cameras.height, images) for pose in poses]
    return Workload(case, geometry, rap, images, view_weights, loops, own_cameras, poses, K, {})


# --- the ways to a batch of views ------------------------------------------------------------------------------------


def renderer(work: Workload, path: str, batch: int, backend: str) -> Callable[[], Any]:
    """A call that makes the first `n_views` views from their reference images, or from kept feature maps ("-maps").

    It returns, from rapfast and the reference, [batch, H, W, 3] on the device for the path "rap" and [C, 3, h, w] on
    the CPU for "rap-loop", of all C views of the case; from RAP's loop a generator of [3, H, W] or [3, h, w], one view
    at a time.
    """
    maps = work.maps(backend, n_views(work, path, batch, backend)) if backend.endswith("-maps") else None
    if backend.startswith("rap-"):
        return partial(_baseline, work, path, batch, work.loops[backend.startswith("rap-compiled")], maps)
    if path == "rap":
        return partial(_rapfast, work, batch, maps, "reference" if backend == "reference" else "rapfast")
    if backend == "reference":
        return partial(_reference_loop, work, batch)
    return _synthesis(work, batch, maps)


def _baseline(work: Workload, path: str, batch: int, loop: RapLoop, maps: Tensor | None) -> Any:
    background = work.images.new_zeros(3)
    finish = ToNetworkInput(work.case.network_size, background) if path == "rap-loop" else _as_it_is
    for i in range(batch):
        source = {"image": work.images[i]} if maps is None else {"maps": maps[i]}
        package = loop.render(work.camera(path, i), background, view_weight=work.view_weights[i], **source)
        yield finish(package["render"])


def _as_it_is(image: Tensor) -> Tensor:
    return image


def n_views(work: Workload, path: str, batch: int, backend: str) -> int:
    """Views that a renderer's call makes. rapfast's loop goes through all of the case in batches, as a loop would:
    one is copied to the CPU while the next is made."""
    return batch if path == "rap" or backend.startswith("rap-") else len(work.images)


def _rapfast(work: Workload, batch: int, maps: Tensor | None, backend: str, **more: Any) -> Tensor:
    if maps is None:
        maps = work.rap.feature_maps(work.images[:batch])
    more |= {"backgrounds": work.images.new_zeros(batch, 3), "rasterize_mode": "antialiased", "backend": backend}
    return work.rap.render(**work.views(batch), feature_maps=maps, **more)[0]


def _synthesis(work: Workload, batch: int, maps: Tensor | None) -> Callable[[], Tensor]:
    """`RandomViewSynthesizer.render` of all views. Where there are no maps it keeps none, so that each call makes all
    of them; an image's values are looked at in the first call alone."""
    references = maps
    if maps is None:
        cache = FeatureMapCache(work.rap, gpu_bytes=0)
        references = ReferenceMaps(work.rap, work.images, cache=cache, by_number=True)
    cameras = work.geometry.cameras
    views = RandomViewSynthesizer(
        work.rap, work.K, (cameras.height, cameras.width), references, work.case.network_size, batch_size=batch,
        destination="pinned",
    )  # fmt: skip
    poses, weights = work.poses.numpy(), work.view_weights
    return lambda: views.render(poses, weights).images


def _reference_loop(work: Workload, batch: int) -> Tensor:
    """All views by the plain-torch renderer, batch by batch."""
    post = PostProcess(work.case.network_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, layout="CHW")
    parts = []
    for first in range(0, len(work.images), batch):
        images = work.images[first : first + batch]
        maps = work.rap.feature_maps(images)
        views = work.views(len(images), first)
        parts.append(work.rap.render(**views, feature_maps=maps, backend="reference", postprocess=post)[0].cpu())
    return torch.cat(parts)


def pictures(path: str, drawn: Any) -> Tensor:
    """What a renderer's call returned, as images [C, H, W, 3] whose colours are not normalised."""
    images = drawn if isinstance(drawn, Tensor) else torch.stack(list(drawn))
    if path == "rap":
        return images if images.shape[-1] == 3 else images.permute(0, 2, 3, 1)
    images = images.permute(0, 2, 3, 1)
    return images * images.new_tensor(IMAGENET_STD) + images.new_tensor(IMAGENET_MEAN)


def exact(work: Workload, path: str, batch: int) -> Tensor:
    """The pictures by RAP's loop without TF32, eager, which all others are compared with."""
    with rap_loop.tf32(False):
        return pictures(path, _baseline(work, path, batch, work.loops[False], None))


def strict(work: Workload, batch: int) -> Tensor:
    """rapfast's pictures in its precision "fp32", from float32 feature maps of RAP's own network without TF32."""
    with rap_loop.tf32(False):
        maps = torch.stack([work.loops[False].feature_maps(work.images[i]) for i in range(batch)])
    return _rapfast(work, batch, maps, "rapfast", precision="fp32")


# --- what the colour stage cannot do without -------------------------------------------------------------------------

BYTES_PER_SECOND, FP16_FLOPS = 4.25e12, 790e12
"""What an NVIDIA H200 was measured to reach: a copy on the device (read and written), and 16-bit matrix products."""


class ColorWork(NamedTuple):
    """The fused colour stage's work for one view."""

    records: float
    bytes: float
    operations: float  # a multiply-add is two

    @property
    def floor_ms(self) -> float:
        """The time below which no GPU of the ceilings above can do it: the longer of moving and computing."""
        return 1e3 * max(self.bytes / BYTES_PER_SECOND, self.operations / FP16_FLOPS)


def color_work(net: ColorNet, records: float, value_size: int = 2) -> ColorWork:
    """Work to colour a view of so many records, a record being a visible Gaussian.

    The layers are the kernel's, without its padding: those with no ReLU between them are one, and what depends on the
    Gaussian alone (position and intrinsic features, with the biases) is read as the base row. Bytes: base row and 4
    taps of 16 features in each of 3 maps, ``value_size`` bytes a number; mean, box coordinates, the Gaussian's index
    and the colour written, 4 bytes a number; the weights once.
    """
    layers = fused_layers(net)
    macs = sum(layer.inputs.numel() + (layer.direction.numel() if layer.direction.any() else 0) for layer in layers)
    base = sum(len(layer.constant) for layer in layers if layer.own.any())
    per_record = value_size * (base + 3 * 4 * 16) + 4 * (3 + 6 + 1 + 3)
    return ColorWork(records, records * per_record + value_size * macs, 2.0 * records * macs)
