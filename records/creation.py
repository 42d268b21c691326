"""Creates a TFRecord dataset from a folder that has one subfolder of images per class.

  creation.create_dataset('flower_photos', 'my_flowers')
"""

import collections
import concurrent.futures
import contextlib
import csv
import glob
import hashlib
import os
import shlex
import tempfile
import unicodedata

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tqdm

from common import files
from common import terminal
from records import flowers
from records import image_files

VALIDATION_FRACTION = 0.1
NUM_SHARDS = 2
WRITE_WINDOW = 256  # images in memory at a time
MAX_LISTED_CLASSES = 50  # in the printed table
MAX_SHARDS = 99_999  # the file names have five digits

# Names, in upper or lower case, of the subfolders of an image folder that is already split.
SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'validation',
                 'valid': 'validation', 'validation': 'validation', 'dev': 'validation',
                 'eval': 'validation', 'test': 'test', 'testing': 'test'}
# Folders that operating systems and storage devices leave behind.
SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', 'lost+found', '$RECYCLE.BIN', 'System Volume Information')

Item = collections.namedtuple('Item', [  # one file of a class folder
    'path',
    'split',  # name of its split, or None if it is to be drawn
    'class_name',
    'reason',  # why the file cannot be used, or None
    'digest',  # bytes, SHA-256 of the file
    'kept_as',  # (format, height, width) of a file that is kept byte for byte, or None
])


def create_dataset(image_dir, dataset_dir, dataset_name=flowers.DATASET_NAME,
                   validation_fraction=None, num_shards=None, seed=0, num_workers=None,
                   labels_file=None, overwrite=False):
  """Writes a dataset and prints how many images of each class it has.

  Args:
    image_dir: folder with one subfolder per class, whose names become the class
      names; or folder with the subfolders train and validation or test, each with one
      subfolder per class, which become the splits as they are.
    dataset_dir: folder to write to; created if missing.
    dataset_name: prefix of the shards' names.
    validation_fraction: float in [0, 1), share of each class that goes to the
      validation split; 0 writes no validation split. None means VALIDATION_FRACTION;
      it must be None for images that are already split.
    num_shards: number of files per split; None means NUM_SHARDS, or one for a split of one image.
    seed: int of 0 or more that determines the split and the order.
    num_workers: number of images to decode in parallel; None means one per core. It
      does not change the result.
    labels_file: labels.txt with the ids of the classes; None numbers the class
      names in sorted order.
    overwrite: whether to replace an existing dataset of this name.

  Raises:
    flowers.DatasetError: the folders are unsuitable, or existing files would be
      replaced. Nothing is written then.
  """
  if os.sep in dataset_name or not flowers.is_class_name(dataset_name):
    raise flowers.DatasetError(
        f'--dataset_name {dataset_name!r} cannot be used as a file name prefix')
  splits = find_splits(image_dir, dataset_dir)
  if validation_fraction is not None and None not in splits:
    raise flowers.DatasetError(f'{image_dir} is already split into {", ".join(splits)}: leave out '
                               '--validation_fraction')
  class_names = order_classes(image_dir, splits, labels_file)
  check_target(dataset_dir, dataset_name, class_names, overwrite)
  convert = image_files.Converter()
  with concurrent.futures.ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
    items = examine(splits, convert, pool)
    items_of = split_items(items, class_names, VALIDATION_FRACTION
                           if validation_fraction is None else validation_fraction, seed)
    shards_of = count_shards(items_of, num_shards)
    rejected = [item for item in items if item.reason]
    with new_files(dataset_dir, lambda: _existing_files(dataset_dir, dataset_name)) as folder:
      for split_name, split in items_of.items():
        paths = [os.path.join(folder, flowers.shard_name(split_name, i, shards_of[split_name],
                                                         dataset_name))
                 for i in range(shards_of[split_name])]
        write_split(split, class_names, convert, pool, paths, f'Writing {split_name}')
      if rejected:
        write_rejected(rejected, image_dir, os.path.join(folder, rejected_name(dataset_name)))
      write_labels(class_names, folder)
  print_table(class_names, items_of, rejected)
  if rejected:
    path = os.path.join(dataset_dir, rejected_name(dataset_name))
    print(f'{len(rejected)} files or folders were rejected: {path} says why')
  if validation_fraction != 0:
    print_classes_without_images(class_names, items_of)


