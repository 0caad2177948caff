# make demo   Meta-SGD beside MAML on sine curves, as in the paper's Table 1 and Figure 3
# make test   every unit and one thin run of each experiment, in minutes
# make test-all  also what is marked slow: kills, several processes, notebooks, whole tables, large learners
# make faults puts faults into the package, and asks whether the tests notice; takes hours
# make lint   style and types
# make docs   the documentation, as pages in docs/_build/html; warnings are errors
# make package  builds sdist and wheel in dist/, and tests the installed wheel away from the clone
# make release  all checks of a release, and the files in dist/; it uploads nothing
# make notebooks  runs the notebooks anew, and keeps their outputs
# make fuzz   ten thousand hostile files for everything that is read from disk, and ten thousand random values
# make bench  ours against its peers; needs the extra `bench`
# make torture  kills a run at random moments, 60 times; it must end as if never killed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt
JOBS ?= auto
# Prints one sentence and fails, if the Python that runs it is too old.
NEW_ENOUGH = -c "import sys; sys.version_info >= (3, 11, 4) or sys.exit('error: metasgd_jax needs Python 3.11.4 or newer, \
got %d.%d.%d from ' % sys.version_info[:3] + sys.executable + '; $(1)')"
TESTS = -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all faults fuzz lint docs notebooks bench torture lowest package release clean

demo: $(VENV)/plots
	$(BIN)/python -m experiments.regression --workdir=runs/demo

test: $(VENV)/test
	$(BIN)/python $(TESTS) -m 'not slow'

test-slow: $(VENV)/test
	$(BIN)/python $(TESTS) -m 'slow and not optimized'
	XLA_FLAGS= $(BIN)/python $(TESTS) -m optimized

test-all: test test-slow

faults: $(VENV)/faults
	$(BIN)/python -m tests.faults cover --data=runs/faults
	$(BIN)/python -m tests.faults run --data=runs/faults --results=runs/faults/verdicts.jsonl

fuzz: $(VENV)/test
	$(BIN)/python -m tests.fuzz --inputs=10000
	PYTHONPATH=tests $(BIN)/python -m tests.fuzz.random_values --inputs=10000

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -q -W -n --keep-going -b html docs docs/_build/html

notebooks: $(VENV)/notebooks
	$(BIN)/python -m notebooks.execute

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.sinusoids
	$(BIN)/python -m benchmarks.classification
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.navigation

torture: $(VENV)/test
	$(BIN)/python tests/torture.py --kills=60

# The tests with the oldest versions that pyproject.toml allows.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip --disable-pip-version-check -q install -c constraints-lowest.txt -e '.[test]'
	.venv-lowest/bin/python $(TESTS)

# All files but the package's own are copied: what the tests import is the installed wheel.
package: $(VENV)/dev
	rm -rf dist .venv-package
	$(BIN)/python -m build
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt "$$(ls dist/*.whl)[test]"
	mkdir .venv-package/outside
	git ls-files -z -- . ':!metasgd_jax' | xargs -0 cp --parents -t .venv-package/outside
	cd .venv-package/outside && ../bin/python -P $(TESTS)

release: lint test-all docs package
	$(BIN)/python tests/release.py

clean:
	rm -rf $(VENV) .venv-lowest .venv-package dist runs docs/_build docs/notebooks

# One file for each extra that is installed; a change of what is asked for installs anew.
$(VENV)/%: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python $(call NEW_ENOUGH,remove $(VENV) and give a newer one as in make $(MAKECMDGOALS) PYTHON=python3.13)
	@echo 'installing metasgd_jax[$*] in $(VENV), about a minute the first time'
	$(PIP) -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) $(call NEW_ENOUGH,give a newer one as in make $(MAKECMDGOALS) PYTHON=python3.13)
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
