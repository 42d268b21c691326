"""Trains Xception on the flowers, or on your own TFRecords, data-parallel over towers.

  python train_flowers.py --dataset_dir dataset --log_dir log

Every GPU gets a tower, a replica of the network that works on its part of the
batch, and the towers' gradients are averaged. Writes checkpoints,
`model_config.json` and TensorBoard events to --log_dir. The same command run
again resumes from the newest checkpoint.

With TF_CONFIG in the environment, several workers train together and only the
first of them writes.
"""

import contextlib
import functools
import shlex
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import arguments
from common import checkpoints
from deployment import cluster
from deployment import precision
from deployment import towers
from evaluation import evaluator
from records import flowers
from training import evaluation_hook
from training import fine_tuning
from training import hooks as training_hooks
from training import log_folder
from training import optimization
from training import options
from training import plan as training_plan
from training import saving
from training import step as training_step
import xception

SAVE_IMAGES_SECS = 300  # image summaries are large


def build_graph(plan, args, recipe, workers):
  """Builds the graph from the dataset's files to the weight update; returns a TrainStep."""
  tf.set_random_seed(plan.config.seed)
  global_step = tf.train.get_or_create_global_step()
  learning_rate = optimization.build_learning_rate(
      recipe, training_step.get_or_create_next_image(), plan.dataset.num_samples, args.batch_size,
      plan.total_images)
  optimizer = optimization.build_optimizer(recipe, learning_rate)
  if args.precision == 'float16':
    optimizer = precision.scale_loss(optimizer)
  for dataset in filter(None, [plan.dataset, plan.validation]):
    flowers.require_readable(dataset)
  batch = flowers.load_numbered_batch(
      plan.dataset, args.batch_size, plan.config.image_size, plan.config.image_size,
      is_training=True, seed=plan.config.seed, first_image=plan.first_image,
      num_readers=args.num_readers, num_preprocessing_threads=args.num_preprocessing_threads,
      worker=workers.index, num_workers=workers.size, area_range=(recipe.min_crop_area, 1.0))
  class_weights = None
  if args.class_weights == 'balanced':
    class_weights = optimization.balanced_class_weights(flowers.count_labels(plan.dataset))
  loss_fn = functools.partial(
      training_step.tower_loss, num_classes=plan.config.num_classes, is_training=True,
      depth_multiplier=plan.config.depth_multiplier, dropout_keep_prob=recipe.dropout_keep_prob,
      label_smoothing=recipe.label_smoothing, seed=plan.config.seed, class_weights=class_weights)
  with slim.arg_scope(xception.xception_arg_scope(
      optimization.l2_weight_decay(recipe),
      xception.warmed_up_decay(recipe.batch_norm_decay, global_step))), \
       fine_tuning.arg_scope(args.trainable_scopes):
    return training_step.build_train_step(
        *batch, loss_fn, optimizer, learning_rate, plan.devices, global_step,
        args.accumulate_steps, recipe.clip_gradient_norm, recipe.moving_average_decay,
        args.trainable_scopes, workers, args.all_reduce_precision, args.variable_update)


def restore_weights(plan, args, workers):
  """Decides which weights training starts from, and prints the decision.

  Returns:
    A Scaffold's init_fn that restores --checkpoint_path, or None. Only the chief
    restores: the other workers receive its weights.

  Raises:
    checkpoints.CheckpointError: a checkpoint does not fit the graph.
  """
  if plan.checkpoint:
    checkpoints.check_same_variables(plan.checkpoint)
    if args.checkpoint_path:
      print(f'Warning: --checkpoint_path {args.checkpoint_path} is NOT used: training resumes '
            f'from step {plan.start_step} in {plan.log_dir}. To start from --checkpoint_path, '
            'choose another --log_dir', file=sys.stderr)
    return None
  if not args.checkpoint_path or not workers.is_chief:
    return None
  restoration = fine_tuning.restore(args.checkpoint_path, args.checkpoint_exclude_scopes,
                                    args.ignore_missing_vars, args.use_averages)
  print(restoration.report)
  return restoration.init_fn


def build_hooks(plan, args, train_step, scaffold, evaluations, workers):
  """Returns the hooks that report, save and evaluate a run: {name: hook}."""
  writer = tf.summary.FileWriterCache.get(plan.log_dir)
  hooks = {
      'bad_records': training_hooks.BadRecordsHook(
          train_step.global_step, train_step.positions, plan.dataset, plan.config.seed,
          plan.first_image, args.batch_size, workers, args.max_bad_fraction, writer),
      'progress': training_hooks.ProgressHook(
          train_step.global_step, training_step.get_or_create_next_image(), train_step.loss,
          train_step.accuracy, args.batch_size, workers.size * len(plan.devices), plan,
          args.log_every_n_steps, writer),
  }
  if workers.is_chief:
    hooks.update(build_chief_hooks(plan, args, train_step, scaffold, writer))
  if args.eval_every_epochs:
    hooks['evaluation'] = evaluation_hook.EvaluationHook(
        evaluator.Evaluator(
            plan.validation, plan.config,
            train_step.tower_batch_size, plan.devices, workers=workers),
        train_step.global_step, scaffold.saver, plan.log_dir, plan.config,
        max(1, round(args.eval_every_epochs * plan.steps_per_epoch)), plan.max_steps,
        evaluations, args.early_stop_patience)
  if args.profile_steps:
    hooks['profile'] = training_hooks.ProfileHook(
        train_step.global_step, args.profile_steps, plan.log_dir, writer)
  return hooks


