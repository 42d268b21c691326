"""The log folder of a training run: its lock, its model and the record of its starts."""

import contextlib
import datetime
import fcntl
import glob
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files

LOCK_FILE = 'train.lock'
RUNS_FILE = 'runs.jsonl'
SCRATCH_PREFIX = 'train_flowers_'  # and the process, in the folder of temporary files


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
    reason = 'it is a broken link' if os.path.islink(log_dir) else error.strerror
    raise LogFolderError(f'Cannot write to --log_dir {log_dir!r}: {reason}') from error
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
  """Returns a context with a temporary folder for a worker whose files nobody keeps.

  Workers that were killed leave theirs, which are removed here.
  """
  for folder in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f'{SCRATCH_PREFIX}*_*')):
    pid = os.path.basename(folder)[len(SCRATCH_PREFIX):].split('_')[0]
    if pid.isdecimal() and not _is_alive(int(pid)):
      shutil.rmtree(folder, ignore_errors=True)
  return tempfile.TemporaryDirectory(prefix=f'{SCRATCH_PREFIX}{os.getpid()}_')


def _is_alive(pid):
  try:
    os.kill(pid, 0)  # sends nothing
  except ProcessLookupError:
    return False
  except (PermissionError, OverflowError):  # another user's process; not a process's number
    pass
  return True


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


def record_start(log_dir, start_step, dataset, devices, summary_writer):
  """Records this start's command, devices and versions in runs.jsonl and TensorBoard.

  Warns if the images are not those of the previous start.

  Args:
    log_dir: the run's folder.
    start_step: the step that training starts from.
    dataset: slim Dataset of the training split.
    devices: device of each tower.
    summary_writer: tf.summary.FileWriter.
  """
  path = os.path.join(log_dir, RUNS_FILE)
  training_split = dataset.records.fingerprint()
  previous = _last_training_split(path) if start_step else None
  if previous not in (None, training_split):
    print(f'Warning: the training split has changed since the last start (images, hash of their '
          f'sizes: {previous} then, {training_split} now). Training continues at the same '
          'position, so images of this epoch may be seen twice or not at all', file=sys.stderr)
  run = {
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'start_step': start_step,
      'command': sys.argv,
      'training_split': training_split,
      'devices': list(devices),
      'physical_devices': [device.name for device in tf.config.list_physical_devices()],
      'git': _git_state(),
      'python': platform.python_version(),
      'tensorflow': tf.__version__,
      'numpy': np.__version__,
      'platform': platform.platform(),
  }
  with open(path, 'a', encoding='utf-8') as f:
    f.write(json.dumps(run) + '\n')
  rows = ''.join(f'| {name} | {value} |\n' for name, value in run.items())
  metadata = tf.SummaryMetadata(plugin_data=tf.SummaryMetadata.PluginData(plugin_name='text'))
  summary_writer.add_summary(tf.Summary(value=[tf.Summary.Value(
      tag='run', metadata=metadata,
      tensor=tf.make_tensor_proto(f'| | |\n|---|---|\n{rows}', tf.string))]), start_step)


def _last_training_split(path):
  """Returns the fingerprint of the training split in the last line of runs.jsonl, or None."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.loads(f.readlines()[-1]).get('training_split')
  except (OSError, ValueError, IndexError, AttributeError):  # missing, or edited
    return None


def _git_state():
  """Returns the scripts' commit, with a + if files differ from it, or None without git."""
  def git(*args):
    return subprocess.run(['git', '-C', files.PROJECT_DIR, *args], check=True, capture_output=True,
                          text=True).stdout.strip()
  try:
    return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.CalledProcessError):
    return None
