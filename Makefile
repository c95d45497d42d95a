# `make demo` and `make test` are all a newcomer needs; the environment is created on the way.
PYTHON ?= python3
ENVIRONMENT := .venv
RUN := $(ENVIRONMENT)/bin/python
WITH_GRADIO := .venv-app
PYTEST := $(RUN) -m pytest --numprocesses 2 --dist loadfile
LOCK := $(ENVIRONMENT)/bin/uv pip compile --universal --python-version 3.11 --quiet --upgrade --custom-compile-command 'make lock'

# The demo is small, so that the whole chain runs in minutes on two cores. BACKBONE=densenet121 takes longer.
DEMO := demo
IN_DEMO := --data $(DEMO)/data --graphics $(DEMO)/graphics
SAMPLE := --train 480
SIZE := 96
SEGMENTATION := --input-size 64 --epochs 4 --learning-rate 3e-3 --ema 0.8 --views 1
BACKBONE ?= mobilenet
TRAINING := --learning-rate 1e-3 $(if $(filter mobilenet,$(BACKBONE)),--input-size 64 --epochs 8,--epochs 12)

# gpu-report: an environment for each library, because they need different versions of CUDA. CPU=1 needs none of them.
WITH := gpu jax torch
MINUTES := 10
ON_CPU := $(if $(CPU),$(ENVIRONMENT)/dev.installed)

.DEFAULT_GOAL := help
.PHONY: help setup demo chain gpu-report test test-app test-all lint figures lock clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(ENVIRONMENT)/requirements.installed: requirements.txt
$(ENVIRONMENT)/dev.installed: requirements/dev.txt
$(WITH:%=$(ENVIRONMENT)/%.installed): $(ENVIRONMENT)/%.installed: requirements/%.txt
$(ENVIRONMENT)/%.installed:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; use another: make PYTHON=python3.12 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(ENVIRONMENT)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

setup: $(ENVIRONMENT)/requirements.installed  ## only create the environment .venv

demo: $(ENVIRONMENT)/requirements.installed  ## run the five scripts on synthetic images: minutes on a CPU, no data or weights to download
	@$(MAKE) --no-print-directory chain

chain:
	@rm -rf $(DEMO)
	$(RUN) -m melanoma.sources.synthetic --out $(DEMO)/source $(SAMPLE)
	$(RUN) segmentation_01_preprocessing.py --source $(DEMO)/source $(IN_DEMO) --size $(SIZE)
	$(RUN) segmentation_02_segnet_train.py $(IN_DEMO) --network segnet $(SEGMENTATION)
	$(RUN) image_mask_array.py $(IN_DEMO)
	$(RUN) densenet_train.py $(IN_DEMO) --backbone $(BACKBONE) --weights none $(TRAINING)
	$(RUN) evaluate.py $(IN_DEMO)
	@echo; echo "The PNGs:"; ls $(DEMO)/graphics/*.png

gpu-report: $(ON_CPU)  ## measure training and prediction on an NVIDIA GPU in ten minutes; CPU=1: try it at toy size
ifdef CPU
	$(RUN) -m benchmarks.gpu_report --cpu --minutes $(MINUTES)
else
	@nvidia-smi -L | grep -q '^GPU' || { echo 'nvidia-smi lists no NVIDIA GPU; make gpu-report CPU=1 tries it at toy size' >&2; exit 2; }
	@for name in $(WITH); do $(MAKE) --no-print-directory ENVIRONMENT=$(ENVIRONMENT)-$$name $(ENVIRONMENT)-$$name/$$name.installed || exit; done
	$(ENVIRONMENT)-$(firstword $(WITH))/bin/python -m benchmarks.gpu_report --minutes $(MINUTES) --python $(WITH:%=$(ENVIRONMENT)-%/bin/python)
endif

test: $(ENVIRONMENT)/dev.installed  ## run the quick tests
	$(PYTEST) -m "not slow"

# Gradio needs an older Pillow than the other packages, which this environment takes from the main one.
$(WITH_GRADIO)/app_test.installed: requirements/app_test.txt $(ENVIRONMENT)/dev.installed
	$(RUN) -m venv $(WITH_GRADIO)
	$(RUN) -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$$($(WITH_GRADIO)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	$(WITH_GRADIO)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-app: $(WITH_GRADIO)/app_test.installed  ## run the tests of app.py with Gradio, and in Chromium if it is there
	$(WITH_GRADIO)/bin/python -m pytest tests/chain/test_app.py

test-all: $(ENVIRONMENT)/dev.installed test-app  ## run all tests, also those of XLA, JAX, Dask, kills, real data
	$(PYTEST)

lint: $(ENVIRONMENT)/dev.installed  ## check style, types and the import layers of the package
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(ENVIRONMENT)/bin/lint-imports

figures: $(ENVIRONMENT)/requirements.installed  ## draw the diagrams of the two networks
	$(RUN) -m tools.schematics

lock: $(ENVIRONMENT)/dev.installed  ## update the pinned requirements to the newest versions
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) requirements/gpu.in -c requirements.txt -o requirements/gpu.txt
	$(LOCK) requirements/jax.in -c requirements.txt -o requirements/jax.txt
	$(LOCK) requirements/export.in -c requirements.txt -o requirements/export.txt
	$(LOCK) requirements/cluster.in -c requirements.txt -o requirements/cluster.txt
	$(LOCK) requirements/many.in -c requirements.txt -o requirements/many.txt
	$(LOCK) requirements/dev.in -c requirements/cluster.txt -c requirements/export.txt -c requirements/many.txt -o requirements/dev.txt
	$(LOCK) requirements/torch.in -c requirements.txt -o requirements/torch.txt
	$(LOCK) requirements/app.in -o requirements/app.txt
	$(LOCK) requirements/app_test.in -c requirements/app.txt -o requirements/app_test.txt
	$(LOCK) requirements/challenge.in -o requirements/challenge.txt

clean:  ## remove the environment and the demo
	rm -rf $(ENVIRONMENT) $(WITH_GRADIO) $(WITH:%=$(ENVIRONMENT)-%) $(DEMO)
