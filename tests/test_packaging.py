"""What the build files, the folders and the built module say about each other."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import rapfast
from rapfast import _native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".in", ".map", ".txt"}


def read(path: str) -> str:
    return (ROOT / path).read_text()


def cmake_list(file: str, name: str) -> list[str]:
    """The items of `set(NAME ...)`, which must be there exactly once as a literal list."""
    found = re.findall(rf"^set\({name}\s*([^)$]*)\)", read(file), re.MULTILINE)
    assert len(found) == 1, f"{file} must set {name} once, as a plain list"
    return found[0].split()


def python(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads(read("pyproject.toml"))


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module: importing it defines its functions and builds nothing."""
    spec = importlib.util.spec_from_file_location("rapfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cmake() -> str:
    """The cmake of the test extra."""
    module = importlib.import_module("cmake")
    return str(Path(module.CMAKE_BIN_DIR, "cmake"))


# ---------------------------------------------------------------------------------- source lists


def test_cmake_lists_every_source_of_csrc() -> None:
    lists = ["RAPFAST_CPU_SOURCES", "RAPFAST_BASELINE_SOURCES", "RAPFAST_MODULE_SOURCES"]
    listed = [source for name in lists for source in cmake_list("CMakeLists.txt", name)]
    listed += cmake_list("CMakeLists.txt", "RAPFAST_CUDA_SOURCES")
    listed += [f"csrc/cuda/{s}.cu" for s in cmake_list("CMakeLists.txt", "RAPFAST_CUDA_STAGES")]
    test_sources = cmake_list("csrc/tests/CMakeLists.txt", "RAPFAST_TEST_SOURCES")
    listed += [f"csrc/tests/{source}" for source in test_sources]
    on_disk = [p.relative_to(ROOT).as_posix() for s in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(s)]
    assert sorted(listed) == sorted(on_disk)


def test_only_csrc_cpu_is_compiled_for_the_chosen_cpu() -> None:
    fast = cmake_list("CMakeLists.txt", "RAPFAST_CPU_SOURCES")
    assert all(source.startswith("csrc/cpu/") for source in fast)
    baseline = cmake_list("CMakeLists.txt", "RAPFAST_BASELINE_SOURCES")
    baseline += cmake_list("CMakeLists.txt", "RAPFAST_MODULE_SOURCES")
    assert not any(source.startswith("csrc/cpu/") for source in baseline)
    assert fast and baseline
    # CMake's own account of the build that the module under test came from.
    commands = ROOT / "build" / sysconfig.get_config_var("SOABI") / "compile_commands.json"
    if not commands.is_file():
        pytest.skip("the module was not built in this checkout")
    for entry in json.loads(commands.read_text()):
        source = Path(entry["file"]).relative_to(ROOT).as_posix()
        chosen = f"-march={_native._C.build_info()['cpu_arch']}" in entry["command"]
        assert chosen == (source in fast and platform.machine() == "x86_64"), source


def test_every_stage_has_its_header_and_its_cpu_file() -> None:
    for stage in ("project", "color", "color_net", "bin", "blend", "composite"):
        assert (ROOT / f"csrc/{stage}.h").is_file()
        assert (ROOT / f"csrc/cpu/{stage}.cpp").is_file()
    for stage in ("project", "color", "blend", "composite"):
        assert (ROOT / f"csrc/{stage}_bwd.h").is_file()
        assert (ROOT / f"csrc/cpu/{stage}_bwd.cpp").is_file()


def test_native_sources_include_no_torch() -> None:
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)')
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not include.search(path.read_text()), path
    for file in ("CMakeLists.txt", "csrc/tests/CMakeLists.txt"):
        assert not re.search(r"find_package\(\s*torch|TORCH_", read(file), re.IGNORECASE), file


def test_source_distribution_names_every_kind_of_source() -> None:
    rules = {
        line.split()[1]: line.split()[2:]
        for line in read("MANIFEST.in").splitlines()
        if line.startswith("recursive-include")
    }
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert path.suffix in SOURCE_SUFFIXES, f"{path.name} is of no kind that belongs in csrc"
            assert any(path.match(pattern) for pattern in rules["csrc"]), f"{path} is not in MANIFEST.in"
    for name in ("CMakeLists.txt", "LICENSE", "Makefile", "setup.py"):
        assert name in read("MANIFEST.in")
        assert (ROOT / name).is_file()


