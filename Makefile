# Two commands do everything: `make serve` and `make test`. The rest: `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# A .venv whose Python is too old or has gone (an upgrade of the system) is made anew.
STALE := $(if $(wildcard $(VENV)),$(shell $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null || echo stale))
# TORCH=cpu takes torch's CPU build from PyTorch's own index; the default is PyPI's (with CUDA).
TORCH ?= default
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_FLAGS := $(if $(filter cpu,$(TORCH)),--extra-index-url $(TORCH_INDEX))
# What to serve, and further options: make serve MODEL=nvidia/NV-Embed-v2 ARGS="--port 9000"
MODEL ?=
ARGS ?=
# Where benchmarks write; tests/bench/results holds those that README shows.
RESULTS ?= build/bench/results

# Another torch than the lock's: make test-torch TORCH_VERSION=2.11.0
TORCH_VERSION ?= 2.9.0
OTHER := build/torch-$(TORCH_VERSION)

# Which one belongs to the lock's torch is in the metadata of its CUDA wheel; CPU builds have none.
TRITON_VERSION := 3.7.1
TRITON := build/triton/triton-$(TRITON_VERSION).dist-info

.PHONY: help install serve test test-slow test-fast test-torch test-families test-sentence-transformers test-clients client-tools lock-clients test-browser browser-tools screenshots test-examples test-triton coverage check fix openapi graph gpu-check chaos soak audit bench bench-peers simulate chart-check observability-check drill recipe image image-check tiny-model test-bulk test-ray test-ray-encode lock-ray lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv with what serving needs

serve: $(VENV)/.installed ## serve on http://127.0.0.1:8000 (MODEL=…, ARGS=…)
	$(BIN)/nv-embed serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

# What measures time runs after the others: three at a time, for they wait most of it, and the finest by
# itself. All are in tests/chaos (tests/conftest.py sees to it). Status 5: of what ARGS names, none does.
# PASSIVE: where tests share cores, a thread that waits has to leave its core to the others.
# Bytecode is written even where PYTHONDONTWRITEBYTECODE is set, as images have it: else each of some
# 400 processes compiles this project anew, and pytest all that it rewrites.
TEST_JOBS ?= 4
test test-slow test-fast coverage: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.installed-test ## run all tests but the slow ones: the gate (TEST_JOBS at once)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(TEST_JOBS) --dist worksteal -m "not timing and not slow" $(ARGS) || [ $$? -eq 5 ]
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 3 --dist worksteal -m "timing and not alone" $(or $(ARGS),tests/chaos) || [ $$? -eq 5 ]
	$(BIN)/pytest -m alone $(or $(ARGS),tests/chaos) || [ $$? -eq 5 ]

test-slow: $(VENV)/.installed-test ## run those that take long: compiled training, gpu-check of another family, benches
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(TEST_JOBS) --dist worksteal -m slow $(ARGS)

# Beside what starts processes: the emulated GPU, and what schemathesis reads while it is collected.
SLOW := chaos bench model/training model/test_emulated_cuda.py server/api/test_schemathesis.py
test-fast: $(VENV)/.installed-test ## run those of units, of the model and of the app in process
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist load -q -p no:schemathesis -m "not process and not whole" \
	    $(addprefix --ignore=tests/,$(SLOW)) $(ARGS)

coverage: $(VENV)/.installed-test ## which lines no test runs, those of child processes included
	$(BIN)/pytest -n $(TEST_JOBS) -q -m "not timing" --cov --cov-report=term-missing:skip-covered $(ARGS)

test-torch: $(OTHER)/.installed ## run the model's tests with another torch (TORCH_VERSION=2.9.0)
	$(OTHER)/bin/pytest tests/model $(ARGS)

$(OTHER)/.installed: requirements-test.lock pyproject.toml
	@echo "Installing torch $(TORCH_VERSION) into $(OTHER): gigabytes, unless TORCH=cpu …"
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|setuptools)==' $< > $(OTHER)/requirements.txt  # torch says which setuptools
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	    -r $(OTHER)/requirements.txt torch==$(TORCH_VERSION)
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-families: $(VENV)/.installed-test ## gpu-check of each family's small checkpoint, on an emulated device
	FAMILIES=full $(BIN)/pytest tests/model/test_gpu_check.py -k family $(ARGS)

