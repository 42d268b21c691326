"""Tests files of weights, and whole models of Keras 2."""

import json
import os
import shutil
import tempfile

import h5py
import numpy as np
import tensorflow.compat.v1 as tf

from conversion import keras_files
from conversion import keras_models
from keras_equivalence_test import keras_process
from keras_equivalence_test import randomize

SHAPE = (71, 71, 3)


def setUpModule():
  global FOLDER, KERAS
  FOLDER = tempfile.mkdtemp()
  KERAS = keras_process()
  KERAS.submit(start, FOLDER).result()


def tearDownModule():
  KERAS.shutdown()
  shutil.rmtree(FOLDER)


def start(folder):
  """Prepares the process of Keras."""
  global FOLDER, BASE, keras, layers
  FOLDER = folder
  keras = keras_models.import_keras()
  layers = keras.layers
  BASE = keras.applications.Xception(weights=None, include_top=False, input_shape=SHAPE)
  randomize(BASE, np.random.default_rng(0))


def nested(front, head, pooling='GlobalAveragePooling2D'):
  """Returns a model of layers, BASE as one layer, pooling and more layers."""
  inputs = net = keras.Input(SHAPE)
  for layer in [*front, BASE, getattr(layers, pooling)(), *head]:
    net = layer(net)
  return keras.Model(inputs, net)


def read_weights(head, suffix, pooling='GlobalAveragePooling2D'):
  """Saves the weights of a nested model and reads them.

  Args:
    head: list of (layer class, arguments) behind the pooling.
    suffix: .weights.h5 of Keras 3, or .h5 for those of Keras 2.
    pooling: class of the layer after Xception.

  Returns:
    Whether the weights read are those saved, and the notes; or the error's text.
  """
  model = nested([], [getattr(layers, kind)(**arguments) for kind, arguments in head],
                 pooling)
  path = f'{FOLDER}/model{suffix}'
  if suffix == '.h5':
    model.save(f'{FOLDER}/whole.h5')
    with h5py.File(f'{FOLDER}/whole.h5') as whole, h5py.File(path, 'w') as weights:
      for name in whole['model_weights']:
        whole.copy(f'model_weights/{name}', weights)
      weights.attrs.update(whole['model_weights'].attrs)
  else:
    model.save_weights(path)
  try:
    network = keras_files.load(path)
  except keras_models.ConversionError as error:
    return str(error)
  expected = {**keras_models.slim_weights(BASE),
              **keras_models.logits_weights(model.layers[-1].get_weights())}
  is_same = network.weights.keys() == expected.keys() and all(
      np.array_equal(network.weights[name], value) for name, value in expected.items())
  return is_same, network.notes


def write_as_keras_2(model, path):
  """Writes a model as Keras 2 did, to whose configuration Keras 3 objects in five places."""
  model.save(path)
  with h5py.File(path, 'r+') as file:
    config = json.loads(file.attrs['model_config'])
    change_into_keras_2(config['config'])
    file.attrs['model_config'] = json.dumps(config)
    file.attrs['keras_version'] = '2.15.0'


def change_into_keras_2(model_config):
  """Changes the configuration of a functional model, see `write_as_keras_2`."""
  nested_names = [layer['name'] for layer in model_config['layers']
                  if layer['class_name'] == 'Functional']
  for layer in model_config['layers']:
    kind, config = layer['class_name'], layer['config']
    layer['inbound_nodes'] = [
        [[history[0], history[1] + (history[0] in nested_names), history[2], {}]
         for history in (tensor['config']['keras_history'] for tensor in tensors_of(node['args']))]
        for node in layer['inbound_nodes']]
    if kind == 'SeparableConv2D':
      config.update(groups=1, kernel_initializer=None, kernel_regularizer=None)
    elif kind == 'BatchNormalization':
      config['axis'] = [3]
    elif kind == 'Rescaling':
      layer['class_name'] = 'TFOpLambda'
      layer['config'] = {'name': layer['name'], 'function': 'math.multiply', 'dtype': 'float32'}
      layer['inbound_nodes'][0][0][3] = {'y': config['scale'], 'name': None}
      layer['inbound_nodes'] = layer['inbound_nodes'][0]
    elif kind == 'Lambda':
      code = config['function']['config']
      config.update(function=[code['code'], code['defaults'], None], function_type='lambda')
    elif kind == 'Functional':
      change_into_keras_2(config)
  for key in ('input_layers', 'output_layers'):
    model_config[key] = [model_config[key]]


def tensors_of(args):
  """Returns the tensors in the serialized arguments of a layer's call."""
  return args[0] if isinstance(args[0], list) else args


