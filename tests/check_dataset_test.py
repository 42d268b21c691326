"""Tests of the check of a dataset: what it counts, and what it finds."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

import check_dataset
from common import terminal
from create_tfrecords_test import image_bytes
from evaluation import pictures
from records import flowers
from scripts import PROJECT


class CheckDatasetTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    with open(os.path.join(self.dir, 'labels.txt'), 'w', encoding='utf-8') as f:
      f.write('0:cat\n1:dog\n')

  def write(self, split, seeds_and_labels):
    path = os.path.join(self.dir, flowers.shard_name(split, 0, 1))
    with tf.python_io.TFRecordWriter(path) as writer:
      for seed, label in seeds_and_labels:
        encoded = image_bytes(seed, 'PNG') if isinstance(seed, int) else seed
        writer.write(flowers.make_example(encoded, 'png', label, 90, 80).SerializeToString())
    return path

  def check(self):
    report, _ = check_dataset.check_dataset(self.dir, 'flowers')
    return report

  def test_a_good_dataset(self):
    self.write('train', [(1, 0), (2, 1), (3, 1)])
    self.write('validation', [(4, 0), (5, 1)])
    report = self.check()
    self.assertTrue(report['ok'])
    self.assertEqual(report['duplicates'], [])
    train = report['splits']['train']
    self.assertEqual(train['num_records'], 3)
    self.assertEqual(train['classes'], {'cat': 1, 'dog': 2})
    self.assertEqual(train['imbalance'], 2)
    self.assertEqual((train['height'], train['width']), ([90, 90, 90], [80, 80, 80]))
    self.assertEqual(train['sizes'], {'65-128': 3})
    dataset = flowers.get_split('train', self.dir)
    read = flowers.RecordReader(dataset)
    pixels = np.concatenate([read(i)[0].reshape(-1, 3) for i in range(3)]) / 255
    self.assertAllClose(train['channel_mean'], pixels.mean(0))
    self.assertAllClose(train['channel_std'], pixels.std(0))

  def test_validation_may_be_missing(self):
    self.write('train', [(1, 0), (2, 1)])
    report = self.check()
    self.assertTrue(report['ok'])
    self.assertEqual(list(report['splits']), ['train'])

  def test_bad_records_are_named(self):
    path = self.write('train', [(1, 0), (b'', 0), (2, 7), (image_bytes(3)[:300], 1), (4, 1)])
    report = self.check()
    self.assertFalse(report['ok'])
    bad = report['splits']['train']['bad_records']
    self.assertEqual([(b['file'], b['record']) for b in bad], [(path, 1), (path, 2), (path, 3)])
    self.assertEqual(bad[1]['reason'], 'its label is 7, but labels.txt has the ids 0 to 1')
    self.assertEqual(report['splits']['train']['classes'], {'cat': 1, 'dog': 1})

  def test_a_file_cut_short(self):
    path = self.write('train', [(1, 0), (2, 1), (3, 1)])
    os.truncate(path, os.path.getsize(path) - 1)
    report = self.check()
    self.assertFalse(report['ok'])
    self.assertEqual(report['splits']['train']['damaged_files'],
                     [f'{path} ends inside record 2, which is lost'])

  def test_leaks_and_duplicates(self):
    train = self.write('train', [(1, 0), (2, 1), (1, 0), (3, 1)])
    validation = self.write('validation', [(4, 0), (3, 1)])
    report = self.check()
    self.assertFalse(report['ok'])
    self.assertLen(report['duplicates'], 2)
    self.assertEqual(report['leaks'], [[
        {'split': 'train', 'file': train, 'record': 3, 'class': 'dog'},
        {'split': 'validation', 'file': validation, 'record': 1, 'class': 'dog'}]])
    self.assertEqual(report['conflicts'], [])

  def test_one_image_in_two_classes(self):
    self.write('validation', [(4, 0), (3, 1), (4, 1)])  # a split for validation is enough
    report = self.check()
    self.assertFalse(report['ok'])
    self.assertEqual([[place['class'] for place in same] for same in report['conflicts']],
                     [['cat', 'dog']])
    self.assertEqual(report['leaks'], [])

  def test_all_splits_are_opened_first(self):
    self.write('train', [(1, 0), (2, 1)])
    self.write('validation', [])
    with mock.patch.object(check_dataset, 'check_split', side_effect=AssertionError), \
         self.assertRaisesRegex(flowers.DatasetError, 'validation_.* hold no records'):
      self.check()

  def test_the_contact_sheet_is_bounded(self):
    thumbnail = np.full([128, 96, 3], [200, 0, 0], np.uint8)
    names = [f'$class_{i}' for i in range(600)]
    content = pictures.draw_contact_sheet([[thumbnail, thumbnail]] * 100, names)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
    self.assertBetween(pixels.shape[0], 100 * 128, 100 * 150)
    self.assertAllClose((pixels == [200, 0, 0]).all(-1).sum() / (200 * 128 * 96), 1, atol=0.02)

  def test_no_good_record(self):
    self.write('train', [(b'BM', 0), (1, 9)])
    train = self.check()['splits']['train']
    self.assertEqual((len(train['bad_records']), train['classes']), (2, {'cat': 0, 'dog': 0}))

  def test_the_table_is_bounded(self):
    with open(os.path.join(self.dir, 'labels.txt'), 'w', encoding='utf-8') as f:
      f.writelines(f'{i}:same name\n' for i in range(600))
    self.write('train', [(0, 0), (599, 599)])
    self.write('test', [(1, 1)])
    report = self.check()
    self.assertEqual((report['splits']['train']['classes']['599:same name'],
                      report['splits']['test']['classes']['1:same name']), (1, 1))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      check_dataset.print_report(report)
    self.assertLess(len(output.getvalue().splitlines()), 40)
    self.assertIn('... and 580 classes with more training images', output.getvalue())

  def test_columns_are_aligned(self):
    with open(os.path.join(self.dir, 'labels.txt'), 'w', encoding='utf-8') as f:
      f.write('0:向日葵の花の種と茎\n1:می\u200cخک\n')
    self.write('train', [(1, 0), (2, 1)])
    report = self.check()
    with contextlib.redirect_stdout(io.StringIO()) as output:
      check_dataset.print_report(report)
    self.assertLen({terminal.text_width(line) for line in output.getvalue().splitlines()[:8]}, 1)

  def run_script(self, *args):
    return subprocess.run(
        [sys.executable, os.path.join(PROJECT, 'check_dataset.py'), '--dataset_dir', self.dir,
         *args], capture_output=True, text=True)

  def test_the_script(self):
    self.write('train', [(1, 0), (2, 1), (3, 1)])
    sheet = os.path.join(self.dir, 'sheet.png')
    result = self.run_script('--contact_sheet', sheet)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEndsWith(result.stdout, 'No problems found\n')
    with Image.open(sheet) as image:
      self.assertGreater(np.asarray(image.convert('RGB')).std(), 10)

    self.write('train', [(1, 0), (2, 1), (3, -1)])
    result = self.run_script('--json')
    self.assertEqual(result.returncode, 1)
    self.assertFalse(json.loads(result.stdout)['ok'])
    result = self.run_script()
    self.assertEqual(result.returncode, 1)
    self.assertRegex(result.stdout, 'record 2: its label is -1')
    result = self.run_script('--dataset_name', 'cats')
    self.assertEqual(result.returncode, 1)
    self.assertRegex(result.stderr, 'check_dataset.py: No file matches .*cats_train_')
    result = self.run_script('--contact_sheet', os.path.join(sheet, 'x.png'))
    self.assertRegex(result.stderr, 'check_dataset.py: Cannot write results into .*not a folder')
    self.assertNotIn('Traceback', result.stderr)
