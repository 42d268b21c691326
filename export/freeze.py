"""Freezes a checkpoint and writes it in one or more formats.

  graph_def, predict, weights = freeze.freeze(checkpoint, config)
"""

import importlib.metadata
import json
import os
import platform
import tempfile

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from common import files
from export import comparison
from export import folding
from export import formats
from export import models
from export import quantization
from export import runtimes
from records import flowers
import xception
import xception_preprocessing

# Entries of model.json that may differ between files that several runs wrote into one folder.
ORIGIN_KEYS = ('image_size', 'depth_multiplier', 'checkpoint', 'global_step', 'averaged_weights',
               'temperature', 'folded', 'precision', 'versions')


class FreezeError(Exception):
  """The files cannot be written to the requested place."""


def softmax(logits, scope):
  """A `prediction_fn` of two-dimensional logits.

  slim.softmax reshapes by tf.shape, an operation that OpenCV's TFLite reader and GPU
  delegates lack.
  """
  with tf.name_scope(scope):
    return tf.nn.softmax(logits, name='Softmax')


def freeze(checkpoint, config, use_averages='auto', use_temperature=False):
  """Builds the inference graph of a checkpoint, with its weights as constants.

  Args:
    checkpoint: path of the checkpoint.
    config: its ModelConfig.
    use_averages: 'auto', 'yes' or 'no', see `checkpoints.restore`.
    use_temperature: whether to divide the logits by the temperature that is stored
      beside the checkpoint.

  Returns:
    graph_def: tf.GraphDef with nodes `input`, float32
      [None, image_size, image_size, 3] in [-1, 1], and `output`, float32
      [None, num_classes], the softmax.
    predict: function of images as for `input` that returns the probabilities of
      the checkpoint itself, at the same temperature.
    weights: {'averaged_weights': whether they are Polyak averages, 'temperature':
      the temperature, or None}.

  Raises:
    checkpoints.CheckpointError: the checkpoint cannot be restored, or has no
      temperature.
  """
  # A GPU's TF32 would be further from the written files than their bounds allow.
  session = tf.Session(graph=tf.Graph(), config=runtimes.session_config(use_gpu=False))
  with session.graph.as_default():
    images = tf.placeholder(tf.float32, [None, config.image_size, config.image_size, 3],
                            name=models.INPUT_NODE)
    with slim.arg_scope(xception.xception_arg_scope()):
      _, end_points = xception.xception(
          images, config.num_classes, is_training=False,
          depth_multiplier=config.depth_multiplier,
          prediction_fn=softmax)
    output = tf.identity(end_points['Predictions'], name=models.OUTPUT_NODE)
    is_averaged = checkpoints.restore(session, checkpoint, use_averages)
    temperature = None
    if use_temperature:
      temperature = _find_temperature(checkpoint, is_averaged, config.image_size)
      # Dividing the weights needs no operation that some other program might lack.
      for variable in slim.get_model_variables('Xception/Logits'):
        variable.load(session.run(variable) / temperature, session)
    graph_def = tf.graph_util.convert_variables_to_constants(
        session, session.graph.as_graph_def(), [models.OUTPUT_NODE])
  return graph_def, lambda batch: session.run(output, {images: batch}), {
      'averaged_weights': is_averaged, 'temperature': temperature}


def _find_temperature(checkpoint, is_averaged, image_size):
  found = checkpoints.read_temperature(checkpoint, is_averaged, image_size)
  if found is None:
    weights = 'Polyak averages' if is_averaged else 'the weights as trained'
    raise checkpoints.CheckpointError(
        f'{checkpoints.temperature_file(checkpoint)} has no temperature for {weights} of '
        f'{checkpoint} at {image_size} pixels: run eval_flowers.py --fit_temperature for them '
        'first, or leave out --temperature')
  return found['temperature']


