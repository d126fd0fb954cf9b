"""rapfast inside a GaussianModel that behaves as RAP's is described: log scales, logits, parameters, its own render."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from scenes import assert_same
from torch import Tensor, nn

from rapfast import Cameras, Scene, rasterization
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene, rap_calls, sample_features
from rapfast.integrations.rap import adapt, forget, install, uninstall

C, N = 3, 60
A = make_appearance(n=N, c=C, n_maps=1)
STATE = net_state()
WEIGHTS = [0.3, 1.7, 1.0]
PIPE = SimpleNamespace(debug=False)
BLACK = torch.zeros(3)
IMAGES = [torch.rand(3, 33, 34, generator=torch.Generator().manual_seed(i)) for i in range(2)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def map_net() -> FeatureMapNet:
    torch.manual_seed(0)
    return FeatureMapNet().train()


@pytest.fixture
def model_class():
    """A class of its own for each test, since installing changes it."""

    class GaussianModel:
        def __init__(self, map_net: FeatureMapNet) -> None:
            self._xyz = nn.Parameter(A.means.float())
            self._scaling = nn.Parameter(A.scales.float().log())
            self._rotation = nn.Parameter(A.quats.float())
            self._opacity = nn.Parameter(A.opacities.float().logit()[:, None])
            self._features_intrinsic = nn.Parameter(A.intrinsic.float())
            self.box_coord = nn.Parameter(A.box_coord.float())
            self.map_generator = map_net
            self.color_net = ColorNet().requires_grad_()
            self.color_net.load_state_dict(STATE)
            self.colornet_inter_weight = 1.0
            self.calls: list[dict[str, Any]] = []

        get_xyz = property(lambda self: self._xyz)
        get_scaling = property(lambda self: self._scaling.exp())
        get_rotation = property(lambda self: nn.functional.normalize(self._rotation))
        get_opacity = property(lambda self: self._opacity.sigmoid())

        def render(self, camera, pipe, bg_color, scaling_modifier=1.0, **options):
            """All Gaussians in plain torch, one camera: what gsplat does for RAP."""
            self.calls.append({"camera": camera, "weight": self.colornet_inter_weight} | options)
            viewmat = camera.world_view_transform.T
            maps = self.map_generator(camera.original_image[None])[0]
            a = sample_features(maps, self.get_xyz, self.box_coord, viewmat, camera.K)
            arguments = self.get_xyz, a, self._features_intrinsic, viewmat, self.colornet_inter_weight
            colors = self.color_net(*arguments)
            images, _, meta = rasterization(
                self.get_xyz, self.get_rotation, self.get_scaling * scaling_modifier, self.get_opacity[:, 0], colors,
                viewmat[None], camera.K[None], camera.image_width, camera.image_height, backgrounds=bg_color[None],
                rasterize_mode="antialiased", packed=False, backend="reference",
            )  # fmt: skip
            radii = meta["radii"][0].max(-1).values
            return {
                "render": images[0].permute(2, 0, 1), "viewspace_points": meta["means2d"],
                "visibility_filter": radii > 0, "radii": radii, "depth": None,
            }  # fmt: skip

    return GaussianModel


@pytest.fixture
def model(model_class, map_net):
    return install(model_class)(map_net)


def camera(view: int, image: int = 0, **changes: Any) -> SimpleNamespace:
    attributes = {
        "world_view_transform": A.viewmats[view].float().T,
        "K": A.Ks[view].float(),
        "image_width": WIDTH,
        "image_height": HEIGHT,
        "original_image": IMAGES[image],
    }
    return SimpleNamespace(**(attributes | changes))


CAMERAS = [camera(0), camera(1, image=1), camera(2)]


def original(model, view: int, weight: float) -> dict[str, Any]:
    """What the class's own render draws, its record of calls left as it was."""
    before, model.colornet_inter_weight = model.colornet_inter_weight, weight
    with torch.no_grad():
        result = type(model).render._rapfast_original(model, CAMERAS[view], PIPE, BLACK)
    model.calls.pop()
    model.colornet_inter_weight = before
    return result


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_without_gradients_rapfast_renders(model):
    for view, weight in enumerate(WEIGHTS):
        model.colornet_inter_weight = weight
        with torch.no_grad():
            got = model.render(CAMERAS[view], PIPE, BLACK)
        assert model.calls == [], "the class's own render is not reached"
        want = original(model, view, weight)
        assert furthest(got["render"], want["render"]) < 1e-3
        assert float(want["render"].std()) > 0.05
        assert_same(got["radii"], want["radii"])
        assert_same(got["visibility_filter"], want["visibility_filter"])
        assert furthest(got["viewspace_points"], want["viewspace_points"][0]) < 1e-3


