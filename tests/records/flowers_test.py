"""Tests of the TFRecord input pipeline on small datasets that the tests write."""

import argparse
import io
import os
import shutil
import tempfile
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf
from tensorflow.core.framework import dataset_options_pb2
import tf_slim as slim

from common import arguments
from records import flowers
from records import tfrecords

CLASS_NAMES = ('daisy', 'dandelion', 'roses')


def encoded_image(index, image_format='jpg', height=90, width=110):
  """A smooth image whose red tells its index."""
  columns = np.linspace(0, 90, width)
  pixels = np.stack([np.full([height, width], 5 * index), np.tile(columns, (height, 1)),
                     np.tile(columns[::-1], (height, 1))], -1).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, {'jpg': 'JPEG'}.get(image_format, image_format))
  return file.getvalue()


def index_of(image):
  """The index of an `encoded_image`, from its preprocessed pixels."""
  return int(round((image[..., 0].mean() / 2 + 0.5) * 255 / 5))


class FlowersTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.write_labels('0:daisy\n1:dandelion\n2:roses\n')

  def write_labels(self, text):
    with open(os.path.join(self.dir, flowers.LABELS_FILE), 'wb') as f:
      f.write(text if isinstance(text, bytes) else text.encode())

  def write_shard(self, examples, split='train', shard=0, num_shards=1):
    path = os.path.join(self.dir, flowers.shard_name(split, shard, num_shards))
    with tf.python_io.TFRecordWriter(path) as writer:
      for example in examples:
        writer.write(example.SerializeToString())
    return path

  def write_images(self, indices, split='train', shard=0, num_shards=1):
    return self.write_shard(
        [flowers.make_example(encoded_image(i), 'jpg', i % 3, 90, 110) for i in indices],
        split, shard, num_shards)

  def read_batches(self, num_batches, batch_size=4, is_training=True, split='train', **kwargs):
    """Returns [(images, labels)] of `num_batches`, or of all until the end."""
    with tf.Graph().as_default(), tf.Session() as session:
      batch = flowers.load_batch(flowers.get_split(split, self.dir), batch_size, 71, 71,
                                 is_training, **kwargs)
      batches = []
      try:
        while num_batches is None or len(batches) < num_batches:
          batches.append(session.run(batch))
      except tf.errors.OutOfRangeError:
        pass
      return batches

  # The format.

  def test_shard_name(self):
    self.assertEqual(flowers.shard_name('train', 0, 2), 'flowers_train_00000-of-00002.tfrecord')

  def test_record_round_trip(self):
    example = flowers.make_example(b'bytes', 'png', 3, 240, 320)
    feature = tf.train.Example.FromString(example.SerializeToString()).features.feature
    self.assertEqual(feature['image/encoded'].bytes_list.value, [b'bytes'])
    self.assertEqual(feature['image/format'].bytes_list.value, [b'png'])
    self.assertEqual(feature['image/class/label'].int64_list.value, [3])
    self.assertEqual(feature['image/height'].int64_list.value, [240])
    self.assertEqual(feature['image/width'].int64_list.value, [320])

  def test_labels(self):
    for text in ('0:daisy\n1:dandelion\n2:roses\n', '2:roses\n0:daisy\n1:dandelion',
                 '0:daisy\r\n1: dandelion \r\n\r\n2:roses\r\n',
                 '\ufeff0:daisy\n1:dandelion\n2:roses', '0 daisy\n1\tdandelion\n2 : roses'):
      self.write_labels(text)
      self.assertEqual(flowers.read_labels(self.dir), list(CLASS_NAMES))

  def test_a_name_may_have_colons_and_any_letters(self):
    names = ['Löwenzahn: gelb', '蒲公英', 'می‌خک', '👩‍🌾', '$x$']
    self.write_labels(''.join(f'{i}:{name}\n' for i, name in enumerate(names)))
    self.assertEqual(flowers.read_labels(self.dir), names)
    self.write_labels('0:Lo\u0308wenzahn\n')  # decomposed, as macOS writes it
    self.assertEqual(flowers.read_labels(self.dir), ['L\u00f6wenzahn'])

  def test_malformed_labels(self):
    for text, message in [
        ('0:daisy\nroses\n', "line 2: expected id:name like 0:daisy, got 'roses'"),
        ('0:daisy\n1:\n', "line 2: expected id:name like 0:daisy, got '1:'"),
        ('-1:daisy\n', 'line 1: expected id:name'),
        ('0:daisy\n0:roses\n', "line 2: id 0 is already 'daisy'"),
        ('1:daisy\n2:roses\n', r'must be 0 to 1, got \[1, 2\]'),
        ('\n', 'is empty'),
        ('1:daisy\n2:roses\n', 'labels begin at 1 are read with --labels_offset 1'),
        ('0:a\0b\n', 'expected id:name'),
        ('0:Löwenzahn\n'.encode('latin-1'), 'is not UTF-8 text .*iconv -f LATIN1 -t UTF-8'),
        ('0:daisy\n'.encode('utf-16'), 'is not UTF-8 text .*iconv -f UTF-16 -t UTF-8')]:
      self.write_labels(text)
      with self.assertRaisesRegex(flowers.DatasetError, message) as context:
        flowers.read_labels(self.dir)
      self.assertIn('labels.txt', str(context.exception))

  def test_missing_labels(self):
    os.remove(os.path.join(self.dir, 'labels.txt'))
    with self.assertRaisesRegex(flowers.DatasetError, 'Cannot read .*labels.txt'):
      flowers.read_labels(self.dir)

  # get_split.

  def test_split_is_a_slim_dataset(self):
    self.write_images(range(5), shard=0, num_shards=2)
    self.write_images(range(5, 12), shard=1, num_shards=2)
    dataset = flowers.get_split('train', self.dir)
    self.assertIsInstance(dataset, slim.dataset.Dataset)
    self.assertEqual(dataset.num_samples, 12)
    self.assertEqual(dataset.num_classes, 3)
    self.assertEqual(dataset.labels_to_names, dict(enumerate(CLASS_NAMES)))
    self.assertEqual([os.path.basename(path) for path in dataset.data_sources],
                     ['flowers_train_00000-of-00002.tfrecord',
                      'flowers_train_00001-of-00002.tfrecord'])
    self.assertEqual(sorted(dataset.decoder.list_items()), ['image', 'label'])

  def test_slims_own_provider_reads_it(self):
    self.write_images(range(6))
    with tf.Graph().as_default():
      provider = slim.dataset_data_provider.DatasetDataProvider(
          flowers.get_split('train', self.dir), shuffle=False, num_readers=1)
      image, label = provider.get(['image', 'label'])
      with tf.Session() as session:
        coordinator = tf.train.Coordinator()
        threads = tf.train.start_queue_runners(session, coordinator)
        session.run(tf.local_variables_initializer())
        labels = [session.run([image, label])[1] for _ in range(6)]
        coordinator.request_stop()
        coordinator.join(threads, stop_grace_period_secs=5, ignore_live_threads=True)
    self.assertEqual(labels, [0, 1, 2, 0, 1, 2])

  def test_another_file_pattern(self):
    path = self.write_images(range(4))
    os.rename(path, os.path.join(self.dir, 'mine-train.tfrecord'))
    dataset = flowers.get_split('train', self.dir, file_pattern='mine-%s.tfrecord')
    self.assertEqual(dataset.num_samples, 4)

  def test_another_name_does_not_match(self):
    self.write_images(range(4))
    for name in ('flowers_train', 'f*', '[f]lowers', '%s', 'flowers'):
      for shard in range(2):
        path = os.path.join(self.dir, flowers.shard_name('train', shard, 2, name))
        with tf.python_io.TFRecordWriter(path) as writer:
          writer.write(flowers.make_example(encoded_image(1), 'jpg', 0, 90, 110)
                       .SerializeToString())
    os.remove(os.path.join(self.dir, flowers.shard_name('train', 0, 1)))
    for name in ('flowers_train', 'f*', '[f]lowers', '%s', 'flowers'):
      dataset = flowers.get_split('train', self.dir, dataset_name=name)
      self.assertEqual([os.path.basename(path) for path in dataset.data_sources],
                       [flowers.shard_name('train', shard, 2, name) for shard in range(2)])

  def test_missing_and_extra_shards(self):
    self.write_images(range(4), shard=0, num_shards=2)
    with self.assertRaisesRegex(flowers.DatasetError, '1 of 2 shards are missing, .*00001-of'):
      flowers.get_split('train', self.dir)
    self.write_images(range(4, 8), shard=1, num_shards=2)
    old = self.write_images(range(4), shard=0, num_shards=1)
    with self.assertRaisesRegex(flowers.DatasetError, f'{old} is not one of the 2 shards'):
      flowers.get_split('train', self.dir)
    os.rename(old, old.replace('00000-of-00001', '00002-of-00002'))
    with self.assertRaisesRegex(flowers.DatasetError, '00002-of-00002.tfrecord is not one of'):
      flowers.get_split('train', self.dir)
    # A pattern may choose some of the shards that exist.
    dataset = flowers.get_split('train', self.dir, file_pattern='flowers_%s_00000*')
    self.assertEqual(dataset.num_samples, 4)

  def rename_shards(self, *names):
    for i, name in enumerate(names):
      os.rename(self.write_images([i]), os.path.join(self.dir, name))

  def test_shards_with_other_numbers_than_ours(self):
    for names in (['train-000-of-003', 'train-001-of-003', 'train-002-of-003'],
                  [f'train-{i}-of-11' for i in range(11)],
                  [f'train-{i}-of-11' for i in range(1, 12)]):
      self.rename_shards(*names)
      self.assertEqual(flowers.get_split('train', self.dir, '%s-*').num_samples, len(names))
      os.remove(os.path.join(self.dir, names[1]))
      with self.assertRaisesRegex(flowers.DatasetError,
                                  f'shards are missing, such as .*{names[1]}:'):
        flowers.get_split('train', self.dir, '%s-*')
      for name in [names[0], *names[2:]]:
        os.remove(os.path.join(self.dir, name))

  def test_other_names_of_the_validation_split(self):
    for name in ('val', 'valid', 'validation'):  # the last one wins
      self.rename_shards(f'{name}-00000-of-00001')
      dataset = flowers.get_split('validation', self.dir, '%s-*')
      self.assertEqual(dataset.data_sources, [os.path.join(self.dir, f'{name}-00000-of-00001')])

  def test_a_pattern_that_gives_one_file_to_two_splits(self):
    self.rename_shards('train_set_train.tfrecord', 'train_set_validation.tfrecord')
    for split in ('train', 'validation'):
      with self.assertRaisesRegex(flowers.DatasetError,
                                  'train_set_validation.tfrecord would be in the splits'):
        flowers.get_split(split, self.dir, '*%s*')

  def test_records_of_other_tools(self):
    feature = flowers.make_example(encoded_image(9), 'jpg', 1, 90, 110).features.feature
    example = tf.train.Example()
    example.features.feature['image'].CopyFrom(feature['image/encoded'])
    example.features.feature['label'].CopyFrom(feature['image/class/label'])
    os.rename(self.write_shard([example] * 2), os.path.join(self.dir, 'train-00000-of-00001'))
    options = argparse.Namespace(
        dataset_dir=self.dir, dataset_name=None, file_pattern='%s-*', image_key='image',
        label_key='label', labels_offset=None)
    dataset = flowers.get_split('train', **arguments.dataset_options(options))
    with tf.Graph().as_default(), tf.Session() as session:
      images, labels = session.run(flowers.load_batch(dataset, 2, 71, 71, is_training=False))
    self.assertEqual([index_of(image) for image in images], [9, 9])
    self.assertAllEqual(labels, [1, 1])

  def write_label_range(self, labels):
    self.write_shard([flowers.make_example(encoded_image(i % 50), 'jpg', label, 90, 110)
                      for i, label in enumerate(labels)])

  def test_labels_that_begin_at_1(self):
    self.write_labels(''.join(f'{i}:class{i}\n' for i in range(150)))
    self.write_label_range(range(1, 151))
    with self.assertRaisesRegex(flowers.DatasetError, r'no record has the label 0, but some have '
                                r'150; .* names 0 to 149. Use --labels_offset 1'):
      flowers.get_split('train', self.dir)
    dataset = flowers.get_split('train', self.dir, labels_offset=1)
    self.assertEqual(flowers.count_labels(dataset), [1] * 150)
    self.write_labels(''.join(f'{i}:class{i}\n' for i in range(151)))  # 0 is no class
    with self.assertRaisesRegex(flowers.DatasetError, 'If id 0 is no class, call it background'):
      flowers.get_split('train', self.dir, labels_offset=1)
    self.write_labels(''.join(f'{i}:class{i}\n' for i in range(1, 152)))  # 151 has no images
    self.assertEqual(flowers.get_split('train', self.dir, labels_offset=1).num_classes, 151)
    self.write_labels(''.join(f'{i}:class{i}\n' for i in range(150)))
    dataset = flowers.get_split('train', self.dir, labels_offset=1)
    self.assertEqual([flowers.RecordReader(dataset)(i)[1] for i in (0, 149)], [0, 149])
    with tf.Graph().as_default(), tf.Session() as session:
      _, labels = session.run(flowers.load_batch(dataset, 150, 71, 71, is_training=False))
    self.assertAllEqual(labels, range(150))
    self.write_label_range(range(150))
    with self.assertRaisesRegex(flowers.DatasetError, 'no record has the label 150, but some '
                                'have 0;'):
      flowers.get_split('train', self.dir, labels_offset=1)

  def test_names_of_labels_that_begin_at_1(self):
    for text in ('0:daisy\n1:roses\n', '1:daisy\n2:roses\n', '0:Background\n1:daisy\n2:roses\n'):
      self.write_labels(text)
      self.assertEqual(flowers.read_labels(self.dir, labels_offset=1), ['daisy', 'roses'])

  def test_unknown_split(self):
    with self.assertRaisesRegex(ValueError, "Unknown split 'dev': use one of train, valid"):
      flowers.get_split('dev', self.dir)

  def test_no_file(self):
    with self.assertRaisesRegex(flowers.DatasetError, 'No file matches .*flowers_train_'):
      flowers.get_split('train', self.dir)

  def test_no_record(self):
    path = self.write_shard([])
    with self.assertRaisesRegex(flowers.DatasetError, f'{path} hold no records'):
      flowers.get_split('train', self.dir)

  def test_files_that_cannot_be_opened(self):
    path = os.path.join(self.dir, flowers.shard_name('train', 0, 1))

    def check_error(reason):
      with self.assertRaises(OSError) as context:
        flowers.get_split('train', self.dir)
      self.assertEndsWith(str(context.exception), f'{reason}: {path!r}')

    os.symlink('nowhere', path)
    check_error('No such file or directory')
    os.remove(path)
    os.mkdir(path)
    check_error('Is a directory')
    os.rmdir(path)
    self.write_images([1])
    denied = PermissionError(13, 'Permission denied', path)  # root may read any file
    with mock.patch.object(tfrecords, 'open', side_effect=denied, create=True):
      check_error('Permission denied')

  def test_a_shard_cut_short_loses_its_own_tail(self):
    path = self.write_images(range(3), shard=0, num_shards=2)
    self.write_images(range(3, 8), shard=1, num_shards=2)
    with open(path, 'r+b') as f:
      f.truncate(os.path.getsize(path) - 5)
    dataset = flowers.get_split('train', self.dir)
    self.assertEqual(dataset.num_samples, 2 + 5)
    self.assertEqual(dataset.records.damages, [f'{path} ends inside record 2, which is lost'])
    (_, labels), = self.read_batches(None, 10, is_training=False)
    self.assertAllEqual(labels, [0, 1, 0, 1, 2, 0, 1])

  def test_no_record_left(self):
    path = self.write_images([1])
    with open(path, 'r+b') as f:
      f.truncate(50)
    with self.assertRaisesRegex(flowers.DatasetError, 'ends inside record 0'):
      flowers.get_split('train', self.dir)

  # load_batch.

  def test_training_batch(self):
    self.write_images(range(6))
    (images, labels), = self.read_batches(1)
    self.assertEqual((images.shape, images.dtype), ((4, 71, 71, 3), np.float32))
    self.assertEqual((labels.shape, labels.dtype), ((4,), np.int64))
    self.assertBetween(images.min(), -1, 1)
    self.assertBetween(images.max(), -1, 1)

  def test_no_tuning_thread_delays_the_end(self):
    self.write_images(range(6))
    for is_training in (True, False):
      with tf.Graph().as_default() as graph:
        flowers.load_batch(flowers.get_split('train', self.dir), 2, 71, 71, is_training)
      options, = [dataset_options_pb2.Options.FromString(node.attr['serialized_options'].s)
                  for function in graph.as_graph_def().library.function
                  for node in function.node_def if node.op == 'OptionsDataset']
      self.assertTrue(options.autotune_options.HasField('enabled'))
      self.assertFalse(options.autotune_options.enabled)

  def test_evaluation_sees_every_image_once_in_order(self):
    self.write_images(range(5), 'validation', 0, 2)
    self.write_images(range(5, 10), 'validation', 1, 2)
    batches = self.read_batches(None, batch_size=4, is_training=False, split='validation')
    self.assertEqual([len(labels) for _, labels in batches], [4, 4, 2])
    seen = [index_of(image) for images, _ in batches for image in images]
    self.assertEqual(seen, list(range(10)))
    self.assertEqual([label for _, labels in batches for label in labels],
                     [i % 3 for i in range(10)])

  def test_evaluation_pixels_are_pillows(self):
    encoded = encoded_image(40)
    self.write_shard([flowers.make_example(encoded, 'jpg', 0, 90, 110)])
    with tf.Graph().as_default(), tf.Session() as session:
      dataset = flowers.get_split('train', self.dir)
      record = next(tf.python_io.tf_record_iterator(dataset.data_sources[0]))
      image = session.run(dataset.decoder.decode(tf.constant(record), ['image'])[0])
    self.assertAllEqual(image, np.asarray(Image.open(io.BytesIO(encoded))))

  def test_formats_that_tensorflow_decodes(self):
    rgba = io.BytesIO()
    Image.open(io.BytesIO(encoded_image(30))).convert('RGBA').save(rgba, 'PNG')
    animation = io.BytesIO()
    Image.new('RGB', (90, 90), (200, 0, 0)).save(
        animation, 'GIF', save_all=True, append_images=[Image.new('RGB', (90, 90))])
    contents = [*(encoded_image(i, image_format) for i, image_format in enumerate(
        ('png', 'bmp', 'gif', 'webp'), 5)), rgba.getvalue(), animation.getvalue()]
    self.write_shard([flowers.make_example(content, 'any', 0, 90, 110) for content in contents])
    (images, _), = self.read_batches(1, batch_size=6, is_training=False)
    self.assertEqual([index_of(image) for image in images], [5, 6, 7, 8, 30, 40])
    self.assertLen(self.read_batches(1, batch_size=6)[0][1], 6)
    read = flowers.RecordReader(flowers.get_split('train', self.dir))
    self.assertEqual([index_of(read(i)[0] / 127.5 - 1) for i in range(6)], [5, 6, 7, 8, 30, 40])

  def epochs_of_labels(self, num_epochs, num_images, **kwargs):
    # One class an image, so that labels tell which image it was.
    self.write_labels(''.join(f'{i}:class{i}\n' for i in range(num_images)))
    half = num_images // 2
    for shard, indices in enumerate([range(half), range(half, num_images)]):
      self.write_shard([flowers.make_example(encoded_image(i), 'jpg', i, 90, 110)
                        for i in indices], shard=shard, num_shards=2)
    batches = self.read_batches(num_epochs * num_images // 5, batch_size=5, **kwargs)
    return np.concatenate([labels for _, labels in batches]).reshape(num_epochs, num_images)

  def test_every_epoch_has_every_image_once_in_another_order(self):
    epochs = self.epochs_of_labels(3, 20)
    for epoch in epochs:
      self.assertAllEqual(np.sort(epoch), np.arange(20))
    self.assertNotAllEqual(epochs[0], epochs[1])
    self.assertNotAllEqual(epochs[1], epochs[2])
    # Shards and records are mixed: a batch is not a run of neighbours.
    self.assertNotAllEqual(np.sort(epochs[0][:5]), np.sort(epochs[0])[:5])

  def test_the_seed_decides_the_order(self):
    first, again, other = (self.epochs_of_labels(1, 20, seed=seed) for seed in (1, 1, 2))
    self.assertAllEqual(first, again)
    self.assertNotAllEqual(first, other)

  def test_resuming_continues_with_the_very_same_batches(self):
    self.write_images(range(10), shard=0, num_shards=2)
    self.write_images(range(10, 14), shard=1, num_shards=2)
    uninterrupted = self.read_batches(10, seed=3)
    resumed = self.read_batches(5, seed=3, first_image=5 * 4)
    for (images, labels), (expected_images, expected_labels) in zip(resumed, uninterrupted[5:]):
      self.assertAllEqual(labels, expected_labels)
      self.assertAllEqual(images, expected_images)

  def test_epochs_distort_differently(self):
    self.write_images([20])
    batches = self.read_batches(3, batch_size=1)
    self.assertNotAllClose(batches[0][0], batches[1][0], atol=0.01)
    self.assertNotAllClose(batches[1][0], batches[2][0], atol=0.01)

  def test_record_number_tells_which_record_it_was(self):
    labels = self.epochs_of_labels(2, 20, seed=5).ravel()
    self.assertAllEqual(labels, [flowers.record_number(position, 20, 5)
                                 for position in range(40)])

  # Bad records: the third of six is bad in some way.

  def check_bad_record(self, bad, message):
    """`bad` is a tf.train.Example, or a function that damages the shard."""
    examples = [flowers.make_example(encoded_image(i), 'jpg', i % 3, 90, 110) for i in range(6)]
    if isinstance(bad, tf.train.Example):
      examples[2] = bad
    path = self.write_shard(examples)
    if callable(bad):
      bad(path)
    dataset = flowers.get_split('train', self.dir)
    self.assertEqual(dataset.num_samples, 6)
    with tf.Graph().as_default(), tf.Session() as session:
      batch = flowers.load_numbered_batch(dataset, 6, 71, 71, is_training=False)
      images, labels, positions = session.run(batch)
    self.assertAllEqual(positions, [0, 1, 3, 4, 5])
    self.assertAllEqual(labels, [0, 1, 0, 1, 2])
    self.assertEqual([index_of(image) for image in images], [0, 1, 3, 4, 5])

    # Training goes on without it, and its number is left out.
    with tf.Graph().as_default(), tf.Session() as session:
      batch = flowers.load_numbered_batch(dataset, 5, 71, 71, is_training=True, seed=1)
      positions = np.concatenate([session.run(batch)[2] for _ in range(4)])
    left_out = sorted(set(range(positions[-1] + 1)) - set(positions))
    self.assertNotEmpty(left_out)
    self.assertEqual({flowers.record_number(p, 6, 1) for p in left_out}, {2})

    reader = flowers.RecordReader(dataset)
    self.assertEqual(index_of(reader(1)[0] / 127.5 - 1), 1)
    with self.assertRaisesRegex(tfrecords.RecordError, message):
      reader(2)

  def test_no_good_record(self):
    good = flowers.make_example(encoded_image(1), 'jpg', 1, 90, 110)
    bad = flowers.make_example(b'BM', 'bmp', 1, 90, 110)
    self.write_shard([bad] * 50)
    dataset = flowers.get_split('train', self.dir)
    with self.assertRaisesRegex(flowers.DatasetError, 'None of 50 records can be used: .*record 0'):
      flowers.require_readable(dataset)
    with mock.patch.object(flowers, 'NUM_TRIED_RECORDS', 10):
      with self.assertRaisesRegex(flowers.DatasetError, 'None of 10 records can be used'):
        flowers.require_readable(dataset)
    with tf.Graph().as_default(), tf.Session() as session:
      with self.assertRaisesRegex(tf.errors.InvalidArgumentError, flowers.NO_GOOD_RECORD):
        session.run(flowers.load_batch(dataset, 4, 71, 71, is_training=True))
    # One good record is enough, wherever it is.
    self.write_shard([bad] * 20 + [good])
    dataset = flowers.get_split('train', self.dir)
    flowers.require_readable(dataset)
    with tf.Graph().as_default(), tf.Session() as session:
      _, labels = session.run(flowers.load_batch(dataset, 4, 71, 71, is_training=True))
    self.assertAllEqual(labels, [1] * 4)

  def test_a_label_outside_labels_txt(self):
    for label in (3, -1):
      self.check_bad_record(flowers.make_example(encoded_image(1), 'jpg', label, 90, 110),
                            f'its label is {label}, but labels.txt has the ids 0 to 2')

  def test_a_missing_key(self):
    for key in ('image/encoded', 'image/class/label'):
      example = flowers.make_example(encoded_image(1), 'jpg', 1, 90, 110)
      del example.features.feature[key]
      self.check_bad_record(example, f'{key}.* is required but could not be found')

  def test_a_key_of_another_type(self):
    example = flowers.make_example(encoded_image(1), 'jpg', 1, 90, 110)
    example.features.feature['image/class/label'].bytes_list.value.append(b'1')
    self.check_bad_record(example, 'image/class/label holds text instead of the id of the class')

  def test_a_one_hot_label(self):
    example = flowers.make_example(encoded_image(1), 'jpg', 1, 90, 110)
    example.features.feature['image/class/label'].int64_list.value.append(0)
    self.check_bad_record(example, 'image/class/label has 2 values instead of one')

  def test_an_image_that_does_not_decode(self):
    encoded = encoded_image(1)
    for broken in (encoded[:len(encoded) // 2], b'', b'<html>not found</html>', b'\xff\xd8\xff'):
      self.check_bad_record(flowers.make_example(broken, 'jpg', 1, 90, 110), '.')

  def test_a_flipped_bit(self):
    def flip(path):
      records = tfrecords.Records([path])
      with open(path, 'r+b') as f:
        content = bytearray(f.read())
        content[content.index(records[2]) + 100] ^= 4
        f.seek(0)
        f.write(content)

    self.check_bad_record(flip, 'its checksum is wrong: the file is damaged')
