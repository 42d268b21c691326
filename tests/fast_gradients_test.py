"""Tests that the fast gradients are TensorFlow's own."""

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

import fast_gradients
import xception


def setUpModule():
  tf.disable_v2_behavior()
  tf.enable_resource_variables()


class FastGradientsTest(tf.test.TestCase):

  def assertSameGradients(self, function, inputs, uses_conv_gradient=False):
    """Compares the gradients of a function of tensors, with and without the override."""
    with tf.Graph().as_default() as graph, tf.Session() as session:
      tensors = [tf.constant(value) for value in inputs]
      expected = tf.gradients(function(*tensors), tensors)
      first = len(graph.get_operations())
      with fast_gradients.override():
        output = function(*tensors)
      gradients = tf.gradients(output, tensors)
      kinds = {op.type for op in graph.get_operations()[first:]}
      self.assertEqual('Conv2DBackpropFilter' in kinds, uses_conv_gradient)
      for value, wanted in zip(*session.run([gradients, expected])):
        self.assertAllClose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

  def test_pointwise_convolutions(self):
    random = np.random.default_rng(0)
    for height, width in ((8, 8), (7, 10)):
      for stride in (1, 2, 3):
        weights = random.normal(size=[2, -(-height // stride), -(-width // stride), 9])

        def loss(images, kernel, stride=stride, weights=weights):
          return tf.reduce_sum(weights.astype(np.float32) * tf.nn.conv2d(
              images, kernel, strides=stride, padding='SAME'))

        self.assertSameGradients(loss, [
            random.normal(size=shape).astype(np.float32)
            for shape in ((2, height, width, 5), (1, 1, 5, 9))])

  def test_other_convolutions_are_left_to_tensorflow(self):
    random = np.random.default_rng(0)
    for kernel_shape, strides, padding in (
        ((3, 3, 6, 8), 1, 'SAME'),
        ((1, 1, 6, 8), [1, 2, 1, 1], 'SAME'),
        ((1, 1, 3, 8), 1, 'SAME'),  # two groups
        ((1, 1, 6, 8), 1, [[0, 0], [1, 1], [1, 1], [0, 0]])):
      with self.subTest(kernel_shape=kernel_shape, strides=strides, padding=padding):
        images, kernel = (random.normal(size=shape).astype(np.float32)
                          for shape in ((2, 8, 8, 6), kernel_shape))

        def loss(images, kernel, strides=strides, padding=padding):
          return tf.reduce_sum(tf.square(
              tf.nn.conv2d(images, kernel, strides=strides, padding=padding)))

        self.assertSameGradients(loss, [images, kernel], uses_conv_gradient=True)

  def test_the_whole_network(self):
    images = np.random.default_rng(0).normal(size=[2, 75, 71, 3])

    def build(reuse):
      with slim.arg_scope(xception.xception_arg_scope()):
        logits, _ = xception.xception(tf.constant(images, tf.float32), 5, is_training=False,
                                      depth_multiplier=0.125, reuse=reuse)
      return tf.reduce_sum(tf.square(logits))

    with tf.Graph().as_default() as graph, tf.Session() as session:
      expected = tf.gradients(build(None), tf.trainable_variables())
      first = len(graph.get_operations())
      with fast_gradients.override():
        loss = build(True)
      gradients = tf.gradients(loss, tf.trainable_variables())
      # The two 3 x 3 convolutions are all that is left.
      kinds = [op.type for op in graph.get_operations()[first:]]
      self.assertEqual(kinds.count('Conv2DBackpropFilter'), 2)
      session.run(tf.global_variables_initializer())
      for variable, value, wanted in zip(tf.trainable_variables(),
                                         *session.run([gradients, expected])):
        self.assertAllClose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(),
                            msg=variable.op.name)


if __name__ == '__main__':
  tf.test.main()
