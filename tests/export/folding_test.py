"""Tests of batch-norm folding against the unfolded graph and against TensorFlow's own tool."""

import tempfile

import numpy as np
import tensorflow.compat.v1 as tf
from tensorflow.python.tools import optimize_for_inference_lib

from common import checkpoints
from export import folding
from export import freeze
import small_model


def run(graph_def, images):
  with tf.Graph().as_default(), tf.Session() as session:
    tf.import_graph_def(graph_def, name='')
    return session.run('output:0', {'input:0': images})


def ops(graph_def):
  return [node.op for node in graph_def.node]


class FoldTestCase(tf.test.TestCase):

  def assertSorted(self, graph_def):
    seen = set()
    for node in graph_def.node:
      self.assertContainsSubset([tensor.partition(':')[0] for tensor in node.input], seen)
      self.assertNotIn(node.name, seen)
      seen.add(node.name)


class XceptionTest(FoldTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    with tempfile.TemporaryDirectory() as folder:
      checkpoint = small_model.write_checkpoint(folder)
      cls.graph_def, predict, _ = freeze.freeze(
          checkpoint, checkpoints.load_config(checkpoint))
    cls.images = small_model.validation_images()[0][::10]
    cls.expected = predict(cls.images)
    cls.folded = folding.fold(cls.graph_def, 'output')

  def test_the_images_differ(self):
    # Otherwise the comparisons below would prove nothing.
    self.assertGreater(np.ptp(self.expected, axis=0).max(), 0.2)

  def test_computes_what_the_checkpoint_computes(self):
    self.assertAllClose(run(self.folded, self.images), self.expected, rtol=0, atol=1e-5)

  def test_nodes(self):
    self.assertEqual(small_model.num_norms(self.graph_def), 40)
    self.assertEqual(small_model.num_norms(self.folded), 0)
    self.assertEqual(ops(self.folded).count('Identity'), 1)  # the output
    self.assertEqual(ops(self.folded).count('Conv2D'), 41)
    self.assertEqual(ops(self.folded).count('BiasAdd'), 41)
    self.assertSorted(self.folded)
    self.assertEqual((self.folded.node[0].name, self.folded.node[-1].name), ('input', 'output'))

  def test_kernels_and_outputs_equal_those_of_tensorflows_own_tool(self):
    oracle = optimize_for_inference_lib.optimize_for_inference(
        self.graph_def, ['input'], ['output'], tf.float32.as_datatype_enum)
    self.assertEqual(small_model.num_norms(oracle), 0)
    self.assertAllClose(run(self.folded, self.images), run(oracle, self.images), rtol=0, atol=1e-5)
    kernels, expected = self.kernels(self.folded), self.kernels(oracle)
    self.assertLen(expected, 41)
    for name, kernel in expected.items():
      self.assertAllClose(kernels[name], kernel, rtol=1e-5, atol=1e-6, msg=name)

  def kernels(self, graph_def):
    nodes = {node.name: node for node in graph_def.node}
    return {node.name: tf.make_ndarray(nodes[node.input[1]].attr['value'].tensor)
            for node in graph_def.node if node.op == 'Conv2D'}

  def test_delayed_biases(self):
    delayed = folding.delay_biases(self.folded, 'output')
    self.assertAllClose(run(delayed, self.images), self.expected, rtol=0, atol=1e-5)
    self.assertSorted(delayed)
    self.assertEqual(ops(delayed).count('BiasAdd'), 37)  # Of 41: at 4 sums, two became one.
    nodes = {node.name: node for node in delayed.node}
    for node in delayed.node:
      if node.op in ('AddV2', 'MaxPool'):
        for tensor in node.input:
          if nodes[tensor].op == 'BiasAdd':  # It belongs to a sum, not to a convolution.
            self.assertEqual(nodes[nodes[tensor].input[0]].op, 'AddV2')
    self.assertEqual(ops(self.folded).count('BiasAdd'), 41)  # The argument is unchanged.


class LayerTest(FoldTestCase):

  def freeze(self, build, is_training=False):
    """Returns the graph of `build`, a function of images and of a norm with random parameters."""
    random = np.random.default_rng(0)

    def norm(net):
      depth = net.shape[-1]
      gamma, beta, mean = (tf.identity(random.normal(size=depth).astype(np.float32))
                           for _ in range(3))
      variance = tf.constant(random.uniform(0.1, 2.0, depth).astype(np.float32))
      statistics = {} if is_training else {'mean': mean, 'variance': variance}
      return tf.nn.fused_batch_norm(net, gamma, beta, epsilon=0.01, is_training=is_training,
                                    **statistics)[0]

    with tf.Graph().as_default() as graph:
      images = tf.placeholder(tf.float32, [None, 9, 9, 3], name='input')
      tf.identity(build(images, norm), name='output')
    return graph.as_graph_def()

  def kernel(self, *shape):
    return tf.identity(np.random.default_rng(1).normal(size=shape).astype(np.float32))

  def check(self, build, num_norms, **kwargs):
    graph_def = self.freeze(build, **kwargs)
    images = np.random.default_rng(2).normal(size=[4, 9, 9, 3]).astype(np.float32)
    folded = folding.fold(graph_def, 'output')
    self.assertEqual(small_model.num_norms(folded), num_norms)
    self.assertAllClose(run(folded, images), run(graph_def, images), rtol=1e-5, atol=1e-4)
    self.assertSorted(folded)

  def test_convolution(self):
    self.check(lambda net, norm: norm(tf.nn.conv2d(net, self.kernel(3, 3, 3, 5), 2, 'SAME')), 0)

  def test_convolution_with_bias(self):
    self.check(lambda net, norm: norm(tf.nn.bias_add(
        tf.nn.conv2d(net, self.kernel(1, 1, 3, 5), 1, 'VALID'), self.kernel(5))), 0)

  def test_depthwise_convolution_with_a_multiplier(self):
    self.check(lambda net, norm: norm(tf.nn.depthwise_conv2d(
        net, self.kernel(3, 3, 3, 2), [1, 1, 1, 1], 'SAME')), 0)

  def test_a_kernel_shared_by_two_convolutions(self):
    def build(net, norm):
      kernel = self.kernel(3, 3, 3, 3)
      net = norm(tf.nn.conv2d(net, kernel, 1, 'SAME'))
      return norm(tf.nn.conv2d(net, kernel, 1, 'SAME'))
    self.check(build, 0)

  def test_a_convolution_with_another_consumer(self):
    def build(net, norm):
      net = tf.nn.conv2d(net, self.kernel(3, 3, 3, 5), 1, 'SAME')
      return norm(net) + net
    self.check(build, 1)

  def test_a_bias_with_another_consumer(self):
    def build(net, norm):
      net = tf.nn.bias_add(tf.nn.conv2d(net, self.kernel(3, 3, 3, 5), 1, 'SAME'), self.kernel(5))
      return norm(net) * net
    self.check(build, 1)

  def test_no_convolution_before_the_norm(self):
    self.check(lambda net, norm: norm(tf.nn.relu(net)), 1)

  def test_training_mode(self):
    def build(net, norm):
      return norm(tf.nn.conv2d(net, self.kernel(3, 3, 3, 5), 1, 'SAME'))
    self.check(build, 1, is_training=True)

  def test_refused_graphs(self):
    graph_def = self.freeze(lambda net, norm: tf.nn.relu(net))
    with self.assertRaisesRegex(ValueError, "no node 'logits'"):
      folding.fold(graph_def, 'logits')
    graph_def.node[-1].input.append('^input')
    with self.assertRaisesRegex(ValueError, "'output' has a control input"):
      folding.fold(graph_def, 'output')
