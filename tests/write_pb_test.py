"""Tests of write_pb.py: what it writes, what it compares, and what it refuses."""

import contextlib
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from unittest import mock

import numpy as np
from scipy import special
from tensorflow.compat import v2 as tf2
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files
from export import comparison
from export import formats
from export import freeze
from export import models
from records import flowers
from scripts import DATASET_DIR
from scripts import PROJECT
import small_model
import write_pb

HAS_ONNX = all(importlib.util.find_spec(name) for name in ('tf2onnx', 'onnxruntime'))
ROW = re.compile(r'^(\w+) +([\d,]+) +(\S+) +(\S+)% +(\S+)$', re.MULTILINE)
# Formats that TensorFlow alone writes and runs.
FORMATS = 'pb,saved_model,tflite,tflite_float16,tflite_int8,jpeg_pb'
FILES = {'model.pb', 'model_saved_model', 'model.tflite', 'model_float16.tflite',
         'model_int8.tflite', 'model_jpeg.pb'}


def read_graph(path):
  with open(path, 'rb') as f:
    return tf.GraphDef.FromString(f.read())


class WritePbTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.log_dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.log_dir)
    cls.checkpoint = small_model.write_checkpoint(cls.log_dir)

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.pb = os.path.join(self.dir, 'model.pb')

  def write(self, *options, log_dir=None):
    """Runs the script's main; returns its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      write_pb.main(write_pb.parse_args([
          '--log_dir', log_dir or self.log_dir, '--output_file', self.pb,
          '--dataset_dir', DATASET_DIR, *options]))
    return output.getvalue()

  def run_script(self, *options):
    """Runs the script as __main__; returns the message that it ends with."""
    argv = ['write_pb.py', '--log_dir', self.log_dir, '--output_file', self.pb,
            '--dataset_dir', DATASET_DIR, *options]
    # The tests may run under nohup or in the background, where these are ignored.
    for number, handler in [(signal.SIGINT, signal.default_int_handler),
                            (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)]:
      self.addCleanup(signal.signal, number, signal.signal(number, handler))
    with mock.patch.object(sys, 'argv', argv), \
         contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), \
         self.assertRaises(SystemExit) as end:
      runpy.run_path(os.path.join(PROJECT, argv[0]), run_name='__main__')
    return end.exception.code

  def model_file(self):
    with open(os.path.join(self.dir, 'model.json'), encoding='utf-8') as f:
      return json.load(f)

  def test_every_format(self):
    output = self.write('--formats', FORMATS)
    self.assertCountEqual(os.listdir(self.dir), [*FILES, 'labels.txt', 'model.json'])
    self.assertEqual(flowers.read_labels(self.dir), small_model.CLASS_NAMES)
    self.assertIn(f'100 validation images of {DATASET_DIR}', output)
    rows = {name: (int(size.replace(',', '')), float(difference), float(agreement))
            for name, size, difference, agreement, _ in ROW.findall(output)}
    self.assertEqual(list(rows), FORMATS.split(','))
    for name, (size, difference, agreement) in rows.items():
      self.assertLessEqual(difference, formats.FORMATS[name].bound)
      self.assertGreaterEqual(agreement, 99)
      self.assertGreater(size, 100_000)
    self.assertLess(rows['pb'][1], 1e-5)
    self.assertGreater(rows['tflite_int8'][1], 1e-4)  # not just the float model
    self.assertLess(rows['tflite_float16'][0], 0.6 * rows['tflite'][0])
    self.assertLess(rows['tflite_int8'][0], 0.4 * rows['tflite'][0])
    self.check_model_file(rows)

  def check_model_file(self, rows):
    model = self.model_file()
    self.assertEqual((model['image_size'], model['class_names'], model['global_step']),
                     (71, small_model.CLASS_NAMES, small_model.GLOBAL_STEP))
    self.assertEqual((model['averaged_weights'], model['folded'], model['metrics']),
                     (False, True, None))
    self.assertEqual(model['versions']['tensorflow'], tf.__version__)
    self.assertEqual({file['format'] for file in model['files']}, set(rows))
    for file in model['files']:
      with open(os.path.join(self.dir, file['file']), 'rb') as f:
        content = f.read()
      self.assertEqual((len(content), hashlib.sha256(content).hexdigest()),
                       (file['bytes'], file['sha256']))

  def test_both_signatures_of_the_saved_model(self):
    self.write('--noverify', '--formats', 'pb,saved_model')
    images = comparison.find_images(71, DATASET_DIR)
    expected = models.load(self.pb).predict(images.preprocessed)
    with tf.Graph().as_default(), tf.Session() as session:
      signatures = tf.saved_model.load(
          session, ['serve'], os.path.join(self.dir, 'model_saved_model')).signature_def
      for name, key, batch in [('serving_default', 'images', images.preprocessed),
                               ('encoded', 'encoded', images.encoded)]:
        probabilities = session.run(signatures[name].outputs['probabilities'].name,
                                    {signatures[name].inputs[key].name: batch})
        self.assertAllClose(probabilities, expected, rtol=0, atol=1e-5)

  def test_folded_or_not(self):
    self.write('--noverify')
    self.assertEqual(small_model.num_norms(read_graph(self.pb)), 0)
    self.write('--nofold')
    self.assertEqual(small_model.num_norms(read_graph(self.pb)), 40)
    self.assertFalse(self.model_file()['folded'])

  def test_bfloat16(self):
    self.write('--noverify')
    size = os.path.getsize(self.pb)
    output = self.write('--precision', 'bfloat16', '--formats', 'pb,saved_model,jpeg_pb')
    self.assertLess(os.path.getsize(self.pb), 0.6 * size)
    types = {node.name: node.attr['T'].type for node in read_graph(self.pb).node}
    self.assertEqual(types['Xception/block5_dws_conv1/separable_conv2d'],
                     tf.bfloat16.as_datatype_enum)
    self.assertEqual(types['Xception/Logits/Conv2D'], tf.float32.as_datatype_enum)
    for _, _, difference, _, _ in ROW.findall(output):
      self.assertBetween(float(difference), 1e-5, formats.BFLOAT16_BOUND)
    for options, message in [(['--formats', 'pb,tflite,onnx'], '--formats tflite,onnx'),
                             (['--nofold'], '--nofold')]:
      with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
        write_pb.parse_args(['--precision', 'bfloat16', *options])
      self.assertIn(f'--precision bfloat16 cannot be combined with {message}', errors.getvalue())

  def test_averages(self):
    with tempfile.TemporaryDirectory() as log_dir:
      small_model.write_checkpoint(log_dir, with_averages=True)
      self.assertIn('averaged weights', self.write('--noverify', log_dir=log_dir))
      images, labels = small_model.validation_images()
      probabilities = models.load(self.pb).predict(images)
      self.assertAllEqual(probabilities.argmax(1), labels)
      self.assertTrue(self.model_file()['averaged_weights'])
      self.assertNotIn('averaged weights', self.write('--noverify', '--use_averages', 'no',
                                                      log_dir=log_dir))
      probabilities = models.load(self.pb).predict(images)
      self.assertLess((probabilities.argmax(1) == labels).mean(), 0.5)
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'has no averages'):
      self.write('--use_averages', 'yes')

  def test_metrics_of_the_same_weights_only(self):
    folder = os.path.join(self.log_dir, 'eval')
    os.mkdir(folder)
    self.addCleanup(shutil.rmtree, folder)
    best = os.path.join(self.log_dir, 'best')
    shutil.copytree(self.log_dir, best)
    self.addCleanup(shutil.rmtree, best)
    other = os.path.join(self.dir, 'other')
    os.mkdir(other)
    small_model.write_checkpoint(other, is_fitted=False)  # with the same name and step
    metrics = {'accuracy': 0.5, 'checkpoint_sha256': files.sha256(f'{self.checkpoint}.index'),
               'uses_averages': False, 'image_size': 71}
    for log_dir, written, expected in [
        (self.log_dir, metrics, metrics), (best, metrics, metrics),
        (other, metrics, None), (self.log_dir, {**metrics, 'uses_averages': True}, None),
        (self.log_dir, {**metrics, 'image_size': 128}, None), (self.log_dir, [], None)]:
      with open(os.path.join(folder, 'metrics.json'), 'w') as f:
        json.dump(written, f)
      if log_dir == other:
        shutil.copytree(folder, os.path.join(other, 'eval'))
      self.write('--noverify', log_dir=log_dir)
      self.assertEqual(self.model_file()['metrics'], expected)

  def store_temperature(self, **changed):
    """Writes a temperature of 8 beside the checkpoint, as eval_flowers.py does."""
    path = os.path.join(self.log_dir, 'temperature.json')
    with open(path, 'w') as f:
      json.dump({'temperature': 8.0, 'checkpoint_sha256': files.sha256(f'{self.checkpoint}.index'),
                 'uses_averages': False, 'image_size': 71, **changed}, f)
    self.addCleanup(os.remove, path)

  def read_nodes(self, images, *names):
    """Returns the values of nodes of the .pb."""
    with tf.Graph().as_default(), tf.Session() as session:
      tf.import_graph_def(read_graph(self.pb), name='')
      return session.run([f'{name}:0' for name in names], {'input:0': images})

  def test_temperature(self):
    images, _ = small_model.validation_images()
    self.write('--noverify')
    logits, = self.read_nodes(images, 'Xception/SpatialSqueeze')
    self.assertIsNone(self.model_file()['temperature'])
    expected = special.softmax(logits / 8.0, axis=1)
    self.store_temperature()
    names = 'pb,saved_model,tflite,jpeg_pb' + ',onnx' * HAS_ONNX
    output = self.write('--temperature', '--formats', names)
    self.assertIn(f'Froze {self.checkpoint}, logits divided by 8: input node', output)
    self.assertEqual([file['temperature'] for file in self.model_file()['files']],
                     [8.0] * len(self.model_file()['files']))
    # The checkpoint that the files are compared with has the temperature too.
    differences = {name: float(difference) for name, _, difference, _, _ in ROW.findall(output)}
    self.assertLess(differences['pb'], 1e-5)
    self.assertGreater(np.abs(special.softmax(logits, axis=1) - expected).max(), 0.1)
    for name, path in freeze.plan_files(names.split(','), self.pb).items():
      batch = comparison.find_images(71, DATASET_DIR).encoded if name == 'jpeg_pb' else images
      self.assertAllClose(models.load(path).predict(batch), expected, rtol=0, atol=1e-5, msg=name)
    scaled, probabilities = self.read_nodes(images, 'Xception/SpatialSqueeze', 'output')
    self.assertAllClose(scaled, logits / 8.0, rtol=0, atol=1e-5)
    self.assertAllClose(probabilities, expected, rtol=0, atol=1e-5)
    self.write('--temperature', '--noverify', '--nofold')
    self.assertAllClose(models.load(self.pb).predict(images), expected, rtol=0, atol=1e-5)

  def test_no_temperature_of_these_weights(self):
    message = ('temperature.json has no temperature for the weights as trained of '
               f'{self.checkpoint} at 71 pixels: run eval_flowers.py --fit_temperature ')
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      self.write('--temperature')
    self.store_temperature(uses_averages=True)
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      self.write('--temperature')
    self.assertEmpty(os.listdir(self.dir))

  def test_every_file_keeps_its_own_description(self):
    self.write('--noverify', '--formats', 'jpeg_pb')
    with tempfile.TemporaryDirectory() as log_dir:
      checkpoint = small_model.write_checkpoint(log_dir, 8)
      self.write('--noverify', log_dir=log_dir)
    described = self.model_file()
    self.assertEqual((described['checkpoint'], described['global_step']), (checkpoint, 8))
    self.assertEqual([(file['file'], file['checkpoint'], file['global_step'])
                      for file in described['files']],
                     [('model.pb', checkpoint, 8), ('model_jpeg.pb', self.checkpoint, 7)])
    with open(os.path.join(self.dir, 'model_jpeg.pb'), 'ab') as f:
      f.write(b'changed')
    self.write('--noverify')
    self.assertEqual([(file['file'], file['global_step']) for file in self.model_file()['files']],
                     [('model.pb', 7)])

  def test_model_json_of_another_program_is_not_replaced(self):
    content = '{"class_name": "Functional", "config": {}}'
    with open(os.path.join(self.dir, 'model.json'), 'w') as f:
      f.write(content)
    with self.assertRaisesRegex(freeze.FreezeError, 'model.json was not written by write_pb.py'):
      self.write('--noverify')
    with open(os.path.join(self.dir, 'model.json')) as f:
      self.assertEqual(f.read(), content)

  def test_files_that_are_not_checkpoints(self):
    folder = os.path.join(self.dir, 'log')
    os.mkdir(folder)
    checkpoints.save_config(small_model.CONFIG, folder)
    for name, content in [('weights.h5', b'\x89HDF\r\n\x1a\n' + bytes(99)), ('notes.txt', b'text')]:
      path = os.path.join(folder, name)
      with open(path, 'wb') as f:
        f.write(content)
      with self.assertRaisesRegex(checkpoints.CheckpointError, path):
        self.write('--checkpoint_path', path)
    with self.assertRaisesRegex(checkpoints.CheckpointError, f'No checkpoint in {folder}'):
      self.write('--checkpoint_path', folder)

  def test_damaged_checkpoint(self):
    with tempfile.TemporaryDirectory() as log_dir:
      checkpoint = small_model.write_checkpoint(log_dir)
      with open(f'{checkpoint}.index', 'wb') as f:
        f.write(b'damaged')
      with self.assertRaisesRegex(checkpoints.CheckpointError, 'ckpt-7 cannot be read'):
        self.write(log_dir=log_dir)

  def test_checkpoint_that_training_deletes_meanwhile(self):
    with tempfile.TemporaryDirectory() as log_dir:
      checkpoint = small_model.write_checkpoint(log_dir)
      metrics = {'accuracy': 0.5, 'checkpoint_sha256': files.sha256(f'{checkpoint}.index'),
                 'uses_averages': False, 'image_size': 71}
      with open(os.path.join(log_dir, 'metrics.json'), 'w') as f:
        json.dump(metrics, f)

      def delete(*_):
        for path in glob.glob(f'{checkpoint}.*'):
          os.remove(path)
        return {}

      with mock.patch.object(comparison, 'verify', delete):
        self.write(log_dir=log_dir)
    self.assertCountEqual(os.listdir(self.dir), ['model.pb', 'labels.txt', 'model.json'])
    self.assertEqual((self.model_file()['global_step'], self.model_file()['metrics']),
                     (small_model.GLOBAL_STEP, metrics))

  def test_interrupted_and_failing_runs_leave_nothing(self):
    def stop(number):
      signal.raise_signal(number)
      time.sleep(10)  # which the signal ends

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      with mock.patch.object(comparison, 'verify', lambda *_, number=number: stop(number)):
        self.assertEqual(self.run_script(), 'write_pb.py: interrupted; nothing was written')
      self.assertEmpty(os.listdir(self.dir))
    full = tf.errors.ResourceExhaustedError(None, None, '/x; No space left on device')
    with mock.patch.object(tf2.saved_model, 'save', side_effect=full):
      self.assertEqual(self.run_script('--formats', 'saved_model'),
                       'write_pb.py: nothing was written: /x; No space left on device')
    self.assertEmpty(os.listdir(self.dir))

  def test_without_a_dataset(self):
    folder = os.getcwd()
    os.chdir(self.dir)
    self.addCleanup(os.chdir, folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
      write_pb.main(write_pb.parse_args(['--log_dir', self.log_dir]))
    self.assertIn('100 random images, because there is no dataset in dataset', output.getvalue())
    with self.assertRaisesRegex(flowers.DatasetError, 'Cannot read none/labels.txt'):
      self.write('--dataset_dir', 'none')

  def test_files_that_differ_from_the_checkpoint_are_not_written(self):
    for name in ('model.pb', 'labels.txt'):
      with open(os.path.join(self.dir, name), 'w') as f:
        f.write('0:daisy\n1:dandelion\n2:roses\n3:sunflowers\n4:tulips\n')
    before = sorted(os.listdir(self.dir))
    real = formats.FORMATS['tflite_float16']
    for bound, predict in [(1e-6, None), (1.0, lambda batch: np.eye(5)[[4] * len(batch)]),
                           (1.0, lambda batch: np.full([len(batch), 5], np.nan))]:
      with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(formats.FORMATS, {
            'tflite_float16': real._replace(bound=bound)}))
        if predict:
          stack.enter_context(mock.patch.object(models, 'load', return_value=(
              models.FrozenModel(small_model.CLASS_NAMES, 71, {}, predict))))
        with self.assertRaisesRegex(comparison.ComparisonError,
                                    'Nothing was written, .*tflite_float16'):
          self.write('--formats', 'tflite_float16')
      self.assertEqual(sorted(os.listdir(self.dir)), before)
      with open(self.pb) as f:
        self.assertStartsWith(f.read(), '0:daisy')

  def test_checkpoint_that_predicts_nan(self):
    def predict_nan(batch):
      return np.full([len(batch), 5], np.nan)

    images = comparison.find_images(71, DATASET_DIR)
    with self.assertRaisesRegex(comparison.ComparisonError,
                                'Nothing was written, because the checkpoint itself predicts NaN'):
      comparison.verify({'pb': 'none.pb'}, images, predict_nan, 'float32')

  def test_a_saved_model_is_replaced_and_nothing_else(self):
    self.write('--noverify', '--formats', 'saved_model')
    folder = os.path.join(self.dir, 'model_saved_model')
    with open(os.path.join(folder, 'old'), 'w') as f:
      f.write('old')
    self.write('--noverify', '--formats', 'saved_model')
    self.assertNotIn('old', os.listdir(folder))
    os.remove(os.path.join(folder, 'saved_model.pb'))
    with self.assertRaisesRegex(freeze.FreezeError, 'exists and is not a SavedModel'):
      self.write('--noverify', '--formats', 'saved_model')

  def test_wrong_options(self):
    with open(os.path.join(self.dir, 'labels.txt'), 'w') as f:
      f.write('0:cat\n1:dog\n')
    with self.assertRaisesRegex(freeze.FreezeError, 'names other classes than the checkpoint'):
      self.write()
    self.assertCountEqual(os.listdir(self.dir), ['labels.txt'])
    with self.assertRaisesRegex(freeze.FreezeError, 'none/x.pb: there is no folder none'):
      self.write('--output_file', 'none/x.pb')
    for name in ('model.tflite', 'labels.txt', f'{self.dir}/', 'model', 'saved_model.pb'):
      with self.assertRaisesRegex(freeze.FreezeError, f"must be .* a .pb file .* got '{name}'"):
        self.write('--output_file', name)
    with self.assertRaisesRegex(freeze.FreezeError, r"must be UTF-8, got 'a\\udcff.pb'"):
      self.write('--output_file', os.fsdecode(b'a\xff.pb'))
    with self.assertRaisesRegex(
        freeze.FreezeError, r'\[a\]\*_saved_model contains \* \[, which TensorFlow reads as a'):
      self.write('--output_file', f'{self.dir}/[a]*.pb', '--formats', 'saved_model')
    os.symlink('none', f'{self.dir}/model_saved_model')
    with self.assertRaisesRegex(freeze.FreezeError, '_saved_model exists and is not a SavedModel'):
      self.write('--formats', 'saved_model')
    with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
      self.write('--formats', 'pb,caffe')
    self.assertIn('must be among pb,saved_model,', errors.getvalue())
    with mock.patch.dict('sys.modules', {'tf2onnx': None}):
      with self.assertRaisesRegex(formats.FormatError, 'pip install tf2onnx onnxruntime'):
        self.write('--formats', 'onnx')
