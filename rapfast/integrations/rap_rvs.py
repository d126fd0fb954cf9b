"""rapfast's random views inside RAP's training: its three renderers are replaced, its files stay as they are.

    import utils.nvs_utils                      # RAP's module of the renderers, whatever its name
    from rapfast.integrations.rap import install_rvs
    install_rvs(utils.nvs_utils)

A class of rapfast stands then for each of RAP's in every module that has imported it, with a star or by name. Where
RAP's configs, data set or camera parameters have other attributes than `rapfast.rvs.renderers.ROLES` says, `names` and
`values` tell. Call it before RAP makes a renderer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rapfast import _check as check
from rapfast.rvs import renderers

CLASSES = ("GaussianRenderer", "GaussianRendererWithAttempts", "GaussianRendererWithBrisqueAttempts")


def install_rvs(
    module: ModuleType, *, names: Mapping[str, str] | None = None, values: Mapping[str, Any] | None = None
) -> dict[str, type]:
    """Put rapfast's renderers in the place of RAP's three. Again with other options: those hold.

    Args:
        module: RAP's module in which they are defined, imported.
        names: attributes of roles that differ from `ROLES`, such as {"translation": "rvs_range"}.
        values: what roles are, in place of any attribute, such as {"appearance_augmentation": False}. A renderer takes
            them along into its process, so they must be able to be pickled.

    Returns:
        The three classes by name.

    Raises:
        TypeError, ValueError: `module` is no module or lacks a class, or a role is not known.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"module must be RAP's module of the renderers, got {check.describe(module)}")
    for argument, given in (("names", names), ("values", values)):
        for role in given or {}:
            if role not in renderers.ROLES:
                raise ValueError(f"{argument} must have keys of {', '.join(renderers.ROLES)}, got {role!r}")
    missing = [name for name in CLASSES if not isinstance(getattr(module, name, None), type)]
    if missing:
        raise TypeError(f"{module.__name__} must have the classes {', '.join(CLASSES)}, it has no {missing[0]}")
    options = renderers.RendererOptions(dict(names or {}), dict(values or {}))
    replaced: dict[type, type] = {}
    made: dict[str, type] = {}
    for name in CLASSES:
        before = getattr(module, name)
        original = getattr(before, "rapfast_original", before)
        base = getattr(renderers, name)
        contents = {"rapfast_base": base, "rapfast_original": original, "rapfast_options": options}
        made[name] = type(name, (base,), contents | {"__doc__": base.__doc__, "__module__": module.__name__})
        replaced[before] = made[name]
    for before in replaced:
        for child in before.__subclasses__():
            if child not in replaced:
                warnings.warn(
                    f"{child.__module__}.{child.__qualname__} is made of {before.__name__} as it was, and stays so",
                    RuntimeWarning,
                    stacklevel=2,
                )
    _swap(replaced)
    return made


def uninstall_rvs(module: ModuleType) -> None:
    """Take `install_rvs` back, in every module. Harmless where nothing is installed."""
    found = [value for name in CLASSES if isinstance(value := getattr(module, name, None), type)]
    _swap({value: value.rapfast_original for value in found if hasattr(value, "rapfast_original")})


def _swap(replaced: Mapping[type, type]) -> None:
    """In the names of all modules. By identity: what else is in there may not be hashable, or warn when touched."""
    by_id = {id(before): after for before, after in replaced.items()}
    for module in list(sys.modules.values()):
        contents = getattr(module, "__dict__", None)
        if not isinstance(contents, dict):
            continue
        for name, value in list(contents.items()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])