def test_batches(model):
    with torch.no_grad():
        got = model.render_batch(CAMERAS, PIPE, BLACK, view_weights=WEIGHTS)
        first = model.render_batch(CAMERAS, PIPE, BLACK, view_weights=WEIGHTS[0])
        for view, weight in enumerate(WEIGHTS):
            assert furthest(got[view]["render"], original(model, view, weight)["render"]) < 1e-3
            model.colornet_inter_weight = weight
            assert_same(model.render(CAMERAS[view], PIPE, BLACK)["render"], got[view]["render"])
            assert (furthest(first[view]["render"], got[view]["render"]) > 1e-2) == (view > 0)
        # None: the model's weight.
        model.colornet_inter_weight = WEIGHTS[1]
        assert_same(model.render_batch(CAMERAS, PIPE, BLACK)[1]["render"], got[1]["render"])
        cameras = Cameras(A.viewmats.float(), A.Ks.float(), WIDTH, HEIGHT)
        own = model.render_batch(cameras, PIPE, BLACK, view_weights=WEIGHTS, images=IMAGES, map_ids=[0, 1, 0])
        for view in range(C):
            assert_same(own[view]["render"], got[view]["render"])
    assert model.calls == []


def leaves_of(model) -> dict[str, Tensor]:
    """What RAP's optimizers step, by name."""
    named = {name: value for name, value in vars(model).items() if isinstance(value, nn.Parameter)}
    for net in ("color_net", "map_generator"):
        named |= {f"{net}.{name}": value for name, value in getattr(model, net).named_parameters()}
    return named


