"""Trains Xception on the flowers, or on your own TFRecords, data-parallel over towers.

  python train_flowers.py --dataset_dir dataset --log_dir log

Every GPU of the machine gets a tower, a replica of the network that works on
its part of the batch; their gradients are averaged. Writes checkpoints,
`model_config.json` and TensorBoard events into --log_dir. The same command
again resumes where the last checkpoint was written.

With TF_CONFIG in the environment it is one of several workers that train
together; only the first of them writes.
"""

import collections
import functools
import sys

import slim_bridge  # noqa: F401, first: it also silences what TensorFlow says at import.

import tensorflow.compat.v1 as tf
import tf_slim as slim

import checkpoints
import cluster
import evaluation
import evaluation_hook
import fast_operations
import fine_tuning
import flowers
import log_folder
import optimization
import options
import precision
import towers
import training_hooks
import training_plan
import xception

MAX_IMAGE_SUMMARIES = 4
SAVE_IMAGES_SECS = 300  # image summaries fill a disk sooner than anything else
SAVE_OPS = ('SaveV2', 'MergeV2Checkpoints')

TrainStep = collections.namedtuple('TrainStep', [
    'train_op',  # updates everything once
    'global_step',  # int64 [], as it is after train_op
    'loss',  # float32 [], with regularization, as it was before train_op
    'accuracy',  # float32 [], top-1 of the batch
    'positions',  # int64 [images of this worker], in the endless row
    'finite_check',  # the op that fails when the loss or a gradient is not finite
    'scalar_summaries',  # string []
    'image_summaries',  # string []
    'histogram_summaries',  # string [], of weights and gradients
])

class TrainingError(Exception):
  """Training cannot start or go on; the message says why and what to do."""


def tower_loss(images, labels, positions, num_classes, is_training, depth_multiplier,
               dropout_keep_prob, label_smoothing, seed, class_weights=None):
  """Runs the network on one tower's images.

  Args:
    images: float32 [batch, height, width, 3] in [-1, 1].
    labels: int64 [batch] in [0, num_classes).
    positions: int64 [batch], of the images in the endless row.
    num_classes, is_training, depth_multiplier, dropout_keep_prob: see
      `xception.xception`.
    label_smoothing: float in [0, 1), share of the label spread over all classes.
    seed: int, of dropout; it drops others at every position.
    class_weights: list of num_classes floats that multiply the images' losses,
      or None.

  Returns:
    cross_entropy: float32 [], mean over the images, without regularization.
    accuracy: float32 [], top-1, in [0, 1].
  """
  logits, _ = xception.xception(
      images, num_classes, is_training, dropout_keep_prob,
      dropout_seed=tf.stack([tf.constant(seed, tf.int64), positions[0]]),
      depth_multiplier=depth_multiplier)
  cross_entropy = tf.losses.softmax_cross_entropy(
      tf.one_hot(labels, num_classes), logits, label_smoothing=label_smoothing,
      weights=tf.gather(class_weights, labels) if class_weights else 1.0,
      loss_collection=None, reduction=tf.losses.Reduction.SUM_OVER_BATCH_SIZE)
  correct = tf.equal(tf.argmax(logits, 1), labels)
  return cross_entropy, tf.reduce_mean(tf.cast(correct, tf.float32))


