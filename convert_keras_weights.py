"""Converts the weights of keras.applications.Xception to a slim checkpoint and back.

  python convert_keras_weights.py --keras_weights imagenet --output_checkpoint ckpt/xception.ckpt
  python convert_keras_weights.py --checkpoint log --output_keras xception.keras

The first command writes a checkpoint and its model_config.json, for the
--checkpoint_path of the other scripts; the second writes a file for Keras. Both
networks have the same 236 weights under different names, so a round trip
changes no bit.
"""

import argparse
import contextlib
import os
import re
import socket
import sys
import tempfile
import textwrap
import warnings

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from common import arguments
from common import checkpoints
from records import flowers
import xception

IMAGENET = 'imagenet'
IMAGENET_CLASSES = 1000
WEIGHTS_SUFFIXES = ('.h5', '.hdf5', '.keras')
OUTPUT_SUFFIXES = ('.keras', '.weights.h5', '.h5')
# Renamed into place in this order: TensorFlow finds a checkpoint by its index.
CHECKPOINT_SUFFIXES = ('.data-00000-of-00001', '.index')
STATE_FILE = 'checkpoint'  # names the newest checkpoint of a folder
TIMEOUT_SECS = 30  # how long a download may stall

# Slim's names of a layer's weights, in the order of Keras' get_weights().
SLIM_VARIABLES = {
    'Conv2D': ('weights',),
    'SeparableConv2D': ('depthwise_weights', 'pointwise_weights'),
    'BatchNormalization': ('gamma', 'beta', 'moving_mean', 'moving_variance'),
    'Dense': ('weights', 'biases'),
}
# Keras names the residual convolutions and their batch norms by a counter that depends
# on what the process built before, so they are identified by their order.
RESIDUAL_CONVS = tuple(f'block{block}_res_conv' for block in (1, 2, 3, 12))
LOGITS = 'Xception/Logits/weights'


class ConversionError(Exception):
  """The weights cannot be converted; the message says why and what to do."""


def import_keras():
  """Imports Keras on TensorFlow, whatever ~/.keras/keras.json says.

  Keras needs TensorFlow 2's behavior, so nothing in this module switches it
  off. The import takes seconds: make the cheap checks before it.
  """
  os.environ['KERAS_BACKEND'] = 'tensorflow'
  import keras
  keras.config.set_floatx('float32')
  keras.config.set_image_data_format('channels_last')
  return keras


def slim_names(model):
  """Returns a list of (layer, names of its slim variables in get_weights() order).

  Args:
    model: a keras.applications.Xception, with or without its classifier.
  """
  unnamed = {'Conv2D': iter(RESIDUAL_CONVS), 'BatchNormalization': iter(RESIDUAL_CONVS)}
  pairs = []
  for layer in model.layers:
    kind = type(layer).__name__
    if kind not in SLIM_VARIABLES:
      continue
    if layer.name == 'predictions':
      scope = 'Logits'
    elif layer.name.startswith('block'):
      scope = layer.name.removesuffix('_bn').replace('_sepconv', '_dws_conv')
    else:
      scope = next(unnamed[kind])
    if kind == 'BatchNormalization':
      scope += '/BatchNorm'
    pairs.append((layer, [f'Xception/{scope}/{name}' for name in SLIM_VARIABLES[kind]]))
  return pairs


def slim_weights(model):
  """Returns {slim variable name: float32 array} of a keras.applications.Xception."""
  weights = {}
  for layer, names in slim_names(model):
    for name, value in zip(names, layer.get_weights()):
      # Keras' dense layer is a 1 x 1 convolution in slim.
      weights[name] = value[None, None] if name == LOGITS else value
  return weights


def set_slim_weights(model, weights):
  """Sets the weights of a keras.applications.Xception; the inverse of `slim_weights`."""
  for layer, names in slim_names(model):
    layer.set_weights([weights[name][0, 0] if name == LOGITS else weights[name]
                       for name in names])


def load_keras(keras_weights, num_classes):
  """Builds Keras' Xception with its ImageNet weights, or those of a file.

  Args:
    keras_weights: path of a file of weights or of a whole model, in any format
      that Keras reads; or 'imagenet', which Keras downloads and verifies.
    num_classes: int, how many classes it has; 0 is without top.

  Returns:
    A Keras model; without top if the file has none.

  Raises:
    ConversionError: the weights are missing, have another number of classes,
      or are not of Keras' Xception.
  """
  if keras_weights == IMAGENET:
    return load_imagenet(num_classes)
  if not os.path.isfile(keras_weights):
    raise ConversionError(f'There is no file {keras_weights}: give --keras_weights the path of '
                          f'a weights file, or the word {IMAGENET}')
  if not keras_weights.endswith(WEIGHTS_SUFFIXES):
    raise ConversionError(f'{keras_weights} ends in none of {", ".join(WEIGHTS_SUFFIXES)}, by '
                          'which Keras tells the formats: rename it')
  return load_file(keras_weights, num_classes)