def trained(model, result: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of a loss on one picture and on where the Gaussians are in it."""
    for leaf in leaves_of(model).values():
        leaf.grad = None
    g = torch.Generator().manual_seed(5)
    picture = result["render"]
    (picture * torch.randn(picture.shape, generator=g).to(picture)).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves_of(model).items()}
    return found | {"viewspace_points": result["viewspace_points"].grad}


def assert_trained_alike(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-2) -> None:
    assert got.keys() == want.keys()
    n_met = 0
    for name, expected in want.items():
        if expected is None or not expected.any() or name.endswith(("conv.0.bias", "conv.3.bias")):
            continue  # biases in front of a norm change nothing
        n_met += 1
        assert got[name].isfinite().all(), name
        error = (got[name].cpu() - expected.reshape(got[name].shape)).norm() / expected.norm()
        assert float(error) < tolerance, f"{name} differs by {float(error):.1e}"
    assert n_met > 70


def original_trained(model, view: int, weight: float, **options: Any) -> dict[str, Tensor]:
    """As trained(), through the class's own render."""
    before, model.colornet_inter_weight = model.colornet_inter_weight, weight
    result = type(model).render._rapfast_original(model, CAMERAS[view], PIPE, BLACK, **options)
    model.calls.pop()
    model.colornet_inter_weight = before
    result["viewspace_points"].retain_grad()
    return trained(model, result)


def test_training_gives_the_models_parameters_their_gradients(model):
    """All that RAP optimizes, the networks included, has the gradient that RAP's own render gives it."""
    model.colornet_inter_weight = 1.3
    result = model.render(CAMERAS[1], PIPE, BLACK, scaling_modifier=1.2)
    assert model.calls == [], "the class's own render is not reached"
    assert result["viewspace_points"].shape == (N, 2)
    assert result["radii"].dtype == torch.int32 and result["visibility_filter"].any()
    got = trained(model, result)
    assert got["viewspace_points"].shape == (N, 2), "in pixels, for densification"
    assert_trained_alike(got, original_trained(model, 1, 1.3, scaling_modifier=1.2))
    assert model.map_generator.encoder[1].num_batches_tracked == 0


@pytest.mark.parametrize("fused", [False, True])
def test_training_steps_are_seen(model, fused):
    """An optimizer's steps, in place, move the next picture, those of fused kernels too, which torch does not count;
    parameters that are replaced are read anew."""
    optimizer = torch.optim.Adam(leaves_of(model).values(), lr=1e-3, fused=fused)
    with torch.no_grad():
        model.render(CAMERAS[0], PIPE, BLACK)  # what it keeps is out of date after the first step
    target = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(6):
        loss = (model.render(CAMERAS[0], PIPE, BLACK)["render"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)), losses
    with torch.no_grad():
        got = model.render(CAMERAS[0], PIPE, BLACK)["render"]
    assert furthest(got, original(model, 0, 1.0)["render"]) < 1e-3
    # Densification: other tensors of another size.
    for name in ("_xyz", "_scaling", "_rotation", "_opacity", "_features_intrinsic", "box_coord"):
        setattr(model, name, nn.Parameter(getattr(model, name).detach()[5:]))
    model.color_net = ColorNet()
    result = model.render(CAMERAS[0], PIPE, BLACK)
    assert_trained_alike(trained(model, result), original_trained(model, 0, 1.0))


def test_halves_of_box_coord_are_trained(model):
    """As RAP may keep them, of which the rows are made for each call."""
    whole, weight = model.box_coord, torch.rand(3, HEIGHT, WIDTH)

    def render() -> Tensor:
        return (model.render(CAMERAS[1], PIPE, BLACK)["render"] * weight).sum()

    want = torch.autograd.grad(render(), whole)[0]
    model.box_coord1, model.box_coord2 = (nn.Parameter(whole.detach()[:, rows]) for rows in (2, slice(2)))
    model.box_coord = None
    got = torch.autograd.grad(render(), [model.box_coord1, model.box_coord2])
    assert_same(got[0], want[:, 2])
    assert_same(got[1], want[:, :2])
    assert all(x.any() for x in got)


def test_batches_are_trained(model):
    """Each view with its own weight and reference image; the gradient is the sum of the views'."""
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    results = model.render_batch(CAMERAS, PIPE, BLACK, view_weights=weights)
    assert model.calls == []
    g = torch.Generator()
    losses = [(r["render"] * torch.randn(r["render"].shape, generator=g.manual_seed(5))).sum() for r in results]
    leaves = leaves_of(model)
    got = torch.autograd.grad(sum(losses), [*leaves.values(), weights], allow_unused=True)
    assert got[-1].abs().min() > 0
    want = [original_trained(model, view, weight) for view, weight in enumerate(WEIGHTS)]
    summed = {name: sum(w[name] for w in want) for name in leaves}
    assert_trained_alike(dict(zip(leaves, got, strict=False)), summed)
    cameras = Cameras(A.viewmats.float(), A.Ks.float(), WIDTH, HEIGHT)
    own = model.render_batch(cameras, PIPE, BLACK, view_weights=WEIGHTS, images=IMAGES, map_ids=[0, 1, 0])
    for x, y in zip(own, results, strict=True):
        assert furthest(x["render"].detach(), y["render"].detach()) < 1e-5
    with pytest.raises(ValueError, match="view_weights must hold one number for each of 3 views, got 2"):
        model.render_batch(CAMERAS, PIPE, BLACK, view_weights=[1.0, 2.0])


def test_the_weight_may_have_another_name_or_be_a_methods(model_class, map_net):
    for name, value in (("own_weight", 0.2), ("own_weight", lambda: 0.2), ("later", 0.2)):
        model = install(model_class, names={"view_weight": ("own_weight", "later")})(map_net)
        setattr(model, name, value)
        with torch.no_grad():
            got = model.render(CAMERAS[0], PIPE, BLACK)["render"]
        want = original(model, 0, 0.2)["render"]
        assert furthest(got, want) < 1e-3 < furthest(original(model, 0, 1.0)["render"], want)


def test_trained_intrinsics_of_a_method_are_seen_and_angles_refused(model_class, map_net):
    """In a model of which nothing is trained."""
    model = install(model_class)(map_net)
    for value in (*vars(model).values(), map_net):
        if isinstance(value, (Tensor, nn.Module)):
            value.requires_grad_(False)
    K = A.Ks[0].float().clone().requires_grad_()
    for given in (K, lambda: K):
        picture = model.render(camera(0, K=given), PIPE, BLACK)["render"]
        assert torch.autograd.grad(picture.square().sum(), K)[0].any()
    angles = {"FoVx": torch.tensor(0.9, requires_grad=True), "FoVy": 0.7, "K": None}
    with pytest.raises(NotImplementedError, match="cameras?.*FoVx"):
        model.render(camera(0, **angles), PIPE, BLACK)
    map_net.requires_grad_()


@pytest.fixture
def smooth_activations(monkeypatch):
    """In the feature-map network, whose 34 x 33 pixels under a norm of their own leave some ReLU so near zero that a
    change of the weights by 1e-7 opens it, and a gradient by 4 %. Without them 1e-6 changes gradients by 4e-5."""
    monkeypatch.setattr(torch, "relu", nn.functional.softplus)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.softplus(x))