def build_train_step(images, labels, positions, loss_fn, optimizer, learning_rate, devices,
                     global_step, accumulate_steps=1, clip_gradient_norm=0.0,
                     moving_average_decay=0.0, trainable_scopes=(), workers=cluster.Alone(),
                     all_reduce_precision='float32'):
  """Builds one step: towers, averaged gradients, the update of the weights.

  Args:
    images, labels, positions: this worker's part of the global batch, from
      `flowers.load_numbered_batch`.
    loss_fn: `tower_loss` with everything but images, labels, positions given.
    optimizer: tf.train.Optimizer.
    learning_rate: float32 [], for the summaries.
    devices: device of each tower.
    global_step: int64 [] variable, counted up by the step.
    accumulate_steps: int, parts of a tower's images that are computed in turn.
    clip_gradient_norm, moving_average_decay: see `optimization.Recipe`.
    trainable_scopes: see `fine_tuning`.
    workers, all_reduce_precision: who trains, and see their `average`.

  Returns:
    A TrainStep.
  """
  def tower(*tower_batch):
    with fast_operations.override():
      cross_entropy, accuracy = loss_fn(*tower_batch)
    variables = fine_tuning.trainable_variables(trainable_scopes)
    return cross_entropy, accuracy, optimizer.compute_gradients(cross_entropy, variables)

  losses, accuracies, tower_gradients = zip(*towers.replicate(
      towers.accumulate(tower, accumulate_steps), devices, images, labels, positions))

  with tf.device(towers.variables_device(devices)):
    # Here every tower waits for the slowest.
    gradients = towers.average_gradients(tower_gradients)
    # And here every worker, for the workers' mean.
    gradients, variables = zip(*gradients)
    gradients = list(zip(workers.average(gradients, all_reduce_precision), variables))
    cross_entropy, accuracy, last_position = workers.combine(
        tf.add_n(losses) / len(losses), tf.add_n(accuracies) / len(accuracies), positions[-1])

    # The weights are shared, so their L2 and its gradient are added once.
    regularization = tf.losses.get_regularization_loss()
    decays = tf.gradients(regularization, variables)
    gradients = [(gradient if decay is None else gradient + decay, variable)
                 for (gradient, variable), decay in zip(gradients, decays)]
    loss = tf.add(cross_entropy, regularization, name='total_loss')
    gradient_norm = tf.global_norm([gradient for gradient, _ in gradients])

    # In front of the update: weights that are saved are never NaN.
    finite_check = tf.debugging.check_numerics(
        loss if precision.scales_loss(optimizer) else loss + gradient_norm,
        'loss or gradient', name='finite_check')
    # Saved with the weights: where a resumed run goes on.
    next_image = tf.get_variable(checkpoints.NEXT_IMAGE, [], tf.int64, tf.zeros_initializer(),
                                 trainable=False)
    statistics_updates = workers.average_variables(
        fine_tuning.moving_statistics(trainable_scopes), towers.first_tower_updates())
    with tf.control_dependencies([finite_check, *statistics_updates]):
      train_op = tf.group(
          next_image.assign(last_position + 1),
          optimizer.apply_gradients(
              optimization.clip_gradients(gradients, gradient_norm, clip_gradient_norm),
              global_step))
    if moving_average_decay:
      averages = tf.train.ExponentialMovingAverage(moving_average_decay, global_step)
      with tf.control_dependencies([train_op]):
        train_op = averages.apply(slim.get_model_variables())
    with tf.control_dependencies([train_op]):
      step_after = global_step.read_value()

  scalar_summaries = tf.summary.merge([
      tf.summary.scalar('losses/total_loss', loss),
      tf.summary.scalar('losses/cross_entropy', cross_entropy),
      tf.summary.scalar('losses/regularization', regularization),
      tf.summary.scalar('accuracy', accuracy),
      tf.summary.scalar('learning_rate', learning_rate),
      tf.summary.scalar('gradient_norm', gradient_norm),
  ])
  histogram_summaries = tf.summary.merge([
      tf.summary.histogram(f'{kind}/{variable.op.name}', tensor)
      for gradient, variable in gradients
      for kind, tensor in (('weights', variable), ('gradients', gradient))])
  image_summaries = tf.summary.image('distorted_images', images, MAX_IMAGE_SUMMARIES)
  return TrainStep(train_op, step_after, loss, accuracy, positions, finite_check.op,
                   scalar_summaries, image_summaries, histogram_summaries)


def run_training(step, hooks, log_dir, session_config, start_step, max_steps, scaffold, workers):
  """Runs training steps until max_steps or a signal.

  Args:
    step: TrainStep of the default graph.
    hooks: session hooks.
    log_dir: folder of checkpoints and events; a checkpoint in it is restored.
    session_config: tf.ConfigProto.
    start_step, max_steps: the steps that training starts from and ends with.
    scaffold: tf.train.Scaffold; its init_fn restores weights from elsewhere if
      log_dir holds no checkpoint.
    workers: cluster.Workers or Alone.

  Returns:
    The step reached, and the name of the signal or the worker that ended
    training, or None.

  Raises:
    TrainingError: the loss or a gradient was not finite, or saving failed.
    cluster.ClusterError: another worker is gone.
  """
  stop_on_signal = training_hooks.StopOnSignalHook(workers)
  hooks = [stop_on_signal, tf.train.StopAtStepHook(last_step=max_steps), *hooks]
  reached = start_step
  try:
    # No MonitoredSession: when another worker is gone it would begin anew for ever.
    with tf.train.SingularMonitoredSession(
        hooks, scaffold, workers.master, session_config, checkpoint_dir=log_dir) as session:
      while not session.should_stop():
        _, reached = session.run([step.train_op, step.global_step])
  except tf.errors.OpError as error:
    if error.op is step.finite_check:
      in_log_dir = f' in {log_dir}' if workers.is_chief else ''
      raise TrainingError(
          f'The loss or a gradient is not finite at step {reached + 1}. The weights were '
          f'not updated with it; the last checkpoint{in_log_dir} is good. A smaller '
          '--learning_rate may help') from error
    # What fails outside of a session has no op: it is a file.
    if error.op is None or error.op.type in SAVE_OPS:
      raise TrainingError(
          f'Cannot save in {log_dir}: {error.message.splitlines()[0]}. The '
          'checkpoint before it is whole: make room, then resume with the same command'
          ) from error
    if error.op.type == 'RestoreV2':
      raise TrainingError(f'Cannot restore the newest checkpoint of {log_dir}: '
                          f'{error.message.splitlines()[0]}') from error
    if lost := workers.explain(error):
      raise lost from error
    raise
  return reached, stop_on_signal.received or workers.stopped_by


