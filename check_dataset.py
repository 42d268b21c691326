"""Reads every record of a dataset and reports its contents and its faults.

  python check_dataset.py --dataset_dir my_flowers --contact_sheet flowers.png

Verifies checksums, keys and labels, and decodes every image; counts the images of
each class and size; finds images that are in several splits. Works with all
TFRecords in the format that records/flowers.py describes. The exit code is 1 if
anything is wrong.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf
import tqdm

from common import arguments
from common import files
from common import terminal
from evaluation import pictures
from records import flowers
from records import tfrecords

READ_WINDOW = 2 * (os.cpu_count() or 1)  # records in memory at a time
MAX_LISTED = 20  # bad records and duplicates in the tables; --json has all of them
MAX_CLASS_ROWS = 50  # classes in the table; of more, the MAX_LISTED smallest are printed


def read_all(dataset):
  """Yields (number, image, label, SHA-256 of the encoded image, reason) of every record.

  The reason is None for a good record; for a bad one, image, label and SHA-256 are.
  """
  read = flowers.RecordReader(dataset)

  def read_one(number):
    try:
      image, label = read(number)
    except tfrecords.RecordError as error:
      return number, None, None, None, str(error)
    features = tf.train.Example.FromString(dataset.records[number]).features.feature
    encoded, = features[dataset.image_key].bytes_list.value
    return number, image, label, hashlib.sha256(encoded).digest(), None

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm.tqdm(
      total=dataset.num_samples, unit=' images', disable=None) as progress:
    for start in range(0, dataset.num_samples, READ_WINDOW):
      window = range(start, min(start + READ_WINDOW, dataset.num_samples))
      for record in pool.map(read_one, window):
        yield record
        progress.update()


def check_split(dataset, sheet_numbers=()):
  """Reads all records of a split.

  Args:
    dataset: slim Dataset from `flowers.get_split`.
    sheet_numbers: numbers of the records to return thumbnails of.

  Returns:
    report: dict for JSON, see `check_dataset`.
    images: {SHA-256 of an encoded image: numbers and labels of its records}.
    thumbnails: {number: uint8 [height, width, 3]} of the good records in sheet_numbers.
  """
  labels, heights, widths = [], [], []
  bad, images, thumbnails = [], collections.defaultdict(list), {}
  pixels, sums, squares = 0, np.zeros(3), np.zeros(3)
  for number, image, label, digest, reason in read_all(dataset):
    if reason:
      bad.append({**_place(dataset, number), 'reason': reason})
      continue
    labels.append(label)
    heights.append(image.shape[0])
    widths.append(image.shape[1])
    images[digest].append((number, label))
    pixels += image.shape[0] * image.shape[1]
    sums += image.sum((0, 1), dtype=np.float64) / 255
    squares += np.square(image / 255.0).sum((0, 1))
    if number in sheet_numbers:
      thumbnails[number] = _thumbnail(image)
  counts = np.bincount(np.array(labels, np.int64), minlength=dataset.num_classes).tolist()
  mean = sums / max(pixels, 1)
  report = {
      'num_records': dataset.num_samples,
      'bad_records': bad,
      'damaged_files': dataset.records.damages,
      'classes': dict(zip(_distinct_names(dataset), counts)),
      'imbalance': max(counts) / min(counts) if min(counts) else None,
      'height': _spread(heights),
      'width': _spread(widths),
      'sizes': _size_histogram(heights, widths),
      'channel_mean': mean.tolist(),
      'channel_std': np.sqrt(np.maximum(squares / max(pixels, 1) - mean**2, 0)).tolist(),
  }
  return report, images, thumbnails


def check_dataset(dataset_dir, dataset_name=flowers.DATASET_NAME, images_per_class=0, seed=0,
                  **dataset_options):
  """Checks all splits of a dataset.

  Args:
    dataset_dir: folder of the TFRecord files and labels.txt.
    dataset_name: prefix of the file names.
    images_per_class: number of thumbnails of each class.
    seed: int that determines which images.
    **dataset_options: other arguments of `flowers.get_split`.

  Returns:
    report: dict with `splits` (for each: num_records, bad_records with file,
      record and reason, damaged_files, classes with their counts, imbalance as
      largest count / smallest, height and width as [minimum, median, maximum],
      sizes as counts by the longer side, channel_mean and channel_std in [0, 1]),
      `duplicates` (the places and classes of images that occur more than once),
      `leaks` (those of them that are in several splits), `conflicts` (those that are
      in several classes) and `ok`.
    thumbnails: a list of uint8 [height, width, 3] for each of the first
      pictures.MAX_SHEET_ROWS classes, from the training split or, without one, from the first.
  """
  report = {'dataset_dir': dataset_dir, 'splits': {}}
  places = collections.defaultdict(list)
  thumbnails = []
  for split, dataset in open_splits(dataset_dir, dataset_name, dataset_options).items():
    chosen = [] if thumbnails else _choose(dataset, images_per_class, seed)
    report['splits'][split], images, found = check_split(
        dataset, {number for numbers in chosen for number in numbers})
    thumbnails = thumbnails or [[found[number] for number in numbers if number in found]
                                for numbers in chosen]
    names = _distinct_names(dataset)
    for digest, numbers_and_labels in images.items():
      places[digest] += [{'split': split, **_place(dataset, number), 'class': names[label]}
                         for number, label in numbers_and_labels]
  duplicates = [same for same in places.values() if len(same) > 1]
  report['duplicates'] = duplicates
  report['leaks'] = [same for same in duplicates if len({place['split'] for place in same}) > 1]
  report['conflicts'] = [same for same in duplicates
                         if len({place['class'] for place in same}) > 1]
  report['ok'] = not (report['leaks'] or report['conflicts'] or any(
      split['bad_records'] or split['damaged_files'] for split in report['splits'].values()))
  return report, thumbnails


def open_splits(dataset_dir, dataset_name, dataset_options):
  """Opens every split that a dataset has, before any is read; returns {name: slim Dataset}.

  Raises:
    flowers.DatasetError: there is no split, or one cannot be opened.
  """
  splits, missing = {}, []
  for name in flowers.SPLITS:
    try:
      splits[name] = flowers.get_split(name, dataset_dir, dataset_name=dataset_name,
                                       **dataset_options)
    except flowers.MissingSplitError as error:
      missing.append(error)
  if not splits:
    raise missing[0]
  return splits


def print_report(report):
  """Prints the report as tables."""
  splits = report['splits']
  counts = next(iter(splits.values()))['classes']
  names = list(counts)
  if len(names) > MAX_CLASS_ROWS:
    names = sorted(counts, key=counts.get)[:MAX_LISTED]
  width = max(map(terminal.text_width, [*names, 'good images']))
  print(f'{"":{width}} ' + ' '.join(f'{split:>12}' for split in splits))

  def row(title, values):
    print(terminal.pad(title, width), ' '.join(f'{value:>12}' for value in values))

  for name in names:
    row(name, [split['classes'][name] for split in splits.values()])
  if len(names) < len(counts):
    print(f'... and {len(counts) - len(names)} classes with more training images')
  row('good images', [sum(split['classes'].values()) for split in splits.values()])
  row('bad records', [len(split['bad_records']) for split in splits.values()])
  row('imbalance', [f'{split["imbalance"]:.2f}' if split['imbalance'] else 'empty class'
                    for split in splits.values()])
  for side in ('height', 'width'):
    row(side, ['-'.join(f'{value:.0f}' for value in split[side]) for split in splits.values()])
  for name, split in splits.items():
    mean, std = ([f'{value:.3f}' for value in split[key]]
                 for key in ('channel_mean', 'channel_std'))
    print(f'{name}: mean {" ".join(mean)}, standard deviation {" ".join(std)} (red green blue)')
    print(f'{name}: longer sides ' + ', '.join(
        f'{size} {count}' for size, count in split['sizes'].items()))
    for damage in split['damaged_files']:
      print(f'{name}: {damage}')
    for bad in split['bad_records'][:MAX_LISTED]:
      print(f'{name}: {bad["file"]}, record {bad["record"]}: {bad["reason"]}')
  for same in report['duplicates'][:MAX_LISTED]:
    print('same image: ' + '; '.join(
        f'{place["file"]}, record {place["record"]} ({place["class"]})' for place in same))
  print(f'{len(report["duplicates"])} images occur more than once, '
        f'{len(report["leaks"])} of them in several splits, {len(report["conflicts"])} in several '
        'classes')
  print('No problems found' if report['ok'] else 'Problems found: see above')


def _choose(dataset, images_per_class, seed):
  """Returns a list of random record numbers for each of the first classes."""
  chosen = [[] for _ in range(min(dataset.num_classes, pictures.MAX_SHEET_ROWS))]
  num_missing = images_per_class * len(chosen)
  for number in np.random.default_rng(seed).permutation(dataset.num_samples):
    if not num_missing:
      break
    label = flowers.read_label(dataset, number)
    if label in range(len(chosen)) and len(chosen[label]) < images_per_class:
      chosen[label].append(int(number))
      num_missing -= 1
  return chosen


def _distinct_names(dataset):
  """Returns the class names in order; a name that several classes have gets its id."""
  names = dataset.labels_to_names
  counts = collections.Counter(names.values())
  return [names[label] if counts[names[label]] == 1 else f'{label}:{names[label]}'
          for label in range(dataset.num_classes)]


def _thumbnail(image):
  thumbnail = Image.fromarray(image)
  thumbnail.thumbnail((pictures.THUMBNAIL_SIZE, pictures.THUMBNAIL_SIZE))
  return np.asarray(thumbnail)


def _place(dataset, number):
  path, index = dataset.records.locate(number)
  return {'file': path, 'record': index}


def _spread(values):
  return [float(f(values)) for f in (np.min, np.median, np.max)] if values else [0.0] * 3


def _size_histogram(heights, widths):
  """Returns {'129-256': count} of the longer sides, in powers of two."""
  exponents = collections.Counter(
      (max(size) - 1).bit_length() for size in zip(heights, widths))
  return {f'{2**e // 2 + 1 if e else 1}-{2**e}': exponents[e] for e in sorted(exponents)}


images_per_class = arguments.checked_number(int, lambda value: 1 <= value <= 50, 'from 1 to 50')


def parse_args(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                   formatter_class=arguments.HelpFormatter)
  arguments.add_dataset_options(parser)
  parser.add_argument('--json', action='store_true', help='print a JSON object instead of tables')
  parser.add_argument('--contact_sheet', type=arguments.path, metavar='PNG',
                      help='write a picture of random images of each class '
                      f'(of the first {pictures.MAX_SHEET_ROWS} classes)')
  parser.add_argument('--images_per_class', type=images_per_class, default=8,
                      help='number of images of each class on the contact sheet, up to 50')
  parser.add_argument('--seed', type=arguments.non_negative_int, default=0,
                      help='determines which images are on the contact sheet')
  return parser.parse_args(argv)


def main(args):
  if args.contact_sheet:
    files.require_writable(os.path.dirname(args.contact_sheet))
  report, thumbnails = check_dataset(
      images_per_class=args.images_per_class if args.contact_sheet else 0, seed=args.seed,
      **arguments.dataset_options(args))
  if args.contact_sheet:
    names = list(next(iter(report['splits'].values()))['classes'])
    files.write_atomically(args.contact_sheet, pictures.draw_contact_sheet(thumbnails, names))
  if args.json:
    print(json.dumps(report))
  else:
    print_report(report)
  return report['ok']


if __name__ == '__main__':
  tf.disable_v2_behavior()
  arguments.escape_unprintable_output()
  try:
    sys.exit(0 if main(parse_args()) else 1)
  except (flowers.DatasetError, OSError) as error:
    sys.exit(f'check_dataset.py: {error}')
