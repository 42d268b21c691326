"""Tests of fine-tuning: restoring a checkpoint and training a part of the network."""

import functools
import glob
import os
import shutil
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
import small_model
from training import fine_tuning
from training import step as training_step
import xception

DEPTH_MULTIPLIER = 0.125
HEAD = 'Xception/Logits'


def build(num_classes=5, depth_multiplier=DEPTH_MULTIPLIER, is_training=True, images=None):
  """Builds the network for 71 x 71 pixels in the default graph; returns its logits."""
  if images is None:
    images = tf.zeros([2, 71, 71, 3])
  with slim.arg_scope(xception.xception_arg_scope()):
    return xception.xception(images, num_classes, is_training,
                             depth_multiplier=depth_multiplier)[0]


class FineTuningTestCase(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.dir)
    cls.checkpoint = os.path.join(cls.dir, 'model.ckpt-7')
    with tf.Graph().as_default(), tf.Session() as session:
      tf.set_random_seed(1)
      build()
      session.run(tf.global_variables_initializer())
      tf.train.Saver().save(session, cls.checkpoint)
    reader = tf.train.load_checkpoint(cls.checkpoint)
    cls.stored = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


class RestoreTest(FineTuningTestCase):

  def restore(self, session, *args):
    """Initializes the graph with another seed, then restores; returns the report."""
    restoration = fine_tuning.restore(self.checkpoint, *args)
    tf.set_random_seed(2)
    session.run(tf.global_variables_initializer())
    restoration.init_fn(None, session)
    return restoration.report

  def assertRestored(self, session, all_but):
    for variable in slim.get_model_variables():
      value, stored = session.run(variable), self.stored.get(variable.op.name)
      if not variable.op.name.startswith(all_but):
        self.assertAllEqual(value, stored, variable.op.name)
      elif variable.op.name.endswith('weights'):  # others are initialized with constants
        self.assertNotAllEqual(value, stored, variable.op.name)

  def test_everything(self):
    with tf.Graph().as_default(), tf.Session() as session:
      build()
      report = self.restore(session)
      self.assertRestored(session, all_but=('nothing',))
    self.assertEqual(report, f'Starting from 236 of 236 variables of {self.checkpoint}, as '
                     'trained, not averaged')

  def test_averages_as_evaluation_uses_them(self):
    checkpoint = small_model.write_checkpoint(tempfile.mkdtemp(dir=self.dir),
                                              with_averages=True)
    weights = f'{HEAD}/weights'
    reader = tf.train.load_checkpoint(checkpoint)
    for use_averages, name, report in (
        ('auto', f'{weights}/ExponentialMovingAverage', ', their Polyak averages'),
        ('yes', f'{weights}/ExponentialMovingAverage', ', their Polyak averages'),
        ('no', weights, ', as trained, not averaged')):
      with tf.Graph().as_default(), tf.Session() as session:
        build()
        restoration = fine_tuning.restore(checkpoint, use_averages=use_averages)
        restoration.init_fn(None, session)
        variable, = slim.get_model_variables(weights)
        self.assertAllEqual(session.run(variable), reader.get_tensor(name))
        self.assertEndsWith(restoration.report, report)
    with tf.Graph().as_default():
      build()
      with self.assertRaisesRegex(checkpoints.CheckpointError, 'has no averages of the weights'):
        fine_tuning.restore(self.checkpoint, use_averages='yes')

  def test_the_newest_of_a_folder(self):
    with tf.Graph().as_default():
      build()
      self.assertIn(self.checkpoint, fine_tuning.restore(self.dir).report)

  def test_excluded_scopes(self):
    with tf.Graph().as_default(), tf.Session() as session:
      build()
      self.restore(session, (HEAD, 'Xception/block14'))
      self.assertRestored(session, all_but=(HEAD, 'Xception/block14'))

  def test_a_head_of_other_classes_is_left_out_and_reported(self):
    with tf.Graph().as_default(), tf.Session() as session:
      build(num_classes=3)
      report = self.restore(session)
      self.assertRestored(session, all_but=(HEAD,))
    self.assertIn('234 of 236', report)
    self.assertIn('its head is left out: 5 classes there, 3 here', report)

  def test_missing_variables(self):
    with tf.Graph().as_default(), tf.Session() as session:
      build()
      with tf.variable_scope('Xception/Logits'):
        slim.model_variable('more', [2])
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  'lacks 1 of 237 variables, first Xception/Logits/more'):
        fine_tuning.restore(self.checkpoint)
      report = self.restore(session, (), True)
      self.assertIn('236 of 237', report)
      self.assertIn('1 are missing, first Xception/Logits/more', report)

  def test_a_checkpoint_without_logits(self):
    with tf.Graph().as_default(), tf.Session() as session:
      build()
      session.run(tf.global_variables_initializer())
      path = tf.train.Saver([v for v in slim.get_model_variables() if HEAD not in v.op.name]).save(
          session, os.path.join(tempfile.mkdtemp(dir=self.dir), 'xception.ckpt'))
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  'lacks 2 of 236 variables, first Xception/Logits/'):
        fine_tuning.restore(path)
      self.assertIn('Starting from 234 of 236', fine_tuning.restore(path, (HEAD,)).report)

  def test_refusals(self):
    for message, arguments, options in [
        ('no variable name starts with it. Layers have names such as Xception/block1_conv1',
         (self.checkpoint, ('xception/logits',)), {}),
        ('No checkpoint in /nowhere', ('/nowhere',), {}),
        ('Nothing is left to restore', (self.checkpoint, ('Xception',)), {}),
        ('holds another network: .* variables have other shapes, .* Is --depth_multiplier the same',
         (self.checkpoint,), {'depth_multiplier': 0.25}),
        ('holds none of the .*: it has other/weights, the network Xception/block1_conv1/weights',
         (self.save('other/weights'), (), True), {}),
        ('in the format of tf.train.Checkpoint: save them with tf.compat.v1.train.Saver',
         (self.save('_CHECKPOINTABLE_OBJECT_GRAPH'),), {})]:
      with tf.Graph().as_default():
        build(**options)
        with self.assertRaisesRegex(checkpoints.CheckpointError, message):
          fine_tuning.restore(*arguments)

  def test_a_file_cut_short(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    for path in glob.glob(f'{self.checkpoint}.*'):
      shutil.copy(path, folder)
    data, = glob.glob(os.path.join(folder, '*.data*'))
    os.truncate(data, 100)
    with tf.Graph().as_default(), tf.Session() as session:
      build()
      restoration = fine_tuning.restore(folder)
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  f'{folder}/.* cannot be restored: Read less bytes'):
        restoration.init_fn(None, session)

  def save(self, name):
    """Writes a checkpoint that holds a number under a name; returns its path."""
    path = os.path.join(self.dir, name.replace('/', '_'))
    with tf.Graph().as_default(), tf.Session() as session:
      session.run(tf.raw_ops.SaveV2(prefix=path, tensor_names=[name], shape_and_slices=[''],
                                    tensors=[tf.constant(1.0)]))
    return path


