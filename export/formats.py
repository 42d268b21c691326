"""Writes a frozen graph in the formats that other programs read.

  formats.FORMATS['onnx'].write(graph_def, 'frozen_model_xception.onnx')
"""

import collections
import importlib
import logging
import os
import tempfile

import slim_bridge  # noqa: F401, before TensorFlow: see there

from tensorflow.compat import v2 as tf2
import tensorflow.compat.v1 as tf
from tensorflow.python.eager import context

from export import folding
from export import quantization
from export import runtimes
import xception_preprocessing

ONNX_OPSET, MIN_ONNX_OPSET = 18, 13
ENCODED_SIGNATURE = 'encoded'  # takes encoded images; serving_default takes pixels

# Largest allowed difference between a format's probabilities and the checkpoint's.
FLOAT32_BOUND, FLOAT16_BOUND, BFLOAT16_BOUND, DYNAMIC_RANGE_BOUND = 1e-4, 1e-2, 2e-2, 5e-2

Format = collections.namedtuple('Format', [
    'suffix',  # replaces the .pb of --output_file
    # Largest allowed difference of a probability from the checkpoint's; None compares the
    # accuracies instead.
    'bound',
    'has_bfloat16',  # whether the format can hold bfloat16 operations
    'is_calibrated',  # whether activations are quantized, by means of training images
    # Function of a tf.GraphDef with nodes `input` and `output`, a path and Settings.
    'write',
])


Settings = collections.namedtuple('Settings', [
    'batch_size',  # of every format; None is any
    'opset',  # of ONNX
    'nchw',  # whether the input of ONNX is [n, 3, image_size, image_size]
    'calibration_images',  # float32 [n, image_size, image_size, 3] in [-1, 1], for 8-bit formats
], defaults=[None, ONNX_OPSET, False, None])


class FormatError(Exception):
  """A format cannot be written by what is installed."""


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


def fix_batch_size(graph_def, batch_size):
  """Returns a copy of a frozen graph whose input has a fixed batch size."""
  fixed = tf.GraphDef.FromString(graph_def.SerializeToString())
  node = next(node for node in fixed.node if node.name == runtimes.INPUT_NODE)
  node.attr['shape'].shape.dim[0].size = batch_size
  return fixed


def require_packages(formats, verify, opset=ONNX_OPSET):
  """Checks that what writes the formats is installed, before any work is done.

  Args:
    formats: names of formats.
    verify: whether the files will also be run, which needs more packages.
    opset: of ONNX.

  Raises:
    FormatError: a package is missing, or cannot write this opset.
  """
  onnx_formats = [name for name in formats if name.startswith('onnx')]
  needs_runtime = verify or 'onnx_int8' in formats
  packages = ['tf2onnx'] + ['onnxruntime'] * needs_runtime if onnx_formats else []
  for package in packages:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise FormatError(f'--formats {",".join(onnx_formats)} needs {package}: pip install '
                        f'{" ".join(packages)} ({error})') from error
  if packages:
    newest = importlib.import_module('tf2onnx.constants').OPSET_TO_IR_VERSION
    if not MIN_ONNX_OPSET <= opset <= max(newest):
      raise FormatError(f'--opset must be {MIN_ONNX_OPSET} to {max(newest)}, got {opset}')


def _write_pb(graph_def, path, settings):
  del settings
  with open(path, 'wb') as f:
    f.write(graph_def.SerializeToString(deterministic=True))


def _write_saved_model(graph_def, path, settings):
  """Writes one network with two signatures: probabilities of images, and of encoded images.

  Each signature is a function of its own, so that converters of serving_default
  meet no decoder. TFLite's converter takes serving_default, and not all
  signatures, if there is a function called `serve`.
  """
  del settings
  # TensorFlow runs this as a tf.function.
  graph_def = folding.delay_biases(graph_def, runtimes.OUTPUT_NODE)
  shape = _input_shape(graph_def)

  def serve(images):
    return {runtimes.PROBABILITIES: _import(graph_def, images)}

  def serve_encoded(encoded):
    return module.serve(_decode_and_preprocess(encoded, shape[1]))

  # The eager context has no session's configuration.
  os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
  with context.eager_mode():
    module = tf2.Module()
    module.serve = tf2.function(serve, autograph=False, input_signature=[
        tf2.TensorSpec(shape, tf.float32, runtimes.IMAGES)])
    module.serve_encoded = tf2.function(serve_encoded, autograph=False, input_signature=[
        tf2.TensorSpec(shape[:1], tf.string, runtimes.ENCODED)])
    tf2.saved_model.save(module, path, {
        tf2.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: module.serve,
        ENCODED_SIGNATURE: module.serve_encoded})


def _write_jpeg_pb(graph_def, path, settings):
  """Writes a graph whose `input`, string [n], takes the bytes of JPEG or PNG files."""
  graph_def = folding.delay_biases(graph_def, runtimes.OUTPUT_NODE)
  batch_size, image_size = _input_shape(graph_def)[:2]
  with tf.Graph().as_default() as graph:
    encoded = tf.placeholder(tf.string, [batch_size], name=runtimes.INPUT_NODE)
    probabilities = _import(graph_def, _decode_and_preprocess(encoded, image_size))
    tf.identity(probabilities, name=runtimes.OUTPUT_NODE)
  _write_pb(tf.graph_util.extract_sub_graph(
      graph.as_graph_def(), [runtimes.OUTPUT_NODE]), path, settings)


@tf.autograph.experimental.do_not_convert  # see flowers.load_numbered_batch
def _decode_and_preprocess(encoded, image_size):
  """Turns encoded images, string [n], into float32 [n, image_size, image_size, 3] in [-1, 1]."""
  images = tf.map_fn(
      lambda content: xception_preprocessing.preprocess_for_eval(
          decode_on_white(content), image_size, image_size),
      encoded, dtype=tf.float32)
  # Without this, a fixed batch size would be lost.
  return tf.ensure_shape(images, encoded.shape.concatenate([image_size, image_size, 3]))


