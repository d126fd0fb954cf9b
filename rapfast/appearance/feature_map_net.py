"""RAP's feature-map network: a UNet on ResNet18 that turns a reference image into maps of features.

RAP runs it on one image at a time and never in eval mode, so each of its BatchNorms divides by the statistics of
that one image. That is instance normalisation with BatchNorm's affine parameters, which does not mix images, so
here a batch of images gives what the images give one by one. The running statistics in a state dict are carried
along, for RAP to find again, and not used.

Residual blocks: He et al. 2016 (arXiv 1512.03385), table 1, 18 layers. UNet: Ronneberger et al. 2015. The wiring and
the names follow RAP (Li et al., ICCV 2025); docs/appearance.md has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapfast import _check as check
from rapfast._native import _C as native
from rapfast.appearance.feature_map_cuda import LONGEST_SIDE, deterministic_cudnn, make_maps
from rapfast.appearance.state_dict import check_shapes, check_state, without_compile_prefix

MAP_CHANNELS = 48
"""Channels of a feature map: three maps of 16."""

_SMALLEST = 33
"""Pixels that the longer side needs: with fewer, the deepest layer is one pixel, which has no variance."""


class PerImageNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance of each image's channel.

    Entries and names are BatchNorm2d's. Statistics of half-precision input are taken in float32.
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, H, W] -> the same shape, dtype and memory format."""
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        scale = (var + self.eps).rsqrt() * self.weight.to(wide.dtype)[:, None, None]
        # Not x * scale + (bias - mean * scale), which cancels where the mean is large beside the deviation.
        return ((wide - mean) * scale + self.bias.to(wide.dtype)[:, None, None]).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = PerImageNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = PerImageNorm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, PerImageNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class ConvPair(nn.Module):
    """Twice: 3x3 convolution, norm, ReLU."""

    def __init__(self, channels_in: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=bias),
            PerImageNorm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            PerImageNorm(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FeatureMapNet(nn.Module):
    """Reference images [R, 3, H, W] in 0..1 -> feature maps [R, 48, ceil(H/2), ceil(W/2)], read as 3 maps of 16.

    Plain torch, differentiable, float32, float64 or (on a GPU, best with `.to(memory_format=torch.channels_last)`)
    float16. No ImageNet normalisation: the images go in as they are.

    Args:
        pair_bias: whether the decoder's 3x3 convolutions have biases. They change nothing (the norm behind them
            subtracts them again), but a state dict has them or not; `from_state_dict` sees which.
    """

    def __init__(self, *, pair_bias: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            PerImageNorm(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            _layer(64, 64, stride=1),
            _layer(64, 128, stride=2),
            _layer(128, 256, stride=2),
            _layer(256, 512, stride=2),
        )
        self.decoder = nn.ModuleList()
        for channels_in, channels, skip in ((512, 256, 256), (256, 128, 128), (128, 64, 64), (64, 64, 64)):
            self.decoder.append(nn.ConvTranspose2d(channels_in, channels, 2, stride=2))
            self.decoder.append(ConvPair(channels + skip, channels, pair_bias))
        self.final_conv = nn.Conv2d(64, MAP_CHANNELS, 1)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], source: str = "state") -> FeatureMapNet:
        """The network with the weights of RAP's `map_generator.pth`, in eval mode and without gradients.

        Args:
            state: names to tensors; a compiled module's `_orig_mod.` prefix is taken off.
            source: opens the error sentences.

        Raises:
            TypeError, ValueError: it is no such state dict; every entry that is missing, unknown or of another
                shape is named. Running statistics may be absent.
        """
        kept = check_state(state, source)
        net = cls(pair_bias="decoder.1.conv.0.bias" in kept)
        own = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
        check_shapes({name: own[name] for name in own if "running_" in name} | kept, _shapes(own), source)
        dtype = kept["final_conv.weight"].dtype
        net.to(dtype if dtype in (torch.float16, torch.float64) else torch.float32)
        net.load_state_dict(state, strict=False)
        return net.eval().requires_grad_(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`, also for the state dict of a compiled module (prefix `_orig_mod.`)."""
        return super().load_state_dict(without_compile_prefix(state_dict), *args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """[R, 3, H, W], of the parameters' dtype -> [R, 48, ceil(H/2), ceil(W/2)].

        The bits may depend on R, since convolution libraries choose their algorithm by it; `feature_maps` fixes it.
        """
        stem = self.encoder[0](images)
        layer1 = self.encoder[4](self.encoder[3](torch.relu(self.encoder[1](stem))))
        layer2 = self.encoder[5](layer1)
        layer3 = self.encoder[6](layer2)
        x = self.encoder[7](layer3)
        # The last step is taken twice, with the same weights: at the size of layer 1 and at that of the stem.
        for step, skip in ((0, layer3), (2, layer2), (4, layer1), (6, layer1), (6, stem)):
            x = F.interpolate(self.decoder[step](x), size=skip.shape[2:], mode="nearest")
            x = self.decoder[step + 1](torch.cat([x, skip], dim=1))
        return self.final_conv(x)

    def feature_maps(self, images: Tensor | Sequence[Tensor], *, precision: str | None = None) -> Tensor | list[Tensor]:
        """The feature maps of reference images, made in one canonical way.

        Bit by bit, an image's maps do not depend on the images beside it. Every image goes through the network alone,
        by deterministic algorithms, or, with "fp16", in a batch of a size that its own size alone decides: cuDNN
        chooses and rounds by batch size, and in some sizes by an image's place. `forward` takes any batch.

        On a GPU up to 8 images run side by side in a CUDA graph, which is made when a size has come up a few times and
        kept for the 4 latest sizes (at 854x480 0.9 GB with "fp16", 1.2 GB with "fp32"). Weights may change in between,
        but not through `parameter.data`, which nobody can see. Where a gradient is asked for, the module runs on each
        image as it stands.

        Args:
            images: [R, 3, H, W] floating point in 0..1, on the network's device; one side at least 33 pixels. Or a
                sequence of [3, H, W], which may differ in size.
            precision: "fp16" is float16 maps and convolutions with float32 sums and statistics, on a GPU only, at
                most 6400 pixels a side. "fp32" is the float32 module itself; whether its convolutions use TF32, as
                RAP's do, is for `torch.backends` to say. None is "fp16" for a float32 or float16 network on a GPU
                that is asked for no gradient, and else the network's own dtype.

        Returns:
            [R, 48, ceil(H/2), ceil(W/2)]; for a sequence, a list of [48, h, w]. On a GPU channels last.

        Raises:
            TypeError, ValueError: naming what was expected and what came.
            NotImplementedError: "fp16" on a CPU, in a build without CUDA, or where a gradient is asked for.
        """
        batched = isinstance(images, Tensor)
        checked = [self._checked("images", images, 4)] if batched else [
            self._checked(f"images[{i}]", image, 3)[None] for i, image in enumerate(images)
        ]  # fmt: skip
        half = self._in_half(precision, checked)
        made = self._by_size(checked, half)
        return made[0] if batched else [one[0] for one in made]

    def _in_half(self, precision: str | None, images: Sequence[Tensor]) -> bool:
        """Whether `precision` means float16 kernels here; raises where it cannot be had."""
        weight = self.final_conv.weight
        check.choice("precision", precision, ("fp16", "fp32", None))
        if precision == "fp32":
            if weight.dtype != torch.float32:
                raise ValueError(f'precision="fp32" takes a float32 network, got {check.describe(weight)}')
            return False
        wants_gradient = self._wants_gradient(images)
        if precision is None and not (
            weight.is_cuda and weight.dtype in (torch.float32, torch.float16) and not wants_gradient
        ):
            return False
        if not weight.is_cuda:
            raise NotImplementedError(f'precision="fp16" runs on a GPU, the network is on {weight.device}: use "fp32"')
        if wants_gradient:
            raise NotImplementedError('precision="fp16" has no backward: use "fp32", or torch.no_grad()')
        if not hasattr(native, "map_stats_cuda"):
            raise NotImplementedError(
                'precision="fp16" needs a rapfast built with CUDA: install it where nvcc is found '
                '(RAPFAST_CUDA=1 pip install -e .), or use "fp32"'
            )
        longest = max((max(image.shape[-2:]) for image in images), default=0)
        if longest > LONGEST_SIDE:
            raise ValueError(
                f'precision="fp16" takes images of at most {LONGEST_SIDE} pixels a side, got {longest}: use "fp32"'
            )
        return True

    def _wants_gradient(self, images: Sequence[Tensor]) -> bool:
        if not torch.is_grad_enabled():  # before the walk over all parameters, which takes 0.2 ms
            return False
        return any(tensor.requires_grad for tensor in (*images, *self.parameters()))

    def _checked(self, name: str, image: Any, dims: int) -> Tensor:
        weight = self.final_conv.weight
        shape = "[R, 3, H, W]" if dims == 4 else "[3, H, W]"
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor {shape} in 0..1, got {check.describe(image)}")
        if image.dim() != dims or image.shape[-3] != 3 or max(image.shape[-2:]) < _SMALLEST or 0 in image.shape[-2:]:
            raise ValueError(
                f"{name} must be {shape} with one side of at least {_SMALLEST} pixels, got {check.describe(image)}"
            )
        if image.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device} (as the network), got {check.describe(image)}")
        return image

    def _by_size(self, batches: Sequence[Tensor], half: bool) -> list[Tensor]:
        """Maps of batches [n, 3, H, W], those of a size together."""
        places: dict[torch.Size, list[int]] = {}
        for i, batch in enumerate(batches):
            places.setdefault(batch.shape[1:], []).append(i)
        made: dict[int, Tensor] = {}
        for those in places.values():
            maps = self._one_size(torch.cat([batches[i] for i in those]) if len(those) > 1 else batches[those[0]], half)
            made.update(zip(those, maps.split([len(batches[i]) for i in those]), strict=True))
        return [made[i] for i in range(len(batches))]

    def _one_size(self, images: Tensor, half: bool) -> Tensor:
        weight = self.final_conv.weight
        if len(images) == 0:
            height, width = (-(-side // 2) for side in images.shape[-2:])
            return weight.new_empty((0, MAP_CHANNELS, height, width), dtype=torch.float16 if half else weight.dtype)
        if weight.is_cuda and not self._wants_gradient([images]):
            return make_maps(self, images, half=half)
        with deterministic_cudnn():
            return torch.cat([self(image) for image in images.to(weight.dtype).split(1)])


def _layer(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels_in, channels, stride), ResidualBlock(channels, channels, 1))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
