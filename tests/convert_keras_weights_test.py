"""Tests both directions of the conversion, every file format and every error.

Keras needs TensorFlow 2's behavior, which slim's graphs need switched off, so
`in_keras` runs what needs Keras in a process of its own, KERAS.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import h5py
import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from conversion import keras_models
import convert_keras_weights
from create_tfrecords_test import image_bytes
import eval_flowers
from keras_equivalence_test import keras_process
from keras_equivalence_test import patches
from keras_equivalence_test import randomize
from records import flowers
from scripts import PROJECT
import xception

SIZES = [(107, 139), (128, 128)]
# Weights as Keras 2 wrote them, a whole model in HDF5, and Keras 3's two formats.
FORMATS = ['keras_2.h5', 'model.h5', 'xception.weights.h5', 'xception.keras']
MODELS = {}  # {number of classes, 0 for no classifier: model}, in the process KERAS only


def setUpModule():
  global FOLDER, KERAS, IMAGES, KERAS_LOGITS, WEIGHTS, KERAS_FILE
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  FOLDER = tempfile.mkdtemp()
  # Keeps the tests away from the user's downloads. Keras reads it once, at its import.
  os.environ['KERAS_HOME'] = os.path.join(FOLDER, 'keras_home')
  KERAS = keras_process()
  random = np.random.default_rng(0)
  IMAGES = [patches(height, width, random) for height, width in SIZES]
  KERAS_LOGITS, WEIGHTS = in_keras(make_models, IMAGES)
  KERAS_FILE = os.path.join(FOLDER, 'keras_2.h5')
  in_keras(save, 5, KERAS_FILE)


def tearDownModule():
  KERAS.shutdown()
  del os.environ['KERAS_HOME']
  shutil.rmtree(FOLDER)


def in_keras(function, *args):
  """Returns function(*args), run in the process KERAS; re-raises its exceptions."""
  return KERAS.submit(function, *args).result()


def make_models(images):
  """Fills MODELS with models of random weights.

  Args:
    images: list of float32 [n, height, width, 3] batches.

  Returns:
    {number of classes: list of logits, one array per batch}, and the slim
    weights of the model with 5 classes.
  """
  keras = keras_models.import_keras()
  for num_classes in (5, 1000):
    MODELS[num_classes] = keras.applications.Xception(
        weights=None, classes=num_classes, classifier_activation=None,
        input_tensor=keras.Input([None, None, 3]))
    randomize(MODELS[num_classes], np.random.default_rng(num_classes))
  MODELS[0] = keras.applications.Xception(weights=None, include_top=False)
  for layer, source in zip(MODELS[0].layers, MODELS[5].layers):
    layer.set_weights(source.get_weights())
  logits = {num_classes: [np.array(MODELS[num_classes]([batch], training=False))
                          for batch in images] for num_classes in (5, 1000)}
  return logits, keras_models.slim_weights(MODELS[5])


def save(num_classes, path):
  """Saves one of MODELS in one of FORMATS."""
  model = MODELS[num_classes]
  if path.endswith('.weights.h5'):
    model.save_weights(path)
  elif path.endswith('keras_2.h5'):
    model.save(path + '.h5')
    with h5py.File(path + '.h5') as whole, h5py.File(path, 'w') as weights:
      for name in whole['model_weights']:
        whole.copy(f'model_weights/{name}', weights)
      weights.attrs.update(whole['model_weights'].attrs)
    os.remove(path + '.h5')
  else:
    model.save(path)


def load(path, images=None):
  """Loads a file that the script wrote, the way users of Keras do.

  Returns:
    Its slim weights, its (height, width), and its probabilities for `images`
    or None.
  """
  keras = keras_models.import_keras()
  model = (keras.applications.Xception(weights=path, classes=5)
           if path.endswith('.weights.h5') else keras.saving.load_model(path))
  probabilities = None if images is None else np.array(model(images, training=False))
  return keras_models.slim_weights(model), model.input_shape[1:3], probabilities


def convert(*args):
  """Runs the script's main and returns what it printed."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    convert_keras_weights.main(convert_keras_weights.parse_args(args))
  return output.getvalue()


