"""Tests of finding checkpoints and restoring weights from them."""

import contextlib
import glob
import io
import json
import os
import shutil
import tempfile

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints


def model_variable():
  return slim.model_variable('layer/weights', initializer=1.0, shape=None)


class CheckpointsTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.prefix = os.path.join(self.dir, 'model.ckpt')

  def save(self, step, with_averages=False):
    """Saves a weight of 1 whose average is 1.5; returns the checkpoint."""
    with tf.Graph().as_default(), tf.Session() as session:
      weight = model_variable()
      if with_averages:
        averages = tf.train.ExponentialMovingAverage(0.5)
        with tf.control_dependencies([weight.assign(2.0)]):
          apply = averages.apply([weight])
        session.run(tf.global_variables_initializer())
        session.run(apply)
        session.run(weight.assign(1.0))
      else:
        session.run(tf.global_variables_initializer())
      return tf.train.Saver().save(session, self.prefix, step)


class FindTest(CheckpointsTestCase):

  def remove(self, pattern):
    for path in glob.glob(f'{self.prefix}{pattern}'):
      os.remove(path)

  def test_newest_of_a_folder_or_one_by_name(self):
    first, second = self.save(1), self.save(2)
    self.assertEqual(checkpoints.find(self.dir), second)
    self.assertEqual(checkpoints.find('elsewhere', self.dir), second)
    self.assertEqual(checkpoints.find('elsewhere', first), first)

  def test_a_file_of_a_checkpoint_means_the_checkpoint(self):
    first, second = self.save(1), self.save(2)
    for suffix in ('.index', '.meta', '.data-00000-of-00001', '/'):
      self.assertEqual(checkpoints.find(None, first + suffix), first)
    self.assertEqual(checkpoints.find(None, os.path.join(self.dir, 'checkpoint')), second)

  def test_none(self):
    for path in (self.dir, self.prefix + '-3', os.path.join(self.dir, 'nowhere')):
      with self.assertRaisesRegex(checkpoints.CheckpointError, f'No checkpoint in {path}: run '):
        checkpoints.find(path)

  def test_the_file_checkpoint_may_be_missing_damaged_or_edited(self):
    saved = [self.save(step) for step in (9, 10)]
    state = os.path.join(self.dir, 'checkpoint')
    for content in (None, '', 'model_checkpoint_path', b'\xff\xfe'):
      os.remove(state)
      if content is not None:
        with open(state, 'wb') as f:
          f.write(content if isinstance(content, bytes) else content.encode())
      self.assertEqual(checkpoints.list_checkpoints(self.dir), saved)
      open(state, 'a').close()
    with open(state, 'w', encoding='utf-8') as f:
      f.write('model_checkpoint_path: "model.ckpt-9"\n')
    self.assertEqual(checkpoints.find(self.dir), saved[0])

  def test_a_folder_that_was_copied_or_moved(self):
    self.save(2)
    copy = os.path.join(self.dir, 'copy')
    os.mkdir(copy)
    for path in glob.glob(f'{self.dir}/*.*') + [f'{self.dir}/checkpoint']:
      shutil.copy(path, copy)
    self.assertEqual(checkpoints.find(copy), os.path.join(copy, 'model.ckpt-2'))
    self.remove('*')  # the original
    self.assertEqual(checkpoints.find(copy), os.path.join(copy, 'model.ckpt-2'))

  def test_an_incomplete_newest_checkpoint(self):
    first, _ = self.save(1), self.save(2)
    self.remove('-2.index')
    self.assertEqual(checkpoints.list_checkpoints(self.dir), [first])
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
      self.assertEqual(checkpoints.find(self.dir), first)
    self.assertIn(f'model.ckpt-2, the newest checkpoint of {self.dir}, is incomplete: using',
                  stderr.getvalue())
    self.remove('-1.data*')
    with self.assertRaisesRegex(
        checkpoints.CheckpointError,
        r'holds parts of checkpoints \(checkpoint, model.ckpt-1.index, .*Copy the missing files'):
      checkpoints.find(self.dir)

  def test_what_is_no_checkpoint(self):
    for name, message in (('model.h5', 'is a Keras file: convert it with convert_keras_weights.py'),
                          ('model.keras', 'is a Keras file: convert it with convert_keras'),
                          ('model.ckpt-1.index', 'No checkpoint in')):
      path = os.path.join(self.dir, name)
      open(path, 'w').close()
      with self.assertRaisesRegex(checkpoints.CheckpointError, message):
        checkpoints.find(None, path)

  def test_a_text_and_a_damaged_checkpoint(self):
    text = os.path.join(self.dir, 'notes.txt')
    damaged = self.save(1)
    for path in (text, f'{damaged}.index'):
      with open(path, 'w', encoding='utf-8') as f:
        f.write('To do: train more.\n' * 10)
    for path in (text, damaged):
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  f'{path} cannot be read: .*not an sstable'):
        checkpoints.open_checkpoint(checkpoints.find(None, path))

  def test_paths_that_tensorflow_cannot_read(self):
    for path, message in (('log[1]', r'contains \[, which TensorFlow reads as a pattern'),
                          ('what?', r'contains \?'), ('a*b', r'contains \*'),
                          ('a\\b', r'contains \\'),
                          ('gs://bucket/log', 'is a URL'), ('caf\udce9', 'is not UTF-8')):
      with self.assertRaisesRegex(checkpoints.CheckpointError, message):
        checkpoints.check_path(path)
    checkpoints.check_path('/tmp/a folder (2)/Löwenzahn-{1}')


