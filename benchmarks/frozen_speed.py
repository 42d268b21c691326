"""Measures what folding and bfloat16 gain for the paper's network, in one run.

  python -m benchmarks.frozen_speed --rounds 15

Random weights, batch 8, 299 x 299. The graphs take turns, so that a slow minute
of the machine affects all of them, and their medians are compared.
"""

import argparse
import collections
import statistics
import tempfile
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from benchmarks import network
from export import folding
from export import formats
from export import freeze
from export import models

IMAGE_SIZE, BATCH_SIZE = 299, 8
CLASS_NAMES = ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips']


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=15)
  args = parser.parse_args()

  plain = network.frozen_graph(IMAGE_SIZE)
  folded = folding.fold(plain, 'output')
  bfloat16 = formats.to_bfloat16(folded)
  predictors = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, graph_def, precision in [
        ('float32, not folded', plain, 'float32'), ('float32, folded', folded, 'float32'),
        ('bfloat16 of classify_image, not folded', plain, 'bfloat16'),
        ('bfloat16 of classify_image, folded', folded, 'bfloat16'),
        ('bfloat16 of write_pb, folded', bfloat16, 'float32')]:
      path = freeze.write_drafts(graph_def, CLASS_NAMES, {'pb': 'model.pb'}, folder)['pb']
      predictors[name] = models.load(path, precision).predict
  images = np.random.default_rng(0).uniform(
      -1, 1, [BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3]).astype(np.float32)
  seconds = collections.defaultdict(list)
  for _ in range(args.rounds):
    for name, run in predictors.items():
      run(images)  # The other graphs have filled the caches.
      start = time.perf_counter()
      run(images)
      seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  for name, median in medians.items():
    print(f'{name:<40} {BATCH_SIZE / median:6.1f} images/s '
          f'{medians["float32, not folded"] / median:6.2f} x')


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  main()
