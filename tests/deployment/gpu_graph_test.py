"""Tests what TensorFlow would make of the training graph on GPUs; needs none.

The kernel registry tells which operations run on GPUs, and TensorFlow's graph optimizer runs
for a virtual cluster of GPUs.
"""

import collections
import contextlib
import functools
import os
import tempfile
from unittest import mock

import tensorflow.compat.v1 as tf
from tensorflow.core.protobuf import device_properties_pb2
from tensorflow.core.protobuf import rewriter_config_pb2
from tensorflow.python.framework import kernels
from tensorflow.python.grappler import cluster as virtual_cluster
from tensorflow.python.grappler import tf_optimizer
import tf_slim as slim

from deployment import precision
from deployment import towers
from training import step as training_step
import xception

BATCH_SIZE, IMAGE_SIZE, NUM_CLASSES, DEPTH_MULTIPLIER = 4, 71, 5, 0.125
ANYWHERE = ('Const', 'NoOp', 'Placeholder')

Optimized = collections.namedtuple('Optimized', [
    'types',  # Counter of (operation type, data format, number format)
    'log',  # what TensorFlow printed
])


def build_graph(num_gpus, precision_name, fc_layers=(), variable_update=None):
  """Builds a training step on GPUs in a new graph; returns the graph and the TrainStep."""
  with tf.Graph().as_default() as graph:
    optimizer = tf.train.AdamOptimizer(0.001)
    if precision_name == 'float16':
      optimizer = precision.scale_loss(optimizer)
    loss_fn = functools.partial(
        training_step.tower_loss, num_classes=NUM_CLASSES, is_training=True,
        depth_multiplier=DEPTH_MULTIPLIER, dropout_keep_prob=0.5, label_smoothing=0.0, seed=1)
    network = functools.partial(xception.xception, fc_layers=fc_layers)
    with slim.arg_scope(xception.xception_arg_scope()), \
         mock.patch.object(xception, 'xception', network):
      step = training_step.build_train_step(
          tf.placeholder(tf.float32, [BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3]),
          tf.placeholder(tf.int64, [BATCH_SIZE]), tf.placeholder(tf.int64, [BATCH_SIZE]),
          loss_fn, optimizer, tf.constant(0.001), [f'/gpu:{i}' for i in range(num_gpus)],
          tf.train.get_or_create_global_step(), variable_update=variable_update)
  return graph, step


def has_gpu_kernel(op):
  """Returns whether an operation has a GPU kernel for its types."""
  def fits(constraint):
    if constraint.name not in op.node_def.attr:
      return True
    value = op.node_def.attr[constraint.name]
    types = [value.type] if value.type else value.list.type
    allowed = constraint.allowed_values.list.type
    return not allowed or all(each in allowed for each in types)

  return any(kernel.device_type in ('GPU', 'DEFAULT') and all(map(fits, kernel.constraint))
             for kernel in kernels.get_registered_kernels_for_op(op.type).kernel)


def virtual_gpus(num_gpus):
  """Returns a virtual cluster of a CPU and GPUs."""
  devices = []
  for name in ('CPU:0', *(f'GPU:{i}' for i in range(num_gpus))):
    properties = device_properties_pb2.DeviceProperties(
        type=name[:3], vendor='NVIDIA', model='H100', frequency=1755, num_cores=132,
        memory_size=80 << 30, bandwidth=3350000000)
    if name.startswith('GPU'):
      properties.environment.update(architecture='9.0', cuda='12050', cudnn='9300')
    devices.append(device_properties_pb2.NamedDevice(
        name=f'/job:localhost/replica:0/task:0/device:{name}', properties=properties))
  return virtual_cluster.Cluster(devices=devices)


@contextlib.contextmanager
def captured_stderr():
  """Captures what TensorFlow's C++ code prints; yields a function that returns it."""
  with tempfile.TemporaryFile() as f:
    saved = os.dup(2)
    os.dup2(f.fileno(), 2)

    def text():
      f.seek(0)
      return f.read().decode()
    try:
      yield text
    finally:
      os.dup2(saved, 2)
      os.close(saved)


def optimize(num_gpus, precision_name, **kwargs):
  """Optimizes the layout of a training graph for GPUs; returns an Optimized."""
  graph, step = build_graph(num_gpus, precision_name, **kwargs)
  with graph.as_default():
    for fetch in (step.train_op, step.global_step, step.loss):
      tf.add_to_collection('train_op', fetch)  # where the optimizer looks for fetches
  config = tf.ConfigProto()
  precision.set_session_options(config, precision_name, xla=False)
  rewrites = config.graph_options.rewrite_options
  rewrites.optimizers.extend(
      ['auto_mixed_precision'] * (precision_name == 'float16') + ['layout'])
  rewrites.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
  with captured_stderr() as log:
    optimized = tf_optimizer.OptimizeGraph(config, tf.train.export_meta_graph(graph=graph),
                                           verbose=False, cluster=virtual_gpus(num_gpus))
    log = log()
  return Optimized(collections.Counter(
      (node.op, node.attr['data_format'].s.decode(), tf.as_dtype(node.attr['T'].type).name)
      for node in optimized.node if 'T' in node.attr), log)


