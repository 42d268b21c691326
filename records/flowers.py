"""The dataset format and the input pipeline that reads it.

A dataset is a folder of files like `flowers_train_00000-of-00002.tfrecord`, with
the same for validation, and a `labels.txt` that names the classes in lines like
`0:daisy`. Every record is a tf.train.Example, for instance

  image/encoded      b'\\xff\\xd8...'  the bytes of a JPEG or PNG file
  image/format       b'jpg'           or b'png'; not needed for reading
  image/class/label  3                an id in labels.txt
  image/height       240              pixels
  image/width        320              pixels

  dataset = flowers.get_split('train', 'dataset')
  images, labels = flowers.load_batch(dataset, 32, 299, 299, is_training=True)
"""

import codecs
import collections
import contextlib
import functools
import glob
import os
import re
import time
import unicodedata

import slim_bridge  # noqa: F401, before TensorFlow: see there

from google.protobuf import message as protobuf
import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import errors
from records import tfrecords
import xception_preprocessing

SPLITS = ('train', 'validation', 'test')
OTHER_SPLIT_NAMES = {'validation': ('valid', 'val')}  # in file names of other tools
LABELS_FILE = 'labels.txt'
DATASET_NAME = 'flowers'  # prefix of the file names
IMAGE_KEY = 'image/encoded'
LABEL_KEY = 'image/class/label'

READ_GROUP = 32  # records per call into Python, because each call costs about 0.1 ms
FIVE_DIGITS = '[0-9]' * 5
MAX_NAMED_BAD_RECORDS = 5  # bad records that are named; all are counted
NUM_TRIED_RECORDS = 1000  # a split is refused if none of so many can be used
LABEL_SCAN_SECS = 5  # time limit for reading labels when a split is opened
END_OF_EPOCH = -1  # among the positions of images
NO_GOOD_RECORD = 'No usable record in an entire epoch: run check_dataset.py'
ITEMS_TO_DESCRIPTIONS = {
    'image': 'A color image of varying size.',
    'label': 'The id of the class in labels.txt.',
}


class DatasetError(Exception):
  """A dataset that cannot be read or written; the message says what to do about it."""


class MissingSplitError(DatasetError):
  """A dataset without files of a split."""


def name_pattern(dataset_name):
  """Returns the file pattern of a dataset's shards for `get_split`, and of no others."""
  name = glob.escape(dataset_name).replace('%', '[%]')
  return f'{name}_%s_{FIVE_DIGITS}-of-{FIVE_DIGITS}.tfrecord'


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
      IMAGE_KEY: byte_string(encoded),
      'image/format': byte_string(image_format.encode()),
      LABEL_KEY: int64(label),
      'image/height': int64(height),
      'image/width': int64(width),
  }))


def is_class_name(text):
  """Returns whether a line of labels.txt can hold this name."""
  return text == text.strip() != '' and not any(
      unicodedata.category(character) in ('Cc', 'Cs', 'Zl', 'Zp') for character in text)


def read_labels(dataset_dir, labels_offset=0):
  """Reads the class names of a dataset's labels.txt; see `read_labels_file`."""
  return read_labels_file(os.path.join(dataset_dir, LABELS_FILE), labels_offset)


def read_labels_file(path, labels_offset=0):
  """Reads the class names of a labels file.

  Args:
    path: file with a line like 0:daisy for each class.
    labels_offset: int of 0 or more that is subtracted from the labels of the records.
      The ids in the file may be those before the subtraction: they may begin at
      labels_offset, or at 0 with the name "background".

  Returns:
    List of class names in Unicode's composed form (NFC), indexed by id.

  Raises:
    DatasetError: the file cannot be read, or its ids are not consecutive.
  """
  names = _parse_labels(path, _read_lines(path))
  ids = sorted(names)
  if ids[0] not in (0, labels_offset) or ids != list(range(ids[0], ids[0] + len(ids))):
    hint = ('. Records whose labels begin at 1 are read with --labels_offset 1'
            if ids[0] == 1 else '')
    raise DatasetError(f'{path}: the ids of {len(ids)} classes must be 0 to {len(ids) - 1}, got '
                       f'{ids if len(ids) < 10 else f"{ids[0]} to {ids[-1]}"}{hint}')
  first = labels_offset if ids[0] == 0 and names[0].lower() == 'background' else 0
  return [names[label] for label in ids[first:]]


