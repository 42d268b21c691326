"""Converts image files of any format to JPEG or PNG bytes that TensorFlow decodes correctly.

JPEG and PNG files that TensorFlow decodes to what Pillow shows are kept byte for
byte; all others are converted.
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
  """An image file that cannot be used; the message says why."""


class Converter:
  """Converts encoded images; safe to call from several threads at once."""

  def __init__(self):
    with tf.Graph().as_default():
      self._encoded = tf.placeholder(tf.string, [])
      self._decoded = xception_preprocessing.decode(self._encoded)
      self._session = tf.Session(config=tf.ConfigProto(device_count={'GPU': 0}))

  def __call__(self, content):
    """Converts one image.

    Args:
      content: bytes of the file; they alone determine its format.

    Returns:
      encoded: bytes of a JPEG or PNG file; `content` itself if it needs no conversion.
      image_format: 'jpg' or 'png'.
      height, width: ints, in pixels.

    Raises:
      ImageError: the file is empty, truncated, damaged, too large or not an image.
    """
    if not content:
      raise ImageError('the file is empty')
    try:
      return self._convert(content)
    except ImageError:
      raise
    except Image.UnidentifiedImageError as error:
      raise ImageError('it is not an image') from error
    except Exception as error:  # pylint: disable=broad-except
      # On damaged files Pillow raises almost anything: SyntaxError, ValueError, ...
      raise ImageError(f'it cannot be decoded: {error}') from error

  def _convert(self, content):
    image = Image.open(io.BytesIO(content))
    if image.width * image.height > MAX_PIXELS:
      raise ImageError(f'{image.width} x {image.height} is more than {MAX_PIXELS} pixels')
    image.load()
    kind = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png'}.get(image.format)
    if kind and image.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT:
      if self._shows_as(content, image, kind):
        return content, kind, image.height, image.width
    # As PNG, images from lossy formats would only take more space.
    kind = 'jpg' if image.format in ('JPEG', 'MPO', 'WEBP') else 'png'
    image = to_rgb(ImageOps.exif_transpose(image))
    encoded = io.BytesIO()
    if kind == 'jpg':
      image.save(encoded, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
    else:
      image.save(encoded, 'PNG')
    return encoded.getvalue(), kind, image.height, image.width

  def _shows_as(self, content, image, kind):
    """Returns whether TensorFlow decodes the file to what Pillow shows."""
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
    ImageError: the range of its pixel values is unknown.
  """
  if image.mode.startswith('I;16'):
    # Pillow's own conversion clips everything above 255.
    pixels = np.asarray(image).astype(np.float64) / 257
    image = Image.fromarray(np.round(np.clip(pixels, 0, 255)).astype(np.uint8))
  elif image.mode in ('I', 'F'):
    raise ImageError(f'the range of its pixel values (mode {image.mode}) is unknown')
  if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('RGB')
