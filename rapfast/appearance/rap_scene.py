"""A trained RAP scene: Gaussians whose colours come from a reference image, a view and a weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rapfast import _check as check
from rapfast import ops, reference
from rapfast.appearance import rap_files as files
from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.feature_map_net import MAP_CHANNELS, FeatureMapNet
from rapfast.appearance.features import check_like_rap, map_coordinates, sample_features, view_directions
from rapfast.io.files import PathLike
from rapfast.io.ply import load_ply
from rapfast.meta import Meta
from rapfast.postprocess import PostProcess
from rapfast.rasterization import BACKENDS, RENDER_MODES, rasterization, require_cuda
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

    def __post_init__(self) -> None:
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
        return RapScene(scene, box_coord, nets[0], nets[1], dict(self.config), self.iteration, self.extras)

    def feature_maps(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """[R, 48, ceil(H/2), ceil(W/2)] of reference images [R, 3, H, W]; see `FeatureMapNet.feature_maps`."""
        return self.feature_map_net.feature_maps(images)

    def decode(
        self,
        viewmat: Tensor,
        K: Tensor,
        feature_map: Tensor,
        view_weight: float | Tensor = 1.0,
        *,
        rap_compatible: bool = False,
    ) -> Tensor:
        """What RAP's `store_cache` keeps of a view: the decoder's output [N, F] of all Gaussians, F = 48 in RAP.

        Given to `render` as `decoded`, it keeps this view's appearance and projection in any other view.

        Args:
            viewmat, K: [4, 4] and [3, 3] of the view. feature_map: [48, h, w]. view_weight: a finite number or [].
            rap_compatible: raise RAP's IndexError where exactly one Gaussian falls on the projected map.
        """
        viewmat = check.tensor_like("viewmat", viewmat, [(4, 4)], self.scene.means, "the scene")
        K = check.tensor_like("K", K, [(3, 3)], self.scene.means, "the scene")
        _check_map("feature_map", feature_map, self.scene)
        if isinstance(view_weight, Tensor):
            view_weight = view_weight.reshape(-1)
        (weight,) = _check_weights(view_weight, 1, self.scene.means)
        if check.flag("rap_compatible", rap_compatible):
            check_like_rap(map_coordinates(self.scene.means, self.box_coord[:, 2], viewmat, K)[1])
        return self._decode(torch.arange(len(self), device=self.scene.device), viewmat, K, feature_map, weight)

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
        backend: str = "rapfast",
        rap_compatible: bool = False,
    ) -> tuple[Tensor, Tensor, Meta | dict[str, Any]]:
        """Render C views, each with its own reference image, weight, projection and directions.

        The colour network runs on the Gaussians that a view sees, view by view, so a view in a batch is bitwise
        the view alone.

        Args:
            viewmats: [C, 4, 4] world to camera (OpenCV). Ks: [C, 3, 3] pixels. Dtype and device of the scene.
            width, height: pixels.
            feature_maps: [R, 48, h, w] of R reference images, as `feature_maps` returns them, or a sequence of
                [48, h, w]; any floating dtype, on the scene's device.
            decoded: [N, F] or [C, N, F] from `decode`, in place of feature_maps, map_ids and view_weights (RAP's
                `use_cache`): the directions alone are the view's own.
            map_ids: [C] whole numbers 0 .. R - 1, the reference image of each view. May be left out where R is 1 or C.
            view_weights: [C] finite numbers that scale the appearance, or one for all views; None is 1.
            backgrounds: [C, 3] or [C, H, W, 3].
            rasterize_mode: "classic" or "antialiased"; None: what the scene was trained with.
            backend: "rapfast"; or "reference" and "gsplat", which colour all Gaussians of all views and have
                gradients.
            rap_compatible: raise RAP's IndexError where exactly one of the N Gaussians falls on a view's projected
                map. With decoded none is sampled, and RAP does not raise either.
            render_mode, near_plane, far_plane, radius_clip, eps2d, packed, alpha_cap, postprocess: as in
                `rapfast.rasterization`.

        Returns:
            colours [C, H, W, D], alphas [C, H, W, 1], meta, as `rapfast.rasterization` returns them. Colours are
            not clamped, those of spherical harmonics at 0 from below.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            NotImplementedError: a gradient is wanted of the "rapfast" backend.
            IndexError: see rap_compatible.
        """
        scene, n = self.scene, len(self)
        check.choice("backend", backend, BACKENDS)
        check.choice("render_mode", render_mode, RENDER_MODES)
        if rasterize_mode is None:
            rasterize_mode = "antialiased" if self.config.get("antialiasing", True) else "classic"
        check.choice("rasterize_mode", rasterize_mode, ("classic", "antialiased"))
        viewmats = check.tensor_like("viewmats", viewmats, [("C", 4, 4)], scene.means, "the scene")
        c = len(viewmats)
        Ks = check.tensor_like("Ks", Ks, [(c, 3, 3)], scene.means, "the scene")
        if decoded is None:
            maps = _check_maps(feature_maps, scene)
            ids = _check_map_ids(map_ids, len(maps), c)
            weights = _check_weights(view_weights, c, scene.means)
        else:
            for name, value in (("feature_maps", feature_maps), ("map_ids", map_ids), ("view_weights", view_weights)):
                if value is not None:
                    raise ValueError(f"{name} must be None where decoded is given, got {check.describe(value)}")
            width_out = self.color_net.decoder.widths[-1]
            shapes = [(n, width_out), (c, n, width_out)]
            decoded = check.tensor_like("decoded", decoded, shapes, scene.means, "the scene")
            decoded = decoded.expand(c, n, width_out)
        limits = {
            "near_plane": check.number("near_plane", near_plane, what="a depth"),
            "far_plane": check.number("far_plane", far_plane, what="a depth"),
            "radius_clip": check.number("radius_clip", radius_clip, 0.0, what="a radius of at least 0 pixels"),
            "eps2d": check.number("eps2d", eps2d, 0.0, 1e15, what="a variance of at least 0 pixels^2"),
        }
        width = check.integer("width", width, 1, check.MAX_IMAGE_SIZE, " pixels")
        height = check.integer("height", height, 1, check.MAX_IMAGE_SIZE, " pixels")
        if check.flag("rap_compatible", rap_compatible) and decoded is None:
            for viewmat, K in zip(viewmats, Ks, strict=True):
                check_like_rap(map_coordinates(scene.means, self.box_coord[:, 2], viewmat, K)[1])
        if backend == "rapfast":
            own = {"decoded": decoded} if decoded is not None else {"feature_maps": maps, "view_weights": weights}
            self._refuse_gradients(viewmats=viewmats, Ks=Ks, backgrounds=backgrounds, **own)

        def view_colors(i: int, seen: Tensor) -> Tensor:
            """Colours [m, 3] of Gaussians seen [m] in view i."""
            if decoded is not None:
                return self._finish(decoded[i, seen], seen, viewmats[i])
            features = self._decode(seen, viewmats[i], Ks[i], maps[ids[i]], weights[i])
            return self._finish(features, seen, viewmats[i])

        if render_mode in ("D", "ED"):
            colors = scene.means.new_zeros((n, 3))
        elif backend == "rapfast":
            colors = scene.means.new_zeros((c, n, 3))
            visible = self._visible(viewmats, Ks, width, height, rasterize_mode == "antialiased", limits)
            for i, seen in enumerate(visible):
                colors[i, seen] = view_colors(i, seen)
        else:
            everyone = torch.arange(n, device=scene.device)
            views = [view_colors(i, everyone) for i in range(c)]
            colors = torch.stack(views) if views else scene.means.new_zeros((0, n, 3))
        return rasterization(
            scene.means, scene.quats, scene.scales, scene.opacities, colors, viewmats, Ks, width, height,
            **limits, packed=packed, backgrounds=backgrounds, render_mode=render_mode, rasterize_mode=rasterize_mode,
            alpha_cap=alpha_cap, postprocess=postprocess, backend=backend,
        )  # fmt: skip

    def _visible(
        self, viewmats: Tensor, Ks: Tensor, width: int, height: int, antialiased: bool, limits: Mapping[str, float]
    ) -> Iterator[Tensor]:
        """For each view the Gaussians [m] that it sees, ascending."""
        scene = self.scene
        if scene.device.type == "cuda":
            require_cuda(scene.means)
        geometry = [tensor[None].contiguous() for tensor in (scene.means, scene.quats, scene.scales)]
        rest = [tensor[None].contiguous() for tensor in (scene.opacities, viewmats, Ks)]
        records = ops.project(*geometry, None, *rest, width, height, antialiased=antialiased, **limits)
        ids, offsets = records.gaussian_ids.long(), records.image_offsets.tolist()
        return (ids[begin:end] for begin, end in zip(offsets, offsets[1:], strict=False))

    def _decode(self, ids: Tensor, viewmat: Tensor, K: Tensor, feature_map: Tensor, weight: Tensor) -> Tensor:
        """The decoder's output [m, F] for Gaussians ids [m] in one view."""
        means, boxes = self.scene.means[ids], self.box_coord[ids]
        a = sample_features(feature_map, means, boxes, viewmat, K, coord_scale=self.coord_scale)
        return self.color_net.decode(means, a, self.scene.intrinsic[ids], weight)

    def _finish(self, decoded: Tensor, ids: Tensor, viewmat: Tensor) -> Tensor:
        """Colours [m, 3] from decoded [m, F]: the colour head, or the harmonics, in the directions of one view."""
        means = self.scene.means[ids]
        if not self.puts_out_sh:
            return self.color_net.head(decoded, view_directions(means, viewmat))
        coefficients = decoded.unflatten(-1, (-1, 3))
        degree = SH_DEGREE_OF_COUNT[coefficients.shape[1]]
        colors = reference.spherical_harmonics(degree, means - reference.camera_positions(viewmat), coefficients)
        # The clamp must not hide an infinity, which the renderer counts.
        return torch.where(colors.isfinite(), (colors + 0.5).clamp(min=0), colors)

    def _refuse_gradients(self, **arguments: Tensor | list[Tensor] | None) -> None:
        if not torch.is_grad_enabled():
            return
        scene = self.scene
        own = {"means": scene.means, "quats": scene.quats, "scales": scene.scales, "opacities": scene.opacities}
        own |= {
            "intrinsic": scene.intrinsic,
            "box_coord": self.box_coord,
            "color_net": list(self.color_net.parameters()),
        }
        for name, value in (own | arguments).items():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    raise NotImplementedError(
                        f"{name} requires a gradient and rapfast has no backward yet: call under torch.no_grad() for "
                        'the image alone, or use backend="gsplat" (on a GPU) or backend="reference" for gradients'
                    )

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


