# make train   set up, train on the default text, write samples       make test    set up, then every check and test
# make check   lint, format and types only                            make clean   all that these made
PYTHON ?= python3

.PHONY: train test check setup clean
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
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/train.stamp

clean:
	rm -rf .venv runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
