"""BRISQUE against the ``brisque`` package's scores: kept in tests/golden/, and anew where the package is installed."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from brisque_pictures import SCORES, package_score, pictures

from rapfast.rvs import brisque as module
from rapfast.rvs import brisque_graphs as graphs
from rapfast.rvs.brisque import MODEL_FILE, Brisque

# Pictures with exactly flat areas, where the package counts the signs of its own builds' rounding errors: coarse JPEG
# blocks, and a render whose half-precision storage made areas equal.
FLAT = {"jpeg 1", "jpeg 2", "jpeg 3", "render 3"}


def each(scorer: Brisque, images: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: scorer.score(torch.from_numpy(i)[None].to(scorer.device)).item() for name, i in images.items()}


def noise(batch: int, height: int = 40, width: int = 52, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_packages(device: torch.device) -> None:
    expected = json.loads(SCORES.read_text())["scores"]
    found = each(Brisque(device), pictures())
    assert found.keys() == expected.keys()
    assert max(expected.values()) - min(expected.values()) > 60  # the pictures span the range that is of use
    for name, score in found.items():
        assert score == pytest.approx(expected[name], abs=0.05 if name in FLAT else 5e-4), name


def test_single_precision_is_near(device: torch.device) -> None:
    expected = json.loads(SCORES.read_text())["scores"]
    for name, score in each(Brisque(device, torch.float32), pictures()).items():
        assert score == pytest.approx(expected[name], abs=0.3 if name in {*FLAT, "smallest"} else 0.02), name


def test_scores_are_those_of_the_installed_package() -> None:
    """Other releases of NumPy, SciPy and OpenCV than the kept scores': flat areas agree less well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = package_score()
    except ImportError as error:
        pytest.skip(f"the package brisque cannot be imported: {error}")
    images = pictures()
    try:
        score(images["render 0"])
    except TypeError as error:  # brisque 0.2.0 with NumPy 2.4
        pytest.skip(f"the package brisque cannot score with the NumPy installed: {error}")
    for name, found in each(Brisque(), images).items():
        assert found == pytest.approx(score(images[name]), abs=0.1 if name in FLAT else 0.02), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(40, 52), (33, 47)])
