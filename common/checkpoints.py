"""Finds the checkpoints of a log folder, and stores beside them what they were built with.

train_flowers.py writes `model_config.json`; eval_flowers.py and write_pb.py
read it, so that no number is repeated on their command lines.
"""

import dataclasses
import json
import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import files

CONFIG_FILE = 'model_config.json'
NEXT_IMAGE = 'next_image'  # variable: the image that a resumed run goes on with


class CheckpointError(Exception):
  """A checkpoint or its configuration is missing, damaged, or of another model."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that the graph of a checkpoint depends on.

  Attributes:
    class_names: names of the classes; a name's index is its label.
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
    checkpoint_path: a checkpoint like log/model.ckpt-1500, or a folder whose
      newest one is meant; None is the newest of log_dir.

  Returns:
    The checkpoint's path, without its file endings.

  Raises:
    CheckpointError: there is none.
  """
  path = checkpoint_path or log_dir
  if os.path.isdir(path):
    checkpoint = tf.train.latest_checkpoint(path)
    if checkpoint and tf.train.checkpoint_exists(checkpoint):
      return checkpoint
  elif tf.train.checkpoint_exists(path):
    return path
  raise CheckpointError(f'No checkpoint in {path}: run train_flowers.py first')


def global_step(checkpoint):
  """Returns the training step that the checkpoint was written at."""
  return int(tf.train.load_checkpoint(checkpoint).get_tensor('global_step'))


def next_image(checkpoint):
  """Returns how many images training had passed when the checkpoint was written.

  Raises:
    CheckpointError: training did not write it.
  """
  reader = tf.train.load_checkpoint(checkpoint)
  if not reader.has_tensor(NEXT_IMAGE):
    raise CheckpointError(f'{checkpoint} was not written by train_flowers.py, which cannot '
                          'resume from it: choose another --log_dir')
  return int(reader.get_tensor(NEXT_IMAGE))


def stored_names(checkpoint, names, use_averages='auto'):
  """Returns the names by which a checkpoint knows the variables of a network.

  Args:
    checkpoint: path of the checkpoint.
    names: names of the network's variables.
    use_averages: 'auto' takes the Polyak averages of the weights if the
      checkpoint has them, else the weights; 'yes' and 'no' insist on one.

  Returns:
    dict from each name to the name in the checkpoint, and whether these are
    the averages.

  Raises:
    CheckpointError: 'yes', and the checkpoint has no averages.
  """
  stored = tf.train.load_checkpoint(checkpoint).get_variable_to_shape_map()
  # As tf.train.ExponentialMovingAverage calls them.
  averages = {name: f'{name}/ExponentialMovingAverage' for name in names}
  has_averages = all(average in stored for average in averages.values())
  if use_averages == 'yes' and not has_averages:
    raise CheckpointError(f'{checkpoint} has no averages of the weights: train with '
                          '--moving_average_decay, or evaluate the weights themselves')
  if use_averages == 'no' or not has_averages:
    return {name: name for name in names}, False
  return averages, True


def inference_saver(checkpoint, use_averages='auto'):
  """Returns what restores the default graph's network from a checkpoint.

  Args:
    checkpoint, use_averages: see `stored_names`.

  Returns:
    A tf.train.Saver, and whether it restores averages.

  Raises:
    CheckpointError: 'yes', and the checkpoint has no averages.
  """
  variables = {variable.op.name: variable for variable in slim.get_model_variables()}
  names, are_averages = stored_names(checkpoint, variables, use_averages)
  saver = tf.train.Saver({names[name]: variable for name, variable in variables.items()})
  return saver, are_averages


def check_same_variables(checkpoint):
  """Checks that the default graph can resume from a checkpoint, and use all of it.

  Raises:
    CheckpointError: one has variables that the other lacks, as those of another
      optimizer.
  """
  stored = set(tf.train.load_checkpoint(checkpoint).get_variable_to_shape_map())
  here = {variable.op.name for variable in tf.global_variables()}
  if stored != here:
    lacking = sorted(here - stored) or sorted(stored - here)
    raise CheckpointError(
        f'{checkpoint} {"lacks" if here - stored else "has"} {len(lacking)} variables that this '
        f'run {"needs" if here - stored else "lacks"}, the first is {lacking[0]}. Resume with '
        'the options that it was started with (optimizer, recipe, averages, trainable scopes), '
        'or choose another --log_dir')


def sha256(checkpoint):
  """Returns the SHA-256 of a checkpoint's index, which has a checksum of every variable.

  It identifies the content of the checkpoint, wherever that is copied or moved. A
  checkpoint of version 1 is a single file, whose SHA-256 it is.
  """
  index = f'{checkpoint}.index'
  return files.sha256(index if os.path.exists(index) else checkpoint)


def save_config(config, log_dir):
  """Writes the configuration into log_dir, in one atomic step."""
  text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + '\n'
  files.write_atomically(os.path.join(log_dir, CONFIG_FILE), text.encode())


def load_config(checkpoint):
  """Reads the configuration beside a checkpoint.

  Returns:
    A ModelConfig.

  Raises:
    CheckpointError: there is none, or it cannot be understood.
  """
  path = os.path.join(os.path.dirname(checkpoint), CONFIG_FILE)
  try:
    with open(path, encoding='utf-8') as f:
      return ModelConfig(**json.load(f))
  except (OSError, ValueError, TypeError) as error:
    raise CheckpointError(
        f'{path}, which train_flowers.py writes beside a checkpoint, cannot be read: '
        f'{error}') from error


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
        'Choose another --log_dir, or the same options')
