"""The `rapfast` command: info, render, demo, rvs, augment, convert, profile, bench, compare, tune.

Each subcommand is a dataclass whose fields are its options and whose `run()` does the work; tyro turns the fields and
their docstrings into the parser and its help. Whatever goes wrong ends in one sentence on stderr and an exit status:
2 for input, output or an option that cannot be used, 1 for a fault of rapfast's own, 130 after Ctrl-C. `run()` may
return a status of its own.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence

from .._version import __version__
from .common import Command, sentence

__all__ = ["main"]

# tyro keeps blank lines and lines that begin with a space as they are.
_DESCRIPTION = """Render scenes of 3D Gaussians to pictures and films.

rapfast demo --out demo
  a furnished room, rendered from all sides; no download

rapfast render guitar.ply --orbit 24 --out pictures
  any scene, with cameras made for it

rapfast render scene.ply --cameras sparse/0 --out pictures
  with the capture's own cameras: COLMAP, transforms.json, cameras.json

rapfast rvs output/church --poses data/church/sparse/0 --views 5000 --out church_views
  random views of a RAP scene around known poses, as pictures, poses and a manifest

rapfast augment --batch --provider synthetic --video_list demo --output_root films
  an avatar's video from other viewpoints, a film for each set of camera parameters

rapfast convert scene.ply scene.spz
  another file format

rapfast info
  versions, devices, what is missing; rapfast --version: that of rapfast alone

rapfast profile -- render scene.ply --orbit 24 --out pictures
  where the time and the memory of a command go; also: rapfast bench, compare, tune

`rapfast COMMAND --help` explains a command by examples."""

_PASS_ON = ("profile", "bench")
"""Commands whose words behind -- are another's."""

# Faults of the input or of the machine, which the sentence of the exception explains.
_EXPECTED = (OSError, ValueError, TypeError, ImportError, RuntimeError, NotImplementedError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"rapfast {__version__}")
        return 0
    try:
        command = parse(arguments)
    except SystemExit as stop:  # help was shown, or tyro explained what it could not parse
        return stop.code if isinstance(stop.code, int) else 2
    try:
        status = command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; finished files are kept, none is half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rapfast info | head`: the reader has left, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if command.debug:
            traceback.print_exc()
        expected = isinstance(error, _EXPECTED)
        hint = "" if expected else " (a fault of rapfast's own: --debug shows where)"
        print(f"rapfast: {sentence(error)}{hint}", file=sys.stderr)
        return 2 if expected else 1
    return status or 0


def parse(arguments: list[str]) -> Command:
    """The command with its options; SystemExit where help was asked for or it cannot be parsed."""
    try:
        import tyro
    except ImportError:
        print("rapfast: the command line needs tyro and rich: pip install tyro rich", file=sys.stderr)
        raise SystemExit(2) from None
    from .augment import Augment
    from .bench import Bench
    from .compare import Compare
    from .convert import Convert
    from .demo import Demo
    from .info import Info
    from .profile import Profile
    from .render import Render
    from .rvs import Rvs
    from .tune import Tune

    commands = {
        "render": Render, "demo": Demo, "rvs": Rvs, "augment": Augment, "convert": Convert, "info": Info,
        "profile": Profile, "bench": Bench, "compare": Compare, "tune": Tune,
    }  # fmt: skip
    words: list[str] = []
    if arguments[:1] == ["profile"] and not {"--", "-h", "--help"} & set(arguments):
        arguments = arguments[:1]  # which says that -- is missing, where tyro would call the command an unknown option
    passes_on = bool(arguments) and arguments[0] in _PASS_ON and "--" in arguments
    if passes_on:
        place = arguments.index("--")
        arguments, words = arguments[:place], arguments[place + 1 :]
    command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="rapfast", description=_DESCRIPTION, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return dataclasses.replace(command, words=tuple(words)) if passes_on else command
