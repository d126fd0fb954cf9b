"""Attempts drawn ahead of their outcome, with the generator left where a loop without foresight would leave it.

RAP's renderers draw an attempt, render it, look at the picture, and draw again for the same view or go on to the next.
Each draw depends on the outcomes before it, since all come from one generator. To render attempts of many views in one
batch, the outcomes are guessed, the draws made by the guess, and the generator taken back at the first outcome that
was guessed wrong: to its state before the guess, from which the draws that did happen are repeated. What was drawn
behind that point is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .poses import Array, PoseSampler, as_poses, generator, weight_range


@dataclass(frozen=True, eq=False)
class Guess:
    """Attempts in the order in which a loop would make them; `len()` of them.

    Attributes:
        views: [n] int64, which view of those given.
        attempts: [n] int64, which attempt at it, from 0.
        poses: [n,3,4] float64 camera-to-world.
        weights: [n] float64, or None without a range for them.
        ends: [n] bool, whether this attempt is guessed to be the view's last.
        final_weights: [n] float64, drawn behind the last attempt at a view, NaN where `ends` is False; or None
            without a range for them.
    """

    views: NDArray[np.int64]
    attempts: NDArray[np.int64]
    poses: Array
    weights: Array | None
    ends: NDArray[np.bool_]
    final_weights: Array | None

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True, eq=False)
class ViewEnd:
    """How the loop left a view.

    Attributes:
        view: which one.
        attempts: how many were made, 1..max_attempts.
        accepted: whether the last of them was accepted.
        pose: [3,4] float64, that of the last attempt.
        weight: that of the last attempt, which is also the one of the fallback; None without a range for them.
        final_weight: drawn behind the last attempt; None without a range for it.
    """

    view: int
    attempts: int
    accepted: bool
    pose: Array
    weight: float | None
    final_weight: float | None


@dataclass(eq=False)
class _Stretch:
    """One guess, and how many of its attempts are settled."""

    guess: Guess
    state: dict[str, Any]
    settled: int = 0


@dataclass(eq=False)
class SpeculativeDraws:
    """Draws the attempts at `poses`, view by view, ahead of their outcomes.

    The loop it stands for::

        for view, pose in enumerate(poses):
            for attempt in range(max_attempts):
                new_pose = a pose around `pose`        # the sampler's six or seven numbers
                weight = U(*weights)                   # if there is a range for it
                if accepted(view, attempt, new_pose):  # rendered and found good
                    break
            final_weight = U(*final_weights)           # if there is a range for it

    which is RAP's renderer with attempts for ``weights=(0, 2)``, and the one by BRISQUE for ``final_weights=(0, 2)``
    ("accepted" then means that the score is below the threshold, after which no further attempt is made).

    Used as a context::

        with SpeculativeDraws(sampler, poses, max_attempts, weights=(0, 2)) as draws:
            while not draws.done:
                guess = draws.guess(8)
                outcome = ...                                                # [8] bool, from rendering all of them
                for end in draws.settle(outcome):
                    ...

    More than one guess may be open: the next batch can be rendered while the outcomes of the last are on their way.
    Most of a small guess's time goes into reading the generator's state, so where few outcomes are guessed wrong it is
    cheaper to guess far ahead, and to render and settle a guess in parts.
    Leaving the context, also by an exception, takes the generator back to where the loop stands after the last
    settled attempt. In between it is ahead, so nothing else may draw from it.

    Attributes:
        sampler: how a pose is drawn.
        poses: [V,3,4] or [V,4,4] camera-to-world, one per view.
        max_attempts: at most so many attempts per view, >= 1.
        rng: None for numpy's global generator, or a np.random.RandomState. (A torch.Generator needs no foresight, as
            `PoseSampler.draw` can draw all attempts at once.)
        weights, final_weights: ranges (low, high), or None to draw none.

    Raises:
        TypeError, ValueError: an argument is not as said.
    """

    sampler: PoseSampler
    poses: Any
    max_attempts: int
    rng: Any = None
    weights: Sequence[float] | None = None
    final_weights: Sequence[float] | None = None
    _open: deque[_Stretch] = field(default_factory=deque, init=False, repr=False)
    _settled: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    _guessed: tuple[int, int] = field(default=(0, 0), init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, PoseSampler):
            raise TypeError(f"sampler must be a PoseSampler, got {_check.describe(self.sampler)}")
        self.poses = as_poses("poses", self.poses)
        self.max_attempts = _check.integer("max_attempts", self.max_attempts, 1, 1 << 40)
        self.rng = generator(self.rng)
        self.weights = None if self.weights is None else weight_range("weights", self.weights)
        if self.final_weights is not None:
            self.final_weights = weight_range("final_weights", self.final_weights)

    def __enter__(self) -> SpeculativeDraws:
        return self

    def __exit__(self, *_: object) -> None:
        self.rewind()

    @property
    def position(self) -> tuple[int, int]:
        """(view, attempt) that the loop is to make next; (V, 0) at its end."""
        return self._settled

    @property
    def open(self) -> int:
        """Attempts guessed and not yet settled."""
        return sum(len(stretch.guess) - stretch.settled for stretch in self._open)

    @property
    def done(self) -> bool:
        """Whether every view is settled."""
        return self._settled[0] == len(self.poses)

    def guess(self, n: int, expected: int = 1) -> Guess:
        """Draw the next `n` attempts as if each view ended with its attempt number `expected`.

        Args:
            n: how many, >= 1. Fewer come back where the views end.
            expected: attempts that a view is guessed to need, 1..max_attempts. One that has made more already is
                guessed to end with its next. With `expected` = K the K candidates of a view come together.
        """
        n = _check.integer("n", n, 1, 1 << 40)
        expected = _check.integer("expected", expected, 1, self.max_attempts)
        view, attempt = self._guessed
        where, ends = [], []
        while len(where) < n and view < len(self.poses):
            where.append((view, attempt))
            ends.append(attempt + 1 >= expected)
            view, attempt = (view + 1, 0) if ends[-1] else (view, attempt + 1)
        self._guessed = (view, attempt)
        views, attempts = np.array(where, dtype=np.int64).reshape(-1, 2).T
        last = np.array(ends, dtype=bool)
        state = self.rng.get_state(legacy=False)
        numbers, weights, final = self.sampler.draw_attempts(last, self.rng, self.weights, self.final_weights)
        guess = Guess(views, attempts, self.sampler.apply(self.poses[views], numbers), weights, last, final)
        if len(guess):
            self._open.append(_Stretch(guess, state))
        return guess

    def settle(self, accepted: Sequence[bool]) -> list[ViewEnd]:
        """Say how open attempts ended, from the oldest on, and learn which views that ends.

        At the first outcome guessed wrong all later attempts are dropped, the generator is taken back and the rest of
        `accepted` is ignored: `open` is 0 then, and the next guess begins at `position`.

        Args:
            accepted: [k] bool, k <= `open`.

        Returns:
            The views ended by these outcomes, in order.
        """
        outcomes = np.asarray(accepted)
        if outcomes.ndim != 1 or (outcomes.dtype != bool and len(outcomes)):
            raise TypeError(f"accepted must be a list of True and False, got {outcomes.dtype} {list(outcomes.shape)}")
        if len(outcomes) > self.open:
            raise ValueError(
                f"accepted must have at most {self.open} outcomes, one per open attempt, got {len(outcomes)}"
            )
        ended: list[ViewEnd] = []
        for outcome in outcomes.tolist():
            stretch = self._open[0]
            guess, i = stretch.guess, stretch.settled
            view, attempt = int(guess.views[i]), int(guess.attempts[i])
            ends = outcome or attempt + 1 == self.max_attempts
            stretch.settled += 1
            self._settled = (view + 1, 0) if ends else (view, attempt + 1)
            as_guessed = ends == bool(guess.ends[i])
            final = guess.final_weights[i] if guess.final_weights is not None else None
            if not as_guessed:
                final = self._repeat(ends)
            elif stretch.settled == len(guess):
                self._open.popleft()
            if ends:
                weight = None if guess.weights is None else float(guess.weights[i])
                final = None if final is None else float(final)
                ended.append(ViewEnd(view, attempt + 1, outcome, guess.poses[i], weight, final))
            if not as_guessed:
                break
        return ended

    def rewind(self) -> None:
        """Drop all open attempts and take the generator back to where the loop stands after the settled ones."""
        if self._open:
            first = self._open[0]
            self._repeat(first.settled > 0 and bool(first.guess.ends[first.settled - 1]))

    def _repeat(self, ends: bool) -> float | None:
        """Drop what is open; draw the settled attempts of its first stretch again, the last of which ended its view or
        not. Returns the final weight behind it, if one was drawn."""
        first = self._open[0]
        self._open.clear()
        self._guessed = self._settled
        self.rng.set_state(first.state)
        last = first.guess.ends[: first.settled].copy()
        last[-1:] = ends
        _, _, final = self.sampler.draw_attempts(last, self.rng, self.weights, self.final_weights)
        return float(final[-1]) if final is not None and ends else None
