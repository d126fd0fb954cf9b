"""Providers: sequences on disk, GUAVA's dictionaries, the synthetic person."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_videos import make_films, read_film
from cli_runs import run

from rapfast import Cameras, media, rasterization, save_ply
from rapfast.augment import (
    DIFFICULTIES,
    AugmentationJob,
    Identity,
    Viewpoint,
    film_path,
    fixed_viewpoint,
    guava,
    load_provider,
    parameter_sets,
)
from rapfast.augment.disk import DiskProvider
from rapfast.augment.synthetic import SyntheticProvider, studio
from rapfast.procedural.person import BONES, PARENTS, PIVOTS, person
from rapfast.procedural.person_motion import PersonMotion, bone_transforms
from rapfast.scene import Scene

CPU = torch.device("cpu")

# -------------------------------------------------------------------------------------------- disk

F, N, WIDTH, HEIGHT = 4, 50, 48, 32


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(F, N, 3, generator=g) * 0.3, "quats": torch.randn(F, N, 4, generator=g),
        "scales": torch.rand(F, N, 3, generator=g) * 0.1 + 0.02, "opacities": torch.rand(N, generator=g),
        "colors": torch.rand(N, 6, generator=g),
    }  # fmt: skip


def backgrounds() -> list[np.ndarray]:
    """The green changes from frame to frame."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return [np.stack([4 * x, 0 * x + 50 * f + 20, 6 * y], 2).astype(np.uint8) for f in range(F)]


def write_video(
    folder: Path, identity="safetensors", motion="one", background="images", target=(0.0, 0.1, 0.0)
) -> Path:
    """A video's folder in one of the ways that it may be written."""
    st = pytest.importorskip("safetensors.torch", reason="the extra augment is not installed")
    folder.mkdir(parents=True)
    t = tensors()
    if identity == "ply":
        save_ply(Scene(t["means"][0], t["quats"][0], t["scales"][0], t["opacities"], t["colors"][:, None, :3] - 0.5),
                 folder / "identity.ply")  # fmt: skip
    else:
        saved = {"opacities": t["opacities"][:, None].clone(), "colors": t["colors"]}
        st.save_file(saved, folder / "identity.safetensors")
    if motion == "one":
        moving = {name: t[name] for name in ("means", "quats", "scales")}
        st.save_file(moving, folder / "motion.safetensors")
    elif motion == "still scales":
        moving = {"means": t["means"], "quats": t["quats"], "scales": t["scales"][0].clone()}
        st.save_file(moving, folder / "motion.safetensors")
    else:
        (folder / "motion").mkdir()
        for f in range(F):
            frame = {name: t[name][f].clone() for name in ("means", "quats", "scales")}
            st.save_file(frame, folder / "motion" / f"{f:06d}.safetensors")
    if background == "images":
        (folder / "backgrounds").mkdir()
        for f, image in enumerate(backgrounds()):
            media.write_png(folder / "backgrounds" / f"{f:06d}.png", image)
    elif background == "still":
        media.write_png(folder / "background.png", backgrounds()[0])
    else:
        pytest.importorskip("av")
        with media.VideoWriter(folder / "background.mp4", WIDTH, HEIGHT, fps=30, quality=1) as film:
            for image in backgrounds():
                film.add(image)
    Cameras.look_at([(0, -2, 0)], (0, 0, 0), width=WIDTH, height=HEIGHT).save(folder / "cameras.json")
    if target is not None:
        (folder / "video.json").write_text(json.dumps({"fps": 24, "target": target}))
    return folder


@pytest.mark.parametrize("identity", ["safetensors", "ply"])
@pytest.mark.parametrize("motion", ["one", "each", "still scales"])
def test_a_sequence_is_what_was_written(tmp_path, identity, motion):
    write_video(tmp_path / "v", identity, motion)
    video, t = DiskProvider(str(tmp_path)).load_video("v"), tensors()
    assert (video.n_frames, video.fps) == (F, 24.0) and video.viewpoint.target.tolist() == [0.0, 0.1, 0.0]
    assert (video.viewpoint.width, video.viewpoint.height) == (WIDTH, HEIGHT)
    if identity == "ply":
        assert video.identity.sh_degree == 0 and torch.allclose(video.identity.colors[:, 0], t["colors"][:, :3] - 0.5)
        assert torch.allclose(video.identity.opacities, t["opacities"], atol=1e-6)
    else:
        assert video.identity.sh_degree is None and torch.equal(video.identity.colors, t["colors"])
        assert torch.equal(video.identity.opacities, t["opacities"])
    for f in range(F):
        found = video.deform(f, video.target(f))
        assert torch.equal(found.means, t["means"][f]) and torch.equal(found.quats, t["quats"][f])
        assert torch.equal(found.scales, t["scales"][0 if motion == "still scales" else f])


