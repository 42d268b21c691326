"""Converts image files of any format to JPEG or PNG bytes that TensorFlow decodes correctly.

JPEG and PNG files that TensorFlow decodes to what Pillow shows are kept byte for
byte; all others are converted.
"""

import contextlib
import io

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
from PIL import Image
from PIL import ImageOps
import tensorflow.compat.v1 as tf

import xception_preprocessing

SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff',
            '.avif', '.heic', '.heif', '.jp2', '.j2k', '.ppm', '.pgm', '.pbm', '.pnm', '.tga',
            '.ico')
MAX_PIXELS = 100_000_000  # a JPEG of 1 MB may claim more than memory holds
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, a warning, would come before this one
JPEG_QUALITY = 95
PNG = b'\x89PNG\r\n\x1a\n'  # the first bytes of a PNG file

EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
TIFF_SUBFILE_TYPE = 254
TIFF_THUMBNAIL = 1  # bit of TIFF_SUBFILE_TYPE


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
      if content[4:8] == b'ftyp':  # a box of the ISO base media file format
        raise ImageError('it is a HEIC image or a video, which Pillow cannot read: convert it to '
                         'JPEG, for instance with heif-convert') from error
      if content.startswith(PNG):
        raise ImageError('it is a PNG image with damaged or unusual metadata: save it '
                         'again') from error
      raise ImageError('it is not an image') from error
    except Exception as error:  # pylint: disable=broad-except
      # On damaged files Pillow raises almost anything: SyntaxError, ValueError, ...
      raise ImageError(f'it cannot be decoded: {error}') from error

  def _convert(self, content):
    image = Image.open(io.BytesIO(content))
    if image.format == 'TIFF':
      skip_thumbnails(image)
    if image.width * image.height > MAX_PIXELS:
      raise ImageError(f'{image.width} x {image.height} is more than {MAX_PIXELS} pixels')
    image.load()
    kind = {'JPEG': 'jpg', 'MPO': 'jpg', 'PNG': 'png'}.get(image.format)
    if kind and image.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT:
      if self._shows_as(content, image, kind):
        return content, kind, image.height, image.width
    # As PNG, images from lossy formats would only take more space.
    kind = 'jpg' if image.format in ('JPEG', 'MPO', 'WEBP', 'AVIF') else 'png'
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


def skip_thumbnails(image):
  """Moves a PIL image of a TIFF file to its first page that is no thumbnail, if it has one."""
  with contextlib.suppress(EOFError):  # after the last page
    while image.tag_v2.get(TIFF_SUBFILE_TYPE, 0) & TIFF_THUMBNAIL:
      image.seek(image.tell() + 1)


def to_rgb(image):
  """Converts a PIL image of any mode to RGB: 16 bits to 8, transparency to white.

  Raises:
    ImageError: the range of its pixel values is unknown.
  """
  if image.mode.startswith('I;16'):
    # Pillow's own conversion clips everything above 255.
    pixels = np.asarray(image).astype(np.float64)
    if 0 < pixels.max() < 4096:
      raise ImageError(f'its 16-bit pixels reach only {pixels.max():.0f} of 65535, as with a '
                       'camera of 10 or 12 bits: convert it to 8 bits')
    pixels /= 257
    image = Image.fromarray(np.round(np.clip(pixels, 0, 255)).astype(np.uint8))
  elif image.mode in ('I', 'F'):
    raise ImageError(f'the range of its pixel values (mode {image.mode}) is unknown')
  if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('RGB')
