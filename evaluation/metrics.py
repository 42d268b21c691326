"""Computes the metrics of a classification and formats them as a table.

A precision or recall without a single image to count is 0. Averages are taken
over all classes of the dataset, including those that never occur.
"""

import collections
import math

import numpy as np

from common import terminal

Z_95 = 1.959963984540054  # 97.5 % of a standard normal distribution lie below
TOP_K = 5
MAX_TABLE_ROWS = 100  # of more classes, the table shows the worst
MAX_DENSE_CLASSES = 100  # of more classes, metrics.json leaves zeros out of the confusion matrix
MAX_NAME_WIDTH = 30  # columns of the terminal

Metrics = collections.namedtuple('Metrics', [
    'num_images',  # int
    'num_correct',  # int
    'accuracy',  # float, top-1
    'accuracy_interval',  # (low, high), 95 % Wilson score interval
    'top_5_accuracy',  # float, or None with 5 classes or fewer: it would always be 1
    'loss',  # float, mean cross-entropy
    'confusion_matrix',  # int64 [num_classes (label), num_classes (prediction)]
    'classes',  # ClassMetrics of float64 or int64 [num_classes] each
    'macro_average',  # ClassMetrics of numbers: every class counts the same
    'weighted_average',  # ClassMetrics of numbers: every image counts the same
])
ClassMetrics = collections.namedtuple('ClassMetrics', ['precision', 'recall', 'f1', 'support'])


def compute(labels, probabilities, losses):
  """Computes all metrics of an evaluation.

  Args:
    labels: int [num_images] in [0, num_classes), one image or more.
    probabilities: float [num_images, num_classes].
    losses: float [num_images], cross-entropies.

  Returns:
    Metrics.
  """
  from sklearn import metrics as sklearn_metrics  # takes a second that --help does not have

  num_images, num_classes = probabilities.shape
  predictions = probabilities.argmax(1)

  def class_metrics(average):
    *scores, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), average=average, zero_division=0)
    if average:
      return ClassMetrics(*map(float, scores), num_images)
    return ClassMetrics(*scores, support.astype(np.int64))  # floats if no prediction is right

  num_correct = int((predictions == labels).sum())
  return Metrics(
      num_images=num_images,
      num_correct=num_correct,
      accuracy=num_correct / num_images,
      accuracy_interval=wilson_interval(num_correct, num_images),
      top_5_accuracy=top_k_accuracy(labels, probabilities) if num_classes > TOP_K else None,
      loss=float(np.mean(losses, dtype=np.float64)),
      confusion_matrix=np.bincount(num_classes * labels + predictions, minlength=num_classes**2)
      .reshape(num_classes, num_classes),
      classes=class_metrics(None),
      macro_average=class_metrics('macro'),
      weighted_average=class_metrics('weighted'))


def top_k_accuracy(labels, probabilities, k=TOP_K):
  """Returns the share of the images whose label is among their k most probable classes.

  Of equally probable classes the first one wins, as in argmax and unlike in scikit-learn.
  """
  top = np.argsort(-probabilities, axis=1, kind='stable')[:, :k]
  return float((top == np.asarray(labels)[:, np.newaxis]).any(1).mean())


def wilson_interval(num_correct, num_images, z=Z_95):
  """Returns the Wilson score interval of an accuracy.

  Unlike the normal approximation, it stays within [0, 1] and has a width at 0 and 1.
  """
  share = num_correct / num_images
  centre = share + z**2 / (2 * num_images)
  half_width = z * math.sqrt(share * (1 - share) / num_images + (z / (2 * num_images))**2)
  scale = 1 + z**2 / num_images
  return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def to_dict(metrics, class_names):
  """Returns the metrics in types that json.dumps accepts.

  The confusion matrix is a list of rows, one per label. A row is a list of the
  counts of all predictions or, of more than MAX_DENSE_CLASSES classes, a dict
  {prediction: count} without zeros, whose keys json.dumps turns into strings.
  """
  matrix = metrics.confusion_matrix.tolist()
  if len(matrix) > MAX_DENSE_CLASSES:
    matrix = [{prediction: count for prediction, count in enumerate(row) if count}
              for row in matrix]
  columns = (column.tolist() for column in metrics.classes)
  return {
      **metrics._asdict(),
      'loss': metrics.loss if math.isfinite(metrics.loss) else None,  # JSON has no NaN
      'confusion_matrix': matrix,
      'classes': [{'name': name, **ClassMetrics(*row)._asdict()}
                  for name, *row in zip(class_names, *columns)],
      'macro_average': metrics.macro_average._asdict(),
      'weighted_average': metrics.weighted_average._asdict(),
  }


def format_table(metrics, class_names):
  """Returns the metrics of every class, and their averages, as lines of text.

  Of more than MAX_TABLE_ROWS classes, those with the lowest F1 are shown.
  """
  shown = range(len(class_names))
  if len(shown) > MAX_TABLE_ROWS:
    shown = np.argsort(metrics.classes.f1, kind='stable')[:MAX_TABLE_ROWS]
  rows = [(class_names[i], *(column[i] for column in metrics.classes)) for i in shown]
  if len(rows) < len(class_names):
    rows.append((f'(best {len(class_names) - len(rows)} not shown)',))
  rows += [('macro average', *metrics.macro_average),
           ('weighted average', *metrics.weighted_average)]
  names = [shorten(row[0], MAX_NAME_WIDTH) for row in rows]
  width = max(map(terminal.text_width, names))
  lines = [f'{"":{width}}  precision  recall      f1  support']
  for name, (_, *numbers) in zip(names, rows):
    line = terminal.pad(name, width)
    if numbers:
      line += '  {:9.4f}  {:6.4f}  {:6.4f}  {:7d}'.format(*numbers)
    lines.append(line)
  return '\n'.join(lines)


def shorten(text, width):
  """Returns the text, its middle replaced by an ellipsis if it is wider than `width` columns.

  The middle, because long names often differ at their ends: beetle_larva_01, beetle_larva_02.
  """
  if terminal.text_width(text) <= width:
    return text
  head, tail = text, text
  while terminal.text_width(head) > width // 2:
    head = head[:-1]
  while terminal.text_width(tail) > (width - 1) // 2:
    tail = tail[1:]
  return f'{head}…{tail}'