def find_splits(image_dir, dataset_dir):
  """Finds the images.

  Returns:
    {split name: {class name: sorted paths}}; the name is None for images that are not
    split yet.

  Raises:
    flowers.DatasetError: the folders are unsuitable.
  """
  folders = _subfolders(image_dir, dataset_dir)
  names = {name: SPLIT_FOLDERS.get(name.lower()) for name in folders}
  train = [name for name in names if names[name] == 'train']
  if len(set(names.values()) - {None}) < 2 or not train or (
      None in names.values() and not _has_classes(folders[train[0]])):
    return {None: find_classes(image_dir, folders)}
  for name in names:
    if list(names.values()).count(names[name]) > 1 or names[name] is None:
      raise flowers.DatasetError(
          f'{image_dir} has the folders {", ".join(names)}: for images that are already split, it '
          'needs one folder each for train and validation or test, and no others')
  splits = {}
  for name in sorted(names, key=lambda name: flowers.SPLITS.index(names[name])):
    if not _has_classes(folders[name]):
      raise flowers.DatasetError(
          f'{folders[name]} is a split by its name, but its images are not in class folders: move '
          'each into one, or use --image_dir with the folder of another split')
    splits[names[name]] = find_classes(folders[name], _subfolders(folders[name], dataset_dir))
    if unknown := splits[names[name]].keys() - splits['train'].keys():
      raise flowers.DatasetError(f'{folders[name]} has the class {min(unknown)}, but '
                                 f'{folders[train[0]]} does not')
  return splits


def find_classes(image_dir, folders):
  """Returns {class name: sorted paths} of class folders, {name: path}."""
  if stray := _images_in(image_dir):
    raise flowers.DatasetError(
        f'{len(stray)} images, such as {_printable(stray[0])}, are directly in {image_dir}: '
        'move each into the folder of its class')
  paths = {}
  for name, folder in folders.items():
    if not flowers.is_class_name(name):
      raise flowers.DatasetError(
          f'The class name {_printable(name)!r} cannot be written to labels.txt: give the folder a '
          'UTF-8 name without line breaks or leading or trailing spaces')
    name = unicodedata.normalize('NFC', name)
    if name in paths:
      raise flowers.DatasetError(f'{image_dir} has two folders named {name}, in different '
                                 'Unicode forms: put the images into one')
    children = _visible_entries(folder)
    if not children:
      raise flowers.DatasetError(f'The class folder {folder} is empty: fill or remove it')
    if all(child.is_dir() for child in children):
      raise flowers.DatasetError(f'{folder} contains only folders: if the classes are one level '
                                 f'deeper, use --image_dir {shlex.quote(folder)}')
    paths[name] = [child.path for child in children]
  return paths


def order_classes(image_dir, splits, labels_file):
  """Returns the class names in the order of their ids; splits are those of `find_splits`."""
  folders = next(iter(splits.values()))
  if len(folders) < 2:
    raise flowers.DatasetError(f'{image_dir} needs at least 2 class folders, found {len(folders)}')
  if labels_file is None:
    return list(folders)
  class_names = flowers.read_labels_file(labels_file)
  if sorted(class_names) != sorted(folders):
    unknown = sorted(set(folders).difference(class_names))
    missing = sorted(set(class_names).difference(folders))
    twice = sorted({name for name in class_names if class_names.count(name) > 1})
    raise flowers.DatasetError(
        f'{labels_file} does not match the class folders: not in the file: {unknown or "none"}; '
        f'without a folder: {missing or "none"}; more than once in the file: {twice or "none"}')
  return class_names


