"""Writes the weights of a slim checkpoint as a Keras file."""

import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from common import checkpoints
from conversion import keras_files
from conversion import keras_models
from conversion import output_files
import xception


def convert(checkpoint, path, use_averages='auto', overwrite=False):
  """Writes a checkpoint's weights as a Keras file.

  Args:
    checkpoint: path of a checkpoint, or of a folder whose newest one is used.
    path: path of the file: .weights.h5 for weights, .keras or .h5 for a whole
      model.
    use_averages: 'auto', 'yes' or 'no', see `checkpoints.stored_names`.
    overwrite: bool, whether an existing file may be replaced.

  Raises:
    keras_models.ConversionError: the checkpoint is damaged or holds another
      network, or the file cannot be written.
    checkpoints.CheckpointError: there is no checkpoint, or it has no averages.
  """
  output_files.refuse_existing([path], overwrite)
  if os.path.isfile(checkpoint) and checkpoint.endswith(keras_files.SUFFIXES):
    raise keras_models.ConversionError(
        f'{checkpoint} is a Keras file, not a checkpoint: give it as --keras_weights, with '
        '--output_checkpoint')
  checkpoint = checkpoints.find(None, checkpoint)
  try:
    reader = tf.train.load_checkpoint(checkpoint)
    stored = reader.get_variable_to_shape_map()
    model = build_for(checkpoint, stored)
    names, are_averages = checkpoints.stored_names(
        checkpoint, keras_models.slim_weights(model), use_averages)
    keras_models.set_slim_weights(model, {name: reader.get_tensor(names[name]) for name in names})
  except tf.errors.OpError as error:
    raise keras_models.ConversionError(
        f'{checkpoint} is damaged ({error.message}): convert another checkpoint') from error
  size, num_classes = model.input_shape[1], model.output_shape[1]
  print(f'Read {len(names)} weights of {checkpoint}: '
        f'{"their Polyak averages" if are_averages else "as trained, not averaged"}; '
        f'{model.count_params():,} parameters, {num_classes} classes, images of {size} x {size}')

  with output_files.folder_beside(path) as folder:
    temporary = os.path.join(folder, os.path.basename(path))
    save = model.save_weights if path.endswith('.weights.h5') else model.save
    save(temporary)
    os.replace(temporary, path)
  print(f'Wrote {path} ({os.path.getsize(path) / 1e6:.1f} MB)')


def build_for(checkpoint, stored):
  """Builds Keras' Xception with the classes and the image size of a checkpoint.

  Args:
    checkpoint: path of the checkpoint.
    stored: dict {variable name: shape as a list} of the checkpoint.

  Returns:
    A Keras model of random weights.

  Raises:
    keras_models.ConversionError: the variables are not those of Keras' Xception.
    checkpoints.CheckpointError: model_config.json is damaged.
  """
  layers = {name.split('/')[1] for name in stored if name.startswith('Xception/')}
  if layers and keras_models.LOGITS not in stored:
    raise keras_models.ConversionError(
        f"{checkpoint} has no logits, so Keras' classifier would be random: convert a checkpoint "
        'of a trained network')
  size = xception.xception.default_image_size
  if os.path.exists(output_files.beside(checkpoint, checkpoints.CONFIG_FILE)):
    size = checkpoints.load_config(checkpoint).image_size
  model = keras_models.import_keras().applications.Xception(
      weights=None, classes=stored.get(keras_models.LOGITS, [1])[-1], input_shape=(size, size, 3))

  expected = {name: list(value.shape) for name, value in keras_models.slim_weights(model).items()}
  problems = [f'lacks {name}' for name in expected if name not in stored]
  problems += [f'has {layer}'
               for layer in sorted(layers - {name.split('/')[1] for name in expected})]
  if problems:
    raise keras_models.ConversionError(
        f"{checkpoint} does not hold Keras' Xception: it {problems[0]}. Convert a checkpoint that "
        'train_flowers.py wrote')
  for name, shape in expected.items():
    if stored[name] != shape:
      raise keras_models.ConversionError(
          f'{checkpoint} does not have the width of Keras\' Xception: {name} is {stored[name]}, '
          f'not {shape}. Train with --depth_multiplier 1')
  return model
