"""Tests of learning rate schedules and optimizers against their formulas."""

import numpy as np
import tensorflow.compat.v1 as tf

import optimization


def setUpModule():
  tf.disable_v2_behavior()
  tf.enable_resource_variables()


class LearningRateTest(tf.test.TestCase):

  def rates(self, steps, decay_type, batch_size=10, num_samples=100):
    with tf.Graph().as_default(), tf.Session() as session:
      step = tf.placeholder(tf.int64, [])
      rate = optimization.configure_learning_rate(
          decay_type, 0.1, 0.5, 0.004, step, batch_size, num_samples,
          num_epochs_per_decay=2.0, max_steps=100)
      self.assertEqual(rate.dtype, tf.float32)
      return [session.run(rate, {step: i}) for i in steps]

  def test_fixed(self):
    self.assertAllClose(self.rates([0, 99], 'fixed'), [0.1, 0.1])

  def test_exponential_goes_down_in_steps(self):
    # 10 steps an epoch, a decay every 2 epochs, by a half; never under 0.004.
    self.assertAllClose(self.rates([0, 19, 20, 39, 40, 99, 100], 'exponential'),
                        [0.1, 0.1, 0.05, 0.05, 0.025, 0.00625, 0.004])

  def test_exponential_counts_images_not_steps(self):
    # The same images in half the steps.
    self.assertAllClose(self.rates([9, 10, 20], 'exponential', batch_size=20), [0.1, 0.05, 0.025])

  def test_polynomial_is_a_line(self):
    self.assertAllClose(self.rates([0, 50, 100, 200], 'polynomial'),
                        [0.1, (0.1 + 0.004) / 2, 0.004, 0.004])


class OptimizerTest(tf.test.TestCase):

  def take_two_steps(self, name):
    """Values of a weight that starts at 1 and has the gradients 2, then 1."""
    with tf.Graph().as_default(), tf.Session() as session:
      weight = tf.get_variable('weight', initializer=1.0)
      gradient = tf.placeholder(tf.float32, [])
      optimizer = optimization.configure_optimizer(
          name, tf.constant(0.1), momentum=0.8, adam_beta1=0.7, adam_beta2=0.9,
          rmsprop_decay=0.6, opt_epsilon=0.01)
      train_op = optimizer.apply_gradients([(gradient, weight)])
      session.run(tf.global_variables_initializer())
      values = []
      for value in (2.0, 1.0):
        session.run(train_op, {gradient: value})
        values.append(session.run(weight))
      return values

  def test_sgd_has_momentum(self):
    self.assertAllClose(self.take_two_steps('sgd'), [1 - 0.2, 0.8 - 0.1 * (0.8 * 2 + 1)])

  def test_adam(self):
    first, second, weight, expected = 0.0, 0.0, 1.0, []
    for step, gradient in enumerate([2.0, 1.0], 1):
      first = 0.7 * first + 0.3 * gradient
      second = 0.9 * second + 0.1 * gradient**2
      rate = 0.1 * np.sqrt(1 - 0.9**step) / (1 - 0.7**step)
      weight -= rate * first / (np.sqrt(second) + 0.01)
      expected.append(weight)
    self.assertAllClose(self.take_two_steps('adam'), expected)

  def test_rmsprop(self):
    mean_square, momentum, weight, expected = 1.0, 0.0, 1.0, []
    for gradient in [2.0, 1.0]:
      mean_square = 0.6 * mean_square + 0.4 * gradient**2
      momentum = 0.8 * momentum + 0.1 * gradient / np.sqrt(mean_square + 0.01)
      weight -= momentum
      expected.append(weight)
    self.assertAllClose(self.take_two_steps('rmsprop'), expected)


if __name__ == '__main__':
  tf.test.main()
