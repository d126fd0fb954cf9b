"""rapfast inside RAP: its own GaussianModel renders through rapfast, and in batches; its files stay as they are.

    from rapfast.integrations.rap import install
    install(GaussianModel)

gives the class `render_batch(cameras, pipe, bg_color, ...)` and replaces its `render`. In a call that needs gradients,
that is, with gradients enabled and any of the model's parts or the call's tensors requiring one, they flow to the
model's own parameters, those of its networks included: RAP's training runs as it is. `viewspace_points` [N, 2] then
has its gradient, in pixels, as `.grad` after backward.

What is assumed of a model, where `NAMES` gives each part's attribute (or property, or method without arguments):

    part           attribute              what it must be
    means          get_xyz                [N, 3]
    quats          get_rotation           [N, 4], w x y z
    scales         get_scaling            [N, 3] after activation
    opacities      get_opacity            [N, 1] or [N] after activation
    intrinsic      _features_intrinsic    [N, 16, 3]; where it is absent, get_features
    box_coord      box_coord              [N, 3, 2]; where it is absent, box_coord1 and box_coord2
    map_generator  map_generator          a module whose state_dict() has the names of map_generator.pth
    color_net      color_net              a module whose state_dict() has the names of color_net.pth
    view_weight    colornet_inter_weight  a number; 1 where it is absent

and the settings `use_colors_precomp`, `antialiasing`, `coord_scale`, `map_num`, `use_decode_with_pos` and `use_okmap`
are attributes of the model or of its `args`; one that is in neither has RAP's default. Cameras are read as
`rapfast.appearance.rap_cameras` says.

A spawned process imports RAP anew: call `install` where the child runs it too, at the top level of the main module
or of one that it imports.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rapfast import _check as check
from rapfast.appearance import rap_calls
from rapfast.appearance.color_net import ColorNet
from rapfast.appearance.feature_map_net import FeatureMapNet
from rapfast.appearance.fused import PreparedNetworks
from rapfast.appearance.rap_files import box_coordinates
from rapfast.appearance.rap_scene import RapScene
from rapfast.appearance.state_dict import without_compile_prefix
from rapfast.cameras import Cameras
from rapfast.integrations.rap_rvs import install_rvs as install_rvs
from rapfast.integrations.rap_rvs import uninstall_rvs as uninstall_rvs
from rapfast.scene import Scene

NAMES: dict[str, str | tuple[str, ...]] = {
    "means": "get_xyz",
    "quats": "get_rotation",
    "scales": "get_scaling",
    "opacities": "get_opacity",
    "intrinsic": ("_features_intrinsic", "get_features"),
    "box_coord": "box_coord",
    "map_generator": "map_generator",
    "color_net": "color_net",
    "view_weight": "colornet_inter_weight",
}
"""Each part's attribute, or several of which the first that is there is taken."""

SETTINGS = ("use_colors_precomp", "antialiasing", "coord_scale", "map_num", "use_decode_with_pos", "use_okmap")

ONLY_BY_NAME = ("means_transform",)
"""What `render` takes beside RAP's arguments: [3, 4] that moves the centres for drawing alone, for deblurring."""

ARGUMENTS = (
    "camera", "pipe", "bg_color", "scaling_modifier", "override_colors", "other_viewpoint_camera", "store_cache",
    "use_cache", "point_features", "interp_alpha",
)  # fmt: skip
"""Of RAP's `render`, in its order."""

_UNUSED = ("running_", "num_batches_tracked", "mask")
"""In names of a network's entries that no picture depends on. RAP's forward passes change the first two."""

_OF_CAMERAS = (
    "world_view_transform", "K", "FoVx", "FoVy", "original_image", "viewmats", "Ks", rap_calls.WEIGHT_ATTRIBUTE,
)  # fmt: skip
"""Attributes of cameras, and of `rapfast.Cameras`, that may require a gradient."""

ModelClass = TypeVar("ModelClass", bound=type)