@pytest.mark.cuda
def test_training_on_the_gpu_is_the_cpus(model_class, map_net, smooth_activations):
    """In full precision; in half precision nearly so."""
    cpu = install(model_class)(map_net)
    want = trained(cpu, cpu.render(CAMERAS[1], PIPE, BLACK))
    for precision, tolerance in (("fp32", 1e-3), ("fp16", 5e-2)):
        install(model_class, precision=precision)
        gpu = model_class(copy.deepcopy(map_net).cuda())
        for name, value in vars(gpu).items():
            if isinstance(value, nn.Parameter):
                setattr(gpu, name, nn.Parameter(value.detach().cuda()))
        gpu.color_net.cuda()
        with torch.backends.cudnn.flags(allow_tf32=False):
            got = trained(gpu, gpu.render(CAMERAS[1], PIPE, BLACK))
        assert got["viewspace_points"].is_cuda
        assert_trained_alike(got, want, tolerance)


def test_deblurring(model):
    """The centres move by a matrix, which is trained, and colours stay where they are."""
    transform = torch.tensor([[1.0, 0.02, 0.0, 0.05], [-0.02, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -0.03]])
    moved = transform.clone().requires_grad_()
    result = model.render(CAMERAS[0], PIPE, BLACK, means_transform=moved)
    result["render"].square().mean().backward()
    assert moved.grad.abs().min() > 0 and model._xyz.grad.any()
    with torch.no_grad():
        same = model.render(CAMERAS[0], PIPE, BLACK, means_transform=transform)["render"]
        still = model.render(CAMERAS[0], PIPE, BLACK)["render"]
    assert furthest(result["render"].detach(), same) < 1e-4
    assert furthest(still, same) > 1e-2


@pytest.mark.parametrize("needs", ["_opacity", "color_net", "map_generator", "camera", "background", "nothing"])
def test_what_makes_a_call_need_gradients(model_class, map_net, needs):
    model = install(model_class)(FeatureMapNet() if needs == "map_generator" else map_net)
    for value in (*vars(model).values(), map_net):
        if isinstance(value, (Tensor, nn.Module)):
            value.requires_grad_(False)
    views, background = [CAMERAS[0]], BLACK
    if needs == "camera":
        views = [camera(0, world_view_transform=A.viewmats[0].float().T.clone().requires_grad_())]
    elif needs == "background":
        background = torch.zeros(3, requires_grad=True)
    elif needs != "nothing":
        getattr(model, needs).requires_grad_()
    for result in (model.render(views[0], PIPE, background), model.render_batch(views, PIPE, background)[0]):
        assert result["render"].requires_grad == (needs != "nothing")
    with torch.no_grad():
        assert not model.render(views[0], PIPE, background)["render"].requires_grad
    assert model.calls == []
    map_net.requires_grad_()


