"""Tests of 8-bit formats: calibration images, accuracy, and what is refused."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from export import comparison
from export import folding
from export import freeze
from export import models
from export import quantization
from export import runtimes
from records import flowers
from scripts import DATASET_DIR
import small_model
import write_pb

HAS_ONNX = all(importlib.util.find_spec(name) for name in ('tf2onnx', 'onnxruntime'))
CLASS_NAMES = small_model.CLASS_NAMES


def read_examples(split, count):
  dataset = flowers.get_split(split, DATASET_DIR)
  return [tf.train.Example.FromString(dataset.records[number])
          for number in np.linspace(0, dataset.num_samples - 1, count).astype(int)]


class DatasetTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)

  def write_dataset(self, train, validation=()):
    """Writes a dataset of tf.train.Examples; returns its folder."""
    folder = tempfile.mkdtemp(dir=self.dir)
    shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), folder)
    for split, examples in [('train', train), ('validation', validation)]:
      if examples:
        path = os.path.join(folder, flowers.shard_name(split, 0, 1))
        with tf.python_io.TFRecordWriter(path) as writer:
          for example in examples:
            writer.write(example.SerializeToString())
    return folder


class CalibrationImagesTest(DatasetTestCase):

  def read(self, folder, num_images):
    return quantization.read_calibration_images(CLASS_NAMES, 71, num_images, folder)

  def test_equally_many_of_each_class(self):
    images = self.read(DATASET_DIR, 12)
    self.assertEqual((images.shape, images.dtype), ((12, 71, 71, 3), np.float32))
    self.assertAllEqual(images, self.read(DATASET_DIR, 12))
    dataset = flowers.get_split('train', DATASET_DIR)
    with tf.Graph().as_default(), tf.Session() as session:
      train, labels = session.run(flowers.load_batch(dataset, 400, 71, 71, is_training=False))
    numbers = [int(np.flatnonzero((train == image).all((1, 2, 3)))[0]) for image in images]
    self.assertLen(set(numbers), 12)
    self.assertAllEqual(np.bincount(labels[numbers]), [3, 3, 2, 2, 2])

  def test_mistakes(self):
    examples = read_examples('train', 20)
    daisies = [example for example in examples
               if example.features.feature['image/class/label'].int64_list.value[0] == 0]
    damaged = read_examples('train', 20)
    for example in damaged:
      example.features.feature['image/encoded'].bytes_list.value[0] = b'no image'
    other = self.write_dataset(examples)
    with open(os.path.join(other, 'labels.txt'), 'w') as f:
      f.write('0:cat\n1:dog\n')
    for folder, count, message in [
        (self.write_dataset([], examples), 5, 'calibrated on training images: No file matches'),
        (self.write_dataset(examples), 50, 'takes 10 training images of each class, but there'),
        (self.write_dataset(daisies), 3, 'but there are only 0 of dandelion'),
        (self.write_dataset(damaged), 5, r'record \d+: '),
        (other, 5, 'have other classes than the checkpoint')]:
      with self.assertRaisesRegex(flowers.DatasetError, message):
        self.read(folder, count)


class ComparisonTest(tf.test.TestCase):

  def test_faults(self):
    def compared(difference=0.0, agreement=1.0, loss=0.0):
      return comparison.Comparison(difference, agreement, 1.0, loss)

    for arguments, message in [
        ((compared(0.4, 0.95, 0.01), None), None),
        ((compared(0.4, 0.94, 0.0), None), 'the same for 95% of the images'),
        ((compared(0.4, 0.98, 0.02), None), 'loses 2.0% of accuracy, 1.0% are allowed'),
        ((compared(0.4, 0.86, 0.1), None, 0.1), None),
        ((compared(float('nan'), 1.0, 0.0), None), 'the class must be the same'),
        ((compared(1e-5), 1e-4), None), ((compared(1e-3), 1e-4), 'of 1e-04 is allowed'),
        ((compared(float('nan')), 1e-4), 'of 1e-04 is allowed'),
        ((compared(agreement=0.98), 1e-4), 'the same for 99% of the images')]:
      fault = comparison.find_fault(*arguments)
      self.assertEqual(fault is None, message is None, fault)
      self.assertIn(message or '', fault or '')

  def test_too_few_images(self):
    images = comparison.find_images(71, DATASET_DIR)
    comparison.require_labels(images, CLASS_NAMES)
    for few in (images._replace(encoded=images.encoded[1:]),
                images._replace(class_names=None)):
      with self.assertRaisesRegex(comparison.ComparisonError, 'needs 100 validation images'):
        comparison.require_labels(few, CLASS_NAMES)


class EqualizeTest(tf.test.TestCase):

  def test_it_computes_the_same_with_more_even_channels(self):
    with tempfile.TemporaryDirectory() as folder:
      checkpoint = small_model.write_checkpoint(folder)
      graph_def, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    graph_def = folding.fold(graph_def, 'output')
    images = small_model.validation_images()[0][:16]
    equalized = quantization.equalize(graph_def, images)

    def run(graph_def):
      with tf.Graph().as_default() as graph, tf.Session() as session:
        tf.import_graph_def(graph_def, name='')
        layers = [f'{node.name}:0' for node in graph_def.node
                  if node.op == 'DepthwiseConv2dNative']
        self.assertLen(layers, 34)
        output, activations = session.run([graph.get_tensor_by_name('output:0'), layers],
                                          {'input:0': images})
      ranges = [np.abs(values).max((0, 1, 2)) for values in activations]
      return output, np.mean([np.median(values) / values.max() for values in ranges])

    output, evenness = run(equalized)
    self.assertAllClose(output, predict(images), rtol=0, atol=1e-5)
    self.assertGreater(evenness, 1.1 * run(graph_def)[1])


class WriteTest(DatasetTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.log_dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.log_dir)
    small_model.write_checkpoint(cls.log_dir)

  def write(self, *options):
    with contextlib.redirect_stdout(io.StringIO()) as output:
      write_pb.main(write_pb.parse_args([
          '--log_dir', self.log_dir, '--output_file', os.path.join(self.dir, 'm.pb'),
          '--dataset_dir', DATASET_DIR, '--calibration_images', '50', *options]))
    return output.getvalue()

  def test_files(self):
    # The small model is sure of nothing: its accuracy is lost to any noise.
    output = self.write('--formats', 'pb,tflite_full_int8' + ',onnx_int8' * HAS_ONNX,
                        '--max_accuracy_loss', '0.1')
    names = ['m_full_int8.tflite'] + ['m_int8.onnx'] * HAS_ONNX
    self.assertCountEqual(os.listdir(self.dir), ['m.pb', 'labels.txt', 'model.json', *names])
    self.assertIn('tflite_full_int8: accuracy ', output)
    with open(os.path.join(self.dir, 'model.json')) as f:
      entries = {entry['file']: entry for entry in json.load(f)['files']}
    images, labels = small_model.validation_images()
    expected = models.load(os.path.join(self.dir, 'm.pb')).predict(images)
    for name in names:
      path = os.path.join(self.dir, name)
      probabilities = models.load(path).predict(images)
      self.assertGreater(np.mean(probabilities.argmax(1) == expected.argmax(1)), 0.86)
      self.assertGreater(np.mean(probabilities.argmax(1) == labels), 0.89)
      self.assertLess(os.path.getsize(path), 0.5 * os.path.getsize(os.path.join(self.dir, 'm.pb')))
      quantized = entries[name]['quantization']
      self.assertAllClose(quantized['input']['scale'], 2 / 255, rtol=0.02)
      self.assertBetween(quantized['input']['zero_point'], 126, 129)
      self.assertAllClose(quantized['output']['scale'], 1 / 256, rtol=0.02)
      self.assertEqual((quantized['output']['zero_point'], quantized['output']['dtype']),
                       (0, 'uint8'))
    port = runtimes.open_network(os.path.join(self.dir, names[0])).input
    self.assertEqual((port.dtype, port.scale),
                     (np.uint8, entries[names[0]]['quantization']['input']['scale']))

  def test_what_loses_accuracy_is_not_written(self):
    with mock.patch.object(comparison, 'find_fault', return_value='it loses 2.0% of accuracy'), \
         self.assertRaisesRegex(comparison.ComparisonError, 'Nothing was written, .*loses 2.0%'):
      self.write('--formats', 'tflite_full_int8')
    self.assertEmpty(os.listdir(self.dir))
    with self.assertRaisesRegex(flowers.DatasetError, '--calibration_images 401 takes 81 '):
      self.write('--formats', 'tflite_full_int8', '--calibration_images', '401')
    self.assertEmpty(os.listdir(self.dir))
    with mock.patch.object(comparison, 'DATASET_DIR', self.dir):
      with self.assertRaisesRegex(comparison.ComparisonError, 'got 100 random images'):
        write_pb.main(write_pb.parse_args([
            '--log_dir', self.log_dir, '--output_file', os.path.join(self.dir, 'm.pb'),
            '--formats', 'tflite_full_int8']))
