# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
# Where torch comes from; empty: the default index, whose build for Linux brings CUDA. The small build for CPUs alone:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
PARALLEL := -q -n auto --dist worksteal
# Tests of processes: a file starts few of them and shares them, so it stays together.
BY_FILE := -q -n 2 --dist loadfile

.PHONY: demo test check lint test-slow test-clients test-load-clients test-ui test-gpu bench proto clean

demo: $(READY)  ## deploy the bundled pair on this machine's CPU, stream a completion, take it down
	$(BIN)/python deploy/demo.py

test: $(READY)  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow" $(BY_FILE) tests/dist tests/e2e
	$(BIN)/python -m pytest -m "not gpu" $(PARALLEL) tests/unit tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/triton

check: lint  ## the fast loop: lint, and the unit tests, fresh stubs among them
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

lint: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-slow: $(READY)  ## what takes too long for every run: tiers of the KV cache under load and damage, a node that is killed
	$(BIN)/python -m pytest -q -m slow tests/e2e

test-clients: $(READY)  ## clients of others against a real deployment; writes docs/clients.md
	[ -x .venv-clients/bin/python ] || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check openai anthropic langchain-openai litellm
	$(BIN)/python -m tests.clients .venv-clients/bin/python

test-load-clients: $(READY)  ## load generators and lm-eval against a real deployment; they use torch of .venv; writes docs/load-clients.md
	[ -x .venv-load/bin/python ] || $(PYTHON) -m venv .venv-load
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.venv-load/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/echelon_torch.pth"
	.venv-load/bin/pip install --quiet --disable-pip-version-check guidellm 'lm-eval[api]'
	$(BIN)/python -m tests.clients.load .venv-load/bin

test-ui: $(READY)  ## the page at /ui/ in a real browser, before a real deployment
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } || { echo "make test-ui needs chromium and chromedriver on PATH, and cannot install them here. Debian: apt-get install chromium chromium-driver"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check selenium axe-core-python
	$(BIN)/python -m pytest -q -p no:xdist tests/ui

test-gpu:  ## on a machine with a CUDA device; uses the Python on PATH, which brings torch and triton
	$(PYTHON) -m pytest -m gpu tests/gpu tests/triton

bench: $(READY)  ## the benchmarks that run on this machine; results go to bench/results
	$(BIN)/python -m bench.kernels --save
	$(BIN)/python -m bench.decode --save
	$(BIN)/python -m bench.rounds --save
	$(BIN)/python -m bench.speculate --dtype float32 --threads 1 --save
	$(BIN)/python -m bench.speculate --tp 2 --threads 1 --placement separate --name speculate-tp2 --save
	$(BIN)/python -m bench.acceptance --save

proto:  ## regenerate echelon/pb after editing protos/
	protos/generate.sh

clean:
	rm -rf .venv .venv-clients .venv-load .venv-proto build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The version range that pyproject.toml gives for torch: another version would be replaced right after.
TORCH_REQUIREMENT = $(PYTHON) deploy/torch_requirement.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Echelon needs Python 3.11 or 3.12, found {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	$(BIN)/pip install --disable-pip-version-check --index-url $(TORCH_INDEX) "$$($(TORCH_REQUIREMENT))"
endif
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
