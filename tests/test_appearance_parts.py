"""A RAP scene whose parts are replaced, copied or shared by threads, and gradients in every container."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from appearance_scenes import HEIGHT, RAP_WIDTHS, WIDTH, make_appearance, net_state

from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene

APPEARANCE = make_appearance(n=60, c=3, n_maps=3)


@pytest.fixture
def rap() -> RapScene:
    a = APPEARANCE
    geometry = (tensor.float() for tensor in (a.means, a.quats, a.scales, a.opacities))
    scene = Scene(*geometry, intrinsic=a.intrinsic.float())
    torch.manual_seed(0)
    maps = FeatureMapNet().eval().requires_grad_(False)
    return RapScene(scene, a.box_coord.float(), maps, ColorNet.from_state_dict(net_state()).float())


def render(rap: RapScene, **changes):
    a, device = APPEARANCE, rap.scene.device
    views = {"viewmats": a.viewmats.float().to(device), "Ks": a.Ks.float().to(device)}
    given = {"feature_maps": a.maps.float().to(device), "view_weights": [0.2, 1.0, 1.8]}
    return rap.render(**views, width=WIDTH, height=HEIGHT, **(given | changes))[0]


def other_net(**widths: tuple[int, ...]) -> ColorNet:
    return ColorNet.from_state_dict(net_state(RAP_WIDTHS | widths)).float()


def test_replaced_parts_are_checked_before_anything_runs(rap):
    render(rap)
    right = rap.color_net, rap.box_coord
    for net in (other_net(encoder=(119, 32, 48)), other_net(encoder=(199, 32, 48)), other_net(color_decoder=(51, 16))):
        rap.color_net = net
        with pytest.raises(ValueError, match="color_net must"):
            render(rap)
        with pytest.raises(ValueError, match="color_net must"):
            rap.prepare()
    rap.color_net = right[0]
    for box_coord in (right[1][:1], right[1].double(), right[1][:, :2]):
        rap.box_coord = box_coord
        with pytest.raises((TypeError, ValueError), match=r"box_coord must be float32 \[60, 3, 2\]"):
            render(rap)
    rap.box_coord = right[1]
    rap.scene = Scene(*(torch.cat([part, part]) for part in (
        rap.scene.means, rap.scene.quats, rap.scene.scales, rap.scene.opacities)
    ), intrinsic=torch.cat([rap.scene.intrinsic] * 2))  # fmt: skip
    with pytest.raises(ValueError, match=r"box_coord must be float32 \[120, 3, 2\]"):
        render(rap)


def test_a_replaced_network_of_the_same_form_is_the_one_that_colours(rap):
    before = render(rap)
    rap.color_net = ColorNet.from_state_dict(net_state(seed=9)).float()
    after = render(rap)
    assert not torch.equal(before, after)
    assert torch.allclose(after, render(rap, backend="reference"), atol=2e-5)


@pytest.mark.parametrize("container", [lambda maps: maps, lambda maps: list(maps), lambda maps: maps.unbind()])
def test_gradients_are_found_in_every_container(rap, container):
    maps = APPEARANCE.maps.float().requires_grad_()
    render(rap, feature_maps=container(maps)).square().sum().backward()
    assert maps.grad.isfinite().all() and maps.grad.any()
    with torch.no_grad():
        assert torch.equal(render(rap, feature_maps=container(maps)), render(rap))


def test_numpy_arrays_are_numbers_of_views(rap):
    want = render(rap, map_ids=[2, 0, 1])
    assert torch.equal(render(rap, map_ids=np.array([2, 0, 1]), view_weights=np.array([0.2, 1.0, 1.8])), want)
    with pytest.raises(ValueError, match=r"view_weights must be floating point \[3\]"):
        render(rap, view_weights=np.ones(2))


def test_a_copy_carries_no_prepared_network(rap):
    fresh = len(pickle.dumps(rap))
    want = render(rap)
    assert len(pickle.dumps(rap)) < fresh + 4096
    for other in (pickle.loads(pickle.dumps(rap)), copy.deepcopy(rap)):
        assert not other._networks._kept
        assert torch.equal(render(other), want)


@pytest.mark.cuda
def test_networks_of_several_sizes_in_several_threads(rap):
    """The kernels' setting for shared memory is no launch's own."""
    rap = rap.to("cuda")
    narrow = RapScene(
        rap.scene, rap.box_coord, rap.feature_map_net, other_net(encoder=(159, 16, 48), decoder=(96, 48)).cuda()
    )
    wide = RapScene(rap.scene, rap.box_coord, rap.feature_map_net, other_net(encoder=(159, 256, 240, 48)).cuda())
    want = {(id(s), p): render(s, precision=p) for s in (rap, narrow, wide) for p in ("fp16", "fp32")}
    failures = []

    def work(scene: RapScene, precision: str) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    got = render(scene, precision=precision)
                assert torch.equal(got, want[id(scene), precision])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(s, p)) for s in (rap, narrow, wide) for p in ("fp16", "fp32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.cuda
def test_feature_maps_of_replaced_weights():
    """A freed weight's address comes again; its number of changes, too."""
    torch.manual_seed(0)
    net = FeatureMapNet().cuda().eval().requires_grad_(False)
    image = torch.rand(1, 3, 40, 48, device="cuda")
    for seed in range(12):
        for _ in range(2):
            torch.manual_seed(seed)
            weight = torch.randn_like(net.final_conv.weight)
            net.final_conv.weight = torch.nn.Parameter(weight, requires_grad=False)
        want = copy.deepcopy(net).feature_maps(image)
        assert torch.equal(net.feature_maps(image), want)
