"""rapfast.appearance.fused: a network folded into few layers is the network, and what is kept of it is up to date."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from network_scenes import CPU64, WIDTHS, color_net, make_appearance
from torch import Tensor

from rapfast.appearance import ColorNet
from rapfast.appearance.features import positional_encoding, view_directions
from rapfast.appearance.fused import PARTS, PreparedNetworks, fused_layers, half_precision, map_pixels, prepare
from rapfast.ops import Network

N = 60
APPEARANCE = make_appearance(N, 1)
MEANS, INTRINSIC = APPEARANCE.means, APPEARANCE.intrinsic


pytestmark = pytest.mark.usefixtures("one_thread")


def random_net(
    widths: tuple[list[int], list[int], list[int]], n_appearance: int, n_intrinsic: int, n_frequencies: int | None,
    with_head: bool = True,
) -> ColorNet:  # fmt: skip
    """Blocks whose hidden and output widths are these; the last one's output is that of the network."""
    n_position = 0 if n_frequencies is None else 3 + 6 * n_frequencies
    encoder, decoder, head = widths
    net = ColorNet(
        [n_position + n_appearance + n_intrinsic, *encoder],
        [encoder[-1] + n_intrinsic, *decoder],
        [decoder[-1] + 3, *head] if with_head else None,
        n_frequencies=n_frequencies,
    )
    return net.double().requires_grad_(False)


def plain(net: ColorNet, part: str, x: Tensor, intrinsic: Tensor, directions: Tensor) -> Tensor:
    """What fused_layers(net, part) stands for, by the modules themselves."""
    decoded = x if part == "head" else net.decode(MEANS, x, intrinsic)
    return decoded if part == "decode" or net.color_decoder is None else net.head(decoded, directions)


def inputs_of(net: ColorNet, part: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    width = net.decoder.widths[-1] if part == "head" else net.n_appearance
    x = torch.randn(N, width, generator=g).double()
    intrinsic = INTRINSIC.flatten(1)[:, : net.n_intrinsic]
    return x, intrinsic, view_directions(MEANS, APPEARANCE.viewmats[0])


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert bool(want.isfinite().all())
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


# The layers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    widths=st.tuples(*[st.lists(st.integers(1, 70), min_size=1, max_size=4)] * 3),
    n_appearance=st.integers(0, 50),
    n_intrinsic=st.integers(0, 48),
    n_frequencies=st.sampled_from([None, 0, 1, 10]),
    with_head=st.booleans(),
)
def test_fused_layers_are_the_network(widths, n_appearance, n_intrinsic, n_frequencies, with_head):
    assume(n_appearance + n_intrinsic > 0 or n_frequencies is not None)
    net = random_net(widths, n_appearance, n_intrinsic, n_frequencies, with_head)
    for part in PARTS:
        if part == "head" and not with_head:
            continue
        x, intrinsic, directions = inputs_of(net, part)
        own = (
            intrinsic if n_frequencies is None else torch.cat([positional_encoding(MEANS, n_frequencies), intrinsic], 1)
        )
        y = x
        layers = fused_layers(net, part)
        for i, layer in enumerate(layers):
            y = torch.relu(y) if i else y
            y = y @ layer.inputs.T + own @ layer.own.T + directions @ layer.direction.T + layer.constant
        assert_near(y, plain(net, part, x, intrinsic, directions), 1e-12)
        blocks = {"all": widths, "decode": widths[:2], "head": widths[2:]}[part]
        hidden = sum(len(b) - 1 for b in blocks) - (len(widths[2]) - 1 if part == "all" and not with_head else 0)
        assert len(layers) == hidden + 1, "one more than there are ReLUs"


