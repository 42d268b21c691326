"""Measures the cost of averaging Xception's gradients between workers on this machine.

  python -m benchmarks.all_reduce --workers 2 3 4

Starts workers on 127.0.0.1 that only average tensors with the shapes of the network's 156
trainable variables, 91.4 MB. Prints measured seconds and bytes per step next to the bytes that
a ring must send, then the computed cost of a ring on larger clusters.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import files
from deployment import cluster
from deployment import towers
import xception

WARM_UP_STEPS = 3
STEPS = 15
MODES = [(bucket_bytes, precision) for precision in cluster.PRECISIONS
         for bucket_bytes in (0, cluster.BUCKET_BYTES)]
# For the computed table: latency of a hop, as measured with small tensors, and an assumed step.
HOP_SECS, COMPUTE_SECS = 0.00015, 0.25
PAPER_WORKERS, PAPER_GBITS = (8, 64, 256), (10, 25, 100)


def gradient_shapes():
  """Returns the shapes of the trainable variables for 1000 classes."""
  with tf.Graph().as_default(), slim.arg_scope(xception.xception_arg_scope()):
    xception.xception(tf.zeros([1, 71, 71, 3]), 1000, is_training=True)
    return [variable.shape.as_list() for variable in tf.trainable_variables()]


def bytes_on_loopback():
  with open('/proc/net/dev', encoding='ascii') as f:
    line, = (line for line in f if line.strip().startswith('lo:'))
  return int(line.split(':')[1].split()[8])


def work():
  """Runs one worker; the chief prints a line of JSON for each mode."""
  shapes = gradient_shapes()
  config = towers.session_config(['/cpu:0'])
  workers = cluster.find_workers()
  workers.start(config, startup_timeout_secs=120, step_timeout_secs=60)
  for bucket_bytes, precision in MODES:
    with tf.Graph().as_default(), tf.device(workers.device):
      variables = [tf.get_variable(f'v{i}', shape, collections=[]) for i, shape in
                   enumerate(shapes)]
      values = [variable.read_value() for variable in variables]
      step = tf.group(*workers.average(values, precision, bucket_bytes))
      with workers.session() as session:
        session.run([variable.initializer for variable in variables])
        seconds = []
        for i in range(WARM_UP_STEPS + STEPS):
          if i == WARM_UP_STEPS:
            sent = bytes_on_loopback()
          start = time.perf_counter()
          session.run(step)
          seconds.append(time.perf_counter() - start)
        sent = (bytes_on_loopback() - sent) / STEPS / workers.size
    workers.all_gather('next')
    if workers.is_chief:
      print(json.dumps({'bucket_bytes': bucket_bytes, 'precision': precision, 'bytes': sent,
                        'seconds': statistics.median(seconds[WARM_UP_STEPS:])}), flush=True)
  workers.leave()


def measure(num_workers):
  """Returns the results of one cluster."""
  sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(num_workers)]
  addresses = [f'127.0.0.1:{each.getsockname()[1]}' for each in sockets]
  for each in sockets:
    each.close()
  processes = [subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.all_reduce', '--work'], cwd=files.PROJECT_DIR, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
      env=dict(os.environ, TF_CONFIG=json.dumps({
          'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': i}})))
      for i in range(num_workers)]
  outputs = [process.communicate()[0] for process in processes]
  return [json.loads(line) for line in outputs[0].splitlines() if line.startswith('{')]


def ring_bytes(num_workers, num_bytes):
  """Returns the bytes that a worker sends to average num_bytes over a ring."""
  return 2 * (num_workers - 1) / num_workers * num_bytes


def print_on_paper(num_bytes):
  """Prints the computed cost of a ring at the nominal speed of the links."""
  print(f'\nComputed: {num_bytes / 1e6:.1f} MB, {HOP_SECS * 1000} ms per hop, {COMPUTE_SECS} s '
        'per step. Images per second relative to perfect scaling:')
  print('| workers | Gbit/s | ring, s | of which hops, s | sequential | overlapped |')
  print('|---|---|---|---|---|---|')
  for num_workers in PAPER_WORKERS:
    for gbit in PAPER_GBITS:
      hops = 2 * (num_workers - 1) * HOP_SECS
      seconds = ring_bytes(num_workers, num_bytes) * 8 / (gbit * 1e9) + hops
      print(f'| {num_workers} | {gbit} | {seconds:.3f} | {hops:.3f} | '
            f'{COMPUTE_SECS / (COMPUTE_SECS + seconds):.0%} | '
            f'{COMPUTE_SECS / max(COMPUTE_SECS, seconds):.0%} |')


def main(args):
  if args.work:
    work()
    return
  num_bytes = 4 * sum(tf.TensorShape(shape).num_elements() for shape in gradient_shapes())
  print(f'Measured: {num_bytes / 1e6:.1f} MB, on this machine\'s loopback')
  print('| workers | buckets | format | s/step | MB sent per worker | MB of a ring |')
  print('|---|---|---|---|---|---|')
  for num_workers in args.workers:
    for row in measure(num_workers):
      wire_bytes = num_bytes // (2 if row['precision'] == 'bfloat16' else 1)
      buckets = '4 MB' if row['bucket_bytes'] else 'none'
      print(f'| {num_workers} | {buckets} | {row["precision"]} | {row["seconds"]:.3f} | '
            f'{row["bytes"] / 1e6:.1f} | {ring_bytes(num_workers, wire_bytes) / 1e6:.1f} |',
            flush=True)
  print_on_paper(num_bytes)


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workers', type=int, nargs='+', default=[2, 3, 4],
                      help='numbers of workers')
  parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
  main(parser.parse_args())
