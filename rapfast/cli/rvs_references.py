"""The reference images of `rapfast rvs`: given ones, or a model's own training images; and which view gets which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .. import media
from ..rvs.hashes import file_fingerprint

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class References:
    """R image files.

    Attributes:
        names: R, as the manifest has them. paths: R. fingerprints: R, of the files.
        of_pose: the place of each pose's own image; None where the images are not the poses' own.
        size: (width, height) that images are scaled to; None for as they are.
    """

    names: list[str]
    paths: list[Path]
    fingerprints: list[str]
    of_pose: list[int] | None
    size: tuple[int, int] | None

    def load(self, place: int) -> Tensor:
        """[3, H, W] float32 in 0..1, scaled by averaging over areas."""
        image = torch.from_numpy(media.read_image(self.paths[place])).permute(2, 0, 1)
        if self.size is not None and self.size != (image.shape[2], image.shape[1]):
            image = torch.nn.functional.interpolate(image[None], size=self.size[::-1], mode="area")[0]
        return image.contiguous()

    def key(self, place: int) -> tuple:
        """What decides the image that `load` returns."""
        from PIL import __version__ as pillow

        return self.fingerprints[place], self.size or (), pillow


def find_references(
    given: Sequence[Path], names: Sequence[str] | None, model: Path, config: Mapping[str, Any], poses: Path,
    size: tuple[int, int] | None,
) -> References:  # fmt: skip
    """The images given (files and folders), or the training images of a model.

    Args:
        given: files and folders; empty: look for the training images.
        names: of the poses' images. model, config: folder and cfg_args of the scene. poses: the camera file.

    Raises:
        FileNotFoundError: there is none; the sentence says where was looked.
    """
    if given:
        labels, paths = _given(given)
        of_pose = None if names is None else _pairs([_bare(label) for label in labels], names)
    else:
        paths, labels = _training_images(names, model, config, poses), list(names or [])
        of_pose = list(range(len(paths)))
        # Two cameras may name one image; it is one reference then.
    return References(labels, paths, [file_fingerprint(path) for path in paths], of_pose, size)


def _given(given: Sequence[Path]) -> tuple[list[str], list[Path]]:
    labels, paths = [], []
    for path in given:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise FileNotFoundError(f"--reference {path}: holds no images ({', '.join(SUFFIXES)})")
            labels += [p.relative_to(path).as_posix() for p in found]
            paths += found
        elif path.is_file():
            labels.append(path.name)
            paths.append(path)
        else:
            raise FileNotFoundError(f"--reference {path}: there is no such image or folder")
    return labels, paths


def _pairs(labels: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The place of each name among the labels, by its path or else its last part; None where one has no match."""
    whole = {label: i for i, label in enumerate(labels)}
    last: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        last.setdefault(PurePosixPath(label).name, []).append(i)
    places = []
    for name in map(_bare, names):
        matches = [whole[name]] if name in whole else last.get(PurePosixPath(name).name, [])
        if len(matches) != 1:
            return None
        places.append(matches[0])
    return places


def _training_images(names: Sequence[str] | None, model: Path, config: Mapping[str, Any], poses: Path) -> list[Path]:
    if not names:
        raise FileNotFoundError(
            f"--reference: none given, and {poses} does not name its images: name images, or a folder of them"
        )
    roots: list[Path] = []
    source, images = config.get("source_path"), str(config.get("images") or "images")
    if source:
        bases = [Path(source)] if Path(source).is_absolute() else [model / str(source), Path(source)]
        roots += [base / part for base in bases for part in (images, "images", ".")]
    base = poses if poses.is_dir() else poses.parent
    roots += [base / part for part in (images, "images", ".", "../images", "../../images")]
    roots = list(dict.fromkeys(roots))
    for root in roots:
        found = [_image_at(root, name) for name in names]
        if all(found):
            return found
    looked = ", ".join(dict.fromkeys(str(root) for root in roots))
    raise FileNotFoundError(
        f"--reference: none given, and the training images of {model} were not found (looked for {names[0]!r} and "
        f"{len(names) - 1} more in {looked}): name images, or a folder of them"
    )


def _image_at(root: Path, name: str) -> Path | None:
    """The image of this name, or of this name with another suffix: converted images keep their names."""
    candidates = [root / name, *(root / f"{_bare(name)}{suffix}" for suffix in SUFFIXES)]
    return next((path for path in candidates if path.suffix.lower() in SUFFIXES and path.is_file()), None)


def _bare(name: str) -> str:
    """Without an image's suffix, with forward slashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path)
