"""Reads every record of a dataset and tells what is in it, and what is wrong with it.

  python check_dataset.py --dataset_dir my_flowers --contact_sheet flowers.png

Checks checksums, keys, labels, and that every image decodes; counts classes and
sizes; finds images that are in training and validation both. Works on any
TFRecords of the format that flowers.py describes. Ends with 1 if something is
broken.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import io
import json
import os
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

from google.protobuf import message
from matplotlib.figure import Figure
import numpy as np
import tensorflow.compat.v1 as tf
import tqdm

from common import arguments
from common import files
from records import flowers
from records import tfrecords

READ_WINDOW = 256  # records in flight
MAX_LISTED = 20  # bad records and duplicates in the table; --json has them all


def read_all(dataset):
  """Yields (number, image, label, SHA-256 of the encoded image, reason) of every record.

  Of a bad one all but number and reason are None; reason is None of a good one.
  """
  read = flowers.RecordReader(dataset)

  def read_one(number):
    try:
      image, label = read(number)
    except tfrecords.RecordError as error:
      return number, None, None, None, str(error)
    features = tf.train.Example.FromString(dataset.records[number]).features.feature
    encoded, = features['image/encoded'].bytes_list.value
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
    sheet_numbers: numbers of records whose images are wanted.

  Returns:
    report: dict for JSON, see `check_dataset`.
    digests: {SHA-256 of an encoded image: numbers of its records}.
    images: {number: uint8 [height, width, 3]} of sheet_numbers, without bad ones.
  """
  labels, heights, widths = [], [], []
  bad, digests, images = [], collections.defaultdict(list), {}
  pixels, sums, squares = 0, np.zeros(3), np.zeros(3)
  for number, image, label, digest, reason in read_all(dataset):
    if reason:
      bad.append({**_place(dataset, number), 'reason': reason})
      continue
    labels.append(label)
    heights.append(image.shape[0])
    widths.append(image.shape[1])
    digests[digest].append(number)
    pixels += image.shape[0] * image.shape[1]
    sums += image.sum((0, 1), dtype=np.float64) / 255
    squares += np.square(image / 255.0).sum((0, 1))
    if number in sheet_numbers:
      images[number] = image
  counts = np.bincount(labels, minlength=dataset.num_classes).tolist()
  mean = sums / max(pixels, 1)
  report = {
      'num_records': dataset.num_samples,
      'bad_records': bad,
      'damaged_files': dataset.records.damages,
      'classes': {dataset.labels_to_names[i]: count for i, count in enumerate(counts)},
      'imbalance': max(counts) / min(counts) if min(counts) else None,
      'height': _spread(heights),
      'width': _spread(widths),
      'sizes': _size_histogram(heights, widths),
      'channel_mean': mean.tolist(),
      'channel_std': np.sqrt(np.maximum(squares / max(pixels, 1) - mean**2, 0)).tolist(),
  }
  return report, digests, images


def check_dataset(dataset_dir, dataset_name, images_per_class=0, seed=0):
  """Checks the splits of a dataset, and both together.

  Args:
    dataset_dir, dataset_name: where the files are, and how their names begin.
    images_per_class: how many images of each class to return.
    seed: int, which ones.

  Returns:
    report: dict with `splits` (for each: num_records, bad_records with file,
      record and reason, damaged_files, classes with their counts, imbalance as
      largest count / smallest, height and width as [least, median, greatest],
      sizes as counts by the longer side, channel_mean and channel_std in
      [0, 1]), `duplicates` (images that are there more than once, with their
      places), `leaks` (those of them in both splits) and `ok`.
    images: {class name: list of uint8 [height, width, 3]} of the training split.
  """
  report = {'dataset_dir': dataset_dir, 'splits': {}}
  places = collections.defaultdict(list)
  images = {}
  for split in flowers.SPLITS:
    try:
      dataset = flowers.get_split(split, dataset_dir, flowers.name_pattern(dataset_name))
    except flowers.MissingSplitError:
      if split == 'train':
        raise
      continue  # a dataset may do without validation
    order = np.random.default_rng(seed).permutation(dataset.num_samples)
    wanted = _choose(dataset, order, images_per_class) if split == 'train' else {}
    report['splits'][split], digests, found = check_split(
        dataset, {number for numbers in wanted.values() for number in numbers})
    for digest, numbers in digests.items():
      places[digest] += [{'split': split, **_place(dataset, number)} for number in numbers]
    if split == 'train':
      images = {name: [found[number] for number in numbers if number in found]
                for name, numbers in wanted.items()}
  duplicates = [same for same in places.values() if len(same) > 1]
  report['duplicates'] = duplicates
  report['leaks'] = [same for same in duplicates if len({place['split'] for place in same}) > 1]
  report['ok'] = not (report['leaks'] or any(
      split['bad_records'] or split['damaged_files'] for split in report['splits'].values()))
  return report, images