def build_graph(plan, args, recipe, workers):
  """Builds the graph, from the files of the dataset to the update of the weights.

  Returns:
    A TrainStep.
  """
  tf.set_random_seed(plan.config.seed)
  global_step = tf.train.get_or_create_global_step()
  learning_rate = optimization.build_learning_rate(
      recipe, global_step, plan.steps_per_epoch, args.batch_size, plan.max_steps)
  optimizer = optimization.build_optimizer(recipe, learning_rate)
  if args.precision == 'float16':
    optimizer = precision.scale_loss(optimizer)
  flowers.require_readable(plan.dataset)
  batch = flowers.load_numbered_batch(
      plan.dataset, args.batch_size, plan.config.image_size, plan.config.image_size,
      is_training=True, seed=plan.config.seed, first_image=plan.first_image,
      num_readers=args.num_readers, num_preprocessing_threads=args.num_preprocessing_threads,
      worker=workers.index, num_workers=workers.size)
  class_weights = None
  if args.class_weights == 'balanced':
    class_weights = optimization.balanced_class_weights(flowers.count_labels(plan.dataset))
  loss_fn = functools.partial(
      tower_loss, num_classes=plan.config.num_classes, is_training=True,
      depth_multiplier=plan.config.depth_multiplier, dropout_keep_prob=recipe.dropout_keep_prob,
      label_smoothing=recipe.label_smoothing, seed=plan.config.seed, class_weights=class_weights)
  with slim.arg_scope(xception.xception_arg_scope(
      optimization.l2_weight_decay(recipe),
      xception.warmed_up_decay(recipe.batch_norm_decay, global_step))), \
       fine_tuning.arg_scope(args.trainable_scopes):
    return build_train_step(
        *batch, loss_fn, optimizer, learning_rate, plan.devices, global_step,
        args.accumulate_steps, recipe.clip_gradient_norm, recipe.moving_average_decay,
        args.trainable_scopes, workers, args.all_reduce_precision)


def restore_weights(plan, args, workers):
  """Decides which weights training starts from, and says it.

  Returns:
    A function of a Scaffold and a session that restores the weights of
    --checkpoint_path, or None; other workers than the chief receive its weights.

  Raises:
    checkpoints.CheckpointError: a checkpoint does not fit the graph.
  """
  if plan.checkpoint:
    checkpoints.check_same_variables(plan.checkpoint)
    if args.checkpoint_path:
      print(f'Warning: --checkpoint_path {args.checkpoint_path} is NOT used, because '
            f'{plan.log_dir} already holds step {plan.start_step} and training resumes there. '
            'To start from --checkpoint_path, choose another --log_dir', file=sys.stderr)
    return None
  if not args.checkpoint_path or not workers.is_chief:
    return None
  restoration = fine_tuning.restore(args.checkpoint_path, args.checkpoint_exclude_scopes,
                                    args.ignore_missing_vars)
  print(restoration.report)
  return restoration.init_fn


