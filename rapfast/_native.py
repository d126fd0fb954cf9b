"""Loads the native module, or says in one sentence why it cannot be used here."""

from __future__ import annotations

import importlib
from types import ModuleType

from rapfast._version import __version__

_INSTALL = "run 'pip install -e .' in the repository (or reinstall rapfast)"


def load() -> ModuleType:
    """Imports ``rapfast._C`` and checks that it can run here. No CUDA call is made.

    Returns: the native module.
    Raises: ImportError, in one sentence, where the module is not built, was built for another
        version of the package or cannot be loaded, or where this CPU lacks an instruction set it
        was compiled for.
    """
    try:
        native = importlib.import_module("rapfast._C")
    except ModuleNotFoundError as error:
        if error.name != "rapfast._C":
            raise
        raise ImportError(f"rapfast's native module is not built: {_INSTALL}.") from None
    except ImportError as error:
        raise ImportError(f"rapfast's native module cannot be loaded ({error}): {_INSTALL}.") from error
    check(native)
    return native


def check(native: ModuleType) -> None:
    """Raises ImportError where ``native`` is of another version or this CPU cannot run it."""
    built = native.build_info()
    if built["version"] != __version__:
        raise ImportError(
            f"rapfast's native module was built for version {built['version']} and the package is "
            f"{__version__}: {_INSTALL}."
        )
    missing = native.cpu_missing()
    if missing:
        raise ImportError(
            f"rapfast was built for {built['cpu_arch']} and this CPU lacks {', '.join(missing)}: "
            "reinstall it from source on this machine with RAPFAST_CPU_ARCH=native in the "
            "environment (x86-64 instead of native runs on every CPU)."
        )


_C = load()
