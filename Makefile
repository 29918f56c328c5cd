# Every target sets up its own environment in .venv; all it needs before is Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick check docs bench gpu-bench gpu-wheels torture clean

demo: .venv/demo
	$(BIN)/python pipelines/demo.py --work demo

# on all cores, a file of tests on one, in the order of tests/conftest.py; a process that dies ends it, since what it left
# could hang the others
test: .venv/test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# under 3 minutes on two cores: without tests that take over 5 seconds, and with few cases of what has many
test-quick: .venv/test
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# warnings are errors: a broken link, an unknown option or a page outside the contents
docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet --builder html docs docs/_build

bench: .venv/bench
	$(BIN)/python tests/benchmarks/bench.py --work runs/bench

# on a machine whose Python has PyTorch for its GPU, and the packages of gpu-wheels
gpu-bench:
	$(PYTHON) tests/benchmarks/gpu.py --out runs/gpu

# for a machine without a network: copy the folder there, and `pip install --no-index --no-deps .wheels/*.whl`
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --dest .wheels --requirement tests/benchmarks/gpu_wheels.txt

torture: .venv/test
	$(BIN)/python tests/torture/torture.py --work runs/torture

# torch first and pinned: a range would let pip fetch gigabytes of CUDA packages where a CPU build is at hand
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	touch $@

.venv/demo: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,demo,report]'
	touch $@

# CLIP_benchmark without what it asks for: its metrics need nothing of it
# timm apart, with torchvision, whose compiled part does not load beside a CPU build of torch: transformers would take
# other image processors with it; without them, their test is skipped
.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,demo,report,audio,large,logging,objects,onnx,ray,video,test]' 'mteb>=2.26,<3'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps clip-benchmark
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target .venv/timm timm torchvision
	touch $@

.venv/docs: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs,report]'
	touch $@

# LitData without what it asks for: torchvision is of no use here
.venv/bench: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,bench,objects]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps litdata
	touch $@

clean:
	rm -rf .venv demo build docs/_build docs/generated *.egg-info
