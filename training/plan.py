"""The plan of a training run: its data, devices and steps, found before a graph is built."""

import collections
import dataclasses
import math
import shlex
import sys

import tensorflow.compat.v1 as tf

from common import arguments
from common import checkpoints
from deployment import cluster
from deployment import precision
from deployment import towers
from records import flowers
from training import log_folder
from training import optimization

# The options, besides the recipe's, on which the workers of a cluster must agree.
SHARED_OPTIONS = ('batch_size', 'accumulate_steps', 'image_size', 'depth_multiplier',
                  'num_epochs', 'max_number_of_steps', 'class_weights', 'trainable_scopes',
                  'precision', 'eval_every_epochs', 'early_stop_patience',
                  'all_reduce_precision', 'variable_update', 'check_weights_steps', 'image_key',
                  'label_key', 'labels_offset')

Plan = collections.namedtuple('Plan', [
    'dataset',  # slim Dataset of the training split
    'validation',  # slim Dataset of the validation split, or None
    'devices',  # device of each tower
    'log_dir',  # folder that this worker writes to
    'checkpoint',  # the one in log_dir that training resumes from, or None
    'config',  # checkpoints.ModelConfig
    'start_step',  # global step of that checkpoint, or 0
    'first_image',  # position of the first image in the endless sequence
    'steps_per_epoch',  # float
    'max_steps',  # the last step
    'total_images',  # number of images seen at that step, which is where schedules end
])


class PlanError(Exception):
  """The options do not fit together; the message says why and what to do."""


def find_inputs(args, num_workers):
  """Finds the dataset and the devices that the command line names; writes nothing.

  Returns:
    The slim Datasets of the training split and, for --eval_every_epochs, of the
    validation split; the device of each tower.

  Raises:
    flowers.DatasetError, towers.DeviceError, PlanError: training is not possible.
  """
  dataset_options = arguments.dataset_options(args)
  dataset = flowers.get_split('train', **dataset_options)
  validation = (flowers.get_split('validation', **dataset_options)
                if args.eval_every_epochs else None)
  if dataset.num_classes < 2:
    raise PlanError(f'{args.dataset_dir} has one class, {dataset.labels_to_names[0]}: a classifier '
                    'needs at least 2 to tell apart')
  devices = towers.tower_devices(args.num_clones, args.clone_on_cpu)
  precision.check(args.precision, args.xla, devices)
  if args.batch_size % (num_workers * len(devices) * args.accumulate_steps):
    raise PlanError(
        f'--batch_size {args.batch_size} is the sum over all towers: it must be divisible by '
        f'workers x towers x --accumulate_steps, {num_workers} x {len(devices)} x '
        f'{args.accumulate_steps}')
  if validation and validation.num_samples < num_workers:
    raise PlanError(f'The validation split has {validation.num_samples} images, fewer than '
                    f'{num_workers} workers: train without --eval_every_epochs')
  return dataset, validation, devices


def make_plan(args, dataset, validation, devices, log_dir, workers):
  """Plans the first and last step, and stores the model's configuration in the log folder.

  The chief, which alone has checkpoints, decides for all workers.

  Returns:
    A Plan.

  Raises:
    checkpoints.CheckpointError: the log folder holds another model.
  """
  checkpoint = checkpoints.find_newest(log_dir)
  config = log_folder.load_or_create_config(dataset, log_dir, checkpoint, args.image_size,
                                            args.depth_multiplier, args.seed)
  seed, start_step, first_image = workers.all_gather([
      config.seed, checkpoints.global_step(checkpoint) if checkpoint else 0,
      checkpoints.next_image(checkpoint) if checkpoint else 0])[0]
  max_steps, total_images = find_end(
      args.num_epochs * dataset.num_samples, args.batch_size, start_step, first_image,
      args.max_number_of_steps)
  return Plan(
      dataset=dataset,
      validation=validation,
      devices=devices,
      log_dir=log_dir,
      checkpoint=checkpoint,
      config=dataclasses.replace(config, seed=seed),
      start_step=start_step,
      first_image=first_image,
      steps_per_epoch=dataset.num_samples / args.batch_size,
      max_steps=max_steps,
      total_images=total_images)


def find_end(images, batch_size, start_step, first_image, max_number_of_steps=None):
  """Finds where training ends.

  Args:
    images: float, number of images to train on.
    batch_size: images per step, which may differ from that of earlier steps.
    start_step: number of steps already taken.
    first_image: number of images already seen.
    max_number_of_steps: upper bound of the last step, or None.

  Returns:
    The last step, and the number of images seen by then.
  """
  total_images = math.ceil(images / batch_size) * batch_size
  max_steps = start_step + max(0, math.ceil((total_images - first_image) / batch_size))
  if max_number_of_steps and max_number_of_steps < max_steps:
    max_steps = max(max_number_of_steps, start_step)
    total_images = first_image + (max_steps - start_step) * batch_size
  return max_steps, total_images


def show(plan, args, recipe, workers):
  """Prints the plan before the graph is built."""
  for damage in plan.dataset.records.damages:
    print(f'Warning: {damage}', file=sys.stderr)
  num_towers = len(plan.devices)
  in_parts = f' in {args.accumulate_steps} parts' if args.accumulate_steps > 1 else ''
  if workers.size > 1:
    print(f'{workers}; gradients are exchanged as {args.all_reduce_precision}')
  print(f'{num_towers} {"tower" if num_towers == 1 else "towers"} on '
        f'{", ".join(plan.devices)}; global batch {args.batch_size}, '
        f'{args.batch_size // (workers.size * num_towers)} per tower{in_parts}; '
        f'{args.precision}')
  print(f'{plan.dataset.num_samples} images of {plan.dataset.num_classes} classes: '
        f'{plan.steps_per_epoch:.1f} steps per epoch')
  print(f'Recipe: {optimization.describe(recipe)}')
  watch = (f'watch it with: tensorboard --logdir={shlex.quote(plan.log_dir)}'
           if workers.is_chief else 'worker 0 writes the log')
  print(f'Steps {plan.start_step} to {plan.max_steps}, seed {plan.config.seed}; {watch}',
        flush=True)


def settings_to_share(plan, args, recipe):
  """Returns the settings that must be the same on every worker: {name: value}."""
  return {
      'the code (its hash)': cluster.code_hash(),
      'TensorFlow': tf.__version__,
      'the training split (images, hash of their sizes)': plan.dataset.records.fingerprint(),
      'the class names (hash)': cluster.text_hash('\n'.join(plan.config.class_names)),
      'towers': len(plan.devices),
      'the validation split (images, hash of their sizes)':
          plan.validation.records.fingerprint() if plan.validation else None,
      'mirrored variables': towers.mirrors_variables(plan.devices, args.variable_update),
      **{f'--{name}': getattr(args, name) for name in SHARED_OPTIONS},
      **{f'--{name}': value for name, value in dataclasses.asdict(recipe).items()},
      'the variables (hash of their names and shapes)': cluster.variables_hash(),
  }
