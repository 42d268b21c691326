"""Loads a classifier of any format, such as write_pb.py writes, and runs it on images.

  model = models.load('frozen_model_xception.tflite')
  probabilities = model.predict(images)

A .pb or a SavedModel is a program: load only files made by you or by someone you
trust.
"""

import dataclasses
import json
import os
import typing

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from common import arguments
from common import checkpoints
from common import errors
from common import files
from export import runtimes
from records import flowers
import xception_preprocessing

ModelError = runtimes.ModelError
INPUT_NODE, OUTPUT_NODE = runtimes.INPUT_NODE, runtimes.OUTPUT_NODE

MODEL_FILE = 'model.json'  # describes the models in its folder
SAVED_MODEL_FILE = 'saved_model.pb'  # in the folder of a SavedModel

PRECISIONS = ('float32', 'bfloat16')

# What model.json may say under some of its keys: {key: (predicate, description)}.
MODEL_FILE_TYPES = {
    'image_size': (lambda value: type(value) is int and 0 < value <= arguments.MAX_IMAGE_SIZE,
                   f'a whole number from 1 to {arguments.MAX_IMAGE_SIZE}'),
    'global_step': (lambda value: type(value) is int and value >= 0,
                    'a whole number of 0 or more'),
    'class_names': (lambda value: isinstance(value, list)
                    and all(isinstance(name, str) for name in value), 'a list of texts'),
    'file': (lambda value: isinstance(value, str), 'a text'),
    'sha256': (lambda value: isinstance(value, str), 'a text'),
}

# Rows of 8-bit probabilities sum to 1 only roughly; logits do not at all.
MAX_SUM_ERROR = 0.1


@dataclasses.dataclass(frozen=True)
class FrozenModel:
  """A model that is ready to run.

  Attributes:
    class_names: names of the classes.
    image_size: height and width of its images in pixels; None if it takes
      encoded images.
    description: what the model.json in its folder says of this file; empty if it
      says nothing.
  """
  class_names: list[str]
  image_size: int | None
  description: dict
  _run: typing.Callable

  def predict(self, batch):
    """Classifies a batch.

    Args:
      batch: float32 [n, image_size, image_size, 3] in [-1, 1] with n >= 1; if
        image_size is None, a list of the bytes of n JPEG or PNG files.

    Returns:
      The probabilities, float32 [n, num_classes].

    Raises:
      ModelError: the model does not run, or returns no probabilities.
    """
    if not len(batch):
      raise ValueError('predict() needs at least one image, got an empty batch')
    return self._run(batch)


class Preprocessor:
  """Turns an encoded image into the network's input, exactly as evaluation does."""

  def __init__(self, image_size):
    with tf.Graph().as_default():
      self._encoded = tf.placeholder(tf.string, [])
      # Cropping before the conversion to float gives the same pixels in a third
      # less memory; a large image takes a gigabyte.
      crop = tf.image.central_crop(xception_preprocessing.decode(self._encoded),
                                   xception_preprocessing.CENTRAL_FRACTION)
      self._image = xception_preprocessing.preprocess_for_eval(
          crop, image_size, image_size, central_fraction=None)
      self._session = tf.Session(config=runtimes.session_config(use_gpu=False))

  def __call__(self, encoded):
    """Returns float32 [image_size, image_size, 3] in [-1, 1].

    Args:
      encoded: bytes of a JPEG or PNG file.
    """
    return self._session.run(self._image, {self._encoded: encoded})


def load(path, precision='float32', use_gpu=True):
  """Loads a model.

  Args:
    path: a .tflite file, an .onnx file, a SavedModel (its folder or its
      saved_model.pb), or a frozen graph under any other name.
    precision: 'bfloat16' makes TensorFlow run a float32 graph in bfloat16.
    use_gpu: False makes TensorFlow run it on the CPU; other runtimes always do.

  Returns:
    A FrozenModel.

  Raises:
    ModelError: the file is missing, damaged or not the one that model.json
      describes; its runtime is not installed or cannot run it; it is no
      classifier of square RGB images; or its classes are unknown.
  """
  if os.path.basename(path) == SAVED_MODEL_FILE:
    path = os.path.dirname(os.path.abspath(path))
  _refuse_other_files(path)
  if not os.path.exists(path):
    raise ModelError(f'There is no model {path}: write_pb.py writes one')
  content = _read_model_file(path)
  _check_sums(path, content['files'])
  description = _description(path, content)
  network = runtimes.open_network(path, precision, use_gpu)
  image_size, is_channels_first = _input_layout(path, network.input, description)
  class_names = _class_names(path, description, _num_classes(path, network.output))
  return FrozenModel(class_names, image_size, description, _runner(
      path, network, is_channels_first, len(class_names)))


