# make demo    renders the demo scene to demo_out/
# make test    the native test programs, then pytest (ARGS="-k ply" is handed to pytest)
# make bench   the benchmarks, written to bench_out/run.json (bench/README.md tells what to do with it)
# make clean   removes all that these wrote
#
# The first three make .venv and install rapfast into it, and install again when a source of the
# native module changed. They need Python 3.10 or newer (PYTHON=... picks one), make and a C++
# compiler. pip's settings, such as PIP_CONSTRAINT, and the build's, such as RAPFAST_CUDA=0, are
# taken from the environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# The native test programs want the kernels only where they can run.
GPU := $(shell nvidia-smi -L 2>/dev/null)
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml rapfast/_version.py
# Overrides a PYTHONPATH that could put another rapfast before this one.
export PYTHONPATH :=

.PHONY: demo test bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-video
	$(BIN)/rapfast demo --out demo_out --overwrite

test: $(VENV)/.installed-test
	$(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  $(if $(GPU),,-DRAPFAST_CUDA=0)
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest --output-on-failure
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed-bench
	mkdir -p bench_out
	$(BIN)/python -m pytest bench --benchmark-json=bench_out/run.json $(ARGS)

$(VENV)/.installed-%: $(NATIVE) | $(VENV)/.created
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) was not found: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: rapfast needs Python 3.10 or newer, got $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) has no venv (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist rapfast.egg-info demo_out bench_out rapfast/_C.*.so