def test_raps_other_arguments(model):
    with torch.no_grad():
        stored = model.render(CAMERAS[0], PIPE, BLACK, 1.0, None, None, True)["render"]
        assert furthest(stored, original(model, 0, 1.0)["render"]) < 1e-3
        cached = model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)["render"]
        scene = adapt(model)
        decoded = scene.decode(A.viewmats[0].float(), A.Ks[0].float(), scene.feature_maps(IMAGES[:1])[0], 1.0)
        want = scene.render(A.viewmats[1:2].float(), A.Ks[1:2].float(), WIDTH, HEIGHT, decoded=decoded,
                            backgrounds=BLACK[None])[0][0]  # fmt: skip
        assert furthest(cached, want.permute(2, 0, 1)) < 1e-5
        model._opacity.mul_(0.9)  # the model changes, the cache stays, as in RAP
        assert furthest(model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)["render"], cached) > 1e-3
        other = model.render(CAMERAS[0], PIPE, BLACK, other_viewpoint_camera=CAMERAS[2])["render"]
        assert other.shape == (3, HEIGHT, WIDTH)
        with pytest.raises(NotImplementedError, match="interp_alpha"):
            model.render(CAMERAS[0], PIPE, BLACK, interp_alpha=0.5)
        with pytest.raises(NotImplementedError, match="masked is not an argument of RAP's render"):
            model.render(CAMERAS[0], PIPE, BLACK, masked=True)
        with pytest.raises(TypeError, match="camera is given twice"):
            model.render(CAMERAS[0], PIPE, BLACK, camera=CAMERAS[0])
        with pytest.raises(TypeError, match="render_batch has no argument masked"):
            model.render_batch(CAMERAS, PIPE, BLACK, masked=True)
    assert model.calls == []


def test_a_cache_of_a_call_with_gradients(model):
    """It belongs to that call's graph; one without would cut off what it was made of."""
    model.render(CAMERAS[0], PIPE, BLACK, store_cache=True)
    result = model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)
    result["render"].square().mean().backward()
    assert model.color_net.encoder.lin0.weight.grad.any() and model.color_net.color_decoder.lin0.weight.grad.any()
    with torch.no_grad():
        again = model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)["render"]
        assert furthest(again, result["render"].detach()) < 1e-5
        model.render(CAMERAS[0], PIPE, BLACK, store_cache=True)
        model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)
    with pytest.raises(RuntimeError, match="takes a cache that was stored in one"):
        model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)
    forget(model)
    with pytest.raises(RuntimeError, match="use_cache needs the cache of a call"):
        model.render(CAMERAS[1], PIPE, BLACK, use_cache=True)
    assert model.calls == []


def test_changes_of_the_model_are_seen_and_nothing_is_rebuilt_without_one(model):
    scene = adapt(model)
    assert adapt(model) is scene
    assert scene.scene.means.data_ptr() == model._xyz.data_ptr(), "shared"
    original(model, 0, 1.0)  # its norms count another image, which no picture depends on
    assert adapt(model) is scene

    def changed(part: str) -> None:
        nonlocal scene
        new = adapt(model)
        assert new is not scene, part
        assert (new.color_net is scene.color_net) == (part != "color_net")
        assert (new.feature_map_net is scene.feature_map_net) == (part != "map_generator")
        assert adapt(model) is new
        scene = new

    for name in ("_xyz", "_scaling", "_rotation", "_opacity", "_features_intrinsic", "box_coord"):
        with torch.no_grad():
            getattr(model, name).add_(0.1)
        changed(name)
        setattr(model, name, nn.Parameter(getattr(model, name).detach().roll(1, 0)))
        changed(name)
        setattr(model, name, nn.Parameter(getattr(model, name).detach().clone()))
        assert adapt(model) is scene, "other memory, the same values"
    with torch.no_grad():
        model.color_net.decoder.lin0.bias.add_(1.0)
    changed("color_net")
    assert float(scene.color_net.decoder.lin0.bias[0] - STATE["decoder.lin0.bias"][0]) == pytest.approx(1.0)
    with torch.no_grad():  # changed in place and then moved: the memory that was read holds the new values, too
        model.color_net.decoder.lin0.bias.add_(1.0)
    model.color_net.decoder.lin0.bias = nn.Parameter(model.color_net.decoder.lin0.bias.detach().clone())
    changed("color_net")
    assert float(scene.color_net.decoder.lin0.bias[0] - STATE["decoder.lin0.bias"][0]) == pytest.approx(2.0)
    model.color_net = ColorNet()
    changed("color_net")
    model.map_generator = FeatureMapNet()
    changed("map_generator")
    model.antialiasing = False
    changed("antialiasing")
    model._xyz = nn.Parameter(model._xyz.detach()[1:])
    with pytest.raises(ValueError, match=r"GaussianModel.get_rotation must be float32 \[59, 4\]"):
        adapt(model)


