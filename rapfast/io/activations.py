"""Between what files store and what the renderer takes.

Files of 3DGS store scales as logarithms and opacities as logits (Kerbl et al. 2023, section 5.1, where the
optimiser wants unbounded variables); a `Scene` holds the values themselves.
"""

from __future__ import annotations

import torch

#: Stand-ins for logarithms and logits that are infinite. Read back in float32 they give exactly 0, 0 and 1:
#: exp(-110) is below half the smallest subnormal (1.4e-45), and 1 - sigmoid(30) is below half an ulp of 1.
LOG_OF_ZERO = -110.0
LOGIT_OF_ZERO = -110.0
LOGIT_OF_ONE = 30.0


def activate_(quats: torch.Tensor, log_scales: torch.Tensor, logits: torch.Tensor) -> None:
    """In place: quats [N,4] to unit length (zero stays zero), log_scales [N,3] -> scales, logits [N] -> opacities."""
    # MKL settles how accurate its exponential is in the first call; where two threads make it, one was seen to get an
    # error of 1e-4, and so a file's scales other bits, in one run of seven.
    torch.zeros(1, device="cpu").exp_()
    log_scales.exp_()
    logits.sigmoid_()
    # Dividing by the largest component first keeps the square from over- and underflowing.
    largest = quats.abs().amax(dim=1, keepdim=True) if len(quats) else quats[:, :1].abs()
    quats /= torch.where(largest == 0, torch.ones_like(largest), largest)
    length = torch.linalg.vector_norm(quats, dim=1, keepdim=True)
    quats /= torch.where(length == 0, torch.ones_like(length), length)


def log_of(scales: torch.Tensor) -> torch.Tensor:
    """float32 logarithms [n,3] of scales [n,3] >= 0, with `LOG_OF_ZERO` where the scale is 0."""
    return scales.double().log().clamp(min=LOG_OF_ZERO).float()


def logit_of(opacities: torch.Tensor) -> torch.Tensor:
    """float32 logits [n] of opacities [n] in 0..1, finite at both ends."""
    return torch.logit(opacities.double()).clamp(LOGIT_OF_ZERO, LOGIT_OF_ONE).float()
