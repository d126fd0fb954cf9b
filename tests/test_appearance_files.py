"""RAP's folders: written, read back, and every way in which they may be wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from appearance_scenes import HEIGHT, WIDTH, make_appearance, net_state
from scenes import assert_same
from torch import Tensor

from rapfast import Scene
from rapfast.appearance import ColorNet, FeatureMapNet, RapScene, load_rap, rap_files

N = 30
CONFIG = {"antialiasing": True, "data_device": "cuda", "map_num": 3, "resolution": -1, "use_colors_precomp": True}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A model folder as a training leaves it, put together by hand and not by save()."""
    torch.manual_seed(1)
    model = tmp_path_factory.mktemp("model")
    folder = model / "ckpts_point_cloud" / "iteration_300"
    folder.mkdir(parents=True)
    (model / "cfg_args").write_text("Namespace(" + ", ".join(f"{k}={v!r}" for k, v in CONFIG.items()) + ")")
    a = make_appearance(n=N)
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_intr_{i}" for i in range(48)), "opacity"]
    names += ["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    # column f_intr_{c * 16 + k} is intrinsic[:, k, c]
    intrinsic = [a.intrinsic[:, k, c] for c in range(3) for k in range(16)]
    columns = [*a.means.T, *torch.zeros(3, N), *intrinsic, torch.logit(a.opacities), *a.scales.log().T, *a.quats.T]
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {N}\n"
    header += "".join(f"property float {name}\n" for name in names) + "end_header\n"
    table = torch.stack([column.float() for column in columns], 1).numpy().astype("<f4")
    (folder / "point_cloud.ply").write_bytes(header.encode() + table.tobytes())
    torch.save({f"_orig_mod.{k}": v for k, v in FeatureMapNet().state_dict().items()}, folder / "map_generator.pth")
    state = {k: torch.nn.Parameter(v.float()) for k, v in net_state().items()}
    torch.save(state | {"mask_decoder.lin0.weight": torch.ones(2, 3)}, folder / "color_net.pth")
    other = {"box_coord": torch.nn.Parameter(a.box_coord.float()), "other": torch.arange(3)}
    torch.save(other, folder / "other_attributes_dict.pth")
    return model


@pytest.fixture
def model(written, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def folder_of(model: Path) -> Path:
    return model / "ckpts_point_cloud" / "iteration_300"


def picture(rap: RapScene) -> Tensor:
    a = make_appearance(n=N)
    return rap.render(
        a.viewmats.float(), a.Ks.float(), WIDTH, HEIGHT, feature_maps=a.maps[:1].float(), view_weights=1.4
    )[0]


def same_networks(a: RapScene, b: RapScene) -> bool:
    pairs = (a.color_net, b.color_net), (a.feature_map_net, b.feature_map_net)
    return all(
        all(torch.equal(value, y.state_dict()[name]) for name, value in x.state_dict().items()) for x, y in pairs
    )


def test_load(written):
    rap = load_rap(written)
    a = make_appearance(n=N)
    assert (len(rap), rap.iteration, rap.config) == (N, 300, CONFIG)
    assert torch.equal(rap.scene.intrinsic, a.intrinsic.float())
    assert torch.equal(rap.box_coord, a.box_coord.float())
    assert torch.allclose(rap.scene.scales, a.scales.float())
    assert torch.equal(rap.color_net.state_dict()["encoder.lin0.weight"], net_state()["encoder.lin0.weight"].float())
    by_hand = RapScene(
        Scene(rap.scene.means, rap.scene.quats, rap.scene.scales, rap.scene.opacities, intrinsic=a.intrinsic.float()),
        a.box_coord.float(),
        FeatureMapNet(),
        ColorNet.from_state_dict({name: value.float() for name, value in net_state().items()}),
    )
    assert_same(picture(rap), picture(by_hand))
    assert rap.feature_maps(torch.rand(1, 3, 40, 50)).shape == (1, 48, 20, 25)


def test_save_and_load_again(written, tmp_path):
    rap = load_rap(written)
    target = tmp_path / "new" / "model"
    rap.save(target)
    again = load_rap(str(target))
    assert (again.iteration, again.config) == (300, CONFIG)
    assert same_networks(rap, again)
    assert torch.equal(again.box_coord, rap.box_coord)
    assert torch.equal(again.scene.intrinsic, rap.scene.intrinsic)
    assert torch.allclose(picture(again), picture(rap), atol=1e-3)
    # what RAP itself looks for: its names, and the entries that rapfast does not use
    folder = folder_of(target)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(folder_of(written)))
    assert os.listdir(folder.parent) == ["iteration_300"]
    colors = torch.load(folder / "color_net.pth", weights_only=True)
    assert set(colors) == set(net_state()) | {"mask_decoder.lin0.weight"}
    maps = torch.load(folder / "map_generator.pth", weights_only=True)
    assert set(maps) == set(FeatureMapNet().state_dict())
    other = torch.load(folder / "other_attributes_dict.pth", weights_only=True)
    assert set(other) == {"box_coord", "other"}
    rap.save(target, iteration=7000)
    assert load_rap(target).iteration == 7000
    assert load_rap(target, iteration=300).iteration == 300
    half = rap.to(torch.float64)
    half.feature_map_net.half()
    half.save(target, iteration=7001)
    assert load_rap(target).feature_map_net.final_conv.weight.dtype == torch.float32


def test_save_replaces_nothing_and_leaves_no_half(written, tmp_path, monkeypatch):
    rap = load_rap(written)
    rap.save(tmp_path)
    before = (folder_of(tmp_path) / "color_net.pth").read_bytes()
    with pytest.raises(FileExistsError, match="iteration_300: exists already"):
        rap.save(tmp_path)
    assert (folder_of(tmp_path) / "color_net.pth").read_bytes() == before

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(rap_files.torch, "save", fail)
    with pytest.raises(OSError, match="disk on fire"):
        rap.save(tmp_path, iteration=301)
    assert os.listdir(tmp_path / "ckpts_point_cloud") == ["iteration_300"]
    monkeypatch.undo()
    (tmp_path / "cfg_args").write_text("Namespace(antialiasing=False)")
    with pytest.raises(ValueError, match="cfg_args: is of another scene"):
        rap.save(tmp_path, iteration=301)
    with pytest.raises(TypeError, match="iteration must be a whole number"):
        rap.save(tmp_path, iteration="last")


def test_box_coordinates_in_two_parts(model, written, tmp_path):
    path = folder_of(model) / "other_attributes_dict.pth"
    whole = make_appearance(n=N).box_coord.float()
    torch.save({"box_coord1": whole[:, 2].clone(), "box_coord2": whole[:, :2].clone()}, path)
    rap = load_rap(model)
    assert torch.equal(rap.box_coord, whole)
    assert_same(picture(rap), picture(load_rap(written)))
    rap.save(tmp_path / "copy")
    other = torch.load(folder_of(tmp_path / "copy") / "other_attributes_dict.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in other.items()} == {
        "box_coord1": (N, 2),
        "box_coord2": (N, 2, 2),
    }
    assert torch.equal(load_rap(tmp_path / "copy").box_coord, whole)
    torch.save({"box_coord1": whole[:, 2], "box_coord2": whole[:, 2]}, path)
    with pytest.raises(ValueError, match=r"must be \[30, 2\] and \[30, 2, 2\], got \[30, 2\] and \[30, 2\]"):
        load_rap(model)
    torch.save({"box_coord1": whole[:, 2]}, path)
    with pytest.raises(ValueError, match=r"must have box_coord \[30, 3, 2\], or box_coord1 and box_coord2"):
        load_rap(model)
    torch.save({"box_coord": whole[:7]}, path)
    with pytest.raises(ValueError, match=r"box_coord must be \[30, 3, 2\] as point_cloud.ply says, got \[7, 3, 2\]"):
        load_rap(model)


def test_the_largest_iteration_wins(model):
    folder = folder_of(model)
    for name in ("iteration_1000", "iteration_99"):
        shutil.copytree(folder, folder.with_name(name))
    for name in ("iteration_best", "iteration_-5", ".tmp-iteration_9999"):
        folder.with_name(name).mkdir()
    folder.with_name("iteration_2000").write_text("a file")
    assert load_rap(model).iteration == 1000
    with pytest.raises(FileNotFoundError, match=r"iteration 5 is not there, only \[99, 300, 1000\]"):
        load_rap(model, iteration=5)


def test_missing_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="ckpts_point_cloud: no such folder"):
        load_rap(tmp_path / "nothing")
    for name in ("color_net.pth", "map_generator.pth", "other_attributes_dict.pth", "point_cloud.ply"):
        path = folder_of(model) / name
        path.rename(path.with_suffix(".away"))
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            load_rap(model)
        path.with_suffix(".away").rename(path)
    (model / "cfg_args").unlink()
    with pytest.raises(FileNotFoundError, match="cfg_args: no such file"):
        load_rap(model)
    shutil.rmtree(folder_of(model))
    with pytest.raises(FileNotFoundError, match="holds no folder iteration_<number>"):
        load_rap(model)


