"""What `rapfast rvs` draws for each view, and its picture. View i depends on the seed and i alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..appearance import RapScene
from ..cameras import Cameras
from ..postprocess import PostProcess
from ..profiling import count, section
from ..rvs.brisque import Brisque
from ..rvs.filters import FarFrom, TurnsInPlace, lens_grid, nearest_centre
from ..rvs.map_cache import FeatureMapCache
from ..rvs.poses import PoseSampler, world_to_camera
from ..rvs.view_cache import ViewCache, view_keys, view_settings
from .rvs_references import References


class Draw(NamedTuple):
    """What is drawn for one view before its pose.

    Attributes:
        index: the view's number. position: what it is drawn around. around: the given pose of that.
        reference: its reference image. weight: its own. rng: the generator that its poses come from.
    """

    index: int
    position: int
    around: int
    reference: int
    weight: float
    rng: np.random.RandomState


MAX_DRAWS = 1000
"""Poses drawn for one picture before it is given up that one is far enough from the validation poses."""


class Positions(NamedTuple):
    """P poses to draw around, view i around number i modulo P.

    Attributes:
        poses: [P, 3, 4] float64 camera-to-world.
        given: [P] the given pose that each belongs to, whose intrinsics and image it takes.
    """

    poses: np.ndarray
    given: np.ndarray


def given_positions(cameras: Cameras) -> Positions:
    """The given poses themselves."""
    return Positions(camera_to_world(cameras), np.arange(len(cameras)))


def grid_positions(
    cameras: Cameras, step: float, margin: float, max_distance: float, keep: FarFrom | None, seed: int
) -> Positions:
    """A grid's points, see `lens_grid`, in an order drawn by the seed: a part of them is spread over all.

    Raises:
        ValueError: there is none, or there are too many.
    """
    given = camera_to_world(cameras)
    try:
        grid = lens_grid(given, step, margin=margin, max_distance=max_distance)
    except ValueError as error:
        raise ValueError(f"--sampler lens: {error}") from None
    n_all = len(grid)
    if keep is not None:
        grid = grid[keep(grid)]
    if not len(grid):
        why = "within --distance of a given pose" if not n_all else "far enough from the validation poses"
        raise ValueError(f"--sampler lens: no point of the grid is {why}")
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, 0, 1))))
    grid = grid[rng.permutation(len(grid))]
    return Positions(grid, nearest_centre(grid[:, :, 3], given[:, :, 3])[0])


class RandomViews:
    """Views by their number.

    Args:
        scene: on the device to render on. cameras: M given poses, and the size to render at.
        positions: to draw around. sampler: draws around them. keep: refuses poses, which are drawn again.
        saved_size: (width, height) of the pictures.
        seed, weights: of the draws. brisque: a threshold and a number of attempts, or None.
        batch: views in one call; halved where memory does not suffice. max_memory: bytes that a call may take.
    """

    def __init__(
        self, scene: RapScene, cameras: Cameras, references: References, positions: Positions,
        sampler: PoseSampler | TurnsInPlace, *, keep: FarFrom | None = None,
        saved_size: tuple[int, int], seed: int, weights: tuple[float, float], brisque: tuple[float, int] | None,
        batch: int, max_memory: int | None = None, precision: str | None,
    ) -> None:  # fmt: skip
        self.batch, self._max_memory = batch, max_memory
        self._scene, self._cameras, self._references, self._sampler = scene, cameras, references, sampler
        self._seed, self._weights, self._precision = seed, weights, precision
        self._positions, self._keep = positions, keep
        self._Ks = cameras.Ks.double().numpy()
        size = None if saved_size == (cameras.width, cameras.height) else saved_size[::-1]
        self._post, self._unclamped = PostProcess(size=size, dtype=torch.uint8), PostProcess(size=size)
        scale = np.array([saved_size[0] / cameras.width, saved_size[1] / cameras.height, 1.0])
        self._saved_Ks = self._Ks * scale[:, None]
        device = scene.scene.device
        self._threshold, self._attempts = brisque or (0.0, 1)
        self._brisque = None if brisque is None else Brisque(device)
        self._background = torch.ones(1, 3, device=device) if scene.config.get("white_background") else None
        self._maps = FeatureMapCache(scene, precision=precision)
        self._cache: ViewCache | None = None
        self._settings = ""

    @contextlib.contextmanager
    def cached(self, folder: Path | None, refresh: str) -> Iterator[None]:
        """While a `with` block runs: feature maps in memory, and in the folder, with the views, if there is one."""
        self._maps = FeatureMapCache(
            self._scene,
            pinned_bytes=8 << 30 if self._scene.scene.device.type == "cuda" else 0,
            disk_dir=None if folder is None else folder / "maps",
            precision=self._precision,
        )
        if folder is None:
            yield
            return
        self._settings = view_settings(
            self._scene, self._cameras.width, self._cameras.height, postprocess=self._post, precision=self._precision
        )
        with ViewCache(folder / "views", refresh=refresh) as self._cache:
            yield

    def statistics(self) -> list[str]:
        """What the caches on disk did, as sentences."""
        return [] if self._cache is None else [self._maps.stats.sentence(), self._cache.stats.sentence()]

    def draw(self, index: int) -> Draw:
        """By a generator seeded by the pair (seed, index)."""
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self._seed, index))))
        position, own = index % len(self._positions.poses), self._references.of_pose
        around = int(self._positions.given[position])
        reference = rng.randint(len(self._references.names)) if own is None else own[around]
        return Draw(index, position, around, int(reference), float(rng.uniform(*self._weights)), rng)

    def render(self, indices: Sequence[int]) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Of each view its picture, uint8 [H, W, 3], and what the manifest says of it."""
        drawn = [self.draw(i) for i in indices]
        judged: list[dict[str, Any]]
        if self._brisque is None:
            poses, judged = self._drawn_poses(drawn), [{} for _ in drawn]
        else:
            poses, judged = self._best_poses(drawn)
        weights = [d.weight for d in drawn]
        if self._cache is None:
            pictures = self._pictures(drawn, poses, weights, self._post)
            with section("download"):
                images = list(pictures.cpu())
        else:
            around = [d.around for d in drawn]
            names = [repr(self._references.key(d.reference)) for d in drawn]
            keys = view_keys(self._settings, poses, self._Ks[around], weights, names)
            images, _ = self._cache.render(
                keys,
                lambda missing: self._pictures(
                    [drawn[i] for i in missing], poses[missing], [weights[i] for i in missing], self._post
                ),
            )
        return [
            (image.numpy(), self._entry(d, pose) | verdict)
            for image, d, pose, verdict in zip(images, drawn, poses, judged, strict=True)
        ]

    def _entry(self, drawn: Draw, pose: np.ndarray) -> dict[str, Any]:
        return {
            "pose": pose.tolist(),
            "K": self._saved_Ks[drawn.around].tolist(),
            "weight": drawn.weight,
            "reference": self._references.names[drawn.reference],
            "reference_blake2b": self._references.fingerprints[drawn.reference],
            "around": self._entry_name(drawn),
        }

    def _entry_name(self, drawn: Draw) -> int | str:
        """Of the given pose."""
        names = self._cameras.names
        return drawn.around if names is None else names[drawn.around]

    @section("draw poses")
    def _drawn_poses(self, drawn: Sequence[Draw]) -> np.ndarray:
        """The next pose of each view's generator that is not refused, [C, 3, 4]."""
        poses = np.zeros((len(drawn), 3, 4))
        left = np.arange(len(drawn))
        for _ in range(MAX_DRAWS):
            numbers = np.concatenate([self._sampler.draw(1, drawn[i].rng)[0] for i in left])
            poses[left] = self._sampler.apply(self._positions.poses[[drawn[i].position for i in left]], numbers)
            if self._keep is not None:
                left = left[~self._keep(poses[left])]
            if self._keep is None or not len(left):
                return poses
        view = drawn[left[0]]
        raise ValueError(
            f"view {view.index}: {MAX_DRAWS} poses were drawn around {self._entry_name(view)!r}, and none is far "
            "enough from the validation poses: lower --min-distance or --min-angle, or raise --distance or --angle"
        )

    def _best_poses(self, drawn: Sequence[Draw]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Of up to K poses of each view the first whose picture at weight 1 scores below the threshold, else the best
        (the first of equals; a picture without a score is the worst). Views that have theirs are not tried again."""
        best = np.zeros((len(drawn), 3, 4))
        scores = np.full(len(drawn), np.nan)
        chosen = np.zeros(len(drawn), dtype=int)
        left = list(range(len(drawn)))
        for attempt in range(self._attempts):
            poses = self._drawn_poses([drawn[i] for i in left])
            pictures = self._pictures([drawn[i] for i in left], poses, [1.0] * len(left), self._unclamped)
            for i, pose, score in zip(left, poses, self._brisque.score(pictures).tolist(), strict=True):
                if attempt == 0 or score < scores[i] or (np.isnan(scores[i]) and not np.isnan(score)):
                    best[i], scores[i], chosen[i] = pose, score, attempt
            left = [i for i in left if not scores[i] < self._threshold]
            if not left:
                break
        verdicts = [
            {"brisque": None if np.isnan(score) else float(score), "attempt": int(attempt)}
            for score, attempt in zip(scores, chosen, strict=True)
        ]
        return best, verdicts

    def _pictures(
        self, drawn: Sequence[Draw], poses: np.ndarray, weights: Sequence[float], post: PostProcess
    ) -> Tensor:
        """[C, H, W, 3] on the device; in halves where memory does not suffice."""
        try:
            return self._one_call(drawn, poses, weights, post)
        except torch.cuda.OutOfMemoryError:
            if len(drawn) == 1:
                raise
        torch.cuda.empty_cache()
        half = (len(drawn) + 1) // 2
        self.batch = min(self.batch, half)
        print(f"note: out of GPU memory with {len(drawn)} views in one call; going on with {half}", file=sys.stderr)
        parts = (slice(None, half), slice(half, None))
        return torch.cat([self._pictures(drawn[p], poses[p], weights[p], post) for p in parts])

    @torch.no_grad()
    @section("draw")
    def _one_call(
        self, drawn: Sequence[Draw], poses: np.ndarray, weights: Sequence[float], post: PostProcess
    ) -> Tensor:
        used = {self._references.key(d.reference): d.reference for d in drawn}
        maps = self._maps.get(keys=list(used), load=lambda key: self._references.load(used[key]))
        places = {key: i for i, key in enumerate(used)}
        device = self._scene.scene.device
        count("views", len(drawn))
        colors, _, _ = self._scene.render(
            torch.from_numpy(world_to_camera(poses)).to(device),
            torch.from_numpy(self._Ks[[d.around for d in drawn]].astype(np.float32)).to(device),
            self._cameras.width, self._cameras.height,
            feature_maps=maps, map_ids=[places[self._references.key(d.reference)] for d in drawn],
            view_weights=list(weights), postprocess=post, precision=self._precision, max_memory=self._max_memory,
            backgrounds=None if self._background is None else self._background.expand(len(drawn), 3),
        )  # fmt: skip
        return colors


def camera_to_world(cameras: Cameras) -> np.ndarray:
    """[M, 3, 4] float64, inverted in float64."""
    return torch.linalg.inv(cameras.viewmats.double())[:, :3].numpy()