def _read_lines(path):
  try:
    with open(path, encoding='utf-8-sig') as f:
      return [line.strip() for line in f]
  except OSError as error:
    raise DatasetError(f'Cannot read {path} ({error.strerror}): a dataset needs this file, '
                       'with a line like 0:daisy for each class') from error
  except UnicodeDecodeError as error:
    is_utf_16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    raise DatasetError(f'{path} is not UTF-8 text ({error}): convert it, for instance with '
                       f'iconv -f {"UTF-16" if is_utf_16 else "LATIN1"} -t UTF-8') from error


def _parse_labels(path, lines):
  """Returns {id: class name}."""
  names = {}
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    match = re.fullmatch(r'([0-9]+)(?:\s*:\s*|\s+)(\S.*)', line)
    if not match or not is_class_name(match[2]):
      raise DatasetError(f'{path}, line {number}: expected id:name like 0:daisy, got {line!r}')
    label = int(match[1])
    if label in names:
      raise DatasetError(f'{path}, line {number}: id {label} is already {names[label]!r}')
    names[label] = unicodedata.normalize('NFC', match[2])
  if not names:
    raise DatasetError(f'{path} is empty: expected a line like 0:daisy for each class')
  return names


def get_split(split_name, dataset_dir, file_pattern=None, reader=None, dataset_name=DATASET_NAME,
              image_key=IMAGE_KEY, label_key=LABEL_KEY, labels_offset=0):
  """Opens one split of a dataset.

  The keyword arguments describe datasets of other tools, and are the values of
  `arguments.dataset_options`.

  Args:
    split_name: 'train', 'validation' or 'test'.
    dataset_dir: folder of the TFRecord files and labels.txt.
    file_pattern: glob pattern of the file names in dataset_dir, in which %s stands
      for split_name; None means the shards of dataset_name.
    reader: TensorFlow reader class for slim's DatasetDataProvider; None means
      tf.TFRecordReader.
    dataset_name: prefix of the file names.
    image_key, label_key: keys of the encoded image and of the label in a record.
    labels_offset: int of 0 or more to subtract from the labels of the records.

  Returns:
    A slim Dataset with data_sources (sorted paths), reader, decoder of the items
    'image' (uint8 [height, width, 3]) and 'label' (int64 []), num_samples (a count
    of the records), num_classes, labels_to_names, `records` (the
    `tfrecords.Records` of the files), and the last three arguments.

  Raises:
    ValueError: the split is unknown.
    MissingSplitError: the split has no files.
    DatasetError: shards are missing or from several runs, the files hold no
      records, labels.txt is invalid, or the labels need another labels_offset.
  """
  if split_name not in SPLITS:
    raise ValueError(f'Unknown split {split_name!r}: use one of {", ".join(SPLITS)}')
  if file_pattern and '%s' not in file_pattern:
    raise ValueError(f'file_pattern must contain %s in place of the split, got {file_pattern!r}')
  class_names = read_labels(dataset_dir, labels_offset)
  files = _find_shards(dataset_dir, file_pattern or name_pattern(dataset_name), split_name)
  records = tfrecords.Records(files)
  if not len(records):
    raise DatasetError('; '.join(records.damages) or f'{", ".join(files)} hold no records')

  items_to_handlers = {
      'image': slim.tfexample_decoder.ItemHandlerCallback(
          image_key, lambda features: xception_preprocessing.decode(features[image_key])),
      'label': slim.tfexample_decoder.ItemHandlerCallback(
          label_key, lambda features: features[label_key] - labels_offset),
  }
  dataset = slim.dataset.Dataset(
      data_sources=files,
      reader=reader or tf.TFRecordReader,
      decoder=slim.tfexample_decoder.TFExampleDecoder(
          _keys_to_features(image_key, label_key), items_to_handlers),
      num_samples=len(records),
      items_to_descriptions=ITEMS_TO_DESCRIPTIONS,
      num_classes=len(class_names),
      labels_to_names=dict(enumerate(class_names)),
      records=records, image_key=image_key, label_key=label_key, labels_offset=labels_offset)
  _check_labels_offset(dataset, os.path.join(dataset_dir, LABELS_FILE))
  return dataset


