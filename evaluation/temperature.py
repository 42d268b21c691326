"""Calibrates probabilities with one number, the temperature that logits are divided by.

A temperature above 1 makes a network less sure of itself, one below 1 surer. The
most probable class, and with it the accuracy, stays the same. Guo et al., *On
Calibration of Modern Neural Networks*, 2017, https://arxiv.org/abs/1706.04599.
"""

import collections

import numpy as np

from evaluation import curves

MIN_IMAGES = 20  # with fewer, chance decides
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0

Scaled = collections.namedtuple('Scaled', [
    'temperature',  # float > 0
    'fitted_on',  # name of the split that it was fitted on
    'loss',  # float, mean cross-entropy at this temperature
    'calibration',  # curves.Calibration at this temperature
])


class TemperatureError(Exception):
  """No temperature can be fitted; the message says why."""


def fit(labels, logits):
  """Returns the temperature at which the mean cross-entropy of softmax(logits / T) is smallest.

  The cross-entropy is convex in 1 / T, so its slope has one zero at most.

  Args:
    labels: int [num_images] in [0, num_classes).
    logits: float [num_images, num_classes], up to a constant for each image.

  Raises:
    TemperatureError: there are fewer than MIN_IMAGES images, or no temperature
      between MIN_TEMPERATURE and MAX_TEMPERATURE is the best one.
  """
  from scipy import optimize  # takes time that --help does not have
  from scipy import special

  num_images = len(labels)
  if num_images < MIN_IMAGES:
    raise TemperatureError(f'A temperature is fitted to {MIN_IMAGES} images or more, got '
                           f'{num_images}: choose a larger split')
  if not np.isfinite(logits).all():
    raise TemperatureError('No temperature can be fitted, because the network predicts NaN or '
                           'infinity: did training diverge?')
  margins = _margins(labels, logits)

  def slope(inverse):
    """Returns the derivative of the mean cross-entropy with respect to 1 / T."""
    return (special.softmax(inverse * margins, axis=1) * margins).sum(1).mean()

  if slope(1 / MAX_TEMPERATURE) >= 0:
    raise TemperatureError(f'No temperature up to {MAX_TEMPERATURE:g} is high enough: the network '
                           'does no better than guessing, or its logits are in the thousands')
  if slope(1 / MIN_TEMPERATURE) <= 0:
    num_correct = (margins <= 0).all(1).sum()
    raise TemperatureError(
        f'No temperature down to {MIN_TEMPERATURE:g} is low enough, because {num_correct} of '
        f'{num_images} predictions are right: choose a split with more mistakes')
  return 1 / optimize.brentq(slope, 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)


def scale(labels, logits, temperature, fitted_on):
  """Returns what a temperature makes of predictions, a Scaled.

  Args:
    labels, logits: see `fit`.
    temperature: float > 0.
    fitted_on: name of the split that it was fitted on.
  """
  from scipy import special

  margins = _margins(labels, logits) / temperature
  return Scaled(temperature, fitted_on, float(special.logsumexp(margins, axis=1).mean()),
                curves.calibrate(labels, special.softmax(margins, axis=1)))


def to_dict(scaled):
  """Returns a Scaled in types that json.dumps accepts."""
  return {'temperature': scaled.temperature, 'fitted_on': scaled.fitted_on, 'loss': scaled.loss,
          **curves.calibration_to_dict(scaled.calibration)}


def _margins(labels, logits):
  """Returns by how much each logit is above that of the label, float64."""
  logits = np.asarray(logits, np.float64)
  return logits - logits[np.arange(len(labels)), labels, np.newaxis]
