# Every target sets itself up: .venv is made once, and again when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet

.PHONY: demo gallery docs test test-all parity lint clean

## Pictures from the shipped model, in outputs/
demo: $(VENV)/.demo
	$(RUN) -m launch.generate --config=configs/emoji.py --seed=7 --out=outputs \
	  --prompt="red apple" --prompt="alien" --prompt="rocket" --prompt="man student" \
	  --prompt="hundred points" --prompt="rooster" --prompt="musical note" --prompt="red heart" \
	  --prompt="four leaf clover"

## What the shipped model can be conditioned on, in one picture
gallery: $(VENV)/.demo
	$(RUN) -m launch.gallery --out=outputs/gallery.png

## The pages, in site/
docs: $(VENV)/.test
	$(RUN) -m mkdocs build --strict

## The tests that need neither torch, network nor accelerator, but for the slow ones
test: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist worksteal --ignore=tests/parity -m 'not slow'

## The same with the slow ones: killed 8 times, on 8 devices, what the shipped model draws ...
test-all: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist worksteal --ignore=tests/parity

## Comparisons with torch, diffusers and transformers (CPU); a process per core, a thread each
parity: $(VENV)/.parity
	OMP_NUM_THREADS=1 JAXSD_FUSIONS=1 $(RUN) -m pytest -n auto --dist worksteal tests/parity

## Style and types
lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) outputs site .cache .pytest_cache .ruff_cache .mypy_cache

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: jaxsd needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(RUN)
	$(PIP) --editable '.[hints]'
	touch $@

$(VENV)/.test: pyproject.toml | $(RUN)
	$(PIP) --editable '.[test]'
	touch $(VENV)/.demo $@

# On Linux PyPI's torch carries CUDA; pip's settings may name torch's own CPU index instead.
# Of controlnet_aux only the drawing of poses is used; what it requires beside numpy and OpenCV
# serves its networks, and a torchvision from another index than torch breaks transformers; so of
# spandrel, which requires that too, only some of its networks.
$(VENV)/.parity: pyproject.toml Makefile | $(RUN)
	$(PIP) --editable '.[test,parity]'
	$(PIP) --no-deps controlnet_aux==0.0.10 spandrel==0.4.2 spandrel_extra_arches==0.2.0 \
	  tomesd==0.1.3 DeepCache==0.1.1
	touch $(VENV)/.demo $(VENV)/.test $@
