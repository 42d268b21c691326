"""What the command lines accept: checked numbers for every script, and training's options.

A wrong value ends a script as argparse does, with the option, the value and
the range, before anything is built.
"""

import argparse
import dataclasses
import shlex

import tensorflow.compat.v1 as tf

import cluster
import flowers
import optimization
import precision
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


def scopes(text):
  """An argparse type: variable scopes, separated by commas, as a tuple."""
  return tuple(scope.strip() for scope in text.split(',') if scope.strip())


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
  """Adds the default to an option's help, unless there is none."""

  def _get_help_string(self, action):
    if action.default is None or action.default is False:
      return action.help
    return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
  """Takes options from files too: `@file` stands for the options in it, # begins a comment."""

  def __init__(self, **kwargs):
    super().__init__(fromfile_prefix_chars='@', formatter_class=HelpFormatter, **kwargs)

  def convert_arg_line_to_args(self, arg_line):
    return shlex.split(arg_line, comments=True)


def parse_train_args(description, argv=None):
  """Parses the command line of train_flowers.py; returns an argparse.Namespace.

  The defaults of the recipe's options are those of the recipe that it names.
  """
  parser = ArgumentParser(
      description=description,
      epilog='@FILE stands for the options in FILE, so that those of a run can be kept.')
  _add_data_options(parser.add_argument_group('data'))
  _add_network_options(parser.add_argument_group('network'))
  _add_optimization_options(parser.add_argument_group('optimization'))
  _add_optimizer_options(parser.add_argument_group('optimizer'))
  _add_fine_tuning_options(parser.add_argument_group('fine-tuning'))
  _add_device_options(parser.add_argument_group('devices'))
  _add_cluster_options(parser.add_argument_group(
      'cluster', 'Several machines train together if TF_CONFIG names them; see README.'))
  _add_run_options(parser.add_argument_group('run'))
  recipe_name = parser.parse_known_args(argv)[0].recipe
  parser.set_defaults(**dataclasses.asdict(optimization.RECIPES[recipe_name]))
  args = parser.parse_args(argv)
  if args.early_stop_patience and not args.eval_every_epochs:
    parser.error('--early_stop_patience needs --eval_every_epochs')
  return args


def recipe(args):
  """Returns the optimization.Recipe of a command line."""
  return optimization.Recipe(**{field.name: getattr(args, field.name)
                                for field in dataclasses.fields(optimization.Recipe)})


def _add_data_options(group):
  group.add_argument('--dataset_dir', default='dataset',
                     help='folder of the TFRecords and labels.txt')
  group.add_argument('--dataset_name', default=flowers.DATASET_NAME,
                     help='first part of the files\' names')
  group.add_argument('--max_bad_fraction', type=fraction, default=0.01,
                     help='share of the records that may be bad before training stops')
  group.add_argument('--batch_size', type=positive_int, default=16,
                     help='images per step, summed over towers')
  group.add_argument('--accumulate_steps', type=positive_int, default=1,
                     help='parts of the batch that are computed one after the other, so that '
                     'a large one fits into memory')
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
  _add_recipe_option(group, 'dropout_keep_prob', keep_prob,
                     'share of the features kept in front of the logits')
  _add_recipe_option(group, 'batch_norm_decay', fraction,
                     'decay of the moving statistics, once warmed up')


def _add_optimization_options(group):
  group.add_argument('--recipe', choices=sorted(optimization.RECIPES), default='flowers',
                     help='the defaults of the options of the recipe, which is printed when '
                     'training starts; imagenet and jft are the paper\'s')
  group.add_argument('--num_epochs', type=positive_float, default=40.0,
                     help='how many times every image is seen')
  group.add_argument('--max_number_of_steps', type=positive_int,
                     help='ends training earlier, after this step')
  _add_recipe_option(group, 'learning_rate', positive_float, 'the greatest rate',
                     '--initial_learning_rate')
  _add_recipe_option(group, 'learning_rate_decay_type', None,
                     'polynomial is a straight line to --end_learning_rate, cosine half a wave',
                     choices=['fixed', 'exponential', 'polynomial', 'cosine'])
  _add_recipe_option(group, 'learning_rate_decay_factor', positive_float,
                     'exponential decay: factor of one decay')
  _add_recipe_option(group, 'num_epochs_per_decay', positive_float,
                     'exponential decay: epochs between two decays',
                     '--num_epochs_before_decay')
  _add_recipe_option(group, 'num_samples_per_decay', non_negative_int,
                     'exponential decay: images between two decays, instead of epochs')
  group.add_argument('--staircase', action=argparse.BooleanOptionalAction,
                     default=optimization.Recipe.staircase,
                     help='exponential decay goes down in steps')
  _add_recipe_option(group, 'end_learning_rate', non_negative_float,
                     'the rate does not fall below it')
  _add_recipe_option(group, 'warmup_epochs', non_negative_float,
                     'epochs in which the rate rises from 0 in a line')
  _add_recipe_option(group, 'weight_decay', non_negative_float,
                     'L2 regularization of the kernels; decoupled from the gradient with adamw')
  _add_recipe_option(group, 'label_smoothing', fraction,
                     'share of the label that is spread over all classes')
  group.add_argument('--class_weights', choices=['none', 'balanced'], default='none',
                     help='balanced: rare classes weigh as much as frequent ones; reads all '
                     'records once at the start')
  _add_recipe_option(group, 'clip_gradient_norm', non_negative_float,
                     'greatest global norm of the gradients; 0 does not clip')
  _add_recipe_option(group, 'moving_average_decay', fraction,
                     'of the averages of the weights (Polyak), once warmed up; 0 keeps none')


