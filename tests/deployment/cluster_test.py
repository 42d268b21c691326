"""Tests of training on several workers: real processes that meet on 127.0.0.1.

Larger clusters and the ways to fail take minutes: `make test-cluster`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files
from deployment import cluster
from records import flowers
from scripts import DATASET_DIR
from scripts import PROJECT
from scripts import slow
from training import hooks as training_hooks

WORKER = os.path.join(PROJECT, 'tests', 'deployment', 'cluster_worker.py')
TRAIN = ['--dataset_dir', DATASET_DIR, '--image_size', '71', '--depth_multiplier', '0.125',
         '--batch_size', '12', '--clone_on_cpu', '--seed', '1', '--learning_rate_decay_type',
         'fixed', '--log_every_n_steps', '1', '--startup_timeout_secs', '90',
         '--step_timeout_secs', '15']
# Small steps with frozen batch norm, in which rounding errors do not grow.
GENTLE = ['--frozen', '--optimizer', 'sgd', '--momentum', '0', '--learning_rate', '0.0002',
          '--clip_gradient_norm', '1', '--dropout_keep_prob', '1']
STEP_TIMEOUT_SECS = 15
END_SECS = 120  # within which every process must end, whatever was done to it



def free_addresses(number):
  """Returns unused addresses on 127.0.0.1."""
  sockets = [socket.socket() for _ in range(number)]
  for each in sockets:
    each.bind(('127.0.0.1', 0))
  addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
  for each in sockets:
    each.close()
  return addresses


def tf_config(addresses, index):
  return json.dumps({'cluster': {'worker': addresses},
                     'task': {'type': 'worker', 'index': index}})


class FindWorkersTest(tf.test.TestCase):

  def find(self, config):
    with mock.patch.dict(os.environ, {'TF_CONFIG': config}):
      return cluster.find_workers()

  def test_one_worker_is_alone(self):
    for config in ('', ' ', tf_config(['localhost:1'], 0)):
      self.assertIs(type(self.find(config)), cluster.SingleWorker)

  def test_workers_only(self):
    workers = self.find(tf_config(['a:1', 'b:1', 'c:1'], 2))
    self.assertEqual((workers.size, workers.index, workers.is_chief, workers.device),
                     (3, 2, False, '/job:worker/task:2'))
    self.assertEqual(str(workers), 'Worker 2 of 3, c:1')
    self.assertTrue(self.find(tf_config(['a:1', 'b:1'], 0)).is_chief)

  def test_chief_and_workers(self):
    config = {'cluster': {'worker': ['b:1', 'c:1'], 'chief': ['a:1']},
              'task': {'type': 'worker', 'index': 0}}
    workers = self.find(json.dumps(config))
    self.assertEqual((workers.size, workers.index, workers.is_chief), (3, 1, False))
    self.assertEqual(str(workers), 'Worker 1 of 3, b:1')
    config['task'] = {'type': 'chief', 'index': 0}
    workers = self.find(json.dumps(config))
    self.assertEqual((workers.index, workers.is_chief, workers.device),
                     (0, True, '/job:chief/task:0'))

  def test_a_malformed_tf_config_is_shown(self):
    for config, reason in (
        ('{', 'Expecting'), ('[]', ''), ('{"cluster": {"worker": ["a:1", "b:1"]}}', 'lacks'),
        ('{"task": {"type": "worker", "index": 0}}', 'lacks'),
        (tf_config(['a:1', 'b:1'], 2), ''),
        ('{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', 'its jobs are ps')):
      with self.assertRaisesRegex(cluster.ClusterError,
                                  f'{reason}.*expected JSON like.*got {re.escape(config)}'):
        self.find(config)


class BucketsTest(tf.test.TestCase):

  def test_last_first_and_closed_when_full(self):
    self.assertEqual(cluster.make_buckets([5, 1, 4, 3, 2], bucket_bytes=5), [[4, 3], [2, 1], [0]])
    self.assertEqual(cluster.make_buckets([1, 9, 1], bucket_bytes=5), [[2, 1], [0]])
    self.assertEqual(cluster.make_buckets([], bucket_bytes=5), [])


class CodeHashTest(tf.test.TestCase):

  def test_every_byte_of_the_code_counts(self):
    copy = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), 'copy')
    shutil.copytree(PROJECT, copy, ignore=lambda folder, names: [
        name for name in names if name.startswith('.') or name in ('build', 'docs', 'tests')
        or name.endswith('.tfrecord')])
    hashes = {cluster.code_hash()}
    with mock.patch.object(files, 'PROJECT_DIR', copy):
      self.assertIn(cluster.code_hash(), hashes)  # wherever the code is
      for name in ('cpu_kernels/kernels.cc', 'train_flowers.py', 'xception.py',
                   'deployment/towers.py'):
        path = os.path.join(copy, name)
        with open(path, 'r+b') as f:
          f.seek(100)
          byte, = f.read(1)
          f.seek(100)
          f.write(bytes([byte ^ 1]))
        hashes.add(cluster.code_hash())
      os.rename(path, f'{copy}/deployment/renamed.py')
      hashes.add(cluster.code_hash())
    self.assertLen(hashes, 6)


class InputTest(tf.test.TestCase):

  def batches(self, number, is_training, **kwargs):
    dataset = flowers.get_split('validation', DATASET_DIR)
    with tf.Graph().as_default(), tf.Session() as session:
      batch = flowers.load_numbered_batch(dataset, 12, 71, 71, is_training, seed=3, **kwargs)
      return [session.run(batch) for _ in range(number)]

  def test_workers_batches_are_one_workers_batch(self):
    expected = self.batches(9, True, first_image=31)  # into the second epoch
    for size in (2, 3):
      parts = [self.batches(9, True, first_image=31, worker=i, num_workers=size)
               for i in range(size)]
      for step, columns in enumerate(expected):
        for column, values in enumerate(columns):
          self.assertAllEqual(np.concatenate([part[step][column] for part in parts]), values)

  def test_evaluation_has_every_image_once(self):
    (_, labels, _), = self.batches(1, False)
    for size in (2, 3):
      positions = []
      for index in range(size):
        rows = self.batches(3, False, worker=index, num_workers=size)
        positions += [position for _, _, batch in rows for position in batch]
        self.assertEqual(rows[0][2].tolist(), list(range(index, 12 * size, size)))
        self.assertEqual(rows[0][1][0], labels[index])
      self.assertEqual(len(set(positions)), 36 * size if size < 3 else 100)

  def test_bad_records_of_a_workers_own_row(self):
    dataset = flowers.get_split('train', DATASET_DIR)
    workers = mock.Mock(index=1, size=2)
    writer = mock.Mock()
    hook = training_hooks.BadRecordsHook(None, None, dataset, 1, 100, 8, workers, 0.004, writer)
    # Its images are 104 to 107, 112 to 115, 120 ...: 106 and 113 are missing.
    for step, positions in ((1, [104, 105, 107, 112]), (2, [114, 115, 120, 121])):
      hook.after_run('context', mock.Mock(results=(step, np.array(positions))))
    self.assertRegex(hook.too_many, '^2 of 400 records are bad')
    workers.request_stop.assert_called_once_with('context')


class ClusterTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)

  def path(self, name, index=0):
    return os.path.join(self.dir, f'{name}{index}')

  def start(self, name, addresses, index, *options):
    """Starts one worker; `name` names its log folder, output and weights."""
    environment = dict(os.environ, TF_CONFIG=tf_config(addresses, index) if addresses else '')
    with open(self.path(name, index) + '.out', 'a', encoding='utf-8') as output:
      process = subprocess.Popen(
          [sys.executable, WORKER, self.path(name, index) + '.npz', *TRAIN, '--log_dir',
           self.path(name, index), *options], env=environment, stdout=output,
          stderr=subprocess.STDOUT)
    self.addCleanup(process.wait)
    self.addCleanup(process.kill)
    return process

  def start_all(self, name, size, *options):
    addresses = free_addresses(size)
    return [self.start(name, addresses, i, *options) for i in range(size)]

  def output(self, name, index=0):
    with open(self.path(name, index) + '.out', encoding='utf-8') as f:
      return f.read()

  def finish(self, name, processes, codes=None):
    """Waits for all processes; returns the last line and the running time in seconds of each."""
    begin = time.monotonic()
    lines, seconds = [], []
    for i, process in enumerate(processes):
      try:
        process.wait(max(1, begin + END_SECS - time.monotonic()))
      except subprocess.TimeoutExpired:
        self.fail(f'Worker {i} did not end:\n{self.output(name, i)}')
      seconds.append(time.monotonic() - begin)
      lines.append([line for line in self.output(name, i).strip().splitlines()
                    if not re.match(r'[IWE]\d{4} ', line)][-1])  # TensorFlow's own log
      expected = codes[i] if codes else 0
      self.assertEqual(process.returncode, expected, self.output(name, i))
    return lines, seconds

  def train(self, name, size, *options):
    """Trains to the end; returns every worker's weights."""
    self.finish(name, self.start_all(name, size, *options))
    return [self.weights(name, i) for i in range(size)]

  def train_alone(self, name, *options):
    self.finish(name, [self.start(name, None, 0, *options)])
    return self.weights(name)

  def weights(self, name, index=0):
    with np.load(self.path(name, index) + '.npz') as arrays:
      return dict(arrays)

  def wait_for_step(self, name, step, processes):
    deadline = time.monotonic() + END_SECS
    while f'global step {step}/' not in self.output(name):
      self.assertIsNone(processes[0].poll(), self.output(name))
      self.assertLess(time.monotonic(), deadline, self.output(name))
      time.sleep(0.02)

  def losses(self, name, index=0):
    return dict(re.findall(r'^global step (\d+)/\d+: (loss = [\d.]+, accuracy = [\d.]+)',
                           self.output(name, index), re.MULTILINE))

  def assertIdentical(self, weights, others):
    self.assertEqual(weights.keys(), others.keys())
    for name, value in weights.items():
      self.assertEqual(value.tobytes(), others[name].tobytes(), name)

  def distance(self, weights, others):
    """Returns the norm of the difference of all trained weights, relative to that of weights."""
    names = [name for name in weights
             if name.startswith('Xception') and name.endswith(('weights', 'biases', 'beta'))]
    difference = sum(np.square(weights[name] - others[name], dtype=np.float64).sum()
                     for name in names)
    norm = sum(np.square(weights[name], dtype=np.float64).sum() for name in names)
    return np.sqrt(difference / norm)

  def assertNoTraceback(self, name, size):
    for i in range(size):
      self.assertNotIn('Traceback', self.output(name, i))


