"""What an avatar system plugs in: identity, motion and background of a video, and what follows the rasterizer.

A `Provider` is the model, a `Video` one tracked video. Everything here that does not depend on a camera is asked for
once, however many parameter sets are rendered: the model once, a video once, each of its frames once.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check

from .compositing import composite


@dataclass(frozen=True, eq=False)
class Identity:
    """What belongs to the person and to no frame; kept once for a whole video.

    Attributes:
        opacities: [N] in 0..1.
        colors: features [N, D], the first three of which are RGB with white at 1; or, with `sh_degree`,
            spherical-harmonics coefficients [N, K, 3].
        sh_degree: 0..4, or None where `colors` are features.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    opacities: Tensor
    colors: Tensor
    sh_degree: int | None = None

    def __post_init__(self) -> None:
        check.floating_tensor("opacities", self.opacities, "[N]")
        if self.opacities.dim() != 1:
            raise ValueError(f"opacities must be [N], got {check.describe(self.opacities)}")
        n = len(self.opacities)
        if n and not (self.opacities.amin() >= 0 and self.opacities.amax() <= 1):
            low, high = self.opacities.aminmax()
            raise ValueError(f"opacities must be within 0..1, as after a sigmoid; got {low:g} to {high:g}")
        shape = (n, "D") if self.sh_degree is None else (n, "K", 3)
        check.tensor_like("colors", self.colors, [shape], self.opacities, "opacities")
        if self.sh_degree is None and self.colors.shape[1] < 3:
            raise ValueError(f"colors must have at least the three channels of RGB, got {check.describe(self.colors)}")
        if self.sh_degree is not None:
            bases = (check.integer("sh_degree", self.sh_degree, 0, 4) + 1) ** 2
            if self.colors.shape[1] < bases:
                raise ValueError(
                    f"colors must be [N, K, 3], K at least {bases} for sh_degree {self.sh_degree}, got "
                    f"{check.describe(self.colors)}"
                )

    @property
    def n_channels(self) -> int:
        """Channels of a rendered image."""
        return self.colors.shape[-1]

    def to(self, device: torch.device) -> Identity:
        """The same on a device, in float32 and contiguous."""
        opacities, colors = (t.to(device, torch.float32).contiguous() for t in (self.opacities, self.colors))
        return Identity(opacities, colors, self.sh_degree)


@dataclass(frozen=True, eq=False)
class Motion:
    """Where the Gaussians are in one frame: means [N, 3] and scales [N, 3] (standard deviations) in world units, quats
    [N, 4] wxyz of any norm but zero."""

    means: Tensor
    quats: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """The camera that a video's parameter sets start from, and the point that they turn around.

    Attributes:
        viewmat: [4, 4] world to camera, OpenCV axes (x right, y down, z forward).
        K: [3, 3] intrinsics in pixels, pixel centres at +0.5.
        width, height: of the images, pixels.
        target: [3] in world units (metres), in front of the camera: the person's head or chest.

    Raises:
        ValueError: a shape is another, a value is not finite, or `target` lies behind the camera.
    """

    viewmat: np.ndarray
    K: np.ndarray
    width: int
    height: int
    target: np.ndarray

    def __post_init__(self) -> None:
        for name, shape in (("viewmat", (4, 4)), ("K", (3, 3)), ("target", (3,))):
            value = getattr(self, name)
            value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            array = np.array(value, dtype=np.float64)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name} must be {list(shape)} finite numbers, got {check.describe(array)}")
            object.__setattr__(self, name, array)
        for name in ("width", "height"):
            check.integer(name, getattr(self, name), 1, check.MAX_IMAGE_SIZE, " pixels")
        depth = (self.viewmat @ [*self.target, 1.0])[2]
        if depth <= 0:
            raise ValueError(f"target must lie in front of the camera, got a point {-depth:g} behind it")


class Video:
    """One tracked video, loaded. Derive from it, or give any object with these attributes and methods.

    Attributes:
        n_frames: at least 1.
        fps: frames per second of the films; None: 30.
        viewpoint: the camera to start from.
        identity: its tensors on any device; the job keeps them once on its own.
    """

    n_frames: int
    fps: float | None = None
    viewpoint: Viewpoint
    identity: Identity

    def target(self, frame: int) -> Any:
        """What the tracker knows of a frame, as `deform` and `background` want it. Called once for each frame."""
        return None

    def deform(self, frame: int, target: Any) -> Motion:
        """The Gaussians of a frame, on any device. Called once for each frame."""
        raise NotImplementedError(f"{type(self).__name__} must define deform(frame, target)")

    def background(self, frame: int, target: Any) -> Tensor:
        """What stands behind the person, [height, width, 3] uint8, or floating in 0..1. Called once for each frame."""
        raise NotImplementedError(f"{type(self).__name__} must define background(frame, target)")

    def close(self) -> None:
        """Called when the video is done with, whether it succeeded or not."""


