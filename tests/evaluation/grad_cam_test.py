"""Tests that Grad-CAM maps equal those of Keras, and show where the evidence for a class is."""

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from conversion import keras_models
from evaluation import grad_cam
import keras_equivalence_test
import xception

NUM_CLASSES = 10
HEIGHT, WIDTH = 107, 139
CLASSES = [6, 7]  # of the two images; the maps of some others are empty
# A layer, and Keras' layer after the same batch norm and, where one follows, the same ReLU.
KERAS_LAYERS = {'block14_dws_conv2': 'block14_sepconv2_act', 'block13_dws_conv2':
                'block13_sepconv2_bn', 'block4_dws_conv1': 'block4_sepconv2_act'}


def run_keras():
  """Computes maps of a random network, as https://keras.io/examples/vision/grad_cam does.

  Returns:
    images: float32 [2, HEIGHT, WIDTH, 3].
    maps: {layer: float32 [2, rows, columns]} of CLASSES.
    weights: dict {slim variable name: array}.
  """
  keras = keras_models.import_keras()
  import tensorflow  # of version 2, in this process

  random = np.random.default_rng(0)
  model = keras.applications.Xception(
      weights=None, classes=NUM_CLASSES, input_shape=(HEIGHT, WIDTH, 3))
  keras_equivalence_test.randomize(model, random)
  images = keras_equivalence_test.patches(HEIGHT, WIDTH, random)
  model.layers[-1].activation = None  # logits instead of probabilities
  outputs = [model.get_layer(name).output for name in KERAS_LAYERS.values()]
  with tensorflow.GradientTape() as tape:
    *activations, logits = keras.Model(model.input, [*outputs, model.output])(images)
    chosen = tensorflow.gather(logits, CLASSES, batch_dims=1)
  maps = {}
  for layer, output, gradient in zip(KERAS_LAYERS, activations,
                                     tape.gradient(chosen, activations)):
    weights = gradient.numpy().mean((1, 2))
    maps[layer] = np.maximum(np.einsum('nyxc,nc->nyx', output.numpy(), weights), 0)
  return images, maps, keras_models.slim_weights(model)


class KerasTest(tf.test.TestCase):

  def test_maps_equal_those_of_keras(self):
    with keras_equivalence_test.keras_process() as executor:
      images, expected, weights = executor.submit(run_keras).result()
    with tf.Graph().as_default(), tf.Session() as session:
      with slim.arg_scope(xception.xception_arg_scope()):
        logits, end_points = xception.xception(
            tf.constant(images), NUM_CLASSES, is_training=False)
      variables = slim.get_model_variables()
      session.run([v.initializer for v in variables],
                  {v.initializer.inputs[1]: weights[v.op.name] for v in variables})
      found = session.run({
          layer: grad_cam.build_maps(logits, end_points, layer, tf.constant(CLASSES, tf.int64))
          for layer in expected})
    self.assertEqual([maps.shape for maps in found.values()], [(2, 4, 5), (2, 7, 9), (2, 13, 17)])
    for layer, maps in found.items():
      # On the way back to earlier layers, a ReLU whose input is within rounding of 0 may pass a
      # gradient in one program and not in the other.
      tolerance = 1e-4 if layer == 'block14_dws_conv2' else 5e-3
      for image_map, expected_map in zip(maps, expected[layer]):
        self.assertGreater(expected_map.max(), 0)
        self.assertAllClose(image_map, expected_map, rtol=0, atol=tolerance * expected_map.max())


class MapsTest(tf.test.TestCase):

  def test_map_lies_where_the_classes_differ(self):
    # Noise, but for the stripes in the upper right corner: horizontal ones are class 0 and
    # vertical ones class 1.
    def draw(count):
      images = random.uniform(-0.5, 0.5, [count, 32, 32, 3]).astype(np.float32)
      labels = np.arange(count) % 2
      stripes = np.where(np.arange(8) // 2 % 2, 1, -1)
      images[labels == 0, :8, -8:] = stripes[:, np.newaxis, np.newaxis]
      images[labels == 1, :8, -8:] = stripes[:, np.newaxis]
      return {image_input: images, label_input: labels}

    random = np.random.default_rng(0)
    with tf.Graph().as_default(), tf.Session() as session:
      tf.set_random_seed(0)
      image_input = tf.placeholder(tf.float32, [None, 32, 32, 3])
      label_input = tf.placeholder(tf.int64, [None])
      net = slim.conv2d(image_input, 16, 3, stride=2)
      net = last = slim.conv2d(net, 16, 3, stride=2, activation_fn=None)
      net = tf.reduce_mean(tf.nn.relu(net), [1, 2])
      logits = slim.fully_connected(net, 2, activation_fn=None)
      loss = tf.losses.sparse_softmax_cross_entropy(label_input, logits)
      train_op = tf.train.AdamOptimizer(0.01).minimize(loss)
      maps, maps_of_other_class = (grad_cam.build_maps(logits, {'last': last}, 'last', classes)
                                   for classes in (label_input, 1 - label_input))
      session.run(tf.global_variables_initializer())
      for _ in range(200):
        session.run(train_op, draw(32))
      found, found_of_other_class = session.run([maps, maps_of_other_class], draw(32))

    def corner(cells):
      return cells[:, :3, 5:].sum((1, 2))

    self.assertEqual(found.shape, (32, 8, 8))
    self.assertAllGreater(corner(found) / found.sum((1, 2)), 0.7)  # of the area it has 0.14
    self.assertAllLess(corner(found_of_other_class) / corner(found), 0.1)

  def test_layers_without_a_map(self):
    with tf.Graph().as_default(), slim.arg_scope(xception.xception_arg_scope()):
      logits, end_points = xception.xception(
          tf.zeros([1, 71, 71, 3]), 5, is_training=False, depth_multiplier=0.125)
      for layer in ('Logits', 'block15_avg_pool', 'block14_dws_conv3'):
        with self.assertRaisesRegex(
            grad_cam.LayerError, f"^'{layer}' is not a layer .*: choose one of block1_conv1, .*, "
            'block14_dws_conv1, block14_dws_conv2$'):
          grad_cam.build_maps(logits, end_points, layer, tf.zeros([1], tf.int64))
