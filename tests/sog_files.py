"""A writer of small SOG files for the tests, by hand from the format's description."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
from PIL import Image

#: Codebook of 256 values from -4 to 4, for scales, colours and SH alike.
CODEBOOK = np.linspace(-4, 4, 256)


def webp(pixels: np.ndarray) -> bytes:
    """Lossless WebP of uint8 [h, w, 4]."""
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "WEBP", lossless=True, exact=True)
    return out.getvalue()


def sog_parts(count: int = 5, bands: int = 1, seed: int = 0) -> tuple[dict, dict[str, bytes], dict[str, np.ndarray]]:
    """meta.json's content, the pictures, and the values that a reader must give (log scales, linear opacities)."""
    rng = np.random.default_rng(seed)
    width = 4
    height = -(-count // width)
    texture = lambda: rng.integers(0, 256, (height, width, 4), dtype=np.uint8)  # noqa: E731
    low, high, quats, scales, sh0, labels = (texture() for _ in range(6))
    quats[..., :3] = 100 + quats[..., :3] // 6  # components that leave something for the largest
    quats[..., 3] = 252 + quats[..., 3] % 4
    coefficients = {0: 0, 1: 3, 2: 8, 3: 15}[bands]
    palette = 70  # more than one row of 64
    labels[..., 0] = labels[..., 0] % palette
    labels[..., 1] = 0

    flat = lambda t: t.reshape(-1, 4)[:count].astype(np.float64)  # noqa: E731
    log = -2 + 4 * (flat(low)[:, :3] + 256 * flat(high)[:, :3]) / 65535
    index = lambda t: CODEBOOK[t.reshape(-1, 4)[:count, :3]]  # noqa: E731
    q = (flat(quats)[:, :3] / 255 * 2 - 1) / np.sqrt(2)
    full = np.empty((count, 4))
    for row, tag in enumerate(quats.reshape(-1, 4)[:count, 3]):
        full[row] = np.insert(q[row], tag - 252, np.sqrt(max(0.0, 1 - (q[row] ** 2).sum())))
    values = {
        "means": np.sign(log) * (np.exp(np.abs(log)) - 1),
        "log_scales": index(scales),
        "quats": full,
        "sh0": index(sh0),
        "opacities": flat(sh0)[:, 3] / 255,
    }
    meta: dict = {
        "version": 2,
        "count": count,
        "means": {"mins": [-2, -2, -2], "maxs": [2, 2, 2], "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": CODEBOOK.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": CODEBOOK.tolist(), "files": ["sh0.webp"]},
    }
    pictures = {"means_l": low, "means_u": high, "quats": quats, "scales": scales, "sh0": sh0}
    if coefficients:
        centroids = rng.integers(0, 256, (2, 64 * coefficients, 4), dtype=np.uint8)
        pictures |= {"shN_centroids": centroids, "shN_labels": labels}
        meta["shN"] = {
            "count": palette, "bands": bands, "codebook": CODEBOOK.tolist(),
            "files": ["shN_centroids.webp", "shN_labels.webp"],
        }  # fmt: skip
        label = labels.reshape(-1, 4)[:count, 0].astype(int)
        columns = (label % 64)[:, None] * coefficients + np.arange(coefficients)
        values["shN"] = CODEBOOK[centroids[label // 64][np.arange(count)[:, None], columns, :3]]
    return meta, {f"{name}.webp": webp(p) for name, p in pictures.items()}, values


def bundle(meta: object, pictures: dict[str, bytes]) -> bytes:
    """The .sog zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("meta.json", meta if isinstance(meta, str | bytes) else json.dumps(meta))
        for name, data in pictures.items():
            archive.writestr(name, data)
    return out.getvalue()
