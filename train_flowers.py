"""Trains Xception on the flowers, or on your own TFRecords, data-parallel over towers.

  python train_flowers.py --dataset_dir dataset --log_dir log

Every GPU of the machine gets a tower, a replica of the network that works on
its part of the batch; their gradients are averaged. Writes checkpoints,
`model_config.json` and TensorBoard events into --log_dir. The same command
again resumes where the last checkpoint was written.
"""

import collections
import math
import os
import random
import sys

import slim_bridge  # noqa: F401, first: it also silences what TensorFlow says at import.

import tensorflow.compat.v1 as tf
import tf_slim as slim

import checkpoints
import flowers
import optimization
import options
import towers
import training_hooks
import xception

MAX_IMAGE_SUMMARIES = 4
SAVE_IMAGES_SECS = 300  # image summaries fill a disk sooner than anything else

TrainStep = collections.namedtuple('TrainStep', [
    'train_op',  # updates everything once
    'global_step',  # int64 [], as it is after train_op
    'loss',  # float32 [], with regularization, as it was before train_op
    'accuracy',  # float32 [], top-1 of the batch
    'positions',  # int64 [batch_size], of its images in the endless row
    'finite_check',  # the op that fails when the loss or a gradient is not finite
    'scalar_summaries',  # string []
    'image_summaries',  # string []
])


class TrainingError(Exception):
  """Training cannot start or go on; the message says why and what to do."""


def tower_loss(images, labels, num_classes, is_training, depth_multiplier,
               dropout_keep_prob, label_smoothing):
  """Runs the network on one tower's images.

  Args:
    images: float32 [batch, height, width, 3] in [-1, 1].
    labels: int64 [batch] in [0, num_classes).
    num_classes, is_training, depth_multiplier, dropout_keep_prob: see
      `xception.xception`.
    label_smoothing: float in [0, 1), share of the label spread over all classes.

  Returns:
    cross_entropy: float32 [], mean over the images, without regularization.
    accuracy: float32 [], top-1, in [0, 1].
  """
  logits, _ = xception.xception(
      images, num_classes, is_training, dropout_keep_prob,
      depth_multiplier=depth_multiplier)
  cross_entropy = tf.losses.softmax_cross_entropy(
      tf.one_hot(labels, num_classes), logits, label_smoothing=label_smoothing,
      loss_collection=None)
  correct = tf.equal(tf.argmax(logits, 1), labels)
  return cross_entropy, tf.reduce_mean(tf.cast(correct, tf.float32))


def build_train_step(images, labels, positions, loss_fn, optimizer, learning_rate, devices,
                     global_step):
  """Builds one step: towers, averaged gradients, the update of the weights.

  Args:
    images, labels, positions: the global batch, from `flowers.load_numbered_batch`.
    loss_fn: `tower_loss` with everything but images and labels given.
    optimizer: tf.train.Optimizer.
    learning_rate: float32 [], for the summaries.
    devices: device of each tower.
    global_step: int64 [] variable, counted up by the step.

  Returns:
    A TrainStep.
  """
  # Saved with the weights: where a resumed run goes on.
  next_image = tf.get_variable(checkpoints.NEXT_IMAGE, [], tf.int64, tf.zeros_initializer(),
                               trainable=False)

  def tower(tower_images, tower_labels):
    cross_entropy, accuracy = loss_fn(tower_images, tower_labels)
    return cross_entropy, accuracy, optimizer.compute_gradients(cross_entropy)

  losses, accuracies, tower_gradients = zip(
      *towers.replicate(tower, devices, images, labels))

  with tf.device(towers.variables_device(devices)):
    # Here every tower waits for the slowest.
    gradients = towers.average_gradients(tower_gradients)
    cross_entropy = tf.add_n(losses) / len(losses)
    accuracy = tf.add_n(accuracies) / len(accuracies)

    # The weights are shared, so their L2 and its gradient are added once.
    regularization = tf.add_n(tf.losses.get_regularization_losses())
    decays = tf.gradients(regularization, [variable for _, variable in gradients])
    gradients = [(gradient if decay is None else gradient + decay, variable)
                 for (gradient, variable), decay in zip(gradients, decays)]
    loss = tf.add(cross_entropy, regularization, name='total_loss')

    # In front of the update: weights that are saved are never NaN.
    gradient_norm = tf.global_norm([gradient for gradient, _ in gradients])
    finite_check = tf.debugging.check_numerics(loss + gradient_norm, 'loss or gradient',
                                               name='finite_check')
    # Every tower's batch norms would race for the same moving statistics: the
    # first one's are as good as any.
    update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS, towers.tower_scope(0) + '/')
    with tf.control_dependencies([finite_check, *update_ops]):
      train_op = tf.group(next_image.assign(positions[-1] + 1),
                          optimizer.apply_gradients(gradients, global_step))
    with tf.control_dependencies([train_op]):
      step_after = global_step.read_value()

  scalar_summaries = tf.summary.merge([
      tf.summary.scalar('losses/total_loss', loss),
      tf.summary.scalar('losses/cross_entropy', cross_entropy),
      tf.summary.scalar('losses/regularization', regularization),
      tf.summary.scalar('accuracy', accuracy),
      tf.summary.scalar('learning_rate', learning_rate),
  ])
  image_summaries = tf.summary.image('distorted_images', images, MAX_IMAGE_SUMMARIES)
  return TrainStep(train_op, step_after, loss, accuracy, positions, finite_check.op,
                   scalar_summaries, image_summaries)


