"""Writes the weights of a Keras file as a slim checkpoint."""

import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from conversion import keras_files
from conversion import keras_models
from conversion import output_files
import xception

# Renamed into place in this order: TensorFlow finds a checkpoint by its index.
CHECKPOINT_SUFFIXES = ('.data-00000-of-00001', '.index')
STATE_FILE = 'checkpoint'  # names the newest checkpoint of a folder
TOLERANCE = 1e-4  # largest difference from Keras, of a probability or relative to the features


def convert(keras_weights, path, num_classes=None, image_size=None, class_names=None,
            overwrite=False):
  """Writes Keras' weights as a checkpoint with its model_config.json.

  Args:
    keras_weights: path of a Keras file, or 'imagenet'.
    path: path of the checkpoint, without its file endings.
    num_classes: int, the number of classes that is required; None accepts any.
      With 'imagenet', 0 leaves the logits out.
    image_size: int, height and width in pixels if the file does not give them; None is 299.
    class_names: list of str; None are those of ImageNet, or class_0, class_1, ...
    overwrite: bool, whether existing files may be replaced.

  Raises:
    keras_models.ConversionError: the weights cannot be read or converted, or the
      checkpoint cannot be written.
  """
  config_path = output_files.beside(path, checkpoints.CONFIG_FILE)
  output_files.refuse_existing([output_files.beside(path, STATE_FILE), config_path,
                                *(path + suffix for suffix in CHECKPOINT_SUFFIXES)], overwrite)
  is_imagenet = keras_weights == keras_files.IMAGENET
  if not is_imagenet and not keras_weights.endswith(keras_files.SUFFIXES) and (
      is_checkpoint(keras_weights)):
    raise keras_models.ConversionError(
        f'{keras_weights} is a checkpoint, not a Keras file: give it as --checkpoint, with '
        '--output_keras')
  network = load_keras(keras_weights, num_classes)
  print(f'Read {len(network.weights)} weights of {keras_weights}: '
        f'{sum(value.size for value in network.weights.values()):,} parameters, '
        f'{network.num_classes or "no"} classes')
  for note in network.notes:
    print(note)
  size = choose_image_size(network, image_size, keras_weights)
  config = None
  if network.num_classes:
    class_names = choose_class_names(class_names, network.num_classes, keras_weights)
    config = checkpoints.ModelConfig(class_names, size, depth_multiplier=1.0, seed=0)
  elif class_names or image_size:
    raise keras_models.ConversionError(
        f'{keras_weights} has no classifier, so its checkpoint keeps neither class names nor an '
        'image size: leave --labels and --image_size out')
  write_checkpoint(network, config, size, path)
  print(f'Wrote {path} and {config_path}' if config else
        f'Wrote {path} without logits, for fine-tuning; it has no {checkpoints.CONFIG_FILE}')


def is_checkpoint(path):
  """Returns whether a path is that of a checkpoint, or of a folder with one."""
  try:
    tf.train.load_checkpoint(checkpoints.find(None, path))
  except (checkpoints.CheckpointError, tf.errors.OpError, ValueError):
    return False
  return True


def load_keras(keras_weights, num_classes):
  """Returns the keras_models.Network of a Keras file, with `num_classes` classes if given."""
  is_imagenet = keras_weights == keras_files.IMAGENET
  if is_imagenet and num_classes not in (None, 0, keras_files.IMAGENET_CLASSES):
    raise keras_models.ConversionError(
        f"Keras' ImageNet weights have {keras_files.IMAGENET_CLASSES} classes, not {num_classes}: "
        'leave --num_classes out, or give 0 for no logits')
  network = keras_files.load(keras_weights, with_top=num_classes != 0)
  found = network.num_classes
  if found and num_classes not in (None, found):
    raise keras_models.ConversionError(f'{keras_weights} has {found} classes, not {num_classes}: '
                                       f'give --num_classes {found}, or leave it out')
  return network


