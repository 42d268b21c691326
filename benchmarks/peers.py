"""Compares the network with Keras' and timm's, in alternating processes."""

import functools
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys

from benchmarks import rounds

FOLDER = os.path.dirname(os.path.abspath(__file__))
OURS = os.path.join(os.path.dirname(FOLDER), 'benchmark.py')
KERAS = os.path.join(FOLDER, 'keras_xception.py')
TIMM = os.path.join(FOLDER, 'timm_xception.py')

# (mode, precision, name of the peer, its program, its options)
PEERS = (
    ('train', 'float32', 'Keras train_on_batch', KERAS, ()),
    ('train', 'float32', 'timm, channels_last', TIMM, ()),
    ('train', 'bfloat16', 'timm, channels_last', TIMM, ()),
    ('inference', 'float32', 'Keras predict_on_batch', KERAS, ()),
    ('inference', 'float32', 'timm, torch.compile', TIMM, ('--compile',)),
    ('inference', 'float32', 'timm, compiled and frozen', TIMM, ('--compile', '--freeze')),
    ('inference', 'bfloat16', 'timm, torch.compile', TIMM, ('--compile',)),
    ('inference', 'bfloat16', 'timm, compiled and frozen', TIMM, ('--compile', '--freeze')),
)


class PeerError(Exception):
  """A measured program failed."""


def compare(modes, batch_size, image_size, num_steps, num_rounds):
  """Measures the network and its peers on the CPU, printing progress to standard error.

  Args:
    modes: list of 'train', 'inference' or both.
    batch_size, image_size, num_steps: options of each measurement.
    num_rounds: measurements per median.

  Returns:
    List of dicts as from `compare_rates`. Measurements that fail, for example because the
    machine lacks bfloat16 or a compiler, are left out.

  Raises:
    PeerError: nothing could be compared.
  """
  has_timm = all(importlib.util.find_spec(name) for name in ('timm', 'torch'))
  options = ['--batch_size', str(batch_size), '--image_size', str(image_size),
             '--steps', str(num_steps)]
  peers = [peer for peer in PEERS if peer[0] in modes and (has_timm or peer[3] != TIMM)]
  functions = {}
  for mode, precision, peer, program, more in peers:
    common = ['--mode', mode, '--precision', precision, *options]
    for name, command in (('ours', [OURS, *common, '--json']), (peer, [program, *common, *more])):
      functions[mode, precision, name] = functools.partial(
          _rate, f'{mode}, {precision}, {name}', command)
  rates = rounds.record_turns(functions, num_rounds)
  pairs = {(mode, precision, peer): (rates[mode, precision, 'ours'], rates[mode, precision, peer])
           for mode, precision, peer, _, _ in peers}
  rows = [compare_rates(*names, *pair) for names, pair in pairs.items()
          if not any(map(math.isnan, itertools.chain(*pair)))]
  if not rows:
    raise PeerError('nothing could be compared, see above')
  return rows


def table(rows):
  """Returns the rows of `compare` as text."""
  lines = [f'{"on the CPU":20}{"":26}{"ours":>9}{"peer":>9}{"ratio":>8}   of the rounds']
  lines += [
      f'{row["mode"]:10}{row["precision"]:10}{row["peer"]:26}{row["images_per_second"]:9.2f}'
      f'{row["peer_images_per_second"]:9.2f}{row["ratio"]:8.2f}   '
      f'{row["smallest_ratio"]:.2f} to {row["greatest_ratio"]:.2f}' for row in rows]
  return '\n'.join(lines)


def compare_rates(mode, precision, peer, ours, theirs):
  """Returns medians and ratios of two lists of images per second, one number per round."""
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


def _rate(name, command):
  """Runs a measurement; returns its images a second, or NaN if it failed."""
  try:
    output = json.loads(run_program(command))
  except PeerError as error:
    print(f'{name}: left out, because {error}', file=sys.stderr)
    return math.nan
  rate = output['images_per_second'] if isinstance(output, dict) else output
  print(f'{name}: {rate:.2f} images/s', file=sys.stderr)
  return rate


def run_program(command):
  """Runs a Python program on the CPU; returns the last line that it prints.

  Args:
    command: list of the program's file and its arguments.

  Raises:
    PeerError: its exit code is not 0.
  """
  process = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                           env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
  if process.returncode:
    raise PeerError(f'{" ".join(command)} failed: {process.stderr.strip()[-500:]}')
  return process.stdout.strip().splitlines()[-1]
