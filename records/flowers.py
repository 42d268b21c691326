"""The dataset format and the input pipeline that reads it.

A dataset is a folder of files like `flowers_train_00000-of-00002.tfrecord`, with
the same for validation, and a `labels.txt` that names the classes in lines like
`0:daisy`. Every record is a tf.train.Example, for instance

  image/encoded      b'\\xff\\xd8...'  the bytes of a JPEG or PNG file
  image/format       b'jpg'           or b'png'
  image/class/label  3                an id in labels.txt
  image/height       240              pixels
  image/width        320              pixels

  dataset = flowers.get_split('train', 'dataset')
  images, labels = flowers.load_batch(dataset, 32, 299, 299, is_training=True)
"""

import functools
import glob
import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

from google.protobuf import message
import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from records import tfrecords
import xception_preprocessing

SPLITS = ('train', 'validation')
LABELS_FILE = 'labels.txt'
DATASET_NAME = 'flowers'  # first part of the file names

READ_GROUP = 32  # records per call into Python, because each call costs about 0.1 ms
MAX_NAMED_BAD_RECORDS = 5  # bad records that are named; all are counted
MAX_FIRST_BAD = 100  # a dataset that begins with so many bad records is refused

# Without defaults, so that a record that lacks a key is an error and not class 0.
KEYS_TO_FEATURES = {
    'image/encoded': tf.FixedLenFeature((), tf.string),
    'image/format': tf.FixedLenFeature((), tf.string),
    'image/class/label': tf.FixedLenFeature((), tf.int64),
}
ITEMS_TO_DESCRIPTIONS = {
    'image': 'A color image of varying size.',
    'label': 'The id of the class in labels.txt.',
}


class DatasetError(Exception):
  """A dataset that cannot be read or written; the message says what to do about it."""


class MissingSplitError(DatasetError):
  """A dataset without files of a split."""


def name_pattern(dataset_name):
  """Returns the file pattern of a dataset for `get_split`, such as flowers_%s_*.tfrecord."""
  return f'{dataset_name}_%s_*.tfrecord'


def shard_name(split_name, shard, num_shards, dataset_name=DATASET_NAME):
  """Returns the file name of a shard, such as flowers_train_00000-of-00002.tfrecord."""
  return f'{dataset_name}_{split_name}_{shard:05d}-of-{num_shards:05d}.tfrecord'


def make_example(encoded, image_format, label, height, width):
  """Builds the record of one image.

  Args:
    encoded: bytes of a JPEG or PNG file.
    image_format: 'jpg' or 'png'.
    label: int, an id in labels.txt.
    height, width: ints, size of the image in pixels.

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
  """Reads the class names of a labels file.

  Args:
    path: file with a line like 0:daisy for each class.

  Returns:
    List of class names, indexed by id.

  Raises:
    DatasetError: the file cannot be read, or its ids are not 0, 1, 2, ...
  """
  try:
    with open(path, encoding='utf-8-sig') as f:
      lines = [line.strip() for line in f]
  except OSError as error:
    raise DatasetError(f'Cannot read {path} ({error.strerror}): a dataset needs this file, '
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
    raise DatasetError(f'{path} is empty: expected a line like 0:daisy for each class')
  if sorted(names) != list(range(len(names))):
    raise DatasetError(f'{path}: the ids of {len(names)} classes must be 0 to '
                       f'{len(names) - 1}, got {sorted(names)}')
  return [names[label] for label in range(len(names))]


def get_split(split_name, dataset_dir, file_pattern=None, reader=None):
  """Opens one split of a dataset.

  Args:
    split_name: 'train' or 'validation'.
    dataset_dir: folder of the TFRecord files and labels.txt.
    file_pattern: glob pattern of the file names in dataset_dir, in which %s stands
      for split_name; None means 'flowers_%s_*.tfrecord'.
    reader: TensorFlow reader class for slim's DatasetDataProvider; None means
      tf.TFRecordReader.

  Returns:
    A slim Dataset with data_sources (sorted paths), reader, decoder of the items
    'image' (uint8 [height, width, 3]) and 'label' (int64 []), num_samples (a count
    of the records), num_classes, labels_to_names, and `records`, the
    `tfrecords.Records` of the files.

  Raises:
    ValueError: the split is unknown.
    MissingSplitError: the split has no files.
    DatasetError: the files hold no records, or labels.txt is invalid.
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
                       f'The {len(files)} files of {pattern} hold no records')

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

  Training repeats the records without end, each epoch in a different order. The
  order and the distortions depend only on `seed` and on the number of images before,
  so training that resumes with `first_image` sees the same images as uninterrupted
  training. Evaluation reads the records once and in order; its last batch may be
  smaller.

  Records that cannot be used are skipped; `load_numbered_batch` shows which ones.

  Args:
    dataset: slim Dataset from `get_split`.
    batch_size: images per step, summed over towers.
    height, width: output size in pixels.
    is_training: Python bool; True shuffles and distorts, False takes the
      central crops in order.
    seed: int of 0 or more that determines the order and the distortions.
    first_image: int, number of training images to skip.
    num_readers: number of record groups to read in parallel.
    num_preprocessing_threads: number of images to preprocess in parallel; tf.data
      chooses it by default.

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
  """Does what `load_batch` does and also returns the position of each image.

  Several workers divide the images among themselves, and each reads only its own. In
  training each worker gets its share of every batch, so together they see what a
  single worker would see. At evaluation each gets every num_workers-th image, in
  batches of batch_size.

  Args:
    worker, num_workers: this worker's index and the number of workers, which must
      divide batch_size.

  Returns:
    images, labels: see `load_batch`; in training, batch_size / num_workers of them.
    positions: int64, positions of the images in the sequence of all images, in
      ascending order. A missing position is that of a bad record (see
      `training_position`). `record_number` converts a training position to a record
      number; at evaluation the two are equal.
  """
  share = batch_size // num_workers if is_training else batch_size

  def read(positions):
    numbers = [record_number(position, dataset.num_samples, seed) for position in positions
               ] if is_training else positions
    return np.array([_read_or_empty(dataset.records, number) for number in numbers], object)

  def read_group(positions):
    if is_training:
      positions = training_position(positions, first_image, batch_size, worker, num_workers)
    records = tf.numpy_function(read, [positions], tf.string, stateful=False)
    return positions, tf.ensure_shape(records, [None])

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
  """Converts an index among one worker's images to a position among all training images.

  Args:
    index: int or int64 tensor, index of the image among the worker's images.
    first_image: position at which the first batch begins.
    batch_size: images per step, summed over workers.
    worker, num_workers: the worker's index and the number of workers.
  """
  share = batch_size // num_workers
  return first_image + index // share * batch_size + worker * share + index % share