def run_training(step, hooks, log_dir, devices, start_step, max_steps, save_summaries_secs,
                 save_interval_secs, save_interval_steps):
  """Runs training steps until max_steps or a signal; a checkpoint is saved at the end.

  Args:
    step: TrainStep of the default graph.
    hooks: further session hooks.
    log_dir: folder of checkpoints and events; a checkpoint in it is restored.
    devices: device of each tower.
    start_step, max_steps: the steps that training starts from and ends with.
    save_summaries_secs: seconds between two scalar summaries.
    save_interval_secs, save_interval_steps: seconds or steps between two
      checkpoints; one of them is None.

  Returns:
    The step reached, and the name of the signal that ended training or None.

  Raises:
    TrainingError: the loss or a gradient was not finite.
  """
  scaffold = tf.train.Scaffold(saver=tf.train.Saver())
  writer = tf.summary.FileWriterCache.get(log_dir)
  stop_on_signal = training_hooks.StopOnSignalHook()
  hooks = [
      stop_on_signal,
      tf.train.StopAtStepHook(last_step=max_steps),
      tf.train.CheckpointSaverHook(log_dir, save_interval_secs, save_interval_steps,
                                   scaffold=scaffold),
      tf.train.SummarySaverHook(save_secs=save_summaries_secs, summary_writer=writer,
                                summary_op=step.scalar_summaries),
      tf.train.SummarySaverHook(save_secs=SAVE_IMAGES_SECS, summary_writer=writer,
                                summary_op=step.image_summaries),
      *hooks,
  ]
  reached = start_step
  try:
    with tf.train.MonitoredTrainingSession(
        checkpoint_dir=log_dir, scaffold=scaffold, hooks=hooks,
        config=towers.session_config(devices), save_checkpoint_secs=None,
        save_summaries_secs=None, save_summaries_steps=None,
        log_step_count_steps=None) as session:
      while not session.should_stop():
        _, reached = session.run([step.train_op, step.global_step])
  except tf.errors.OpError as error:
    if error.op is step.finite_check:
      raise TrainingError(
          f'The loss or a gradient is not finite at step {reached + 1}. The weights were '
          f'not updated with it; the last checkpoint in {log_dir} is good. A smaller '
          '--learning_rate may help') from error
    raise
  return reached, stop_on_signal.received


def configure_model(dataset, log_dir, checkpoint, image_size, depth_multiplier, seed):
  """Stores what is trained in log_dir, or checks it against what is stored there.

  Args:
    dataset: slim Dataset of the training split.
    log_dir: folder of the checkpoints; created if missing.
    checkpoint: the checkpoint in log_dir that training resumes from, or None.
    image_size, depth_multiplier: as asked on the command line.
    seed: int; None is drawn, or taken from log_dir.

  Returns:
    A ModelConfig.

  Raises:
    checkpoints.CheckpointError: log_dir holds checkpoints of another model.
  """
  os.makedirs(log_dir, exist_ok=True)
  found = checkpoints.load_config(checkpoint) if checkpoint else None
  if seed is None:
    seed = found.seed if found else random.randrange(2**31)
  config = checkpoints.ModelConfig(
      class_names=[dataset.labels_to_names[i] for i in range(dataset.num_classes)],
      image_size=image_size, depth_multiplier=depth_multiplier, seed=seed)
  if found:
    checkpoints.check_same_model(config, found, log_dir)
  else:
    checkpoints.save_config(config, log_dir)
  return config


