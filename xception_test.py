"""Tests of the network: shapes, parameters, initialization, moving statistics.

  python xception_test.py
"""

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

import xception

# Output of every layer for a 299 x 299 image.
END_POINT_SHAPES = {
    'block1_conv1': [149, 149, 32],
    'block1_conv2': [147, 147, 64],
    'block1_res_conv': [74, 74, 128],
    'block2_dws_conv1': [147, 147, 128],
    'block2_dws_conv2': [147, 147, 128],
    'block2_res_conv': [37, 37, 256],
    'block3_dws_conv1': [74, 74, 256],
    'block3_dws_conv2': [74, 74, 256],
    'block3_res_conv': [19, 19, 728],
    'block4_dws_conv1': [37, 37, 728],
    'block4_dws_conv2': [37, 37, 728],
    **{f'block{block}_dws_conv{i}': [19, 19, 728] for block in range(5, 13) for i in (1, 2, 3)},
    'block12_res_conv': [10, 10, 1024],
    'block13_dws_conv1': [19, 19, 728],
    'block13_dws_conv2': [19, 19, 1024],
    'block14_dws_conv1': [10, 10, 1536],
    'block14_dws_conv2': [10, 10, 2048],
    'block15_avg_pool': [1, 1, 2048],
}


def setUpModule():
  tf.disable_v2_behavior()
  tf.enable_resource_variables()


def num_parameters(variables):
  return sum(v.shape.num_elements() for v in variables)


def build(inputs, num_classes=5, weight_decay=1e-5, batch_norm_decay=0.99, **kwargs):
  with slim.arg_scope(xception.xception_arg_scope(weight_decay, batch_norm_decay)):
    return xception.xception(inputs, num_classes, **kwargs)