def _check_maps(maps: Any, scene: Scene) -> list[Tensor]:
    if isinstance(maps, Tensor):
        if maps.dim() != 4 or not maps.is_floating_point():
            raise ValueError(
                f"feature_maps must be a floating-point tensor [R, {MAP_CHANNELS}, h, w], got {check.describe(maps)}"
            )
        named = [("feature_maps", m) for m in maps] or [("feature_maps", maps.reshape(0))]
    elif isinstance(maps, Sequence) and not isinstance(maps, (str, bytes)) and maps:
        named = [(f"feature_maps[{i}]", m) for i, m in enumerate(maps)]
    else:
        raise TypeError(
            f"feature_maps must be a tensor [R, {MAP_CHANNELS}, h, w] or a sequence of [{MAP_CHANNELS}, h, w], "
            f"got {check.describe(maps)}"
        )
    for name, m in named:
        _check_map(name, m, scene, shown=maps if name == "feature_maps" else m)
    return [m for _, m in named]


def _check_map(name: str, m: Any, scene: Scene, shown: Any = None) -> None:
    """One map, or one of a tensor of maps, which is then what is `shown`."""
    shape = f"[R, {MAP_CHANNELS}, h, w]" if name == "feature_maps" else f"[{MAP_CHANNELS}, h, w]"
    good = isinstance(m, Tensor) and m.is_floating_point() and m.dim() == 3
    if not good or m.shape[0] != MAP_CHANNELS or 0 in m.shape or m.device != scene.device:
        came = check.describe(m if shown is None else shown)
        raise ValueError(f"{name} must be floating point {shape} on {scene.device} with no side 0, got {came}")


