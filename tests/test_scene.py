"""Scene: what it accepts, what it says of what it does not, and what its methods keep."""

from __future__ import annotations

import pytest
import torch

from rapfast import Scene


def make_scene(n: int = 5, degree: int = 1, **replace: torch.Tensor | None) -> Scene:
    generator = torch.Generator().manual_seed(7)
    fields: dict[str, torch.Tensor | None] = {
        "means": torch.randn(n, 3, generator=generator),
        "quats": torch.randn(n, 4, generator=generator),
        "scales": torch.rand(n, 3, generator=generator) + 0.01,
        "opacities": torch.rand(n, generator=generator),
        "sh": torch.randn(n, (degree + 1) ** 2, 3, generator=generator),
    }
    return Scene(**{**fields, **replace})


@pytest.mark.parametrize("degree", range(5))
def test_length_and_degree(degree: int) -> None:
    scene = make_scene(6, degree)
    assert len(scene) == 6
    assert scene.sh_degree == degree
    assert make_scene(sh=None).sh_degree is None
    assert len(make_scene(0)) == 0


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"means": torch.zeros(5, 4)}, r"means must be \[N,3\], got float32 \[5, 4\] on cpu"),
        ({"quats": torch.zeros(5, 3)}, r"quats must be float32 \[5,4\] on cpu, got float32 \[5, 3\] on cpu"),
        ({"scales": torch.zeros(4, 3)}, r"scales must be float32 \[5,3\] on cpu"),
        ({"opacities": torch.zeros(5, 1)}, r"opacities must be float32 \[5\] on cpu"),
        ({"opacities": torch.zeros(5, dtype=torch.float64)}, r"opacities must be float32 .* got float64"),
        ({"scales": torch.zeros(5, 3, device="meta")}, r"scales must be float32 \[5,3\] on cpu, got .* on meta"),
        ({"sh": torch.zeros(5, 5, 3)}, r"sh must be float32 \[5,K,3\] with K one of 1, 4, 9, 16, 25 on cpu"),
        ({"intrinsic": torch.zeros(5, 3, 16)}, r"intrinsic must be float32 \[5,16,3\] on cpu"),
    ],
)
def test_wrong_shapes_dtypes_and_devices_are_named(replace: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(**replace)


@pytest.mark.parametrize("name", ["means", "quats", "sh"])
def test_what_is_no_tensor_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make_scene(**{name: [[0.0, 0.0, 0.0]] * 5})
    with pytest.raises(TypeError, match="means must be a floating-point tensor"):
        make_scene(means=torch.zeros(5, 3, dtype=torch.int64))


def test_to_changes_dtype_everywhere_and_shares_what_fits() -> None:
    scene = make_scene()
    double = scene.to(dtype=torch.float64)
    assert {t.dtype for t in (double.means, double.quats, double.scales, double.opacities, double.sh)} == {
        torch.float64
    }
    assert scene.to("cpu").means.data_ptr() == scene.means.data_ptr()
    assert scene.to(torch.float64).dtype == torch.float64


def test_valid_finds_every_kind_of_bad_gaussian() -> None:
    scene = make_scene(7)
    scene.means[0, 1] = torch.nan
    scene.scales[1, 0] = -1
    scene.opacities[2] = 1.5
    scene.quats[3] = 0
    scene.sh[4, 2, 1] = torch.inf
    assert scene.valid().tolist() == [False] * 5 + [True] * 2
    kept = scene.select(scene.valid())
    assert len(kept) == 2
    assert torch.equal(kept.sh, scene.sh[5:])
    assert make_scene(0).valid().shape == (0,)


def test_repr_says_what_it_is() -> None:
    assert "5 Gaussians, SH degree 1" in repr(make_scene())
    assert "intrinsic features" in repr(make_scene(sh=None, intrinsic=torch.zeros(5, 16, 3)))
