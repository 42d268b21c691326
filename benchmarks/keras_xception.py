"""Prints the images per second of Keras' Xception, training or inference."""

import argparse
import os
import statistics
import time

os.environ['KERAS_BACKEND'] = 'tensorflow'

import keras
import numpy as np

WARM_UP_STEPS = 3

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--mode', choices=['train', 'inference'], required=True)
parser.add_argument('--precision', choices=['float32'], required=True)
parser.add_argument('--batch_size', type=int, required=True)
parser.add_argument('--image_size', type=int, required=True)
parser.add_argument('--depth_multiplier', type=float, default=1.0, help='scales all widths')
parser.add_argument('--steps', type=int, required=True)
args = parser.parse_args()

shape = args.image_size, args.image_size, 3
images = np.random.default_rng(0).normal(size=(args.batch_size, *shape)).astype(np.float32)
labels = np.arange(args.batch_size) % 5
config = keras.applications.Xception(weights=None, classes=5, input_shape=shape).get_config()
for layer in config['layers']:
  layer.pop('build_config', None)  # holds the full width
  if 'filters' in layer['config']:
    layer['config']['filters'] = round(layer['config']['filters'] * args.depth_multiplier)
model = keras.Model.from_config(config)
model.compile(keras.optimizers.Adam(), 'sparse_categorical_crossentropy')

seconds = []
for _ in range(WARM_UP_STEPS + args.steps):
  start = time.perf_counter()
  if args.mode == 'train':
    model.train_on_batch(images, labels)
  else:
    model.predict_on_batch(images)
  seconds.append(time.perf_counter() - start)
print(args.batch_size / statistics.median(seconds[WARM_UP_STEPS:]))
