# make train   set up, train on the default text, write samples       make test    set up, then every check and test
# make check   lint, format and types only                            make clean   all that these made
# make test-torchtext   set up an environment with torchtext beside it, then test the bridge to it (5 GB)
PYTHON ?= python3

.PHONY: train test test-torchtext check setup setup-torchtext clean
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

setup-torchtext: .venv-torchtext/dev.stamp

.venv-torchtext/dev.stamp: pyproject.toml constraints.txt constraints-torchtext.txt
	$(PYTHON) -m venv .venv-torchtext
	# All of constraints.txt but what constraints-torchtext.txt has instead.
	sed 's/==.*/==/; s/^/^/' constraints-torchtext.txt | grep -v -f - constraints.txt \
		| cat - constraints-torchtext.txt > .venv-torchtext/constraints.txt
	.venv-torchtext/bin/python -m pip install --quiet --constraint .venv-torchtext/constraints.txt \
		--editable '.[test,torchtext]'
	touch $@

clean:
	rm -rf .venv .venv-torchtext runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
