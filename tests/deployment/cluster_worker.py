"""Trains as train_flowers.py does, then stores the final weights of this worker.

  TF_CONFIG=... python tests/deployment/cluster_worker.py WEIGHTS.npz [--frozen] ...

--frozen freezes batch norm, whose statistics depend on how the images are divided among
towers; the number of threads is TensorFlow's default for the same reason. --drift changes one
weight of this worker after that step. --prefetch prefetches to the towers' devices.
"""

import argparse
import functools
import os
import sys
from unittest import mock

sys.path.insert(0, os.path.abspath(f'{__file__}/../../..'))

import numpy as np
import tensorflow.compat.v1 as tf

from deployment import cluster
from deployment import towers
import train_flowers
from training import options
from training import step as training_step


class StoreWeightsHook(tf.train.SessionRunHook):
  """Writes every variable to a file when training ends."""

  def __init__(self, path, drift):
    self._path = path
    self._drift = drift

  def begin(self):
    weights = tf.trainable_variables()[0]
    self._change = weights.assign(weights * 1.01)

  def after_run(self, run_context, run_values):
    if run_context.session.run(tf.train.get_global_step()) == self._drift:
      run_context.session.run(self._change)

  def end(self, session):
    np.savez(self._path, **session.run({v.op.name: v for v in tf.global_variables()}))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('weights')
  parser.add_argument('--frozen', action='store_true')
  parser.add_argument('--drift', type=int)
  parser.add_argument('--prefetch', action='store_true')
  args, train_options = parser.parse_known_args()
  tower_loss, build_hooks = training_step.tower_loss, train_flowers.build_hooks

  def loss(*batch, is_training, **kwargs):
    return tower_loss(*batch, is_training=is_training and not args.frozen, **kwargs)

  def hooks(*hook_args):
    return {**build_hooks(*hook_args), 'weights': StoreWeightsHook(args.weights, args.drift)}

  with mock.patch.object(training_step, 'tower_loss', loss), \
       mock.patch.object(train_flowers, 'build_hooks', hooks), \
       mock.patch.object(training_step, 'build_train_step', functools.partial(
           training_step.build_train_step, prefetch=args.prefetch)), \
       mock.patch.object(towers, 'start_threads'):
    try:
      train_flowers.main(options.parse_train_args('', train_options))
    except (cluster.ClusterError, training_step.TrainingError) as error:
      sys.exit(f'train_flowers.py: {error}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  main()
