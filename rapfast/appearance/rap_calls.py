"""RAP's own calls: cameras as RAP has them in, its dictionaries out, all views of one image size in one call.

`render` takes the arguments of RAP's `render`; `render_batch` takes many cameras and gives each its own reference
image and weight. Both return, per view,

    render            [3, H, W] colours, not clamped
    viewspace_points  [N, 2] projected centres in pixels, 0 where a Gaussian is not seen
    visibility_filter [N] bool, radii > 0
    radii             [N] int32 pixels, the larger of x and y, 0 where a Gaussian is not seen
    depth             [1, H, W] sum of weight times depth, not divided by alpha; None where it was not asked for

The entries of size N are made when they are asked for. Where a gradient is wanted, pictures and depths are
differentiable, and `viewspace_points` lie between Gaussians and picture: after backward their `.grad` [N, 2] is the
gradient by pixels, which densification reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapfast import _check as check
from rapfast._call_arguments import BACKENDS
from rapfast.appearance.features import check_like_rap, map_coordinates, view_directions
from rapfast.appearance.fused import half_precision
from rapfast.appearance.rap_cameras import View, read_camera, read_cameras, reference_image
from rapfast.appearance.rap_scene import RapScene
from rapfast.appearance.view_inputs import (
    check_map_ids,
    check_maps,
    check_weights,
    refuse_precision,
    wants_gradient,
    weight_tensor,
)
from rapfast.cameras import Cameras
from rapfast.meta import _LAZY, Meta
from rapfast.rasterization import rasterization, rasterize_colored

WEIGHT_ATTRIBUTE = "colornet_inter_weight"
"""RAP's name of the view weight: looked up on a camera, then on the scene."""

HARMLESS = ("debug",)
"""Settings of pipe that change no picture."""

FLAGS = ("antialiasing", "compute_cov3D_python", "convert_SHs_python")
"""Settings of pipe that are True or False."""


def _without_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call on a scene that computes in the scene's dtype, whatever autocast is on around it."""

    @wraps(call)
    def in_full(scene: RapScene, *args: Any, **options: Any) -> Any:
        with torch.autocast(scene.scene.device.type, enabled=False):
            return call(scene, *args, **options)

    return in_full


@_without_autocast
def render_batch(
    scene: RapScene,
    cameras: Cameras | Sequence[Any],
    pipe: Any,
    bg_color: Tensor | Sequence[float] | None,
    *,
    view_weights: Tensor | Sequence[float] | float | None = None,
    images: Tensor | Sequence[Tensor] | None = None,
    feature_maps: Tensor | Sequence[Tensor] | None = None,
    map_ids: Tensor | Sequence[int] | None = None,
    with_depth: bool = False,
    rap_compatible: bool = False,
    viewmat_layout: str | None = None,
    ignored_pipe_settings: Collection[str] = (),
    precision: str | None = None,
    backend: str = "rapfast",
) -> list[dict[str, Any]]:
    """Render many cameras; one `RapScene.render` per image size. A view is bitwise what `render` gives for it.

    Args:
        cameras: C cameras as `rapfast.appearance.rap_cameras` reads them, sizes mixed at will.
        pipe: RAP's settings of the renderer, or None. Read of it: `antialiasing`, which must be the scene's, `debug`,
            which changes nothing, and `compute_cov3D_python`, `convert_SHs_python` and anything else that is True
            (or 1, or a NumPy True), which is refused by name.
        bg_color: [3], or [C, 3] with one for each camera; None is black.
        view_weights: [C] finite numbers, or one for all. None: each camera's `colornet_inter_weight`, else the
            scene's attribute of that name, else 1.
        images: [R, 3, H, W] in 0..1 or a sequence of [3, H, W], the reference images. None: each camera's own
            `original_image`. One that is met several times, the same memory, is run through the network once.
        feature_maps: what `RapScene.feature_maps` made of them, in place of images.
        map_ids: [C] which of images or feature_maps each camera takes; may be left out where there are 1 or C.
        with_depth: whether to render depth.
        rap_compatible: raise RAP's IndexError where exactly one Gaussian falls on a view's projected map; then no
            view is rendered.
        viewmat_layout: "transposed", "plain" or None, see `read_cameras`. None reads matrices on a GPU back.
        ignored_pipe_settings: names that pipe may have as True because they do not change the picture.
        precision: as in `RapScene.render`; with "fp32" a float32 feature-map network makes its maps in float32, too.
        backend: as in `RapScene.render`. With "gsplat" and "reference" `viewspace_points` is a slice, into which no
            gradient flows.

    Returns:
        C dictionaries in the order of the cameras, see the top of this file.

    Raises:
        TypeError, ValueError: naming the argument or the camera's attribute, what was expected and what came.
        NotImplementedError: a setting of pipe is refused.
    """
    like = scene.scene.means
    _check_options(precision, backend, rap_compatible, like)
    _check_pipe(pipe, scene, ignored_pipe_settings)
    views = read_cameras(cameras, like, viewmat_layout)
    weights = _weights(view_weights, views, scene)
    backgrounds = _backgrounds(bg_color, len(views), like)
    check.flag("with_depth", with_depth)
    if not views:
        # No maps are right for no cameras; anything else is looked at as always.
        if isinstance(feature_maps, Tensor):
            none = feature_maps.dim() == 4 and len(feature_maps) == 0
        else:
            none = isinstance(feature_maps, (list, tuple)) and not feature_maps
        _check_references(scene, images, None if none else feature_maps)
        return []
    maps, ids = _references(scene, views, images, feature_maps, map_ids, precision)
    return _draw(
        scene, views, maps, ids, weights, backgrounds, with_depth,
        rap_compatible=rap_compatible, backend=backend, **_given(precision=precision),
    )  # fmt: skip


