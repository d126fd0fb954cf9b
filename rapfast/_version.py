"""The version of rapfast: the only copy, read by pyproject.toml and CMakeLists.txt too."""

__version__ = "0.1.0"
