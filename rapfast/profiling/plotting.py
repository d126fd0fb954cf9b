"""matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files alone.

    Raises:
        ImportError: says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'rapfast[bench]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
