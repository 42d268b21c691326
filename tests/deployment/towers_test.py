"""Tests of the towers: any number of them takes the same step."""

import functools
import glob
import os
import re
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from deployment import towers
from scripts import DATASET_DIR
from scripts import PROJECT
import train_flowers
from training import options
from training import step as training_step
import xception

NUM_CLASSES = 3
IMAGE_SIZE = 71
DEPTH_MULTIPLIER = 0.125
LEARNING_RATE = 0.01


def batch(size=8):
  random = np.random.default_rng(0)
  images = random.uniform(-1, 1, [size, IMAGE_SIZE, IMAGE_SIZE, 3]).astype(np.float32)
  return images, np.arange(size) % NUM_CLASSES


def initialize(session, values=None):
  """Initializes every variable, with values[name] where there is one."""
  values = values or {}
  session.run(tf.global_variables_initializer(),
              {variable.initializer.inputs[1]: values[variable.op.name]
               for variable in tf.global_variables() if variable.op.name in values})


def take_step(num_towers, is_training=False, initial_values=None,
               weight_decay=1e-3, inputs=None, **options):
  """Takes one step of `build_train_step` on CPU towers.

  is_training False freezes batch norm and disables dropout, so that the number of towers
  changes the step by rounding only.

  Returns:
    loss, accuracy: of the step.
    values: {variable name: value} after the step.
    initial_values: {variable name: value} before it.
  """
  images, labels = inputs or batch()
  devices = towers.tower_devices(num_towers, clone_on_cpu=True)
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    global_step = tf.train.get_or_create_global_step()
    learning_rate = tf.constant(LEARNING_RATE)
    loss_fn = functools.partial(
        training_step.tower_loss, num_classes=NUM_CLASSES, is_training=is_training,
        depth_multiplier=DEPTH_MULTIPLIER, dropout_keep_prob=1.0, label_smoothing=0.0, seed=1)
    # With decay 0 the moving statistics are those of the last batch.
    with slim.arg_scope(xception.xception_arg_scope(weight_decay, batch_norm_decay=0.0)):
      step = training_step.build_train_step(
          tf.constant(images), tf.constant(labels), tf.range(len(labels), dtype=tf.int64),
          loss_fn, tf.train.MomentumOptimizer(learning_rate, 0.9), learning_rate, devices,
          global_step, **options)
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    with tf.Session(config=towers.session_config(devices)) as session:
      initialize(session, initial_values)
      before = session.run(variables)
      _, loss, accuracy = session.run([step.train_op, step.loss, step.accuracy])
      return loss, accuracy, session.run(variables), before


class AverageGradientsTest(tf.test.TestCase):

  def test_mean_is_numpys(self):
    random = np.random.default_rng(0)
    for num_towers in (1, 2, 3, 4):
      with tf.Graph().as_default(), tf.Session() as session:
        variables = [tf.get_variable(name, shape) for name, shape in
                     [('kernel', [3, 3, 4, 8]), ('bias', [8]), ('scalar', [])]]
        values = [random.normal(size=[num_towers, *v.shape.as_list()]).astype(np.float32)
                  for v in variables]
        averaged = towers.average_gradients(
            [[(tf.constant(value[i]), v) for value, v in zip(values, variables)]
             for i in range(num_towers)])
        self.assertEqual([v for _, v in averaged], variables)
        for (gradient, _), value in zip(averaged, values):
          self.assertAllClose(session.run(gradient), np.mean(value, 0), rtol=1e-6, atol=1e-6)

  def test_a_variable_without_gradient_is_named(self):
    with tf.Graph().as_default():
      unused = tf.get_variable('unused', [])
      with self.assertRaisesRegex(ValueError, 'does not depend on the variable unused'):
        towers.require_gradients([(None, unused)])


