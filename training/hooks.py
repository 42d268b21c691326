"""Session hooks that report a training run's progress, trace it and stop it cleanly."""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time

import tensorflow.compat.v1 as tf
from tensorflow.python.client import timeline
import tqdm

from common import files
from records import flowers

# `timeout` of the coreutils signals a process and then its group: one signal arrives twice.
REPEAT_SECS = 0.1


class ProgressHook(tf.train.SessionRunHook):
  """Shows loss, accuracy and images per second: a bar on a terminal, otherwise log lines.

  A line's figures are means over the steps since the previous line. Images per
  second also go to TensorBoard.
  """

  def __init__(self, global_step, next_image, loss, accuracy, batch_size, num_towers, plan,
               log_every_n_steps, summary_writer):
    """Initializes the hook.

    Args:
      global_step: int64 [], its value after the step.
      next_image: int64 [] variable, the number of images seen.
      loss, accuracy: float32 [], of the step.
      batch_size: images per step, summed over towers.
      num_towers: number of towers on all workers.
      plan: plan.Plan.
      log_every_n_steps: steps between two lines.
      summary_writer: tf.summary.FileWriter.
    """
    self._next_image = next_image
    self._fetches = {'step': global_step, 'loss': loss, 'accuracy': accuracy}
    self._batch_size = batch_size
    self._num_towers = num_towers
    self._plan = plan
    self._log_every_n_steps = log_every_n_steps
    self._summary_writer = summary_writer
    self._bar = None

  def begin(self):
    with tf.control_dependencies([self._fetches['step']]):
      self._fetches['images'] = self._next_image.read_value()

  def after_create_session(self, session, coord):
    self._step = self._plan.start_step
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=self._plan.total_images, initial=self._plan.first_image,
                            unit=' images', dynamic_ncols=True)
    self._start_interval()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._fetches)

  def after_run(self, run_context, run_values):
    values = run_values.results
    step = int(values['step'])
    if step == self._step:  # float16 skipped it
      return
    self._step = step
    self._losses.append(values['loss'])
    self._accuracies.append(values['accuracy'])
    if self._bar is not None:
      self._bar.update(int(values['images']) - self._bar.n)
    if step % self._log_every_n_steps == 0 or step == self._plan.max_steps:
      self._report(step, int(values['images']))
      self._start_interval()

  def end(self, session):
    if self._bar is not None:
      self._bar.close()

  def _start_interval(self):
    self._losses, self._accuracies = [], []
    self._interval_start = time.perf_counter()

  def _report(self, step, images):
    steps = len(self._losses)
    seconds_per_step = (time.perf_counter() - self._interval_start) / steps
    images_per_second = self._batch_size / seconds_per_step
    loss = sum(self._losses) / steps
    accuracy = sum(self._accuracies) / steps
    epoch = images / self._plan.dataset.num_samples
    self._summary_writer.add_summary(
        tf.Summary(value=[tf.Summary.Value(tag='images_per_second',
                                           simple_value=images_per_second)]), step)
    if self._bar is not None:
      self._bar.set_postfix_str(f'epoch {epoch:.1f}, loss {loss:.4f}, accuracy {accuracy:.3f}')
      return
    minutes, seconds = divmod(round((self._plan.max_steps - step) * seconds_per_step), 60)
    per_tower = (f', {images_per_second / self._num_towers:.1f} per tower'
                 if self._num_towers > 1 else '')
    line = (f'global step {step}/{self._plan.max_steps}: loss = {loss:.4f}, '
            f'accuracy = {accuracy:.3f} ({seconds_per_step:.3f} sec/step, '
            f'{images_per_second:.1f} images/sec{per_tower}, epoch {epoch:.2f}, '
            f'{minutes // 60:02}:{minutes % 60:02}:{seconds:02} left)')
    try:
      print(line, flush=True)
    except OSError:  # the terminal or the reader of a pipe is gone; training goes on
      _discard_output(1)


