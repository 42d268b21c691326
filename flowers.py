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

import functools
import glob
import os

import slim_bridge  # noqa: F401, first: tf_slim does not import without it.

from google.protobuf import message
import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

import tfrecords
import xception_preprocessing

SPLITS = ('train', 'validation')
LABELS_FILE = 'labels.txt'
DATASET_NAME = 'flowers'  # first part of the file names

# Records that one call of Python reads: a call costs some 0.1 ms.
READ_GROUP = 32

MAX_NAMED_BAD_RECORDS = 5  # named one by one; all are counted
MAX_FIRST_BAD = 100  # bad records in a row, at which a dataset is taken for another's

# No defaults: a record without one of these is an error, not class 0.
KEYS_TO_FEATURES = {
    'image/encoded': tf.FixedLenFeature((), tf.string),
    'image/format': tf.FixedLenFeature((), tf.string),
    'image/class/label': tf.FixedLenFeature((), tf.int64),
}
ITEMS_TO_DESCRIPTIONS = {
    'image': 'A color image of varying size.',
    'label': 'The id of the class, as in labels.txt.',
}


class DatasetError(Exception):
  """A dataset that cannot be read; the message says what to do about it."""


class MissingSplitError(DatasetError):
  """A dataset has no file of a split."""


def name_pattern(dataset_name):
  """Returns the pattern of a dataset's files, for `get_split`: flowers_%s_*.tfrecord."""
  return f'{dataset_name}_%s_*.tfrecord'


def shard_name(split_name, shard, num_shards, dataset_name=DATASET_NAME):
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
  """Reads the class names of a dataset's labels.txt; see `read_labels_file`."""
  return read_labels_file(os.path.join(dataset_dir, LABELS_FILE))


