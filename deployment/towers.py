"""Data parallelism on one machine: towers replicated over devices, gradients averaged.

All towers build the same network, each for its part of the batch. They either share the
variables of a parameter server, or each has a mirror of them that it updates itself.
"""

import os

import tensorflow.compat.v1 as tf
from tensorflow.python.ops import data_flow_ops
import tf_slim as slim

VARIABLE_UPDATES = ('parameter_server', 'mirrored')


class DeviceError(Exception):
  """This machine lacks a device or an instruction set that was asked for."""


def tower_devices(num_clones=None, clone_on_cpu=False):
  """Chooses the device of each tower.

  Args:
    num_clones: number of towers, 1 or more; None is one per GPU, or one on the CPU if there
      is no GPU.
    clone_on_cpu: True gives each tower a CPU device of its own.

  Returns:
    List of device names such as '/gpu:0'.

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


def on_gpus(devices):
  """Returns whether the towers are on GPUs."""
  return devices[0].startswith('/gpu')


def mirrors_variables(devices, variable_update=None):
  """Returns whether every tower has its own copy of the variables.

  Args:
    devices: device of each tower.
    variable_update: one of VARIABLE_UPDATES; None mirrors the variables on several GPUs.
  """
  if variable_update is None:
    return on_gpus(devices) and len(devices) > 1
  return variable_update == 'mirrored' and len(devices) > 1


def variables_device(devices, mirrored=False):
  """Returns the device of the variables that are saved: the CPU if several towers share them."""
  return devices[0] if mirrored or len(devices) == 1 else '/cpu:0'


def session_config(devices):
  """Returns a tf.ConfigProto for sessions on the towers' devices, and on no other GPU.

  GPU memory is allocated as needed: other programs may use the rest.
  """
  num_cpus = max(1, sum(device.startswith('/cpu') for device in devices))
  # `tower_devices` has checked the devices; soft placement is for operations without a GPU
  # kernel, such as summaries.
  config = tf.ConfigProto(allow_soft_placement=True, device_count={'CPU': num_cpus})
  config.gpu_options.allow_growth = True
  if on_gpus(devices):
    config.gpu_options.visible_device_list = ','.join(
        device.removeprefix('/gpu:') for device in devices)
  else:
    config.device_count['GPU'] = 0
  return config


def initialize(session):
  """Initializes the default graph's variables and their copies, and fetches the first batch."""
  init_ops = tf.global_variables_initializer(), tf.train.Scaffold.default_local_init_op()
  for init_op in init_ops:
    session.run(init_op)


def start_threads(config, devices):
  """Gives each tower one thread if there are as many CPU towers as cores, or more.

  By default all cores share every operation and wait for the slowest. Thread pools are
  created by the process's first session, so call this before creating one.

  Args:
    config: tf.ConfigProto of the session, changed in place.
    devices: device of each tower.
  """
  if not on_gpus(devices) and len(devices) >= num_cores():
    config.intra_op_parallelism_threads = 1
    tf.Session(config=config).close()


