"""Creates a TFRecord dataset from a folder that has one subfolder of images per class.

  creation.create_dataset('flower_photos', 'my_flowers')
"""

import collections
import concurrent.futures
import csv
import glob
import hashlib
import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tqdm

from records import flowers
from records import image_files

REJECTED_FILE = 'rejected.csv'
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff')
WRITE_WINDOW = 256  # images in memory at a time

Item = collections.namedtuple('Item', [  # one file of a class folder
    'path',
    'class_name',
    'reason',  # why the file cannot be used, or None
    'digest',  # bytes, SHA-256 of the file
    'kept_as',  # (format, height, width) of a file that is kept byte for byte, or None
])


def create_dataset(image_dir, dataset_dir, dataset_name=flowers.DATASET_NAME,
                   validation_fraction=0.1, num_shards=2, seed=0, num_workers=None,
                   labels_file=None, overwrite=False):
  """Writes a dataset and prints how many images of each class it has.

  Args:
    image_dir: folder with one subfolder per class. The subfolders' names become the
      class names.
    dataset_dir: folder to write to; created if missing.
    dataset_name: prefix of the shards' names.
    validation_fraction: float in [0, 1), share of each class that goes to the
      validation split; 0 writes no validation split.
    num_shards: number of files per split.
    seed: int of 0 or more that determines the split and the order.
    num_workers: number of images to decode in parallel; None means one per core. It
      does not change the result.
    labels_file: labels.txt with the ids of the classes; None numbers the class
      names in sorted order.
    overwrite: whether to replace an existing dataset of this name.

  Raises:
    flowers.DatasetError: the folders are unsuitable, or existing files would be
      replaced; nothing was written.
  """
  files = list_files(image_dir, dataset_dir)
  class_names = order_classes(files, labels_file)
  check_target(dataset_dir, dataset_name, class_names, overwrite)
  convert = image_files.Converter()
  with concurrent.futures.ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
    items = examine(files, convert, pool)
    splits = split_items(items, class_names, validation_fraction, seed)
    for name, split in splits.items():
      if len(split) < num_shards:
        raise flowers.DatasetError(f'--num_shards {num_shards} is more than the number of images '
                                   f'in the {name} split, {len(split)}')
    os.makedirs(dataset_dir, exist_ok=True)
    written = [path for name, split in splits.items() for path in write_split(
        split, class_names, convert, pool, dataset_dir, dataset_name, name, num_shards)]
  rejected = [item for item in items if item.reason]
  if rejected:
    written.append(write_rejected(rejected, image_dir, dataset_dir))
  written.append(write_labels(class_names, dataset_dir))
  replace_dataset(written, dataset_dir, dataset_name)
  print_table(class_names, splits, rejected)


def list_files(image_dir, dataset_dir):
  """Returns {class name: sorted paths} of the class folders in image_dir.

  Raises:
    flowers.DatasetError: image_dir does not have one folder of images per class.
  """
  if not os.path.isdir(image_dir):
    raise flowers.DatasetError(f'There is no folder {image_dir}: is --image_dir right?')
  entries = [entry for entry in _visible_entries(image_dir)
             if os.path.abspath(entry.path) != os.path.abspath(dataset_dir)]
  folders = [entry for entry in entries if entry.is_dir()]
  stray = [entry.name for entry in entries
           if not entry.is_dir() and entry.name.lower().endswith(IMAGE_SUFFIXES)]
  if stray:
    raise flowers.DatasetError(
        f'{len(stray)} images, such as {_printable(stray[0])}, are directly in {image_dir}: '
        'move each into the folder of its class')
  files = {}
  for folder in folders:
    _check_class_name(folder.name)
    children = list(_visible_entries(folder.path))
    if not children:
      raise flowers.DatasetError(f'The class folder {folder.path} is empty: fill or remove it')
    if all(child.is_dir() for child in children):
      raise flowers.DatasetError(
          f'{folder.path} has only folders in it: if the classes are one level deeper, use '
          f'--image_dir {folder.path}')
    files[folder.name] = [child.path for child in children]
  if len(files) < 2:
    raise flowers.DatasetError(f'{image_dir} needs at least 2 class folders, found {len(files)}')
  return files


