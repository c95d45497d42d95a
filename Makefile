# Everything a newcomer needs: `make demo`, `make test`. The environment is made on the way.
PYTHON ?= python3
ENVIRONMENT := .venv
RUN := $(ENVIRONMENT)/bin/python
LOCK := $(ENVIRONMENT)/bin/uv pip compile --universal --python-version 3.11 --quiet --upgrade --custom-compile-command 'make lock'

# The demo works small: 96-pixel images and few epochs show the chain in minutes on two cores.
DEMO := demo
IN_DEMO := --data $(DEMO)/data --graphics $(DEMO)/graphics

.DEFAULT_GOAL := help
.PHONY: help demo test lint figures lock clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(ENVIRONMENT)/%.installed: %.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(ENVIRONMENT)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

demo: $(ENVIRONMENT)/requirements.installed  ## the five scripts on a drawn sample: no network, no weights, minutes on a CPU
	@rm -rf $(DEMO)
	$(RUN) -m melanoma.phantom --out $(DEMO)/source
	$(RUN) segmentation_01_preprocessing.py --source $(DEMO)/source $(IN_DEMO) --size 96
	$(RUN) segmentation_02_segnet_train.py $(IN_DEMO) --network segnet --network-size 64 --epochs 16 --averaging 0.9
	$(RUN) image_mask_array.py $(IN_DEMO)
	$(RUN) densenet_train.py $(IN_DEMO) --weights none --epochs 12 --learning-rate 1e-3
	$(RUN) evaluate.py $(IN_DEMO)
	@echo; echo "Open $(DEMO)/graphics/report.html; its pictures and some more:"; ls $(DEMO)/graphics/*.png

test: $(ENVIRONMENT)/requirements-dev.installed  ## all tests
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

lint: $(ENVIRONMENT)/requirements-dev.installed  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

figures: $(ENVIRONMENT)/requirements.installed  ## README's drawings of the two networks
	$(RUN) -m melanoma.schematics

lock: $(ENVIRONMENT)/requirements-dev.installed  ## newest versions into the locks
	$(LOCK) requirements.in -o requirements.txt
	$(LOCK) requirements-gpu.in -c requirements.txt -o requirements-gpu.txt
	$(LOCK) requirements-jax.in -c requirements.txt -o requirements-jax.txt
	$(LOCK) requirements-cpu.in -c requirements.txt -o requirements-cpu.txt
	$(LOCK) requirements-cluster.in -c requirements.txt -o requirements-cluster.txt
	$(LOCK) requirements-dev.in -c requirements-cluster.txt -c requirements-cpu.txt -o requirements-dev.txt
	$(LOCK) benchmarks/requirements-torch.in -c requirements-cpu.txt -o benchmarks/requirements-torch.txt

clean:  ## takes environment and demo away
	rm -rf $(ENVIRONMENT) $(DEMO)
