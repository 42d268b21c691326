# Everything from a fresh clone: each target sets up .venv first if it is missing.
#   make train  make eval  make freeze  make tensorboard  make test

PYTHON ?= python3
LOG_DIR ?= log
DATASET_DIR ?= dataset
# Small images and a narrow network: minutes on two CPU cores. On a GPU, leave
# them out: make train TRAIN_FLAGS=
TRAIN_FLAGS ?= --image_size 128 --depth_multiplier 0.5

RUN = .venv/bin/python

.PHONY: train eval freeze tensorboard test clean

train: .venv/installed
	$(RUN) train_flowers.py --dataset_dir $(DATASET_DIR) --log_dir $(LOG_DIR) $(TRAIN_FLAGS)

eval: .venv/installed
	$(RUN) eval_flowers.py --dataset_dir $(DATASET_DIR) --log_dir $(LOG_DIR)

freeze: .venv/installed
	$(RUN) write_pb.py --log_dir $(LOG_DIR)

tensorboard: .venv/installed
	.venv/bin/tensorboard --logdir $(LOG_DIR) --host 127.0.0.1

test: .venv/installed
	$(RUN) -m pytest -q xception_test.py tests

# Removes the environment only: never logs or data.
clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.txt
	touch $@
