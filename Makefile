# Each target does the set-up it needs; running it again is instant when nothing changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
METHODS := adamp,refined-schedule,adadagrad,batch-group-norm,ps-kd,grand-el2n

.PHONY: demo test lint claims bench docs generate clean

demo: $(READY)
	$(BIN)/assay compare --task digits --methods $(METHODS) --trials 4 --seeds 5

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 1)')

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate.py --check

claims: $(READY)
	for id in $$($(BIN)/assay list | cut -f1); do $(BIN)/assay run $$id --jobs 2 || exit 1; done

bench: $(READY)
	$(BIN)/python benchmarks/optim.py
	$(BIN)/python benchmarks/optim_steps.py
	$(BIN)/python benchmarks/losses.py
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 $(BIN)/python benchmarks/nn.py --compiled

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

generate: $(READY)
	$(BIN)/python scripts/generate.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Assay needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) site build dist assay-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
