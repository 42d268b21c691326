"""Tests which Keras models are converted, with their own answers, and which are refused by name.

All models share one Xception for images of 71 pixels, in a process of Keras.
"""

import shutil
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from conversion import keras_files
from conversion import keras_models
from keras_equivalence_test import keras_process
from keras_equivalence_test import randomize
import xception

SIZE = 71
SHAPE = (SIZE, SIZE, 3)
OURS = r'pixels in \[-1, 1\]'  # part of the note on a model that does not rescale


def setUpModule():
  global FOLDER, KERAS
  FOLDER = tempfile.mkdtemp()
  KERAS = keras_process()
  KERAS.submit(start, FOLDER).result()


def tearDownModule():
  KERAS.shutdown()
  shutil.rmtree(FOLDER)


def start(folder):
  """Prepares the process of Keras: an Xception without head, and the slim network."""
  global FOLDER, BASE, SLIM, keras, layers
  FOLDER = folder
  keras = keras_models.import_keras()
  layers = keras.layers
  BASE = keras.applications.Xception(weights=None, include_top=False, input_shape=SHAPE)
  randomize(BASE, np.random.default_rng(0))
  with tf.Graph().as_default():
    images = tf.placeholder(tf.float32, [None, *SHAPE])
    with slim.arg_scope(xception.xception_arg_scope()):
      features, _ = xception.xception(images, 0, is_training=False)
    SLIM = tf.Session(), images, features, slim.get_model_variables()


def answer_slim(weights, images):
  """Returns the slim network's probabilities, or its features for weights without logits."""
  session, placeholder, features, variables = SLIM
  session.run([variable.initializer for variable in variables],
              {variable.initializer.inputs[1]: weights[variable.op.name]
               for variable in variables})
  found = session.run(features, {placeholder: images}).reshape(len(images), -1)
  if keras_models.LOGITS not in weights:
    return found
  logits = found @ weights[keras_models.LOGITS][0, 0] + weights[keras_models.BIASES]
  exp = np.exp(logits - logits.max(1, keepdims=True))
  return exp / exp.sum(1, keepdims=True)


def pooled():
  return layers.GlobalAveragePooling2D()(BASE.output)


def flat(*head):
  """Returns a model of BASE, global average pooling and the layers of a head."""
  output = pooled()
  for layer in head:
    output = layer(output)
  return keras.Model(BASE.input, output)


def behind(*front, base=None, shape=SHAPE):
  """Returns a sequential model of layers, BASE, global average pooling and softmax."""
  return keras.Sequential([keras.Input(shape), *front, base or BASE,
                           layers.GlobalAveragePooling2D(), softmax()])


def softmax(classes=5, **kwargs):
  return layers.Dense(classes, activation='softmax', kernel_initializer='random_normal', **kwargs)


def linear(classes=5):
  return layers.Dense(classes, kernel_initializer='random_normal')


def called_functionally(rescale):
  """Returns a model that rescales with a function, augments and calls BASE as a layer."""
  inputs = keras.Input(SHAPE)
  augment = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])
  net = BASE(rescale(augment(inputs)), training=False)
  return keras.Model(inputs, softmax()(layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(net))))


def renamed():
  copy = keras.models.clone_model(BASE, clone_function=lambda layer: layer.from_config(
      {**layer.get_config(), 'name': f'my_{layer.name}'}))
  copy.set_weights(BASE.get_weights())
  return behind(base=copy)


def mixed_precision():
  keras.mixed_precision.set_global_policy('mixed_float16')
  try:
    copy = keras.applications.Xception(weights=None, include_top=False, input_shape=SHAPE)
    copy.set_weights(BASE.get_weights())
    model = behind(base=copy)
  finally:
    keras.mixed_precision.set_global_policy('float32')
  return model


def frozen():
  copy = keras.models.clone_model(BASE)
  copy.set_weights(BASE.get_weights())
  copy.trainable = False
  return behind(base=copy)


def of_size(size):
  copy = keras.applications.Xception(weights=None, include_top=False)
  copy.set_weights(BASE.get_weights())
  return behind(base=copy, shape=(size, size, 3))


