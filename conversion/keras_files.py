"""Reads the files that Keras and its users write, as weights of the slim network."""

import collections
import dataclasses
import inspect
import json
import numbers
import os
import re
import shutil
import socket
import tempfile
import textwrap
import warnings
import zipfile

import h5py
import numpy as np

from conversion import keras_models

IMAGENET = 'imagenet'
IMAGENET_CLASSES = 1000
SUFFIXES = ('.h5', '.hdf5', '.keras')
TIMEOUT_SECS = 30  # how long a download may stall

# Keras 2's names of the operations in keras_models.ARITHMETIC.
KERAS_2_ARITHMETIC = {'math.truediv': 'TrueDivide', 'math.divide': 'Divide',
                      'math.multiply': 'Multiply', 'math.add': 'Add', 'math.subtract': 'Subtract',
                      '__operators__.add': 'Add'}


def load(keras_weights, with_top=True):
  """Reads a Keras file, or the weights that Keras downloads.

  Args:
    keras_weights: path of weights or of a whole model, or 'imagenet'.
    with_top: bool, whether to download the ImageNet weights with the classifier.

  Returns:
    A keras_models.Network.

  Raises:
    keras_models.ConversionError: the file cannot be read, or the slim network cannot compute
      what the model computes.
  """
  if keras_weights == IMAGENET:
    # What Keras publishes is known, so nothing has to be assumed.
    network = keras_models.read_model(load_imagenet(with_top), IMAGENET)
    return dataclasses.replace(network, notes=[])
  if not os.path.isfile(keras_weights):
    raise keras_models.ConversionError(
        f'There is no file {keras_weights}: give --keras_weights the path of a Keras file, or the '
        f'word {IMAGENET}')
  if not keras_weights.endswith(SUFFIXES):
    raise keras_models.ConversionError(
        f'{keras_weights} must end in one of {", ".join(SUFFIXES)}, the suffixes of Keras files')
  if zipfile.is_zipfile(keras_weights):
    return keras_models.read_model(load_model(keras_weights), keras_weights)
  try:
    with h5py.File(keras_weights) as file:
      if 'model_config' not in file.attrs:
        return read_weights(file, keras_weights)
      is_keras_2 = not str(file.attrs.get('keras_version', '2')).startswith('3')
  except OSError as error:
    raise keras_models.ConversionError(
        f'{keras_weights} is not a Keras file, or is damaged: {shortened(error)}') from error
  model = (load_keras_2_model if is_keras_2 else load_model)(keras_weights)
  return keras_models.read_model(model, keras_weights)


def load_imagenet(with_top):
  """Returns Keras' Xception with the ImageNet weights, which Keras downloads and verifies."""
  keras = keras_models.import_keras()
  socket.setdefaulttimeout(TIMEOUT_SECS)  # Keras itself would wait forever
  try:
    return keras.applications.Xception(weights=IMAGENET, include_top=with_top)
  except Exception as error:  # Keras raises no narrower class
    raise keras_models.ConversionError(
        f'Keras cannot get its ImageNet weights: {shortened(error)}. Run it again, or download '
        'the file another way and give its path') from error


def imagenet_names():
  """Returns Keras' names of the ImageNet classes, or None if it cannot get them."""
  keras = keras_models.import_keras()
  try:
    # Row i is an image of class i.
    decoded = keras.applications.imagenet_utils.decode_predictions(
        np.eye(IMAGENET_CLASSES), top=1)
  except Exception:  # Keras raises no narrower class
    return None
  return [name for ((_, name, _),) in decoded]


def shortened(error):
  """Returns an error's message in one line; Keras goes on to list every layer and weight."""
  return textwrap.shorten(str(error).rstrip('.'), 250, placeholder=' ...')


def load_model(path, name=None):
  """Loads a whole model with Keras, without running code that the file may hold.

  Args:
    path: path of the file.
    name: what messages call it, if not by its path.
  """
  keras = keras_models.import_keras()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)
    try:
      return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras, h5py and zipfile raise
      raise keras_models.ConversionError(
          f'Keras cannot load {name or path}: {shortened(error)}. If Keras 2 wrote it as .keras, '
          'save it as .h5 with Keras 2; if it has custom code or layers, save only its Xception'
          ) from error


def load_keras_2_model(path):
  """Loads a whole .h5 model of Keras 2, whose configuration Keras 3 does not understand."""
  keras = keras_models.import_keras()
  with tempfile.TemporaryDirectory() as folder:
    copy = os.path.join(folder, 'model.h5')
    shutil.copyfile(path, copy)
    with h5py.File(copy, 'r+') as file:
      config = json.loads(file.attrs['model_config'])
      try:
        file.attrs['model_config'] = json.dumps(modernize(config, keras))
      except keras_models.ConversionError as error:
        raise keras_models.ConversionError(f'{path} cannot be converted: {error}') from error
      except (IndexError, KeyError, TypeError, ValueError) as error:
        raise keras_models.ConversionError(
            f'{path} cannot be converted: the configuration of its model is not one that Keras 2 '
            f'wrote ({error!r})') from error
    return load_model(copy, path)