def _keys_to_features(image_key, label_key):
  # Without defaults, so that a record that lacks a key is an error and not class 0.
  return {image_key: tf.FixedLenFeature((), tf.string),
          label_key: tf.FixedLenFeature((), tf.int64)}


def _find_shards(dataset_dir, pattern, split_name):
  """Returns the sorted paths of a split; raises DatasetError unless every shard exists."""
  files_of = {split: _find_files(dataset_dir, pattern, split) for split in SPLITS}
  paths = files_of.pop(split_name)
  if not paths:
    pattern = pattern.replace('%s', split_name).replace('[0-9]', '?')
    raise MissingSplitError(f'No file matches {os.path.join(dataset_dir, pattern)}: check '
                            '--dataset_dir, --dataset_name and --file_pattern')
  for other, files in files_of.items():
    if shared := sorted(set(paths).intersection(files)):
      raise DatasetError(f'{shared[0]} would be in the splits {split_name} and {other}: use a '
                         f'--file_pattern in which %s is where they differ, not {pattern}')
  shards = collections.defaultdict(set)  # {(text before, text after): {(shard, number of shards)}}
  for path in paths:
    if match := re.fullmatch(r'(.*)(?<!\d)(\d+)-of-(\d+)([^/]*)', path, re.DOTALL):
      shards[match[1], match[4]].add((match[2], match[3]))
  for (head, tail), texts in shards.items():
    digits = min(len(shard) for shard, _ in texts)  # 1 if they are not padded with zeros
    found = {(int(shard), int(total)) for shard, total in texts}
    num_shards = max(total for _, total in found)
    # Other tools number shards from 1.
    first = 1 if (num_shards, num_shards) in found and (0, num_shards) not in found else 0
    expected = {(shard, num_shards) for shard in range(first, first + num_shards)}

    def path_of(numbers, head=head, tail=tail, digits=digits):
      return '{}{:0{digits}d}-of-{:0{digits}d}{}'.format(head, *numbers, tail, digits=digits)

    if unexpected := sorted(found - expected):
      raise DatasetError(f'{path_of(unexpected[0])} is not one of the {num_shards} shards beside '
                         'it: remove the files of the older dataset')
    missing = [path for path in map(path_of, sorted(expected - found)) if not os.path.exists(path)]
    if missing:
      raise DatasetError(f'{len(missing)} of {num_shards} shards are missing, such as '
                         f'{missing[0]}: copy or create them again')
  return paths


def _find_files(dataset_dir, pattern, split_name):
  """Returns the sorted paths of the files of a split, under the first of its names that any has."""
  for name in (split_name, *OTHER_SPLIT_NAMES.get(split_name, ())):
    if paths := glob.glob(os.path.join(glob.escape(dataset_dir), pattern.replace('%s', name))):
      return sorted(paths)
  return []


def _check_labels_offset(dataset, labels_file):
  """Raises DatasetError if the labels of the records begin one too high or too low.

  With many classes, the labels outside labels.txt would be a small share of the
  records, and all other images would be trained as the neighbouring class.
  Labels are read in random order until the first and the last class are found, for
  at most LABEL_SCAN_SECS.
  """
  last = dataset.num_classes - 1
  wanted = {0, last} if dataset.labels_offset else {0}
  seen = set()
  deadline = time.monotonic() + LABEL_SCAN_SECS
  for number in np.random.default_rng(0).permutation(dataset.num_samples):
    seen.add(read_label(dataset, number))
    if wanted <= seen or time.monotonic() > deadline:
      break
  else:
    if (dataset.labels_offset and seen == set(range(last))
        and 0 in _parse_labels(labels_file, _read_lines(labels_file))):
      raise DatasetError(
          f'{labels_file} has {last + 1} ids from 0 on, but with --labels_offset '
          f'{dataset.labels_offset} no record of {dataset.data_sources[0]} is of the last class, '
          f'{dataset.labels_to_names[last]}. If id 0 is no class, call it background; if that '
          f'class really has no records, let the ids begin at {dataset.labels_offset}')
  shift = 1 if 0 not in seen and last + 1 in seen else -1 if last not in seen and -1 in seen else 0
  if shift and dataset.labels_offset + shift >= 0:
    offset = dataset.labels_offset
    outside, absent = (last + 1, 0) if shift > 0 else (-1, last)
    raise DatasetError(
        f'{dataset.data_sources[0]}: no record has the label {absent + offset}, but some have '
        f'{outside + offset}; with --labels_offset {offset}, {LABELS_FILE} names {offset} to '
        f'{last + offset}. Use --labels_offset {offset + shift} or, if the other splits refuse '
        f'that, remove the records labelled {outside + offset}')


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