def plan_files(format_names, output_file):
  """Returns {format: path} of the files to write; all are named after output_file.

  Raises:
    FreezeError: output_file is not a .pb in an existing folder, its name cannot be
      used, or something else has a file's name.
  """
  if os.path.splitext(output_file)[1] != '.pb' or (
      os.path.basename(output_file) == models.SAVED_MODEL_FILE):
    raise FreezeError(
        f'--output_file must be the name of a .pb file like frozen_model_xception.pb, got '
        f'{output_file!r}; --formats adds other formats beside it')
  if output_file.encode(errors='ignore').decode() != output_file:
    raise FreezeError(f'--output_file: the name must be UTF-8, got {output_file!r}')
  folder = os.path.dirname(output_file) or '.'
  if not os.path.isdir(folder):
    raise FreezeError(f'--output_file {output_file}: there is no folder {folder}')
  stem = output_file.removesuffix('.pb')
  paths = {name: output_file if name == 'pb' else stem + formats.FORMATS[name].suffix
           for name in format_names}
  for name, path in paths.items():
    if name == 'saved_model':
      _check_saved_model_path(path)
    elif os.path.isdir(path):
      raise FreezeError(f'{path} is a folder: choose another --output_file')
  return paths


def _check_saved_model_path(path):
  if found := sorted(set(path).intersection(checkpoints.GLOB_CHARACTERS)):
    raise FreezeError(f'{path} contains {" ".join(found)}, which TensorFlow reads as a pattern '
                      'when it loads a SavedModel: choose another --output_file')
  if os.path.lexists(path) and not os.path.isfile(os.path.join(path, models.SAVED_MODEL_FILE)):
    raise FreezeError(f'{path} exists and is not a SavedModel: choose another --output_file')


def check_labels(class_names, path):
  """Raises an error if `path` is not a labels.txt of the same classes."""
  if os.path.lexists(path) and flowers.read_labels_file(path) != class_names:
    raise FreezeError(f'{path} names other classes than the checkpoint: '
                      'choose an --output_file in another folder')


def labels_text(class_names):
  return ''.join(f'{label}:{name}\n' for label, name in enumerate(class_names))


def write_drafts(graph_def, class_names, paths, folder, settings=formats.Settings()):
  """Writes every format and labels.txt into a folder; returns {format: path there}."""
  with open(os.path.join(folder, flowers.LABELS_FILE), 'w', encoding='utf-8') as f:
    f.write(labels_text(class_names))
  drafts = {}
  for name, path in paths.items():
    drafts[name] = os.path.join(folder, os.path.basename(path))
    formats.FORMATS[name].write(graph_def, drafts[name], settings)
  return drafts


def _describe_origin(checkpoint, config, weights, fold, precision, format_names):
  """Returns what model.json says about the making of a file."""
  packages = ['tensorflow', 'tf-slim', 'numpy'] + ['tf2onnx'] * any(
      name.startswith('onnx') for name in format_names)
  return dict(zip(ORIGIN_KEYS, [
      config.image_size, config.depth_multiplier, checkpoint, checkpoints.global_step(checkpoint),
      weights['averaged_weights'], weights['temperature'], fold, precision,
      {'python': platform.python_version(),
       **{name: importlib.metadata.version(name) for name in packages}}]))


def _describe_files(paths, comparisons, origin):
  """Returns the entries of model.json for files: format, SHA-256, comparison, origin."""
  described = []
  for name, path in paths.items():
    for file in models.files_below(path):
      described.append({
          'file': os.path.relpath(file, os.path.dirname(path)), 'format': name,
          'bytes': os.path.getsize(file), 'sha256': files.sha256(file),
          **(comparisons[name]._asdict() if name in comparisons else {}), **origin,
          **(quantization.describe(path) if formats.FORMATS[name].is_calibrated else {})})
  return described


def read_other_files(folder, paths):
  """Returns the entries of an existing model.json for files that this run does not replace.

  Args:
    folder: folder of model.json.
    paths: {format: path} of the files to write.

  Returns:
    List of the entries whose files still have the same content.

  Raises:
    FreezeError: model.json is not one of write_pb.py.
  """
  path = os.path.join(folder, models.MODEL_FILE)
  replaced = {os.path.basename(path) for path in paths.values()}
  try:
    with open(path, encoding='utf-8') as f:
      description = json.load(f)
    # Entries of older versions lack their origin, which is that of the whole model.json.
    origin = {key: description[key] for key in ORIGIN_KEYS if key in description}
    return [{**origin, **entry} for entry in description['files']
            if entry['file'].split(os.sep)[0] not in replaced
            and _has_sha256(os.path.join(folder, entry['file']), entry['sha256'])]
  except FileNotFoundError:
    return []
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise FreezeError(f'{path} was not written by write_pb.py: '
                      'choose an --output_file in another folder') from error


