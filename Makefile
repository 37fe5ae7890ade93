# Two commands do everything: `make run` and `make test` set up what is missing.
PYTHON ?= python3
# `make setup CPU=1 TORCH="OPTIONS"` takes torch and torchvision without CUDA, for machines
# without a GPU. TORCH holds pip's options; PyTorch's own site names the index.
ifeq ($(CPU)$(strip $(TORCH)),1)
$(error CPU=1 needs an index with torch for CPUs, which PyTorch's own site names. \
Write make setup CPU=1 TORCH="OPTIONS")
endif
VENV := .venv
BIN := $(VENV)/bin
# More options of pytest for `make test` and `make test-deploy`.
PYTEST :=
STAMP := $(VENV)/.installed

.PHONY: setup run test test-slow test-deploy recipes style lint docs bench bench-gpu soak audit load breaks

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes and about $(if $(TORCH),2,7) GB the first time."
ifneq ($(TORCH),)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) torch torchvision
endif
	@$(BIN)/python -m tools.install -e ".[all,dev]"
	@touch $(STAMP)

run: setup
	@$(BIN)/fedlora run digits

# Types are checked beside the tests, some of which wait. What mypy says comes last.
test: style
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest $(PYTEST); failed=$$?; \
	wait $$types || failed=1; echo "mypy:"; cat $(VENV)/mypy.log; exit $$failed

# What tries very many inputs, or starts many processes (see `SLOW` in tests/conftest.py).
test-slow: setup
	$(BIN)/python -m pytest -m "slow and not (deploy or flower or recipes)" -o cache_dir=.pytest_cache/slow $(PYTEST)

# Real Flower processes. Two files at a time: more of them slow a fleet beyond its timeouts. The
# other tests may run at the same time, so these keep another cache.
# Only files that have such a test are imported.
test-deploy: setup
	$(BIN)/python -m pytest -n 2 -m "deploy or flower" -o cache_dir=.pytest_cache/deploy $(PYTEST) \
		$(shell grep -rlE "mark\.(deploy|flower)" tests --include="test_*.py")

# Breaks the promise on purpose, in each known way, and sees that a test notices.
breaks: setup
	@$(BIN)/python -m tests.breaks

# Every paper recipe for one private round on random weights of its full architecture: about 75
# minutes of CPU. Two at a time need 12 GB of memory.
recipes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load -m recipes tests/simulations/test_recipes.py

# The documentation as a site in site/; open site/index.html. A dead link or anchor is an error.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build --strict

bench: setup
	@$(BIN)/python -m benchmarks --output benchmarks/results/bench.json

bench-gpu: setup
	@$(BIN)/python -m benchmarks gpu --output benchmarks/results/bench-gpu.json

# Kills processes of a simulation and of a fleet again and again, and looks at what is left.
soak: setup
	@$(BIN)/python -m benchmarks.soak

# Attacks on real runs of each method, and what they find of the claimed ε.
audit: setup
	@$(BIN)/python -m benchmarks.audit

# More and more SuperNodes at one SuperLink, on this machine.
load: setup
	@$(BIN)/python -m benchmarks.load

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy
