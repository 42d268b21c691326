"""A small Xception, without the time training takes: its checkpoints, images and batch norms."""

import functools
import os

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from records import flowers
from scripts import DATASET_DIR
import xception

IMAGE_SIZE = 71
GLOBAL_STEP = 7
CLASS_NAMES = ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips']
CONFIG = checkpoints.ModelConfig(CLASS_NAMES, IMAGE_SIZE, depth_multiplier=0.125, seed=1)


def num_norms(graph_def):
  """Returns the number of batch norms in a graph."""
  return sum(node.op.startswith('FusedBatchNorm') for node in graph_def.node)


def validation_images():
  """float32 [100, IMAGE_SIZE, IMAGE_SIZE, 3] in [-1, 1], and their labels, int64 [100]."""
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(flowers.load_batch(
        flowers.get_split('validation', DATASET_DIR), 100, IMAGE_SIZE, IMAGE_SIZE,
        is_training=False))


def write_checkpoint(folder, step=GLOBAL_STEP, with_averages=False, is_fitted=True):
  """Writes a checkpoint and the configuration beside it.

  The layers are random. No batch norm is neutral, so that a fold that leaves out
  one of its numbers shows.

  Args:
    folder: where to write.
    step: the checkpoint's global step.
    with_averages: stores Polyak averages too; the weights of the logits are then
      the negative of their averages.
    is_fitted: True fits the logits to the validation images, so that the network
      is sure about them; False draws them, others for each step.

  Returns:
    The checkpoint's path.
  """
  session, averages, fitted = _network()
  with session.graph.as_default():
    logits = {variable.op.name.split('/')[-1]: variable
              for variable in slim.get_model_variables('Xception/Logits')}
    weights, biases = fitted if is_fitted else (
        np.random.default_rng(step).normal(0.0, 0.3, fitted[0].shape), np.zeros_like(fitted[1]))
    averages[logits['weights']].load(weights, session)
    averages[logits['biases']].load(biases, session)
    logits['weights'].load(-weights if with_averages else weights, session)
    logits['biases'].load(biases, session)
    tf.train.get_global_step().load(step, session)
    variables = set(tf.global_variables())
    if not with_averages:
      variables.difference_update(averages.values())
    checkpoints.save_config(CONFIG, folder)
    return tf.train.Saver(list(variables)).save(
        session, os.path.join(folder, 'model.ckpt'), step, write_meta_graph=False)


@functools.cache
def _network():
  """Returns a session, {variable: its average}, and fitted weights and biases of the logits."""
  images, labels = validation_images()
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    tf.train.get_or_create_global_step()
    with slim.arg_scope(xception.xception_arg_scope(batch_norm_decay=0.0)):
      _, end_points = xception.xception(
          tf.constant(images), CONFIG.num_classes, dropout_keep_prob=1.0,
          depth_multiplier=CONFIG.depth_multiplier)
    variables = slim.get_model_variables()
    moving = tf.train.ExponentialMovingAverage(0.0)
    average = moving.apply(variables)
    session = tf.Session()
    session.run(tf.global_variables_initializer())
    random = np.random.default_rng(1)
    for variable in variables:
      if variable.op.name.endswith('gamma'):
        variable.load(random.uniform(0.5, 1.5, variable.shape), session)
      elif variable.op.name.endswith('beta'):
        variable.load(random.normal(0.0, 0.3, variable.shape), session)
    features, _ = session.run([end_points['block15_avg_pool'],
                               tf.get_collection(tf.GraphKeys.UPDATE_OPS)])
    session.run(average)
    weights, biases = _fit(features.reshape([len(labels), -1]), labels)
    return (session, {variable: moving.average(variable) for variable in variables},
            (weights[np.newaxis, np.newaxis], biases))


def _fit(features, labels):
  """Returns weights and biases of logits, by ridge regression."""
  mean = features.mean(0)
  centred = features - mean
  targets = np.eye(len(CLASS_NAMES))[labels] - 1.0 / len(CLASS_NAMES)
  covariance = centred.T @ centred
  ridge = 0.2 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
  weights = 20.0 * np.linalg.solve(covariance + ridge, centred.T @ targets)
  return weights.astype(np.float32), (-mean @ weights).astype(np.float32)
