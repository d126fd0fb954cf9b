"""A call that is too large for its memory, or for 32-bit indices, as several smaller ones with the same pixels.

Views are independent, bit by bit, so groups of them are rendered one after the other into the same outputs; a view that
is still too large is rendered in bands of tile rows, and finished when it is whole. What is kept of each group is what
``meta`` needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rapfast.ops._library import TILE_SIZE
from rapfast.ops.color_net import NetworkInput
from rapfast.ops.project import Records

TOGETHER = 8
"""Views that are rendered together wherever they fit: fewer at a time take longer."""


class TooLarge(RuntimeError):
    """A call wants more than it may have. Nothing was drawn, and nothing too large was allocated.

    Attributes:
        n_bytes: what it would take; None where an index would have more than 31 bits, or there
            are too many regions.
    """

    def __init__(self, message: str, n_bytes: int | None) -> None:
        super().__init__(message)
        self.n_bytes = n_bytes


class Inputs(NamedTuple):
    """What differs from view to view, or from scene to scene."""

    means: Tensor  # [B, N, 3]
    quats: Tensor | None  # [B, N, 4]
    scales: Tensor | None  # [B, N, 3]
    covars: Tensor | None  # [B, N, 3, 3]
    opacities: Tensor  # [B, N]
    colors: Tensor | None  # [B, (C,) N, D] or [B, (C,) N, K, 3]; [1, N, ...]: of all scenes
    viewmats: Tensor  # [B, C, 4, 4]
    Ks: Tensor  # [B, C, 3, 3]
    backgrounds: Tensor | None  # [I, D] or [I, H, W, D]
    per_camera: bool  # colours
    network_input: NetworkInput | None = None  # of one scene

    @property
    def n_images(self) -> int:
        return self.viewmats.shape[0] * self.viewmats.shape[1]

    @property
    def colors_shared(self) -> bool:
        return self.colors is not None and not self.per_camera and self.colors.shape[0] < self.means.shape[0]

    def part(self, first: int, count: int) -> Inputs:
        """The images [first, first + count): whole scenes, or cameras of one."""
        c = self.viewmats.shape[1]
        if first % c == 0 and count % c == 0:
            scenes, cameras = slice(first // c, (first + count) // c), slice(None)
        else:
            scenes, cameras = slice(first // c, first // c + 1), slice(first % c, first % c + count)

        def cut(tensor: Tensor | None, with_cameras: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            return tensor[scenes, cameras] if with_cameras else tensor[scenes]

        return Inputs(
            means=cut(self.means),
            quats=cut(self.quats),
            scales=cut(self.scales),
            covars=cut(self.covars),
            opacities=cut(self.opacities),
            colors=self.colors if self.colors_shared else cut(self.colors, self.per_camera),
            viewmats=cut(self.viewmats, True),
            Ks=cut(self.Ks, True),
            backgrounds=None if self.backgrounds is None else self.backgrounds[first : first + count],
            per_camera=self.per_camera,
            network_input=None if self.network_input is None else _of_views(self.network_input, cameras),
        )


def _of_views(given: NetworkInput, cameras: slice) -> NetworkInput:
    """What ``cameras`` of a scene feed to the network."""
    per_camera = given.features is not None and (given.kind == "embedding" or given.features.dim() == 3)
    return replace(
        given,
        view_weights=given.view_weights[cameras],
        map_ids=None if given.map_ids is None else given.map_ids[cameras],
        features=given.features[cameras] if per_camera else given.features,
    )


class Views(NamedTuple):
    """What rendering some views leaves."""

    images: Tensor  # [I, h, w, D] or [I, D, h, w]
    alphas: Tensor  # [I, h, w, 1] or [I, 1, h, w]
    n_invalid: Tensor  # [I] int64
    make_records: Callable[[], Records]  # reads no input
    n_kept: int  # bytes that make_records holds


class Renderer(NamedTuple):
    """How a group of views is rendered. `whole` and `band` raise `TooLarge` where they would take more bytes than the
    third argument allows, None being any number."""

    # some views; into the images and alphas given, or (None) into new ones
    whole: Callable[[Inputs, tuple[Tensor, Tensor] | None, int | None], Views]
    # of one view the tile rows [first, first + count), before the composite; None: the backend knows no bands
    band: Callable[[Inputs, tuple[int, int], int | None], Views] | None
    # a view's blended colours [1, H, W, D] and alphas [1, H, W, 1] to its image and alpha
    finish: Callable[[Inputs, Tensor, Tensor], tuple[Tensor, Tensor]]
    output_bytes: int  # of one view's image and alpha, finished
    blended_bytes: int  # of its blended colours and alphas
    # images and alphas of so many views for `whole` to write to; None: it cannot
    make_outputs: Callable[[int], tuple[Tensor, Tensor]] | None = None
    # bytes above which more than `TOGETHER` views are split although nobody asked, which costs no time; None: never
    comfortable: int | None = None


def render(renderer: Renderer, inputs: Inputs, height: int, max_memory: int | None) -> Views:
    """Renders all views, in groups where it must be.

    Args:
        height: of the views before post-processing, pixels.
        max_memory: bytes that the call may take, outputs and what ``meta`` keeps included. None: as many as it needs.

    Raises:
        ValueError: ``max_memory`` is too small for the smallest part.
        TooLarge: without ``max_memory``, where one view alone needs more than 31-bit indices and knows no bands.
    """
    n = inputs.n_images
    if n == 0:
        return renderer.whole(inputs, None, None)
    outputs = _Outputs(n, renderer, max_memory)
    size = n
    while outputs.done < n:
        first, count = outputs.done, _count(size, outputs.done, inputs.viewmats.shape[1], n)
        try:
            if count == n:
                return renderer.whole(inputs, None, outputs.budget(count))
            views = renderer.whole(inputs.part(first, count), outputs.room(count), outputs.budget(count))
        except TooLarge as error:
            if count > 1:
                size = max(count // 2, TOGETHER if count > TOGETHER else 1)
                continue
            views = _banded(renderer, inputs.part(first, 1), height, outputs, error)
        outputs.add(views)
    return outputs.views()


def _count(size: int, first: int, n_cameras: int, n: int) -> int:
    """Images of the next group, at most ``size``: whole scenes, or cameras of one."""
    if size >= n_cameras:
        return min(size // n_cameras * n_cameras, n - first)
    return min(size, n_cameras - first % n_cameras)


class _Outputs:
    """The outputs of all views, filled group by group, and what is left of the memory."""

    def __init__(self, n: int, renderer: Renderer, max_memory: int | None) -> None:
        self.n, self.renderer, self.max_memory = n, renderer, max_memory
        self.done = 0
        self._images: Tensor | None = None
        self._alphas: Tensor | None = None
        self._groups: list[tuple[Tensor, Callable[[], Records]]] = []
        self._kept = 0

    def others(self, count: int, banded: bool = False) -> int:
        """Bytes that are taken while a group of so many views is rendered, but for what it takes itself."""
        if count == self.n and not banded:
            return 0
        n_outputs = self.n
        if banded:
            return n_outputs * self.renderer.output_bytes + self._kept + self.renderer.blended_bytes
        if self.renderer.make_outputs is not None:
            n_outputs -= count  # those that it writes to are its own
        return n_outputs * self.renderer.output_bytes + self._kept

    def budget(self, count: int, banded: bool = False) -> int | None:
        """Bytes that a group may take."""
        if self.max_memory is None:
            return self.renderer.comfortable if count > TOGETHER else None
        return self.max_memory - self.others(count, banded)

    def room(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Where the next group is to be written, if it can be."""
        if self.renderer.make_outputs is None:
            return None
        if self._images is None:
            self._images, self._alphas = self.renderer.make_outputs(self.n)
        views = slice(self.done, self.done + count)
        return self._images[views], self._alphas[views]

    def add(self, views: Views) -> None:
        """Takes the next group, copying what was not written where it belongs."""
        count = len(views.n_invalid)
        if self._images is None:
            self._images, self._alphas = (
                tensor.new_empty((self.n, *tensor.shape[1:])) for tensor in (views.images, views.alphas)
            )
        for whole, part in ((self._images, views.images), (self._alphas, views.alphas)):
            place = whole[self.done : self.done + count]
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)
        self._groups.append((views.n_invalid, views.make_records))
        self._kept += views.n_kept
        self.done += count

    def views(self) -> Views:
        groups = self._groups
        return Views(
            images=self._images,
            alphas=self._alphas,
            n_invalid=torch.cat([n_invalid for n_invalid, _ in groups]),
            make_records=lambda: _joined([make() for _, make in groups]),
            n_kept=self._kept,
        )


