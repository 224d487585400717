# make train   set up, train on the default text, write samples       make test    set up, then every check and test
# make check   lint, format and types only                            make clean   all that these made
# make test-torchtext   set up an environment with torchtext beside it, then test the bridge to it (5 GB)
# make test-ray         set up an environment with Ray beside it, then test sweeps on a Ray cluster of this machine
PYTHON ?= python3

.PHONY: train test test-torchtext test-ray check setup setup-torchtext setup-ray clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

train: .venv/train.stamp
	.venv/bin/python train.py

test: check
	.venv/bin/python -m pytest --numprocesses=2 --dist=worksteal

check: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup: .venv/dev.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train.stamp: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[report]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/train.stamp

test-torchtext: setup-torchtext .venv/dev.stamp
	CHARLM_OTHER_PYTHON=$(CURDIR)/.venv/bin/python .venv-torchtext/bin/python -m pytest tests/test_torchtext.py

test-ray: setup-ray
	.venv-ray/bin/python -m pytest tests/test_sweep.py -k "clusters_launcher and ray"

setup-torchtext: .venv-torchtext/dev.stamp

setup-ray: .venv-ray/dev.stamp

# An extra that needs older packages than the others, in an environment of its own.
.venv-%/dev.stamp: pyproject.toml constraints.txt constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	# All of constraints.txt but what the extra's own file has instead.
	sed 's/==.*/==/; s/^/^/' constraints-$*.txt | grep -v -f - constraints.txt \
		| cat - constraints-$*.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable '.[test,$*]'
	touch $@

clean:
	rm -rf .venv .venv-torchtext .venv-ray runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
