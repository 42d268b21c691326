"""Writes a frozen graph in the formats that other programs read.

  formats.FORMATS['onnx'].write(graph_def, 'frozen_model_xception.onnx')
"""

import collections
import importlib
import logging

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from export import folding
from export import runtimes
import xception_preprocessing

ONNX_OPSET = 18
ENCODED_SIGNATURE = 'encoded'  # takes encoded images; serving_default takes pixels

# Largest allowed difference between a format's probabilities and the checkpoint's.
FLOAT32_BOUND, FLOAT16_BOUND, BFLOAT16_BOUND, INT8_BOUND = 1e-4, 1e-2, 2e-2, 5e-2

Format = collections.namedtuple('Format', [
    'suffix',  # replaces the .pb of --output_file
    'bound',  # largest allowed difference of a probability from the checkpoint's
    'has_bfloat16',  # whether the format can hold bfloat16 operations
    'write',  # function of a tf.GraphDef with nodes `input` and `output`, and a path
])


class FormatError(Exception):
  """A format cannot be written because a package is missing."""


def to_bfloat16(graph_def):
  """Converts a folded graph to bfloat16, from its input to the global average pool.

  The graph shrinks to half its size and runs fast on CPUs with AVX512_BF16 or
  AMX. The average, the logits and the softmax stay in float32, because there the
  8 bits of a bfloat16 mantissa would be visible in the probabilities.

  Args:
    graph_def: tf.GraphDef from `folding.fold`; it is not changed.

  Returns:
    A tf.GraphDef with the same input and output.
  """
  converted = tf.GraphDef(versions=graph_def.versions)
  renamed = {}  # name of a tensor -> name of its cast to the wanted type

  def add_cast(tensor, old_type, new_type):
    renamed[tensor] = f'{tensor}/{new_type.name}'
    converted.node.add(name=renamed[tensor], op='Cast', input=[tensor], attr={
        'SrcT': tf.AttrValue(type=old_type.as_datatype_enum),
        'DstT': tf.AttrValue(type=new_type.as_datatype_enum)})

  is_past_pool = False
  for node in graph_def.node:
    if node.op == 'Mean':
      is_past_pool = True
      add_cast(node.input[0], tf.bfloat16, tf.float32)
    tensors = [renamed.get(tensor, tensor) for tensor in node.input]
    node = converted.node.add(name=node.name, op=node.op, input=tensors, attr=node.attr)
    if node.op == 'Placeholder':
      add_cast(node.name, tf.float32, tf.bfloat16)
    elif not is_past_pool:
      _set_bfloat16(node)
  return converted


def _set_bfloat16(node):
  bfloat16 = tf.bfloat16.as_datatype_enum
  if node.op != 'Const':
    node.attr['T'].type = bfloat16
  elif node.attr['dtype'].type == tf.float32.as_datatype_enum:
    value = tf.make_ndarray(node.attr['value'].tensor).astype(tf.bfloat16.as_numpy_dtype)
    node.attr['dtype'].type = bfloat16
    node.attr['value'].tensor.CopyFrom(tf.make_tensor_proto(value))


def require_packages(formats, verify):
  """Checks that the packages needed to write the formats are installed, before any work is done.

  Args:
    formats: names of formats.
    verify: whether the files will also be run, which needs more packages.

  Raises:
    FormatError: a package is missing.
  """
  packages = ['tf2onnx'] + ['onnxruntime'] * verify if 'onnx' in formats else []
  for package in packages:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise FormatError(f'--formats onnx needs {package}: pip install '
                        f'{" ".join(packages)} ({error})') from error


def _write_pb(graph_def, path):
  with open(path, 'wb') as f:
    f.write(graph_def.SerializeToString(deterministic=True))


def _write_saved_model(graph_def, path):
  """Writes one network with two signatures: probabilities of images, and of encoded images."""
  # Only TensorFlow reads it, and TensorFlow 2 runs it as a tf.function.
  graph_def = folding.delay_biases(graph_def, runtimes.OUTPUT_NODE)
  with tf.Graph().as_default(), tf.Session() as session:
    encoded, preprocessed = _encoded_images(_image_size(graph_def), 'encoded')
    # Feeding images bypasses the decoder.
    images = tf.placeholder_with_default(preprocessed, [None, *preprocessed.shape[1:]],
                                         name=runtimes.IMAGES)
    probabilities = _import(graph_def, images)
    builder = tf.saved_model.Builder(path)
    builder.add_meta_graph_and_variables(
        session, [tf.saved_model.tag_constants.SERVING], signature_def_map={
            tf.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY:
                _signature(runtimes.IMAGES, images, probabilities),
            ENCODED_SIGNATURE:
                _signature(runtimes.ENCODED, encoded, probabilities)})
    builder.save()