def test_missing_and_mismatched_weights_are_named(model):
    path = folder_of(model) / "color_net.pth"
    state = {name: value.float() for name, value in net_state().items()}
    del state["decoder.lin1.bias"]
    state["color_decoder.lin1.weight"] = torch.zeros(3, 40)
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        load_rap(model)
    assert str(error.value).startswith(f"{path}: does not fit the network in 2 places")
    assert "decoder.lin1.bias [48] is missing" in str(error.value)
    assert "color_decoder.lin1.weight must be [3, 48], got [3, 40]" in str(error.value)
    torch.save({name: value.float() for name, value in net_state({"encoder": (131, 20), "decoder": (68, 48),
                "color_decoder": (51, 3)}).items()}, path)  # fmt: skip
    with pytest.raises(ValueError, match="48 appearance and 48 intrinsic features, got 20 and 48"):
        load_rap(model)


class Evil:
    """Would make a folder where a file of it is unpickled freely."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_no_code_in_the_files_is_run(model, tmp_path):
    path = folder_of(model) / "color_net.pth"
    torch.save({"encoder.lin0.weight": Evil(tmp_path / "owned")}, path)
    with pytest.raises(ValueError, match="color_net.pth: cannot be read by torch.load with weights_only=True"):
        load_rap(model)
    config = model / "cfg_args"
    for text in (
        f"Namespace(a=__import__('os').mkdir({str(tmp_path / 'owned')!r}))",
        "Namespace(**{'a': 1})",
        "print('hello')",
        "Namespace(a=1",
        "(" * 5000,
        "",
    ):
        config.write_text(text)
        with pytest.raises(ValueError):
            load_rap(model)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["color_net.pth", "map_generator.pth", "other_attributes_dict.pth"])
def test_damaged_files(model, name):
    path = folder_of(model) / name
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for kept in (0, 1, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=f"{name}: "):
            load_rap(model)
    for _ in range(3):
        path.write_bytes(generator.bytes(300))
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            load_rap(model)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a dict of names, got a list"):
        load_rap(model)


def test_config(model):
    path = model / "cfg_args"
    path.write_text("Namespace(a=1, b='x', c=[1, 2], d=None, e=-0.5, f=device(type='cuda'))\n")
    assert rap_files.read_config(path) == {
        "a": 1,
        "b": "x",
        "c": [1, 2],
        "d": None,
        "e": -0.5,
        "f": "device(type='cuda')",
    }
    for text, sentence in (
        ("use_okmap=True", "use_okmap=True in cfg_args is not supported"),
        ("use_decode_with_pos=True", "use_decode_with_pos=True in cfg_args is not supported"),
        ("map_num=4", "map_num=4 in cfg_args is not supported"),
    ):
        path.write_text(f"Namespace({text})")
        with pytest.raises(NotImplementedError, match=sentence):
            load_rap(model)
    path.write_text("Namespace(coord_scale=0)")
    with pytest.raises(ValueError, match="coord_scale in cfg_args must be finite and not 0"):
        load_rap(model)


def test_inria_scene_in_the_place_of_raps(model):
    from rapfast import save_ply

    n = N
    scene = load_rap(model).scene
    plain = Scene(scene.means, scene.quats, scene.scales, scene.opacities, sh=torch.zeros(n, 4, 3))
    save_ply(plain, folder_of(model) / "point_cloud.ply")
    with pytest.raises(ValueError, match=r"point_cloud.ply: must have f_intr_0..47 \(RAP's layout\), it has SH"):
        load_rap(model)
