# Two commands do everything: `make demo` and `make test`. Both build .venv first.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
export OMP_WAIT_POLICY ?= passive
export HF_HUB_DISABLE_TELEMETRY ?= 1

PEERS := llama_cpp xllamacpp llmcompressor auto_round bitsandbytes openvino torchao kvpress transformers training
# The default build of llama.cpp takes its AMX path on machines that have none and dies there, so that the features are named.
LLAMA_CMAKE := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON \
	-DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON -DGGML_AVX_VNNI=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF

.PHONY: env demo test test-long test-triton lint bench bench-quick peers $(PEERS:%=peers-%) reference look docs fuzz

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Files of tests in two processes, each with a cache of its own.
test: env
	$(PY) -m pytest -n 2 --dist loadfile

# What `make test` has no time for.
test-long: env
	$(PY) -m pytest -m long

# Triton's kernels, in its interpreter where there is no GPU. They are skipped by `make test` unless triton is there: it takes 1 GB.
test-triton: env
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[gpu]'
	$(PY) -m pytest tests/kernels/test_triton.py tests/kernels/test_attention.py

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Mutated configs, plans, headers and folders by the thousand; what surprises is kept in tests/cli/corpus/ and tested ever after.
FUZZ_CASES ?= 5000
fuzz: env
	$(PY) -m tests.cli.fuzz $(FUZZ_CASES) $$RANDOM

# Each benchmark writes benchmarks/results/NAME.json, from which the documentation draws its figures, with the seconds that it took;
# `make bench-NAME` runs one, and goes on where it was stopped. docs/results.md states what each took, and the sum. bench-quick needs no peers.
QUICK := plan_time kernels exact_bytes process_peak streaming
LONG := calibration decode decode_time depth elastic fsdp kv_claims kv_prefill loss optimizers packing plans prediction feedback recipes \
	recomputation choosers kills
BESIDE_PEERS := exports decode_peers weights kv pretraining tuning
bench: bench-quick $(LONG:%=bench-%) peers $(BESIDE_PEERS:%=bench-%)

bench-quick: $(QUICK:%=bench-%)

bench-%: env
	$(PY) -m benchmarks.$*

# Other tools to stand beside, each in an environment of its own, pinned by benchmarks/peers/NAME.txt; called as processes.
peers: $(PEERS:%=peers-%)

$(PEERS:%=peers-%): peers-%: .peers/%/.stamp

.peers/%/.stamp: benchmarks/peers/%.txt
	test -x .peers/$*/bin/python || python3 -m venv .peers/$*
	CMAKE_ARGS="$(LLAMA_CMAKE)" .peers/$*/bin/python -m pip install -q --disable-pip-version-check -r $<
	test $* != openvino || .peers/$*/bin/python -m pip uninstall -q -y torchvision  # it breaks the CPU build of torch
	touch $@

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