def num_cores():
  """Returns the number of CPU cores that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on every system
    return os.cpu_count() or 1


def explain_out_of_memory(error, devices, tower_batch_size):
  """Returns a sentence that says which tower ran out of memory and what to do, or None.

  Args:
    error: tf.errors.OpError of a session.
    devices: device of each tower.
    tower_batch_size: images that a tower processes at a time.
  """
  if not isinstance(error, tf.errors.ResourceExhaustedError):
    return None
  device = tf.DeviceSpec.from_string(error.op.device if error.op else '')
  name = f'/{device.device_type or "?"}:{device.device_index}'.lower()
  tower = f'tower {devices.index(name)} ({name})' if name in devices else 'a tower'
  float16 = '--precision float16, ' if on_gpus(devices) else ''
  return (f'Out of memory: {tower} cannot process {tower_batch_size} images at a time. Use '
          f'--accumulate_steps 2 or more, {float16}a smaller --batch_size or --image_size')


def tower_scope(index):
  """Returns the name scope of a tower."""
  return f'tower_{index}'


def first_part(collection, tower=0):
  """Returns the elements of a collection that belong to the first part of a tower's images.

  For updates of moving statistics, for example: those of several parts would race for the same
  variables.
  """
  scopes = (f'{tower_scope(tower)}/part_0/', f'{tower_scope(tower)}/')
  elements = (tf.get_collection(collection, scope) for scope in scopes)
  return next(filter(None, elements), [])


def split_batch(devices, *batch):
  """Splits a batch into equal parts on the CPU, so that each device receives its own part only.

  Args:
    devices: device names from `tower_devices`.
    *batch: tensors whose first dimension is divisible by the number of devices.

  Returns:
    List of tuples of tensors, one tuple per tower.
  """
  with tf.device('/cpu:0'):
    return list(zip(*(tf.split(tensor, len(devices)) for tensor in batch)))


def prefetch(devices, parts):
  """Copies each tower's part of the next batch to its device while the current one is used.

  Args:
    devices: device names from `tower_devices`.
    parts: list of tuples of tensors from `split_batch`.

  Returns:
    The parts of the current batch, on the devices; the op that fetches the next batch. It must
    run once before the first step, which `Scaffold.default_local_init_op` does, and then once in
    every step.
  """
  current, fetch = [], []
  for device, part in zip(devices, parts):
    with tf.device(device):
      area = data_flow_ops.StagingArea([tensor.dtype for tensor in part],
                                       [tensor.shape for tensor in part])
      fetch.append(area.put(part))
      current.append(area.get())
  fetch = tf.group(*fetch)
  tf.add_to_collection(tf.GraphKeys.TABLE_INITIALIZERS, fetch)
  return current, fetch


def replicate(tower_fn, devices, parts, mirrored=False):
  """Builds one tower per device.

  Args:
    tower_fn: function of the tensors of a part; the first tower creates its variables.
    devices: device names from `tower_devices`.
    parts: list of tuples of tensors, one tuple per tower.
    mirrored: whether the other towers have copies of the variables instead of sharing them.

  Returns:
    List of the values of tower_fn, one per tower.
  """
  outputs = []
  for i, (device, part) in enumerate(zip(devices, parts)):
    with tf.device(device), tf.name_scope(tower_scope(i)), \
         tf.variable_scope(tf.get_variable_scope(), reuse=i > 0,
                           custom_getter=_mirroring_getter(i) if mirrored and i else None), \
         slim.arg_scope([slim.model_variable, slim.variable],
                        device=device if mirrored else variables_device(devices)):
      outputs.append(tower_fn(*part))
  return outputs


def copies(variables):
  """Returns the copies of variables that belong to the tower being built."""
  with tf.variable_scope(tf.get_variable_scope(), reuse=True):
    return [tf.get_variable(variable.op.name, dtype=variable.dtype.base_dtype)
            for variable in variables]


def _mirroring_getter(tower):
  """Returns a variable getter that returns a tower's copies of the variables."""
  mirrors = {}

  def get(getter, name, *args, **kwargs):
    if name not in mirrors:
      mirrors[name] = _mirror(getter(name, *args, **kwargs), f'{tower_scope(tower)}/{name}')
    return mirrors[name]
  return get


def get_slot(getter, name, *args, **kwargs):
  """Gets an optimizer's variable; a custom getter for `tf.variable_scope`.

  Those of mirrors are copies too, so that all towers go on from the same checkpoint.
  """
  scope, _, original = name.partition('/')
  if not scope.startswith(tower_scope('')):
    return getter(name, *args, **kwargs)
  return _mirror(getter(original, *args, **{**kwargs, 'reuse': True}), name)


def _mirror(variable, name):
  """Returns a copy of a variable that is not saved: it starts with the variable's value."""
  with tf.name_scope(None):
    # Local variables are initialized after a checkpoint has been restored.
    return tf.Variable(variable.read_value, trainable=False, name=name,
                       collections=[tf.GraphKeys.LOCAL_VARIABLES])


def accumulate(tower_fn, num_parts):
  """Returns a tower function that processes its images in equal parts, one after another.

  Only one part's activations are in memory at a time. The results are averaged over the
  parts, so they equal those of tower_fn on all images, except that batch norm sees one part.

  Args:
    tower_fn: function of tensors that returns scalars followed by a list of (gradient,
      variable) pairs.
    num_parts: int; 1 returns tower_fn unchanged.
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


def require_gradients(pairs):
  """Returns (gradient, variable) pairs as they are.

  Raises:
    ValueError: a variable has no gradient.
  """
  for gradient, variable in pairs:
    if gradient is None:
      raise ValueError(f'The loss does not depend on the variable {variable.name}')
  return pairs


def average_gradients(tower_gradients):
  """Averages gradients over the towers, which wait for each other here.

  Args:
    tower_gradients: one list of (gradient, variable) pairs per tower, in the same order, as
      `Optimizer.compute_gradients` returns them.

  Returns:
    List of (mean gradient, variable) pairs.
  """
  if len(tower_gradients) == 1:
    return tower_gradients[0]
  return [(tf.add_n([gradient for gradient, _ in pairs]) / len(pairs), pairs[0][1])
          for pairs in zip(*tower_gradients)]
