"""Tests of models.load: predictions of every format, and the message for each faulty model."""

import json
import os
import shutil
import tempfile
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files
from export import folding
from export import formats
from export import freeze
from export import models
from records import flowers
from scripts import DATASET_DIR
import small_model
import xception_preprocessing


class FrozenModelsTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.dir)
    checkpoint = small_model.write_checkpoint(cls.dir)
    graph_def, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    cls.predict = staticmethod(predict)
    cls.paths = freeze.write_drafts(
        folding.fold(graph_def, 'output'), small_model.CLASS_NAMES,
        {name: 'model' + formats.FORMATS[name].suffix
         for name in ('pb', 'saved_model', 'tflite', 'jpeg_pb')}, cls.dir)

  def test_any_number_of_images(self):
    images = small_model.validation_images()[0][:5]
    expected = self.predict(images)
    for name in ('pb', 'saved_model', 'tflite'):
      model = models.load(self.paths[name])
      self.assertEqual((model.image_size, model.class_names), (71, small_model.CLASS_NAMES))
      for count in (5, 1, 3):
        self.assertAllClose(model.predict(images[:count]), expected[:count], rtol=0, atol=1e-5)
      with self.assertRaisesRegex(ValueError, 'got an empty batch'):
        model.predict(images[:0])

  def test_encoded_images(self):
    dataset = flowers.get_split('validation', DATASET_DIR)
    encoded = [tf.train.Example.FromString(dataset.records[i]).features.feature[
        'image/encoded'].bytes_list.value[0] for i in range(3)]
    model = models.load(self.paths['jpeg_pb'])
    self.assertIsNone(model.image_size)
    preprocess = models.Preprocessor(71)
    images = np.stack([preprocess(content) for content in encoded])
    self.assertAllEqual(images, small_model.validation_images()[0][:3])
    self.assertAllClose(model.predict(encoded), self.predict(images), rtol=0, atol=1e-5)

  def test_bfloat16(self):
    images = small_model.validation_images()[0][:8]
    for name in ('pb', 'saved_model'):
      probabilities = models.load(self.paths[name], 'bfloat16').predict(images)
      self.assertAllClose(probabilities, self.predict(images), rtol=0,
                          atol=formats.BFLOAT16_BOUND)
    with self.assertRaisesRegex(models.ModelError, 'only .pb and SavedModel run in bf'):
      models.load(self.paths['tflite'], 'bfloat16')

  def test_damaged_and_missing_models(self):
    with self.assertRaisesRegex(models.ModelError, 'no model none.pb: write_pb.py writes'):
      models.load('none.pb')
    empty = os.path.join(self.dir, 'empty')
    os.makedirs(empty, exist_ok=True)
    with self.assertRaisesRegex(models.ModelError, 'empty is not a SavedModel'):
      models.load(empty)
    for suffix, message in [('.pb', 'is empty|not a frozen graph|has no input'),
                            ('.tflite', 'not a TFLite model')]:
      with open(self.paths['pb' if suffix == '.pb' else 'tflite'], 'rb') as f:
        content = f.read()
      for damaged in (b'', b'not a model', content[:5]):
        path = os.path.join(self.dir, 'damaged' + suffix)
        with open(path, 'wb') as f:
          f.write(damaged)
        with self.assertRaisesRegex(models.ModelError, message):
          models.load(path)

  def test_an_empty_file(self):
    path = os.path.join(self.dir, 'empty.pb')
    with open(path, 'wb'):
      pass
    with self.assertRaisesRegex(models.ModelError, 'empty.pb is empty$'):
      models.load(path)

  def test_files_that_other_scripts_take(self):
    checkpoint = os.path.join(self.dir, f'model.ckpt-{small_model.GLOBAL_STEP}')
    for path in (checkpoint, f'{checkpoint}.index', self.dir):
      with self.assertRaisesRegex(models.ModelError, f'{path} is a checkpoint.*write_pb.py, or '
                                  'give it as --log_dir or --checkpoint_path'):
        models.load(path)
    for suffix in ('.keras', '.h5'):
      path = os.path.join(self.dir, f'model{suffix}')
      with open(path, 'wb'), self.assertRaisesRegex(
          models.ModelError, f'{path} is a Keras file: convert it with convert_keras_weights.py'):
        models.load(path)

  def test_checksums(self):
    with tempfile.TemporaryDirectory() as folder:
      path = shutil.copy(self.paths['tflite'], folder)
      shutil.copy(os.path.join(self.dir, 'labels.txt'), folder)
      with open(os.path.join(folder, 'model.json'), 'w') as f:
        json.dump({'global_step': 7, 'checkpoint': 'a', 'files': [
            {'file': 'model.tflite', 'sha256': files.sha256(path), 'global_step': 9}]}, f)
      model = models.load(path)
      self.assertEqual((model.image_size, model.description['global_step'],
                        model.description['checkpoint']), (71, 9, 'a'))
      os.truncate(path, os.path.getsize(path) // 2)
      with self.assertRaisesRegex(models.ModelError, 'model.tflite is damaged or is not the'):
        models.load(path)
      with open(os.path.join(folder, 'model.json'), 'w') as f:
        f.write('{}')
      with self.assertRaisesRegex(models.ModelError, 'Cannot read the model.json of'):
        models.load(path)

  def test_another_graph(self):
    with tf.Graph().as_default() as graph:
      tf.identity(tf.placeholder(tf.float32, [None, 2], name='x'), name='output')
    path = os.path.join(self.dir, 'other.pb')
    with open(path, 'wb') as f:
      f.write(graph.as_graph_def().SerializeToString())
    with self.assertRaisesRegex(models.ModelError, r"input x:0 has the shape \[None, 2\]"):
      models.load(path)

  def test_labels(self):
    with tempfile.TemporaryDirectory() as folder:
      path = shutil.copy(self.paths['pb'], folder)
      with self.assertRaisesRegex(models.ModelError, 'has 5 classes, and no .*labels.txt'):
        models.load(path)
      with open(os.path.join(folder, 'labels.txt'), 'w') as f:
        f.write('0:cat\n1:dog\n')
      with self.assertRaisesRegex(models.ModelError, 'labels.txt names 2 classes, but .* has 5'):
        models.load(path)
      with open(os.path.join(folder, 'labels.txt'), 'w') as f:
        f.write('cat\ndog\n')
      with self.assertRaisesRegex(
          models.ModelError, 'of .*model.pb: .*labels.txt, line 1: expected id:name like 0:daisy'):
        models.load(path)
      os.remove(os.path.join(folder, 'labels.txt'))
      with open(os.path.join(folder, 'model.json'), 'w') as f:
        json.dump({'class_names': ['cat', 'dog'], 'files': []}, f)
      with self.assertRaisesRegex(models.ModelError, 'model.json names 2 classes, but .* has 5'):
        models.load(path)

  def test_a_missing_runtime(self):
    path = os.path.join(self.dir, 'model.onnx')
    with open(path, 'w') as f:
      f.write('')
    with mock.patch.dict('sys.modules', {'onnxruntime': None}):
      with self.assertRaisesRegex(models.ModelError, 'pip install onnxruntime'):
        models.load(path)
    with mock.patch.dict('sys.modules', {'ai_edge_litert.interpreter': None}):
      with mock.patch.object(tf, 'lite', None):
        with self.assertRaisesRegex(models.ModelError, 'pip install ai-edge-litert'):
          models.load(self.paths['tflite'])

  def test_preprocessing_is_that_of_evaluation(self):
    image = np.random.default_rng(0).integers(0, 256, [83, 120, 3], np.uint8)
    with tf.Graph().as_default(), tf.Session() as session:
      encoded = session.run(tf.image.encode_png(image))
      expected = session.run(xception_preprocessing.preprocess_image(
          tf.constant(image), 71, 71, is_training=False))
    self.assertAllEqual(models.Preprocessor(71)(encoded), expected)
