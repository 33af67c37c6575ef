# Two environments, both ends of the version range: .venv (newest, constraints.txt) and .venv-colab (constraints-colab.txt).
# The package itself is installed into neither: the notebook has to bring its own copy, and a broken one must show.
PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
EXTRAS = import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(item for name in sys.argv[1:] for item in extras[name]), sep="\n")
DEMO = outputs/demo
REAL_MODEL = outputs/models/smollm2-135m
SHAPE_MODEL = outputs/models/dialogpt-shape

.PHONY: demo demo-again demo-killed demo-experiment test test-colab test-environments test-browser lint notebooks recipe-search soak bench-checkpoints bench-data bench-live-view bench-sweep sweep-memory experiments experiments-full bench bench-colab bench-generate gpu-check data-report real-run real-run-1000 real-run-300 verdict-runs clean

demo: .venv/.installed
	rm -rf $(DEMO)
	$(MAKE) demo-again

# Once more over the run that is there already: it goes on where that was, which is the end.
demo-again: .venv/.installed
	mkdir -p $(DEMO)
	.venv/bin/python -m papermill colab_dpo_training.ipynb $(DEMO)/colab_dpo_training.ipynb \
		-f tests/demo_parameters.yaml --cwd $(DEMO) -k python3 --execution-timeout 300 --no-progress-bar
	.venv/bin/python tools/check_demo.py $(DEMO)

# The kernel of the executing notebook is killed, and the notebook run again: the same adapter as `make demo` has.
demo-killed: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/kill_notebook.py $(DEMO) outputs/demo-killed

# Every section of the experiment notebook in its smallest form: that it runs, not what it finds.
demo-experiment: .venv/.installed
	mkdir -p $(DEMO)
	.venv/bin/python -m papermill dpo_training_experiment.ipynb $(DEMO)/dpo_training_experiment.ipynb \
		-f tests/experiment_parameters.yaml --cwd $(DEMO) -k python3 --execution-timeout 300 --no-progress-bar

# Every section as a reader gets it (one seed, 200 rows); run again and only what is missing runs.
EXPERIMENTS = outputs/experiments
experiments: .venv/.installed
	mkdir -p $(EXPERIMENTS)
	.venv/bin/python -m papermill dpo_training_experiment.ipynb $(EXPERIMENTS)/dpo_training_experiment.ipynb \
		--cwd $(EXPERIMENTS) -k python3 --execution-timeout 900 --no-progress-bar

# All rows and three seeds: the results behind the notebook's prose, which tests/test_experiment_claims.py checks.
FULL_RESULTS = tests/fixtures/experiments/results.jsonl
experiments-full: .venv/.installed
	mkdir -p $(EXPERIMENTS)/full $(dir $(FULL_RESULTS))
	.venv/bin/python -m papermill dpo_training_experiment.ipynb $(EXPERIMENTS)/full/dpo_training_experiment.ipynb \
		-f tests/experiment_full.yaml -p RESULTS $(CURDIR)/$(FULL_RESULTS) --cwd $(EXPERIMENTS)/full -k python3 --no-progress-bar
	.venv/bin/python -m pytest tests/test_experiment_claims.py

test: .venv/.installed lint
	.venv/bin/python -m pytest

test-colab: .venv-colab/.installed
	.venv-colab/bin/python -m pytest -m versions

test-environments: .venv/.installed .venv-colab/.installed
	.venv/bin/python -m pytest tests/environments -m environments

# JupyterLab in a real browser; tools/install_browser.sh brings Debian's Chromium and a Japanese font.
test-browser: .venv/.browser-installed
	.venv/bin/python -m pytest tests/browser -m browser

lint: .venv/.installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

notebooks:
	$(PYTHON) tools/embed_helpers.py

$(REAL_MODEL)/config.json: | .venv/.installed
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt gguf
	.venv/bin/python tools/build_real_model.py $(REAL_MODEL)

# On the really pretrained model, 1,000 rows each: the default, without its warm-up, usual LoRA, and what the experiment notebook
# recommends. About 20 minutes a setting on two cores; run again and only what is missing runs.
recipe-search: $(REAL_MODEL)/config.json
	.venv/bin/python -m dpo_helpers experiment --grid tools/recipe_grid.json --results outputs/recipe-search.jsonl

# Thirty real trainings killed at random moments and resumed from a copy of the mirror: about 10 minutes.
KILLS = 30
soak: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/soak.py outputs/soak --kills $(KILLS)

# What checkpoints and the mirror cost, at the default interval; the slow mirror takes 3 s for every file.
bench-checkpoints: .venv/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/bench_checkpoints.py $(SHAPE_MODEL) outputs/bench-checkpoints/dialogpt-shape.json \
		--rounds 2 --rows 250
	PYTHONPATH=. .venv/bin/python tools/bench_checkpoints.py embedded outputs/bench-checkpoints/embedded.json --rounds 5
	PYTHONPATH=. .venv/bin/python tools/bench_checkpoints.py embedded outputs/bench-checkpoints/slow.json --slow 3

