# All that is needed is `python3`, 3.10 to 3.13. List the targets with: make help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
NBVAL := $(if $(NOTEBOOKS),--nbval-lax --nbval-current-env --nbval-cell-timeout=600 --nbval-kernel-startup-timeout=120)

# Each process takes a whole test file or notebook at a time, or all tests that share ranks, in the order of
# tests/conftest.py. Two keep two cores busy with the fast tests; clusters and kernels also wait, so all tests get
# three. One process: PYTEST_ARGS='-n 0'
XDIST := --dist=loadscope --no-loadscope-reorder

# Idle OpenMP threads sleep instead of spinning, which would slow down the other process.
export OMP_WAIT_POLICY := passive

# The models are tiny: a second thread costs more than it saves. Hundreds of Python processes start, and most of them
# import the library: compile it once, also where the environment says otherwise, and collect less garbage meanwhile.
test quick: export OMP_NUM_THREADS := 1
test quick: export PYTHONDONTWRITEBYTECODE :=
test quick: export PYTHONPATH := $(CURDIR)/tests/startup$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help demo test quick lab docs lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.demo-installed ## convert, build and run the small model that ships with the package, and save a picture
	@$(BIN)/mmdit demo $(DEMO_ARGS)

test: $(VENV)/.test-installed ## all tests, and every notebook from a fresh kernel
	@IPP_NONINTERACTIVE=1 $(BIN)/python -m pytest --numprocesses=3 $(XDIST) $(NBVAL) tests $(NOTEBOOKS) $(PYTEST_ARGS)

quick: $(VENV)/.test-installed ## all but the slow tests, for after each edit (about three minutes)
	@$(BIN)/python -m pytest --numprocesses=2 $(XDIST) -m 'not slow and not browser' tests $(PYTEST_ARGS)

lab: $(VENV)/.test-installed ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(LAB_ARGS)

# Warnings are errors, among them links within the repository that lead nowhere.
docs: $(VENV)/.docs-installed ## the website in _site/: notebooks as they are committed, guides, API
	@$(BIN)/python -m sphinx -E -W --keep-going --quiet -d $(VENV)/doctrees -c docs/site . _site $(DOCS_ARGS)
	@rm -rf jupyter_execute # myst-nb's copies of the notebooks
	@echo 'The website is in _site/; its front page is _site/index.html'

lint: $(VENV)/.lint-installed ## check the code and its format with ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.lint-installed ## fix what ruff can fix, and format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove the environment and everything that was generated here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache demo_output _site jupyter_execute
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after its install has succeeded; an interrupted install runs again.
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
	@$(PIP) --editable '.[rtx,onnx,notebooks,parallel,dev,docs]'
	@touch $@ $(VENV)/.demo-installed $(VENV)/.docs-installed

$(VENV)/.docs-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'Installing what the website needs into $(VENV) (some minutes, once)'
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.lint-installed: constraints.txt | $(VENV)/.created
	@$(PIP) ruff
	@touch $@