def decode_on_white(encoded):
  """Decodes a JPEG or PNG file as create_tfrecords.py converts it: transparency becomes white.

  An EXIF orientation is ignored, since TensorFlow has no operation that reads it.

  Args:
    encoded: string [], bytes of the file.

  Returns:
    uint8 [height, width, 3].
  """
  def blend():
    pixels = tf.cast(tf.image.decode_png(encoded, channels=4), tf.int32)
    color, alpha = pixels[..., :3], pixels[..., 3:]
    # Where a PNG of fewer than 8 bits has no transparency, TensorFlow's alpha is not 255, but
    # the largest number of that many bits.
    bit_depth = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, 24, 1), tf.uint8)[0], tf.int32)
    is_opaque = tf.reduce_all(tf.equal(alpha, 2**bit_depth - 1))
    alpha = tf.maximum(alpha, 255 * tf.cast(is_opaque, tf.int32))
    return tf.cast((color * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

  is_png = tf.equal(tf.strings.substr(encoded, 1, 3), 'PNG')
  with tf.control_dependencies([tf.debugging.Assert(
      is_png | tf.image.is_jpeg(encoded), ['expected a JPEG or PNG file'])]):
    return tf.cond(is_png, blend, lambda: xception_preprocessing.decode(encoded))


def _input_shape(graph_def):
  node = next(node for node in graph_def.node if node.name == runtimes.INPUT_NODE)
  return tf.TensorShape(node.attr['shape'].shape).as_list()


def _import(graph_def, images):
  """Imports a frozen graph into the default graph; returns its output."""
  output, = tf.import_graph_def(
      graph_def, {f'{runtimes.INPUT_NODE}:0': images},
      [f'{runtimes.OUTPUT_NODE}:0'], name='network')
  return output


def _tflite_writer(optimizations=(), supported_types=(), is_calibrated=False):
  """Returns a function that writes TFLite with these settings of the converter."""
  def write(graph_def, path, settings):
    if is_calibrated:
      graph_def = quantization.equalize(graph_def, settings.calibration_images,
                                        settings.batch_size)
    with tf.Graph().as_default(), tf.Session(
        config=runtimes.session_config(use_gpu=False)) as session:
      images, output = tf.import_graph_def(graph_def, return_elements=[
          f'{runtimes.INPUT_NODE}:0', f'{runtimes.OUTPUT_NODE}:0'], name='')
      converter = tf.lite.TFLiteConverter.from_session(session, [images], [output])
      converter.optimizations = list(optimizations)
      converter.target_spec.supported_types = list(supported_types)
      if is_calibrated:
        quantization.configure_tflite(converter, settings.calibration_images, settings.batch_size)
      content = converter.convert()
    with open(path, 'wb') as f:
      f.write(content)
  return write


def _write_onnx(graph_def, path, settings):
  tf2onnx = importlib.import_module('tf2onnx')
  logging.getLogger('tf2onnx').setLevel(logging.WARNING)
  model, _ = tf2onnx.convert.from_graph_def(
      graph_def, input_names=[f'{runtimes.INPUT_NODE}:0'],
      output_names=[f'{runtimes.OUTPUT_NODE}:0'], opset=settings.opset,
      inputs_as_nchw=[f'{runtimes.INPUT_NODE}:0'] if settings.nchw else None)
  graph = model.graph
  # tf2onnx keeps TensorFlow's ":0" and calls the unknown batch size unk__678.
  names = {value.name: value.name.removesuffix(':0') for value in (*graph.input, *graph.output)}
  for node in graph.node:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
  for value in (*graph.input, *graph.output):
    value.name = names[value.name]
    if not value.type.tensor_type.shape.dim[0].dim_value:
      value.type.tensor_type.shape.dim[0].dim_param = 'batch_size'
  with open(path, 'wb') as f:
    f.write(model.SerializeToString())


def _write_onnx_int8(graph_def, path, settings):
  images = settings.calibration_images
  with tempfile.TemporaryDirectory() as folder:
    float_path = os.path.join(folder, 'model.onnx')
    _write_onnx(quantization.equalize(graph_def, images, settings.batch_size), float_path,
                settings)
    quantization.quantize_onnx(
        float_path, path, images.transpose(0, 3, 1, 2) if settings.nchw else images,
        settings.batch_size)


FORMATS = {
    'pb': Format('.pb', FLOAT32_BOUND, True, False, _write_pb),
    'saved_model': Format('_saved_model', FLOAT32_BOUND, True, False, _write_saved_model),
    'tflite': Format('.tflite', FLOAT32_BOUND, False, False, _tflite_writer()),
    'tflite_float16': Format('_float16.tflite', FLOAT16_BOUND, False, False, _tflite_writer(
        [tf.lite.Optimize.DEFAULT], [tf.float16])),
    # Dynamic range: 8-bit weights, float activations in the file.
    'tflite_int8': Format('_int8.tflite', DYNAMIC_RANGE_BOUND, False, False, _tflite_writer(
        [tf.lite.Optimize.DEFAULT])),
    'tflite_full_int8': Format('_full_int8.tflite', None, False, True, _tflite_writer(
        is_calibrated=True)),
    'onnx': Format('.onnx', FLOAT32_BOUND, False, False, _write_onnx),
    'onnx_int8': Format('_int8.onnx', None, False, True, _write_onnx_int8),
    'jpeg_pb': Format('_jpeg.pb', FLOAT32_BOUND, True, False, _write_jpeg_pb),
}