def one_by_one(network: Network, x: Tensor, directions: Tensor) -> Tensor:
    """A network in the kernels' fp32 form, run as csrc/color_net.h describes it."""
    y = x
    for i, layer in enumerate(network.layers):
        padded = torch.zeros(len(x), layer.n_in + (16 if layer.takes_direction else 0), dtype=torch.float64)
        padded[:, : y.shape[1]] = torch.relu(y) if i else y
        if layer.takes_direction:
            padded[:, layer.n_in : layer.n_in + 3] = directions
        size = padded.shape[1] * layer.n_out
        weight = network.weights[layer.weights : layer.weights + size].reshape(-1, layer.n_out)
        assert weight.numel() == size
        if layer.base >= 0:
            assert layer.biases == -1
            start = network.base[:, layer.base : layer.base + layer.n_out]
        else:
            start = network.biases[layer.biases : layer.biases + layer.n_out].expand(len(x), -1)
        assert start.shape == (len(x), layer.n_out)
        y = padded @ weight.double() + start.double()
    return y


CASES = {
    "RAP": WIDTHS["RAP"],
    "one layer each": WIDTHS["one layer each"],
    "odd": WIDTHS["odd"],
    "widest": WIDTHS["widest"],
    "no head": {"encoder": (159, 30), "decoder": (78, 20, 27)},
}


@pytest.mark.parametrize(
    ("name", "part"), [(n, p) for n in CASES for p in PARTS if p != "head" or "color_decoder" in CASES[n]]
)
def test_the_kernels_form_is_the_network(name, part):
    net = color_net(CPU64, CASES[name])
    network = prepare(net, MEANS, INTRINSIC, part=part, output="raw").network
    x, intrinsic, directions = inputs_of(net, part)
    want = plain(net, part, x, intrinsic, directions)
    got = one_by_one(network, x, directions)
    assert network.n_outputs == want.shape[1]
    assert_near(got[:, : want.shape[1]], want, 1e-12)
    assert not got[:, want.shape[1] :].any(), "padding of the outputs is 0"
    for layer, after in pairwise(network.layers):
        assert layer.n_out == after.n_in
    assert all(layer.n_in % 16 == layer.n_out % 16 == 0 for layer in network.layers)
    assert network.base is None or (network.base.is_contiguous() and network.base.shape[1] % 16 == 0)
    assert (network.base is None) == (part == "head")
    used = [layer.base for layer in network.layers if layer.base >= 0]
    ends = [layer.base + layer.n_out for layer in network.layers if layer.base >= 0]
    assert used == [0, *ends][: len(used)] and (not ends or ends[-1] == network.base.shape[1])
    directed = [layer.takes_direction for layer in network.layers]
    assert sum(directed) == (0 if part == "decode" or net.color_decoder is None else 1)


def test_a_network_that_looks_away_takes_no_direction():
    net = color_net(CPU64)
    net.color_decoder.lin0.weight[:, 48:] = 0
    assert not any(layer.takes_direction for layer in prepare(net, MEANS, INTRINSIC).network.layers)


def test_what_it_costs():
    """RAP's widths: 352 bytes a Gaussian in fp16 and twice that in fp32, and the multiply-adds left of 53,664."""
    for half, size in ((True, 2), (False, 4)):
        small = prepare(color_net(CPU64).float(), MEANS.float(), INTRINSIC.float(), half=half)
        large = prepare(
            color_net(CPU64).float(), MEANS.repeat(3, 1).float(), INTRINSIC.repeat(3, 1, 1).float(), half=half
        )
        assert large.n_bytes - small.n_bytes == 2 * N * (128 + 48) * size
        assert small.multiply_adds == 48 * 128 + 128 * 96 + 96 * 64 + 64 * 48 + 48 * 48 + 48 * 48 + 3 * 48 + 48 * 3
        tensors = small.network.weights, small.network.biases, small.network.base
        assert small.n_bytes == sum(x.numel() * x.element_size() for x in tensors)
        assert (
            [x.dtype for x in tensors] == [torch.float16, torch.float32, torch.float16] if half else [torch.float32] * 3
        )
        assert small.seconds > 0


