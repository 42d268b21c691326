"""Freezes a checkpoint into a .pb file or into formats for other programs.

  python write_pb.py --log_dir log --output_file frozen_model_xception.pb
  python write_pb.py --log_dir log --formats pb,saved_model,tflite,onnx

Writes the graph with constant weights and folded batch norms, with the input node
`input` (images) and the output node `output` (probabilities), and labels.txt and
model.json beside it. Every file is loaded by its own runtime and compared with
the checkpoint before it gets its final name.

A .pb is a program: load only files that you or someone you trust made.
"""

import argparse
import dataclasses
import os
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from common import arguments
from common import checkpoints
from common import errors
from common import terminal
from export import comparison
from export import formats
from export import freeze
from export import models
from export import quantization
from records import flowers


def parse_formats(text):
  """The argparse type of a comma-separated list of formats."""
  names = text.split(',')
  unknown = [name for name in names if name not in formats.FORMATS]
  if unknown:
    raise argparse.ArgumentTypeError(f'must be among {",".join(formats.FORMATS)}, got {text}')
  return list(dict.fromkeys(names))


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0],
      epilog='Models that decode images themselves (jpeg_pb, and the signature "encoded" of '
      'saved_model) blend transparent pixels with white but ignore an EXIF orientation, which '
      'TensorFlow cannot read. classify_image.py turns every image upright before such a model '
      'gets it; other programs have to do the same. A .pb is a program: load only files that you '
      'or someone you trust made.',
      formatter_class=arguments.HelpFormatter)
  parser.add_argument('--log_dir', '--train_dir', type=arguments.path, default='./log',
                      help='folder that train_flowers.py wrote')
  parser.add_argument('--checkpoint_path', type=arguments.path,
                      help='freezes this checkpoint, or the newest of this folder '
                      '(default: the newest of --log_dir)')
  parser.add_argument('--use_averages', choices=['auto', 'yes', 'no'], default='auto',
                      help='whether to freeze the Polyak averages of the weights; auto: if the '
                      'checkpoint has them')
  parser.add_argument('--temperature', action='store_true',
                      help='divides logits by the temperature of eval_flowers.py --fit_temperature')
  parser.add_argument('--output_file', type=arguments.path, default='frozen_model_xception.pb',
                      help='name of the frozen graph, ending in .pb; the other formats are named '
                      'after it, and labels.txt and model.json are written beside it')
  parser.add_argument('--formats', type=parse_formats, default='pb',
                      help=f'comma-separated formats: {", ".join(formats.FORMATS)}')
  parser.add_argument('--image_size', '--eval_image_size', type=arguments.image_size,
                      help='height and width of the images in pixels; the network takes any size '
                      '(default: the size it was trained with)')
  parser.add_argument('--nofold', action='store_true',
                      help='keeps the batch norms in the graph')
  parser.add_argument('--precision', choices=models.PRECISIONS, default='float32',
                      help='bfloat16 halves the file size and is fast on CPUs with AVX512_BF16 '
                      'or AMX; for pb, saved_model and jpeg_pb')
  parser.add_argument('--batch_size', type=arguments.positive_int,
                      help='fixes the first dimension of the input in every format (default: '
                      'any number of images)')
  parser.add_argument('--opset', type=arguments.positive_int, default=formats.ONNX_OPSET,
                      help=f'version of the ONNX operators, {formats.MIN_ONNX_OPSET} or newer')
  parser.add_argument('--nchw', action='store_true',
                      help='gives ONNX the input [n, 3, image_size, image_size]')
  group = parser.add_argument_group('formats with 8-bit activations')
  group.add_argument('--calibration_images', type=arguments.positive_int,
                     default=quantization.CALIBRATION_IMAGES,
                     help='training images that give the range of every activation')
  group.add_argument('--max_accuracy_loss', type=arguments.fraction,
                     default=comparison.MAX_ACCURACY_LOSS,
                     help='validation accuracy that they may lose; 0.01 is one point')
  group = parser.add_argument_group('comparison with the checkpoint')
  group.add_argument('--noverify', action='store_false', dest='verify',
                     help='writes the files without comparing them')
  arguments.add_dataset_options(group, dataset_dir=None)
  args = parser.parse_args(argv)
  if not any(name.startswith('onnx') for name in args.formats) and (
      args.nchw or args.opset != formats.ONNX_OPSET):
    parser.error('--nchw and --opset apply to the ONNX formats: add one to --formats')
  if args.precision == 'bfloat16':
    wrong = [name for name in args.formats if not formats.FORMATS[name].has_bfloat16]
    if wrong or args.nofold:
      parser.error('--precision bfloat16 cannot be combined with '
                   + ('--nofold' if args.nofold else f'--formats {",".join(wrong)}'))
  return args


def main(args):
  checkpoint = checkpoints.find(args.log_dir, args.checkpoint_path)
  config = checkpoints.load_config(checkpoint)
  config = dataclasses.replace(config, image_size=args.image_size or config.image_size)
  formats.require_packages(args.formats, args.verify, args.opset)
  paths = freeze.plan_files(args.formats, args.output_file)
  folder = os.path.dirname(args.output_file) or '.'
  freeze.check_labels(config.class_names, os.path.join(folder, flowers.LABELS_FILE))
  dataset_options = arguments.dataset_options(args)
  images = comparison.find_images(config.image_size, **dataset_options) if args.verify else None
  if images and images.class_names != config.class_names:
    images = images._replace(labels=None)  # they say nothing about these classes
  calibration_images = None
  if any(formats.FORMATS[name].is_calibrated for name in args.formats):
    if args.verify:
      comparison.require_labels(images, config.class_names)
    calibration_images = quantization.read_calibration_images(
        config.class_names, config.image_size, args.calibration_images,
        **{'dataset_dir': comparison.DATASET_DIR, **dataset_options})
  settings = formats.Settings(args.batch_size, args.opset, args.nchw, calibration_images)
  weights = freeze.write_models(
      checkpoint, config, paths, images, args.use_averages, not args.nofold, args.precision,
      settings, args.max_accuracy_loss, args.temperature)
  print(f'Froze {checkpoint}' + ', averaged weights' * weights['averaged_weights']
        + (f', logits divided by {weights["temperature"]:.4g}' if args.temperature else '')
        + f': input node {models.INPUT_NODE}, float32 [{args.batch_size}, {config.image_size}, '
        f'{config.image_size}, 3] in [-1, 1]; output node {models.OUTPUT_NODE}, float32 '
        f'[{args.batch_size}, {config.num_classes}]; {flowers.LABELS_FILE} and {models.MODEL_FILE} '
        f'in {folder}')
  for path in paths.values():
    print(f'Wrote {path} ({models.num_bytes(path) / 1e6:.1f} MB)')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  arguments.escape_unprintable_output()
  terminal.interrupt_on_kill()
  # GPUs may compute float32 in TF32, with which the comparison would exceed its bounds.
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
  try:
    main(parse_args())
  except (checkpoints.CheckpointError, flowers.DatasetError, models.ModelError,
          formats.FormatError, comparison.ComparisonError, freeze.FreezeError, OSError) as error:
    sys.exit(f'write_pb.py: {error}')
  except tf.errors.OpError as error:  # what writing a SavedModel raises if, say, the disk is full
    sys.exit(f'write_pb.py: nothing was written: {errors.reason(error)}')
  except KeyboardInterrupt:
    sys.exit('write_pb.py: interrupted; nothing was written')