def convert_imagenet(weights, weights_without_top, checkpoint):
  """Converts files as if Keras had downloaded them as its ImageNet weights.

  It converts them three times: with the class names out of reach, with the
  class names, and without logits.

  Returns:
    The checksums that Keras was asked to verify, the three outputs, and the
    class names of the first two checkpoints.
  """
  names = os.path.join(os.path.dirname(weights), 'names.json')
  with open(names, 'w') as f:
    json.dump({i: [f'n{i:08}', f'name_{i}'] for i in range(1000)}, f)
  args = ['--keras_weights', 'imagenet', '--output_checkpoint', checkpoint, '--overwrite']
  with mock.patch('keras.src.utils.file_utils.get_file', side_effect=[
      weights, Exception('URL fetch failure'), weights, names, weights_without_top]) as get_file:
    outputs = [convert(*args)]
    class_names = [checkpoints.load_config(checkpoint).class_names]
    outputs.append(convert(*args))
    class_names.append(checkpoints.load_config(checkpoint).class_names)
    outputs.append(convert(*args, '--num_classes', '0'))
  return [call.kwargs['file_hash'] for call in get_file.call_args_list], outputs, class_names


def fail_to_download(url, checkpoint):
  """Converts the ImageNet weights as if Keras published them at `url`."""
  with mock.patch('keras.src.applications.xception.WEIGHTS_PATH', url):
    convert('--keras_weights', 'imagenet', '--output_checkpoint', checkpoint)


def save_other_network(path):
  """Saves a network of one layer in the format that the suffix asks for."""
  keras = keras_models.import_keras()
  model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
  (model.save_weights if path.endswith('.weights.h5') else model.save)(path)


def save_small_model(path):
  """Saves a model with one sigmoid output for images of 71 pixels."""
  keras = keras_models.import_keras()
  inputs = keras.Input([71, 71, 3])
  base = keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3))
  randomize(base, np.random.default_rng(0))
  pooled = keras.layers.GlobalAveragePooling2D()(base(inputs))
  keras.Model(inputs, keras.layers.Dense(1, 'sigmoid')(pooled)).save(path)


def convert_with_other_answers(path, checkpoint):
  """Converts a file as if Keras answered with the classes swapped."""
  with mock.patch.object(keras_models, 'probabilities',
                         lambda outputs, activation: np.concatenate([outputs, 1 - outputs], 1)):
    convert('--keras_weights', path, '--output_checkpoint', checkpoint)


def read(checkpoint):
  """Returns {name: value} of a checkpoint."""
  reader = tf.train.load_checkpoint(checkpoint)
  return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def build(num_classes, depth_multiplier=1.0):
  """Builds the slim network for images of any size; returns (images, logits)."""
  images = tf.placeholder(tf.float32, [None, None, None, 3])
  with slim.arg_scope(xception.xception_arg_scope()):
    return images, xception.xception(images, num_classes, is_training=False,
                                     depth_multiplier=depth_multiplier)[0]


def slim_logits(checkpoint, num_classes, batches):
  """Returns the slim network's logits, one array for each batch of images."""
  with tf.Graph().as_default(), tf.Session() as session:
    images, logits = build(num_classes)
    checkpoints.restore(session, checkpoint)
    return [session.run(logits, {images: batch}) for batch in batches]


def softmax(logits):
  exp = np.exp(logits - logits.max(1, keepdims=True))
  return exp / exp.sum(1, keepdims=True)


class ConversionTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp(dir=FOLDER)
    self.addCleanup(shutil.rmtree, self.dir)
    self.checkpoint = os.path.join(self.dir, 'ckpt', 'xception.ckpt')

  def path(self, name):
    return os.path.join(self.dir, name)

  def save(self, num_classes, name):
    path = self.path(name)
    in_keras(save, num_classes, path)
    return path

  def to_slim(self, keras_weights, *args):
    return in_keras(convert, '--keras_weights', keras_weights,
                    '--output_checkpoint', self.checkpoint, *args)

  def to_keras(self, checkpoint, name, *args):
    return in_keras(convert, '--checkpoint', checkpoint, '--output_keras', self.path(name), *args)

  def assertSameWeights(self, weights, expected):
    self.assertCountEqual(weights, expected)
    for name, value in expected.items():
      self.assertEqual(weights[name].dtype, value.dtype, name)
      np.testing.assert_array_equal(weights[name], value, name)

  def assertRefused(self, message, function, *args):
    with self.assertRaisesRegex((keras_models.ConversionError,
                                 checkpoints.CheckpointError, flowers.DatasetError), message):
      function(*args)


