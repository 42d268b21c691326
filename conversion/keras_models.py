"""Matches Keras models with the slim network, layer by layer.

Layers are matched by the graph they form, so neither their names nor the nesting
of models matters. A layer that the slim network cannot reproduce is an error that
names the layer: no part of a model is dropped silently.
"""

from collections.abc import Callable
import dataclasses
import functools
import numbers
import os
import warnings

import numpy as np

import xception

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
BIASES = 'Xception/Logits/biases'
NUM_FEATURES = 2048  # of an image, the input of the logits
FIRST_CONV = 'Xception/block1_conv1/weights'
FIRST_MEAN = 'Xception/block1_conv1/BatchNorm/moving_mean'

# What a layer must have in common with its counterpart in Keras' Xception.
CONFIG_KEYS = {
    'Conv2D': ('filters', 'kernel_size', 'strides', 'padding', 'dilation_rate', 'groups',
               'use_bias', 'activation', 'data_format'),
    'SeparableConv2D': ('filters', 'kernel_size', 'strides', 'padding', 'dilation_rate',
                        'depth_multiplier', 'use_bias', 'activation', 'data_format'),
    'BatchNormalization': ('epsilon', 'center', 'scale'),
    'MaxPooling2D': ('pool_size', 'strides', 'padding', 'data_format'),
    'Activation': ('activation',),
    'Add': (),
}
# Layers that do nothing at inference, like all Random... layers except RandomCrop.
NEUTRAL = {'Dropout', 'SpatialDropout2D', 'GaussianDropout', 'GaussianNoise', 'AlphaDropout',
           'ActivityRegularization', 'Identity'}
# Keras operations of a tensor and a number c, as the (scale, offset) of a Rescaling layer.
ARITHMETIC = {
    'TrueDivide': lambda c: (1 / c, 0.0), 'Divide': lambda c: (1 / c, 0.0),
    'Multiply': lambda c: (c, 0.0), 'Add': lambda c: (1.0, c), 'Subtract': lambda c: (1.0, -c)}

class ConversionError(Exception):
  """The weights cannot be converted; the message says why and what to do."""


@dataclasses.dataclass
class Network:
  """What a Keras file holds.

  Attributes:
    weights: dict {slim variable name: float32 array}.
    image_size: height and width of its images in pixels, None if it is not stored.
    notes: sentences on what the conversion assumed.
    answer: function of float32 [n, height, width, 3] images in [-1, 1] that
      returns Keras' outputs in the form of the slim network's: probabilities
      [n, classes], or pooled features [n, 2048]; None if the file holds weights only.
  """
  weights: dict[str, np.ndarray]
  image_size: int | None
  notes: list[str]
  answer: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def num_classes(self):
    return self.weights[LOGITS].shape[-1] if LOGITS in self.weights else 0


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


@functools.cache
def reference_model():
  """Returns Keras' Xception without its classifier, for comparison."""
  return import_keras().applications.Xception(
      weights=None, include_top=False, input_shape=(xception.MIN_IMAGE_SIZE,) * 2 + (3,))


