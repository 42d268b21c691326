"""Writes a frozen graph in the formats that other programs read.

  graph_formats.FORMATS['onnx'].write(graph_def, 'frozen_model_xception.onnx')
"""

import collections
import importlib
import logging

import slim_bridge  # noqa: F401, first: it also silences what TensorFlow says at import.

import tensorflow.compat.v1 as tf

import batch_norm_folding
import frozen_models
import xception_preprocessing

ONNX_OPSET = 18

# How far a format's probabilities may be from the checkpoint's.
FLOAT32_BOUND, FLOAT16_BOUND, BFLOAT16_BOUND, INT8_BOUND = 1e-4, 1e-2, 2e-2, 5e-2

Format = collections.namedtuple('Format', [
    'suffix',  # takes the place of the .pb of --output_file
    'bound',  # largest difference of a probability from the checkpoint's
    'has_bfloat16',  # whether its operations come in bfloat16
    'write',  # function of a tf.GraphDef with nodes `input` and `output`, and a path
])


class FormatError(Exception):
  """A format cannot be written; the message says what to install."""


def to_bfloat16(graph_def):
  """Lets a folded graph compute in bfloat16 from its input to the global average pool.

  The graph is half the size, and runs fast on CPUs that have AVX512_BF16 or AMX.
  The average, the logits and the softmax stay float32, where 8 bits of mantissa
  would show.

  Args:
    graph_def: tf.GraphDef from `batch_norm_folding.fold`; it is not changed.

  Returns:
    A tf.GraphDef with the same input and output.
  """
  converted = tf.GraphDef(versions=graph_def.versions)
  renamed = {}  # tensor of the old graph -> the same in the type that is wanted

  def add_cast(tensor, old_type, new_type):
    renamed[tensor] = f'{tensor}/{new_type.name}'
    converted.node.add(name=renamed[tensor], op='Cast', input=[tensor], attr={
        'SrcT': tf.AttrValue(type=old_type.as_datatype_enum),
        'DstT': tf.AttrValue(type=new_type.as_datatype_enum)})

  is_behind_pool = False
  for node in graph_def.node:
    if node.op == 'Mean':
      is_behind_pool = True
      add_cast(node.input[0], tf.bfloat16, tf.float32)
    tensors = [renamed.get(tensor, tensor) for tensor in node.input]
    node = converted.node.add(name=node.name, op=node.op, input=tensors, attr=node.attr)
    if node.op == 'Placeholder':
      add_cast(node.name, tf.float32, tf.bfloat16)
    elif not is_behind_pool:
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
  """Looks for what writes the formats, and with `verify` runs them, before any work is done.

  Raises:
    FormatError: it is not installed.
  """
  wanted = ['tf2onnx'] + ['onnxruntime'] * verify if 'onnx' in formats else []
  for package in wanted:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise FormatError(f'--formats onnx needs {package}: pip install '
                        f'{" ".join(wanted)} ({error})') from error


def _write_pb(graph_def, path):
  with open(path, 'wb') as f:
    f.write(graph_def.SerializeToString(deterministic=True))


def _write_saved_model(graph_def, path):
  """Writes one network with two signatures: images, or encoded images, to probabilities."""
  # TensorFlow alone reads it, in TensorFlow 2 as a tf.function.
  graph_def = batch_norm_folding.delay_biases(graph_def, frozen_models.OUTPUT_NODE)
  with tf.Graph().as_default(), tf.Session() as session:
    encoded, preprocessed = _encoded_images(_image_size(graph_def), 'encoded')
    # Whoever feeds images cuts off what would have computed them.
    images = tf.placeholder_with_default(preprocessed, [None, *preprocessed.shape[1:]],
                                         name=frozen_models.IMAGES)
    probabilities = _import(graph_def, images)
    builder = tf.saved_model.Builder(path)
    builder.add_meta_graph_and_variables(
        session, [tf.saved_model.tag_constants.SERVING], signature_def_map={
            tf.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY:
                _signature(frozen_models.IMAGES, images, probabilities),
            frozen_models.ENCODED_SIGNATURE:
                _signature(frozen_models.ENCODED, encoded, probabilities)})
    builder.save()


def _signature(input_name, tensor, probabilities):
  return tf.saved_model.build_signature_def(
      {input_name: tf.saved_model.build_tensor_info(tensor)},
      {frozen_models.PROBABILITIES: tf.saved_model.build_tensor_info(probabilities)},
      tf.saved_model.signature_constants.PREDICT_METHOD_NAME)


def _write_jpeg_pb(graph_def, path):
  """Writes a graph whose `input` is string [None], JPEG or PNG files' bytes."""
  with tf.Graph().as_default() as graph:
    _, images = _encoded_images(_image_size(graph_def), frozen_models.INPUT_NODE)
    tf.identity(_import(graph_def, images), name=frozen_models.OUTPUT_NODE)
  _write_pb(tf.graph_util.extract_sub_graph(
      graph.as_graph_def(), [frozen_models.OUTPUT_NODE]), path)


def _encoded_images(image_size, name):
  """Returns a placeholder of encoded images, string [None], and the images as evaluated."""
  encoded = tf.placeholder(tf.string, [None], name=name)
  preprocess = tf.autograph.experimental.do_not_convert(
      lambda content: xception_preprocessing.preprocess_for_eval(
          xception_preprocessing.decode(content), image_size, image_size))
  return encoded, tf.map_fn(preprocess, encoded, dtype=tf.float32)


def _image_size(graph_def):
  node = next(node for node in graph_def.node if node.name == frozen_models.INPUT_NODE)
  return node.attr['shape'].shape.dim[1].size


def _import(graph_def, images):
  """Adds a frozen graph to the default one; returns its output."""
  output, = tf.import_graph_def(
      graph_def, {f'{frozen_models.INPUT_NODE}:0': images},
      [f'{frozen_models.OUTPUT_NODE}:0'], name='network')
  return output


def _tflite_writer(optimizations=(), supported_types=()):
  """Returns a function that writes TFLite with the converter's settings."""
  def write(graph_def, path):
    with tf.Graph().as_default(), tf.Session() as session:
      images, output = tf.import_graph_def(graph_def, return_elements=[
          f'{frozen_models.INPUT_NODE}:0', f'{frozen_models.OUTPUT_NODE}:0'], name='')
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
      graph_def, input_names=[f'{frozen_models.INPUT_NODE}:0'],
      output_names=[f'{frozen_models.OUTPUT_NODE}:0'], opset=ONNX_OPSET)
  graph = model.graph
  # ONNX has no ":0", and shows the unknown batch size as unk__678.
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
    # Weights in 8 bits, arithmetic in float where that is more exact ("dynamic range").
    'tflite_int8': Format('_int8.tflite', INT8_BOUND, False, _tflite_writer(
        [tf.lite.Optimize.DEFAULT])),
    'onnx': Format('.onnx', FLOAT32_BOUND, False, _write_onnx),
    'jpeg_pb': Format('_jpeg.pb', FLOAT32_BOUND, True, _write_jpeg_pb),
}
