"""Tests of temperature scaling: the fitted number, what it does, and when there is none."""

import inspect
import unittest

import numpy as np
from scipy import special
from sklearn import base
from sklearn import calibration as sklearn_calibration
import tensorflow.compat.v1 as tf

from evaluation import temperature

HAS_SKLEARN = 'temperature' in inspect.getdoc(sklearn_calibration.CalibratedClassifierCV)


def draw(factor, num_images=500, num_classes=4):
  """Returns labels and logits that are `factor` times those that the labels were drawn from."""
  random = np.random.default_rng(3)
  logits = random.normal(0, 2, [num_images, num_classes])
  # The largest of logits with Gumbel noise is drawn from their softmax.
  labels = (logits + random.gumbel(size=logits.shape)).argmax(1)
  return labels, (factor * logits + random.normal(size=[num_images, 1])).astype(np.float32)


def mean_loss(labels, logits, value):
  return -special.log_softmax(logits.astype(np.float64) / value, 1)[
      np.arange(len(labels)), labels].mean()


class Logits(base.ClassifierMixin, base.BaseEstimator):
  """A classifier whose input is already its logits."""

  def fit(self, logits, labels):
    del logits
    self.classes_ = np.unique(labels)
    return self

  def decision_function(self, logits):
    return logits

  def predict(self, logits):
    return self.classes_[logits.argmax(1)]


class FitTest(tf.test.TestCase):

  def test_it_is_the_best_of_a_grid(self):
    for factor in (0.3, 1.0, 3.0):
      labels, logits = draw(factor)
      found = temperature.fit(labels, logits)
      grid = factor * np.linspace(0.8, 1.2, 201)
      best = grid[np.argmin([mean_loss(labels, logits, value) for value in grid])]
      self.assertAllClose(found, best, rtol=0, atol=factor * 0.0011)  # half a step
      self.assertBetween(best / factor, 0.81, 1.19)  # inside the grid

  @unittest.skipUnless(HAS_SKLEARN, 'scikit-learn has temperature scaling from 1.8 on')
  def test_it_is_that_of_scikit_learn(self):
    from sklearn import frozen
    for factor in (0.3, 3.0):
      labels, logits = draw(factor)
      theirs = sklearn_calibration.CalibratedClassifierCV(
          frozen.FrozenEstimator(Logits().fit(logits, labels)), method='temperature')
      theirs.fit(logits.astype(np.float64), labels)
      found = temperature.fit(labels, logits)
      self.assertAllClose(special.softmax(logits.astype(np.float64) / found, 1),
                          theirs.predict_proba(logits.astype(np.float64)), rtol=0, atol=1e-6)

  def test_probabilities_that_underflow(self):
    labels, logits = draw(60.0)
    probabilities = special.softmax(logits, 1)
    self.assertEqual(probabilities.dtype, np.float32)
    self.assertGreater((probabilities == 0).mean(), 0.4)
    same_labels, same_logits = draw(1.0)
    self.assertAllClose(temperature.fit(labels, logits),
                        60 * temperature.fit(same_labels, same_logits), rtol=1e-4)

  def test_without_a_best_temperature(self):
    labels, logits = draw(1.0)
    broken = logits.copy()
    broken[7, 1] = np.nan
    for message, args in [
        ('20 images or more, got 19', (labels[:19], logits[:19])),
        ('20 images or more, got 1:', (labels[:1], logits[:1])),
        ('because 500 of 500 predictions are right', (logits.argmax(1), logits)),
        ('because 500 of 500 predictions are right', (logits.argmax(1), 1e6 * logits)),
        ('no better than guessing', (logits.argmin(1), logits)),
        ('no better than guessing', (labels, 0 * logits)),
        ('or its logits are in the thousands', (labels, 1e4 * logits)),
        ('predicts NaN or infinity', (labels, broken))]:
      with self.assertRaisesRegex(temperature.TemperatureError, message):
        temperature.fit(*args)

  def test_one_mistake_is_enough(self):
    labels, logits = draw(1.0)
    labels = logits.argmax(1)
    labels[3] = logits[3].argsort()[-2]
    found = temperature.fit(labels, logits)
    self.assertBetween(found, 0.01, 0.5)
    for other in (0.99 * found, 1.01 * found):
      self.assertGreater(mean_loss(labels, logits, other), mean_loss(labels, logits, found))


class ScaleTest(tf.test.TestCase):

  def test_loss_and_calibration(self):
    # Both images have the probabilities 0.8 and 0.2, and 2/3 and 1/3 at the temperature 2.
    labels, logits = np.array([0, 1]), np.log([[0.8, 0.2], [0.8, 0.2]]) + [[5], [-7]]
    found = temperature.scale(labels, logits, 2.0, 'validation')
    self.assertEqual((found.temperature, found.fitted_on), (2.0, 'validation'))
    self.assertAllClose(found.loss, -(np.log(2 / 3) + np.log(1 / 3)) / 2)
    self.assertAllClose(found.calibration.expected_error, 2 / 3 - 1 / 2)
    self.assertAllEqual(found.calibration.num_images, [0] * 6 + [2, 0, 0, 0])
    self.assertAllClose(found.calibration.accuracy[6], 0.5)

  def test_overconfident_network(self):
    labels, logits = draw(3.0)
    before, after = (temperature.scale(labels, logits, value, 'train')
                     for value in (1.0, temperature.fit(labels, logits)))
    self.assertAllClose(before.loss, mean_loss(labels, logits, 1.0))
    self.assertLess(after.loss, 0.75 * before.loss)
    self.assertGreater(before.calibration.expected_error, 0.14)
    self.assertLess(after.calibration.expected_error, 0.07)
    values = temperature.to_dict(after)
    self.assertEqual((values['loss'], values['expected_calibration_error']),
                     (after.loss, after.calibration.expected_error))
    self.assertEqual(sum(row['num_images'] for row in values['calibration']), 500)
