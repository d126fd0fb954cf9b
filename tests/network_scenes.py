"""Scenes with a fused colour network, the forms in which it runs, and how far each may be from float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from appearance_scenes import RAP_WIDTHS, Appearance, net_state
from appearance_scenes import make_appearance as make_unrounded
from torch import Tensor, nn

from rapfast import Scene
from rapfast.appearance import ColorNet, EmbeddingScene, RapScene
from rapfast.appearance.features import map_coordinates

Widths = dict[str, tuple[int, ...]]


class Form(NamedTuple):
    """A device and a precision."""

    device: torch.device
    dtype: torch.dtype
    half: bool

    @property
    def precision(self) -> str | None:
        """As the scenes' `render` takes it."""
        return "fp16" if self.half else None if self.dtype == torch.float64 else "fp32"


CPU64 = Form(torch.device("cpu"), torch.float64, False)
CPU32 = Form(torch.device("cpu"), torch.float32, False)
CUDA32 = Form(torch.device("cuda"), torch.float32, False)
CUDA16 = Form(torch.device("cuda"), torch.float32, True)

FORMS = [
    pytest.param(CPU64, id="cpu float64"),
    pytest.param(CPU32, id="cpu float32"),
    pytest.param(CUDA32, id="cuda fp32", marks=pytest.mark.cuda),
    pytest.param(CUDA16, id="cuda fp16", marks=pytest.mark.cuda),
]
FAST_FORMS = FORMS[1:]  # those of float32 inputs

WIDTHS: dict[str, Widths] = {
    "RAP": RAP_WIDTHS,
    "one layer each": {"encoder": (159, 20), "decoder": (68, 33), "color_decoder": (36, 3)},
    "odd": {"encoder": (159, 1, 130, 7), "decoder": (55, 17, 100, 3), "color_decoder": (6, 15, 31, 3)},
    "widest": {"encoder": (159, 256, 256, 129), "decoder": (177, 255, 241), "color_decoder": (244, 200, 3)},
    "just narrow": {"encoder": (159, 128, 128), "decoder": (176, 127), "color_decoder": (130, 128, 3)},
}


def make_appearance(*arguments: Any, **options: Any) -> Appearance:
    """A scene whose numbers are those of float32, so that nothing but the arithmetic differs between the forms."""
    return Appearance(*(tensor.float().double() for tensor in make_unrounded(*arguments, **options)))


def to(a: Appearance, form: Form) -> Appearance:
    return Appearance(*(tensor.to(form.device, form.dtype) for tensor in a))


def tame(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with its last layer halved: colours of order 1, as the fp16 bound supposes."""
    last = max(name for name in state if name.startswith("color_decoder") and name.endswith("weight"))
    return state | {name: state[name] / 2 for name in (last, last.replace("weight", "bias"))}


def color_net(form: Form, widths: Widths = RAP_WIDTHS, seed: int = 5, **options: Any) -> ColorNet:
    state = net_state(widths, seed)
    if "color_decoder" in widths:
        state = tame(state)
    return ColorNet.from_state_dict(state, **options).to(form.device, form.dtype)


def rap_scene(a: Appearance, net: ColorNet, form: Form, config: dict[str, Any] | None = None) -> RapScene:
    """Of these Gaussians. Feature maps are given, so no network makes any."""
    a = to(a, form)
    scene = Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=a.intrinsic)
    return RapScene(scene, a.box_coord, nn.Identity(), net.to(form.device, form.dtype), config or {})


def embedding_scene(a: Appearance, net: ColorNet, form: Form) -> EmbeddingScene:
    a = to(a, form)
    scene = Scene(a.means, a.quats, a.scales, a.opacities, intrinsic=a.intrinsic)
    return EmbeddingScene(scene, net.to(form.device, form.dtype))


def near_border(a: Appearance, view: int, band: float = 1e-5) -> Tensor:
    """[N] bool: in which of a view's Gaussians fp16's places, computed in float32, may fall on the other side of the
    projected map's border."""
    grown = a.box_coord[:, 2] * (1 + band)
    shrunk = a.box_coord[:, 2] * (1 - band)
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[:2, 2] = band * float(a.Ks[view, :2].abs().max())
    sides = [
        map_coordinates(a.means, box, a.viewmats[view], a.Ks[view] + sign * shift)[1]
        for box in (grown, shrunk)
        for sign in (-1, 1)
    ]
    return torch.stack(sides).any(0) & ~torch.stack(sides).all(0)


def assert_colors(got: Tensor, want: Tensor, form: Form, border: Tensor | None = None) -> None:
    """Numbers [M, D] of a network against float64: 1e-10 in float64, 1e-5 in float32, in fp16 at most 2e-2 in all
    but a thousandth, each relative to the colours' size (at least 1).

    In fp16 rows marked in `border` [M] may be anything; they are at most one in a hundred.
    """
    got, want = got.detach().cpu().double(), want.detach().cpu()
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    assert want.dtype == torch.float64
    if want.numel() == 0:
        return
    assert bool(got.isfinite().all()) and bool(want.isfinite().all())
    scale = max(1.0, float(want.abs().max()))
    error = (got - want).abs()
    if not form.half:
        allowed = 1e-10 if form.dtype == torch.float64 else 1e-5
        assert float(error.max()) <= allowed * scale, f"errs by {float(error.max()):.2e} of {scale:.2f}"
        return
    if border is not None:
        border = border.cpu()
        assert int(border.sum()) <= math.ceil(0.01 * len(border))
        error, want = error[~border], want[~border]
    size = max(1.0, float(want.square().mean().sqrt()))
    worst = error.flatten().sort().values
    k = min(len(worst) - 1, math.ceil(0.999 * len(worst)) - 1)
    assert float(worst[k]) <= 2e-2 * size, f"errs by {float(worst[k]):.2e} at the 99.9th percentile, size {size:.2f}"
    assert float(worst[-1]) <= 6e-2 * size
    assert float(worst.mean()) <= 3e-3 * size


def psnr(got: Tensor, want: Tensor) -> float:
    """Of pictures whose colours are of order 1, in decibels."""
    mean_square = float((got.cpu().double() - want.cpu().double()).square().mean())
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


__all__ = [
    "CPU32", "CPU64", "CUDA16", "CUDA32", "FAST_FORMS", "FORMS", "WIDTHS", "Appearance", "Form", "assert_colors",
    "color_net", "embedding_scene", "make_appearance", "near_border", "net_state", "psnr", "rap_scene", "to",
]  # fmt: skip
