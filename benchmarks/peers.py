"""The project's network beside Keras' and timm's, in processes that take turns."""

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys

from benchmarks import rounds

FOLDER = os.path.dirname(os.path.abspath(__file__))
OURS = os.path.join(os.path.dirname(FOLDER), 'benchmark.py')
KERAS = os.path.join(FOLDER, 'keras_xception.py')
TIMM = os.path.join(FOLDER, 'timm_xception.py')

# (mode, precision, peer, its program, its further options)
PEERS = (
    ('train', 'float32', 'Keras train_on_batch', KERAS, ()),
    ('train', 'float32', 'timm, channels_last', TIMM, ()),
    ('train', 'bfloat16', 'timm, channels_last', TIMM, ()),
    ('inference', 'float32', 'Keras predict_on_batch', KERAS, ()),
    ('inference', 'float32', 'timm, torch.compile', TIMM, ('--compile',)),
    ('inference', 'bfloat16', 'timm, torch.compile', TIMM, ('--compile',)),
)


class PeerError(Exception):
  """A program that was to be measured failed."""


def compare(batch_size, image_size, num_steps, num_rounds):
  """Measures everything in turns.

  Args:
    batch_size, image_size, num_steps: of each measurement.
    num_rounds: measurements that each figure is the median of.

  Returns:
    List of dicts: mode, precision, peer, images a second of ours and of the
    peer, the ratio of the medians, and the smallest and greatest of a round.
  """
  has_timm = all(importlib.util.find_spec(name) for name in ('timm', 'torch'))
  options = ['--batch_size', str(batch_size), '--image_size', str(image_size),
             '--steps', str(num_steps)]
  peers = [peer for peer in PEERS if has_timm or peer[3] != TIMM]
  functions = {}
  for mode, precision, _, program, more in peers:
    common = ['--mode', mode, '--precision', precision, *options]
    functions[mode, precision, OURS] = functools.partial(_run_ours, [OURS, *common, '--json'])
    functions[mode, precision, program] = functools.partial(_run, [program, *common, *more])
  rates = rounds.record_turns(functions, num_rounds)
  return [compare_rates(mode, precision, name, rates[mode, precision, OURS],
                        rates[mode, precision, program])
          for mode, precision, name, program, _ in peers]


def table(rows):
  """Returns the rows of `compare` as text."""
  lines = [f'{"":10}{"":10}{"":26}{"ours":>9}{"peer":>9}{"ratio":>8}   of the rounds']
  lines += [
      f'{row["mode"]:10}{row["precision"]:10}{row["peer"]:26}{row["images_per_second"]:9.2f}'
      f'{row["peer_images_per_second"]:9.2f}{row["ratio"]:8.2f}   '
      f'{row["smallest_ratio"]:.2f} to {row["greatest_ratio"]:.2f}' for row in rows]
  return '\n'.join(lines)


def compare_rates(mode, precision, peer, ours, theirs):
  """Returns the row of `compare` for two lists of images a second, a number a round."""
  ratios = [a / b for a, b in zip(ours, theirs)]
  return {
      'mode': mode,
      'precision': precision,
      'peer': peer,
      'images_per_second': statistics.median(ours),
      'peer_images_per_second': statistics.median(theirs),
      'ratio': statistics.median(ours) / statistics.median(theirs),
      'smallest_ratio': min(ratios),
      'greatest_ratio': max(ratios),
  }


def _run_ours(command):
  return json.loads(_output(command))['images_per_second']


def _run(command):
  return float(_output(command))


def _output(command):
  """Runs a Python program; returns the last line that it prints."""
  process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
  if process.returncode:
    raise PeerError(f'{" ".join(command)} failed: {process.stderr.strip()[-500:]}')
  return process.stdout.strip().splitlines()[-1]