# The current release, and the last one that runs with transformers 4; the rest is the lock's.
ST_6 := sentence-transformers==6.2.0
ST_5 := sentence-transformers==5.7.0 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
test-sentence-transformers: build/st-6/.installed build/st-5/.installed ## load what `nv-embed export` writes in both
	for release in 6 5; do PYTHONPATH=build/st-$$release $(BIN)/pytest \
	    tests/model/test_sentence_transformers_export.py $(ARGS) || exit 1; done

build/st-%/.installed: | $(VENV)/.installed-test
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) $(ST_$*)
	@touch $@

# Each environment's list pins all that is in it: nothing is resolved, and torch cannot come along.
CLIENTS := build/clients
CLIENT_LISTS := $(wildcard tests/clients/requirements-*.txt)
test-clients: client-tools $(VENV)/.installed-test $(CLIENT_LISTS:tests/clients/requirements-%.txt=$(CLIENTS)/%/.installed) $(CLIENTS)/node/.installed ## other makers' clients against a real server (ARGS="--only langchain")
	PYTHONPATH=. $(BIN)/python -m tests.clients.run $(ARGS)

NODE_20 := process.exit(process.versions.node.split(".")[0] >= 20 ? 0 : 1)
client-tools:
	@command -v npm >/dev/null && command -v curl >/dev/null && node -e '$(NODE_20)' || { \
	    echo "test-clients needs Node 20 or later, npm and curl; Debian: apt-get install nodejs npm curl"; \
	    exit 1; }

$(CLIENTS)/%/.installed: tests/clients/requirements-%.txt | $(VENV)/.installed-test
	@echo "Installing the clients of $< …"
	rm -rf $(@D) && mkdir -p $(CLIENTS)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# These import torch: they run in .venv, with this folder before it.
$(CLIENTS)/borrowed/.installed: tests/clients/requirements-borrowed.txt | $(VENV)/.installed-test
	@echo "Installing the clients of $< …"
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

$(CLIENTS)/node/.installed: tests/clients/node/package-lock.json tests/clients/node/package.json | client-tools
	@echo "Installing the clients of $< …"
	rm -rf $(@D) && mkdir -p $(@D) && cp $^ $(@D)
	cd $(@D) && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

lock-clients: $(VENV)/.installed-test ## take the clients' newest releases (tests/clients/requirements-*.txt)
	PYTHONPATH=. $(BIN)/python -m tests.clients.lock $(ARGS)

# A missing tool fails: in the gate the pages are only served and computed with (test_pages.py).
BROWSER := build/browser
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome))
test-browser: $(VENV)/.installed-test $(BROWSER)/.installed ## the pages in headless Chromium, with axe-core
	CHROMIUM="$(CHROMIUM)" PYTHONPATH=$(BROWSER)/python $(BIN)/pytest tests/browser $(ARGS)

screenshots: ## renew the pictures of the playground in docs/
	SCREENSHOTS=docs $(MAKE) test-browser ARGS="-k the_playground"

browser-tools:
	@test -n "$(CHROMIUM)" && command -v npm >/dev/null && node -e '$(NODE_20)' || { \
	    echo "test-browser needs Chromium, Node 20 or later and npm; Debian: apt-get install chromium nodejs npm"; \
	    exit 1; }

$(BROWSER)/.installed: tests/browser/requirements.txt tests/browser/package-lock.json | $(VENV)/.installed-test browser-tools
	@echo "Installing what drives the browser …"
	rm -rf $(BROWSER) && mkdir -p $(BROWSER)/node
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(BROWSER)/python -r $<
	cp tests/browser/package*.json $(BROWSER)/node
	cd $(BROWSER)/node && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

test-examples: $(VENV)/.installed-test ## each example in a new environment of its own, with real stores
	EXAMPLE_ENVIRONMENTS=build/examples $(BIN)/pytest tests/examples $(ARGS)

test-bulk: $(VENV)/.installed-test build/stores/.installed ## encode's output in pandas and LanceDB, and a million rows
	PYTHONPATH=build/stores BULK_ROWS=30000 $(BIN)/pytest tests/server/offline/test_read_back.py $(ARGS)
	CHAOS=full $(BIN)/pytest tests/chaos/test_encode.py $(ARGS)