def _add_optimizer_options(group):
  _add_recipe_option(group, 'optimizer', None, 'sgd has momentum',
                     choices=['adam', 'adamw', 'rmsprop', 'sgd'])
  _add_recipe_option(group, 'momentum', fraction, 'of sgd and rmsprop', '--rmsprop_momentum')
  group.add_argument('--nesterov', action=argparse.BooleanOptionalAction,
                     default=optimization.Recipe.nesterov, help='sgd looks ahead')
  _add_recipe_option(group, 'rmsprop_decay', fraction, 'of the mean square gradient')
  _add_recipe_option(group, 'adam_beta1', fraction, 'decay of the mean gradient')
  _add_recipe_option(group, 'adam_beta2', fraction, 'decay of the mean square gradient')
  _add_recipe_option(group, 'opt_epsilon', positive_float,
                     'added to the denominator by adam, adamw and rmsprop')


def _add_recipe_option(group, name, value_type, text, *other_names, choices=None):
  group.add_argument(f'--{name}', *other_names, type=value_type, choices=choices,
                     default=getattr(optimization.Recipe, name), help=text)


def _add_fine_tuning_options(group):
  group.add_argument('--checkpoint_path',
                     help='starts from the weights of this checkpoint, or of the newest in '
                     'this folder; a head of another number of classes is left out')
  group.add_argument('--checkpoint_exclude_scopes', type=scopes, default=(), metavar='SCOPES',
                     help='does not restore variables whose names begin so (separated by '
                     'commas), like Xception/Logits')
  group.add_argument('--trainable_scopes', type=scopes, default=(), metavar='SCOPES',
                     help='trains variables whose names begin so, and no others; other batch '
                     'norms keep their statistics')
  group.add_argument('--ignore_missing_vars', action='store_true',
                     help='variables that the checkpoint lacks are left as initialized')


def _add_device_options(group):
  group.add_argument('--num_clones', type=positive_int,
                     help='number of towers (default: one on every GPU, or one on the CPU)')
  group.add_argument('--clone_on_cpu', action='store_true',
                     help='puts the towers on the CPU, to try them without GPUs')
  group.add_argument('--precision', choices=precision.PRECISIONS, default='float32',
                     help='bfloat16 is faster on CPUs, float16 on GPUs; weights stay float32')
  group.add_argument('--xla', action='store_true', help='compiles the graph, on GPUs')


def _add_cluster_options(group):
  group.add_argument('--all_reduce_precision', choices=list(cluster.PRECISIONS),
                     default='float32',
                     help='number format of gradients between workers; bfloat16 halves what '
                     'travels and rounds to 3 digits')
  group.add_argument('--startup_timeout_secs', type=positive_float, default=600,
                     help='seconds from the start of this worker to its first step, after which '
                     'it gives up waiting for the others')
  group.add_argument('--step_timeout_secs', type=positive_float, default=120,
                     help='seconds between two steps after which the others are taken for dead; '
                     'more than a checkpoint or an evaluation takes')
  group.add_argument('--check_weights_steps', type=positive_int, default=100,
                     help='steps between two comparisons of the workers\' weights, which must '
                     'be the same to the bit')


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
  group.add_argument('--histograms_every_n_steps', type=positive_int,
                     help='steps between two histograms of weights and gradients '
                     '(default: none)')
  group.add_argument('--profile_steps', type=positive_int, nargs='+', metavar='STEP',
                     help='writes a trace of these steps (default: none)')
  group.add_argument('--eval_every_epochs', type=positive_float,
                     help='epochs between two evaluations on the validation split, the best of '
                     'which is kept in LOG_DIR/best (default: none)')
  group.add_argument('--early_stop_patience', type=positive_int, metavar='N',
                     help='stops after N evaluations without progress (default: never)')
  group.add_argument('--max_to_keep', type=positive_int, default=5,
                     help='newest checkpoints that are kept')
  group = group.add_mutually_exclusive_group()
  group.add_argument('--save_interval_secs', type=positive_float, default=600,
                     help='seconds between two checkpoints')
  group.add_argument('--save_interval_steps', type=positive_int,
                     help='steps between two checkpoints, instead of seconds')
