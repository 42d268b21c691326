"""Runs the programs of docs/export.md, "In other programs", on a small model.

Each program is run as printed there and must give the checkpoint's
probabilities. Programs whose packages are not installed are skipped.
"""

import contextlib
import glob
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from export import freeze
from export import models
from scripts import DATASET_DIR
from scripts import PROJECT
import small_model
import write_pb

HAS_ONNX = all(importlib.util.find_spec(name) for name in ('tf2onnx', 'onnxruntime'))


def program(title, language='python'):
  """Returns the program under the title **title** of docs/export.md."""
  for page in sorted(glob.glob(os.path.join(PROJECT, 'docs', 'export*.md'))):
    with open(page, encoding='utf-8') as f:
      _, found, text = f.read().partition(f'**{title}**')
    if found:
      return re.search(rf'```{language}\n(.*?)```', text, re.DOTALL)[1]
  raise ValueError(f'docs/export.md has no program {title!r}')


class ClientsTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.dir)
    checkpoint = small_model.write_checkpoint(cls.dir)
    with contextlib.redirect_stdout(io.StringIO()):
      write_pb.main(write_pb.parse_args([
          '--log_dir', cls.dir, '--output_file', os.path.join(cls.dir, 'frozen_model_xception.pb'),
          '--formats', 'pb,saved_model,tflite,tflite_full_int8' + ',onnx,onnx_int8' * HAS_ONNX,
          '--dataset_dir', DATASET_DIR, '--calibration_images', '50',
          '--max_accuracy_loss', '0.1']))
    images, _ = small_model.validation_images()
    images = images[::10]
    np.save(os.path.join(cls.dir, 'images.npy'), images)
    _, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    cls.expected = predict(images)

  def check(self, title, package='tensorflow', model=None, expected=None, atol=1e-4):
    """Runs a program of docs/export.md; returns what it printed.

    Args:
      title: the program's.
      package: what it needs, else the test is skipped.
      model: file to use in place of frozen_model_xception.pb.
      expected: probabilities, by default the checkpoint's.
      atol: largest allowed difference of a probability.
    """
    if not importlib.util.find_spec(package):
      self.skipTest(f'{package} is not installed')
    text = program(title)
    if model:
      self.assertIn("'frozen_model_xception.pb'", text)
      text = text.replace('frozen_model_xception.pb', model)
    code = ('import numpy as np\n'
            "images = np.load('images.npy')\n"
            f'{text}\n'
            "np.save('probabilities.npy', np.asarray(probabilities))\n")
    output = self.run_command([sys.executable, '-c', code])
    self.assertAllClose(np.load(os.path.join(self.dir, 'probabilities.npy')),
                        self.expected if expected is None else expected, rtol=0, atol=atol)
    return output

  def run_command(self, command):
    """Runs a program in the model's folder; returns what it printed."""
    result = subprocess.run(command, cwd=self.dir, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, timeout=300, shell=isinstance(command, str))
    self.assertEqual(result.returncode, 0, result.stdout)
    return result.stdout

  def test_tensorflow_1_style(self):
    self.check('TensorFlow, graph mode')

  def test_saved_model(self):
    # TensorFlow logs this when it gives up fusing operations.
    self.assertNotIn('remapper failed', self.check('TensorFlow 2, SavedModel'))

  def test_keras(self):
    self.assertNotIn('remapper failed', self.check('Keras', 'keras'))

  def test_wrap_function(self):
    self.check('TensorFlow 2, .pb')

  def test_saved_model_cli(self):
    command = program('saved_model_cli', 'sh')
    self.assertTrue(command.startswith('saved_model_cli '))
    self.run_command(os.path.join(os.path.dirname(sys.executable), command))
    probabilities = np.load(os.path.join(self.dir, 'out', 'probabilities.npy'))
    self.assertAllClose(probabilities, self.expected, rtol=0, atol=1e-4)

  def test_features(self):
    self.assertEndsWith(self.check('Features'), '(10, 256) (10, 5)\n')

  def test_opencv(self):
    self.check('OpenCV', 'cv2')

  def test_opencv_tflite(self):
    self.check('OpenCV, TFLite', 'cv2')

  def test_opencv_onnx(self):
    self.require_onnx()
    self.check('OpenCV, ONNX', 'cv2')

  def test_openvino(self):
    for model in ['frozen_model_xception.pb', 'frozen_model_xception.tflite',
                  'frozen_model_xception_saved_model'] + ['frozen_model_xception.onnx'] * HAS_ONNX:
      self.check('OpenVINO', 'openvino', model)

  def test_openvino_8_bits(self):
    self.require_onnx()
    path = os.path.join(self.dir, 'frozen_model_xception_int8.onnx')
    images = np.load(os.path.join(self.dir, 'images.npy'))
    # OpenVINO computes some of the sums and the softmax in float32.
    self.check('OpenVINO', 'openvino', path, models.load(path).predict(images), atol=5e-2)

  def test_onnx_runtime(self):
    self.require_onnx()
    self.check('ONNX Runtime')

  def test_litert(self):
    self.check('LiteRT', 'ai_edge_litert')

  def test_litert_8_bits(self):
    path = os.path.join(self.dir, 'frozen_model_xception_full_int8.tflite')
    images = np.load(os.path.join(self.dir, 'images.npy'))
    self.check('LiteRT, 8 bits', 'ai_edge_litert', expected=models.load(path).predict(images))

  def test_tflite_converter(self):
    self.check('TFLite from the SavedModel')

  def test_tf2onnx(self):
    self.require_onnx()
    command = program('ONNX from the SavedModel', 'sh')
    self.assertTrue(command.startswith('python '))
    self.run_command(sys.executable + command.removeprefix('python'))
    images = np.load(os.path.join(self.dir, 'images.npy'))
    self.assertAllClose(models.load(os.path.join(self.dir, 'converted.onnx')).predict(images),
                        self.expected, rtol=0, atol=1e-4)

  @unittest.skipUnless(shutil.which('g++'), 'g++ is not installed')
  def test_cpp(self):
    with open(os.path.join(self.dir, 'classify.cc'), 'w', encoding='utf-8') as f:
      f.write(program('C++', 'cpp'))
    np.load(os.path.join(self.dir, 'images.npy')).tofile(os.path.join(self.dir, 'images.bin'))
    command = program('C++', 'sh').replace('$(python ', f'$({sys.executable} ')
    self.assertIn(' 128\n', command)
    output = self.run_command(command.replace(' 128\n', f' {small_model.IMAGE_SIZE}\n'))
    lines = output.splitlines()[-len(self.expected):]  # TensorFlow logs before them
    self.assertAllClose([[float(value) for value in line.split()] for line in lines],
                        self.expected, rtol=0, atol=1e-4)

  def require_onnx(self):
    if not HAS_ONNX:
      self.skipTest('tf2onnx or onnxruntime is not installed')