def test_the_base_is_rounded_once():
    """What a Gaussian adds is exact to the last bit of its dtype, also where its sines turn fast."""
    net = color_net(CPU64)
    exact = prepare(net, MEANS, INTRINSIC).network.base
    single = prepare(net.float(), MEANS.float(), INTRINSIC.float()).network.base
    assert torch.equal(single, exact.float())
    half = prepare(net, MEANS.float(), INTRINSIC.float(), half=True).network.base
    assert torch.equal(half, exact.half())


# The tensor cores' operands


def mma_m16n8k16(a: list[list[float]], b: list[list[float]], c: list[list[float]]) -> list[list[float]]:
    """One instruction as the PTX manual lays it out: a [32][8], b [32][4] and c [32][4] are what each lane holds."""
    A = [[0.0] * 16 for _ in range(16)]
    B = [[0.0] * 8 for _ in range(16)]
    out = [list(row) for row in c]
    for lane in range(32):
        group, t = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            A[row][2 * t + i % 2 + (8 if i >= 4 else 0)] = a[lane][i]
        for i in range(4):
            B[2 * t + i % 2 + (8 if i >= 2 else 0)][group] = b[lane][i]
    for lane in range(32):
        group, t = lane // 4, lane % 4
        for i in range(4):
            row, column = group + (8 if i >= 2 else 0), 2 * t + i % 2
            out[lane][i] += math.fsum(A[row][k] * B[k][column] for k in range(16))
    return out


