"""A colour network as the kernels run it: few layers, what does not depend on the view computed once.

Between two ReLUs a network is affine, so a block's last layer and the next block's first are one layer. What a
layer adds for a Gaussian whatever the view (its encoded position, its own features, the biases) is that Gaussian's
row of the `base`, computed once per scene. All of this is done in float64 and rounded once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rapfast import _check as check
from rapfast._call import require_cuda
from rapfast.appearance.color_net import BLOCKS, ColorNet, Weights
from rapfast.appearance.features import positional_encoding
from rapfast.ops._library import aligned
from rapfast.ops.color_net import BLOCK, MAX_LAYERS, MAX_WIDTH, Layer, Network

PRECISIONS = ("fp16", "fp32")

BLOCKS_OF_PART = {"all": BLOCKS, "decode": BLOCKS[:2], "head": BLOCKS[2:]}
PARTS = tuple(BLOCKS_OF_PART)
"""What of a network is run: all of it, all before the colour head, the colour head alone."""

_CHUNK = 1 << 16  # Gaussians whose base is computed at a time


class _Affine(NamedTuple):
    """inputs x + own s + direction d + constant, in float64; s are a Gaussian's encoded position and features."""

    inputs: Tensor  # [out, in]
    own: Tensor  # [out, S]
    direction: Tensor  # [out, 3]
    constant: Tensor  # [out]

    @staticmethod
    def identity(width: int, n_own: int, like: Tensor) -> _Affine:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=like.device)

        eye = torch.eye(width, dtype=torch.float64, device=like.device)
        return _Affine(eye, zeros(width, n_own), zeros(width, 3), zeros(width))

    def then(self, weight: Tensor, bias: Tensor) -> _Affine:
        """The affine map behind this one."""
        return _Affine(weight @ self.inputs, weight @ self.own, weight @ self.direction, weight @ self.constant + bias)


