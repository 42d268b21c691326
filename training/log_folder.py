"""The log folder of a training run: its lock, its model and the record of its starts."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import random
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files

CHECKPOINT_NAME = 'model.ckpt'  # tf.train.CheckpointSaverHook's
LOCK_FILE = 'train.lock'
RUNS_FILE = 'runs.jsonl'


class LogFolderError(Exception):
  """The log folder cannot be used; the message says why."""


@contextlib.contextmanager
def lock(log_dir):
  """Creates log_dir and keeps every other training run out of it during the context.

  The system releases the lock however the process ends, even by kill -9.

  Yields:
    log_dir.

  Raises:
    LogFolderError: another process holds the lock, or log_dir cannot be written to.
    checkpoints.CheckpointError: TensorFlow cannot read checkpoints at this path.
  """
  checkpoints.check_path(log_dir)
  try:
    os.makedirs(log_dir, exist_ok=True)
    f = open(os.path.join(log_dir, LOCK_FILE), 'a+', encoding='utf-8')
  except OSError as error:
    raise LogFolderError(f'Cannot write to --log_dir {log_dir!r}: {error.strerror}') from error
  with f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      f.seek(0)
      raise LogFolderError(f'Process {f.read().strip() or "(unknown)"} is training in {log_dir}: '
                           'wait for it, stop it, or choose another --log_dir') from error
    f.truncate(0)
    f.write(f'{os.getpid()}\n')
    f.flush()
    yield log_dir


def scratch():
  """Returns a context with a temporary folder for a worker whose files nobody keeps."""
  return tempfile.TemporaryDirectory(prefix='train_flowers_')


def make_saver(folder, max_to_keep):
  """Returns a tf.train.Saver of the default graph that also deletes the folder's old checkpoints.

  The paths that it stores are relative, so the folder can be moved.
  """
  saver = tf.train.Saver(max_to_keep=max_to_keep, save_relative_paths=True)
  saver.recover_last_checkpoints([path for path in checkpoints.list_checkpoints(folder)
                                  if os.path.basename(path).startswith(f'{CHECKPOINT_NAME}-')])
  return saver


def load_or_create_config(dataset, log_dir, checkpoint, image_size, depth_multiplier, seed):
  """Stores the model's configuration in log_dir, or compares it with the one stored there.

  Args:
    dataset: slim Dataset of the training split.
    log_dir: folder of the checkpoints.
    checkpoint: the checkpoint in log_dir that training resumes from, or None.
    image_size, depth_multiplier: as on the command line.
    seed: int; None takes the stored one, or draws one.

  Returns:
    A ModelConfig.

  Raises:
    checkpoints.CheckpointError: log_dir holds checkpoints of another model.
  """
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


def record_start(log_dir, start_step, devices, summary_writer):
  """Records this start's command, devices and versions in runs.jsonl and TensorBoard.

  Args:
    log_dir: the run's folder.
    start_step: the step that training starts from.
    devices: device of each tower.
    summary_writer: tf.summary.FileWriter.
  """
  run = {
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'start_step': start_step,
      'command': sys.argv,
      'devices': list(devices),
      'physical_devices': [device.name for device in tf.config.list_physical_devices()],
      'git': _git_state(),
      'python': platform.python_version(),
      'tensorflow': tf.__version__,
      'numpy': np.__version__,
      'platform': platform.platform(),
  }
  with open(os.path.join(log_dir, RUNS_FILE), 'a', encoding='utf-8') as f:
    f.write(json.dumps(run) + '\n')
  rows = ''.join(f'| {name} | {value} |\n' for name, value in run.items())
  metadata = tf.SummaryMetadata(plugin_data=tf.SummaryMetadata.PluginData(plugin_name='text'))
  summary_writer.add_summary(tf.Summary(value=[tf.Summary.Value(
      tag='run', metadata=metadata,
      tensor=tf.make_tensor_proto(f'| | |\n|---|---|\n{rows}', tf.string))]), start_step)


def _git_state():
  """Returns the scripts' commit, with a + if files differ from it, or None without git."""
  def git(*args):
    return subprocess.run(['git', '-C', files.PROJECT_DIR, *args], check=True, capture_output=True,
                          text=True).stdout.strip()
  try:
    return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.CalledProcessError):
    return None