def read_keras_2(scale):
  """Reads a model of Keras 2 with rescaling in front.

  Returns:
    The largest differences of its answer and of its weights, its notes and its size.
  """
  model = nested([layers.Rescaling(scale)], [layers.Dense(5, 'softmax')])
  path = f'{FOLDER}/keras_2.h5'
  write_as_keras_2(model, path)
  images = np.random.default_rng(1).uniform(-1, 1, [2, *SHAPE]).astype(np.float32)
  expected = np.asarray(model(127.5 * (images + 1), training=False))
  network = keras_files.load(path)
  name = 'Xception/block9_dws_conv2/pointwise_weights'
  return (np.abs(network.answer(images) - expected).max(),
          np.abs(network.weights[name] - keras_models.slim_weights(BASE)[name]).max(),
          network.notes, network.image_size)


def read_lambda(kind):
  """Reads a model with a Lambda layer that writes a file.

  Args:
    kind: .keras, .h5 or keras_2.h5.

  Returns:
    The error's text, and whether the layer's code was run.
  """
  trace, path = f'{FOLDER}/trace', f'{FOLDER}/lambda{kind}'

  def leave_trace(images, path=trace):
    open(path, 'w').close()
    return images

  leave_trace.__name__ = '<lambda>'  # Keras stores the code of lambdas only
  model = nested([layers.Lambda(leave_trace)], [layers.Dense(5, 'softmax')])
  (write_as_keras_2 if 'keras_2' in kind else keras.Model.save)(model, path)
  os.remove(trace)
  return refusal(path), os.path.exists(trace)


def read_own_layer():
  """Reads a model with a layer of another program; returns the error's text."""
  own_layer = type('OwnLayer', (layers.Layer,), {'call': lambda self, images: images,
                                                 '__module__': 'another_program'})
  path = f'{FOLDER}/own.keras'
  nested([own_layer()], [layers.Dense(5, 'softmax')]).save(path)
  return refusal(path)


def refusal(path):
  """Returns why a file is refused."""
  try:
    keras_files.load(path)
  except keras_models.ConversionError as error:
    return str(error)
  return 'it is converted'


class KerasFilesTest(tf.test.TestCase):

  def test_weights_of_a_nested_model(self):
    for suffix in ('.weights.h5', '.h5'):
      for units in (5, 1):
        head = [('Dropout', {'rate': 0.5}), ('Dense', {'units': units})]
        is_same, notes = KERAS.submit(read_weights, head, suffix).result()
        self.assertTrue(is_same)
        self.assertLen(notes, 1)
        self.assertRegex(notes[0], r'holds weights only\. .* global average pooling and a softmax '
                         r'\(a sigmoid if it has one output\), and to expect pixels in \[-1, 1\]')

  def test_what_weights_alone_do_not_show(self):
    head = [('Dense', {'units': 3, 'activation': 'sigmoid'})]
    is_same, notes = KERAS.submit(read_weights, head, '.weights.h5', 'GlobalMaxPooling2D').result()
    self.assertTrue(is_same)
    self.assertRegex(notes[0], 'global average pooling and a softmax')

  def test_weights_that_would_be_lost(self):
    batch_norm = [('BatchNormalization', {}), ('Dense', {'units': 5})]
    two = [('Dense', {'units': 64}), ('Dense', {'units': 5})]
    for suffix in ('.weights.h5', '.h5'):
      self.assertRegex(KERAS.submit(read_weights, batch_norm, suffix).result(),
                       'batch_normalization')
      self.assertRegex(KERAS.submit(read_weights, two, suffix).result(),
                       r'cannot be converted: .* no place for the weights of .*dense_\d')
      self.assertRegex(KERAS.submit(read_weights, two[1:], suffix, 'Flatten').result(),
                       'no place for the weights of .*dense')

  def test_model_of_keras_2(self):
    answer, weights, notes, size = KERAS.submit(read_keras_2, 1 / 255).result()
    self.assertLess(answer, 1e-5)
    self.assertEqual(weights, 0)
    self.assertLen(notes, 1)
    self.assertIn('rescales pixels to [0, 1]', notes[0])
    self.assertEqual(size, 71)

  def test_code_of_a_file_is_not_run(self):
    for kind in ('.keras', '.h5', 'keras_2.h5'):
      message, was_run = KERAS.submit(read_lambda, kind).result()
      self.assertRegex(message, 'cannot be converted|Keras cannot load')
      self.assertNotIn('\n', message)
      self.assertFalse(was_run)
    message = KERAS.submit(read_own_layer).result()
    self.assertRegex(message, 'Keras cannot load .*own.keras: .* custom code or layers, save only')
    self.assertNotIn('\n', message)
