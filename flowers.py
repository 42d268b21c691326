"""The flowers as TFRecords: their format, and the input pipeline that reads them.

A dataset is a folder of `flowers_train_00000-of-00002.tfrecord` files and their
validation siblings beside `labels.txt`, whose lines `0:daisy` name the classes.
Every record is a tf.train.Example with, for instance,

  image/encoded      b'\\xff\\xd8...'  the bytes of a JPEG or PNG file
  image/format       b'jpg'           or b'png'
  image/class/label  3                an id of labels.txt
  image/height       240              pixels
  image/width        320              pixels

  dataset = flowers.get_split('train', 'dataset')
  images, labels = flowers.load_batch(dataset, 32, 299, 299, is_training=True)
"""

import os
import struct

import slim_bridge  # noqa: F401, first: tf_slim does not import without it.

import tensorflow.compat.v1 as tf
import tf_slim as slim

import xception_preprocessing

SPLITS = ('train', 'validation')
LABELS_FILE = 'labels.txt'
FILE_PATTERN = 'flowers_%s_*.tfrecord'

# Encoded records that are held to be shuffled: about 400 MB of photographs.
SHUFFLE_BUFFER = 4096

ITEMS_TO_DESCRIPTIONS = {
    'image': 'A color image of varying size.',
    'label': 'The id of the class, as in labels.txt.',
}


class DatasetError(Exception):
  """A dataset that cannot be read; the message says what to do about it."""


def shard_name(split_name, shard, num_shards, dataset_name='flowers'):
  """Returns the file name of one shard: flowers_train_00000-of-00002.tfrecord."""
  return f'{dataset_name}_{split_name}_{shard:05d}-of-{num_shards:05d}.tfrecord'


def make_example(encoded, image_format, label, height, width):
  """Builds the record of one image.

  Args:
    encoded: bytes of a JPEG or PNG file.
    image_format: 'jpg' or 'png'.
    label: int, an id of labels.txt.
    height, width: ints, the image's size in pixels.

  Returns:
    A tf.train.Example.
  """
  def int64(value):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  def byte_string(value):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

  return tf.train.Example(features=tf.train.Features(feature={
      'image/encoded': byte_string(encoded),
      'image/format': byte_string(image_format.encode()),
      'image/class/label': int64(label),
      'image/height': int64(height),
      'image/width': int64(width),
  }))


def read_labels(dataset_dir):
  """Reads the class names of labels.txt.

  Args:
    dataset_dir: folder of the dataset.

  Returns:
    List of class names; a name's index is its id.

  Raises:
    DatasetError: the file is missing, empty, or not `id:name` lines that number
      the classes 0, 1, 2, ...
  """
  path = os.path.join(dataset_dir, LABELS_FILE)
  try:
    with open(path, encoding='utf-8-sig') as f:
      lines = [line.strip() for line in f]
  except OSError as error:
    raise DatasetError(f'Cannot read {path} ({error.strerror}): a dataset needs it, '
                       'with a line like 0:daisy for each class') from error
  except UnicodeDecodeError as error:
    raise DatasetError(f'{path} is not UTF-8 text ({error})') from error

  names = {}
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    label, _, name = line.partition(':')
    label, name = label.strip(), name.strip()
    if not (label.isascii() and label.isdigit() and name):
      raise DatasetError(f'{path}, line {number}: expected id:name like 0:daisy, got {line!r}')
    if int(label) in names:
      raise DatasetError(f'{path}, line {number}: id {int(label)} is already '
                         f'{names[int(label)]!r}')
    names[int(label)] = name
  if not names:
    raise DatasetError(f'{path} names no class: expected a line like 0:daisy for each')
  if sorted(names) != list(range(len(names))):
    raise DatasetError(f'{path}: the ids of {len(names)} classes must be 0 to '
                       f'{len(names) - 1}, got {sorted(names)}')
  return [names[label] for label in range(len(names))]


def count_records(path):
  """Counts the records of one TFRecord file by their length headers.

  Nothing but 12 bytes a record is read, so it takes microseconds a record.

  Raises:
    DatasetError: the file ends inside a record.
  """
  # A record is its length (uint64), the length's CRC (4 bytes), data, CRC (4).
  count = 0
  size = os.path.getsize(path)
  with open(path, 'rb') as f:
    while f.tell() < size:
      header = f.read(12)
      if len(header) < 12 or f.tell() + struct.unpack('<Q', header[:8])[0] + 4 > size:
        raise DatasetError(f'{path} is damaged: it ends inside record {count}. '
                           'Make or copy the file again')
      f.seek(struct.unpack('<Q', header[:8])[0] + 4, os.SEEK_CUR)
      count += 1
  return count


