"""Tests of what benchmark.py counts and prints; how fast anything is, is no test's business."""

import json
import os
import subprocess
import sys
import unittest

from benchmarks import network
from benchmarks import peers
from benchmarks import rounds

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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

  def test_training_as_a_command(self):
    result = subprocess.run(
        [sys.executable, os.path.join(PROJECT, 'benchmark.py'), '--mode', 'train', '--batch_size',
         '2', '--image_size', '71', '--steps', '2', '--num_clones', '2', '--clone_on_cpu',
         '--json'], capture_output=True, text=True)
    self.assertEqual(result.returncode, 0, result.stderr)
    figures = json.loads(result.stdout)
    self.assertAlmostEqual(figures['images_per_second'] * figures['seconds_per_step'], 2.0)
    self.assertLessEqual(figures['seconds_per_step_p10'], figures['seconds_per_step_p90'])
    self.assertAlmostEqual(
        figures['fraction_of_limit'],
        figures['images_per_second'] * figures['gflops_per_image']
        / figures['limit_gflops_per_second'])
    # Weights, gradients and Adam's two slots of 20.9 million parameters.
    self.assertGreater(figures['peak_memory_mib'], 4 * 4 * 20.9e6 / 2**20)
    for name in ('import_seconds', 'graph_seconds', 'first_step_seconds'):
      self.assertGreater(figures[name], 0.1, name)

  def test_what_the_machine_cannot_do(self):
    result = subprocess.run(
        [sys.executable, os.path.join(PROJECT, 'benchmark.py'), '--xla', '--clone_on_cpu'],
        capture_output=True, text=True)
    self.assertEqual(result.returncode, 1)
    self.assertIn('benchmark.py: --xla needs a GPU', result.stderr)

  def test_table_of_peers(self):
    row = peers.compare_rates('train', 'float32', 'Keras train_on_batch',
                              [4.0, 6.0, 5.0], [4.0, 2.0, 4.0])
    self.assertEqual((row['ratio'], row['smallest_ratio'], row['greatest_ratio']),
                     (1.25, 1.0, 3.0))
    self.assertRegex(
        peers.table([row]).splitlines()[1],
        r'^train +float32 +Keras train_on_batch +5\.00 +4\.00 +1\.25 +1\.00 to 3\.00$')


if __name__ == '__main__':
  unittest.main()