@_without_autocast
def render(
    scene: RapScene,
    camera: Any,
    pipe: Any,
    bg_color: Tensor | Sequence[float] | None,
    scaling_modifier: float = 1.0,
    override_colors: Tensor | None = None,
    other_viewpoint_camera: Any = None,
    store_cache: bool = False,
    use_cache: bool = False,
    point_features: Any = None,
    interp_alpha: float = 0.0,
    *,
    view_weight: Tensor | float | None = None,
    image: Tensor | None = None,
    feature_map: Tensor | None = None,
    means_transform: Tensor | None = None,
    with_depth: bool = False,
    rap_compatible: bool = False,
    viewmat_layout: str | None = None,
    ignored_pipe_settings: Collection[str] = (),
    precision: str | None = None,
    backend: str = "rapfast",
) -> dict[str, Any]:
    """Render one camera with the arguments of RAP's `render`.

    Args:
        camera: see `rapfast.appearance.rap_cameras`.
        scaling_modifier: the Gaussians' scales are multiplied by it.
        override_colors: [N, 3] in place of the network's colours; then no reference image is needed.
        other_viewpoint_camera: the colours are made for `camera`, with its direction and projection, and drawn as
            this camera sees them. (Spherical harmonics are evaluated when drawing, in its directions.)
        store_cache: keep the decoder's output [N, 48] of this call, as `scene.decoded_cache`.
        use_cache: take it from there: appearance and projection stay those of the view that stored it, the
            directions are the camera's. No reference image is needed, and no weight is read. A cache that was stored
            where gradients were wanted belongs to the graph of that call, whose backward then serves both.
        point_features, interp_alpha: refused unless None and 0.
        view_weight, image, feature_map: of this view, as `view_weights`, `images` and `feature_maps` [48, h, w] of
            `render_batch`.
        means_transform: [3, 4]; the Gaussians are drawn at A [X 1], coloured where they are (RAP's deblurring).
        pipe, bg_color and the rest: as in `render_batch`.

    Returns:
        One dictionary, see the top of this file.

    Raises:
        TypeError, ValueError, NotImplementedError: as `render_batch`, and for the arguments above.
        RuntimeError: use_cache without a stored cache, or with one that would cut off a gradient that is wanted.
    """
    if point_features is not None:
        raise NotImplementedError(f"point_features={check.describe(point_features)} is not supported by rapfast")
    if check.number("interp_alpha", interp_alpha) != 0:
        raise NotImplementedError(f"interp_alpha={interp_alpha} is not supported by rapfast")
    scaling_modifier = check.number("scaling_modifier", scaling_modifier, 0.0, what="a factor of at least 0")
    if check.flag("store_cache", store_cache) and check.flag("use_cache", use_cache):
        raise ValueError("store_cache and use_cache must not both be True")
    if override_colors is not None and (store_cache or use_cache):
        raise ValueError("override_colors must be None where store_cache or use_cache is True: no cache is met")
    if use_cache or override_colors is not None:
        why = "use_cache is True" if use_cache else "override_colors is given"
        for name, value in (("view_weight", view_weight), ("image", image), ("feature_map", feature_map)):
            if value is not None:
                raise ValueError(f"{name} must be None where {why}, got {check.describe(value)}")
    like, net = scene.scene.means, scene.color_net
    _check_options(precision, backend, rap_compatible, like)
    _check_pipe(pipe, scene, ignored_pipe_settings)
    check.flag("with_depth", with_depth)
    view = read_camera(camera, like, viewmat_layout)
    backgrounds = _backgrounds(bg_color, 1, like)
    transform = None
    if means_transform is not None:
        transform = check.tensor_like("means_transform", means_transform, [(3, 4)], like, "the scene")
    if override_colors is not None:
        check.tensor_like("override_colors", override_colors, [(len(scene), 3)], like, "the scene")
    other = view
    if other_viewpoint_camera is not None:
        other = read_camera(other_viewpoint_camera, like, viewmat_layout, "other_viewpoint_camera")

    redrawn = scaling_modifier != 1 or override_colors is not None or other is not view or transform is not None
    decoded = _cached(scene) if use_cache else None
    maps, ids, weights = [], [], []
    if override_colors is None and not use_cache:
        weights = _weights(view_weight, [view], scene)
        images, given_maps = (None if one is None else [one] for one in (image, feature_map))
        maps, ids = _references(scene, [view], images, given_maps, None, precision)
        if not (redrawn or store_cache):
            return _draw(
                scene, [view], maps, ids, weights, backgrounds, with_depth,
                rap_compatible=rap_compatible, backend=backend, **_given(precision=precision),
            )[0]  # fmt: skip
    with_graph = backend == "rapfast" and scene.wants_gradient(
        *view[2:4], *other[2:4], maps, weights, decoded, override_colors, transform, backgrounds
    )
    if decoded is None and (store_cache or not with_graph) and override_colors is None:
        other_backend = None if backend == "rapfast" else backend
        decoded = scene.decode(
            view.viewmat, view.K, maps[0], weights[0], rap_compatible=rap_compatible,
            **_given(precision=precision, backend=other_backend),
        )  # fmt: skip
        if store_cache:
            scene.decoded_cache = decoded
    mode = "RGB+D" if with_depth else "RGB"
    camera_arguments = other.viewmat[None], other.K[None], other.width, other.height
    if not redrawn:
        colors, _, meta = scene.render(
            *camera_arguments, decoded=decoded, backgrounds=backgrounds, render_mode=mode, packed=False,
            backend=backend, **_given(precision=precision),
        )  # fmt: skip
        return _dictionaries(colors, meta, with_depth)[0]

    means = scene.scene.means
    if transform is not None:
        # Products and sums rather than a matmul, which TF32 would round.
        means = (transform[:, :3] * means[:, None]).sum(-1) + transform[:, 3]
    geometry = means, scene.scene.quats, scene.scene.scales * scaling_modifier, scene.scene.opacities
    options = {
        "render_mode": mode, "packed": False,
        "rasterize_mode": "antialiased" if scene.config.get("antialiasing", True) else "classic",
    }  # fmt: skip
    # The colours of all N Gaussians, as RAP makes them, for a rasterizer call that is not the view's own.
    if override_colors is not None:
        colors = override_colors
    elif with_graph:
        if rap_compatible and decoded is None:
            check_like_rap(map_coordinates(scene.scene.means, scene.box_coord[:, 2], view.viewmat, view.K)[1])
        fed = maps, ids, None if decoded is not None else weight_tensor(weights, weights)
        colors = scene.colors_of_all(view.viewmat, view.K, *fed, decoded, precision)
    elif scene.puts_out_sh:
        colors = decoded
    else:
        colors = net.head(decoded, view_directions(scene.scene.means, view.viewmat))
    degree = None
    if override_colors is None and scene.puts_out_sh:
        colors, degree = colors.unflatten(-1, (-1, 3)), scene.sh_degree
    if with_graph:
        camera_arguments = *camera_arguments[:2], backgrounds, *camera_arguments[2:], None
        colors, _, meta = rasterize_colored(*geometry, *camera_arguments, colors=colors, sh_degree=degree, **options)
    else:
        colors, _, meta = rasterization(
            *geometry, colors, *camera_arguments, sh_degree=degree, backgrounds=backgrounds, backend=backend, **options
        )
    return _dictionaries(colors, meta, with_depth)[0]