def modernize(value, keras):
  """Returns the configuration of a Keras 2 model, or a part of it, as Keras 3 expects it."""
  if isinstance(value, list):
    return [modernize(item, keras) for item in value]
  if not isinstance(value, dict):
    return value
  value = {key: modernize(item, keras) for key, item in value.items()}
  config, kind = value.get('config'), value.get('class_name')
  if kind == 'TFOpLambda':
    return rescaling_layer(value)
  if isinstance(config, dict) and 'output_layers' in config:
    modernize_graph(config)
  layer_class = getattr(keras.layers, str(kind), None)
  if layer_class is not None and isinstance(config, dict):
    known = {'batch_input_shape'}.union(*(
        inspect.signature(base.__init__).parameters for base in layer_class.__mro__))
    value['config'] = {key: item for key, item in config.items() if key in known}
    if kind == 'BatchNormalization' and isinstance(config['axis'], list):
      value['config']['axis'], = config['axis']
  return value


def rescaling_layer(value):
  """Returns the configuration of a Rescaling layer for Keras 2's arithmetic with a tensor."""
  function = value['config']['function']
  source, node, tensor, arguments = value['inbound_nodes'][0]
  if function not in KERAS_2_ARITHMETIC or not isinstance(arguments.get('y'), numbers.Real):
    raise keras_models.ConversionError(
        f'layer {value["config"]["name"]} (TFOpLambda): of the tensor operations of Keras 2, only '
        'the arithmetic of preprocess_input can be converted')
  to_rescaling = keras_models.ARITHMETIC[KERAS_2_ARITHMETIC[function]]
  scale, offset = to_rescaling(arguments['y'])
  return {**value, 'class_name': 'Rescaling', 'inbound_nodes': [[[source, node, tensor, {}]]],
          'config': {'name': value['config']['name'], 'scale': scale, 'offset': offset}}


def modernize_graph(config):
  """Changes the configuration of a functional model of Keras 2 into that of Keras 3."""
  kinds = {layer['name']: layer['class_name'] for layer in config['layers'] if 'name' in layer}
  # Keras 2 counts the construction of a nested model as its first call, Keras 3 does not. If a
  # nested functional model is the output, Keras 3 corrects the number itself.
  for layer in config['layers']:
    for call in layer.get('inbound_nodes', ()):
      for source in call:
        if kinds[source[0]] in ('Functional', 'Model', 'Sequential'):
          source[1] -= 1
  for output in config['output_layers']:
    if kinds[output[0]] == 'Sequential':
      output[1] -= 1
  for key in ('input_layers', 'output_layers'):
    if len(config[key]) == 1:
      config[key], = config[key]  # a list would make lists of a nested model's outputs


def read_weights(file, path):
  """Returns the Network of a file without a model's configuration; see `load`.

  Args:
    file: an open h5py.File: .weights.h5 of Keras 3, or .h5 weights of Keras 2.
    path: its path, for messages.
  """
  stored = collections.defaultdict(list)
  for name, values in stored_layers(file):
    stored[kind_of(values)].append((name, values))
  weights = {}
  for layer, names in keras_models.slim_names(keras_models.reference_model()):
    kind = type(layer).__name__
    if not stored[kind]:
      raise keras_models.ConversionError(
          f"{path} does not hold Keras' Xception: it lacks weights for {layer.name} ({kind})")
    name, values = stored[kind].pop(0)
    shapes = [value.shape for value in values]
    expected = [value.shape for value in layer.get_weights()]
    if shapes != expected:
      raise keras_models.ConversionError(
          f"{path} does not match Keras' Xception: {name} has weights of shapes {shapes} where "
          f'Xception has {expected}. If it holds other layers too, save the whole model as .keras, '
          'which shows how they are connected')
    weights.update(zip(names, values))
  if stored['Dense'] and stored['Dense'][0][1][0].shape[0] == keras_models.NUM_FEATURES:
    weights.update(keras_models.logits_weights(stored['Dense'].pop(0)[1]))
  unused = [name for layers in stored.values() for name, _ in layers]
  if unused:
    raise keras_models.ConversionError(
        f'{path} cannot be converted: the slim network is Xception with one dense layer and has no '
        f'place for the weights of {", ".join(unused)}')
  return keras_models.Network(weights, None, [
      'The file holds weights only. The model is assumed to be Xception with global average '
      'pooling and a softmax (a sigmoid if it has one output), and to expect pixels in [-1, 1]'])


def stored_layers(file):
  """Returns a list of (layer name, list of arrays) of a file of weights, in Keras' order."""
  layers = collections.defaultdict(list)
  if 'layer_names' in file.attrs:  # Keras 2
    for group in as_text(file.attrs['layer_names']):
      for name in as_text(file[group].attrs['weight_names']):
        layers[f'{group}/{name.rpartition("/")[0]}'].append(file[group][name][()])
    return list(layers.items())

  def visit(name, item):
    if isinstance(item, h5py.Dataset) and not re.match(
        r'(optimizer|metrics)/|.*seed_generator/', name):
      layers[name.partition('/vars/')[0]].append((natural(name), item[()]))

  file.visititems(visit)
  # Keras numbers the layers of a kind in their order: conv2d, conv2d_1, ..., conv2d_10.
  return [(name, [value for _, value in sorted(layers[name], key=lambda pair: pair[0])])
          for name in sorted(layers, key=natural)]


def natural(name):
  """Returns a sort key by which conv2d_2 comes before conv2d_10."""
  return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def as_text(names):
  """Returns HDF5 strings as a list of str."""
  return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def kind_of(values):
  """Returns the kind of layer that has weights of these shapes."""
  ranks = tuple(value.ndim for value in values)
  return {(4,): 'Conv2D', (4, 4): 'SeparableConv2D', (1, 1, 1, 1): 'BatchNormalization',
          (2,): 'Dense', (2, 1): 'Dense'}.get(ranks, 'other')
