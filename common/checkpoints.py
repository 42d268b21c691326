"""Finds checkpoints, and stores their model's configuration beside them.

train_flowers.py writes `model_config.json`; eval_flowers.py and write_pb.py read
it, so that their command lines need not repeat it.
"""

import collections
import dataclasses
import json
import os
import re
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import errors
from common import files
import xception

CONFIG_FILE = 'model_config.json'
TEMPERATURE_FILE = 'temperature.json'
NEXT_IMAGE = 'next_image'  # variable: the position that a resumed run continues from
GLOB_CHARACTERS = '*?[\\'  # TensorFlow expands them when it restores
FILE_SUFFIX = re.compile(r'\.(index|meta|data-\d{5}-of-(\d{5}))$')


class CheckpointError(Exception):
  """A checkpoint or its configuration is missing, damaged or belongs to another model."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The settings that determine a checkpoint's graph.

  Attributes:
    class_names: names of the classes, ordered by label.
    image_size: height and width of the network's input in pixels.
    depth_multiplier: width of the network, 1.0 in the paper.
    seed: seed of the training run.
  """
  class_names: list[str]
  image_size: int
  depth_multiplier: float
  seed: int

  @property
  def num_classes(self):
    return len(self.class_names)


def find(log_dir, checkpoint_path=None):
  """Finds a checkpoint.

  Args:
    log_dir: folder that train_flowers.py wrote.
    checkpoint_path: a checkpoint like log/model.ckpt-1500, or a folder, which
      means its newest one; None means the newest one of log_dir.

  Returns:
    The checkpoint's path without file extensions.

  Raises:
    CheckpointError: there is none.
  """
  path = log_dir if checkpoint_path is None else checkpoint_path
  check_path(path)
  if os.path.basename(path) == 'checkpoint' and not os.path.isdir(path):
    path = os.path.dirname(path) or '.'
  if os.path.isdir(path):
    if checkpoint := find_newest(path):
      return checkpoint
  else:
    prefix = FILE_SUFFIX.sub('', path.rstrip('/'))
    if prefix.endswith(('.h5', '.keras')) and os.path.exists(prefix):
      raise CheckpointError(f'{path} is a Keras file: convert it with convert_keras_weights.py')
    folder, name = os.path.split(prefix)
    if name in _complete_names(folder or '.') or os.path.isfile(prefix):  # a file of version 1
      return prefix
  raise CheckpointError(f'No checkpoint in {path}: run train_flowers.py first')


def check_path(path):
  """Raises a CheckpointError if TensorFlow cannot write checkpoints to a path and read them."""
  reason = None
  if '://' in path:
    reason = 'is a URL: use a folder of this machine'
  elif found := sorted(set(path).intersection(GLOB_CHARACTERS)):
    reason = f'contains {" ".join(found)}, which TensorFlow reads as a pattern: rename the folder'
  elif path.encode(errors='ignore').decode() != path:
    reason = 'is not UTF-8: rename the folder'
  if reason:
    raise CheckpointError(f'{path!r} {reason}')


def list_checkpoints(folder):
  """Returns the complete checkpoints in a folder, oldest first.

  Their order is that of the file `checkpoint`; where it is missing or names a newest
  checkpoint that is not complete, it is that of their steps. Only the names in that file
  count, so a folder can be moved.
  """
  ordered = _read_state(folder)  # first, because training may save between the two
  complete = _complete_names(folder)
  if not ordered or ordered[-1] not in complete:
    def step_and_time(name):
      step = re.search(r'-(\d+)$', name)
      return int(step.group(1)) if step else -1, os.path.getmtime(f'{folder}/{name}.index')
    ordered = sorted(complete, key=step_and_time)
  return [os.path.join(folder, name) for name in ordered if name in complete]


def find_newest(folder):
  """Returns the newest checkpoint of a folder, or None if it holds no file of one.

  Raises:
    CheckpointError: it holds files of checkpoints, but no complete checkpoint.
  """
  named = _read_state(folder)
  found = list_checkpoints(folder)
  if found and named and os.path.basename(found[-1]) != named[-1]:
    print(f'Warning: {named[-1]}, the newest checkpoint of {folder}, is incomplete: '
          f'using {found[-1]}', file=sys.stderr)
  parts = sorted(name for name in _list_folder(folder)
                 if name == 'checkpoint' or re.search(r'\.(index|data-\d{5}-of-\d{5})$', name))
  if parts and not found:
    raise CheckpointError(
        f'{folder} holds parts of checkpoints ({", ".join(parts[:3])}), but no complete one, '
        'which is an .index with all its .data files. Copy the missing files back, or move these '
        'away to start again')
  return found[-1] if found else None


def open_checkpoint(checkpoint):
  """Returns a reader of a checkpoint.

  Raises:
    CheckpointError: it is damaged, or is not a checkpoint.
  """
  try:
    return tf.train.load_checkpoint(checkpoint)
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    raise CheckpointError(f'{checkpoint} cannot be read: {error}') from error


