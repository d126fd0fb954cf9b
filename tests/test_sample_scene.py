"""The room with RAP's appearance: what its fit is worth, and that its pictures follow reference image and weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rapfast import load_rap, procedural
from rapfast.procedural import appearance
from rapfast.procedural.appearance import LIGHTINGS, REFERENCE_SIZE
from rapfast.procedural.appearance_fit import fit_appearance

HOURS = list(LIGHTINGS)


@pytest.fixture(scope="module")
def lit():
    return procedural.lit_room(8000, seed=3)  # other furniture details and another number than the fit's


@pytest.fixture(scope="module")
def scene(lit):
    return procedural.appearance_room(lit=lit)


@pytest.fixture(scope="module")
def places():
    """Viewpoints that the fit has not seen."""
    return procedural.room_cameras(8, 2 * REFERENCE_SIZE[0], 2 * REFERENCE_SIZE[1])


def references(lit, places, hour):
    return procedural.as_references(lit.images(places, hour))


@pytest.fixture(scope="module")
def maps(lit, scene, places):
    """Feature maps by hour, the reference images from the first three places."""
    return {hour: scene.feature_maps(references(lit, places[:3], hour)) for hour in HOURS}


def pictures(scene, places, feature_map, weights):
    """[len(weights), H, W, 3] of the last place under the reference image of one map."""
    n = len(weights)
    view = places.viewmats[7:].expand(n, 4, 4), places.Ks[7:].expand(n, 3, 3), places.width, places.height
    images, _, _ = scene.render(*view, feature_maps=feature_map[None], map_ids=[0] * n, view_weights=weights)
    return images


@pytest.fixture(scope="module")
def strips(scene, places, maps):
    return {h: torch.stack([pictures(scene, places, m, [0.0, 0.5, 1.0, 1.5, 2.0]) for m in maps[h]]) for h in HOURS}


def test_it_has_raps_sizes(scene):
    assert len(scene) == 8000 and scene.scene.intrinsic.shape == (8000, 16, 3) and scene.scene.sh is None
    assert scene.color_net.encoder.widths == (159, 128, 96, 64, 48)
    assert scene.color_net.decoder.widths == (96, 48, 48, 48) and scene.color_net.color_decoder.widths == (51, 48, 3)
    assert bool((scene.box_coord[:, :2].abs() < 1).all()) and bool((scene.box_coord[:, 2] >= 480).all())
    # Places on the maps differ, and neighbours have neighbouring ones.
    assert bool((scene.box_coord[:, :2].flatten(1).std(0) > 0.03).all())


def test_the_same_numbers_twice(lit, scene):
    again = procedural.appearance_room(8000, 3)
    assert torch.equal(again.scene.intrinsic, scene.scene.intrinsic) and torch.equal(again.box_coord, scene.box_coord)
    for one, two in ((again.color_net, scene.color_net), (again.feature_map_net, scene.feature_map_net)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name


def test_weight_0_is_neutral_whatever_the_reference_image(lit, strips, places):
    first = strips["day"][0, 0]
    for hour in HOURS:
        for strip in strips[hour]:
            assert torch.equal(strip[0], first), hour
    neutral = lit.images(places[7:], [0, 0, 0, 0])[0].permute(1, 2, 0)
    assert float((first - neutral).square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("hour", HOURS)
def test_weight_1_is_the_light_of_the_reference_image(lit, strips, places, hour):
    truth = lit.images(places[7:], hour)[0].permute(1, 2, 0)
    ignored = float((strips[hour][0, 0].clamp(0, 1) - truth).square().mean().sqrt())
    for strip in strips[hour]:
        error = float((strip[2].clamp(0, 1) - truth).square().mean().sqrt())
        assert error < 0.08 and error < 0.75 * ignored
        # The wrong hour's truth is farther away.
        for other in HOURS:
            if other != hour:
                wrong = lit.images(places[7:], other)[0].permute(1, 2, 0)
                assert float((strip[2].clamp(0, 1) - wrong).square().mean().sqrt()) > error


@pytest.mark.parametrize("hour", HOURS)
def test_the_weight_takes_the_picture_steadily_from_neutral_through_the_light_and_beyond(lit, strips, places, hour):
    truth = lit.images(places[7:], hour)[0].permute(1, 2, 0)
    for strip in strips[hour]:
        change = truth - strip[0]
        way = [(float(((image - strip[0]) * change).sum() / change.square().sum())) for image in strip]
        assert way[0] == 0 and all(b > a + 0.1 for a, b in zip(way, way[1:], strict=False)), way
        assert 0.5 < way[2] < 1.5, way


def test_a_person_would_recognise_the_hours(strips):
    red_over_blue = {hour: float((s[:, 2, ..., 0] - s[:, 2, ..., 2]).mean()) for hour, s in strips.items()}
    bright = {hour: float(s[:, 2].clamp(0, 1).mean()) for hour, s in strips.items()}
    assert red_over_blue["evening"] > red_over_blue["day"] > red_over_blue["overcast"]
    assert bright["day"] > bright["evening"] > bright["night"] and bright["day"] > bright["overcast"] + 0.05


def test_blends_lie_between(lit, scene, places, strips):
    half = scene.feature_maps(references(lit, places[:1], [0.5, 0, 0, 0.5]))[0]
    (image,) = pictures(scene, places, half, [1.0])
    day, night = strips["day"][0, 2], strips["night"][0, 2]
    assert float(night.mean()) + 0.03 < float(image.mean()) < float(day.mean()) - 0.03


def test_shipped_fit_holds_on_places_never_seen(lit, scene, places):
    """Colours of all Gaussians under weight 1, seen from the middle of the room; map 2 as RAP samples it."""
    from rapfast.reference import spherical_harmonics

    view = procedural.room_orbit(1, 854, 480)
    eye = -view.viewmats[0, :3, :3].T @ view.viewmats[0, :3, 3]
    direction = lit.scene.means - eye
    front = (direction * lit.normals).sum(1) < 0
    errors, ignored = [], []
    neutral = (spherical_harmonics(3, direction, lit.sh[0]) + 0.5)[front]
    for k, hour in enumerate(HOURS, 1):
        truth = (spherical_harmonics(3, direction, lit.sh[k]) + 0.5).clamp(0, 1)[front]
        for feature_map in scene.feature_maps(references(lit, places, hour)):
            decoded = scene.decode(view.viewmats[0], view.Ks[0], feature_map)
            colors = scene.color_net.head(decoded, F.normalize(direction, dim=1))[front]
            errors.append(float((colors - truth).square().mean()))
            ignored.append(float((neutral - truth).square().mean()))
    assert np.sqrt(np.mean(errors)) < 0.065
    assert np.sqrt(np.mean(errors)) < 0.5 * np.sqrt(np.mean(ignored))


def test_raps_files_lead_back_to_the_same_picture(tmp_path, scene, places, maps, strips):
    scene.save(tmp_path)
    read = load_rap(tmp_path)
    assert read.config == scene.config and read.iteration == scene.iteration
    (image,) = pictures(read, places, maps["evening"][0], [1.5])
    # The PLY holds logarithms and logits, so up to rounding.
    assert float((image - strips["evening"][0, 3]).abs().max()) < 1e-3


def test_a_fit_is_deterministic_and_survives_its_file(tmp_path):
    tiny = {"n_gaussians": 4000, "other_rooms": (), "n_views": 1, "n_references": 4, "steps": 3}
    fit, report = fit_appearance(seed=5, **tiny)
    again, _ = fit_appearance(seed=5, **tiny)
    fit.save(tmp_path / "fit.npz")
    read = procedural.load_fit(tmp_path / "fit.npz")
    assert report.seconds > 0 and set(report.by_hour) == set(LIGHTINGS) and read.seed == 5
    for other in (again, read):
        for name, value in fit._tensors().items():
            assert torch.equal(value, other._tensors()[name]), name
    # Another seed is another network.
    assert not torch.equal(appearance.seeded_map_net(5).encoder[4][0].conv1.weight,
                           appearance.seeded_map_net(6).encoder[4][0].conv1.weight)  # fmt: skip


def test_what_cannot_be_used_is_named(tmp_path, lit):
    with pytest.raises(ValueError, match="hour must be one of day, evening, overcast, night, got 'noon'"):
        lit.under("noon")
    with pytest.raises(ValueError, match="hour must hold 4 shares, one of each lighting, got 2"):
        lit.under([0.5, 0.5])
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="bad.npz: is not a fit of the room's appearance"):
        procedural.load_fit(tmp_path / "bad.npz")
    with pytest.raises(OSError, match="absent"):
        procedural.load_fit(tmp_path / "absent.npz")
