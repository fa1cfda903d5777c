# Everything a target needs is installed into .venv by launch/venv.sh (Python 3.11 to 3.14, uv used when present).
PY := .venv/bin/python
JOBS ?= 2

.PHONY: help venv quickstart test parity ray nightly lint clean
help:           ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv:           ## make .venv with the package and its test tools
	@launch/venv.sh dev

quickstart:     ## the main job on a laptop CPU: teacher, traces, store, students, report
	@launch/venv.sh
	$(PY) -m distill_jax train configs/quickstart.py

test: venv      ## linter and the test suite
	$(PY) -m ruff check .
	$(PY) -m pytest -n $(JOBS)

parity:         ## comparisons against transformers + torch
	@launch/venv.sh dev parity
	$(PY) -m pytest -m parity

ray:            ## parts of teacher jobs on a Ray cluster of two nodes, one of which is killed
	@launch/venv.sh dev ray
	$(PY) -m pytest -m ray

nightly: test parity ray  ## the slow tests, the long fault campaign, and the quickstart on seeds 1 and 2
	$(PY) -m pytest -m "slow or faults_long"
	$(PY) -m distill_jax train configs/quickstart.py --set seed=1 --set name=quickstart-seed1
	$(PY) -m distill_jax train configs/quickstart.py --set seed=2 --set name=quickstart-seed2

lint: venv      ## ruff and pyright
	$(PY) -m ruff check . && $(PY) -m pyright --pythonpath $(PY)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
