"""FeatureMapNet against the same network written down a second time, one image at a time, with BatchNorm."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast.appearance import FeatureMapNet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def contract_names() -> set[str]:
    """The names that docs/appearance.md lists for map_generator.pth, from torchvision's for ResNet18."""
    names = {"encoder.0.weight", "final_conv.weight", "final_conv.bias"}
    norms = ["encoder.1"]
    for layer in (4, 5, 6, 7):
        for block in (0, 1):
            for i in (1, 2):
                names.add(f"encoder.{layer}.{block}.conv{i}.weight")
                norms.append(f"encoder.{layer}.{block}.bn{i}")
        if layer != 4:
            names.add(f"encoder.{layer}.0.downsample.0.weight")
            norms.append(f"encoder.{layer}.0.downsample.1")
    for i in (0, 2, 4, 6):
        names |= {f"decoder.{i}.weight", f"decoder.{i}.bias"}
    for i in (1, 3, 5, 7):
        for conv in (0, 3):
            names |= {f"decoder.{i}.conv.{conv}.weight", f"decoder.{i}.conv.{conv}.bias"}
            norms.append(f"decoder.{i}.conv.{conv + 1}")
    return names | {f"{norm}.{entry}" for norm in norms for entry in NORM}


@functools.cache
def random_state(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights as they might be after training: every affine parameter matters, running statistics are far off."""
    g = torch.Generator().manual_seed(3)
    state = {}
    for name, value in FeatureMapNet().state_dict().items():
        if not value.is_floating_point():
            state[name] = torch.tensor(1234)
        elif name.endswith("running_var"):
            state[name] = torch.full_like(value, 7.0).to(dtype)
        elif value.dim() == 1:
            base = 1.0 if name.endswith("weight") else 0.0
            state[name] = (base + 0.4 * torch.randn(value.shape, generator=g)).to(dtype)
        else:
            fan_in = value[0].numel()
            state[name] = (torch.randn(value.shape, generator=g) * (2 / fan_in) ** 0.5).to(dtype)
    return state


def slow(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """[1, 3, H, W] -> [1, 48, h, w]: BatchNorm in train mode on a batch of one, written from the contract."""
    s = state

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, None, None, s[f"{name}.weight"], s[f"{name}.bias"], training=True, eps=1e-5)

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        y = F.relu(norm(F.conv2d(x, s[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        y = norm(F.conv2d(y, s[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in s:
            x = norm(F.conv2d(x, s[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return F.relu(x + y)

    taps = [F.conv2d(image, s["encoder.0.weight"], stride=2, padding=3)]
    x = F.max_pool2d(F.relu(norm(taps[0], "encoder.1")), 3, 2, 1)
    for layer, stride in ((4, 1), (5, 2), (6, 2), (7, 2)):
        x = block(block(x, f"encoder.{layer}.0", stride), f"encoder.{layer}.1", 1)
        taps.append(x)

    def up(x: Tensor, skip: Tensor, i: int) -> Tensor:
        x = F.conv_transpose2d(x, s[f"decoder.{i}.weight"], s[f"decoder.{i}.bias"], stride=2)
        rows = (torch.arange(skip.shape[2]) * x.shape[2]) // skip.shape[2]
        columns = (torch.arange(skip.shape[3]) * x.shape[3]) // skip.shape[3]
        x = torch.cat((x[:, :, rows][:, :, :, columns], skip), 1)
        for conv in (0, 3):
            name = f"decoder.{i + 1}.conv.{conv}"
            x = F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), padding=1)
            x = F.relu(norm(x, f"decoder.{i + 1}.conv.{conv + 1}"))
        return x

    stem, layer1, layer2, layer3, layer4 = taps
    x = up(up(up(layer4, layer3, 0), layer2, 2), layer1, 4)
    x = up(up(x, layer1, 6), stem, 6)
    return F.conv2d(x, s["final_conv.weight"], s["final_conv.bias"])


def images(n: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pictures unlike each other: noise of other brightness and contrast for each."""
    g = torch.Generator().manual_seed(height * width)
    noise = torch.rand(n, 3, height, width, generator=g, dtype=torch.float64)
    return (noise ** torch.arange(1, n + 1)[:, None, None, None]).to(dtype)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_are_the_contracts():
    assert set(FeatureMapNet().state_dict()) == contract_names()
    without = set(FeatureMapNet(pair_bias=False).state_dict())
    assert contract_names() - without == {f"decoder.{i}.conv.{c}.bias" for i in (1, 3, 5, 7) for c in (0, 3)}


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (35, 33), (1, 40)])
def test_batch_equals_batchnorm_one_by_one(size):
    net = FeatureMapNet.from_state_dict(random_state())
    batch = images(3, *size)
    got = net(batch)
    want = torch.cat([slow(random_state(), image[None]) for image in batch])
    assert got.shape == (3, 48, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert got.dtype == torch.float64
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6
    assert float((got[0] - got[1]).abs().max()) > 0.1 * float(want.abs().max()), "the images must matter"


def test_a_shared_batch_statistic_or_eval_mode_would_be_seen():
    state, batch = random_state(), images(2, 40, 48)
    want = slow(state, batch[:1])
    mixed = slow(state, batch)[:1]
    assert float((mixed - want).abs().max() / want.abs().max()) > 0.05, "two images in one BatchNorm must differ"
    net = FeatureMapNet.from_state_dict(state)
    assert torch.equal(net.train()(batch), net.eval()(batch)), "the mode must not matter"
    scaled = dict(state)
    for name in state:
        if "running_" in name:
            scaled[name] = state[name] * 5 + 1
    assert torch.equal(FeatureMapNet.from_state_dict(scaled)(batch[:1]), net(batch[:1])), "statistics are unused"
    assert float((net(batch[:1]) - want).abs().max() / want.abs().max()) < 1e-6


def test_pairs_without_bias_load_and_biases_change_nothing():
    state, batch = random_state(), images(1, 40, 36)
    bare = {k: v for k, v in state.items() if not k.endswith((".conv.0.bias", ".conv.3.bias"))}
    got = FeatureMapNet.from_state_dict(bare)(batch)
    assert torch.allclose(got, slow(bare, batch), rtol=1e-9, atol=1e-9)
    assert torch.allclose(got, FeatureMapNet.from_state_dict(state)(batch), rtol=1e-7, atol=1e-7)


def test_compiled_prefix_is_taken_off():
    state = {f"_orig_mod.{name}": value for name, value in random_state().items()}
    batch = images(1, 40, 36)
    want = FeatureMapNet.from_state_dict(random_state())(batch)
    assert torch.equal(FeatureMapNet.from_state_dict(state)(batch), want)
    net = FeatureMapNet().double()
    net.load_state_dict(state)
    assert torch.equal(net(batch), want)
    assert int(net.state_dict()["encoder.1.num_batches_tracked"]) == 1234
    assert torch.equal(net.state_dict()["encoder.1.running_var"], state["_orig_mod.encoder.1.running_var"])


def test_feature_maps_do_not_depend_on_the_batch():
    net = FeatureMapNet.from_state_dict(random_state(torch.float32))
    assert net.final_conv.weight.dtype == torch.float32
    batch = images(6, 41, 38, torch.float32)
    together = net.feature_maps(batch)
    assert together.shape == (6, 48, 21, 19)
    for i, image in enumerate(batch):
        assert torch.equal(net.feature_maps(image[None])[0], together[i])
    assert torch.equal(net.feature_maps(batch.flip(0)).flip(0), together)
    assert net.feature_maps(batch[:0]).shape == (0, 48, 21, 19)


def test_feature_maps_of_images_of_several_sizes():
    net = FeatureMapNet.from_state_dict(random_state(torch.float32))
    a, b = images(2, 41, 38, torch.float32), images(1, 34, 52, torch.float32)
    got = net.feature_maps([a[0], b[0], a[1]])
    assert [tuple(m.shape) for m in got] == [(48, 21, 19), (48, 17, 26), (48, 21, 19)]
    assert torch.equal(torch.stack([got[0], got[2]]), net.feature_maps(a))
    assert torch.equal(got[1], net.feature_maps(b)[0])


def test_float32_channels_last_and_half_stay_close():
    batch = images(2, 40, 44)
    want = FeatureMapNet.from_state_dict(random_state())(batch)
    scale = float(want.abs().max())
    single = FeatureMapNet.from_state_dict(random_state(torch.float32))
    assert float((single(batch.float()).double() - want).abs().max()) / scale < 1e-4
    last = single.to(memory_format=torch.channels_last)
    got = last.feature_maps(batch)
    assert float((got.double() - want).abs().max()) / scale < 1e-4
    half = single.half().feature_maps(batch)
    assert half.dtype == torch.float16
    error = (half.double() - want).norm() / want.norm()
    assert float(error) < 0.02


def test_bad_state_dicts_are_named_layer_by_layer():
    state = dict(random_state())
    del state["encoder.5.0.downsample.0.weight"]
    state["decoder.3.conv.1.weight"] = torch.zeros(64, dtype=torch.float64)
    state["encoder.fc.weight"] = torch.zeros(10, 512, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        FeatureMapNet.from_state_dict(state, "map_generator.pth")
    text = str(error.value)
    assert text.startswith("map_generator.pth: does not fit the network in 3 places")
    assert "encoder.5.0.downsample.0.weight [128, 64, 1, 1] is missing" in text
    assert "decoder.3.conv.1.weight must be [128], got [64]" in text
    assert "encoder.fc.weight [10, 512] is not part of the network" in text
    with pytest.raises(TypeError, match="state: must be a state dict"):
        FeatureMapNet.from_state_dict(torch.zeros(3))
    with pytest.raises(TypeError, match="final_conv.bias must be a dense tensor, got a list"):
        FeatureMapNet.from_state_dict(random_state() | {"final_conv.bias": [0.0] * 48})
    # RAP's mask branch, and statistics that nobody reads
    tolerated = random_state() | {"mask_conv.weight": torch.zeros(1, 64, 1, 1)}
    FeatureMapNet.from_state_dict({k: v for k, v in tolerated.items() if "running_" not in k})


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (
            torch.zeros(1, 3, 40, 40, dtype=torch.uint8),
            TypeError,
            r"floating-point tensor \[R, 3, H, W\] in 0..1, got ui",
        ),
        (torch.zeros(3, 40, 40), ValueError, r"images must be \[R, 3, H, W\] .* got float32 \[3, 40, 40\] on cpu"),
        (torch.zeros(1, 4, 40, 40), ValueError, r"images must be \[R, 3, H, W\]"),
        (torch.zeros(1, 3, 32, 32), ValueError, "one side of at least 33 pixels"),
        ([torch.zeros(3, 40, 40), torch.zeros(1, 3, 40, 40)], ValueError, r"images\[1\] must be \[3, H, W\]"),
    ],
)
def test_bad_images(value, error, sentence):
    net = FeatureMapNet.from_state_dict(random_state(torch.float32))
    with pytest.raises(error, match=sentence):
        net.feature_maps(value)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_feature_maps_do_not_depend_on_the_batch_on_a_gpu(dtype):
    """At this size cuDNN's TF32 and half-precision convolutions round by an image's place in its batch."""
    net = FeatureMapNet.from_state_dict(random_state(torch.float32)).cuda().to(dtype)
    net = net.to(memory_format=torch.channels_last) if dtype == torch.float16 else net
    batch = torch.rand(8, 3, 480, 854, device="cuda")
    together = net.feature_maps(batch)
    assert torch.equal(net.feature_maps(batch.roll(3, 0)).roll(-3, 0), together)
    assert torch.equal(net.feature_maps(batch[5:6])[0], together[5])
    error = (net(batch.to(dtype)).double() - together.double()).norm() / together.double().norm()
    assert float(error) < 0.02