build/stores/.installed: tests/server/offline/requirements-stores.txt | $(VENV)/.installed-test
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

test-triton: $(VENV)/.installed-test $(TRITON) ## run the fused kernels' tests by Triton's interpreter (700 MB)
	PYTHONPATH=build/triton TRITON_INTERPRET=1 $(BIN)/pytest tests/model/test_fused.py $(ARGS)

$(TRITON):
	rm -rf build/triton
	$(BIN)/pip install --quiet --disable-pip-version-check --target build/triton --no-deps \
	    triton==$(TRITON_VERSION)

check: $(VENV)/.installed-test ## ruff, mypy strict, the layering test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py

fix: $(VENV)/.installed-test ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: $(VENV)/.installed-test ## write openapi.yaml from the app
	$(BIN)/nv-embed openapi > openapi.yaml.new && mv openapi.yaml.new openapi.yaml

graph: $(VENV)/.installed-test ## draw who imports whom: docs/imports.svg
	PYTHONPATH=. $(BIN)/python -m tests.import_graph

gpu-check: $(VENV)/.installed-test ## prove parity and measure on this GPU (MODEL=…, ARGS=--quick)
	$(BIN)/nv-embed gpu-check --model $(or $(MODEL),nvidia/NV-Embed-v2) $(ARGS)

chaos: $(VENV)/.installed-test ## break a real server on purpose, at length (minutes)
	CHAOS=full $(BIN)/pytest tests/chaos $(ARGS)

# An hour: make soak SOAK_MINUTES=60. The samples and a plot go to build/soak.
SOAK_MINUTES ?= 10
soak: $(VENV)/.installed-test ## watch memory, files, tasks and latency under a long mixed load
	PYTHONPATH=. $(BIN)/python -m tests.chaos.soak --minutes $(SOAK_MINUTES) $(ARGS)

# --strict: a package that could not be looked up fails the audit. Without it, and without a network,
# pip-audit skips them all and finds nothing wrong. Another service: make audit ARGS="-s osv".
audit: build/audit/bin/pip-audit ## look for known vulnerabilities in the locked packages
	@for lock in requirements.lock requirements-test.lock requirements-ray.lock; do echo "$$lock:"; \
	    $< --strict --no-deps --disable-pip --progress-spinner off $(ARGS) -r $$lock || { \
	    echo "$$lock: NOT AUDITED, or vulnerable: see above (the service must be reachable)"; \
	    exit 1; }; done

build/audit/bin/pip-audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.7,<3'

bench: $(VENV)/.installed-test ## measure forward, front, large, serve, load and busy (RESULTS=folder; minutes)
	for name in forward front large serve load busy; do \
	    $(BIN)/python -m tests.bench.$$name --results $(RESULTS) $(ARGS) || exit 1; done

bench-peers: $(VENV)/.installed-test ## install other embedding servers, each by itself, and run the same texts
	$(BIN)/python -m tests.bench.peers --results $(RESULTS) $(ARGS)

simulate: $(VENV)/.installed-test ## predict answers/s, p50, p99, refusals by load and number of servers (ARGS=--help)
	$(BIN)/python -m tests.bench.simulate --results $(RESULTS) $(ARGS)

chart-check: $(VENV)/.installed-test build/chart/.installed ## the Helm chart and compose files, without a cluster
	PYTHONPATH=build/chart:. $(BIN)/python -m tests.docker.chart $(ARGS)

build/chart/.installed: tests/docker/requirements-chart.txt | $(VENV)/.installed-test
	@echo "Installing Helm's library and Kubernetes' schemas into build/chart (400 MB) …"
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# In a network of its own: Ray's processes would talk over the machine's address, and ask outside for it.
ALONE = PYTHONPATH=$(CURDIR):$(CURDIR)/build/ray unshare $(if $(filter-out 0,$(shell id -u)),-r) -n
test-ray: $(VENV)/.installed-test build/ray/.installed ## replicas of Ray Serve behind both proxies: killed, deployed anew
	$(ALONE) $(BIN)/python -P -m tests.ray.run $(ARGS)

test-ray-encode: $(VENV)/.installed-test build/ray/.installed ## encode on a Ray cluster whose actors and nodes come and go
	$(ALONE) $(BIN)/python -P -m tests.ray.encode