@pytest.mark.parametrize("background", ["images", "still", "film"])
def test_backgrounds_of_each_kind(tmp_path, background):
    write_video(tmp_path / "v", background=background)
    video = DiskProvider(str(tmp_path)).load_video("v")
    for f in range(F):
        found = video.background(f, None)
        assert found.dtype == torch.uint8 and found.shape == (HEIGHT, WIDTH, 3)
        error = np.abs(found.numpy().astype(int) - backgrounds()[0 if background == "still" else f])
        assert error.mean() < 6 if background == "film" else error.max() == 0
    video.close()


def test_without_a_target_the_camera_turns_about_the_person(tmp_path):
    write_video(tmp_path / "v", target=None)
    video = DiskProvider(str(tmp_path)).load_video("v")
    assert np.allclose(video.viewpoint.target, tensors()["means"][0].median(0).values.numpy()) and video.fps is None


@pytest.mark.parametrize("identity", ["safetensors", "ply"])
def test_films_of_a_sequence(tmp_path, identity):
    """From the command line; the frame is the render of what was written over the background."""
    pytest.importorskip("av")
    write_video(tmp_path / "tracked" / "v", identity)
    words = ("--tracked_root", tmp_path / "tracked", "--video_list", "v", "--output_root", tmp_path / "out")
    assert run("augment", "--batch", *words, "--difficulties", "easy", "--device", "cpu", "--save_frame_png") == 0
    path = film_path(tmp_path / "out", "easy", "v")
    assert len(read_film(path)) == F
    content = json.loads((tmp_path / "out" / "augmentation_params.json").read_text())
    video, t = DiskProvider(str(tmp_path / "tracked")).load_video("v"), tensors()
    from rapfast.augment import set_seed

    views, Ks = fixed_viewpoint(video.viewpoint, DIFFICULTIES["easy"], F, 24.0, set_seed(0, "easy", 0, "v"))
    assert content["sets"]["easy"]["v"]["fps"] == 24.0
    for f in range(F):
        view, K = (torch.from_numpy(x[f]).float()[None] for x in (views, Ks))
        image, alpha, _ = rasterization(t["means"][f], t["quats"][f], t["scales"][f], video.identity.opacities,
                                        video.identity.colors, view, K, WIDTH, HEIGHT,
                                        sh_degree=video.identity.sh_degree)  # fmt: skip
        expected = 255 * image[0, ..., :3].clamp(0, 1) + torch.from_numpy(backgrounds()[f]) * (1 - alpha[0])
        from PIL import Image

        found = np.asarray(Image.open(path.parent / "frames" / f"{f:06d}.png")).astype(float)
        assert np.abs(found - expected.clamp(0, 255).numpy()).max() <= 1


def broken(tmp_path: Path, change) -> str:
    """The sentence about a video that was changed after it was written."""
    folder = write_video(tmp_path / "v")
    change(folder)
    with pytest.raises((ValueError, OSError)) as told:
        video = DiskProvider(str(tmp_path)).load_video("v")
        for f in range(video.n_frames):
            video.deform(f, None)
            video.background(f, None)
    return str(told.value)


