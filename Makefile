PYTHON ?= python3
# Or another: `make clean test TORCH=2.11.0`.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo study test soak lint clean

demo: $(VENV)/installed  ## train xPos and RoPE, measure both far beyond the trained length, draw the plot
	for recipe in xpos rotary; do \
	$(BIN)/python -m train fit --config configs/$$recipe.yaml --trainer.devices 1 || exit 1; done
	$(BIN)/python -m train.extrapolate runs/xpos runs/rotary --windows 10 --modes '[dense, tail, BCA, recompute]'

study: $(VENV)/installed  ## all that docs/extrapolation.md reports and study/results lacks: hours from nothing
	$(BIN)/python -m study $(STUDY)

test: lint  ## linters, type checker, all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/installed  ## forty kills of a training, which then ends as if nothing had been
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[study,test]"
	touch $@

clean:  ## the environment and caches; never a run
	rm -rf $(VENV) runs/.cache .pytest_cache .ruff_cache .hypothesis
