"""Trains as train_flowers.py does, and stores the weights that this worker ends with.

  TF_CONFIG=... python tests/cluster_worker.py WEIGHTS.npz [--frozen] OPTIONS

--frozen freezes batch norm, whose statistics are of one tower's images: then a
step is the same arithmetic however its images are shared.
"""

import os
import sys
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tensorflow.compat.v1 as tf

import cluster
import options
import train_flowers


class StoreWeightsHook(tf.train.SessionRunHook):
  """Writes every variable to a file when training ends."""

  def __init__(self, path):
    self._path = path

  def end(self, session):
    np.savez(self._path, **session.run({v.op.name: v for v in tf.global_variables()}))


def main(path, argv):
  tower_loss, build_hooks = train_flowers.tower_loss, train_flowers.build_hooks
  if '--frozen' in argv:
    argv.remove('--frozen')
    tower_loss = lambda *args, is_training, **kwargs: train_loss(
        *args, is_training=False, **kwargs)
  train_loss = train_flowers.tower_loss

  def hooks(*args):
    return {**build_hooks(*args), 'weights': StoreWeightsHook(path)}

  with mock.patch.object(train_flowers, 'tower_loss', tower_loss), \
       mock.patch.object(train_flowers, 'build_hooks', hooks):
    try:
      train_flowers.main(options.parse_train_args('', argv))
    except (cluster.ClusterError, train_flowers.TrainingError) as error:
      sys.exit(f'train_flowers.py: {error}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  main(sys.argv[1], sys.argv[2:])
