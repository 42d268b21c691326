"""Tests of models.load on models that write_pb.py did not write."""

import importlib.util
import json
import os
import shutil
import tempfile
import unittest

import numpy as np
import tensorflow.compat.v1 as tf

from export import models
import small_model

SIZE = 75
HAS_ONNX = all(importlib.util.find_spec(name) for name in ('onnx', 'onnxruntime'))


def build(images, image_size=SIZE):
  """A small classifier whose probabilities differ from image to image and depend on positions."""
  net = tf.reshape(tf.nn.avg_pool2d(images, 15, 15, 'VALID'), [-1, (image_size // 15)**2 * 3])
  weights = np.random.default_rng(0).normal(0, 2, [net.shape[1], 5]).astype(np.float32)
  return net @ tf.constant(weights)


def random_images(count):
  images = np.random.default_rng(1).uniform(-1, 1, [count, 5, 5, 3])
  return images.repeat(15, 1).repeat(15, 2).astype(np.float32)


def expected_probabilities(images):
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(tf.nn.softmax(build(tf.constant(images))))


class ForeignModelTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    with open(os.path.join(self.dir, 'labels.txt'), 'w') as f:
      f.writelines(f'{label}:{name}\n' for label, name in enumerate(small_model.CLASS_NAMES))
    self.images = random_images(5)
    self.expected = expected_probabilities(self.images)

  def write(self, name, content):
    path = os.path.join(self.dir, name)
    with open(path, 'wb') as f:
      f.write(content)
    return path

  def check(self, path, atol=1e-5):
    model = models.load(path)
    self.assertEqual((model.image_size, model.class_names), (SIZE, small_model.CLASS_NAMES))
    for count in (5, 1, 3):
      self.assertAllClose(model.predict(self.images[:count]), self.expected[:count],
                          rtol=0, atol=atol)
    return model


class PbTest(ForeignModelTest):

  def write_graph(self, transform=tf.nn.softmax, shape=(None, SIZE, SIZE, 3), name='x',
                  more=lambda: None, dtype=tf.float32):
    with tf.Graph().as_default() as graph:
      images = tf.cast(tf.placeholder(dtype, shape, name=name), tf.float32)
      transform(build(tf.transpose(images, [0, 2, 3, 1]) if shape[1] == 3 else images))
      more()
    return self.write('model.pb', graph.as_graph_def().SerializeToString())

  def test_other_names_and_a_fixed_batch(self):
    self.check(self.write_graph())
    self.check(self.write_graph(shape=(2, SIZE, SIZE, 3)))
    self.check(self.write_graph(
        lambda logits: tf.nn.softmax(logits)[:, tf.newaxis, tf.newaxis], name='data'))

  def test_the_one_of_several_that_is_named(self):
    self.check(self.write_graph(
        lambda logits: tf.nn.softmax(logits, name='output'), name='input',
        more=lambda: [tf.placeholder(tf.bool, name='is_training'), tf.constant(1.0) + 1.0]))
    for consume in (lambda output: tf.argmax(output, 1), lambda output: tf.nn.top_k(output, 2)):
      self.check(self.write_graph(
          lambda logits, consume=consume: consume(tf.nn.softmax(logits, name='output'))))

  def test_layouts_and_types(self):
    self.check(self.write_graph(shape=(None, 3, SIZE, SIZE)))
    self.check(self.write_graph(
        lambda logits: tf.nn.softmax(logits)[:, :, tf.newaxis, tf.newaxis]))
    self.check(self.write_graph(dtype=tf.float64))
    self.check(self.write_graph(dtype=tf.float16), atol=0.02)
    model = models.load(self.write_graph(dtype=tf.uint8))
    with self.assertRaisesRegex(models.ModelError, 'x:0 is uint8 without a scale'):
      model.predict(self.images)

  def test_unknown_image_size(self):
    path = self.write_graph(shape=(None, None, None, 3))
    with self.assertRaisesRegex(models.ModelError, 'leaves the image size open'):
      models.load(path)
    with open(os.path.join(self.dir, 'model.json'), 'w') as f:
      json.dump({'image_size': SIZE, 'files': []}, f)
    self.check(path)
    with open(os.path.join(self.dir, 'model.json'), 'w') as f:
      json.dump({'image_size': SIZE, 'class_names': small_model.CLASS_NAMES, 'files': []}, f)
    os.remove(os.path.join(self.dir, 'labels.txt'))
    self.check(path)

  def test_wrong_values_in_model_json(self):
    path = self.write_graph(shape=(None, None, None, 3))
    size = 'image_size must be a whole number from 1 to 10000'
    names = 'class_names must be a list of texts'
    for content, message in [
        ({'image_size': '75'}, f"{size}, got '75'"), ({'image_size': 75.0}, f'{size}, got 75.0'),
        ({'image_size': [75]}, f'{size}, got [75]'), ({'image_size': 0}, f'{size}, got 0'),
        ({'image_size': 10001}, f'{size}, got 10001'), ({'image_size': True}, f'{size}, got True'),
        ({'class_names': {'0': 'a'}}, f"{names}, got {{'0': 'a'}}"),
        ({'class_names': 5}, f'{names}, got 5'), ({'class_names': [1, 2]}, f'{names}, got [1, 2]'),
        ({'global_step': 'x'}, "global_step must be a whole number of 0 or more, got 'x'"),
        ({'files': [{'file': ['x']}]}, "file must be a text, got ['x']"),
        ({'files': [{'image_size': None}]}, f'{size}, got None')]:
      with open(os.path.join(self.dir, 'model.json'), 'w') as f:
        json.dump({'image_size': SIZE, 'files': [], **content}, f)
      with self.assertRaises(models.ModelError) as error:
        models.load(path)
      self.assertEqual(str(error.exception), f'{self.dir}/model.json: {message}')

  def test_refused_models(self):
    for path, message in [
        (lambda: self.write_graph(more=lambda: tf.placeholder(tf.bool, name='is_training')),
         'has 2 inputs, is_training, x: one must be named input'),
        (lambda: self.write_graph(more=lambda: tf.identity(tf.constant(1.0), name='loss')),
         'has 2 outputs, Softmax, loss: one must be named output'),
        (lambda: self.write_graph(shape=(None, SIZE, 90, 3)),
         r'the shape \[None, 75, 90, 3\], expected square images'),
        (lambda: self.write_graph(shape=(None, SIZE, SIZE, 1)),
         r'the shape \[None, 75, 75, 1\], expected square images of 3 channels'),
        (lambda: self.write_graph(lambda logits: tf.nn.softmax(logits)[:, :3]), 'has 3'),
        (lambda: self.write_graph(lambda logits: tf.reduce_mean(logits, name='loss')),
         r'its output loss:0 has the shape \[\], expected \[n, num_classes\]'),
        (lambda: self.write_graph(lambda logits: tf.io.write_file('x', tf.as_string(logits[0, 0]))),
         'has no output: one must be named output'),
        (lambda: self.write_graph(more=lambda: tf.Variable(1.0)), 'has variables')]:
      with self.assertRaisesRegex(models.ModelError, message):
        models.load(path())
    for reduce, shape in [(lambda logits: tf.reduce_mean(logits), r'\(\)'),
                          (lambda logits: tf.nn.softmax(logits)[:1], r'\(1, 5\)')]:
      model = models.load(self.write_graph(
          lambda logits, reduce=reduce: tf.placeholder_with_default(reduce(logits), None),
          name='input'))
      with self.assertRaisesRegex(models.ModelError, f'an array of shape {shape} for a batch of 5'):
        model.predict(self.images)
    model = models.load(self.write_graph(tf.identity))
    with self.assertRaisesRegex(models.ModelError, 'must end with a softmax'):
      model.predict(self.images)

  def test_the_file_in_a_saved_model(self):
    path = os.path.join(self.dir, 'other')
    with tf.Graph().as_default(), tf.Session() as session:
      images = tf.placeholder(tf.float32, [None, SIZE, SIZE, 3])
      tf.saved_model.simple_save(session, path, {'pixels': images},
                                 {'scores': tf.nn.softmax(build(images))})
    self.check(path)
    self.check(os.path.join(path, 'saved_model.pb'))

  def test_a_saved_model_without_the_values_of_its_variables(self):
    path = os.path.join(self.dir, 'keras')
    with tf.Graph().as_default(), tf.Session() as session:
      images = tf.placeholder(tf.float32, [None, SIZE, SIZE, 3])
      scale = tf.Variable(1.0, collections=['not_saved'])
      tf.saved_model.simple_save(session, path, {'images': images},
                                 {'scores': tf.nn.softmax(build(images) * scale)})
    with self.assertRaisesRegex(
        models.ModelError, 'keras does not run: its variables have no values: .* model.export'):
      models.load(path).predict(self.images)

  def test_signatures_of_a_saved_model(self):
    def save(folder, images_key, output_key, signature='serving_default'):
      path = os.path.join(self.dir, folder)
      with tf.Graph().as_default(), tf.Session() as session:
        images = tf.placeholder(tf.float32, [None, SIZE, SIZE, 3])
        logits = build(images)
        builder = tf.saved_model.Builder(path)
        builder.add_meta_graph_and_variables(session, ['serve'], {
            signature: tf.saved_model.predict_signature_def(
                {images_key: images, 'rate': tf.placeholder(tf.float32, [])},
                {output_key: tf.nn.softmax(logits), 'logits': logits})})
        builder.save()
      return path

    self.check(save('named', 'images', 'probabilities'))
    for path, message in [
        (save('inputs', 'pixels', 'probabilities'), 'has 2 inputs, pixels, rate: one must'),
        (save('outputs', 'images', 'scores'), 'has 2 outputs, logits, scores: one must be named'),
        (save('other', 'images', 'probabilities', 'predict'),
         'other is not a SavedModel with a signature serving_default: it has predict')]:
      with self.assertRaisesRegex(models.ModelError, message):
        models.load(path)


class TFLiteTest(ForeignModelTest):

  def convert(self, shape=(None, SIZE, SIZE, 3), io_type=None):
    with tf.Graph().as_default(), tf.Session() as session:
      images = tf.placeholder(tf.float32, shape, name='x')
      converter = tf.lite.TFLiteConverter.from_session(
          session, [images], [tf.nn.softmax(build(images))])
      if io_type:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[np.newaxis]]
                                                    for image in random_images(50))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = io_type
      return converter.convert()

  def test_8_bit_input_and_output(self):
    for io_type in (tf.uint8, tf.int8):
      self.check(self.write('int8.tflite', self.convert(io_type=io_type)), atol=0.05)

  def test_a_fixed_batch(self):
    self.check(self.write('one.tflite', self.convert((1, SIZE, SIZE, 3))))
    self.check(self.write('two.tflite', self.convert((2, SIZE, SIZE, 3))))

  def test_truncated_files(self):
    content = self.convert()
    for length in [*range(8, len(content) - 64, 97), len(content) // 2]:
      path = self.write('cut.tflite', content[:length])
      with self.assertRaisesRegex(models.ModelError, 'cut.tflite is damaged or truncated'):
        models.load(path)


@unittest.skipUnless(HAS_ONNX, 'onnx or onnxruntime is not installed')
class OnnxTest(ForeignModelTest):

  def write_onnx(self, shape, is_channels_first=False):
    import onnx
    nodes, net = [], 'data'
    if not is_channels_first:
      nodes.append(onnx.helper.make_node('Transpose', ['data'], ['nchw'], perm=[0, 3, 1, 2]))
      net = 'nchw'
    weights = np.random.default_rng(0).normal(0, 2, [75, 5]).astype(np.float32)
    nodes += [
        onnx.helper.make_node('AveragePool', [net], ['pool'], kernel_shape=[15, 15],
                              strides=[15, 15]),
        onnx.helper.make_node('Transpose', ['pool'], ['nhwc'], perm=[0, 2, 3, 1]),
        onnx.helper.make_node('Flatten', ['nhwc'], ['flat']),
        onnx.helper.make_node('MatMul', ['flat', 'weights'], ['logits']),
        onnx.helper.make_node('Softmax', ['logits'], ['scores'])]
    graph = onnx.helper.make_graph(
        nodes, 'g', [onnx.helper.make_tensor_value_info('data', onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info('scores', onnx.TensorProto.FLOAT, [shape[0], 5])],
        [onnx.numpy_helper.from_array(weights, 'weights')])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)],
                                   ir_version=9)
    return self.write('model.onnx', model.SerializeToString())

  def test_layouts_and_batches(self):
    self.check(self.write_onnx(['n', SIZE, SIZE, 3]))
    self.check(self.write_onnx(['n', 3, SIZE, SIZE], is_channels_first=True))
    self.check(self.write_onnx([1, 3, SIZE, SIZE], is_channels_first=True))

  def test_a_truncated_file(self):
    with open(self.write_onnx([1, SIZE, SIZE, 3]), 'rb') as f:
      content = f.read()
    with self.assertRaisesRegex(models.ModelError, 'not an ONNX model'):
      models.load(self.write('cut.onnx', content[:len(content) // 2]))
