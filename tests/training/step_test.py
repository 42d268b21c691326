"""Tests of the training loop: signals, skipped steps, progress and explained errors."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import types
from unittest import mock

import tensorflow.compat.v1 as tf

from deployment import cluster
from deployment import precision
from records import flowers
from scripts import PROJECT
from training import evaluation_hook
from training import hooks as training_hooks
from training import step as training_step

BLOCKED_STEP = textwrap.dedent('''
    import time
    import slim_bridge
    import numpy as np
    import tensorflow.compat.v1 as tf
    from deployment import cluster
    from training import hooks

    def block():
      print('blocked', flush=True)
      time.sleep(600)
      return np.int32(0)

    tf.disable_v2_behavior()
    step = tf.py_func(block, [], tf.int32)
    tf.train.create_global_step()
    with hooks.StopOnSignalHook(cluster.SingleWorker()) as hook, \\
         tf.train.SingularMonitoredSession([hook]) as session:
      session.run(step)
''')


class SignalTest(tf.test.TestCase):

  def test_a_second_signal_ends_a_blocked_step(self):
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM),
                          (signal.SIGHUP, signal.SIGTERM)):
      process = subprocess.Popen(
          [sys.executable, '-c', BLOCKED_STEP], cwd=PROJECT, text=True, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          # The tests may run under nohup, which this process would inherit.
          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
      with process.stdout as output:
        try:
          for line in output:
            if line == 'blocked\n':
              process.send_signal(first)
            if line.startswith(f'{first.name}: finishing this step, then saving.'):
              process.send_signal(second)
              break
          self.assertEqual(process.wait(timeout=30), 128 + second)
        finally:
          process.kill()


class SkippedStepsTest(tf.test.TestCase):

  def test_float16_whose_gradients_are_never_finite(self):
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    plan = types.SimpleNamespace(
        log_dir=folder, checkpoint=None, start_step=0, max_steps=3, first_image=0,
        total_images=6, dataset=types.SimpleNamespace(num_samples=2))
    evaluator, saver, writer = mock.Mock(), mock.Mock(), mock.Mock()
    with tf.Graph().as_default(), contextlib.redirect_stdout(io.StringIO()) as output:
      weight = tf.get_variable('weight', initializer=1.0)
      step = training_step.build_train_step(
          tf.zeros([2, 4, 4, 3]), tf.zeros([2], tf.int64), tf.range(2, dtype=tf.int64),
          # The square root of 0 is finite, its gradient is not.
          lambda *_: (tf.sqrt(weight * 0.0), tf.constant(1.0)),
          precision.scale_loss(tf.train.GradientDescentOptimizer(0.1)), tf.constant(0.1),
          ['/cpu:0'], tf.train.create_global_step())
      hooks = [
          evaluation_hook.EvaluationHook(
              evaluator, step.global_step, saver, folder, None, 1, 3,
              evaluation_hook.read_record(folder, None, 0)),
          training_hooks.ProgressHook(
              step.global_step, training_step.get_or_create_next_image(), step.loss,
              step.accuracy, 2, 1, plan, 1, writer),
          training_hooks.ProfileHook(step.global_step, [1], folder, writer)]
      with self.assertRaisesRegex(training_step.TrainingError,
                                  'No gradient was finite in 100 attempts at step 1, .*float32'):
        training_step.run_training(step, hooks, plan, None, tf.train.Scaffold(),
                                   cluster.SingleWorker())
    self.assertEqual(output.getvalue(), '')
    for unused in (evaluator, saver, writer):
      self.assertEqual(unused.mock_calls, [])
    self.assertEqual(os.listdir(folder), ['eval'])


class ProgressTest(tf.test.TestCase):

  def test_a_reader_that_is_gone(self):
    hook = training_hooks.ProgressHook(
        None, None, None, None, 2, 1, mock.Mock(max_steps=9, dataset=mock.Mock(num_samples=10)), 1,
        mock.Mock())
    hook._losses, hook._accuracies, hook._interval_start = [0.5], [1.0], 0.0
    with mock.patch('builtins.print', side_effect=BrokenPipeError), \
         mock.patch.object(training_hooks, '_discard_output') as discard:
      hook._report(1, 2)
    discard.assert_called_once_with(1)

  def test_the_time_left_has_more_than_24_hours(self):
    plan = types.SimpleNamespace(start_step=0, max_steps=1001,
                                 dataset=types.SimpleNamespace(num_samples=10))
    hook = training_hooks.ProgressHook(None, None, None, None, 2, 1, plan, 1, mock.Mock())
    values = types.SimpleNamespace(results={'step': 1, 'images': 2, 'loss': 0.5, 'accuracy': 1.0})
    with mock.patch.object(training_hooks.time, 'perf_counter', side_effect=[0.0, 183.845, 0.0]), \
         contextlib.redirect_stdout(io.StringIO()) as output:
      hook.after_create_session(None, None)
      hook.after_run(None, values)
    self.assertEqual(output.getvalue(), 'global step 1/1001: loss = 0.5000, accuracy = 1.000 '
                     '(183.845 sec/step, 0.0 images/sec, epoch 0.20, 51:04:05 left)\n')


class ExplainTest(tf.test.TestCase):

  def explain(self, error):
    step = types.SimpleNamespace(finite_check='check', tower_batch_size=64)
    plan = types.SimpleNamespace(log_dir='/log', devices=['/gpu:0', '/gpu:1'])
    return training_step._explain(error, step, plan, 7, cluster.SingleWorker())

  def test_only_errors_of_files_in_the_log_folder_are_errors_of_saving(self):
    error = tf.errors.ResourceExhaustedError(None, None, '/log/checkpoint.tmp; No space left')
    self.assertStartsWith(str(self.explain(error)), 'Cannot save in /log: /log/checkpoint.tmp; No ')
    for message in ('Cannot assign a device for operation', 'out of memory'):
      self.assertIsNone(self.explain(tf.errors.InternalError(None, None, message)))
    save_op = types.SimpleNamespace(type='SaveV2')
    self.assertIn('Cannot save in /log: full',
                  str(self.explain(tf.errors.ResourceExhaustedError(None, save_op, 'full'))))

  def test_an_epoch_without_a_good_record(self):
    message = f'assertion failed: [{flowers.NO_GOOD_RECORD}]\n\t [[{{{{node Assert}}}}]]'
    explained = self.explain(tf.errors.InvalidArgumentError(None, None, message))
    self.assertIsInstance(explained, training_step.TrainingError)
    self.assertEqual(str(explained), 'No usable record in an entire epoch: run check_dataset.py')

  def test_a_gpu_without_enough_memory_is_named(self):
    op = types.SimpleNamespace(type='Conv2D', device='/device:GPU:1')
    self.assertIn('tower 1 (/gpu:1) cannot process 64 images at a time',
                  str(self.explain(tf.errors.ResourceExhaustedError(None, op, 'OOM'))))
