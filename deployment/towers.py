"""Data parallelism on one machine: towers replicated over devices, gradients averaged.

Every tower is the same graph on the same variables, fed with its part of the
batch. `average_gradients` is where the towers wait for each other.
"""

import os

import tensorflow.compat.v1 as tf
import tf_slim as slim


class DeviceError(Exception):
  """Towers were asked for that this machine has no devices for."""


def tower_devices(num_clones=None, clone_on_cpu=False):
  """Chooses the device of each tower.

  Args:
    num_clones: number of towers, 1 or more; None is one on every GPU, or one on
      the CPU of a machine without a GPU.
    clone_on_cpu: puts the towers on the CPU, each on a CPU device of its own.

  Returns:
    List of device names like '/gpu:0'.

  Raises:
    DeviceError: there are fewer GPUs than towers.
  """
  gpus = [] if clone_on_cpu else tf.config.list_physical_devices('GPU')
  if clone_on_cpu or (num_clones is None and not gpus):
    return [f'/cpu:{i}' for i in range(num_clones or 1)]
  if num_clones is not None and num_clones > len(gpus):
    found = ', '.join(gpu.name for gpu in gpus) or 'none'
    raise DeviceError(
        f'--num_clones {num_clones} needs {num_clones} GPUs, but TensorFlow finds '
        f'{len(gpus)} ({found}). Ask for fewer, or add --clone_on_cpu')
  return [f'/gpu:{i}' for i in range(num_clones or len(gpus))]


def variables_device(devices):
  """Returns where the variables live: beside one tower, on the CPU for several."""
  return devices[0] if len(devices) == 1 else '/cpu:0'


def session_config(devices):
  """Returns the tf.ConfigProto of a session that has the towers' devices."""
  num_cpus = max(1, sum(device.startswith('/cpu') for device in devices))
  config = tf.ConfigProto(
      # Towers are checked when they are chosen; this places what a GPU cannot
      # do, like the input pipeline and the summaries.
      allow_soft_placement=True,
      device_count={'CPU': num_cpus})
  if devices[0].startswith('/cpu'):
    config.device_count['GPU'] = 0
  config.gpu_options.allow_growth = True
  return config


def start_threads(config, devices):
  """Gives towers that fill all cores of the CPU one thread each.

  By default every operation is shared by all cores, and waits for the last. The threads
  belong to the process, whose first session decides: call this in front of it.

  Args:
    config: tf.ConfigProto of the session, changed in place.
    devices: device of each tower.
  """
  if devices[0].startswith('/cpu') and len(devices) >= num_cores():
    config.intra_op_parallelism_threads = 1
    tf.Session(config=config).close()


def num_cores():
  """Returns how many cores of the CPU this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on every system
    return os.cpu_count() or 1


def tower_scope(index):
  """Returns the name scope of a tower."""
  return f'tower_{index}'


def first_tower_updates():
  """Returns the ops that update the moving statistics from the first images of the batch.

  Every tower's, and every part's, would race for the same variables; the first
  ones' are as good as any.
  """
  scopes = (f'{tower_scope(0)}/part_0/', f'{tower_scope(0)}/')
  updates = (tf.get_collection(tf.GraphKeys.UPDATE_OPS, scope) for scope in scopes)
  return next(filter(None, updates), [])


def replicate(tower_fn, devices, *batch):
  """Builds one tower a device, each on its equal part of the batch.

  Args:
    tower_fn: function of the parts of `batch`; its variables are created by
      the first tower and shared by the others.
    devices: device names from `tower_devices`.
    *batch: tensors whose first dimension divides by the number of devices.

  Returns:
    List of what tower_fn returned, one a tower.
  """
  parts = zip(*(tf.split(tensor, len(devices)) for tensor in batch))
  outputs = []
  for i, (device, part) in enumerate(zip(devices, parts)):
    with tf.device(device), tf.name_scope(tower_scope(i)), \
         tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
         slim.arg_scope([slim.model_variable, slim.variable],
                        device=variables_device(devices)):
      outputs.append(tower_fn(*part))
  return outputs


def accumulate(tower_fn, num_parts):
  """Returns a tower function that works on its images in equal parts, one after the other.

  Only one part's activations are in memory at a time. What the parts return is
  averaged, so that the result is tower_fn's on all images at once, but for
  batch norm, which sees one part.

  Args:
    tower_fn: function of tensors; returns scalars and, as the last, a list of
      (gradient, variable) pairs.
    num_parts: int; 1 is tower_fn as it is.
  """
  def accumulated(*batch):
    sums, gradient_sums = [], []
    for i, part in enumerate(zip(*(tf.split(tensor, num_parts) for tensor in batch))):
      with tf.name_scope(f'part_{i}'), \
           tf.variable_scope(tf.get_variable_scope(), reuse=i > 0), \
           tf.control_dependencies(gradient_sums):
        *scalars, pairs = tower_fn(*part)
        gradients, variables = zip(*pairs)
        sums = scalars if i == 0 else [a + b for a, b in zip(sums, scalars)]
        gradient_sums = (list(gradients) if i == 0 else
                         [a + b for a, b in zip(gradient_sums, gradients)])
    return (*(scalar / num_parts for scalar in sums),
            [(gradient / num_parts, variable)
             for gradient, variable in zip(gradient_sums, variables)])
  return tower_fn if num_parts == 1 else accumulated


def average_gradients(tower_gradients):
  """Averages gradients over the towers: the one point where they synchronise.

  Args:
    tower_gradients: a list a tower of (gradient, variable) pairs, as
      `Optimizer.compute_gradients` returns them, in the same order.

  Returns:
    List of (mean gradient, variable) pairs.

  Raises:
    ValueError: a variable has no gradient.
  """
  averaged = []
  for pairs in zip(*tower_gradients):
    variable = pairs[0][1]
    gradients = [gradient for gradient, _ in pairs]
    if any(gradient is None for gradient in gradients):
      raise ValueError(f'The loss does not depend on the variable {variable.name}')
    if len(gradients) > 1:
      gradients = [tf.add_n(gradients) / len(gradients)]
    averaged.append((gradients[0], variable))
  return averaged
