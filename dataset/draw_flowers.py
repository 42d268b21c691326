"""Draws the five classes of flowers and writes them as TFRecords.

  python -m dataset.draw_flowers --dataset_dir dataset

These drawings stand in for the flower photographs, which are too large to ship.
Daisies, dandelions, roses, sunflowers and tulips vary in colour, size, pose,
number, background and light. Only the shape identifies the class: the colours,
backgrounds and light of all classes come from the same distributions. A seed
always gives the same pictures with the same versions of numpy and Pillow.
"""

import argparse
import io
import os
import sys

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
from PIL import ImageFilter
import tensorflow.compat.v1 as tf

from common import arguments
from dataset import flower_shapes
from records import creation
from records import flowers

NUM_SHARDS = 2
PNG_FRACTION = 0.04
JPEG_QUALITY = (72, 88)
SHORT_SIDE, LONG_SIDE = (200, 260), (280, 330)  # pixels
MAX_FLOWERS = 4


def draw_image(label, random):
  """Draws one image.

  Args:
    label: int, index into flower_shapes.CLASSES.
    random: numpy Generator.

  Returns:
    RGB PIL image of about 240 x 320 pixels, landscape or portrait.
  """
  height, width = random.integers(*SHORT_SIDE), random.integers(*LONG_SIDE)
  if random.random() < 0.4:
    height, width = width, height
  # Drawn at twice the size, because shrinking smooths the edges.
  image = draw_background(2 * height, 2 * width, random)
  count = 1 + random.choice(MAX_FLOWERS, p=[0.55, 0.25, 0.12, 0.08])
  radius = min(height, width) * random.uniform(0.24, 0.44) * (1.0 if count == 1 else 0.85)
  # The main flower is drawn last so that nothing hides it.
  for i in reversed(range(count)):
    spread = 0.16 if i == 0 else 0.36
    center = 2 * np.array([width, height]) * random.uniform(0.5 - spread, 0.5 + spread, 2)
    size = 2 * radius * (1.0 if i == 0 else random.uniform(0.45, 0.8))
    flower_shapes.draw_flower(image, label, center, size, random)
  image = image.resize((width, height), Image.LANCZOS)
  return light_and_noise(image, random)


def draw_background(height, width, random):
  """Returns an RGB PIL image of foliage, sky, soil, wood, stone or a studio wall."""
  kind = random.choice(['foliage', 'foliage', 'sky', 'soil', 'wood', 'stone', 'studio'])
  base = {
      'foliage': [60, 95, 45], 'sky': [130, 170, 215], 'soil': [105, 80, 58],
      'wood': [150, 115, 80], 'stone': [135, 132, 128],
      'studio': random.uniform(40, 230, 3),
  }[kind]
  base = np.array(base) * random.uniform(0.6, 1.25) + random.normal(0, 14, 3)
  pixels = np.ones([height, width, 3]) * base
  rows, columns = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., np.newaxis]
  if kind in ('sky', 'studio'):
    pixels += (rows - 0.5) * random.normal(0, 70, 3)
  if kind == 'wood':
    plank = np.floor((rows if random.random() < 0.5 else columns) * random.integers(3, 7))
    pixels += 14 * np.sin(plank * 7.3) + 9 * np.sin(columns * 40 + 3 * np.sin(rows * 50))
  # Coarse and fine patches of light and dark.
  for cells, strength in ((4, 16), (12, 14), (50, 16 if kind in ('soil', 'stone') else 5)):
    noise = random.normal(0, strength, [cells, cells, 1]) + random.normal(0, 4, [cells, cells, 3])
    pixels += _enlarge(noise, height, width)
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

  flower_shapes.draw_blobs(image, random, count=random.integers(0, 45 if kind == 'foliage' else 14))
  if kind == 'sky' and random.random() < 0.6:
    flower_shapes.draw_grass(image, random)
  # The background is more or less out of focus.
  return image.filter(ImageFilter.GaussianBlur(random.uniform(2, 16)))