build/ray/.installed: requirements-ray.lock | $(VENV)/.installed-test
	@echo "Installing Ray into build/ray (600 MB) …"
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

drill: $(VENV)/.installed-test ## renew servers behind HAProxy and nginx, under load: is a request lost?
	PYTHONPATH=. $(BIN)/python -m tests.docker.drill $(ARGS)

observability-check: $(VENV)/.installed-test ## the dashboard's queries on a real Prometheus, each alert by its fault
	PYTHONPATH=. $(BIN)/python -m tests.docker.observability $(ARGS)

# In a folder of its own, with what it downloads: an hour on two idle cores. Debian only. STS, BANKING77 and
# QUESTIONS name what is the reader's to fetch (small.sh says where it comes from).
recipe: $(VENV)/.installed-test ## run the small model's whole recipe on a tenth of its data (SHARE=0.1)
	@for name in STS BANKING77 QUESTIONS; do printenv $$name > /dev/null || \
	    { echo "make recipe: set $$name, as the first lines of model/training/recipes/small.sh say" >&2; exit 2; }; done
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[training]'
	for part in small small2 small3; do SHARE=$(or $(SHARE),0.1) PYTHON=$(BIN)/python \
	    model/training/recipes/$$part.sh build/recipe || exit 1; done

image: ## build the container image nv-embed-server (TORCH=cpu for one without CUDA)
	docker build --build-arg TORCH=$(TORCH) -t nv-embed-server .

# Where no registry can be reached: BASE_IMAGE=debootstrap, as root. What pip needs of this machine to
# reach its index: BUILD_OPTIONS="--volume=/etc/pip.conf:/etc/pip.conf:ro --build-arg=TORCH_INDEX=…".
BUILD_OPTIONS ?=
image-check: $(VENV)/.installed-test build/image-tools/.installed ## build the CPU's image by Podman, run it hardened, compare its vectors (BASE_IMAGE=…)
	PATH="$(CURDIR)/build/image-tools/bin:$$PATH" PYTHONPATH=. $(BIN)/python -m tests.docker.image \
	    $(if $(BASE_IMAGE),--base $(BASE_IMAGE)) $(BUILD_OPTIONS:%=--build-option=%) $(ARGS)

build/image-tools/.installed: tests/docker/requirements-image.txt | $(VENV)/.installed-test
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

tiny-model: $(VENV)/.installed-test ## write a random checkpoint to build/tiny-nv-embed
	$(BIN)/python -m tests.checkpoints build/tiny-nv-embed

# Without torch's own nvidia-* pins; the runtime's versions are those that the tests ran with.
FREEZE = freeze --all --exclude nv-embed-server --exclude pip \
    | sed -E 's/^torch==([0-9.]+).*/torch==\1/' | grep -vE '^(nvidia-|triton|cuda-)'

lock: ## renew requirements.lock and requirements-test.lock
	rm -rf build/lock-test build/lock && mkdir -p build
	$(PYTHON) -m venv build/lock-test && $(PYTHON) -m venv --without-pip build/lock
	build/lock-test/bin/pip install -q $(PIP_FLAGS) torch==2.13.0 '.[test]'
	build/lock-test/bin/pip $(FREEZE) > requirements-test.lock
	build/lock-test/bin/pip --python build/lock install -q $(PIP_FLAGS) -c requirements-test.lock .
	build/lock-test/bin/pip --python build/lock $(FREEZE) > requirements.lock

lock-ray: $(VENV)/.installed-test ## renew requirements-ray.lock, after make lock
	PYTHONPATH=. $(BIN)/python -m tests.ray.lock

clean: ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info

.PHONY: stale
stale:
	@echo "$(VENV) has no Python 3.11 or later: making it anew"

# pip comes last: without it the environment is half made, and the next run goes on.
$(VENV)/bin/pip: $(STALE)
	@$(PYTHON) -c '$(IS_NEW_ENOUGH)' || { \
	    echo "This needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(if $(STALE),--clear) $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment; Debian: apt-get install python3-venv"; \
	    exit 1; }

$(VENV)/.installed: requirements.lock pyproject.toml $(STALE) | $(VENV)/bin/pip
	@echo "Installing what serving needs into $(VENV); this takes minutes the first time …"
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	@echo "Installing the test packages into $(VENV) …"
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-test.lock
	@touch $@