class TogetherTest(ClusterTestCase):

  def test_two_workers_take_the_steps_of_one_process_with_two_towers(self):
    options = ['--max_number_of_steps', '6', '--check_weights_steps', '2']
    weights, others = self.train('pair', 2, *options)
    self.assertIdentical(weights, others)
    self.assertEqual(weights['next_image'], 72)
    self.assertEqual(checkpoints.global_step(checkpoints.find(self.path('pair', 0))), 6)
    self.assertFalse(os.path.exists(self.path('pair', 1)))  # worker 1 wrote nothing
    self.assertRegex(self.output('pair', 1), 'Worker 1 of 2, 127.0.0.1')

    alone = self.train_alone('alone', *options, '--num_clones', '2')
    self.assertLen(self.losses('pair', 0), 6)
    self.assertEqual(self.losses('pair', 0), self.losses('pair', 1))
    self.assertEqual(self.losses('pair', 0), self.losses('alone'))
    self.assertLess(self.distance(alone, weights), 1e-5)

  def test_kill_9_of_a_worker_and_restart(self):
    options = ['--save_interval_steps', '2', '--max_number_of_steps', '400']
    processes = self.start_all('killed', 2, *options)
    self.wait_for_step('killed', 6, processes)
    processes[1].kill()
    lines, seconds = self.finish('killed', processes, [1, -signal.SIGKILL])
    self.assertRegex(lines[0], r'Worker 0 of 2, .* lost the other workers \(\w+: .*\)\. No answer '
                     r'from worker 1 \(.*\). Restart all workers with the same commands')
    self.assertLess(seconds[0], STEP_TIMEOUT_SECS)
    self.assertNoTraceback('killed', 1)

    step = checkpoints.global_step(checkpoints.find(self.path('killed')))
    self.assertGreaterEqual(step, 4)
    weights, others = self.train('killed', 2, '--max_number_of_steps', str(step + 2))
    for i in range(2):
      self.assertIn(f'Steps {step} to {step + 2}', self.output('killed', i))
    self.assertIdentical(weights, others)