def _draw(
    scene: RapScene,
    views: Sequence[View],
    maps: Sequence[Tensor],
    ids: Sequence[int],
    weights: Tensor | Sequence[float],
    backgrounds: Tensor | None,
    with_depth: bool,
    **options: Any,
) -> list[dict[str, Any]]:
    """The views' dictionaries: one call of `RapScene.render` for each image size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, view in enumerate(views):
        groups.setdefault((view.width, view.height), []).append(i)
    results: list[dict[str, Any]] = [{}] * len(views)
    for (width, height), members in groups.items():
        used = sorted({ids[i] for i in members})
        colors, _, meta = scene.render(
            torch.stack([views[i].viewmat for i in members]),
            torch.stack([views[i].K for i in members]),
            width,
            height,
            feature_maps=[maps[k] for k in used],
            map_ids=[used.index(ids[i]) for i in members],
            view_weights=weights[members] if isinstance(weights, Tensor) else [weights[i] for i in members],
            backgrounds=backgrounds if backgrounds is None or len(groups) == 1 else backgrounds[members],
            render_mode="RGB+D" if with_depth else "RGB",
            packed=False,
            **options,
        )
        for i, result in zip(members, _dictionaries(colors, meta, with_depth), strict=True):
            results[i] = result
    return results


class _Seen:
    """What a view's dictionary says about each of the N Gaussians, from the meta of the view's call."""

    def __init__(self, meta: dict[str, Any], place: int) -> None:
        self._meta, self._place = meta, place

    @property
    def viewspace_points(self) -> Tensor:
        if getattr(self._meta, "means2d_of_views", None) is not None:
            return self._meta.means2d_of_views[self._place]
        return self._meta["means2d"][self._place]

    @cached_property
    def radii(self) -> Tensor:
        return self._meta["radii"][self._place].amax(-1)

    @property
    def visibility_filter(self) -> Tensor:
        return self.radii > 0


def _dictionaries(colors: Tensor, meta: dict[str, Any], with_depth: bool) -> list[dict[str, Any]]:
    """RAP's dictionary of each view from the pictures [C, H, W, 3 or 4] of one call."""
    pictures = colors.permute(0, 3, 1, 2)
    for points in getattr(meta, "means2d_of_views", None) or ():
        if points.requires_grad:
            points.retain_grad()
    depths: Sequence[Tensor | None] = pictures[:, 3:].unbind() if with_depth else [None] * len(pictures)
    return [
        Meta(
            {
                "render": picture,
                "viewspace_points": _LAZY,
                "visibility_filter": _LAZY,
                "radii": _LAZY,
                "depth": depth,
            },
            _Seen(meta, place),
            is_live=isinstance(meta, Meta) and meta.is_live,
        )
        for place, (picture, depth) in enumerate(zip(pictures[:, :3].unbind(), depths, strict=True))
    ]