def test_bad_sequences_are_told(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    t = tensors()

    def resave(**changed):
        return lambda folder: st.save_file({**{k: t[k] for k in ("means", "quats", "scales")}, **changed},
                                           folder / "motion.safetensors")  # fmt: skip

    def small_image(folder):
        media.write_png(folder / "backgrounds" / "000002.png", np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))

    cases = [
        (resave(means=t["means"][:, :9].clone()),
         "means must be [F, 50, 3] for the identity's 50 Gaussians, got [4, 9, 3]"),
        (resave(quats=t["quats"][:3].clone()), "quats must be [F, 50, 4] for the identity's 50 Gaussians, got [3,"),
        (lambda f: (f / "motion.safetensors").write_bytes(b"{}"), "motion.safetensors: is no safetensors file"),
        (lambda f: (f / "motion.safetensors").unlink(), "motion.safetensors: no such file"),
        (lambda f: st.save_file({"means": t["means"]}, f / "motion.safetensors"), "has no quats; it holds means"),
        (lambda f: st.save_file({"opacities": t["opacities"]}, f / "identity.safetensors"),
         "must hold either colors or sh, got opacities"),
        (small_image, "000002.png: is 49x32 and the camera's images are 48x32: a background is never scaled"),
        (lambda f: (f / "backgrounds" / "000003.png").unlink(), "backgrounds: has 3 images for 4 frames"),
        (lambda f: (f / "backgrounds" / "000001.png").unlink(), "backgrounds: has no file 000001.png among its 3"),
        (lambda f: media.write_png(f / "backgrounds" / "2.png", backgrounds()[2]),
         "backgrounds: holds 000002.png and 2.png for one frame; keep the one to read"),
        (lambda f: st.save_file({"opacities": 4 * t["opacities"] - 2, "colors": t["colors"]},
                                f / "identity.safetensors"), "opacities must be within 0..1, as after a sigmoid"),
        (lambda f: media.write_png(f / "background.png", backgrounds()[0]), "must hold one of background.mp4"),
        (lambda f: (f / "cameras.json").unlink(), "must hold the camera to start from, cameras.json"),
        (lambda f: (f / "video.json").write_text('{"frames": 3}'), "must be an object with fps and target, not frames"),
        (lambda f: (f / "video.json").write_text('{"target": [0, -9, 0]}'), "target must lie in front of the camera"),
        (lambda f: (f / "motion").mkdir(), "holds motion.safetensors and the folder motion; keep the one to read"),
    ]  # fmt: skip
    for k, (change, sentence) in enumerate(cases):
        assert sentence in broken(tmp_path / str(k), change), sentence


@pytest.mark.parametrize("background", ["images", "still", "film"])
def test_a_dry_run_tells_of_backgrounds_what_the_run_does(tmp_path, background, capsys):
    """By headers alone; the other videos are made."""
    pytest.importorskip("av")
    for name in ("a", "bad", "c"):
        write_video(tmp_path / "tracked" / name, background=background)
    names = {"images": "backgrounds/000000.png", "still": "background.png", "film": "background.mp4"}
    path, taller = tmp_path / "tracked" / "bad" / names[background], np.zeros((HEIGHT + 2, WIDTH, 3), np.uint8)
    if background == "film":
        with media.VideoWriter(path, WIDTH, HEIGHT + 2) as film:
            film.add(taller)
    else:
        media.write_png(path, taller)
    told = f"{path}: is 48x34 and the camera's images are 48x32: a background is never scaled"
    words = ("augment", "--batch", "--tracked_root", tmp_path / "tracked", "--video_list", "a", "bad", "c",
             "--output_root", tmp_path / "out", "--difficulties", "easy", "--device", "cpu")  # fmt: skip
    assert run(*words, "--dry_run") == 0
    out = capsys.readouterr().out
    assert told in out and out.count("cannot") == 1 and out.count("to render") == 2 and "2 of 3 films" in out
    assert run(*words) == 2
    assert told in capsys.readouterr().err
    assert [film_path(tmp_path / "out", "easy", name).exists() for name in ("a", "bad", "c")] == [True, False, True]


def test_a_dry_run_misses_no_file(tmp_path):
    """What has to be there is looked for before anything is read."""
    for k, (name, sentence) in enumerate([
        ("identity.safetensors", "identity.safetensors: no such file"),
        ("motion.safetensors", "motion.safetensors: no such file"),
        ("cameras.json", "must hold the camera to start from, cameras.json"),
        ("backgrounds", "must hold one of background.mp4, background.png and the folder backgrounds, has none"),
    ]):  # fmt: skip
        path = write_video(tmp_path / str(k)) / name
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(FileNotFoundError, match=sentence):
            DiskProvider(str(tmp_path)).check_video(str(k))


def test_a_background_film_that_is_too_short(tmp_path):
    pytest.importorskip("av")
    folder = write_video(tmp_path / "v", background="film")
    with media.VideoWriter(folder / "background.mp4", WIDTH, HEIGHT) as film:
        film.add(backgrounds()[0])
    video = DiskProvider(str(tmp_path)).load_video("v")
    video.background(0, None)
    with pytest.raises(ValueError, match="background.mp4: has 1 frames, fewer than the motion's 4"):
        video.background(1, None)
    with media.VideoWriter(folder / "background.mp4", WIDTH + 2, HEIGHT) as film:
        film.add(np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8))
    with pytest.raises(ValueError, match="background.mp4: is 50x32 and the camera's images are 48x32"):
        DiskProvider(str(tmp_path)).load_video("v")