def _joined(groups: list[Records]) -> Records:
    """The records of consecutive groups of images as those of one call."""
    offsets, n_records = [groups[0].image_offsets[:1]], 0
    for group in groups:
        offsets.append(group.image_offsets[1:] + n_records)
        n_records += len(group.records)
    return Records(
        records=torch.cat([group.records for group in groups]),
        radii=torch.cat([group.radii for group in groups]),
        gaussian_ids=torch.cat([group.gaussian_ids for group in groups]),
        image_offsets=torch.cat(offsets),
        n_invalid=torch.cat([group.n_invalid for group in groups]),
    )


def _banded(renderer: Renderer, view: Inputs, height: int, outputs: _Outputs, error: TooLarge) -> Views:
    """One view, as many tile rows at a time as fit: half of them at first."""
    if renderer.band is None:
        raise _no_room(error, outputs.others(1), outputs, "one view")
    n_rows = -(-height // TILE_SIZE)
    budget = outputs.budget(1, banded=True)
    blended = alphas = None
    views: Views | None = None
    first, size = 0, n_rows // 2
    while first < n_rows:
        if size == 0:
            kept = 0 if views is None else views.n_kept
            raise _no_room(error, outputs.others(1, banded=True) + kept, outputs, "one row of tiles")
        count = min(size, n_rows - first)
        try:
            band = renderer.band(view, (first, count), budget)
        except TooLarge as again:
            # without its frames, of which this is one: what they hold would live until the next collection
            error, size = again.with_traceback(None), count // 2
            continue
        if views is None:
            blended, alphas = (t.new_empty((1, height, *t.shape[2:])) for t in (band.images, band.alphas))
            views = band._replace(images=blended, alphas=alphas)  # its records are those of the whole view
            if budget is not None:
                budget -= band.n_kept
        top = first * TILE_SIZE
        blended[:, top : top + band.images.shape[1]] = band.images
        alphas[:, top : top + band.alphas.shape[1]] = band.alphas
        del band  # the next one wants its memory
        first += count
    images, alphas = renderer.finish(view, blended, alphas)
    return views._replace(images=images, alphas=alphas)


def _no_room(error: TooLarge, others: int, outputs: _Outputs, smallest: str) -> Exception:
    """What to raise where the smallest part is still too large."""
    if outputs.max_memory is None or error.n_bytes is None:
        return error
    return ValueError(
        f"max_memory must be at least {others + error.n_bytes} bytes to render {smallest} at a time of {outputs.n} "
        f"views, got {outputs.max_memory}"
    )
