"""Backward of stage 1: from gradients of records to those of Gaussians and cameras."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rapfast.ops._library import address, cpu_arguments, define, native


class ProjectGradients(NamedTuple):
    """Gradients of the inputs of the project stage; empty tensors where not wanted."""

    means: Tensor  # [B, N, 3]
    quats: Tensor  # [B, N, 4]
    scales: Tensor  # [B, N, 3]
    covars: Tensor  # [B, N, 3, 3], 0 below the diagonal
    opacities: Tensor  # [B, N]
    viewmats: Tensor  # [B, C, 4, 4]
    Ks: Tensor  # [B, C, 3, 3]


def _allocate(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> ProjectGradients:
    means = inputs[0]
    return ProjectGradients(
        *(means.new_empty(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True))
    )


def _fake(
    means, quats, scales, covars, opacities, viewmats, Ks, gaussian_ids, image_offsets, v_records, v_means2d, width,
    height, camera_model, antialiased, eps2d, wanted,
):  # fmt: skip
    return tuple(_allocate((means, quats, scales, covars, opacities, viewmats, Ks), wanted))


def _cpu(
    means, quats, scales, covars, opacities, viewmats, Ks, gaussian_ids, image_offsets, v_records, v_means2d, width,
    height, camera_model, antialiased, eps2d, wanted,
):  # fmt: skip
    out = _allocate((means, quats, scales, covars, opacities, viewmats, Ks), wanted)
    native.project_bwd(
        **cpu_arguments(means),
        n_scenes=means.shape[0],
        n_cameras=viewmats.shape[1],
        n_gaussians=means.shape[1],
        width=width,
        height=height,
        camera_model=camera_model,
        antialiased=antialiased,
        dense_means2d=v_means2d is not None and v_means2d.dim() == 3,
        eps2d=eps2d,
        means=address(means),
        quats=address(quats),
        scales=address(scales),
        covars=address(covars),
        opacities=address(opacities),
        viewmats=address(viewmats),
        Ks=address(Ks),
        gaussian_ids=address(gaussian_ids),
        image_offsets=address(image_offsets),
        v_records=address(v_records),
        v_means2d=address(v_means2d),
        **{f"v_{name}": address(tensor) for name, tensor in out._asdict().items()},
    )
    return tuple(out)


project_bwd_op = define(
    "project_bwd(Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, "
    "Tensor Ks, Tensor gaussian_ids, Tensor image_offsets, Tensor v_records, Tensor? v_means2d, int width, int height, "
    "int camera_model, bool antialiased, float eps2d, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
)


def project_bwd(
    means: Tensor,  # [B, N, 3]
    quats: Tensor | None,  # [B, N, 4]
    scales: Tensor | None,  # [B, N, 3]
    covars: Tensor | None,  # [B, N, 3, 3]
    opacities: Tensor,  # [B, N]
    viewmats: Tensor,  # [B, C, 4, 4]
    Ks: Tensor,  # [B, C, 3, 3]
    gaussian_ids: Tensor,  # [M] int32
    image_offsets: Tensor,  # [I + 1] int64
    v_records: Tensor,  # [M, 8]
    v_means2d: Tensor | None,  # [M, 2] or dense [I, N, 2]
    width: int,
    height: int,
    *,
    camera_model: int,
    antialiased: bool,
    eps2d: float,
    wanted: list[bool],
) -> ProjectGradients:
    """Gradients of the project stage's inputs; ``wanted`` says of which, in the order of the fields.

    Where ``v_means2d`` is given, the first two columns of ``v_records`` are not read.
    """
    return ProjectGradients(*project_bwd_op(
        means, quats, scales, covars, opacities, viewmats, Ks, gaussian_ids, image_offsets, v_records, v_means2d,
        width, height, camera_model, antialiased, eps2d, wanted,
    ))  # fmt: skip