def one_warp(network: Network, layer_index: int, x: Tensor, directions: Tensor) -> Tensor:
    """A layer for 16 records as a warp of csrc/cuda/color_net_half.cu runs it: lane t of the four that share a row
    holds columns 4 t ... 4 t + 3 of each block of 16, before and after."""
    layer = network.layers[layer_index]
    weights = network.weights.double().tolist()
    columns = torch.zeros(16, layer.n_in + (16 if layer.takes_direction else 0), dtype=torch.float64)
    columns[:, : x.shape[1]] = x
    if layer.takes_direction:
        columns[:, layer.n_in : layer.n_in + 3] = directions
    given = columns.tolist()
    start = (
        network.base[:16, layer.base :] if layer.base >= 0 else network.biases[layer.biases :].expand(16, -1)
    ).tolist()
    n_blocks_in = columns.shape[1] // 16
    out = [[0.0] * layer.n_out for _ in range(16)]
    for block in range(layer.n_out // 16):
        sums = [[[0.0] * 4 for _ in range(32)] for _ in range(2)]
        for lane in range(32):
            group, t = lane // 4, lane % 4
            for i in range(4):  # of the lane's four columns, two belong to each instruction
                for half_tile in range(2):
                    value = start[group + 8 * half_tile][16 * block + 4 * t + i]
                    sums[i // 2][lane][2 * half_tile + i % 2] = value
        for k in range(n_blocks_in):
            a = [[0.0] * 8 for _ in range(32)]
            for lane in range(32):
                group, t = lane // 4, lane % 4
                for row in range(2):
                    four = given[group + 8 * row][16 * k + 4 * t : 16 * k + 4 * t + 4]
                    a[lane][2 * row : 2 * row + 2] = four[:2]
                    a[lane][4 + 2 * row : 4 + 2 * row + 2] = four[2:]
            first = layer.weights + ((block * n_blocks_in + k) * 32) * 8
            held = [weights[first + 8 * lane : first + 8 * lane + 8] for lane in range(32)]
            sums[0] = mma_m16n8k16(a, [w[:4] for w in held], sums[0])
            sums[1] = mma_m16n8k16(a, [w[4:] for w in held], sums[1])
        for lane in range(32):
            group, t = lane // 4, lane % 4
            for i in range(4):
                for half_tile in range(2):
                    value = sums[i // 2][lane][2 * half_tile + i % 2]
                    out[group + 8 * half_tile][16 * block + 4 * t + i] = value
    return torch.tensor(out, dtype=torch.float64)


def test_operands_lie_as_the_instruction_wants_them():
    """Against the same layers in the fp32 form, rounded alike."""
    net = color_net(CPU64, {"encoder": (159, 33, 7), "decoder": (55, 20), "color_decoder": (23, 17, 3)})
    half = prepare(net, MEANS.float(), INTRINSIC.float(), half=True).network
    full = prepare(net, MEANS, INTRINSIC).network
    assert len(half.layers) == 3 and half.layers == full.layers
    g = torch.Generator().manual_seed(2)
    directions = view_directions(MEANS[:16], APPEARANCE.viewmats[0]).half().double()
    rounded = full.weights.half().double()
    for i, layer in enumerate(full.layers):
        x = torch.randn(16, layer.n_in, generator=g).half().double()
        given = x
        if layer.takes_direction:
            given = torch.cat([x, directions, torch.zeros(16, 13, dtype=torch.float64)], 1)
        weight = rounded[layer.weights :][: given.shape[1] * layer.n_out].reshape(-1, layer.n_out)
        if layer.base >= 0:
            start = full.base[:16, layer.base : layer.base + layer.n_out].half().double()
        else:
            start = full.biases[layer.biases : layer.biases + layer.n_out].float().double()
        assert_near(one_warp(half, i, x, directions), given @ weight + start, 1e-12)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_half_precision_keeps_the_contracts_bound(widths):
    """fp16 operands and activations with exact sums: 2e-2 at the 99.9th percentile, for colours of order 1."""
    net = color_net(CPU64, widths)
    a = make_appearance(1500, 1)
    full = prepare(net, a.means, a.intrinsic).network
    directions = view_directions(a.means, a.viewmats[0])
    g = torch.Generator().manual_seed(4)
    x = 2 * torch.rand(1500, 48, generator=g).double() - 1
    want = one_by_one(full, x, directions)[:, :3]
    y = x
    for i, layer in enumerate(full.layers):
        given = (torch.relu(y) if i else y).half().double()
        given = torch.nn.functional.pad(given, (0, layer.n_in - given.shape[1]))
        if layer.takes_direction:
            given = torch.cat([given, directions.half().double(), torch.zeros(1500, 13, dtype=torch.float64)], 1)
        weight = full.weights[layer.weights :][: given.shape[1] * layer.n_out].reshape(-1, layer.n_out)
        if layer.base >= 0:
            start = full.base[:, layer.base : layer.base + layer.n_out].half().double()
        else:
            start = full.biases[layer.biases : layer.biases + layer.n_out]
        y = given @ weight.half().double() + start
    error = (y[:, :3] - want).abs().flatten().sort().values
    assert 0.2 < float(want.square().mean().sqrt()) < 3
    assert float(error[int(0.999 * len(error))]) < 2e-2
    assert float(error.mean()) > 1e-5, "something was rounded"


# What is refused


def test_too_wide_or_too_deep():
    wide = ColorNet((159, 257, 48), (96, 48), (51, 3)).double()
    with pytest.raises(
        NotImplementedError,
        match='color_net must be at most 256 wide and 16 layers deep for backend="rapfast", got width 257 and 2 lay',
    ):
        prepare(wide, MEANS, INTRINSIC)
    deep = ColorNet((159, *[8] * 17), (56, 48), (51, 3)).double()
    with pytest.raises(NotImplementedError, match='got width 48 and 17 layers: backend="reference" takes any'):
        prepare(deep, MEANS, INTRINSIC)
    prepare(ColorNet((159, 256, 48), (96, 48), (51, 3)).double(), MEANS, INTRINSIC)
    prepare(ColorNet((159, *[8] * 16), (56, 48), (51, 3)).double(), MEANS, INTRINSIC)


def test_beyond_float16():
    means, intrinsic = MEANS.float(), INTRINSIC.float()
    net = color_net(CPU64).float()
    net.encoder.lin1.weight[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"must stay within float16's 65504 .*, and weights does not: use \"fp32\""):
        prepare(net, means, intrinsic, half=True)
    prepare(net, means, intrinsic)
    net = color_net(CPU64).float()
    net.encoder.lin0.bias[3] = -7e4
    with pytest.raises(ValueError, match="and what it adds for a Gaussian does not"):
        prepare(net, means, intrinsic, half=True)
    net.encoder.lin0.bias[3] = -6e4
    prepare(net, means, intrinsic, half=True)
    net.encoder.lin1.bias[3] = 1e6  # biases without a base stay in float32
    assert float(prepare(net, means, intrinsic, half=True).network.biases.max()) == 1e6


@pytest.mark.parametrize("half", [False, True])
def test_gaussians_that_are_not_finite_harm_no_others(half):
    means, intrinsic = MEANS.float(), INTRINSIC.float()
    want = prepare(color_net(CPU64), means, intrinsic, half=half).network
    means, intrinsic = means.clone(), intrinsic.clone()
    means[3, 1] = math.nan
    intrinsic[5, 2, 2] = math.inf
    got = prepare(color_net(CPU64), means, intrinsic, half=half).network
    good = [n for n in range(N) if n not in (3, 5)]
    assert torch.equal(got.base[good], want.base[good])
    assert not got.base[[3, 5], :128].isfinite().any()
    assert torch.equal(got.weights, want.weights)


def test_precision_of_a_call_on_the_cpu():
    assert half_precision(None, MEANS) is False
    assert half_precision("fp32", MEANS.float()) is False
    with pytest.raises(ValueError, match="precision must be one of"):
        half_precision("fp8", MEANS)
    with pytest.raises(NotImplementedError, match='precision must be "fp32" or None on cpu, got "fp16"'):
        half_precision("fp16", MEANS.float())
    with pytest.raises(ValueError, match='precision must be None for a float64 scene, got "fp32"'):
        half_precision("fp32", MEANS)


# What is kept


def get(kept: PreparedNetworks, net: ColorNet, means: Tensor = MEANS, intrinsic: Tensor = INTRINSIC, **form: object):
    return kept.get(net, means, intrinsic, **form)


def test_a_prepared_network_is_used_again():
    kept, net = PreparedNetworks(), color_net(CPU64)
    first = get(kept, net)
    assert get(kept, net) is first
    assert get(kept, net, MEANS, INTRINSIC) is first
    head = get(kept, net, part="head")
    assert head is not first and get(kept, net, part="head") is head and get(kept, net) is first
    half = get(kept, net, half=True)
    assert half.network.half and not first.network.half
    kept.clear()
    assert get(kept, net) is not first


def change(net: ColorNet, what: str) -> tuple[Tensor, Tensor]:
    """A change of the network or of what it is prepared for; the Gaussians from then on."""
    means, intrinsic = MEANS, INTRINSIC
    if what == "weight in place":
        net.decoder.lin1.weight.mul_(1.5)
    elif what == "bias in place":
        net.color_decoder.lin1.bias.add_(0.1)
    elif what == "load_state_dict":
        net.load_state_dict(color_net(CPU64, seed=6).state_dict())
    elif what == "new parameter":
        net.encoder.lin2.bias = torch.nn.Parameter(net.encoder.lin2.bias + 1, requires_grad=False)
    elif what == "new layer":
        net.encoder.lin2 = torch.nn.Linear(96, 64).double().requires_grad_(False)
    elif what == "new means":
        means = MEANS + 0.1
    elif what == "new intrinsic":
        intrinsic = INTRINSIC * 2
    elif what == "optimizer":
        net.requires_grad_(True)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(net.parameters(), lr=0.1).step()
        net.requires_grad_(False)
    return means, intrinsic


@pytest.mark.parametrize(
    "what",
    [
        "weight in place", "bias in place", "load_state_dict", "new parameter", "new layer", "new means",
        "new intrinsic", "optimizer",
    ],
)  # fmt: skip
def test_a_changed_network_is_prepared_again(what):
    kept, net = PreparedNetworks(), color_net(CPU64)
    before = get(kept, net)
    with torch.no_grad() if what != "optimizer" else torch.enable_grad():
        means, intrinsic = change(net, what)
    after = get(kept, net, means, intrinsic)
    fresh = prepare(net, means, intrinsic)
    assert after is not before
    for name in ("weights", "biases", "base"):
        assert torch.equal(getattr(after.network, name), getattr(fresh.network, name))
    same = [torch.equal(getattr(after.network, n), getattr(before.network, n)) for n in ("weights", "biases", "base")]
    assert not all(same), "the change must be one that shows"
    assert get(kept, net, means, intrinsic) is after


def test_gaussians_changed_in_place():
    kept, net = PreparedNetworks(), color_net(CPU64)
    means, intrinsic = MEANS.clone(), INTRINSIC.clone()
    first = get(kept, net, means, intrinsic)
    means[4] += 1
    second = get(kept, net, means, intrinsic)
    intrinsic[7] = 0
    third = get(kept, net, means, intrinsic)
    bases = [p.network.base for p in (first, second, third)]
    assert (bases[1] != bases[0]).any(1).nonzero().flatten().tolist() == [4]
    assert (bases[2] != bases[1]).any(1).nonzero().flatten().tolist() == [7]


def test_a_freed_tensors_address_is_not_taken_for_it():
    """Tensors made one after another often get the same address."""
    kept, net = PreparedNetworks(), color_net(CPU64)
    for i in range(4):
        means = MEANS + i
        assert torch.equal(get(kept, net, means).network.base, prepare(net, means, INTRINSIC).network.base)
        del means


def test_under_inference_mode():
    """Tensors made there count no changes: `clear` is the way."""
    with torch.inference_mode():
        kept, net = PreparedNetworks(), color_net(CPU64)
        means = MEANS.clone()
        first = get(kept, net, means)
        assert get(kept, net, means) is first
        means[0] += 1
        kept.clear()
        assert not torch.equal(get(kept, net, means).network.base, first.network.base)


# Maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_maps_as_the_kernels_read_them(dtype):
    """Read where they lie if they can be; else copied. Either way the same numbers."""
    maps = torch.rand(3, 48, 5, 7).half().to(dtype)
    want = maps.permute(0, 2, 3, 1)
    channels_last = maps.to(memory_format=torch.channels_last)
    room = torch.zeros(1 + maps.numel(), dtype=dtype)
    misaligned = room[1:].view(3, 5, 7, 48).copy_(want).permute(0, 3, 1, 2)
    wide = torch.zeros(3, 48, 5, 9, dtype=dtype).to(memory_format=torch.channels_last)
    wide[..., 1:8] = maps
    forms = {
        "contiguous": maps, "channels-last": channels_last, "a list": list(channels_last), "misaligned": misaligned,
        "sliced": wide[..., 1:8], "flipped twice": channels_last.flip(0).flip(0),
        "every second": torch.repeat_interleave(channels_last, 2, 0)[::2],
    }  # fmt: skip
    for name, given_maps in forms.items():
        pixels, places = map_pixels(given_maps, [2, 0, 1, 2], dtype)
        for view, k in enumerate([2, 0, 1, 2]):
            pixel = pixels[places[view]]
            assert pixel.is_contiguous() and pixel.data_ptr() % 16 == 0, name
            assert torch.equal(pixel, want[k]), name
    in_place, places = map_pixels(channels_last, [2, 1], dtype)
    assert len(in_place) == 2, "those alone that are used"
    if 5 * 7 * 48 * dtype.itemsize % 16 == 0:
        assert [p.data_ptr() for p in in_place] == [channels_last[k].data_ptr() for k in (1, 2)]
    other = torch.float32 if dtype != torch.float32 else torch.float16
    assert map_pixels(channels_last, [0], other)[0][0].dtype == other