# --------------------------------------------------------------------------------------- metadata


def test_version_is_the_same_everywhere() -> None:
    assert rapfast.__version__ == _native._C.build_info()["version"]
    try:
        assert rapfast.__version__ == metadata.version("rapfast")
    except metadata.PackageNotFoundError:
        pytest.skip("rapfast is on the path and not installed for this Python")
    literal = re.compile(rf"(?<![\d.]){re.escape(rapfast.__version__)}(?![\d.])")
    for file in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert not literal.search(read(file)), f"{file} repeats the version of rapfast/_version.py"


def test_extras_and_requirements(pyproject: dict) -> None:
    project = pyproject["project"]
    assert set(project["optional-dependencies"]) == {"video", "augment", "formats", "bench", "test"}
    assert "gsplat==1.5.3" in project["optional-dependencies"]["bench"]
    names = [re.match(r"[\w-]+", r)[0] for r in project["dependencies"]]
    assert names == ["torch", "numpy", "pillow", "tyro", "rich"]
    assert not any("torch" in r for r in pyproject["build-system"]["requires"])
    assert project["requires-python"] == ">=3.10"
    assert project["scripts"] == {"rapfast": "rapfast.cli:main"}


def test_info_knows_the_extra_of_every_optional_package(pyproject: dict) -> None:
    from rapfast.info import PACKAGES

    extras = pyproject["project"]["optional-dependencies"]
    for name, extra in PACKAGES.items():
        requirements = pyproject["project"]["dependencies"] if extra is None else extras[extra]
        assert any(re.match(rf"{name}\b(?!-)", r) for r in requirements), (name, extra)


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)
    assert re.fullmatch(r"(#.*\n)*torch==[\d.]+\n", read(".ci/constraints.txt"))


# -------------------------------------------------------------------------------------- the module


def test_module_exports_its_entry_point_only() -> None:
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm of binutils")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", _native._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[-1] for line in listing.stdout.splitlines()] == ["PyInit__C"]


def test_module_links_no_cuda_and_no_openmp_library() -> None:
    ldd = shutil.which("ldd")
    if ldd is None or sys.platform != "linux":
        pytest.skip("needs ldd")
    listing = subprocess.run([ldd, _native._C.__file__], capture_output=True, text=True, check=True)
    assert not re.search(r"libcud|libcudart|libgomp|libomp|libtorch|libc10", listing.stdout)


def test_import_brings_only_torch_and_numpy() -> None:
    # torch's compiler takes as long to load as the rest of torch
    others = ("PIL", "tyro", "rich", "av", "gsply", "gsplat", "matplotlib", "torch._dynamo")
    code = f"import sys, rapfast; print([name for name in {others} if name in sys.modules])"
    run = python("-c", code)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_import_with_no_visible_device_and_after_fork() -> None:
    code = """
import os, sys
pid = os.fork()
import rapfast
from rapfast._native import _C
assert _C.cpu_supported() and _C.cpu_missing() == []
if pid == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
pid = os.fork()  # and once more with the module loaded
if pid == 0:
    answer = _C.cuda_devices()
    os._exit(0 if answer["devices"] == [] and answer["reason"].endswith(".") else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    run = python("-c", code, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr


def fake_native(version: str = rapfast.__version__, missing: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(
        build_info=lambda: {"version": version, "cpu_arch": "x86-64-v4"},
        cpu_missing=lambda: list(missing),
    )


def test_wrong_cpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapfast._C", fake_native(missing=("AVX512F", "AVX512BW")))
    with pytest.raises(ImportError, match="built for x86-64-v4 and this CPU lacks AVX512F, AVX512BW: reinstall"):
        _native.load()


def test_module_of_another_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapfast._C", fake_native(version="0.0.7"))
    with pytest.raises(ImportError, match="built for version 0.0.7 and the package is .*: run"):
        _native.load()


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A folder with a rapfast that is no more than what loads the native module."""
    package = tmp_path / "rapfast"
    package.mkdir()
    for name in ("_native.py", "_version.py"):
        shutil.copy(ROOT / "rapfast" / name, package)
    (package / "__init__.py").touch()
    return tmp_path


