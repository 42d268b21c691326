"""Tests of the flowers that are shipped in dataset/, and of the script that draws them."""

import collections
import hashlib
import io
import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
import tensorflow.compat.v1 as tf

from dataset import draw_flowers
from records import flowers
from scripts import DATASET_DIR
from scripts import PROJECT

SIZES = {'train': 400, 'validation': 100}

Record = collections.namedtuple('Record', ['encoded', 'format', 'label', 'height', 'width'])


def read_records(dataset_dir, split):
  records = []
  for path in flowers.get_split(split, dataset_dir).data_sources:
    for serialized in tf.python_io.tf_record_iterator(path):
      feature = tf.train.Example.FromString(serialized).features.feature
      records.append(Record(feature['image/encoded'].bytes_list.value[0],
                            feature['image/format'].bytes_list.value[0].decode(),
                            feature['image/class/label'].int64_list.value[0],
                            feature['image/height'].int64_list.value[0],
                            feature['image/width'].int64_list.value[0]))
  return records


class ShippedFlowersTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.records = {split: read_records(DATASET_DIR, split) for split in SIZES}

  def all_records(self):
    return self.records['train'] + self.records['validation']

  def test_classes_and_counts(self):
    self.assertEqual(flowers.read_labels(DATASET_DIR),
                     ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips'])
    for split, size in SIZES.items():
      self.assertLen(flowers.get_split(split, DATASET_DIR).data_sources, 2)
      counts = collections.Counter(record.label for record in self.records[split])
      self.assertEqual(counts, dict.fromkeys(range(5), size // 5))

  def test_small_enough_to_ship(self):
    total = sum(os.path.getsize(os.path.join(DATASET_DIR, name))
                for name in os.listdir(DATASET_DIR) if name.endswith('.tfrecord'))
    self.assertLess(total, 8 * 2**20)

  def test_every_image_is_what_its_record_says(self):
    for record in self.all_records():
      with Image.open(io.BytesIO(record.encoded)) as image:
        image.load()
        self.assertEqual(image.format, {'jpg': 'JPEG', 'png': 'PNG'}[record.format])
        self.assertEqual(image.size, (record.width, record.height))
        self.assertEqual(image.mode, 'RGB')
      self.assertBetween(min(image.size), 200, 260)
      self.assertBetween(max(image.size), 280, 330)

  def test_jpeg_with_a_few_pngs(self):
    for split in SIZES:
      formats = collections.Counter(record.format for record in self.records[split])
      self.assertBetween(formats['png'], 1, 0.1 * SIZES[split])

  def test_no_image_twice(self):
    digests = {hashlib.sha256(record.encoded).digest() for record in self.all_records()}
    self.assertLen(digests, sum(SIZES.values()))

  def test_color_alone_does_not_tell_the_class(self):
    def mean_colors(split):
      return [np.asarray(Image.open(io.BytesIO(record.encoded)), np.float64).mean((0, 1))
              for record in self.records[split]], [r.label for r in self.records[split]]

    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    classifier.fit(*mean_colors('train'))
    self.assertLess(classifier.score(*mean_colors('train')), 0.6)
    self.assertLess(classifier.score(*mean_colors('validation')), 0.6)


class DrawFlowersTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.dir = folder.name

  def draw(self, *args):
    return subprocess.run(
        [sys.executable, '-m', 'dataset.draw_flowers', '--dataset_dir', self.dir,
         '--num_train', '10', '--num_validation', '5', *args],
        cwd=PROJECT, capture_output=True, text=True)

  def test_script(self):
    result = self.draw()
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertIn('Wrote 10 training and 5 validation images', result.stdout)
    self.assertLen(read_records(self.dir, 'train'), 10)
    self.assertLen(read_records(self.dir, 'validation'), 5)
    self.assertLen(os.listdir(self.dir), 5)  # no temporary file is left

    before = {name: os.stat(os.path.join(self.dir, name)).st_mtime_ns
              for name in os.listdir(self.dir)}
    result = self.draw()
    self.assertEqual(result.returncode, 1)
    self.assertRegex(result.stderr, r'draw_flowers.py: .*labels.txt exists: use --overwrite')
    self.assertNotIn('Traceback', result.stderr)
    self.assertEqual(before, {name: os.stat(os.path.join(self.dir, name)).st_mtime_ns
                              for name in os.listdir(self.dir)})

  def test_the_seed_decides_every_pixel(self):
    def draw(seed):
      return [example.SerializeToString(deterministic=True)
              for example in draw_flowers.split_examples('train', 5, seed)]

    self.assertEqual(draw(1), draw(1))
    self.assertTrue(set(draw(1)).isdisjoint(draw(2)))