def random_images(*shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


class XceptionTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    # A graph of its own for every test.
    graph = tf.Graph()
    context = graph.as_default()
    context.__enter__()
    self.addCleanup(context.__exit__, None, None, None)
    tf.set_random_seed(1)

  def test_parameters_of_1000_classes_are_the_papers(self):
    build(tf.placeholder(tf.float32, [None, 299, 299, 3]), 1000)
    self.assertEqual(num_parameters(tf.trainable_variables()), 22855952)
    self.assertEqual(num_parameters(tf.global_variables()), 22910480)
    self.assertLen(tf.global_variables(), 236)

  def test_parameters_of_5_classes(self):
    build(tf.placeholder(tf.float32, [None, 299, 299, 3]), 5)
    self.assertEqual(num_parameters(tf.global_variables()), 20871725)

  def test_end_points_and_shapes(self):
    images = tf.zeros([2, 299, 299, 3])
    logits, end_points = build(images, 1000)
    self.assertEqual(logits.shape.as_list(), [2, 1000])
    self.assertEqual(logits.op.name.split('/')[0], 'Xception')
    self.assertIs(end_points['Logits'], logits)
    self.assertTrue(end_points['Predictions'].op.name.startswith('Xception/Predictions/'))
    shapes = {name: tensor.shape.as_list() for name, tensor in end_points.items()}
    self.assertEqual(shapes, {name: [2, *shape] for name, shape in END_POINT_SHAPES.items()}
                     | {'Logits': [2, 1000], 'Predictions': [2, 1000]})

  def test_default_image_size(self):
    self.assertEqual(xception.xception.default_image_size, 299)

  def test_variables_are_under_the_scope(self):
    build(tf.zeros([1, 71, 71, 3]), depth_multiplier=0.125, scope='Other')
    self.assertTrue(all(v.op.name.startswith('Other/') for v in tf.global_variables()))
    names = {v.op.name for v in tf.trainable_variables()}
    self.assertContainsSubset(
        {'Other/block1_conv1/weights', 'Other/block5_dws_conv1/depthwise_weights',
         'Other/block5_dws_conv1/pointwise_weights', 'Other/block5_dws_conv1/BatchNorm/gamma',
         'Other/block5_dws_conv1/BatchNorm/beta', 'Other/Logits/weights',
         'Other/Logits/biases'}, names)

  def test_every_image_size_from_71(self):
    for height, width in [(71, 71), (224, 224), (256, 256), (512, 512), (150, 200)]:
      with tf.Graph().as_default(), tf.Session() as session:
        _, end_points = build(tf.constant(random_images(1, height, width, 3)),
                              is_training=False, depth_multiplier=0.125)
        self.assertEqual(end_points['block15_avg_pool'].shape.as_list(), [1, 1, 1, 256])
        session.run(tf.global_variables_initializer())
        predictions = session.run(end_points['Predictions'])
        self.assertAllClose(predictions.sum(), 1.0)

  def test_too_small_an_image_is_refused(self):
    with self.assertRaisesRegex(ValueError, '71 x 71 pixels or more, got 70 x 100'):
      build(tf.zeros([1, 70, 100, 3]))

  def test_unknown_batch_and_image_size(self):
    images = tf.placeholder(tf.float32, [None, None, None, 3])
    logits, _ = build(images, is_training=False, depth_multiplier=0.125)
    self.assertEqual(logits.shape.as_list(), [None, 5])
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      for shape in [(3, 71, 90, 3), (1, 120, 75, 3)]:
        self.assertEqual(session.run(logits, {images: random_images(*shape)}).shape,
                         (shape[0], 5))

  def test_reuse_shares_the_variables(self):
    images = tf.constant(random_images(2, 71, 71, 3))
    first, _ = build(images, is_training=False, depth_multiplier=0.125)
    num_variables = len(tf.global_variables())
    second, _ = build(images, is_training=False, depth_multiplier=0.125, reuse=True)
    self.assertLen(tf.global_variables(), num_variables)
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      self.assertAllEqual(*session.run([first, second]))

  def test_a_second_network_without_reuse_is_refused(self):
    images = tf.zeros([1, 71, 71, 3])
    build(images, depth_multiplier=0.125)
    with self.assertRaisesRegex(ValueError, 'already exists'):
      build(images, depth_multiplier=0.125)

  def test_depth_multiplier_and_min_depth(self):
    _, end_points = build(tf.zeros([1, 71, 71, 3]), depth_multiplier=0.25, min_depth=20)
    depths = {name: tensor.shape.as_list()[-1] for name, tensor in end_points.items()}
    self.assertEqual(depths['block1_conv1'], 20)
    self.assertEqual(depths['block1_res_conv'], 32)
    self.assertEqual(depths['block5_dws_conv3'], 182)
    self.assertEqual(depths['block14_dws_conv2'], 512)

  def test_depth_multiplier_must_be_positive(self):
    with self.assertRaisesRegex(ValueError, 'greater than 0, got 0'):
      build(tf.zeros([1, 71, 71, 3]), depth_multiplier=0)

  def test_fc_layers_are_optional(self):
    _, end_points = build(tf.zeros([2, 71, 71, 3]), 10, fc_layers=(64, 48),
                          depth_multiplier=0.125)
    self.assertEqual(end_points['fc1'].shape.as_list(), [2, 1, 1, 64])
    self.assertEqual(end_points['fc2'].shape.as_list(), [2, 1, 1, 48])
    shapes = {v.op.name: v.shape.as_list() for v in tf.trainable_variables()}
    self.assertEqual(shapes['Xception/fc1/weights'], [1, 1, 256, 64])
    self.assertEqual(shapes['Xception/fc2/biases'], [48])
    self.assertEqual(shapes['Xception/Logits/weights'], [1, 1, 48, 10])

  def test_without_classes_features_are_returned(self):
    for num_classes in (0, None):
      with tf.Graph().as_default():
        features, end_points = build(tf.zeros([2, 71, 71, 3]), num_classes,
                                     depth_multiplier=0.125)
        self.assertEqual(features.shape.as_list(), [2, 256])
        self.assertNotIn('Logits', end_points)

  def test_spatial_squeeze_and_prediction_fn(self):
    logits, end_points = build(tf.zeros([2, 71, 71, 3]), depth_multiplier=0.125,
                               spatial_squeeze=False,
                               prediction_fn=lambda net, scope: tf.sigmoid(net, name=scope))
    self.assertEqual(logits.shape.as_list(), [2, 1, 1, 5])
    self.assertEqual(end_points['Predictions'].op.type, 'Sigmoid')

  def test_dropout_only_while_training(self):
    for is_training, repeats in [(True, False), (False, True)]:
      with tf.Graph().as_default(), tf.Session() as session:
        logits, _ = build(tf.constant(random_images(2, 71, 71, 3)), is_training=is_training,
                          depth_multiplier=0.125)
        session.run(tf.global_variables_initializer())
        self.assertEqual(np.array_equal(session.run(logits), session.run(logits)), repeats)

  def test_dropout_seed_decides_what_is_dropped(self):
    images = tf.constant(random_images(2, 71, 71, 3))
    seed = tf.placeholder(tf.int64, [2])
    build(images, is_training=True, depth_multiplier=0.125, dropout_seed=seed)
    dropped = tf.get_default_graph().get_tensor_by_name('Xception/Logits/Conv2D:0').op.inputs[0]
    # The numbers do not depend on the axes that the features are spread over.
    expected = tf.nn.experimental.stateless_dropout(
        tf.ones([2, 1, 1, 256]), 0.5, seed, rng_alg='philox')
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      values = {s: session.run([dropped, expected], {seed: [1, s]}) for s in (5, 6)}
    for features, mask in values.values():
      self.assertEqual(features.shape, (2, 1, 1, 256))
      self.assertAllEqual(features[mask == 0], np.zeros(np.sum(mask == 0)))
      self.assertGreater(np.mean(features[mask > 0] > 0), 0.9)
    self.assertNotAllEqual(values[5][1], values[6][1])

  def test_weight_decay_is_l2_of_every_kernel_and_nothing_else(self):
    build(tf.zeros([1, 71, 71, 3]), weight_decay=0.01, depth_multiplier=0.125)
    kernels = [v for v in tf.trainable_variables() if v.op.name.endswith('weights')]
    losses = tf.losses.get_regularization_losses()
    self.assertLen(kernels, 2 + 4 + 2 * 34 + 1)
    self.assertLen(losses, len(kernels))
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      expected = 0.01 / 2 * sum(np.square(k, dtype=np.float64).sum()
                                for k in session.run(kernels))
      self.assertAllClose(session.run(tf.add_n(losses)), expected, rtol=1e-5)

  def test_the_signal_keeps_its_variance_at_the_start(self):
    build(tf.constant(random_images(4, 128, 128, 3)), depth_multiplier=0.5)
    norms = [op for op in tf.get_default_graph().get_operations()
             if op.type == 'FusedBatchNormV3']
    self.assertLen(norms, 40)
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      for op, deviation in zip(norms, session.run(
          [tf.math.reduce_std(op.inputs[0]) for op in norms])):
        self.assertBetween(deviation, 0.3, 10.0, op.name)

  def test_batch_norm_is_kerass(self):
    build(tf.zeros([1, 71, 71, 3]), depth_multiplier=0.125)
    norms = [op for op in tf.get_default_graph().get_operations()
             if op.type == 'FusedBatchNormV3']
    self.assertAllClose([op.get_attr('epsilon') for op in norms], [0.001] * 40)

  def test_moving_statistics_after_one_step(self):
    images = random_images(2, 71, 71, 3)
    build(tf.constant(images), depth_multiplier=0.125, batch_norm_decay=0.9)
    norm = next(op for op in tf.get_default_graph().get_operations()
                if op.name.startswith('Xception/block1_conv1/')
                and op.type == 'FusedBatchNormV3')
    moving = {v.op.name: v for v in tf.global_variables()}
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    self.assertLen(updates, 80)
    with self.session() as session:
      session.run(tf.global_variables_initializer())
      net = session.run(norm.inputs[0]).reshape(-1, 16)
      session.run(updates)
      mean, variance = session.run([moving[f'Xception/block1_conv1/BatchNorm/moving_{name}']
                                    for name in ('mean', 'variance')])
    self.assertAllClose(mean, 0.1 * net.mean(0), rtol=1e-4, atol=1e-6)
    self.assertAllClose(variance, 0.9 + 0.1 * net.var(0, ddof=1), rtol=1e-4)

  def test_warmed_up_decay(self):
    step = tf.placeholder(tf.int64, [])
    decay = xception.warmed_up_decay(0.99, step)
    with self.session() as session:
      values = [session.run(decay, {step: s}) for s in (0, 30, 889, 891, 10**6)]
    self.assertAllClose(values, [1 / 10, 31 / 40, 890 / 899, 0.99, 0.99])

  def test_inference_is_right_after_a_short_training(self):
    batches = _batches_of_stripes(num_batches=3, batch_size=16)
    images = tf.placeholder(tf.float32, [16, 71, 71, 3])
    labels = tf.placeholder(tf.int64, [16])
    global_step = tf.train.get_or_create_global_step()
    decay = xception.warmed_up_decay(0.99, global_step)
    options = {'num_classes': 3, 'depth_multiplier': 0.125, 'dropout_keep_prob': 1.0}
    training_logits, _ = build(images, is_training=True, batch_norm_decay=decay, **options)
    inference_logits, _ = build(images, is_training=False, reuse=True, **options)
    loss = tf.losses.sparse_softmax_cross_entropy(labels, training_logits)
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
      train_op = tf.train.AdamOptimizer(0.002).minimize(loss, global_step)

    def accuracy(session, logits):
      return np.mean([session.run(logits, {images: x}).argmax(1) == y for x, y in batches])

    with self.session() as session:
      session.run(tf.global_variables_initializer())
      for step in range(30):
        x, y = batches[step % len(batches)]
        session.run(train_op, {images: x, labels: y})
      training = accuracy(session, training_logits)
      inference = accuracy(session, inference_logits)
    self.assertGreater(training, 0.8)
    self.assertAllClose(inference, training, atol=0.05)


def _batches_of_stripes(num_batches, batch_size):
  """Images of horizontal, vertical or diagonal stripes: three classes of texture."""
  random = np.random.default_rng(0)
  rows, columns = np.mgrid[:71, :71]
  patterns = [rows, columns, rows + columns]
  batches = []
  for _ in range(num_batches):
    labels = random.integers(3, size=batch_size)
    waves = [np.sin(patterns[label] * random.uniform(0.4, 0.8) + random.uniform(0, 6))
             for label in labels]
    images = np.stack(waves)[..., np.newaxis] * random.uniform(0.3, 0.6, [batch_size, 1, 1, 3])
    images += random.normal(0, 0.1, images.shape)
    batches.append((images.astype(np.float32), labels))
  return batches


if __name__ == '__main__':
  tf.test.main()