def check_target(dataset_dir, dataset_name, class_names, overwrite):
  """Raises DatasetError if files that must not be replaced would be."""
  if '://' in dataset_dir:
    raise flowers.DatasetError(f'--dataset_dir must be a folder of this machine, got {dataset_dir}')
  files.require_writable(dataset_dir)
  existing = _existing_files(dataset_dir, dataset_name)
  others = _other_shards(dataset_dir, dataset_name)
  labels_file = os.path.join(dataset_dir, flowers.LABELS_FILE)
  if (os.path.exists(labels_file) and (others or not existing or not overwrite)
      and flowers.read_labels(dataset_dir) != class_names):
    if others:
      raise flowers.DatasetError(f'{labels_file} lists other classes and is also used by '
                                 f'{others[0]}: choose another --dataset_dir')
    if not existing:
      raise flowers.DatasetError(f'{labels_file} lists other classes, and no dataset here is '
                                 f'called {dataset_name}: choose another --dataset_dir')
  if existing and not overwrite:
    raise flowers.DatasetError(f'{existing[0]} exists: use --overwrite to replace the dataset, '
                               'or choose another --dataset_dir')


def count_shards(items_of, num_shards=None):
  """Returns {split name: number of its shards} of splits, {split name: items}.

  Raises:
    flowers.DatasetError: a split has fewer images than num_shards.
  """
  if num_shards is None:
    return {split_name: min(NUM_SHARDS, len(items)) for split_name, items in items_of.items()}
  for split_name, items in items_of.items():
    if num_shards > min(len(items), MAX_SHARDS):
      raise flowers.DatasetError(
          f'--num_shards {num_shards} is more than {MAX_SHARDS}' if num_shards > MAX_SHARDS else
          f'--num_shards {num_shards} is more than the number of images in the {split_name} split, '
          f'{len(items)}')
  return dict.fromkeys(items_of, num_shards)


def examine(splits, convert, pool):
  """Decodes every file once and returns an Item for each.

  Args:
    splits: see `find_splits`.
    convert: image_files.Converter.
    pool: ThreadPoolExecutor.
  """
  def examine_file(split_name, class_name, path):
    try:
      content = _read(path)
      encoded, *kept_as = convert(content)
    except image_files.ImageError as error:
      return Item(path, split_name, class_name, str(error), None, None)
    digest = hashlib.sha256(content).digest()
    return Item(path, split_name, class_name, None, digest,
                kept_as if encoded is content else None)

  found = [(split_name, class_name, path) for split_name, classes in splits.items()
           for class_name, paths in classes.items() for path in paths]
  items = list(tqdm.tqdm(pool.map(lambda file: examine_file(*file), found), 'Reading',
                         total=len(found), unit=' images', disable=None))
  return reject_duplicates(items)


def reject_duplicates(items):
  """Rejects all but the first of identical files, and all of them if their classes differ."""
  first, first_of_other_class = {}, {}
  for item in items:
    if item.reason is None:
      equal = first.setdefault(item.digest, item)
      if equal.class_name != item.class_name:
        first_of_other_class.setdefault(item.digest, item)

  def judge(item):
    if item.reason:
      return item
    equal, other = first[item.digest], first_of_other_class.get(item.digest)
    if other:
      other = equal if item.class_name != equal.class_name else other
      return item._replace(reason=f'same content as {_printable(other.path)} in another class: '
                           'which class is right?')
    if item is not equal:
      return item._replace(reason=f'same content as {_printable(equal.path)}')
    return item

  return [judge(item) for item in items]


def split_items(items, class_names, validation_fraction, seed):
  """Splits the usable items of each class at random in the same proportion.

  Items that have a split keep it.

  Returns:
    {split name: items}, each in random order, without empty splits.

  Raises:
    flowers.DatasetError: no training image of a class can be used.
  """
  usable, reasons = collections.defaultdict(list), {}
  for item in items:
    if item.reason is None:
      usable[item.split, item.class_name].append(item)
    elif item.split in (None, 'train'):
      reasons.setdefault(item.class_name, item.reason)
  splits = {name: [] for name in flowers.SPLITS}
  for label, class_name in enumerate(class_names):
    undivided = usable[None, class_name]
    order = np.random.default_rng([seed, label]).permutation(len(undivided))
    num_validation = round(validation_fraction * len(undivided))
    if validation_fraction and undivided:
      # Every class gets a training image, and a validation image if it has a second one.
      num_validation = min(max(num_validation, 1), len(undivided) - 1)
    splits['validation'] += [undivided[i] for i in order[:num_validation]]
    splits['train'] += [undivided[i] for i in order[num_validation:]]
    for split_name in flowers.SPLITS:
      splits[split_name] += usable[split_name, class_name]
    if not undivided and not usable['train', class_name]:
      raise flowers.DatasetError(f'No image of the class {class_name} can be used. The first: '
                                 f'{reasons[class_name]}')
  splits = {name: split for name, split in splits.items() if split}
  for i, (name, split) in enumerate(splits.items()):
    order = np.random.default_rng([seed, len(class_names), i]).permutation(len(split))
    splits[name] = [split[j] for j in order]
  return splits


