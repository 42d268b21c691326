"""Tests of the number formats that a graph computes in."""

import collections
import os
from unittest import mock

import tensorflow.compat.v1 as tf
import tf_slim as slim

from deployment import precision
from deployment import towers
import xception


def computed_types(precision_name):
  """Returns {operation type: the number formats it computes in} of a training step."""
  with tf.Graph().as_default():
    with slim.arg_scope(xception.xception_arg_scope()):
      logits, _ = xception.xception(tf.zeros([2, 71, 71, 3]), 5, depth_multiplier=0.125)
    step = tf.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(logits))
    config = tf.ConfigProto()
    precision.set_session_options(config, precision_name, False)
    with tf.Session(config=config) as session:
      session.run(tf.global_variables_initializer())
      metadata = tf.RunMetadata()
      session.run(step, options=tf.RunOptions(output_partition_graphs=True),
                  run_metadata=metadata)
  types = collections.defaultdict(set)
  for graph in metadata.partition_graphs:
    for node in graph.node:
      kind = node.op.removeprefix('_MklNative').removeprefix('_Mkl').removeprefix('_')
      if kind == 'FusedBatchNormEx':  # the fusion with a ReLU
        kind = 'FusedBatchNormV3'
      if 'T' in node.attr:
        types[kind].add(tf.as_dtype(node.attr['T'].type))
  return types


class PrecisionTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(os.environ))  # which bfloat16 changes

  def test_a_users_own_lists_stay(self):
    name = 'TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_DENYLIST_ADD'
    os.environ[name] = 'Mean'
    precision.set_session_options(tf.ConfigProto(), 'bfloat16', False)
    self.assertEqual(set(os.environ[name].split(',')), {'Mean', *precision.FLOAT32_OPERATIONS})

  def test_bfloat16_is_used_where_it_is_faster(self):
    try:
      precision.check('bfloat16', False, ['/cpu:0'])
    except towers.DeviceError as error:
      self.skipTest(str(error))
    types = computed_types('bfloat16')
    for kind in ('Conv2D', 'DepthwiseConv2dNative', 'DepthwiseConv2dNativeBackpropInput'):
      self.assertEqual(types[kind], {tf.bfloat16}, kind)
    for kind in precision.FLOAT32_OPERATIONS:
      self.assertEqual(types[kind], {tf.float32}, kind)

  def test_float32_stays(self):
    types = computed_types('float32')
    for kind in ('Conv2D', 'DepthwiseConv2dNative', *precision.FLOAT32_OPERATIONS):
      self.assertEqual(types[kind], {tf.float32}, kind)
