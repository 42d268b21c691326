"""Tests of a log folder's configuration, its lock and its record of starts."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from unittest import mock

import tensorflow.compat.v1 as tf

from common import checkpoints
from scripts import PROJECT
from training import log_folder


class LogFolderTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.dir = folder.name


class ConfigureModelTest(LogFolderTestCase):

  def configure(self, checkpoint=None, **kwargs):
    options = {'class_names': ['daisy', 'Löwenzahn'], 'image_size': 71, 'depth_multiplier': 0.5,
                   'seed': 1}
    options.update(kwargs)
    class_names = options.pop('class_names')
    dataset = type('Dataset', (), {'labels_to_names': dict(enumerate(class_names)),
                                   'num_classes': len(class_names)})
    return log_folder.load_or_create_config(dataset, self.dir, checkpoint, **options)

  def test_round_trip(self):
    config = self.configure()
    checkpoint = os.path.join(self.dir, 'model.ckpt-1')
    self.assertEqual(checkpoints.load_config(checkpoint), config)
    self.assertEqual(config.num_classes, 2)
    self.assertEqual(self.configure(checkpoint), config)
    self.assertEqual(os.listdir(self.dir), ['model_config.json'])

  def test_a_seed_that_is_not_given_is_kept(self):
    drawn = self.configure(seed=None).seed
    self.assertEqual(self.configure(os.path.join(self.dir, 'model.ckpt-1'), seed=None).seed, drawn)

  def test_another_model_is_refused(self):
    self.configure()
    checkpoint = os.path.join(self.dir, 'model.ckpt-1')
    for change, message in [
        ({'image_size': 96}, 'image_size is 71 there and 96 here'),
        ({'depth_multiplier': 1.0}, 'depth_multiplier is 0.5 there and 1.0 here'),
        ({'class_names': ['daisy', 'roses']}, "'Löwenzahn'.* there and .*'roses'.* here"),
        ({'seed': 2}, 'seed is 1 there and 2 here')]:
      with self.assertRaisesRegex(checkpoints.CheckpointError, message):
        self.configure(checkpoint, **change)

  def test_a_damaged_configuration_is_named(self):
    self.configure()
    checkpoint = os.path.join(self.dir, 'model.ckpt-1')
    for content in ('{"image_size": 71', '{"image_size": 71}', '[]', ''):
      with open(os.path.join(self.dir, 'model_config.json'), 'w', encoding='utf-8') as f:
        f.write(content)
      with self.assertRaisesRegex(checkpoints.CheckpointError,
                                  'model_config.json, which train_flowers.py writes .* cannot'):
        checkpoints.load_config(checkpoint)


class LockTest(LogFolderTestCase):

  def test_a_second_process_is_refused_until_the_first_ends(self):
    log_dir = os.path.join(self.dir, 'log')
    program = ('import sys, time\nfrom training import log_folder\n'
               'with log_folder.lock(sys.argv[1]):\n'
               '  print("locked", flush=True)\n'
               '  time.sleep(600)\n')
    holder = subprocess.Popen([sys.executable, '-c', program, log_dir], cwd=PROJECT,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    self.addCleanup(holder.stdout.close)
    self.assertEqual(holder.stdout.readline(), 'locked\n')
    with self.assertRaisesRegex(log_folder.LogFolderError,
                                f'Process {holder.pid} is training in .*log: wait for it'):
      with log_folder.lock(log_dir):
        pass
    holder.kill()
    holder.wait()
    with log_folder.lock(log_dir):
      with open(os.path.join(log_dir, 'train.lock'), encoding='utf-8') as f:
        self.assertEqual(int(f.read()), os.getpid())

  def test_folders_that_cannot_be_written(self):
    denied = PermissionError(13, 'Permission denied')  # root may write anywhere
    for log_dir, makedirs, reason in [
        ('', os.makedirs, 'No such file or directory'),
        (os.path.join(self.dir, 'log'), mock.Mock(side_effect=denied), 'Permission denied')]:
      with mock.patch.object(os, 'makedirs', makedirs), \
           self.assertRaises(log_folder.LogFolderError) as context, log_folder.lock(log_dir):
        pass
      self.assertEqual(str(context.exception), f'Cannot write to --log_dir {log_dir!r}: {reason}')


class ScratchTest(LogFolderTestCase):

  def test_folders_of_dead_workers_are_removed(self):
    dead = subprocess.Popen(['true'])
    dead.wait()
    names = [f'train_flowers_{dead.pid}_a', f'train_flowers_{os.getppid()}_b', 'train_flowers_c']
    for name in names:
      os.makedirs(os.path.join(self.dir, name, 'plugins'))
    with mock.patch.object(tempfile, 'tempdir', self.dir), log_folder.scratch() as folder:
      self.assertStartsWith(folder, os.path.join(self.dir, f'train_flowers_{os.getpid()}_'))
      self.assertCountEqual(os.listdir(self.dir), [*names[1:], os.path.basename(folder)])
    self.assertCountEqual(os.listdir(self.dir), names[1:])


class RecordStartTest(LogFolderTestCase):

  def record_start(self, step, training_split='400, abc'):
    """Returns the warning."""
    dataset = mock.Mock(**{'records.fingerprint.return_value': training_split})
    with tf.Graph().as_default(), contextlib.redirect_stderr(io.StringIO()) as stderr:
      writer = tf.summary.FileWriter(self.dir, filename_suffix=str(step))
      log_folder.record_start(self.dir, step, dataset, ['/cpu:0'], writer)
      writer.close()
    return stderr.getvalue()

  def test_a_changed_dataset(self):
    self.assertEqual(self.record_start(0), '')
    self.assertEqual(self.record_start(7), '')
    self.assertIn('the training split has changed since the last start (images, hash of their '
                  'sizes: 400, abc then, 500, abc now)', self.record_start(7, '500, abc'))
    self.assertEqual(self.record_start(0), '')  # a new run
    with open(os.path.join(self.dir, 'runs.jsonl'), 'a', encoding='utf-8') as f:
      f.write('{}\n')  # of a version that did not store it
    self.assertEqual(self.record_start(8, '500, abc'), '')

  def test_a_line_for_each_start_and_a_text_in_tensorboard(self):
    for step in (0, 7):
      self.record_start(step)
    with open(os.path.join(self.dir, 'runs.jsonl'), encoding='utf-8') as f:
      runs = [json.loads(line) for line in f]
    self.assertEqual([run['start_step'] for run in runs], [0, 7])
    self.assertEqual(runs[0]['command'], sys.argv)
    self.assertEqual(runs[0]['tensorflow'], tf.__version__)
    self.assertEqual(runs[0]['devices'], ['/cpu:0'])
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=PROJECT, capture_output=True,
                            text=True)
    if not commit.returncode:  # not in a release archive
      self.assertRegex(runs[0]['git'], f'^{commit.stdout.strip()}[+]?$')
    texts = {event.step: value.tensor.string_val[0].decode()
             for path in tf.gfile.Glob(os.path.join(self.dir, 'events.*'))
             for event in tf.train.summary_iterator(path) for value in event.summary.value
             if value.tag == 'run' and value.metadata.plugin_data.plugin_name == 'text'}
    self.assertEqual(sorted(texts), [0, 7])
    self.assertIn(f'| tensorflow | {tf.__version__} |', texts[7])
