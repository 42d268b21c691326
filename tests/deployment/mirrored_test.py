"""Tests of mirrored variables: the same weights as with a parameter server, without one."""

import functools
import os
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from deployment import cluster
from deployment import precision
from deployment import towers
from scripts import slow
from training import step as training_step
import xception

BATCH_SIZE, IMAGE_SIZE, NUM_CLASSES = 8, 71, 3
NUM_STEPS = 4  # even: every NUM_STEPS steps see the same two batches in turn


def small_loss(images, labels, positions):
  """A loss like `step.tower_loss`, of a network that takes a second to build."""
  del positions
  with tf.variable_scope('Xception'), slim.arg_scope([slim.batch_norm], is_training=False):
    net = slim.conv2d(images[:, :15, :15], 8, 3)
    logits = slim.conv2d(tf.reduce_mean(net, [1, 2], keepdims=True), NUM_CLASSES, 1,
                         activation_fn=None, normalizer_fn=None)
  logits = tf.squeeze(logits, [1, 2])
  correct = tf.equal(tf.argmax(logits, 1), labels)
  return (tf.losses.sparse_softmax_cross_entropy(labels, logits, loss_collection=None),
          tf.reduce_mean(tf.cast(correct, tf.float32)))


xception_loss = functools.partial(
    training_step.tower_loss, num_classes=NUM_CLASSES, is_training=False, depth_multiplier=0.125,
    dropout_keep_prob=1.0, label_smoothing=0.0, seed=1)


class Training:
  """Training on CPU towers with frozen batch norm, in a session of its own, from drawn weights."""

  def __init__(self, num_towers, make_optimizer, variable_update, loss_fn=xception_loss,
               **options):
    devices = towers.tower_devices(num_towers, clone_on_cpu=True)
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, [2 * BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3])
    labels = np.arange(len(images)) % NUM_CLASSES
    with tf.Graph().as_default(), slim.arg_scope(xception.xception_arg_scope(1e-3)):
      tf.set_random_seed(1)
      batches = tf.data.Dataset.from_tensor_slices(
          (images.astype(np.float32), labels, np.arange(len(images))))
      batch = tf.data.make_one_shot_iterator(batches.repeat().batch(
          BATCH_SIZE, drop_remainder=True)).get_next()
      self.step = training_step.build_train_step(
          *batch, loss_fn, make_optimizer(), tf.constant(0.01), devices,
          tf.train.get_or_create_global_step(), variable_update=variable_update, **options)
      self.saver = tf.train.Saver()
      self.init_copies = tf.train.Scaffold.default_local_init_op()
      self.variables, self.mirrors = (
          {variable.op.name: variable for variable in each}
          for each in (tf.global_variables(), tf.local_variables()))
      self.session = tf.Session(config=towers.session_config(devices))
      towers.initialize(self.session)

  def train(self):
    """Takes NUM_STEPS steps.

    Returns:
      {name: value} of the variables that a checkpoint holds, and of the mirrors.
    """
    for _ in range(NUM_STEPS):
      self.session.run(self.step.train_op)
    return self.session.run([self.variables, self.mirrors])

  def save(self, path):
    self.saver.save(self.session, path, write_meta_graph=False)

  def restore(self, path):
    self.saver.restore(self.session, path)
    self.session.run(self.init_copies)


def momentum():
  return tf.train.MomentumOptimizer(0.002, 0.9)


def adam():
  return tf.train.AdamOptimizer(0.001)


class MirroredTest(tf.test.TestCase):

  def assertIdentical(self, values, expected):
    self.assertEqual(values.keys(), expected.keys())
    for name, value in values.items():
      self.assertEqual(value.tobytes(), expected[name].tobytes(), name)

  def assertMirrors(self, values, mirrors, num_towers):
    """Checks that every tower's copies are the first tower's variables, to the bit."""
    for tower in range(1, num_towers):
      prefix = towers.tower_scope(tower) + '/'
      copies = {name.removeprefix(prefix): value for name, value in mirrors.items()
                if name.startswith(prefix)}
      self.assertContainsSubset(
          [name for name in values if name.startswith('Xception/')
           and 'ExponentialMovingAverage' not in name], copies)
      self.assertIdentical(copies, {name: values[name] for name in copies})

  def assertSameBitsEitherWay(self, num_towers, make_optimizer, **options):
    expected, none = Training(num_towers, make_optimizer, 'parameter_server', **options).train()
    self.assertEmpty(none)
    values, mirrors = Training(num_towers, make_optimizer, 'mirrored', **options).train()
    self.assertIdentical(values, expected)
    self.assertMirrors(values, mirrors, num_towers)

  def test_either_way_ends_with_the_same_bits(self):
    for num_towers in (2, 4):
      for make_optimizer in (momentum, adam):
        self.assertSameBitsEitherWay(
            num_towers, make_optimizer, loss_fn=small_loss)

  @slow
  def test_either_way_ends_with_the_same_bits_of_xception(self):
    for num_towers in (2, 4):
      for make_optimizer in (momentum, adam):
        self.assertSameBitsEitherWay(num_towers, make_optimizer)

  @slow
  def test_every_option_of_the_update(self):
    self.assertSameBitsEitherWay(
        2, lambda: precision.scale_loss(adam()), accumulate_steps=2, clip_gradient_norm=0.5,
        moving_average_decay=0.9, prefetch=True)

  def test_either_way_resumes_the_other(self):
    shared, mirrored = (Training(2, adam, way) for way in towers.VARIABLE_UPDATES)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'model.ckpt')
      shared.train()
      shared.save(path)
      expected, _ = shared.train()
      mirrored.restore(path)
      values, mirrors = mirrored.train()
      self.assertIdentical(values, expected)
      self.assertMirrors(values, mirrors, 2)

      mirrored.save(path)
      self.assertEqual({name for name, _ in tf.train.list_variables(path)}, set(values))
      expected, _ = mirrored.train()
      shared.restore(path)
      values, _ = shared.train()
      self.assertIdentical(values, expected)

  def test_gradients_are_added_in_the_order_of_the_towers(self):
    random = np.random.default_rng(0)
    for num_towers in (2, 4):  # numbers by which a division is exact
      devices = towers.tower_devices(num_towers, clone_on_cpu=True)
      values = [[random.normal(size=shape).astype(np.float32) for shape in ([3, 5, 7], [], [99])]
                for _ in devices]
      with tf.Graph().as_default(), tf.Session(config=towers.session_config(devices)) as session:
        gradients = [[tf.constant(value) for value in tower] for tower in values]
        means = session.run(cluster.SingleWorker().average_towers(
            gradients, devices, bucket_bytes=300))
      sums, backwards = ([functools.reduce(np.add, parts) for parts in zip(*each)]
                         for each in (values, values[::-1]))
      for tower_means in means:
        for mean, total in zip(tower_means, sums):
          self.assertEqual(mean.tobytes(), (total / num_towers).tobytes())
    self.assertNotEqual(sums[0].tobytes(), backwards[0].tobytes())  # the order matters

  def test_several_gpus_mirror_by_default(self):
    for num_gpus, variable_update, mirrored in (
        (1, None, False), (2, None, True), (2, 'parameter_server', False), (1, 'mirrored', False)):
      devices = [f'/gpu:{i}' for i in range(num_gpus)]
      self.assertEqual(towers.mirrors_variables(devices, variable_update), mirrored)
    self.assertFalse(towers.mirrors_variables(['/cpu:0', '/cpu:1']))