def choose_image_size(network, image_size, keras_weights):
  """Returns the image size of a Keras file, or `image_size` if the file has none."""
  if network.image_size is None:
    if image_size is None and network.num_classes and keras_weights != keras_files.IMAGENET:
      size = xception.xception.default_image_size
      print(f'The file does not give the size of its images: {size} x {size} pixels are assumed; '
            '--image_size sets another size')
    return image_size or xception.xception.default_image_size
  if image_size not in (None, network.image_size):
    raise keras_models.ConversionError(
        f'{keras_weights} is for images of {network.image_size} x {network.image_size} pixels, '
        f'not {image_size}: leave --image_size out')
  return network.image_size


def choose_class_names(class_names, num_classes, keras_weights):
  """Returns `class_names`; for None those of ImageNet, or class_0, class_1, ..."""
  if class_names is None and keras_weights == keras_files.IMAGENET:
    class_names = keras_files.imagenet_names()
  if class_names is None:
    class_names = [f'class_{i}' for i in range(num_classes)]
    print(f'The classes are named class_0 to {class_names[-1]}; --labels sets other names')
  if len(class_names) != num_classes:
    raise keras_models.ConversionError(
        f'--labels names {len(class_names)} classes, but {keras_weights} has {num_classes}: give '
        'the labels.txt it was trained with')
  return class_names


def write_checkpoint(network, config, image_size, path):
  """Writes a slim checkpoint of step 0 that reproduces Keras' outputs; replaces existing files.

  Args:
    network: a keras_models.Network.
    config: a ModelConfig, or None for weights without logits.
    image_size: height and width in pixels of the images on which outputs are compared.
    path: path of the checkpoint, without its file endings.

  Raises:
    keras_models.ConversionError: it cannot be written, or the outputs differ.
  """
  values = {**network.weights, 'global_step': np.int64(0)}
  with output_files.folder_beside(path) as folder:
    temporary = os.path.join(folder, os.path.basename(path))
    tf.raw_ops.SaveV2(prefix=temporary, tensor_names=list(values),
                      shape_and_slices=[''] * len(values), tensors=list(values.values()))
    if network.answer is not None:
      compare_answers(temporary, network, image_size)
    # An interruption must not leave an old index or configuration beside new data.
    for old in (f'{path}.index', output_files.beside(path, checkpoints.CONFIG_FILE)):
      if os.path.exists(old):
        os.remove(old)
    if config:
      checkpoints.save_config(config, os.path.dirname(path))
    for suffix in CHECKPOINT_SUFFIXES:
      os.replace(temporary + suffix, path + suffix)
    tf.train.update_checkpoint_state(os.path.dirname(path) or '.', path)


def compare_answers(checkpoint, network, image_size):
  """Raises a ConversionError unless a checkpoint reproduces Keras' outputs on random images."""
  images = np.random.default_rng(0).uniform(-1, 1, [2, image_size, image_size, 3])
  images = images.astype(np.float32)
  with tf.Graph().as_default(), \
       tf.Session(config=tf.ConfigProto(device_count={'GPU': 0})) as session:
    with slim.arg_scope(xception.xception_arg_scope()):
      features, end_points = xception.xception(
          tf.constant(images), network.num_classes, is_training=False)
    checkpoints.restore(session, checkpoint, use_averages='no')
    found = session.run(end_points.get('Predictions', features))
  expected = network.answer(images)
  difference = np.abs(found.reshape(expected.shape) - expected).max()
  # Probabilities are at most 1; features can be much larger.
  if not difference <= TOLERANCE * max(1, np.abs(expected).max()):
    raise keras_models.ConversionError(
        f'The slim network outputs {found[0]} where Keras outputs {expected[0]}: the model '
        'computes something that its layers and weights do not show')
  print(f"The slim network reproduces Keras' outputs: they differ by at most {difference:.1g}")
