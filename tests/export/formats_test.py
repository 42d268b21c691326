"""Tests of the written formats: signatures, shapes, operations, and the decoding of images."""

import importlib.util
import io
import itertools
import shutil
import struct
import tempfile
import unittest
import zlib

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from common import checkpoints
from export import folding
from export import formats
from export import freeze
from export import models
from export import runtimes
from records import image_files
import small_model

HAS_ONNX = all(importlib.util.find_spec(name) for name in ('tf2onnx', 'onnxruntime'))


def encode(image, image_format='PNG', **kwargs):
  file = io.BytesIO()
  image.save(file, image_format, **kwargs)
  return file.getvalue()


def transparent_images():
  """Returns {mode: PIL image} of random pixels, most of them transparent in part."""
  random = np.random.default_rng(0)

  def draw(*shape):
    return random.integers(0, 256, shape, np.uint8)

  palette = Image.fromarray(draw(90, 80, 3)).quantize(16)
  palette.info['transparency'] = bytes(range(0, 256, 16))
  return {'RGBA': Image.fromarray(draw(90, 80, 4)), 'LA': Image.fromarray(draw(90, 80, 2), 'LA'),
          'P': palette, 'RGB': Image.fromarray(draw(90, 80, 3)), 'L': Image.fromarray(draw(90, 80)),
          'I;16': Image.fromarray(random.integers(0, 2**16, [90, 80], np.uint16))}


def small_png(color_type, bit_depth, *chunks):
  """Returns a PNG of 8 x 7 random pixels, 0 (grey) or 3 (palette), with chunks like b'tRNS...'."""
  def chunk(data):
    return struct.pack('>I', len(data) - 4) + data + struct.pack('>I', zlib.crc32(data))

  random = np.random.default_rng(bit_depth)
  rows = [b'\0' + random.bytes(bit_depth) for _ in range(7)]
  header = b'IHDR' + struct.pack('>IIBBBBB', 8, 7, bit_depth, color_type, 0, 0, 0)
  return image_files.PNG + b''.join(
      chunk(data) for data in (header, *chunks, b'IDAT' + zlib.compress(b''.join(rows)), b'IEND'))


class DecodeTest(tf.test.TestCase):

  def decode(self, content):
    with tf.Graph().as_default(), tf.Session() as session:
      return session.run(formats.decode_on_white(tf.constant(content)))

  def test_transparency_becomes_white_as_in_records(self):
    for mode, image in transparent_images().items():
      content = encode(image)
      expected = np.asarray(image_files.to_rgb(Image.open(io.BytesIO(content))), int)
      self.assertAllClose(self.decode(content), expected, rtol=0, atol=1, msg=mode)

  def test_every_bit_depth(self):
    convert = image_files.Converter()
    palette = b'PLTE' + np.random.default_rng(0).bytes(3 * 256)
    for bit_depth, transparency in itertools.product((1, 2, 4, 8), (b'', b'tRNS\0\0')):
      for color_type, colors in [(0, b''), (3, palette[:4 + 3 * 2**bit_depth])]:
        content = small_png(color_type, bit_depth, *filter(None, [colors, transparency]))
        expected = np.asarray(image_files.to_rgb(Image.open(io.BytesIO(convert(content)[0]))), int)
        self.assertAllClose(self.decode(content), expected, rtol=0, atol=1,
                            msg=f'{color_type}, {bit_depth} bits, {transparency}')

  def test_jpeg(self):
    content = encode(transparent_images()['RGB'], 'JPEG')
    self.assertAllEqual(self.decode(content), np.asarray(Image.open(io.BytesIO(content))))


class FormatsTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.log_dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.log_dir)
    checkpoint = small_model.write_checkpoint(cls.log_dir)
    graph_def, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    cls.graph_def = folding.fold(graph_def, 'output')
    cls.images = small_model.validation_images()[0][::20]
    cls.expected = predict(cls.images)

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)

  def write(self, names, **settings):
    settings = formats.Settings(**settings)
    graph_def = self.graph_def
    if settings.batch_size:
      graph_def = formats.fix_batch_size(graph_def, settings.batch_size)
    return freeze.write_drafts(
        graph_def, small_model.CLASS_NAMES,
        {name: 'model' + formats.FORMATS[name].suffix for name in names}, self.dir, settings)

  def test_no_operation_computes_a_shape(self):
    self.assertEqual({node.op for node in self.graph_def.node}, {
        'AddV2', 'BiasAdd', 'Const', 'Conv2D', 'DepthwiseConv2dNative', 'Identity', 'MaxPool',
        'Mean', 'Placeholder', 'Relu', 'Softmax', 'Squeeze'})

  def test_saved_model(self):
    path = self.write(['saved_model'])['saved_model']
    weights = sum(len(node.attr['value'].tensor.tensor_content) for node in self.graph_def.node)
    self.assertBetween(models.num_bytes(path), weights, 1.2 * weights)  # not twice
    pictures = transparent_images()
    encoded = [encode(picture) for picture in pictures.values()]
    preprocess = models.Preprocessor(71)
    images = np.stack([preprocess(encode(image_files.to_rgb(Image.open(io.BytesIO(content)))))
                       for content in encoded])
    with tf.Graph().as_default(), tf.Session() as session:
      signatures = tf.saved_model.load(session, ['serve'], path).signature_def
      self.assertContainsSubset(['serving_default', 'encoded'], signatures)

      def run(name, key, batch):
        signature = signatures[name]
        return session.run(signature.outputs['probabilities'].name,
                           {signature.inputs[key].name: batch})

      self.assertAllClose(run('serving_default', 'images', self.images), self.expected, atol=1e-5)
      # A difference of 1/255 in some pixels.
      self.assertAllClose(run('encoded', 'encoded', encoded),
                          run('serving_default', 'images', images), rtol=0, atol=0.01)

  def test_a_fixed_batch_size(self):
    names = ['pb', 'saved_model', 'tflite', 'jpeg_pb'] + ['onnx'] * HAS_ONNX
    pictures = [encode(picture) for picture in transparent_images().values()]
    for name, path in self.write(names, batch_size=2).items():
      network = runtimes.open_network(path)
      self.assertEqual((network.input.shape[0], network.output.shape[0]), (2, 2), name)
      if name != 'jpeg_pb':
        self.assertAllClose(models.load(path).predict(self.images), self.expected, atol=1e-5)
      else:
        self.assertAllClose(models.load(path).predict(pictures[:5])[4:],
                            models.load(path).predict(pictures[4:5]), atol=1e-5)

  @unittest.skipUnless(HAS_ONNX, 'tf2onnx or onnxruntime is not installed')
  def test_onnx_settings(self):
    import onnx
    for opset, nchw, shape in [(13, False, [None, 71, 71, 3]), (18, True, [None, 3, 71, 71])]:
      path = self.write(['onnx'], opset=opset, nchw=nchw)['onnx']
      self.assertEqual(runtimes.open_network(path).input.shape, shape)
      self.assertEqual(onnx.load(path).opset_import[0].version, opset)
      self.assertAllClose(models.load(path).predict(self.images), self.expected, atol=1e-5)
    for opset in (12, 19):
      with self.assertRaisesRegex(formats.FormatError, f'--opset must be 13 to 18, got {opset}'):
        formats.require_packages(['onnx'], True, opset)