@contextlib.contextmanager
def new_files(dataset_dir, find_old_files=tuple):
  """Yields a folder whose files move to dataset_dir at the end of the context.

  After an error or an interrupt, none of them remain.

  Args:
    dataset_dir: folder of the files; created if missing.
    find_old_files: function that returns the paths of the files that they replace.
  """
  is_new = not os.path.isdir(dataset_dir)
  os.makedirs(dataset_dir, exist_ok=True)
  try:
    with tempfile.TemporaryDirectory(prefix='.new-', dir=dataset_dir) as folder:
      yield folder
      names = os.listdir(folder)
      if flowers.LABELS_FILE in names:  # without it, nothing reads a mix of old and new shards
        with contextlib.suppress(FileNotFoundError):
          os.remove(os.path.join(dataset_dir, flowers.LABELS_FILE))
      for path in find_old_files():
        if os.path.basename(path) not in names:
          os.remove(path)  # readers would mix old shards with new ones
      # labels.txt comes last, because it makes the dataset complete.
      for name in sorted(names, key=lambda name: name == flowers.LABELS_FILE):
        os.replace(os.path.join(folder, name), os.path.join(dataset_dir, name))
  except BaseException:
    if is_new:
      with contextlib.suppress(OSError):
        os.rmdir(dataset_dir)
    raise


def write_split(items, class_names, convert, pool, paths, description):
  """Writes items to TFRecord files in turn.

  Args:
    items: list of Items.
    class_names: class names in the order of their ids.
    convert: image_files.Converter.
    pool: ThreadPoolExecutor.
    paths: paths of the files.
    description: text for the progress bar.
  """
  labels = {name: label for label, name in enumerate(class_names)}

  def make_record(item):
    try:
      content = _read(item.path)
    except image_files.ImageError:
      content = b''
    if hashlib.sha256(content).digest() != item.digest:
      raise flowers.DatasetError(f'{_printable(item.path)} changed while the dataset was created: '
                                 'run the script again')
    encoded, image_format, height, width = (
        (content, *item.kept_as) if item.kept_as else convert(content))
    example = flowers.make_example(encoded, image_format, labels[item.class_name], height, width)
    return example.SerializeToString(deterministic=True)

  with contextlib.ExitStack() as stack:
    progress = stack.enter_context(tqdm.tqdm(
        desc=description, total=len(items), unit=' images', disable=None))
    writers = [stack.enter_context(tf.python_io.TFRecordWriter(os.fsencode(path)))
               for path in paths]
    for start in range(0, len(items), WRITE_WINDOW):
      window = items[start:start + WRITE_WINDOW]
      for i, record in enumerate(pool.map(make_record, window), start):
        writers[i % len(writers)].write(record)
        progress.update()


def rejected_name(dataset_name):
  """Returns the name of the file that lists what was rejected from a dataset."""
  return f'{dataset_name}_rejected.csv'


def write_rejected(rejected, image_dir, path):
  """Writes the table of the rejected files and the reasons."""
  with open(path, 'w', encoding='utf-8', newline='') as f:
    writer = csv.writer(f)
    writer.writerow(['file', 'reason'])
    for item in rejected:
      writer.writerow([_printable(os.path.relpath(item.path, image_dir)), item.reason])


def write_labels(class_names, folder):
  """Writes labels.txt."""
  with open(os.path.join(folder, flowers.LABELS_FILE), 'w', encoding='utf-8', newline='\n') as f:
    f.writelines(f'{label}:{name}\n' for label, name in enumerate(class_names))


