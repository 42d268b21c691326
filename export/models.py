"""Loads a model that write_pb.py wrote, in any format, and runs it on images.

  model = models.load('frozen_model_xception.tflite')
  probabilities = model.predict(images)

Each format runs in its own runtime: .pb and SavedModel in TensorFlow, .tflite in
LiteRT (`pip install ai-edge-litert`) or else TensorFlow's own interpreter, .onnx
in ONNX Runtime (`pip install onnxruntime`).

A .pb or a SavedModel is a program: load only files made by you or by someone you
trust.
"""

import dataclasses
import importlib
import json
import os
import typing
import warnings

import slim_bridge  # noqa: F401, before TensorFlow: see there

from google.protobuf import message
import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import rewriter_config_pb2

from common import files
from records import flowers
import xception_preprocessing

# Names of graph nodes and of SavedModel inputs and outputs.
INPUT_NODE = 'input'
OUTPUT_NODE = 'output'
IMAGES, ENCODED, PROBABILITIES = 'images', 'encoded', 'probabilities'
ENCODED_SIGNATURE = 'encoded'  # takes encoded images; serving_default takes pixels

MODEL_FILE = 'model.json'  # describes the models in its folder
TFLITE_IDENTIFIER = b'TFL3'  # bytes 4 to 8 of every file

PRECISIONS = ('float32', 'bfloat16')


class ModelError(Exception):
  """A model cannot be loaded; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class FrozenModel:
  """A model that is ready to run.

  Attributes:
    class_names: names of the classes, from the labels.txt in its folder.
    image_size: height and width of its images in pixels; None if it takes
      encoded images.
    description: content of the model.json in its folder; without one, {'files': []}.
  """
  class_names: list[str]
  image_size: int | None
  description: dict
  _run: typing.Callable

  def predict(self, batch):
    """Classifies a batch.

    Args:
      batch: float32 [n, image_size, image_size, 3] in [-1, 1] with n >= 1; if
        image_size is None, a list of the bytes of n JPEG or PNG files.

    Returns:
      The probabilities, float32 [n, num_classes].
    """
    if not len(batch):
      raise ValueError('predict() needs at least one image, got an empty batch')
    return self._run(batch)


class Preprocessor:
  """Turns an encoded image into the network's input, exactly as evaluation does."""

  def __init__(self, image_size):
    with tf.Graph().as_default():
      self._encoded = tf.placeholder(tf.string, [])
      # Cropping before the conversion to float gives the same pixels in a third
      # less memory; a large image takes a gigabyte.
      crop = tf.image.central_crop(xception_preprocessing.decode(self._encoded),
                                   xception_preprocessing.CENTRAL_FRACTION)
      self._image = xception_preprocessing.preprocess_for_eval(
          crop, image_size, image_size, central_fraction=None)
      self._session = tf.Session(config=tf.ConfigProto(device_count={'GPU': 0}))

  def __call__(self, encoded):
    """Returns float32 [image_size, image_size, 3] in [-1, 1].

    Args:
      encoded: bytes of a JPEG or PNG file.
    """
    return self._session.run(self._image, {self._encoded: encoded})


def load(path, precision='float32'):
  """Loads a model.

  Args:
    path: a .tflite file, an .onnx file, the folder of a SavedModel, or a frozen
      graph under any other name.
    precision: 'bfloat16' makes TensorFlow run a float32 graph in bfloat16.

  Returns:
    A FrozenModel.

  Raises:
    ModelError: the file is missing, damaged or not the one that model.json
      describes; its runtime is not installed or cannot run it in this precision;
      or labels.txt is missing or names another number of classes.
  """
  if not os.path.exists(path):
    raise ModelError(f'There is no model {path}: write_pb.py writes one')
  if os.path.isdir(path):
    load_format = _load_saved_model
  else:
    load_format = {'.tflite': _load_tflite, '.onnx': _load_onnx}.get(
        os.path.splitext(path)[1].lower(), _load_pb)
  if precision != 'float32' and load_format in (_load_tflite, _load_onnx):
    raise ModelError(f'{path}: only .pb and SavedModel run in {precision}')
  description = _read_description(path)
  _check_sums(path, description)
  image_size, num_classes, run = load_format(path, precision)

  labels_file = os.path.join(os.path.dirname(os.path.abspath(path)), flowers.LABELS_FILE)
  try:
    class_names = flowers.read_labels_file(labels_file)
  except flowers.DatasetError as error:
    raise ModelError(f'{path} needs the labels.txt that was written with it: {error}') from error
  if len(class_names) != num_classes:
    raise ModelError(f'{labels_file} names {len(class_names)} classes, but {path} '
                     f'has {num_classes}')
  return FrozenModel(class_names, image_size, description, run)


def files_below(path):
  """Returns the sorted files of a SavedModel's folder, or the one file of another format."""
  if not os.path.isdir(path):
    return [path]
  return sorted(os.path.join(folder, name)
                for folder, _, names in os.walk(path) for name in names)


