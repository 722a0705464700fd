# Two commands do all the set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A torch that is installed already (for this machine's GPU, say) is respected, not replaced.
# (Not one in an activated virtual environment: a new environment does not see into it.)
HAS_TORCH := $(shell $(PYTHON) -c "import importlib.util as u, sys; print(u.find_spec('torch') and sys.prefix == sys.base_prefix and 1 or '')" 2>/dev/null)
SITE := $(if $(HAS_TORCH),--system-site-packages,)
PINS := $(VENV)/constraints.txt

.PHONY: quickstart test processes zero campaign slow docs coverage mutation faults soak clean

quickstart: $(VENV)/.installed  ## the main job on the bundled small model, offline, a few minutes
	rm -rf quickstart-run
	$(BIN)/lora-dpo quickstart --to quickstart-run

test: $(VENV)/.installed-test  ## lint, types and all tests
	scripts/check $(BIN)

processes: $(VENV)/.installed-test  ## the campaign of several processes, some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/processes/campaign.py -v --capture=sys

zero: $(VENV)/.installed-test  ## two processes under DeepSpeed, skipped where it is not installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/processes/zero.py -v

campaign: $(VENV)/.installed-test  ## bad input by the thousand; its table goes into docs/campaign.md
	$(BIN)/python -m tests.campaign $(CAMPAIGN)

slow: $(VENV)/.installed-test  ## tests that take a minute each: real data of ../shared, benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

docs: $(VENV)/.installed-docs  ## the site, in docs/_build/html/index.html; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html

coverage: $(VENV)/.installed-campaigns  ## lines and branches that the tests reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term --cov-report=json

mutation: $(VENV)/.installed-campaigns  ## defects planted in objectives, log-probs and data: are they noticed?
	$(BIN)/python -m tests.mutation $(MUTANTS)

KILLS ?= 60
faults: $(VENV)/.installed-test  ## kills, full disks, damaged files; writes the table of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --kills $(KILLS) --out docs/reliability.md

soak: $(VENV)/.installed-test  ## thousands of steps; memory, files and pace into docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --out docs/reliability.md

$(BIN)/python:
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(if $(HAS_TORCH),grep -v '^torch==',cat) constraints.txt > $(PINS)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable .
	touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-campaigns: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable '.[campaigns]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) quickstart-run docs/_build docs/api docs/notebooks docs/objectives docs/tables .pytest_cache .mypy_cache .ruff_cache
