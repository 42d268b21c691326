"""Converts the weights of keras.applications.Xception to a slim checkpoint and back.

  python convert_keras_weights.py --keras_weights imagenet --output_checkpoint ckpt/xception.ckpt
  python convert_keras_weights.py --checkpoint log --output_keras xception.keras

The first command writes a checkpoint and its model_config.json, for the
--checkpoint_path of the other scripts; the second writes a file for Keras. Both
networks have the same 236 weights under different names, so a round trip
changes no bit. A whole model is converted only if the slim network reproduces
Keras' outputs; what the slim network cannot compute is refused.
"""

import argparse
import os
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

from common import arguments
from common import checkpoints
from conversion import keras_files
from conversion import keras_models
from conversion import to_keras
from conversion import to_slim
from records import flowers
import xception

OUTPUT_SUFFIXES = ('.keras', '.weights.h5', '.h5')


def checkpoint_name(text):
  """The argparse type of --output_checkpoint."""
  text = arguments.path(text)
  if not os.path.basename(text) or os.path.isdir(text):
    raise argparse.ArgumentTypeError(f'must name a file like ckpt/xception.ckpt, got {text}')
  return text


def keras_file_name(text):
  """The argparse type of --output_keras."""
  text = arguments.path(text)
  if not text.endswith(OUTPUT_SUFFIXES):
    raise argparse.ArgumentTypeError(
        f'must end in {", ".join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}, got {text}')
  return text


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0], formatter_class=arguments.HelpFormatter)
  source = parser.add_argument_group('source').add_mutually_exclusive_group(required=True)
  source.add_argument('--keras_weights', type=arguments.path, metavar='FILE',
                      help='weights or a whole model in .h5, .weights.h5 or .keras, or the word '
                      f'{keras_files.IMAGENET} to let Keras download its ImageNet weights')
  source.add_argument('--checkpoint', type=arguments.path,
                      help='a checkpoint, or a folder whose newest checkpoint is converted')
  slim_group = parser.add_argument_group('from Keras to slim, with --keras_weights')
  slim_group.add_argument('--output_checkpoint', type=checkpoint_name,
                          help='checkpoint to write, like ckpt/xception.ckpt; model_config.json '
                          'is written beside it')
  slim_group.add_argument('--num_classes', type=arguments.non_negative_int,
                          help='number of classes that FILE must have (default: any); with '
                          f'{keras_files.IMAGENET}, 0 leaves the logits out')
  slim_group.add_argument('--image_size', type=arguments.image_size,
                          help='height and width of the images in pixels, if FILE lacks them '
                          f'(default: {xception.xception.default_image_size})')
  slim_group.add_argument('--labels', type=arguments.path,
                          help='a labels.txt with the class names (default: the ImageNet names '
                          f'for {keras_files.IMAGENET}, otherwise class_0, class_1, ...)')
  keras_group = parser.add_argument_group('from slim to Keras, with --checkpoint')
  keras_group.add_argument('--output_keras', type=keras_file_name,
                           help='file to write: .keras or .h5 for a whole model, .weights.h5 for '
                           'weights')
  keras_group.add_argument('--use_averages', choices=['auto', 'yes', 'no'],
                           help='whether to convert the Polyak averages of the weights; auto does '
                           'if the checkpoint has them (default: auto)')
  parser.add_argument('--overwrite', action='store_true', help='replace existing files')
  args = parser.parse_args(argv)

  given, other, output = (('--keras_weights', keras_group, '--output_checkpoint')
                          if args.checkpoint is None else
                          ('--checkpoint', slim_group, '--output_keras'))
  for action in other._group_actions:
    if getattr(args, action.dest) is not None:
      parser.error(f'{action.option_strings[0]} does not go with {given}')
  if getattr(args, output.removeprefix('--')) is None:
    parser.error(f'{given} needs {output}')
  return args


def main(args):
  if args.checkpoint is not None:
    to_keras.convert(args.checkpoint, args.output_keras, args.use_averages or 'auto',
                     args.overwrite)
  else:
    class_names = flowers.read_labels_file(args.labels) if args.labels else None
    to_slim.convert(args.keras_weights, args.output_checkpoint, args.num_classes, args.image_size,
                    class_names, args.overwrite)


if __name__ == '__main__':
  # TensorFlow 2's behavior stays on because Keras needs it. The GPUs may be busy training.
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
  sys.stdout.reconfigure(errors='backslashreplace')  # not every terminal can show every path
  try:
    main(parse_args())
  except (keras_models.ConversionError, checkpoints.CheckpointError, flowers.DatasetError) as error:
    sys.exit(f'convert_keras_weights.py: {error}')
  except KeyboardInterrupt:
    sys.exit('convert_keras_weights.py: interrupted; run it again')
