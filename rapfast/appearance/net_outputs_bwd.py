"""Backward of `net_outputs`: the network of the records again, layer by layer in plain torch, and back through it.

A chunk of records at a time, only those whose colour has a gradient. All is computed in the scene's dtype. Where the
forward has operands in half precision, the products of matrices on the way back are TF32, whose operands have float16's
mantissa and float32's range. The layers before them are not: rounded operands open and close ReLUs that are near zero,
and a few of those put a gradient off by more than all rounding on the way back. In full precision TF32 is off. Places
on the maps and sums over the records of a view are float64.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.appearance.color_net import Weights
from rapfast.appearance.features import DIRECTION_OFFSET, Z_OFFSET, positional_encoding
from rapfast.appearance.fused import PARTS
from rapfast.ops._library import define
from rapfast.ops.color_net import INPUTS
from rapfast.reference.color import camera_positions

_CHUNK = 1 << 16
"""Records that go through the network at a time: about 0.6 GB in float32 with RAP's widths."""

NET_SCHEMA = (
    "Tensor gaussian_ids, Tensor image_offsets, Tensor means, Tensor viewmats, Tensor Ks, Tensor intrinsic, "
    "Tensor? box_coord, Tensor? features, Tensor view_weights, Tensor[] parameters, Tensor[] maps, int[] map_ids, "
    "int[] form, float coord_scale"
)
"""Inputs of both operators, see `rapfast.appearance.net_outputs.NetInputs`."""


class Form(NamedTuple):
    """What the numbers `form` and the list `parameters` of the operators say."""

    weights: Weights
    kind: str
    part: str
    half: bool

    @staticmethod
    def read(form: Sequence[int], parameters: Sequence[Tensor]) -> Form:
        n_encoder, n_decoder, n_head, n_frequencies, kind, part, half = form
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        blocks = pairs[:n_encoder], pairs[n_encoder : n_encoder + n_decoder], pairs[n_encoder + n_decoder :]
        assert len(blocks[2]) == n_head
        kinds = {number: name for name, number in INPUTS.items()}
        weights = Weights(*blocks, None if n_frequencies < 0 else n_frequencies)
        return Form(weights, kinds[kind], PARTS[part], bool(half))

    @property
    def n_outputs(self) -> int:
        head = [] if self.part == "decode" else self.weights.color_decoder
        return (head or self.weights.decoder)[-1][1].shape[0]


def _backward_fake(
    v_outputs, gaussian_ids, image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights,
    parameters, maps, map_ids, form, coord_scale, wanted,
):  # fmt: skip
    inputs = [means, viewmats, Ks, intrinsic, box_coord, features, view_weights, *parameters, *maps]
    return [
        torch.empty_like(x) if want and x is not None else means.new_empty((0,))
        for x, want in zip(inputs, wanted, strict=True)
    ]


def _backward(
    v_outputs, gaussian_ids, image_offsets, means, viewmats, Ks, intrinsic, box_coord, features, view_weights,
    parameters, maps, map_ids, form, coord_scale, wanted,
):  # fmt: skip
    read = Form.read(form, parameters)
    with torch.autocast(means.device.type, enabled=False), _matmuls(means.device, in_tf32=False):
        # Most records of a picture are hidden; their colours have no gradient.
        rows = v_outputs.any(1).nonzero()[:, 0]
        images = torch.bucketize(rows, image_offsets[1:], right=True)
        b = _Backward(
            read, means, viewmats, Ks, intrinsic, box_coord, features, view_weights.to(means), parameters, maps,
            map_ids, coord_scale, wanted,
        )  # fmt: skip
        for first in range(0, len(rows), _CHUNK):
            part = slice(first, first + _CHUNK)
            b.add(gaussian_ids[rows[part]].long(), images[part], v_outputs[rows[part]])
        sums = b.finish()
    inputs = [means, viewmats, Ks, intrinsic, box_coord, features, view_weights, *parameters, *maps]
    return [
        torch.empty_like(x).copy_(v) if want and x is not None else means.new_empty((0,))
        for x, v, want in zip(inputs, sums, wanted, strict=True)
    ]


net_outputs_bwd_op = define(
    f"net_outputs_bwd(Tensor v_outputs, {NET_SCHEMA}, bool[] wanted) -> Tensor[]",
    fake=_backward_fake,
    cpu=_backward,
    cuda=_backward,
)


