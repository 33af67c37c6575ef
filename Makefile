# Two environments, both ends of the version range: .venv (newest, constraints.txt) and .venv-colab (constraints-colab.txt).
# The package itself is installed into neither: the notebook has to bring its own copy, and a broken one must show.
PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
EXTRAS = import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(item for name in sys.argv[1:] for item in extras[name]), sep="\n")
DEMO = outputs/demo
REAL_MODEL = outputs/models/smollm2-135m
SHAPE_MODEL = outputs/models/dialogpt-shape

.PHONY: demo test test-colab test-environments test-browser lint notebooks bench soak real-run experiments gpu-check clean

# Both notebooks as a reader runs them, the main one twice: the second time it goes on where the first one was, at the end.
# Then its kernel is killed in the middle, and it is run again. tests/test_demo.py says what must have come out of it.
PAPERMILL = .venv/bin/python -m papermill -k python3 --execution-timeout 300 --no-progress-bar
demo: .venv/.installed
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	for name in colab_dpo_training again; do \
		$(PAPERMILL) colab_dpo_training.ipynb $(DEMO)/$$name.ipynb -f tests/demo_parameters.yaml --cwd $(DEMO) || exit 1; \
	done
	$(PAPERMILL) dpo_training_experiment.ipynb $(DEMO)/dpo_training_experiment.ipynb \
		-f tests/experiment_parameters.yaml --cwd $(DEMO)
	PYTHONPATH=. .venv/bin/python tools/kill_notebook.py $(DEMO) outputs/demo-killed
	.venv/bin/python -m pytest -s -m demo tests/test_demo.py

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

# Speed: the seed's way, the fastest stock TRL of both environments and ours; generation; a sweep; checkpoints. An hour.
bench: .venv/.installed .venv-colab/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/bench.py training $(SHAPE_MODEL) --other .venv-colab/bin/python
	PYTHONPATH=. .venv/bin/python tools/bench.py generation $(SHAPE_MODEL)
	PYTHONPATH=. .venv/bin/python tools/bench.py sweep $(SHAPE_MODEL)
	PYTHONPATH=. .venv/bin/python tools/bench.py checkpoints embedded

# Real trainings killed at random moments and resumed from a copy of the mirror: 30 take about 10 minutes.
KILLS = 30
soak: .venv/.installed
	PYTHONPATH=. .venv/bin/python tools/soak.py outputs/soak --kills $(KILLS)

# The default recipe on the really pretrained model; 4 x 1 gives the losses of 1 x 4, sooner. A finished run is not repeated.
# On two cores: 300 rows about 12 minutes, 1,000 rows about 40. Without the warm-up: REAL="--set sft_epochs=0".
ROWS = 1000
REAL =
real-run: $(REAL_MODEL)/config.json
	.venv/bin/python -m dpo_helpers train --set model_name=$(REAL_MODEL) --set per_device_train_batch_size=4 \
		--set gradient_accumulation_steps=1 --set num_samples=$(ROWS) $(REAL) --run-dir outputs/real-run

# Every section of the experiment notebook as a reader gets it; run again, and only what is missing runs.
experiments: .venv/.installed
	mkdir -p outputs/experiments
	$(PAPERMILL) dpo_training_experiment.ipynb outputs/experiments/dpo_training_experiment.ipynb --cwd outputs/experiments

# Trains, measures and checks the precision where CUDA is there; says so where it is not.
gpu-check: .venv/.installed $(SHAPE_MODEL)/config.json
	PYTHONPATH=. .venv/bin/python tools/gpu_check.py $(SHAPE_MODEL)

$(REAL_MODEL)/config.json: | .venv/.installed
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt gguf
	.venv/bin/python tools/build_models.py real $(REAL_MODEL)

$(SHAPE_MODEL)/config.json: | .venv/.installed
	.venv/bin/python tools/build_models.py shape $(SHAPE_MODEL)

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