def test_a_score_does_not_depend_on_its_batch(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Brisque(device, dtype)
    images = noise(17, *size).to(device)
    images[3:9] *= torch.linspace(0, 1, size[0], device=device)[:, None, None] ** 4
    whole = scorer.score(images)
    assert whole.unique().numel() == 17
    for batch in (1, 3, 8, 16):
        assert torch.equal(torch.cat([scorer.score(part) for part in images.split(batch)]), whole), batch
    monkeypatch.setattr(module, "_MAX_CHUNK_BYTES", 1 << 20)  # two pictures of this size in a chunk at most
    assert torch.equal(scorer.score(images), whole)
    assert torch.equal(scorer.score(images.flip(0)).flip(0), whole)


def test_a_score_does_not_depend_on_threads_nor_strides() -> None:
    scorer, images = Brisque(), noise(2, 120, 161)
    whole = scorer.score(images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(scorer.score(images), whole)
    finally:
        torch.set_num_threads(threads)
    planes = images.permute(0, 3, 1, 2)
    assert torch.equal(scorer.score(planes), whole)
    assert torch.equal(scorer.score(planes.contiguous()), whole)
    assert torch.equal(scorer.score(torch.cat((images, images), 2)[:, :, :161]), whole)


def test_worse_pictures_score_higher() -> None:
    images = pictures()
    found = each(Brisque(), {name: images[name] for name in ("render 1", "blur 1", "blur 3", "render 3", "jpeg 3")})
    assert found["render 1"] + 10 < found["blur 1"]
    assert found["render 3"] + 20 < min(found["blur 3"], found["jpeg 3"])


def test_half_precision_pictures_are_scored_as_they_are() -> None:
    images, scorer = noise(2), Brisque()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scorer.score(images.to(dtype)), scorer.score(images.to(dtype).float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_picture_that_is_not_finite_spoils_no_other(device: torch.device, bad: float) -> None:
    scorer, images = Brisque(device), noise(4).to(device)
    expected = scorer.score(images)
    images[2, 5, 7, 1] = bad
    found = scorer.score(images)
    assert found.isnan().tolist() == [False, False, True, False]
    keep = [0, 1, 3]
    assert torch.equal(found[keep], expected[keep])
    with pytest.raises(ValueError, match=r"images must be finite, got NaN or infinity in those of index \[2\]"):
        scorer.score(images, check_finite=True)


def test_a_black_picture_has_no_score() -> None:
    images = noise(2)
    images[0] = 0
    assert Brisque().score(images).isnan().tolist() == [True, False]


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no numbers that a program could wait for."""
    images = torch.empty(5, 60, 81, 3, device="meta")
    assert Brisque("meta").score(images).shape == (5,)
    with pytest.raises((NotImplementedError, RuntimeError)):
        Brisque("meta").score(images, check_finite=True)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu() -> None:
    scorer, images = Brisque("cuda"), noise(3).cuda()
    first = scorer.score(images)
    assert torch.equal(scorer.score(images), first)  # makes a graph, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = scorer.score(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scorer.score(images)
    images.copy_(noise(3, seed=1))
    graph.replay()
    assert torch.equal(captured, scorer.score(images))


# --- graphs ----------------------------------------------------------------------------------------------------------


def eagerly(scorer: Brisque, images: torch.Tensor) -> torch.Tensor:
    """The same kernels, one by one."""
    planes = images.permute(0, 3, 1, 2)
    return torch.cat([scorer._scores(part) for part in planes.split(scorer._at_once(*planes.shape[2:]))])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_graphs_change_no_bit(dtype: torch.dtype) -> None:
    scorer = Brisque("cuda", dtype)
    for seed in range(3):  # one by one; captured; replayed
        for batch in (1, 2, 3, 5, 8, 16, 19):
            images = noise(batch, seed=seed).cuda()
            for given in (images, images.double(), images.half(), images.permute(0, 3, 1, 2)):
                planes = given if given.shape[3] == 3 else given.permute(0, 2, 3, 1)
                assert torch.equal(scorer.score(given), eagerly(scorer, planes)), (seed, batch, given.dtype)
    assert scorer._graphs._sizes and all(size.graphs for size in scorer._graphs._sizes.values())


@pytest.mark.cuda
def test_what_is_left_in_a_graphs_places_spoils_nothing() -> None:
    scorer, images = Brisque("cuda"), noise(8).cuda()
    for _ in range(3):
        assert scorer.score(images * torch.nan).isnan().all()
    for _ in range(3):
        assert torch.equal(scorer.score(images[:5]), eagerly(scorer, images[:5]))


@pytest.mark.cuda
def test_graphs_on_streams_and_threads() -> None:
    """Each on a stream of its own, with work in front, all sharing the graphs' memory."""
    scorer, busy = Brisque("cuda"), torch.randn(2048, 2048, device="cuda")
    given = [noise(4, seed=k).cuda() for k in range(6)]
    wanted = [eagerly(scorer, images) for images in given]
    scorer.score(given[0])
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work(k: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for turn in range(12):
                    j = (k + turn) % len(given)
                    for _ in range(turn % 3):
                        torch.mm(busy, busy)
                    if not torch.equal(scorer.score(given[j].clone()), wanted[j]):
                        wrong.append((k, turn))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.cuda
def test_few_graphs_are_kept() -> None:
    scorer = Brisque("cuda")
    for _ in range(2):
        for width in (40, 44, 48, 52):
            for _ in range(3):
                images = noise(2, width=width).cuda()
                assert torch.equal(scorer.score(images), eagerly(scorer, images))
            assert len(scorer._graphs._sizes) <= graphs.KEPT_SIZES


@pytest.mark.cuda
def test_modes_of_the_caller_do_not_matter() -> None:
    scorer, images = Brisque("cuda"), noise(2).cuda()
    wanted = eagerly(scorer, images)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(scorer.score(images.clone()), wanted)
    with torch.autocast("cuda", torch.float16):
        for _ in range(3):
            assert torch.equal(scorer.score(images), wanted)
    assert torch.equal(scorer.score(images), wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("failing", [1, 2])
def test_without_memory_for_a_graph_scores_are_the_same(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Memory runs out in the trial run before a capture, or in the capture."""
    scorer, images = Brisque("cuda"), noise(2).cuda()
    wanted = scorer.score(images)
    real, calls = scorer._scores, []

    def full(pictures: torch.Tensor) -> torch.Tensor:
        calls.append(torch.cuda.is_current_stream_capturing())
        if len(calls) == failing:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(pictures)

    monkeypatch.setattr(scorer, "_scores", full)
    with pytest.warns(RuntimeWarning, match="memory ran out while BRISQUE's kernels were put into a CUDA graph"):
        assert torch.equal(scorer.score(images), wanted)
    assert calls == ([False, True, False] if failing == 2 else [False, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scorer.score(images), wanted)
    assert not scorer._graphs._sizes
    # Nothing is left open: another scorer's graphs can be made.
    other = Brisque("cuda")
    for _ in range(3):
        assert torch.equal(other.score(images), wanted)
    assert any(size.graphs for size in other._graphs._sizes.values())


@pytest.mark.cuda
def test_graphs_on_a_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
    images, scorers = noise(3), [Brisque(f"cuda:{k}") for k in range(2)]
    for _ in range(3):
        first, second = (scorer.score(images.to(scorer.device)).cpu() for scorer in scorers)
        assert torch.equal(first, second)
    assert torch.cuda.current_device() == 0


def test_a_copy_is_a_scorer() -> None:
    scorer, images = Brisque(dtype=torch.float32), noise(2)
    for copied in (pickle.loads(pickle.dumps(scorer)), copy.deepcopy(scorer)):
        assert copied.dtype == torch.float32 and torch.equal(copied.score(images), scorer.score(images))


def test_the_shape_parameter_inverts_its_ratio() -> None:
    """Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)): 1/2 for Laplace's density, 2/pi for the normal one, 3/10 at a = 1/2."""
    ratios = torch.tensor([0.3, 0.5, 2 / np.pi, 0.75, 0.9, 0.0], dtype=torch.float64)
    found = Brisque()._shape_of(ratios).tolist()
    assert found == pytest.approx([0.5, 1, 2, module.SHAPES[1], module.SHAPES[1], module.SHAPES[0]], rel=3e-8)


def test_the_model_is_the_packages() -> None:
    """Facts of its svm.txt: size, and the box |weight| <= C = 1024 whose sum is 0."""
    with np.load(MODEL_FILE, allow_pickle=False) as model:
        assert model["support_vectors"].shape == (770, 36)
        assert (float(model["gamma"]), float(model["rho"])) == (0.05, -155.845)
        assert np.abs(model["weights"]).max() == 1024
        assert abs(model["weights"].sum()) < 0.1
        assert (model["feature_max"] > model["feature_min"]).all()


def test_errors_are_sentences() -> None:
    scorer = Brisque()
    wanted = r"images must be a floating tensor \[B, H, W, 3\] or \[B, 3, H, W\]"
    with pytest.raises(
        TypeError, match=wanted + r" with white at 1 \(divide uint8 by 255\), got uint8 \[1, 40, 52, 3\]"
    ):
        scorer.score((255 * noise(1)).byte())
    with pytest.raises(TypeError, match=wanted + " with white at 1 .* got ndarray"):
        scorer.score(noise(1).numpy())
    with pytest.raises(TypeError, match="got one of layout torch.sparse_coo"):
        scorer.score(noise(1).to_sparse())
    for shape in ([40, 52, 3], [1, 40, 52, 4], [0, 40, 52, 3], [1, 40, 3, 52]):
        with pytest.raises(ValueError, match=wanted + " with B of at least 1, got float32 .*" + str(shape[-2])):
            scorer.score(torch.rand(shape))
    for shape in ([1, 15, 52, 3], [1, 3, 52, 15]):
        with pytest.raises(ValueError, match="images must be at least 16 x 16 pixels, got float32"):
            scorer.score(torch.rand(shape))
    with pytest.raises(ValueError, match="images must be on cpu, where this Brisque is, got float32 .* on meta"):
        scorer.score(noise(1).to("meta"))
    with pytest.raises(NotImplementedError, match="images requires a gradient.*detach"):
        scorer.score(noise(1).requires_grad_())
    with torch.no_grad():
        assert scorer.score(noise(1).requires_grad_()).isfinite().all()
    with pytest.raises(TypeError, match="check_finite must be True or False, got int 1"):
        scorer.score(noise(1), check_finite=1)
    with pytest.raises(TypeError, match="dtype must be torch.float32 or torch.float64, got torch.float16"):
        Brisque(dtype=torch.float16)