def _has_sha256(path, sha256):
  return os.path.isfile(path) and files.sha256(path) == sha256


def find_metrics(checkpoint, is_averaged, image_size):
  """Returns the metrics.json of eval_flowers.py for exactly these weights, or None.

  Args:
    checkpoint: path of the checkpoint, in a log folder or in its `best`.
    is_averaged: whether the weights are Polyak averages.
    image_size: height and width of the images in pixels.
  """
  folder = os.path.dirname(checkpoint)
  paths = (os.path.join(folder, 'metrics.json'),
           os.path.join(folder, 'eval', 'metrics.json'),
           os.path.join(os.path.dirname(folder), 'eval', 'metrics.json'))
  found = (checkpoints.read_result(path, checkpoint, is_averaged, image_size) for path in paths)
  return next(filter(None, found), None)


def _replace(source, target):
  """Renames a file or a folder, replacing `target` if it exists."""
  if not os.path.isdir(target):
    os.replace(source, target)
    return
  with tempfile.TemporaryDirectory(dir=os.path.dirname(source)) as replaced:
    os.rename(target, os.path.join(replaced, 'old'))
    os.rename(source, target)


def write_models(checkpoint, config, paths, images=None, use_averages='auto', fold=True,
                 precision='float32', settings=formats.Settings(),
                 max_accuracy_loss=comparison.MAX_ACCURACY_LOSS, use_temperature=False):
  """Freezes a checkpoint and writes it in several formats, with labels.txt and model.json.

  No file gets its final name before all have been compared with the checkpoint.

  Args:
    checkpoint: path of the checkpoint.
    config: its ModelConfig.
    paths: {format: path}, from `plan_files`.
    images: comparison.Images to compare on, or None for no comparison.
    use_averages: see `freeze`.
    fold: whether to fold batch norms into the convolutions.
    precision: one of models.PRECISIONS.
    settings: formats.Settings.
    max_accuracy_loss: see `comparison.verify`.
    use_temperature: see `freeze`.

  Returns:
    The weights' description, see `freeze`.

  Raises:
    checkpoints.CheckpointError: see `freeze`.
    comparison.ComparisonError: a file's predictions differ from the checkpoint's.
  """
  folder = os.path.dirname(next(iter(paths.values()))) or '.'
  other_files = read_other_files(folder, paths)
  graph_def, predict, weights = freeze(checkpoint, config, use_averages, use_temperature)
  # Training may delete the checkpoint while the files are written and compared.
  origin = _describe_origin(checkpoint, config, weights, fold, precision, paths)
  metrics = find_metrics(checkpoint, weights['averaged_weights'], config.image_size)
  if fold:
    graph_def = folding.fold(graph_def, models.OUTPUT_NODE)
  if precision == 'bfloat16':
    graph_def = formats.to_bfloat16(graph_def)
  if settings.batch_size:
    graph_def = formats.fix_batch_size(graph_def, settings.batch_size)
  with tempfile.TemporaryDirectory(prefix='write_pb.', suffix='.tmp', dir=folder) as temporary:
    drafts = write_drafts(graph_def, config.class_names, paths, temporary, settings)
    comparisons = comparison.verify(
        drafts, images, predict, precision, max_accuracy_loss) if images else {}
    description = {
        'input_range': [-1, 1],
        'preprocessing': f'central {xception_preprocessing.CENTRAL_FRACTION} of each side, '
                         'resize_bilinear of TensorFlow 1 (align_corners=False), '
                         'RGB / 127.5 - 1',
        'class_names': config.class_names,
        **origin,
        'files': _describe_files(drafts, comparisons, origin) + other_files,
        'metrics': metrics,
    }
    with open(os.path.join(temporary, models.MODEL_FILE), 'w', encoding='utf-8') as f:
      json.dump(description, f, indent=2, ensure_ascii=False)
      f.write('\n')
    for name in os.listdir(temporary):
      _replace(os.path.join(temporary, name), os.path.join(folder, name))
  return weights
