# make train and make test set up what they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= test
BIN := $(VENV)/bin
# Tests of a file share what one process has compiled. A process that dies has no
# successor, for which xdist would wait forever.
PYTEST := pytest -n 2 --dist loadfile --max-worker-restart 0
OLDEST := jax==0.7.2 jaxlib==0.7.2 optax==0.2.6

.PHONY: help setup train train-sharded reliability experiments bench tpu-check \
	gpu-check test test-default-flags test-slow test-oldest test-clients dist-check \
	release-check docs docs-setup docs-serve lint format clean

help:
	@echo "make train          SOAP, Muon and AdamW on a small language model, with a plot"
	@echo "make train-sharded  the language model on a mesh of 8 virtual devices"
	@echo "make test           lint, types and tests"
	@echo "make test-default-flags  the tests of numbers as XLA compiles for users"
	@echo "make test-slow      every combination of options, 2,400 random cases, long runs"
	@echo "make reliability    the figures of docs/reliability.md"
	@echo "make experiments    the comparisons of docs/results.md, many hours if all are new"
	@echo "make bench          times and memory of steps, refreshes, compiling, training"
	@echo "make tpu-check      training steps compiled for TPU pods, without a TPU"
	@echo "make gpu-check      memory of training steps compiled for a GPU, without a GPU"
	@echo "make test-oldest    the tests on the oldest supported JAX and optax"
	@echo "make test-clients   trainings with programs of others, which docs/clients.md lists"
	@echo "make dist-check     the wheel, built and used in environments of its own"
	@echo "make release-check TAG=v1.2.3  the same for a release, which is then in dist/"
	@echo "make docs           the documentation site, in site/, with every link checked"
	@echo "make docs-serve     the documentation site in a browser, renewed at each change"
	@echo "make format         format the code"
	@echo "PYTHON=python3.12 VENV=.venv-3.12 choose another interpreter."

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "soap_optax needs Python 3.11 or newer; set PYTHON"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRA)]" $(PINS)
	@touch $@

train: setup
	$(BIN)/python examples/compare_lm.py

train-sharded: setup
	XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
		$(BIN)/python examples/train_lm.py --mesh 2 2 2 --scan --block-size 32 \
		--steps 40 --warmup 10 --eval-every 10 --eval-batches 2 \
		--metrics runs/sharded.csv

reliability: setup
	$(BIN)/python experiments/reliability.py --out docs/results

experiments: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[experiments]"
	$(BIN)/python experiments/language_model.py --out docs/results \
		--curves docs/results/curves
	$(BIN)/python experiments/precisions.py --out docs/results
	$(BIN)/python experiments/pinn.py --out docs/results
	$(BIN)/python experiments/vision.py --out docs/results
	$(BIN)/python experiments/complex_parameters.py --out docs/results

bench: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/small.py --out docs/results
	$(BIN)/python benchmarks/steps.py --out docs/results
	$(BIN)/python benchmarks/steps.py --out docs/results --preset 24-layers \
		--rows soap --parts steps
	$(BIN)/python benchmarks/steps.py --out docs/results --preset 768x12 \
		--rows adamw soap --parts steps --cycles 1
	OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/steps.py --parts refreshes \
		--out docs/results/one_lapack_thread
	for preset in default 24-layers; do \
		XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false \
		$(BIN)/python benchmarks/steps.py --parts steps --rows soap \
		--preset $$preset --out docs/results/sequential_schedule || exit 1; done

# In an environment of its own: where libtpu is installed, JAX looks for TPUs.
tpu-check:
	$(MAKE) setup VENV=.venv-tpu
	.venv-tpu/bin/python -m pip install --quiet libtpu
	.venv-tpu/bin/python benchmarks/pods.py --out docs/results

# In an environment of its own: CUDA's libraries take 5 GB.
gpu-check:
	$(MAKE) setup VENV=.venv-gpu
	.venv-gpu/bin/python -m pip install --quiet "jax[cuda12]"
	.venv-gpu/bin/python benchmarks/gpus.py --out docs/results

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m $(PYTEST)

# make test compiles faster than users do, see tests/conftest.py.
test-default-flags: setup
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m $(PYTEST) \
		tests/test_golden.py tests/test_reliability.py tests/test_sharding.py

test-slow: setup
	$(BIN)/python -m $(PYTEST) -m slow
	$(BIN)/python -m $(PYTEST) --hypothesis-profile slow tests/test_properties.py

test-oldest:
	$(MAKE) setup VENV=.venv-oldest PINS="$(OLDEST)"
	.venv-oldest/bin/python -m $(PYTEST)

# Programs of others, in two environments of their own: MaxText needs Python 3.12.
CLIENTS ?= nnx_digits linen_text equinox_autoencoder haiku_digits optimistix_fit \
	numpyro_vae flowjax_density jinns_burgers netket_heisenberg gymnax_ppo
LLM_CLIENTS ?= tunix_lora maxtext_pretrain
LLM_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3) \
	python3.12)
LLM_ENV := DECOUPLE_GCLOUD=TRUE JAX_PLATFORMS=cpu \
	XLA_FLAGS=--xla_force_host_platform_device_count=8

.venv-clients/.installed: examples/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet -e . -r $<
	@touch $@

.venv-clients-llm/.installed: examples/clients/requirements_llm.txt
	$(LLM_PYTHON) -m venv .venv-clients-llm
	.venv-clients-llm/bin/python -m pip install --quiet -e . -r $<
	@touch $@

test-clients: $(if $(CLIENTS),.venv-clients/.installed)
test-clients: $(if $(LLM_CLIENTS),.venv-clients-llm/.installed)
	for name in $(CLIENTS); do \
		.venv-clients/bin/python examples/clients/$$name.py || exit 1; done
	for name in $(LLM_CLIENTS); do \
		$(LLM_ENV) .venv-clients-llm/bin/python examples/clients/$$name.py || exit 1; done

dist-check:
	$(PYTHON) .ci/check_dist.py

release-check:
	$(PYTHON) .ci/check_dist.py --release $(TAG) --oldest $(OLDEST)

# In an environment of its own.
docs-setup:
	$(MAKE) setup VENV=.venv-docs EXTRA=docs
	$(MAKE) docs/katex

docs: docs-setup
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

docs-serve: docs-setup
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

# KaTeX sets the formulas. The environment has an npm of its own.
docs/katex:
	PATH=$(CURDIR)/.venv-docs/bin:$$PATH npm install --silent --no-save \
		--prefix .venv-docs katex@0.19
	rm -rf $@.part && mkdir $@.part
	cd .venv-docs/node_modules/katex/dist && cp -r fonts katex.min.css katex.min.js \
		contrib/auto-render.min.js $(CURDIR)/$@.part
	mv $@.part $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv* runs dist site docs/katex .mypy_cache .pytest_cache .ruff_cache