def load_imagenet(num_classes):
  """See `load_keras`."""
  if num_classes not in (0, IMAGENET_CLASSES):
    raise ConversionError(f'Keras\' ImageNet weights have {IMAGENET_CLASSES} classes, not '
                          f'{num_classes}: leave --num_classes out, or give 0 for no logits')
  keras = import_keras()
  socket.setdefaulttimeout(TIMEOUT_SECS)  # Keras would wait for ever
  try:
    return keras.applications.Xception(weights=IMAGENET, include_top=bool(num_classes))
  except Exception as error:  # no narrower class: Keras raises this one
    raise ConversionError(
        f'Keras cannot get its ImageNet weights: {shortened(error)}. Run it again, or give the '
        'path of the file, fetched in another way') from error


def load_file(path, num_classes):
  """See `load_keras`."""
  keras = import_keras()
  with warnings.catch_warnings():
    # Comes some hundred times with the file of another network, which is refused.
    warnings.filterwarnings('ignore', 'Skipping nested container')
    try:
      # Even 0 classes are tried with a top: without one, the newer formats
      # would drop that of the file in silence.
      return keras.applications.Xception(weights=path, classes=num_classes or 1)
    except Exception as error:  # whatever Keras, h5py and zipfile raise
      failure = error
    found = re.search(r'Received[^()]*\(2048, (\d+)\)', str(failure))
    if found:
      raise ConversionError(f'{path} has {found[1]} classes, not {num_classes}: give '
                            f'--num_classes {found[1]}') from failure
    try:
      return keras.applications.Xception(weights=path, include_top=False)
    except Exception:  # what failed first says more
      raise ConversionError(
          f'{path} has no weights of Keras\' Xception ({shortened(failure)}). If it should, '
          'its suffix may be wrong: .weights.h5 means weights that Keras 3 saved, .h5 those of '
          'Keras 2, or a whole model') from failure


def shortened(error):
  """Returns what an error says, in one line: Keras goes on to list every layer and weight."""
  return textwrap.shorten(str(error).rstrip('.'), 250, placeholder=' ...')


def imagenet_names():
  """Returns Keras' names of the ImageNet classes, or None if it cannot get them."""
  keras = import_keras()
  try:
    # Row i is an image of class i.
    decoded = keras.applications.imagenet_utils.decode_predictions(
        np.eye(IMAGENET_CLASSES), top=1)
  except Exception:  # no narrower class: Keras raises this one
    return None
  return [name for ((_, name, _),) in decoded]


def keras_to_slim(keras_weights, num_classes, labels, path, overwrite):
  """Writes Keras' weights as a checkpoint with its model_config.json.

  Args:
    keras_weights, num_classes: see `load_keras`.
    labels: path of a labels.txt with the class names, or None.
    path: path of the checkpoint, without its file endings.
    overwrite: bool, whether existing files may be replaced.

  Raises:
    ConversionError: the weights cannot be read or the checkpoint cannot be
      written.
    flowers.DatasetError: `labels` cannot be read.
  """
  refuse_existing([beside(path, STATE_FILE), beside(path, checkpoints.CONFIG_FILE),
                   *(path + suffix for suffix in CHECKPOINT_SUFFIXES)], overwrite)
  class_names = flowers.read_labels_file(labels) if labels else None
  weights = slim_weights(load_keras(keras_weights, num_classes))
  found_classes = weights[LOGITS].shape[-1] if LOGITS in weights else 0
  print(f'Read {len(weights)} weights of {keras_weights}: '
        f'{sum(value.size for value in weights.values()):,} parameters, '
        f'{found_classes or "no"} classes')

  config = None
  if found_classes:
    if class_names is None and keras_weights == IMAGENET:
      class_names = imagenet_names()
    if class_names is None:
      class_names = [f'class_{i}' for i in range(found_classes)]
      print(f'The classes are named class_0 to {class_names[-1]}; --labels gives other names')
    if len(class_names) != found_classes:
      raise ConversionError(f'{labels} names {len(class_names)} classes, but {keras_weights} has '
                            f'{found_classes}: give the labels.txt it was trained with')
    config = checkpoints.ModelConfig(
        class_names, image_size=xception.xception.default_image_size, depth_multiplier=1.0, seed=0)
  write_checkpoint(weights, config, path)
  print(f'Wrote {path} and {beside(path, checkpoints.CONFIG_FILE)}' if config else
        f'Wrote {path} without logits, for fine-tuning; it has no {checkpoints.CONFIG_FILE}')