def draw_contact_sheet(images, path):
  """Draws a row of images for each class, and writes the PNG file."""
  columns = max(1, *map(len, images.values()))
  figure = Figure(figsize=(1.6 * columns, 1.8 * len(images)), layout='constrained')
  axes = figure.subplots(len(images), columns, squeeze=False)
  for row, (name, row_images) in zip(axes, images.items()):
    row[0].set_title(name, loc='left', fontsize=10)
    for axis in row:
      axis.axis('off')
    for axis, image in zip(row, row_images):
      axis.imshow(image)
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=80)
  files.write_atomically(path, png.getvalue())


def print_report(report):
  """Prints the report as tables."""
  splits = report['splits']
  names = list(next(iter(splits.values()))['classes'])
  width = max(map(len, [*names, 'good images']))
  print(f'{"":{width}} ' + ' '.join(f'{split:>12}' for split in splits))

  def row(title, values):
    print(f'{title:{width}} ' + ' '.join(f'{value:>12}' for value in values))

  for name in names:
    row(name, [split['classes'][name] for split in splits.values()])
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
    print('same image: ' + '; '.join(f'{place["file"]}, record {place["record"]}'
                                     for place in same))
  print(f'{len(report["duplicates"])} images are there more than once, '
        f'{len(report["leaks"])} of them in training and validation both')
  print('Nothing is broken' if report['ok'] else 'Something is broken: see above')


def _choose(dataset, order, images_per_class):
  """{class name: numbers of random records}; the labels are read without decoding."""
  wanted = {name: [] for name in dataset.labels_to_names.values()}
  for number in order:
    if all(len(numbers) >= images_per_class for numbers in wanted.values()):
      break
    try:
      example = tf.train.Example.FromString(dataset.records[number])
      label, = example.features.feature['image/class/label'].int64_list.value
      numbers = wanted[dataset.labels_to_names[label]]
    except (tfrecords.RecordError, message.DecodeError, ValueError, KeyError):
      continue  # named when it is read
    if len(numbers) < images_per_class:
      numbers.append(int(number))
  return wanted


def _place(dataset, number):
  path, index = dataset.records.locate(number)
  return {'file': path, 'record': index}


def _spread(values):
  return [float(f(values)) for f in (np.min, np.median, np.max)] if values else [0.0] * 3


def _size_histogram(heights, widths):
  """{'129-256': count} of the longer sides, in powers of two."""
  exponents = collections.Counter(
      (max(size) - 1).bit_length() for size in zip(heights, widths))
  return {f'{2**e // 2 + 1 if e else 1}-{2**e}': exponents[e] for e in sorted(exponents)}


def parse_args(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                   formatter_class=arguments.HelpFormatter)
  parser.add_argument('--dataset_dir', default='dataset',
                      help='folder of the TFRecords and labels.txt')
  parser.add_argument('--dataset_name', default=flowers.DATASET_NAME,
                      help='first part of the files\' names')
  parser.add_argument('--json', action='store_true', help='print one JSON object, no tables')
  parser.add_argument('--contact_sheet', metavar='PNG',
                      help='write a picture of random training images of every class')
  parser.add_argument('--images_per_class', type=arguments.positive_int, default=8,
                      help='on the contact sheet')
  parser.add_argument('--seed', type=arguments.non_negative_int, default=0,
                      help='which images are on it')
  return parser.parse_args(argv)


def main(args):
  report, images = check_dataset(args.dataset_dir, args.dataset_name,
                                 args.images_per_class if args.contact_sheet else 0, args.seed)
  if args.contact_sheet:
    draw_contact_sheet(images, args.contact_sheet)
  if args.json:
    print(json.dumps(report))
  else:
    print_report(report)
  return report['ok']


if __name__ == '__main__':
  tf.disable_v2_behavior()
  try:
    sys.exit(0 if main(parse_args()) else 1)
  except (flowers.DatasetError, OSError) as error:
    sys.exit(f'check_dataset.py: {error}')
