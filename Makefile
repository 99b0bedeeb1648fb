# Two commands do everything: `make demo` and `make test`. Both build .venv first.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
export OMP_WAIT_POLICY ?= passive
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: env demo test lint bench reference look docs

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

test: env
	$(PY) -m pytest

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Each benchmark writes benchmarks/results/NAME.json, from which the documentation draws its figures. All of them take about
# half an hour on two free cores; `make bench-NAME` runs one.
bench: bench-kernels bench-process_peak bench-streaming bench-plans

bench-%: env
	$(PY) -m benchmarks.$*

# Plans, packs, runs and verifies the shipped model A, and draws the page: out/demo-report.html.
demo: env
	@demo/demo.sh $(PY)

# Fills tables, file map and outputs into the documentation. Outputs are recorded with: python docs/generate.py --record
docs: env
	$(PY) docs/generate.py

reference: env
	$(PY) -m reference

# Screenshots of the demo's page, to look at: light, dark, phone and print.
look: env
	test -f out/demo-report.html || demo/demo.sh $(PY)
	$(PY) docs/look.py out/demo-report.html out/look