@slow
class MirroredTest(ClusterTestCase):

  def test_towers_of_two_workers(self):
    # Four towers: a ring adds their gradients in another order than two pairs do.
    options = [*GENTLE, '--num_clones', '2', '--max_number_of_steps', '4',
               '--check_weights_steps', '2']
    weights, others = self.train('mirrored', 2, '--variable_update', 'mirrored', *options)
    self.assertIdentical(weights, others)
    self.assertEqual(weights['next_image'], 48)
    shared, _ = self.train('shared', 2, *options)
    self.assertEqual(weights.keys(), shared.keys())
    self.assertLess(self.distance(shared, weights), 1e-6)
    # Each of them resumes the other.
    resumed, others = self.train('shared', 2, '--variable_update', 'mirrored', *options[:-3], '6',
                                 *options[-2:])
    self.assertIdentical(resumed, others)
    self.assertEqual(resumed['next_image'], 72)


class PrefetchTest(ClusterTestCase):

  @slow
  def test_kill_9_and_resume(self):
    options = ['--num_clones', '2', '--save_interval_steps', '2', '--max_number_of_steps']
    whole = self.train_alone('whole', *options, '6')
    process = self.start('killed', None, 0, '--prefetch', *options, '400')
    self.wait_for_step('killed', 3, [process])
    process.kill()
    process.wait()
    step = checkpoints.global_step(checkpoints.find(self.path('killed')))
    self.assertBetween(step, 2, 5)
    resumed = self.train_alone('killed', '--prefetch', *options, '6')
    self.assertIdentical(whole, resumed)
    self.assertEqual(resumed['next_image'], 72)


