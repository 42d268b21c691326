"""Tests that the slim network computes what keras.applications.Xception computes.

Keras 3 needs TensorFlow 2's behavior, which slim needs switched off: Keras runs
in a process of its own.
"""

import os
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import tensorflow.compat.v1 as tf

import tf_slim as slim
import xception

NUM_CLASSES = 10
HEIGHT, WIDTH = 107, 139  # odd and even sizes follow each other down the network

KERAS = textwrap.dedent('''
    import sys
    import keras
    import numpy as np

    path, num_classes, height, width = sys.argv[1], *map(int, sys.argv[2:])
    random = np.random.default_rng(0)
    model = keras.applications.Xception(
        weights=None, classes=num_classes, input_shape=(height, width, 3))
    arrays = {}
    for layer in model.layers:
      weights = layer.get_weights()
      if isinstance(layer, keras.layers.BatchNormalization):
        gamma, beta, mean, variance = weights
        weights = [random.uniform(0.5, 1.5, gamma.shape), random.normal(0, 0.1, beta.shape),
                   random.normal(0, 0.1, mean.shape), random.uniform(0.5, 1.5, variance.shape)]
      else:
        # Keras' own start makes all images alike at the end of the network: a
        # depthwise kernel reads 9 inputs, not 9 of every channel.
        weights = [random.normal(0, (w.size // w.shape[-1] if w.shape[-1] > 1 else 9)**-0.5,
                                 w.shape) for w in weights]
      layer.set_weights(weights)
      for i, weight in enumerate(layer.get_weights()):
        arrays[f'{layer.name}/{i}'] = weight
    # Patches: single pixels of noise would average out to the same features.
    images = random.uniform(-1, 1, [2, 8, 8, 3]).repeat(18, 1).repeat(18, 2)
    images = images[:, :height, :width].astype(np.float32)
    features = keras.Model(model.input, [model.get_layer('avg_pool').output, model.output])
    pooled, probabilities = features(images, training=False)
    np.savez(path, images=images, pooled=pooled, probabilities=probabilities,
             count=model.count_params(), **arrays)
''')


def setUpModule():
  tf.disable_v2_behavior()
  tf.enable_resource_variables()


def keras_layer(slim_layer):
  """The name of the Keras layer that a slim layer corresponds to."""
  if slim_layer == 'Logits':
    return 'predictions'
  if slim_layer.endswith('_res_conv'):
    # Keras numbers its unnamed layers.
    number = ['block1', 'block2', 'block3', 'block12'].index(slim_layer.split('_')[0])
    return f'conv2d_{number}' if number else 'conv2d'
  return slim_layer.replace('_dws_conv', '_sepconv')


def keras_name(slim_name):
  """The key of a variable like Xception/block2_dws_conv1/BatchNorm/gamma in the archive."""
  _, layer, *path = slim_name.split('/')
  layer = keras_layer(layer)
  if path[0] != 'BatchNorm':
    return f'{layer}/{0 if path[0] in ("weights", "depthwise_weights") else 1}'
  layer = (layer.replace('conv2d', 'batch_normalization') if layer.startswith('conv2d')
           else layer + '_bn')
  return f'{layer}/{["gamma", "beta", "moving_mean", "moving_variance"].index(path[1])}'


class KerasEquivalenceTest(tf.test.TestCase):

  def test_same_weights_same_predictions(self):
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'keras.npz')
      subprocess.run([sys.executable, '-c', KERAS, path, str(NUM_CLASSES), str(HEIGHT),
                      str(WIDTH)], check=True, env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2'})
      with np.load(path) as archive:
        keras = dict(archive)

    with tf.Graph().as_default(), tf.Session() as session:
      with slim.arg_scope(xception.xception_arg_scope()):
        _, end_points = xception.xception(
            tf.constant(keras['images']), NUM_CLASSES, is_training=False)
      variables = slim.get_model_variables()
      self.assertEqual(sum(v.shape.num_elements() for v in variables), keras['count'])
      values = {v: keras.pop(keras_name(v.op.name)) for v in variables}
      # Nothing is left over: every weight of Keras has its place here.
      self.assertCountEqual(keras, ['images', 'pooled', 'probabilities', 'count'])
      session.run([v.initializer for v in variables],
                  {v.initializer.inputs[1]: value.reshape(v.shape.as_list())
                   for v, value in values.items()})
      pooled, probabilities = session.run(
          [end_points['block15_avg_pool'], end_points['Predictions']])

    self.assertAllClose(pooled[:, 0, 0], keras['pooled'], rtol=1e-4, atol=1e-5)
    self.assertAllClose(probabilities, keras['probabilities'], rtol=1e-5, atol=1e-5)
    # Not the same for trivial reasons.
    self.assertGreater(np.abs(probabilities[0] - probabilities[1]).max(), 1e-3)


if __name__ == '__main__':
  tf.test.main()
