"""Tests that the slim network computes what keras.applications.Xception computes.

Keras 3 needs TensorFlow 2's behavior, which slim needs switched off, so Keras
runs in a process of its own.
"""

import concurrent.futures
import multiprocessing

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from conversion import keras_models
import xception

NUM_CLASSES = 10
HEIGHT, WIDTH = 107, 139  # its feature maps have odd and even sizes


def keras_process():
  """Returns an executor of one new process, in which TensorFlow 2's behavior is on."""
  return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))


def randomize(model, random):
  """Gives a Keras Xception random weights and statistics, none of them neutral."""
  for layer in model.layers:
    weights = layer.get_weights()
    if len(weights) == 4:  # a batch norm
      gamma, beta, mean, variance = weights
      weights = [random.uniform(0.5, 1.5, gamma.shape), random.normal(0, 0.1, beta.shape),
                 random.normal(0, 0.1, mean.shape), random.uniform(0.5, 1.5, variance.shape)]
    else:
      # With Keras' own initialization all images look alike at the end of the network:
      # a depthwise kernel has 9 inputs, not 9 for every channel.
      weights = [random.normal(0, (w.size // w.shape[-1] if w.shape[-1] > 1 else 9)**-0.5,
                               w.shape) for w in weights]
    layer.set_weights(weights)


def patches(height, width, random):
  """Returns two images of random squares; the features of random pixels would average out."""
  images = random.uniform(-1, 1, [2, 8, 8, 3]).repeat(18, 1).repeat(18, 2)
  return images[:, :height, :width].astype(np.float32)


def run_keras():
  """Runs Keras' Xception on random images.

  Returns:
    images: float32 [2, HEIGHT, WIDTH, 3].
    pooled: float32 [2, 2048], the features in front of the classifier.
    probabilities: float32 [2, NUM_CLASSES].
    weights: dict {slim variable name: array}.
    count: int, number of parameters.
  """
  keras = keras_models.import_keras()
  random = np.random.default_rng(0)
  model = keras.applications.Xception(
      weights=None, classes=NUM_CLASSES, input_shape=(HEIGHT, WIDTH, 3))
  randomize(model, random)
  images = patches(HEIGHT, WIDTH, random)
  features = keras.Model(model.input, [model.get_layer('avg_pool').output, model.output])
  pooled, probabilities = features(images, training=False)
  return (images, np.array(pooled), np.array(probabilities),
          keras_models.slim_weights(model), model.count_params())


class KerasEquivalenceTest(tf.test.TestCase):

  def test_same_weights_same_predictions(self):
    with keras_process() as executor:
      images, keras_pooled, keras_probabilities, weights, count = (
          executor.submit(run_keras).result())

    with tf.Graph().as_default(), tf.Session() as session:
      with slim.arg_scope(xception.xception_arg_scope()):
        _, end_points = xception.xception(tf.constant(images), NUM_CLASSES, is_training=False)
      variables = slim.get_model_variables()
      self.assertEqual(sum(v.shape.num_elements() for v in variables), count)
      # Every weight of Keras is used.
      self.assertCountEqual(weights, [v.op.name for v in variables])
      session.run([v.initializer for v in variables],
                  {v.initializer.inputs[1]: weights[v.op.name] for v in variables})
      pooled, probabilities = session.run(
          [end_points['block15_avg_pool'], end_points['Predictions']])

    self.assertAllClose(pooled[:, 0, 0], keras_pooled, rtol=1e-4, atol=1e-5)
    self.assertAllClose(probabilities, keras_probabilities, rtol=1e-5, atol=1e-5)
    # The images differ enough for the comparison to mean something.
    self.assertGreater(np.abs(probabilities[0] - probabilities[1]).max(), 1e-3)
