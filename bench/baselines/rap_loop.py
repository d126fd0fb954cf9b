"""RAP's own way to a view, in plain torch and gsplat 1.5.3: what rapfast's appearance path is measured against.

Written from RAP's formulas and file layout (docs/appearance.md), shared with nothing in `rapfast.appearance`, so that
a change there cannot move the baseline. As its users run it: one view at a time; a UNet with BatchNorm in train mode
on the one reference image; both networks in float32 with TF32 matmuls; the colour network on all N Gaussians;
`torch.compile` of the two networks (RAP's default) or not.

What RAP also does and is left out, to the baseline's advantage: activations of the raw parameters at each render, its
own camera classes, of which nothing but the matrices is made here, and copies of reference images to the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# --- the UNet --------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """ResNet18's residual block."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + identity)


class DoubleConv(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in (n_in, n_out):
            layers += [nn.Conv2d(n, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MapGenerator(nn.Module):
    """[1, 3, H, W] in 0..1 -> [1, 48, ceil(H/2), ceil(W/2)]; stays in train mode, as RAP leaves it."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        layers = [nn.Sequential(BasicBlock(n, m, stride), BasicBlock(m, m, 1)) for n, m, stride in widths]
        self.encoder = nn.Sequential(*stem, *layers)
        self.decoder = nn.ModuleList()
        for n_in, n_up, n_cat in ((512, 256, 512), (256, 128, 256), (128, 64, 128), (64, 64, 128)):
            self.decoder.extend([nn.ConvTranspose2d(n_in, n_up, 2, 2), DoubleConv(n_cat, n_up)])
        self.final_conv = nn.Conv2d(64, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, layer in enumerate(self.encoder):
            x = layer(x)
            if i in (0, 4, 5, 6):
                skips.append(x)  # raw stem, layers 1, 2, 3
        raw, one, two, three = skips
        for i, skip in ((0, three), (2, two), (4, one), (6, one), (6, raw)):
            x = F.interpolate(self.decoder[i](x), size=skip.shape[2:], mode="nearest")
            x = self.decoder[i + 1](torch.cat([x, skip], dim=1))
        return self.final_conv(x)


# --- the colour network ----------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.n = len(widths) - 1
        for i in range(self.n):
            setattr(self, f"lin{i}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.n):
            x = getattr(self, f"lin{i}")(x)
            if i < self.n - 1:
                x = F.relu(x)
        return x


class ColorNet(nn.Module):
    """Positions [N, 3], sampled features [N, 48], intrinsic ones [N, 48] and directions [N, 3] -> RGB [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Mlp(159, 128, 96, 64, 48)
        self.decoder = Mlp(96, 48, 48, 48)
        self.color_decoder = Mlp(51, 48, 3)

    def forward(self, means: Tensor, sampled: Tensor, intrinsic: Tensor, directions: Tensor) -> Tensor:
        encoded = [means]
        for k in range(10):
            encoded += [torch.sin(means * 2.0**k), torch.cos(means * 2.0**k)]
        x = self.encoder(torch.cat([*encoded, sampled, intrinsic], dim=-1))
        x = self.decoder(torch.cat([x, intrinsic], dim=-1))
        return self.color_decoder(torch.cat([x, directions], dim=-1))


# --- render and loop -------------------------------------------------------------------------------------------------


class Camera(NamedTuple):
    """One view, as RAP's camera objects hold it: everything is on the device before `render` is called."""

    viewmat: Tensor  # [4, 4] world to camera
    K: Tensor  # [3, 3] pixels
    center: Tensor  # [3]
    width: int
    height: int

    @classmethod
    def make(cls, pose: Tensor, K: Tensor, width: int, height: int, like: Tensor) -> Camera:
        """Of a camera-to-world pose [3, 4] and K on the CPU, with dtype and device of ``like``."""
        matrix = torch.cat([pose, pose.new_tensor([[0.0, 0.0, 0.0, 1.0]])]).to(like.dtype)
        viewmat = torch.linalg.inv(matrix)
        return cls(viewmat.to(like.device), K.to(like), matrix[:3, 3].to(like.device), width, height)


class Networks(NamedTuple):
    """RAP's two networks, ready to run."""

    map_generator: Callable[[Tensor], Tensor]
    color_net: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def load(
        cls, map_generator: Mapping[str, Tensor], color_net: Mapping[str, Tensor], like: Tensor, compiled: bool = False
    ) -> Networks:
        """From state dicts as RAP saves them, with dtype and device of ``like``.

        compiled: RAP's default, `torch.compile` of both.
        """
        nets = []
        for kind, state in ((MapGenerator, map_generator), (ColorNet, color_net)):
            net = kind().to(dtype=like.dtype, device=like.device)
            net.load_state_dict(state)
            net.train().requires_grad_(False)
            # A user has one N and one image size, so each gets code of its own, which dynamic shapes would not.
            nets.append(torch.compile(net, dynamic=False) if compiled else net)
        return cls(*nets)


class RapLoop:
    """A scene as RAP renders it.

    Args:
        means, quats, scales, opacities: [N, 3], [N, 4], [N, 3], [N], after activation.
        intrinsic: [N, 16, 3]. box_coord: [N, 3, 2].
        networks: of the same dtype and device.
        rasterize: called as gsplat's ``rasterization``; None is gsplat's own.
    """

    def __init__(
        self,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        intrinsic: Tensor,
        box_coord: Tensor,
        networks: Networks,
        rasterize: Callable[..., Any] | None = None,
    ) -> None:
        if rasterize is None:
            from gsplat import rasterization as rasterize
        self.rasterize = rasterize
        self.means, self.quats, self.scales, self.opacities = means, quats, scales, opacities
        self.intrinsic = intrinsic.flatten(1)  # column 3 k + c, as the network takes it
        self.box_coord = box_coord
        self.networks = networks

    def feature_maps(self, image: Tensor) -> Tensor:
        """[3, H, W] -> [48, ceil(H/2), ceil(W/2)]."""
        return self.networks.map_generator(image[None])[0]

    def sampled_features(self, maps: Tensor, camera: Camera) -> Tensor:
        """[N, 48]: two maps at learned coordinates, the third where the camera sees the Gaussian."""
        maps = maps.unflatten(0, (3, 16))
        fixed = F.grid_sample(
            maps[:2], self.box_coord[:, :2].transpose(0, 1)[:, None], padding_mode="border", align_corners=False
        )  # [2, 16, 1, N]
        fixed = fixed[:, :, 0].permute(2, 0, 1).flatten(1)
        in_camera = self.means @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        u, v, z = (in_camera @ camera.K.T).unbind(-1)
        xy = torch.stack([u, v], -1) / (z + 1e-2)[:, None]
        window = self.box_coord[:, 2].flip(-1)  # (width, height)
        valid = (xy > 0).all(-1) & (xy < window).all(-1) & (z > 0)
        grid = (xy / (window / 2) - 1)[valid]
        seen = F.grid_sample(maps[2:], grid[None, None], padding_mode="border", align_corners=False)
        projected = xy.new_zeros(len(xy), 16)
        projected[valid] = seen[0, :, 0].T
        return torch.cat([fixed, projected], dim=-1)

    def render(
        self,
        camera: Camera,
        background: Tensor,
        image: Tensor | None = None,
        maps: Tensor | None = None,
        view_weight: float = 1.0,
    ) -> dict[str, Any]:
        """One view, with the reference image [3, H, W] or with the feature maps [48, h, w] made of it.

        Returns:
            "render" [3, H, W], "viewspace_points", "visibility_filter" [N], "radii" [N] and "depth", as RAP's.
        """
        if maps is None:
            maps = self.feature_maps(image)
        appearance = self.sampled_features(maps, camera) * view_weight
        offset = self.means - camera.center
        directions = offset / (offset.norm(dim=-1, keepdim=True) + 1e-5)
        colors = self.networks.color_net(self.means, appearance, self.intrinsic, directions)
        images, _, meta = self.rasterize(
            means=self.means, quats=self.quats, scales=self.scales, opacities=self.opacities, colors=colors,
            viewmats=camera.viewmat[None], Ks=camera.K[None], width=camera.width, height=camera.height,
            near_plane=0.01, far_plane=1e10, eps2d=0.3, packed=False, backgrounds=background[None],
            render_mode="RGB", rasterize_mode="antialiased",
        )  # fmt: skip
        radii = meta["radii"][0].amax(-1)
        return {
            "render": images[0].permute(2, 0, 1),
            "viewspace_points": meta["means2d"],
            "visibility_filter": radii > 0,
            "radii": radii,
            "depth": None,
        }


class ToNetworkInput:
    """The end of RAP's loop: [3, H, W] on the device -> normalised [3, h, w] on the CPU, waited for."""

    def __init__(self, size: tuple[int, int], like: Tensor) -> None:
        self.size = size
        self.mean = like.new_tensor(IMAGENET_MEAN)[:, None, None]
        self.std = like.new_tensor(IMAGENET_STD)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        small = F.interpolate(image[None], size=self.size, mode="bilinear", align_corners=False)[0]
        return ((small - self.mean) / self.std).cpu()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether matmuls and convolutions may round their float32 inputs to TF32; RAP's scripts allow both."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = allowed
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