class Provider:
    """An avatar system. Derive from it, and define at least `load_video`.

    Attributes:
        near_plane, alpha_cap: of the rasterizer; INRIA's, which GUAVA has, are 0.2 and 0.99.
        refine_batch: images that `refine` gets in one call, always as many: the last call is filled up with zeros. A
            network's last bits depend on the size of its batch, which is therefore the same in every mode.
    """

    near_plane: float = 0.01
    alpha_cap: float = 0.999
    refine_batch: int = 4

    def load_model(self, device: torch.device) -> None:
        """Load networks, once in a process. Called before the first video, and not at all where nothing is to do."""

    def check_video(self, name: str) -> None:
        """Raise OSError or ValueError where a video cannot be there. Called before anything is loaded; quick."""

    def load_video(self, name: str) -> Video:
        """Identity and tracking of a video, once."""
        raise NotImplementedError(f"{type(self).__name__} must define load_video(name)")

    def refine(self, features: Tensor, alphas: Tensor, seeds: Sequence[int]) -> Tensor:
        """RGB [B, 3, H, W] with white at 1 of rendered features [B, D, H, W] and alphas [B, 1, H, W].

        The features are premultiplied: each channel is the sum of weight x feature, 0 where nothing is. The result is
        not: it is multiplied by alpha once, afterwards. Noise must be drawn from generators of the `seeds`, one for
        each image, which depend on video, set and frame alone. Without this method the first three features are shown
        as they are.
        """
        raise NotImplementedError(f"{type(self).__name__} has no refiner")

    def composite(self, pictures: Tensor, alphas: Tensor, backgrounds: Tensor, *, premultiplied: bool) -> Tensor:
        """Finished frames [F, S, 3, H, W] of pictures [F, S, 3, H, W] and alphas [F, S, 1, H, W] over backgrounds
        [F, H, W, 3]. By default `rapfast.augment.composite`, which applies alpha once."""
        return composite(pictures, alphas, backgrounds, premultiplied=premultiplied)

    def cameras(
        self, viewpoint: Viewpoint, difficulty: Any, n_frames: int, fps: float, seed: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """World-to-camera matrices [F, 4, 4] and intrinsics [F, 3, 3] of a parameter set.

        By default `rapfast.augment.fixed_viewpoint`. Must depend on its arguments alone.
        """
        from .viewpoints import fixed_viewpoint

        return fixed_viewpoint(viewpoint, difficulty, n_frames, fps, seed)

    def describe(self) -> dict[str, Any]:
        """All of the provider that decides the films, as JSON: films made with another are not taken up. Without this
        method the command compares its --provider_args."""
        return {}

    @property
    def refines(self) -> bool:
        """Whether this provider has a refiner: whether it defines `refine`."""
        return type(self).refine is not Provider.refine

    @property
    def draws_cameras(self) -> bool:
        """Whether cameras are rapfast's, drawn from the difficulties' ranges: whether `cameras` is not defined."""
        return type(self).cameras is Provider.cameras


def load_provider(spec: str, tracked_root: str | None, arguments: Mapping[str, Any]) -> Provider:
    """The provider of "disk", "synthetic" or "module:object".

    The object is a `Provider`, or what makes one: a class or function, called with the arguments by name, and with
    `tracked_root` where it takes that.

    Raises:
        ImportError, ValueError, TypeError: it cannot be found, or it is none.
    """
    known = {"disk": "rapfast.augment.disk:DiskProvider", "synthetic": "rapfast.augment.synthetic:SyntheticProvider"}
    module_name, colon, object_name = known.get(spec, spec).partition(":")
    if not (module_name and colon and object_name):
        raise ValueError(f"provider must be disk, synthetic or MODULE:OBJECT, got {spec!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"provider {spec}: {module_name} cannot be imported: {error}") from error
    for part in object_name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"provider {spec}: {module_name} has no {object_name}")
        found = getattr(found, part)
    if isinstance(found, Provider):
        if arguments:
            raise ValueError(f"provider {spec} is made already and takes no arguments, got {', '.join(arguments)}")
        return found
    if not callable(found):
        raise TypeError(f"provider {spec} must be a rapfast.augment.Provider, or make one, got {check.describe(found)}")
    made = found(**_fitting(spec, found, tracked_root, arguments))
    if not isinstance(made, Provider):
        raise TypeError(f"provider {spec} must make a rapfast.augment.Provider, got a {type(made).__name__}")
    return made


def _fitting(spec: str, make: Any, tracked_root: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in arguments if not takes_all and name not in names]
    if unknown:
        known = ", ".join(name for name in names if name != "tracked_root") or "none"
        raise ValueError(f"provider {spec} has no argument {unknown[0]!r}; it takes {known}")
    found = dict(arguments)
    if tracked_root is not None:
        if not takes_all and "tracked_root" not in names:
            raise ValueError(f"provider {spec} reads no files: leave out the tracked root, got {tracked_root!r}")
        found["tracked_root"] = tracked_root
    missing = [p.name for p in parameters if p.default is p.empty and p.name in names and p.name not in found]
    if missing:
        raise ValueError(f"provider {spec} needs {missing[0]}")
    return found
