"""Bad input to rasterization(): an error that names the argument, or a defined picture; never a crash."""

from __future__ import annotations

import inspect
import math
import re
import resource
from typing import Any

import numpy as np
import pytest
import torch
from scenes import HEIGHT, WIDTH, Scene, assert_close64, assert_same, covariances, make_scene, skip_unsupported

from rapfast import rasterization

N, C = 40, 2
SCENE_ARGUMENTS = list(Scene._fields)


def arguments(**changes: Any) -> dict[str, Any]:
    scene = make_scene(N, C, dtype=torch.float32)
    return {**scene._asdict(), "width": WIDTH, "height": HEIGHT, **changes}


def assert_raises(kind: type[Exception] | tuple[type[Exception], ...], *parts: str, **changes: Any) -> None:
    """The call fails with this type of error, whose message holds all these parts."""
    with pytest.raises(kind) as caught:
        rasterization(**arguments(**changes))
    for part in parts:
        assert part in str(caught.value), f"no {part!r} in: {caught.value}"


# Tensors: type, dtype, layout, device, shape.


@pytest.mark.parametrize(
    "value", [None, 1.0, "means", [[1.0]], np.zeros((N, 3), np.float32)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", SCENE_ARGUMENTS)
def test_not_a_tensor(name, value):
    assert_raises(
        TypeError, f"{name} must be", f"got {'None' if value is None else type(value).__name__}", **{name: value}
    )


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("name", SCENE_ARGUMENTS)
def test_dtype(name, dtype):
    value = arguments()[name].to(dtype)
    shape = ", ".join(map(str, value.shape))
    assert_raises(TypeError, f"{name} must be", "float32", f"got {str(dtype)[6:]} [{shape}] on cpu", **{name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_all_of_an_unsupported_dtype(dtype):
    changes = {name: value.to(dtype) for name, value in make_scene(N, C)._asdict().items()}
    assert_raises(TypeError, "means must be a float32 or float64 tensor [..., N, 3]", **changes)


@pytest.mark.parametrize("name", SCENE_ARGUMENTS[1:])
def test_mixed_dtypes(name):
    value = arguments()[name].double()
    assert_raises(TypeError, f"{name} must be float32", "on cpu (as means), got float64", **{name: value})


@pytest.mark.parametrize("name", SCENE_ARGUMENTS)
def test_sparse(name):
    assert_raises(TypeError, f"{name} must be", **{name: arguments()[name].to_sparse()})


@pytest.mark.parametrize("name", SCENE_ARGUMENTS)
def test_mixed_devices(name):
    changed = {name: arguments()[name].to("meta")}
    blamed = name if name != "means" else "quats"
    assert_raises(ValueError, f"{blamed} must be float32", " on meta", " on cpu", **changed)


def test_all_on_a_device_without_backend():
    changes = {name: value.to("meta") for name, value in make_scene(N, C).to(torch.float32)._asdict().items()}
    assert_raises(NotImplementedError, "means", "on meta", **changes)


BAD_SHAPES = {
    "means": [(N, 2), (N, 4), (N,), (3,), (), (N + 1, 3), (1, N, 3), (2, N, 3)],
    "quats": [(N, 3), (N + 1, 4), (N,), (1, N, 4), (4,)],
    "scales": [(N, 1), (N - 1, 3), (N,), (1, N, 3)],
    "opacities": [(N, 1), (N + 1,), (), (1, N)],
    "colors": [(N + 1, 3), (N,), (C + 1, N, 3), (N, C, 3), (C, N), (1, C, N, 3), (N, 0), (C, N, 0)],
    "viewmats": [(C, 3, 4), (C, 4), (4, 4), (1, C, 4, 4), (C, 4, 3)],
    "Ks": [(C + 1, 3, 3), (3, 3), (C, 4, 4), (1, C, 3, 3), (C, 9)],
    "backgrounds": [(C, 4), (C + 1, 3), (3,), (C, WIDTH, HEIGHT, 3), (C, HEIGHT, WIDTH, 1), (HEIGHT, WIDTH, 3)],
}


@pytest.mark.parametrize(("name", "shape"), [(name, s) for name, shapes in BAD_SHAPES.items() for s in shapes], ids=str)
def test_shapes(name, shape):
    shown = f"[{', '.join(map(str, shape))}] on cpu"
    # A wrong shape of means is found at means itself or, where it is a possible one, at the next argument.
    possible_means = name == "means" and len(shape) >= 2 and shape[-1] == 3
    blamed = "quats" if possible_means else name
    parts = (f"{blamed} must be",) if possible_means else (f"{blamed} must ", f"got float32 {shown}")
    assert_raises(ValueError, *parts, **{name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(N, 6), (N, 3), (N, 9), (C, N, 3, 3), (N + 1, 3, 3)], ids=str)
def test_covars_shape(shape):
    assert_raises(ValueError, "covars must be float32 [40, 3, 3]", covars=torch.ones(shape))


@pytest.mark.parametrize("shape", [(N, 3), (N, 15, 3), (N, 16), (N, 16, 4), (C, N, 3, 3), (C, N, 16, 1)], ids=str)
def test_sh_shape(shape):
    """Degree 3 needs 16 coefficients of 3 channels."""
    assert_raises(ValueError, "colors must", "got float32 [", sh_degree=3, colors=torch.ones(shape))


@pytest.mark.parametrize("name", ["quats", "scales"])
def test_quats_and_scales_may_be_absent_with_covars_only(name):
    assert_raises(TypeError, f"{name} must be", "got None", **{name: None})


# Numbers and words.


@pytest.mark.parametrize("name", ["width", "height"])
def test_sizes(name):
    for value in (0, -1, 2**20 + 1, 2**31, 2**63, 10**30):
        assert_raises(ValueError, f"{name} must be between 1 and 1048576 pixels, got {value}", **{name: value})
    for value in (16.0, "16", None, True, False, torch.tensor(16.0), np.float32(16), [16]):
        assert_raises(TypeError, f"{name} must be a whole number, got ", **{name: value})


@pytest.mark.parametrize("sixteen", [16, np.int64(16), torch.tensor(16)], ids=lambda v: type(v).__name__)
def test_whole_numbers_of_other_types_are_accepted(sixteen):
    colors, _, meta = rasterization(**arguments(width=sixteen, height=sixteen))
    assert colors.shape == (C, 16, 16, 3)
    assert type(meta["width"]) is int


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (15, 17)], ids=str)
def test_small_sizes(size, backend):
    colors, alphas, _ = rasterization(**arguments(width=size[0], height=size[1]), backend=backend)
    assert colors.shape == (C, size[1], size[0], 3) and alphas.shape == (C, size[1], size[0], 1)
    assert bool(colors.isfinite().all())


def test_very_wide_image():
    """The widest image there may be, one pixel high; centres stay exact to its end."""
    scene = make_scene(1, 1, dtype=torch.float32)
    scene.means[0] = torch.tensor([(1 << 20) - 8.5, 0.5, 1.0])
    scene.scales[0] = 2.0
    scene.opacities[0] = 0.5
    scene.viewmats[0] = torch.eye(4)
    scene.Ks[0] = torch.eye(3)
    colors, alphas, meta = rasterization(*scene, 1 << 20, 1, camera_model="ortho")
    assert alphas.shape == (1, 1, 1 << 20, 1)
    assert int(alphas.argmax()) == (1 << 20) - 9
    assert float(alphas.max()) == pytest.approx(0.5, rel=1e-5)
    assert not alphas[0, 0, : (1 << 20) - 40].any()
    assert meta["tile_width"] == 1 << 16


def test_an_image_that_cannot_be_allocated_is_an_error():
    """A tebipixel, under a limit on the address space: without one some machines promise any amount of memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
    try:
        with pytest.raises((RuntimeError, MemoryError), match=re.compile("memory|alloc", re.IGNORECASE)):
            rasterization(**arguments(width=1 << 20, height=1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("near_plane", [math.nan], ValueError),
        ("near_plane", ["near", "0.1", None, True, [1.0]], TypeError),
        ("far_plane", [math.nan], ValueError),
        ("far_plane", [None], TypeError),
        ("radius_clip", [-1.0, math.nan], ValueError),
        ("radius_clip", [None], TypeError),
        ("eps2d", [-0.1, math.nan, math.inf], ValueError),
        ("eps2d", ["0.3", None], TypeError),
        ("sh_degree", [-1, 5, 2**40], ValueError),
        ("sh_degree", [1.0, "1", True], TypeError),
        ("alpha_cap", [0.0, 1.0, 1.5, -0.5, math.nan, math.inf, 1 / 256], ValueError),
        ("alpha_cap", [None, "0.99"], TypeError),
        ("channel_chunk", [0, -1], ValueError),
        ("channel_chunk", [1.5, None], TypeError),
        ("packed", [None, 1, "True"], TypeError),
        ("absgrad", [None, 1], TypeError),
        ("sparse_grad", [None, 1], TypeError),
        ("segmented", [None, 1], TypeError),
        ("render_mode", ["rgb", "", "RGB+", "DEPTH", None, 3], ValueError),
        ("rasterize_mode", ["Classic", "", None, "aa"], ValueError),
        ("camera_model", ["perspective", "", None], ValueError),
        ("backend", ["cuda", "", None, "torch"], ValueError),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings(name, values, error):
    for value in values:
        changes: dict[str, Any] = {name: value}
        if name == "sh_degree":
            changes["colors"] = torch.rand(N, 25, 3)
        assert_raises(error, f"{name} must be", "got ", **changes)


def test_near_beyond_far():
    assert_raises(ValueError, "near_plane must not exceed far_plane, got 2.0 and 1.0", near_plane=2.0, far_plane=1.0)


def test_infinite_planes_are_no_planes():
    scene = arguments()
    want = rasterization(**scene)[0]
    assert_same(rasterization(**scene, far_plane=math.inf)[0], want)
    assert_same(rasterization(**scene, near_plane=-math.inf, camera_model="ortho")[0],
                rasterization(**scene, near_plane=-1e30, camera_model="ortho")[0])  # fmt: skip


def test_sparse_grad_as_gsplat_asserts():
    assert_raises(ValueError, "sparse_grad must be False with packed=False", sparse_grad=True, packed=False)
    batched = {name: x[None] for name, x in make_scene(N, C).to(torch.float32)._asdict().items()}
    assert_raises(ValueError, "sparse_grad must be False with leading batch dimensions", sparse_grad=True, **batched)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tile_size", 8),
        ("tile_size", 32),
        ("distributed", True),
        ("with_ut", True),
        ("with_eval3d", True),
        ("radial_coeffs", torch.zeros(C, 6)),
        ("tangential_coeffs", torch.zeros(C, 2)),
        ("thin_prism_coeffs", torch.zeros(C, 4)),
        ("ftheta_coeffs", object()),
        ("rolling_shutter", "ROLLING_TOP_TO_BOTTOM"),
        ("viewmats_rs", torch.zeros(C, 4, 4)),
        ("camera_model", "ftheta"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("backend", ["rapfast", "reference", "gsplat"])
def test_unsupported_arguments_are_named(name, value, backend):
    assert_raises(NotImplementedError, f"{name}=", "not supported", backend=backend, **{name: value})


def test_defaults_are_gsplats():
    """Names, order and defaults of gsplat.rasterization 1.5.3, but for what it computes from others."""
    gsplat = pytest.importorskip("gsplat", reason="needs gsplat (the extra 'bench')")
    ours = inspect.signature(rasterization).parameters
    theirs = inspect.signature(gsplat.rasterization).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        if name == "rolling_shutter":  # an enum of gsplat; None is its GLOBAL
            assert parameter.default.name == "GLOBAL"
            rasterization(**arguments(rolling_shutter=parameter.default))
        else:
            assert ours[name].default == parameter.default, name
    assert list(ours)[len(theirs) :] == ["backend", "alpha_cap", "postprocess", "max_memory"]


def test_gsplat_backend_needs_a_gpu():
    assert_raises(ValueError, 'means must be on a CUDA device with backend="gsplat"', "on cpu", backend="gsplat")


# Gradients.


@pytest.mark.parametrize("name", [*SCENE_ARGUMENTS, "backgrounds", "covars"])
def test_gradients_are_given(name, device):
    tensors = make_scene(N, C, dtype=torch.float32, device=device)._asdict()
    if name == "backgrounds":
        tensors["backgrounds"] = torch.rand(C, 3, device=device)
    if name == "covars":
        tensors["covars"] = covariances(Scene(**tensors))
    want = rasterization(**tensors, width=WIDTH, height=HEIGHT)[0]
    tensors[name] = tensors[name].clone().requires_grad_()
    picture = rasterization(**tensors, width=WIDTH, height=HEIGHT)[0]
    assert picture.requires_grad
    assert_same(picture.detach(), want)
    (gradient,) = torch.autograd.grad(picture.sum(), tensors[name])
    assert bool(gradient.isfinite().all()) and bool(gradient.any())
    with pytest.raises(NotImplementedError, match=f"max_memory=1000 .*{name} requires one"):
        rasterization(**tensors, width=WIDTH, height=HEIGHT, max_memory=1000)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got, alphas, meta = rasterization(**tensors, width=WIDTH, height=HEIGHT)
        assert_same(got, want)
        assert not got.requires_grad and not alphas.requires_grad and not meta["means2d"].requires_grad
    # So has the reference.
    picture = rasterization(**tensors, width=20, height=10, backend="reference")[0]
    (gradient,) = torch.autograd.grad(picture.sum(), tensors[name])
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


# Numbers that are none, and Gaussians and cameras that are none.

BAD_VALUES = [
    (name, value)
    for name in ("means", "quats", "scales", "opacities", "colors", "sh", "covars", "viewmats", "Ks")
    for value in (math.nan, math.inf, -math.inf)
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_non_finite_values(name, value, packed, dtype, device):
    """One bad number: the picture is that of the rest, and the count that of the reference."""
    skip_unsupported(device, dtype)
    scene = make_scene(N, C, sh_degree=1 if name == "sh" else None, dtype=dtype, device=device)
    options: dict[str, Any] = {"sh_degree": 1 if name == "sh" else None, "packed": packed}
    options["render_mode"] = "RGB+ED"
    if name == "covars":
        options["covars"] = covariances(scene)
    target = options["covars"] if name == "covars" else getattr(scene, "colors" if name == "sh" else name)
    is_camera = name in ("viewmats", "Ks")
    bad = (
        1
        if is_camera
        else int(rasterization(*scene, WIDTH, HEIGHT, **{**options, "packed": True})[2]["gaussian_ids"][0])
    )
    target[bad].view(-1)[0] = value

    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT, **options)
    assert bool(colors.isfinite().all()) and bool(alphas.isfinite().all())
    for key in ("means2d", "depths", "conics", "opacities"):
        assert bool(meta[key].isfinite().all()), key
    reference = rasterization(*scene, WIDTH, HEIGHT, **options, backend="reference")[2]
    assert_same(meta["n_invalid"], reference["n_invalid"])
    if is_camera:
        assert meta["n_invalid"].tolist() == [0, N]
        assert not alphas[1].any()
        assert bool(alphas[0].any())
    else:
        assert int(meta["n_invalid"].sum()) >= 1
        keep = torch.arange(N, device=device) != bad
        rest = scene._replace(**{k: getattr(scene, k)[keep] for k in Scene._fields[:5]})
        if name == "covars":
            options["covars"] = options["covars"][keep]
        assert_same(colors, rasterization(*rest, WIDTH, HEIGHT, **options)[0])


@DTYPES
def test_everything_non_finite(dtype, device):
    """All Gaussians, all cameras: a black picture, all counted."""
    skip_unsupported(device, dtype)
    scene = Scene(*(torch.full_like(x, math.nan) for x in make_scene(N, C, dtype=dtype, device=device)))
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT)
    assert not colors.any() and not alphas.any()
    assert meta["n_invalid"].tolist() == [N] * C


@DTYPES
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quats", 0.0),
        ("quats", 1e-30),
        ("quats", 1e30),
        ("scales", 0.0),
        ("scales", -0.3),
        ("scales", 1e-20),
        ("scales", 1e6),
        ("scales", 1e19),
        ("scales", 1e38),
        ("opacities", -0.5),
        ("opacities", 0.0),
        ("opacities", 1.0),
        ("opacities", 1.5),
        ("opacities", 1e30),
        ("means", 0.0),
        ("means", 1e10),
        ("means", 1e19),
        ("means", 1e38),
        ("colors", -3.0),
        ("colors", 1e30),
        ("colors", 3e38),
    ],
)
def test_degenerate_gaussians(name, value, dtype, device):
    """Half the Gaussians are made extreme: finite pictures, counts and, in float64, pixels of the reference."""
    skip_unsupported(device, dtype)
    scene = make_scene(N, C, width=33, height=20, dtype=dtype)
    getattr(scene, name)[::2] = value
    scene = scene.to(device)
    for options in ({}, {"rasterize_mode": "antialiased"}, {"camera_model": "ortho"}, {"camera_model": "fisheye"}):
        colors, alphas, meta = rasterization(*scene, 33, 20, **options)
        want, want_alphas, want_meta = rasterization(*scene, 33, 20, backend="reference", **options)
        assert bool(alphas.isfinite().all()) and float(alphas.min()) >= 0 and float(alphas.max()) < 1
        if value < 1e38:  # sums of the largest floats may overflow: no fault of the renderer
            assert bool(colors.isfinite().all())
        assert_same(meta["n_invalid"], want_meta["n_invalid"])
        if dtype == torch.float64:
            assert_close64(colors, want)
            assert_close64(alphas, want_alphas)


@pytest.mark.parametrize("what", ["singular", "zero", "focal 0", "focal -1", "K zero"])
def test_degenerate_cameras(what, device):
    """Such a view is its background, its Gaussians are counted, the other view is untouched."""
    scene = make_scene(N, C, sh_degree=1, dtype=torch.float32)
    backgrounds = torch.rand(C, 3, device=device)
    want = rasterization(*scene.to(device), WIDTH, HEIGHT, sh_degree=1, backgrounds=backgrounds)[0]
    if what == "singular":
        scene.viewmats[1, 0, :3] = scene.viewmats[1, 1, :3]
    elif what == "zero":
        scene.viewmats[1] = 0
    elif what == "K zero":
        scene.Ks[1] = 0
    else:
        scene.Ks[1, 0, 0] = float(what.split()[1])
    colors, alphas, meta = rasterization(*scene.to(device), WIDTH, HEIGHT, sh_degree=1, backgrounds=backgrounds)
    assert meta["n_invalid"].tolist() == [0, N]
    assert_same(colors[0], want[0])
    assert_same(colors[1], backgrounds[1].expand(HEIGHT, WIDTH, 3).contiguous())
    assert not alphas[1].any()


@pytest.mark.parametrize("seed", range(10))
def test_random_poison(seed, device):
    """Numbers of every kind in random places of every input: counts and pixels of the reference."""
    skip_unsupported(device, torch.float64)
    g = torch.Generator().manual_seed(seed)
    values = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, -1e-300, 1e100, -1e100, 1e300, -1e300]
    scene = make_scene(100, 3, sh_degree=2, seed=seed)
    for x in scene:
        places = torch.randint(x.numel(), (max(1, x.numel() // 60),), generator=g)
        picks = torch.randint(len(values), places.shape, generator=g)
        x.view(-1)[places] = torch.tensor(values, dtype=x.dtype)[picks]
    scene = scene.to(device)
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT, sh_degree=2)
    want, want_alphas, want_meta = rasterization(*scene, WIDTH, HEIGHT, sh_degree=2, backend="reference")
    assert int(meta["n_invalid"].sum()) > 0
    assert_same(meta["n_invalid"], want_meta["n_invalid"])
    assert_same(meta["gaussian_ids"], want_meta["gaussian_ids"])
    assert_close64(alphas, want_alphas)
    scale = want.abs().amax().clamp(min=1)
    assert_close64(colors / scale, want / scale)


@pytest.mark.parametrize("backend", ["rapfast", "reference"])
def test_float64_everywhere(backend, device):
    """float64 in, float64 out, to float64's precision."""
    skip_unsupported(device, torch.float64)
    scene = make_scene(N, C, device=device)
    colors, alphas, meta = rasterization(*scene, WIDTH, HEIGHT, backend=backend, render_mode="RGB+ED")
    assert colors.dtype == alphas.dtype == torch.float64
    for key in ("means2d", "depths", "conics", "opacities"):
        assert meta[key].dtype == torch.float64
    single = rasterization(*scene.to(torch.float32), WIDTH, HEIGHT, backend=backend, render_mode="RGB+ED")[0]
    difference = float((colors - single.double()).abs().max())
    assert 1e-9 < difference < 0.05
