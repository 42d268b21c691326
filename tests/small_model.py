"""A small Xception with a checkpoint, for the tests of what is made of one."""

import os

import numpy as np
import tensorflow.compat.v1 as tf

import checkpoints
import flowers
import tf_slim as slim
import xception

DATASET_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'dataset')
IMAGE_SIZE = 71
GLOBAL_STEP = 7
CLASS_NAMES = ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips']


def validation_images():
  """float32 [100, IMAGE_SIZE, IMAGE_SIZE, 3] in [-1, 1], and their labels, int64 [100]."""
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(flowers.load_batch(
        flowers.get_split('validation', DATASET_DIR), 100, IMAGE_SIZE, IMAGE_SIZE,
        is_training=False))


def write_checkpoint(folder, with_averages=False):
  """Writes a checkpoint that is sure about the validation images; returns its path.

  Random layers, and logits fitted to their features: nobody has to wait for
  training. No batch norm is neutral, so that a fold that leaves one of its
  numbers out shows. The averages know the labels, the weights themselves are
  negated.
  """
  images, labels = validation_images()
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(1)
    with slim.arg_scope(xception.xception_arg_scope(batch_norm_decay=0.0)):
      _, end_points = xception.xception(tf.constant(images), len(CLASS_NAMES),
                                        dropout_keep_prob=1.0, depth_multiplier=0.125)
    variables = slim.get_model_variables()
    global_step = tf.train.get_or_create_global_step()
    session.run(tf.global_variables_initializer())
    global_step.load(GLOBAL_STEP, session)
    random = np.random.default_rng(1)
    for variable in variables:
      if variable.op.name.endswith('gamma'):
        variable.load(random.uniform(0.5, 1.5, variable.shape), session)
      elif variable.op.name.endswith('beta'):
        variable.load(random.normal(0.0, 0.3, variable.shape), session)
    features, _ = session.run([end_points['block15_avg_pool'],
                               tf.get_collection(tf.GraphKeys.UPDATE_OPS)])
    weights, biases = _fit(features.reshape([len(labels), -1]), labels)
    logits = {variable.op.name.split('/')[-1]: variable
              for variable in slim.get_model_variables('Xception/Logits')}
    logits['weights'].load(weights[np.newaxis, np.newaxis], session)
    logits['biases'].load(biases, session)
    if with_averages:
      averages = tf.train.ExponentialMovingAverage(0.5)
      averages.apply(variables)
      session.run(tf.variables_initializer([averages.average(v) for v in variables]))
      logits['weights'].load(-weights[np.newaxis, np.newaxis], session)
    path = tf.train.Saver().save(session, os.path.join(folder, 'model.ckpt'), global_step=GLOBAL_STEP,
                                 write_meta_graph=False)
  checkpoints.save_config(checkpoints.ModelConfig(CLASS_NAMES, IMAGE_SIZE, 0.125, 1), folder)
  return path


def _fit(features, labels):
  """Returns weights and biases of logits, by ridge regression."""
  mean = features.mean(0)
  centred = features - mean
  targets = np.eye(len(CLASS_NAMES))[labels] - 1.0 / len(CLASS_NAMES)
  covariance = centred.T @ centred
  ridge = 0.2 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
  weights = 20.0 * np.linalg.solve(covariance + ridge, centred.T @ targets)
  return weights.astype(np.float32), (-mean @ weights).astype(np.float32)
