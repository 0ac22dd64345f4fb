# The daily commands. Each sets up what it needs: Python 3.10 or newer with venv, and gcc.
PYTHON ?= python3
VENV   ?= .venv

PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
BUILT   := $(VENV)/.built
C_FILES := $(shell find csrc -name '*.[ch]' -not -name dlpack.h -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: build demo test bench format lint sanitize mutants wheel wheel-matrix clean test-gpu mutants-gpu ptxas

build: $(BUILT)

demo: build                  ## a known video, continued under five attention rules; pictures in demo/
	$(PY) -m lightforcing demo

# Idle OpenMP threads sleep: spinning ones starve the others when tests share few cores. A worker
# for each core (half a GB each); one that is idle takes tests from another. Notebooks come first,
# being the longest: then the workers end together.
test: export OMP_WAIT_POLICY = passive
test: lint                   ## lint, every test, the README's code and the notebooks
	$(PY) -m pytest notebooks tests --nbmake --nbmake-timeout=300 \
		-n logical --maxprocesses 4 --dist worksteal

test-gpu: build              ## GPU tests, compute-sanitizer and the CPU tests, on a machine with a GPU
	$(PY) scripts/test_gpu.py

ptxas: build                 ## registers and spills of every CUDA kernel; fails on a spill
	$(PY) scripts/ptxas_report.py

bench: build                 ## CPU speed against torch
	$(PY) benchmarks/cpu.py

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(C_FILES)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(PY) scripts/ptxas_report.py --check

sanitize: build              ## the whole suite under AddressSanitizer and UBSan, log in benchmarks/results
	$(PY) scripts/sanitize.py

mutants: build               ## seeded faults, each of which the suite must catch
	$(PY) tests/mutants/run.py

mutants-gpu: build           ## seeded faults in kernels, on a machine with a Hopper GPU and nvcc
	$(PY) tests/mutants/run.py --gpu

wheel: $(READY)              ## one cp310-abi3 wheel in dist/
	$(PY) scripts/wheel_matrix.py --build-only

wheel-matrix: $(READY)       ## that wheel on CPython 3.10 to 3.13 with old and new NumPy
	$(PY) scripts/wheel_matrix.py

clean:
	rm -rf build dist demo lightforcing.egg-info lightforcing/*.so $(BUILT) $(READY)

# The pinned tools of pyproject's `dev` extra, and this tree as an editable install. CUDA is left to
# the build below, which keeps its objects; byte code, nearly half of pip's time, to first imports.
$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	LIGHTFORCING_NO_CUDA=1 $(PY) -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

$(BUILT): $(SOURCES) $(READY)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@
