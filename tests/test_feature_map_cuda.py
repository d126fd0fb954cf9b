"""The fast feature maps: half precision, graphs, and bits that do not depend on an image's company.

Where there is no GPU, the kernels of csrc/cuda/feature_norm.cu are played by numpy, from csrc/feature_norm.h's words:
what the network does with them is tested everywhere.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from rapfast.appearance import FeatureMapNet, feature_map_cuda
from rapfast.appearance.feature_map_cuda import EAGER_IMAGES, GRAPHS, KEPT_SIZES, LONGEST_SIDE, PIXELS

SIZES = [(48, 66), (37, 50), (1, 40)]


@functools.cache
def state(seed: int = 3) -> dict[str, Tensor]:
    """Weights as they might be after training, float32."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in FeatureMapNet().state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            base = 1.0 if name.endswith("weight") else 0.0
            out[name] = base + 0.4 * torch.randn(value.shape, generator=g)
        elif value.is_floating_point():
            out[name] = torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5
    return out


def network(seed: int = 3) -> FeatureMapNet:
    return FeatureMapNet.from_state_dict(state(seed))


def pictures(n: int, height: int, width: int, device: str = "cpu") -> Tensor:
    """Unlike each other: noise of other brightness and contrast for each."""
    g = torch.Generator().manual_seed(height * width + n)
    noise = torch.rand(n, 3, height, width, generator=g)
    return (noise ** torch.linspace(0.5, 4, n)[:, None, None, None]).to(device)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(net: FeatureMapNet, images: Tensor) -> Tensor:
    """The maps in float64, from the plain module."""
    return copy.deepcopy(net).double()(images.double())


# ------------------------------------------------------------------- the kernels' part, played by numpy


def memory(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype=kind).reshape(shape)


class Kernels:
    """rapfast._C's part for the feature maps, on the CPU. A pitched tensor's last row ends with its channels."""

    map_stats_scratch = 64

    @staticmethod
    def pitched(address: int, pixels: int, channels: int, pitch: int) -> np.ndarray:
        flat = memory(address, ((pixels - 1) * pitch + channels,), np.float16)
        return np.lib.stride_tricks.as_strided(flat, (pixels, channels), (2 * pitch, 2))

    @classmethod
    def map_stats_cuda(
        cls, *, n_images, n_pixels, channels, eps, x, weight, bias, copy, copy_pitch, scratch, norm, device, stream
    ):
        assert n_images == 1
        values = memory(x, (n_pixels, channels), np.float16)
        out = memory(norm, (3, channels), np.float32)
        wide = values.astype(np.float64)
        out[0] = wide.mean(0)
        out[1] = memory(weight, (channels,), np.float32) / np.sqrt(wide.var(0) + eps)
        out[2] = memory(bias, (channels,), np.float32)
        if copy:
            cls.pitched(copy, n_pixels, channels, copy_pitch)[:] = values

    @classmethod
    def map_norm_cuda(
        cls, *, n_images, n_pixels, channels, x, norm, residual, residual_norm, y, copy, copy_pitch, device, stream
    ):
        def normed(address, statistics):
            mean, scale, bias = memory(statistics, (3, channels), np.float32)
            return (memory(address, (n_pixels, channels), np.float16) - mean) * scale + bias

        value = normed(x, norm)
        if residual and residual_norm:
            value = value + normed(residual, residual_norm)
        elif residual:
            value = value + memory(residual, (n_pixels, channels), np.float16).astype(np.float32)
        value = np.maximum(value, 0)
        memory(y, (n_pixels, channels), np.float16)[:] = value
        if copy:
            cls.pitched(copy, n_pixels, channels, copy_pitch)[:] = value

    @staticmethod
    def map_pool_cuda(*, n_images, height, width, channels, x, norm, y, device, stream):
        mean, scale, bias = memory(norm, (3, channels), np.float32)
        value = np.maximum((memory(x, (height, width, channels), np.float16) - mean) * scale + bias, 0)
        value = torch.from_numpy(value).permute(2, 0, 1)[None]
        pooled = torch.nn.functional.max_pool2d(value, 3, 2, 1)[0].permute(1, 2, 0).numpy()
        memory(y, pooled.shape, np.float16)[:] = pooled

    @classmethod
    def map_unfold_cuda(
        cls, *, n_images, factor, in_height, in_width, height, width, channels, x, bias, y, pitch, device, stream
    ):
        value = memory(x, (in_height, in_width, factor, factor, channels), np.float16).astype(np.float32)
        value = value + memory(bias, (channels,), np.float32)
        apart = value.transpose(0, 2, 1, 3, 4).reshape(in_height * factor, in_width * factor, channels)
        cls.pitched(y, height * width, channels, pitch)[:] = apart[:height, :width].reshape(-1, channels)


