"""Creates a TFRecord dataset from a folder that has one subfolder of images per class.

  python create_tfrecords.py --image_dir flower_photos --dataset_dir my_flowers

Writes shards of training and validation images, labels.txt and, if some files
could not be used, flowers_rejected.csv with the reasons. If --image_dir has the folders
train and validation (or val) or test, each with one subfolder per class, these
become the splits. The same images and seed give the same shards on every machine.
The files get their final names only after all of them are complete.
"""

import argparse
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from common import arguments
from common import terminal
from records import creation
from records import flowers


def parse_args(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                   formatter_class=arguments.HelpFormatter)
  parser.add_argument('--image_dir', type=arguments.path, required=True,
                      help='folder with one subfolder of images per class, or with the folders '
                      'train, validation and test that have these subfolders')
  parser.add_argument('--dataset_dir', type=arguments.path, required=True,
                      help='folder to write to')
  parser.add_argument('--dataset_name', default=flowers.DATASET_NAME,
                      help='prefix of the file names')
  parser.add_argument('--validation_fraction', type=arguments.fraction,
                      help='share of each class that goes to the validation split, unless the '
                      f'images are split already (default: {creation.VALIDATION_FRACTION})')
  parser.add_argument('--num_shards', type=arguments.positive_int,
                      help=f'number of files per split (default: {creation.NUM_SHARDS})')
  parser.add_argument('--seed', type=arguments.non_negative_int, default=0,
                      help='determines the split and the order of the images')
  parser.add_argument('--num_workers', type=arguments.positive_int,
                      help='number of images to decode in parallel (default: one per core)')
  parser.add_argument('--labels_file', type=arguments.path,
                      help='labels.txt with the ids of the classes (default: class names are '
                      'numbered in sorted order)')
  parser.add_argument('--overwrite', action='store_true', help='replace an existing dataset')
  return parser.parse_args(argv)


if __name__ == '__main__':
  arguments.escape_unprintable_output()
  terminal.interrupt_on_kill()
  args = parse_args()
  try:
    creation.create_dataset(
        args.image_dir, args.dataset_dir, args.dataset_name, args.validation_fraction,
        args.num_shards, args.seed, args.num_workers, args.labels_file, args.overwrite)
  except (flowers.DatasetError, OSError) as error:
    sys.exit(f'create_tfrecords.py: {error}')
  except tf.errors.OpError as error:  # what TFRecordWriter raises if, say, the disk is full
    sys.exit(f'create_tfrecords.py: the TFRecords cannot be written: {error.message}')
  except KeyboardInterrupt:
    sys.exit('create_tfrecords.py: interrupted; nothing was written')
  print(f'Wrote {args.dataset_dir}')