def order_classes(files, labels_file):
  """Returns the class names in the order of their ids."""
  if labels_file is None:
    return list(files)
  class_names = flowers.read_labels_file(labels_file)
  if sorted(class_names) != sorted(files):
    unknown = sorted(set(files).difference(class_names))
    missing = sorted(set(class_names).difference(files))
    raise flowers.DatasetError(f'{labels_file} does not match the class folders: not in the file: '
                               f'{unknown or "none"}; without a folder: {missing or "none"}')
  return class_names


def check_target(dataset_dir, dataset_name, class_names, overwrite):
  """Raises DatasetError if existing files would be replaced without overwrite."""
  if overwrite:
    return
  existing = _shards(dataset_dir, dataset_name)
  rejected_file = os.path.join(dataset_dir, REJECTED_FILE)
  existing += [rejected_file] if os.path.exists(rejected_file) else []
  labels_file = os.path.join(dataset_dir, flowers.LABELS_FILE)
  if os.path.exists(labels_file) and flowers.read_labels(dataset_dir) != class_names:
    existing.append(labels_file)
  if existing:
    raise flowers.DatasetError(f'{existing[0]} exists: use --overwrite to replace the dataset, '
                               'or choose another --dataset_dir')


def examine(files, convert, pool):
  """Decodes every file once and returns an Item for each.

  Args:
    files: {class name: paths}.
    convert: image_files.Converter.
    pool: ThreadPoolExecutor.
  """
  def examine_file(class_name, path):
    try:
      content = _read(path)
      encoded, *kept_as = convert(content)
    except image_files.ImageError as error:
      return Item(path, class_name, str(error), None, None)
    digest = hashlib.sha256(content).digest()
    return Item(path, class_name, None, digest, kept_as if encoded is content else None)

  pairs = [(class_name, path) for class_name, paths in files.items() for path in paths]
  items = list(tqdm.tqdm(pool.map(lambda pair: examine_file(*pair), pairs), 'Reading',
                         total=len(pairs), unit=' images', disable=None))
  return reject_duplicates(items)


def reject_duplicates(items):
  """Rejects all but one of identical files in a class, and identical files in several classes."""
  by_digest = collections.defaultdict(list)
  for item in items:
    if item.reason is None:
      by_digest[item.digest].append(item)

  def judge(item):
    if item.reason:
      return item
    equals = by_digest[item.digest]
    others = [other for other in equals if other.class_name != item.class_name]
    if others:
      return item._replace(reason=f'same content as {_printable(others[0].path)} in another '
                           'class: which class is right?')
    if item is not equals[0]:
      return item._replace(reason=f'same content as {_printable(equals[0].path)}')
    return item

  return [judge(item) for item in items]


def split_items(items, class_names, validation_fraction, seed):
  """Splits the usable items of each class at random in the same proportion.

  Returns:
    {'train': items, 'validation': items}, each in random order; without 'validation'
    if it would be empty.

  Raises:
    flowers.DatasetError: no image of a class can be used.
  """
  train, validation = [], []
  for label, class_name in enumerate(class_names):
    usable = [item for item in items if item.class_name == class_name and item.reason is None]
    if not usable:
      reasons = [item.reason for item in items if item.class_name == class_name]
      raise flowers.DatasetError(f'No image of the class {class_name} can be used. The first: '
                                 f'{reasons[0]}')
    order = np.random.default_rng([seed, label]).permutation(len(usable))
    num_validation = round(validation_fraction * len(usable))
    if validation_fraction:
      # Every class gets a training image, and a validation image if it has a second one.
      num_validation = min(max(num_validation, 1), len(usable) - 1)
    validation += [usable[i] for i in order[:num_validation]]
    train += [usable[i] for i in order[num_validation:]]
  splits = {'train': train, 'validation': validation} if validation else {'train': train}
  for i, name in enumerate(splits):
    order = np.random.default_rng([seed, len(class_names), i]).permutation(len(splits[name]))
    splits[name] = [splits[name][j] for j in order]
  return splits