def record_number(position, num_samples, seed):
  """Returns the number of the record that training reads at a position.

  Args:
    position: int, number of training images before this one.
    num_samples: number of records; each is read once per epoch.
    seed: int of 0 or more.
  """
  epoch, index = divmod(int(position), num_samples)
  return int(_epoch_order(num_samples, seed, epoch)[index])


@functools.lru_cache(maxsize=4)  # at the end of an epoch, some readers are in the next one
def _epoch_order(num_samples, seed, epoch):
  return np.random.default_rng([seed, epoch]).permutation(num_samples)


def _read_or_empty(records, number):
  try:
    return records[number]
  except tfrecords.RecordError:
    return b''  # cannot be parsed, so it is skipped like any other bad record


def read_label(dataset, number):
  """Returns the label of a record without decoding its image; None for a bad record."""
  try:
    features = tf.train.Example.FromString(dataset.records[number]).features.feature
    label, = features['image/class/label'].int64_list.value
  except (tfrecords.RecordError, message.DecodeError, ValueError):
    return None
  return label if 0 <= label < dataset.num_classes else None


def count_labels(dataset):
  """Reads every record and returns the number of records of each class, a list of ints.

  Bad records are not counted.

  Raises:
    DatasetError: a class has no records.
  """
  labels = [read_label(dataset, number) for number in range(dataset.num_samples)]
  counts = np.bincount([label for label in labels if label is not None],
                       minlength=dataset.num_classes).tolist()
  if 0 in counts:
    raise DatasetError(f'The class {dataset.labels_to_names[counts.index(0)]!r} has no records: '
                       'classes cannot be balanced without them')
  return counts


def require_readable(dataset):
  """Raises DatasetError if none of the first records can be used.

  The pipeline skips bad records, so it would search such a dataset forever.
  """
  read = RecordReader(dataset)
  for number in range(min(dataset.num_samples, MAX_FIRST_BAD)):
    try:
      read(number)
      return
    except tfrecords.RecordError:
      pass
  raise DatasetError(f'None of the first {number + 1} records can be used: '
                     + describe_bad_record(dataset, 0))


def describe_bad_record(dataset, number):
  """Returns a description like 'FILE, record 12: its checksum is wrong'."""
  path, index = dataset.records.locate(number)
  try:
    RecordReader(dataset)(number)
  except tfrecords.RecordError as error:
    return f'{path}, record {index}: {error}'
  return f'{path}, record {index}: it was unreadable before but is readable now'


class RecordReader:
  """Decodes single records outside the pipeline and explains why a record is bad."""

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
      tfrecords.RecordError: the record is damaged, lacks a key, cannot be decoded, or
        has a label that is not in labels.txt.
    """
    record = self._dataset.records[number]
    try:
      image, label = self._session.run(self._fetches, {self._record: record})
    except tf.errors.OpError as error:
      # The reason comes before the name of the operation that failed.
      message = error.message.split('[[{{node')[0].strip().splitlines()[-1]
      raise tfrecords.RecordError(message) from error
    if not 0 <= label < self._dataset.num_classes:
      raise tfrecords.RecordError(f'its label is {label}, but labels.txt has the ids 0 to '
                                  f'{self._dataset.num_classes - 1}')
    return image, int(label)
