PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp, so that the install runs once and again only when what it installs changes.
READY := $(VENV)/.installed

.PHONY: demo space test test-slow lint cards clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/hf-ae demo

space: $(READY)
	HF_HUB_OFFLINE=1 MALLOC_ARENA_MAX=2 $(BIN)/python spaces/hf-ae/app.py  # few arenas: less memory under load

test: $(READY)
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/pytest -q -m slow -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The cards of model_cards, and beside the weights the code that a repository carries (git ignores it).
cards: $(READY)
	$(BIN)/python -c "from pathlib import Path; from hf_ae.hub.push import refresh; [refresh(p.parent) for name in ('config', 'model_index') for p in Path('model_cards').glob(f'*/{name}.json')]"

clean:
	rm -rf $(VENV) build dist demo *.egg-info