class OnCpu(feature_map_cuda.HalfSteps):
    def _place(self) -> dict[str, int]:
        return {"device": 0, "stream": 0}


@pytest.mark.parametrize("size", SIZES)
def test_rewritten_network_is_the_module(size, monkeypatch):
    """Crops for resizes, one tap of four, skips written in place: in float16 as near as the float16 module is."""
    monkeypatch.setattr(feature_map_cuda, "native", Kernels)
    net, images = network(), pictures(1, *size)
    steps = OnCpu(net)
    own = steps.inputs(1, *size)
    own[:, :3].copy_(images)
    height, width = (-(-side // 2) for side in size)
    out = torch.full((1, 48, height, width), float("nan"), dtype=torch.float16).to(memory_format=torch.channels_last)
    steps.finish(steps.run(own, steps.scratch(1)), out)
    want = exact(net, images)
    module = error(copy.deepcopy(net).half()(images.half()), want)
    assert error(out, want) < 1.5 * module + 1e-3
    assert module < (0.3 if size == (1, 40) else 0.01), "a deepest layer of 1 x 2 pixels makes much of little"


@pytest.mark.parametrize("side", [1, 2, 3, 7, 240, 427, 1079, LONGEST_SIDE // 2])
def test_nearest_resize_by_one_pixel_is_a_crop(side):
    line = torch.arange(2.0 * side)[None, None, None]
    half = torch.nn.functional.interpolate(line, size=(1, side), mode="nearest")
    assert torch.equal(half, line[..., ::2])
    longer = line[..., : side + 1]
    if side > 1:
        assert torch.equal(torch.nn.functional.interpolate(longer, size=(1, side), mode="nearest"), longer[..., :side])


def test_half_weights_are_copies_that_follow():
    net = network()
    steps = feature_map_cuda.HalfSteps(net)
    before = [value.clone() for value in steps.tensors()]
    own = {value.data_ptr() for value in net.parameters()}
    assert not own & {value.data_ptr() for value in steps.tensors()}
    other = feature_map_cuda.HalfSteps(network(4)).tensors()
    for kept, value in zip(steps.tensors(), other, strict=True):
        assert kept.shape == value.shape
        kept.copy_(value)
    assert torch.equal(net.final_conv.bias, state()["final_conv.bias"])
    assert not any(torch.equal(a, b) for a, b in zip(steps.tensors(), before, strict=True))


def test_precision_on_a_cpu():
    net, images = network(), pictures(2, 40, 36)
    assert torch.equal(net.feature_maps(images), net.feature_maps(images, precision="fp32"))
    assert net.double().feature_maps(images).dtype == torch.float64
    with pytest.raises(ValueError, match='"fp32" takes a float32 network, got float64'):
        net.feature_maps(images, precision="fp32")
    with pytest.raises(NotImplementedError, match='precision="fp16" runs on a GPU, the network is on cpu'):
        net.float().feature_maps(images, precision="fp16")
    with pytest.raises(ValueError, match="precision must be one of 'fp16', 'fp32', None, got 'tf32'"):
        net.feature_maps(images, precision="tf32")


def test_gradients_reach_weights_and_images_on_a_cpu():
    net, images = network().requires_grad_(), pictures(2, 34, 36).requires_grad_()
    net.feature_maps(images).square().mean().backward()
    assert float(images.grad.abs().max()) > 0
    assert float(net.encoder[0].weight.grad.abs().max()) > 0


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("size", [*SIZES[:2], (480, 854)])  # the third makes much of little
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_maps_are_the_modules(size, precision):
    net, images = network().cuda(), pictures(3, *size, "cuda")
    want = exact(net, images)
    with torch.backends.cudnn.flags(allow_tf32=False):
        maps = net.feature_maps(images, precision=precision)
    assert maps.dtype == {"fp16": torch.float16, "fp32": torch.float32}[precision]
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert error(maps, want) < {"fp16": 0.01, "fp32": 2e-5}[precision]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("size", [(480, 854), (121, 75)])
def test_bits_do_not_depend_on_the_batch_or_on_graphs(size, precision):
    net, images = network().cuda(), pictures(11, *size, "cuda")
    alone = torch.cat(
        [FeatureMapNet.from_state_dict(state()).cuda().feature_maps(i[None], precision=precision) for i in images]
    )
    for _ in range(2 + EAGER_IMAGES // 3):  # without a graph at first
        for n in (11, 1, 3, 8, 2, 5):
            assert torch.equal(net.feature_maps(images[:n], precision=precision), alone[:n])
    assert torch.equal(net.feature_maps(images.flip(0), precision=precision).flip(0), alone)
    several = net.feature_maps([*images[:3], images[4, :, :40, :36], images[5]], precision=precision)
    assert torch.equal(torch.stack([*several[:3], several[4]]), alone[[0, 1, 2, 5]])
    assert several[3].shape == (48, 20, 18)
    half = images.half()
    assert torch.equal(net.feature_maps(half, precision=precision), net.feature_maps(half.float(), precision=precision))


def warm(net: FeatureMapNet, images: Tensor, precision: str = "fp16") -> Tensor:
    """Until graphs run."""
    for _ in range(EAGER_IMAGES // len(images) + 2):
        maps = net.feature_maps(images, precision=precision)
    return maps


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_changed_weights_are_seen(precision):
    net, images = network().cuda(), pictures(8, 64, 72, "cuda")
    first = warm(net, images, precision)
    want = warm(network(4).cuda(), images, precision)
    net.load_state_dict(state(4), strict=False)  # in place
    assert torch.equal(net.feature_maps(images, precision=precision), want)
    net.to("cpu").load_state_dict(state(3), strict=False)
    net.to("cuda")  # other memory
    assert torch.equal(net.feature_maps(images, precision=precision), first)
    with torch.inference_mode():
        frozen = network(4).cuda()
        assert torch.equal(warm(frozen, images, precision), want)
        frozen.load_state_dict(state(3), strict=False)
        assert torch.equal(frozen.feature_maps(images, precision=precision), first)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_torchs_modes_change_nothing(precision):
    images = pictures(8, 64, 72, "cuda")
    want = warm(network().cuda(), images, precision)
    net = network().cuda()
    with torch.inference_mode():
        assert torch.equal(warm(net, images, precision), want)
    assert torch.equal(net.feature_maps(images, precision=precision), want)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(net.feature_maps(images, precision=precision), want)
        assert torch.equal(warm(network().cuda(), images, precision), want)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = True
    assert torch.equal(warm(network().cuda(), images, precision), want)
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


@pytest.mark.cuda
def test_default_precision_on_a_gpu():
    net, images = network().cuda(), pictures(2, 40, 44, "cuda")
    assert net.feature_maps(images).dtype == torch.float16
    assert torch.equal(net.feature_maps(images), net.feature_maps(images, precision="fp16"))
    assert net.feature_maps(images[:0]).dtype == torch.float16
    assert copy.deepcopy(net).half().feature_maps(images).dtype == torch.float16
    assert copy.deepcopy(net).double().feature_maps(images).dtype == torch.float64
    net.requires_grad_()
    maps = net.feature_maps(images)
    assert maps.dtype == torch.float32
    maps.sum().backward()
    assert net.encoder[0].weight.grad is not None
    with pytest.raises(NotImplementedError, match="has no backward"):
        net.feature_maps(images, precision="fp16")
    with torch.no_grad():
        assert net.feature_maps(images).dtype == torch.float16


@pytest.mark.cuda
def test_images_too_long_for_half_are_refused():
    net = network().cuda()
    with pytest.raises(ValueError, match=f"at most {LONGEST_SIDE} pixels a side, got {LONGEST_SIDE + 1}"):
        net.feature_maps(torch.zeros(1, 3, 2, LONGEST_SIDE + 1, device="cuda"))
    long = pictures(1, 2, LONGEST_SIDE, "cuda")
    assert error(net.feature_maps(long), exact(net, long)) < 0.01


@pytest.mark.cuda
def test_several_sizes_take_turns_and_memory_is_given_back():
    net = network().cuda()
    sizes = [(40 + 8 * i, 48) for i in range(KEPT_SIZES + 2)]
    batches = [pictures(4, *size, "cuda") for size in sizes]
    want = [warm(net, images) for images in batches]
    for _ in range(3):
        assert all(torch.equal(net.feature_maps(i), m) for i, m in zip(batches, want, strict=True))
    maker = feature_map_cuda._makers[net][torch.device("cuda:0"), True]
    assert torch.equal(warm(net, batches[0]), want[0])
    assert len(maker._sizes) == KEPT_SIZES
    assert sum(len(size.graphs) for size in maker._sizes.values()) > 0
    # A network that goes takes its graphs along; a copy of it has none.
    assert copy.deepcopy(net) not in feature_map_cuda._makers
    gone = weakref.ref(maker)
    del net, maker
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_images_and_wide_types_run_fewer_at_a_time(dtype):
    steps = feature_map_cuda.PlainSteps(torch.nn.Linear(1, 1, dtype=dtype))
    most = {n: feature_map_cuda._most_at_once(steps, 480 * n, 854 * n) for n in range(1, 12)}
    assert most[1] == 2 * GRAPHS[-1] // dtype.itemsize
    assert most[11] == 1
    for n, images in most.items():
        assert images == 1 or images * 480 * n * 854 * n * dtype.itemsize <= 2 * PIXELS


@pytest.mark.cuda
def test_one_large_image():
    net, images = network().cuda(), pictures(3, 1200, 1700, "cuda")
    maps = warm(net, images)
    assert torch.equal(maps[2:], network().cuda().feature_maps(images[2:]))
    assert error(maps[:1], exact(net, images[:1])) < 0.01


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, *feature_map_cuda.HalfSteps.batches])
@pytest.mark.parametrize("size", [(64, 72), (480, 854), (121, 75), (480, 640)])
def test_every_way_to_group_convolutions_keeps_an_image_to_itself(size, batch, monkeypatch):
    """Each is tried here wherever it may be used."""
    net, images = network().cuda(), pictures(9, *size, "cuda")
    steps = feature_map_cuda.HalfSteps(net)
    if batch > 1 and not feature_map_cuda._places_are_equal(steps, batch, *size):
        pytest.skip("this GPU's convolutions round by an image's place here")
    monkeypatch.setattr(feature_map_cuda.HalfSteps, "batches", (batch,))
    maps = warm(net, images)
    for i in (0, 3, 8):
        assert torch.equal(net.feature_maps(images[i : i + 1])[0], maps[i])
    assert torch.equal(net.feature_maps(images.roll(2, 0)).roll(-2, 0), maps)


@pytest.mark.cuda
def test_places_that_matter_are_noticed():
    class Uneven(feature_map_cuda.HalfSteps):
        def run(self, images: Tensor, scratch: Tensor) -> Tensor:
            maps = super().run(images, scratch)
            maps[1, 5, 3, 2] += 1  # what stands second is rounded up, say
            return maps

    net = network().cuda()
    assert not feature_map_cuda._places_are_equal(Uneven(net), 4, 64, 72)
    assert feature_map_cuda._places_are_equal(feature_map_cuda.HalfSteps(net), 1, 64, 72)


@pytest.mark.cuda
def test_inside_a_graph_of_the_callers_own():
    net, images = network().cuda(), pictures(3, 64, 72, "cuda")
    graph = torch.cuda.CUDAGraph()
    own = images.clone()
    with pytest.raises(RuntimeError, match="must have run once for images of 64 x 72 pixels"), torch.cuda.graph(graph):
        net.feature_maps(own)
    want = warm(net, images)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        maps = net.feature_maps(own)
    own.copy_(images.flip(0))
    graph.replay()
    assert torch.equal(maps, want.flip(0))


@pytest.mark.cuda
def test_streams_and_threads_share_a_network():
    net = network().cuda()
    batches = [pictures(8, 64, 72 + 8 * (i % 2), "cuda") for i in range(4)]
    want = [warm(network().cuda(), images) for images in batches]
    right = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                right.append(torch.equal(net.feature_maps(batches[i]), want[i]))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80


@pytest.mark.cuda
def test_not_a_number_stays_in_its_image():
    net, images = network().cuda(), pictures(8, 64, 72, "cuda")
    want = warm(net, images)
    images[3, 1, 5, 7] = float("nan")
    maps = net.feature_maps(images)
    assert bool(maps[3].isnan().all())
    images[3] = 0.5
    assert torch.equal(net.feature_maps(images)[[0, 1, 2, 4, 5, 6, 7]], want[[0, 1, 2, 4, 5, 6, 7]])
    assert torch.equal(maps[[0, 1, 2, 4, 5, 6, 7]], want[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.cuda
def test_norm_statistics_of_a_mean_far_from_zero():
    """A channel of mean 1000 and deviation 1 in float16, which sums of squares would lose."""
    for channels in (64, 128, 256, 512):
        for pixels in (1, 2, 7, 405, 102480 * 64 // channels):
            x = (1000 + torch.randn(2, pixels, channels, device="cuda")).half()
            x[:, 0] = 900  # the pixel that the sums are shifted by
            weight, bias = torch.rand(2, channels, device="cuda") + 0.5
            norm = torch.full((2, 3, channels), float("nan"), device="cuda")
            scratch = torch.zeros(2 * feature_map_cuda.native.map_stats_scratch, dtype=torch.uint8, device="cuda")
            copied = torch.zeros(2, pixels, 2 * channels, dtype=torch.half, device="cuda")
            for _ in range(2):
                feature_map_cuda.native.map_stats_cuda(
                    n_images=2,
                    n_pixels=pixels,
                    channels=channels,
                    eps=1e-5,
                    x=x.data_ptr(),
                    weight=weight.data_ptr(),
                    bias=bias.data_ptr(),
                    copy=copied[..., channels:].data_ptr(),
                    copy_pitch=2 * channels,
                    scratch=scratch.data_ptr(),
                    norm=norm.data_ptr(),
                    device=0,
                    stream=torch.cuda.current_stream().cuda_stream,
                )
            wide = x.double()
            torch.testing.assert_close(norm[:, 0].double(), wide.mean(1), rtol=1e-6, atol=0)
            scale = weight.double() / (wide.var(1, correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(norm[:, 1].double(), scale, rtol=1e-4, atol=0)
            assert torch.equal(norm[:, 2], bias.expand(2, -1))
            assert torch.equal(copied[..., channels:], x)
            assert not bool(copied[..., :channels].any())
