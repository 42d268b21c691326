"""Tests of what becomes of image files of every kind, good and bad, in a record."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from records import image_files


def smooth(height=40, width=60):
  """A PIL image, smooth so that JPEG keeps it within a few levels."""
  rows, columns = np.mgrid[0:height, 0:width]
  return Image.fromarray(np.stack(
      [rows * 200 // height, columns * 200 // width, 255 - rows * 200 // height],
      -1).astype(np.uint8))


def save(image, image_format, **kwargs):
  file = io.BytesIO()
  image.save(file, image_format, **kwargs)
  return file.getvalue()


def png_header(width, height):
  """A PNG file that claims a size and holds next to nothing."""
  def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
          + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b''))


class ConverterTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.convert = staticmethod(image_files.Converter())

  def check(self, content, image_format, expected, tolerance, kept):
    """The record shows `expected`, a PIL image or an array; returns its bytes."""
    encoded, kind, height, width = self.convert(content)
    self.assertEqual(kind, image_format)
    self.assertEqual(encoded == content, kept)
    with tf.Graph().as_default(), tf.Session() as session:
      pixels = session.run(tf.image.decode_image(encoded, channels=3))
    expected = np.asarray(expected)
    self.assertEqual((height, width), expected.shape[:2])
    self.assertAllClose(pixels.astype(int), expected.astype(int), rtol=0, atol=tolerance)
    return encoded

  def test_taken_byte_for_byte(self):
    image = smooth()
    grey = image.convert('L')
    for content, image_format, expected, tolerance in [
        (save(image, 'JPEG', quality=95), 'jpg', image, 12),
        (save(image, 'JPEG', quality=95, progressive=True), 'jpg', image, 12),
        (save(grey, 'JPEG', quality=95), 'jpg', grey.convert('RGB'), 12),
        (save(image, 'PNG'), 'png', image, 0),
        (save(grey, 'PNG'), 'png', grey.convert('RGB'), 0),
        (save(image.quantize(16), 'PNG'), 'png', image.quantize(16).convert('RGB'), 0),
        (save(image.resize((1, 1)), 'PNG'), 'png', image.resize((1, 1)), 0),
        (save(Image.new('RGB', (20000, 10), 'teal'), 'JPEG'), 'jpg',
         Image.new('RGB', (20000, 10), 'teal'), 12)]:
      self.check(content, image_format, expected, tolerance, kept=True)

  def test_lossless_files_become_png(self):
    image = smooth()
    for image_format in ('BMP', 'TIFF', 'PPM', 'TGA', 'JPEG2000'):
      self.check(save(image, image_format), 'png', image, 0, kept=False)
    icon = save(image, 'ICO', sizes=[image.size])
    self.check(icon, 'png', image, 0, kept=False)
    self.assertContainsSubset(('.pnm', '.pbm', '.j2k', '.ico', '.tga'), image_files.SUFFIXES)

  def test_lossy_files_become_jpeg(self):
    for content in (save(smooth(), 'WEBP', lossless=True), save(smooth(), 'AVIF', quality=90)):
      self.check(content, 'jpg', smooth(), 12, kept=False)

  def test_the_first_frame_of_a_gif(self):
    frames = [Image.new('RGB', (30, 20), color) for color in ('red', 'blue')]
    self.check(save(frames[0], 'GIF', save_all=True, append_images=frames[1:]), 'png', frames[0],
               0, kept=False)

  def test_cmyk(self):
    for color in ('red', 'white', 'black', 'green'):
      image = Image.new('RGB', (32, 32), color)
      self.check(save(image.convert('CMYK'), 'JPEG', quality=95), 'jpg', image, 12, kept=False)

  def test_16_bits_are_scaled(self):
    values = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(4, 0)
    expected = np.array([[0, 1, 128, 255]]).repeat(4, 0)[..., np.newaxis].repeat(3, 2)
    self.check(save(Image.fromarray(values), 'PNG'), 'png', expected, 0, kept=False)

  def test_16_bits_of_an_unknown_range(self):
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    with self.assertRaisesRegex(image_files.ImageError, 'its 16-bit pixels reach only 4095 of'):
      self.convert(save(Image.fromarray(pixels), 'PNG'))

  def test_a_tiff_that_begins_with_a_thumbnail(self):
    image, thumbnail = smooth(), smooth(20, 30)
    content = save(thumbnail, 'TIFF', tiffinfo={254: 1}, save_all=True, append_images=[image])
    self.check(content, 'png', image, 0, kept=False)

  def test_transparency_becomes_white(self):
    image = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    expected = np.full([8, 8, 3], 255)
    expected[:, :4] = [0, 0, 255]
    self.check(save(image, 'PNG'), 'png', expected, 0, kept=False)
    palette = image.convert('RGB').quantize(4)
    transparent = palette.getpixel((7, 7))
    self.check(save(palette, 'PNG', transparency=transparent), 'png', expected, 0, kept=False)

  def test_exif_orientation_is_applied(self):
    image = smooth()
    exif = Image.Exif()
    for orientation, operation in [(2, Image.Transpose.FLIP_LEFT_RIGHT),
                                   (3, Image.Transpose.ROTATE_180),
                                   (6, Image.Transpose.ROTATE_270),
                                   (8, Image.Transpose.ROTATE_90)]:
      exif[image_files.EXIF_ORIENTATION] = orientation
      content = save(image, 'JPEG', quality=95, exif=exif)
      encoded = self.check(content, 'jpg', image.transpose(operation), 15, kept=False)
      self.assertNotIn(image_files.EXIF_ORIENTATION, Image.open(io.BytesIO(encoded)).getexif())
    exif[image_files.EXIF_ORIENTATION] = 1
    self.check(save(image, 'JPEG', quality=95, exif=exif), 'jpg', image, 12, kept=True)

  def test_bad_files(self):
    jpeg, png = save(smooth(), 'JPEG'), save(smooth(), 'PNG')
    for content, message in [
        (b'', 'the file is empty'),
        (b'<!DOCTYPE html><html><body>404 Not Found</body></html>', 'it is not an image'),
        (b'To do: take pictures\n', 'it is not an image'),
        (np.random.default_rng(0).bytes(5000), 'it is not an image'),
        (b'\0\0\0\x18ftypheic' + bytes(100), 'HEIC image .*convert it to JPEG'),
        (jpeg[:len(jpeg) // 2], 'it cannot be decoded: '),
        (jpeg[:4], 'it is not an image|it cannot be decoded'),
        (png[:len(png) // 2], 'it cannot be decoded'),
        (png_header(400, 400), 'it cannot be decoded'),
        (png_header(10_000, 9_999) + bytes(10), 'it cannot be decoded|it is not an image'),
        (png_header(10_001, 10_000), '10001 x 10000 is more than 100000000 pixels'),
        (png_header(60_000, 60_000), '60000 x 60000 is more than 100000000 pixels'),
        (save(Image.fromarray(np.ones([4, 4], np.float32)), 'TIFF'), 'the range of its pixel')]:
      with self.assertRaisesRegex(image_files.ImageError, message):
        self.convert(content)

  def test_changed_bytes_never_raise_anything_else(self):
    random = np.random.default_rng(0)
    for original in (save(smooth(), 'JPEG'), save(smooth(), 'PNG'), save(smooth(), 'GIF'),
                     save(smooth(), 'BMP'), save(smooth(), 'WEBP'), save(smooth(), 'TIFF')):
      outcomes = set()
      for _ in range(60):
        content = bytearray(original)
        for position in random.integers(0, len(content), 4):
          content[position] = random.integers(256)
        try:
          _, kind, _, _ = self.convert(bytes(content))
          outcomes.add(kind)
        except image_files.ImageError as error:
          self.assertNotEmpty(str(error))
          outcomes.add('error')
      self.assertContainsSubset(outcomes, {'jpg', 'png', 'error'})