class KerasToSlimTest(ConversionTestCase):

  def test_every_format(self):
    for name in FORMATS:
      output = self.to_slim(self.save(5, name), '--num_classes', '5', '--overwrite')
      self.assertIn(f'Read 236 weights of {self.path(name)}: 20,871,725 parameters, 5 classes',
                    output)
      self.assertEndsWith(output, 'model_config.json\n')
      self.assertSameWeights(read(self.checkpoint), {**WEIGHTS, 'global_step': np.int64(0)})
    self.assertCountEqual(os.listdir(os.path.dirname(self.checkpoint)), [
        'checkpoint', 'model_config.json', 'xception.ckpt.data-00000-of-00001',
        'xception.ckpt.index'])

  def test_every_format_without_top(self):
    expected = {name: value for name, value in WEIGHTS.items() if '/Logits/' not in name}
    self.assertLen(expected, 234)
    for name in FORMATS:
      output = self.to_slim(self.save(0, name), '--num_classes', '5', '--overwrite')
      self.assertIn('20,861,480 parameters, no classes', output)
      self.assertIn('without logits, for fine-tuning', output)
      self.assertSameWeights(read(self.checkpoint), {**expected, 'global_step': np.int64(0)})
    self.assertNotIn('model_config.json', os.listdir(os.path.dirname(self.checkpoint)))

  def test_same_logits(self):
    for num_classes in (5, 1000):
      self.to_slim(self.save(num_classes, 'model.h5'), '--num_classes', str(num_classes),
                   '--overwrite')
      found = slim_logits(self.checkpoint, num_classes, IMAGES)
      for logits, expected in zip(found, KERAS_LOGITS[num_classes]):
        self.assertEqual(logits.shape, (2, num_classes))
        largest = np.abs(expected).max()
        self.assertLess(np.abs(logits - expected).max(), 1e-5 * largest)
        # The images differ enough for the comparison to mean something.
        self.assertGreater(np.abs(expected[0] - expected[1]).max(), 0.01 * largest)

  def test_eval_flowers_takes_the_checkpoint(self):
    labels = self.path('labels.txt')
    with open(labels, 'w') as f:
      f.write('0:daisy\n1:dandelion\n2:roses\n3:sunflowers\n4:tulips\n')
    self.to_slim(KERAS_FILE, '--num_classes', '5', '--labels', labels)
    config = checkpoints.load_config(self.checkpoint)
    self.assertEqual(config, checkpoints.ModelConfig(
        ['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips'], 299, 1.0, 0))

    with tf.python_io.TFRecordWriter(self.path(flowers.shard_name('validation', 0, 1))) as writer:
      for i in range(3):
        writer.write(flowers.make_example(image_bytes([i]), 'jpg', i, 1, 1).SerializeToString())
    with tf.Graph().as_default():
      eval_flowers.main(eval_flowers.parse_args(
          ['--dataset_dir', self.dir, '--checkpoint_path', os.path.dirname(self.checkpoint),
           '--log_eval', self.path('eval')]))
    with open(self.path('eval/metrics.json')) as f:
      metrics = json.load(f)
    self.assertEqual((metrics['num_images'], metrics['global_step']), (3, 0))

  def test_imagenet(self):
    weights, weights_without_top = self.save(1000, 'keras_2.h5'), self.save(0, 'model.h5')
    hashes, outputs, class_names = in_keras(
        convert_imagenet, weights, weights_without_top, self.checkpoint)
    # The MD5 sums of the files that Keras publishes.
    with_top, names, without_top = ('0a58e3b7378bc2990ea3b43d5981f1f6',
                                    'c2c37ea517e94d9795004a39431a14cb',
                                    'b0042744bf5b25fce3cb969f33bebb97')
    self.assertEqual(hashes, [with_top, names, with_top, names, without_top])
    for output in outputs[:2]:
      self.assertIn('Read 236 weights of imagenet: 22,910,480 parameters, 1000 classes', output)
    self.assertIn('named class_0 to class_999; --labels sets other names', outputs[0])
    self.assertEqual(class_names[0], [f'class_{i}' for i in range(1000)])
    self.assertNotIn('--labels', outputs[1])
    self.assertEqual(class_names[1], [f'name_{i}' for i in range(1000)])
    self.assertIn('without logits', outputs[2])
    # The earlier model_config.json described a checkpoint with logits.
    self.assertNotIn('model_config.json', os.listdir(os.path.dirname(self.checkpoint)))

  def test_imagenet_download_fails(self):
    message = 'Keras cannot get its ImageNet weights: .*{}.*. Run it again, or download the file'
    path = self.path('xception.h5')
    self.assertRefused(message.format('URL fetch failure on file://.*No such file'),
                       in_keras, fail_to_download, f'file://{path}', self.checkpoint)
    self.assertRefused(message.format('Connection refused'),
                       in_keras, fail_to_download, 'http://127.0.0.1:1/x.h5', self.checkpoint)
    with open(path, 'w') as f:
      f.write('something else')
    self.assertRefused(message.format('file hash does not match .*0a58e3b7378bc2990ea3b43d5981'),
                       in_keras, fail_to_download, f'file://{path}', self.checkpoint)
    self.assertRefused('have 1000 classes, not 5: leave --num_classes out', convert,
                       '--keras_weights', 'imagenet', '--num_classes', '5',
                       '--output_checkpoint', self.checkpoint)
    self.assertEqual(os.listdir(self.dir), ['xception.h5'])
    self.assertLen(os.listdir(os.path.join(os.environ['KERAS_HOME'], 'models')), 1)

  def test_another_number_of_classes(self):
    for num_classes in ('0', '7'):
      self.assertRefused(f'keras_2.h5 has 5 classes, not {num_classes}: give --num_classes 5',
                         self.to_slim, KERAS_FILE, '--num_classes', num_classes)
    self.assertFalse(os.path.exists(os.path.dirname(self.checkpoint)))

  def test_damaged_and_foreign_files(self):
    with open(self.save(5, 'xception.weights.h5'), 'rb') as f:
      start = f.read(1_000_000)
    for name, content in [('cut.weights.h5', start), ('empty.h5', b''), ('text.keras', b'text')]:
      with open(self.path(name), 'wb') as f:
        f.write(content)
    for name in ('other.h5', 'other.weights.h5'):
      in_keras(save_other_network, self.path(name))
    for message in [
        'cut.weights.h5 is not a Keras file, or is damaged: .*truncated file',
        'empty.h5 is not a Keras file, or is damaged', 'text.keras is not a Keras file',
        'other.h5 cannot be converted: it holds no Xception',
        "other.weights.h5 does not hold Keras' Xception: it lacks weights for block1_conv1"]:
      with self.assertRaisesRegex(keras_models.ConversionError, message) as context:
        self.to_slim(self.path(message.split()[0]))
      self.assertNotIn('\n', str(context.exception))
    self.assertFalse(os.path.exists(os.path.dirname(self.checkpoint)))

  def test_image_size(self):
    path = self.path('small.keras')
    in_keras(save_small_model, path)
    labels = self.path('labels.txt')
    with open(labels, 'w') as f:
      f.write('0:no\n1:yes\n')
    output = self.to_slim(path, '--labels', labels)
    self.assertRegex(
        output, r"The slim network reproduces Keras' outputs: they differ by at most \S+-0")
    config = checkpoints.load_config(self.checkpoint)
    self.assertEqual((config.image_size, config.class_names), (71, ['no', 'yes']))
    self.assertRefused('is for images of 71 x 71 pixels, not 299: leave --image_size out',
                       self.to_slim, path, '--image_size', '299', '--overwrite')
    # Weights alone do not say how large the images are.
    self.assertIn('299 x 299 pixels are assumed', self.to_slim(KERAS_FILE, '--overwrite'))
    config = checkpoints.load_config(self.checkpoint)
    self.assertEqual((config.image_size, config.class_names),
                     (299, [f'class_{i}' for i in range(5)]))
    self.to_slim(KERAS_FILE, '--image_size', '128', '--overwrite')
    self.assertEqual(checkpoints.load_config(self.checkpoint).image_size, 128)

  def test_other_answers_than_those_of_keras(self):
    path = self.path('small.keras')
    in_keras(save_small_model, path)
    self.assertRefused('The slim network outputs .* where Keras outputs', in_keras,
                       convert_with_other_answers, path, self.checkpoint)
    self.assertEqual(os.listdir(os.path.dirname(self.checkpoint)), [])

  def test_options_that_weights_without_classifier_cannot_keep(self):
    path = self.save(0, 'model.h5')
    labels = self.path('labels.txt')
    with open(labels, 'w') as f:
      f.write('0:cat\n1:dog\n')
    for option in (['--labels', labels], ['--image_size', '128']):
      self.assertRefused('has no classifier.* leave --labels and --image_size out',
                         self.to_slim, path, *option)

  def test_checkpoint_given_as_keras_file(self):
    path = write(self.path('model.ckpt'), {'Xception/w': np.zeros(1)})
    tf.train.update_checkpoint_state(self.dir, path)
    for given in (path, self.dir):
      self.assertRefused(f'{given} is a checkpoint, not a Keras file: give it as --checkpoint',
                         convert, '--keras_weights', given, '--output_checkpoint', self.checkpoint)

  def test_mistakes_found_before_keras_is_loaded(self):
    def to_slim(weights, *args):
      convert('--keras_weights', weights, '--output_checkpoint', self.checkpoint, *args)

    self.assertRefused('There is no file none.h5: give --keras_weights', to_slim, 'none.h5')
    self.assertRefused(f'There is no file {self.dir}', to_slim, self.dir)
    path = self.path('xception.npz')
    with open(path, 'w'):
      pass
    self.assertRefused(f'{path} must end in one of .h5, .hdf5, .keras', to_slim, path)
    self.assertRefused('Cannot read none.txt', to_slim, path, '--labels', 'none.txt')

    os.mkdir(os.path.dirname(self.checkpoint))
    for name in ('checkpoint', 'model_config.json', 'xception.ckpt.index',
                 'xception.ckpt.data-00000-of-00001'):
      existing = os.path.join(os.path.dirname(self.checkpoint), name)
      with open(existing, 'w'):
        pass
      self.assertRefused(f'{existing} exists: choose another folder or name, or add --overwrite',
                         to_slim, path)
      os.remove(existing)

  def test_labels_with_another_number_of_classes(self):
    labels = self.path('labels.txt')
    with open(labels, 'w') as f:
      f.write('0:cat\n1:dog\n')
    self.assertRefused(f'--labels names 2 classes, but {KERAS_FILE} has 5', self.to_slim,
                       KERAS_FILE, '--num_classes', '5', '--labels', labels)
    self.assertEqual(os.listdir(self.dir), ['labels.txt'])

  def test_unwritable_output(self):
    with open(os.path.dirname(self.checkpoint), 'w'):
      pass
    self.assertRefused(f'Cannot write {self.checkpoint} .*File exists.*: free some space',
                       self.to_slim, KERAS_FILE, '--num_classes', '5')