class BadRecordsHook(tf.train.SessionRunHook):
  """Counts the records that the input pipeline skipped, and stops if there are too many.

  Gaps in the positions of this worker's images identify the records. A record
  counts once, in however many epochs it is skipped.

  Attributes:
    too_many: why training was stopped, or None.
  """

  def __init__(self, global_step, positions, dataset, seed, first_image, batch_size, workers,
               max_bad_fraction, summary_writer):
    """Initializes the hook.

    Args:
      global_step: int64 [], its value after the step.
      positions: int64 [images of this worker], from `flowers.load_numbered_batch`.
      dataset, seed, first_image, batch_size: the arguments of that call.
      workers: cluster.Workers or SingleWorker, to stop training on all of them.
      max_bad_fraction: fraction of the records that may be bad, in [0, 1).
      summary_writer: tf.summary.FileWriter.
    """
    self.too_many = None
    self._fetches = [global_step, positions]
    self._dataset = dataset
    self._seed = seed
    self._position = functools.partial(
        flowers.training_position, first_image=first_image, batch_size=batch_size,
        worker=workers.index, num_workers=workers.size)
    self._next_index = 0  # of this worker's images
    self._workers = workers
    self._max_bad = max_bad_fraction * dataset.num_samples
    self._summary_writer = summary_writer
    self._bad_numbers = set()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._fetches)

  def after_run(self, run_context, run_values):
    step, positions = run_values.results
    missing = self._find_missing(positions)
    if missing:
      for position in missing:
        self._count(flowers.record_number(position, self._dataset.num_samples, self._seed))
      self._summary_writer.add_summary(
          tf.Summary(value=[tf.Summary.Value(tag='bad_records',
                                             simple_value=len(self._bad_numbers))]), step)
      if len(self._bad_numbers) > self._max_bad:
        self.too_many = (
            f'{len(self._bad_numbers)} of {self._dataset.num_samples} records are bad, more '
            f'than the {self._max_bad:g} that --max_bad_fraction allows. Recreate the dataset, or '
            'raise --max_bad_fraction')
        self._workers.request_stop(run_context)

  def end(self, session):
    if self._bad_numbers:
      print(f'Bad records skipped: {len(self._bad_numbers)}', file=sys.stderr)

  def _find_missing(self, positions):
    """Returns the positions that were skipped before and between these."""
    missing = []
    for position in positions:
      while (expected := self._position(self._next_index)) != position:
        missing.append(expected)
        self._next_index += 1
      self._next_index += 1
    return missing

  def _count(self, number):
    if number in self._bad_numbers:
      return
    self._bad_numbers.add(number)
    if len(self._bad_numbers) <= flowers.MAX_NAMED_BAD_RECORDS:
      print(f'Warning: skipping {flowers.describe_bad_record(self._dataset, number)}',
            file=sys.stderr, flush=True)


class ProfileHook(tf.train.SessionRunHook):
  """Traces chosen steps, for TensorBoard's graph and as files for ui.perfetto.dev.

  `timeline-100.json` in the log folder shows when and where each op of step 100 ran.
  """

  def __init__(self, global_step, steps, log_dir, summary_writer):
    """Initializes the hook.

    Args:
      global_step: int64 [], its value after the step.
      steps: the steps to trace.
      log_dir: folder of the files.
      summary_writer: tf.summary.FileWriter.
    """
    self._global_step = global_step
    self._steps = set(steps)
    self._log_dir = log_dir
    self._summary_writer = summary_writer

  def after_create_session(self, session, coord):
    self._step = session.run(tf.train.get_global_step())

  def before_run(self, run_context):
    trace = None
    if self._step + 1 in self._steps:
      trace = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
    return tf.train.SessionRunArgs(self._global_step, options=trace)

  def after_run(self, run_context, run_values):
    previous, self._step = self._step, int(run_values.results)
    if self._step == previous or self._step not in self._steps:
      return
    trace = timeline.Timeline(run_values.run_metadata.step_stats).generate_chrome_trace_format()
    files.write_atomically(os.path.join(self._log_dir, f'timeline-{self._step}.json'),
                           trace.encode())
    self._summary_writer.add_run_metadata(run_values.run_metadata, f'step {self._step}',
                                          self._step)


class StopOnSignalHook(tf.train.SessionRunHook):
  """On Ctrl-C or SIGTERM, finishes the current step and stops training, which saves.

  So it does when the terminal is closed (SIGHUP), unless nohup is to ignore that.
  A second signal ends the process at once, whatever it waits for; the last
  checkpoint stays intact. Signals are received while the hook's context lasts.

  Attributes:
    received: name of the signal, such as 'SIGINT', or None.
  """

  def __init__(self, workers):
    """Initializes the hook; it stops training on all `workers` (Workers or SingleWorker)."""
    self.received = None
    self._workers = workers

  def __enter__(self):
    self._read_socket, self._write_socket = socket.socketpair()
    self._write_socket.setblocking(False)
    signal.set_wakeup_fd(self._write_socket.fileno())
    self._signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      self._signals.append(signal.SIGHUP)
    self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    for signal_number in self._signals:
      signal.signal(signal_number, lambda *_: None)  # which writes the number to the socket
    threading.Thread(target=self._receive, daemon=True).start()
    return self

  def after_run(self, run_context, run_values):
    if self.received:
      self._workers.request_stop(run_context)

  def __exit__(self, *_):
    for signal_number in self._signals:
      signal.signal(signal_number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    self._write_socket.close()

  def _receive(self):
    """Waits for signals in a thread, since the main one may be blocked in a step."""
    while number := self._read_socket.recv(1):
      if self.received:
        os._exit(128 + number[0])
      if number[0] == signal.SIGHUP:  # writing to a terminal that is gone fails
        for descriptor in self._terminals:
          _discard_output(descriptor)
      self.received = signal.Signals(number[0]).name
      time.sleep(REPEAT_SECS)
      with contextlib.suppress(BlockingIOError):
        self._read_socket.recv(64, socket.MSG_DONTWAIT)
      print(f'\n{self.received}: finishing this step, then saving. '
            'A second signal exits immediately, without saving.', file=sys.stderr, flush=True)
    self._read_socket.close()


def _discard_output(descriptor):
  """Sends what is written to a file descriptor to nowhere."""
  with open(os.devnull, 'wb') as null:
    os.dup2(null.fileno(), descriptor)
