"""Quantizes models to 8 bits, calibrated on training images.

  images = quantization.read_calibration_images(class_names, 299, 200, 'dataset')
  quantization.quantize_onnx('frozen_model_xception.onnx', 'quantized.onnx', images)

Weights become signed 8-bit integers with a scale for each output channel, and
activations unsigned ones with a scale and a zero point for each tensor, taken
from the range that the calibration images give it.
"""

import importlib

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from export import models
from export import runtimes
from records import flowers

CALIBRATION_IMAGES = 200
BATCH_SIZE = 8  # of calibration, if the model takes any

# How far equalization evens out activations (1) or else weights (0).
EQUALIZATION = 0.75


def read_calibration_images(class_names, image_size, num_images, dataset_dir, **dataset_options):
  """Reads training images, preprocessed as in evaluation and equally many of each class.

  Args:
    class_names: the model's.
    image_size: size of the network's input in pixels.
    num_images: how many to read.
    dataset_dir: folder of the dataset.
    **dataset_options: other arguments of `flowers.get_split`.

  Returns:
    float32 [num_images, image_size, image_size, 3] in [-1, 1], the same at every call.

  Raises:
    flowers.DatasetError: there is no training split, it has other classes or too few
      images of one, or an image is damaged.
  """
  try:
    dataset = flowers.get_split('train', dataset_dir, **dataset_options)
  except flowers.DatasetError as error:
    raise flowers.DatasetError(f'8-bit formats are calibrated on training images: {error}'
                               ) from error
  if list(dataset.labels_to_names.values()) != class_names:
    raise flowers.DatasetError('8-bit formats are calibrated on training images, but those of '
                               f'{dataset_dir} have other classes than the checkpoint')
  preprocess = models.Preprocessor(image_size)
  images = []
  for number in _choose_records(dataset, num_images):
    try:
      example = tf.train.Example.FromString(dataset.records[number])
      images.append(preprocess(example.features.feature[dataset.image_key].bytes_list.value[0]))
    except (tf.errors.OpError, IndexError) as error:
      raise flowers.DatasetError(flowers.describe_bad_record(dataset, number)) from error
  return np.stack(images)


def _choose_records(dataset, num_images):
  """Returns the numbers of random records, equally many of each class."""
  num_classes = dataset.num_classes
  wanted = [num_images // num_classes + (label < num_images % num_classes)
            for label in range(num_classes)]
  missing, chosen = list(wanted), []
  for number in np.random.default_rng(0).permutation(dataset.num_samples):
    label = flowers.read_label(dataset, number)
    if label not in range(num_classes):
      raise flowers.DatasetError(flowers.describe_bad_record(dataset, number))
    if missing[label]:
      missing[label] -= 1
      chosen.append(number)
    if len(chosen) == num_images:
      return chosen
  label = int(np.argmax(missing))
  raise flowers.DatasetError(
      f'--calibration_images {num_images} takes {wanted[label]} training images of each class, '
      f'but there are only {wanted[label] - missing[label]} of {dataset.labels_to_names[label]}')


def _batches(images, batch_size):
  """Yields all images in batches of one size; the last batch is filled up from the start."""
  for first in range(0, len(images), batch_size):
    yield images.take(range(first, first + batch_size), axis=0, mode='wrap')


def equalize(graph_def, images, batch_size=None):
  """Evens out the ranges of the channels between depthwise and pointwise convolutions.

  Nothing comes between the two, so a channel's factor can move from one kernel to
  the other and leave the network as it is. Without this, the channels with the
  widest range take most of the 256 levels that all channels of a tensor share.

  Args:
    graph_def: frozen tf.GraphDef, folded or not; it is not changed.
    images: from `read_calibration_images`.
    batch_size: the graph's; None is any.

  Returns:
    A tf.GraphDef that computes the same up to float rounding.
  """
  graph_def = tf.GraphDef.FromString(graph_def.SerializeToString())
  nodes = {node.name: node for node in graph_def.node}

  def kernel_of(layer):
    node = nodes[layer.input[1]]
    while node.op == 'Identity':  # in graphs whose batch norms are not folded
      node = nodes[node.input[0]]
    return node

  pairs = [(nodes[node.input[0]], node) for node in graph_def.node if node.op == 'Conv2D'
           and nodes[node.input[0]].op == 'DepthwiseConv2dNative'
           and kernel_of(nodes[node.input[0]]).op == kernel_of(node).op == 'Const']
  ranges = _channel_ranges(graph_def, [depthwise.name for depthwise, _ in pairs], images,
                           batch_size or BATCH_SIZE)
  for (depthwise, pointwise), activations in zip(pairs, ranges):
    tensors = [kernel_of(layer).attr['value'].tensor for layer in (depthwise, pointwise)]
    kernels = [tf.make_ndarray(tensor) for tensor in tensors]
    weights = np.abs(kernels[1]).max((0, 1, 3))
    scale = np.ones_like(activations)
    has_signal = (activations > 0) & (weights > 0)  # other channels keep their scale
    if has_signal.any():
      ratio = (activations[has_signal]**EQUALIZATION
               / weights[has_signal]**(1 - EQUALIZATION))
      scale[has_signal] = np.clip(ratio / np.median(ratio), 1e-3, 1e3)
    for tensor, kernel in zip(tensors, (kernels[0] / scale[:, np.newaxis],
                                        kernels[1] * scale[:, np.newaxis])):
      tensor.CopyFrom(tf.make_tensor_proto(kernel.astype(np.float32)))
  return graph_def