def test_an_image_does_not_depend_on_what_was_drawn_before(model):
    """Rebuilding draws no random numbers: RAP's own stay where they were."""
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    adapt(model)
    assert torch.equal(torch.rand(4), want)


def test_inference_mode(model):
    with torch.no_grad():
        want = model.render(CAMERAS[0], PIPE, BLACK)["render"]
    with torch.inference_mode():
        assert_same(model.render(CAMERAS[0], PIPE, BLACK)["render"], want)
        model._xyz = model._xyz * 2  # made here, it counts no changes
        assert furthest(model.render(CAMERAS[0], PIPE, BLACK)["render"], want) > 1e-2
        model._xyz.mul_(0.5)
        assert furthest(model.render(CAMERAS[0], PIPE, BLACK)["render"], want) < 1e-5


def test_installing_twice_and_taking_it_back(model_class, map_net):
    own = model_class.__dict__["render"]
    assert install(model_class) is model_class
    install(model_class, with_depth=True)
    assert model_class.render._rapfast_original is own
    model = model_class(map_net)
    with torch.no_grad():
        assert model.render(CAMERAS[0], PIPE, BLACK)["depth"].shape == (1, HEIGHT, WIDTH)
        assert model.render_batch(CAMERAS[:1], PIPE, BLACK)[0]["depth"].shape == (1, HEIGHT, WIDTH)
    assert model.render(CAMERAS[0], PIPE, BLACK)["depth"].requires_grad
    assert model.calls == []

    child = type("Child", (model_class,), {"render_batch": lambda self: "mine"})
    install(child)
    child(map_net).render_batch(CAMERAS[:1], PIPE, BLACK)
    uninstall(child)
    assert child(map_net).render_batch() == "mine"
    assert "render" not in vars(child)

    uninstall(model_class)
    uninstall(model_class)
    assert model_class.__dict__["render"] is own
    assert not hasattr(model_class, "render_batch")
    assert "_rapfast" not in vars(model_class)


def test_other_names_and_settings(model_class, map_net):
    model = model_class(map_net)
    want = adapt(model)
    model.appearance_net, model.color_net = model.color_net, None
    model.box_coord1, model.box_coord2, model.box_coord = model.box_coord[:, 2], model.box_coord[:, :2], None
    model.get_features, model._features_intrinsic = (lambda features: lambda: features)(want.scene.intrinsic), None
    model.args = SimpleNamespace(antialiasing=False, coord_scale=2.0)
    got = adapt(model, names={"color_net": "appearance_net"}, config={"coord_scale": 1.5})
    assert torch.equal(got.box_coord, want.box_coord)
    assert torch.equal(got.scene.intrinsic, want.scene.intrinsic)
    assert got.config == {"antialiasing": False, "coord_scale": 1.5}
    with pytest.raises(TypeError, match="GaussianModel must have color_net: give names={'color_net': ...}"):
        adapt(model)


