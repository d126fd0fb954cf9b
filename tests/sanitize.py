"""compute-sanitizer over rapfast's kernels: a sweep of odd shapes for each tool, judged in a line for each part.

    python tests/sanitize.py                       all four tools
    python tests/sanitize.py --tool memcheck       one of memcheck, racecheck, initcheck, synccheck
    python tests/sanitize.py --sweep --seed 3      the sweep alone, without a sanitizer

Each tool goes through the parts of the sweep (--part: forward, backward, lists, networks) in processes of their own,
--jobs at a time.

The sweep draws fresh random inputs from the seed, in memory that torch takes from the driver block by block
(PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a step past a block's end is seen. It runs on two streams in turn, and
compares each picture with the same call's on memory filled with NaN.

Exit status: 0 when no tool found anything, 1 when one did, 77 where nothing could run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("backward", "forward", "networks", "lists")  # those that take long come first
SKIPPED = 77
ROOT = Path(__file__).resolve().parent.parent
# Of the findings only those in rapfast's kernels and CUB's count: torch's own are others' business.
OURS = re.compile(r"rapfast::|\bcub::")
THEIRS = re.compile(r"\bat::|at_cuda_detail|at_native")
OPTIONS = {
    "memcheck": ["--leak-check", "no", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}


def find_sanitizer() -> str | None:
    """The program, on PATH or in a CUDA toolkit."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(place, sub)) for place in places if place for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def kernel_filter(tool: str, sanitizer: str) -> list[str]:
    """Options that look at rapfast's and CUB's kernels alone. initcheck must see every kernel: torch's write what
    rapfast's read."""
    if tool == "initcheck":
        return []
    usage = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False).stdout
    if "--kernel-name" in usage:
        option, key = "--kernel-name", "kernel_substring"
    elif "--kernel-regex" in usage:
        option, key = "--kernel-regex", "kns"
    else:
        return []
    return [option, f"{key}=rapfast", option, f"{key}=cub"]


def findings(report: str) -> tuple[int, int]:
    """How many of a report's findings lie in kernels of ours, and how many elsewhere.

    A finding begins with an unindented line behind the tool's margin and says in the next ones where it was.
    """
    ours = theirs = 0
    for block in re.split(r"^========= (?=\S)", report, flags=re.MULTILINE)[1:]:
        if not re.match(r"(Invalid|Uninitialized|Error|Warning|Race|Barrier|Misaligned|Address|Potential)", block):
            continue
        where = re.split(r"Saved host backtrace|Host Frame", block)[0]  # the kernel; not who launched it
        if OURS.search(where) and not THEIRS.search(where):
            ours += 1
        else:
            theirs += 1
    return ours, theirs


def check(tool: str, part: str, sanitizer: str, seed: int, timeout: float) -> bool:
    """Runs a part of the sweep under one tool; prints the verdict, and the report where there is something in it."""
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "1000",
        "--show-backtrace", "device", *kernel_filter(tool, sanitizer),
        *OPTIONS[tool], sys.executable, __file__, "--sweep", "--part", part, "--seed", str(seed),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout, errors="replace", check=False
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        status = -1
    seconds = time.monotonic() - started
    calls = re.search(r"sweep finished: (\d+) calls", output)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    ours, theirs = findings(output)
    # Without a summary the tool did not run to its end. A count that no parsed finding explains is ours.
    unexplained = summary is not None and int(summary.group(1)) > 0 and ours + theirs == 0
    clean = calls is not None and summary is not None and ours == 0 and not unexplained
    if clean:
        verdict = f"clean, {calls.group(1)} calls" + (f" ({theirs} findings in torch's kernels)" if theirs else "")
    elif status == -1:
        verdict = f"unfinished after {timeout:.0f} s"
    elif summary is None or calls is None:
        verdict = f"the sweep did not finish (exit status {status}, {ours} findings)"
    else:
        verdict = f"{ours or summary.group(1)} findings"
    lines = [] if clean else output.splitlines()
    lines = lines if len(lines) <= 100 else [*lines[:80], "...", *lines[-20:]]
    print("\n".join([f"{tool}, {part}: {verdict}, {seconds:.0f} s", *lines]), flush=True)
    return clean


