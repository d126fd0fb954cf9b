"""What a colour network puts out for the visible records, differentiably.

Two operators. ``rapfast::net_outputs`` runs the kernel of the colour stage with a base made for the Gaussians that
some view sees, since in training the base is out of date after every step. ``rapfast::net_outputs_bwd`` runs the
network of the same records again, so that nothing but the inputs is kept from forward to backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rapfast.appearance.color_net import Weights
from rapfast.appearance.fused import PARTS, make_network, map_pixels
from rapfast.appearance.net_outputs_bwd import NET_SCHEMA, Form, net_outputs_bwd_op
from rapfast.ops._library import define
from rapfast.ops.autograd import _first_derivative
from rapfast.ops.color_net import INPUTS, Network, NetworkInput, color_net_op, operator_arguments


@dataclass(frozen=True, eq=False)
class NetInputs:
    """A colour network and what it is fed for one scene and C views. All tensors may require gradients.

    Attributes:
        weights: of the network.
        means: [N, 3]; viewmats [C, 4, 4] and Ks [C, 3, 3] of the views that colours are made for.
        intrinsic: [N, 16, 3].
        view_weights: [C] on any device, floating point.
        kind: "maps", "embedding" or "features" (see `rapfast.ops.NetworkInput`).
        maps: [48, h, w] each, map_ids: which of them each view has, box_coord [N, 3, 2], coord_scale: for "maps".
        features: [C, E] embeddings, or decoder outputs [N, F] or [C, N, F].
        part: "all"; "decode" for the decoder's outputs; "head" from decoder outputs on.
        half: whether the forward's operands are float16.
        network: the network prepared for all Gaussians, where it is at hand and current; else it is made for those
            that are seen.
    """

    weights: Weights
    means: Tensor
    viewmats: Tensor
    Ks: Tensor
    intrinsic: Tensor
    view_weights: Tensor
    kind: str
    maps: Sequence[Tensor] = ()
    map_ids: Sequence[int] = ()
    box_coord: Tensor | None = None
    coord_scale: float = 1.0
    features: Tensor | None = None
    part: str = "all"
    half: bool = False
    network: Network | None = None


def net_outputs(inputs: NetInputs, gaussian_ids: Tensor, image_offsets: Tensor, *, with_values: bool = True) -> Tensor:
    """[M, F] what the network puts out for records of Gaussians gaussian_ids [M] (int32); those of view i are rows
    image_offsets[i] to image_offsets[i + 1] (int64 [C + 1]). Without values it is for its gradient alone.

    Raises:
        ValueError: a view weight is not finite; with half, a number is beyond float16's range.
    """
    w = inputs.weights
    form = [
        len(w.encoder), len(w.decoder), len(w.color_decoder), -1 if w.n_frequencies is None else w.n_frequencies,
        INPUTS[inputs.kind], PARTS.index(inputs.part), int(inputs.half),
    ]  # fmt: skip
    used = sorted(set(inputs.map_ids))
    places = [used.index(k) for k in inputs.map_ids]
    parameters = [tensor for block in w[:3] for pair in block for tensor in pair]
    return _NetOutputs.apply(
        inputs.network, with_values, form, inputs.coord_scale, places, len(parameters), gaussian_ids, image_offsets,
        inputs.means, inputs.viewmats, inputs.Ks, inputs.intrinsic, inputs.box_coord, inputs.features,
        inputs.view_weights, *parameters, *(inputs.maps[k] for k in used),
    )  # fmt: skip


class _NetOutputs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        network: Network | None,
        with_values: bool,
        form: list[int],
        coord_scale: float,
        map_ids: list[int],
        n_parameters: int,
        gaussian_ids: Tensor,
        image_offsets: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gaussian_ids, image_offsets, *tensors)
        ctx.form, ctx.coord_scale, ctx.map_ids, ctx.n_parameters = form, coord_scale, map_ids, n_parameters
        if not with_values:
            means, n_outputs = tensors[0], Form.read(form, tensors[7 : 7 + n_parameters]).n_outputs
            return means.new_empty(()).expand(len(gaussian_ids), n_outputs)
        parameters, maps = list(tensors[7 : 7 + n_parameters]), list(tensors[7 + n_parameters :])
        arguments = gaussian_ids, image_offsets, *tensors[:7], parameters, maps, map_ids, form, coord_scale
        return net_outputs_op(*arguments) if network is None else _run(network, *arguments)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, v_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gaussian_ids, image_offsets, *tensors = ctx.saved_tensors
        n = ctx.n_parameters
        wanted = [bool(need) for need in ctx.needs_input_grad[8:]]
        gradients = net_outputs_bwd_op(
            v_outputs.contiguous(), gaussian_ids, image_offsets, *tensors[:7], list(tensors[7 : 7 + n]),
            list(tensors[7 + n :]), ctx.map_ids, ctx.form, ctx.coord_scale, wanted,
        )  # fmt: skip
        return *(None,) * 8, *(v if want else None for v, want in zip(gradients, wanted, strict=True))


def _forward_fake(
    gaussian_ids, image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights, parameters, maps,
    map_ids, form, coord_scale,
):  # fmt: skip
    return means.new_empty((gaussian_ids.shape[0], Form.read(form, parameters).n_outputs))


def _forward(
    gaussian_ids, image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights, parameters, maps,
    map_ids, form, coord_scale,
):  # fmt: skip
    read = Form.read(form, parameters)
    with torch.autocast(means.device.type, enabled=False):
        seen, rows = torch.unique(gaussian_ids.long(), return_inverse=True)
        means, intrinsic = means[seen], intrinsic[seen]
        box_coord = None if box_coord is None else box_coord[seen]
        if read.kind == "features":
            features = features[..., seen, :]
        network, _ = make_network(read.weights, means, intrinsic, part=read.part, output="raw", half=read.half)
        return _run(
            network, rows.int(), image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights,
            parameters, maps, map_ids, form, coord_scale,
        )  # fmt: skip


def _run(
    network, gaussian_ids, image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights, parameters,
    maps, map_ids, form, coord_scale,
):  # fmt: skip
    read = Form.read(form, parameters)
    if gaussian_ids.shape[0] == 0:
        return means.new_empty((0, read.n_outputs))
    weights = view_weights.detach().to("cpu", torch.float64)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"view_weights must be finite, got {weights.tolist()}")
    if read.kind == "maps":
        pixels, places = map_pixels(maps, map_ids, torch.float16 if read.half else means.dtype)
        places = torch.tensor(places, device="cpu")
        given = NetworkInput("maps", weights, pixels, places, _plain(box_coord), coord_scale)
    else:
        given = NetworkInput(read.kind, weights, features=_plain(features))
    return color_net_op(
        _plain(means)[None], _plain(viewmats)[None], _plain(Ks)[None], gaussian_ids, image_offsets, None, None, 1, 1, 0,
        *operator_arguments(network, given),
    )  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


net_outputs_op = define(f"net_outputs({NET_SCHEMA}) -> Tensor", fake=_forward_fake, cpu=_forward, cuda=_forward)