class RestoreTest(CheckpointsTestCase):

  def restore(self, checkpoint, use_averages):
    """Returns the weight, and whether the saver calls it an average."""
    with tf.Graph().as_default(), tf.Session() as session:
      weight = model_variable()
      are_averages = checkpoints.restore(session, checkpoint, use_averages)
      return session.run(weight), are_averages

  def test_averages_where_there_are_some(self):
    checkpoint = self.save(1, with_averages=True)
    self.assertEqual(self.restore(checkpoint, 'auto'), (1.5, True))
    self.assertEqual(self.restore(checkpoint, 'yes'), (1.5, True))
    self.assertEqual(self.restore(checkpoint, 'no'), (1.0, False))

  def test_no_averages(self):
    checkpoint = self.save(1)
    self.assertEqual(self.restore(checkpoint, 'auto'), (1.0, False))
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'has no averages of the weights'):
      self.restore(checkpoint, 'yes')


  def test_another_shape(self):
    checkpoint = self.save(1)
    for resource in (False, True):
      with tf.Graph().as_default(), tf.Session() as session:
        slim.model_variable('layer/weights', shape=[2], use_resource=resource)
        with self.assertRaisesRegex(checkpoints.CheckpointError,
                                    r'its layer/weights has the shape \[\], not \(2,\) as in'):
          checkpoints.restore(session, checkpoint)


class ConfigTest(CheckpointsTestCase):

  def test_values_that_somebody_edited(self):
    config = {'class_names': ['a', 'b'], 'image_size': 71, 'depth_multiplier': 1, 'seed': 1}
    for name, value in [('class_names', []), ('class_names', 'ab'), ('class_names', ['a', 2]),
                        ('image_size', '71'), ('image_size', 71.0), ('image_size', 50),
                        ('depth_multiplier', '1'), ('depth_multiplier', 0), ('seed', None)]:
      with open(os.path.join(self.dir, 'model_config.json'), 'w', encoding='utf-8') as f:
        json.dump({**config, name: value}, f)
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  f'model_config.json, .*: {name} cannot be '):
        checkpoints.load_config(self.prefix)


class SameVariablesTest(CheckpointsTestCase):

  def test_other_optimizers_are_refused(self):
    checkpoint = self.save(1)
    with tf.Graph().as_default():
      weight = model_variable()
      checkpoints.check_same_variables(checkpoint)
      tf.train.MomentumOptimizer(0.1, 0.9).minimize(weight * 2.0)
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  'lacks 1 variables that this run needs, first '
                                  'layer/weights/Momentum'):
        checkpoints.check_same_variables(checkpoint)

  def test_averages_are_not_lost_silently(self):
    checkpoint = self.save(1, with_averages=True)
    with tf.Graph().as_default():
      model_variable()
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  'has 1 variables that this run lacks, first '
                                  'layer/weights/ExponentialMovingAverage'):
        checkpoints.check_same_variables(checkpoint)


class NextImageTest(CheckpointsTestCase):

  def test_a_checkpoint_that_training_did_not_write(self):
    with self.assertRaisesRegex(checkpoints.CheckpointError,
                                'was not written by train_flowers.py, which cannot resume'):
      checkpoints.next_image(self.save(1))


  def test_only_the_weights(self):
    self.assertEqual(checkpoints.global_step(self.save(1)), 0)


class TemperatureTest(CheckpointsTestCase):

  def test_only_of_exactly_these_weights(self):
    checkpoint = self.save(1)
    path = os.path.join(self.dir, 'temperature.json')
    self.assertEqual(checkpoints.temperature_file(checkpoint), path)
    self.assertIsNone(checkpoints.read_temperature(checkpoint, False, 71))
    stored = {'temperature': 1.5, 'checkpoint_sha256': checkpoints.sha256(checkpoint),
              'uses_averages': False, 'image_size': 71}
    for content, is_used in [
        (stored, True), ({**stored, 'more': []}, True), ({**stored, 'temperature': 2}, True),
        ({**stored, 'uses_averages': True}, False), ({**stored, 'image_size': 80}, False),
        ({**stored, 'checkpoint_sha256': checkpoints.sha256(self.save(2, True))}, False),
        ({**stored, 'temperature': 0}, False), ({**stored, 'temperature': '2'}, False),
        ({**stored, 'temperature': float('nan')}, False), ([1.5], False), (1.5, False)]:
      with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f)
      self.assertEqual(checkpoints.read_temperature(checkpoint, False, 71),
                       content if is_used else None)
    with open(path, 'wb') as f:
      f.write(b'\xff')
    self.assertIsNone(checkpoints.read_temperature(checkpoint, False, 71))
