"""One training step, from a batch of images to updated weights, and the loop that runs it.

  images, labels, positions = flowers.load_numbered_batch(...)
  train_step = step.build_train_step(images, labels, positions, loss_fn, optimizer, ...)
  reached, stopped_by = step.run_training(train_step, hooks, ...)
"""

import collections
import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from common import errors
from cpu_kernels import operations
from deployment import cluster
from deployment import precision
from deployment import towers
from records import flowers
from training import fine_tuning
from training import hooks as training_hooks
from training import optimization
import xception

MAX_IMAGE_SUMMARIES = 4
MAX_SKIPPED_STEPS = 100  # in a row, for float16: 16 take the loss scale from 2^15 to 1
SAVE_OPS = ('SaveV2', 'MergeV2Checkpoints')

TrainStep = collections.namedtuple('TrainStep', [
    'train_op',  # runs one update of the weights
    'global_step',  # int64 [], its value after train_op
    'loss',  # float32 [], including regularization, before the update
    'accuracy',  # float32 [], top-1 of the batch
    'positions',  # int64 [images of this worker], in the endless sequence of images
    'finite_check',  # op that fails if the loss or a gradient is not finite
    'scalar_summaries',  # string []
    'image_summaries',  # string []
    'histogram_summaries',  # string [], of weights and gradients
    'tower_batch_size',  # int, images that a tower processes at a time
])


class TrainingError(Exception):
  """Training cannot start or continue; the message says why and what to do."""