def fused_layers(net: ColorNet | Weights, part: str = "all") -> list[_Affine]:
    """The network as affine maps with a ReLU between each two.

    x is the scaled appearance (of "head": the decoder's output), s = [encoded position, intrinsic features].
    """
    net = net.weights() if isinstance(net, ColorNet) else net
    weight = net.encoder[0][0]
    n_position = net.n_position
    n_own = n_position + net.n_intrinsic
    if part == "head":
        at = _Affine.identity(len(net.decoder[-1][1]), n_own, weight)
    else:
        at = _Affine.identity(net.n_appearance, n_own, weight)
    own = torch.eye(n_own, dtype=torch.float64, device=weight.device)
    position, intrinsic = own[:n_position], own[n_position:]
    maps: list[_Affine] = []

    for name in BLOCKS_OF_PART[part]:
        block = getattr(net, name)
        if not block:  # there is no head
            continue
        if name == "encoder":
            parts = [_rows(position, at), at, _rows(intrinsic, at)]
        elif name == "decoder":
            parts = [at, _rows(intrinsic, at)]
        else:
            parts = [at, _directions(at)]
        at = _Affine(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        at = _through(block, at, maps)
    return [*maps, at]


def _rows(own: Tensor, like: _Affine) -> _Affine:
    """Inputs that are these rows of s."""
    n, x = len(own), like.inputs
    return _Affine(x.new_zeros(n, x.shape[1]), own, x.new_zeros(n, 3), x.new_zeros(n))


def _directions(like: _Affine) -> _Affine:
    """The three inputs that are the direction."""
    x = like.inputs
    eye = torch.eye(3, dtype=x.dtype, device=x.device)
    return _Affine(x.new_zeros(3, x.shape[1]), like.own.new_zeros(3, like.own.shape[1]), eye, x.new_zeros(3))


def _through(block: list[tuple[Tensor, Tensor]], at: _Affine, maps: list[_Affine]) -> _Affine:
    """`at` behind a block's layers. What stands before a ReLU is put into `maps`."""
    for i, (weight, bias) in enumerate(block):
        at = at.then(weight.detach().double(), bias.detach().double())
        if i + 1 < len(block):
            maps.append(at)
            at = _Affine.identity(len(at.constant), at.own.shape[1], at.constant)
    return at


def _padded(tensor: Tensor, *widths: int) -> Tensor:
    """Zeros behind each dimension up to its width."""
    pads = [(0, width - size) for size, width in zip(tensor.shape, widths, strict=True)]
    return F.pad(tensor, [number for pad in reversed(pads) for number in pad])


def _up(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _operands(weight: Tensor) -> Tensor:
    """[out, in] -> flat, in the order in which a warp's lanes hold an mma.m16n8k16 operand.

    Block by block of 16 outputs and 16 inputs; of each block, lane 4 g + t holds inputs 4 t ... 4 t + 3 of output
    4 (g // 2) + g % 2 and of the one two further on. See csrc/cuda/color_net_half.cu.
    """
    n_out, n_in = weight.shape
    #                     out: block, g // 2, which of two, g % 2; in: block, t, 4
    blocks = weight.reshape(n_out // BLOCK, 4, 2, 2, n_in // BLOCK, 4, 4)
    return blocks.permute(0, 4, 1, 3, 5, 2, 6).reshape(-1)


def own_inputs(net: ColorNet | Weights, means: Tensor, intrinsic: Tensor) -> Tensor:
    """[n, S] float64: what of the network's input belongs to the Gaussian alone."""
    parts = [intrinsic.flatten(1).double()]
    if net.n_frequencies is not None:
        parts.insert(0, positional_encoding(means.double(), net.n_frequencies))
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network ready to run on one scene.

    Attributes:
        network: for `rapfast.ops`.
        n_bytes: memory kept for it, nearly all of it the base of N Gaussians.
        seconds: that making it took.
        multiply_adds: of one record, those of the padding not counted.
    """

    network: Network
    n_bytes: int
    seconds: float
    multiply_adds: int


@torch.no_grad()
def prepare(
    net: ColorNet,
    means: Tensor,
    intrinsic: Tensor,
    *,
    part: str = "all",
    output: str = "color",
    sh_degree: int = 0,
    half: bool = False,
) -> Prepared:
    """The network in the kernels' form, for the Gaussians means [N, 3] with intrinsic [N, F] or [N, 16, 3].

    Args:
        part: one of PARTS. output, sh_degree: see `Network`. half: fp16 weights and base, else means' dtype.

    Raises:
        NotImplementedError: the network is wider or deeper than the kernels take.
        ValueError: with half, a number is beyond float16's range.
    """
    if means.device.type == "cuda":
        torch.cuda.current_stream(means.device).synchronize()  # what was queued before is not to be timed
    begin = time.perf_counter()
    form = {"part": part, "output": output, "sh_degree": sh_degree, "half": half}
    network, multiply_adds = make_network(net, means, intrinsic, **form)
    if means.device.type == "cuda":
        torch.cuda.current_stream(means.device).synchronize()  # other streams will read it too
    kept = [tensor for tensor in (network.weights, network.biases, network.base) if tensor is not None]
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return Prepared(network, n_bytes, time.perf_counter() - begin, multiply_adds)


@torch.no_grad()
def make_network(
    net: ColorNet | Weights, means: Tensor, intrinsic: Tensor, *, part: str, output: str, sh_degree: int = 0, half: bool
) -> tuple[Network, int]:
    """`prepare` for the stream at hand alone: the network and its multiply-adds."""
    maps = fused_layers(net, part)
    widths = [len(m.constant) for m in maps] + [m.inputs.shape[1] for m in maps]
    if max(widths) > MAX_WIDTH or len(maps) > MAX_LAYERS:
        raise NotImplementedError(
            f"color_net must be at most {MAX_WIDTH} wide and {MAX_LAYERS} layers deep for "
            f'backend="rapfast", got width {max(widths)} and {len(maps)} layers: backend="reference" takes any'
        )
    dtype = torch.float16 if half else means.dtype
    layers: list[Layer] = []
    weights, biases, own, constants = [], [], [], []
    n_weights = n_biases = n_base = 0
    for m in maps:
        n_out, n_in = (_up(size) for size in m.inputs.shape)
        matrix = _padded(m.inputs, n_out, n_in)
        takes_direction = bool(m.direction.any())
        if takes_direction:
            matrix = torch.cat([matrix, _padded(m.direction, n_out, BLOCK)], dim=1)
        constant = _padded(m.constant, n_out)
        with_base = bool(m.own.any())
        layers.append(
            Layer(n_in, n_out, takes_direction, n_weights, n_base if with_base else -1, -1 if with_base else n_biases)
        )
        weights.append(_operands(matrix) if half else matrix.T.reshape(-1))
        n_weights += weights[-1].numel()
        if with_base:
            own.append(_padded(m.own, n_out, m.own.shape[1]))
            constants.append(constant)
            n_base += n_out
        else:
            biases.append(constant)
            n_biases += n_out
    network = Network(
        layers=tuple(layers),
        weights=_rounded("weights", torch.cat(weights), dtype),
        biases=torch.cat(biases).to(means.dtype) if biases else means.new_zeros(0),
        base=_base(net, means, intrinsic, torch.cat(own), torch.cat(constants), dtype) if own else None,
        output=output,
        n_outputs=len(maps[-1].constant),
        sh_degree=sh_degree,
    )
    return network, sum(m.inputs.numel() + (m.direction.numel() if m.direction.any() else 0) for m in maps)


def _base(
    net: ColorNet | Weights, means: Tensor, intrinsic: Tensor, own: Tensor, constant: Tensor, dtype: torch.dtype
) -> Tensor:
    """[N, S], a chunk of Gaussians at a time: in float64 all at once would take several times the result."""
    base = torch.empty((len(means), len(constant)), dtype=dtype, device=means.device)
    for begin in range(0, len(means), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        base[rows] = own_inputs(net, means[rows], intrinsic[rows]) @ own.T + constant
    # What is not finite to begin with, Gaussian or network, is counted when it colours.
    if dtype == torch.float16 and bool(own.isfinite().all() & constant.isfinite().all()):
        given = means.isfinite().all(1) & intrinsic.flatten(1).isfinite().all(1)
        if not bool((base.isfinite().all(1) | ~given).all()):
            raise ValueError(_TOO_LARGE.format(name="what it adds for a Gaussian"))
    return base


_TOO_LARGE = 'color_net must stay within float16\'s 65504 for precision="fp16", and {name} does not: use "fp32"'


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & values.isfinite()).any()):
        raise ValueError(_TOO_LARGE.format(name=name))
    return rounded


class PreparedNetworks:
    """Prepared networks of one scene, made at the first call and again where a tensor has changed since.

    A change is a new tensor or one changed in place (torch's version counter, and steps of optimizers: see
    `_count_step`). Tensors made under torch.inference_mode have no counter, and a write through `.data` does not move
    it: such a change goes unseen; call `clear`.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple[list[Tensor], tuple, Prepared]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy in another process, or of other tensors, prepares its own."""
        return {"_kept": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedNetworks:
        return PreparedNetworks()

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    def get(self, net: ColorNet, means: Tensor, intrinsic: Tensor, **form: object) -> Prepared:
        """`prepare` of the arguments, kept."""
        sources = [means, intrinsic, *net.tensors()]
        state = tuple(_identity(tensor) for tensor in sources)
        key = tuple(form.items())
        found = self._kept.get(key)
        if found is None or found[1] != state:
            if means.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the colour network is not prepared and cannot be while a CUDA graph is captured: call "
                    "RapScene.prepare() before"
                )
            self._kept.pop(key, None)  # its memory serves the new one
            # The sources are held: a freed one's address could come again.
            found = [tensor.detach() for tensor in sources], state, prepare(net, means, intrinsic, **form)
            self._kept[key] = found
        return found[2]


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Behind every optimizer's step: its parameters have changed. Fused kernels (``fused=True``, and gsplat's
    SelectiveAdam) write to them without moving torch's version counter, by which what is out of date is known."""
    if torch.compiler.is_compiling():  # compiled code counts what it writes to
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_step)


def _identity(tensor: Tensor) -> tuple:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def half_precision(precision: str | None, means: Tensor) -> bool:
    """Whether a call of this precision, by the "rapfast" backend on the device of means, runs on fp16 operands."""
    on_gpu = means.device.type == "cuda"
    if on_gpu:
        require_cuda(means)
    if precision is None:
        return on_gpu
    if check.choice("precision", precision, PRECISIONS) == "fp16" and not on_gpu:
        raise NotImplementedError(f'precision must be "fp32" or None on {means.device}, got "fp16": that is for a GPU')
    if precision == "fp32" and means.dtype == torch.float64:
        raise ValueError('precision must be None for a float64 scene, got "fp32"')
    return precision == "fp16"


def map_pixels(
    feature_maps: Tensor | Sequence[Tensor], ids: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], list[int]]:
    """The maps that are used, as the kernels read them: [h, w, C] contiguous, of a dtype; and each id's place among
    them. Copies what does not lie so."""
    used = sorted(set(ids))
    if isinstance(feature_maps, Tensor) and len(used) == len(feature_maps):
        pixels = list(_pixels(feature_maps, dtype).unbind())
    else:
        pixels = [_pixels(feature_maps[k], dtype) for k in used]
    places = {k: i for i, k in enumerate(used)}
    return pixels, [places[k] for k in ids]


def _pixels(feature_maps: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., C, h, w] -> [..., h, w, C] at an address that 16-byte loads may use."""
    if math.prod(feature_maps.shape[-3:]) >= 1 << 31:
        raise ValueError(f"feature_maps must have fewer than 2^31 numbers each, got {list(feature_maps.shape)}")
    pixels = feature_maps.detach().movedim(-3, -1)
    if pixels.dtype != dtype or not pixels.is_contiguous():  # asked first: eight times in a batch of eight
        pixels = pixels.to(dtype).contiguous()
    return aligned(pixels)
