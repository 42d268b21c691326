"""Tests that the kernels compute what TensorFlow's operations do, and how they are built."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

from cpu_kernels import build
from scripts import PROJECT

EPSILON = 0.001


def evaluate(fetches):
  with tf.Session() as session:
    return session.run(fetches)


class OperationsTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    try:
      build.find_compiler()
    except build.BuildError as error:
      self.skipTest(str(error))
    self.kernels = build.load()
    self.assertIsNotNone(self.kernels)
    self.random = np.random.default_rng(0)

  def normal(self, *shape, mean=0.0):
    return tf.constant(self.random.normal(mean, 1.0, shape), tf.float32)

  def assertClose(self, values, expected, relative):
    for value, wanted in zip(values, expected, strict=True):
      wanted = np.asarray(wanted, np.float64)
      self.assertAllClose(np.asarray(value, np.float64), wanted, rtol=0,
                          atol=relative * np.abs(wanted).max())

  def batch_norms(self, shape, dtype, relu, mean=0.0):
    """Returns the outputs, statistics and gradients of our operations and of TensorFlow's."""
    images = tf.cast(self.normal(*shape, mean=mean), dtype)
    scale, offset = self.normal(shape[-1]), self.normal(shape[-1])
    theirs, their_mean, their_variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=tf.cast(images, tf.float32), scale=scale, offset=offset, mean=[], variance=[],
        epsilon=EPSILON)
    # Near 0 rounding decides whether a ReLU is active: no gradient comes from there.
    gradient = self.normal(*shape) * tf.cast(tf.abs(theirs) > 0.01, tf.float32)
    gradient = tf.cast(gradient, dtype)
    passed = tf.cast(gradient, tf.float32)
    if relu:
      theirs = tf.nn.relu(theirs)
      passed = tf.raw_ops.ReluGrad(gradients=passed, features=theirs)
    their_gradients = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=passed, x=tf.cast(images, tf.float32), scale=scale,
        reserve_space_1=reserved[0], reserve_space_2=reserved[1], reserve_space_3=reserved[2],
        epsilon=EPSILON)[:3]

    ours, our_mean, our_variance, inverse = self.kernels.xception_batch_norm(
        images, scale, offset, epsilon=EPSILON, relu=relu)
    our_gradients = self.kernels.xception_batch_norm_grad(
        gradient, images, scale, offset, our_mean, inverse, relu=relu)
    return ([tf.cast(each, tf.float32) for each in (ours, our_mean, our_variance, *our_gradients)],
            [theirs, their_mean, their_variance, *their_gradients])

  def test_batch_norm(self):
    # Odd numbers of channels and pixels, few pixels, many parts.
    for shape in ((2, 7, 5, 21), (1, 1, 2, 3), (8, 19, 19, 40)):
      for relu in (False, True):
        with self.subTest(shape=shape, relu=relu), tf.Graph().as_default():
          self.assertClose(*evaluate(self.batch_norms(shape, tf.float32, relu)), 1e-5)

  def test_batch_norm_of_one_pixel(self):
    images = np.float32([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    with tf.Graph().as_default():
      output, mean, variance, inverse = self.kernels.xception_batch_norm(
          images, tf.ones([3]), tf.range(3.0), epsilon=EPSILON, relu=False)
      gradients = self.kernels.xception_batch_norm_grad(
          tf.ones([1, 1, 1, 3]), images, tf.ones([3]), tf.range(3.0), mean, inverse, relu=False)
      self.assertAllEqual(evaluate(output).ravel(), [0, 1, 2])
      self.assertAllEqual(evaluate([mean, variance]), [[1, 2, 3], [0, 0, 0]])
      self.assertAllClose(evaluate(gradients[0]), np.zeros([1, 1, 1, 3]), atol=1e-5)
      self.assertAllEqual(evaluate(gradients[1:]), [[0, 0, 0], [1, 1, 1]])

  def test_batch_norm_in_bfloat16(self):
    with tf.Graph().as_default():
      ours, theirs = evaluate(self.batch_norms((8, 19, 19, 40), tf.bfloat16, relu=True))
    # Images are rounded to 8 bits; sums over them are computed in float32.
    self.assertClose(ours[0:4:3], theirs[0:4:3], 2**-8)
    self.assertClose(ours[1:3] + ours[4:], theirs[1:3] + theirs[4:], 1e-5)

  def test_variance_beside_a_large_mean(self):
    with tf.Graph().as_default():
      images = self.normal(4, 16, 16, 24, mean=1000.0)
      outputs = self.kernels.xception_batch_norm(images, tf.ones([24]), tf.zeros([24]),
                                                 epsilon=EPSILON, relu=False)
      images, (output, mean, variance, _) = evaluate((images, outputs))
    images = images.astype(np.float64)
    deviation = np.sqrt(images.var((0, 1, 2)) + EPSILON)
    self.assertAllClose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    self.assertAllClose(variance, images.var((0, 1, 2), ddof=1), rtol=1e-5)
    # The mean of 1000 is rounded to 6e-5 in float32.
    self.assertAllClose(output, (images - images.mean((0, 1, 2))) / deviation, atol=5e-5)

  def test_a_channel_that_never_changes(self):
    with tf.Graph().as_default():
      output = evaluate(self.kernels.xception_batch_norm(
          tf.fill([2, 8, 8, 20], 100.7), tf.ones([20]), tf.fill([20], 0.25), epsilon=EPSILON,
          relu=False).output)
    self.assertAllEqual(output, np.full([2, 8, 8, 20], 0.25))

  def depthwise(self, shape, dtype, relu):
    """Returns the outputs and gradients of our operations and of TensorFlow's."""
    images, gradient = (tf.cast(self.normal(*shape), dtype) for _ in range(2))
    kernel = self.normal(3, 3, shape[-1], 1)
    ours = self.kernels.xception_depthwise(images, kernel, relu=relu)
    our_gradients = self.kernels.xception_depthwise_grad(gradient, images, kernel, relu=relu)
    wide = tf.cast(images, tf.float32)
    theirs = tf.nn.depthwise_conv2d(tf.nn.relu(wide) if relu else wide, kernel, [1, 1, 1, 1],
                                    'SAME')
    their_gradients = tf.gradients(theirs, [wide, kernel], tf.cast(gradient, tf.float32))
    return ([tf.cast(each, tf.float32) for each in (ours, *our_gradients)],
            [theirs, *their_gradients])

  def test_depthwise(self):
    for shape in ((2, 7, 5, 40), (1, 1, 1, 16), (1, 2, 1, 17), (3, 19, 19, 56)):
      for relu in (False, True):
        with self.subTest(shape=shape, relu=relu), tf.Graph().as_default():
          self.assertClose(*evaluate(self.depthwise(shape, tf.float32, relu)), 1e-5)

  def test_depthwise_in_bfloat16(self):
    with tf.Graph().as_default():
      ours, theirs = evaluate(self.depthwise((3, 19, 19, 56), tf.bfloat16, relu=True))
    self.assertClose(ours[:2], theirs[:2], 2**-8)
    self.assertClose(ours[2:], theirs[2:], 1e-5)

  def batch_norm_depthwises(self, shape, dtype):
    """Returns what `batch_norms` does, and the output of the batch norm."""
    # A gap around the mean: near 0 rounding would decide whether the ReLU is active.
    signs, distances = np.sign(self.random.normal(size=shape)), self.random.normal(size=shape)
    images = tf.cast(tf.constant(signs * (1 + np.abs(distances)), tf.float32), dtype)
    scale, offset = (tf.constant(self.random.choice([-1, 1], shape[-1]) *
                                 self.random.uniform(*limits, shape[-1]), tf.float32)
                     for limits in ((1, 2), (0.05, 0.1)))
    kernel, gradient = self.normal(3, 3, shape[-1], 1), tf.cast(self.normal(*shape), dtype)
    output, mean, variance, inverse = self.kernels.xception_batch_norm_depthwise(
        images, scale, offset, kernel, epsilon=EPSILON)
    gradients = self.kernels.xception_batch_norm_depthwise_grad(
        gradient, images, scale, offset, kernel, mean, inverse)

    wide = tf.cast(images, tf.float32)
    normalized, their_mean, their_variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=wide, scale=scale, offset=offset, mean=[], variance=[], epsilon=EPSILON)
    theirs = tf.nn.depthwise_conv2d(tf.nn.relu(normalized), kernel, [1, 1, 1, 1], 'SAME')
    their_gradients = tf.gradients(theirs, [wide, scale, offset, kernel],
                                   tf.cast(gradient, tf.float32))
    return ([tf.cast(each, tf.float32) for each in (output, mean, variance, *gradients)],
            [theirs, their_mean, their_variance, *their_gradients], normalized)

  def test_fused_batch_norm_and_depthwise(self):
    for shape in ((2, 7, 5, 40), (1, 2, 1, 17), (1, 1, 9, 16), (3, 19, 19, 56)):
      with self.subTest(shape=shape), tf.Graph().as_default():
        ours, theirs, normalized = evaluate(self.batch_norm_depthwises(shape, tf.float32))
        self.assertGreater(np.abs(normalized).min(), 1e-3)
        self.assertClose(ours, theirs, 1e-5)

  def test_fused_batch_norm_and_depthwise_in_bfloat16(self):
    with tf.Graph().as_default():
      ours, theirs, _ = evaluate(self.batch_norm_depthwises((3, 19, 19, 56), tf.bfloat16))
    self.assertClose(ours[0:4:3], theirs[0:4:3], 2**-8)
    self.assertClose(ours[1:3] + ours[4:], theirs[1:3] + theirs[4:], 1e-5)

  def test_rounding_to_bfloat16_is_tensorflows(self):
    # Ties, a value that rounds up to infinity, infinities and NaN.
    values = np.float32([0, 1, 1 + 2**-8, 1 + 3 * 2**-8, -1.003, 3.4e38, 1e-30, np.inf, -np.inf,
                         np.nan, -np.nan])
    channels = np.tile(values, 4)  # whole vectors of the processor and a rest
    with tf.Graph().as_default():
      wanted = evaluate(tf.cast(tf.cast(channels, tf.bfloat16), tf.float32))
      offsets = evaluate(tf.cast(self.kernels.xception_batch_norm(
          tf.cast(tf.zeros([1, 1, 2, len(channels)]), tf.bfloat16), tf.zeros([len(channels)]),
          channels, epsilon=EPSILON, relu=False).output, tf.float32))
      kernel = np.zeros([3, 3, len(channels), 1], np.float32)
      kernel[1, 1] = channels[:, np.newaxis]
      products = evaluate(tf.cast(self.kernels.xception_depthwise(
          tf.cast(tf.ones([1, 1, 1, len(channels)]), tf.bfloat16), kernel, relu=False),
                                  tf.float32))
    np.testing.assert_array_equal(offsets[0, 0, 0], wanted)
    np.testing.assert_array_equal(products[0, 0, 0], wanted)

  def test_nan_stays_nan(self):
    images = np.ones([1, 4, 4, 20], np.float32)
    images[0, 0, 0, 3] = np.nan
    for dtype in (tf.float32, tf.bfloat16):
      with tf.Graph().as_default():
        parameters = tf.cast(images, dtype), tf.ones([20]), tf.zeros([20])
        outputs = evaluate([tf.cast(each, tf.float32) for each in (
            *self.kernels.xception_batch_norm(*parameters, epsilon=EPSILON, relu=True),
            *self.kernels.xception_batch_norm_depthwise(*parameters, tf.ones([3, 3, 20, 1]),
                                                        epsilon=EPSILON))])
      for output in outputs:
        self.assertTrue(np.isnan(output[..., 3]).all())
        self.assertTrue(np.isfinite(output[..., 4]).all())

  def test_nan_passes_a_preceding_relu(self):
    images = np.ones([1, 4, 4, 20], np.float32)
    images[0, 0, 0, 3] = np.nan
    with tf.Graph().as_default():
      output = self.kernels.xception_depthwise(images, tf.ones([3, 3, 20, 1]), relu=True)
      _, kernel_gradient = self.kernels.xception_depthwise_grad(
          tf.ones_like(images), images, tf.ones([3, 3, 20, 1]), relu=True)
      output, kernel_gradient = evaluate([output, kernel_gradient])
    self.assertTrue(np.isnan(output[0, :2, :2, 3]).all())
    self.assertTrue(np.isnan(kernel_gradient[1, 1, 3]).all())
    self.assertTrue(np.isfinite(output[..., 4]).all())

  def test_threads_do_not_change_a_bit(self):
    # A process's first session creates its threads.
    outputs = {subprocess.run(
        [sys.executable, __file__, str(num_threads)], capture_output=True, text=True, check=True,
        env={**os.environ, 'PYTHONPATH': f'{PROJECT}:{PROJECT}/tests'}).stdout
               for num_threads in (1, 2, 5)}
    self.assertLen(outputs, 1)
    self.assertLen(outputs.pop().strip(), 64)

  def test_mismatched_shapes_are_errors(self):
    images, kernel = tf.zeros([1, 4, 4, 16]), tf.zeros([3, 3, 16, 1])
    sixteen = tf.zeros([16])
    norm, depthwise = self.kernels.xception_batch_norm, self.kernels.xception_depthwise
    both = self.kernels.xception_batch_norm_depthwise
    for message, operation in (
        ('16 channels, got [8]', norm(images, tf.zeros([8]), sixteen, epsilon=0.1, relu=False)),
        ('at least one pixel', norm(tf.zeros([0, 4, 4, 16]), sixteen, sixteen, epsilon=0.1,
                                  relu=False)),
        ('16 channels or more', depthwise(tf.zeros([1, 4, 4, 8]), tf.zeros([3, 3, 8, 1]),
                                          relu=False)),
        ('must be 3 x 3', depthwise(images, tf.zeros([5, 5, 16, 1]), relu=False)),
        ('16 channels, got [8]', both(images, sixteen, tf.zeros([8]), kernel, epsilon=0.1)),
        ('must be 3 x 3', both(images, sixteen, sixteen, tf.zeros([5, 5, 16, 1]), epsilon=0.1)),
        ('differ in shape', self.kernels.xception_depthwise_grad(
            tf.zeros([1, 4, 5, 16]), images, kernel, relu=False)),
        ('differ in shape', self.kernels.xception_batch_norm_depthwise_grad(
            tf.zeros([1, 5, 4, 16]), images, sixteen, sixteen, kernel, sixteen, sixteen)),
        ('16 channels, got [8]', self.kernels.xception_batch_norm_depthwise_grad(
            images, images, sixteen, sixteen, kernel, sixteen, tf.zeros([8]))),
        ('differ in shape', self.kernels.xception_batch_norm_grad(
            tf.zeros([2, 4, 4, 16]), images, *[sixteen] * 4, relu=False))):
      with self.subTest(message), self.assertRaisesWithPredicateMatch(
          tf.errors.InvalidArgumentError, lambda error, text=message: text in error.message):
        evaluate(operation)


class BuildTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.said = self.enterContext(contextlib.redirect_stderr(io.StringIO()))

  def write_compiler(self, script):
    path = os.path.join(self.folder, 'compiler')
    with open(path, 'w', encoding='utf-8') as f:
      f.write(f'#!/bin/sh\n{script}\n')
    os.chmod(path, 0o755)
    self.enterContext(mock.patch.dict(os.environ, CXX=path))

  def test_compiled_once(self):
    self.write_compiler('for last; do if [ "$before" = -o ]; then echo made >> "$last"; fi; '
                        'before="$last"; done')
    path = build.build_library(os.path.join(self.folder, 'build'))
    self.write_compiler('exit 1')
    self.assertEqual(build.build_library(os.path.join(self.folder, 'build')), path)
    with open(path, encoding='utf-8') as f:
      self.assertEqual(f.read(), 'made\n')
    self.assertEqual(os.listdir(os.path.dirname(path)), [os.path.basename(path)])
    self.assertEqual(self.said.getvalue(), 'Compiling kernels.cc (once)\n')

  def test_other_machines_have_other_files(self):
    self.write_compiler('for last; do if [ "$before" = -o ]; then echo made > "$last"; fi; '
                        'before="$last"; done')
    paths = {build.build_library(self.folder)}
    with mock.patch.object(build, '_processor', lambda: 'flags: fewer'):
      paths.add(build.build_library(self.folder))
    with mock.patch.object(build, 'FLAGS', ('-O2',)):
      paths.add(build.build_library(self.folder))
    self.assertLen(paths, 3)

  def test_a_compiler_that_fails(self):
    self.write_compiler('echo "In file included from errors.h:1" >&2; '
                        'echo "source.cc:2: error: no" >&2; exit 1')
    with self.assertRaisesRegex(build.BuildError, 'failed: source.cc:2: error: no$'):
      build.build_library(os.path.join(self.folder, 'build'))
    self.assertEmpty(os.listdir(os.path.join(self.folder, 'build')))

  def test_a_compiled_library_needs_no_compiler(self):
    self.write_compiler('for last; do if [ "$before" = -o ]; then echo made > "$last"; fi; '
                        'before="$last"; done')
    path = build.build_library(self.folder)
    with mock.patch.dict(os.environ, CXX='no-such-compiler'):
      self.assertEqual(build.build_library(self.folder), path)

  def test_a_compiler_with_options(self):
    with mock.patch.dict(os.environ, CXX='sh -e'):
      self.assertEqual(build.find_compiler(), ['sh', '-e'])

  def test_a_compiler_that_writes_nothing(self):
    self.write_compiler('exit 0')
    with self.assertRaisesRegex(build.BuildError, 'failed: it wrote no library$'):
      build.build_library(os.path.join(self.folder, 'build'))

  def test_a_library_that_cannot_be_loaded_is_named(self):
    path = os.path.join(self.folder, 'broken.so')
    with open(path, 'w', encoding='utf-8'):
      pass
    with mock.patch.object(build, 'build_library', return_value=path):
      self.assertIsNone(build.load.__wrapped__())
    self.assertIn(f'{path} cannot be loaded: ', self.said.getvalue())
    self.assertIn('Delete it', self.said.getvalue())

  def test_no_compiler(self):
    with mock.patch.dict(os.environ, CXX='', PATH=self.folder), \
         self.assertRaisesRegex(build.BuildError, r'no C\+\+ compiler .*apt install g'):
      build.build_library(self.folder)

  def test_a_folder_that_cannot_be_written(self):
    self.write_compiler('exit 0')
    path = os.path.join(self.folder, 'file')
    with open(path, 'w', encoding='utf-8'):
      pass
    with self.assertRaisesRegex(build.BuildError, 'file/build is not writable'):
      build.build_library(os.path.join(path, 'build'))

  def test_without_a_compiler_it_says_so(self):
    with mock.patch.dict(os.environ, CXX='no-such-compiler'), \
         mock.patch.object(build, 'BUILD_DIR', self.folder):
      self.assertIsNone(build.load.__wrapped__())
    self.assertIn('Training continues without kernels.cc, more slowly: no C++ compiler '
                  'found (no-such-compiler)', self.said.getvalue())


def print_hash(num_threads):
  """Prints the SHA-256 of all outputs of the operations."""
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  test = OperationsTest()
  test.setUp()
  with tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=num_threads)) as session:
    values = session.run(test.batch_norms((4, 37, 37, 24), tf.float32, True)[0] +
                         test.depthwise((4, 37, 37, 24), tf.float32, True)[0] +
                         test.batch_norm_depthwises((4, 37, 37, 24), tf.float32)[0])
  print(hashlib.sha256(b''.join(value.tobytes() for value in values)).hexdigest())


if __name__ == '__main__':
  if sys.argv[1:2] and sys.argv[1].isdigit():
    print_hash(int(sys.argv[1]))
  else:
    tf.test.main()
