"""Tests of whole training runs, with a network of two layers, in this process."""

import contextlib
import glob
import io
import os
import shutil
import tempfile
from unittest import mock

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from scripts import DATASET_DIR
import train_flowers
from training import log_folder
from training import options
import xception


def two_layers(images, num_classes, is_training=True, *_, **__):
  """Stands in for `xception.xception`."""
  with tf.variable_scope('Xception'), slim.arg_scope([slim.batch_norm], is_training=is_training):
    net = slim.conv2d(images, 4, [3, 3], stride=8, scope='block1_conv1')
    net = tf.reduce_mean(net, [1, 2], keepdims=True)
    return tf.squeeze(slim.conv2d(net, num_classes, [1, 1], normalizer_fn=None,
                                  activation_fn=None, scope='Logits'), [1, 2]), {}


two_layers.default_image_size = 299


class RunTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.log_dir = os.path.join(self.dir, 'log')
    self.enter_context(mock.patch.object(xception, 'xception', two_layers))

  def enter_context(self, context):
    self.addCleanup(context.__exit__, None, None, None)
    return context.__enter__()

  def train(self, *argv, log_dir=None):
    """Runs train_flowers.py; returns what it printed."""
    args = options.parse_train_args('', [
        '--dataset_dir', DATASET_DIR, '--log_dir', log_dir or self.log_dir, '--image_size', '71',
        '--clone_on_cpu', '--batch_size', '4', '--seed', '1', '--log_every_n_steps', '1', *argv])
    output = io.StringIO()
    with tf.Graph().as_default(), contextlib.redirect_stdout(output), \
         contextlib.redirect_stderr(output):
      train_flowers.main(args)
    return output.getvalue()

  def steps(self, log_dir=None):
    return [checkpoints.global_step(path)
            for path in checkpoints.list_checkpoints(log_dir or self.log_dir)]


class ResumeTest(RunTestCase):

  def test_another_batch_size_sees_the_same_images(self):
    # 24 of 400 images: 6 steps of 4, or 4 and then 8 images in one step.
    options = ['--num_epochs', '0.06', '--learning_rate_decay_type', 'polynomial']
    whole = self.train(*options, log_dir=os.path.join(self.dir, 'whole'))
    self.assertIn('global step 6/6: ', whole)
    self.assertIn('epoch 0.06, 00:00:00 left', whole)
    self.train(*options, '--max_number_of_steps', '4')
    output = self.train(*options, '--batch_size', '8')
    self.assertIn('Steps 4 to 5', output)
    self.assertRegex(output, 'global step 5/5: .*epoch 0.06, 00:00:00 left')
    self.assertEqual(checkpoints.next_image(checkpoints.find(self.log_dir)), 24)
    self.assertIn('already trained to step 5', self.train(*options))
    rates = {event.step: value.simple_value
             for path in glob.glob(os.path.join(self.log_dir, 'events.*'))
             for event in tf.train.summary_iterator(path) for value in event.summary.value
             if value.tag == 'learning_rate'}
    self.assertAllClose(rates[5], 0.002 + (0.00001 - 0.002) * 16 / 24)


class LogFolderTest(RunTestCase):

  def test_a_copy_resumes_from_its_own_checkpoint(self):
    self.train('--max_number_of_steps', '2')
    copy = os.path.join(self.dir, 'copy')
    shutil.copytree(self.log_dir, copy)
    self.train('--max_number_of_steps', '3')
    self.assertIn('Steps 2 to 4', self.train('--max_number_of_steps', '4', log_dir=copy))
    shutil.rmtree(self.log_dir)
    moved = os.path.join(self.dir, 'moved')
    os.rename(copy, moved)
    output = self.train('--max_number_of_steps', '5', '--max_to_keep', '2', log_dir=moved)
    self.assertIn('Steps 4 to 5', output)
    self.assertEqual(self.steps(moved), [4, 5])
    self.assertLen(glob.glob(os.path.join(moved, '*.index')), 2)  # older ones are deleted

  def test_lost_files_never_start_a_run_again(self):
    self.train('--max_number_of_steps', '2')
    self.train('--max_number_of_steps', '4')
    os.remove(os.path.join(self.log_dir, 'checkpoint'))
    self.assertIn('Steps 4 to 5', self.train('--max_number_of_steps', '5'))

    os.remove(os.path.join(self.log_dir, 'model.ckpt-5.index'))
    output = self.train('--max_number_of_steps', '5')
    self.assertIn('model.ckpt-5, the newest checkpoint', output)
    self.assertIn('Steps 4 to 5', output)

    for path in glob.glob(os.path.join(self.log_dir, '*.index')):
      os.remove(path)
    before = {name: os.path.getmtime(os.path.join(self.log_dir, name))
              for name in os.listdir(self.log_dir) if name != log_folder.LOCK_FILE}
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'holds parts of checkpoints'):
      self.train('--max_number_of_steps', '6', '--seed', '2')
    self.assertEqual(before, {name: os.path.getmtime(os.path.join(self.log_dir, name))
                              for name in os.listdir(self.log_dir)
                              if name != log_folder.LOCK_FILE})

  def test_folders_that_cannot_be_used(self):
    file = os.path.join(self.dir, 'file')
    open(file, 'w').close()
    for log_dir, error, message in [
        (self.log_dir + '[1]', checkpoints.CheckpointError, r'contains \[, which TensorFlow reads'),
        ('gs://bucket/log', checkpoints.CheckpointError, 'is a URL'),
        (file, log_folder.LogFolderError, "Cannot write to --log_dir '.*file': File exists"),
        (os.path.join(file, 'log'), log_folder.LogFolderError, 'Not a directory'),
        ('/proc/log', log_folder.LogFolderError, 'Cannot write to --log_dir')]:
      with self.assertRaisesRegex(error, message):
        self.train(log_dir=log_dir)
    self.assertEqual(os.listdir(self.dir), ['file'])
    self.assertFalse(os.path.exists('gs:'))


if __name__ == '__main__':
  tf.test.main()