def _signature(input_name, tensor, probabilities):
  return tf.saved_model.build_signature_def(
      {input_name: tf.saved_model.build_tensor_info(tensor)},
      {runtimes.PROBABILITIES: tf.saved_model.build_tensor_info(probabilities)},
      tf.saved_model.signature_constants.PREDICT_METHOD_NAME)


def _write_jpeg_pb(graph_def, path):
  """Writes a graph whose `input`, string [None], takes the bytes of JPEG or PNG files."""
  with tf.Graph().as_default() as graph:
    _, images = _encoded_images(_image_size(graph_def), runtimes.INPUT_NODE)
    tf.identity(_import(graph_def, images), name=runtimes.OUTPUT_NODE)
  _write_pb(tf.graph_util.extract_sub_graph(
      graph.as_graph_def(), [runtimes.OUTPUT_NODE]), path)


def _encoded_images(image_size, name):
  """Returns a placeholder for encoded images, string [None], and the preprocessed images."""
  encoded = tf.placeholder(tf.string, [None], name=name)
  return encoded, tf.map_fn(
      lambda content: xception_preprocessing.preprocess_for_eval(
          xception_preprocessing.decode(content), image_size, image_size),
      encoded, dtype=tf.float32)


def _image_size(graph_def):
  node = next(node for node in graph_def.node if node.name == runtimes.INPUT_NODE)
  return node.attr['shape'].shape.dim[1].size


def _import(graph_def, images):
  """Imports a frozen graph into the default graph; returns its output."""
  output, = tf.import_graph_def(
      graph_def, {f'{runtimes.INPUT_NODE}:0': images},
      [f'{runtimes.OUTPUT_NODE}:0'], name='network')
  return output


def _tflite_writer(optimizations=(), supported_types=()):
  """Returns a function that writes TFLite with these settings of the converter."""
  def write(graph_def, path):
    with tf.Graph().as_default(), tf.Session() as session:
      images, output = tf.import_graph_def(graph_def, return_elements=[
          f'{runtimes.INPUT_NODE}:0', f'{runtimes.OUTPUT_NODE}:0'], name='')
      converter = tf.lite.TFLiteConverter.from_session(session, [images], [output])
      converter.optimizations = list(optimizations)
      converter.target_spec.supported_types = list(supported_types)
      content = converter.convert()
    with open(path, 'wb') as f:
      f.write(content)
  return write


def _write_onnx(graph_def, path):
  tf2onnx = importlib.import_module('tf2onnx')
  logging.getLogger('tf2onnx').setLevel(logging.WARNING)
  model, _ = tf2onnx.convert.from_graph_def(
      graph_def, input_names=[f'{runtimes.INPUT_NODE}:0'],
      output_names=[f'{runtimes.OUTPUT_NODE}:0'], opset=ONNX_OPSET)
  graph = model.graph
  # tf2onnx keeps TensorFlow's ":0" and calls the unknown batch size unk__678.
  names = {value.name: value.name.removesuffix(':0') for value in (*graph.input, *graph.output)}
  for node in graph.node:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
  for value in (*graph.input, *graph.output):
    value.name = names[value.name]
    value.type.tensor_type.shape.dim[0].dim_param = 'batch_size'
  with open(path, 'wb') as f:
    f.write(model.SerializeToString())


FORMATS = {
    'pb': Format('.pb', FLOAT32_BOUND, True, _write_pb),
    'saved_model': Format('_saved_model', FLOAT32_BOUND, True, _write_saved_model),
    'tflite': Format('.tflite', FLOAT32_BOUND, False, _tflite_writer()),
    'tflite_float16': Format('_float16.tflite', FLOAT16_BOUND, False, _tflite_writer(
        [tf.lite.Optimize.DEFAULT], [tf.float16])),
    # Dynamic range: 8-bit weights, float activations in the file.
    'tflite_int8': Format('_int8.tflite', INT8_BOUND, False, _tflite_writer(
        [tf.lite.Optimize.DEFAULT])),
    'onnx': Format('.onnx', FLOAT32_BOUND, False, _write_onnx),
    'jpeg_pb': Format('_jpeg.pb', FLOAT32_BOUND, True, _write_jpeg_pb),
}
