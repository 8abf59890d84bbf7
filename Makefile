# make quickstart   set up .venv and train, evaluate and use a small model on real cells
# make test         set up .venv and run every check and test
# make lint         the checks alone: ruff, mypy, the order of the layers
# make docs         build the documentation into site/, warnings are errors
#
# Needed: Python 3.11 or newer (with venv) and a connection to a package index. Options:
#   PYTHON=/path/to/python   the interpreter to use instead of the newest one found
#   TORCH_INDEX=URL          index to take torch from; without a GPU, name PyTorch's CPU index here
#                            to save the download of the CUDA packages
# The environment is made again when pyproject.toml or constraints.txt change.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TORCH_INDEX ?=
# twice quiet: errors only
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install --constraint constraints.txt

.PHONY: help quickstart test lint docs
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.eval
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# A candidate must really run: a name on the PATH may be a shim of a version manager without that version.
$(BIN)/python:
	@found=; without_venv=; \
	for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if "$$python" -c 'import venv, ensurepip' 2>/dev/null; then found=$$python; break; fi; \
		without_venv=$${without_venv:-$$python}; \
	done; \
	if [ -z "$$found" ] && [ -n "$$without_venv" ]; then \
		version=$$("$$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "Python $$version has no venv module. On Debian and Ubuntu: apt install python$$version-venv" >&2; \
		exit 1; \
	elif [ -z "$$found" ]; then \
		echo "scModelForge needs Python 3.11 or newer; none of these runs and is new enough:" \
			"$(or $(PYTHON),python3.13 python3.12 python3.11 python3)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "Making the environment $(VENV) with $$("$$found" --version) ..."; \
	"$$found" -m venv --clear $(VENV)

# torch comes first and by itself, so that its index and its pin decide which build the rest builds on.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@command -v nvidia-smi >/dev/null || [ -n "$(TORCH_INDEX)" ] || \
		echo "No NVIDIA GPU here; if pip now downloads CUDA packages, see TORCH_INDEX in the Makefile."
	@echo "Installing torch (minutes the first time) ..."
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.eval $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing scmodelforge[$*] (minutes the first time) ..."
	@$(PIP) --editable '.[$*]'
	@touch $@
