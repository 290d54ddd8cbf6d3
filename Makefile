# make demo      set up .venv, prepare the demo's text, train four runs, print one table and draw their curves (under 5 minutes)
# make test      set up .venv with the test tools and run the tests (under 5 minutes on two cores)
# make test-all  every test in its long form (about a quarter of an hour); CI runs lint and this
# make reliability   the long form of every reliability figure, and their table (about 15 minutes)
# make lint      style and format (ruff)
# make clean     remove what the demo wrote (data/demo, out/); the .venv stays
PYTHON ?= python3
PY = .venv/bin/python
CODE = train.py user.py eval.py model.py lora_moe.py federate.py configurator.py data/stream.py config/default.py config/demo.py \
       run/fleet.py run/journal.py run/report.py run/checkpoint.py run/processes.py assets/base-tiny.safetensors
RUNS = out/demo-local out/demo-fedavg out/demo-1g1s-own out/demo-1g1s-mixture

.PHONY: demo test test-all lint reliability clean

demo: $(RUNS:=/summary.json)
	@echo '== Test perplexity of every user. Local and FedAvg never look at validation text, so one run serves both targets.'
	@$(PY) eval.py $(RUNS) --target=own,mixture
	@for run in $(RUNS); do $(PY) tools/plot.py run $$run; done

out/demo-local/summary.json: ARGS = --method=local
out/demo-fedavg/summary.json: ARGS = --method=fedavg
out/demo-1g1s-own/summary.json: ARGS = --method=comigs_1g1s --target=own
out/demo-1g1s-mixture/summary.json: ARGS = --method=comigs_1g1s --target=mixture

out/demo-%/summary.json: data/demo/meta.json $(CODE)
	@echo '== Training: $(ARGS)'
	@$(PY) train.py config/demo.py $(ARGS) --out_dir=out/demo-$* $$(test ! -e out/demo-$*/summary.json && \
	    ls out/demo-$*/checkpoint/round-* > /dev/null 2>&1 && echo --resume || echo --overwrite)

data/demo/meta.json: .venv/run-ready data/prepare.py data/sources.py data/installed.py
	@echo '== Preparing four users out of text that is installed on this machine'
	@$(PY) data/prepare.py demo --force

test: .venv/test-ready
	@echo '== Running the tests'
	@$(PY) -m pytest -q -n 2 --dist loadfile -m 'not slow'

test-all: .venv/test-ready
	@echo '== Running the tests, the long forms too'
	@$(PY) -m pytest -q -n 2 --dist loadfile

reliability: .venv/test-ready
	@echo '== Running the long form of every reliability figure'
	@RELIABILITY=long $(PY) -m pytest -q -m reliability

lint: .venv/test-ready
	@echo '== Checking style and format'
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.venv/run-ready: requirements.txt
	@echo '== Setting up .venv with the pinned requirements (torch is large; once only)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoCoMiGS needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test-ready: .venv/run-ready requirements-dev.txt
	@echo '== Adding the test tools'
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf data/demo out
