"""Tests that replaced operations compute what TensorFlow's own do."""

import collections
import contextlib
import os
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from cpu_kernels import build
from cpu_kernels import operations
from deployment import precision
from deployment import towers
import xception


class OperationsTest(tf.test.TestCase):

  def assertSameGradients(self, function, inputs, uses_conv_gradient=False):
    """Compares the gradients of a function of tensors, with and without the override."""
    with tf.Graph().as_default() as graph, tf.Session() as session:
      tensors = [tf.constant(value) for value in inputs]
      expected = tf.gradients(function(*tensors), tensors)
      first = len(graph.get_operations())
      with operations.replace_slow_operations():
        output = function(*tensors)
      gradients = tf.gradients(output, tensors)
      kinds = {op.type for op in graph.get_operations()[first:]}
      self.assertEqual('Conv2DBackpropFilter' in kinds, uses_conv_gradient)
      for value, wanted in zip(*session.run([gradients, expected])):
        self.assertAllClose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

  def test_pointwise_convolutions(self):
    random = np.random.default_rng(0)
    for height, width in ((8, 8), (7, 10)):
      for stride in (1, 2, 3):
        weights = random.normal(size=[2, -(-height // stride), -(-width // stride), 9])

        def loss(images, kernel, stride=stride, weights=weights):
          return tf.reduce_sum(weights.astype(np.float32) * tf.nn.conv2d(
              images, kernel, strides=stride, padding='SAME'))

        self.assertSameGradients(loss, [
            random.normal(size=shape).astype(np.float32)
            for shape in ((2, height, width, 5), (1, 1, 5, 9))])

  def test_other_convolutions_are_left_to_tensorflow(self):
    random = np.random.default_rng(0)
    for kernel_shape, strides, padding in (
        ((3, 3, 6, 8), 1, 'SAME'),
        ((1, 1, 6, 8), [1, 2, 1, 1], 'SAME'),
        ((1, 1, 3, 8), 1, 'SAME'),  # two groups
        ((1, 1, 6, 8), 1, [[0, 0], [1, 1], [1, 1], [0, 0]])):
      with self.subTest(kernel_shape=kernel_shape, strides=strides, padding=padding):
        images, kernel = (random.normal(size=shape).astype(np.float32)
                          for shape in ((2, 8, 8, 6), kernel_shape))

        def loss(images, kernel, strides=strides, padding=padding):
          return tf.reduce_sum(tf.square(
              tf.nn.conv2d(images, kernel, strides=strides, padding=padding)))

        self.assertSameGradients(loss, [images, kernel], uses_conv_gradient=True)

  def test_the_whole_network(self):
    with tf.Graph().as_default(), tf.Session() as session:
      expected = tf.gradients(network_loss(False), tf.trainable_variables())
      with operations.replace_slow_operations():
        loss = network_loss(False, reuse=True)
      gradients = tf.gradients(loss, tf.trainable_variables())
      session.run(tf.global_variables_initializer())
      for variable, value, wanted in zip(tf.trainable_variables(),
                                         *session.run([gradients, expected])):
        self.assertAllClose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(),
                            msg=variable.op.name)

  def test_the_whole_network_in_training(self):
    # Rounding errors pass through forty batch norms: TensorFlow's own float32 gradients differ
    # by 2e-5 from those in float64. Rarely a value is so close to 0 that rounding decides whether
    # a ReLU is active, with an error a thousand times larger; then other weights are tried.
    errors = []
    while len(errors) < 3 and not (errors and errors[-1] < 2e-5):
      weights, values = gradients_in_training(tf.float32, len(errors) + 1)
      _, wanted = gradients_in_training(tf.float64, len(errors) + 1, weights)
      errors.append(np.max([np.abs(value - right).max() / np.abs(right).max()
                            for value, right in zip(values, wanted, strict=True)]))
      self.assertTrue(np.isfinite(errors[-1]))
    self.assertLess(errors[-1], 2e-5)

  def test_which_operations_are_replaced(self):
    compiled = build.load() is not None  # kernels_test.py fails if this is a fault
    for is_training in (True, False):
      with tf.Graph().as_default() as graph:
        with operations.replace_slow_operations():
          loss = network_loss(is_training)
        tf.gradients(loss, tf.trainable_variables(), name='gradients')
        needed = tf.graph_util.extract_sub_graph(
            graph.as_graph_def(), [op.name for op in graph.get_operations()
                                   if op.name.startswith('gradients')])
        kinds = collections.Counter(node.op for node in needed.node)
      # The two 3 x 3 convolutions keep their gradients.
      self.assertEqual(kinds['Conv2DBackpropFilter'], 2)
      # 21 depthwise convolutions are the only readers of a batch norm and its ReLU.
      both = 21 if compiled and is_training else 0
      self.assertEqual(kinds['XceptionBatchNormDepthwiseGrad'], both)
      self.assertEqual(kinds['XceptionBatchNormGrad'], 40 - both if both else 0)
      self.assertEqual(kinds['FusedBatchNormV3'], 0 if both else 40)
      self.assertEqual(kinds['XceptionDepthwiseGrad'], 34 - both if compiled else 0)
      self.assertEqual(kinds['DepthwiseConv2dNative'], 0 if compiled else 34)
      if compiled and is_training:
        self.assertEqual(kinds['Relu'] + kinds['ReluGrad'], 0)

  def test_a_dependency_on_the_batch_norm_prevents_fusion(self):
    if build.load() is None:
      self.skipTest('there is no C++ compiler')
    images = np.random.default_rng(0).normal(size=[2, 9, 9, 16])
    outputs = []
    for waits in (False, True):
      with tf.Graph().as_default() as graph, tf.Session() as session:
        with operations.replace_slow_operations():
          normalized, mean, *_ = tf.raw_ops.FusedBatchNormV3(
              x=tf.constant(images, tf.float32), scale=tf.ones([16]), offset=tf.zeros([16]),
              mean=[], variance=[])
          with tf.control_dependencies([-mean] if waits else []):
            net = tf.nn.relu(normalized)
          net = tf.nn.depthwise_conv2d(net, tf.ones([3, 3, 16, 1]), [1, 1, 1, 1], 'SAME')
          net = tf.identity(net)
        kinds = collections.Counter(op.type for op in graph.get_operations())
        self.assertEqual(kinds['XceptionBatchNormDepthwise'], 0 if waits else 1)
        self.assertEqual(kinds['XceptionBatchNorm'] + kinds['XceptionDepthwise'], 2 if waits else 0)
        outputs.append(session.run(net))
    self.assertAllClose(*outputs, rtol=1e-5, atol=1e-5)

  def test_end_points_are_what_they_were(self):
    names = 'block5_dws_conv1', 'block13_dws_conv1', 'block14_dws_conv2'
    results = []
    for context in (contextlib.nullcontext(), operations.replace_slow_operations()):
      with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        images = np.random.default_rng(0).normal(size=[2, 75, 71, 3])
        with context, slim.arg_scope(xception.xception_arg_scope()):
          _, end_points = xception.xception(tf.constant(images, tf.float32), 5, is_training=True,
                                            dropout_keep_prob=1.0, depth_multiplier=0.125)
        tensors = [end_points[name] for name in names]
        # The gradients of a loss that reads them pass through replaced operations.
        loss = tf.add_n([tf.reduce_mean(tensor**2 * tensor) for tensor in tensors])
        weights = tf.trainable_variables('Xception/block4')
        session.run(tf.global_variables_initializer())
        results.append(session.run([tensors, tf.gradients(loss, weights)]))
    # Gradients differ by up to 1 % where rounding decides whether a ReLU is active.
    for values, wanted, relative in zip(*results, (1e-4, 0.05), strict=True):
      for value, right in zip(values, wanted, strict=True):
        self.assertLess(np.linalg.norm(value - right), relative * np.linalg.norm(right))

  def test_without_kernels(self):
    with tf.Graph().as_default() as graph, \
         mock.patch.object(build, 'load', return_value=None):
      with operations.replace_slow_operations():
        loss = network_loss(True)
      tf.gradients(loss, tf.trainable_variables())
    kinds = collections.Counter(op.type for op in graph.get_operations())
    self.assertEqual(kinds['FusedBatchNormGradV3'], 40)
    self.assertEqual(kinds['DepthwiseConv2dNativeBackpropFilter'], 34)

  def test_moving_statistics_are_updated_as_before(self):
    statistics = []
    for context in (contextlib.nullcontext(), operations.replace_slow_operations()):
      with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        with context:
          network_loss(True)
        session.run(tf.global_variables_initializer())
        session.run(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
        statistics.append(session.run([variable for variable in slim.get_model_variables()
                                       if 'moving' in variable.op.name]))
    for value, wanted in zip(*statistics, strict=True):
      self.assertAllClose(value, wanted, rtol=1e-4, atol=1e-6)

  def test_gpus_keep_their_own(self):
    with tf.Graph().as_default() as graph, tf.device('/gpu:0'), \
         mock.patch.object(build, 'load') as load:
      with operations.replace_slow_operations():
        network_loss(True)
    self.assertFalse([op for op in graph.get_operations() if op.type.startswith('Xception')])
    load.assert_not_called()

  def test_bfloat16_reaches_the_kernels(self):
    try:
      precision.check('bfloat16', False, ['/cpu:0'])
    except towers.DeviceError as error:
      self.skipTest(str(error))
    if build.load() is None:
      self.skipTest('there is no C++ compiler')
    self.enterContext(mock.patch.dict(os.environ))  # which bfloat16 changes
    config = tf.ConfigProto()
    precision.set_session_options(config, 'bfloat16', False)
    with tf.Graph().as_default(), tf.Session(config=config) as session:
      with operations.replace_slow_operations():
        loss = network_loss(True)
      step = tf.train.GradientDescentOptimizer(0.1).minimize(loss)
      session.run(tf.global_variables_initializer())
      metadata = tf.RunMetadata()
      session.run(step, options=tf.RunOptions(output_partition_graphs=True),
                  run_metadata=metadata)
    types = collections.Counter(
        (node.op, tf.as_dtype(node.attr['T'].type).name)
        for graph in metadata.partition_graphs for node in graph.node
        if node.op in build.OPERATIONS)
    self.assertEqual(types, {
        ('XceptionBatchNorm', 'bfloat16'): 19, ('XceptionBatchNormGrad', 'bfloat16'): 19,
        ('XceptionBatchNormDepthwise', 'bfloat16'): 21,
        ('XceptionBatchNormDepthwiseGrad', 'bfloat16'): 21,
        ('XceptionDepthwise', 'bfloat16'): 13, ('XceptionDepthwiseGrad', 'bfloat16'): 13})


def network_loss(is_training, reuse=None):
  """The sum of a small network's squared logits."""
  images = np.random.default_rng(0).normal(size=[2, 75, 71, 3])
  with slim.arg_scope(xception.xception_arg_scope()):
    logits, _ = xception.xception(tf.constant(images, tf.float32), 5, is_training,
                                  dropout_keep_prob=1.0, depth_multiplier=0.125, reuse=reuse)
  return tf.reduce_sum(tf.square(logits))


def gradients_in_training(dtype, seed, weights=None):
  """Returns a network's weights, drawn if None, and their gradients.

  In float32 with replaced operations, in float64 with TensorFlow's own.
  """
  is_fast = dtype == tf.float32
  images = np.random.default_rng(seed).normal(size=[2, 75, 71, 3])
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(seed)
    with operations.replace_slow_operations() if is_fast else contextlib.nullcontext(), \
         slim.arg_scope(xception.xception_arg_scope()), \
         slim.arg_scope([slim.batch_norm], fused=is_fast):  # not in float64
      logits, _ = xception.xception(tf.constant(images, dtype), 5, dropout_keep_prob=1.0,
                                    depth_multiplier=0.125)
    gradients = tf.gradients(tf.reduce_sum(tf.square(logits)), tf.trainable_variables())
    session.run(tf.global_variables_initializer())
    if weights is None:
      weights = session.run(slim.get_model_variables())
    for variable, value in zip(slim.get_model_variables(), weights, strict=True):
      variable.load(value, session)
    return weights, session.run(gradients)
