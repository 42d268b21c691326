"""Feeds classify_image.py with damaged and hostile images and watches its memory.

  python tests/hostile_images.py --graph frozen_model_xception.pb

Images of seven formats are truncated, or get flipped bits, the header of another
format or overwritten stretches; some claim sizes that exceed any memory. Each of
them must be classified or refused with a message. All images are fed twice, each
time followed by a pass without the large ones, whose memory TensorFlow may keep:
the exit code is 1 if the second of these passes takes more memory than the first.
"""

import argparse
import io
import os
import struct
import sys
import tempfile
import warnings
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

import classify_image
from export import models

FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM')
MAX_GROWTH = 100e6  # bytes
BOMB_EVERY = 500


def good_images():
  """Returns the bytes of small images in every format and of some unusual kinds."""
  random = np.random.default_rng(0)
  image = Image.fromarray(random.integers(0, 256, [8, 10, 3], np.uint8)).resize((100, 80))
  pictures = [(image, name, {}) for name in FORMATS]
  pictures += [(image, 'JPEG', {'progressive': True}), (image.convert('CMYK'), 'JPEG', {}),
               (image.convert('RGBA'), 'PNG', {}), (image.quantize(16), 'PNG', {})]
  contents = []
  for picture, name, options in pictures:
    file = io.BytesIO()
    picture.save(file, name, **options)
    contents.append(file.getvalue())
  return contents


def mutate(content, others, random):
  """Returns a damaged copy of an image's bytes."""
  content = bytearray(content)
  kind = random.integers(4)
  if kind == 0:
    return bytes(content[:random.integers(len(content))])
  if kind == 1:
    for position in random.integers(0, 8 * len(content), random.integers(1, 20)):
      content[position // 8] ^= 1 << position % 8
  elif kind == 2:
    header = others[random.integers(len(others))][:random.integers(4, 40)]
    content[:len(header)] = header
  else:
    first = random.integers(len(content))
    content[first:first + 64] = random.bytes(int(random.integers(1, 64)))
  return bytes(content)


def bomb(number):
  """Returns a small PNG file that decodes to nearly 100 million pixels, or claims more."""
  def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

  side = (10_001, 9_000, 60_000, 2**31 - 1)[number % 4]
  rows = zlib.compressobj(9)
  data = b''
  if side == 9_000:  # within the limits, so it must be classified
    row = bytes(1 + 3 * side)
    data = b''.join(rows.compress(row) for _ in range(side)) + rows.flush()
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
          + chunk(b'IDAT', data) + chunk(b'IEND', b''))


def resident_bytes():
  with open('/proc/self/statm') as f:
    return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def write_images(folder, num_images, num_bombs, seed):
  """Writes image files one by one and yields their names."""
  random = np.random.default_rng(seed)
  originals = good_images()
  bombs = iter(range(num_bombs))
  for number in range(num_images):
    path = os.path.join(folder, f'{number}.jpg')
    bomb_number = next(bombs, None) if number % BOMB_EVERY == 0 else None
    content = (bomb(bomb_number) if bomb_number is not None else
               mutate(originals[number % len(originals)], originals, random))
    with open(path, 'wb') as f:
      f.write(content)
    yield path


def feed(model, num_images, num_bombs, seed):
  """Returns how many images were classified and refused, and the peak memory in bytes."""
  num_classified = num_refused = peak = 0
  with tempfile.TemporaryDirectory() as folder:
    files = write_images(folder, num_images, num_bombs, seed)
    for result in classify_image.classify(model, files, batch_size=8, top_k=5):
      os.remove(result.file)
      if result.error is None:
        total = sum(prediction['probability'] for prediction in result.predictions)
        assert abs(total - 1) < 1e-3, result
        num_classified += 1
      else:
        assert result.error, result
        num_refused += 1
      peak = max(peak, resident_bytes())
  return num_classified, num_refused, peak


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--graph', required=True)
  parser.add_argument('--num_images', type=int, default=10_000)
  parser.add_argument('--num_bombs', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  warnings.simplefilter('ignore')  # Pillow's warnings about damaged metadata

  model = models.load(args.graph)
  peaks = []
  for _ in range(2):
    num_classified, num_refused, largest_peak = feed(
        model, args.num_images, args.num_bombs, args.seed)
    *_, peak = feed(model, args.num_images, 0, args.seed)
    peaks.append(peak)
  print(f'{args.num_images} images, twice: {num_classified} classified, {num_refused} refused, '
        f'{largest_peak / 1e6:.0f} MB of memory; without the large ones, '
        f'{peaks[0] / 1e6:.0f} MB the first time and {peaks[1] / 1e6:.0f} MB the second time')
  return 1 if peaks[1] - peaks[0] > MAX_GROWTH else 0


if __name__ == '__main__':
  tf.disable_v2_behavior()
  sys.exit(main())
