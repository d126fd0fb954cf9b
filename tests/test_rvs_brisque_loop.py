"""How the attempts by BRISQUE are made: few waits for many attempts, and RAP's failures known beforehand.

That results and generator are those of a loop over views is in test_rvs_renderers.py.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from test_rvs_renderers import POSES, SAMPLER, make_scene, same_state, synthesizer

from rapfast.appearance import FeatureMapNet
from rapfast.rvs import brisque_loop
from rapfast.rvs.brisque import Brisque
from rapfast.rvs.brisque_loop import BrisqueLoop
from rapfast.rvs.draws import SpeculativeDraws

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes():
    net = FeatureMapNet().eval().requires_grad_(False)
    return {"dense": make_scene(net), "sparse": make_scene(net, sparse=True)}


def loop_over(scene, threshold: float = 40.0, **changes) -> BrisqueLoop:
    owner = synthesizer(scene, **changes)
    return BrisqueLoop(owner, POSES, list(range(len(POSES))), threshold, draws_weights=True)


@pytest.mark.parametrize("which", ["dense", "sparse"])
@pytest.mark.parametrize("certain", [0, 8, 10**9])
def test_what_is_certain_on_the_host_is_what_the_device_counts(scenes, which, certain, monkeypatch):
    """With a threshold of 0 the host alone would judge, with a large one the device alone."""
    loop = loop_over(scenes[which])
    poses = SAMPLER.sample(np.concatenate([POSES] * 20), np.random.RandomState(4))
    asked: list[int] = []
    one_point = loop.owner.one_point
    monkeypatch.setattr(loop.owner, "one_point", lambda some: asked.append(len(some)) or one_point(some))
    monkeypatch.setattr(brisque_loop, "CERTAIN", certain)
    found = loop._fails(poses)
    want = one_point(poses).tolist()
    assert any(want) == (which == "sparse")
    if certain:
        assert found == want
    else:
        assert not any(found) and not asked
    if certain == 8:
        assert asked == [len(poses)] if which == "sparse" else sum(asked) < len(poses) / 4


@pytest.mark.parametrize(("threshold", "most"), [(-1e9, 9), (1e9, 4)])
def test_many_attempts_are_scored_for_one_wait(scenes, threshold, most, monkeypatch):
    """Where outcomes are all alike, attempts come by the dozen: 44 of them, or 11."""
    guesses: list[int] = []
    guess = SpeculativeDraws.guess

    def counted(self, n, expected=1):
        made = guess(self, n, expected)
        guesses.append(len(made))
        return made

    monkeypatch.setattr(SpeculativeDraws, "guess", counted)
    rng = np.random.RandomState(7)
    views = synthesizer(scenes["dense"], batch_size=8).with_brisque(POSES, SAMPLER, 4, threshold, rng)
    made = int(views.attempts.sum())
    assert made == (44 if threshold < 0 else 11)
    assert len(guesses) <= most and max(guesses) > made / most
    # One at a time, the same numbers.
    alone = np.random.RandomState(7)
    monkeypatch.setattr(BrisqueLoop, "_ahead", lambda self, outcomes: 1)
    again = synthesizer(scenes["dense"], batch_size=8).with_brisque(POSES, SAMPLER, 4, threshold, alone)
    assert np.array_equal(again.poses, views.poses) and np.array_equal(again.scores, views.scores)
    assert same_state(rng.get_state(), alone.get_state())
    assert len(guesses) >= made


def test_the_surer_the_outcome_the_further_ahead(scenes):
    loop = loop_over(scenes["dense"], batch_size=8)
    ahead = [loop._ahead(deque([True] * good + [False] * bad)) for good, bad in ((32, 32), (8, 56), (2, 62), (0, 64))]
    assert ahead == sorted(ahead) and ahead[0] < 8 < ahead[-1] <= brisque_loop.FURTHEST * 8
    mirrored = [
        loop._ahead(deque([True] * good + [False] * bad)) for bad, good in ((32, 32), (8, 56), (2, 62), (0, 64))
    ]
    assert mirrored == ahead
    assert loop._ahead(deque()) >= 1
    assert loop_over(scenes["dense"], batch_size=1)._ahead(deque([True] * 64)) <= brisque_loop.FURTHEST


def test_no_more_pictures_at_once_than_a_batch_holds(scenes, monkeypatch):
    rendered: list[int] = []
    scored: list[int] = []
    owner = synthesizer(scenes["dense"], batch_size=3, brisque=Brisque())
    pictures, score = owner.pictures, owner.brisque.score
    monkeypatch.setattr(owner, "pictures", lambda m, *rest: rendered.append(len(m)) or pictures(m, *rest))
    monkeypatch.setattr(owner.brisque, "score", lambda made: scored.append(len(made)) or score(made))
    owner.with_brisque(POSES, SAMPLER, 5, -1e9, np.random.RandomState(1))
    assert max(rendered) == max(scored) == 3
    assert sum(rendered) == sum(scored) >= 55
