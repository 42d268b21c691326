"""Compares written models of any format with the checkpoint that they came from.

  images = comparison.find_images(None, 'flowers', image_size)
  comparisons = comparison.verify(paths, images, predict, 'float32')
"""

import collections
import io
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
TABLE_ROW = '{:<15} {:>12} {:>12} {:>8} {:>9}'
MIN_AGREEMENT = 0.99  # share of the images whose most probable class must be the same

Images = collections.namedtuple('Images', [
    'encoded',  # list of bytes, JPEG or PNG files
    'preprocessed',  # float32 [n, image_size, image_size, 3] in [-1, 1], the same images
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
])


class ComparisonError(Exception):
  """A model's probabilities are too far from the checkpoint's."""


def find_images(dataset_dir, dataset_name, image_size):
  """Returns the Images to compare on.

  Args:
    dataset_dir: folder of a dataset, whose validation images are used; None is
      DATASET_DIR, or random images if that holds no dataset.
    dataset_name: first part of its files' names.
    image_size: size of the network's input in pixels.

  Raises:
    flowers.DatasetError: dataset_dir holds no dataset.
  """
  folder = dataset_dir or DATASET_DIR
  try:
    encoded = _read_validation_images(folder, dataset_name)
    description = f'{len(encoded)} validation images of {folder}'
  except flowers.DatasetError:
    if dataset_dir:
      raise
    encoded = _draw_random_images(image_size)
    description = f'{len(encoded)} random images, because there is no dataset in {folder}'
  preprocess = models.Preprocessor(image_size)
  return Images(encoded, np.stack([preprocess(content) for content in encoded]), description)


def _read_validation_images(dataset_dir, dataset_name):
  dataset = flowers.get_split('validation', dataset_dir, flowers.name_pattern(dataset_name))
  read = flowers.RecordReader(dataset)
  num_images = min(MAX_IMAGES, dataset.num_samples)
  encoded = []
  for number in np.linspace(0, dataset.num_samples - 1, num_images).astype(int):
    try:
      read(number)
    except tfrecords.RecordError:
      continue  # Evaluation skips it too.
    example = tf.train.Example.FromString(dataset.records[number])
    encoded.append(example.features.feature['image/encoded'].bytes_list.value[0])
  if not encoded:
    raise flowers.DatasetError(f'No validation image of {dataset_dir} is usable: '
                               + flowers.describe_bad_record(dataset, 0))
  return encoded


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
  return Comparison(
      max_difference=float(np.abs(found.probabilities - reference.probabilities).max()),
      agreement=float(np.mean(
          found.probabilities.argmax(1) == reference.probabilities.argmax(1))),
      milliseconds=found.milliseconds)


def is_close(comparison, bound):
  """Whether the probabilities are within `bound` and the classes agree; False for NaN."""
  return comparison.max_difference <= bound and comparison.agreement >= MIN_AGREEMENT


def verify(paths, images, predict, precision):
  """Compares written files with the checkpoint, and prints a table.

  Args:
    paths: {format: path} of the files; labels.txt is in the same folder.
    images: Images to compare on.
    predict: the checkpoint's function from `freeze.freeze`.
    precision: what the files compute in, one of models.PRECISIONS.

  Returns:
    {format: Comparison}.

  Raises:
    ComparisonError: a file differs from the checkpoint by more than its format
      allows.
  """
  reference = measure(predict, images.preprocessed)
  print(f'Compared on {images.description}; ms per image in batches of {BATCH_SIZE}')
  print(TABLE_ROW.format('format', 'bytes', 'difference', 'top-1', 'ms'))
  print(TABLE_ROW.format('checkpoint', '', '', '', f'{reference.milliseconds:.1f}'), flush=True)
  comparisons, too_far = {}, []
  for name, path in paths.items():
    comparison = compare(models.load(path, use_gpu=False), images, reference)
    print(TABLE_ROW.format(
        name, f'{models.num_bytes(path):,}', f'{comparison.max_difference:.1e}',
        f'{comparison.agreement:.1%}', f'{comparison.milliseconds:.1f}'), flush=True)
    bound = (formats.BFLOAT16_BOUND if precision == 'bfloat16'
             else formats.FORMATS[name].bound)
    if not is_close(comparison, bound):
      too_far.append(f'{name} (allowed: a difference of {bound:.0e}, the same class for '
                     f'{MIN_AGREEMENT:.0%} of the images)')
    comparisons[name] = comparison
  if too_far:
    raise ComparisonError('Nothing was written, because these formats differ too much from the '
                          'checkpoint: ' + ', '.join(too_far))
  return comparisons