def build_hooks(plan, args, step, scaffold, workers):
  """Returns the hooks of a run that watch and save it: {name: hook}."""
  writer = tf.summary.FileWriterCache.get(plan.log_dir)
  hooks = {
      'bad_records': training_hooks.BadRecordsHook(
          step.global_step, step.positions, plan.dataset, plan.config.seed, plan.first_image,
          args.batch_size, workers, args.max_bad_fraction, writer),
      'progress': training_hooks.ProgressHook(
          step.global_step, step.loss, step.accuracy, args.batch_size,
          workers.size * len(plan.devices), plan.dataset.num_samples, plan.max_steps,
          args.log_every_n_steps, writer),
  }
  if workers.is_chief:
    hooks.update(build_chief_hooks(plan, args, step, scaffold, writer))
  if args.eval_every_epochs:
    # All workers decide by the chief's record, so that they stop together.
    best = workers.exchange(evaluation_hook.read_best(plan.log_dir))[0]
    hooks['evaluation'] = evaluation_hook.EvaluationHook(
        evaluation.Evaluator(
            plan.validation, plan.config,
            args.batch_size // (workers.size * len(plan.devices)), plan.devices, workers=workers),
        step.global_step, scaffold.saver, plan.log_dir, plan.config,
        max(1, round(args.eval_every_epochs * plan.steps_per_epoch)), plan.max_steps, best,
        args.early_stop_patience)
  if args.profile_steps:
    hooks['profile'] = training_hooks.ProfileHook(
        step.global_step, args.profile_steps, plan.log_dir, writer)
  return hooks


def build_chief_hooks(plan, args, step, scaffold, writer):
  """Returns the hooks that write checkpoints and summaries: {name: hook}."""
  log_folder.record_start(plan.log_dir, plan.start_step, plan.devices, writer)
  hooks = {
      'checkpoints': tf.train.CheckpointSaverHook(
          plan.log_dir, None if args.save_interval_steps else args.save_interval_secs,
          args.save_interval_steps, scaffold=scaffold),
      'scalars': tf.train.SummarySaverHook(
          save_secs=args.save_summaries_secs, summary_writer=writer,
          summary_op=step.scalar_summaries),
      'images': tf.train.SummarySaverHook(
          save_secs=SAVE_IMAGES_SECS, summary_writer=writer, summary_op=step.image_summaries),
  }
  if args.histograms_every_n_steps:
    hooks['histograms'] = tf.train.SummarySaverHook(
        save_steps=args.histograms_every_n_steps, summary_writer=writer,
        summary_op=step.histogram_summaries)
  return hooks


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
    train(training_plan.make(args, *inputs, log_dir, workers), args, recipe, session_config, workers)
  workers.leave()


def train(plan, args, recipe, session_config, workers):
  """Trains as planned, from the graph to the last checkpoint."""
  training_plan.show(plan, args, recipe, workers)
  if plan.start_step >= plan.max_steps:
    print(f'{plan.log_dir} is already trained to step {plan.start_step}: '
          'ask for more --num_epochs, or choose another --log_dir')
    return

  step = build_graph(plan, args, recipe, workers)
  num_parameters = sum(v.shape.num_elements()
                       for v in fine_tuning.trainable_variables(args.trainable_scopes))
  print(f'{num_parameters:,} trainable parameters', flush=True)
  workers.require_same(training_plan.settings_to_share(plan, args, recipe))
  scaffold = tf.train.Scaffold(saver=tf.train.Saver(max_to_keep=args.max_to_keep),
                               init_fn=restore_weights(plan, args, workers))
  hooks = build_hooks(plan, args, step, scaffold, workers)
  reached, stopped_by = run_training(
      step, [*workers.hooks(args.check_weights_steps), *hooks.values()], plan.log_dir,
      session_config, plan.start_step, plan.max_steps, scaffold, workers)

  print(f'Saved step {reached} in {plan.log_dir}' if workers.is_chief else
        f'Ended with step {reached}, which worker 0 saves')
  if hooks['bad_records'].too_many:
    raise TrainingError(hooks['bad_records'].too_many)
  if args.eval_every_epochs and hooks['evaluation'].stopped_early:
    print(hooks['evaluation'].stopped_early)
  if stopped_by:
    print(f'Stopped by {stopped_by}: resume with the same command')
  elif workers.is_chief:
    print(f'Next: python eval_flowers.py --dataset_dir {args.dataset_dir} '
          f'--log_dir {plan.log_dir}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    main(options.parse_train_args(__doc__.split('\n')[0]))
  except (flowers.DatasetError, towers.DeviceError, checkpoints.CheckpointError,
          log_folder.LockedError, cluster.ClusterError, training_plan.PlanError,
          TrainingError) as error:
    sys.exit(f'train_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('train_flowers.py: interrupted before the first step; nothing was trained')