def read_labels_file(path):
  """Reads class names.

  Args:
    path: file of lines like 0:daisy.

  Returns:
    List of class names; a name's index is its id.

  Raises:
    DatasetError: the file is missing, empty, or not `id:name` lines that number
      the classes 0, 1, 2, ...
  """
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
    num_samples (counted), num_classes, labels_to_names, and `records`, the
    `tfrecords.Records` of the files.

  Raises:
    ValueError: unknown split.
    MissingSplitError: no file.
    DatasetError: no record, or a bad labels.txt.
  """
  if split_name not in SPLITS:
    raise ValueError(f'Unknown split {split_name!r}: use one of {", ".join(SPLITS)}')
  class_names = read_labels(dataset_dir)
  pattern = (file_pattern or name_pattern(DATASET_NAME)).replace('%s', split_name)
  files = sorted(glob.glob(os.path.join(glob.escape(dataset_dir), pattern)))
  if not files:
    raise MissingSplitError(f'No file matches {os.path.join(dataset_dir, pattern)}: '
                            'is --dataset_dir right, and --dataset_name?')
  records = tfrecords.Records(files)
  if not len(records):
    raise DatasetError('; '.join(records.damages) or
                       f'The {len(files)} files of {pattern} hold no record')

  items_to_handlers = {
      'image': slim.tfexample_decoder.Image(dct_method=xception_preprocessing.DCT_METHOD),
      'label': slim.tfexample_decoder.Tensor('image/class/label'),
  }
  return slim.dataset.Dataset(
      data_sources=files,
      reader=reader or tf.TFRecordReader,
      decoder=slim.tfexample_decoder.TFExampleDecoder(KEYS_TO_FEATURES, items_to_handlers),
      num_samples=len(records),
      items_to_descriptions=ITEMS_TO_DESCRIPTIONS,
      num_classes=len(class_names),
      labels_to_names=dict(enumerate(class_names)),
      records=records)


def load_batch(dataset, batch_size, height, width, is_training, seed=0, first_image=0,
               num_readers=4, num_preprocessing_threads=tf.data.AUTOTUNE):
  """Reads, decodes and preprocesses batches of images.

  Training never ends: it goes through the records epoch after epoch, each time
  in another order. Order and distortions are a pure function of `seed` and of
  how many images came before, so that training which resumes with
  `first_image` sees what it would have seen uninterrupted. Evaluation goes
  through the records once, in order, and the last batch may be smaller.

  A record that cannot be used is passed over; `load_numbered_batch` tells which.

  Args:
    dataset: slim Dataset from `get_split`.
    batch_size: images per step, summed over towers.
    height, width: output size in pixels.
    is_training: Python bool; True shuffles and distorts, False takes the
      central crops in order.
    seed: int of 0 or more, of the order and the distortions.
    first_image: int, number of training images to pass over.
    num_readers: groups of records read at the same time.
    num_preprocessing_threads: images preprocessed at the same time; by default
      tf.data finds the best number.

  Returns:
    images: float32 [batch_size, height, width, 3] in [-1, 1].
    labels: int64 [batch_size] in [0, num_classes).
    Their first dimension is unknown at evaluation, which ends with
    tf.errors.OutOfRangeError.
  """
  images, labels, _ = load_numbered_batch(
      dataset, batch_size, height, width, is_training, seed, first_image, num_readers,
      num_preprocessing_threads)
  return images, labels


def load_numbered_batch(dataset, batch_size, height, width, is_training, seed=0, first_image=0,
                        num_readers=4, num_preprocessing_threads=tf.data.AUTOTUNE,
                        worker=0, num_workers=1):
  """Does what `load_batch` does, and tells which images of the endless row they are.

  Several workers share the images without reading those of the others. In
  training each has its part of every batch: together they see what one sees
  alone. At evaluation each has every num_workers-th image, in batches of
  batch_size.

  Args:
    worker, num_workers: which worker's images; batch_size divides by num_workers.

  Returns:
    images, labels: see `load_batch`; in training, batch_size / num_workers.
    positions: int64, their numbers, rising; a number that is left out is that
      of a bad record (see `training_position`). `record_number` turns a
      position of training into a record; at evaluation they are the same.
  """
  share = batch_size // num_workers if is_training else batch_size

  def read(positions):
    numbers = [record_number(position, dataset.num_samples, seed) for position in positions
               ] if is_training else positions
    return np.array([_read_or_empty(dataset.records, number) for number in numbers], object)

  # AutoGraph has nothing to convert here. It takes half a second, and the code that it writes
  # into the temporary folder stays there when training is killed.
  @tf.autograph.experimental.do_not_convert
  def read_group(positions):
    if is_training:
      positions = training_position(positions, first_image, batch_size, worker, num_workers)
    records = tf.numpy_function(read, [positions], tf.string, stateful=False)
    return positions, tf.ensure_shape(records, [None])

  @tf.autograph.experimental.do_not_convert
  def load_image(position, record):
    features = tf.parse_single_example(record, KEYS_TO_FEATURES)
    encoded, label = features['image/encoded'], features['image/class/label']
    with tf.control_dependencies([tf.debugging.Assert(
        (label >= 0) & (label < dataset.num_classes), [label])]):
      if is_training:
        image = xception_preprocessing.decode_and_distort(
            encoded, height, width, tf.stack([tf.constant(seed, tf.int64), position]))
      else:
        image = xception_preprocessing.preprocess_for_eval(
            xception_preprocessing.decode(encoded), height, width)
    return image, label, position

  with tf.device('/cpu:0'), tf.name_scope('load_batch'):
    if is_training:
      positions = tf.data.Dataset.range(tf.int64.max)
    else:
      positions = tf.data.Dataset.range(worker, dataset.num_samples, num_workers)
    batches = (positions
               .batch(READ_GROUP)
               .map(read_group, num_readers)
               .unbatch()
               .map(load_image, num_preprocessing_threads)
               .ignore_errors()
               .batch(share, drop_remainder=is_training)
               .prefetch(tf.data.AUTOTUNE))
    return tf.data.make_one_shot_iterator(batches).get_next()


def training_position(index, first_image, batch_size, worker=0, num_workers=1):
  """Returns the position, in the endless row of all images, of one in a worker's own row.

  Args:
    index: int or int64 tensor, of the image in the worker's row.
    first_image: position that the first batch begins with.
    batch_size: images per step, summed over workers.
    worker, num_workers: whose row it is.
  """
  share = batch_size // num_workers
  return first_image + index // share * batch_size + worker * share + index % share


def record_number(position, num_samples, seed):
  """Returns the number of the record that training reads at a position.

  Args:
    position: int, images before it since training began.
    num_samples: records of the dataset; each is read once an epoch.
    seed: int of 0 or more.
  """
  epoch, index = divmod(int(position), num_samples)
  return int(_epoch_order(num_samples, seed, epoch)[index])


@functools.lru_cache(maxsize=4)  # one epoch for each of the readers at its end
def _epoch_order(num_samples, seed, epoch):
  return np.random.default_rng([seed, epoch]).permutation(num_samples)


def _read_or_empty(records, number):
  try:
    return records[number]
  except tfrecords.RecordError:
    return b''  # does not parse, and is passed over like any other bad record


def count_labels(dataset):
  """Reads every record once, and returns how many there are of each class, a list of ints.

  Bad records are left out.

  Raises:
    DatasetError: a class has none.
  """
  counts = [0] * dataset.num_classes
  for number in range(dataset.num_samples):
    try:
      example = tf.train.Example.FromString(dataset.records[number])
    except (tfrecords.RecordError, message.DecodeError):
      continue
    values = example.features.feature['image/class/label'].int64_list.value
    if len(values) == 1 and 0 <= values[0] < dataset.num_classes:
      counts[values[0]] += 1
  if 0 in counts:
    raise DatasetError(f'No record of class {dataset.labels_to_names[counts.index(0)]!r}: '
                       'classes cannot be balanced without it')
  return counts


def require_readable(dataset):
  """Fails if not even one of the first records can be used.

  A pipeline that passes bad records over would look for a good one for ever.

  Raises:
    DatasetError: it names the first record and what is wrong with it.
  """
  read = RecordReader(dataset)
  for number in range(min(dataset.num_samples, MAX_FIRST_BAD)):
    try:
      read(number)
      return
    except tfrecords.RecordError:
      pass
  raise DatasetError('Not one of the first records can be used: '
                     + describe_bad_record(dataset, 0))


def describe_bad_record(dataset, number):
  """Returns 'file, record 12: what is wrong with it'."""
  path, index = dataset.records.locate(number)
  try:
    RecordReader(dataset)(number)
  except tfrecords.RecordError as error:
    return f'{path}, record {index}: {error}'
  return f'{path}, record {index}: it could not be read, but now it can'


class RecordReader:
  """Reads records one by one, outside of the pipeline, and tells what is wrong with a bad one."""

  def __init__(self, dataset):
    """Initializes the reader; `dataset` is a slim Dataset from `get_split`."""
    self._dataset = dataset
    with tf.Graph().as_default():
      self._record = tf.placeholder(tf.string, [])
      self._fetches = dataset.decoder.decode(self._record, ['image', 'label'])
      self._session = tf.Session(config=tf.ConfigProto(device_count={'GPU': 0}))

  def __call__(self, number):
    """Returns a record's image, uint8 [height, width, 3], and its label, int.

    Raises:
      tfrecords.RecordError: it is damaged, lacks a key, does not decode, or its
        label is not in labels.txt.
    """
    record = self._dataset.records[number]
    try:
      image, label = self._session.run(self._fetches, {self._record: record})
    except tf.errors.OpError as error:
      # What went wrong stands in front of the name of the op that it befell.
      message = error.message.split('[[{{node')[0].strip().splitlines()[-1]
      raise tfrecords.RecordError(message) from error
    if not 0 <= label < self._dataset.num_classes:
      raise tfrecords.RecordError(f'its label is {label}, but labels.txt has the ids 0 to '
                                  f'{self._dataset.num_classes - 1}')
    return image, int(label)