def _references(
    scene: RapScene,
    views: Sequence[View],
    images: Tensor | Sequence[Tensor] | None,
    feature_maps: Tensor | Sequence[Tensor] | None,
    map_ids: Tensor | Sequence[int] | None,
    precision: str | None,
) -> tuple[list[Tensor], list[int]]:
    """Feature maps [48, h, w], and which of them each view takes. The network runs once on each image that is met."""
    _check_references(scene, images, feature_maps)
    if feature_maps is not None:
        return feature_maps, check_map_ids(map_ids, len(feature_maps), len(views))
    if images is None:
        if map_ids is not None:
            raise ValueError("map_ids must be None where each camera brings its own reference image")
        chosen = [reference_image(view) for view in views]
    else:
        chosen = [images[k] for k in check_map_ids(map_ids, len(images), len(views))]
    distinct: dict[tuple[Any, ...], int] = {}
    pictures, ids = [], []
    for image in chosen:
        # Of the same memory one may be trained and another, detached, not.
        key = (image.data_ptr(), image.shape, image.stride(), image.dtype, image.device, wants_gradient(image))
        if key not in distinct:
            distinct[key] = len(pictures)
            pictures.append(image.to(scene.scene.device))
        ids.append(distinct[key])
    net = scene.feature_map_net
    if precision == "fp32" and net.final_conv.weight.dtype == torch.float32:
        return net.feature_maps(pictures, precision="fp32"), ids
    return scene.feature_maps(pictures), ids


