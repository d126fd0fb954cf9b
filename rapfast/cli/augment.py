"""`rapfast augment`: films of avatars under sets of camera parameters."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from .. import __version__
from ..augment import (
    DIFFICULTIES,
    AugmentationJob,
    Budget,
    Difficulty,
    FilmOptions,
    OutputFolder,
    ParameterSet,
    Provider,
    load_provider,
    parameter_sets,
    read_difficulties,
)
from ..augment.output import check_video_name
from ..media import require_av
from .augment_report import FrameProgress, failure_sentence, plan_table, summary_lines
from .common import Command, check_file, parse_bytes, parse_device, typed

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@dataclass(kw_only=True)
class Augment(Command):
    """Render tracked videos of avatars from other viewpoints: a film for each video and set of camera parameters.

    By example:

    rapfast augment --batch --provider synthetic --video_list demo --output_root out
      a procedural person, no data needed: out/easy/demo/render_fixed_viewpoint/demo/demo_fixed_viewpoint_video.mp4,
      and medium and hard beside it.

    rapfast augment --batch --video_list A B --tracked_root tracked --output_root out --difficulties easy hard
      videos tracked/A and tracked/B, as docs/augmentation.md describes their files.

    rapfast augment --batch --provider my_avatar:GuavaProvider --video_list_file videos.txt --output_root out
      your own avatar system: an object of a Python module on the path (or in this folder).

    rapfast augment --batch --video_list_file part7.txt --tracked_root tracked --output_root out --part_id 7
      a shard of a job array, with a parameter file of its own, augmentation_params_part7.json.

    With --batch a model is loaded once, a video once, and each frame deformed once, however many sets there are.
    Without it each video and set has a process of its own, which loads and precomputes everything anew: the old way,
    for comparison.

    Interrupted, even killed, and given again, the command goes on with the films that are missing. Only one process at
    a time may write to a folder; shards with a --part_id of their own may share one.
    """

    output_root: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the films; made where it does not exist."""

    video_list: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Videos, by name."""

    video_list_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Videos, a name on each line; empty lines and those that begin with # are left out."""

    tracked_root: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the tracked videos, for providers that read files."""

    batch: bool = False
    """Load once and precompute once, for all sets; else a process for each video and set."""

    difficulties: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Sets of camera parameters. Default: easy medium hard, or all of --difficulties_file."""

    difficulties_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON with ranges of your own, as {"studio": {"yaw": [-60, 60], "pitch": 10}}."""

    sets: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Viewpoints drawn for each difficulty; above 1 their folders are easy_00, easy_01, ..."""

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET ...")] = ()
    """Of these sets, render only some."""

    seed: int = 0
    """Seed of all draws."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """A GPU's number, or auto, cpu, cuda, cuda:NUMBER."""

    part_id: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Number of this shard (a SLURM array index): it gets a parameter file of its own."""

    save_frame_png: bool = False
    """Write each frame as a PNG too, into frames/ beside the film."""

    provider: Annotated[str, tyro.conf.arg(metavar="NAME|MODULE:OBJECT")] = "disk"
    """Avatar system: disk, synthetic, or an object of a Python module."""

    provider_args: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Arguments of the provider, such as frames=30 gaussians=20000 of the synthetic one."""

    quality: int = 18
    """x264's constant rate factor, 0 to 51; lower is better and larger."""

    preset: Annotated[str, tyro.conf.arg(metavar="PRESET")] = "veryfast"
    """x264's preset, ultrafast to veryslow."""

    encoder_threads: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Threads that share a film's frames; films of several sets are encoded side by side besides."""

    odd_size: Annotated[str, tyro.conf.arg(metavar="pad|refuse")] = "pad"
    """H.264 needs even sides: pad odd ones by one pixel, or refuse such videos. Nothing is ever scaled."""

    views: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Images rendered in one call, or a frame in all sets side by side where those are more; changes no pixel."""

    sets_together: Annotated[int, tyro.conf.arg(metavar="N")] = 16
    """Sets rendered side by side, at most."""

    gpu_memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """For precomputed frames, such as 8GiB. Default: half of what is free."""

    host_memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """For frames that do not fit there. Default: a quarter of what is free."""

    asset_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for frames that fit in neither; its files vanish with the process. Default: the output folder."""

    dry_run: bool = False
    """Show what would be rendered, and write nothing."""

    overwrite: bool = False
    """Render these films anew, in a folder of other settings too, whose films are then no longer listed."""

    def run(self) -> None:
        """Check everything that can be checked, then render what is not there."""
        device = self._check()
        videos, sets = self._videos(), self._sets()
        provider = self.make_provider()
        if self.dry_run:
            folder = self._folder(self._job(provider, sets, device))
            if not self.overwrite:
                folder.look()
                self.compare_roots(folder)
            print(plan_table(folder, videos, sets, self.seed, provider, self.overwrite))
            return
        require_av()
        if not self.batch:
            from .augment_processes import one_process_per_set

            one_process_per_set(self, videos, sets, self._folder(self._job(provider, sets, device)))
            return
        job = self._job(provider, sets, device)
        try:
            with self._folder(job) as folder, FrameProgress() as progress:
                self.compare_roots(folder)
                summary = job.run(videos, folder, progress.update, overwrite=self.overwrite)
        except torch.cuda.OutOfMemoryError:
            raise RuntimeError("out of GPU memory: give smaller --views, --sets_together or --gpu_memory") from None
        except MemoryError:
            raise RuntimeError("out of memory: give smaller --views, --sets_together or --host_memory") from None
        for line in summary_lines(summary, folder):
            print(line)
        if summary.failures:
            raise ValueError(failure_sentence(summary)) from summary.failures[0].error

    def compare_roots(self, folder: OutputFolder) -> None:
        """Tell where films are kept that were made of videos in another folder."""
        before = folder.noted.get("tracked_root", self.tracked_root)
        if before != self.tracked_root and folder.films:
            print(
                f"note: films that are there were made of the videos in {before}, and are kept; --overwrite makes them "
                "anew",
                file=sys.stderr,
            )

    def make_provider(self) -> Provider:
        """The provider of --provider, with its arguments."""
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` does: a module in the current folder is found
        if self.provider == "disk" and self.tracked_root is None:
            raise ValueError(
                "--tracked_root must name the folder of the tracked videos; to try the command without any, give "
                "--provider synthetic"
            )
        arguments = _arguments(self.provider_args)
        with typed("provider", "--provider"):
            return load_provider(self.provider, self.tracked_root, arguments)

    def _job(self, provider: Provider, sets: list[ParameterSet], device: torch.device) -> AugmentationJob:
        return AugmentationJob(
            provider, sets, device, seed=self.seed, budget=self._budget(), views=self.views,
            films=FilmOptions(self.quality, self.preset, self.encoder_threads, self.save_frame_png),
            sets_together=self.sets_together, pad=self.odd_size == "pad",
        )  # fmt: skip

    def _folder(self, job: AugmentationJob) -> OutputFolder:
        folder = job.folder(self.output_root, part_id=self.part_id, overwrite=self.overwrite)
        folder.settings["provider"] = self.provider
        if type(job.provider).describe is Provider.describe:
            known = ("near_plane", "alpha_cap")  # which are among the settings
            given = _arguments(self.provider_args).items()
            folder.settings |= {f"provider.{name}": value for name, value in given if name not in known}
        versions = {"rapfast": __version__, "torch": torch.__version__}
        folder.head = {"versions": versions, "tracked_root": self.tracked_root}
        return folder

    def _budget(self) -> Budget:
        sizes = (
            None if text is None else parse_bytes(text, option)
            for text, option in ((self.gpu_memory, "--gpu_memory"), (self.host_memory, "--host_memory"))
        )
        return Budget(*sizes, self.output_root if self.asset_dir is None else self.asset_dir)

    def _check(self) -> torch.device:
        for name in ("sets", "encoder_threads", "views", "sets_together"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"--seed must be within 0..2^64 - 1, got {self.seed}")
        if not 0 <= self.quality <= 51:
            raise ValueError(f"--quality must be within 0..51, got {self.quality}")
        if self.preset not in PRESETS:
            raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.odd_size not in ("pad", "refuse"):
            raise ValueError(f"--odd_size must be pad or refuse, got {self.odd_size!r}")
        if self.part_id is not None and self.part_id < 0:
            raise ValueError(f"--part_id must not be negative, got {self.part_id}")
        self._budget()
        if self.asset_dir is not None and not self.asset_dir.is_dir():
            raise ValueError(f"--asset_dir must be a folder, and {self.asset_dir} is none")
        device = parse_device(f"cuda:{self.device}" if self.device.isdigit() else self.device)
        if self.gpu_memory is not None and device.type != "cuda":
            raise ValueError(f"--gpu_memory is of a GPU, and --device {self.device} has none: give --host_memory")
        return device

    def _videos(self) -> list[str]:
        names = list(self.video_list)
        if self.video_list_file is not None:
            check_file(self.video_list_file, "--video_list_file")
            try:
                lines = self.video_list_file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                raise ValueError(f"{self.video_list_file}: must be a text file of names, one on a line") from None
            names += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not names:
            raise ValueError("give videos: --video_list NAME ..., or --video_list_file FILE with a name on each line")
        return [check_video_name(name) for name in dict.fromkeys(names)]

    def _sets(self) -> list[ParameterSet]:
        known: dict[str, Difficulty] = dict(DIFFICULTIES)
        names = self.difficulties or tuple(DIFFICULTIES)
        if self.difficulties_file is not None:
            own = read_difficulties(check_file(self.difficulties_file, "--difficulties_file"))
            known |= own
            names = self.difficulties or tuple(own)
        try:
            sets = parameter_sets(names, known, self.sets)
        except ValueError as error:
            raise ValueError(f"--difficulties: {error}") from None
        unknown = [name for name in self.only if name not in {s.name for s in sets}]
        if unknown:
            raise ValueError(f"--only: there is no set {unknown[0]!r} among {', '.join(s.name for s in sets)}")
        return [s for s in sets if not self.only or s.name in self.only]


def _arguments(texts: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE; a value that is JSON (a number, true) is what it says, anything else is text."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--provider_args must be KEY=VALUE, as frames=30; got {text!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
