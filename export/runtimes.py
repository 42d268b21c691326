"""Opens a model file of any origin in the runtime of its format.

  network = runtimes.open_network('frozen_model_xception.tflite')
  output = network.run(batch)

.pb and SavedModel run in TensorFlow, .tflite in LiteRT (`pip install
ai-edge-litert`) or else TensorFlow's own interpreter, .onnx in ONNX Runtime
(`pip install onnxruntime`).
"""

import collections
import importlib
import os
import struct
import warnings

import slim_bridge  # noqa: F401, before TensorFlow: see there

from google.protobuf import message
import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import rewriter_config_pb2
from tensorflow.lite.python import schema_py_generated

from common import errors

# Names of graph nodes and of SavedModel inputs and outputs.
INPUT_NODE = 'input'
OUTPUT_NODE = 'output'
IMAGES, ENCODED, PROBABILITIES = 'images', 'encoded', 'probabilities'

TFLITE_IDENTIFIER = b'TFL3'  # bytes 4 to 8 of every file
ONNX_DTYPES = {'tensor(float)': np.float32, 'tensor(float16)': np.float16,
               'tensor(double)': np.float64, 'tensor(uint8)': np.uint8, 'tensor(int8)': np.int8,
               'tensor(string)': np.object_}
VARIABLE_OPS = ('VarHandleOp', 'VariableV2', 'Variable')

Port = collections.namedtuple('Port', [
    'name',  # as its file calls it
    'shape',  # list of ints, None for an unknown dimension; None if the rank is unknown
    'dtype',  # NumPy's; object for strings
    'scale',  # a quantized value q stands for (q - zero_point) * scale; 0.0 if not quantized
    'zero_point',
])
Network = collections.namedtuple('Network', [
    'input',  # Port
    'output',  # Port
    'run',  # function of an array as the input takes it, which returns the output's
])


class ModelError(Exception):
  """A model cannot be loaded or run; the message says why and what to do."""


def open_network(path, precision='float32', use_gpu=True):
  """Opens a model.

  Args:
    path: a .tflite file, an .onnx file, the folder of a SavedModel, or a frozen
      graph under any other name.
    precision: 'bfloat16' makes TensorFlow run a float32 graph in bfloat16.
    use_gpu: False makes TensorFlow run it on the CPU; other runtimes always do.

  Returns:
    A Network.

  Raises:
    ModelError: the file is damaged, its runtime is not installed or cannot run it
      in this precision, or it is not clear which of its inputs or outputs to use.
  """
  suffix = os.path.splitext(path)[1].lower()
  if suffix in ('.tflite', '.onnx') and not os.path.isdir(path):
    if precision != 'float32':
      raise ModelError(f'{path}: only .pb and SavedModel run in {precision}')
    return _open_tflite(path) if suffix == '.tflite' else _open_onnx(path)
  session = tf.Session(graph=tf.Graph(), config=session_config(precision, use_gpu))
  return (_open_saved_model if os.path.isdir(path) else _open_pb)(path, session)


def session_config(precision='float32', use_gpu=True):
  """Returns a tf.ConfigProto for inference that takes GPU memory only as it is needed."""
  config = tf.ConfigProto(device_count={} if use_gpu else {'GPU': 0})
  config.gpu_options.allow_growth = True
  if precision == 'bfloat16':
    config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = (
        rewriter_config_pb2.RewriterConfig.ON)
  return config


def _choose(path, kind, names, preferred):
  """Returns the preferred one of several names, or the only one."""
  if preferred in names:
    return preferred
  if len(names) == 1:
    return names[0]
  found = f'{len(names)} {kind}s, {", ".join(sorted(names)[:10])}' if names else f'no {kind}'
  raise ModelError(f'{path} has {found}: one must be named {preferred}, or there must be only one')


def _open_pb(path, session):
  graph_def = tf.GraphDef()
  try:
    with open(path, 'rb') as f:
      content = f.read()
    if not content:
      raise ModelError(f'{path} is empty')
    graph_def.ParseFromString(content)
    with session.graph.as_default():
      tf.import_graph_def(graph_def, name='')
  except (message.DecodeError, ValueError, OSError, tf.errors.OpError) as error:
    raise ModelError(f'{path} is not a frozen graph: {errors.reason(error)}') from error
  variables = [node.name for node in graph_def.node if node.op in VARIABLE_OPS]
  if variables:
    raise ModelError(f'{path} has variables without values, such as {variables[0]}: freeze it '
                     'with write_pb.py')
  consumed = {tensor.lstrip('^').partition(':')[0]
              for node in graph_def.node for tensor in node.input}

  def is_output(node):
    is_last = node.name not in consumed and node.op != 'Const'
    return (is_last or node.name == OUTPUT_NODE) and (
        session.graph.get_operation_by_name(node.name).outputs)

  inputs = [node.name for node in graph_def.node if node.op.startswith('Placeholder')]
  outputs = [node.name for node in graph_def.node if is_output(node)]
  tensors = [session.graph.get_tensor_by_name(f'{name}:0') for name in (
      _choose(path, 'input', inputs, INPUT_NODE), _choose(path, 'output', outputs, OUTPUT_NODE))]
  return _tensorflow_network(session, *tensors)


