"""What is fed to the colour network: encoded positions, features sampled from maps, view directions.

Every function takes the Gaussians of one view and any floating dtype. Matrices are applied as sums of products and
not by matmul, so that TF32 cannot move a projected point, nor the number of points its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rapfast.reference.color import camera_positions

Z_OFFSET = 1e-2
"""Added to the depth before the division by it, in the coordinates of the projected map alone."""

DIRECTION_OFFSET = 1e-5
"""Added to the distance before the division by it."""


def positional_encoding(points: Tensor, n_frequencies: int = 10) -> Tensor:
    """[..., 3] -> [..., 3 + 6 n_frequencies]: X, sin(2^0 X), cos(2^0 X), ..., sin(2^(n-1) X), cos(2^(n-1) X).

    As Mildenhall et al. 2020 (NeRF), equation 4, with the points themselves in front and without the factor pi.
    """
    parts = [points]
    for power in range(n_frequencies):
        angle = points * 2.0**power
        parts += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(parts, dim=-1)


def view_directions(means: Tensor, viewmat: Tensor) -> Tensor:
    """[n, 3] (X - c) / (|X - c| + 1e-5), with c the position of the camera that viewmat [4, 4] describes."""
    offset = means - camera_positions(viewmat)
    return offset / (torch.linalg.vector_norm(offset, dim=-1, keepdim=True) + DIRECTION_OFFSET)


def map_coordinates(means: Tensor, boxes: Tensor, viewmat: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Where Gaussians fall on the projected map, and which of them do.

    Args:
        means: [n, 3] world positions.
        boxes: [n, 2] learned (height, width) of each Gaussian's window, pixels of the view; not the image's size.
        viewmat: [4, 4] world to camera.
        K: [3, 3] intrinsics, pixels.

    Returns:
        coordinates [n, 2] (x, y), -1..1 across the map, 0 where not valid; valid [n] bool.

        (u, v, z) = K (R X + t); x = u / (z + 0.01), y = v / (z + 0.01); valid where 0 < x < width, 0 < y < height
        and z > 0. The coordinates are x / (width / 2) - 1 and y / (height / 2) - 1.
    """
    in_camera = (viewmat[:3, :3] * means[:, None]).sum(-1) + viewmat[:3, 3]
    u, v, z = (K * in_camera[:, None]).sum(-1).unbind(-1)
    xy = torch.stack([u, v], -1) / (z + Z_OFFSET)[:, None]
    size = boxes.flip(-1)
    with torch.no_grad():
        # NaN fails every comparison.
        valid = ((xy > 0) & (xy < size)).all(-1) & (z > 0)
    # Replaced before the division: an infinity behind the mask would still reach the gradient.
    xy = torch.where(valid[:, None], xy, 0)
    size = torch.where(valid[:, None], size, 1)
    return torch.where(valid[:, None], xy / (size / 2) - 1, 0), valid


def sample_map(feature_map: Tensor, coordinates: Tensor) -> Tensor:
    """[C, h, w] at coordinates [n, 2] (x, y) in -1..1 -> [n, C].

    Bilinear; -1 and 1 are the outer edges of the outer pixels (align_corners=False); beyond the centres of those
    their values go on (border padding).
    """
    if len(coordinates) == 0:
        return feature_map.new_zeros((0, feature_map.shape[0]))
    grid = coordinates[None, None]
    sampled = F.grid_sample(feature_map[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T


def sample_features(
    feature_map: Tensor,
    means: Tensor,
    box_coord: Tensor,
    viewmat: Tensor,
    K: Tensor,
    *,
    coord_scale: float = 1.0,
    rap_compatible: bool = False,
) -> Tensor:
    """The appearance of Gaussians in one view: what RAP reads out of a reference image's three maps.

    Args:
        feature_map: [3 F, h, w] of the reference image (F = 16 in RAP), any floating dtype.
        means: [n, 3] world positions.
        box_coord: [n, 3, 2] learned: rows 0 and 1 are (x, y) in -1..1 on maps 0 and 1, row 2 is the (height, width)
            of the window that map 2 fills.
        viewmat, K: [4, 4] and [3, 3] of the view that is rendered (not of the reference image).
        coord_scale: the learned (x, y) are divided by it.
        rap_compatible: raise where RAP does.

    Returns:
        [n, 3 F] of the dtype of means: maps 0, 1 and 2, F features each. Those of map 2 are 0 for Gaussians that do
        not fall on it (see `map_coordinates`).

    Raises:
        IndexError: with rap_compatible, where exactly one of the Gaussians falls on map 2. RAP fails there with all
            N Gaussians of the scene in mind, so give it all of them.
    """
    maps = feature_map.to(means.dtype).unflatten(0, (3, -1))
    coordinates, valid = map_coordinates(means, box_coord[:, 2], viewmat, K)
    if rap_compatible:
        check_like_rap(valid)
    learned = box_coord[:, :2] / coord_scale
    projected = torch.where(valid[:, None], sample_map(maps[2], coordinates), 0)
    return torch.cat([sample_map(maps[0], learned[:, 0]), sample_map(maps[1], learned[:, 1]), projected], dim=-1)


def check_like_rap(valid: Tensor) -> None:
    """Raise RAP's IndexError where exactly one Gaussian of valid [N] falls on the projected map."""
    if int(valid.sum()) == 1:
        raise IndexError(
            "exactly one Gaussian falls on the projected feature map, which RAP cannot render; rap_compatible=False "
            "renders it"
        )
