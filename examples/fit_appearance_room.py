"""Fits the appearance of the procedural room, writes it as a RAP model and draws what weights from 0 to 2 do to it.

    python examples/fit_appearance_room.py --out appearance_room

Takes about two minutes on two free CPU cores. `--fit rapfast/procedural/appearance_room.npz` renews the fit that comes
with rapfast.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rapfast import PostProcess, media, procedural
from rapfast.procedural.appearance import LIGHTINGS
from rapfast.procedural.appearance_fit import fit_appearance

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("appearance_room"), help="folder for the model and picture")
    parser.add_argument("--gaussians", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=700, help="of the colour network's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", type=Path, help="also write the fit alone, without the room, to this .npz")
    options = parser.parse_args()

    fit, report = fit_appearance(options.gaussians, options.seed, steps=options.steps, progress=print)
    print(
        f"fitted in {report.seconds:.0f} s; on reference images from places never seen, colours are off by "
        f"{report.color_error:.4f} (root mean square, of 0..1), and by {report.neutral_error:.4f} where the reference "
        f"image is ignored"
    )
    for hour, error in report.by_hour.items():
        print(f"  {hour:9} {error:.4f}")
    if options.fit:
        fit.save(options.fit)

    lit = procedural.lit_room(options.gaussians, options.seed)
    scene = procedural.appearance_room(lit=lit, fit=fit)
    options.out.mkdir(parents=True, exist_ok=True)
    scene.save(options.out)

    # Reference images from four places, the view from a fifth.
    places = procedural.room_cameras(5, *(2 * side for side in (192, 108)))
    references = torch.cat([lit.images(places[k : k + 1], hour) for k, hour in enumerate(LIGHTINGS)])
    maps = scene.feature_maps(procedural.as_references(references))
    rows = []
    for k in range(len(LIGHTINGS)):
        rows.append((255 * references[k].permute(1, 2, 0) + 0.5).to(torch.uint8).numpy())
        view = [places.viewmats[4:].expand(5, 4, 4), places.Ks[4:].expand(5, 3, 3), places.width, places.height]
        post = PostProcess(clamp=(0.0, 1.0), dtype=torch.uint8)
        images, _, _ = scene.render(*view, feature_maps=maps, map_ids=[k] * 5, view_weights=WEIGHTS, postprocess=post)
        rows.extend(images.numpy())
    media.write_png(options.out / "strip.png", media.contact_sheet(rows, columns=1 + len(WEIGHTS)))
    print(f"{options.out}: the model, and strip.png with reference images at the left and weights 0 to 2")


if __name__ == "__main__":
    main()