@slow
class LargerTest(ClusterTestCase):

  def test_any_sharing_of_the_batch_is_one_process(self):
    # Statistics that fit the weights, as in a network that has begun to learn.
    self.train_alone('start', '--max_number_of_steps', '20')
    options = [*GENTLE, '--max_number_of_steps', '10', '--checkpoint_path', self.path('start')]
    alone = self.train_alone('alone', *options)
    steps = self.distance(alone, self.weights('start'))
    for size, towers in ((2, 1), (3, 1), (2, 2)):
      name = f'{size}x{towers}'
      weights, *others = self.train(name, size, *options, '--num_clones', str(towers))
      for other in others:
        self.assertIdentical(weights, other)
      self.assertLess(self.distance(alone, weights), 1e-6)
      self.assertLess(self.distance(alone, weights), steps / 10)
      self.assertEqual(weights['next_image'], alone['next_image'])
    # The sum of two is the same in any order, and so are the bits.
    two_towers = self.train_alone('towers', *options, '--num_clones', '2')
    self.assertIdentical(self.weights('2x1'), two_towers)

  def test_restarted_training_is_uninterrupted_training(self):
    options = ['--moving_average_decay', '0.99', '--max_number_of_steps']
    whole, _ = self.train('whole', 2, *options, '8')
    self.train('parts', 2, *options, '5')
    parts, others = self.train('parts', 2, *options, '8')
    self.assertIdentical(parts, others)
    self.assertIdentical(parts, whole)

  def test_bfloat16_between_workers(self):
    weights, others = self.train('bfloat16', 2, '--all_reduce_precision', 'bfloat16',
                                 '--max_number_of_steps', '4')
    self.assertIdentical(weights, others)

  def test_evaluation_has_every_image_and_is_that_of_one_process(self):
    options = [*GENTLE, '--max_number_of_steps', '4', '--eval_every_epochs', '0.06']
    self.train('pair', 2, *options)
    self.train_alone('alone', *options, '--num_clones', '2')
    pattern = re.compile(r'^validation at step \d.*$', re.MULTILINE)
    found = pattern.findall(self.output('pair', 0))
    self.assertLen(found, 2)
    self.assertEqual(found, pattern.findall(self.output('pair', 1)))
    self.assertEqual(found, pattern.findall(self.output('alone')))
    self.assertTrue(os.path.exists(os.path.join(self.path('pair'), 'best', 'checkpoint')))