def files_below(path):
  """Returns the sorted files of a SavedModel's folder, or the one file of another format."""
  if not os.path.isdir(path):
    return [path]
  return sorted(os.path.join(folder, name)
                for folder, _, names in os.walk(path) for name in names)


def num_bytes(path):
  """Returns the total size of a model's files in bytes."""
  return sum(os.path.getsize(file) for file in files_below(path))


def _refuse_other_files(path):
  """Raises a ModelError if a path is of a checkpoint or a Keras file, and names the script."""
  prefix = checkpoints.FILE_SUFFIX.sub('', path)
  is_log_dir = os.path.exists(os.path.join(path, 'checkpoint')) and (
      not os.path.exists(os.path.join(path, SAVED_MODEL_FILE)))
  if is_log_dir or os.path.exists(f'{prefix}.index'):
    raise ModelError(f'{path} is a checkpoint, not a frozen model: freeze it with write_pb.py, or '
                     'give it as --log_dir or --checkpoint_path instead of --graph')
  if os.path.isfile(path) and path.lower().endswith(('.h5', '.keras')):
    raise ModelError(f'{path} is a Keras file: convert it with convert_keras_weights.py')


def _read_model_file(path):
  """Returns the content of the model.json in a model's folder, or {'files': []} without one."""
  model_file = os.path.join(os.path.dirname(os.path.abspath(path)), MODEL_FILE)
  try:
    with open(model_file, encoding='utf-8') as f:
      content = json.load(f)
    if not all(isinstance(file, dict) for file in content['files']):
      raise ValueError(f'expected a list of objects as files, got {content["files"]!r}')
  except FileNotFoundError:
    return {'files': []}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ModelError(f'Cannot read the {MODEL_FILE} of {path}: {error!r}') from error
  for entries in (content, *content['files']):
    for key, (is_valid, expected) in MODEL_FILE_TYPES.items():
      if key in entries and not is_valid(entries[key]):
        raise ModelError(f'{model_file}: {key} must be {expected}, got {entries[key]!r:.100}')
  return content


def _check_sums(path, entries):
  """Compares a model's files with their SHA-256 in model.json."""
  folder = os.path.dirname(os.path.abspath(path))
  sums = {entry.get('file'): entry.get('sha256') for entry in entries}
  for file in files_below(os.path.abspath(path)):
    name = os.path.relpath(file, folder)
    if sums.get(name) not in (None, files.sha256(file)):
      raise ModelError(f'{file} is damaged or is not the file that its {MODEL_FILE} '
                       'describes: write it again with write_pb.py')


def _description(path, content):
  """Returns what model.json says of one model; its entry comes before what all have in common."""
  folder = os.path.dirname(os.path.abspath(path))
  names = {os.path.relpath(file, folder) for file in files_below(os.path.abspath(path))}
  common = {key: value for key, value in content.items() if key != 'files'}
  for entry in content['files']:
    if entry.get('file') in names:
      is_same = all(entry.get(key, common.get(key)) == common.get(key) for key in
                    ('checkpoint', 'global_step', 'averaged_weights', 'image_size'))
      return {**common, **entry, **({} if is_same else {'metrics': None})}
  return common


def _input_layout(path, port, description):
  """Returns the image size, None for encoded images, and whether channels come first."""
  if port.dtype == object:
    return None, False
  shape = [None] * 4 if port.shape is None else port.shape
  expected = f'{path}: its input {port.name} has the shape {shape}'
  if len(shape) != 4:
    raise ModelError(f'{expected}, expected [n, size, size, 3] or [n, 3, size, size]')
  is_channels_first = shape[1] == 3 and shape[3] != 3
  channels, (height, width) = ((shape[1], shape[2:]) if is_channels_first else
                               (shape[3], shape[1:3]))
  if channels not in (None, 3) or height != width:
    raise ModelError(f'{expected}, expected square images of 3 channels')
  image_size = height or description.get('image_size')
  if not image_size:
    raise ModelError(f'{expected}, which leaves the image size open: write {{"image_size": 299, '
                     f'"files": []}} with its size into a {MODEL_FILE} in its folder')
  return image_size, is_channels_first