class TrainableScopesTest(FineTuningTestCase):

  def take_step(self, trainable_scopes):
    """Returns all variables before and after a step from the checkpoint."""
    with tf.Graph().as_default(), tf.Session() as session:
      tf.set_random_seed(3)
      images = tf.constant(np.random.default_rng(0).normal(size=[4, 71, 71, 3]), tf.float32)
      loss_fn = functools.partial(
          training_step.tower_loss, num_classes=5, is_training=True,
          depth_multiplier=DEPTH_MULTIPLIER, dropout_keep_prob=1.0, label_smoothing=0.0, seed=1)
      with slim.arg_scope(xception.xception_arg_scope(0.1)), \
           fine_tuning.arg_scope(trainable_scopes):
        step = training_step.build_train_step(
            images, tf.constant([0, 1, 2, 3], tf.int64), tf.range(4, dtype=tf.int64), loss_fn,
            tf.train.GradientDescentOptimizer(0.1), tf.constant(0.1), ['/cpu:0'],
            tf.train.get_or_create_global_step(), trainable_scopes=trainable_scopes)
      restoration = fine_tuning.restore(self.checkpoint)
      session.run(tf.global_variables_initializer())
      restoration.init_fn(None, session)
      variables = {v.op.name: v for v in slim.get_model_variables()}
      before = session.run(variables)
      session.run(step.train_op)
      return before, session.run(variables)

  def changed(self, before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}

  def test_only_the_head(self):
    before, after = self.take_step((HEAD,))
    self.assertEqual(self.changed(before, after), {f'{HEAD}/weights', f'{HEAD}/biases'})

  def test_a_block_with_its_batch_norms(self):
    before, after = self.take_step(('Xception/block14', HEAD))
    changed = self.changed(before, after)
    self.assertTrue(all(name.startswith(('Xception/block14', HEAD)) for name in changed))
    self.assertEqual(changed, {name for name in before
                               if name.startswith(('Xception/block14', HEAD))})

  def test_a_batch_norm_moves_with_its_parameters(self):
    norm = 'Xception/block14_dws_conv2/BatchNorm'
    before, after = self.take_step((norm,))
    self.assertEqual(self.changed(before, after), {f'{norm}/{name}' for name in (
        'gamma', 'beta', 'moving_mean', 'moving_variance')})
    before, after = self.take_step((f'{norm}/gamma',))
    self.assertEqual(self.changed(before, after), {f'{norm}/gamma'})

  def test_everything_without_scopes(self):
    before, after = self.take_step(())
    # Moving means whose batch mean is 0 do not change.
    self.assertGreater(len(self.changed(before, after)), 230)

  def test_frozen_layers_compute_as_at_evaluation(self):
    with tf.Graph().as_default(), tf.Session() as session:
      images = tf.constant(np.random.default_rng(0).normal(size=[4, 71, 71, 3]), tf.float32)
      with slim.arg_scope(xception.xception_arg_scope()):
        with fine_tuning.arg_scope((HEAD,)):
          _, frozen = xception.xception(images, 5, True, depth_multiplier=DEPTH_MULTIPLIER)
        _, evaluated = xception.xception(images, 5, False, depth_multiplier=DEPTH_MULTIPLIER,
                                         reuse=True)
      tf.train.Saver(slim.get_model_variables()).restore(session, self.checkpoint)
      self.assertAllEqual(*session.run([frozen['block15_avg_pool'],
                                        evaluated['block15_avg_pool']]))

  def test_an_unknown_scope(self):
    with tf.Graph().as_default():
      build()
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  '--trainable_scopes Xception/Head: no variable name starts'):
        fine_tuning.trainable_variables(('Xception/Head',))
