"""What the command lines accept: checked numbers for every script, and training's options.

A wrong value ends a script as argparse does, with the option, the value and
the range, before anything is built.
"""

import argparse

import tensorflow.compat.v1 as tf

import flowers
import xception


def number(number_type, is_allowed, allowed):
  """Returns an argparse type.

  Args:
    number_type: int or float.
    is_allowed: function of a number; it is False for NaN too.
    allowed: which numbers are, for the message.
  """
  def parse(text):
    try:
      value = number_type(text)
    except ValueError:
      value = None
    if value is None or not is_allowed(value):
      kind = 'a whole number' if number_type is int else 'a number'
      raise argparse.ArgumentTypeError(f'must be {kind} {allowed}, got {text}')
    return value
  return parse


positive_int = number(int, lambda value: value > 0, 'greater than 0')
non_negative_int = number(int, lambda value: value >= 0, 'of 0 or more')
positive_float = number(float, lambda value: 0 < value < float('inf'), 'greater than 0')
non_negative_float = number(float, lambda value: 0 <= value < float('inf'), 'of 0 or more')
fraction = number(float, lambda value: 0 <= value < 1, 'of 0 or more and less than 1')
keep_prob = number(float, lambda value: 0 < value <= 1, 'greater than 0 and at most 1')
image_size = number(int, lambda value: value >= xception.MIN_IMAGE_SIZE,
                    f'of {xception.MIN_IMAGE_SIZE} or more')
num_threads = number(int, lambda value: value > 0 or value == tf.data.AUTOTUNE,
                     f'greater than 0, or {tf.data.AUTOTUNE}')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
  """Adds the default to an option's help, unless there is none."""

  def _get_help_string(self, action):
    if action.default is None or action.default is False:
      return action.help
    return super()._get_help_string(action)


def parse_train_args(description, argv=None):
  """Parses the command line of train_flowers.py; returns an argparse.Namespace."""
  parser = argparse.ArgumentParser(
      description=description, formatter_class=HelpFormatter)
  _add_data_options(parser.add_argument_group('data'))
  _add_network_options(parser.add_argument_group('network'))
  _add_optimization_options(parser.add_argument_group('optimization'))
  _add_optimizer_options(parser.add_argument_group('optimizer'))
  _add_device_options(parser.add_argument_group('devices'))
  _add_run_options(parser.add_argument_group('run'))
  return parser.parse_args(argv)
def _add_data_options(group):
  group.add_argument('--dataset_dir', default='dataset',
                     help='folder of the TFRecords and labels.txt')
  group.add_argument('--dataset_name', default=flowers.DATASET_NAME,
                     help='first part of the files\' names')
  group.add_argument('--max_bad_fraction', type=fraction, default=0.01,
                     help='share of the records that may be bad before training stops')
  group.add_argument('--batch_size', type=positive_int, default=16,
                     help='images per step, summed over towers')
  group.add_argument('--image_size', '--train_image_size', type=image_size,
                     default=xception.xception.default_image_size,
                     help='height and width of the network\'s input in pixels, '
                     f'{xception.MIN_IMAGE_SIZE} or more')
  group.add_argument('--num_readers', type=positive_int, default=4,
                     help='files read at the same time')
  group.add_argument('--num_preprocessing_threads', type=num_threads, default=tf.data.AUTOTUNE,
                     help='images preprocessed at the same time; '
                     f'{tf.data.AUTOTUNE} finds the best number')


def _add_network_options(group):
  group.add_argument('--depth_multiplier', type=positive_float, default=1.0,
                     help='scales the depth of every layer; below 1 for quick trials')
  group.add_argument('--dropout_keep_prob', type=keep_prob, default=0.5,
                     help='share of the features kept in front of the logits')
  group.add_argument('--batch_norm_decay', type=fraction, default=0.99,
                     help='decay of the moving statistics, once warmed up')


def _add_optimization_options(group):
  group.add_argument('--num_epochs', type=positive_float, default=40.0,
                     help='how many times every image is seen')
  group.add_argument('--max_number_of_steps', type=positive_int,
                     help='ends training earlier, after this step')
  group.add_argument('--learning_rate', '--initial_learning_rate', type=positive_float,
                     default=0.002, help='at the first step')
  group.add_argument('--learning_rate_decay_type', default='polynomial',
                     choices=['fixed', 'exponential', 'polynomial'],
                     help='polynomial is a straight line to --end_learning_rate')
  group.add_argument('--learning_rate_decay_factor', type=positive_float, default=0.94,
                     help='exponential decay: factor of one decay')
  group.add_argument('--num_epochs_per_decay', '--num_epochs_before_decay',
                     type=positive_float, default=2.0,
                     help='exponential decay: epochs between two decays')
  group.add_argument('--end_learning_rate', type=non_negative_float, default=0.00001,
                     help='the rate does not fall below it')
  group.add_argument('--weight_decay', type=non_negative_float, default=0.00001,
                     help='L2 regularization of the kernels')
  group.add_argument('--label_smoothing', type=fraction, default=0.0,
                     help='share of the label that is spread over all classes')


def _add_optimizer_options(group):
  group.add_argument('--optimizer', choices=['adam', 'rmsprop', 'sgd'], default='adam',
                     help='sgd has momentum')
  group.add_argument('--momentum', '--rmsprop_momentum', type=fraction, default=0.9,
                     help='of sgd and rmsprop')
  group.add_argument('--rmsprop_decay', type=fraction, default=0.9,
                     help='of the mean square gradient')
  group.add_argument('--adam_beta1', type=fraction, default=0.9,
                     help='decay of the mean gradient')
  group.add_argument('--adam_beta2', type=fraction, default=0.999,
                     help='decay of the mean square gradient')
  group.add_argument('--opt_epsilon', type=positive_float, default=1e-7,
                     help='added to the denominator by adam and rmsprop')


def _add_device_options(group):
  group.add_argument('--num_clones', type=positive_int,
                     help='number of towers (default: one on every GPU, or one on the CPU)')
  group.add_argument('--clone_on_cpu', action='store_true',
                     help='puts the towers on the CPU, to try them without GPUs')


def _add_run_options(group):
  group.add_argument('--log_dir', '--train_dir', default='./log',
                     help='folder of checkpoints and TensorBoard events')
  group.add_argument('--seed', type=non_negative_int,
                     help='of the weights, the order and the distortions (default: drawn '
                     'for a new --log_dir, kept for an old one)')
  group.add_argument('--log_every_n_steps', type=positive_int, default=10,
                     help='steps between two lines of progress')
  group.add_argument('--save_summaries_secs', type=positive_float, default=10,
                     help='seconds between two TensorBoard points')
  group = group.add_mutually_exclusive_group()
  group.add_argument('--save_interval_secs', type=positive_float, default=600,
                     help='seconds between two checkpoints')
  group.add_argument('--save_interval_steps', type=positive_int,
                     help='steps between two checkpoints, instead of seconds')
