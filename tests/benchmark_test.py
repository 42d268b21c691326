"""Tests of what benchmark.py counts and prints; speed is left to `make benchmark`."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import unittest
from unittest import mock

from benchmarks import gpu_report
from benchmarks import input_pipeline
from benchmarks import network
from benchmarks import peers
from benchmarks import rounds
from scripts import PROJECT
from scripts import slow


class BenchmarkTest(unittest.TestCase):

  def test_operations_are_the_papers(self):
    # 8.4 billion multiply-adds at 299 x 299, two operations each.
    self.assertAlmostEqual(network.count_flops(299, num_classes=1000) / 2e9, 8.4, delta=0.05)

  def test_turns(self):
    calls = []
    values = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def take(name):
      calls.append(name)
      return next(values)

    functions = {'a': lambda: take('a'), 'b': lambda: take('b')}
    self.assertEqual(rounds.take_turns(functions, 3), {'a': 2.0, 'b': 20.0})
    self.assertEqual(''.join(calls), 'ababab')

  def test_figures(self):
    figures = network.figures([1.0, 2.0, 4.0], 8, 0.5, 0.25)
    self.assertEqual(figures['images_per_second'], 4.0)
    self.assertEqual(figures['seconds_per_step'], 2.0)
    self.assertAlmostEqual(figures['seconds_per_step_p10'], 1.2)
    self.assertAlmostEqual(figures['seconds_per_step_p90'], 3.6)

  def test_use_of_the_limit(self):
    with mock.patch.object(network, 'measure_limit', return_value=200e9):
      self.assertEqual(network.use_of_limit(4.0, 10e9, 'float32', ['/cpu:0']),
                       {'fraction_of_limit': 0.2, 'limit_gflops_per_second': 200.0,
                        'gflops_per_image': 10.0})

  @slow
  def test_training_as_a_command(self):
    figures = self.figures_of('--mode', 'train', '--num_clones', '2', '--clone_on_cpu')
    self.assertEqual(figures['gflops_per_image'],
                     3 * network.count_flops(71, depth_multiplier=0.25) / 1e9)
    # TensorFlow alone takes less than 300 MiB.
    self.assertGreater(figures['peak_memory_mib'], 300)

  def test_inference_as_a_command(self):
    figures = self.figures_of('--mode', 'inference')
    self.assertEqual(figures['gflops_per_image'],
                     network.count_flops(71, depth_multiplier=0.25) / 1e9)

  @slow
  def test_end_to_end_as_a_command(self):
    self.figures_of('--mode', 'end_to_end')

  def test_input_as_a_command(self):
    self.figures_of('--mode', 'input', depth_multiplier=None)

  def small_pipeline(self):
    return mock.patch.multiple(
        input_pipeline, IMAGE_SIZE=71, BATCH_SIZE=4, NUM_BATCHES=2, WARM_UP_BATCHES=1,
        TRAIN_IMAGE_SIZE=71, TRAIN_DEPTH_MULTIPLIER=0.125, TRAIN_BATCH_SIZE=2, NUM_TRAIN_STEPS=2)

  def test_training_on_one_batch(self):
    with self.small_pipeline():
      self.assertGreater(input_pipeline.time_training(real_images=False), 0)

  @slow
  def test_input_and_its_peers(self):
    with self.small_pipeline():
      figures = input_pipeline.compare(num_rounds=1)
    self.assertGreater(min(figures.values()), 0)
    for peer in ('slim', 'keras'):
      self.assertAlmostEqual(figures[f'ratio_to_{peer}'] * figures[f'{peer}_images_per_second'],
                             figures['images_per_second'])

  def figures_of(self, *options, depth_multiplier='0.25'):
    """Runs benchmark.py on a small network; returns what it prints."""
    width = ['--depth_multiplier', depth_multiplier] if depth_multiplier else []
    result = self.run_benchmark('--batch_size', '2', '--image_size', '71', '--steps', '2',
                                '--json', *width, *options)
    self.assertEqual(result.returncode, 0, result.stderr)
    figures = json.loads(result.stdout)
    for name in ('images_per_second', 'seconds_per_step', 'seconds_per_step_p10',
                 'seconds_per_step_p90', 'peak_memory_mib', 'import_seconds', 'graph_seconds',
                 'graph_operations', 'graph_mib', 'first_step_seconds'):
      self.assertGreater(figures[name], 0, name)
    return figures

  def run_benchmark(self, *options):
    return subprocess.run([sys.executable, os.path.join(PROJECT, 'benchmark.py'), *options],
                          capture_output=True, text=True)

  def test_what_cannot_be_measured(self):
    for code, options, message in (
        (1, ['--xla', '--clone_on_cpu'], 'benchmark.py: --xla needs a GPU'),
        (1, ['--num_clones', '3', '--clone_on_cpu'],
         '--batch_size 8 is the sum over all towers and must be divisible by 3 towers'),
        (2, ['--mode', 'input', '--precision', 'bfloat16'],
         '--precision would have no effect on --mode input, which takes --batch_size'),
        (2, ['--mode', 'end_to_end', '--peers'], '--mode end_to_end has no peers')):
      result = self.run_benchmark(*options)
      self.assertEqual(result.returncode, code)
      self.assertIn(message, result.stderr)
      self.assertNotIn('Traceback', result.stderr)

  def test_peers(self):
    programs = []

    def run_program(command):
      programs.append(command)
      if 'bfloat16' in command:
        raise peers.PeerError('no bfloat16 here')
      return '{"images_per_second": 6.0}' if command[0] == peers.OURS else '4.0'

    with mock.patch.object(peers, 'run_program', run_program), \
         mock.patch.object(importlib.util, 'find_spec', return_value=True), \
         contextlib.redirect_stderr(io.StringIO()) as said:
      rows = peers.compare(['inference'], 2, 71, 5, num_rounds=2)
    self.assertEqual([(row['peer'], row['ratio']) for row in rows],
                     [('Keras predict_on_batch', 1.5), ('timm, torch.compile', 1.5),
                      ('timm, compiled and frozen', 1.5)])
    # Each peer and our program, once per round and precision.
    self.assertEqual(len(programs), 2 * (4 + 3))
    self.assertIn('inference, bfloat16, ours: left out, because no bfloat16 here',
                  said.getvalue())

  def test_a_peer_that_fails(self):
    with self.assertRaisesRegex(peers.PeerError, '(?s)failed: .*arguments are required'):
      peers.run_program([peers.KERAS, '--no_such_option'])

  def test_table_of_peers(self):
    row = peers.compare_rates('train', 'float32', 'Keras train_on_batch',
                              [4.0, 6.0, 5.0], [4.0, 2.0, 4.0])
    self.assertEqual((row['ratio'], row['smallest_ratio'], row['greatest_ratio']),
                     (1.25, 1.0, 3.0))
    self.assertRegex(
        peers.table([row]).splitlines()[1],
        r'^train +float32 +Keras train_on_batch +5\.00 +4\.00 +1\.25 +1\.00 to 3\.00$')


class GpuReportTest(unittest.TestCase):
  """The checks of `make test-gpu`, on CPU devices."""

  SIZES = {'batch_size': 4, 'image_size': 71, 'depth_multiplier': 0.125}

  def test_without_a_gpu_nothing_runs(self):
    result = subprocess.run([sys.executable, '-m', 'benchmarks.gpu_report'], cwd=PROJECT,
                            capture_output=True, text=True)
    self.assertEqual((result.returncode, result.stdout),
                     (0, 'TensorFlow finds no GPU: 0 tests run\n'))

  def test_checks_on_cpu_devices(self):
    self.assertRegex(gpu_report.check_kernels(['/cpu:0'], **self.SIZES),
                     r'^\d{4} operations on CPU:0, convolutions in NHWC$')
    self.assertEqual(gpu_report.check_one_tower(['/cpu:0'], **self.SIZES),
                     'losses of 3 steps differ by 0.0e+00')
    self.assertRegex(gpu_report.check_towers(['/cpu:0', '/cpu:1'], **self.SIZES),
                     r'^parameter_server: losses .*e-0[5-9]; mirrored: losses .*e-0[5-9]$')

  @slow
  def test_scripts_on_cpu_devices(self):
    self.assertRegex(
        gpu_report.check_scripts(['/cpu:0'], 'float32', 0.3, 71, 0.125, min_accuracy=0.0),
        r'^float32: resumed at step 5, accuracy [\d.]+ after 0.3 epochs, frozen and compared$')
    with self.assertRaisesRegex(gpu_report.CheckError, 'train_flowers.py .* ended with 1'):
      gpu_report.check_scripts(['/cpu:0'], 'float16', 0.3, 71, 0.125, min_accuracy=0.0)

  def test_losses_that_differ(self):
    for losses in ([1.0, 2.01], [1.0, float('nan')]):
      with self.assertRaisesRegex(gpu_report.CheckError, 'differ by'):
        gpu_report.compare_losses(losses, [1.0, 2.0])

  def test_what_is_checked_on_gpus(self):
    one, two = (gpu_report.gpu_checks([f'/gpu:{i}' for i in range(n)]) for n in (1, 2))
    self.assertEqual(set(two) - set(one), {
        'towers', 'float16, 2 towers, parameter_server', 'float16, 2 towers, mirrored'})

  def test_failures_are_counted(self):
    def fail():
      raise gpu_report.CheckError('too slow')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      self.assertEqual(gpu_report.run_checks({'a': lambda: 'fine', 'b': fail}), 1)
    self.assertRegex(printed.getvalue(),
                     r'^ok      a: fine \(0 s\)\nFAILED  b: CheckError: too slow \(0 s\)\n$')


if __name__ == '__main__':
  unittest.main()