# AutoGraph has nothing to convert in here. It takes half a second, and the code that it writes
# to the temporary folder stays there when the process is killed.
@tf.autograph.experimental.do_not_convert
def load_numbered_batch(dataset, batch_size, height, width, is_training, seed=0, first_image=0,
                        num_readers=4, num_preprocessing_threads=tf.data.AUTOTUNE,
                        worker=0, num_workers=1,
                        area_range=xception_preprocessing.AREA_RANGE):
  """Does what `load_batch` does and also returns the position of each image.

  Several workers divide the images among themselves, and each reads only its own. In
  training each worker gets its share of every batch, so together they see what a
  single worker would see. At evaluation each gets every num_workers-th image, in
  batches of batch_size.

  Args:
    worker, num_workers: this worker's index and the number of workers, which must
      divide batch_size.
    area_range: see `xception_preprocessing.preprocess_image`.

  Returns:
    images, labels: see `load_batch`; in training, batch_size / num_workers of them.
    positions: int64, positions of the images in the sequence of all images, in
      ascending order. A missing position is that of a bad record (see
      `training_position`). `record_number` converts a training position to a record
      number; at evaluation the two are equal.
  """
  share = batch_size // num_workers if is_training else batch_size

  def read(positions):
    return np.array([_read_or_empty(dataset, position, seed, is_training)
                     for position in positions], object)

  def read_group(indices):
    positions = indices
    if is_training:
      positions = tf.where(tf.equal(indices, END_OF_EPOCH), indices, training_position(
          indices, first_image, batch_size, worker, num_workers))
    records = tf.numpy_function(read, [positions], tf.string, stateful=False)
    return positions, tf.ensure_shape(records, [None])

  with tf.device('/cpu:0'), tf.name_scope('load_batch'):
    if is_training:
      # Of any 2 n consecutive positions, n are a whole epoch.
      indices = _endless_indices(2 * dataset.num_samples)
    else:
      indices = tf.data.Dataset.range(worker, dataset.num_samples, num_workers)
    images = (indices
              .batch(READ_GROUP)
              .map(read_group, num_readers)
              .unbatch()
              .map(functools.partial(_load_image, dataset, height, width, is_training, seed,
                                     area_range),
                   num_preprocessing_threads)
              .ignore_errors())
    if is_training:
      images = images.scan(tf.constant(0, tf.int64), _count_epoch).filter(
          lambda image, label, position: tf.not_equal(position, END_OF_EPOCH))
    return _next_batch(images, share, drop_remainder=is_training)


def _next_batch(images, batch_size, drop_remainder):
  """Returns the tensors of the next batch of a tf.data.Dataset."""
  # Closing a session waits for the thread that tunes its pipeline. That thread can miss the
  # signal and sleep on, for about a minute. Reading is no slower without it.
  options = tf.data.Options()
  options.autotune.enabled = False
  batches = (images
             .batch(batch_size, drop_remainder)
             .prefetch(tf.data.AUTOTUNE)
             .with_options(options))
  return tf.data.make_one_shot_iterator(batches).get_next()


def _endless_indices(num_images):
  """Returns a tf.data.Dataset of 0, 1, 2, ... with END_OF_EPOCH after every num_images."""
  return tf.data.Dataset.range(tf.int64.max // num_images).flat_map(
      lambda epoch: tf.data.Dataset.range(epoch * num_images, (epoch + 1) * num_images)
      .concatenate(tf.data.Dataset.from_tensors(tf.constant(END_OF_EPOCH, tf.int64))))


