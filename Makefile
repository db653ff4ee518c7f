# `make demo` and `make test` work from a clean checkout with Python 3.11. `make help` lists every target.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Python keeps its bytecode: without it, each process that imports open_clip compiles PyTorch again, which takes 6 s.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The kind of .venv: cpu, gpu or trt. Later targets keep it.
FOR := $(or $(shell cat $(VENV)/.for 2>/dev/null),cpu)
PINS_cpu := requirements/all.txt
PINS_gpu := requirements/gpu.txt
PINS_trt := requirements/gpu.txt requirements/tensorrt.txt
PINS := $(PINS_$(FOR))
READY := $(VENV)/.ready-$(FOR)

.PHONY: help setup setup-cpu setup-gpu setup-trt demo serve bench check test test-quick test-long audit soak lint format docs lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 10

setup: $(READY) ## create the environment in .venv and build the two C libraries
	@$(BIN)/python -m clip_tools.c_libraries || true # optional: a failure logs what is lost without them

# A failed setup leaves no stamp, so the next make continues it.
$(READY): $(PINS) requirements/uv.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11, or name another with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11, for which requirements/ is pinned" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) from $(PINS) (some GB the first time)" >&2
	@rm -f $(VENV)/.ready* && echo $(FOR) >$(VENV)/.for
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(BIN)/uv pip sync -q --python $(BIN)/python --require-hashes $(PINS)
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

setup-cpu: ## set up for a machine without a GPU, with OpenVINO: what `make setup` does at first
setup-gpu: ## set up for a GPU host, with CUDA in place of OpenVINO
setup-trt: ## like setup-gpu, and TensorRT, whose package downloads its libraries from NVIDIA

setup-cpu setup-gpu setup-trt:
	@$(MAKE) --no-print-directory setup FOR=$(@:setup-%=%)

demo: setup ## embed photographs with the real server and show the result as a table and a picture
	@$(BIN)/clip-tools demo

serve: setup models/clip_onnx/1/model.onnx ## run the server in the foreground: 8000 HTTP, 8001 gRPC, 8002 metrics
	@exec $(BIN)/clip-tools serve $(ARGS)

models/clip_onnx/1/model.onnx: | setup
	@$(BIN)/clip-tools export-onnx

# The last command fails if a target was missed; all results are written by then.
bench: setup ## measure the speed and write JSON, tables and pictures to results/ (over an hour)
	@$(BIN)/clip-tools bench --soak 20000 $(ARGS)
	@$(BIN)/clip-tools bench --preprocess --output results/preprocess.json >/dev/null
	@$(BIN)/clip-tools serialisation >/dev/null
	@$(BIN)/clip-tools onnx-profile >/dev/null
	@$(BIN)/clip-tools perf --serve --concurrency 1,2,4,8,16,32 --request-rate 5,10,20,30 >/dev/null
	@$(BIN)/clip-tools profile >/dev/null
	@$(BIN)/clip-tools sweep --also results/profile.json >/dev/null
	@$(BIN)/clip-tools report
	@$(BIN)/clip-tools bench --check --result results/bench.json

# Three processes, as tests often wait; tests/conftest.py says which of them runs what. One process with ARGS.
test: setup ## run every test that this machine can run
	@$(BIN)/python -m pytest $(or $(ARGS),-n 3 --no-loadscope-reorder)

check: setup ## run lint, types, and the unit tests that need neither a server nor an export
	@$(MAKE) --no-print-directory --output-sync --jobs 2 lint test-quick

test-quick: setup
	@$(BIN)/python -m pytest -q -n 2 -m "not long and not slow" tests/unit $(ARGS)

test-long: setup ## run the long tests: thousands of broken files, overload, faults, soak (over an hour)
	@$(BIN)/python -m pytest -m "long or promise" $(ARGS)

soak: setup models/clip_onnx/1/model.onnx ## send an hour of good and bad traffic; fails if a request is lost or a resource grows
	@$(BIN)/clip-tools soak $(ARGS)

audit: setup ## check the pinned packages for known vulnerabilities (needs a package index with advisories)
	@$(BIN)/python -m clip_tools.audit $(ARGS)

lint: setup ## check format, lint, types and generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m clip_tools.docs --check
	@$(BIN)/hadolint Dockerfile

format: setup ## fix the format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## write the generated documents
	@$(BIN)/python -m clip_tools.docs

lock: setup ## pin the requirements again (needs the package index)
	@./requirements/lock.sh $(BIN)/uv

clean: ## remove what was built, except the environment and the photographs
	rm -rf .cache/demo .cache/models .pytest_cache .ruff_cache .mypy_cache $(foreach tower,clip_onnx clip_text_onnx,$(addprefix models/$(tower)/1/,model.onnx model.onnx.data manifest.json sample.npz)) models/tokenize/1/merges.txt models/preprocess/1/*.so