def print_table(class_names, splits, rejected):
  """Prints how many images of each class are in each split and how many were rejected."""
  columns = {name: splits.get(name, []) for name in flowers.SPLITS[:2]} | splits
  columns['rejected'] = rejected
  counts = [collections.Counter(item.class_name for item in items) for items in columns.values()]
  listed = class_names[:MAX_LISTED_CLASSES]
  width = max(len('class'), len('total'), *map(terminal.text_width, listed))
  print(f'{"class":{width}} ' + ' '.join(f'{name:>10}' for name in columns))
  for name in listed:
    print(terminal.pad(name, width), ' '.join(f'{count[name]:10}' for count in counts))
  if len(listed) < len(class_names):
    print(f'... and {len(class_names) - len(listed)} more classes')
  print(f'{"total":{width}} ' + ' '.join(f'{count.total():10}' for count in counts))


def print_classes_without_images(class_names, splits):
  """Prints which classes have no images in the validation split or in another one."""
  for split_name in flowers.SPLITS:
    if split_name not in splits:
      if split_name == 'validation':
        print('Note: there is no validation split')
      continue
    without = sorted(set(class_names).difference(
        item.class_name for item in splits[split_name]), key=class_names.index)
    if without:
      print(f'Note: the {split_name} split has no images of {len(without)} of {len(class_names)} '
            f'classes ({", ".join(without[:3])}{", ..." if len(without) > 3 else ""})')


def _subfolders(folder, dataset_dir):
  """Returns {name: path} of the subfolders, without dataset_dir and other datasets."""
  if not os.path.isdir(folder):
    raise flowers.DatasetError(f'There is no folder {folder}: is --image_dir right?')
  folders = {}
  for entry in _visible_entries(folder):
    if entry.is_symlink() and not os.path.exists(entry.path):
      raise flowers.DatasetError(f'{_printable(entry.path)} is a broken link: repair or remove it')
    if not entry.is_dir():
      continue
    has_images = bool(_images_in(entry.path)) or _has_classes(entry.path)
    if os.path.realpath(entry.path) != os.path.realpath(dataset_dir):
      if has_images or not _shards_in(entry.path):
        folders[entry.name] = entry.path
    elif has_images:
      raise flowers.DatasetError(f'--dataset_dir {dataset_dir} is a class folder: choose another')
  return folders


def _has_classes(folder):
  return not _images_in(folder) and any(entry.is_dir() for entry in _visible_entries(folder))


def _images_in(folder):
  """Returns the names of the files that look like images."""
  return [entry.name for entry in _visible_entries(folder)
          if not entry.is_dir() and entry.name.lower().endswith(image_files.SUFFIXES)]


def _visible_entries(folder):
  # Sorted by name, because the order of a listing depends on the file system.
  with os.scandir(folder) as entries:
    return sorted((entry for entry in entries if not entry.name.startswith('.')
                   and entry.name not in SYSTEM_FOLDERS),
                  key=lambda entry: os.fsencode(entry.name))


def _read(path):
  if not os.path.isfile(path):  # opening a pipe would block
    raise image_files.ImageError(
        'a folder inside a class folder; files in it: '
        f'{sum(len(names) for *_, names in os.walk(path))}' if os.path.isdir(path) else
        'a broken link' if os.path.islink(path) else 'not a file')
  try:
    with open(path, 'rb') as f:
      return f.read()
  except OSError as error:
    raise image_files.ImageError(f'it cannot be read: {error.strerror}') from error


def _existing_files(dataset_dir, dataset_name):
  """Returns the paths of the files that a new dataset replaces, except labels.txt."""
  pattern = flowers.name_pattern(dataset_name)
  paths = [path for split_name in flowers.SPLITS for path in glob.glob(
      os.path.join(glob.escape(dataset_dir), pattern.replace('%s', split_name)))]
  rejected_file = os.path.join(dataset_dir, rejected_name(dataset_name))
  return sorted(paths) + [rejected_file] * os.path.exists(rejected_file)


def _shards_in(folder):
  """Returns the paths of the TFRecord files in a folder, a set."""
  return {path for pattern in ('*.tfrecord*', '*-of-[0-9]*')
          for path in glob.glob(os.path.join(glob.escape(folder), pattern))}


def _other_shards(dataset_dir, dataset_name):
  """Returns the TFRecord files in dataset_dir that belong to other datasets."""
  return sorted(_shards_in(dataset_dir).difference(_existing_files(dataset_dir, dataset_name)))


def _printable(text):
  return text.encode('utf-8', 'backslashreplace').decode('utf-8')
