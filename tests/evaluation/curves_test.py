"""Tests of areas below curves, calibration and thresholds on cases computed by hand."""

import json

import numpy as np
import tensorflow.compat.v1 as tf

from evaluation import curves


def two_classes(*probabilities):
  """Returns float [n, 2] of the probabilities of class 1."""
  return np.stack([1 - np.array(probabilities), probabilities], 1)


class CurvesTest(tf.test.TestCase):

  def test_two_classes(self):
    # Of 6 pairs of an image of class 1 and one of class 0, 5 are ranked correctly.
    labels = np.array([0, 0, 1, 1, 1])
    found = curves.compute(labels, two_classes(0.1, 0.4, 0.35, 0.82, 0.9))
    self.assertAllClose(found.roc_auc, [5 / 6, 5 / 6])
    # In descending order of the probability: right, right, wrong, right.
    self.assertAllClose(found.average_precision[1], (1 + 1 + 3 / 4) / 3)
    self.assertAllClose(found.averages['roc_auc'], {'macro': 5 / 6, 'weighted': 5 / 6})
    rows = {row.threshold: row for row in found.thresholds}
    self.assertAllClose(tuple(rows[0.5]), (0.5, 2 / 3, 1, 2 / 3))
    self.assertAllClose(tuple(rows[0.2]), (0.2, 1, 1 / 2, 1 / 2))
    table = curves.format_thresholds(found.thresholds).splitlines()
    self.assertLen(table, 1 + 19 + 1)  # one for every 5 %, and 0.82

  def test_classes_without_a_curve(self):
    labels = np.array([0, 1, 1, 1])
    found = curves.compute(labels, np.array([[0.8, 0.01, 0.19], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1],
                                             [0.9, 0.05, 0.05]]))
    self.assertAllClose(found.roc_auc, [2 / 3, 1, np.nan])
    self.assertAllClose(found.averages['roc_auc'], {'macro': 5 / 6, 'weighted': 11 / 12})
    self.assertEmpty(found.thresholds)
    values = json.loads(json.dumps(curves.to_dict(found), allow_nan=False))
    self.assertEqual(values['areas'][2], {'roc_auc': None, 'average_precision': None})
    for labels, probabilities in [(np.zeros(3, int), two_classes(0.1, 0.2, 0.3)),
                                  (np.array([0, 1]), np.full([2, 2], np.nan))]:
      found = curves.compute(labels, probabilities)
      self.assertEqual(found.averages['average_precision'], {'macro': None, 'weighted': None})
      self.assertEmpty(found.thresholds)

  def test_calibration(self):
    # Confidences 0.95, 0.91 (one right), 0.62 (right) and 1.0 (right).
    found = curves.calibrate(np.array([0, 1, 1, 1]), two_classes(0.05, 0.09, 0.62, 1.0))
    self.assertAllEqual(found.num_images, [0] * 6 + [1, 0, 0, 3])
    self.assertAllClose(found.confidence[[6, 9]], [0.62, 0.953333])
    self.assertAllClose(found.accuracy[[6, 9]], [1, 2 / 3])
    self.assertAllClose(found.expected_error, (0.38 + 3 * (0.953333 - 2 / 3)) / 4)
    self.assertTrue(np.isnan(found.accuracy[0]))