def _check_references(scene: RapScene, images: Any, feature_maps: Any) -> None:
    """That images or feature_maps are what they should be, where they are given."""
    if feature_maps is not None:
        if images is not None:
            raise ValueError("images (image) must be None where feature_maps (feature_map) is given")
        check_maps(feature_maps, scene.scene)
    elif images is not None:
        if not isinstance(images, (Tensor, Sequence)) or isinstance(images, (str, bytes)):
            raise TypeError(f"images must be a tensor or a sequence of tensors, got {check.describe(images)}")
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() != 3 or len(image) != 3:
                raise ValueError(f"images[{i}] must be floating point [3, H, W] in 0..1, got {check.describe(image)}")


def _check_options(precision: Any, backend: Any, rap_compatible: Any, like: Tensor) -> None:
    """As `RapScene.render` checks them, which some calls never meet."""
    check.flag("rap_compatible", rap_compatible)
    check.choice("precision", precision, ("fp16", "fp32", None))
    if check.choice("backend", backend, BACKENDS) == "rapfast":
        half_precision(precision, like)
    else:
        refuse_precision(precision, backend)


def _weights(weights: Any, views: Sequence[View], scene: RapScene) -> Tensor | list[float]:
    """[C], from the argument, else from each camera, else from the scene, else 1."""
    if weights is None:
        own = getattr(scene, WEIGHT_ATTRIBUTE, 1.0)
        weights = []
        for view in views:
            value = getattr(view.camera, WEIGHT_ATTRIBUTE, None)
            name = WEIGHT_ATTRIBUTE if value is None else f"{view.name}.{WEIGHT_ATTRIBUTE}"
            value = own if value is None else value
            weights.append(value if _is_trained(value) else check.number(name, value))
        if any(map(_is_trained, weights)):
            like = scene.scene.means
            weights = torch.stack([check.as_tensor(w).to(like).reshape(()) for w in weights])
    elif isinstance(weights, Tensor) and weights.dim() == 0:
        weights = weights.expand(len(views))
    numbers = check_weights(weights, len(views), scene.scene.means)
    return weights if numbers is None or (isinstance(weights, Tensor) and weights.requires_grad) else numbers


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and wants_gradient(value)


def _backgrounds(color: Any, c: int, like: Tensor) -> Tensor | None:
    if color is None:
        return None
    try:
        color = check.as_tensor(color)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"bg_color must be numbers [3] or [{c}, 3], got {check.describe(color)}") from None
    if tuple(color.shape) not in ((3,), (c, 3)):
        raise ValueError(f"bg_color must be [3] or [{c}, 3], one for each camera, got {check.describe(color)}")
    return color.to(like.device, like.dtype).expand(c, 3)


def _check_pipe(pipe: Any, scene: RapScene, ignored: Collection[str]) -> None:
    """Refuse what would change the picture, or might: nothing that pipe says is passed over silently."""
    if pipe is None:
        return
    if isinstance(ignored, str):
        raise TypeError(f"ignored_pipe_settings must be a collection of names, got the text {ignored!r}")
    trained = bool(scene.config.get("antialiasing", True))
    for name in dir(pipe):
        if name.startswith("_") or name in HARMLESS or name in ignored:
            continue
        value = _as_flag(getattr(pipe, name))
        if name in FLAGS and value is not None:
            check.flag(f"pipe.{name}", value)
        if name == "antialiasing":
            if value is not None and value != trained:
                raise NotImplementedError(
                    f"pipe.antialiasing={value} is not supported by rapfast for a scene trained with {trained}"
                )
        elif value is True:
            raise NotImplementedError(
                f"pipe.{name}=True is not supported by rapfast; where it does not change the picture, name it in "
                "ignored_pipe_settings"
            )


def _as_flag(value: Any) -> Any:
    """True or False for what stands for it: 1 and 0, of NumPy or torch, too. Anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def _cached(scene: RapScene) -> Tensor:
    decoded = getattr(scene, "decoded_cache", None)
    if decoded is None:
        raise RuntimeError("use_cache needs the cache of a call with store_cache=True on the same scene, there is none")
    shape = (len(scene), scene.color_net.decoder.widths[-1])
    check.tensor_like("decoded_cache", decoded, [shape], scene.scene.means, "the scene")
    net = scene.color_net
    made_of = net.encoder.tensors() + net.decoder.tensors(), scene.scene.means, scene.scene.intrinsic, scene.box_coord
    if not decoded.requires_grad and wants_gradient(*made_of):
        raise RuntimeError(
            "use_cache=True in a call that needs gradients takes a cache that was stored in one: this one was stored "
            "without, and what it was made of (network, positions, features) would get none"
        )
    return decoded


def _given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}