def test_a_damaged_background_film_is_told(tmp_path):
    """Whatever FFmpeg calls it, and the other video is rendered."""
    pytest.importorskip("av")
    for name in ("bad", "good"):
        write_video(tmp_path / name, background="film")
    film = tmp_path / "bad" / "background.mp4"
    data = bytearray(film.read_bytes())
    at = data.index(b"mdat")
    data[at + 4 : at + 4 + 400] = b"\xff" * 400
    film.write_bytes(data)
    summary = make_films(tmp_path / "out", DiskProvider(str(tmp_path)), ("bad", "good"), ("easy",))
    assert [f.video for f in summary.failures] == ["bad"] and [f.video for f in summary.films] == ["good"]
    assert str(summary.failures[0].error).startswith("video bad: frame ")


def test_identities_of_harmonics():
    opacities = torch.rand(4)
    assert Identity(opacities, torch.rand(4, 9, 3), 1).sh_degree == 1
    with pytest.raises(ValueError, match=r"colors must be \[N, K, 3\], K at least 16 for sh_degree 3, got"):
        Identity(opacities, torch.rand(4, 9, 3), 3)
    with pytest.raises(ValueError, match="sh_degree must be"):
        Identity(opacities, torch.rand(4, 9, 3), 5)


# ------------------------------------------------------------------------------------------- GUAVA


def guava_camera(eye=(0.3, -0.2, -2.0), tanfov=(0.4, 0.3), size=(64, 48)) -> dict:
    """A dictionary made by hand, element by element, as INRIA's getWorld2View2 and getProjectionMatrix make it."""
    c, s = math.cos(0.2), math.sin(0.2)
    R = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])  # world to camera
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3], world_to_camera[:3, 3] = R, -R @ np.array(eye)
    near, far = 0.01, 100.0
    P = np.zeros((4, 4))
    P[0, 0], P[1, 1] = 1 / tanfov[0], 1 / tanfov[1]
    P[2, 2], P[2, 3], P[3, 2] = far / (far - near), -far * near / (far - near), 1.0
    view = torch.from_numpy(world_to_camera).float().T[None]
    return {
        "world_view_transform": view.clone(), "full_proj_transform": view @ torch.from_numpy(P).float().T,
        "tanfovx": torch.tensor([tanfov[0]]), "tanfovy": tanfov[1], "image_width": size[0],
        "image_height": torch.tensor([size[1]]), "camera_center": torch.tensor([eye]).float(),
    }  # fmt: skip


def guava_assets(batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "xyz": torch.randn(batch, 40, 3, generator=g) * 0.3, "rotation": torch.randn(batch, 40, 4, generator=g),
        "scaling": torch.rand(batch, 40, 3, generator=g) * 0.1, "opacity": torch.rand(batch, 40, 1, generator=g),
        "features_color": torch.rand(batch, 40, 32, generator=g),
    }  # fmt: skip


def test_a_guava_camera_puts_points_where_its_own_matrices_do():
    camera = guava_camera()
    found = guava.cameras_of(camera)
    assert (found.width, found.height, len(found)) == (64, 48, 1)
    assert torch.allclose(found.viewmats, camera["world_view_transform"].mT)
    assert torch.allclose(found.centers, camera["camera_center"], atol=1e-6)
    assert torch.allclose(found.Ks[0], torch.tensor([[80.0, 0, 32], [0, 80.0, 24], [0, 0, 1]]), atol=1e-4)
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    clip = torch.cat([points, torch.ones(20, 1)], 1) @ camera["full_proj_transform"][0]  # INRIA's rows of points
    ndc = clip[:, :2] / clip[:, 3:]
    inria = ((ndc + 1) * torch.tensor([64.0, 48.0]) - 1) / 2  # its pixel centres are whole numbers
    ours = found.Ks[0] @ (found.viewmats[0, :3, :3] @ points.T + found.viewmats[0, :3, 3:])
    assert torch.allclose((ours[:2] / ours[2]).T, inria + 0.5, atol=1e-3)