def test_options_reach_the_calls(model_class, map_net):
    pipe = SimpleNamespace(sharper=True)
    model = install(model_class)(map_net)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="pipe.sharper=True"):
        model.render(CAMERAS[0], pipe, BLACK)
    install(model_class, ignored_pipe_settings=["sharper"], rap_compatible=True, viewmat_layout="plain")
    with torch.no_grad():
        model.box_coord[:, 2] = 1e-9
        model.box_coord[0, 2] = 1e9
        facing = torch.eye(4)
        facing[:3, 3] = torch.tensor([5.0, 5.0, 5.0])  # all in front, right of and below the corner
        with pytest.raises(IndexError, match="exactly one Gaussian"):
            model.render(camera(0, world_view_transform=facing), pipe, BLACK)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"_xyz": None}, TypeError, "GaussianModel must have get_xyz: give names={'means': ...}"),
        ({"_xyz": torch.zeros(N, 2)}, ValueError, r"GaussianModel.get_xyz must be \[N, 3\], got float32 \[60, 2\]"),
        ({"_xyz": torch.zeros(N, 3).half()}, TypeError, "GaussianModel.get_xyz must be a float32 or float64 tensor"),
        ({"_features_intrinsic": None}, TypeError, "GaussianModel must have _features_intrinsic or get_features"),
        (
            {"_features_intrinsic": torch.zeros(N, 3, 16)},
            ValueError,
            r"GaussianModel._features_intrinsic must be float32 \[60, 16, 3\] on cpu \(as GaussianModel.get_xyz\)",
        ),
        ({"box_coord": None}, TypeError, "GaussianModel must have box_coord"),
        ({"box_coord": torch.zeros(N, 2)}, ValueError, r"GaussianModel.box_coord must be float32 \[60, 3, 2\]"),
        ({"_opacity": torch.zeros(N, 2)}, ValueError, r"GaussianModel.get_opacity must be float32 \[60, 1\] or \[60\]"),
        ({"map_generator": 3}, TypeError, "GaussianModel.map_generator must be a torch module, got a int"),
        ({"color_net": nn.Linear(2, 2)}, ValueError, "GaussianModel.color_net: encoder.lin0.weight"),
        ({"use_okmap": True}, NotImplementedError, "use_okmap=True"),
        ({"colornet_inter_weight": "strong"}, TypeError, "colornet_inter_weight must be a number, got str"),
    ],
)
def test_models_that_do_not_fit(model, changes, error, sentence):
    for name, value in changes.items():
        setattr(model, name, value)
    if changes.get("_xyz", 0) is None:
        type(model).get_xyz = None
    with torch.no_grad(), pytest.raises(error, match=sentence):
        model.render(CAMERAS[0], PIPE, BLACK)


def test_bad_arguments_of_install(model_class):
    with pytest.raises(TypeError, match="model_class must be a class, got int 3"):
        install(3)
    with pytest.raises(TypeError, match="Empty must have a method render"):
        install(type("Empty", (), {}))
    with pytest.raises(ValueError, match="names must have keys of means, quats, .*, got 'centres'"):
        install(model_class, names={"centres": "_xyz"})
    with pytest.raises(ValueError, match="config must have keys of use_colors_precomp, .*, got 'sh_degree'"):
        install(model_class, config={"sh_degree": 3})
    with pytest.raises(TypeError, match="with_depth must be True or False"):
        install(model_class, with_depth="yes")
    assert "_rapfast" not in vars(model_class)


def test_the_adapted_scene_is_the_models(model):
    """Field by field what loading the same model from files would give."""
    scene = adapt(model)
    assert isinstance(scene, RapScene)
    want = Scene(
        A.means.float(), nn.functional.normalize(A.quats.float()), A.scales.float(), A.opacities.float(),
        intrinsic=A.intrinsic.float(),
    )  # fmt: skip
    for name, value in want._tensors():
        assert furthest(getattr(scene.scene, name), value) < 1e-5
        assert not getattr(scene.scene, name).requires_grad
    assert not any(parameter.requires_grad for parameter in scene.color_net.parameters())
    with torch.no_grad():
        assert_same(
            model.render(CAMERAS[0], PIPE, BLACK)["render"], rap_calls.render(scene, CAMERAS[0], PIPE, BLACK)["render"]
        )


@pytest.mark.cuda
def test_a_model_on_the_gpu(model, map_net):
    with torch.no_grad():
        want = model.render_batch(CAMERAS, PIPE, BLACK, view_weights=WEIGHTS)
    for name, value in list(vars(model).items()):
        if isinstance(value, Tensor):
            setattr(model, name, nn.Parameter(value.detach().cuda()))
    model.map_generator = FeatureMapNet().cuda()
    model.map_generator.load_state_dict(map_net.state_dict())
    model.color_net = ColorNet().cuda()
    model.color_net.load_state_dict(STATE)
    state = torch.cuda.get_rng_state()
    with torch.no_grad():
        got = model.render_batch(CAMERAS, PIPE, BLACK.cuda(), view_weights=WEIGHTS)  # matrices and images on the CPU
        for view, weight in enumerate(WEIGHTS):
            assert float((got[view]["render"].cpu() - want[view]["render"]).abs().mean()) < 1e-2
            model.colornet_inter_weight = weight
            assert_same(model.render(CAMERAS[view], PIPE, BLACK)["render"], got[view]["render"])
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert next(adapt(model).feature_map_net.parameters()).device.type == "cuda"
    assert model.calls == []
