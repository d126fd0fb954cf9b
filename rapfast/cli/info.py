"""`rapfast info`: versions, build options, devices, and what is missing."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass

from .. import info
from .common import Command


@dataclass(kw_only=True)
class Info(Command):
    """Show versions, build options, devices, and what is missing and how to get it.

    By example:

    rapfast info
    rapfast info --json | jq .cuda
    """

    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        """Collect and print."""
        found = info.collect()
        print(json_module.dumps(found, indent=2) if self.json else info.format_text(found))
