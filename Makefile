# make demo, make test: from a clean checkout, with Python 3.11. The rest is in `make help`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What .venv is made for, cpu, gpu or trt; later targets keep it.
FOR := $(or $(shell cat $(VENV)/.for 2>/dev/null),cpu)
PINS_cpu := requirements/all.txt
PINS_gpu := requirements/gpu.txt
PINS_trt := requirements/gpu.txt requirements/tensorrt.txt
PINS := $(PINS_$(FOR))
READY := $(VENV)/.ready-$(FOR)

.PHONY: help setup setup-cpu setup-gpu setup-trt demo serve bench check test test-quick test-long audit soak lint format docs lock clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 10

setup: $(READY) ## the environment, in .venv, and our two C libraries
	@$(BIN)/python -m clip_tools.c_libraries || true # it says what works less well without them

# A failed set-up leaves no stamp, so the next make goes on from there.
$(READY): $(PINS) requirements/uv.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11, or name another with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11, for which requirements/ is pinned" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) from $(PINS) (the first time: some GB)" >&2
	@rm -f $(VENV)/.ready* && echo $(FOR) >$(VENV)/.for
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(BIN)/uv pip sync -q --python $(BIN)/python --require-hashes $(PINS)
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

setup-cpu: ## the environment of a machine without a GPU, which `make setup` makes at first: OpenVINO
setup-gpu: ## that of a GPU host: CUDA in place of OpenVINO
setup-trt: ## the same and TensorRT, whose package fetches its libraries from NVIDIA

setup-cpu setup-gpu setup-trt:
	@$(MAKE) --no-print-directory setup FOR=$(@:setup-%=%)

demo: setup ## photographs to embeddings through the real server, shown as a table and a picture
	@$(BIN)/clip-tools demo

serve: setup models/clip_onnx/1/model.onnx ## the server in the foreground: 8000 HTTP, 8001 gRPC, 8002 metrics
	@exec $(BIN)/clip-tools serve $(ARGS)

models/clip_onnx/1/model.onnx: | setup
	@$(BIN)/clip-tools export-onnx

# The last line judges, when all is written: it fails when a target is missed.
bench: setup ## how fast it is: fills results/ with JSON, tables and pictures (over an hour)
	@$(BIN)/clip-tools bench --soak 20000 $(ARGS)
	@$(BIN)/clip-tools bench --preprocess --output results/preprocess.json >/dev/null
	@$(BIN)/clip-tools serialisation >/dev/null
	@$(BIN)/clip-tools onnx-profile >/dev/null
	@$(BIN)/clip-tools perf --serve --concurrency 1,2,4,8,16,32 --request-rate 5,10,20,30 >/dev/null
	@$(BIN)/clip-tools profile >/dev/null
	@$(BIN)/clip-tools sweep --also results/profile.json >/dev/null
	@$(BIN)/clip-tools report
	@$(BIN)/clip-tools bench --check --result results/bench.json

# In two processes: one has the servers, the other the rest (tests/conftest.py); in one where ARGS names some.
test: setup ## every test this machine can run
	@$(BIN)/python -m pytest $(or $(ARGS),-n 2 --no-loadscope-reorder)

check: setup ## the quick loop: lint, types, and the unit tests that need no server and no export
	@$(MAKE) --no-print-directory --output-sync --jobs 2 lint test-quick

test-quick: setup
	@$(BIN)/python -m pytest -q -n 2 -m "not long and not slow" tests/unit $(ARGS)

test-long: setup ## the long forms: thousands of broken files, overload, faults, soak (most of an hour)
	@$(BIN)/python -m pytest -m "long or promise" $(ARGS)

soak: setup models/clip_onnx/1/model.onnx ## an hour of good and bad traffic; fails when something is lost or grows
	@$(BIN)/clip-tools soak $(ARGS)

audit: setup ## known vulnerabilities of the pinned packages (needs the index's own advisories)
	@$(BIN)/python -m clip_tools.audit $(ARGS)

lint: setup ## format, lint, types, generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m clip_tools.docs --check
	@$(BIN)/hadolint Dockerfile

format: setup ## put the format right
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## write the generated documents anew
	@$(BIN)/python -m clip_tools.docs

lock: setup ## resolve the requirements anew (needs the package index)
	@./requirements/lock.sh $(BIN)/uv

clean: ## remove what was built; the environment and the photographs stay
	rm -rf .cache/demo .cache/models .pytest_cache .ruff_cache .mypy_cache $(foreach tower,clip_onnx clip_text_onnx,$(addprefix models/$(tower)/1/,model.onnx model.onnx.data manifest.json sample.npz)) models/tokenize/1/merges.txt models/preprocess/1/*.so