def print_plan(dataset, devices, batch_size, start_step, max_steps, config, log_dir):
  """Says what is trained on what, before anything takes time."""
  for damage in dataset.records.damages:
    print(f'Warning: {damage}', file=sys.stderr)
  print(f'{len(devices)} {"tower" if len(devices) == 1 else "towers"} on {", ".join(devices)}; '
        f'global batch {batch_size}, {batch_size // len(devices)} per tower')
  print(f'{dataset.num_samples} images of {dataset.num_classes} classes: '
        f'{dataset.num_samples / batch_size:.1f} steps per epoch')
  print(f'Steps {start_step} to {max_steps}, seed {config.seed}; '
        f'watch it with: tensorboard --logdir={log_dir}', flush=True)


def main(args):
  dataset = flowers.get_split('train', args.dataset_dir,
                              flowers.name_pattern(args.dataset_name))
  devices = towers.tower_devices(args.num_clones, args.clone_on_cpu)
  if args.batch_size % len(devices):
    raise TrainingError(f'--batch_size {args.batch_size} is the sum over all towers: '
                        f'it must divide by {len(devices)} towers')
  checkpoint = tf.train.latest_checkpoint(args.log_dir)
  start_step = checkpoints.global_step(checkpoint) if checkpoint else 0
  first_image = checkpoints.next_image(checkpoint) if checkpoint else 0
  config = configure_model(dataset, args.log_dir, checkpoint, args.image_size,
                           args.depth_multiplier, args.seed)
  max_steps = math.ceil(args.num_epochs * dataset.num_samples / args.batch_size)
  max_steps = min(max_steps, args.max_number_of_steps or max_steps)

  print_plan(dataset, devices, args.batch_size, start_step, max_steps, config, args.log_dir)
  if start_step >= max_steps:
    print(f'{args.log_dir} is already trained to step {start_step}: '
          'ask for more --num_epochs, or choose another --log_dir')
    return

  tf.set_random_seed(config.seed)
  global_step = tf.train.get_or_create_global_step()
  learning_rate = optimization.configure_learning_rate(
      args.learning_rate_decay_type, args.learning_rate, args.learning_rate_decay_factor,
      args.end_learning_rate, global_step, args.batch_size, dataset.num_samples,
      args.num_epochs_per_decay, max_steps)
  optimizer = optimization.configure_optimizer(
      args.optimizer, learning_rate, args.momentum, args.adam_beta1, args.adam_beta2,
      args.rmsprop_decay, args.opt_epsilon)
  flowers.require_readable(dataset)
  images, labels, positions = flowers.load_numbered_batch(
      dataset, args.batch_size, config.image_size, config.image_size, is_training=True,
      seed=config.seed, first_image=first_image, num_readers=args.num_readers,
      num_preprocessing_threads=args.num_preprocessing_threads)

  def loss_fn(tower_images, tower_labels):
    return tower_loss(tower_images, tower_labels, config.num_classes, True,
                      config.depth_multiplier, args.dropout_keep_prob, args.label_smoothing)

  with slim.arg_scope(xception.xception_arg_scope(
      args.weight_decay, xception.warmed_up_decay(args.batch_norm_decay, global_step))):
    step = build_train_step(images, labels, positions, loss_fn, optimizer, learning_rate, devices,
                            global_step)
  num_parameters = sum(v.shape.num_elements() for v in tf.trainable_variables())
  print(f'{num_parameters:,} trainable parameters', flush=True)

  writer = tf.summary.FileWriterCache.get(args.log_dir)
  bad_records = training_hooks.BadRecordsHook(
      step.global_step, step.positions, dataset, config.seed, first_image,
      args.max_bad_fraction, writer)
  progress = training_hooks.ProgressHook(
      step.global_step, step.loss, step.accuracy, args.batch_size, len(devices),
      dataset.num_samples, max_steps, args.log_every_n_steps, writer)
  reached, stopped_by = run_training(
      step, [bad_records, progress], args.log_dir, devices, start_step, max_steps,
      args.save_summaries_secs,
      None if args.save_interval_steps else args.save_interval_secs, args.save_interval_steps)
  print(f'Saved step {reached} in {args.log_dir}')
  if bad_records.too_many:
    raise TrainingError(bad_records.too_many)
  print(f'Stopped by {stopped_by}: resume with the same command' if stopped_by else
        f'Next: python eval_flowers.py --dataset_dir {args.dataset_dir} '
        f'--log_dir {args.log_dir}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    main(options.parse_train_args(__doc__.split('\n')[0]))
  except (flowers.DatasetError, towers.DeviceError, checkpoints.CheckpointError,
          TrainingError) as error:
    sys.exit(f'train_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('train_flowers.py: interrupted before the first step; nothing was trained')
