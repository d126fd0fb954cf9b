"""The attempts of `RandomViewSynthesizer.with_brisque`, and what random-view synthesis returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapfast.appearance.features import Z_OFFSET
from rapfast.rvs.brisque import Brisque
from rapfast.rvs.draws import Guess, SpeculativeDraws
from rapfast.rvs.poses import Array, world_to_camera

if TYPE_CHECKING:
    from rapfast.rvs.synthesis import RandomViewSynthesizer

REMEMBERED = 64
"""Latest outcomes that the next ones are guessed from."""

BATCH_COST = 3
"""What a batch of attempts costs beside its attempts, in attempts: launches, and the wait for the scores. (Between 1.5
and 6 an H200's time hardly changes.)"""

FURTHEST = 4
"""Attempts made ahead of their outcomes, in batches at most."""

SAMPLE = 1024
"""Gaussians counted on the host where it is asked whether more than one falls on the map, ..."""

CERTAIN = 8
"""... of which so many are more than one, however the map's border was rounded."""


@dataclass(frozen=True, eq=False)
class SyntheticViews:
    """M rendered views.

    Attributes:
        images: [M, 3, h, w], resized and normalised.
        poses: [M, 3, 4] float64 camera-to-world on the CPU, those of the images.
        weights: [M] float64 on the CPU; 1 where none are drawn.
        attempts: [M] int64 on the CPU, how many were made.
        accepted: [M] bool on the CPU, False where the last attempt failed too: the image shows the given pose, or by
            BRISQUE the best of the attempts.
        scores: [M] float64 on the CPU, of the best attempt by BRISQUE, infinite where none has one; else None.
    """

    images: Tensor
    poses: Tensor
    weights: Tensor
    attempts: Tensor
    accepted: Tensor
    scores: Tensor | None = None


class Shown(NamedTuple):
    """A picture that `on_pictures` is given: which view, and by BRISQUE its score and whether it was refused."""

    view: int
    score: float | None
    refused: bool


def views_of(images: Tensor, *arrays: Array) -> SyntheticViews:
    """`SyntheticViews` of arrays in its order."""
    return SyntheticViews(images, *(torch.from_numpy(np.array(array)) for array in arrays))


@dataclass(eq=False)
class _View:
    """What is known of a view whose attempts are under way."""

    score: float = np.inf
    pose: Array | None = None  # of the best attempt
    picture: Tensor | None = None  # its own
    leader: tuple[int, Tensor] | None = None  # the attempt whose colours the others take, and its viewmat
    decoded: Tensor | None = None  # those colours


def _whole_views(ahead: int, draws: SpeculativeDraws) -> int:
    """About so many attempts, but up to the last one of a view: its colours are made for all of them together."""
    left = draws.max_attempts - draws.position[1]
    return ahead if ahead < left else left + draws.max_attempts * round((ahead - left) / draws.max_attempts)


class _Tried(NamedTuple):
    """Attempts rendered and scored: pictures [n, 3, h, w] on the device, where each attempt's is, and the scores, NaN
    for one that fails."""

    pictures: Tensor
    row_of: dict[int, int]
    scores: list[float]

    def picture(self, attempt: int) -> Tensor:
        return self.pictures[self.row_of[attempt]]


class BrisqueLoop:
    """Attempts at views, batch by batch. `run`, then `views`.

    Args:
        owner: renders and scores.
        start: [M, 3, 4] given poses. ids: their reference images. threshold: a score below it ends a view's attempts.
        draws_weights: whether the best pose is rendered again with a drawn weight; else the attempt's picture is kept.
    """

    def __init__(
        self, owner: RandomViewSynthesizer, start: Array, ids: list[int], threshold: float, draws_weights: bool
    ) -> None:
        self.owner, self.ids, self.threshold, self.draws_weights = owner, ids, threshold, draws_weights
        if owner.brisque is None:
            owner.brisque = Brisque(owner.scene.scene.device)
        m = len(start)
        self.poses, self.weights, self.scores = start.copy(), np.ones(m), np.full(m, np.inf)
        self.attempts, self.accepted = np.zeros(m, dtype=np.int64), np.zeros(m, dtype=bool)
        self.buffer = owner.buffer(m)
        self.to_render: list[int] = []
        self.open: dict[int, _View] = {}
        means, boxes = owner.scene.scene.means, owner.scene.box_coord[:, 2]
        step = -(-len(means) // SAMPLE) or 1
        self.sample = means[::step].double().cpu().numpy(), boxes[::step].flip(-1).double().cpu().numpy()
        self.K = owner.K.double().cpu().numpy()

    def run(self, draws: SpeculativeDraws) -> None:
        outcomes: deque[bool] = deque(maxlen=REMEMBERED)
        while not draws.done:
            # An outcome is guessed to be the more frequent one of late.
            optimistic = 2 * sum(outcomes) >= len(outcomes)
            ahead = self._ahead(outcomes)
            if optimistic:
                guess = draws.guess(ahead, 1)
            else:
                guess = draws.guess(_whole_views(ahead, draws), draws.max_attempts)
            self._settle(draws, guess, self._try(guess), outcomes)
            here, made = draws.position
            view = self.open.get(here)
            self.open = {} if view is None else {here: view}
            if view is not None and view.leader is not None and view.leader[0] >= made:
                view.leader = view.decoded = None  # that attempt was dropped
            if len(self.to_render) >= self.owner.batch_size:
                self._render()

    def _ahead(self, outcomes: Sequence[bool]) -> int:
        """How many attempts to make next.

        Those behind the first outcome that was guessed wrong are made in vain. Where that happens with probability q,
        n attempts have about n - q n^2 / 2 of use, and BATCH_COST + n over that is least near sqrt(2 BATCH_COST / q).
        """
        wrong = min(sum(outcomes), len(outcomes) - sum(outcomes))
        q = (wrong + 1) / (len(outcomes) + 2)
        return min(FURTHEST * self.owner.batch_size, max(1, round((2 * BATCH_COST / q) ** 0.5)))

    def views(self) -> SyntheticViews:
        self._render()
        images = self.buffer.finish()
        return views_of(images, self.poses, self.weights, self.attempts, self.accepted, self.scores)

    def _try(self, guess: Guess) -> _Tried:
        """Render and score the attempts. The device is read back once, when all is under way."""
        owner, views = self.owner, guess.views.tolist()
        for name in views:
            self.open.setdefault(name, _View())
        alone = [i for i, name in enumerate(views) if self.open[name].leader is None]
        fails = dict(zip(alone, self._fails(guess.poses[alone]), strict=True))
        leaders: dict[int, int] = {}
        followers: dict[int, list[int]] = {}
        for i, name in enumerate(views):
            if self.open[name].leader is not None or name in leaders:  # its map is read, which did not fail
                followers.setdefault(name, []).append(i)
            elif not fails[i]:
                leaders[name] = i
        order = [*leaders.values(), *(i for members in followers.values() for i in members)]
        viewmats = owner.viewmats(guess.poses[order])
        for row, (name, i) in enumerate(leaders.items()):
            self.open[name].leader = int(guess.attempts[i]), viewmats[row]
        like = viewmats.new_empty(0)
        pictures = like.new_empty((len(order), 3, *owner.size), dtype=torch.float32)
        scores = like.new_empty(len(order), dtype=torch.float64)

        def draw(first: int, count: int, decoded: Callable[[], Tensor | None]) -> None:
            def work(begin: int, end: int) -> None:
                rows = slice(first + begin, first + end)
                ids = [self.ids[views[i]] for i in order[rows]]
                pictures[rows] = owner.pictures(viewmats[rows], ids, decoded())

            owner.in_batches(count, work)

        def score(begin: int, end: int) -> None:
            scores[begin:end] = owner.brisque.score(pictures[begin:end])

        draw(0, len(leaders), lambda: None)
        first = len(leaders)
        for name, members in followers.items():
            draw(first, len(members), lambda name=name: self._decoded(name))
            first += len(members)
            if name != views[-1]:  # which alone is likely to go on
                self.open[name].decoded = None
        owner.in_batches(len(order), score)
        row_of = {i: row for row, i in enumerate(order)}
        found = scores.tolist()
        return _Tried(pictures, row_of, [found[row_of[i]] if i in row_of else np.nan for i in range(len(guess))])

    def _fails(self, poses: Array) -> list[bool]:
        """Whether RAP fails at poses [P, 3, 4]. The device is asked about those alone that are not certain."""
        points, boxes = self.sample
        matrices = world_to_camera(poses).astype(np.float64)
        in_camera = points @ matrices[:, :3, :3].transpose(0, 2, 1) + matrices[:, None, :3, 3]
        u, v, z = np.moveaxis(in_camera @ self.K.T, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = u / (z + Z_OFFSET), v / (z + Z_OFFSET)
        counts = ((x > 0) & (x < boxes[:, 0]) & (y > 0) & (y < boxes[:, 1]) & (z > 0)).sum(1)
        fails = np.zeros(len(poses), dtype=bool)
        doubtful = np.flatnonzero(counts < CERTAIN)
        if len(doubtful):
            fails[doubtful] = self.owner.one_point(poses[doubtful])
        return fails.tolist()

    def _decoded(self, name: int) -> Tensor:
        view, owner = self.open[name], self.owner
        if view.decoded is None:
            (feature_map,) = owner.maps([self.ids[name]])
            view.decoded = owner.scene.decode(view.leader[1], owner.K, feature_map, 1.0, precision=owner.precision)
        return view.decoded

    def _settle(self, draws: SpeculativeDraws, guess: Guess, tried: _Tried, outcomes: deque[bool]) -> None:
        """Take over the outcomes up to the first that was guessed wrong."""
        refused: list[int] = []
        finished: dict[int, Tensor] = {}
        for i, score in enumerate(tried.scores):
            name, good = int(guess.views[i]), score < self.threshold
            view = self.open[name]
            if score < view.score:
                view.score, view.pose = score, guess.poses[i]
                view.picture = None if self.draws_weights else tried.picture(i).clone()
            if not good and score == score:
                refused.append(i)
            outcomes.append(good)
            for end in draws.settle([good]):
                self.attempts[name], self.accepted[name], self.scores[name] = end.attempts, good, view.score
                self.weights[name] = 1.0 if end.final_weight is None else end.final_weight
                if view.pose is not None:
                    self.poses[name] = view.pose
                if view.picture is not None:
                    finished[name] = view.picture
                else:
                    self.to_render.append(name)
            if not draws.open:
                break
        if self.owner.on_pictures is not None and refused:
            about = [Shown(int(guess.views[i]), tried.scores[i], True) for i in refused]
            self.owner.on_pictures(torch.stack([tried.picture(i) for i in refused]), about)
        if finished:
            names = list(finished)
            kept = torch.stack(list(finished.values()))
            self.owner.put(self.buffer, names, kept, self.scores[names].tolist(), are_pictures=True)

    def _render(self) -> None:
        names, self.to_render = self.to_render, []
        if names:
            self.owner.render_into(
                self.buffer, names, self.poses[names], self.weights[names], [self.ids[name] for name in names],
                self.scores[names].tolist(),
            )  # fmt: skip