class _Backward:
    """The sums of one backward, and the walk that adds to them."""

    def __init__(
        self, form: Form, means: Tensor, viewmats: Tensor, Ks: Tensor, intrinsic: Tensor, box_coord: Tensor | None,
        features: Tensor | None, view_weights: Tensor, parameters: Sequence[Tensor], maps: Sequence[Tensor],
        map_ids: Sequence[int], coord_scale: float, wanted: Sequence[bool],
    ) -> None:  # fmt: skip
        self.form, self.means, self.intrinsic = form, means, intrinsic.flatten(1)
        self.viewmats, self.Ks, self.view_weights = viewmats.double(), Ks.double(), view_weights
        self.positions = camera_positions(viewmats)
        self.box_coord, self.coord_scale, self.features = box_coord, coord_scale, features
        # Where there are no views, there are no maps either.
        self.atlas = _Atlas.of(maps, map_ids, form.half, means) if form.kind == "maps" and maps else None
        self.v_means, self.v_intrinsic = torch.zeros_like(means), torch.zeros_like(self.intrinsic)
        self.v_box_coord = None if box_coord is None else torch.zeros_like(box_coord)
        self.v_features = None if features is None else torch.zeros_like(features)
        self.v_parameters = [torch.zeros_like(p) for p in parameters]
        self.with_places = any(wanted[i] for i in (0, 1, 2, 4))  # means, viewmats, Ks, box_coord
        self.with_parameters, self.with_maps = any(wanted[7 : 7 + len(parameters)]), any(wanted[7 + len(parameters) :])
        # Per view: the camera's position 3, R 9, t 3 and K 9 of the projection onto map 2, the weight 1.
        self.v_views = means.new_zeros((len(viewmats), 25), dtype=torch.float64)

    def add(self, ids: Tensor, images: Tensor, v: Tensor) -> None:
        """Adds what records of Gaussians ids [n] in views images [n] give, whose outputs have gradients v [n, F]."""
        net, part = self.form.weights, self.form.part
        means, own = self.means[ids], self.intrinsic[ids]
        scale = self.view_weights[images][:, None]
        v_views = v.new_zeros((len(ids), 25), dtype=torch.float64)
        v_encoder, v_decoder, v_head = self._parameters_of_blocks()

        # Forward, every layer's input kept.
        if part == "head":
            fed = self._own_features(ids, images)
            decoded = fed * scale
        else:
            taps = None
            if self.atlas is not None:
                taps = self._taps(means, ids, images)
                texels = self.atlas.texels[taps.rows].to(v.dtype)
                fed = (texels * taps.weights[..., None]).sum(2).flatten(1)
            else:
                fed = self.features[images]
            encoded = [] if net.n_frequencies is None else [positional_encoding(means, net.n_frequencies)]
            encoder_inputs, x = _through(net.encoder, torch.cat([*encoded, fed * scale, own], 1))
            decoder_inputs, decoded = _through(net.decoder, torch.cat([x, own], 1))

        # And back.
        if part != "decode" and net.color_decoder:
            offset = means - self.positions[images]
            distance = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            direction = offset / (distance + DIRECTION_OFFSET)
            head_inputs, _ = _through(net.color_decoder, torch.cat([decoded, direction], 1))
            v = self._back(net.color_decoder, head_inputs, v, v_head)
            v, v_direction = v[:, :-3], v[:, -3:]
            along = (v_direction * direction).sum(1, keepdim=True)
            along = torch.where(distance > 0, along / distance, 0)
            v_offset = v_direction / (distance + DIRECTION_OFFSET) - along * direction
            self.v_means.index_add_(0, ids, v_offset)
            v_views[:, :3] = -v_offset
        if part == "head":
            v_fed = v * scale
            self._add_own_features(ids, images, v_fed)
            v_views[:, 24] = (v * fed).sum(1)
        else:
            v = self._back(net.decoder, decoder_inputs, v, v_decoder)
            n_own = net.n_intrinsic
            v, v_own = v[:, : v.shape[1] - n_own], v[:, v.shape[1] - n_own :]
            v = self._back(net.encoder, encoder_inputs, v, v_encoder)
            v_position, v_scaled, v_first = v.split([net.n_position, net.n_appearance, n_own], 1)
            self.v_intrinsic.index_add_(0, ids, v_own + v_first)
            if encoded:
                self.v_means.index_add_(0, ids, _positional_encoding_vjp(encoded[0], v_position))
            v_views[:, 24] = (v_scaled * fed).sum(1)
            v_fed = v_scaled * scale
            if taps is None:
                self.v_features += _sums_of_views(images, v_fed.double(), len(self.viewmats)).to(v.dtype)
            else:
                v_map = v_fed.unflatten(1, (3, 1, -1))
                if self.with_maps:
                    self.atlas.add(taps, v_map)
                if self.with_places:
                    self._add_places(taps, (texels * v_map).sum(-1), ids, v_views)
        self.v_views += _sums_of_views(images, v_views, len(self.viewmats))

    def finish(self) -> list[Tensor | None]:
        """Gradients in the order of the operator's inputs."""
        n_views = len(self.viewmats)
        v_position, v_R, v_t, v_K, v_weights = self.v_views.split([3, 9, 3, 9, 1], 1)
        # c = -R^-1 t: dc = -R^-1 (dt + dR c). Singular cameras see nothing and have no gradient.
        r0, r1, r2 = self.viewmats[:, :3, :3].unbind(1)
        adjugate = torch.stack([torch.linalg.cross(r1, r2), torch.linalg.cross(r2, r0), torch.linalg.cross(r0, r1)], 1)
        solved = -(adjugate * v_position[:, None]).sum(-1) / (r0 * adjugate[:, 0]).sum(1, keepdim=True)
        moves = (v_position != 0).any(1, keepdim=True)
        solved, center = (torch.where(moves, x, 0) for x in (solved, self.positions.double()))
        v_viewmats = self.viewmats.new_zeros((n_views, 4, 4))
        v_viewmats[:, :3, :3] = v_R.reshape(-1, 3, 3) + solved[:, :, None] * center[:, None]
        v_viewmats[:, :3, 3] = v_t + solved
        v_maps = [] if self.atlas is None else self.atlas.gradients()
        return [
            self.v_means, v_viewmats, v_K.reshape(-1, 3, 3), self.v_intrinsic.unflatten(1, (-1, 3)), self.v_box_coord,
            self.v_features, v_weights[:, 0], *self.v_parameters, *v_maps,
        ]  # fmt: skip

    def _parameters_of_blocks(self) -> list[list[Tensor] | None]:
        """The gradients of each block's weights and biases, as they follow each other; None where none is wanted."""
        if not self.with_parameters:
            return [None] * 3
        ends = [2 * len(block) for block in self.form.weights[:3]]
        return [self.v_parameters[sum(ends[:i]) : sum(ends[: i + 1])] for i in range(3)]

    def _back(
        self, block: list[tuple[Tensor, Tensor]], inputs: list[Tensor], v: Tensor, v_parameters: list[Tensor] | None
    ) -> Tensor:
        """From the gradient of the block's output to that of its input; adds to the parameters' on the way."""
        with _matmuls(v.device, in_tf32=self.form.half):
            for i in reversed(range(len(block))):
                if v_parameters is not None:
                    v_parameters[2 * i].addmm_(v.T, inputs[i])
                    v_parameters[2 * i + 1] += v.sum(0)
                v = v @ block[i][0]
                if i:
                    v = torch.where(inputs[i] > 0, v, 0)
        return v

    def _rows_of_features(self, ids: Tensor, images: Tensor) -> Tensor:
        return ids if self.features.dim() == 2 else images * len(self.means) + ids

    def _own_features(self, ids: Tensor, images: Tensor) -> Tensor:
        return self.features.flatten(0, -2)[self._rows_of_features(ids, images)]

    def _add_own_features(self, ids: Tensor, images: Tensor, v: Tensor) -> None:
        self.v_features.flatten(0, -2).index_add_(0, self._rows_of_features(ids, images), v)

    def _taps(self, means: Tensor, ids: Tensor, images: Tensor) -> _Taps:
        """Where records read the maps. Formulas: `features.map_coordinates` and `sample_map`."""
        box = self.box_coord[ids].double()
        viewmat, K = self.viewmats[images], self.Ks[images]
        points = means.double()
        in_camera = (viewmat[:, :3, :3] * points[:, None]).sum(-1) + viewmat[:, :3, 3]
        u, v, z = (K * in_camera[:, None]).sum(-1).unbind(-1)
        shifted = z + Z_OFFSET
        xy = torch.stack([u, v], -1) / shifted[:, None]
        size = box[:, 2].flip(-1)
        valid = ((xy > 0) & (xy < size)).all(-1) & (z > 0)
        xy, size = (torch.where(valid[:, None], x, y) for x, y in ((xy, 0.0), (size, 1.0)))
        shifted = torch.where(valid, shifted, 1)
        projected = torch.where(valid[:, None], xy / (size / 2) - 1, 0)
        places = torch.cat([box[:, :2] / self.coord_scale, projected[:, None]], 1)
        rows, weights, slopes = self.atlas.look_up(places, images)
        weights[:, 2] *= valid[:, None]
        slopes[:, :, 2] *= valid[None, :, None]
        return _Taps(rows, weights.to(means.dtype), slopes, xy, size, shifted, in_camera, points, images)

    def _add_places(self, taps: _Taps, v_weights: Tensor, ids: Tensor, v_views: Tensor) -> None:
        """On from the gradients [n, 3, 4] of the taps' weights, through the places on the maps."""
        v_places = torch.stack([(v_weights * slope).sum(-1) for slope in taps.slopes], -1)  # [n, 3, 2]
        v_box = torch.empty_like(v_places)
        v_box[:, :2] = v_places[:, :2] / self.coord_scale
        v_box[:, 2] = (-2 * v_places[:, 2] * taps.xy / taps.size.square()).flip(-1)
        self.v_box_coord.index_add_(0, ids, v_box.to(self.v_box_coord.dtype))
        v_xy = v_places[:, 2] * 2 / taps.size
        v_uv = v_xy / taps.shifted[:, None]
        v_uvz = torch.cat([v_uv, -(v_uv * taps.xy).sum(1, keepdim=True)], 1)
        v_camera = (v_uvz[:, :, None] * self.Ks[taps.images]).sum(1)
        v_points = (v_camera[:, :, None] * self.viewmats[taps.images, :3, :3]).sum(1)
        self.v_means.index_add_(0, ids, v_points.to(self.v_means.dtype))
        v_views[:, 3:12] = (v_camera[:, :, None] * taps.points[:, None]).flatten(1)
        v_views[:, 12:15] = v_camera
        v_views[:, 15:24] = (v_uvz[:, :, None] * taps.in_camera[:, None]).flatten(1)


