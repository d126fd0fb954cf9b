"""Builds rapfast._C by CMake; everything else about the package is in pyproject.toml.

Environment: RAPFAST_CUDA, RAPFAST_CUDA_ARCHS, RAPFAST_CPU_ARCH (CMakeLists.txt explains them), CXX,
CMAKE_ARGS, CMAKE_BUILD_TYPE, CMAKE_BUILD_PARALLEL_LEVEL.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(sentence: str) -> NoReturn:
    """Ends the build with one sentence as the last thing that pip shows."""
    raise SystemExit(f"error: {sentence}")


def find_tool(name: str, folder_variable: str) -> str | None:
    """The path of cmake or ninja: of the Python package of that name, else on PATH.

    Under build isolation the package is in an environment that is deleted after the build, so a
    path found once must never be relied on at the next build.
    """
    if importlib.util.find_spec(name) is not None:
        folder = getattr(importlib.import_module(name), folder_variable, None)
        program = Path(folder, name) if folder else None
        if program is not None and program.is_file():
            return str(program)
    return shutil.which(name)


def cmake_options(env: dict[str, str], ninja: str | None, pybind11_dir: str) -> list[str]:
    """CMake's arguments for the module; paths into the build environment are given every time."""
    options = [
        "-DRAPFAST_PYTHON_MODULE=ON",
        "-DRAPFAST_TESTS=OFF",
        f"-DRAPFAST_CUDA={env.get('RAPFAST_CUDA') or 'auto'}",
        f"-DRAPFAST_CUDA_ARCHS={env.get('RAPFAST_CUDA_ARCHS', '')}",
        f"-DRAPFAST_CPU_ARCH={env.get('RAPFAST_CPU_ARCH') or 'x86-64-v3'}",
        f"-DCMAKE_BUILD_TYPE={env.get('CMAKE_BUILD_TYPE') or 'Release'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_dir}",
    ]
    if ninja is not None:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM:FILEPATH={ninja}"]
    else:
        options += ["-G", "Unix Makefiles"]
    return options + shlex.split(env.get("CMAKE_ARGS", ""))


def keep_or_drop(build_dir: Path, settings: str) -> None:
    """Empties a build folder that was configured with settings CMake cannot change afterwards."""
    stamp = build_dir / "rapfast_settings.txt"
    if build_dir.exists() and not (stamp.is_file() and stamp.read_text() == settings):
        shutil.rmtree(build_dir)
    build_dir.mkdir(parents=True, exist_ok=True)
    stamp.write_text(settings)


class CMakeExtension(Extension):
    """An extension whose sources CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Builds each CMakeExtension in build/<Python ABI>, which the next build reuses."""

    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            fail(
                "cmake was not found: install it (pip install cmake), or leave "
                "--no-build-isolation out."
            )
        cxx = os.environ.get("CXX", "")
        candidates = shlex.split(cxx)[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in candidates):
            fail(
                f"no C++ compiler was found ({', '.join(candidates)}): rapfast needs gcc 11 or "
                "newer, or clang (on Debian and Ubuntu: apt install g++)."
            )
        try:
            import pybind11
        except ImportError:
            fail(
                "pybind11 was not found: install it (pip install pybind11), or leave "
                "--no-build-isolation out."
            )

        ninja = find_tool("ninja", "BIN_DIR")
        options = cmake_options(dict(os.environ), ninja, pybind11.get_cmake_dir())
        generator = options[options.index("-G") + 1]
        build_dir = ROOT / "build" / sysconfig.get_config_var("SOABI")
        keep_or_drop(
            build_dir, "\n".join([str(ROOT), generator, cxx, sysconfig.get_path("include")])
        )
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), *options]
        build = [cmake, "--build", str(build_dir), "--target", "_C", "--parallel", jobs]
        for command in (configure, build):
            if subprocess.run(command).returncode != 0:
                fail(
                    "the native module could not be built: the lines above, from CMake or the "
                    "compiler, say why."
                )

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / target.name, target)


if __name__ == "__main__":
    setup(ext_modules=[CMakeExtension("rapfast._C")], cmdclass={"build_ext": CMakeBuild})
