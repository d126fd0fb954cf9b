"""RAP's colour network: from a Gaussian's position, appearance and own features to its colour in one view.

Three ReLU networks in a row. The encoder takes [PE(position) | w * appearance | intrinsic], the decoder [encoder's
output | intrinsic], the colour head [decoder's output | view direction]. All widths are read from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rapfast.appearance.features import positional_encoding, view_directions
from rapfast.appearance.state_dict import check_shapes, check_state, without_compile_prefix

BLOCKS = ("encoder", "decoder", "color_decoder")


class Weights(NamedTuple):
    """The tensors of a colour network without its modules: what an operator is given. Lists of (weight, bias)."""

    encoder: list[tuple[Tensor, Tensor]]
    decoder: list[tuple[Tensor, Tensor]]
    color_decoder: list[tuple[Tensor, Tensor]]  # empty where the decoder puts out spherical harmonics
    n_frequencies: int | None

    @property
    def n_position(self) -> int:
        """Numbers of the encoded position."""
        return 0 if self.n_frequencies is None else 3 + 6 * self.n_frequencies

    @property
    def n_intrinsic(self) -> int:
        return self.decoder[0][0].shape[1] - self.encoder[-1][0].shape[0]

    @property
    def n_appearance(self) -> int:
        return self.encoder[0][0].shape[1] - self.n_position - self.n_intrinsic


class ReluNet(nn.Module):
    """Linear layers lin0, lin1, ... with biases, ReLU between them and none behind the last."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        for i, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
            self.add_module(f"lin{i}", nn.Linear(n_in, n_out))

    def tensors(self) -> list[Tensor]:
        """Weights and biases, for each call to look at: `parameters()` takes a hundred microseconds for a network."""
        return [tensor for layer in self._modules.values() for tensor in layer._parameters.values()]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer."""
        return [(layer.weight, layer.bias) for layer in self._modules.values()]

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.children()):
            x = layer(torch.relu(x) if i else x)
        return x


class ColorNet(nn.Module):
    """A colour network in plain torch: any floating dtype, differentiable, one view's Gaussians at a time.

    Args:
        encoder, decoder, color_decoder: widths of each block, input first, output last. RAP's are the defaults.
            color_decoder None is a network whose decoder puts out spherical harmonics.
        n_frequencies: of the positional encoding; None feeds no position.

    Attributes:
        n_intrinsic: features of each Gaussian, what the decoder takes beside the encoder's output.
        n_appearance: the rest of the encoder's input: features sampled from maps, or a view's embedding.

    Raises:
        ValueError: the widths do not fit each other.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (159, 128, 96, 64, 48),
        decoder: Sequence[int] = (96, 48, 48, 48),
        color_decoder: Sequence[int] | None = (51, 48, 3),
        *,
        n_frequencies: int | None = 10,
    ) -> None:
        super().__init__()
        self.n_frequencies = n_frequencies
        n_position = 0 if n_frequencies is None else 3 + 6 * n_frequencies
        self.n_intrinsic = decoder[0] - encoder[-1]
        self.n_appearance = encoder[0] - n_position - self.n_intrinsic
        if self.n_intrinsic < 0:
            raise ValueError(f"decoder must take at least the encoder's {encoder[-1]} outputs, got {decoder[0]} inputs")
        if self.n_appearance < 0:
            raise ValueError(
                f"encoder must take at least {n_position + self.n_intrinsic} inputs ({n_position} of the position, "
                f"{self.n_intrinsic} intrinsic), got {encoder[0]}"
            )
        if color_decoder is not None and color_decoder[0] != decoder[-1] + 3:
            raise ValueError(
                f"color_decoder must take {decoder[-1] + 3} inputs (the decoder's outputs and a direction), "
                f"got {color_decoder[0]}"
            )
        self.encoder = ReluNet(encoder)
        self.decoder = ReluNet(decoder)
        self.color_decoder = None if color_decoder is None else ReluNet(color_decoder)

    def tensors(self) -> list[Tensor]:
        """Weights and biases of all blocks."""
        head = [] if self.color_decoder is None else self.color_decoder.tensors()
        return self.encoder.tensors() + self.decoder.tensors() + head

    def weights(self) -> Weights:
        """The same, block by block."""
        head = [] if self.color_decoder is None else self.color_decoder.pairs()
        return Weights(self.encoder.pairs(), self.decoder.pairs(), head, self.n_frequencies)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], source: str = "state", *, n_frequencies: int | None = 10
    ) -> ColorNet:
        """The network with the weights of RAP's `color_net.pth`, or of any other of this form; without gradients.

        Args:
            state: `encoder.lin0.weight` [out, in], `encoder.lin0.bias` [out], ..., `decoder.lin*` and, unless the
                decoder puts out spherical harmonics, `color_decoder.lin*`. A `_orig_mod.` prefix is taken off.
            source: opens the error sentences.
            n_frequencies: as in the constructor; weights do not tell.

        Raises:
            TypeError, ValueError: it is no such state dict; every entry that is missing, unknown or that does not
                fit its neighbour is named.
        """
        kept = check_state(state, source)
        widths = {block: _widths(kept, block) for block in BLOCKS}
        shapes: dict[str, tuple[int, ...]] = {}
        for block, sizes in widths.items():
            for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
                shapes |= {f"{block}.lin{i}.weight": (n_out, n_in), f"{block}.lin{i}.bias": (n_out,)}
        for block in ("encoder", "decoder"):
            if len(widths[block]) < 2:
                raise ValueError(f"{source}: {block}.lin0.weight [out, in] is missing")
        check_shapes(kept, shapes, source)
        head = widths["color_decoder"] if len(widths["color_decoder"]) > 1 else None
        try:
            net = cls(widths["encoder"], widths["decoder"], head, n_frequencies=n_frequencies)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        net.to(kept["encoder.lin0.weight"].dtype)
        net.load_state_dict(kept)
        return net.eval().requires_grad_(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`, also for the state dict of a compiled module (prefix `_orig_mod.`)."""
        return super().load_state_dict(without_compile_prefix(state_dict), *args, **kwargs)

    def decode(self, means: Tensor, appearance: Tensor, intrinsic: Tensor, view_weight: float | Tensor = 1.0) -> Tensor:
        """The part that does not depend on the view's direction, what RAP's `store_cache` keeps.

        Args:
            means: [n, 3] world positions.
            appearance: [n, n_appearance] sampled from maps (see `sample_features`), or one embedding
                [n_appearance] for the whole view.
            intrinsic: [n, 16, 3], or [n, n_intrinsic] in the order 3 k + c.
            view_weight: w, a number or a tensor [] or [n]: scales the appearance.

        Returns:
            [n, decoder's outputs].
        """
        n = len(means)
        intrinsic = intrinsic.flatten(1)
        if torch.is_tensor(view_weight) and view_weight.dim() == 1:
            view_weight = view_weight[:, None]
        parts = [(appearance * view_weight).expand(n, -1), intrinsic]
        if self.n_frequencies is not None:
            parts.insert(0, positional_encoding(means, self.n_frequencies))
        return self.decoder(torch.cat([self.encoder(torch.cat(parts, dim=-1)), intrinsic], dim=-1))

    def head(self, decoded: Tensor, directions: Tensor) -> Tensor:
        """Colours [n, 3] of decode()'s output in directions [n, 3]; no offset, no clamp.

        Raises:
            ValueError: the network has no colour head.
        """
        if self.color_decoder is None:
            raise ValueError("color_decoder is missing: this network puts out spherical harmonics, see sh()")
        return self.color_decoder(torch.cat([decoded, directions], dim=-1))

    def colors(
        self,
        means: Tensor,
        appearance: Tensor,
        intrinsic: Tensor,
        viewmat: Tensor,
        view_weight: float | Tensor = 1.0,
    ) -> Tensor:
        """Colours [n, 3] of one view's Gaussians as the camera viewmat [4, 4] sees them; the rest as in decode()."""
        return self.head(self.decode(means, appearance, intrinsic, view_weight), view_directions(means, viewmat))

    def sh(self, means: Tensor, appearance: Tensor, intrinsic: Tensor, view_weight: float | Tensor = 1.0) -> Tensor:
        """Spherical-harmonic coefficients [n, K, 3], for networks whose decoder puts them out; as decode().

        Raises:
            ValueError: the decoder has not 3 K outputs with K = 1, 4, 9, 16 or 25.
        """
        width = self.decoder.widths[-1]
        if width not in (3, 12, 27, 48, 75):
            raise ValueError(f"decoder must have 3, 12, 27, 48 or 75 outputs to be read as SH, got {width}")
        return self.decode(means, appearance, intrinsic, view_weight).unflatten(-1, (-1, 3))

    def forward(
        self,
        means: Tensor,
        appearance: Tensor,
        intrinsic: Tensor,
        viewmat: Tensor,
        view_weight: float | Tensor = 1.0,
    ) -> Tensor:
        """colors()."""
        return self.colors(means, appearance, intrinsic, viewmat, view_weight)


def _widths(state: Mapping[str, Tensor], block: str) -> list[int]:
    """[in of lin0, out of lin0, out of lin1, ...] as far as the names go; gaps and misfits show in check_shapes."""
    layers = {}
    for name, value in state.items():
        match = re.fullmatch(rf"{block}\.lin(0|[1-9]\d?)\.weight", name)
        if match and value.dim() == 2:
            layers[int(match[1])] = value
    if 0 not in layers:
        return []
    widths = [layers[0].shape[1]]
    for i in range(max(layers) + 1):
        # A layer that is missing is asked for with the width that its successor takes.
        width = layers[i].shape[0] if i in layers else layers[i + 1].shape[1] if i + 1 in layers else widths[-1]
        widths.append(width)
    return widths
