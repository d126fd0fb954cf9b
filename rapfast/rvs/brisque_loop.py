"""The attempts of `RandomViewSynthesizer.with_brisque`, and what random-view synthesis returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapfast.rvs.brisque import Brisque
from rapfast.rvs.draws import Guess, SpeculativeDraws
from rapfast.rvs.poses import Array

if TYPE_CHECKING:
    from rapfast.rvs.synthesis import RandomViewSynthesizer


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

    def run(self, draws: SpeculativeDraws) -> None:
        ahead = self.owner.batch_size
        outcomes: deque[bool] = deque(maxlen=64)
        while not draws.done:
            # An outcome is guessed to be the more frequent one of late.
            optimistic = 2 * sum(outcomes) >= len(outcomes)
            guess = draws.guess(ahead, 1 if optimistic else draws.max_attempts)
            used = self._settle(draws, guess, *self._try(guess), outcomes)
            ahead = min(self.owner.batch_size, 2 * used)
            here, made = draws.position
            view = self.open.get(here)
            self.open = {} if view is None else {here: view}
            if view is not None and view.leader is not None and view.leader[0] >= made:
                view.leader = view.decoded = None  # that attempt was dropped
            if len(self.to_render) >= self.owner.batch_size:
                self._render()

    def views(self) -> SyntheticViews:
        self._render()
        images = self.buffer.finish()
        return views_of(images, self.poses, self.weights, self.attempts, self.accepted, self.scores)

    def _try(self, guess: Guess) -> tuple[Tensor, list[float]]:
        """Pictures [n, 3, h, w] of all attempts, on the device, and their scores; NaN where an attempt fails."""
        owner, views = self.owner, guess.views.tolist()
        viewmats = owner.viewmats(guess.poses)
        for name in views:
            self.open.setdefault(name, _View())
        alone = [i for i, name in enumerate(views) if self.open[name].leader is None]
        fails = dict(zip(alone, owner.one_point(guess.poses[alone]).tolist(), strict=True))
        leaders: list[int] = []
        followers: dict[int, list[int]] = {}
        for i, (name, attempt) in enumerate(zip(views, guess.attempts.tolist(), strict=True)):
            view = self.open[name]
            if view.leader is not None:  # its map is read, which did not fail
                followers.setdefault(name, []).append(i)
            elif not fails[i]:
                view.leader = (attempt, viewmats[i])
                leaders.append(i)
        pictures = torch.zeros((len(guess), 3, *owner.size), device=viewmats.device)
        scores = torch.full((len(guess),), torch.nan, dtype=torch.float64, device=viewmats.device)

        def draw(members: list[int], decoded: Callable[[], Tensor | None]) -> None:
            def work(begin: int, end: int) -> None:
                part = members[begin:end]
                places = torch.tensor(part, device=viewmats.device)
                made = owner.pictures(viewmats[places], [self.ids[views[i]] for i in part], decoded())
                pictures[places], scores[places] = made, owner.brisque.score(made)

            owner.in_batches(len(members), work)

        draw(leaders, lambda: None)
        for name, members in followers.items():
            draw(members, lambda name=name: self._decoded(name))
            if name != views[-1]:  # which alone is likely to go on
                self.open[name].decoded = None
        return pictures, scores.tolist()

    def _decoded(self, name: int) -> Tensor:
        view, owner = self.open[name], self.owner
        if view.decoded is None:
            (feature_map,) = owner.maps([self.ids[name]])
            view.decoded = owner.scene.decode(view.leader[1], owner.K, feature_map, 1.0, precision=owner.precision)
        return view.decoded

    def _settle(
        self, draws: SpeculativeDraws, guess: Guess, pictures: Tensor, scores: list[float], outcomes: deque[bool]
    ) -> int:
        """Take over the outcomes up to the first that was guessed wrong; how many those are."""
        used = 0
        refused: list[int] = []
        finished: dict[int, Tensor] = {}
        for i, score in enumerate(scores):
            name, good = int(guess.views[i]), score < self.threshold
            view = self.open[name]
            if score < view.score:
                view.score, view.pose = score, guess.poses[i]
                view.picture = None if self.draws_weights else pictures[i].clone()
            if not good and score == score:
                refused.append(i)
            used += 1
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
            about = [Shown(int(guess.views[i]), scores[i], True) for i in refused]
            self.owner.on_pictures(pictures[refused], about)
        if finished:
            names = list(finished)
            kept = torch.stack(list(finished.values()))
            self.owner.put(self.buffer, names, kept, self.scores[names].tolist(), are_pictures=True)
        return used

    def _render(self) -> None:
        names, self.to_render = self.to_render, []
        if names:
            self.owner.render_into(
                self.buffer, names, self.poses[names], self.weights[names], [self.ids[name] for name in names],
                self.scores[names].tolist(),
            )  # fmt: skip