class GpuGraphTest(tf.test.TestCase):

  def assertAllNchw(self, optimized, num_towers=1):
    self.assertNotIn('failed', optimized.log)
    for kind, number in (('Conv2D', 41), ('DepthwiseConv2dNative', 34), ('FusedBatchNormV3', 40)):
      gradients = (['FusedBatchNormGradV3'] if kind == 'FusedBatchNormV3' else
                   [f'{kind}BackpropInput', f'{kind}BackpropFilter'])
      for each in (kind, *gradients):
        self.assertEqual(optimized.types[each, 'NCHW', 'float32'], number * num_towers, each)
        self.assertEqual(optimized.types[each, 'NHWC', 'float32'], 0, each)
    self.assertLessEqual(sum(number for (kind, *_), number in optimized.types.items()
                             if kind == 'Transpose'), 10 * num_towers)

  def test_float32_is_nchw(self):
    self.assertAllNchw(optimize(1, 'float32'))

  def test_float32_is_nchw_on_two_gpus(self):
    self.assertAllNchw(optimize(2, 'float32'), num_towers=2)

  def test_float32_is_nchw_with_fully_connected_layers(self):
    optimized = optimize(1, 'float32', fc_layers=(64, 48))
    self.assertNotIn('failed', optimized.log)
    self.assertEqual(optimized.types['FusedBatchNormV3', 'NCHW', 'float32'], 40)

  def test_float16_computes_in_float16(self):
    for num_gpus in (1, 2):
      optimized = optimize(num_gpus, 'float16')
      self.assertNotIn('failed', optimized.log)
      for kind, number in (('Conv2D', 41), ('Conv2DBackpropFilter', 41), ('FusedBatchNormV3', 40)):
        in_float16 = sum(count for (name, _, number_format), count in optimized.types.items()
                         if (name, number_format) == (kind, 'float16'))
        self.assertEqual(in_float16, number * num_gpus, kind)

  def test_operations_on_gpus_have_kernels(self):
    for num_gpus, precision_name in ((1, 'float32'), (2, 'float32'), (2, 'float16')):
      graph, _ = build_graph(num_gpus, precision_name)
      on_gpus = [op for op in graph.get_operations()
                 if 'GPU' in op.device.upper() and op.type not in ANYWHERE]
      self.assertGreater(len(on_gpus), 1000 * num_gpus)
      self.assertEqual({op.type for op in on_gpus if not has_gpu_kernel(op)}, set())

  def test_where_the_parts_of_a_step_are(self):
    def on_both(number):
      return {'GPU:0': number, 'GPU:1': number}

    for variable_update in towers.VARIABLE_UPDATES:
      graph, step = build_graph(2, 'float32', variable_update=variable_update)
      places = collections.defaultdict(collections.Counter)
      for op in graph.get_operations():
        places[op.type][op.device.removeprefix('/device:')] += 1
      self.assertEqual(places['Stage'], on_both(1))
      self.assertEqual(places['Unstage'], on_both(1))
      self.assertEqual(places['Conv2D'], on_both(41))
      mirrored = variable_update == 'mirrored'
      copies = [op.device for op in graph.get_operations()
                if op.type == 'VarHandleOp' and op.name.startswith(towers.tower_scope(1))]
      # 236 variables of the network, and Adam's two for each that is trained.
      self.assertEqual(copies, ['/device:GPU:1'] * (236 + 2 * 156) * mirrored)
      self.assertEqual(places['Split'], {'CPU:0': 3})  # images, labels, positions
      # 75 kernels, and the norm of 156 gradients.
      self.assertEqual(places['L2Loss'], {'GPU:0': 75 + 156, 'GPU:1': 75} if mirrored else
                       {'CPU:0': 75 + 156})
      self.assertEqual(places['ResourceApplyAdam'], on_both(156) if mirrored else {'CPU:0': 156})
      self.assertEqual(places['CollectiveReduce'], on_both(1) if mirrored else {})
    fetched = tf.graph_util.extract_sub_graph(graph.as_graph_def(), [step.train_op.name])
    self.assertEqual(sum(node.op == 'Stage' for node in fetched.node), 2)
    # A step's positions are those of the batch that it uses, not of the one that it fetches.
    fetched = tf.graph_util.extract_sub_graph(graph.as_graph_def(), [step.positions.op.name])
    self.assertEqual({node.op for node in fetched.node} & {'Stage', 'Unstage'}, {'Unstage'})
