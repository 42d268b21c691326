"""Runs the programs of docs/export.md, "In other programs", on a small model.

Each program is run as printed there and must give the checkpoint's
probabilities. Programs whose packages are not installed are skipped.
"""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from export import freeze
from scripts import DATASET_DIR
from scripts import PROJECT
import small_model
import write_pb

HAS_ONNX = all(importlib.util.find_spec(name) for name in ('tf2onnx', 'onnxruntime'))


def program(title, language='python'):
  """Returns the program under the title **title** of docs/export.md."""
  with open(os.path.join(PROJECT, 'docs', 'export.md'), encoding='utf-8') as f:
    _, _, text = f.read().partition(f'**{title}**')
  return re.search(rf'```{language}\n(.*?)```', text, re.DOTALL)[1]


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
          '--formats', 'pb,saved_model,tflite' + ',onnx' * HAS_ONNX,
          '--dataset_dir', DATASET_DIR]))
    images, _ = small_model.validation_images()
    images = images[::10]
    np.save(os.path.join(cls.dir, 'images.npy'), images)
    _, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    cls.expected = predict(images)

  def check(self, title, package='tensorflow'):
    """Runs a program of docs/export.md; returns what it printed."""
    if not importlib.util.find_spec(package):
      self.skipTest(f'{package} is not installed')
    code = ('import numpy as np\n'
            "images = np.load('images.npy')\n"
            f'{program(title)}\n'
            "np.save('probabilities.npy', np.asarray(probabilities))\n")
    output = self.run_command([sys.executable, '-c', code])
    self.assertAllClose(np.load(os.path.join(self.dir, 'probabilities.npy')), self.expected,
                        rtol=0, atol=1e-4)
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

  def test_opencv(self):
    self.check('OpenCV', 'cv2')

  def test_onnx_runtime(self):
    if not HAS_ONNX:
      self.skipTest('tf2onnx or onnxruntime is not installed')
    self.check('ONNX Runtime')

  def test_litert(self):
    self.check('LiteRT', 'ai_edge_litert')


if __name__ == '__main__':
  tf.test.main()