def _num_classes(path, port):
  """Returns the number of classes, None if the file does not tell."""
  shape = [None, None] if port.shape is None else port.shape
  sizes = [size for size in shape[1:] if size != 1]  # such as [n, 1, 1, num_classes]
  if len(sizes) != 1:
    raise ModelError(f'{path}: its output {port.name} has the shape {shape}, expected '
                     '[n, num_classes]')
  return sizes[0]


def _class_names(path, description, num_classes):
  """Returns the names in labels.txt in the model's folder, or else those in model.json."""
  folder = os.path.dirname(os.path.abspath(path))
  source, class_names = os.path.join(folder, MODEL_FILE), description.get('class_names')
  labels_file = os.path.join(folder, flowers.LABELS_FILE)
  if os.path.exists(labels_file):
    try:
      source, class_names = labels_file, flowers.read_labels_file(labels_file)
    except flowers.DatasetError as error:
      raise ModelError(f'No class names of {path}: {error}') from error
  elif not class_names:
    raise ModelError(f'{path} has {num_classes or "unnamed"} classes, and no {labels_file} that '
                     'names them, with a line like 0:daisy for each class')
  if num_classes not in (None, len(class_names)):
    raise ModelError(f'{source} names {len(class_names)} classes, but {path} has {num_classes}')
  return class_names


def _runner(path, network, is_channels_first, num_classes):
  """Returns a function from a batch of any size to probabilities."""
  batch_size = network.input.shape[0] if network.input.shape else None

  def run_part(part):
    padding = np.repeat(part[-1:], batch_size - len(part), axis=0) if batch_size else part[:0]
    try:
      output = network.run(np.concatenate([part, padding]))
    except Exception as error:  # pylint: disable=broad-except
      # Each runtime has exceptions of its own.
      raise ModelError(f'{path} does not run: {errors.reason(error)}') from error
    num_images = len(part) + len(padding)
    if np.shape(output)[:1] != (num_images,):
      raise ModelError(f'{path} returns an array of shape {np.shape(output)} for a batch of '
                       f'{num_images}, expected [n, num_classes]')
    return output[:len(part)]

  def run(batch):
    batch = _to_input(path, network.input, batch, is_channels_first)
    step = batch_size or len(batch)
    output = np.concatenate([run_part(batch[first:first + step])
                             for first in range(0, len(batch), step)])
    return _to_probabilities(path, network.output, output, num_classes)

  return run


def _to_input(path, port, batch, is_channels_first):
  """Converts a batch to the layout and the type that a network takes."""
  batch = np.asarray(batch, None if port.dtype != object else object)
  if is_channels_first:
    batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
  if port.dtype.kind in 'iu':
    _require_scale(path, port)
    limits = np.iinfo(port.dtype)
    batch = np.clip(np.round(batch / port.scale) + port.zero_point, limits.min, limits.max)
  return batch.astype(port.dtype)


def _to_probabilities(path, port, output, num_classes):
  """Converts a network's output to float32 [n, num_classes], and checks that it is a softmax."""
  if port.dtype.kind in 'iu':
    _require_scale(path, port)
    output = (output.astype(np.float32) - port.zero_point) * port.scale
  if output[0].size != num_classes:
    raise ModelError(f'{path} returns {output[0].size} numbers an image, but has '
                     f'{num_classes} classes')
  output = output.reshape([len(output), num_classes]).astype(np.float32)
  # A NaN is for the comparison to find.
  if output.min() < -MAX_SUM_ERROR or np.abs(output.sum(1) - 1).max() > MAX_SUM_ERROR:
    raise ModelError(f'{path}: its output {port.name} does not hold probabilities, their sum is '
                     f'{output[0].sum():.3g}: it must end with a softmax')
  return output


def _require_scale(path, port):
  if not port.scale:
    raise ModelError(f'{path}: {port.name} is {port.dtype} without a scale, expected float32 or '
                     'a quantized type')