class _Taps(NamedTuple):
    """Of n records on three maps, the four texels around each place."""

    rows: Tensor  # [n, 3, 4] of the atlas
    weights: Tensor  # [n, 3, 4]
    slopes: Tensor  # [2, n, 3, 4] of the weights, by x and by y in -1..1
    xy: Tensor  # [n, 2] pixels on map 2, 0 where it is not met
    size: Tensor  # [n, 2] of the window there, 1 where it is not met
    shifted: Tensor  # [n] depth + Z_OFFSET, 1 where it is not met
    in_camera: Tensor  # [n, 3]
    points: Tensor  # [n, 3]
    images: Tensor  # [n]


class _Atlas:
    """All maps in one table of texels, of 16 features each: map r's at 3 (y w + x) + k from its first row on."""

    @staticmethod
    def of(maps: Sequence[Tensor], map_ids: Sequence[int], half: bool, like: Tensor) -> _Atlas:
        dtype = torch.float16 if half else like.dtype
        atlas = _Atlas()
        flat = [m.movedim(0, -1).to(dtype).reshape(-1, m.shape[0] // 3) for m in maps]
        starts = [0]
        for texels in flat:
            starts.append(starts[-1] + len(texels))
        atlas.sizes = [tuple(m.shape[1:]) for m in maps]
        atlas.texels = flat[0] if len(flat) == 1 else torch.cat(flat)
        atlas.v_texels = torch.zeros_like(atlas.texels, dtype=like.dtype)
        # [C, 3] of each view: width, height and the first row of its map.
        table = [(atlas.sizes[k][1], atlas.sizes[k][0], starts[k]) for k in map_ids]
        atlas.of_view = torch.tensor(table, dtype=torch.int64, device="cpu").reshape(-1, 3).to(like.device)
        return atlas

    def look_up(self, places: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, weights [n, 3, 4] and slopes [2, n, 3, 4] of the texels around places [n, 3, 2] (-1..1)."""
        of_record = self.of_view[images]
        size = of_record[:, None, :2]  # [n, 1, 2]
        at = ((places + 1) * size - 1) / 2
        inside = (at > 0) & (at < size - 1)  # beyond, the border goes on; what is not a number stays there
        at = torch.where(inside, at, (at >= size - 1) * (size - 1))
        low = at.floor()
        f = at - low
        low = low.long()
        high = torch.minimum(low + 1, size - 1)
        rows, weights, slopes = [], [], []
        for column, wx, dx in ((low[..., 0], 1 - f[..., 0], -1), (high[..., 0], f[..., 0], 1)):
            for line, wy, dy in ((low[..., 1], 1 - f[..., 1], -1), (high[..., 1], f[..., 1], 1)):
                texel = line * size[..., 0] + column
                rows.append(of_record[:, 2:] + 3 * texel + torch.arange(3, device=texel.device))
                weights.append(wx * wy)
                slopes.append(torch.stack([dx * wy, dy * wx], -1))
        per_unit = torch.where(inside, size / 2, 0)  # pixels over -1..1
        by_place = torch.stack(slopes, -2) * per_unit[..., None, :]  # [n, 3, 4, 2]
        return torch.stack(rows, -1), torch.stack(weights, -1), by_place.movedim(-1, 0)

    def add(self, taps: _Taps, v: Tensor) -> None:
        """v [n, 3, 1, 16]: gradients of what was read."""
        self.v_texels.index_add_(0, taps.rows.flatten(), (v * taps.weights[..., None]).flatten(0, 2))

    def gradients(self) -> list[Tensor]:
        """[48, h, w] of each map."""
        parts = self.v_texels.split([3 * h * w for h, w in self.sizes])
        return [p.reshape(h, w, -1).movedim(-1, 0) for p, (h, w) in zip(parts, self.sizes, strict=True)]


def _through(block: list[tuple[Tensor, Tensor]], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each layer's input, and the block's output."""
    inputs = []
    for i, (weight, bias) in enumerate(block):
        inputs.append(torch.relu_(x) if i else x)
        x = torch.addmm(bias, x, weight.T)
    return inputs, x


def _positional_encoding_vjp(encoded: Tensor, v: Tensor) -> Tensor:
    """Adjoint of `features.positional_encoding`, from its output [n, 3 + 6 F]."""
    sines = encoded[:, 3:].unflatten(1, (-1, 2, 3))  # [n, F, (sin, cos), 3]
    v_sines = v[:, 3:].unflatten(1, (-1, 2, 3))
    factors = 2.0 ** torch.arange(sines.shape[1], dtype=v.dtype, device=v.device)[:, None]
    return v[:, :3] + (factors * (sines[:, :, 1] * v_sines[:, :, 0] - sines[:, :, 0] * v_sines[:, :, 1])).sum(1)


def _sums_of_views(images: Tensor, values: Tensor, n_views: int) -> Tensor:
    """[C, D] sums of values [n, D] (float64) over the records of each view: a product of matrices, since millions of
    atomic additions to a few rows would wait for each other."""
    members = images[None] == torch.arange(n_views, device=images.device)[:, None]
    return members.to(values.dtype) @ values


_switch = threading.RLock()


def callers_tf32() -> tuple[bool, bool]:
    """Whether convolutions, and products of float32 matrices, may use TF32 on a GPU: as the caller has it, whatever a
    backward in another thread has meanwhile. What torch had before 2.9 raises where the newer switches were set."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with _switch:
        if hasattr(matmul, "fp32_precision"):
            return cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"
        return cudnn.allow_tf32, matmul.allow_tf32


@contextlib.contextmanager
def _matmuls(device: torch.device, *, in_tf32: bool) -> Iterator[None]:
    """Products of float32 matrices on a GPU with TF32 operands or without, for one thread at a time: the switch is
    the process's."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if in_tf32 else "ieee")
    if not hasattr(matmul, name):  # torch before 2.9
        name, value = "allow_tf32", in_tf32
    with _switch:
        before = getattr(matmul, name)
        if name == "fp32_precision":
            # What is read may be a wider setting's, which is to go on reaching matmul when it is changed.
            setattr(matmul, name, "none")
            before = "none" if getattr(matmul, name) == before else before
        setattr(matmul, name, value)
        try:
            yield
        finally:
            setattr(matmul, name, before)
