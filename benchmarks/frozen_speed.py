"""Measures the images per second of frozen models in their runtimes, in one run on the CPU.

  python -m benchmarks.frozen_speed --rounds 9

Random weights, 299 pixels at full width and 128 pixels at half width, batches of
1 and 8. The models take turns, so that a slow minute of the machine affects all
of them, and their medians are compared. Keras' and timm's networks are scaled to
the same width. What is not installed is left out.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
import tempfile
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from benchmarks import network
from benchmarks import peers
from benchmarks import rounds
from export import folding
from export import formats
from export import freeze
from export import models
from export import runtimes

CONFIGURATIONS = [(299, 1.0), (128, 0.5)]  # image size, depth multiplier
BATCH_SIZES = [1, 8]
CLASS_NAMES = ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips']
NUM_CALIBRATION_IMAGES = 8  # speed does not depend on the ranges
PEERS = [('Keras predict_on_batch', peers.KERAS, (), ('keras',)),
         ('timm, torch.compile', peers.TIMM, ('--compile',), ('timm', 'torch'))]


def write_models(image_size, depth_multiplier, folder):
  """Writes the network in every format that the installed packages allow.

  Returns:
    {name: path}.
  """
  graph_def = network.frozen_graph(image_size, depth_multiplier)
  folded = folding.fold(graph_def, runtimes.OUTPUT_NODE)
  settings = formats.Settings(calibration_images=random_images(
      NUM_CALIBRATION_IMAGES, image_size))
  names = ['pb', 'tflite', 'tflite_full_int8'] + ['onnx', 'onnx_int8'] * is_installed(
      'tf2onnx', 'onnxruntime')
  paths = freeze.write_drafts(folded, CLASS_NAMES, {
      name: 'model' + formats.FORMATS[name].suffix for name in names}, folder, settings)
  for name, variant in [('pb, not folded', graph_def),
                        ('pb, bfloat16', formats.to_bfloat16(folded))]:
    paths[name] = freeze.write_drafts(
        variant, CLASS_NAMES, {'pb': f'{name}.pb'}, folder, settings)['pb']
  return paths


def is_installed(*packages):
  return all(importlib.util.find_spec(package) for package in packages)


def random_images(count, image_size):
  return np.random.default_rng(0).uniform(
      -1, 1, [count, image_size, image_size, 3]).astype(np.float32)


def openvino_predictor(path):
  """Returns a function that runs a model in OpenVINO; what is float32 in it stays float32."""
  openvino = importlib.import_module('openvino')
  compiled = openvino.compile_model(openvino.convert_model(path), 'CPU',
                                    {'INFERENCE_PRECISION_HINT': 'f32'})
  return lambda batch: compiled(batch)[0]


def measure(predict, images):
  """Returns images per second of one call; the call before it fills the caches."""
  predict(images)
  start = time.perf_counter()
  predict(images)
  return len(images) / (time.perf_counter() - start)


def measure_peer(program, options, batch_size, image_size, depth_multiplier):
  """Returns images per second of a peer's program, of which each call takes 5 steps."""
  return float(peers.run_program([
      program, '--mode', 'inference', '--precision', 'float32', '--batch_size', str(batch_size),
      '--image_size', str(image_size), '--depth_multiplier', str(depth_multiplier),
      '--steps', '5', *options]))


def compare(image_size, depth_multiplier, num_rounds):
  """Prints a table of one configuration."""
  with tempfile.TemporaryDirectory() as folder:
    paths = write_models(image_size, depth_multiplier, folder)
    predictors = {name: models.load(path, use_gpu=False).predict for name, path in paths.items()}
    if is_installed('openvino'):
      predictors.update({f'{name} in OpenVINO': openvino_predictor(paths[name])
                         for name in ('pb', 'onnx_int8') if name in paths})
    for batch_size in BATCH_SIZES:
      images = random_images(batch_size, image_size)
      functions = {name: functools.partial(measure, predict, images)
                   for name, predict in predictors.items()}
      functions.update({
          name: functools.partial(measure_peer, program, options, batch_size, image_size,
                                  depth_multiplier)
          for name, program, options, packages in PEERS if is_installed(*packages)})
      medians = rounds.take_turns(functions, num_rounds)
      print(f'{image_size} pixels, width {depth_multiplier}, batch {batch_size}')
      for name, median in medians.items():
        print(f'  {name:<24} {median:7.1f} images/s {median / medians["pb"]:6.2f} x', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=9)
  args = parser.parse_args()
  for image_size, depth_multiplier in CONFIGURATIONS:
    compare(image_size, depth_multiplier, args.rounds)


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    main()
  except peers.PeerError as error:
    sys.exit(f'frozen_speed.py: {error}')
