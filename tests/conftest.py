"""Prepares every test: TensorFlow 1's behavior, and no GPU."""

import os

# CPUs compute the same everywhere, and a user may be training on the GPUs.
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')

import slim_bridge  # noqa: F401, before TensorFlow: see there

import pytest
import tensorflow.compat.v1 as tf


@pytest.fixture(autouse=True, scope='session')
def graph_mode():
  """Switches TensorFlow 2's behavior off, as the scripts do."""
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