def num_bytes(path):
  """Returns the total size of a model's files in bytes."""
  return sum(os.path.getsize(file) for file in files_below(path))


def _read_description(path):
  """Returns the content of the model.json in a model's folder, or {'files': []} without one."""
  try:
    with open(os.path.join(os.path.dirname(os.path.abspath(path)), MODEL_FILE),
              encoding='utf-8') as f:
      description = json.load(f)
    if not isinstance(description, dict):
      raise ValueError(f'expected an object, got {description!r}')
    return description
  except FileNotFoundError:
    return {'files': []}
  except (OSError, ValueError) as error:
    raise ModelError(f'Cannot read the {MODEL_FILE} of {path}: {error}') from error


def _check_sums(path, description):
  """Compares a model's files with their SHA-256 in model.json."""
  path = os.path.abspath(path)
  folder = os.path.dirname(path)
  try:
    sums = {file['file']: file['sha256'] for file in description['files']}
  except (KeyError, TypeError) as error:
    raise ModelError(f'Cannot read the {MODEL_FILE} of {path}: {error!r}') from error
  for file in files_below(path):
    name = os.path.relpath(file, folder)
    if name in sums and sums[name] != files.sha256(file):
      raise ModelError(f'{file} is damaged or is not the file that its {MODEL_FILE} '
                       'describes: write it again with write_pb.py')


def _load_pb(path, precision):
  graph_def = tf.GraphDef()
  session = _session(precision)
  try:
    with open(path, 'rb') as f:
      graph_def.ParseFromString(f.read())
    with session.graph.as_default():
      tf.import_graph_def(graph_def, name='')
    images = session.graph.get_tensor_by_name(f'{INPUT_NODE}:0')
    output = session.graph.get_tensor_by_name(f'{OUTPUT_NODE}:0')
  except (message.DecodeError, ValueError, KeyError, OSError) as error:
    raise ModelError(f'{path} is not a frozen graph of write_pb.py: {error}') from error
  return *_sizes(images, output), _runner(session, images, output)


def _load_saved_model(path, precision):
  session = _session(precision)
  try:
    with session.graph.as_default():
      signatures = tf.saved_model.load(
          session, [tf.saved_model.tag_constants.SERVING], path).signature_def
    signature = signatures[tf.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY]
    images = session.graph.get_tensor_by_name(signature.inputs[IMAGES].name)
    output = session.graph.get_tensor_by_name(signature.outputs[PROBABILITIES].name)
  except (OSError, RuntimeError, ValueError, KeyError, tf.errors.OpError) as error:
    raise ModelError(f'{path} is not a SavedModel of write_pb.py: {error}') from error
  return *_sizes(images, output), _runner(session, images, output)


def _session(precision):
  config = tf.ConfigProto()
  config.gpu_options.allow_growth = True
  if precision == 'bfloat16':
    config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = (
        rewriter_config_pb2.RewriterConfig.ON)
  return tf.Session(graph=tf.Graph(), config=config)


def _sizes(images, output):
  image_size = None if images.dtype == tf.string else images.shape.as_list()[1]
  return image_size, output.shape.as_list()[-1]


def _runner(session, images, output):
  return lambda batch: session.run(output, {images: batch})


def _load_tflite(path, precision):
  del precision  # The file decides.
  with open(path, 'rb') as f:
    if f.read(8)[4:] != TFLITE_IDENTIFIER:
      raise ModelError(f'{path} is not a TFLite model')
  try:
    interpreter = _tflite_interpreter_class()(model_path=path, num_threads=os.cpu_count())
  except (ValueError, RuntimeError) as error:
    raise ModelError(f'{path} is not a TFLite model: {error}') from error
  images, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

  def run(batch):
    interpreter.resize_tensor_input(images['index'], batch.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(images['index'], batch)
    interpreter.invoke()
    return interpreter.get_tensor(output['index'])

  return int(images['shape'][1]), int(output['shape'][-1]), run


def _tflite_interpreter_class():
  try:
    return importlib.import_module('ai_edge_litert.interpreter').Interpreter
  except ImportError:
    if not hasattr(tf, 'lite') or not hasattr(tf.lite, 'Interpreter'):
      raise ModelError('A .tflite model needs LiteRT: pip install ai-edge-litert') from None
    warnings.filterwarnings('ignore', '.*tf.lite.Interpreter is deprecated', UserWarning)
    return tf.lite.Interpreter


def _load_onnx(path, precision):
  del precision  # The file decides.
  try:
    onnxruntime = importlib.import_module('onnxruntime')
  except ImportError as error:
    raise ModelError('An .onnx model needs ONNX Runtime: pip install onnxruntime') from error
  try:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  except Exception as error:  # pylint: disable=broad-except
    # ONNX Runtime has a dozen unrelated exceptions, one for each status code.
    raise ModelError(f'{path} is not an ONNX model: {error}') from error
  images, output = session.get_inputs()[0], session.get_outputs()[0]
  return images.shape[1], output.shape[-1], (
      lambda batch: session.run([output.name], {images.name: batch})[0])
