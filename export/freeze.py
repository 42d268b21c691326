"""Freezes a checkpoint, and writes it in every format that is asked for.

  graph_def, predict, is_averaged = freeze.freeze(checkpoint, config)
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


class FreezeError(Exception):
  """The graph cannot be written where it was asked for, or is not right."""


def freeze(checkpoint, config, use_averages='auto'):
  """Builds the inference graph of a checkpoint, with its weights as constants.

  Args:
    checkpoint: path of the checkpoint.
    config: its ModelConfig.
    use_averages: 'auto', 'yes' or 'no', see `checkpoints.inference_saver`.

  Returns:
    graph_def: tf.GraphDef with nodes `input`, float32
      [None, image_size, image_size, 3] in [-1, 1], and `output`, float32
      [None, num_classes], the softmax.
    predict: function of images, as `input` takes them, that returns the
      checkpoint's own probabilities.
    is_averaged: whether the weights are Polyak averages.
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
          # slim.softmax reshapes by tf.shape, an operation that OpenCV's TFLite reader and
          # GPU delegates lack.
          prediction_fn=lambda logits, scope: tf.nn.softmax(logits, name=scope))
    output = tf.identity(end_points['Predictions'], name=models.OUTPUT_NODE)
    saver, is_averaged = checkpoints.inference_saver(checkpoint, use_averages)
    saver.restore(session, checkpoint)
    graph_def = tf.graph_util.convert_variables_to_constants(
        session, session.graph.as_graph_def(), [models.OUTPUT_NODE])
  return graph_def, lambda batch: session.run(output, {images: batch}), is_averaged


def plan_files(format_names, output_file):
  """Returns {format: path} of the files to write; the others follow the .pb's name.

  Raises:
    FreezeError: there is no such folder, or something else is in a file's place.
  """
  folder = os.path.dirname(output_file) or '.'
  if not os.path.isdir(folder):
    raise FreezeError(f'--output_file {output_file}: there is no folder {folder}')
  stem = output_file.removesuffix('.pb')
  paths = {name: output_file if name == 'pb' else stem + formats.FORMATS[name].suffix
           for name in format_names}
  for name, path in paths.items():
    if name != 'saved_model' and os.path.isdir(path):
      raise FreezeError(f'{path} is a folder: choose another --output_file')
    if name == 'saved_model' and os.path.exists(path) and not (
        os.path.isfile(os.path.join(path, 'saved_model.pb'))):
      raise FreezeError(f'{path} exists and is no SavedModel: choose another --output_file')
  return paths


def check_labels(class_names, path):
  """Refuses to replace a labels.txt that names other classes."""
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      if f.read() != labels_text(class_names):
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


def _describe_files(paths, comparisons):
  """Returns what model.json says about the files: format, bytes, SHA-256, comparison."""
  described = []
  for name, path in paths.items():
    for file in models.files_below(path):
      described.append({
          'file': os.path.relpath(file, os.path.dirname(path)), 'format': name,
          'bytes': os.path.getsize(file), 'sha256': files.sha256(file),
          **(comparisons[name]._asdict() if name in comparisons else {}),
          **(quantization.describe(path) if formats.FORMATS[name].is_calibrated else {})})
  return described


def find_metrics(checkpoint):
  """Returns what eval_flowers.py found of this very checkpoint, or None."""
  path = os.path.join(os.path.dirname(checkpoint), 'eval', 'metrics.json')
  try:
    with open(path, encoding='utf-8') as f:
      metrics = json.load(f)
    same = os.path.basename(metrics['checkpoint']) == os.path.basename(checkpoint)
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return metrics if same else None


def _describe_model(checkpoint, config, is_averaged, fold, precision, described_files):
  """Returns the content of model.json."""
  packages = ['tensorflow', 'tf-slim', 'numpy'] + ['tf2onnx'] * any(
      file['format'].startswith('onnx') for file in described_files)
  return {
      'image_size': config.image_size,
      'input_range': [-1, 1],
      'preprocessing': f'central {xception_preprocessing.CENTRAL_FRACTION} of each side, '
                       'resize_bilinear of TensorFlow 1 (align_corners=False), '
                       'RGB / 127.5 - 1',
      'class_names': config.class_names,
      'depth_multiplier': config.depth_multiplier,
      'checkpoint': checkpoint,
      'global_step': checkpoints.global_step(checkpoint),
      'averaged_weights': is_averaged,
      'folded': fold,
      'precision': precision,
      'versions': {'python': platform.python_version(),
                   **{name: importlib.metadata.version(name) for name in packages}},
      'files': described_files,
      'metrics': find_metrics(checkpoint),
  }


def _replace(source, target):
  """Gives a file or a folder its final name; replaces what had it."""
  if not os.path.isdir(target):
    os.replace(source, target)
    return
  with tempfile.TemporaryDirectory(dir=os.path.dirname(source)) as replaced:
    os.rename(target, os.path.join(replaced, 'old'))
    os.rename(source, target)


def write_models(checkpoint, config, paths, images=None, use_averages='auto', fold=True,
                 precision='float32', settings=formats.Settings(),
                 max_accuracy_loss=comparison.MAX_ACCURACY_LOSS):
  """Freezes a checkpoint and writes it in several formats, labels.txt and model.json beside them.

  Nothing gets its final name before every file was compared with the checkpoint.

  Args:
    checkpoint: path of the checkpoint.
    config: its ModelConfig.
    paths: {format: path}, from `plan_files`.
    images: comparison.Images to compare on; None compares nothing.
    use_averages: see `freeze`.
    fold: whether batch norms are folded into the convolutions.
    precision: one of models.PRECISIONS, what the files compute in.
    settings: formats.Settings.
    max_accuracy_loss: see `comparison.verify`.

  Returns:
    Whether the weights are Polyak averages.

  Raises:
    comparison.ComparisonError: a file does not compute what the checkpoint does.
  """
  folder = os.path.dirname(next(iter(paths.values()))) or '.'
  graph_def, predict, is_averaged = freeze(checkpoint, config, use_averages)
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
    description = _describe_model(checkpoint, config, is_averaged, fold, precision,
                                  _describe_files(drafts, comparisons))
    with open(os.path.join(temporary, models.MODEL_FILE), 'w', encoding='utf-8') as f:
      json.dump(description, f, indent=2, ensure_ascii=False)
      f.write('\n')
    for name in os.listdir(temporary):
      _replace(os.path.join(temporary, name), os.path.join(folder, name))
  return is_averaged