def build_chief_hooks(plan, args, train_step, scaffold, writer):
  """Returns the hooks that write checkpoints and summaries: {name: hook}."""
  log_folder.record_start(plan.log_dir, plan.start_step, plan.dataset, plan.devices, writer)
  hooks = {
      'checkpoints': tf.train.CheckpointSaverHook(
          plan.log_dir, None if args.save_interval_steps else args.save_interval_secs,
          args.save_interval_steps, scaffold=scaffold),
      'scalars': tf.train.SummarySaverHook(
          save_secs=args.save_summaries_secs, summary_writer=writer,
          summary_op=train_step.scalar_summaries),
      'images': tf.train.SummarySaverHook(
          save_secs=SAVE_IMAGES_SECS, summary_writer=writer, summary_op=train_step.image_summaries),
  }
  if args.histograms_every_n_steps:
    hooks['histograms'] = tf.train.SummarySaverHook(
        save_steps=args.histograms_every_n_steps, summary_writer=writer,
        summary_op=train_step.histogram_summaries)
  return hooks


def evaluation_command(args):
  """Returns the shell command that evaluates a run, on the training split if it is the only one."""
  dataset_options = arguments.dataset_options(args)
  options = {**dataset_options, 'log_dir': args.log_dir}
  for split_name in ('validation', 'test'):
    with contextlib.suppress(flowers.DatasetError, OSError):
      flowers.get_split(split_name, **dataset_options)
      break
  else:
    split_name = 'train'
  if split_name != 'validation':
    options['dataset_split_name'] = split_name
  return shlex.join(['python', 'eval_flowers.py', *(
      word for name, value in options.items() for word in (f'--{name}', str(value)))])


def main(args):
  recipe = options.recipe(args)
  workers = cluster.find_workers()
  inputs = training_plan.find_inputs(args, workers.size)
  session_config = towers.session_config(inputs[-1])
  towers.start_threads(session_config, inputs[-1])
  precision.set_session_options(session_config, args.precision, args.xla)
  workers.start(session_config, args.startup_timeout_secs, args.step_timeout_secs)
  with (log_folder.lock(args.log_dir) if workers.is_chief else log_folder.scratch() as log_dir,
        tf.device(workers.device)):
    plan = training_plan.make_plan(args, *inputs, log_dir, workers)
    train(plan, args, recipe, session_config, workers)
  workers.leave()


def train(plan, args, recipe, session_config, workers):
  """Trains from the plan's first step to its last and saves the result."""
  training_plan.show(plan, args, recipe, workers)
  # Every worker compares with the chief's best, so that all stop at the same step.
  evaluations = workers.all_gather(
      evaluation_hook.read_record(plan.log_dir, plan.config, plan.start_step)
      if args.eval_every_epochs else None)[0]
  if plan.start_step >= plan.max_steps and (
      evaluations is None or evaluations['global_step'] == plan.start_step):
    print(f'{plan.log_dir} is already trained to step {plan.start_step}: '
          'raise --num_epochs or --max_number_of_steps, or choose another --log_dir')
    return

  train_step = build_graph(plan, args, recipe, workers)
  num_parameters = sum(v.shape.num_elements()
                       for v in fine_tuning.trainable_variables(args.trainable_scopes))
  print(f'{num_parameters:,} trainable parameters', flush=True)
  workers.require_same(training_plan.settings_to_share(plan, args, recipe))
  scaffold = tf.train.Scaffold(saver=saving.Saver(plan.log_dir, args.max_to_keep),
                               init_fn=restore_weights(plan, args, workers))
  hooks = build_hooks(plan, args, train_step, scaffold, evaluations, workers)
  reached, stopped_by = training_step.run_training(
      train_step, [*workers.hooks(args.check_weights_steps), *hooks.values()], plan,
      session_config, scaffold, workers)

  print(f'Saved step {reached} in {plan.log_dir}' if workers.is_chief else
        f'Stopped at step {reached}, which worker 0 saves')
  if hooks['bad_records'].too_many:
    workers.leave()  # the others wait for this worker
    raise training_step.TrainingError(hooks['bad_records'].too_many)
  if args.eval_every_epochs and hooks['evaluation'].stopped_early:
    print(hooks['evaluation'].stopped_early)
  if stopped_by:
    print(f'Stopped by {stopped_by}: resume with the same command')
  elif workers.is_chief:
    print(f'Next: {evaluation_command(args)}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  arguments.escape_unprintable_output()
  try:
    main(options.parse_train_args(__doc__.split('\n')[0]))
  except (flowers.DatasetError, towers.DeviceError, checkpoints.CheckpointError,
          log_folder.LogFolderError, cluster.ClusterError, training_plan.PlanError,
          training_step.TrainingError, OSError) as error:
    sys.exit(f'train_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('train_flowers.py: interrupted before the first step; nothing was trained')