def _open_saved_model(path, session):
  try:
    with session.graph.as_default():
      signatures = tf.saved_model.load(
          session, [tf.saved_model.tag_constants.SERVING], path).signature_def
    key = tf.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY
    if key not in signatures:  # a map of protocol buffers would create it
      raise ValueError(f'it has {", ".join(sorted(signatures)) or "none"}')
    signature = signatures[key]
  except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
    raise ModelError(f'{path} is not a SavedModel with a signature serving_default: '
                     f'{errors.reason(error)}') from error
  infos = (signature.inputs[_choose(path, 'input', list(signature.inputs), IMAGES)],
           signature.outputs[_choose(path, 'output', list(signature.outputs), PROBABILITIES)])
  network = _tensorflow_network(
      session, *(session.graph.get_tensor_by_name(info.name) for info in infos))

  def run(batch):
    try:
      return network.run(batch)
    except tf.errors.FailedPreconditionError as error:
      raise ModelError('its variables have no values: save a Keras model with '
                       'model.export(folder), not with tf.saved_model.save') from error

  return network._replace(run=run)


def _tensorflow_network(session, images, output):
  ports = [Port(tensor.name, None if tensor.shape.rank is None else tensor.shape.as_list(),
                np.dtype(tensor.dtype.as_numpy_dtype), 0.0, 0) for tensor in (images, output)]
  return Network(*ports, lambda batch: session.run(output, {images: batch}))


def _open_tflite(path):
  _check_tflite(path)
  try:
    interpreter = _tflite_interpreter_class()(model_path=path, num_threads=os.cpu_count())
    interpreter.allocate_tensors()
  except (ValueError, RuntimeError) as error:
    raise ModelError(f'{path} is not a TFLite model that LiteRT can run: {error}') from error

  def choose(kind, details, preferred):
    by_name = {detail['name']: detail for detail in details}
    detail = by_name[_choose(path, kind, list(by_name), preferred)]
    shape = [None if size < 0 else int(size) for size in detail['shape_signature']]
    return detail['index'], Port(detail['name'], shape, np.dtype(detail['dtype']),
                                 *detail['quantization'])

  images_index, images = choose('input', interpreter.get_input_details(), INPUT_NODE)
  output_index, output = choose('output', interpreter.get_output_details(), OUTPUT_NODE)

  def run(batch):
    if list(interpreter.get_input_details()[0]['shape']) != list(batch.shape):
      interpreter.resize_tensor_input(images_index, batch.shape)
      interpreter.allocate_tensors()
    interpreter.set_tensor(images_index, batch)
    interpreter.invoke()
    return interpreter.get_tensor(output_index)

  return Network(images, output, run)


def _check_tflite(path):
  """Reads every table and buffer of the file, because LiteRT crashes on a truncated one."""
  with open(path, 'rb') as f:
    content = f.read()
  if content[4:8] != TFLITE_IDENTIFIER:
    raise ModelError(f'{path} is not a TFLite model')
  try:
    schema_py_generated.ModelT.InitFromPackedBuf(content)
  except (struct.error, ValueError, TypeError, IndexError, OverflowError) as error:
    raise ModelError(f'{path} is damaged or truncated: {error}') from error


def _tflite_interpreter_class():
  try:
    return importlib.import_module('ai_edge_litert.interpreter').Interpreter
  except ImportError:
    if not hasattr(tf, 'lite') or not hasattr(tf.lite, 'Interpreter'):
      raise ModelError('A .tflite model needs LiteRT: pip install ai-edge-litert') from None
    warnings.filterwarnings('ignore', '.*tf.lite.Interpreter is deprecated', UserWarning)
    return tf.lite.Interpreter


def _open_onnx(path):
  try:
    onnxruntime = importlib.import_module('onnxruntime')
  except ImportError as error:
    raise ModelError('An .onnx model needs ONNX Runtime: pip install onnxruntime') from error
  try:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  except Exception as error:  # pylint: disable=broad-except
    # ONNX Runtime has a dozen unrelated exceptions, one for each status code.
    raise ModelError(f'{path} is not an ONNX model: {error}') from error

  def choose(kind, values, preferred):
    by_name = {value.name: value for value in values}
    value = by_name[_choose(path, kind, list(by_name), preferred)]
    if value.type not in ONNX_DTYPES:
      raise ModelError(f'{path}: its {kind} {value.name} has the type {value.type}, expected '
                       'tensor(float)')
    # An unknown dimension is None or has a name.
    shape = [size if isinstance(size, int) else None for size in value.shape]
    return Port(value.name, shape, np.dtype(ONNX_DTYPES[value.type]), 0.0, 0)

  images = choose('input', session.get_inputs(), INPUT_NODE)
  output = choose('output', session.get_outputs(), OUTPUT_NODE)
  return Network(images, output,
                 lambda batch: session.run([output.name], {images.name: batch})[0])
