"""Tests of making a dataset of a folder of images, and of the folders it refuses."""

import collections
import contextlib
import csv
import glob
import hashlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from common import terminal
from records import creation
from records import flowers
from scripts import PROJECT


def image_bytes(seed, image_format='JPEG'):
  """An encoded image of 90 x 80 pixels; every seed gives another."""
  pixels = np.random.default_rng(seed).integers(0, 256, [9, 8, 3]).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).resize((80, 90)).save(file, image_format)
  return file.getvalue()


class CreateDatasetTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.image_dir = os.path.join(self.dir, 'images')
    self.dataset_dir = os.path.join(self.dir, 'dataset')

  def write(self, path, content):
    path = os.path.join(os.fsencode(self.image_dir), os.fsencode(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
      f.write(content)

  def write_classes(self, **counts):
    for seed, (name, count) in enumerate(counts.items()):
      for i in range(count):
        self.write(f'{name}/{i:03d}.jpg', image_bytes([seed, i]))

  def create(self, **kwargs):
    """Makes the dataset; returns what was printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      creation.create_dataset(self.image_dir, self.dataset_dir, **kwargs)
    return output.getvalue()

  def features(self, split):
    """[(encoded, format, label, height, width)] of a split."""
    records = flowers.get_split(split, self.dataset_dir).records
    result = []
    for i in range(len(records)):
      feature = tf.train.Example.FromString(records[i]).features.feature
      result.append((feature['image/encoded'].bytes_list.value[0],
                     feature['image/format'].bytes_list.value[0],
                     *(feature[f'image/{key}'].int64_list.value[0]
                       for key in ('class/label', 'height', 'width'))))
    return result

  def rejected(self):
    path = os.path.join(self.dataset_dir, 'flowers_rejected.csv')
    with open(path, encoding='utf-8', newline='') as f:
      return {row['file']: row['reason'] for row in csv.DictReader(f)}

  def digests(self):
    digests = {}
    for path in glob.glob(os.path.join(self.dataset_dir, '**'), recursive=True):
      if os.path.isfile(path):
        with open(path, 'rb') as f:
          digests[os.path.relpath(path, self.dataset_dir)] = hashlib.sha256(f.read()).digest()
    return digests

  def assertRefused(self, message, **kwargs):
    before = self.digests() if os.path.isdir(self.dataset_dir) else None
    with self.assertRaisesRegex(flowers.DatasetError, message):
      self.create(**kwargs)
    self.assertEqual(before, self.digests() if before is not None else None)

  # What is written.

  def test_records(self):
    self.write_classes(cat=10, dog=20)
    output = self.create(validation_fraction=0.2, num_shards=2, seed=1)
    self.assertEqual(sorted(os.listdir(self.dataset_dir)), [
        'flowers_train_00000-of-00002.tfrecord', 'flowers_train_00001-of-00002.tfrecord',
        'flowers_validation_00000-of-00002.tfrecord',
        'flowers_validation_00001-of-00002.tfrecord', 'labels.txt'])
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['cat', 'dog'])
    train, validation = self.features('train'), self.features('validation')
    self.assertEqual(collections.Counter(r[2] for r in train), {0: 8, 1: 16})
    self.assertEqual(collections.Counter(r[2] for r in validation), {0: 2, 1: 4})
    # Every file once, byte for byte.
    self.assertCountEqual(
        [r[0] for r in train + validation],
        [image_bytes([seed, i]) for seed, n in ((0, 10), (1, 20)) for i in range(n)])
    self.assertEqual({r[1:2] + r[3:] for r in train + validation}, {(b'jpg', 90, 80)})
    self.assertNotEqual([r[2] for r in train], sorted(r[2] for r in train))
    self.assertEqual([line.split() for line in output.splitlines()], [
        ['class', 'train', 'validation', 'rejected'], ['cat', '8', '2', '0'],
        ['dog', '16', '4', '0'], ['total', '24', '6', '0']])

  def test_load_batch_reads_it(self):
    self.write_classes(cat=3, dog=3)
    self.create()
    with tf.Graph().as_default(), tf.Session() as session:
      images, labels = session.run(flowers.load_batch(
          flowers.get_split('train', self.dataset_dir), 4, 71, 71, is_training=False))
    self.assertEqual(images.shape, (4, 71, 71, 3))
    self.assertAllEqual(np.bincount(labels), [2, 2])

  def test_same_files_for_the_same_seed(self):
    self.write_classes(cat=12, dog=9)
    self.write('cat/converted.bmp', image_bytes(77, 'BMP'))
    digests = []
    scandir = os.scandir

    @contextlib.contextmanager
    def reversed_scandir(path):
      with scandir(path) as entries:
        yield reversed(list(entries))

    for seed, num_workers, listing in ((1, 1, scandir), (1, 4, reversed_scandir), (2, 1, scandir)):
      with mock.patch.object(os, 'scandir', listing):
        self.create(seed=seed, num_workers=num_workers, overwrite=True)
      digests.append(self.digests())
    self.assertEqual(digests[0], digests[1])
    self.assertNotEqual(digests[0], digests[2])

  def test_every_class_is_trained_and_validated(self):
    self.write_classes(one=1, two=2, many=40)
    self.create(validation_fraction=0.1, num_shards=1)
    self.assertEqual(collections.Counter(r[2] for r in self.features('train')), {1: 1, 2: 1, 0: 36})
    self.assertEqual(collections.Counter(r[2] for r in self.features('validation')), {2: 1, 0: 4})

  def test_no_validation(self):
    self.write_classes(cat=2, dog=2)
    self.create(validation_fraction=0)
    self.assertLen(self.features('train'), 4)
    with self.assertRaisesRegex(flowers.DatasetError, 'No file matches'):
      flowers.get_split('validation', self.dataset_dir)

  def test_ids_of_an_existing_labels_file(self):
    self.write_classes(cat=2, dog=4)
    labels = os.path.join(self.dir, 'ids.txt')
    with open(labels, 'w', encoding='utf-8') as f:
      f.write('1:cat\n0:dog\n')
    self.create(labels_file=labels, num_shards=1)
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['dog', 'cat'])
    self.assertEqual(collections.Counter(r[2] for r in self.features('train')), {0: 3, 1: 1})
    with open(labels, 'w', encoding='utf-8') as f:
      f.write('0:cat\n1:cow\n')
    self.assertRefused(r"ids.txt does not match .*not in the file: \['dog'\]; without a folder: "
                       r"\['cow'\]", labels_file=labels, overwrite=True)
    with open(labels, 'w', encoding='utf-8') as f:
      f.write('0:cat\n1:dog\n2:dog\n')
    self.assertRefused(r"more than once in the file: \['dog'\]", labels_file=labels,
                       overwrite=True)

  # Files that cannot be used.

  def test_rejected_files(self):
    self.write_classes(cat=4, dog=4)
    self.write('cat/.DS_Store', b'hidden files are ignored')
    self.write('.git/x', b'and hidden folders')
    self.write('LICENSE.txt', b'and other files beside the classes')
    self.write('cat/zero.jpg', b'')
    self.write('cat/page.jpg', b'<html>')
    self.write('cat/with space and ü.jpg', b'no image')
    self.write(b'cat/not-utf8-\xff.jpg', b'no image')
    self.write('cat/line\nbreak.jpg', b'no image')
    self.write('cat/folder/inside.jpg', image_bytes(50))
    self.write('dog/truncated.jpg', image_bytes(51)[:400])
    self.write('dog/copy.jpg', image_bytes([1, 0]))
    os.symlink('nowhere', os.path.join(self.image_dir, 'dog', 'broken-link.jpg'))
    os.symlink('.', os.path.join(self.image_dir, 'dog', 'loop'))
    os.mkfifo(os.path.join(self.image_dir, 'dog', 'pipe.jpg'))
    output = self.create(num_shards=1)
    self.assertEqual(self.rejected(), {
        'cat/zero.jpg': 'the file is empty',
        'cat/page.jpg': 'it is not an image',
        'cat/with space and ü.jpg': 'it is not an image',
        'cat/not-utf8-\\udcff.jpg': 'it is not an image',
        'cat/line\nbreak.jpg': 'it is not an image',
        'cat/folder': 'a folder inside a class folder; files in it: 1',
        'dog/truncated.jpg': mock.ANY,
        'dog/copy.jpg': mock.ANY,
        'dog/broken-link.jpg': 'a broken link',
        'dog/loop': mock.ANY,
        'dog/pipe.jpg': 'not a file'})
    self.assertStartsWith(self.rejected()['dog/truncated.jpg'], 'it cannot be decoded')
    self.assertRegex(output, r'\ncat +3 +1 +6\ndog +3 +1 +5\ntotal +6 +2 +11\n'
                     '11 files or folders were rejected')

  def test_good_files_with_odd_names(self):
    self.write_classes(cat=2, dog=2)
    names = ['with space.jpg', 'line\nbreak.jpg', b'\xff\xfe.jpg', 'no suffix', 'wrong.txt']
    for i, name in enumerate(names):
      self.write(b'cat/' + os.fsencode(name), image_bytes(100 + i))
    self.write('elsewhere.bin', image_bytes(200))
    os.symlink('../elsewhere.bin', os.path.join(self.image_dir, 'dog', 'link.jpg'))
    self.create(num_shards=1)
    encoded = [r[0] for split in ('train', 'validation') for r in self.features(split)]
    self.assertLen(encoded, 10)
    self.assertContainsSubset([image_bytes(100 + i) for i in range(5)] + [image_bytes(200)],
                              encoded)

  def test_equal_files(self):
    self.write_classes(cat=4, dog=4)
    self.write('cat/000 again.jpg', image_bytes([0, 0]))
    self.write('dog/cat.jpg', image_bytes([0, 3]))
    self.create(num_shards=1)
    reasons = self.rejected()
    self.assertCountEqual(reasons, ['cat/000.jpg', 'cat/003.jpg', 'dog/cat.jpg'])
    self.assertRegex(reasons['cat/000.jpg'], 'same content as .*cat/000 again.jpg$')
    self.assertRegex(reasons['cat/003.jpg'], 'same content as .*dog/cat.jpg in another class')
    self.assertRegex(reasons['dog/cat.jpg'], 'same content as .*cat/003.jpg in another class')
    encoded = [r[0] for split in ('train', 'validation') for r in self.features(split)]
    self.assertLen(set(encoded), len(encoded))

  # Folders that are refused, without a trace.

  def test_folder_mistakes(self):
    self.assertRefused('There is no folder .*images: is --image_dir right')
    os.mkdir(self.image_dir)
    self.assertRefused('images needs at least 2 class folders, found 0')
    self.write_classes(cat=2)
    self.assertRefused('images needs at least 2 class folders, found 1')
    self.write('dog/x/1.jpg', image_bytes(1))
    self.assertRefused('dog contains only folders: if the classes are one level deeper')
    shutil.rmtree(os.path.join(self.image_dir, 'dog'))
    os.mkdir(os.path.join(self.image_dir, 'dog'))
    self.assertRefused('The class folder .*dog is empty')
    self.write('dog/notes.txt', b'none yet')
    self.assertRefused('No image of the class dog can be used. The first: it is not an image')
    self.write('IMG_1.JPG', image_bytes(1))
    self.assertRefused('1 images, such as IMG_1.JPG, are directly in')

  def test_class_names_that_labels_txt_cannot_hold(self):
    self.write_classes(cat=1)
    for name in ('line\nbreak', ' space', b'\xff'):
      self.write(os.fsencode(name) + b'/1.jpg', image_bytes(9))
      self.assertRefused('cannot be written to labels.txt')
      shutil.rmtree(os.path.join(os.fsencode(self.image_dir), os.fsencode(name)))

  def test_more_shards_than_images(self):
    self.write_classes(cat=2, dog=2)
    self.assertRefused('--num_shards 3 is more than the number of images in the train split, 2',
                       num_shards=3)
    os.remove(os.path.join(self.image_dir, 'dog', '001.jpg'))
    self.write_classes(cat=10)
    self.create()  # by default, a split of one image has one shard
    self.assertEqual([len(flowers.get_split(name, self.dataset_dir).data_sources)
                      for name in ('train', 'validation')], [2, 1])

  def test_folders_that_would_be_lost(self):
    self.write_classes(cat=2, dog=2)
    os.symlink('nowhere', os.path.join(self.image_dir, 'cow'))
    self.assertRefused('cow is a broken link')
    os.remove(os.path.join(self.image_dir, 'cow'))
    self.dataset_dir = os.path.join(self.image_dir, 'dog')
    self.assertRefused('--dataset_dir .*dog is a class folder')
    self.dataset_dir = os.path.join(self.image_dir, 'records')
    for overwrite in (False, True):  # its own output is no class
      self.create(num_shards=1, overwrite=overwrite)
    self.assertLen(self.features('train'), 2)
    for name in ('Lo\u0308we', 'L\u00f6we'):
      self.write(f'{name}/1.jpg', image_bytes(60))
    self.assertRefused('two folders named L\u00f6we', overwrite=True)

  def test_folders_that_are_no_classes(self):
    self.write_classes(cat=2, dog=2)
    for name in ('__MACOSX', '@eaDir', 'lost+found'):
      os.mkdir(os.path.join(self.image_dir, name))
    self.write('__MACOSX/cat/._1.jpg', b'of another system')
    self.dataset_dir = os.path.join(self.image_dir, 'records')
    self.create(num_shards=1)
    self.dataset_dir = os.path.join(self.image_dir, 'other')  # beside the earlier one
    self.write('cow/no suffix', image_bytes(9))  # but this is one
    self.write('cow/labels.txt', b'0:cow\n')
    self.create(num_shards=1)
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['cat', 'cow', 'dog'])

  def test_a_file_that_vanishes_while_the_dataset_is_written(self):
    self.write_classes(cat=2, dog=2)
    write_split = creation.write_split

    def remove_and_write(*args):
      shutil.rmtree(self.image_dir)
      write_split(*args)

    with mock.patch.object(creation, 'write_split', remove_and_write):
      self.assertRefused('.jpg changed while the dataset was created')

  def test_paths_that_cannot_be_written(self):
    self.write_classes(cat=2, dog=2)
    self.dataset_dir = 'ram://bucket/out'
    self.assertRefused('must be a folder of this machine, got ram://bucket/out')
    self.dataset_dir = os.path.join(self.image_dir, 'cat', '000.jpg', 'inside')
    with self.assertRaisesRegex(NotADirectoryError, '000.jpg is not a folder'):
      self.create()
    self.dataset_dir = os.path.join(self.dir, os.fsdecode(b'not-utf8-\xff'))
    self.create()
    self.assertLen(self.features('train'), 2)

  def test_a_class_folder_that_is_a_link(self):
    self.write_classes(cat=2)
    self.write('../elsewhere/1.jpg', image_bytes(7))
    os.symlink('../elsewhere', os.path.join(self.image_dir, 'dog'))
    self.create(num_shards=1)
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['cat', 'dog'])
    self.assertIn((image_bytes(7), b'jpg', 1, 90, 80), self.features('train'))

  def test_class_names_of_any_script(self):
    names = sorted(['می‌خک', '👩‍🌾', '$x$', 'Lo\u0308we', '\u2067rose\u2069'])
    for i, name in enumerate(names):
      self.write(f'{name}/1.jpg', image_bytes(i))
    lines = self.create(num_shards=1).splitlines()[:len(names) + 2]
    self.assertEqual(flowers.read_labels(self.dataset_dir), [
        unicodedata.normalize('NFC', name) for name in names])
    self.assertLen({terminal.text_width(line) for line in lines}, 1)  # columns are aligned

  # What is there already.

  def test_nothing_is_replaced_without_overwrite(self):
    self.write_classes(cat=6, dog=6)
    self.create(num_shards=2)
    self.assertRefused('00000-of-00002.tfrecord exists: use --overwrite')
    self.assertRefused('00000-of-00002.tfrecord exists: use --overwrite', num_shards=1)
    self.create(dataset_name='other')  # beside it, with the same labels
    self.assertLen(os.listdir(self.dataset_dir), 9)
    self.write('cow/1.jpg', image_bytes(300))
    self.write('cow/2.jpg', image_bytes(301))
    for overwrite in (False, True):  # the other dataset needs it
      self.assertRefused('labels.txt lists other classes and is also used by .*other_train',
                         num_shards=1, overwrite=overwrite)
    for path in glob.glob(os.path.join(self.dataset_dir, 'other_*')):
      os.remove(path)
    self.create(num_shards=1, overwrite=True)
    # The old shards are not mixed in.
    self.assertLen(flowers.get_split('train', self.dataset_dir).data_sources, 1)
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['cat', 'cow', 'dog'])

  def test_files_of_another_dataset(self):
    self.write_classes(cat=2, dog=2)
    self.write('../dataset/train/x.record', b'records')
    self.write('../dataset/rejected.csv', b'another program\'s')
    self.write('../dataset/labels.txt', b'0:x\n1:y\n')
    for overwrite in (False, True):
      self.assertRefused('labels.txt lists other classes, and no dataset here is called flowers',
                         overwrite=overwrite)
    self.write('../dataset/labels.txt', b'0:cat\n1:dog\n')
    self.write('cat/empty.jpg', b'')
    before = self.digests()
    self.create()
    self.write('cat/1.jpg', b'')
    self.create(dataset_name='pets')
    self.assertContainsSubset(before.items(), self.digests().items())
    self.assertContainsSubset(['flowers_rejected.csv', 'pets_rejected.csv'],
                              os.listdir(self.dataset_dir))

  def test_an_interrupted_run_leaves_what_was_there(self):
    self.write_classes(cat=6, dog=6)
    self.create()
    before = self.digests()
    with mock.patch.object(creation, 'write_labels', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        self.create(seed=5, overwrite=True)
    self.assertEqual(self.digests(), before)
    self.create(seed=5, overwrite=True)
    self.assertEqual(sorted(os.listdir(self.dataset_dir)), sorted(before))

  def test_an_error_leaves_nothing(self):
    self.write_classes(cat=6, dog=6)
    full = tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
    with mock.patch.object(tf.python_io.TFRecordWriter, 'write', side_effect=full):
      with self.assertRaises(tf.errors.ResourceExhaustedError):
        self.create()
    self.assertFalse(os.path.exists(self.dataset_dir))
    self.create()
    before = self.digests()
    with mock.patch.object(tf.python_io.TFRecordWriter, 'write', side_effect=full):
      with self.assertRaises(tf.errors.ResourceExhaustedError):
        self.create(seed=5, overwrite=True)
    self.assertEqual(self.digests(), before)

  def test_kill_leaves_what_was_there(self):
    self.write_classes(cat=6, dog=6)
    self.create()
    before = self.digests()

    def kill(*_):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(10)  # which the signal ends

    self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    argv = ['create_tfrecords.py', '--image_dir', self.image_dir, '--dataset_dir',
            self.dataset_dir, '--seed', '5', '--overwrite']
    with mock.patch.object(sys, 'argv', argv), mock.patch.object(creation, 'write_labels', kill), \
         contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), \
         self.assertRaisesRegex(SystemExit, 'interrupted; nothing was written'):
      runpy.run_path(os.path.join(PROJECT, argv[0]), run_name='__main__')
    self.assertEqual(self.digests(), before)

  def test_a_name_that_begins_like_another(self):
    self.write_classes(cat=6, dog=6)
    self.create(dataset_name='flowers_train', validation_fraction=0)
    self.create(dataset_name='[f]*%s', validation_fraction=0)
    before = self.digests()
    self.create(validation_fraction=0)
    self.create(validation_fraction=0, overwrite=True, num_shards=1, seed=3)
    self.assertContainsSubset(before.items(), self.digests().items())
    self.assertLen(os.listdir(self.dataset_dir), 6)
    for name in ('', 'a/b', 'a\n'):
      self.assertRefused('cannot be used as a file name prefix', dataset_name=name)

  # Images that are split already.

  def test_splits_as_they_are(self):
    for number, name in enumerate(['train/dog', 'train/cat', 'val/cat', 'val/dog', 'test/cat']):
      for i in range(3):
        self.write(f'{name}/{i}.jpg', image_bytes([number, i]))
    self.write('val/cat/leak.jpg', image_bytes([1, 0]))
    self.write('train/labels.csv', b'not an image')
    output = self.create(num_shards=1)
    self.assertEqual([line.split() for line in output.splitlines()[:4]], [
        ['class', 'train', 'validation', 'test', 'rejected'], ['cat', '3', '3', '3', '1'],
        ['dog', '3', '3', '0', '0'], ['total', '6', '6', '3', '1']])
    self.assertIn('Note: the test split has no images of 1 of 2 classes (dog)\n', output)
    for split, numbers in (('train', [1, 0]), ('validation', [2, 3]), ('test', [4])):
      self.assertCountEqual([(r[0], r[2]) for r in self.features(split)], [
          (image_bytes([number, i]), label) for label, number in enumerate(numbers)
          for i in range(3)])
    self.assertRefused('is already split into train, validation, test: leave out',
                       validation_fraction=0.2, overwrite=True)
    self.write('val/cow/1.jpg', image_bytes(8))
    self.assertRefused('val has the class cow, but .*train does not', overwrite=True)
    shutil.rmtree(os.path.join(self.image_dir, 'val', 'cow'))
    self.write('train/stray.jpg', image_bytes(10))
    self.assertRefused('train is a split by its name, but its images are not in class folders',
                       overwrite=True)
    os.remove(os.path.join(self.image_dir, 'train', 'stray.jpg'))
    self.write('valid/cat/1.jpg', image_bytes(9))
    self.assertRefused('needs one folder each for train and validation or test', overwrite=True)

  def test_splits_without_classes(self):
    self.write_classes(train=3, val=2, test=2)
    self.assertRefused('train is a split by its name, but its images are not in class folders')
    self.write('bus/1.jpg', image_bytes(8))  # so that train is a vehicle
    self.create()
    self.assertEqual(flowers.read_labels(self.dataset_dir), ['bus', 'test', 'train', 'val'])

  def test_classes_without_validation_images(self):
    self.write_classes(one=1, two=2, three=3)
    self.assertIn('Note: the validation split has no images of 1 of 3 classes (one)\n',
                  self.create(num_shards=1))
    shutil.rmtree(self.image_dir)
    self.write_classes(one=1, two=1, three=1)
    self.assertIn('Note: there is no validation split\n',
                  self.create(num_shards=1, overwrite=True))

  def test_many_classes(self):
    class_names = [f'class{i}' for i in range(20000)]
    items = [creation.Item(f'{name}/{i}', None, name, None, f'{name}/{i}', None)
             for name in class_names for i in range(2)]
    start = time.process_time()
    splits = creation.split_items(creation.reject_duplicates(items), class_names, 0.5, 0)
    self.assertLess(time.process_time() - start, 10)
    self.assertEqual([len(split) for split in splits.values()], [20000, 20000])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      creation.print_table(class_names, splits, [])
    self.assertLen(output.getvalue().splitlines(), 53)

  def test_the_same_files_from_every_process(self):
    self.write_classes(cät=3, 犬=3)
    digests = []
    for hash_seed in ('1', '2'):
      subprocess.run([sys.executable, os.path.join(PROJECT, 'create_tfrecords.py'), '--image_dir',
                      self.image_dir, '--dataset_dir', self.dataset_dir, '--overwrite'], check=True,
                     capture_output=True, env={**os.environ, 'PYTHONHASHSEED': hash_seed,
                                                'PYTHONIOENCODING': 'ascii'})
      digests.append(self.digests())
    self.assertEqual(digests[0], digests[1])

  def test_the_script(self):
    self.write_classes(cat=3, dog=3)
    command = [sys.executable, os.path.join(PROJECT, 'create_tfrecords.py'), '--image_dir',
               self.image_dir, '--dataset_dir', self.dataset_dir]
    result = subprocess.run(command, capture_output=True, text=True)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(result.stdout.splitlines()[-1], f'Wrote {self.dataset_dir}')
    result = subprocess.run(command, capture_output=True, text=True)
    self.assertEqual(result.returncode, 1)
    self.assertNotIn('Traceback', result.stderr)
    self.assertRegex(result.stderr, 'create_tfrecords.py: .* exists: use --overwrite')