class ReplicateTest(tf.test.TestCase):

  def test_every_tower_has_its_part_and_its_device(self):
    def tower(images, labels):
      weights = slim.model_variable('weights', [])
      return images, labels, images * weights

    with tf.Graph().as_default():
      devices = towers.tower_devices(4, clone_on_cpu=True)
      outputs = towers.replicate(tower, devices, towers.split_batch(
          devices, tf.reshape(tf.range(16.0), [8, 2]), tf.range(8)))
      self.assertLen(slim.get_model_variables(), 1)
      self.assertEqual(slim.get_model_variables()[0].device, '/device:CPU:0')
      for i, output in enumerate(outputs):
        self.assertEqual(output[2].device, f'/device:CPU:{i}')
        self.assertStartsWith(output[2].name, towers.tower_scope(i) + '/')
      with tf.Session(config=towers.session_config(devices)) as session:
        parts = session.run([output[:2] for output in outputs])
    self.assertAllEqual(np.concatenate([labels for _, labels in parts]), np.arange(8))
    self.assertAllEqual(np.concatenate([images for images, _ in parts]),
                        np.arange(16.0).reshape(8, 2))

  def test_towers_run_on_devices_of_their_own(self):
    devices = towers.tower_devices(2, clone_on_cpu=True)
    with tf.Graph().as_default(), tf.Session(config=towers.session_config(devices)) as session:
      names = [device.name for device in session.list_devices()]
    self.assertLen(names, 2)
    self.assertEndsWith(names[0], 'CPU:0')
    self.assertEndsWith(names[1], 'CPU:1')


class DevicesTest(tf.test.TestCase):

  def devices(self, num_gpus, *args, **kwargs):
    gpus = [tf.config.PhysicalDevice(f'/physical_device:GPU:{i}', 'GPU') for i in range(num_gpus)]
    with mock.patch.object(tf.config, 'list_physical_devices', return_value=gpus):
      return towers.tower_devices(*args, **kwargs)

  def test_all_gpus_by_default(self):
    self.assertEqual(self.devices(3), ['/gpu:0', '/gpu:1', '/gpu:2'])
    self.assertEqual(self.devices(3, 2), ['/gpu:0', '/gpu:1'])

  def test_the_cpu_without_gpus(self):
    self.assertEqual(self.devices(0), ['/cpu:0'])

  def test_cpu_towers(self):
    self.assertEqual(self.devices(3, 2, clone_on_cpu=True), ['/cpu:0', '/cpu:1'])
    self.assertEqual(self.devices(3, clone_on_cpu=True), ['/cpu:0'])

  def test_too_many_towers(self):
    with self.assertRaisesRegex(
        towers.DeviceError, r'needs 4 GPUs, but TensorFlow finds 2 '
        r'\(/physical_device:GPU:0, /physical_device:GPU:1\)'):
      self.devices(2, 4)
    with self.assertRaisesRegex(towers.DeviceError, r'finds 0 \(none\).*--clone_on_cpu'):
      self.devices(0, 1)

  def test_sessions_open_the_towers_gpus_only(self):
    config = towers.session_config(['/gpu:0', '/gpu:1'])
    self.assertEqual(config.gpu_options.visible_device_list, '0,1')
    self.assertTrue(config.gpu_options.allow_growth)
    self.assertEqual(towers.session_config(['/cpu:0']).device_count['GPU'], 0)

  def test_every_session_of_the_project_leaves_gpu_memory_to_others(self):
    # Sessions without a configuration would take all memory of all GPUs.
    for path in glob.glob(f'{PROJECT}/*/*.py') + glob.glob(f'{PROJECT}/*.py'):
      if '/tests/' in path or path.endswith('_test.py'):
        continue
      with open(path, encoding='utf-8') as f:
        sessions = re.findall(r'tf\.Session\(.*\)', f.read())
      for session in sessions:
        self.assertIn('config=', session, path)

  def test_out_of_memory_is_explained(self):
    graph = tf.Graph()
    with graph.as_default(), graph.device('/job:worker/task:0/gpu:1'):
      op = tf.no_op()
    gpus = ['/gpu:0', '/gpu:1']
    error = tf.errors.ResourceExhaustedError(None, op, 'OOM when allocating tensor')
    self.assertEqual(
        towers.explain_out_of_memory(error, gpus, 64),
        'Out of memory: tower 1 (/gpu:1) cannot process 64 images at a time. Use '
        '--accumulate_steps 2 or more, --precision float16, a smaller --batch_size or '
        '--image_size')
    error = tf.errors.ResourceExhaustedError(None, None, 'OOM')
    self.assertRegex(towers.explain_out_of_memory(error, ['/cpu:0'], 8),
                     'a tower cannot process 8 images at a time. Use --accumulate_steps 2 or '
                     'more, a smaller')
    self.assertIsNone(towers.explain_out_of_memory(
        tf.errors.InternalError(None, op, ''), gpus, 64))

  def test_towers_for_all_cores_have_a_thread_each(self):
    for devices, num_cores, num_threads in (
        (['/cpu:0'], 2, 0), (['/cpu:0', '/cpu:1'], 2, 1), (['/cpu:0', '/cpu:1'], 3, 0),
        (['/cpu:0', '/cpu:1', '/cpu:2'], 2, 1), (['/gpu:0', '/gpu:1'], 1, 0)):
      config = towers.session_config(devices)
      with mock.patch.object(towers, 'num_cores', return_value=num_cores), \
           mock.patch.object(tf, 'Session') as session:
        towers.start_threads(config, devices)
      self.assertEqual(config.intra_op_parallelism_threads, num_threads, (devices, num_cores))
      # The process's first session creates the threads.
      self.assertEqual(session.mock_calls,
                       [mock.call(config=config), mock.call().close()] if num_threads else [])

  def test_training_starts_its_threads_before_any_session(self):
    args = options.parse_train_args('', ['--dataset_dir', DATASET_DIR, '--log_dir', 'none'])
    with mock.patch.object(towers, 'start_threads', side_effect=InterruptedError), \
         mock.patch.object(tf, 'Session') as session:
      with self.assertRaises(InterruptedError):
        train_flowers.main(args)
      session.assert_not_called()

  def test_cores_that_the_process_may_use(self):
    with mock.patch.object(os, 'sched_getaffinity', return_value={0, 3}):
      self.assertEqual(towers.num_cores(), 2)
    with mock.patch.object(os, 'sched_getaffinity', side_effect=AttributeError), \
         mock.patch.object(os, 'cpu_count', return_value=None):
      self.assertEqual(towers.num_cores(), 1)

  def test_one_towers_variables_stay_beside_it(self):
    self.assertEqual(towers.variables_device(['/gpu:0']), '/gpu:0')
    self.assertEqual(towers.variables_device(['/gpu:0', '/gpu:1']), '/cpu:0')


class TrainStepTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Moving statistics that fit the weights, as after some training.
    _, _, cls.values, _ = take_step(1, is_training=True)

  def test_any_number_of_towers_takes_the_same_step(self):
    loss, accuracy, expected, initial_values = take_step(
        1, initial_values=self.values)
    for num_towers in (2, 4):
      tower_loss, tower_accuracy, values, _ = take_step(
          num_towers, initial_values=initial_values)
      self.assertAllClose(tower_loss, loss, rtol=1e-5)
      self.assertEqual(tower_accuracy, accuracy)
      self.assertEqual(values.keys(), expected.keys())
      for name, value in values.items():
        scale = max(1.0, np.abs(expected[name]).max())
        self.assertAllClose(value / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)
    steps = [np.abs(value - initial_values[name]).max() for name, value in expected.items()]
    self.assertGreater(np.median(steps), 1e-4)  # far above the tolerance: there was a step

  def test_accumulated_parts_take_the_same_step(self):
    loss, accuracy, expected, initial_values = take_step(1, initial_values=self.values)
    for num_towers, parts in ((1, 4), (2, 2)):
      part_loss, part_accuracy, values, _ = take_step(
          num_towers, initial_values=initial_values, accumulate_steps=parts)
      self.assertAllClose(part_loss, loss, rtol=1e-5)
      self.assertAllClose(part_accuracy, accuracy)
      for name, value in values.items():
        scale = max(1.0, np.abs(expected[name]).max())
        self.assertAllClose(value / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)

  def test_accumulated_moving_statistics_are_the_first_parts(self):
    images, labels = batch(8)
    _, _, together, initial_values = take_step(
        1, is_training=True, inputs=(images, labels), accumulate_steps=2)
    _, _, first, _ = take_step(1, is_training=True, initial_values=initial_values,
                               inputs=(images[:4], labels[:4]))
    names = [name for name in first if 'moving_' in name and 'Momentum' not in name]
    for name in names:
      self.assertAllClose(together[name], first[name], rtol=1e-5, atol=1e-6, msg=name)

  def test_clipping_is_numpys(self):
    _, _, full, initial_values = take_step(1, initial_values=self.values)
    _, _, clipped, _ = take_step(1, initial_values=initial_values, clip_gradient_norm=0.5)
    # The momenta were as they are in initial_values: a step of theirs is a gradient.
    names = [name for name in full if name.endswith('/Momentum')]
    gradients = {name: full[name] - 0.9 * initial_values[name] for name in names}
    norm = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum()
                       for gradient in gradients.values()))
    self.assertGreater(norm, 0.5)
    for name in names:
      self.assertAllClose(clipped[name] - 0.9 * initial_values[name],
                          gradients[name] * (0.5 / norm), rtol=1e-3, atol=1e-5, msg=name)

  def test_averages_are_numpys(self):
    _, _, values, before = take_step(1, is_training=True, moving_average_decay=0.9)
    names = [name for name in values if name.endswith('/ExponentialMovingAverage')]
    self.assertLen(names, 2 * 80 + 76)  # the network's variables, moving statistics too
    decay = (1 + 1) / (10 + 1)  # warmed up by the step that was taken
    for name in names:
      name = name.removesuffix('/ExponentialMovingAverage')
      average = before[name + '/ExponentialMovingAverage']
      self.assertAllEqual(average, before[name])
      self.assertAllClose(values[name + '/ExponentialMovingAverage'],
                          decay * average + (1 - decay) * values[name], atol=1e-6, msg=name)

  def test_step_is_that_of_tensorflows_own_gradients(self):
    # The whole batch in one tower, loss and L2 by TensorFlow alone.
    images, labels = batch()
    _, _, values, initial_values = take_step(2, initial_values=self.values)
    self.assertEqual(values['global_step'], initial_values['global_step'] + 1)
    with tf.Graph().as_default(), tf.Session() as session:
      with slim.arg_scope(xception.xception_arg_scope(1e-3)):
        logits, _ = xception.xception(tf.constant(images), NUM_CLASSES, is_training=False,
                                      depth_multiplier=DEPTH_MULTIPLIER)
      l2 = [1e-3 * tf.nn.l2_loss(v) for v in tf.trainable_variables() if 'weights' in v.name]
      loss = tf.add_n(l2) + tf.reduce_mean(
          tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
      variables = tf.trainable_variables()
      gradients = tf.gradients(loss, variables)
      initialize(session, initial_values)
      for variable, gradient in zip(variables, session.run(gradients)):
        momentum = 0.9 * initial_values[variable.op.name + '/Momentum'] + gradient
        expected = initial_values[variable.op.name] - LEARNING_RATE * momentum
        scale = max(1.0, np.abs(expected).max())
        self.assertAllClose(values[variable.op.name] / scale, expected / scale,
                            rtol=0, atol=1e-5, msg=variable.op.name)

  def test_moving_statistics_are_the_first_towers(self):
    images, labels = batch(8)
    _, _, together, initial_values = take_step(2, is_training=True, inputs=(images, labels))
    _, _, first, _ = take_step(1, is_training=True, initial_values=initial_values,
                                inputs=(images[:4], labels[:4]))
    names = [name for name in first if 'moving_' in name and 'Momentum' not in name]
    self.assertLen(names, 80)  # 40 batch norms
    for name in names:
      self.assertAllClose(together[name], first[name], rtol=1e-5, atol=1e-6, msg=name)
      self.assertNotAllClose(together[name], initial_values[name], rtol=1e-6, atol=1e-9, msg=name)

  def test_a_loss_that_is_not_finite_leaves_the_weights_alone(self):
    images, labels = batch(4)
    images[1, 2, 3, 0] = np.nan
    with tf.Graph().as_default(), tf.Session() as session:
      global_step = tf.train.get_or_create_global_step()
      loss_fn = functools.partial(
          training_step.tower_loss, num_classes=NUM_CLASSES, is_training=False,
          depth_multiplier=DEPTH_MULTIPLIER, dropout_keep_prob=1.0, label_smoothing=0.0, seed=1)
      with slim.arg_scope(xception.xception_arg_scope()):
        step = training_step.build_train_step(
            tf.constant(images), tf.constant(labels), tf.range(len(labels), dtype=tf.int64),
            loss_fn, tf.train.GradientDescentOptimizer(0.1), tf.constant(0.1), ['/cpu:0'],
            global_step)
      initialize(session)
      before = session.run(tf.global_variables())
      with self.assertRaises(tf.errors.InvalidArgumentError) as context:
        session.run(step.train_op)
      self.assertIs(context.exception.op, step.finite_check)
      for value, expected in zip(session.run(tf.global_variables()), before):
        self.assertAllEqual(value, expected)
