"""Tests of where training ends, and of what is printed before it starts."""

import contextlib
import io
from unittest import mock

import tensorflow.compat.v1 as tf

from deployment import cluster
from training import optimization
from training import plan


class FindEndTest(tf.test.TestCase):

  def test_from_the_start(self):
    self.assertEqual(plan.find_end(400.0, 8, 0, 0), (50, 400))
    self.assertEqual(plan.find_end(401.0, 8, 0, 0), (51, 408))
    self.assertEqual(plan.find_end(400.0, 8, 0, 0, max_number_of_steps=20), (20, 160))
    self.assertEqual(plan.find_end(400.0, 8, 0, 0, max_number_of_steps=60), (50, 400))

  def test_a_resume_with_the_same_batch_size_ends_at_the_same_step(self):
    for bound in (None, 20):
      self.assertEqual(plan.find_end(401.0, 8, 7, 56, bound), plan.find_end(401.0, 8, 0, 0, bound))

  def test_a_resume_with_another_batch_size_ends_with_the_same_image(self):
    self.assertEqual(plan.find_end(96.0, 8, 14, 56), (19, 96))  # 14 steps of 4
    self.assertEqual(plan.find_end(96.0, 4, 7, 56), (17, 96))  # 7 steps of 8
    self.assertEqual(plan.find_end(96.0, 8, 14, 56, max_number_of_steps=16), (16, 72))

  def test_already_trained(self):
    for first_image in (96, 100, 1000):
      self.assertEqual(plan.find_end(96.0, 8, 14, first_image)[0], 14)
    self.assertEqual(plan.find_end(96.0, 8, 7, 56, max_number_of_steps=5)[0], 7)


class ShowTest(tf.test.TestCase):

  def test_files_whose_records_are_lost(self):
    damages = ['a.tfrecord is not a TFRecord file, or it is compressed',
               'b.tfrecord ends inside record 2, which is lost']
    found = mock.Mock(steps_per_epoch=1.0, devices=['/cpu:0'], log_dir='my log')
    found.dataset.records.damages = damages
    args = mock.Mock(batch_size=8, accumulate_steps=1)
    with contextlib.redirect_stdout(io.StringIO()) as output, \
         contextlib.redirect_stderr(io.StringIO()) as errors:
      plan.show(found, args, optimization.RECIPES['flowers'], cluster.SingleWorker())
    self.assertEqual(errors.getvalue(), ''.join(f'Warning: {damage}\n' for damage in damages))
    self.assertIn("; watch it with: tensorboard --logdir='my log'\n", output.getvalue())
