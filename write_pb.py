"""Freezes a checkpoint into one .pb file, and into the formats of other programs.

  python write_pb.py --log_dir log --output_file frozen_model_xception.pb
  python write_pb.py --log_dir log --formats pb,saved_model,tflite,onnx

Writes the graph with its weights as constants and its batch norms folded, input
node `input` (images) and output node `output` (probabilities); labels.txt and
model.json beside it. Everything written is loaded again by its own runtime and
compared with the checkpoint before it gets its name.

A .pb is a program: load only files that you or someone you trust made.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile

import slim_bridge  # noqa: F401, first: it also silences what TensorFlow says at import.

import tensorflow.compat.v1 as tf
import tf_slim as slim

import batch_norm_folding
import checkpoints
import flowers
import frozen_comparison
import frozen_models
import graph_formats
import options
import xception
import xception_preprocessing

TABLE_ROW = '{:<15} {:>12} {:>12} {:>8} {:>9}'


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
  session = tf.Session(graph=tf.Graph())
  with session.graph.as_default():
    images = tf.placeholder(tf.float32, [None, config.image_size, config.image_size, 3],
                            name=frozen_models.INPUT_NODE)
    with slim.arg_scope(xception.xception_arg_scope()):
      _, end_points = xception.xception(
          images, config.num_classes, is_training=False,
          depth_multiplier=config.depth_multiplier)
    output = tf.identity(end_points['Predictions'], name=frozen_models.OUTPUT_NODE)
    saver, is_averaged = checkpoints.inference_saver(checkpoint, use_averages)
    saver.restore(session, checkpoint)
    graph_def = tf.graph_util.convert_variables_to_constants(
        session, session.graph.as_graph_def(), [frozen_models.OUTPUT_NODE])
  return graph_def, lambda batch: session.run(output, {images: batch}), is_averaged


def plan_files(formats, output_file):
  """Returns {format: path} of the files to write; the others follow the .pb's name.

  Raises:
    FreezeError: there is no such folder, or something else is in a file's place.
  """
  folder = os.path.dirname(output_file) or '.'
  if not os.path.isdir(folder):
    raise FreezeError(f'--output_file {output_file}: there is no folder {folder}')
  stem = output_file.removesuffix('.pb')
  paths = {name: output_file if name == 'pb' else stem + graph_formats.FORMATS[name].suffix
           for name in formats}
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


def write_drafts(graph_def, class_names, paths, folder):
  """Writes every format and labels.txt into a folder; returns {format: path there}."""
  with open(os.path.join(folder, flowers.LABELS_FILE), 'w', encoding='utf-8') as f:
    f.write(labels_text(class_names))
  drafts = {}
  for name, path in paths.items():
    drafts[name] = os.path.join(folder, os.path.basename(path))
    graph_formats.FORMATS[name].write(graph_def, drafts[name])
  return drafts


def verify(paths, images, predict, precision):
  """Compares written files with the checkpoint, and prints a table.

  Args:
    paths: {format: path} of files beside their labels.txt.
    images: frozen_comparison.Images.
    predict: the checkpoint's, see `freeze`.
    precision: what the files compute in, one of frozen_models.PRECISIONS.

  Returns:
    {format: frozen_comparison.Comparison}.

  Raises:
    FreezeError: a file is further from the checkpoint than its format allows.
  """
  reference = frozen_comparison.measure(predict, images.preprocessed)
  print(f'Compared on {images.description}; ms an image in batches of '
        f'{frozen_comparison.BATCH_SIZE}')
  print(TABLE_ROW.format('format', 'bytes', 'difference', 'top-1', 'ms'))
  print(TABLE_ROW.format('checkpoint', '', '', '', f'{reference.milliseconds:.1f}'), flush=True)
  comparisons, too_far = {}, []
  for name, path in paths.items():
    comparison = frozen_comparison.compare(frozen_models.load(path), images, reference)
    print(TABLE_ROW.format(
        name, f'{num_bytes(path):,}', f'{comparison.max_difference:.1e}',
        f'{comparison.agreement:.1%}', f'{comparison.milliseconds:.1f}'), flush=True)
    bound = (graph_formats.BFLOAT16_BOUND if precision == 'bfloat16'
             else graph_formats.FORMATS[name].bound)
    if not frozen_comparison.is_close(comparison, bound):
      too_far.append(f'{name} (allowed: {bound:.0e}, '
                     f'{frozen_comparison.MIN_AGREEMENT:.0%} of the classes)')
    comparisons[name] = comparison
  if too_far:
    raise FreezeError('Nothing was written, because this does not compute what the checkpoint '
                      'computes: ' + ', '.join(too_far))
  return comparisons


def num_bytes(path):
  return sum(os.path.getsize(file) for file in frozen_models.files_below(path))


def describe_files(paths, comparisons):
  """Returns what model.json says about the files: format, bytes, SHA-256, comparison."""
  described = []
  for name, path in paths.items():
    for file in frozen_models.files_below(path):
      described.append({
          'file': os.path.relpath(file, os.path.dirname(path)), 'format': name,
          'bytes': os.path.getsize(file), 'sha256': frozen_models.sha256(file),
          **(comparisons[name]._asdict() if name in comparisons else {})})
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


def describe_model(checkpoint, config, args, is_averaged, files):
  """Returns the content of model.json."""
  packages = ['tensorflow', 'tf-slim', 'numpy'] + ['tf2onnx'] * ('onnx' in args.formats)
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
      'folded': not args.nofold,
      'precision': args.precision,
      'versions': {'python': platform.python_version(),
                   **{name: importlib.metadata.version(name) for name in packages}},
      'files': files,
      'metrics': find_metrics(checkpoint),
  }


def replace(source, target):
  """Gives a file or a folder its final name; replaces what had it."""
  if not os.path.isdir(target):
    os.replace(source, target)
    return
  with tempfile.TemporaryDirectory(dir=os.path.dirname(source)) as replaced:
    os.rename(target, os.path.join(replaced, 'old'))
    os.rename(source, target)


def parse_formats(text):
  """The argparse type of a comma-separated list of formats."""
  names = text.split(',')
  unknown = [name for name in names if name not in graph_formats.FORMATS]
  if unknown:
    raise argparse.ArgumentTypeError(
        f'must be of {",".join(graph_formats.FORMATS)}, got {text}')
  return list(dict.fromkeys(names))


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0],
      epilog='A .pb is a program: load only files that you or someone you trust made.',
      formatter_class=options.HelpFormatter)
  parser.add_argument('--log_dir', '--train_dir', default='./log',
                      help='folder that train_flowers.py wrote')
  parser.add_argument('--checkpoint_path',
                      help='freezes this checkpoint, or the newest of this folder '
                      '(default: the newest of --log_dir)')
  parser.add_argument('--use_averages', choices=['auto', 'yes', 'no'], default='auto',
                      help='whether to freeze the Polyak averages of the weights; auto: if '
                      'the checkpoint has them')
  parser.add_argument('--output_file', default='frozen_model_xception.pb',
                      help='the frozen graph; labels.txt, model.json and the other formats '
                      'are written beside it')
  parser.add_argument('--formats', type=parse_formats, default='pb',
                      help=f'comma-separated, of {", ".join(graph_formats.FORMATS)}')
  parser.add_argument('--nofold', action='store_true',
                      help='leaves the batch norms in the graph')
  parser.add_argument('--precision', choices=frozen_models.PRECISIONS, default='float32',
                      help='bfloat16 halves the file and is fast on CPUs with AVX512_BF16 or '
                      'AMX; for pb, saved_model and jpeg_pb')
  group = parser.add_argument_group('comparison with the checkpoint')
  group.add_argument('--verify', action='store_true', default=True,
                     help='loads everything that is written and compares it')
  group.add_argument('--noverify', action='store_false', dest='verify',
                     default=argparse.SUPPRESS, help='writes without looking')
  group.add_argument('--dataset_dir',
                     help='folder of the images to compare on (default: '
                     f'{frozen_comparison.DATASET_DIR}; random images if it is not there)')
  group.add_argument('--dataset_name', default=flowers.DATASET_NAME,
                     help='first part of the dataset files\' names')
  args = parser.parse_args(argv)
  if args.precision == 'bfloat16':
    wrong = [name for name in args.formats if not graph_formats.FORMATS[name].has_bfloat16]
    if wrong or args.nofold:
      parser.error('--precision bfloat16 does not go with '
                   + ('--nofold' if args.nofold else f'--formats {",".join(wrong)}'))
  return args


def main(args):
  checkpoint = checkpoints.find(args.log_dir, args.checkpoint_path)
  config = checkpoints.load_config(checkpoint)
  graph_formats.require_packages(args.formats, args.verify)
  paths = plan_files(args.formats, args.output_file)
  folder = os.path.dirname(args.output_file) or '.'
  check_labels(config.class_names, os.path.join(folder, flowers.LABELS_FILE))
  images = args.verify and frozen_comparison.find_images(
      args.dataset_dir, args.dataset_name, config.image_size)

  graph_def, predict, is_averaged = freeze(checkpoint, config, args.use_averages)
  if not args.nofold:
    graph_def = batch_norm_folding.fold(graph_def, frozen_models.OUTPUT_NODE)
  if args.precision == 'bfloat16':
    graph_def = graph_formats.to_bfloat16(graph_def)

  with tempfile.TemporaryDirectory(prefix='write_pb.', suffix='.tmp', dir=folder) as temporary:
    drafts = write_drafts(graph_def, config.class_names, paths, temporary)
    comparisons = verify(drafts, images, predict, args.precision) if images else {}
    description = describe_model(checkpoint, config, args, is_averaged,
                                 describe_files(drafts, comparisons))
    with open(os.path.join(temporary, frozen_models.MODEL_FILE), 'w', encoding='utf-8') as f:
      json.dump(description, f, indent=2, ensure_ascii=False)
      f.write('\n')
    for name in os.listdir(temporary):
      replace(os.path.join(temporary, name), os.path.join(folder, name))

  print(f'Froze {checkpoint}' + ', averaged weights' * is_averaged
        + f': input node {frozen_models.INPUT_NODE}, float32 [None, {config.image_size}, '
        f'{config.image_size}, 3] in [-1, 1]; output node {frozen_models.OUTPUT_NODE}, float32 '
        f'[None, {config.num_classes}]; {flowers.LABELS_FILE} and {frozen_models.MODEL_FILE} '
        f'in {folder}')
  for path in paths.values():
    print(f'Wrote {path} ({num_bytes(path) / 1e6:.1f} MB)')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    main(parse_args())
  except (checkpoints.CheckpointError, flowers.DatasetError, frozen_models.ModelError,
          graph_formats.FormatError, FreezeError, OSError) as error:
    sys.exit(f'write_pb.py: {error}')