bench-live-view: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/bench_live_view.py outputs/bench_live_view.json

# Eight settings on the shape of DialoGPT, against eight main runs.
bench-sweep: .venv/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/bench_sweep.py $(SHAPE_MODEL) outputs/bench-sweep.json

sweep-memory: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/check_sweep_memory.py

bench-data: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/bench_data.py

$(SHAPE_MODEL)/config.json: | .venv/.installed
	.venv/bin/python tools/build_dialogpt_shape.py $(SHAPE_MODEL)

# DPO's speed: the seed's way, the fastest stock TRL of both environments, and ours, alternating; about ten minutes each.
bench: .venv/.installed .venv-colab/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/bench.py $(SHAPE_MODEL) outputs/bench.json --other .venv-colab/bin/python

bench-colab: .venv/.installed .venv-colab/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv-colab/bin/python tools/bench.py $(SHAPE_MODEL) outputs/bench-colab.json --other .venv/bin/python

# 32 questions in one call against one by one: for the speed in DialoGPT's shape, for equal answers on a trained model.
bench-generate: .venv/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/bench_generate.py $(SHAPE_MODEL) outputs/bench-generate/dialogpt-shape.json
	PYTHONPATH=. .venv/bin/python tools/bench_generate.py embedded outputs/bench-generate/embedded.json

# Trains, measures and checks the precision where CUDA is there; says so where it is not.
gpu-check: .venv/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/gpu_check.py $(SHAPE_MODEL)

# What the generated rows look like, and what the finished ones of the two real runs answer.
FINISHED_RUNS = $(wildcard outputs/real-1000/sft-2/metrics.json outputs/real-1000/sft-0/metrics.json)
data-report: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/data_report.py outputs/data-report $(FINISHED_RUNS:/metrics.json=)

# The default recipe on the really pretrained model, with the warm-up and without; 4 x 1 gives the losses of 1 x 4, sooner.
# A finished run is not repeated. On two cores: 300 rows about 25 minutes, 1,000 rows about 80; run it in the background.
REAL_SETTINGS = --set model_name=$(REAL_MODEL) --set per_device_train_batch_size=4 --set gradient_accumulation_steps=1
real-run: real-run-1000

real-run-1000 real-run-300: real-run-%: $(REAL_MODEL)/config.json
	for epochs in 2 0; do \
		run=outputs/real-$*/sft-$$epochs; \
		.venv/bin/python -m dpo_helpers train $(REAL_SETTINGS) --set sft_epochs=$$epochs \
			--set num_samples=$* --run-dir $$run || exit 1; \
		PYTHONPATH=. .venv/bin/python tools/show_answers.py $$run | tee $$run/answers.md; \
	done

# The runs that the verdict is tested on, good and bad, as small files in tests/fixtures/verdict: about five minutes. Those of the
# really pretrained model: `tools/verdict_runs.py --real $(REAL_MODEL)`, about an hour each.
verdict-runs: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/verdict_runs.py

.venv/.installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt torch
	.venv/bin/python -c '$(EXTRAS)' test notebook > .venv/extras.txt
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -r requirements.txt -r .venv/extras.txt
	touch $@

.venv/.browser-installed: .venv/.installed
	.venv/bin/python -c '$(EXTRAS)' browser > .venv/browser-extras.txt
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -r .venv/browser-extras.txt
	touch $@

# Colab's own Python, torch and kernel; torch and its CUDA libraries are 4.6 GB of downloads, and need no GPU to be imported.
COLAB_PYTHON ?= $(shell for python in python3.13 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13.*/bin/python $(PYTHON); do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && echo $$python && break; done)
.venv-colab/.installed: requirements.txt constraints-colab.txt pyproject.toml
	@test -n "$(COLAB_PYTHON)" || { echo "Colab と同じ Python 3.13 が見つかりません。" \
		"pyenv install 3.13 か、お使いの OS の python3.13 と python3.13-venv で入れてください。" \
		"場所は make test-colab COLAB_PYTHON=/path/to/python3.13 でも指定できます。" >&2; exit 1; }
	@echo "Colab の torch 2.11.0 と同じ版のパッケージを $(COLAB_PYTHON) で入れます。" \
		"約 4.6 GB をダウンロードし、ディスクを約 6 GB 使います。"
	$(COLAB_PYTHON) -m venv --clear .venv-colab
	.venv-colab/bin/python -c '$(EXTRAS)' test notebook > .venv-colab/extras.txt
	.venv-colab/bin/python $(PIP_INSTALL) -c constraints-colab.txt -r requirements.txt -r .venv-colab/extras.txt torchao
	touch $@

clean:
	rm -rf .venv .venv-colab outputs
