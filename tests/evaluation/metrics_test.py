"""Tests of the metrics: small cases by hand, and what scikit-learn does not compute."""

import json

import numpy as np
import tensorflow.compat.v1 as tf

from common import terminal
from evaluation import metrics


def random_predictions(num_images, num_classes, seed=0):
  """Returns labels and probabilities that agree more often than by chance."""
  random = np.random.default_rng(seed)
  labels = random.integers(num_classes, size=num_images)
  logits = random.normal(0, 2, [num_images, num_classes])
  logits[range(num_images), labels] += 2
  return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


class MetricsTest(tf.test.TestCase):

  def test_small_case(self):
    # Class 2 has images that are never predicted; class 3 has neither images nor predictions.
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    found = metrics.compute(np.array(labels), np.eye(4)[predictions], np.arange(6.0))
    self.assertAllEqual(found.confusion_matrix,
                        [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    self.assertEqual((found.num_images, found.num_correct, found.accuracy, found.loss),
                     (6, 3, 0.5, 2.5))
    self.assertAllClose(tuple(found.classes), ([2 / 3, 1 / 3, 0, 0], [2 / 3, 1 / 2, 0, 0],
                                        [2 / 3, 2 / 5, 0, 0], [3, 2, 1, 0]))
    self.assertAllClose(tuple(found.macro_average), (1 / 4, 7 / 24, 4 / 15, 6))
    self.assertAllClose(tuple(found.weighted_average), (4 / 9, 1 / 2, 7 / 15, 6))
    self.assertIsNone(found.top_5_accuracy)

  def test_wilson_interval(self):
    # Newcombe 1998, table I: 81 of 263, 0 of 20.
    self.assertAllClose(metrics.wilson_interval(81, 263), [0.2553, 0.3662], atol=5e-5)
    self.assertAllClose(metrics.wilson_interval(0, 20), [0.0, 0.1611], atol=5e-5)
    self.assertEqual(metrics.wilson_interval(20, 20)[1], 1.0)

  def test_top_k(self):
    probabilities = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    self.assertEqual(metrics.top_k_accuracy([2, 2], probabilities, k=2), 0.5)
    # Ties agree with argmax.
    self.assertEqual(metrics.top_k_accuracy([0, 1], np.full([2, 6], 1 / 6), k=1), 0.5)

  def test_table(self):
    labels, probabilities = random_predictions(40, 3)
    found = metrics.compute(labels, probabilities, np.zeros(40))
    lines = metrics.format_table(found, ['rose', '向日葵', 'x' * 40]).splitlines()
    self.assertLen(lines, 6)
    self.assertLen({terminal.text_width(line) for line in lines}, 1)  # columns are aligned
    self.assertRegex(lines[0], r'^ {30}  precision  recall      f1  support$')
    precision, recall, f1, support = (column[1] for column in found.classes)
    self.assertEqual(lines[2].split(), [
        '向日葵', f'{precision:.4f}', f'{recall:.4f}', f'{f1:.4f}', str(support)])
    self.assertTrue(lines[3].startswith('x' * 15 + '…' + 'x' * 14 + '  '))
    self.assertEqual(lines[5].split()[-1], '40')

  def test_table_of_many_classes_shows_the_worst(self):
    labels, probabilities = random_predictions(3000, 130)
    found = metrics.compute(labels, probabilities, np.zeros(3000))
    names = [f'class_{i}' for i in range(130)]
    lines = metrics.format_table(found, names).splitlines()
    self.assertLen(lines, 1 + 100 + 1 + 2)
    worst = np.argsort(found.classes.f1, kind='stable')
    self.assertEqual([line.split()[0] for line in lines[1:101]], [names[i] for i in worst[:100]])
    self.assertEqual(lines[101].strip(), '(best 30 not shown)')

  def test_json(self):
    labels, probabilities = random_predictions(40, 6)
    found = metrics.compute(labels, probabilities, np.zeros(40))
    values = json.loads(json.dumps(metrics.to_dict(found, list('abcdef'))))
    self.assertEqual(values['classes'][1], {
        'name': 'b', 'precision': found.classes.precision[1], 'recall': found.classes.recall[1],
        'f1': found.classes.f1[1], 'support': found.classes.support[1]})
    self.assertEqual(values['weighted_average']['support'], 40)
    self.assertAllEqual(values['confusion_matrix'], found.confusion_matrix)
    self.assertEqual(values['top_5_accuracy'], found.top_5_accuracy)

  def test_no_prediction_is_right(self):
    found = metrics.compute(np.array([0, 1]), np.eye(2)[[1, 0]], np.array([np.nan, 1]))
    self.assertEqual(metrics.format_table(found, ['a', 'b']).split()[4:9],
                     ['a', '0.0000', '0.0000', '0.0000', '1'])
    self.assertIsNone(metrics.to_dict(found, ['a', 'b'])['loss'])

  def test_json_of_many_classes_leaves_zeros_out(self):
    labels, probabilities = np.array([0, 0, 0, 2999]), np.eye(3000)[[0, 0, 7, 2999]]
    text = json.dumps(metrics.to_dict(metrics.compute(labels, probabilities, np.zeros(4)),
                                      [f'class_{i}' for i in range(3000)]))
    matrix = json.loads(text)['confusion_matrix']
    self.assertLen(matrix, 3000)
    self.assertEqual([matrix[0], matrix[1], matrix[2999]], [{'0': 2, '7': 1}, {}, {'2999': 1}])
    self.assertLess(len(text), 400_000)

  def test_shorten(self):
    self.assertEqual(metrics.shorten('daisy', 5), 'daisy')
    self.assertEqual(metrics.shorten('beetle_larva_02', 9), 'beet…a_02')
    self.assertEqual(metrics.shorten('向日葵向日葵', 8), '向日…葵')
