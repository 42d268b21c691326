# Everything from a fresh clone: each target sets up .venv first if it is missing.
#   make train  make eval  make freeze  make tensorboard  make test

PYTHON ?= python3
LOG_DIR ?= log
DATASET_DIR ?= dataset
# Small images and a narrow network: minutes on two CPU cores. On a GPU, leave
# them out: make train TRAIN_FLAGS=
TRAIN_FLAGS ?= --image_size 128 --depth_multiplier 0.5

RUN = .venv/bin/python

.PHONY: train eval freeze tensorboard test lint test-slow test-cluster test-browser test-clients test-hostile test-gpu \
	benchmark bench-frozen cluster-demo clean

train: .venv/installed
	$(RUN) train_flowers.py --dataset_dir $(DATASET_DIR) --log_dir $(LOG_DIR) $(TRAIN_FLAGS)

eval: .venv/installed
	$(RUN) eval_flowers.py --dataset_dir $(DATASET_DIR) --log_dir $(LOG_DIR)

freeze: .venv/installed
	$(RUN) write_pb.py --log_dir $(LOG_DIR)

tensorboard: .venv/installed
	.venv/bin/tensorboard --logdir $(LOG_DIR) --host 127.0.0.1

test: .venv/installed-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile

# Style and likely mistakes.
lint: .venv/installed-dev
	$(RUN) -m ruff check

# What make test leaves out for its length, clusters apart.
test-slow: .venv/installed-dev
	SLOW_TESTS=1 $(RUN) -m pytest -q tests/pipeline_test.py tests/benchmark_test.py \
		tests/eval_flowers_test.py tests/deployment/mirrored_test.py

# Larger clusters, and every way in which a worker can fail.
test-cluster: .venv/installed-dev
	SLOW_TESTS=1 $(RUN) -m pytest -q tests/deployment/cluster_test.py

# Two workers on this machine train on the flowers: a minute or two.
cluster-demo: .venv/installed
	rm -rf log_cluster
	bash manifests/demo.sh $(RUN) log_cluster

# A frozen model in every program that docs/export.md shows; they are installed beside .venv.
test-clients: .venv-clients/installed
	.venv-clients/bin/python -m pytest -q -rs tests/export tests/write_pb_test.py
	PYTHONPATH=.venv-clients/opencv5 .venv-clients/bin/python -m pytest -q tests/export/clients_test.py -k opencv

# 10,000 damaged images, with the frozen model of make freeze.
test-hostile: .venv/installed
	$(RUN) tests/hostile_images.py --graph frozen_model_xception.pb

# TensorBoard in a real browser; needs Chromium: apt install chromium
test-browser: .venv/installed-dev
	$(RUN) -m pip install -q -r requirements-browser.txt
	$(RUN) -m pytest -q tests/tensorboard_browser.py

# Speed that was gained must stay; on an idle machine.
benchmark: .venv/installed-dev
	$(RUN) -m pytest -q -s tests/speed_gains.py

# Checks and measures training on the GPUs of this machine; prints a report to paste.
test-gpu: .venv/installed
	$(RUN) -m benchmarks.gpu_report

# Frozen models of every format in their runtimes; on an idle machine.
bench-frozen: .venv-clients/installed
	.venv-clients/bin/python -m benchmarks.frozen_speed

# Removes the environments and what was compiled: never logs or data.
clean:
	rm -rf .venv .venv-clients build

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

.venv-clients/installed: requirements.txt requirements-dev.txt requirements-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -r requirements.txt -r requirements-dev.txt -r requirements-clients.txt
	.venv-clients/bin/python -m pip install --no-deps --target .venv-clients/opencv5 "opencv-python-headless>=5,<6"
	touch $@