def _read_number(checkpoint, name):
  """Returns a whole number stored in a checkpoint.

  Raises:
    CheckpointError: it is damaged, or lacks the number.
  """
  try:
    return int(open_checkpoint(checkpoint).get_tensor(name))
  # An IndexError means that a data file is too short.
  except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
    raise CheckpointError(f'{checkpoint} cannot be read: {error}') from error


def global_step(checkpoint):
  """Returns the training step at which the checkpoint was written; 0 if it does not say."""
  has_step = open_checkpoint(checkpoint).has_tensor('global_step')
  return _read_number(checkpoint, 'global_step') if has_step else 0


def next_image(checkpoint):
  """Returns the number of images that training had passed when it wrote the checkpoint.

  Raises:
    CheckpointError: training did not write it.
  """
  if not open_checkpoint(checkpoint).has_tensor(NEXT_IMAGE):
    raise CheckpointError(f'{checkpoint} was not written by train_flowers.py, which cannot '
                          'resume from it: choose another --log_dir')
  return _read_number(checkpoint, NEXT_IMAGE)


def stored_names(checkpoint, names, use_averages='auto'):
  """Maps the names of a network's variables to those under which a checkpoint stores them.

  Args:
    checkpoint: path of the checkpoint.
    names: names of the network's variables.
    use_averages: 'auto' prefers the Polyak averages of the weights; 'yes'
      requires them and 'no' ignores them.

  Returns:
    {name: name in the checkpoint}, and whether these are the averages.

  Raises:
    CheckpointError: 'yes', and the checkpoint has no averages.
  """
  stored = open_checkpoint(checkpoint).get_variable_to_shape_map()
  # As tf.train.ExponentialMovingAverage calls them.
  averages = {name: f'{name}/ExponentialMovingAverage' for name in names}
  has_averages = all(average in stored for average in averages.values())
  if use_averages == 'yes' and not has_averages:
    raise CheckpointError(f'{checkpoint} has no averages of the weights: train with '
                          '--moving_average_decay, or use the weights themselves')
  if use_averages == 'no' or not has_averages:
    return {name: name for name in names}, False
  return averages, True


def restore(session, checkpoint, use_averages='auto', savers=None):
  """Restores the network in a session's graph; returns whether its weights are averages.

  Args:
    session: tf.Session.
    checkpoint, use_averages: see `stored_names`.
    savers: dict, empty at first, for restoring several checkpoints in one session:
      without it, the graph grows with every call.

  Raises:
    CheckpointError: the checkpoint is of another network, is damaged or has no averages.
  """
  savers = {} if savers is None else savers
  stored = open_checkpoint(checkpoint).get_variable_to_shape_map()
  with session.graph.as_default():
    variables = {variable.op.name: variable for variable in slim.get_model_variables()}
    names, are_averages = stored_names(checkpoint, variables, use_averages)
    variables = {names[name]: variable for name, variable in variables.items()}
    key = frozenset(variables)  # checkpoints with the same variables share a saver
    try:
      if key not in savers:
        savers[key] = tf.train.Saver(variables)
      for name, variable in variables.items():  # which the saver would overwrite with any shape
        if stored.get(name, variable.shape) != variable.shape:
          raise ValueError(f'its {name} has the shape {stored[name]}, not {variable.shape} as in '
                           f'the network of {CONFIG_FILE}')
      savers[key].restore(session, checkpoint)
    except (tf.errors.OpError, ValueError) as error:
      raise CheckpointError(
          f'{checkpoint} cannot be restored: {errors.reason(error)}') from error
  return are_averages


def check_same_variables(checkpoint):
  """Checks that the default graph and a checkpoint have the same variables.

  Raises:
    CheckpointError: one has variables that the other lacks, such as another
      optimizer's.
  """
  stored = set(open_checkpoint(checkpoint).get_variable_to_shape_map())
  here = {variable.op.name for variable in tf.global_variables()}
  if stored != here:
    lacking = sorted(here - stored) or sorted(stored - here)
    raise CheckpointError(
        f'{checkpoint} {"lacks" if here - stored else "has"} {len(lacking)} variables that this '
        f'run {"needs" if here - stored else "lacks"}, first {lacking[0]}. Resume with '
        'the options that it was started with (optimizer, recipe, averages, trainable scopes), '
        'or choose another --log_dir')


def sha256(checkpoint):
  """Returns the SHA-256 of a checkpoint's index, which has a checksum of every variable.

  It identifies the content of the checkpoint, wherever that is copied or moved. A
  checkpoint of version 1 is a single file, whose SHA-256 it is.

  Raises:
    CheckpointError: it was deleted, or cannot be read.
  """
  index = f'{checkpoint}.index'
  try:
    return files.sha256(index if os.path.exists(index) else checkpoint)
  except OSError as error:
    raise CheckpointError(f'{checkpoint} cannot be read: {error}') from error