def install(
    model_class: ModelClass,
    *,
    names: Mapping[str, str | Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
    with_depth: bool = False,
    rap_compatible: bool = False,
    viewmat_layout: str | None = None,
    ignored_pipe_settings: Collection[str] = (),
    precision: str | None = None,
) -> ModelClass:
    """Give a GaussianModel class rapfast's `render` and `render_batch`. Again with other options: those hold.

    Args:
        model_class: RAP's class, or one with its attributes and its `render`.
        names: attributes of parts that differ from `NAMES`.
        config: settings (see `SETTINGS`) that the model does not have or has under other names.
        with_depth: whether "depth" is rendered.
        rap_compatible: raise RAP's IndexError where exactly one Gaussian falls on a view's projected map. RAP's
            loops draw their next random numbers according to it.
        viewmat_layout, ignored_pipe_settings, precision: as in `rapfast.appearance.rap_calls.render_batch`.

    Returns:
        The class.

    Raises:
        TypeError, ValueError: it is no class, has no `render`, or a name or setting is not known.
    """
    if not isinstance(model_class, type):
        raise TypeError(f"model_class must be a class, got {check.describe(model_class)}")
    original = getattr(model_class, "render", None)
    if not callable(original):
        raise TypeError(f"{model_class.__name__} must have a method render, whose place rapfast's takes")
    _check_names("names", names, NAMES)
    _check_names("config", config, SETTINGS)
    before = model_class.__dict__.get("_rapfast")
    settings = _Settings(
        original=getattr(original, "_rapfast_original", original),
        replaced=before.replaced if before else _own(model_class),
        names=NAMES | {part: name if isinstance(name, str) else tuple(name) for part, name in (names or {}).items()},
        config=dict(config or {}),
        options={
            "with_depth": check.flag("with_depth", with_depth),
            "rap_compatible": check.flag("rap_compatible", rap_compatible),
            "viewmat_layout": viewmat_layout,
            "ignored_pipe_settings": tuple(ignored_pipe_settings),
            "precision": precision,
        },
    )

    @functools.wraps(settings.original)
    def render(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _render(self, settings, args, kwargs)

    def render_batch(
        self: Any,
        cameras: Cameras | Sequence[Any],
        pipe: Any,
        bg_color: Any,
        *,
        view_weights: Tensor | Sequence[float] | float | None = None,
        **references: Any,
    ) -> list[dict[str, Any]]:
        """Render many cameras, see `rapfast.appearance.rap_calls.render_batch`."""
        return _render_batch(self, settings, cameras, pipe, bg_color, view_weights, references)

    render._rapfast_original = settings.original  # type: ignore[attr-defined]
    model_class._rapfast = settings
    model_class.render = render
    model_class.render_batch = render_batch
    return model_class


def uninstall(model_class: ModelClass) -> ModelClass:
    """Take `install` back: the class is what it was before. Harmless where nothing is installed."""
    settings = model_class.__dict__.get("_rapfast")
    if settings is not None:
        for name, value in settings.replaced.items():
            if value is None:
                delattr(model_class, name)
            else:
                setattr(model_class, name, value)
        del model_class._rapfast
    return model_class


def adapt(
    model: Any,
    *,
    names: Mapping[str, str | Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> RapScene:
    """The live model as a `RapScene`: geometry shared where the model keeps it as rapfast takes it, networks copied.

    The same object comes back until a part of the model changes. A change is seen by an assignment, a torch
    operation in place, or other values; writing through `.data` is not: call `forget` after it.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the model's attribute, what was expected and what came.
    """
    _check_names("names", names, NAMES)
    _check_names("config", config, SETTINGS)
    named = NAMES | {part: name if isinstance(name, str) else tuple(name) for part, name in (names or {}).items()}
    return _adapted(model, named, config or {}).scene


def forget(model: Any) -> None:
    """Drop what is kept of a model, its decoded-feature cache included; the next call reads it anew."""
    for kept in (_ADAPTED, _TRAINED, _CACHES):
        kept.pop(model, None)


@dataclass(frozen=True)
class _Settings:
    """What `install` was called with."""

    original: Callable[..., Any]  # the class's render
    replaced: dict[str, Any]  # the class's own render and render_batch, None where it had none
    names: Mapping[str, str | tuple[str, ...]]
    config: Mapping[str, Any]
    options: dict[str, Any]


def _own(model_class: type) -> dict[str, Any]:
    return {name: model_class.__dict__.get(name) for name in ("render", "render_batch")}


def _check_names(argument: str, given: Mapping[str, Any] | None, known: Collection[str]) -> None:
    for name in given or {}:
        if name not in known:
            raise ValueError(f"{argument} must have keys of {', '.join(known)}, got {name!r}")


# --- calls -----------------------------------------------------------------------------------------------------------


def _render(model: Any, settings: _Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(ARGUMENTS):
        raise TypeError(f"render takes at most {len(ARGUMENTS)} arguments, got {len(args)}")
    given = dict(zip(ARGUMENTS, args, strict=False))
    for name in kwargs:
        if name not in ARGUMENTS + ONLY_BY_NAME:
            raise NotImplementedError(f"{name} is not an argument of RAP's render that rapfast knows")
        if name in given:
            raise TypeError(f"{name} is given twice")
    given |= kwargs
    with_graph = _needs_gradients(model, settings, given.values())
    scene = _scene(model, settings, with_graph)
    scene.decoded_cache = _CACHES.get(model)
    with torch.set_grad_enabled(with_graph):
        result = rap_calls.render(scene, **given, **settings.options)
    if given.get("store_cache"):
        _CACHES[model] = scene.decoded_cache
    return result


def _render_batch(
    model: Any,
    settings: _Settings,
    cameras: Any,
    pipe: Any,
    bg_color: Any,
    view_weights: Any,
    references: dict[str, Any],
) -> list[dict[str, Any]]:
    for name in references:
        if name not in ("images", "feature_maps", "map_ids"):
            raise TypeError(f"render_batch has no argument {name}")
    with_graph = _needs_gradients(model, settings, [cameras, bg_color, view_weights, *references.values()])
    with torch.set_grad_enabled(with_graph):
        return rap_calls.render_batch(
            _scene(model, settings, with_graph), cameras, pipe, bg_color, view_weights=view_weights, **references,
            **settings.options,
        )  # fmt: skip


def _scene(model: Any, settings: _Settings, with_graph: bool) -> RapScene:
    if with_graph:
        scene = _trained(model, settings.names, settings.config)
    else:
        scene = _adapted(model, settings.names, settings.config).scene
    weight = _find(model, settings.names["view_weight"])[1]
    setattr(scene, rap_calls.WEIGHT_ATTRIBUTE, 1.0 if weight is None else weight)
    return scene


def _needs_gradients(model: Any, settings: _Settings, inputs: Collection[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for attribute in [*settings.names.values(), "box_coord1", "box_coord2"]:
        _, value = _find(model, attribute)
        parts = value.parameters() if isinstance(value, nn.Module) else [value]
        if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in parts):
            return True
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for value in inputs for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Any]:
    """What of an argument may require a gradient: itself, its items, or a camera's tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _tensors(item)
    else:
        for name in _OF_CAMERAS:
            part = getattr(value, name, None)
            yield part() if name == "K" and callable(part) else part


# --- the live model --------------------------------------------------------------------------------------------------


class _Source:
    """A tensor as it was read. It is kept, so that its memory cannot be another tensor's meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        # Tensors made in inference mode do not count their changes: one that comes again is then taken as changed.
        self.version = None if tensor.is_inference() else tensor._version

    def is_still(self, other: _Source) -> bool:
        """Whether `other`, read later, holds the values that this one held."""
        mine, theirs = self.tensor, other.tensor
        # First: values that changed in place since are not those that were copied, whatever they are compared with.
        if self.version is None or mine._version != self.version:
            return False
        if (mine.shape, mine.dtype, mine.device) != (theirs.shape, theirs.dtype, theirs.device):
            return False
        same_memory = mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
        return same_memory or torch.equal(mine, theirs)


@dataclass
class _Adapted:
    """A model's RapScene and what it was made of, part by part."""

    scene: RapScene
    sources: dict[str, dict[str, _Source]]
    config: dict[str, Any] = field(default_factory=dict)

    def is_still(self, part: str, sources: Mapping[str, _Source]) -> bool:
        mine = self.sources[part]
        return mine.keys() == sources.keys() and all(mine[name].is_still(sources[name]) for name in mine)


@dataclass
class _Trained:
    """What outlives a call that needs gradients: by part, a network's own tensors and rapfast's network that holds
    them; and what does not depend on the view, while nothing of that is trained."""

    networks: dict[str, tuple[dict[str, Tensor], nn.Module]] = field(default_factory=dict)
    prepared: PreparedNetworks = field(default_factory=PreparedNetworks)


_ADAPTED: weakref.WeakKeyDictionary[Any, _Adapted] = weakref.WeakKeyDictionary()
_TRAINED: weakref.WeakKeyDictionary[Any, _Trained] = weakref.WeakKeyDictionary()
_CACHES: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
"""A model's decoded features, as `store_cache` left them."""


def _trained(model: Any, names: Mapping[str, str | tuple[str, ...]], config: Mapping[str, Any]) -> RapScene:
    """A scene of the model's own tensors, for one call: gradients reach the model's parameters."""
    parts, kept = _read_parts(model, names), _TRAINED.setdefault(model, _Trained())
    networks = {}
    for part, make in (("map_generator", FeatureMapNet), ("color_net", ColorNet)):
        label, state = _state(model, names, part)
        state = {name: value for name, value in state.items() if not any(word in name for word in _UNUSED)}
        held, network = kept.networks.get(part, ({}, None))
        # The same tensors, whatever their values: an optimizer changes those in place.
        if held.keys() != state.keys() or any(held[name] is not state[name] for name in state):
            network = _sharing(make, state, label, parts["means"])
            kept.networks[part] = state, network
        networks[part] = network
    geometry = Scene(
        parts["means"], parts["quats"], parts["scales"], parts["opacities"].reshape(len(parts["means"])),
        intrinsic=parts["intrinsic"],
    )  # fmt: skip
    settings = _config(model, config)
    scene = RapScene(geometry, parts["box_coord"], networks["map_generator"], networks["color_net"], settings)
    scene._networks = kept.prepared
    return scene


def _sharing(make: Any, state: dict[str, Tensor], label: str, means: Tensor) -> nn.Module:
    """rapfast's network with the very parameters of another of the same names."""
    with torch.random.fork_rng(devices=[means.device] if means.is_cuda else []), torch.device(means.device):
        network = make.from_state_dict({name: value.detach() for name, value in state.items()}, label)
    own = without_compile_prefix(state)
    for name, _ in list(network.named_parameters()):
        holder, _, leaf = name.rpartition(".")
        network.get_submodule(holder)._parameters[leaf] = own[name]
    return network


def _read_parts(model: Any, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, Tensor]:
    """The model's tensors as they are, of right shapes."""
    label, means = _part(model, names, "means")
    check.floating_tensor(label, means, "[N, 3]")
    if means.dim() != 2 or means.shape[1] != 3:
        raise ValueError(f"{label} must be [N, 3], got {check.describe(means)}")
    n = len(means)
    parts = {"means": means}
    for part, shapes in (
        ("quats", [(n, 4)]),
        ("scales", [(n, 3)]),
        ("opacities", [(n, 1), (n,)]),
        ("intrinsic", [(n, 16, 3)]),
    ):
        own_label, value = _part(model, names, part)
        parts[part] = check.tensor_like(own_label, value, shapes, means, label)
    parts["box_coord"] = _box_coord(model, names, means, label)
    return parts


@torch.no_grad()
def _adapted(model: Any, names: Mapping[str, str | tuple[str, ...]], config: Mapping[str, Any]) -> _Adapted:
    parts = _read_parts(model, names)
    means, n = parts["means"], len(parts["means"])
    settings = _config(model, config)
    sources = {part: {part: _Source(tensor)} for part, tensor in parts.items()}
    states = {part: _state(model, names, part) for part in ("map_generator", "color_net")}
    for part, (_, state) in states.items():
        used = {name: value for name, value in state.items() if not any(word in name for word in _UNUSED)}
        sources[part] = {name: _Source(tensor) for name, tensor in used.items()}

    old = _ADAPTED.get(model)
    kept = {part for part in sources if old is not None and old.is_still(part, sources[part])}
    if len(kept) == len(sources) and old.config == settings:
        return old
    map_net = old.scene.feature_map_net if "map_generator" in kept else None
    color_net = old.scene.color_net if "color_net" in kept else None
    on_cuda = [means.device] if means.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_cuda), torch.device(means.device):  # layers draw weights when they are made
        if map_net is None:
            own_label, state = states["map_generator"]
            map_net = FeatureMapNet.from_state_dict(state, own_label).to(means.device)
        if color_net is None:
            own_label, state = states["color_net"]
            color_net = ColorNet.from_state_dict(state, own_label).to(means.device, means.dtype)
    tensors = {part: sources[part][part].tensor for part in parts}
    geometry = Scene(
        tensors["means"], tensors["quats"], tensors["scales"], tensors["opacities"].reshape(n),
        intrinsic=tensors["intrinsic"],
    )  # fmt: skip
    scene = RapScene(geometry, tensors["box_coord"], map_net, color_net, settings)
    _ADAPTED[model] = adapted = _Adapted(scene, sources, settings)
    return adapted


def _first(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else names[0]


def _find(model: Any, names: str | tuple[str, ...]) -> tuple[str, Any]:
    """The first of the attributes that the model has, and its value; a method's is what it returns."""
    for name in [names] if isinstance(names, str) else names:
        value = getattr(model, name, None)
        if value is not None:
            return name, value() if callable(value) and not isinstance(value, nn.Module) else value
    return _first(names), None


def _part(model: Any, names: Mapping[str, str | tuple[str, ...]], part: str) -> tuple[str, Any]:
    """How error sentences call a part, and its value."""
    attribute, value = _find(model, names[part])
    kind = type(model).__name__
    if value is None:
        shown = names[part] if isinstance(names[part], str) else " or ".join(names[part])
        raise TypeError(f"{kind} must have {shown}: give names={{{part!r}: ...}} where it has another name")
    return f"{kind}.{attribute}", value


def _box_coord(model: Any, names: Mapping[str, str | tuple[str, ...]], means: Tensor, label: str) -> Tensor:
    kind, n = type(model).__name__, len(means)
    halves = {name: getattr(model, name, None) for name in ("box_coord1", "box_coord2")}
    if _find(model, names["box_coord"])[1] is None and all(value is not None for value in halves.values()):
        return box_coordinates(halves, n, kind).to(means.device, means.dtype)
    own_label, value = _part(model, names, "box_coord")
    return check.tensor_like(own_label, value, [(n, 3, 2)], means, label)


def _state(model: Any, names: Mapping[str, str | tuple[str, ...]], part: str) -> tuple[str, dict[str, Any]]:
    label, module = _part(model, names, part)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{label} must be a torch module, got a {type(module).__name__}")
    return label, module.state_dict(keep_vars=True)


def _config(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are known, from `given`, else the model, else its `args`."""
    config = {}
    for name in SETTINGS:
        for holder in (model, getattr(model, "args", None)):
            value = given.get(name, getattr(holder, name, None))
            if value is not None:
                config.setdefault(name, value)
    return config