def write_split(items, class_names, convert, pool, dataset_dir, dataset_name, split_name,
                num_shards):
  """Writes the shards of a split under temporary names; returns their final paths."""
  labels = {name: label for label, name in enumerate(class_names)}

  def make_record(item):
    content = _read(item.path)
    if hashlib.sha256(content).digest() != item.digest:
      raise flowers.DatasetError(f'{_printable(item.path)} changed while the dataset was created: '
                                 'run the script again')
    encoded, image_format, height, width = (
        (content, *item.kept_as) if item.kept_as else convert(content))
    return flowers.make_example(
        encoded, image_format, labels[item.class_name], height, width).SerializeToString()

  paths = [os.path.join(dataset_dir, flowers.shard_name(split_name, i, num_shards, dataset_name))
           for i in range(num_shards)]
  writers = [tf.python_io.TFRecordWriter(path + '.tmp') for path in paths]
  with tqdm.tqdm(desc=f'Writing {split_name}', total=len(items), unit=' images',
                 disable=None) as progress:
    for start in range(0, len(items), WRITE_WINDOW):
      window = items[start:start + WRITE_WINDOW]
      for i, record in enumerate(pool.map(make_record, window), start):
        writers[i % num_shards].write(record)
        progress.update()
  for writer in writers:
    writer.close()
  return paths


def write_rejected(rejected, image_dir, dataset_dir):
  """Writes rejected.csv under a temporary name; returns its final path."""
  path = os.path.join(dataset_dir, REJECTED_FILE)
  with open(path + '.tmp', 'w', encoding='utf-8', newline='') as f:
    writer = csv.writer(f)
    writer.writerow(['file', 'reason'])
    for item in rejected:
      writer.writerow([_printable(os.path.relpath(item.path, image_dir)), item.reason])
  return path


def write_labels(class_names, dataset_dir):
  """Writes labels.txt under a temporary name; returns its final path."""
  path = os.path.join(dataset_dir, flowers.LABELS_FILE)
  with open(path + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
    f.writelines(f'{label}:{name}\n' for label, name in enumerate(class_names))
  return path


def replace_dataset(written, dataset_dir, dataset_name):
  """Removes the old dataset and gives the new files their final names, labels.txt last."""
  rejected_file = os.path.join(dataset_dir, REJECTED_FILE)
  old = _shards(dataset_dir, dataset_name)
  old += [rejected_file] if os.path.exists(rejected_file) else []
  for path in set(old).difference(written):
    os.remove(path)  # otherwise readers would mix old shards with new ones
  for path in written:
    os.replace(path + '.tmp', path)


def print_table(class_names, splits, rejected):
  """Prints how many images of each class are in each split and how many were rejected."""
  rejections = collections.Counter(item.class_name for item in rejected)
  counts = {name: collections.Counter(item.class_name for item in split)
            for name, split in splits.items()}
  width = max(len('class'), len('total'), *map(len, class_names))
  print(f'{"class":{width}} {"train":>10} {"validation":>10} {"rejected":>10}')
  rows = [(name, *(counts.get(split, {}).get(name, 0) for split in flowers.SPLITS),
           rejections[name]) for name in class_names]
  for name, *numbers in [*rows, ('total', *map(sum, list(zip(*rows))[1:]))]:
    print(f'{name:{width}} ' + ' '.join(f'{number:10}' for number in numbers))


def _visible_entries(folder):
  # Sorted by name, because the order of a listing depends on the file system.
  with os.scandir(folder) as entries:
    return sorted((entry for entry in entries if not entry.name.startswith('.')),
                  key=lambda entry: os.fsencode(entry.name))


def _check_class_name(name):
  if name != name.strip() or not name.isprintable():
    raise flowers.DatasetError(
        f'The class folder {_printable(name)!r} cannot be written to labels.txt: use a UTF-8 name '
        'without line breaks or leading or trailing spaces')


def _read(path):
  if not os.path.isfile(path):  # opening a pipe would block
    raise image_files.ImageError(
        'a folder inside a class folder' if os.path.isdir(path) else
        'a broken link' if os.path.islink(path) else 'not a file')
  try:
    with open(path, 'rb') as f:
      return f.read()
  except OSError as error:
    raise image_files.ImageError(f'it cannot be read: {error.strerror}') from error


def _shards(dataset_dir, dataset_name):
  pattern = flowers.name_pattern(dataset_name)
  return sorted(path for split in flowers.SPLITS for path in glob.glob(
      os.path.join(glob.escape(dataset_dir), pattern.replace('%s', split))))


def _printable(text):
  return text.encode('utf-8', 'backslashreplace').decode('utf-8')