def other_epsilon():
  copy = keras.models.clone_model(BASE, clone_function=lambda layer: layer.from_config(
      {**layer.get_config(), **({'epsilon': 1e-5} if layer.name == 'block5_sepconv2_bn' else {})}))
  return behind(base=copy)


def two_inputs():
  other = keras.Input([4])
  return keras.Model([BASE.input, other], softmax()(layers.Concatenate()([pooled(), other])))


def two_outputs():
  return keras.Model(BASE.input, [softmax()(pooled()), softmax()(pooled())])


def identity(images):
  return images


def to_bytes(images):
  return 127.5 * (images + 1)


# name: (makes the model, makes its pixels of images in [-1, 1], notes)
CONVERTED = {
    'dropout': (lambda: flat(layers.Dropout(0.5), softmax()), identity, [OURS]),
    'no bias': (lambda: flat(softmax(use_bias=False)), identity, [OURS]),
    'regularizer': (lambda: flat(softmax(kernel_regularizer='l2')), identity, [OURS]),
    'activation': (lambda: flat(linear(), layers.Activation('softmax')), identity, [OURS]),
    'softmax layer': (lambda: flat(linear(), layers.Softmax()), identity, [OURS]),
    'kept dimensions': (lambda: keras.Model(BASE.input, softmax()(layers.Flatten()(
        layers.GlobalAveragePooling2D(keepdims=True)(BASE.output)))), identity, [OURS]),
    'logits': (lambda: flat(linear()), identity, [OURS, 'dense.* has no activation']),
    'sigmoid': (lambda: flat(layers.Dense(1, 'sigmoid')), identity, [OURS]),
    'one logit': (lambda: flat(linear(1)), identity, [OURS, 'has no activation']),
    'no head': (lambda: BASE, identity, [OURS]),
    'pooled': (lambda: flat(), identity, [OURS]),
    'sequential': (lambda: behind(layers.Rescaling(1 / 127.5, offset=-1)), to_bytes, []),
    'zero to one': (lambda: behind(layers.Rescaling(1 / 255)), to_bytes, [r'\[0, 1\]']),
    'from zero to one': (lambda: behind(layers.Rescaling(2, -1)), lambda x: (x + 1) / 2, []),
    'preprocess_input': (lambda: called_functionally(
        keras.applications.xception.preprocess_input), to_bytes, []),
    'operators': (lambda: called_functionally(lambda x: (x - 127.5) * (1 / 127.5)), to_bytes, []),
    'renamed': (renamed, identity, [OURS]),
    'mixed precision': (mixed_precision, identity, [OURS]),
    'frozen': (frozen, identity, [OURS]),
    'any size': (lambda: of_size(None), identity, [OURS]),
}
SAVED = ('preprocess_input', 'renamed')  # the others are read without the detour of a file