def write_checkpoint(weights, config, path):
  """Writes a slim checkpoint of step 0, replacing existing files.

  Args:
    weights: dict {variable name: array}.
    config: a ModelConfig, or None for weights without logits.
    path: path of the checkpoint, without its file endings.

  Raises:
    ConversionError: it cannot be written.
  """
  values = {**weights, 'global_step': np.int64(0)}
  with folder_beside(path) as folder:
    temporary = os.path.join(folder, os.path.basename(path))
    tf.raw_ops.SaveV2(prefix=temporary, tensor_names=list(values),
                      shape_and_slices=[''] * len(values), tensors=list(values.values()))
    # An interruption must not leave an old index or configuration beside new data.
    for old in (f'{path}.index', beside(path, checkpoints.CONFIG_FILE)):
      if os.path.exists(old):
        os.remove(old)
    if config:
      checkpoints.save_config(config, os.path.dirname(path))
    for suffix in CHECKPOINT_SUFFIXES:
      os.replace(temporary + suffix, path + suffix)
    tf.train.update_checkpoint_state(os.path.dirname(path) or '.', path)


def slim_to_keras(checkpoint, use_averages, path, overwrite):
  """Writes a checkpoint's weights as a Keras file.

  Args:
    checkpoint: path of a checkpoint, or of a folder whose newest one is used.
    use_averages: 'auto', 'yes' or 'no', see `checkpoints.stored_names`.
    path: path of the file: .weights.h5 for weights, .keras or .h5 for a whole
      model.
    overwrite: bool, whether an existing file may be replaced.

  Raises:
    ConversionError: the checkpoint is damaged or holds another network, or the
      file cannot be written.
    checkpoints.CheckpointError: there is no checkpoint, or it has no averages.
  """
  refuse_existing([path], overwrite)
  checkpoint = checkpoints.find(None, checkpoint)
  try:
    reader = tf.train.load_checkpoint(checkpoint)
    stored = reader.get_variable_to_shape_map()
    model = build_for(checkpoint, stored)
    names, are_averages = checkpoints.stored_names(
        checkpoint, slim_weights(model), use_averages)
    set_slim_weights(model, {name: reader.get_tensor(names[name]) for name in names})
  except tf.errors.OpError as error:
    raise ConversionError(f'{checkpoint} is damaged ({error.message}): '
                          'convert another checkpoint') from error
  size, num_classes = model.input_shape[1], model.output_shape[1]
  print(f'Read {len(names)} weights of {checkpoint}: '
        f'{"their Polyak averages" if are_averages else "the weights, not averages"}; '
        f'{model.count_params():,} parameters, {num_classes} classes, images of {size} x {size}')

  with folder_beside(path) as folder:
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
    ConversionError: the variables are not those of Keras' Xception.
    checkpoints.CheckpointError: model_config.json is damaged.
  """
  layers = {name.split('/')[1] for name in stored if name.startswith('Xception/')}
  if layers and LOGITS not in stored:
    raise ConversionError(f'{checkpoint} has no logits, so Keras\' classifier would be random: '
                          'convert a checkpoint of a trained network')
  size = xception.xception.default_image_size
  if os.path.exists(beside(checkpoint, checkpoints.CONFIG_FILE)):
    size = checkpoints.load_config(checkpoint).image_size
  model = import_keras().applications.Xception(
      weights=None, classes=stored.get(LOGITS, [1])[-1], input_shape=(size, size, 3))

  expected = {name: list(value.shape) for name, value in slim_weights(model).items()}
  odd = [f'lacks {name}' for name in expected if name not in stored]
  odd += [f'has {layer}' for layer in sorted(layers - {name.split('/')[1] for name in expected})]
  if odd:
    raise ConversionError(f'{checkpoint} does not hold Keras\' Xception: it {odd[0]}. Convert a '
                          'checkpoint that train_flowers.py wrote')
  for name, shape in expected.items():
    if stored[name] != shape:
      raise ConversionError(
          f'{checkpoint} does not have the width of Keras\' Xception: {name} is {stored[name]}, '
          f'not {shape}. Train with --depth_multiplier 1')
  return model


def beside(path, name):
  """Returns the path of the file `name` in the folder of `path`."""
  return os.path.join(os.path.dirname(path), name)


def refuse_existing(paths, overwrite):
  """Raises a ConversionError if one of the paths exists and overwrite is False."""
  for path in paths:
    if os.path.exists(path) and not overwrite:
      raise ConversionError(f'{path} exists: choose another folder or name, or give --overwrite')


@contextlib.contextmanager
def folder_beside(path):
  """Yields a temporary folder in the folder of `path`, so a rename can move files to it.

  Raises:
    ConversionError: a file cannot be written while the folder is in use.
  """
  folder = os.path.dirname(path) or '.'
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='converted_', suffix='.tmp', dir=folder) as temporary:
      yield temporary
  except (OSError, tf.errors.OpError) as error:
    raise ConversionError(f'Cannot write {path} ({getattr(error, "message", error)}): free some '
                          'space, or choose another folder') from error


def checkpoint_name(text):
  """The argparse type of --output_checkpoint."""
  if not os.path.basename(text) or os.path.isdir(text):
    raise argparse.ArgumentTypeError(f'must name a file like ckpt/xception.ckpt, got {text}')
  return text


def keras_file_name(text):
  """The argparse type of --output_keras."""
  if not text.endswith(OUTPUT_SUFFIXES):
    raise argparse.ArgumentTypeError(
        f'must end in {", ".join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}, got {text}')
  return text


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0], formatter_class=arguments.HelpFormatter)
  source = parser.add_argument_group('source').add_mutually_exclusive_group(required=True)
  source.add_argument('--keras_weights', metavar='FILE',
                      help='weights or a whole model in .h5, .weights.h5 or .keras, or the word '
                      f'{IMAGENET} to let Keras download its ImageNet weights')
  source.add_argument('--checkpoint',
                      help='a checkpoint, or a folder whose newest checkpoint is converted')
  to_slim = parser.add_argument_group('from Keras to slim, with --keras_weights')
  to_slim.add_argument('--output_checkpoint', type=checkpoint_name,
                       help='checkpoint to write, like ckpt/xception.ckpt; model_config.json is '
                       'written beside it')
  to_slim.add_argument('--num_classes', type=arguments.non_negative_int,
                       help='number of classes in FILE, 0 if it has no classifier; with '
                       f'{IMAGENET}, 0 leaves the logits out (default: {IMAGENET_CLASSES})')
  to_slim.add_argument('--labels', help='a labels.txt with the class names (default: the ImageNet '
                       f'names for {IMAGENET}, otherwise class_0, class_1, ...)')
  to_keras = parser.add_argument_group('from slim to Keras, with --checkpoint')
  to_keras.add_argument('--output_keras', type=keras_file_name,
                        help='file to write: .keras or .h5 for a whole model, .weights.h5 for '
                        'weights')
  to_keras.add_argument('--use_averages', choices=['auto', 'yes', 'no'],
                        help='whether to convert the Polyak averages of the weights; auto does '
                        'if the checkpoint has them (default: auto)')
  parser.add_argument('--overwrite', action='store_true', help='replace existing files')
  args = parser.parse_args(argv)

  given, other, output = (('--keras_weights', to_keras, '--output_checkpoint')
                          if args.checkpoint is None else
                          ('--checkpoint', to_slim, '--output_keras'))
  for action in other._group_actions:
    if getattr(args, action.dest) is not None:
      parser.error(f'{action.option_strings[0]} does not go with {given}')
  if getattr(args, output.removeprefix('--')) is None:
    parser.error(f'{given} needs {output}')
  return args


def main(args):
  if args.keras_weights is not None:
    num_classes = IMAGENET_CLASSES if args.num_classes is None else args.num_classes
    keras_to_slim(args.keras_weights, num_classes, args.labels, args.output_checkpoint,
                  args.overwrite)
  else:
    slim_to_keras(args.checkpoint, args.use_averages or 'auto', args.output_keras,
                  args.overwrite)


if __name__ == '__main__':
  # TensorFlow 2's behavior stays on because Keras needs it. The GPUs may be busy training.
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
  try:
    main(parse_args())
  except (ConversionError, checkpoints.CheckpointError, flowers.DatasetError) as error:
    sys.exit(f'convert_keras_weights.py: {error}')
  except KeyboardInterrupt:
    sys.exit('convert_keras_weights.py: interrupted; run it again')
