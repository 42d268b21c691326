"""The command line of train_flowers.py."""

import argparse
import dataclasses

import tensorflow.compat.v1 as tf

from common import arguments
from deployment import cluster
from deployment import precision
from deployment import towers
from training import optimization
import xception


def parse_train_args(description, argv=None):
  """Parses the command line of train_flowers.py; returns an argparse.Namespace.

  --recipe sets the defaults of the options that belong to a recipe.
  """
  parser = arguments.ArgumentParser(
      description=description,
      epilog='@FILE reads options from FILE, so that those of a run can be kept.')
  _add_data_options(parser.add_argument_group('data'))
  _add_network_options(parser.add_argument_group('network'))
  _add_optimization_options(parser.add_argument_group('optimization'))
  _add_optimizer_options(parser.add_argument_group('optimizer'))
  _add_fine_tuning_options(parser.add_argument_group('fine-tuning'))
  _add_device_options(parser.add_argument_group('devices'))
  _add_cluster_options(parser.add_argument_group(
      'cluster', 'Several machines train together if TF_CONFIG lists them: see docs/cluster.md.'))
  _add_run_options(parser.add_argument_group('run'))
  recipe_name = parser.parse_known_args(argv)[0].recipe
  parser.set_defaults(**dataclasses.asdict(optimization.RECIPES[recipe_name]))
  args = parser.parse_args(argv)
  if args.use_averages != 'auto' and not args.checkpoint_path:
    parser.error('--use_averages needs --checkpoint_path')
  if args.early_stop_patience and not args.eval_every_epochs:
    parser.error('--early_stop_patience needs --eval_every_epochs')
  return args


def recipe(args):
  """Returns the optimization.Recipe of a command line."""
  return optimization.Recipe(**{field.name: getattr(args, field.name)
                                for field in dataclasses.fields(optimization.Recipe)})


def _add_data_options(group):
  arguments.add_dataset_options(group)
  group.add_argument('--max_bad_fraction', type=arguments.fraction, default=0.01,
                     help='fraction of the records that may be bad before training stops')
  group.add_argument('--batch_size', type=arguments.positive_int, default=16,
                     help='images per step, summed over towers')
  group.add_argument('--accumulate_steps', type=arguments.positive_int, default=1,
                     help='parts of the batch, computed one after another so that a large '
                     'batch fits into memory')
  group.add_argument('--image_size', '--train_image_size', type=arguments.image_size,
                     default=xception.xception.default_image_size,
                     help='height and width of the network\'s input in pixels, '
                     f'{xception.MIN_IMAGE_SIZE} or more')
  group.add_argument('--num_readers', type=arguments.positive_int, default=4,
                     help='groups of 32 records read in parallel')
  group.add_argument('--num_preprocessing_threads', type=arguments.num_threads,
                     default=tf.data.AUTOTUNE,
                     help='number of images preprocessed in parallel; '
                     f'{tf.data.AUTOTUNE} lets TensorFlow choose')
  _add_recipe_options(group, 'min_crop_area')


def _add_network_options(group):
  group.add_argument('--depth_multiplier', type=arguments.positive_float, default=1.0,
                     help='scales the depth of every layer; below 1 for quick trials')
  _add_recipe_options(group, 'dropout_keep_prob', 'batch_norm_decay')


def _add_optimization_options(group):
  group.add_argument('--recipe', choices=sorted(optimization.RECIPES), default='flowers',
                     help='sets the defaults of many options, which are printed when training '
                     'starts; photographs is for some thousand images of your own, imagenet and '
                     "jft are the paper's")
  group.add_argument('--num_epochs', type=arguments.num_epochs, default=40.0,
                     help='number of passes over the training images')
  group.add_argument('--max_number_of_steps', type=arguments.positive_int,
                     help='stops at this step if --num_epochs would end later')
  _add_recipe_options(
      group, 'learning_rate', 'learning_rate_decay_type', 'learning_rate_decay_factor',
      'num_epochs_per_decay', 'num_samples_per_decay', 'staircase', 'end_learning_rate',
      'warmup_epochs', 'weight_decay', 'label_smoothing')
  group.add_argument('--class_weights', choices=['none', 'balanced'], default='none',
                     help='balanced gives every class the same total weight, and first reads '
                     'all records once')
  _add_recipe_options(group, 'clip_gradient_norm', 'moving_average_decay')


def _add_optimizer_options(group):
  _add_recipe_options(group, 'optimizer', 'momentum', 'nesterov', 'rmsprop_decay', 'adam_beta1',
                      'adam_beta2', 'opt_epsilon')


