"""Checks that gains in speed have not been lost; run by `make benchmark`.

The bounds are about half of each documented gain, so that a test fails if the gain is lost, not
if it is smaller on another machine.
"""

import functools
import os
import time
import unittest
from unittest import mock

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from benchmarks import input_pipeline
from benchmarks import network
from benchmarks import peers
from benchmarks import rounds
from cpu_kernels import build
from cpu_kernels import operations
from deployment import precision
from deployment import towers

IMAGE_SIZE, BATCH_SIZE, NUM_STEPS, NUM_ROUNDS = 299, 8, 5, 3
NUM_TRAINING_STEPS = 16  # alternating: the gains are a few per cent

PEER_BOUNDS = {
    ('train', 'float32', 'Keras train_on_batch'): 1.13,
    ('train', 'float32', 'timm, channels_last'): 1.05,
    ('train', 'bfloat16', 'timm, channels_last'): 1.05,
    ('inference', 'float32', 'Keras predict_on_batch'): 1.06,
    ('inference', 'float32', 'timm, torch.compile'): 1.15,
    ('inference', 'bfloat16', 'timm, torch.compile'): 1.05,
}


def training_seconds(precision_name='float32'):
  """Builds and warms up a training step; returns a function that times one more."""
  config = towers.session_config(['/cpu:0'])
  # bfloat16 changes the environment, which must not affect the next step.
  with tf.Graph().as_default(), mock.patch.dict(os.environ):
    precision.set_session_options(config, precision_name, xla=False)
    step = network.build_training_step(BATCH_SIZE, IMAGE_SIZE, 1.0, ['/cpu:0'], precision_name,
                                       real_images=False)
    session = tf.Session(config=config)
    towers.initialize(session)
    network.time_steps(lambda: session.run(step.train_op), 1)

  def seconds():
    start = time.perf_counter()
    session.run(step.train_op)
    return time.perf_counter() - start

  return seconds


def inference_rate(fold):
  """Returns the images per second of a frozen graph in bfloat16, folded or not."""
  return network.measure_inference(BATCH_SIZE, IMAGE_SIZE, 1.0, ['/cpu:0'], 'bfloat16', False,
                                   NUM_STEPS, fold)['images_per_second']


class GainsTest(unittest.TestCase):

  def check(self, gain, at_least):
    print(f'\n{self.id().split(".")[-1]}: {gain:.3f} x, {at_least} asked', flush=True)
    self.assertGreater(gain, at_least)

  def compare_steps(self, faster, slower, at_least):
    seconds = rounds.take_turns({'faster': faster, 'slower': slower}, NUM_TRAINING_STEPS)
    self.check(seconds['slower'] / seconds['faster'], at_least)

  def test_gradients_by_matrix_products(self):
    with mock.patch.object(operations, 'CONV2D_GRADIENT', 'Conv2D'):  # TensorFlow's own
      slims = training_seconds()
    self.compare_steps(training_seconds(), slims, 1.02)

  def test_kernels(self):
    self.skip_without_kernels()
    with mock.patch.object(build, 'load', lambda: None):
      tensorflows = training_seconds()
    self.compare_steps(training_seconds(), tensorflows, 1.04)

  def test_kernels_in_bfloat16(self):
    self.skip_without_kernels()
    self.skip_without_bfloat16()
    with mock.patch.object(build, 'load', lambda: None):
      tensorflows = training_seconds('bfloat16')
    self.compare_steps(training_seconds('bfloat16'), tensorflows, 1.17)

  def skip_without_kernels(self):
    if build.load() is None:
      self.skipTest('there is no C++ compiler')

  def skip_without_bfloat16(self):
    try:
      precision.check('bfloat16', False, ['/cpu:0'])
    except towers.DeviceError as error:
      self.skipTest(str(error))

  def test_float32_operations_in_bfloat16_training(self):
    self.skip_without_bfloat16()
    with mock.patch.object(build, 'load', lambda: None):  # which makes the lists unnecessary
      ours = training_seconds('bfloat16')
      with mock.patch.object(precision, 'FLOAT32_OPERATIONS', ()):
        grapplers = training_seconds('bfloat16')
    self.compare_steps(ours, grapplers, 1.025)

  def test_folding_in_bfloat16(self):
    self.skip_without_bfloat16()
    rates = rounds.take_turns({fold: functools.partial(inference_rate, fold)
                               for fold in (True, False)}, NUM_ROUNDS)
    self.check(rates[True] / rates[False], 1.4)

  def test_peers(self):
    for row in peers.compare(['train', 'inference'], BATCH_SIZE, IMAGE_SIZE, NUM_STEPS, NUM_ROUNDS):
      name = row['mode'], row['precision'], row['peer']
      print(f'\n{", ".join(name)}: {row["ratio"]:.2f} x', flush=True)
      with self.subTest(name):
        self.assertGreater(row['ratio'], PEER_BOUNDS.get(name, 1))

  def test_input(self):
    figures = input_pipeline.compare(NUM_ROUNDS)
    print(f'\ninput: {figures["ratio_to_slim"]:.2f} x slim, {figures["ratio_to_keras"]:.2f} x '
          f'Keras, training at {figures["ratio_to_synthetic_training"]:.3f}', flush=True)
    self.assertGreater(figures['ratio_to_slim'], 1.3)
    self.assertGreater(figures['ratio_to_keras'], 2)
    self.assertGreater(figures['ratio_to_synthetic_training'], 0.9)


if __name__ == '__main__':
  unittest.main()
