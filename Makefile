# Every target sets up what it needs: a virtual environment with the pinned versions, and the build.
#
#   make test        lint, and all but the slow tests
#   make test-slow   those alone, but the rare ones
#   make test-all    everything
#   make demo        train two small models with stock's loss and with this one
#   make bench       measure it beside stock PyTorch and a copy of the logits (bench/README.md)
#   make test-torch TORCH=torch==2.10.0
#                    the tests with the wheel, built with the pinned torch, under another torch in an
#                    environment of its own (gigabytes where torch comes with CUDA)
#   make fuzz SECONDS=600 SEED=1
#                    random calls, and calls that nobody should make, for as long as that
#   make cliffs SECONDS=600 SEED=1
#                    random calls beside stock PyTorch: is one of them slower (bench/README.md)
#   make lint        formatting and static checks
#   make format      rewrite the sources the way lint wants them
#   make docs        the pages of docs/ as a website in build/docs/
#   make wheel       a wheel and the source distribution into dist/ (docs/wheels.md)
#   make clean       remove the environment and everything built
#
# PYTHON=python3.12 picks the interpreter, TORCH=torch==2.10.0 another torch with the newest setuptools
# that it takes, VENV=dir another place, WORKERS=n the number of processes that share the tests,
# ARGS="..." goes on to pytest or the program that the target runs.

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
WORKERS ?= 2
SECONDS ?= 60
SEED ?= 0
# A test that waits for ever fails, with the stack of every thread, and so does the run: a worker put
# in the place of one that died never gets work (pytest-xdist 3.8, its issues 1323 and 1378).
PYTEST := pytest -q -n $(WORKERS) --dist loadgroup --max-worker-restart 0 \
	--timeout 900 --timeout-method thread

BIN := $(VENV)/bin
LIBRARY := fused_ce/_C.so
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
CXX_FILES := $(SOURCES) $(shell find tests -name '*.h' -o -name '*.cpp')
# What replaces the pins; 2.11, for one, refuses the newest setuptools. What goes with one torch alone
# is left out.
OTHER_TORCH := s|^torch==.*|$(TORCH)|; s|^setuptools==|setuptools>=77,<=|; \
	/^torchvision=/d; /^timm=/d; /^segmentation-models-pytorch=/d
INSTALLED := $(VENV)/.installed-$(subst /,_,$(if $(TORCH),$(TORCH),pinned))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The workers share the cores: one thread each, but where a test asks for more, and no spinning.
test test-slow test-all test-torch: export OMP_WAIT_POLICY ?= PASSIVE
test test-slow test-all test-torch: export OMP_NUM_THREADS ?= 1
# Nor does each of many processes compile the tests' Python anew, as where this is set.
test test-slow test-all test-torch: export PYTHONDONTWRITEBYTECODE :=

.PHONY: build test test-slow test-all test-torch demo bench cliffs fuzz lint format docs wheel clean

build: $(LIBRARY)

$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("fused_ce: Python 3.10 or newer is needed, \
	found %s; name one with PYTHON=." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed '$(if $(TORCH),$(OTHER_TORCH))' requirements-dev.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	rm -f $(VENV)/.installed-*
	touch '$@'

$(LIBRARY): $(INSTALLED) $(SOURCES) setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# What only some targets need.
$(VENV)/.installed-for-%: requirements-%.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet -r $<
	touch '$@'

test: lint
	$(BIN)/python -m $(PYTEST) -m "not slow" $(ARGS)

test-slow: lint
	$(BIN)/python -m $(PYTEST) -m "slow and not rare" $(ARGS)

test-all: lint
	$(BIN)/python -m $(PYTEST) $(ARGS)

test-torch: OTHER := build/test-torch
test-torch:
	$(if $(TORCH),,$(error name the other torch, as in TORCH=torch==2.10.0))
	$(MAKE) wheel TORCH=
	$(PYTHON) -m venv --clear $(OTHER)
	sed -n '/^torch=/d; /^#/d; /^[nph][uy]/p' requirements-dev.txt > $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet '$(TORCH)' -r $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --no-deps dist/fused_ce-*.whl
	$(OTHER)/bin/$(PYTEST) -m "not slow" tests \
		$(addprefix --ignore tests/programs/,test_build.py test_demo.py test_bench.py) $(ARGS)

demo: build
	$(BIN)/python -m bench.demo $(ARGS)

bench: build
	$(BIN)/python -m bench $(ARGS)

cliffs: build
	$(BIN)/python -m bench.cliffs --seconds $(SECONDS) --seed $(SEED) $(ARGS)

fuzz: build
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: build $(VENV)/.installed-for-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html \
		--doctree-dir build/docs-read docs build/docs $(ARGS)
	@echo "build/docs/index.html"

# torch brings its own libraries. auditwheel names the wheel after the oldest system that it runs on.
wheel: build $(VENV)/.installed-for-release
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist/linux .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		-w dist dist/linux/*.whl
	rm -rf dist/linux
	FUSED_CE_CUDA=0 $(BIN)/python setup.py --quiet sdist --dist-dir dist
	$(BIN)/python -m auditwheel show dist/*.whl
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info $(LIBRARY)