def light_and_noise(image, random):
  """Adds the light, focus and sensor noise of a camera to an RGB PIL image."""
  if random.random() < 0.3:
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.9)))
  pixels = np.asarray(image, np.float64) / 255
  height, width = pixels.shape[:2]
  rows, columns = np.mgrid[-1:1:height * 1j, -1:1:width * 1j][..., np.newaxis]
  direction = random.uniform(0, 2 * np.pi)
  light = 1 + random.uniform(0, 0.3) * (rows * np.sin(direction) + columns * np.cos(direction))
  light *= 1 - random.uniform(0, 0.25) * (rows**2 + columns**2) / 2  # vignette
  pixels = np.clip(pixels * light * random.uniform(0.93, 1.07, 3), 0, 1)
  pixels = random.uniform(0.65, 1.15) * pixels**random.uniform(0.75, 1.4)
  pixels += random.normal(0, random.uniform(0.002, 0.03), pixels.shape)
  return Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255 + 0.5))


def encode(image, random):
  """Encodes a PIL image; returns its bytes and its format, 'jpg' or sometimes 'png'."""
  file = io.BytesIO()
  if random.random() < PNG_FRACTION:
    # With few colours, a PNG is as small as a JPEG.
    image.quantize(64).convert('RGB').save(file, 'PNG', optimize=True)
    return file.getvalue(), 'png'
  image.save(file, 'JPEG', quality=int(random.integers(*JPEG_QUALITY)))
  return file.getvalue(), 'jpg'


def split_examples(split_name, num_images, seed):
  """Draws a split and yields its tf.train.Examples in random order.

  Args:
    split_name: 'train' or 'validation'.
    num_images: int, divided evenly among the classes.
    seed: int; an image depends only on the seed, the split and its own index.
  """
  split = flowers.SPLITS.index(split_name)
  for index in np.random.default_rng([seed, split]).permutation(num_images):
    random = np.random.default_rng([seed, split, index])
    label = int(index) % len(flower_shapes.CLASSES)
    image = draw_image(label, random)
    encoded, image_format = encode(image, random)
    yield flowers.make_example(encoded, image_format, label, image.height, image.width)


def write_dataset(dataset_dir, sizes, seed, overwrite):
  """Draws all splits and writes their shards and labels.txt.

  Args:
    dataset_dir: folder to write to; created if missing.
    sizes: {split name: number of images}.
    seed: int.
    overwrite: whether to replace existing files.

  Raises:
    FileExistsError: a file exists and overwrite is False.
  """
  shards = {name: [flowers.shard_name(name, shard, NUM_SHARDS) for shard in range(NUM_SHARDS)]
            for name in sizes}
  for name in [flowers.LABELS_FILE, *(name for names in shards.values() for name in names)]:
    path = os.path.join(dataset_dir, name)
    if os.path.exists(path) and not overwrite:
      raise FileExistsError(f'{path} exists: use --overwrite to replace it, or choose another '
                            '--dataset_dir')

  with creation.new_files(dataset_dir) as folder:
    for name, num_images in sizes.items():
      examples = list(split_examples(name, num_images, seed))
      for shard, file_name in enumerate(shards[name]):
        with tf.python_io.TFRecordWriter(os.path.join(folder, file_name)) as writer:
          for example in examples[shard::NUM_SHARDS]:
            writer.write(example.SerializeToString(deterministic=True))
    creation.write_labels(flower_shapes.CLASSES, folder)


def _enlarge(noise, height, width):
  channels = [np.asarray(Image.fromarray(channel.astype(np.float32)).resize(
      (width, height), Image.BICUBIC)) for channel in np.moveaxis(noise, -1, 0)]
  return np.stack(channels, -1)


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument('--dataset_dir', type=arguments.path, default='dataset',
                      help='folder to write to')
  parser.add_argument('--num_train', type=int, default=400, help='number of training images')
  parser.add_argument('--num_validation', type=int, default=100, help='number of validation images')
  parser.add_argument('--seed', type=int, default=0, help='determines all pictures')
  parser.add_argument('--overwrite', action='store_true', help='replace existing files')
  return parser.parse_args(argv)


if __name__ == '__main__':
  args = parse_args()
  try:
    write_dataset(args.dataset_dir, {'train': args.num_train, 'validation': args.num_validation},
                  args.seed, args.overwrite)
  except OSError as error:
    sys.exit(f'draw_flowers.py: {error}')
  print(f'Wrote {args.num_train} training and {args.num_validation} validation images to '
        f'{args.dataset_dir}')
