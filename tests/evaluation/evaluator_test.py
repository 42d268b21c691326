"""Tests that an evaluation is exact, repeatable, and the same on any number of devices."""

import os
import shutil
import tempfile
import types

import numpy as np
from scipy import special
import tensorflow.compat.v1 as tf

from common import checkpoints
from deployment import towers
from evaluation import evaluator
from records import flowers
from scripts import DATASET_DIR
import small_model

NUM_IMAGES = 100


class RunPassTest(tf.test.TestCase):

  def test_reader_is_closed_when_the_network_fails(self):
    closed = []

    class Reader:
      num_images = 2
      dataset = types.SimpleNamespace(num_classes=5)

      def __iter__(self):
        try:
          yield np.zeros([2, 8, 8, 3]), np.zeros(2, int), np.arange(2)
        finally:
          closed.append(True)

    def fail(batches):
      raise RuntimeError('no memory')

    try:
      evaluator.run_pass(Reader(), fail)
    except RuntimeError as error:
      # Inside this block the traceback still refers to the iterator.
      self.assertEqual((str(error), closed), ('no memory', [True]))
    else:
      self.fail('No exception')


class EvaluatorTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.dir)
    cls.first = small_model.write_checkpoint(cls.dir, 1, is_fitted=False)
    cls.second = small_model.write_checkpoint(cls.dir, 2, is_fitted=False)
    cls.averaged = small_model.write_checkpoint(cls.dir, 3, with_averages=True, is_fitted=False)
    cls.dataset = flowers.get_split('validation', DATASET_DIR)

  def build_evaluator(self, batch_size=32, num_devices=1):
    evaluate = evaluator.Evaluator(
        self.dataset, small_model.CONFIG, batch_size,
        towers.tower_devices(num_devices, clone_on_cpu=True))
    self.addCleanup(evaluate.close)
    return evaluate

  def assertSame(self, result, expected):
    for field in ('labels', 'probabilities', 'losses', 'positions'):
      np.testing.assert_array_equal(getattr(result, field), getattr(expected, field), field)

  def test_every_image_once_for_every_checkpoint(self):
    evaluate = self.build_evaluator()
    first, second, again = (evaluate(path) for path in (self.first, self.second, self.first))
    self.assertAllEqual(first.positions, np.arange(NUM_IMAGES))
    self.assertEqual(np.bincount(first.labels).tolist(), [20] * 5)
    self.assertAllClose(first.probabilities.sum(1), np.ones(NUM_IMAGES))
    self.assertAllClose(first.losses,
                        -np.log(first.probabilities[range(NUM_IMAGES), first.labels]))
    self.assertAllClose(special.softmax(first.logits, axis=1), first.probabilities)
    self.assertNotAllClose(first.probabilities, second.probabilities)
    self.assertSame(again, first)

  def test_batch_size_does_not_change_the_result(self):
    self.assertAllClose(self.build_evaluator(7)(self.first).probabilities,
                        self.build_evaluator(100)(self.first).probabilities, atol=1e-5)

  def test_devices_do_not_change_a_bit(self):
    # 100 images in batches of 30: two devices have one full batch less in the last round, and
    # three have nothing at all for the third but 10 images.
    expected = self.build_evaluator(30)(self.first)
    for num_devices in (2, 3):
      self.assertSame(self.build_evaluator(30, num_devices)(self.first), expected)

  def test_averages(self):
    evaluate = self.build_evaluator()
    weights = evaluate(self.averaged, use_averages='no')
    averages = evaluate(self.averaged, use_averages='yes')
    chosen = evaluate(self.averaged)
    without = evaluate(self.first)
    self.assertEqual([weights.uses_averages, averages.uses_averages, chosen.uses_averages,
                      without.uses_averages], [False, True, True, False])
    self.assertNotAllClose(weights.probabilities, averages.probabilities)
    self.assertSame(chosen, averages)
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'has no averages of the weights'):
      evaluate(self.first, use_averages='yes')

  def test_graph_does_not_grow(self):
    evaluate = self.build_evaluator(100)
    evaluate(self.first)
    operations = evaluate._graph.get_operations()
    evaluate._graph.finalize()
    evaluate(self.second)
    self.assertEqual(evaluate._graph.get_operations(), operations)

  def test_images(self):
    result = self.build_evaluator(30)(self.first, image_indices=[3, 99], num_mistakes=4)
    with tf.Graph().as_default(), tf.Session() as session:
      images, _ = session.run(flowers.load_batch(self.dataset, 100, 71, 71, is_training=False))
    wrong = np.flatnonzero(result.probabilities.argmax(1) != result.labels)
    worst = sorted(wrong, key=lambda i: -result.probabilities[i].max())[:4]
    self.assertCountEqual(result.images, {3, 99, *worst})
    for index, image in result.images.items():
      self.assertAllEqual(image, images[index])

  def test_split_without_a_good_image(self):
    with tempfile.TemporaryDirectory() as folder:
      shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), folder)
      path = os.path.join(folder, flowers.shard_name('validation', 0, 1))
      with tf.python_io.TFRecordWriter(path) as writer:
        for _ in range(3):
          writer.write(flowers.make_example(b'text', 'jpg', 0, 9, 9).SerializeToString())
      evaluate = evaluator.Evaluator(flowers.get_split('validation', folder), small_model.CONFIG, 2,
                                     ['/cpu:0'])
      self.addCleanup(evaluate.close)
      with self.assertRaisesRegex(flowers.DatasetError,
                                  f'None of the 3 records can be evaluated: {path}, record 0: '):
        evaluate(self.first)

  def test_checkpoint_that_is_gone(self):
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'model.ckpt-9 cannot be read'):
      self.build_evaluator()(os.path.join(self.dir, 'model.ckpt-9'))

  def test_checkpoint_of_another_model(self):
    with tf.Graph().as_default(), tf.Session() as session:
      tf.get_variable('weights', [1])
      session.run(tf.global_variables_initializer())
      path = tf.train.Saver().save(session, os.path.join(self.dir, 'other.ckpt'))
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'other.ckpt cannot be restored'):
      self.build_evaluator()(path)