def read_model(model, path):
  """Returns the Network of a Keras model; see `load`.

  Args:
    model: a Keras model; its layers are set to compute in float32.
    path: name of its file, for messages.
  """
  try:
    compute_in_float32(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
      raise ConversionError(f'it has {len(model.inputs)} inputs and {len(model.outputs)} outputs, '
                            'but the slim network has one of each')
    xception_output, head = split_head(model.outputs[0])
    dense, activation = read_head(head)
    counterparts, xception_input = match_xception(xception_output)
    weights = matched_weights(counterparts)
    scale, offset, image_size = read_front(xception_input)
    if dense is not None:
      weights.update(logits_weights(dense.get_weights(), activation))
    notes, to_pixels = fold_rescaling(weights, scale, offset)
  except ConversionError as error:
    raise ConversionError(f'{path} cannot be converted: {error}') from error
  if dense is not None and activation == 'linear':
    notes.append(f'{dense.name} has no activation: its outputs are treated as logits')

  def answer(images):
    with warnings.catch_warnings():
      # Keras 2's models were given lists of inputs.
      warnings.filterwarnings('ignore', 'The structure of `inputs`')
      outputs = np.asarray(model(to_pixels(images), training=False), np.float32)
    if dense is None:
      return outputs.mean((1, 2)) if outputs.ndim == 4 else outputs
    return probabilities(outputs.reshape(len(images), -1), activation)

  return Network(weights, image_size, notes, answer)


def compute_in_float32(model):
  """Sets all layers of a model, including nested ones, to compute in float32."""
  for layer in model.layers:
    if hasattr(layer, 'layers'):
      compute_in_float32(layer)
    layer.dtype_policy = 'float32'


def probabilities(outputs, activation):
  """Returns a classifier's outputs, [n, outputs], as probabilities, [n, classes]."""
  if outputs.shape[1] == 1:
    outputs = outputs.astype(np.float64)
    positive = outputs if activation == 'sigmoid' else 1 / (1 + np.exp(-outputs))
    return np.concatenate([1 - positive, positive], 1)
  if activation == 'linear':
    outputs = np.exp(outputs - outputs.max(1, keepdims=True))
    return outputs / outputs.sum(1, keepdims=True)
  return outputs


def trace(tensor, outside=None):
  """Finds the layer that computes a tensor, looking into nested models.

  Args:
    tensor: a KerasTensor.
    outside: for a tensor inside a nested model, the (tensor, outside) that the
      model is called on; else None.

  Returns:
    The layer, its inputs as a list of (tensor, outside), and the arguments of
    its call.
  """
  layer, node_index, _ = tensor._keras_history
  node = layer._inbound_nodes[node_index]
  if hasattr(layer, 'layers'):  # a nested model
    if len(node.input_tensors) != 1 or len(getattr(layer, 'outputs', [])) != 1:
      raise refused(layer, 'a nested model must have one input and one output')
    return trace(layer.outputs[0], (node.input_tensors[0], outside))
  if not node.input_tensors and outside is not None:
    return trace(*outside)
  return layer, [(tensor, outside) for tensor in node.input_tensors], node.arguments.args


def refused(layer, reason):
  """Returns a ConversionError that names a layer."""
  return ConversionError(f'layer {layer.name} ({type(layer).__name__}): {reason}')


def is_neutral(layer):
  """Returns whether a layer does nothing at inference."""
  kind = type(layer).__name__
  return (kind in NEUTRAL or kind.startswith('Random') and kind != 'RandomCrop' or
          kind == 'Activation' and layer.get_config()['activation'] == 'linear')


def is_relu(layer):
  """Returns whether a layer is one of Xception's ReLUs."""
  return signature(layer) == ('Activation', ['relu'])


def split_head(output):
  """Finds the end of Xception, its last ReLU.

  Args:
    output: the model's output, a KerasTensor.

  Returns:
    Xception's output as (tensor, outside), and the layers after it in order,
    without those that do nothing at inference.
  """
  position, head = (output, None), []
  while True:
    layer, inputs, _ = trace(*position)
    if is_relu(layer) and len(position[0].shape) == 4:
      return position, head
    if not inputs:
      raise ConversionError('it holds no Xception')
    if len(inputs) > 1:
      raise refused(layer, 'it is part of neither Xception nor a classifier after it')
    if not is_neutral(layer):
      head.insert(0, layer)
    position = inputs[0]


def read_head(head):
  """Returns the dense layer after Xception and its activation, or None, None."""
  pooled, dense, activation = False, None, None
  for layer in head:
    kind, config = type(layer).__name__, layer.get_config()
    if kind == 'GlobalAveragePooling2D' and not pooled:
      pooled = True
    elif kind in ('Flatten', 'Reshape') and pooled and dense is None:
      pass  # pooled features are [n, 1, 1, 2048] or [n, 2048]
    elif kind == 'Dense' and pooled and dense is None:
      dense, activation = layer, config['activation']
    elif kind in ('Activation', 'Softmax') and dense is not None and activation == 'linear':
      activation = config.get('activation', 'softmax')
    else:
      raise refused(layer, 'after Xception, the slim network has global average pooling and one '
                    'dense layer with one activation, and nothing else')
  if dense is None:
    return None, None
  if activation not in ('softmax', 'sigmoid', 'linear'):
    raise refused(dense, f'its activation is {activation}, but the slim network has a softmax')
  outputs = dense.units
  if activation == 'sigmoid' and outputs > 1:
    raise refused(dense, f'its {outputs} sigmoid outputs are independent decisions, but the slim '
                  'network has a softmax over mutually exclusive classes')
  if activation == 'softmax' and outputs == 1:
    raise refused(dense, 'the softmax of one output is always 1')
  return dense, activation


def signature(layer):
  """Returns what a layer computes, apart from its weights."""
  kind, config = type(layer).__name__, layer.get_config()
  if kind not in CONFIG_KEYS:
    return kind, layer.name
  return kind, [config[key] for key in CONFIG_KEYS[kind] if key in config]


def match_xception(output):
  """Matches the layers that compute a tensor with those of Keras' Xception.

  Args:
    output: Xception's output as (tensor, outside), see `trace`.

  Returns:
    A list of (layer, its counterpart in Keras' Xception, names of its slim
    variables), and Xception's input as (tensor, outside).
  """
  reference = reference_model()
  counterparts, xception_input = {}, None
  pending = [(output, (reference.outputs[0], None))]
  while pending:
    position, expected_position = pending.pop()
    expected, expected_inputs, _ = trace(*expected_position)
    if not expected_inputs:
      xception_input = position
      continue
    layer, inputs, _ = trace(*position)
    while is_neutral(layer):
      layer, inputs, _ = trace(*inputs[0])
    if counterparts.get(expected) is layer:
      continue  # reached on another path, over a residual connection
    if expected in counterparts or len(inputs) != len(expected_inputs) or (
        signature(layer) != signature(expected)):
      raise refused(layer, f"it differs from {expected.name} of Keras' Xception")
    counterparts[expected] = layer
    pending += zip(inputs, expected_inputs)
  return [(counterparts[expected], expected, names)
          for expected, names in slim_names(reference)], xception_input


def matched_weights(counterparts):
  """Returns the slim weights of what `match_xception` found."""
  weights = {}
  for layer, expected, names in counterparts:
    values = layer.get_weights()
    shapes, expected_shapes = ([value.shape for value in source.get_weights()]
                               for source in (layer, expected))
    if shapes != expected_shapes:
      raise refused(layer, f"its weights have shapes {shapes}, but those of Keras' Xception "
                    f'have {expected_shapes}')
    weights.update(zip(names, (np.asarray(value, np.float32) for value in values)))
  return weights


def logits_weights(values, activation=None):
  """Returns the slim weights of a dense layer.

  A single output without a softmax becomes two logits, 0 and its own, whose softmax
  is (1 - p, p).

  Args:
    values: its kernel [2048, outputs] and, if it has one, its bias [outputs].
    activation: 'softmax', 'sigmoid' or 'linear'; None if it is not stored.
  """
  kernel = np.asarray(values[0], np.float32)
  bias = np.asarray(values[1] if len(values) > 1 else np.zeros(kernel.shape[1]), np.float32)
  if kernel.shape[1] == 1 and activation != 'softmax':
    kernel, bias = np.pad(kernel, [(0, 0), (1, 0)]), np.pad(bias, (1, 0))
  return {LOGITS: kernel[None, None], BIASES: bias}


def read_front(position):
  """Reads the layers before Xception.

  Args:
    position: Xception's input as (tensor, outside), see `trace`.

  Returns:
    scale and offset of the rescaling, and the image size or None.
  """
  scale, offset, sizes, resizing = 1.0, 0.0, [], None
  while True:
    sizes.append(tuple(position[0].shape[1:3]))
    layer, inputs, arguments = trace(*position)
    if not inputs:
      break
    kind = type(layer).__name__
    if kind == 'Resizing':
      resizing = layer
    elif not is_neutral(layer):
      factor, addend = rescaling(layer, kind, arguments)
      scale, offset = scale * factor, scale * addend + offset
    position = inputs[0]
  sizes.append(tuple(layer.output.shape[1:3]))
  known = [size for size in sizes if None not in size]
  if not known:
    return scale, offset, None
  height, width = known[0]
  if height != width:
    raise ConversionError(f'its images are {height} x {width} pixels, but the scripts here need '
                          'square ones')
  if height < xception.MIN_IMAGE_SIZE:
    raise ConversionError(f'its images are {height} x {width} pixels, but the slim network needs '
                          f'{xception.MIN_IMAGE_SIZE} x {xception.MIN_IMAGE_SIZE} or more')
  if resizing is not None and known[-1] != known[0]:
    raise refused(resizing, f'it resizes images of {known[-1][0]} x {known[-1][1]} pixels, which '
                  'the scripts here do themselves: save the model without this layer')
  return scale, offset, height


def rescaling(layer, kind, arguments):
  """Returns the scale and the offset of a layer before Xception."""
  if kind == 'Rescaling' and np.ndim(layer.scale) == np.ndim(layer.offset) == 0:
    return float(layer.scale), float(layer.offset)
  if kind in ARITHMETIC and len(arguments) == 2 and isinstance(arguments[1], numbers.Real):
    return ARITHMETIC[kind](float(arguments[1]))
  raise refused(layer, 'before Xception, only rescaling by a number and random augmentation can '
                'be converted')


def fold_rescaling(weights, scale, offset):
  """Makes the first convolution take pixels in [-1, 1], as all scripts feed them.

  It has no padding, so any rescaling can be folded exactly into its kernel and into
  the mean of the batch norm after it.

  Args:
    weights: dict {slim variable name: array}, changed in place.
    scale, offset: the rescaling before Xception.

  Returns:
    A list of notes, and a function from images in [-1, 1] to the model's pixels.
  """
  if (scale, offset) == (1.0, 0.0):
    return ['The model does not rescale pixels, so it is assumed to expect pixels in [-1, 1], as '
            'keras.applications.xception.preprocess_input returns'], lambda images: images
  if np.allclose([scale, offset], [2.0, -1.0]):
    return [], lambda images: (images + 1) / 2
  if not -1.01 < offset < 255 * scale + offset < 1.01:
    raise ConversionError(f'it rescales pixels to {scale:g} x pixel {offset:+g}, which is not '
                          'within [-1, 1] for pixels of 0 to 255')
  # In terms of an image in [-1, 1], Xception sees factor * image + addend.
  factor, addend = 127.5 * scale, 127.5 * scale + offset
  if not np.allclose([factor, addend], [1.0, 0.0], atol=1e-6):
    kernel = weights[FIRST_CONV].astype(np.float64)
    weights[FIRST_CONV] = (kernel * factor).astype(np.float32)
    weights[FIRST_MEAN] = (weights[FIRST_MEAN] - addend * kernel.sum((0, 1, 2))).astype(np.float32)
    note = (f'The model rescales pixels to [{offset:.3g}, {255 * scale + offset:.3g}]: its first '
            'convolution was changed to expect [-1, 1] instead')
    return [note], lambda images: 127.5 * (images + 1)
  return [], lambda images: 127.5 * (images + 1)