def get_split(split_name, dataset_dir, file_pattern=None, reader=None):
  """Describes one split of a dataset.

  Args:
    split_name: 'train' or 'validation'.
    dataset_dir: folder of the TFRecord files and labels.txt.
    file_pattern: pattern of the split's file names below dataset_dir, in which
      a %s stands for split_name; None is 'flowers_%s_*.tfrecord'.
    reader: TensorFlow reader class, for slim's DatasetDataProvider; None is
      tf.TFRecordReader.

  Returns:
    A slim Dataset: data_sources (sorted file names), reader, decoder of the
    items 'image' (uint8 [height, width, 3]) and 'label' (int64 []),
    num_samples (counted), num_classes, labels_to_names.

  Raises:
    ValueError: unknown split.
    DatasetError: no file, no record, or a bad labels.txt.
  """
  if split_name not in SPLITS:
    raise ValueError(f'Unknown split {split_name!r}: use one of {", ".join(SPLITS)}')
  class_names = read_labels(dataset_dir)
  pattern = file_pattern or FILE_PATTERN
  pattern = os.path.join(dataset_dir, pattern % split_name if '%s' in pattern else pattern)
  files = sorted(tf.gfile.Glob(pattern))
  if not files:
    raise DatasetError(f'No file matches {pattern}: is --dataset_dir right?')
  num_samples = sum(count_records(path) for path in files)
  if not num_samples:
    raise DatasetError(f'The {len(files)} files of {pattern} hold no record')

  # No defaults: a record without one of these keys is an error, not class 0.
  keys_to_features = {
      'image/encoded': tf.FixedLenFeature((), tf.string),
      'image/format': tf.FixedLenFeature((), tf.string),
      'image/class/label': tf.FixedLenFeature((), tf.int64),
  }
  items_to_handlers = {
      # Accurate: the same pixels as PIL's and OpenCV's.
      'image': slim.tfexample_decoder.Image(dct_method='INTEGER_ACCURATE'),
      'label': slim.tfexample_decoder.Tensor('image/class/label'),
  }
  return slim.dataset.Dataset(
      data_sources=files,
      reader=reader or tf.TFRecordReader,
      decoder=slim.tfexample_decoder.TFExampleDecoder(keys_to_features, items_to_handlers),
      num_samples=num_samples,
      items_to_descriptions=ITEMS_TO_DESCRIPTIONS,
      num_classes=len(class_names),
      labels_to_names=dict(enumerate(class_names)))


def load_batch(dataset, batch_size, height, width, is_training, seed=0, first_image=0,
               num_readers=4, num_preprocessing_threads=tf.data.AUTOTUNE):
  """Reads, decodes and preprocesses batches of images.

  Training never ends: it goes through the records epoch after epoch, each time
  in another order. Order and distortions are a pure function of `seed` and of
  how many images came before, so that training which resumes with
  `first_image` sees what it would have seen uninterrupted. Evaluation goes
  through the records once, in order, and the last batch may be smaller.

  Args:
    dataset: slim Dataset from `get_split`.
    batch_size: images per step, summed over towers.
    height, width: output size in pixels.
    is_training: Python bool; True shuffles and distorts, False takes the
      central crops in order.
    seed: int, of the order and the distortions.
    first_image: int, number of training images to pass over.
    num_readers: files read at the same time while training.
    num_preprocessing_threads: images preprocessed at the same time; by default
      tf.data finds the best number.

  Returns:
    images: float32 [batch_size, height, width, 3] in [-1, 1].
    labels: int64 [batch_size] in [0, num_classes).
    Their first dimension is unknown at evaluation, which ends with
    tf.errors.OutOfRangeError. A record that cannot be read is an error of
    which `read_error_message` makes a sentence.
  """
  def load_image(index, record_and_path):
    record, path = record_and_path
    image, label = dataset.decoder.decode(record, ['image', 'label'])
    with tf.control_dependencies([_assert_label(label, dataset.num_classes, path)]):
      label = tf.identity(label)
    image = xception_preprocessing.preprocess_image(
        image, height, width, is_training, add_image_summaries=False,
        seed=tf.stack([seed, index]))
    return image, label

  with tf.device('/cpu:0'), tf.name_scope('load_batch'):
    if is_training:
      records = _shuffled_records(dataset, seed, first_image, num_readers)
    else:
      records = _records_of(dataset.data_sources).enumerate()
    batches = (records
               .map(load_image, num_preprocessing_threads)
               .batch(batch_size, drop_remainder=is_training)
               .prefetch(tf.data.AUTOTUNE))
    return tf.data.make_one_shot_iterator(batches).get_next()


def read_error_message(error):
  """Returns what was wrong with a record, or None if `error` has another cause.

  Args:
    error: tf.errors.OpError raised by a session that ran `load_batch`.
  """
  # The op that failed is one of the pipeline's own graph, which error.op does
  # not know; the message ends with the op that asked for the batch.
  if 'IteratorGetNext' not in error.message:
    return None
  message = error.message.removeprefix('Graph execution error:').strip()
  return f'A record cannot be read: {message.splitlines()[0]}'


def _shuffled_records(dataset, seed, first_image, num_readers):
  """Endless dataset of (index, (record, path)); index counts all images ever read."""
  def epoch_records(epoch):
    epoch_seed = tf.random.stateless_uniform(
        [], tf.stack([tf.constant(seed, tf.int64), epoch]), maxval=tf.int64.max, dtype=tf.int64)
    files = tf.data.Dataset.from_tensor_slices(dataset.data_sources)
    files = files.shuffle(len(dataset.data_sources), epoch_seed)
    # Undecoded records are shuffled: a hundredth of the memory of images.
    return files.interleave(
        lambda path: _records_of([path]), cycle_length=num_readers,
        num_parallel_calls=num_readers, deterministic=True,
    ).shuffle(min(SHUFFLE_BUFFER, dataset.num_samples), epoch_seed)

  first_epoch, passed_over = divmod(first_image, dataset.num_samples)
  epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
  return (epochs.flat_map(epoch_records)
          .enumerate(first_epoch * dataset.num_samples)
          .skip(passed_over))


def _records_of(paths):
  """Dataset of (record, path) of the files in order."""
  return tf.data.Dataset.from_tensor_slices(paths).flat_map(
      lambda path: tf.data.TFRecordDataset(path).map(lambda record: (record, path)))


def _assert_label(label, num_classes, path):
  message = tf.strings.format(
      'its label is {}, ' + f'but labels.txt has the ids 0 to {num_classes - 1}; file {{}}',
      [label, path])
  return tf.debugging.Assert((label >= 0) & (label < num_classes), [message])
