"""Metrics of a classification: from labels and probabilities to numbers and their table.

Everything is numpy in float64 and equals scikit-learn's with zero_division=0: a
precision or recall without a single image to count is 0. Averages are taken
over all classes of the dataset, also those that never occur.
"""

import collections
import math
import unicodedata

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % of a standard normal distribution lie below
TOP_K = 5
MAX_TABLE_ROWS = 100  # of more classes, the table shows the worst
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
  """Computes all metrics of one evaluation.

  Args:
    labels: int [num_images] in [0, num_classes), one image or more.
    probabilities: float [num_images, num_classes].
    losses: float [num_images], cross-entropies.

  Returns:
    Metrics.
  """
  num_images, num_classes = probabilities.shape
  matrix = confusion_matrix(labels, probabilities.argmax(1), num_classes)
  num_correct = int(np.trace(matrix))
  classes = class_metrics(matrix)
  scores = np.stack(classes[:3])
  return Metrics(
      num_images=num_images,
      num_correct=num_correct,
      accuracy=num_correct / num_images,
      accuracy_interval=wilson_interval(num_correct, num_images),
      top_5_accuracy=top_k_accuracy(labels, probabilities) if num_classes > TOP_K else None,
      loss=float(np.mean(losses, dtype=np.float64)),
      confusion_matrix=matrix,
      classes=classes,
      macro_average=ClassMetrics(*scores.mean(1).tolist(), num_images),
      weighted_average=ClassMetrics(*(scores @ classes.support / num_images).tolist(),
                                    num_images))


def confusion_matrix(labels, predictions, num_classes):
  """Counts the images of each label (row) that each prediction (column) was made for.

  Args:
    labels, predictions: int [num_images] in [0, num_classes).
    num_classes: int.

  Returns:
    int64 [num_classes, num_classes].
  """
  pairs = np.asarray(labels) * num_classes + predictions
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_metrics(matrix):
  """Returns the ClassMetrics of every class of a confusion matrix."""
  correct = np.diag(matrix)
  predicted, support = matrix.sum(0), matrix.sum(1)
  return ClassMetrics(precision=_ratio(correct, predicted), recall=_ratio(correct, support),
                      f1=_ratio(2 * correct, predicted + support), support=support)


def _ratio(numerator, denominator):
  return np.divide(numerator, denominator, out=np.zeros(len(numerator)),
                   where=denominator > 0)


def top_k_accuracy(labels, probabilities, k=TOP_K):
  """Returns the share of the images whose label is among their k most probable classes.

  Of classes that are equally probable the first comes first, as in argmax.
  """
  top = np.argsort(-probabilities, axis=1, kind='stable')[:, :k]
  return float((top == np.asarray(labels)[:, np.newaxis]).any(1).mean())


def wilson_interval(num_correct, num_images, z=Z_95):
  """Returns the Wilson score interval of a share: where the accuracy on all such images lies.

  Unlike the normal approximation, it stays in [0, 1] and has a width at 0 and 1.
  """
  share = num_correct / num_images
  centre = share + z**2 / (2 * num_images)
  half_width = z * math.sqrt(share * (1 - share) / num_images + (z / (2 * num_images))**2)
  scale = 1 + z**2 / num_images
  return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def to_dict(metrics, class_names):
  """Returns the metrics as what json.dumps takes."""
  values = metrics._asdict()
  values['accuracy_interval'] = list(metrics.accuracy_interval)
  values['confusion_matrix'] = metrics.confusion_matrix.tolist()
  columns = (column.tolist() for column in metrics.classes)
  values['classes'] = [
      {'name': name, **ClassMetrics(*row)._asdict()}
      for name, *row in zip(class_names, *columns)]
  values['macro_average'] = metrics.macro_average._asdict()
  values['weighted_average'] = metrics.weighted_average._asdict()
  return values


def format_table(metrics, class_names):
  """Returns the metrics of every class and their averages as lines of text.

  Of more than MAX_TABLE_ROWS classes, it shows those with the lowest F1.
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
  width = max(map(text_width, names))
  lines = [f'{"":{width}}  precision  recall      f1  support']
  for name, (_, *numbers) in zip(names, rows):
    line = name + ' ' * (width - text_width(name))
    if numbers:
      precision, recall, f1, support = numbers
      line += f'  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7d}'
    lines.append(line)
  return '\n'.join(lines)


def text_width(text):
  """Returns how many columns of a terminal a text takes; many Asian characters take two."""
  return sum(0 if unicodedata.combining(character) else
             2 if unicodedata.east_asian_width(character) in 'WF' else 1
             for character in text)


def shorten(text, width):
  """Returns the text, its middle replaced by an ellipsis if it is wider than `width` columns.

  The middle, because long names often differ at their ends: beetle_larva_01, beetle_larva_02.
  """
  if text_width(text) <= width:
    return text
  head, tail = text, text
  while text_width(head) > width // 2:
    head = head[:-1]
  while text_width(tail) > (width - 1) // 2:
    tail = tail[1:]
  return f'{head}…{tail}'
