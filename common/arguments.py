"""Types and formatting of command-line options, shared by all scripts.

A wrong value ends a script the way argparse does: with the option, the value
and the allowed range, before anything is built.
"""

import argparse
import codecs
import os
import shlex
import sys

import tensorflow.compat.v1 as tf

import xception


def checked_number(number_type, is_allowed, allowed):
  """Returns an argparse type that accepts numbers in a range.

  Args:
    number_type: int or float.
    is_allowed: predicate of a number; must be False for NaN.
    allowed: description of the range, for the error message.
  """
  def parse(text):
    try:
      value = number_type(text)
    except ValueError:
      value = None
    if value is None or not is_allowed(value):
      kind = 'a whole number' if number_type is int else 'a number'
      raise argparse.ArgumentTypeError(f'must be {kind} {allowed}, got {text}')
    if number_type is int and value > MAX_INT:
      raise argparse.ArgumentTypeError(f'must be {MAX_INT:,} or less, got {text}')
    return value
  return parse


MAX_IMAGE_SIZE = 10_000  # pixels; one layer's output for one image takes 12.8 GB there
MAX_INT = 10**12  # products with it fit into 64 bits

positive_int = checked_number(int, lambda value: value > 0, 'greater than 0')
non_negative_int = checked_number(int, lambda value: value >= 0, 'of 0 or more')
positive_float = checked_number(float, lambda value: 0 < value < float('inf'), 'greater than 0')
non_negative_float = checked_number(float, lambda value: 0 <= value < float('inf'), 'of 0 or more')
num_epochs = checked_number(float, lambda value: 0 < value <= 1e9,
                            'greater than 0 and at most 1e9')
fraction = checked_number(float, lambda value: 0 <= value < 1, 'of 0 or more and less than 1')
positive_fraction = checked_number(float, lambda value: 0 < value <= 1,
                                   'greater than 0 and at most 1')
image_size = checked_number(
    int, lambda value: xception.MIN_IMAGE_SIZE <= value <= MAX_IMAGE_SIZE,
    f'from {xception.MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}')
num_threads = checked_number(int, lambda value: value > 0 or value == tf.data.AUTOTUNE,
                     f'greater than 0, or {tf.data.AUTOTUNE}')


def path(text):
  """The argparse type of a path: expands ~, and refuses the empty text of an unset variable."""
  if not text:
    raise argparse.ArgumentTypeError('must be a path, got nothing')
  return os.path.expanduser(text)


# The options of add_dataset_options, which are arguments of records.flowers.get_split.
DATASET_OPTIONS = ('dataset_dir', 'dataset_name', 'file_pattern', 'image_key', 'label_key',
                   'labels_offset')


def add_dataset_options(group, dataset_dir='dataset'):
  """Adds the options that say where a dataset is and how its records are to be read.

  Args:
    group: argparse parser or group.
    dataset_dir: default of --dataset_dir; None is `dataset`, if it is there.
  """
  group.add_argument('--dataset_dir', type=path, default=dataset_dir,
                     help='folder of the TFRecords and labels.txt'
                     + ' (default: dataset, if it is there)' * (dataset_dir is None))
  group.add_argument('--dataset_name', help='prefix of the file names (default: flowers)')
  group.add_argument('--file_pattern', type=_file_pattern,
                     help='pattern of the file names instead of --dataset_name, with %%s in place '
                     "of the split, such as '%%s-*' for train-00000-of-00001")
  group.add_argument('--image_key', help='key of the encoded image in a record (default: '
                     'image/encoded)')
  group.add_argument('--label_key', help='key of the label in a record (default: '
                     'image/class/label)')
  group.add_argument('--labels_offset', type=non_negative_int,
                     help='is subtracted from the labels: 1 for records whose labels begin at 1 '
                     '(default: 0)')


def dataset_options(args):
  """Returns the values of the dataset options as keyword arguments of `flowers.get_split`."""
  values = {name: getattr(args, name) for name in DATASET_OPTIONS}
  return {name: value for name, value in values.items() if value is not None}


def _file_pattern(text):
  if '%s' not in text:
    raise argparse.ArgumentTypeError(f"must contain %s in place of the split, got {text}")
  return text


def escape_unprintable_output():
  """Lets scripts print any text: what the output's encoding lacks is escaped."""
  sys.stdout.reconfigure(errors='backslashreplace')


def scopes(text):
  """The argparse type of a comma-separated list of variable scopes; returns a tuple."""
  return tuple(scope.strip() for scope in text.split(',') if scope.strip())


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
  """Appends the default to an option's help text, where it has one."""

  def _get_help_string(self, action):
    if action.default is None or action.default is False:
      return action.help
    return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
  """Also reads options from files: `@FILE` stands for the options in FILE; # starts a comment."""

  def __init__(self, **kwargs):
    super().__init__(fromfile_prefix_chars='@', formatter_class=HelpFormatter, **kwargs)

  def parse_known_args(self, args=None, namespace=None):
    try:
      return super().parse_known_args(args, namespace)
    except RecursionError:
      self.error('an @FILE includes itself')
    except UnicodeDecodeError as error:
      self.error(f'an @FILE is not UTF-8 text: {error}')

  def convert_arg_line_to_args(self, arg_line):
    try:
      return shlex.split(arg_line.lstrip(codecs.BOM_UTF8.decode()), comments=True)
    except ValueError as error:
      self.error(f'the line {arg_line!r} of an @FILE has {str(error).lower()}: put double '
                 'quotes around text that contains an apostrophe')