def sweep(seed: int, parts: Sequence[str]) -> int:
    """Every kernel of these parts on small work of odd shape; returns the number of calls."""
    import torch
    from network_scenes import CUDA16, CUDA32, WIDTHS, Form, color_net, embedding_scene, make_appearance, rap_scene
    from scenes import Scene, covariances, flat, make_scene
    from test_bin import one_pile, random_blobs, to

    import rapfast
    from rapfast import PostProcess, Renderer, ops, rasterization
    from rapfast.appearance.fused import map_pixels, prepare

    picks = random.Random(seed)
    torch.manual_seed(seed)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    calls = 0

    def poison() -> None:
        """NaN in free memory; without a cache the driver may hand out the same pages again."""
        blocks = [torch.full((1 << k,), 0xFF, dtype=torch.uint8, device="cuda") for k in range(9, 21)]
        torch.cuda.synchronize()
        del blocks

    def twice(what: str, render: Callable[[], tuple[torch.Tensor, torch.Tensor, Any]]) -> None:
        """On two streams, each time in memory that is NaN: the same picture."""
        nonlocal calls
        torch.cuda.synchronize()
        pictures = []
        for stream in streams:
            poison()
            with torch.cuda.stream(stream):
                colors, alphas, _ = render()
            stream.synchronize()
            pictures.append(torch.cat([colors.double().flatten(), alphas.double().flatten()]).cpu())
            calls += 1
        if not torch.equal(*pictures):
            raise AssertionError(f"two calls differ: {what}")

    def draw(n: int, c: int, size: tuple[int, int], **options: Any) -> None:
        batch = options.pop("batch", ())
        channels, per_camera = options.pop("channels", 3), options.pop("per_camera", False)
        background, as_covars = options.pop("background", None), options.pop("as_covars", False)
        broken, backward = options.pop("broken", False), options.pop("backward", False)
        shared = options.pop("shared", False)
        scene = make_scene(
            max(n, 1), max(c, 1), batch=batch, channels=channels, sh_degree=options.get("sh_degree"),
            per_camera=per_camera, width=size[0], height=size[1], seed=picks.randrange(1 << 30), dtype=torch.float32,
        )  # fmt: skip
        if n == 0:
            scene = Scene(*(x[:0] for x in scene[:5]), *scene[5:])
        if broken:
            for x in scene[:5]:
                x.view(-1)[:: max(1, x.numel() // 7)] = picks.choice([float("nan"), float("inf"), 0.0, 1e30])
        scene = scene.to("cuda")
        if shared:  # one scene's colours for all, read where they are
            own = scene.colors[(0,) * len(batch)].contiguous()
            scene = scene._replace(colors=own.expand(*batch, *own.shape))
        if as_covars:
            options["covars"] = covariances(scene)
        if background is not None:
            image = (size[1], size[0]) if background == "image" else ()
            options["backgrounds"] = torch.rand(*batch, c, *image, channels, device="cuda")
        what = f"{n} Gaussians, {c} cameras, {size}, {options}"
        if not backward:
            twice(what, lambda: rasterization(*scene, *size, **options))
            return
        leaves = [
            x.requires_grad_() for x in (*scene, *(options.get(k) for k in ("covars", "backgrounds"))) if x is not None
        ]

        def gradients() -> tuple[torch.Tensor, torch.Tensor, Any]:
            images, alphas, meta = rasterization(*scene, *size, **options)
            entries = [meta[name] for name in ("means2d", "conics", "depths")]
            # also where a record is dead: nobody's
            weighted = [(x * torch.sin(torch.arange(x.numel(), device="cuda")).reshape(x.shape)).sum() for x in entries]
            loss = images.square().sum() + alphas.sum() + sum(weighted)
            found = torch.autograd.grad(loss, [*leaves, meta["means2d"]], allow_unused=True)
            return torch.cat([x.flatten() for x in found if x is not None]), images.detach(), None

        gradients()  # by atomics, in any order
        torch.use_deterministic_algorithms(True)
        try:
            twice(f"gradients of {what}", gradients)
        finally:
            torch.use_deterministic_algorithms(False)

    def draw_network(n: int, c: int, form: Form, kind: str, name: str, **options: Any) -> None:
        """Colours of a network of these widths, from maps, an embedding or decoded features."""
        a = make_appearance(n, c, n_maps=2, map_size=options.pop("map_size", (9, 13)))
        if options.pop("broken", False):
            a.intrinsic[:: max(1, n // 7)] = picks.choice([float("nan"), float("inf")])
        cameras = a.viewmats.float().cuda(), a.Ks.float().cuda()
        options |= {"precision": form.precision, "width": picks.randrange(1, 80), "height": picks.randrange(1, 50)}
        weights = [picks.uniform(0.0, 2.0) for _ in range(c)]
        widths, config = WIDTHS[name], {}
        if kind == "embedding":
            length = picks.randrange(1, 60)
            widths = widths | {"encoder": (111 + length, *widths["encoder"][1:])}
            scene = embedding_scene(a, color_net(form, widths), form)
            options |= {"embeddings": torch.rand(c, length, device="cuda"), "view_weights": weights}
        else:
            if kind == "sh":
                widths = {"encoder": widths["encoder"], "decoder": (*widths["decoder"][:-1], 3 * picks.choice([4, 16]))}
                config = {"use_colors_precomp": False}
            scene = rap_scene(a, color_net(form, widths), form, config)
            if kind == "decoded":
                options["decoded"] = torch.rand(c, n, widths["decoder"][-1], device="cuda")
            else:
                maps = [m.to("cuda", picks.choice([torch.float16, torch.float32])) for m in a.maps]
                options |= {"feature_maps": maps, "map_ids": [i % 2 for i in range(c)], "view_weights": weights}

        def prepared_anew() -> tuple[torch.Tensor, torch.Tensor, Any]:
            scene._networks.clear()
            return scene.render(*cameras, **options)

        twice(f"{n} Gaussians, {c} cameras, {form}, {kind}, {name}", prepared_anew)
        if kind in ("maps", "sh"):
            view = cameras[0][0], cameras[1][0]
            scene.decode(*view, maps[0], 1.5, precision=form.precision)

    posts = [
        PostProcess(size=(7, 31), dtype=torch.uint8), PostProcess(layout="CHW", dtype=torch.float16, clamp=(0.0, 1.0)),
        PostProcess(size=(61, 13), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ]  # fmt: skip

    def forward() -> None:
        nonlocal calls
        # Shapes: no Gaussian, one, around a warp and a block; one camera, a group and a bit; sizes around a tile and of
        # several regions.
        for n, c, size in [
            (0, 1, (17, 5)), (1, 1, (1, 1)), (31, 2, (16, 16)), (33, 33, (9, 31)), (257, 3, (33, 17)),
            (1000, 1, (75, 41)), (700, 2, (300, 150)),
        ]:  # fmt: skip
            draw(n, c, size, sh_degree=picks.randrange(5))
        for channels in (1, 2, 3, 4, 5, 9, 17, 33):
            draw(picks.randrange(20, 200), 2, (picks.randrange(1, 40), picks.randrange(1, 40)), channels=channels)
        for model in ("pinhole", "ortho", "fisheye"):
            for mode in ("D", "RGB+ED"):
                settings = {"camera_model": model, "render_mode": mode, "rasterize_mode": "antialiased"}
                draw(picks.randrange(50, 200), 2, (37, 23), sh_degree=picks.randrange(5), **settings)
        draw(100, 2, (33, 20), batch=(2, 2), per_camera=True, channels=6, background="image")
        for options in ({"channels": 3}, {"channels": 6}, {"channels": 33}, {"sh_degree": 3}):
            draw(picks.randrange(50, 600), 3, (33, 20), batch=(picks.randrange(2, 5),), shared=True, **options)
        draw(100, 2, (33, 20), as_covars=True, background="color")
        draw(300, 2, (50, 30), broken=True, sh_degree=2)
        draw(300, 2, (50, 30), broken=True)
        for post in posts:
            draw(100, 2, (33, 20), background="color", postprocess=post)

        # Large ellipses, more rows of tiles than a warp has lanes; and capacities that are too small, with state kept.
        s = flat(make_scene(20, 1, width=40, height=600, dtype=torch.float32, device="cuda"))
        s.scales.mul_(20)
        for capacities in ((0, 0), (3, 70), None):
            ops.render(
                s.means, s.quats, s.scales, None, s.opacities, s.colors, s.viewmats, s.Ks, None, 40, 600,
                camera_model="pinhole", antialiased=False, eps2d=0.3, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
                sh_degree=None, render_mode="RGB+D", alpha_cap=0.999, keep_state=True, capacities=capacities,
            )  # fmt: skip
            calls += 1

        # Bands of tile rows; fixed room, enough and too little, in a graph and out of it.
        s = make_scene(60, 3, sh_degree=1, width=50, height=75, seed=seed, dtype=torch.float32, device="cuda")
        f = flat(s)
        for rows in ((0, 1), (1, 3), (4, 1)):
            poison()
            ops.render(
                f.means, f.quats, f.scales, None, f.opacities, f.colors, f.viewmats, f.Ks, None, 50, 75,
                camera_model="pinhole", antialiased=True, eps2d=0.3, near_plane=0.01, far_plane=1e10, radius_clip=0.0,
                sh_degree=1, render_mode="RGB+ED", alpha_cap=0.999, tile_rows=rows, keep_state=rows[0] == 1,
            )  # fmt: skip
            calls += 1
        for post, capacity in zip((*posts, None), ((0, 0), (5, 70), (100, 30), (200, 100_000)), strict=True):
            renderer = Renderer(
                rapfast.Scene(*s[:4], sh=s.colors),
                3,
                50,
                75,
                capacity=capacity,
                postprocess=post,
                sh_degree=picks.randrange(2),
            )
            for with_graph in (False, True):
                if with_graph:
                    renderer.capture(2)
                for c in (3, 2, 0):
                    poison()
                    renderer.render(s.viewmats[:c], s.Ks[:c])
                    calls += 1

        # The stages one by one, which lay out their memory themselves.
        s = make_scene(
            200, 2, batch=(2,), sh_degree=1, width=50, height=30, seed=seed, dtype=torch.float32, device="cuda"
        )  # fmt: skip
        records = ops.project(s.means, s.quats, s.scales, None, s.opacities, s.viewmats, s.Ks, 50, 30)
        colors = ops.color(s.means, s.viewmats, s.Ks, s.colors, records, 50, 30, sh_degree=1)
        blended, alphas = ops.blend(records, colors, ops.bin(records, 50, 30), 50, 30)
        ops.composite(blended, alphas, n_color_channels=3, postprocess=PostProcess(size=(20, 20)))

    def backward() -> None:
        # Backwards: the same shapes, windows that are full and not, every path of channels, layouts of means2d.
        for n, c, size in [
            (0, 1, (17, 5)), (1, 1, (1, 1)), (31, 2, (16, 16)), (33, 66, (9, 31)), (513, 3, (33, 17)),
            (1100, 1, (75, 41)),
        ]:  # fmt: skip
            packed, absgrad = picks.random() < 0.5, picks.random() < 0.5
            draw(n, c, size, sh_degree=picks.randrange(5), backward=True, packed=packed, absgrad=absgrad)
        for channels in (1, 2, 3, 4, 5, 9, 32, 33):
            for absgrad in (False, True):
                size = (picks.randrange(1, 40), picks.randrange(1, 40))
                per_camera, packed = picks.random() < 0.5, picks.random() < 0.5
                draw(
                    picks.randrange(20, 200), 2, size, channels=channels, per_camera=per_camera, packed=packed,
                    absgrad=absgrad, backward=True,
                )  # fmt: skip
        for model in ("pinhole", "ortho", "fisheye"):
            for mode in ("D", "RGB+ED"):
                settings = {"camera_model": model, "render_mode": mode, "rasterize_mode": "antialiased"}
                draw(picks.randrange(50, 200), 2, (37, 23), sh_degree=picks.randrange(5), backward=True, **settings)
        draw(100, 2, (33, 20), batch=(2, 2), per_camera=True, channels=6, background="image", backward=True)
        draw(100, 2, (33, 20), per_camera=True, sh_degree=3, backward=True)
        draw(100, 2, (33, 20), as_covars=True, background="color", backward=True)
        draw(100, 2, (33, 20), batch=(3,), shared=True, sh_degree=1, backward=True)
        draw(300, 2, (50, 30), broken=True, sh_degree=2, backward=True)
        draw(60, 40, (9, 31), batch=(2,), sh_degree=2, backward=True)  # views in two groups
        for post in posts[1:]:
            draw(100, 2, (33, 20), background="color", postprocess=post, backward=True)

    def lists() -> None:
        nonlocal calls
        # Lists of tiles, with one region and with few, many and more: counts around a block of a sort, many images, one
        # list, room for too few, and so much that chunks are large; so many records that they come by depth first, and
        # so many in one region of many that its list is sorted part by part.
        for n, size, images, more in [
            (31, (40, 30), None, 0), (4095, (500, 400), None, 0), (4097, (1000, 900), [4096, 0, 1], 0),
            (9000, (2100, 2080), None, 0), (9000, (3000, 2900), None, 0), (120, (4112, 4100), None, 0),
            (5000, (700, 300), None, 3 << 20), (100, (100, 90), [i % 2 for i in range(200)], 0),
            (50_000, (40, 30), [30_000, 0, 20_000], 0), (50_000, (40, 30), None, 3 << 20),
            (20_000, (1000, 900), None, 0),
        ]:  # fmt: skip
            for records in (random_blobs(n, size, seed, images=images), one_pile(n, size)):
                records = to(records, torch.device("cuda"))
                poison()
                ops.bin(records, *size, capacity=picks.randrange(2 * n) + more)
                calls += 1

    def networks() -> None:
        nonlocal calls
        # Colour networks: record counts around a tile, a warp's and a block's; widths up to 128 and over; one record of
        # one Gaussian; maps of one pixel.
        for form in (CUDA16, CUDA32):
            for n, c, kind, name in [
                (0, 2, "maps", "RAP"), (1, 1, "maps", "RAP"), (33, 3, "maps", "odd"), (257, 5, "maps", "RAP"),
                (100, 2, "maps", "widest"), (31, 2, "maps", "one layer each"), (65, 3, "embedding", "just narrow"),
                (90, 2, "embedding", "widest"), (77, 4, "decoded", "RAP"), (130, 2, "sh", "RAP"),
                (60, 3, "sh", "widest"),
            ]:  # fmt: skip
                draw_network(n, c, form, kind, name)
            draw_network(50, 2, form, "maps", "RAP", map_size=(1, 1), render_mode="RGB+ED")
            draw_network(120, 3, form, "maps", "RAP", map_size=(1, 20), broken=True)

            # The stage alone, on the first of a scene's records.
            a = make_appearance(150, 3, n_maps=3)
            means, intrinsic, boxes = (x.float().cuda() for x in (a.means, a.intrinsic, a.box_coord))
            viewmats, Ks = a.viewmats.float().cuda()[None], a.Ks.float().cuda()[None]
            shape = (x.float().cuda()[None] for x in (a.quats, a.scales))
            records = ops.project(means[None], *shape, None, a.opacities.float().cuda()[None], viewmats, Ks, 75, 41)
            pixels, places = map_pixels(a.maps.cuda(), [2, 0, 1], torch.float16 if form.half else torch.float32)
            given = ops.NetworkInput("maps", torch.ones(3, dtype=torch.float64), pixels, torch.tensor(places), boxes)
            network = prepare(color_net(form), means, intrinsic, half=form.half).network
            for count in (0, 1, 15, 16, 17, 31, 33, 63, 65, picks.randrange(1, len(records.records))):
                first = ops.Records(
                    records.records[:count].clone(), records.radii[:count].clone(),
                    records.gaussian_ids[:count].clone(), records.image_offsets.clamp(max=count),
                    records.n_invalid.clone(),
                )  # fmt: skip
                poison()
                ops.color_net(means[None], viewmats, Ks, first, 75, 41, network, given, render_mode="RGB+D")
                calls += 1
            raw = prepare(color_net(form), means, intrinsic, half=form.half, part="decode", output="raw").network
            one = ops.NetworkInput("maps", torch.ones(1, dtype=torch.float64), pixels[:1], torch.tensor([0]), boxes)
            ops.network_outputs(means[None], viewmats[:, :1].contiguous(), Ks[:, :1].contiguous(), raw, one)
            calls += 1
        calls += feature_norms()

    of_part = {"forward": forward, "backward": backward, "lists": lists, "networks": networks}
    for part in parts:
        of_part[part]()
    torch.cuda.synchronize()
    return calls


def feature_norms() -> int:
    """What lies between the convolutions of the feature-map network, at odd sizes; returns the number of calls.

    Noise takes the place of what the convolutions give: initcheck does not see all that cuDNN's kernels write.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from rapfast.appearance import FeatureMapNet
    from rapfast.appearance.feature_map_cuda import HalfSteps

    class Unconvolved(HalfSteps):
        def _conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 0) -> Tensor:
            shape = F.conv2d(x.to("meta"), self.convs[name].to("meta"), None, stride, padding).shape
            return torch.randn(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)

    steps = Unconvolved(FeatureMapNet().cuda())
    cases = [(1, 33, 40), (3, 35, 64), (4, 97, 130), (2, 1, 47)]
    for n_images, height, width in cases:
        images = steps.inputs(n_images, height, width).normal_()
        made = steps.run(images, steps.scratch(n_images))
        out = torch.full_like(made, torch.nan)
        steps.finish(made, out)
        assert bool(out.isfinite().all())
    return len(cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, action="append", help="may be given more than once")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given more than once")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=540, help="seconds for a part under a tool")
    parser.add_argument("--sweep", action="store_true", help="run the sweep alone")
    options = parser.parse_args()
    if options.sweep:
        for folder in (ROOT, ROOT / "tests"):
            sys.path.insert(0, str(folder))
        print(f"sweep finished: {sweep(options.seed, options.part or PARTS)} calls", flush=True)
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("No tool was run: compute-sanitizer, of the CUDA toolkit, is neither on PATH nor in CUDA_HOME.")
        return SKIPPED
    tasks = [(tool, part) for part in options.part or PARTS for tool in options.tool or TOOLS]
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = pool.map(lambda task: check(*task, sanitizer, options.seed, options.timeout), tasks)
        return 0 if all([*verdicts]) else 1


if __name__ == "__main__":
    sys.exit(main())
