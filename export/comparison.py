"""Compares written models of any format with the checkpoint that they came from.

  images = comparison.find_images(image_size)
  comparisons = comparison.verify(paths, images, predict, 'float32')
"""

import collections
import io
import os
import statistics
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from export import formats
from export import models
from records import flowers
from records import tfrecords

DATASET_DIR = 'dataset'
MAX_IMAGES = 100
BATCH_SIZE = 8
TABLE_ROW = '{:<16} {:>12} {:>12} {:>8} {:>9}'
MIN_AGREEMENT = 0.99  # share of the images whose most probable class must be the same

# Of formats with 8-bit activations. Their classes agree for MAX_DISAGREEMENT of the images
# plus the accuracy that they may lose.
MAX_ACCURACY_LOSS = 0.01
MAX_DISAGREEMENT = 0.04

Images = collections.namedtuple('Images', [
    'encoded',  # list of bytes, JPEG or PNG files
    'preprocessed',  # float32 [n, image_size, image_size, 3] in [-1, 1], the same images
    'labels',  # list of n ints; None of random images
    'class_names',  # of the labels
    'description',  # where they come from, for the user
])
Measurement = collections.namedtuple('Measurement', [
    'probabilities',  # float32 [n, num_classes]
    'milliseconds',  # per image, in batches of BATCH_SIZE
])
Comparison = collections.namedtuple('Comparison', [
    'max_difference',  # largest difference of a probability
    'agreement',  # share of the images whose most probable class is the same
    'milliseconds',  # per image, in batches of BATCH_SIZE
    'accuracy_loss',  # accuracy of the checkpoint minus that of the format; None without labels
])


class ComparisonError(Exception):
  """A model's probabilities are too far from the checkpoint's."""


def find_images(image_size, dataset_dir=None, **dataset_options):
  """Returns the Images to compare on.

  Args:
    image_size: size of the network's input in pixels.
    dataset_dir: folder of a dataset, whose validation images are used; None is
      DATASET_DIR, or random images if that holds no dataset.
    **dataset_options: other arguments of `flowers.get_split`.

  Raises:
    flowers.DatasetError: dataset_dir holds no dataset.
  """
  folder = dataset_dir or DATASET_DIR
  labels, class_names = None, None
  try:
    encoded, labels, class_names = _read_validation_images(folder, **dataset_options)
    description = f'{len(encoded)} validation images of {folder}'
  except flowers.DatasetError as error:
    if dataset_dir:
      raise
    encoded = _draw_random_images(image_size)
    reason = error if os.path.isdir(folder) else f'there is no dataset in {folder}'
    description = f'{len(encoded)} random images, because {reason}'
  preprocess = models.Preprocessor(image_size)
  return Images(encoded, np.stack([preprocess(content) for content in encoded]), labels,
                class_names, description)


def require_labels(images, class_names):
  """Checks that the accuracies of formats with 8-bit activations can be compared.

  Args:
    images: Images.
    class_names: the checkpoint's.

  Raises:
    ComparisonError: there are fewer than MAX_IMAGES images, or they have other classes.
  """
  if images.class_names != class_names or len(images.encoded) < MAX_IMAGES:
    raise ComparisonError(
        f'8-bit formats lose accuracy, and measuring that needs {MAX_IMAGES} validation images '
        f'of the checkpoint\'s classes, got {images.description}: give a --dataset_dir, or '
        '--noverify to write them unmeasured')


def _read_validation_images(dataset_dir, **dataset_options):
  dataset = flowers.get_split('validation', dataset_dir, **dataset_options)
  read = flowers.RecordReader(dataset)
  num_images = min(MAX_IMAGES, dataset.num_samples)
  encoded, labels = [], []
  for number in np.linspace(0, dataset.num_samples - 1, num_images).astype(int):
    try:
      _, label = read(number)
    except tfrecords.RecordError:
      continue  # Evaluation skips it too.
    example = tf.train.Example.FromString(dataset.records[number])
    encoded.append(example.features.feature[dataset.image_key].bytes_list.value[0])
    labels.append(label)
  if not encoded:
    raise flowers.DatasetError(f'No validation image of {dataset_dir} is usable: '
                               + flowers.describe_bad_record(dataset, 0))
  return encoded, labels, list(dataset.labels_to_names.values())


def _draw_random_images(image_size):
  """Returns PNG files of coloured patches; the network could not tell images of noise apart."""
  random = np.random.default_rng(0)
  encoded = []
  for _ in range(MAX_IMAGES):
    image = Image.fromarray(random.integers(0, 256, [6, 6, 3], np.uint8))
    file = io.BytesIO()
    image.resize((image_size, image_size), Image.Resampling.BICUBIC).save(file, 'PNG')
    encoded.append(file.getvalue())
  return encoded