@slow
class FailureTest(ClusterTestCase):

  def hurt(self, name, victim, signal_number, *options):
    """Trains, sends a signal to a worker at step 5; returns the processes."""
    processes = self.start_all(name, 2, '--save_interval_steps', '3', *options)
    self.wait_for_step(name, 5, processes)
    processes[victim].send_signal(signal_number)
    return processes

  def test_kill_9_of_the_chief(self):
    processes = self.hurt('chief', 0, signal.SIGKILL)
    lines, seconds = self.finish('chief', processes, [-signal.SIGKILL, 1])
    self.assertRegex(lines[1], 'lost the other workers .* No answer from worker 0')
    self.assertLess(seconds[1], STEP_TIMEOUT_SECS)

  def test_frozen_workers(self):
    for victim in (0, 1):
      name = f'frozen{victim}_'
      processes = self.hurt(name, victim, signal.SIGSTOP)
      other = processes[1 - victim]
      begin = time.monotonic()
      self.assertEqual(other.wait(END_SECS), cluster.LOST_EXIT_CODE)
      self.assertLess(time.monotonic() - begin, STEP_TIMEOUT_SECS + 3)
      self.assertIn('Not all workers took a step in 15 seconds (--step_timeout_secs)',
                    self.output(name, 1 - victim))
      processes[victim].send_signal(signal.SIGCONT)
      self.assertNotEqual(processes[victim].wait(END_SECS), 0)

  def test_sigterm_of_any_worker_stops_all_at_the_same_step(self):
    for victim in (0, 1):
      name = f'term{victim}_'
      processes = self.hurt(name, victim, signal.SIGTERM)
      lines, _ = self.finish(name, processes)
      self.assertRegex(lines[victim], 'Stopped by SIGTERM: resume with the same command')
      self.assertRegex(lines[1 - victim], f'Stopped by worker {victim}: resume')
      self.assertIdentical(self.weights(name, 0), self.weights(name, 1))
      self.assertEqual(self.weights(name)['global_step'],
                       checkpoints.global_step(checkpoints.find(self.path(name))))

  def test_late_workers(self):
    for late in (0, 1):
      name = f'late{late}_'
      addresses = free_addresses(2)
      options = ['--max_number_of_steps', '2', '--step_timeout_secs', '10']
      early = self.start(name, addresses, 1 - late, *options)
      time.sleep(20)  # longer than a step may take
      processes = [early, self.start(name, addresses, late, *options)]
      self.finish(name, processes if late else processes[::-1])
      self.assertIdentical(self.weights(name, 0), self.weights(name, 1))

  def test_a_worker_that_never_comes(self):
    for absent in (0, 1):
      name = f'absent{absent}_'
      begin = time.monotonic()
      process = self.start(name, free_addresses(2), 1 - absent, '--startup_timeout_secs', '20')
      self.assertEqual(process.wait(END_SECS), cluster.LOST_EXIT_CODE)
      self.assertLess(time.monotonic() - begin, 40)
      self.assertRegex(self.output(name, 1 - absent),
                       r'Not all workers connected in 20 seconds \(--startup_timeout_secs\). '
                       f'No answer from worker {absent}')

  def test_another_number_of_workers(self):
    addresses = free_addresses(3)
    processes = [self.start('size', addresses[:2], 0), self.start('size', addresses, 1)]
    lines, _ = self.finish('size', processes, [1, 1])
    for i in range(2):
      self.assertRegex(lines[i], f'Worker {i} of {2 + i}, .*: TF_CONFIG lists {2 + i} workers here')

  def test_a_taken_port(self):
    addresses = free_addresses(2)
    with socket.socket() as taken:
      host, port = addresses[1].split(':')
      taken.bind((host, int(port)))
      taken.listen()
      processes = [self.start('port', addresses, i, '--startup_timeout_secs', '30')
                   for i in range(2)]
      lines, _ = self.finish('port', processes, [cluster.LOST_EXIT_CODE, 1])
    self.assertRegex(lines[1], 'Worker 1 of 2, .* cannot start its server: .* port taken')
    self.assertRegex(lines[0], 'Not all workers connected in 30 seconds')

  def test_options_and_graphs_that_differ(self):
    for option, values, message in (
        ('--learning_rate', ('0.1', '0.2'), '--learning_rate is 0.1 and 0.2'),
        ('--optimizer', ('adam', 'sgd'), '--optimizer is adam and sgd')):
      name = option.strip('-')
      addresses = free_addresses(2)
      processes = [self.start(name, addresses, i, option, values[i]) for i in range(2)]
      lines, _ = self.finish(name, processes, [1, 1])
      for line in lines:
        self.assertRegex(line, rf'Workers 0 \(.*\) and 1 \(.*\) cannot train together: {message}')

  def test_weights_that_drift_apart(self):
    addresses = free_addresses(2)
    options = ['--check_weights_steps', '4']
    processes = [self.start('drift', addresses, 0, *options),
                 self.start('drift', addresses, 1, '--drift', '2', *options)]
    lines, _ = self.finish('drift', processes, [1, 1])
    for line in lines:
      self.assertRegex(line, 'The weights of workers 0 and 1 differ after step 4')