def _channel_ranges(graph_def, names, images, batch_size):
  """Returns the largest absolute value of every channel, a float64 array for each named node."""
  with tf.Graph().as_default(), tf.Session(
      config=runtimes.session_config(use_gpu=False)) as session:
    tensors = tf.import_graph_def(graph_def, return_elements=[f'{name}:0' for name in names],
                                  name='')
    maxima = [tf.reduce_max(tf.abs(tensor), [0, 1, 2]) for tensor in tensors]
    found = [session.run(maxima, {f'{runtimes.INPUT_NODE}:0': batch})
             for batch in _batches(images, batch_size)]
  return [np.max(values, axis=0).astype(np.float64) for values in zip(*found)]


def configure_tflite(converter, images, batch_size):
  """Makes a TFLite converter quantize weights and activations, input and output included.

  Args:
    converter: tf.lite.TFLiteConverter.
    images: from `read_calibration_images`.
    batch_size: the model's; None is any.
  """
  converter.optimizations = [tf.lite.Optimize.DEFAULT]
  converter.representative_dataset = lambda: (
      [batch] for batch in _batches(images, batch_size or 1))
  converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
  converter.inference_input_type = converter.inference_output_type = tf.uint8


def quantize_onnx(float_path, path, images, batch_size=None):
  """Quantizes an ONNX model; its input and output stay float32.

  Args:
    float_path: path of the model.
    path: where to write the quantized model.
    images: from `read_calibration_images`, in the layout of the model's input.
    batch_size: the model's; None is any.
  """
  ort = importlib.import_module('onnxruntime.quantization')
  batches = _batches(images, batch_size or BATCH_SIZE)

  class Reader(ort.CalibrationDataReader):

    def get_next(self):
      return next(({runtimes.INPUT_NODE: batch} for batch in batches), None)

  ort.quantize_static(
      float_path, path, Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
      activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8)


def describe(path):
  """Returns the dtype, scale and zero point of a quantized model's input and output.

  Args:
    path: .tflite or .onnx file.

  Returns:
    {'quantization': {'input': {'dtype', 'scale', 'zero_point'}, 'output': the same}}: a
    value q stands for (q - zero_point) * scale. An ONNX file, whose own input and
    output are float32, converts them inside.
  """
  if path.endswith('.onnx'):
    ports = _onnx_ports(path)
  else:
    network = runtimes.open_network(path)
    ports = {name: (port.dtype, port.scale, port.zero_point)
             for name, port in [('input', network.input), ('output', network.output)]}
  return {'quantization': {
      name: {'dtype': str(dtype), 'scale': float(scale), 'zero_point': int(zero_point)}
      for name, (dtype, scale, zero_point) in ports.items()}}


def _onnx_ports(path):
  onnx = importlib.import_module('onnx')
  graph = onnx.load(path).graph
  constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
  images = {runtimes.INPUT_NODE}  # and the same with channels first
  images.update(node.output[0] for node in graph.node
                if node.op_type == 'Transpose' and node.input[0] == runtimes.INPUT_NODE)
  ports = {}
  for node in graph.node:
    if node.op_type == 'QuantizeLinear' and node.input[0] in images:
      name = 'input'
    elif node.op_type == 'DequantizeLinear' and node.output[0] == runtimes.OUTPUT_NODE:
      name = 'output'
    else:
      continue
    scale, zero_point = (constants[tensor] for tensor in node.input[1:])
    ports[name] = zero_point.dtype, scale, zero_point
  return ports
