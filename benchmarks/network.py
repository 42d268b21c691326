"""Speed, memory and start-up time of training and inference.

Measure once per process: a second measurement would start warm and include the first one's
memory.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import resource
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.python.framework import ops
import tf_slim as slim

from common import files
from deployment import precision as precisions
from deployment import towers
from export import folding
from export import freeze
from records import flowers
from training import step as training_step
import xception

NUM_CLASSES = 5
WARM_UP_STEPS = 3
# Besides the forward product, a training step computes the gradients of images and kernels.
TRAINING_FACTOR = 3
LIMIT_SIZE, LIMIT_PRODUCTS = 4096, 5  # side and number of the matrix products
DATASET_DIR = os.path.join(files.PROJECT_DIR, 'dataset')


def count_flops(image_size, depth_multiplier=1.0, num_classes=NUM_CLASSES):
  """Returns the floating-point operations of one image's forward pass.

  Two per multiply-add of the graph's convolutions; everything else is less than 1 %.
  """
  with tf.Graph().as_default() as graph, slim.arg_scope(xception.xception_arg_scope()):
    xception.xception(tf.zeros([1, image_size, image_size, 3]), num_classes, is_training=False,
                      depth_multiplier=depth_multiplier)
    return sum(ops.get_stats_for_node_def(graph, op.node_def, 'flops').value
               for op in graph.get_operations()
               if op.type in ('Conv2D', 'DepthwiseConv2dNative'))


def measure_limit(precision, devices):
  """Returns the operations per second of large matrix products.

  Args:
    precision: number format of the matrices: 'float32', 'bfloat16' or 'float16'.
    devices: device of each tower; each runs a product, up to the number of CPU cores.
  """
  if devices[0].startswith('/cpu'):
    devices = devices[:towers.num_cores()]
  with tf.Graph().as_default(), tf.Session(config=towers.session_config(devices)) as session:
    products = []
    for device in devices:
      with tf.device(device):
        factor = tf.get_variable(f'factor_{len(products)}', [LIMIT_SIZE, LIMIT_SIZE],
                                 tf.as_dtype(precision), tf.ones_initializer(), trainable=False)
        products.append(tf.matmul(factor, factor).op)
    session.run(tf.global_variables_initializer())
    seconds = time_steps(lambda: session.run(products), LIMIT_PRODUCTS)
  return len(devices) * 2 * LIMIT_SIZE**3 / np.median(seconds)


def time_steps(step, num_steps):
  """Calls a function after a warm-up; returns the seconds of each call."""
  for _ in range(WARM_UP_STEPS):
    step()
  seconds = []
  for _ in range(num_steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  return seconds


def build_training_step(batch_size, image_size, depth_multiplier, devices, precision,
                        real_images, variable_update=None, frozen=False):
  """Returns a TrainStep with Adam in the default graph.

  Args:
    frozen: whether to freeze batch norm and to disable dropout.
    Others: see `measure_training`.
  """
  shape = [batch_size, image_size, image_size, 3]
  if real_images:
    batch = flowers.load_numbered_batch(
        flowers.get_split('train', DATASET_DIR), *shape[:3], is_training=True)
  else:
    images = tf.get_variable('images', shape, trainable=False)
    positions = tf.range(batch_size, dtype=tf.int64)
    batch = images, positions % NUM_CLASSES, positions
  loss_fn = functools.partial(
      training_step.tower_loss, num_classes=NUM_CLASSES, is_training=not frozen,
      depth_multiplier=depth_multiplier, dropout_keep_prob=0.5, label_smoothing=0.0, seed=0)
  learning_rate = tf.constant(0.001)
  optimizer = tf.train.AdamOptimizer(learning_rate)
  if precision == 'float16':
    optimizer = precisions.scale_loss(optimizer)
  with slim.arg_scope(xception.xception_arg_scope()):
    return training_step.build_train_step(
        *batch, loss_fn, optimizer, learning_rate, devices,
        tf.train.get_or_create_global_step(), variable_update=variable_update)


def measure_training(batch_size, image_size, depth_multiplier, devices, precision, xla, num_steps,
                     real_images, variable_update=None):
  """Measures training steps of the network.

  Args:
    batch_size: images per step.
    image_size, depth_multiplier: size of the images and of the network.
    devices: device of each tower.
    precision, xla: see `precision.check`.
    num_steps: timed steps.
    real_images: True trains on the shipped flowers through the whole input pipeline, False
      repeats one batch.
    variable_update: see `towers.mirrors_variables`.

  Returns:
    Dict of figures, see `figures`.
  """
  config = towers.session_config(devices)
  towers.start_threads(config, devices)
  precisions.set_session_options(config, precision, xla)
  with tf.Graph().as_default():
    start = time.perf_counter()
    step = build_training_step(batch_size, image_size, depth_multiplier, devices, precision,
                               real_images, variable_update)
    graph_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with tf.Session(config=config) as session:
      towers.initialize(session)
      session.run(step.train_op)
      first_step_seconds = time.perf_counter() - start
      seconds = time_steps(lambda: session.run([step.train_op, step.global_step]), num_steps)
    result = figures(seconds, batch_size, graph_seconds, first_step_seconds)
  return {**result, **use_of_limit(
      result['images_per_second'], TRAINING_FACTOR * count_flops(image_size, depth_multiplier),
      precision, devices)}


def frozen_graph(image_size, depth_multiplier=1.0):
  """Returns a frozen GraphDef of the network from `input` to `output`, not folded.

  The parameters of the batch norms are random like the weights: TensorFlow would remove zero
  biases, which trained networks do not have.
  """
  random = np.random.default_rng(0)
  config = towers.session_config(['/cpu:0'])
  with tf.Graph().as_default(), tf.Session(config=config) as session:
    images = tf.placeholder(tf.float32, [None, image_size, image_size, 3], name='input')
    with slim.arg_scope(xception.xception_arg_scope()):
      _, end_points = xception.xception(images, NUM_CLASSES, is_training=False,
                                        depth_multiplier=depth_multiplier,
                                        prediction_fn=freeze.softmax)
    tf.identity(end_points['Predictions'], name='output')
    session.run(tf.global_variables_initializer())
    for variable in slim.get_model_variables():
      if 'BatchNorm' in variable.op.name:
        variable.load(random.uniform(0.1, 1, variable.shape), session)
    return tf.graph_util.convert_variables_to_constants(
        session, tf.get_default_graph().as_graph_def(), ['output'])


def serialized_frozen_graph(image_size, depth_multiplier, fold):
  """Returns `frozen_graph` as bytes, with folded batch norms if `fold` is True."""
  tf.disable_v2_behavior()  # in a new process
  tf.enable_resource_variables()
  graph_def = frozen_graph(image_size, depth_multiplier)
  if fold:
    graph_def = folding.fold(graph_def, 'output')
  return graph_def.SerializeToString()


def measure_inference(batch_size, image_size, depth_multiplier, devices, precision, xla,
                      num_steps, fold=True):
  """Measures the frozen graph on the first device.

  Args:
    batch_size, image_size, depth_multiplier, devices, precision, xla, num_steps: see
      `measure_training`.
    fold: whether the batch norms are folded, as `write_pb.py` does.

  Returns:
    Dict of figures as from `measure_training`.
  """
  # In a separate process: freezing needs more memory than inference.
  with concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn')) as process:
    frozen = process.submit(serialized_frozen_graph, image_size, depth_multiplier, fold).result()
  batch = np.random.default_rng(0).normal(size=[batch_size, image_size, image_size, 3])
  config = towers.session_config(devices)
  precisions.set_session_options(config, precision, xla)
  with tf.Graph().as_default(), tf.device(devices[0]):
    start = time.perf_counter()
    tf.import_graph_def(tf.GraphDef.FromString(frozen), name='')
    graph_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with tf.Session(config=config) as session:
      run = functools.partial(session.run, 'output:0', {'input:0': batch.astype(np.float32)})
      run()
      first_step_seconds = time.perf_counter() - start
      seconds = time_steps(run, num_steps)
    result = figures(seconds, batch_size, graph_seconds, first_step_seconds)
  return {**result, **use_of_limit(result['images_per_second'],
                                   count_flops(image_size, depth_multiplier), precision,
                                   devices[:1])}


def figures(seconds, batch_size, graph_seconds, first_step_seconds):
  """Returns the figures of a measurement of the default graph; memory is the process's peak.

  Args:
    seconds: list of floats, one per step.
    batch_size: images per step.
    graph_seconds: time to build the graph.
    first_step_seconds: time of the session's creation, the initial values and the first step.
  """
  peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  graph = tf.get_default_graph()
  return {
      'images_per_second': float(batch_size / np.median(seconds)),
      'seconds_per_step': float(np.median(seconds)),
      'seconds_per_step_p10': float(np.percentile(seconds, 10)),
      'seconds_per_step_p90': float(np.percentile(seconds, 90)),
      'peak_memory_mib': peak_memory,
      'graph_seconds': graph_seconds,
      'graph_operations': len(graph.get_operations()),
      'graph_mib': graph.as_graph_def().ByteSize() / 2**20,
      'first_step_seconds': first_step_seconds,
  }


def use_of_limit(images_per_second, flops, precision, devices):
  """Returns the figures of a rate relative to `measure_limit`.

  Args:
    images_per_second: float.
    flops: floating-point operations per image.
    precision, devices: see `measure_limit`.
  """
  limit = measure_limit(precision, devices)
  return {
      'fraction_of_limit': float(flops * images_per_second / limit),
      'limit_gflops_per_second': float(limit / 1e9),
      'gflops_per_image': flops / 1e9,
  }