def tower_loss(images, labels, positions, num_classes, is_training, depth_multiplier,
               dropout_keep_prob, label_smoothing, seed, class_weights=None):
  """Runs the network on one tower's images.

  Args:
    images: float32 [batch, height, width, 3] in [-1, 1].
    labels: int64 [batch] in [0, num_classes).
    positions: int64 [batch], the images' positions in the endless sequence.
    num_classes, is_training, depth_multiplier, dropout_keep_prob: see `xception.xception`.
    label_smoothing: float in [0, 1), share of the label spread over all classes.
    seed: int, seed of dropout, which also depends on the first position.
    class_weights: list of num_classes floats that multiply the images' losses, or None.

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
                     moving_average_decay=0.0, trainable_scopes=(),
                     workers=cluster.SingleWorker(), all_reduce_precision='float32',
                     variable_update=None, prefetch=None):
  """Builds one step: towers, average of their gradients, update of the weights.

  Args:
    images, labels, positions: this worker's part of the global batch, from
      `flowers.load_numbered_batch`.
    loss_fn: `tower_loss` with all arguments bound except images, labels and positions.
    optimizer: tf.train.Optimizer.
    learning_rate: float32 [], for the summaries.
    devices: device of each tower.
    global_step: int64 [] variable, incremented by the step.
    accumulate_steps: int, number of parts that a tower's images are processed in.
    clip_gradient_norm, moving_average_decay: see `optimization.Recipe`.
    trainable_scopes: see `fine_tuning`.
    workers: cluster.Workers or SingleWorker.
    all_reduce_precision: see `workers.average`.
    variable_update: see `towers.mirrors_variables`.
    prefetch: whether to use `towers.prefetch`; None does so on GPUs.

  Returns:
    A TrainStep.
  """
  mirrored = towers.mirrors_variables(devices, variable_update)
  (images, _, positions), parts, fetch_next = _split_batch(
      (images, labels, positions), devices, prefetch)
  losses, accuracies, tower_gradients = _build_towers(
      parts, loss_fn, optimizer, devices, mirrored, accumulate_steps, trainable_scopes)
  with tf.device(towers.variables_device(devices, mirrored)):
    cross_entropy, accuracy, last_position = workers.reduce_step(
        tf.add_n(losses) / len(losses), tf.add_n(accuracies) / len(accuracies), positions[-1])
    copies = _average_gradients(tower_gradients, devices, mirrored, workers, all_reduce_precision)
    copies, regularization = _add_regularization(
        copies, devices if mirrored else [towers.variables_device(devices)])
    gradients = copies[0]
    loss = tf.add(cross_entropy, regularization, name='total_loss')
    gradient_norm = tf.global_norm([gradient for gradient, _ in gradients])
    # Checked before the update, so that saved weights are never NaN.
    finite_check = tf.debugging.check_numerics(
        loss if precision.scales_loss(optimizer) else loss + gradient_norm,
        'loss or gradient', name='finite_check')
    statistics_updates = workers.average_variables(
        fine_tuning.moving_statistics(trainable_scopes),
        towers.first_part(tf.GraphKeys.UPDATE_OPS))
    with tf.control_dependencies([finite_check, *statistics_updates]):
      clipped = optimization.clip_gradients(sum(copies, []), gradient_norm, clip_gradient_norm)
      train_op = _build_update(optimizer, clipped, global_step, last_position + 1,
                               moving_average_decay)
    with tf.control_dependencies([train_op]):
      step_after = global_step.read_value()
    train_op = tf.group(train_op, fetch_next)
  scalars = {'losses/total_loss': loss, 'losses/cross_entropy': cross_entropy,
             'losses/regularization': regularization, 'accuracy': accuracy,
             'learning_rate': learning_rate, 'gradient_norm': gradient_norm}
  return TrainStep(train_op, step_after, loss, accuracy, positions, finite_check.op,
                   *_build_summaries(scalars, images, gradients),
                   images.shape.as_list()[0] // len(devices) // accumulate_steps)


def _split_batch(batch, devices, prefetch):
  """Returns the batch that a step uses, its parts, and the op that fetches the next batch."""
  parts = towers.split_batch(devices, *batch)
  if not (towers.on_gpus(devices) if prefetch is None else prefetch):
    return batch, parts, tf.no_op()
  parts, fetch_next = towers.prefetch(devices, parts)
  with tf.device('/cpu:0'):
    return [tf.concat(column, 0) for column in zip(*parts)], parts, fetch_next


def _build_towers(parts, loss_fn, optimizer, devices, mirrored, accumulate_steps,
                  trainable_scopes):
  """Returns the losses, accuracies and (gradient, variable) pairs of the towers."""
  def tower(*part):
    with operations.replace_slow_operations():
      cross_entropy, accuracy = loss_fn(*part)
    variables = towers.copies(fine_tuning.trainable_variables(trainable_scopes))
    gradients = optimizer.compute_gradients(cross_entropy, variables)
    return cross_entropy, accuracy, towers.require_gradients(gradients)

  return zip(*towers.replicate(towers.accumulate(tower, accumulate_steps), devices, parts,
                               mirrored))


def _average_gradients(tower_gradients, devices, mirrored, workers, all_reduce_precision):
  """Returns (mean gradient, variable) pairs, one list for each copy of the variables."""
  if not mirrored:
    # Every tower waits here for the slowest one, and then every worker.
    gradients, variables = zip(*towers.average_gradients(tower_gradients))
    return [list(zip(workers.average(gradients, all_reduce_precision), variables))]
  gradients = [[gradient for gradient, _ in pairs] for pairs in tower_gradients]
  means = workers.average_towers(gradients, devices, all_reduce_precision)
  return [[(mean, variable) for mean, (_, variable) in zip(tower_means, pairs)]
          for tower_means, pairs in zip(means, tower_gradients)]


def _add_regularization(copies, devices):
  """Adds the gradients of the L2 loss to the mean gradients, so that it counts once.

  Args:
    copies: one list of (gradient, variable) pairs for each copy of the variables.
    devices: device of each copy.

  Returns:
    Lists like `copies`; the L2 loss, float32 [].
  """
  regularized, losses = [], []
  for tower, (pairs, device) in enumerate(zip(copies, devices)):
    with tf.device(device):
      losses.append(tf.add_n(towers.first_part(tf.GraphKeys.REGULARIZATION_LOSSES, tower)
                             or [tf.constant(0.0)]))
      decays = tf.gradients(losses[-1], [variable for _, variable in pairs])
      regularized.append([(gradient if decay is None else gradient + decay, variable)
                          for (gradient, variable), decay in zip(pairs, decays)])
  return regularized, losses[0]


def get_or_create_next_image():
  """Returns the variable of the position after the last image seen, int64 [].

  It is saved with the weights, so that a resumed run continues there.
  """
  with tf.variable_scope('', reuse=tf.AUTO_REUSE):
    return tf.get_variable(checkpoints.NEXT_IMAGE, [], tf.int64, tf.zeros_initializer(),
                           trainable=False)


def _build_update(optimizer, gradients, global_step, next_image, moving_average_decay):
  """Returns the op that updates weights, averages, step and position in the data."""
  # The position comes last, because the learning rate of this step depends on it.
  with tf.variable_scope(tf.get_variable_scope(), custom_getter=towers.get_slot), \
       tf.control_dependencies([optimizer.apply_gradients(gradients, global_step)]):
    train_op = get_or_create_next_image().assign(next_image).op
  if moving_average_decay:
    averages = tf.train.ExponentialMovingAverage(moving_average_decay, global_step)
    with tf.control_dependencies([train_op]):
      train_op = averages.apply(slim.get_model_variables())
  return train_op


def _build_summaries(scalars, images, gradients):
  """Returns the scalar, image and histogram summaries of a step, each string []."""
  return (
      tf.summary.merge([tf.summary.scalar(name, scalar) for name, scalar in scalars.items()]),
      tf.summary.image('distorted_images', images, MAX_IMAGE_SUMMARIES),
      tf.summary.merge([tf.summary.histogram(f'{kind}/{variable.op.name}', tensor)
                        for gradient, variable in gradients
                        for kind, tensor in (('weights', variable), ('gradients', gradient))]))


def run_training(train_step, hooks, plan, session_config, scaffold, workers):
  """Runs training steps until the plan's last step, or until a signal arrives.

  Args:
    train_step: TrainStep of the default graph.
    hooks: session hooks.
    plan: plan.Plan; its checkpoint is restored.
    session_config: tf.ConfigProto.
    scaffold: tf.train.Scaffold; its init_fn runs only if the plan has no checkpoint.
    workers: cluster.Workers or SingleWorker.

  Returns:
    The step reached, and the name of the signal or worker that stopped training,
    or None.

  Raises:
    TrainingError: the loss or a gradient was not finite, or saving failed.
    cluster.ClusterError: another worker is gone.
  """
  reached, num_skipped = plan.start_step, 0
  with training_hooks.StopOnSignalHook(workers) as stop_on_signal:
    hooks = [stop_on_signal, tf.train.StopAtStepHook(last_step=plan.max_steps), *hooks]
    try:
      # MonitoredSession would recreate its session forever once another worker is gone.
      with tf.train.SingularMonitoredSession(
          hooks, scaffold, workers.master, session_config,
          checkpoint_filename_with_path=plan.checkpoint) as session:
        while reached < plan.max_steps and not session.should_stop():
          previous = reached
          _, reached = session.run([train_step.train_op, train_step.global_step])
          num_skipped = num_skipped + 1 if reached == previous else 0
          if num_skipped == MAX_SKIPPED_STEPS:
            raise TrainingError(
                f'No gradient was finite in {num_skipped} attempts at step {reached + 1}, each '
                'with half the loss scale. Use --precision float32, or a smaller --learning_rate')
    except tf.errors.OpError as error:
      if explained := _explain(error, train_step, plan, reached, workers):
        raise explained from error
      raise
  return reached, stop_on_signal.received or workers.stopped_by


def _explain(error, train_step, plan, reached, workers):
  """Returns the exception that explains a session's failure to the user, or None."""
  if error.op is train_step.finite_check:
    in_log_dir = f' in {plan.log_dir}' if workers.is_chief else ''
    return TrainingError(
        f'The loss or a gradient is not finite at step {reached + 1}. The weights were '
        f'not updated with it; the last checkpoint{in_log_dir} is good. A smaller '
        '--learning_rate may help')
  if flowers.NO_GOOD_RECORD in error.message:
    return TrainingError(flowers.NO_GOOD_RECORD)
  # Files that are written from Python, like `checkpoint` and events, have no op.
  if error.op.type in SAVE_OPS if error.op else os.path.join(plan.log_dir, '') in error.message:
    return TrainingError(
        f'Cannot save in {plan.log_dir}: {error.message.splitlines()[0]}. The previous '
        'checkpoint is intact: make room, then resume with the same command')
  if error.op and error.op.type == 'RestoreV2':
    return TrainingError(f'Cannot restore {plan.checkpoint}: '
                         f'{errors.reason(error)}')
  if reason := towers.explain_out_of_memory(error, plan.devices, train_step.tower_batch_size):
    return TrainingError(reason)
  return workers.explain(error)