def read_result(path, checkpoint, uses_averages, image_size):
  """Returns the content of a JSON file of eval_flowers.py that is about exactly these weights.

  Args:
    path: of a file like metrics.json.
    checkpoint: path of the checkpoint, which may have been moved since.
    uses_averages: whether the weights are Polyak averages.
    image_size: height and width of the images in pixels.

  Returns:
    A dict, or None if the file is missing, damaged or about something else.
  """
  identity = {'checkpoint_sha256': sha256(checkpoint), 'uses_averages': uses_averages,
              'image_size': image_size}
  try:
    with open(path, encoding='utf-8') as f:
      found = json.load(f)
    return found if identity.items() <= found.items() else None
  except (AttributeError, OSError, TypeError, ValueError):
    return None


def temperature_file(checkpoint):
  """Returns the path of the file beside a checkpoint in which its temperature is kept."""
  return os.path.join(os.path.dirname(checkpoint), TEMPERATURE_FILE)


def read_temperature(checkpoint, uses_averages, image_size):
  """Returns what `eval_flowers.py --fit_temperature` stored about exactly these weights.

  Args:
    checkpoint, uses_averages, image_size: see `read_result`.

  Returns:
    A dict whose `temperature` is a number > 0, or None.
  """
  found = read_result(temperature_file(checkpoint), checkpoint, uses_averages, image_size)
  temperature = found and found.get('temperature')
  is_usable = isinstance(temperature, (int, float)) and 0 < temperature < float('inf')
  return found if is_usable else None


def save_config(config, log_dir):
  """Writes the configuration to log_dir atomically."""
  text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + '\n'
  files.write_atomically(os.path.join(log_dir, CONFIG_FILE), text.encode())


def load_config(checkpoint):
  """Reads the ModelConfig beside a checkpoint.

  Raises:
    CheckpointError: it is missing or damaged.
  """
  path = os.path.join(os.path.dirname(checkpoint), CONFIG_FILE)
  try:
    with open(path, encoding='utf-8') as f:
      config = ModelConfig(**json.load(f))
    _check_config(config)
    return config
  except (OSError, ValueError, TypeError) as error:
    raise CheckpointError(
        f'{path}, which train_flowers.py writes beside a checkpoint, cannot be read: '
        f'{error}') from error


def _check_config(config):
  """Raises a ValueError if a value, which somebody may have edited, is impossible."""
  is_possible = {
      'class_names': isinstance(config.class_names, list) and config.class_names
                     and all(isinstance(name, str) for name in config.class_names),
      'image_size': type(config.image_size) is int
                    and config.image_size >= xception.MIN_IMAGE_SIZE,
      'depth_multiplier': type(config.depth_multiplier) in (int, float)
                          and 0 < config.depth_multiplier < float('inf'),
      'seed': type(config.seed) is int and config.seed >= 0,
  }
  for name, possible in is_possible.items():
    if not possible:
      raise ValueError(f'{name} cannot be {getattr(config, name)!r}')


def check_same_model(asked, found, log_dir):
  """Raises a CheckpointError if `asked` does not fit the checkpoints of log_dir."""
  differences = [
      f'{field.name} is {getattr(found, field.name)!r} there and '
      f'{getattr(asked, field.name)!r} here'
      for field in dataclasses.fields(ModelConfig)
      if getattr(found, field.name) != getattr(asked, field.name)]
  if differences:
    raise CheckpointError(
        f'{log_dir} holds checkpoints of another model: {"; ".join(differences)}. '
        'Choose another --log_dir, or use the same options')


def _list_folder(folder):
  """Returns the names of the files in a folder, which need not exist."""
  if not os.path.isdir(folder):
    return []
  return [entry.name for entry in os.scandir(folder) if entry.is_file()]


def _complete_names(folder):
  """Returns the names of the checkpoints in a folder that have an index and all their data."""
  names = _list_folder(folder)
  num_found, num_shards = collections.Counter(), {}
  for name in names:
    suffix = FILE_SUFFIX.search(name)
    if suffix and suffix.group(2):
      prefix = name[:suffix.start()]
      num_found[prefix] += 1
      num_shards[prefix] = int(suffix.group(2))
  return {prefix for prefix, count in num_found.items()
          if count >= num_shards[prefix] and f'{prefix}.index' in names}


def _read_state(folder):
  """Returns the names of the checkpoints in the file `checkpoint`, the newest last."""
  try:
    state = tf.train.get_checkpoint_state(folder)
  except ValueError:  # an empty file, or not a text
    state = None
  if not state:
    return []
  newest = state.model_checkpoint_path
  return [os.path.basename(path) for path in
          [*(path for path in state.all_model_checkpoint_paths if path != newest), newest]]
