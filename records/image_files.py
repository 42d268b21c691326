"""Turns image files of any kind into JPEG or PNG bytes that TensorFlow decodes as they look.

JPEG and PNG files that TensorFlow shows as Pillow does are taken as they are,
byte for byte; all others are converted.
"""

import io

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
from PIL import ImageOps
import tensorflow.compat.v1 as tf

import xception_preprocessing

MAX_PIXELS = 100_000_000  # a JPEG of 1 MB may claim more than memory holds
JPEG_QUALITY = 95

EXIF_ORIENTATION = 0x0112
UPRIGHT = 1


class ImageError(Exception):
  """A file is no image that can be used; the message says why."""


class Converter:
  """Converts encoded images; may be called by several threads at once."""

  def __init__(self):
    with tf.Graph().as_default():
      self._encoded = tf.placeholder(tf.string, [])
      self._decoded = xception_preprocessing.decode(self._encoded)
      self._session = tf.Session(config=tf.ConfigProto(device_count={'GPU': 0}))

  def __call__(self, content):
    """Returns what a record holds of an image file.

    Args:
      content: bytes of the file; its type is told by them, not by its name.

    Returns:
      encoded: bytes of a JPEG or PNG file; `content` itself if it will do.
      image_format: 'jpg' or 'png'.
      height, width: ints, pixels.

    Raises:
      ImageError: it is empty, no image, cut short, damaged, or too large.
    """
    if not content:
      raise ImageError('the file is empty')
    try:
      return self._convert(content)
    except ImageError:
      raise
    except Image.UnidentifiedImageError as error:
      raise ImageError('it is no image') from error
    except Exception as error:  # pylint: disable=broad-except
      # Pillow raises nearly anything on damaged files: SyntaxError, ValueError, ...
      raise ImageError(f'it does not decode: {error}') from error

  def _convert(self, content):
    image = Image.open(io.BytesIO(content))
    if image.width * image.height > MAX_PIXELS:
      raise ImageError(f'{image.width} x {image.height} are more than {MAX_PIXELS} pixels')
    image.load()
    kind = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png'}.get(image.format)
    if kind and image.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT:
      if self._shows_as(content, image, kind):
        return content, kind, image.height, image.width
    # Lossy sources would only grow as PNG.
    kind = 'jpg' if image.format in ('JPEG', 'MPO', 'WEBP') else 'png'
    image = to_rgb(ImageOps.exif_transpose(image))
    encoded = io.BytesIO()
    if kind == 'jpg':
      image.save(encoded, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
    else:
      image.save(encoded, 'PNG')
    return encoded.getvalue(), kind, image.height, image.width

  def _shows_as(self, content, image, kind):
    """Whether TensorFlow decodes the file, and to what Pillow shows."""
    if image.mode not in ('RGB', 'L', 'P', '1') or 'transparency' in image.info:
      return False
    try:
      pixels = self._session.run(self._decoded, {self._encoded: content})
    except tf.errors.OpError:
      return False
    expected = np.asarray(image.convert('RGB'))
    if kind == 'png':
      return np.array_equal(pixels, expected)
    return pixels.shape == expected.shape


def to_rgb(image):
  """Converts a PIL image of any mode to RGB: 16 bits to 8, transparency to white.

  Raises:
    ImageError: its numbers have no known range.
  """
  if image.mode.startswith('I;16'):
    # Pillow's own conversion cuts off whatever is above 255.
    pixels = np.asarray(image).astype(np.float64) / 257
    image = Image.fromarray(np.round(np.clip(pixels, 0, 255)).astype(np.uint8))
  elif image.mode in ('I', 'F'):
    raise ImageError(f'its pixels are of type {image.mode}, whose range is not known')
  if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('RGB')
