"""Tests of mirrored variables: the same weights as with a parameter server, without one."""

import functools
import os
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from deployment import precision
from deployment import towers
from scripts import slow
from training import step as training_step
import xception

BATCH_SIZE, IMAGE_SIZE, NUM_CLASSES, NUM_STEPS = 8, 71, 3, 3


def build_step(num_towers, optimizer, variable_update, **options):
  """Builds a step with frozen batch norm on CPU towers; returns it and the towers' devices."""
  devices = towers.tower_devices(num_towers, clone_on_cpu=True)
  random = np.random.default_rng(0)
  images = random.uniform(-1, 1, [2 * BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3]).astype(np.float32)
  labels = np.arange(len(images)) % NUM_CLASSES
  batches = tf.data.Dataset.from_tensor_slices((images, labels, np.arange(len(images))))
  batch = tf.data.make_one_shot_iterator(batches.repeat().batch(
      BATCH_SIZE, drop_remainder=True)).get_next()
  loss_fn = functools.partial(
      training_step.tower_loss, num_classes=NUM_CLASSES, is_training=False,
      depth_multiplier=0.125, dropout_keep_prob=1.0, label_smoothing=0.0, seed=1)
  with slim.arg_scope(xception.xception_arg_scope(1e-3)):
    step = training_step.build_train_step(
        *batch, loss_fn, optimizer, tf.constant(0.01), devices,
        tf.train.get_or_create_global_step(), variable_update=variable_update, **options)
  return step, devices


def train(num_towers, make_optimizer, variable_update, checkpoint=None, restored=None, **options):
  """Takes NUM_STEPS steps from drawn weights or a checkpoint.

  Returns:
    {name: value} of the variables that a checkpoint holds, and of the mirrors.
  """
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    step, devices = build_step(num_towers, make_optimizer(), variable_update, **options)
    variables, mirrors = ({variable.op.name: variable for variable in each}
                          for each in (tf.global_variables(), tf.local_variables()))
    saver, init_copies = tf.train.Saver(), tf.train.Scaffold.default_local_init_op()
    with tf.Session(config=towers.session_config(devices)) as session:
      if restored:
        saver.restore(session, restored)
      else:
        session.run(tf.global_variables_initializer())
      session.run(init_copies)
      for _ in range(NUM_STEPS):
        session.run(step.train_op)
      if checkpoint:
        saver.save(session, checkpoint, write_meta_graph=False)
      return session.run([variables, mirrors])


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

  def test_two_towers_end_with_the_same_bits(self):
    for make_optimizer in (momentum, adam):
      expected, none = train(2, make_optimizer, 'parameter_server')
      self.assertEmpty(none)
      values, mirrors = train(2, make_optimizer, 'mirrored')
      self.assertIdentical(values, expected)
      self.assertMirrors(values, mirrors, 2)

  @slow
  def test_every_option_of_the_update(self):
    options = {'accumulate_steps': 2, 'clip_gradient_norm': 0.5, 'moving_average_decay': 0.9,
               'prefetch': True}

    def make_optimizer():
      return precision.scale_loss(adam())

    expected, _ = train(2, make_optimizer, 'parameter_server', **options)
    values, mirrors = train(2, make_optimizer, 'mirrored', **options)
    self.assertIdentical(values, expected)
    self.assertMirrors(values, mirrors, 2)

  @slow
  def test_four_towers_differ_by_rounding(self):
    # A ring adds the gradients of four towers in another order.
    expected, _ = train(4, momentum, 'parameter_server')
    values, mirrors = train(4, momentum, 'mirrored')
    self.assertMirrors(values, mirrors, 4)
    differences = [np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
                   for name, value in values.items() if name.endswith('weights')]
    print(f'largest relative difference after {NUM_STEPS} steps: {max(differences):.1e}')
    self.assertLess(max(differences), 1e-5)

  def test_either_way_resumes_the_other(self):
    with tempfile.TemporaryDirectory() as folder:
      first, second = os.path.join(folder, 'first'), os.path.join(folder, 'second')
      train(2, adam, 'parameter_server', checkpoint=first)
      expected, _ = train(2, adam, 'parameter_server', checkpoint=second, restored=first)
      values, mirrors = train(2, adam, 'mirrored', checkpoint=second, restored=first)
      self.assertIdentical(values, expected)
      self.assertMirrors(values, mirrors, 2)
      self.assertEqual({name for name, _ in tf.train.list_variables(second)}, set(values))
      expected, _ = train(2, adam, 'mirrored', restored=second)
      values, _ = train(2, adam, 'parameter_server', restored=second)
      self.assertIdentical(values, expected)

  def test_several_gpus_mirror_by_default(self):
    for num_gpus, variable_update, mirrored in (
        (1, None, False), (2, None, True), (2, 'parameter_server', False), (1, 'mirrored', False)):
      devices = [f'/gpu:{i}' for i in range(num_gpus)]
      self.assertEqual(towers.mirrors_variables(devices, variable_update), mirrored)
    self.assertFalse(towers.mirrors_variables(['/cpu:0', '/cpu:1']))


if __name__ == '__main__':
  tf.test.main()
