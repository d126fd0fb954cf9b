"""A Gaussian scene in memory: the parameters of N Gaussians after activation.

Nothing here renders and nothing here reads files; `rapfast.io` fills a `Scene` and the renderer takes
its tensors one by one, so a scene made by any other means needs no more than these six fields.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

#: Number of spherical-harmonics coefficients per colour channel -> degree.
SH_DEGREE_OF_COUNT = {1: 0, 4: 1, 9: 2, 16: 3, 25: 4}


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"


@dataclass(eq=False)
class Scene:
    """Parameters of N Gaussians, all on one device and of one floating dtype.

    Attributes:
        means: [N, 3] centres in world coordinates.
        quats: [N, 4] rotations, w x y z. Unit length after loading, except that a zero quaternion in a file
            stays zero: the renderer culls such a Gaussian and counts it.
        scales: [N, 3] standard deviations along the Gaussian's axes, in world units (not logarithms).
        opacities: [N] in 0..1 (not logits).
        sh: [N, K, 3] spherical-harmonics coefficients of the colour, K = 1, 4, 9, 16 or 25, or None.
        intrinsic: [N, 16, 3] intrinsic appearance features of a RAP scene, or None.

    Raises:
        TypeError: a field is not a tensor of floating dtype.
        ValueError: a shape, dtype or device does not fit the others'.

    Values are not checked: the renderer culls and counts what is not finite (see `valid`).
    """

    means: torch.Tensor
    quats: torch.Tensor
    scales: torch.Tensor
    opacities: torch.Tensor
    sh: torch.Tensor | None = None
    intrinsic: torch.Tensor | None = None

    def __post_init__(self) -> None:
        means = self.means
        if not isinstance(means, torch.Tensor) or not means.is_floating_point():
            raise TypeError(f"means must be a floating-point tensor [N,3], got {_describe(means)}")
        if means.ndim != 2 or means.shape[1] != 3:
            raise ValueError(f"means must be [N,3], got {_describe(means)}")
        n = means.shape[0]
        kind = f"{str(means.dtype).removeprefix('torch.')}"
        expected = {"quats": (n, 4), "scales": (n, 3), "opacities": (n,), "intrinsic": (n, 16, 3)}
        for name, tensor in self._tensors():
            if name in expected:
                shape_text = "[" + ",".join(str(d) for d in expected[name]) + "]"
            else:
                shape_text = f"[{n},3]" if name == "means" else f"[{n},K,3] with K one of 1, 4, 9, 16, 25"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor {shape_text}, got {_describe(tensor)}")
            good = tensor.dtype == means.dtype and tensor.device == means.device
            if name in expected:
                good = good and tuple(tensor.shape) == expected[name]
            elif name == "sh":
                good = good and tensor.ndim == 3 and tensor.shape[0] == n and tensor.shape[2] == 3
                good = good and tensor.shape[1] in SH_DEGREE_OF_COUNT
            if not good:
                raise ValueError(f"{name} must be {kind} {shape_text} on {means.device}, got {_describe(tensor)}")

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        named = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, tensor) for name, tensor in named if tensor is not None or name not in ("sh", "intrinsic")]

    def __len__(self) -> int:
        """N, the number of Gaussians."""
        return int(self.means.shape[0])

    @property
    def sh_degree(self) -> int | None:
        """Degree 0..4 of `sh`, or None where the scene has no spherical harmonics."""
        return None if self.sh is None else SH_DEGREE_OF_COUNT[self.sh.shape[1]]

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Scene:
        """The same scene on another device or in another floating dtype; tensors that fit already are shared."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return Scene(**{name: tensor.to(device=device, dtype=dtype) for name, tensor in self._tensors()})

    def valid(self) -> torch.Tensor:
        """[N] bool: True where every value is finite, the scale not negative, the opacity within 0..1 and the
        quaternion not zero. A Gaussian outside this mask draws nothing or cannot be written to a file."""
        mask = torch.ones(len(self), dtype=torch.bool, device=self.device)
        for _, tensor in self._tensors():
            mask &= torch.isfinite(tensor).reshape(len(self), -1).all(dim=1) if len(self) else mask
        mask &= (self.scales >= 0).all(dim=1)
        mask &= (self.opacities >= 0) & (self.opacities <= 1)
        mask &= (self.quats != 0).any(dim=1)
        return mask

    def select(self, index: torch.Tensor | slice) -> Scene:
        """The Gaussians that `index` picks along N: a bool mask [N], an int64 index tensor, or a slice."""
        return Scene(**{name: tensor[index] for name, tensor in self._tensors()})

    def __repr__(self) -> str:
        colour = "no colour" if self.sh is None else f"SH degree {self.sh_degree}"
        extra = ", intrinsic features" if self.intrinsic is not None else ""
        return f"Scene({len(self):,} Gaussians, {colour}{extra}, {self.dtype}, {self.device})"