def import_error(folder: Path) -> str:
    # -S keeps site-packages out, and with them the installed rapfast.
    run = python("-S", "-c", "import rapfast._native", cwd=folder)
    assert run.returncode == 1
    return run.stderr.strip().splitlines()[-1]


def test_unbuilt_module_is_one_sentence(bare_package: Path) -> None:
    assert import_error(bare_package).startswith(
        "ImportError: rapfast's native module is not built: run 'pip install -e .'"
    )


def test_unloadable_module_is_one_sentence(bare_package: Path) -> None:
    module = bare_package / "rapfast" / Path(_native._C.__file__).name
    module.write_bytes(b"\x7fELF of nothing")
    assert import_error(bare_package).startswith("ImportError: rapfast's native module cannot be loaded (")


# ----------------------------------------------------------------------------- setup.py and CMake


def test_cmake_gets_the_build_environments_paths_each_time(setup_py: ModuleType) -> None:
    options = setup_py.cmake_options({}, "/env/bin/ninja", "/env/share/pybind11")
    assert f"-DPython_EXECUTABLE={sys.executable}" in options
    assert "-Dpybind11_DIR=/env/share/pybind11" in options
    assert "-DCMAKE_MAKE_PROGRAM:FILEPATH=/env/bin/ninja" in options
    assert options[options.index("-G") + 1] == "Ninja"
    # Every setting is passed every time, so that none of an earlier build stays in CMake's cache.
    for option in ("RAPFAST_CUDA=auto", "RAPFAST_CUDA_ARCHS=", "RAPFAST_CPU_ARCH=x86-64-v3"):
        assert f"-D{option}" in options
    assert not any("torch" in option.partition("=")[0].lower() for option in options)


def test_environment_reaches_cmake(setup_py: ModuleType) -> None:
    env = {
        "RAPFAST_CUDA": "0",
        "RAPFAST_CUDA_ARCHS": "80;90",
        "RAPFAST_CPU_ARCH": "native",
        "CMAKE_ARGS": "-DA=1 '-DB=2 3'",
    }
    options = setup_py.cmake_options(env, None, "/p")
    for option in ("-DRAPFAST_CUDA=0", "-DRAPFAST_CUDA_ARCHS=80;90", "-DRAPFAST_CPU_ARCH=native"):
        assert option in options
    assert options[-2:] == ["-DA=1", "-DB=2 3"]
    assert options[options.index("-G") + 1] == "Unix Makefiles"


def test_build_folder_of_other_settings_is_emptied(setup_py: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "build" / "abi"
    setup_py.keep_or_drop(folder, "Ninja")
    (folder / "CMakeCache.txt").touch()
    setup_py.keep_or_drop(folder, "Ninja")
    assert (folder / "CMakeCache.txt").exists()
    setup_py.keep_or_drop(folder, "Unix Makefiles")
    assert not (folder / "CMakeCache.txt").exists()


def configure(cmake: str, build: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [cmake, "-S", str(ROOT), "-B", str(build), "-DRAPFAST_CUDA=0", *options]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-DRAPFAST_CUDA=yes"], "RAPFAST_CUDA must be auto, 0 or 1, got 'yes'."),
        (["-DRAPFAST_CPU_ARCH=z80"], "-march takes, such as x86-64-v3, got 'z80'."),
    ],
)
def test_wrong_option_is_one_sentence(cmake: str, tmp_path: Path, options: list[str], sentence: str) -> None:
    run = configure(cmake, tmp_path, *options)
    assert run.returncode != 0
    assert sentence in " ".join(run.stderr.split())


def test_cuda_without_nvcc_is_one_sentence(cmake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CMake is told to ignore the folders that hold a nvcc, and which other tools to take."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = [*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin"]
    with_nvcc = [folder for folder in folders if Path(folder, "nvcc").exists()]
    ninja = Path(importlib.import_module("ninja").BIN_DIR, "ninja")
    run = configure(
        cmake,
        tmp_path,
        "-DRAPFAST_CUDA=1",
        f"-DCMAKE_IGNORE_PATH={';'.join(with_nvcc)}",
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_CXX_COMPILER={shutil.which('c++') or shutil.which('clang++')}",
    )
    assert run.returncode != 0
    assert "RAPFAST_CUDA=1 but nvcc was not found" in " ".join(run.stderr.split())