def _load_image(dataset, height, width, is_training, seed, area_range, position, record):
  """Parses, decodes and preprocesses a record; returns its image, label and position."""
  def load():
    features = tf.parse_single_example(
        record, _keys_to_features(dataset.image_key, dataset.label_key))
    encoded = features[dataset.image_key]
    label = features[dataset.label_key] - dataset.labels_offset
    with tf.control_dependencies([tf.debugging.Assert(
        (label >= 0) & (label < dataset.num_classes), [label])]):
      if is_training:
        image = xception_preprocessing.decode_and_distort(
            encoded, height, width, tf.stack([tf.constant(seed, tf.int64), position]), area_range)
      else:
        image = xception_preprocessing.preprocess_for_eval(
            xception_preprocessing.decode(encoded), height, width)
    return image, label

  if not is_training:
    return (*load(), position)
  image, label = tf.cond(
      tf.equal(position, END_OF_EPOCH),
      lambda: (tf.zeros([height, width, 3]), tf.constant(0, tf.int64)), load)
  return image, label, position


def _count_epoch(num_images, element):
  """Counts the images since the last END_OF_EPOCH; fails at the next one if there are none."""
  is_end = tf.equal(element[-1], END_OF_EPOCH)
  with tf.control_dependencies([
      tf.debugging.Assert(~is_end | (num_images > 0), [NO_GOOD_RECORD])]):
    return tf.where(is_end, tf.zeros_like(num_images), num_images + 1), element


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


def _read_or_empty(dataset, position, seed, is_training):
  if position == END_OF_EPOCH:
    return b''
  number = record_number(position, dataset.num_samples, seed) if is_training else position
  try:
    return dataset.records[number]
  except tfrecords.RecordError:
    return b''  # cannot be parsed, so it is skipped like any other bad record


def read_label(dataset, number):
  """Reads the label of a record, without decoding its image.

  Args:
    dataset: slim Dataset from `get_split`.
    number: int, number of the record.

  Returns:
    The label minus labels_offset, an int that may be outside [0, num_classes); None if
    the record is damaged or has no single label.
  """
  try:
    features = tf.train.Example.FromString(dataset.records[number]).features.feature
    label, = features[dataset.label_key].int64_list.value
  except (tfrecords.RecordError, protobuf.DecodeError, ValueError):
    return None
  return label - dataset.labels_offset


def count_labels(dataset):
  """Reads every record and returns the number of records of each class, a list of ints.

  Bad records are not counted.

  Raises:
    DatasetError: a class has no records.
  """
  labels = collections.Counter(read_label(dataset, i) for i in range(dataset.num_samples))
  counts = [labels[label] for label in range(dataset.num_classes)]
  if 0 in counts:
    raise DatasetError(f'The class {dataset.labels_to_names[counts.index(0)]!r} has no records: '
                       'classes cannot be balanced without them')
  return counts


def require_readable(dataset):
  """Raises DatasetError if a split has no record that can be used.

  Tries records from all parts of the split, NUM_TRIED_RECORDS at most, until one is good.
  """
  read = RecordReader(dataset)
  numbers = np.linspace(0, dataset.num_samples - 1,
                        min(dataset.num_samples, NUM_TRIED_RECORDS)).astype(int)
  for number in numbers:
    try:
      read(number)
      return
    except tfrecords.RecordError:
      pass
  raise DatasetError(f'None of {len(numbers)} records can be used: '
                     + describe_bad_record(dataset, 0))


def describe_bad_record(dataset, number):
  """Returns a description like 'FILE, record 12: its checksum is wrong'."""
  path, index = dataset.records.locate(number)
  try:
    RecordReader(dataset)(number)
  except tfrecords.RecordError as error:
    return f'{path}, record {index}: {error}'
  return (f'{path}, record {index}: it could not be read at first but can be read now: check the '
          'disk or the network file system')


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
      raise tfrecords.RecordError(
          self._describe_label(record) or errors.reason(error)) from error
    if not 0 <= label < self._dataset.num_classes:
      raise tfrecords.RecordError(f'its label is {label}, but labels.txt has the ids 0 to '
                                  f'{self._dataset.num_classes - 1}')
    return image, int(label)

  def _describe_label(self, record):
    """Returns what is wrong with a label that is not one whole number, such as a name."""
    with contextlib.suppress(protobuf.DecodeError):
      label = tf.train.Example.FromString(record).features.feature[self._dataset.label_key]
      if len(label.int64_list.value) > 1:
        return (f'{self._dataset.label_key} has {len(label.int64_list.value)} values instead of '
                'one, the id of the class')
      if label.bytes_list.value or label.float_list.value:
        return (f'{self._dataset.label_key} holds {"text" if label.bytes_list.value else "floats"} '
                'instead of the id of the class, an int64: write the records with ids')
    return None
