# Nobody has to ask how: `make` lists the targets, and each sets up what it needs.

PYTHON ?= python3
# Its own variable because the right torch depends on the machine. For the smaller CPU build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Two, because the tests hold a model per worker: more workers cost memory before they save time.
WORKERS ?= 2

VENV := .venv
PY = $(VENV)/bin/python
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet

# The oldest transformers that the package takes: the same promises are asked of it, on the families that it has.
# It looks at the numbers of a mask, which a scan does not have: a padded batch is refused there, with the reason.
OLDER := transformers==4.57.*
OLDER_TESTS := tests/matrix/test_contract.py tests/nnterp/test_accessors.py tests/nnterp/test_loading.py \
  tests/nnterp/test_residual_stream.py tests/nnterp/test_standardized_transformer.py tests/nnterp/test_validation.py \
  --deselect tests/nnterp/test_loading.py::test_text_is_scanned_with_its_padding
PACKAGES := nnsight_core nnterp
OUT := out

DEMO_MODEL := demo-llama
STORE_PROMPT := John and Mary went to the store. John handed the milk to
TOWER_PROMPT := The Eiffel Tower is in the city of
STORE_HTML := $(OUT)/lens-john-and-mary.html
TOWER_HTML := $(OUT)/lens-eiffel-tower.html

# A stamp is written last, so an installation that was interrupted is done again.
HAS_TORCH := $(VENV)/.has-torch
HAS_PACKAGE := $(VENV)/.has-package
HAS_TOOLS := $(VENV)/.has-tools
HAS_OLDER := $(VENV)-older/.has-tools

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One job after the other: `make -j` would run two pips in one environment.
.NOTPARALLEL:
.PHONY: help demo test test-older check format site models clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: $(HAS_PACKAGE) ## Draw the logit lens of two prompts as heat maps, with a model shipped here
	@mkdir -p $(OUT)
	@echo "==> logit lens: $(STORE_PROMPT)"
	@HF_HUB_OFFLINE=1 $(PY) -m nnterp lens "$(STORE_PROMPT)" --model $(DEMO_MODEL) --html $(STORE_HTML)
	@echo "==> logit lens: $(TOWER_PROMPT)"
	@HF_HUB_OFFLINE=1 $(PY) -m nnterp lens "$(TOWER_PROMPT)" --model $(DEMO_MODEL) --html $(TOWER_HTML)
	@test -s $(STORE_HTML) && test -s $(TOWER_HTML) || { echo "no heat map was written to $(OUT)/" >&2; exit 1; }
	@echo
	@echo "The heat maps are in these files; open them in a browser:"
	@echo "  $(STORE_HTML)"
	@echo "  $(TOWER_HTML)"

test: check ## Check, then run every test
	@echo "==> pytest"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-older: VENV := $(VENV)-older
test-older: $(HAS_OLDER) ## Ask the same of the oldest transformers that will do
	@echo "==> pytest, with $(OLDER)"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(OLDER_TESTS) $(PYTEST_ARGS)

check: $(HAS_TOOLS) ## Lint, formatting and types; runs no test
	@echo "==> ruff check"
	@$(PY) -m ruff check .
	@echo "==> ruff format --check"
	@$(PY) -m ruff format --check . || { echo "run: make format" >&2; exit 1; }
	@echo "==> mypy"
	@$(PY) -m mypy $(PACKAGES)

format: $(HAS_TOOLS) ## Format the code and mend what ruff can mend
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

site: $(HAS_TOOLS) ## Build the documentation into out/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open $(OUT)/site/index.html in a browser; its search needs a server:"
	@echo "  $(PY) -m http.server --directory $(OUT)/site, then http://localhost:8000"

models: $(HAS_PACKAGE) ## Train the shipped demo models again
	@OMP_NUM_THREADS=2 $(PY) -m nnterp.demo_models.train

clean: ## Remove everything that make made, .venv too
	rm -rf $(VENV) $(VENV)-older $(OUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(HAS_TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing $(TORCH) (the large one)"
	@$(PIP) $(TORCH)
	@touch $@

$(HAS_PACKAGE): pyproject.toml | $(HAS_TORCH)
	@echo "==> installing this package, what it depends on, and what it draws with"
	@$(PIP) --editable ".[display]"
	@touch $@

# The tools come with the package, so whoever has tested need not install again to run the demo.
$(HAS_TOOLS): pyproject.toml | $(HAS_TORCH)
	@echo "==> installing this package, the test tools and the checkers"
	@$(PIP) --editable ".[dev]"
	@touch $(HAS_PACKAGE) $@

$(HAS_OLDER): pyproject.toml
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing $(TORCH), $(OLDER), this package and the test tools"
	@$(PIP) $(TORCH)
	@$(PIP) --editable ".[test]" "$(OLDER)"
	@touch $@
