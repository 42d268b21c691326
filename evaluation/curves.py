"""Measures how well probabilities separate classes, and how well they are calibrated.

Each class is compared with all others together. A class without images, or
with all of them, has no curve, and averages leave it out.
"""

import collections

import numpy as np

NUM_BINS = 10  # of the reliability diagram
THRESHOLDS = np.arange(1, 20) / 20  # of the table for two classes

Curves = collections.namedtuple('Curves', [
    'roc_auc',  # float64 [num_classes], areas below the ROC curves; NaN without a curve
    'average_precision',  # float64 [num_classes]; NaN without a curve
    'averages',  # {'roc_auc' or 'average_precision': {'macro' or 'weighted': float or None}}
    'calibration',  # Calibration
    'thresholds',  # list of Threshold for two classes, else empty
])
Calibration = collections.namedtuple('Calibration', [
    'confidence',  # float64 [NUM_BINS], mean probability of the predicted class; NaN if empty
    'accuracy',  # float64 [NUM_BINS]; NaN if empty
    'num_images',  # int64 [NUM_BINS]
    'expected_error',  # float, mean distance of confidence and accuracy, weighted by images
])
Threshold = collections.namedtuple('Threshold', [
    'threshold',  # class 1 is predicted from this probability on
    'sensitivity',  # share of the images of class 1 that are recognized
    'specificity',  # share of the images of class 0 that are recognized
    'youden_index',  # sensitivity + specificity - 1
])


def compute(labels, probabilities):
  """Computes areas below curves, calibration and thresholds.

  Args:
    labels: int [num_images] in [0, num_classes).
    probabilities: float [num_images, num_classes].

  Returns:
    Curves.
  """
  from sklearn import metrics as sklearn_metrics  # takes a second that --help does not have

  num_images, num_classes = probabilities.shape
  support = np.bincount(labels, minlength=num_classes)
  # A network that diverged predicts NaN.
  has_curve = (support > 0) & (support < num_images) & np.isfinite(probabilities).all()
  areas = {}
  for name, area in (('roc_auc', sklearn_metrics.roc_auc_score),
                     ('average_precision', sklearn_metrics.average_precision_score)):
    areas[name] = np.full(num_classes, np.nan)
    for label in np.flatnonzero(has_curve):
      areas[name][label] = area(labels == label, probabilities[:, label])

  def averages(values):
    if not has_curve.any():
      return {'macro': None, 'weighted': None}
    return {'macro': float(values[has_curve].mean()),
            'weighted': float(np.average(values[has_curve], weights=support[has_curve]))}

  return Curves(
      **areas, averages={name: averages(values) for name, values in areas.items()},
      calibration=calibrate(labels, probabilities),
      thresholds=(compute_thresholds(labels, probabilities[:, 1])
                  if num_classes == 2 and has_curve.all() else []))


def calibrate(labels, probabilities):
  """Returns the Calibration of predictions, in bins of equally wide confidence."""
  confidence = np.nan_to_num(probabilities.max(1)).astype(np.float64)
  is_correct = probabilities.argmax(1) == labels
  bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
  num_images = np.bincount(bins, minlength=NUM_BINS)

  def means(values):
    sums = np.bincount(bins, values, NUM_BINS)
    return np.divide(sums, num_images, out=np.full(NUM_BINS, np.nan), where=num_images > 0)

  confidences, accuracies = means(confidence), means(is_correct)
  expected_error = np.nansum(num_images * np.abs(confidences - accuracies)) / len(labels)
  return Calibration(confidences, accuracies, num_images, float(expected_error))


def compute_thresholds(labels, probabilities):
  """Returns a Threshold for every 5 % and for the largest Youden's index, in ascending order.

  Args:
    labels: int [num_images], 0 or 1, both of which occur.
    probabilities: float [num_images] of class 1.
  """
  from sklearn import metrics as sklearn_metrics

  false_rates, true_rates, candidates = sklearn_metrics.roc_curve(labels, probabilities)
  best = candidates[1:][np.argmax((true_rates - false_rates)[1:])]  # the first one is infinite
  rows = []
  for threshold in np.unique(np.append(THRESHOLDS, best)).tolist():
    is_predicted = probabilities >= threshold
    sensitivity = float(is_predicted[labels == 1].mean())
    specificity = float(1 - is_predicted[labels == 0].mean())
    rows.append(Threshold(threshold, sensitivity, specificity, sensitivity + specificity - 1))
  return rows


def to_dict(curves):
  """Returns the entries of metrics.json, in types that json.dumps accepts; NaN becomes None."""
  return {
      **curves.averages,
      **calibration_to_dict(curves.calibration),
      'thresholds': [threshold._asdict() for threshold in curves.thresholds],
      'areas': [dict(zip(('roc_auc', 'average_precision'), areas)) for areas in zip(
          _numbers(curves.roc_auc), _numbers(curves.average_precision))],
  }


def calibration_to_dict(calibration):
  """Returns a Calibration in types that json.dumps accepts; NaN becomes None."""
  return {
      'expected_calibration_error': calibration.expected_error,
      'calibration': [
          {'confidence': confidence, 'accuracy': accuracy, 'num_images': num_images}
          for confidence, accuracy, num_images in zip(
              _numbers(calibration.confidence), _numbers(calibration.accuracy),
              calibration.num_images.tolist())],
  }


def _numbers(values):
  return [None if np.isnan(value) else value for value in values.tolist()]


def format_thresholds(thresholds):
  """Returns the table of thresholds as lines of text; the best Youden's index has an asterisk."""
  best = max(threshold.youden_index for threshold in thresholds)
  lines = ['threshold  sensitivity  specificity  Youden']
  for threshold in thresholds:
    lines.append('{:9.4f}  {:11.4f}  {:11.4f}  {:6.4f}'.format(*threshold)
                 + ' *' * (threshold.youden_index == best))
  return '\n'.join(lines)
