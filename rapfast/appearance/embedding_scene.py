"""Gaussians whose colours come from a network and one embedding per view."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rapfast import _check as check
from rapfast import ops
from rapfast._call_arguments import BACKENDS, RENDER_MODES
from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.color_records import NetColors, uncompiled_on_gpu
from rapfast.appearance.fused import Prepared, PreparedNetworks, half_precision
from rapfast.appearance.net_outputs import NetInputs
from rapfast.appearance.view_inputs import (
    check_weights,
    refuse_precision,
    wants_gradient,
    weight_tensor,
    weights_like,
)
from rapfast.meta import Meta
from rapfast.postprocess import PostProcess
from rapfast.rasterization import rasterization, rasterize_colored, rasterize_network
from rapfast.scene import Scene


@dataclass(eq=False)
class EmbeddingScene:
    """N Gaussians coloured by a `ColorNet` that is fed an embedding of the view in place of sampled maps.

    Attributes:
        scene: geometry and `intrinsic` [N, 16, 3].
        color_net: `n_appearance` is the embedding's length E; with a colour head of 3 outputs; of the scene's
            dtype and device.

    Raises:
        ValueError: the network does not fit the scene.
    """

    scene: Scene
    color_net: ColorNet
    _networks: PreparedNetworks = field(default_factory=PreparedNetworks, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise where the parts do not fit each other: they may be replaced at any time, and kernels read memory."""
        scene, net = self.scene, self.color_net
        if scene.intrinsic is None:
            raise ValueError("scene must have intrinsic features [N, 16, 3], it has none")
        weight = net.encoder.lin0.weight
        if weight.dtype != scene.dtype or weight.device != scene.device:
            raise ValueError(
                f"color_net must be {scene.dtype} on {scene.device} (as the scene), got {check.describe(weight)}"
            )
        if net.n_intrinsic != 48:
            raise ValueError(f"color_net must take 48 intrinsic features, got {net.n_intrinsic}")
        if net.color_decoder is None or net.color_decoder.widths[-1] != 3:
            raise ValueError("color_net must have a colour head with 3 outputs")

    def __len__(self) -> int:
        """N, the number of Gaussians."""
        return len(self.scene)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EmbeddingScene:
        """A copy on another device or in another floating dtype, the network included."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        net = copy.deepcopy(self.color_net).to(device=device, dtype=dtype)
        return EmbeddingScene(self.scene.to(device=device, dtype=dtype), net)

    def prepare(self, precision: str | None = None) -> Prepared:
        """Compute now, and not in the first `render`, what does not depend on the view; see `RapScene.prepare`."""
        self._check_parts()
        half = half_precision(precision, self.scene.means)
        return self._networks.get(
            self.color_net, self.scene.means, self.scene.intrinsic, part="all", output="color", sh_degree=0, half=half
        )

    @uncompiled_on_gpu
    def render(
        self,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        *,
        embeddings: Tensor,
        view_weights: Tensor | list[float] | float | None = None,
        backgrounds: Tensor | None = None,
        rasterize_mode: str = "antialiased",
        render_mode: str = "RGB",
        near_plane: float = 0.01,
        far_plane: float = 1e10,
        radius_clip: float = 0.0,
        eps2d: float = 0.3,
        packed: bool = True,
        alpha_cap: float = 0.999,
        postprocess: PostProcess | None = None,
        precision: str | None = None,
        backend: str = "rapfast",
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Meta | dict[str, Any]]:
        """Render C views, each with its own embedding and weight.

        Args:
            embeddings: [C, E], of the scene's dtype and device.
            view_weights: [C] finite numbers that scale the embedding, or one for all views; None is 1.
            The others, what comes back and the errors: as `RapScene.render`.
        """
        self._check_parts()
        scene = self.scene
        check.choice("backend", backend, BACKENDS)
        viewmats = check.tensor_like("viewmats", viewmats, [("C", 4, 4)], scene.means, "the scene")
        c = len(viewmats)
        Ks = check.tensor_like("Ks", Ks, [(c, 3, 3)], scene.means, "the scene")
        shape = (c, self.color_net.n_appearance)
        embeddings = check.tensor_like("embeddings", embeddings, [shape], scene.means, "the scene")
        weights = check_weights(view_weights, c, scene.means)
        geometry = scene.means, scene.quats, scene.scales, scene.opacities
        options = {
            "near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip, "eps2d": eps2d,
            "packed": packed, "render_mode": render_mode, "rasterize_mode": rasterize_mode, "alpha_cap": alpha_cap,
            "postprocess": postprocess, "max_memory": max_memory,
        }  # fmt: skip
        if backend == "rapfast":
            trained = wants_gradient(scene.means, scene.intrinsic, self.color_net.tensors())
            wanted = trained or wants_gradient(*geometry, viewmats, Ks, backgrounds, embeddings, view_weights)
            half = half_precision(precision, scene.means)

            def native() -> tuple[ops.Network, ops.NetworkInput]:
                fed = torch.tensor(weights, dtype=torch.float64, device="cpu")
                given = ops.NetworkInput("embedding", fed, features=embeddings.detach().contiguous())
                return self.prepare(precision).network, given

            # On the CPU a compiler can trace the call with a graph, whose stages look at nothing, and that alone.
            if wanted or is_compiling():
                # On the CPU a network that changes at every step is made for the Gaussians that are seen.
                in_full = not is_compiling() and (not trained or scene.means.is_cuda)
                inputs = NetInputs(
                    self.color_net.weights(), scene.means, viewmats, Ks, scene.intrinsic,
                    weight_tensor(view_weights, weights), "embedding", features=embeddings, half=half,
                    network=replace(self.prepare(precision).network, output="raw") if in_full else None,
                )  # fmt: skip
                stage = NetColors(inputs, check.choice("render_mode", render_mode, RENDER_MODES), native)
                return rasterize_colored(*geometry, viewmats, Ks, backgrounds, width, height, stage, **options)
            return rasterize_network(*geometry, viewmats, Ks, backgrounds, width, height, *native(), **options)

        refuse_precision(precision, backend)
        if render_mode in ("D", "ED") or c == 0:
            colors = scene.means.new_zeros((c, len(scene), 3))
        else:
            weights = weights_like(view_weights, weights, scene.means)
            colors = torch.stack([
                self.color_net.colors(scene.means, embeddings[i], scene.intrinsic, viewmats[i], weights[i])
                for i in range(c)
            ])  # fmt: skip
        return rasterization(
            *geometry, colors, viewmats, Ks, width, height, backgrounds=backgrounds, backend=backend, **options
        )
