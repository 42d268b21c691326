"""Tests of learning rate schedules and optimizers against their formulas."""

import dataclasses

import numpy as np
from sklearn.utils import class_weight
import tensorflow.compat.v1 as tf

from training import optimization

RECIPE = optimization.Recipe(
    learning_rate=0.1, learning_rate_decay_factor=0.5, end_learning_rate=0.004,
    num_epochs_per_decay=2.0, momentum=0.8, adam_beta1=0.7, adam_beta2=0.9, rmsprop_decay=0.6,
    opt_epsilon=0.01, weight_decay=0.3)


class LearningRateTest(tf.test.TestCase):

  def rates(self, steps, decay_type, batch_size=10, num_samples=100, **changes):
    recipe = dataclasses.replace(RECIPE, learning_rate_decay_type=decay_type, **changes)
    with tf.Graph().as_default(), tf.Session() as session:
      images_seen = tf.placeholder(tf.int64, [])
      rate = optimization.build_learning_rate(recipe, images_seen, num_samples, batch_size,
                                              total_images=1000)
      self.assertEqual(rate.dtype, tf.float32)
      return [session.run(rate, {images_seen: step * batch_size}) for step in steps]

  def test_fixed(self):
    self.assertAllClose(self.rates([0, 99], 'fixed'), [0.1, 0.1])

  def test_exponential_staircase(self):
    # Halves every 2 epochs of 10 steps, but never falls below 0.004.
    self.assertAllClose(self.rates([0, 19, 20, 39, 40, 99, 100], 'exponential'),
                        [0.1, 0.1, 0.05, 0.05, 0.025, 0.00625, 0.004])

  def test_smooth_exponential(self):
    self.assertAllClose(self.rates([0, 5, 20, 30], 'exponential', staircase=False),
                        [0.1, 0.1 * 0.5**0.25, 0.05, 0.1 * 0.5**1.5])

  def test_exponential_counts_images_not_steps(self):
    # The same images in half the steps.
    self.assertAllClose(self.rates([9, 10, 20], 'exponential', batch_size=20), [0.1, 0.05, 0.025])
    self.assertAllClose(self.rates([2, 3, 6], 'exponential', num_samples_per_decay=30),
                        [0.1, 0.05, 0.025])

  def test_polynomial_is_a_line(self):
    self.assertAllClose(self.rates([0, 50, 100, 200], 'polynomial'),
                        [0.1, (0.1 + 0.004) / 2, 0.004, 0.004])

  def test_cosine(self):
    expected = [0.004 + 0.096 * (1 + np.cos(np.pi * step / 100)) / 2 for step in (0, 25, 50, 100)]
    self.assertAllClose(self.rates([0, 25, 50, 100, 200], 'cosine'), [*expected, 0.004])

  def test_linear_warm_up(self):
    # Two epochs of 10 steps.
    self.assertAllClose(self.rates([0, 9, 18, 19, 20], 'fixed', warmup_epochs=2.0),
                        [0.005, 0.05, 0.095, 0.1, 0.1])

  def test_more_images_than_float32_counts(self):
    recipe = dataclasses.replace(RECIPE, learning_rate_decay_type='polynomial',
                                 end_learning_rate=0.0)
    with tf.Graph().as_default(), tf.Session() as session:
      rate = optimization.build_learning_rate(recipe, tf.constant(2**24 + 1, tf.int64), 10, 1,
                                              total_images=2**24 + 2)
      self.assertAllClose(session.run(rate), 0.1 / (2**24 + 2), rtol=1e-6)


