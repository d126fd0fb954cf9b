"""Stage 2 by a colour network: the colour of every record from a ReLU network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, cuda_arguments, define, native, scratch
from rapfast.ops.color import DEPTH_CHANNELS
from rapfast.ops.project import Records

MAX_LAYERS = 16
MAX_WIDTH = 256
BLOCK = 16
"""Widths are padded to multiples of it."""

MAP_CHANNELS = 48

INPUTS = {"maps": 0, "embedding": 1, "features": 2}
OUTPUTS = {"color": 0, "sh": 1, "raw": 2}

# NetView of csrc/color_net.h.
_VIEW = np.dtype([("map", np.uint64), ("height", np.int32), ("width", np.int32), ("weight", np.float64)])


class Layer(NamedTuple):
    """One layer as the kernels run it, fields of ``NetLayer`` in csrc/color_net.h. Widths are multiples of 16."""

    n_in: int
    n_out: int
    takes_direction: int
    weights: int
    base: int
    biases: int


@dataclass(frozen=True, eq=False)
class Network:
    """A colour network in the form of the kernels; rapfast/appearance/fused.py makes it.

    Attributes:
        layers: at most 16, at most 256 wide.
        weights: of all layers, flat: float16 in the order of the tensor cores' operands, or [n_in (+ 16), n_out].
        biases: of the layers without a base, flat.
        base: [N, S] what of the layers does not depend on the view, S a multiple of 16; dtype of the weights.
        output: "color" (3 numbers), "sh" (3 (sh_degree + 1)^2 numbers) or "raw" (n_outputs numbers).
    """

    layers: tuple[Layer, ...]
    weights: Tensor
    biases: Tensor
    base: Tensor | None
    output: str
    n_outputs: int
    sh_degree: int = 0

    @property
    def half(self) -> bool:
        """Whether it runs on fp16 operands."""
        return self.weights.dtype == torch.float16

    @property
    def n_channels(self) -> int:
        """Channels that it writes for a record."""
        return self.n_outputs if self.output == "raw" else 3


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """What the views of one call feed to a network.

    Attributes:
        view_weights: float64 [C] on the CPU, finite; scales what is fed.
        maps: [h, w, 48] each, contiguous, of the dtype of the network's weights (``kind`` "maps").
        map_ids: int64 [C] on the CPU, which map each view has.
        box_coord: [N, 3, 2] with maps.
        coord_scale: the first two rows of box_coord are divided by it.
        features: [C, E] (``kind`` "embedding"); [N, F] or [C, N, F] (``kind`` "features").
    """

    kind: str
    view_weights: Tensor
    maps: Sequence[Tensor] = ()
    map_ids: Tensor | None = None
    box_coord: Tensor | None = None
    coord_scale: float = 1.0
    features: Tensor | None = None


SCHEMA = (
    "Tensor?[] net, Tensor[] maps, Tensor? map_ids, Tensor? view_weights, int[] net_form, int[] net_layers, "
    "float coord_scale"
)
"""The arguments by which an operator takes a network and its input."""


def operator_arguments(network: Network | None, given: NetworkInput | None) -> tuple[Any, ...]:
    """Network and input in the order of `SCHEMA`. Where there is none, ``net`` is empty."""
    if network is None or given is None:
        return [], [], None, None, [], [], 1.0
    return (
        [network.weights, network.biases, network.base, given.box_coord, given.features],
        list(given.maps),
        given.map_ids,
        given.view_weights,
        [INPUTS[given.kind], OUTPUTS[network.output], network.n_outputs, network.sh_degree],
        [number for layer in network.layers for number in layer],
        given.coord_scale,
    )


def view_table(maps: Sequence[Tensor], map_ids: Tensor | None, view_weights: Tensor) -> Tensor:
    """``NetView`` of each view, as bytes [C, 24] on the CPU."""
    table = np.zeros(len(view_weights), _VIEW)
    table["weight"] = view_weights.numpy()
    if map_ids is not None:
        known = np.array([(m.data_ptr(), m.shape[0], m.shape[1], 0.0) for m in maps], _VIEW)[map_ids.numpy()]
        for name in ("map", "height", "width"):
            table[name] = known[name]
    return torch.from_numpy(table.view(np.uint8).reshape(len(table), _VIEW.itemsize))


def net_arguments(net, net_form, net_layers, coord_scale, views, layers):
    """As the native module takes a network. ``views`` is a table of views, ``layers`` net_layers in a tensor."""
    weights, biases, base, box_coord, features = net
    kind, output, n_outputs, sh_degree = net_form
    return {
        "input": kind,
        "output": output,
        "half": weights.dtype == torch.float16,
        "n_inputs": MAP_CHANNELS if features is None else features.shape[-1],
        "n_outputs": n_outputs,
        "net_sh_degree": sh_degree,
        "n_layers": len(net_layers) // len(Layer._fields),
        "layers": address(layers),
        "weights": address(weights),
        "biases": address(biases),
        "base": address(base),
        "base_stride": 0 if base is None else base.shape[-1],
        "net_views": address(views),
        "box_coord": address(box_coord),
        "coord_scale": coord_scale,
        "features": address(features),
        "per_camera_features": kind == INPUTS["features"] and features.dim() == 3,
    }


def _channels(net_form: Sequence[int], depth_channel: int) -> int:
    _, output, n_outputs, _ = net_form
    return n_outputs if output == OUTPUTS["raw"] else 3 + depth_channel


def _fake(
    means, viewmats, Ks, gaussian_ids, image_offsets, records, n_invalid, width, height, depth_channel,
    net, maps, map_ids, view_weights, net_form, net_layers, coord_scale,
):  # fmt: skip
    return means.new_empty((gaussian_ids.shape[0], _channels(net_form, depth_channel)))


def _arguments(
    out, means, viewmats, Ks, gaussian_ids, image_offsets, records, n_invalid, width, height, depth_channel
):  # fmt: skip
    return dict(  # noqa: C408
        n_scenes=1,
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        width=width,
        height=height,
        capacity=gaussian_ids.shape[0],
        color_stride=out.shape[1],
        means=address(means),
        viewmats=address(viewmats),
        Ks=address(Ks),
        gaussian_ids=address(gaussian_ids),
        image_offsets=address(image_offsets),
        records=address(records),
        record_colors=address(out),
        n_invalid=address(n_invalid),
        sh_degree=-1,
        n_bases=1,
        n_color_channels=out.shape[1] if records is None else 3,
        per_camera=False,
        shared_colors=False,
        depth_channel=depth_channel,
        colors=0,
    )


def _cpu(*inputs):
    stage, (net, maps, map_ids, view_weights, net_form, net_layers, coord_scale) = inputs[:10], inputs[10:]
    out = _fake(*inputs)
    views = view_table(maps, map_ids, view_weights)
    layers = torch.tensor(net_layers, dtype=torch.int64, device="cpu")
    native.color_net(
        **cpu_arguments(out), **_arguments(out, *stage),
        **net_arguments(net, net_form, net_layers, coord_scale, views, layers),
    )  # fmt: skip
    return out


def _cuda(*inputs):
    stage, (net, maps, map_ids, view_weights, net_form, net_layers, coord_scale) = inputs[:10], inputs[10:]
    means, viewmats, _, gaussian_ids, image_offsets = stage[:5]
    channels = _channels(net_form, stage[-1])
    raw = net_form[1] == OUTPUTS["raw"]
    stride = channels if raw else native.color_stride(channels)
    out = means.new_zeros((gaussian_ids.shape[0], stride))
    views = scratch(means, native.view_size * viewmats.shape[1])
    # The image of each record; of rows behind the last one, which are not looked at, the last image.
    rows = torch.arange(gaussian_ids.shape[0], device=means.device)
    images = torch.bucketize(rows, image_offsets[1:], right=True).clamp_(max=viewmats.shape[1] - 1).int()
    table = view_table(maps, map_ids, view_weights).to(means.device)
    layers = torch.tensor(net_layers, dtype=torch.int64, device="cpu")
    native.color_net_cuda(
        **cuda_arguments(means), **_arguments(out, *stage),
        **net_arguments(net, net_form, net_layers, coord_scale, table, layers),
        views=address(views), image_ids=address(images),
    )  # fmt: skip
    return out[:, :channels].contiguous()


color_net_op = define(
    "color_net(Tensor means, Tensor viewmats, Tensor Ks, Tensor gaussian_ids, Tensor image_offsets, "
    "Tensor(a!)? records, Tensor(b!)? n_invalid, int width, int height, int depth_channel, " + SCHEMA + ") -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def color_net(
    means: Tensor,  # [1, N, 3]
    viewmats: Tensor,  # [1, C, 4, 4]
    Ks: Tensor,  # [1, C, 3, 3]
    projected: Records,
    width: int,
    height: int,
    network: Network,
    given: NetworkInput,
    *,
    render_mode: str = "RGB",
) -> Tensor:
    """Colours [M, 3] of the records from a colour network, depth last where the mode has it.

    As in `color`, a record whose colour is not finite gets opacity 0 and is counted.
    """
    return color_net_op(
        means, viewmats, Ks, projected.gaussian_ids, projected.image_offsets, projected.records, projected.n_invalid,
        width, height, DEPTH_CHANNELS[render_mode], *operator_arguments(network, given),
    )  # fmt: skip


def network_outputs(
    means: Tensor,  # [1, N, 3]
    viewmats: Tensor,  # [1, 1, 4, 4]
    Ks: Tensor,  # [1, 1, 3, 3]
    network: Network,
    given: NetworkInput,
) -> Tensor:
    """[N, n_outputs] what a network with "raw" output puts out for all Gaussians in one view."""
    n = means.shape[1]
    ids = torch.arange(n, dtype=torch.int32, device=means.device)
    offsets = torch.tensor([0, n], dtype=torch.int64, device=means.device)
    return color_net_op(
        means, viewmats, Ks, ids, offsets, None, None, 1, 1, 0, *operator_arguments(network, given)
    )  # fmt: skip