def test_a_principal_point_off_the_middle_is_kept():
    base = guava.cameras_of(guava_camera())
    Ks = base.Ks.clone()
    Ks[0, 0, 2], Ks[0, 1, 2], Ks[0, 1, 1] = 30.25, 25.5, 91.0
    camera = guava.camera_dictionary(base.viewmats, Ks, 64, 48)
    again = guava.cameras_of(camera)
    assert torch.allclose(again.Ks, Ks, atol=1e-3) and torch.allclose(again.viewmats, base.viewmats, atol=1e-6)
    original = guava_camera()
    same = guava.camera_dictionary(base.viewmats, base.Ks, 64, 48)
    for name in ("world_view_transform", "full_proj_transform", "camera_center"):
        assert torch.allclose(same[name], original[name], atol=1e-5), name
    assert same["tanfovx"].item() == pytest.approx(0.4) and same["tanfovy"].item() == pytest.approx(0.3)


def test_guava_assets():
    assets = guava_assets()
    identity, motion = guava.identity_of(assets, 1), guava.motion_of(assets, 1)
    assert torch.equal(identity.opacities, assets["opacity"][1, :, 0]) and identity.n_channels == 32
    assert torch.equal(identity.colors, assets["features_color"][1])
    assert torch.equal(motion.means, assets["xyz"][1]) and torch.equal(motion.scales, assets["scaling"][1])
    assert torch.equal(motion.quats, assets["rotation"][1])
    view = guava.viewpoint_of(guava_camera(), assets["xyz"][0].mean(0))
    assert isinstance(view, Viewpoint) and np.allclose(view.target, assets["xyz"][0].mean(0).numpy())
    assert np.allclose(view.K[0, 0], 80)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"world_view_transform": None}, "camera must hold .*; world_view_transform is missing"),
        ({"world_view_transform": torch.eye(3)}, r"world_view_transform must be \[B, 4, 4\], got \[3, 3\]"),
        ({"tanfovx": 0.5}, "tanfovx must be the tangent of half the field of view .*, 0.4, got 0.5"),
        ({"image_width": [64, 65]}, r"image_width must be one size for all cameras, got \[64, 65\]"),
        ({"full_proj_transform": torch.zeros(2, 4, 4)}, "full_proj_transform must have 1 matrices, got 2"),
    ],
)
def test_bad_guava_cameras_are_told(change, sentence):
    camera = {k: v for k, v in (guava_camera() | change).items() if v is not None}
    with pytest.raises(ValueError, match=sentence):
        guava.cameras_of(camera)


def test_bad_guava_assets_are_told():
    with pytest.raises(ValueError, match="assets must hold opacity, features_color; features_color is missing"):
        guava.identity_of({"opacity": torch.zeros(1, 4, 1)})
    with pytest.raises(ValueError, match=r"rotation must be a tensor \[B, N, 4\], got float32 \[1, 4, 3\] on cpu"):
        guava.motion_of({k: torch.zeros(1, 4, 3) for k in ("xyz", "rotation", "scaling")})
    with pytest.raises(ValueError, match="index must be one of the 2 entries of opacity, got 2"):
        guava.identity_of(guava_assets(), 2)


# --------------------------------------------------------------------------------------- synthetic


def test_the_person_has_as_many_gaussians_as_asked_for():
    for n in (2000, 7919, 30_000):
        figure = person(n)
        assert {len(x) for x in (figure.points, figure.quats, figure.scales, figure.colours, figure.bones)} == {n}
        assert np.isfinite(figure.points).all() and (figure.scales > 0).all() and figure.scales.max() < 0.2
        assert np.allclose(np.linalg.norm(figure.quats, axis=1), 1) and np.allclose(figure.weights.sum(1), 1)
        assert figure.colours.min() >= 0 and figure.colours.max() <= 1
    again = person(30_000)
    assert np.array_equal(figure.points, again.points) and np.array_equal(figure.colours, again.colours)
    with pytest.raises(ValueError, match="n_gaussians must be at least 2000 for a person, got 1999"):
        person(1999)


def test_bones_are_rigid_and_hang_together():
    for seconds in (0.0, 0.7, 13.0):
        matrices, quats = bone_transforms(seconds)
        turns = matrices[:, :, :3]
        assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3)) and np.allclose(np.linalg.det(turns), 1)
        assert (quats[:, 0] >= 0).all() and np.allclose(np.linalg.norm(quats, axis=1), 1)
        for bone in range(1, len(BONES)):  # parent and child agree on the joint, but for what breathing shifts
            joint = [matrices[b, :, :3] @ PIVOTS[bone] + matrices[b, :, 3] for b in (bone, PARENTS[bone])]
            assert np.abs(joint[0] - joint[1]).max() < 0.004