def _add_recipe_options(group, *names):
  """Adds the options that belong to these fields of `optimization.Recipe`."""
  fields = {field.name: field for field in dataclasses.fields(optimization.Recipe)}
  for name in names:
    option = fields[name].metadata
    kind = ({'action': argparse.BooleanOptionalAction} if fields[name].type is bool else
            {'type': option['type'], 'choices': option['choices']})
    group.add_argument(f'--{name}', *option['aliases'], default=fields[name].default,
                       help=option['help'], **kind)


def _add_fine_tuning_options(group):
  group.add_argument('--checkpoint_path', type=arguments.path,
                     help='starts from the weights of this checkpoint, or of the newest one in '
                     'this folder; a head with another number of classes is left out')
  group.add_argument('--use_averages', choices=['auto', 'yes', 'no'], default='auto',
                     help="starts from the Polyak averages of that checkpoint's weights; auto: "
                     'if it has them')
  group.add_argument('--checkpoint_exclude_scopes', type=arguments.scopes, default=(),
                     metavar='SCOPES',
                     help='name prefixes, separated by commas, of variables not to restore, '
                     'like Xception/Logits')
  group.add_argument('--trainable_scopes', type=arguments.scopes, default=(), metavar='SCOPES',
                     help='name prefixes, separated by commas, of the only variables to train; '
                     'other batch norms keep their statistics')
  group.add_argument('--ignore_missing_vars', action='store_true',
                     help='initializes variables that the checkpoint lacks instead of failing')


def _add_device_options(group):
  group.add_argument('--num_clones', type=arguments.positive_int,
                     help='number of towers (default: one on every GPU, or one on the CPU)')
  group.add_argument('--clone_on_cpu', action='store_true',
                     help='places the towers on the CPU')
  group.add_argument('--variable_update', choices=towers.VARIABLE_UPDATES,
                     help='mirrored keeps and updates a copy of the variables on every tower, '
                     'parameter_server keeps them on the CPU (default: mirrored on several GPUs)')
  group.add_argument('--precision', choices=precision.PRECISIONS, default='float32',
                     help='bfloat16 is faster on CPUs, float16 on GPUs; weights stay float32')
  group.add_argument('--xla', action='store_true', help='compiles the graph, on GPUs')


def _add_cluster_options(group):
  group.add_argument('--all_reduce_precision', choices=list(cluster.PRECISIONS),
                     default='float32',
                     help='number format of the gradients that workers exchange; bfloat16 halves '
                     'the traffic and rounds to 3 digits')
  group.add_argument('--startup_timeout_secs', type=arguments.positive_float, default=600,
                     help='seconds that a worker waits at most for its first step, which needs '
                     'all others')
  group.add_argument('--step_timeout_secs', type=arguments.positive_float, default=120,
                     help='seconds without a step after which the other workers count as dead; '
                     'must exceed the time of a checkpoint or an evaluation')
  group.add_argument('--check_weights_steps', type=arguments.positive_int, default=100,
                     help="steps between two comparisons of the workers' weights, which must "
                     'be bit-identical')


def _add_run_options(group):
  group.add_argument('--log_dir', '--train_dir', type=arguments.path, default='./log',
                     help='folder of checkpoints and TensorBoard events')
  group.add_argument('--seed', type=arguments.non_negative_int,
                     help='seed of the initial weights, the order of the images and their '
                     'distortions (default: random for a new --log_dir; a resumed run keeps '
                     'its seed)')
  group.add_argument('--log_every_n_steps', type=arguments.positive_int, default=10,
                     help='steps between two progress lines')
  group.add_argument('--save_summaries_secs', type=arguments.positive_float, default=10,
                     help='seconds between two TensorBoard points')
  group.add_argument('--histograms_every_n_steps', type=arguments.positive_int,
                     help='steps between two histograms of weights and gradients '
                     '(default: none)')
  group.add_argument('--profile_steps', type=arguments.positive_int, nargs='+', metavar='STEP',
                     help='writes a trace of these steps (default: none)')
  group.add_argument('--eval_every_epochs', type=arguments.num_epochs,
                     help='epochs between two evaluations on the validation split; the best '
                     'checkpoint is kept in LOG_DIR/best (default: none)')
  group.add_argument('--early_stop_patience', type=arguments.positive_int, metavar='N',
                     help='stops after N evaluations without improvement (default: never)')
  group.add_argument('--max_to_keep', type=arguments.positive_int, default=5,
                     help='number of checkpoints to keep')
  group = group.add_mutually_exclusive_group()
  group.add_argument('--save_interval_secs', type=arguments.positive_float, default=600,
                     help='seconds between two checkpoints')
  group.add_argument('--save_interval_steps', type=arguments.positive_int,
                     help='steps between two checkpoints, instead of seconds')