class OptimizerTest(tf.test.TestCase):

  def take_two_steps(self, name, variable='weights', **changes):
    """Returns a weight, initially 1, after gradients of 2 and 1."""
    recipe = dataclasses.replace(RECIPE, optimizer=name, **changes)
    with tf.Graph().as_default(), tf.Session() as session:
      weight = tf.get_variable(variable, initializer=1.0)
      gradient = tf.placeholder(tf.float32, [])
      optimizer = optimization.build_optimizer(recipe, tf.constant(0.1))
      train_op = optimizer.apply_gradients([(gradient, weight)])
      session.run(tf.global_variables_initializer())
      values = []
      for value in (2.0, 1.0):
        session.run(train_op, {gradient: value})
        values.append(session.run(weight))
      return values

  def adam(self, weight_decay=0.0):
    first, second, weight, values = 0.0, 0.0, 1.0, []
    for step, gradient in enumerate([2.0, 1.0], 1):
      first = 0.7 * first + 0.3 * gradient
      second = 0.9 * second + 0.1 * gradient**2
      rate = 0.1 * np.sqrt(1 - 0.9**step) / (1 - 0.7**step)
      weight *= 1 - 0.1 * weight_decay
      weight -= rate * first / (np.sqrt(second) + 0.01)
      values.append(weight)
    return values

  def test_sgd_has_momentum(self):
    self.assertAllClose(self.take_two_steps('sgd'), [1 - 0.2, 0.8 - 0.1 * (0.8 * 2 + 1)])

  def test_nesterov(self):
    momentum, weight, expected = 0.0, 1.0, []
    for gradient in [2.0, 1.0]:
      momentum = 0.8 * momentum + gradient
      weight -= 0.1 * (gradient + 0.8 * momentum)
      expected.append(weight)
    self.assertAllClose(self.take_two_steps('sgd', nesterov=True), expected)

  def test_adam(self):
    self.assertAllClose(self.take_two_steps('adam'), self.adam())

  def test_adamw_decays_kernels_only(self):
    for name in ('weights', 'depthwise_weights', 'pointwise_weights'):
      self.assertAllClose(self.take_two_steps('adamw', name), self.adam(weight_decay=0.3))
    for name in ('biases', 'BatchNorm/gamma', 'BatchNorm/beta'):
      self.assertAllClose(self.take_two_steps('adamw', name), self.adam())

  def test_adamw_has_no_l2(self):
    self.assertEqual(optimization.l2_weight_decay(RECIPE), 0.3)
    self.assertEqual(
        optimization.l2_weight_decay(dataclasses.replace(RECIPE, optimizer='adamw')), 0.0)

  def test_rmsprop(self):
    mean_square, momentum, weight, expected = 1.0, 0.0, 1.0, []
    for gradient in [2.0, 1.0]:
      mean_square = 0.6 * mean_square + 0.4 * gradient**2
      momentum = 0.8 * momentum + 0.1 * gradient / np.sqrt(mean_square + 0.01)
      weight -= momentum
      expected.append(weight)
    self.assertAllClose(self.take_two_steps('rmsprop'), expected)


class RecipeTest(tf.test.TestCase):

  def test_the_papers(self):
    recipe = optimization.RECIPES['imagenet']
    self.assertEqual(
        (recipe.optimizer, recipe.momentum, recipe.learning_rate,
         recipe.learning_rate_decay_factor, recipe.num_epochs_per_decay, recipe.weight_decay,
         recipe.dropout_keep_prob), ('sgd', 0.9, 0.045, 0.94, 2.0, 1e-5, 0.5))
    recipe = optimization.RECIPES['jft']
    self.assertEqual(
        (recipe.optimizer, recipe.momentum, recipe.learning_rate,
         recipe.learning_rate_decay_factor, recipe.num_samples_per_decay,
         recipe.dropout_keep_prob), ('rmsprop', 0.9, 0.001, 0.9, 3_000_000, 1.0))

  def test_description_has_every_field(self):
    text = optimization.describe(RECIPE)
    for field in dataclasses.fields(RECIPE):
      self.assertIn(f'{field.name} {getattr(RECIPE, field.name)}', text)


class ClassWeightsTest(tf.test.TestCase):

  def test_balanced_is_scikit_learns(self):
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    self.assertAllClose(optimization.balanced_class_weights([70, 20, 10]),
                        class_weight.compute_class_weight('balanced', classes=np.arange(3),
                                                          y=labels))