def test_the_person_moves():
    motion = PersonMotion(person(5000), CPU)
    (a, qa), (b, qb) = motion.at(1.0), motion.at(1.0 + 1 / 30)
    assert 1e-4 < (a - b).norm(dim=1).max() < 0.05 and torch.allclose(qa.norm(dim=1), torch.ones(5000), atol=1e-5)
    far, _ = motion.at(2.3)
    assert (a - far).norm(dim=1).max() > 0.1  # hands
    assert torch.equal(motion.at(1.0)[0], a) and not torch.equal(qa, qb)


def test_the_person_fills_the_picture_and_is_opaque():
    provider = SyntheticProvider(frames=1, gaussians=40_000, width=128, height=128)
    provider.load_model(CPU)
    video = provider.load_video("demo")
    assert video.identity.n_channels == 32 and isinstance(video.identity, Identity)
    motion, view = video.deform(0, video.target(0)), video.viewpoint
    camera = [torch.from_numpy(x).float()[None] for x in (view.viewmat, view.K)]
    images, alphas, _ = rasterization(motion.means, motion.quats, motion.scales, video.identity.opacities,
                                      video.identity.colors, *camera, 128, 128)  # fmt: skip
    alpha = alphas[0, :, :, 0]
    assert 0.2 < (alpha > 0.95).float().mean() < 0.7 and ((alpha > 0.05) & (alpha < 0.95)).float().mean() < 0.08
    face = images[0, 28:36, 60:68, :3].mean((0, 1))
    assert face[0] > face[1] > face[2] and face[0] > 0.5  # skin


def test_the_studio_moves():
    a, b = (studio(t, 64, 48, CPU) for t in (0.0, 1.0))
    assert a.shape == (48, 64, 3) and a.dtype == torch.uint8 and not torch.equal(a, b)
    assert torch.equal(a, studio(0.0, 64, 48, CPU))


def test_the_refiner_is_fixed_and_its_noise_is_the_seeds():
    provider = SyntheticProvider(frames=1, gaussians=2000, width=32, height=32)
    provider.load_model(CPU)
    g = torch.Generator().manual_seed(0)
    alphas = 0.1 + 0.9 * torch.rand(4, 1, 32, 32, generator=g)
    straight = torch.rand(4, 32, 32, 32, generator=g)
    out = provider.refine(straight * alphas, alphas, [1, 2, 3, 4])
    assert out.shape == (4, 3, 32, 32) and (out - straight[:, :3]).abs().max() < 0.03  # colours, and a little texture
    assert torch.equal(out, provider.refine(straight * alphas, alphas, [1, 2, 3, 4]))
    other = provider.refine(straight * alphas, alphas, [1, 9, 3, 4])
    assert torch.equal(out[[0, 2, 3]], other[[0, 2, 3]]) and not torch.equal(out[1], other[1])
    again = SyntheticProvider(frames=1, gaussians=2000, width=32, height=32)
    again.load_model(CPU)
    assert torch.equal(out, again.refine(straight * alphas, alphas, [1, 2, 3, 4]))


def test_names_are_videos(tmp_path):
    pytest.importorskip("av")
    make_films(tmp_path, SyntheticProvider(frames=2, gaussians=2000, width=64, height=48), ("a", "b"), ("easy",))
    a, b = (read_film(film_path(tmp_path, "easy", v))[0] for v in "ab")
    assert np.abs(a.astype(int) - b).mean() > 3


# ------------------------------------------------------------------------------------------ loading


def test_providers_by_name():
    assert isinstance(load_provider("synthetic", None, {"frames": 3}), SyntheticProvider)
    assert load_provider("rapfast.augment.synthetic:SyntheticProvider", None, {"gaussians": 9000}).gaussians == 9000
    disk = load_provider("disk", "tracked", {"near_plane": 0.2})
    assert isinstance(disk, DiskProvider) and disk.near_plane == 0.2 and not disk.refines
    with pytest.raises(ValueError, match="frames must be between 1 and"):
        load_provider("synthetic", None, {"frames": 0})
    job = AugmentationJob(disk, parameter_sets(["easy"], DIFFICULTIES), CPU)
    assert json.dumps(job.settings()) and job.settings()["near_plane"] == 0.2