# name: (makes the model, why it is refused)
REFUSED = {
    'batch norm': (lambda: flat(layers.BatchNormalization(name='bn'), softmax()),
                   r'layer bn \(BatchNormalization\): after Xception'),
    'two dense': (lambda: flat(layers.Dense(64), layers.Dense(5, name='last')),
                  r'layer last \(Dense\)'),
    'hidden': (lambda: flat(layers.Dense(64), layers.ReLU(name='relu'), softmax()),
               r'layer relu \(ReLU\)'),
    'hidden activation': (lambda: flat(layers.Dense(64), layers.Activation('relu'), softmax()),
                          r'layer dense\S* \(Dense\)'),
    'maximum': (lambda: keras.Model(BASE.input, softmax()(
        layers.GlobalMaxPooling2D(name='max')(BASE.output))), r'layer max \(GlobalMaxPooling2D\)'),
    'flatten': (lambda: keras.Model(BASE.input, softmax()(
        layers.Flatten(name='flat')(BASE.output))), r'layer flat \(Flatten\)'),
    'several labels': (lambda: flat(layers.Dense(3, 'sigmoid')),
                       '3 sigmoid outputs are independent decisions'),
    'relu': (lambda: flat(layers.Dense(5, 'relu')), 'its activation is relu'),
    'softmax of one': (lambda: flat(softmax(1)), 'softmax of one output is always 1'),
    'two softmaxes': (lambda: flat(softmax(), layers.Activation('softmax', name='again')),
                      r'layer again \(Activation\)'),
    'two inputs': (two_inputs, 'it has 2 inputs and 1 outputs'),
    'two outputs': (two_outputs, 'it has 1 inputs and 2 outputs'),
    'small': (lambda: of_size(70), 'its images are 70 x 70 pixels, .* needs 71 x 71 or more'),
    'rescaling': (lambda: behind(layers.Rescaling(3)), r'3 x pixel \+0'),
    'rescaling of channels': (lambda: behind(layers.Rescaling([0.1, 0.2, 0.3], name='rgb')),
                              r'layer rgb \(Rescaling\): before'),
    'normalization': (lambda: behind(layers.Normalization(mean=1, variance=1, name='norm')),
                      r'layer norm \(Normalization\)'),
    'oblong': (lambda: behind(base=keras.applications.Xception(
        weights=None, include_top=False, input_shape=(71, 80, 3)), shape=(71, 80, 3)),
               '71 x 80 pixels'),
    'grey': (lambda: behind(base=keras.applications.Xception(
        weights=None, include_top=False, input_shape=(71, 71, 1)), shape=(71, 71, 1)),
             r'layer block1_conv1 .*\(3, 3, 1, 32\)'),
    'epsilon': (other_epsilon, 'layer block5_sepconv2_bn'),
    'other network': (lambda: keras.Sequential([keras.Input([4]), layers.Dense(3)]),
                      'it holds no Xception'),
    'another backbone': (lambda: keras.applications.ResNet50(
        weights=None, input_shape=(71, 71, 3)), "differs from block14_sepconv2_bn of Keras' Xc"),
}


def convert(name):
  """Converts one of CONVERTED; those of SAVED are saved and loaded first.

  Returns:
    What the model answers in slim's terms, what the slim network answers,
    what the Network's own `answer` says, and the Network's size and notes.
  """
  make, to_pixels, _ = CONVERTED[name]
  images = np.random.default_rng(1).uniform(-1, 1, [2, *SHAPE]).astype(np.float32)
  model = make()
  expected = np.asarray(model(to_pixels(images), training=False), np.float64)
  if name == 'one logit':
    expected = 1 / (1 + np.exp(-expected))
  if expected.shape[1] == 1:
    expected = np.concatenate([1 - expected, expected], 1)
  elif name == 'logits':
    expected = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
  elif name == 'no head':
    expected = expected.mean((1, 2))
  if name in SAVED:
    path = f'{FOLDER}/model.keras'
    model.save(path)
    network = keras_files.load(path)
  else:
    network = keras_models.read_model(model, 'x.keras')
  return (expected, answer_slim(network.weights, images), network.answer(images),
          network.image_size, network.notes)


def refuse(name):
  """Returns why one of REFUSED is refused."""
  try:
    keras_models.read_model(REFUSED[name][0](), 'x.keras')
  except keras_models.ConversionError as error:
    return str(error)
  return 'it is converted'


class KerasModelsTest(tf.test.TestCase):

  def test_models_are_converted_with_their_own_answers(self):
    for name, (_, _, notes) in CONVERTED.items():
      with self.subTest(name):
        expected, found, answer, size, found_notes = KERAS.submit(convert, name).result()
        tolerance = 5e-3 if name == 'mixed precision' else 1e-5
        self.assertAllClose(found, answer, rtol=1e-4, atol=1e-5)
        self.assertAllClose(found, expected, rtol=1e-4, atol=tolerance)
        self.assertEqual(size, None if name == 'any size' else SIZE)
        self.assertLen(found_notes, len(notes))
        for found_note, note in zip(found_notes, notes):
          self.assertRegex(found_note, note)

  def test_other_models_are_refused_by_name(self):
    for name, (_, reason) in REFUSED.items():
      with self.subTest(name):
        self.assertRegex(KERAS.submit(refuse, name).result(),
                         f'^x.keras cannot be converted: .*{reason}')
