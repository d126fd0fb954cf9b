"""A trained RAP scene: Gaussians whose colours come from a reference image, a view and a weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rapfast import _check as check
from rapfast import ops, reference
from rapfast._call_arguments import BACKENDS, RENDER_MODES
from rapfast.appearance import rap_files as files
from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.color_records import NetColors, uncompiled_on_gpu
from rapfast.appearance.feature_map_net import MAP_CHANNELS, FeatureMapNet
from rapfast.appearance.features import check_like_rap, map_coordinates, sample_features, view_directions
from rapfast.appearance.fused import Prepared, PreparedNetworks, half_precision, map_pixels
from rapfast.appearance.net_outputs import NetInputs, net_outputs
from rapfast.appearance.view_inputs import (
    check_map,
    check_map_ids,
    check_maps,
    check_weights,
    refuse_precision,
    wants_gradient,
    weight_tensor,
    weights_like,
)
from rapfast.io.files import PathLike
from rapfast.io.ply import load_ply
from rapfast.meta import Meta
from rapfast.postprocess import PostProcess
from rapfast.profiling import section
from rapfast.rasterization import rasterization, rasterize_colored, rasterize_network
from rapfast.scene import SH_DEGREE_OF_COUNT, Scene

REFUSED = ("use_decode_with_pos", "use_okmap")
"""Settings of cfg_args under which RAP colours by other formulas."""


@dataclass(eq=False)
class RapScene:
    """N Gaussians with RAP's appearance. `load_rap` makes one.

    Attributes:
        scene: geometry and `intrinsic` [N, 16, 3].
        box_coord: [N, 3, 2], see `sample_features`; dtype and device of the scene.
        feature_map_net: reference images to feature maps; of any floating dtype.
        color_net: 48 appearance and 48 intrinsic features to colours, or to spherical harmonics where
            `use_colors_precomp` is off; of the scene's dtype.
        config: what cfg_args says. Read here: `use_colors_precomp` (True where absent), `antialiasing` (True),
            `map_num` (3), `coord_scale` (1).
        iteration: of the training; names the folder that `save` writes.
        extras: entries of the files that are not used, by file name, so that `save` can give them back.
        colornet_inter_weight: RAP's name for the weight of a view, where `render_batch` and `render_view` are given
            none.
        decoded_cache: what `render_view(store_cache=True)` has kept, [N, F].

    Raises:
        TypeError, ValueError, NotImplementedError: naming the part that does not fit, or the setting that is refused.
    """

    scene: Scene
    box_coord: Tensor
    feature_map_net: FeatureMapNet
    color_net: ColorNet
    config: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    extras: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    colornet_inter_weight: float = 1.0
    decoded_cache: Tensor | None = field(default=None, init=False, repr=False)
    _networks: PreparedNetworks = field(default_factory=PreparedNetworks, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise where the parts do not fit each other. They may be replaced at any time, and kernels read memory."""
        self.coord_scale = _check_config(self.config)
        if self.scene.intrinsic is None:
            raise ValueError("scene must have intrinsic features [N, 16, 3] (f_intr_0..47 in the PLY), it has none")
        n, net = len(self.scene), self.color_net
        check.tensor_like("box_coord", self.box_coord, [(n, 3, 2)], self.scene.means, "the scene")
        weight = net.encoder.lin0.weight
        if weight.dtype != self.scene.dtype or weight.device != self.scene.device:
            raise ValueError(
                f"color_net must be {self.scene.dtype} on {self.scene.device} (as the scene), "
                f"got {check.describe(weight)}"
            )
        if (net.n_appearance, net.n_intrinsic) != (MAP_CHANNELS, 48):
            raise ValueError(
                f"color_net must take {MAP_CHANNELS} appearance and 48 intrinsic features, "
                f"got {net.n_appearance} and {net.n_intrinsic}"
            )
        if self.puts_out_sh:
            if net.decoder.widths[-1] not in [3 * count for count in SH_DEGREE_OF_COUNT]:
                raise ValueError(
                    f"color_net's decoder must put out 3, 12, 27, 48 or 75 SH numbers, got {net.decoder.widths[-1]}"
                )
        elif net.color_decoder is None or net.color_decoder.widths[-1] != 3:
            raise ValueError("color_net must have a colour head with 3 outputs where use_colors_precomp is on")

    @property
    def sh_degree(self) -> int:
        """Of the harmonics that the decoder puts out, where it does."""
        return SH_DEGREE_OF_COUNT[self.color_net.decoder.widths[-1] // 3]

    @property
    def puts_out_sh(self) -> bool:
        """Whether the network gives spherical harmonics (`use_colors_precomp` off)."""
        return not self.config.get("use_colors_precomp", True)

    def __len__(self) -> int:
        """N, the number of Gaussians."""
        return len(self.scene)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RapScene:
        """A copy on another device or in another floating dtype, networks included."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        nets = [copy.deepcopy(net).to(device=device, dtype=dtype) for net in (self.feature_map_net, self.color_net)]
        box_coord = self.box_coord.to(device=device, dtype=dtype)
        scene = self.scene.to(device=device, dtype=dtype)
        return RapScene(
            scene,
            box_coord,
            nets[0],
            nets[1],
            dict(self.config),
            self.iteration,
            self.extras,
            self.colornet_inter_weight,
        )

    def feature_maps(self, images: Tensor | Sequence[Tensor], *, precision: str | None = None) -> Tensor | list[Tensor]:
        """[R, 48, ceil(H/2), ceil(W/2)] of reference images [R, 3, H, W]; see `FeatureMapNet.feature_maps`."""
        with section("feature maps"):
            return self.feature_map_net.feature_maps(images, precision=precision)

    def decode(
        self,
        viewmat: Tensor,
        K: Tensor,
        feature_map: Tensor,
        view_weight: float | Tensor = 1.0,
        *,
        precision: str | None = None,
        backend: str = "rapfast",
        rap_compatible: bool = False,
    ) -> Tensor:
        """What RAP's `store_cache` keeps of a view: the decoder's output [N, F] of all Gaussians, F = 48 in RAP.

        Given to `render` as `decoded`, it keeps this view's appearance and projection in any other view.

        Args:
            viewmat, K: [4, 4] and [3, 3] of the view. feature_map: [48, h, w]. view_weight: a finite number or [].
            precision, backend: as in `render`; "gsplat" is "reference" here.
            rap_compatible: raise RAP's IndexError where exactly one Gaussian falls on the projected map.
        """
        self._check_parts()
        check.choice("backend", backend, BACKENDS)
        viewmat = check.tensor_like("viewmat", viewmat, [(4, 4)], self.scene.means, "the scene")
        K = check.tensor_like("K", K, [(3, 3)], self.scene.means, "the scene")
        check_map("feature_map", feature_map, self.scene)
        if isinstance(view_weight, Tensor):
            view_weight = view_weight.reshape(-1)
        weights = check_weights(view_weight, 1, self.scene.means)
        if check.flag("rap_compatible", rap_compatible):
            check_like_rap(map_coordinates(self.scene.means, self.box_coord[:, 2], viewmat, K)[1])
        if backend != "rapfast":
            refuse_precision(precision, backend)
            return self._decode(viewmat, K, feature_map, weights_like(view_weight, weights, self.scene.means)[0])
        half = half_precision(precision, self.scene.means)
        if is_compiling() or self.wants_gradient(viewmat, K, feature_map, view_weight):
            fed = [feature_map], [0], weight_tensor(view_weight, weights)
            return self._outputs_of_all(self._net_inputs("decode", viewmat[None], K[None], *fed, half))
        network = self._prepared("decode", "raw", half).network
        views = (viewmat.detach()[None, None].contiguous(), K.detach()[None, None].contiguous())
        given = self._network_input([feature_map], [0], weights, half)
        return ops.network_outputs(self.scene.means.detach()[None].contiguous(), *views, network, given)

    def prepare(self, precision: str | None = None) -> Prepared:
        """Compute now, and not in the first `render`, what of the colours does not depend on the view.

        Args:
            precision: that of the calls to come, as in `render`.

        Returns:
            what it took: memory in bytes (352 a Gaussian in fp16, with RAP's widths), seconds, and the
            multiply-adds left for each (view, Gaussian) pair. It is kept until the scene or its network changes.
        """
        self._check_parts()
        return self._prepared("all", "sh" if self.puts_out_sh else "color", half_precision(precision, self.scene.means))

    @uncompiled_on_gpu
    def render(
        self,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        *,
        feature_maps: Tensor | Sequence[Tensor] | None = None,
        decoded: Tensor | None = None,
        map_ids: Tensor | Sequence[int] | None = None,
        view_weights: Tensor | Sequence[float] | float | None = None,
        backgrounds: Tensor | None = None,
        rasterize_mode: str | None = None,
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
        rap_compatible: bool = False,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Meta | dict[str, Any]]:
        """Render C views, each with its own reference image, weight, projection and directions.

        The colour network runs on the visible (view, Gaussian) pairs alone. A view in a batch is bitwise the view
        alone, given the same maps.

        Args:
            viewmats: [C, 4, 4] world to camera (OpenCV). Ks: [C, 3, 3] pixels. Dtype and device of the scene.
            width, height: pixels.
            feature_maps: [R, 48, h, w] of R reference images, as `feature_maps` returns them, or a sequence of
                [48, h, w]; any floating dtype, on the scene's device. Maps whose memory is channels-last and whose
                dtype is that of the precision are read where they are, others copied.
            decoded: [N, F] or [C, N, F] from `decode`, in place of feature_maps, map_ids and view_weights (RAP's
                `use_cache`): the directions alone are the view's own.
            map_ids: [C] whole numbers 0 .. R - 1, the reference image of each view. May be left out where R is 1 or C.
            view_weights: [C] finite numbers that scale the appearance, or one for all views; None is 1. Numbers and
                CPU tensors are best: one on the GPU is read back, which waits for it.
            backgrounds: [C, 3] or [C, H, W, 3].
            rasterize_mode: "classic" or "antialiased"; None: what the scene was trained with.
            precision: of the colour network: "fp16" (GPU only: operands in half precision, sums in float32) or "fp32"
                (the scene's dtype throughout); None is "fp16" on a GPU and the scene's dtype on the CPU.
            backend: "rapfast"; or "reference" and "gsplat", which colour all Gaussians of all views in plain torch.
            rap_compatible: raise RAP's IndexError where exactly one of the N Gaussians falls on a view's projected
                map. With decoded none is sampled, and RAP does not raise either.
            render_mode, near_plane, far_plane, radius_clip, eps2d, packed, alpha_cap, postprocess, max_memory: as in
                `rapfast.rasterization`.

        Returns:
            colours [C, H, W, D], alphas [C, H, W, 1], meta, as `rapfast.rasterization` returns them. Colours are
            not clamped, those of spherical harmonics at 0 from below.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            NotImplementedError: precision="fp16" on the CPU; the network is wider or deeper than the kernels take (256,
                16 layers); max_memory where a gradient is wanted.
            IndexError: see rap_compatible.

        Differentiable, once, in every tensor of the scene, its network and the call: docs/appearance.md, "Training".
        """
        self._check_parts()
        scene, n = self.scene, len(self)
        check.choice("backend", backend, BACKENDS)
        check.choice("render_mode", render_mode, RENDER_MODES)
        if rasterize_mode is None:
            rasterize_mode = "antialiased" if self.config.get("antialiasing", True) else "classic"
        check.choice("rasterize_mode", rasterize_mode, ("classic", "antialiased"))
        viewmats = check.tensor_like("viewmats", viewmats, [("C", 4, 4)], scene.means, "the scene")
        c = len(viewmats)
        Ks = check.tensor_like("Ks", Ks, [(c, 3, 3)], scene.means, "the scene")
        maps, ids, weights = [], [], []
        if decoded is None:
            maps = check_maps(feature_maps, scene)
            ids = check_map_ids(map_ids, len(maps), c)
            weights = check_weights(view_weights, c, scene.means)
        else:
            for name, value in (("feature_maps", feature_maps), ("map_ids", map_ids), ("view_weights", view_weights)):
                if value is not None:
                    raise ValueError(f"{name} must be None where decoded is given, got {check.describe(value)}")
            width_out = self.color_net.decoder.widths[-1]
            shapes = [(n, width_out), (c, n, width_out)]
            decoded = check.tensor_like("decoded", decoded, shapes, scene.means, "the scene")
        if check.flag("rap_compatible", rap_compatible) and decoded is None:
            for viewmat, K in zip(viewmats, Ks, strict=True):
                check_like_rap(map_coordinates(scene.means, self.box_coord[:, 2], viewmat, K)[1])
        geometry = scene.means, scene.quats, scene.scales, scene.opacities
        options = {
            "near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip, "eps2d": eps2d,
            "packed": packed, "render_mode": render_mode, "rasterize_mode": rasterize_mode, "alpha_cap": alpha_cap,
            "postprocess": postprocess, "max_memory": max_memory,
        }  # fmt: skip

        if backend == "rapfast":
            half = half_precision(precision, self.scene.means)
            # On the CPU a compiler can trace the call with a graph, whose stages look at nothing, and that alone.
            with_graph = is_compiling() or self.wants_gradient(viewmats, Ks, backgrounds, decoded, maps, view_weights)
            if decoded is not None and self.puts_out_sh:  # they are the coefficients
                given = {"colors": decoded.unflatten(-1, (-1, 3)), "sh_degree": self.sh_degree}
                if with_graph:
                    return rasterize_colored(
                        *geometry, viewmats, Ks, backgrounds, width, height, None, **given, **options
                    )
                views = viewmats, Ks, width, height
                return rasterization(
                    *geometry, given["colors"], *views, backgrounds=backgrounds, sh_degree=self.sh_degree, **options
                )

            def native() -> tuple[ops.Network, ops.NetworkInput]:
                if decoded is None:
                    network = self._prepared("all", "sh" if self.puts_out_sh else "color", half).network
                    return network, self._network_input(maps, ids, weights, half)
                ones = torch.ones(c, dtype=torch.float64, device="cpu")
                given = ops.NetworkInput("features", ones, features=decoded.detach().contiguous())
                return self._prepared("head", "color", half).network, given

            if with_graph:
                fed = maps, ids, weight_tensor(view_weights, weights)
                inputs = self._net_inputs("all" if decoded is None else "head", viewmats, Ks, *fed, half, decoded)
                stage = NetColors(inputs, render_mode, native, self.puts_out_sh)
                return rasterize_colored(*geometry, viewmats, Ks, backgrounds, width, height, stage, **options)
            return rasterize_network(*geometry, viewmats, Ks, backgrounds, width, height, *native(), **options)

        refuse_precision(precision, backend)
        if render_mode in ("D", "ED"):
            colors = scene.means.new_zeros((n, 3))
        else:
            if decoded is None:
                weights = weights_like(view_weights, weights, scene.means)
                features = [self._decode(viewmats[i], Ks[i], maps[ids[i]], weights[i]) for i in range(c)]
            else:
                features = decoded.expand(c, n, decoded.shape[-1])
            views = [self._finish(features[i], viewmats[i]) for i in range(c)]
            colors = torch.stack(views) if views else scene.means.new_zeros((0, n, 3))
        return rasterization(
            *geometry, colors, viewmats, Ks, width, height, backgrounds=backgrounds, backend=backend, **options
        )

    def render_batch(self, cameras: Any, pipe: Any, bg_color: Tensor, **options: Any) -> list[Mapping[str, Any]]:
        """RAP's dictionaries for a list of RAP's cameras, all of one image size in one call; see
        `rapfast.appearance.rap_calls.render_batch`."""
        from rapfast.appearance import rap_calls  # it imports this module

        return rap_calls.render_batch(self, cameras, pipe, bg_color, **options)

    def render_view(self, camera: Any, pipe: Any, bg_color: Tensor, *args: Any, **options: Any) -> Mapping[str, Any]:
        """RAP's dictionary for one camera, with the arguments of RAP's own `render`; see
        `rapfast.appearance.rap_calls.render`."""
        from rapfast.appearance import rap_calls

        return rap_calls.render(self, camera, pipe, bg_color, *args, **options)

    def bake(self, camera: Any, weight: float | None = None, **options: Any) -> Any:
        """The scene as one view's reference image and weight colour it, with spherical harmonics for any viewer; see
        `rapfast.appearance.bake.bake`."""
        from rapfast.appearance.bake import bake

        return bake(self, camera, weight, **options)

    def _prepared(self, part: str, output: str, half: bool) -> Prepared:
        sh_degree = self.sh_degree if output == "sh" else 0
        part = "decode" if output == "sh" else part  # where there is a head, it is not used
        return self._networks.get(
            self.color_net, self.scene.means, self.scene.intrinsic,
            part=part, output=output, sh_degree=sh_degree, half=half,
        )  # fmt: skip

    def _network_input(
        self, maps: Tensor | Sequence[Tensor], ids: Sequence[int], weights: Sequence[float], half: bool
    ) -> ops.NetworkInput:
        pixels, places = map_pixels(maps, ids, torch.float16 if half else self.scene.dtype)
        return ops.NetworkInput(
            "maps",
            torch.tensor(weights, dtype=torch.float64, device="cpu"),
            pixels,
            torch.tensor(places, dtype=torch.int64, device="cpu"),
            self.box_coord.detach().contiguous(),
            self.coord_scale,
        )

    def _decode(self, viewmat: Tensor, K: Tensor, feature_map: Tensor, weight: float | Tensor) -> Tensor:
        """The decoder's output [N, F] in one view, in plain torch."""
        means = self.scene.means
        a = sample_features(feature_map, means, self.box_coord, viewmat, K, coord_scale=self.coord_scale)
        return self.color_net.decode(means, a, self.scene.intrinsic, weight)

    def _finish(self, decoded: Tensor, viewmat: Tensor) -> Tensor:
        """Colours [N, 3] from decoded [N, F]: the colour head, or the harmonics, in the directions of one view."""
        means = self.scene.means
        if not self.puts_out_sh:
            return self.color_net.head(decoded, view_directions(means, viewmat))
        coefficients = decoded.unflatten(-1, (-1, 3))
        degree = SH_DEGREE_OF_COUNT[coefficients.shape[1]]
        colors = reference.spherical_harmonics(degree, means - reference.camera_positions(viewmat), coefficients)
        # The clamp must not hide an infinity, which the renderer counts.
        return torch.where(colors.isfinite(), (colors + 0.5).clamp(min=0), colors)

    def colors_of_all(
        self,
        viewmat: Tensor,
        K: Tensor,
        maps: Tensor | Sequence[Tensor],
        ids: Sequence[int],
        weights: Tensor | None,
        decoded: Tensor | None,
        precision: str | None,
    ) -> Tensor:
        """[N, 3] colours of all Gaussians in one view, differentiably; or [N, F] their coefficients where the network
        puts out those. The arguments have been checked; decoded is in place of maps, ids and weights."""
        if decoded is not None and self.puts_out_sh:
            return decoded
        part = "all" if decoded is None else "head"
        half = half_precision(precision, self.scene.means)
        return self._outputs_of_all(self._net_inputs(part, viewmat[None], K[None], maps, ids, weights, half, decoded))

    def _outputs_of_all(self, inputs: NetInputs) -> Tensor:
        ids = torch.arange(len(self), dtype=torch.int32, device=self.scene.device)
        return net_outputs(inputs, ids, torch.tensor([0, len(self)], device=self.scene.device))

    def _net_inputs(
        self, part: str, viewmats: Tensor, Ks: Tensor, maps: Tensor | Sequence[Tensor], ids: Sequence[int],
        weights: Tensor | None, half: bool, decoded: Tensor | None = None,
    ) -> NetInputs:  # fmt: skip
        if decoded is not None:
            maps, ids, weights = [], [], torch.ones(len(viewmats), dtype=torch.float64, device="cpu")
        scene = self.scene
        network = None
        trained = wants_gradient(scene.means, scene.intrinsic, self.color_net.tensors())
        # On the CPU a network that changes at every step is made for the Gaussians that are seen.
        if not is_compiling() and (not trained or scene.means.is_cuda):
            output = "sh" if self.puts_out_sh and part == "all" else "raw" if part == "decode" else "color"
            network = replace(self._prepared(part, output, half).network, output="raw")
        if self.puts_out_sh and part == "all":  # where there is a head, it is not used
            part = "decode"
        return NetInputs(
            self.color_net.weights(), scene.means, viewmats, Ks, scene.intrinsic, weights,
            "maps" if decoded is None else "features", maps, ids, self.box_coord if decoded is None else None,
            self.coord_scale, decoded, part, half, network,
        )  # fmt: skip

    def wants_gradient(self, *arguments: Any) -> bool:
        """Whether gradients are enabled and the scene, its colour network or one of the arguments requires one."""
        scene = self.scene
        return wants_gradient(
            scene.means, scene.quats, scene.scales, scene.opacities, scene.intrinsic, self.box_coord,
            self.color_net.tensors(), *arguments,
        )  # fmt: skip

    def save(self, model_path: PathLike, iteration: int | None = None) -> None:
        """Write the scene as RAP does, so that RAP and `load_rap` read it back.

        Args:
            model_path: the model's folder, made where it is not there.
            iteration: of the folder `iteration_<i>`; None: the scene's own. It appears complete or not at all.

        Raises:
            FileExistsError: the iteration is there already.
            ValueError: the folder's cfg_args is of another scene; a value cannot be written (see `save_ply`).
            OSError: a file cannot be written.
        """
        iteration = self.iteration if iteration is None else iteration
        check.integer("iteration", iteration, 0, 10**18)
        attributes = self.extras.get(files.OTHER_FILE, {})
        box_coord = self.box_coord.detach().float().cpu()
        other = {name: value for name, value in attributes.items() if not name.startswith("box_coord")}
        content = {
            files.MAP_FILE: _plain_state(self.feature_map_net) | self.extras.get(files.MAP_FILE, {}),
            files.COLOR_FILE: _plain_state(self.color_net) | self.extras.get(files.COLOR_FILE, {}),
            files.OTHER_FILE: files.split_like(box_coord, attributes) | other,
        }
        files.save_model(model_path, iteration, self.config, self.scene, content)


def load_rap(model_path: PathLike, iteration: int | None = None) -> RapScene:
    """Read a trained RAP scene, float32 on the CPU, its networks without gradients.

    Args:
        model_path: the folder with `cfg_args` and `ckpts_point_cloud/iteration_<i>/`.
        iteration: which i; None: the largest.

    Raises:
        OSError: a file or folder is missing or cannot be read.
        ValueError: a file is damaged or does not fit; missing and mismatched weights are named layer by layer.
        NotImplementedError: cfg_args has a setting that is refused (`use_decode_with_pos`, `use_okmap`, map_num other
            than 3).

    No code in the files is run: weights are read with weights_only=True, cfg_args is parsed.
    """
    folder, number = files.find_iteration(model_path, iteration)
    config = files.read_config(folder.parent.parent / "cfg_args")
    _check_config(config)  # first: the files of a refused scene have other shapes, which would be blamed instead
    scene = load_ply(folder / "point_cloud.ply")
    paths = {name: folder / name for name in (files.MAP_FILE, files.COLOR_FILE, files.OTHER_FILE)}
    content = {name: files.load_tensors(path) for name, path in paths.items()}
    if scene.intrinsic is None:
        raise ValueError(f"{folder / 'point_cloud.ply'}: must have f_intr_0..47 (RAP's layout), it has SH colours")
    box_coord = files.box_coordinates(content[files.OTHER_FILE], len(scene), paths[files.OTHER_FILE])
    box_coord = box_coord.detach().float().contiguous()
    map_net = FeatureMapNet.from_state_dict(content[files.MAP_FILE], str(paths[files.MAP_FILE])).float()
    color_net = ColorNet.from_state_dict(content[files.COLOR_FILE], str(paths[files.COLOR_FILE])).float()
    extras = {
        files.MAP_FILE: _unused(content[files.MAP_FILE], map_net),
        files.COLOR_FILE: _unused(content[files.COLOR_FILE], color_net),
        files.OTHER_FILE: content[files.OTHER_FILE],
    }
    try:
        return RapScene(scene, box_coord, map_net, color_net, config, number, extras)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _check_config(config: Mapping[str, Any]) -> float:
    """coord_scale, once the settings are known to be those that rapfast renders."""
    for name in REFUSED:
        if config.get(name):
            raise NotImplementedError(f"{name}={config[name]!r} in cfg_args is not supported by rapfast")
    if config.get("map_num", 3) != 3:
        raise NotImplementedError(f"map_num={config['map_num']!r} in cfg_args is not supported by rapfast, only 3 is")
    coord_scale = check.number("coord_scale in cfg_args", config.get("coord_scale", 1.0))
    if coord_scale == 0 or not math.isfinite(coord_scale):
        raise ValueError(f"coord_scale in cfg_args must be finite and not 0, got {coord_scale}")
    return coord_scale


def _unused(state: Mapping[str, Any], net: torch.nn.Module) -> dict[str, Any]:
    own = net.state_dict()
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    return {name: value for name, value in plain.items() if name not in own}


def _plain_state(net: torch.nn.Module) -> dict[str, Tensor]:
    state = net.state_dict()
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in state.items()
    }
