# Everything starts from a bare `python3` (3.10 to 3.13): make help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
NBVAL := $(if $(NOTEBOOKS),--nbval-lax --nbval-current-env --nbval-cell-timeout=600 --nbval-kernel-startup-timeout=120)

# Test files and notebooks run two at a time, each by one process from its first test to its last; -n 0: one by one.
XDIST := --numprocesses=2 --dist=loadscope

# Idle OpenMP threads sleep: spinning ones take the cores from each other where anything else runs.
export OMP_WAIT_POLICY := passive

.PHONY: help demo test lab lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.demo-installed ## convert, build and run the small model that ships with the package; ends with a picture
	@$(BIN)/mmdit demo $(DEMO_ARGS)

test: $(VENV)/.test-installed ## all tests, and every notebook from a fresh kernel
	@IPP_NONINTERACTIVE=1 $(BIN)/python -m pytest $(XDIST) $(NBVAL) tests $(NOTEBOOKS) $(PYTEST_ARGS)

lab: $(VENV)/.test-installed ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(LAB_ARGS)

lint: $(VENV)/.lint-installed ## what ruff says
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.lint-installed ## let ruff put it right
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove the environment and all that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only when its install has ended well: an interrupted one is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; ok = (3, 10) <= v < (3, 14); ok or print("mmdit_lib needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d.%d; say, for instance: make PYTHON=python3.12" % v); sys.exit(not ok)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'Installing what the demo needs into $(VENV) (some minutes, once)'
	@$(PIP) --editable '.[rtx]'
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'Installing everything for tests and notebooks into $(VENV) (some minutes, once)'
	@$(PIP) --editable '.[rtx,notebooks,parallel,dev]'
	@touch $@ $(VENV)/.demo-installed

$(VENV)/.lint-installed: constraints.txt | $(VENV)/.created
	@$(PIP) ruff
	@touch $@