def _check_map_ids(map_ids: Any, n_maps: int, c: int) -> list[int]:
    if map_ids is None:
        if n_maps not in (1, c):
            raise ValueError(f"map_ids must be given where {n_maps} feature maps meet {c} views")
        return [0] * c if n_maps == 1 else list(range(c))
    if isinstance(map_ids, Tensor):
        if map_ids.dim() != 1 or map_ids.is_floating_point() or map_ids.is_complex() or map_ids.dtype == torch.bool:
            raise ValueError(f"map_ids must be whole numbers [{c}], got {check.describe(map_ids)}")
        map_ids = map_ids.tolist()
    elif not isinstance(map_ids, Sequence) or isinstance(map_ids, (str, bytes)):
        raise TypeError(f"map_ids must be whole numbers [{c}], got {check.describe(map_ids)}")
    if len(map_ids) != c:
        raise ValueError(f"map_ids must hold one number for each of {c} views, got {len(map_ids)}")
    return [check.integer(f"map_ids[{i}]", value, 0, n_maps - 1) for i, value in enumerate(map_ids)]


def _check_weights(weights: Any, c: int, like: Tensor) -> Tensor:
    if weights is None:
        return like.new_ones(c)
    if not isinstance(weights, Tensor):
        if isinstance(weights, Sequence) and not isinstance(weights, (str, bytes)):
            values = [check.number(f"view_weights[{i}]", value) for i, value in enumerate(weights)]
        else:
            values = [check.number("view_weights", weights)] * c
        weights = like.new_tensor(values)
    if not weights.is_floating_point() or tuple(weights.shape) != (c,):
        raise ValueError(f"view_weights must be floating point [{c}], one for each view, got {check.describe(weights)}")
    if weights.device != like.device:
        raise ValueError(f"view_weights must be on {like.device} (as the scene), got {check.describe(weights)}")
    weights = weights.to(like.dtype)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"view_weights must be finite, got {weights.tolist()}")
    return weights
