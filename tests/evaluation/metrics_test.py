"""Tests of the metrics: equal to scikit-learn's and scipy's."""

import json

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics
import tensorflow.compat.v1 as tf

from evaluation import metrics


def random_predictions(num_images, num_classes, occurring=None, seed=0):
  """Returns labels and probabilities; only the first `occurring` classes have images."""
  random = np.random.default_rng(seed)
  labels = random.integers(occurring or num_classes, size=num_images)
  logits = random.normal(0, 2, [num_images, num_classes])
  logits[range(num_images), labels] += 2
  # The last class is never predicted.
  logits[:, -1] = logits.min() - 1
  return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


class ScikitLearnTest(tf.test.TestCase):

  def check(self, labels, probabilities):
    num_images, num_classes = probabilities.shape
    classes = range(num_classes)
    predictions = probabilities.argmax(1)
    found = metrics.compute(labels, probabilities,
                            -np.log(probabilities[range(num_images), labels]))

    def assert_same(value, expected):
      np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)

    assert_same(found.accuracy, sklearn_metrics.accuracy_score(labels, predictions))
    assert_same(found.confusion_matrix,
                sklearn_metrics.confusion_matrix(labels, predictions, labels=classes))
    for average, mine in ((None, found.classes), ('macro', found.macro_average),
                          ('weighted', found.weighted_average)):
      expected = sklearn_metrics.precision_recall_fscore_support(
          labels, predictions, labels=classes, average=average, zero_division=0)
      for value, expected_value in zip(mine[:3], expected):
        assert_same(value, expected_value)
      if average is None:
        assert_same(mine.support, expected[3])
    assert_same(found.loss, sklearn_metrics.log_loss(labels, probabilities, labels=classes))
    if num_classes > 5:
      assert_same(found.top_5_accuracy, sklearn_metrics.top_k_accuracy_score(
          labels, probabilities, k=5, labels=classes))
    else:
      self.assertIsNone(found.top_5_accuracy)
    interval = stats.binomtest(found.num_correct, num_images).proportion_ci(0.95, 'wilson')
    assert_same(found.accuracy_interval, interval)
    self.assertEqual(found.num_images, num_images)
    self.assertEqual(found.num_correct, (predictions == labels).sum())

  def test_random_predictions(self):
    for num_classes in (2, 5, 6, 100):
      for seed in range(3):
        self.check(*random_predictions(317, num_classes, seed=seed))

  def test_classes_that_never_occur(self):
    self.check(*random_predictions(50, 7, occurring=3))
    self.check(*random_predictions(20, 100))
    self.check(*random_predictions(1, 2, occurring=1))

  def test_all_right_and_all_wrong(self):
    labels, probabilities = random_predictions(12, 6)
    for predictions in (labels, (labels + 1) % 6):
      self.check(labels, (probabilities + 2 * np.eye(6)[predictions]) / 3)


class MetricsTest(tf.test.TestCase):

  def test_rows_of_the_confusion_matrix_are_labels(self):
    self.assertAllEqual(metrics.confusion_matrix([0, 0, 2], [1, 1, 2], 3),
                        [[0, 2, 0], [0, 0, 0], [0, 0, 1]])

  def test_wilson_interval(self):
    # Newcombe 1998, table I: 81 of 263, 0 of 20.
    self.assertAllClose(metrics.wilson_interval(81, 263), [0.2553, 0.3662], atol=5e-5)
    self.assertAllClose(metrics.wilson_interval(0, 20), [0.0, 0.1611], atol=5e-5)
    self.assertEqual(metrics.wilson_interval(20, 20)[1], 1.0)

  def test_top_k_of_equal_probabilities_agrees_with_argmax(self):
    self.assertEqual(metrics.top_k_accuracy([0, 1], np.full([2, 6], 1 / 6), k=1), 0.5)

  def test_table(self):
    labels, probabilities = random_predictions(40, 3)
    found = metrics.compute(labels, probabilities, np.zeros(40))
    lines = metrics.format_table(found, ['rose', '向日葵', 'x' * 40]).splitlines()
    self.assertLen(lines, 6)
    self.assertLen({metrics.text_width(line) for line in lines}, 1)  # columns are aligned
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

  def test_shorten(self):
    self.assertEqual(metrics.shorten('daisy', 5), 'daisy')
    self.assertEqual(metrics.shorten('beetle_larva_02', 9), 'beet…a_02')
    self.assertEqual(metrics.shorten('向日葵向日葵', 8), '向日…葵')


if __name__ == '__main__':
  tf.test.main()