def write(path, variables):
  """Writes a checkpoint of {name: value}; returns its path."""
  with tf.Graph().as_default(), tf.Session() as session:
    tensors = [tf.placeholder(value.dtype, value.shape) for value in variables.values()]
    save_op = tf.raw_ops.SaveV2(prefix=path, tensor_names=list(variables),
                                shape_and_slices=[''] * len(variables), tensors=tensors)
    session.run(save_op, dict(zip(tensors, variables.values())))
  return path


class SlimToKerasTest(ConversionTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # WEIGHTS are the averages; the weights themselves are twice as large.
    cls.log_dir = os.path.join(FOLDER, 'log')
    os.mkdir(cls.log_dir)
    cls.trained = write(os.path.join(cls.log_dir, 'model.ckpt-7'), {
        'global_step': np.int64(7), **{name: 2 * value for name, value in WEIGHTS.items()},
        **{f'{name}/ExponentialMovingAverage': value for name, value in WEIGHTS.items()}})
    tf.train.update_checkpoint_state(cls.log_dir, cls.trained)
    checkpoints.save_config(checkpoints.ModelConfig(list('abcde'), 128, 1.0, 1), cls.log_dir)

  def test_averages(self):
    output = self.to_keras(self.log_dir, 'new/xception.keras')
    self.assertIn(f'Read 236 weights of {self.trained}: their Polyak averages; '
                  '20,871,725 parameters, 5 classes, images of 128 x 128', output)
    self.assertRegex(output, r'Wrote .*new/xception.keras \(8\d\.\d MB\)\n$')
    self.assertEqual(os.listdir(self.path('new')), ['xception.keras'])
    weights, size, probabilities = in_keras(load, self.path('new/xception.keras'), IMAGES[1])
    self.assertSameWeights(weights, WEIGHTS)
    self.assertEqual(size, (128, 128))
    expected, = slim_logits(self.trained, 5, IMAGES[1:])
    self.assertAllClose(probabilities, softmax(expected), rtol=1e-5, atol=1e-6)

  def test_weights_without_averages(self):
    with open(self.path('xception.h5'), 'w') as f:
      f.write('old')
    output = self.to_keras(self.trained, 'xception.h5', '--use_averages', 'no', '--overwrite')
    self.assertIn('as trained, not averaged', output)
    weights, size, _ = in_keras(load, self.path('xception.h5'))
    self.assertSameWeights(weights, {name: 2 * value for name, value in WEIGHTS.items()})
    self.assertEqual(size, (128, 128))

  def test_there_and_back_again(self):
    self.to_slim(KERAS_FILE, '--num_classes', '5')
    output = self.to_keras(self.checkpoint, 'back.weights.h5')
    self.assertIn('as trained, not averaged', output)
    self.assertIn('images of 299 x 299', output)
    weights, _, _ = in_keras(load, self.path('back.weights.h5'))
    self.assertSameWeights(weights, WEIGHTS)
    self.assertRefused('has no averages of the weights', self.to_keras, self.checkpoint, 'x.keras',
                       '--use_averages', 'yes')

  def test_other_networks(self):
    def refuse(message, variables):
      self.assertRefused(message, self.to_keras, write(self.path('model.ckpt'), variables),
                         'x.keras')

    # The large weights are cut down to one number: only their names matter here.
    zeros = {name: np.zeros(value.shape, np.float32) if value.size < 10_000 else
             np.zeros([1], np.float32) for name, value in WEIGHTS.items()}
    zeros['Xception/Logits/weights'] = WEIGHTS['Xception/Logits/weights']
    other = "does not hold Keras' Xception: it "
    refuse(other + 'lacks Xception/block1_conv1/weights. Convert', {'InceptionV3/w': np.zeros(1)})
    refuse(other + 'has fc1', {**zeros, 'Xception/fc1/weights': np.zeros(1)})
    del zeros['Xception/block1_conv1/BatchNorm/gamma']
    refuse(other + 'lacks Xception/block1_conv1/BatchNorm/gamma', zeros)
    del zeros['Xception/Logits/weights']
    refuse('has no logits', zeros)

  def test_another_width(self):
    path = self.path('narrow/model.ckpt')
    with tf.Graph().as_default(), tf.Session() as session:
      build(5, depth_multiplier=0.125)
      session.run(tf.global_variables_initializer())
      tf.train.Saver().save(session, path)
    self.assertRefused(
        r"not have the width of Keras' Xception: Xception/block1_conv1/weights is "
        r'\[3, 3, 3, 16\], not \[3, 3, 3, 32\]. Train with --depth_multiplier 1',
        self.to_keras, path, 'x.keras')

  def test_damaged_checkpoints(self):
    path = write(self.path('model.ckpt'), WEIGHTS)
    with open(path + '.data-00000-of-00001', 'r+b') as f:
      f.seek(10_000_000)
      f.write(b'damage')
    self.assertRefused('model.ckpt is damaged .*Checksum does not match', self.to_keras, path,
                       'x.keras')
    with open(path + '.index', 'w') as f:
      f.write('damage')
    self.assertRefused('model.ckpt is damaged', self.to_keras, path, 'x.keras')
    self.assertFalse(os.path.exists(self.path('x.keras')))

  def test_mistakes_found_before_keras_is_loaded(self):
    def to_keras(checkpoint, name):
      convert('--checkpoint', checkpoint, '--output_keras', self.path(name))

    self.assertRefused(f'{KERAS_FILE} is a Keras file, not a checkpoint: give it as '
                       '--keras_weights', to_keras, KERAS_FILE, 'xception.keras')
    for checkpoint in (self.dir, self.checkpoint):
      self.assertRefused(f'No checkpoint in {checkpoint}: run train_flowers.py first',
                         to_keras, checkpoint, 'xception.keras')
    with open(self.path('xception.keras'), 'w'):
      pass
    self.assertRefused(f'{self.path("xception.keras")} exists: choose another folder or name, or '
                       'add --overwrite', to_keras, self.log_dir, 'xception.keras')


class CommandLineTest(ConversionTestCase):

  def assertUsage(self, message, *args):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), self.assertRaises(SystemExit) as caught:
      convert_keras_weights.parse_args(args)
    self.assertEqual(caught.exception.code, 2)
    self.assertRegex(error.getvalue(), re.compile(f'error: .*{message}', re.MULTILINE))

  def test_options_of_the_other_direction(self):
    self.assertUsage('one of the arguments --keras_weights --checkpoint is required')
    self.assertUsage('--checkpoint: not allowed with argument --keras_weights',
                     '--keras_weights', 'x.h5', '--checkpoint', 'log')
    self.assertUsage('--keras_weights needs --output_checkpoint', '--keras_weights', 'x.h5')
    self.assertUsage('--checkpoint needs --output_keras', '--checkpoint', 'log')
    self.assertUsage('--num_classes does not go with --checkpoint',
                     '--checkpoint', 'log', '--output_keras', 'x.keras', '--num_classes', '5')
    self.assertUsage('--use_averages does not go with --keras_weights',
                     '--keras_weights', 'x.h5', '--output_checkpoint', 'c', '--use_averages', 'no')

  def test_values(self):
    self.assertUsage('must end in .keras, .weights.h5 or .h5, got x.npz',
                     '--output_keras', 'x.npz')
    for name in (self.dir, self.dir + '/'):
      self.assertUsage(f'must name a file like ckpt/xception.ckpt, got {name}',
                       '--output_checkpoint', name)
    self.assertUsage('must be a whole number of 0 or more, got -1', '--num_classes', '-1')

  def run_script(self, *args, **env):
    return subprocess.run([sys.executable, 'convert_keras_weights.py', *args], cwd=PROJECT,
                          capture_output=True, text=True, env={**os.environ, **env})

  def test_script(self):
    # This output cannot show the path as it is.
    path = os.path.join(self.dir, 'blüte', 'xception.ckpt')
    result = self.run_script('--keras_weights', KERAS_FILE, '--num_classes', '5',
                             '--output_checkpoint', path, PYTHONIOENCODING='ascii')
    self.assertEqual(result.returncode, 0, result.stderr)
    shown = os.path.join(self.dir, r'bl\xfcte')
    self.assertEndsWith(result.stdout,
                        f'Wrote {shown}/xception.ckpt and {shown}/model_config.json\n')
    self.assertSameWeights(read(path), {**WEIGHTS, 'global_step': np.int64(0)})

  def test_script_fails_without_a_traceback(self):
    result = self.run_script('--keras_weights', 'none.h5', '--output_checkpoint', self.checkpoint)
    self.assertEqual(result.returncode, 1)
    self.assertRegex(result.stderr, 'convert_keras_weights.py: There is no file none.h5')
    self.assertNotIn('Traceback', result.stderr)
