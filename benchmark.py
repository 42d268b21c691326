"""Measures the speed of training, inference and input, alone or against Keras, timm and slim.

  python benchmark.py --mode train --batch_size 8 --image_size 299 --json
  python benchmark.py --peers

`train` repeats one batch. `end_to_end` trains on the shipped flowers through the whole input
pipeline; with --synthetic it repeats one batch, and the difference is the cost of the input.
`inference` runs a frozen graph with folded batch norms, `input` the input pipeline alone. The
network's weights are random.

Speeds differ from machine to machine, so compare ratios. --peers alternates its measurements,
so that a slow minute of the machine affects all of them.
"""

import time

START = time.perf_counter()

import argparse
import json
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from benchmarks import input_pipeline
from benchmarks import network
from benchmarks import peers
from common import arguments
from deployment import precision
from deployment import towers
from records import flowers

IMPORT_SECONDS = time.perf_counter() - START

# The options that affect each measurement; any other is an error.
NETWORK_OPTIONS = {'batch_size', 'image_size', 'depth_multiplier', 'clone_on_cpu', 'precision',
                   'xla', 'steps'}
OPTIONS = {
    'train': NETWORK_OPTIONS | {'num_clones', 'variable_update', 'synthetic'},
    'end_to_end': NETWORK_OPTIONS | {'num_clones', 'variable_update', 'synthetic'},
    'inference': NETWORK_OPTIONS | {'synthetic'},
    'input': {'batch_size', 'image_size', 'steps'},
    'train --peers': {'batch_size', 'image_size', 'steps', 'rounds'},
    'inference --peers': {'batch_size', 'image_size', 'steps', 'rounds'},
    'input --peers': {'rounds'},
}


def parse_args(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                   formatter_class=arguments.HelpFormatter)
  parser.add_argument('--mode', choices=['train', 'inference', 'input', 'end_to_end'],
                      help='what to measure (default: train; with --peers, train and '
                      'inference)')
  parser.add_argument('--peers', action='store_true',
                      help='compares training and inference with Keras and, if '
                      'requirements-benchmark.txt is installed, timm; with --mode input, the '
                      "input pipeline with slim's and Keras'")
  parser.add_argument('--batch_size', type=arguments.positive_int, default=8,
                      help='images per step, summed over towers')
  parser.add_argument('--image_size', type=arguments.image_size, default=299,
                      help='height and width in pixels')
  parser.add_argument('--depth_multiplier', type=arguments.positive_float, default=1.0,
                      help='width of the network')
  parser.add_argument('--num_clones', type=arguments.positive_int,
                      help='number of towers (default: one on every GPU, or one on the CPU)')
  parser.add_argument('--clone_on_cpu', action='store_true', help='puts the towers on the CPU')
  parser.add_argument('--variable_update', choices=towers.VARIABLE_UPDATES,
                      help='where the variables are (default: mirrored on several GPUs)')
  parser.add_argument('--precision', choices=precision.PRECISIONS, default='float32',
                      help='number format of the computation')
  parser.add_argument('--xla', action='store_true', help='compiles the graph, on GPUs')
  parser.add_argument('--synthetic', action='store_true',
                      help='repeats one random batch in end_to_end too, as train and '
                      'inference always do')
  parser.add_argument('--steps', type=arguments.positive_int, default=10,
                      help='timed steps')
  parser.add_argument('--rounds', type=arguments.positive_int, default=3,
                      help='measurements per median of --peers')
  parser.add_argument('--json', action='store_true', help='prints JSON instead of a table')
  args = parser.parse_args(argv)
  measurement = (args.mode or 'train') + ' --peers' * args.peers
  if measurement not in OPTIONS:
    parser.error(f'--mode {args.mode} has no peers: leave --peers out, or the mode')
  unused = [f'--{name}' for name, value in vars(args).items()
            if value != parser.get_default(name)
            and name not in OPTIONS[measurement] | {'mode', 'peers', 'json'}]
  if unused:
    parser.error(f'{" and ".join(unused)} would have no effect on --mode {measurement}, which '
                 'takes ' + ', '.join(f'--{name}' for name in sorted(OPTIONS[measurement])))
  return args


def measure(args):
  """Returns the figures of a mode as a dict."""
  if args.mode == 'input':
    return {**input_pipeline.measure(args.batch_size, args.image_size, args.steps),
            'import_seconds': IMPORT_SECONDS}
  devices = towers.tower_devices(args.num_clones, args.clone_on_cpu)
  if args.mode == 'inference':
    devices = devices[:1]
  precision.check(args.precision, args.xla, devices)
  if args.batch_size % len(devices):
    raise towers.DeviceError(f'--batch_size {args.batch_size} is the sum over all towers and must '
                             f'be divisible by {len(devices)} towers (--num_clones)')
  if args.mode == 'inference':
    result = network.measure_inference(args.batch_size, args.image_size, args.depth_multiplier,
                                       devices, args.precision, args.xla, args.steps)
  else:
    result = network.measure_training(args.batch_size, args.image_size, args.depth_multiplier,
                                      devices, args.precision, args.xla, args.steps,
                                      args.mode == 'end_to_end' and not args.synthetic,
                                      args.variable_update)
  return {**result, 'import_seconds': IMPORT_SECONDS}


def main(args):
  if args.peers and args.mode != 'input':
    rows = peers.compare([args.mode] if args.mode else ['train', 'inference'], args.batch_size,
                         args.image_size, args.steps, args.rounds)
    print(json.dumps(rows) if args.json else peers.table(rows))
    return
  figures = input_pipeline.compare(args.rounds) if args.peers else measure(args)
  if args.json:
    print(json.dumps(figures))
    return
  for name, value in figures.items():
    print(f'{name:40} {value:10.3f}')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    main(parse_args())
  except (towers.DeviceError, flowers.DatasetError, peers.PeerError) as error:
    sys.exit(f'benchmark.py: {error}')