def measure(predict, batch):
  """Runs a model on images, in batches of BATCH_SIZE.

  Args:
    predict: function of a slice of `batch` that returns its probabilities.
    batch: float32 [n, image_size, image_size, 3], or a list of n encoded images.

  Returns:
    A Measurement.
  """
  probabilities, seconds = [], []
  predict(batch[:BATCH_SIZE])  # The first call is slower: it sets the runtime up.
  for first in range(0, len(batch), BATCH_SIZE):
    part = batch[first:first + BATCH_SIZE]
    start = time.perf_counter()
    probabilities.append(predict(part))
    seconds.append((time.perf_counter() - start) / len(part))
  return Measurement(np.concatenate(probabilities), 1000 * statistics.median(seconds))


def compare(model, images, reference):
  """Compares a FrozenModel with a checkpoint's Measurement; returns a Comparison."""
  found = measure(model.predict,
                  images.preprocessed if model.image_size else images.encoded)
  classes, expected = found.probabilities.argmax(1), reference.probabilities.argmax(1)
  accuracy_loss = None if images.labels is None else float(
      np.mean(expected == images.labels) - np.mean(classes == images.labels))
  return Comparison(
      max_difference=float(np.abs(found.probabilities - reference.probabilities).max()),
      agreement=float(np.mean(classes == expected)),
      milliseconds=found.milliseconds,
      accuracy_loss=accuracy_loss)


def find_fault(comparison, bound, max_accuracy_loss=MAX_ACCURACY_LOSS):
  """Returns how a format differs too much from the checkpoint, None if it does not.

  Args:
    comparison: Comparison.
    bound: largest allowed difference of a probability; None if it is the accuracy
      that counts.
    max_accuracy_loss: largest allowed loss of accuracy, in [0, 1].
  """
  if bound is None:
    min_agreement = 1 - MAX_DISAGREEMENT - max_accuracy_loss
    if comparison.accuracy_loss > max_accuracy_loss + 1e-9:
      return (f'it loses {comparison.accuracy_loss:.1%} of accuracy, {max_accuracy_loss:.1%} are '
              'allowed by --max_accuracy_loss')
  else:
    min_agreement = MIN_AGREEMENT
    if not comparison.max_difference <= bound:  # NaN too
      return f'a difference of {bound:.0e} is allowed'
  if comparison.agreement < min_agreement or np.isnan(comparison.max_difference):
    return f'the class must be the same for {min_agreement:.0%} of the images'
  return None


def verify(paths, images, predict, precision, max_accuracy_loss=MAX_ACCURACY_LOSS):
  """Compares written files with the checkpoint, and prints a table.

  Args:
    paths: {format: path} of the files; labels.txt is in the same folder.
    images: Images to compare on.
    predict: the checkpoint's function from `freeze.freeze`.
    precision: what the files compute in, one of models.PRECISIONS.
    max_accuracy_loss: of formats with 8-bit activations, in [0, 1].

  Returns:
    {format: Comparison}.

  Raises:
    ComparisonError: a file differs from the checkpoint by more than its format
      allows, or the checkpoint predicts NaN.
  """
  reference = measure(predict, images.preprocessed)
  if np.isnan(reference.probabilities).any():
    raise ComparisonError('Nothing was written, because the checkpoint itself predicts NaN: its '
                          'training has diverged. Choose an earlier one with --checkpoint_path')
  print(f'Compared on {images.description}; ms per image in batches of {BATCH_SIZE}')
  print(TABLE_ROW.format('format', 'bytes', 'difference', 'top-1', 'ms'))
  print(TABLE_ROW.format('checkpoint', '', '', '', f'{reference.milliseconds:.1f}'), flush=True)
  comparisons, faults = {}, []
  for name, path in paths.items():
    comparison = compare(models.load(path, use_gpu=False), images, reference)
    print(TABLE_ROW.format(
        name, f'{models.num_bytes(path):,}', f'{comparison.max_difference:.1e}',
        f'{comparison.agreement:.1%}', f'{comparison.milliseconds:.1f}'), flush=True)
    bound = formats.BFLOAT16_BOUND if precision == 'bfloat16' else formats.FORMATS[name].bound
    fault = find_fault(comparison, bound, max_accuracy_loss)
    if fault:
      faults.append(f'{name} ({fault})')
    elif bound is None:
      print(f'{name}: accuracy {0 - 100 * comparison.accuracy_loss:+.1f} points against the '
            'checkpoint')
    comparisons[name] = comparison
  if faults:
    raise ComparisonError('Nothing was written, because these formats differ too much from the '
                          'checkpoint: ' + ', '.join(faults))
  return comparisons
