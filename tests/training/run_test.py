"""Tests of whole training runs, with a network of two layers, in this process."""

import contextlib
import dataclasses
import glob
import io
import json
import os
import shlex
import shutil
import tempfile
from unittest import mock

import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
import eval_flowers
from evaluation import report
from records import flowers
from scripts import DATASET_DIR
import train_flowers
from training import evaluation_hook
from training import log_folder
from training import optimization
from training import options
from training import saving
from training import step as training_step
import xception


def two_layers(images, num_classes, is_training=True, *_, **__):
  """Stands in for `xception.xception`."""
  with tf.variable_scope('Xception'), slim.arg_scope([slim.batch_norm], is_training=is_training):
    net = slim.conv2d(images, 4, [3, 3], stride=8, scope='block1_conv1')
    net = tf.reduce_mean(net, [1, 2], keepdims=True)
    logits = tf.squeeze(slim.conv2d(net, num_classes, [1, 1], normalizer_fn=None,
                                    activation_fn=None, scope='Logits'), [1, 2])
    return logits, {'Predictions': tf.nn.softmax(logits)}


two_layers.default_image_size = 299


class RunTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.log_dir = os.path.join(self.dir, 'log')
    self.enter_context(mock.patch.object(xception, 'xception', two_layers))

  def enter_context(self, context):
    self.addCleanup(context.__exit__, None, None, None)
    return context.__enter__()

  def train(self, *argv, log_dir=None):
    """Runs train_flowers.py; returns what it printed."""
    args = options.parse_train_args('', [
        '--dataset_dir', DATASET_DIR, '--log_dir', log_dir or self.log_dir, '--image_size', '71',
        '--clone_on_cpu', '--batch_size', '4', '--seed', '1', '--log_every_n_steps', '1', *argv])
    output = io.StringIO()
    with tf.Graph().as_default(), contextlib.redirect_stdout(output), \
         contextlib.redirect_stderr(output):
      train_flowers.main(args)
    return output.getvalue()

  def steps(self, log_dir=None):
    return [checkpoints.global_step(path)
            for path in checkpoints.list_checkpoints(log_dir or self.log_dir)]


class NextCommandTest(RunTestCase):

  def next_command(self, output):
    """Returns the arguments of the command that training printed last."""
    line = output.splitlines()[-1]
    self.assertStartsWith(line, 'Next: python eval_flowers.py --')
    return shlex.split(line.removeprefix('Next: python eval_flowers.py '))

  def test_the_shipped_flowers(self):
    output = self.train('--max_number_of_steps', '1')
    self.assertEqual(self.next_command(output),
                     ['--dataset_dir', DATASET_DIR, '--log_dir', self.log_dir])

  def test_records_of_other_tools(self):
    dataset_dir, log_dir = (os.path.join(self.dir, name) for name in ("Ann's data", '$HOME log'))
    os.mkdir(dataset_dir)
    shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), dataset_dir)
    records = flowers.get_split('train', DATASET_DIR).records
    options = {'--dataset_dir': dataset_dir, '--file_pattern': 'my %s-*', '--image_key': 'jpeg',
               '--label_key': 'my label', '--labels_offset': '1'}
    for split_name, num_images in (('train', 40), ('test', 9)):
      path = os.path.join(dataset_dir, f'my {split_name}-00000-of-00001')
      with tf.python_io.TFRecordWriter(path) as writer:
        for i in range(num_images):
          feature = tf.train.Example.FromString(records[i]).features.feature
          example = tf.train.Example()
          example.features.feature['jpeg'].CopyFrom(feature['image/encoded'])
          label = feature['image/class/label'].int64_list.value[0]
          example.features.feature['my label'].int64_list.value.append(label + 1)
          writer.write(example.SerializeToString())

    words = [word for option in options.items() for word in option]
    output = self.train(*words, '--max_number_of_steps', '1', log_dir=log_dir)
    command = self.next_command(output)
    self.assertEqual(command, [*words, '--log_dir', log_dir, '--dataset_split_name', 'test'])
    with mock.patch.object(report, '_draw_pictures', return_value={}), \
         contextlib.redirect_stdout(io.StringIO()) as evaluated:
      eval_flowers.main(eval_flowers.parse_args([*command, '--eval_on_cpu']))
    self.assertRegex(evaluated.getvalue().splitlines()[-1], r'^Accuracy: .* \(\d of 9\)$')

    os.remove(os.path.join(dataset_dir, 'my test-00000-of-00001'))
    output = self.train(*words, '--max_number_of_steps', '2', log_dir=log_dir)
    self.assertEqual(self.next_command(output)[-2:], ['--dataset_split_name', 'train'])


class ResumeTest(RunTestCase):

  def test_another_batch_size_sees_the_same_images(self):
    # 24 of 400 images: 6 steps of 4, or 4 and then 8 images in one step.
    options = ['--num_epochs', '0.06', '--learning_rate_decay_type', 'polynomial']
    whole = self.train(*options, log_dir=os.path.join(self.dir, 'whole'))
    self.assertIn('global step 6/6: ', whole)
    self.assertIn('epoch 0.06, 00:00:00 left', whole)
    self.train(*options, '--max_number_of_steps', '4')
    output = self.train(*options, '--batch_size', '8')
    self.assertIn('Steps 4 to 5', output)
    self.assertRegex(output, 'global step 5/5: .*epoch 0.06, 00:00:00 left')
    self.assertEqual(checkpoints.next_image(checkpoints.find(self.log_dir)), 24)
    self.assertIn('already trained to step 5', self.train(*options))
    rates = {event.step: value.simple_value
             for path in glob.glob(os.path.join(self.log_dir, 'events.*'))
             for event in tf.train.summary_iterator(path) for value in event.summary.value
             if value.tag == 'learning_rate'}
    self.assertAllClose(rates[5], 0.002 + (0.00001 - 0.002) * 16 / 24)


class BestTest(RunTestCase):

  def setUp(self):
    super().setUp()
    self.best_dir = os.path.join(self.log_dir, 'best')
    self.metrics_file = os.path.join(self.best_dir, 'metrics.json')
    self.config = checkpoints.ModelConfig(['daisy'], 71, 1.0, seed=1)

  def save_best(self, step, accuracy, best=True):
    """Writes a best checkpoint as training does; `best` is None for the first one."""
    with tf.Graph().as_default(), tf.Session() as session:
      hook = evaluation_hook.EvaluationHook(
          mock.Mock(), tf.train.create_global_step(), None, self.log_dir, self.config, 1, 10,
          {'global_step': 0, 'num_without_improvement': 0, 'best': best})
      hook.begin()
      session.run(tf.global_variables_initializer())
      tf.train.get_global_step().load(step, session)
      hook._keep(session, {'global_step': step, 'accuracy': accuracy, 'loss': 1.0})

  def read_best(self, start_step=9, **changes):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
      best = evaluation_hook.read_best(
          self.log_dir, dataclasses.replace(self.config, **changes), start_step)
    return best and best['global_step'], stderr.getvalue()

  def test_the_best_of_this_run_counts(self):
    self.assertEqual(self.read_best(), (None, ''))
    self.save_best(3, 0.5)
    self.assertEqual(self.read_best(), (3, ''))
    self.save_best(5, 0.6)
    self.assertEqual(self.read_best(start_step=5), (5, ''))
    self.assertEqual(self.steps(self.best_dir), [5])

  def test_the_best_of_another_run_is_renamed(self):
    for i, (kwargs, problem) in enumerate([
        ({'start_step': 2}, 'it is of step 3, and training starts from step 2'),
        ({'seed': 2}, 'it belongs to another run')]):
      self.save_best(3, 0.5)
      best, message = self.read_best(**kwargs)
      self.assertIsNone(best)
      self.assertIn(f'{self.best_dir} is ignored and will be renamed: {problem}', message)
      self.save_best(1, 0.4, best=None)
      self.assertEqual(self.steps(f'{self.best_dir}.old{i or ""}'), [3])
      self.assertEqual(self.steps(self.best_dir), [1])

  def test_a_kill_leaves_metrics_that_match_the_checkpoint(self):
    self.save_best(3, 0.5)
    with mock.patch.object(saving.Saver, 'save', side_effect=KeyboardInterrupt), \
         self.assertRaises(KeyboardInterrupt):
      self.save_best(5, 0.6)
    self.assertEqual(self.read_best()[0], 3)

    shutil.copy(self.metrics_file, self.dir)
    self.save_best(5, 0.6)
    os.rename(self.metrics_file, self.metrics_file + '.next')  # as before the last rename
    shutil.copy(os.path.join(self.dir, 'metrics.json'), self.metrics_file)
    self.assertEqual(self.read_best()[0], 5)
    with open(self.metrics_file, encoding='utf-8') as f:
      self.assertEqual(json.load(f)['accuracy'], 0.6)

  def test_a_kill_during_an_evaluation(self):
    evaluated = ['--eval_every_epochs', '0.01', '--learning_rate_decay_type', 'fixed']
    options = ['--max_number_of_steps', '3', *evaluated]
    whole = self.train(*options, log_dir=os.path.join(self.dir, 'whole'))
    with mock.patch.object(evaluation_hook.EvaluationHook, '_evaluate',
                           side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
      self.train('--max_number_of_steps', '1', *evaluated)
    output = self.train('--max_number_of_steps', '1', *evaluated)
    output += self.train(*options)
    output += self.train(*options)  # which finds nothing to do
    self.assertEqual(*([line for line in lines.splitlines() if line.startswith('validation at')]
                       for lines in (whole, output)))
    self.assertEndsWith(output, 'or choose another --log_dir\n')
    self.assertEqual(self.steps(self.best_dir), self.steps(os.path.join(self.dir, 'whole', 'best')))

  def test_evaluations_without_improvement_are_counted_across_starts(self):
    scores = iter([0.5, 0.4, 0.4, 0.4, 0.4])

    def score(hook, checkpoint, step):
      return {'global_step': step, 'accuracy': next(scores), 'loss': None, 'uses_averages': False}

    with mock.patch.object(evaluation_hook.EvaluationHook, '_evaluate', score):
      output = self.train('--max_number_of_steps', '3', '--eval_every_epochs', '0.01')
      self.assertIn('validation at step 3: accuracy = 0.4000, loss = inf; best: 0.5000 at step 1',
                    output)
      output = self.train('--max_number_of_steps', '9', '--eval_every_epochs', '0.02',
                          '--early_stop_patience', '4')
    self.assertIn('no better accuracy than 0.5000 of step 1 in 4 evaluations', output)
    self.assertEqual(self.steps()[-1], 6)  # after 2 and 3, the steps 4 and 6

  def test_early_stop_by_an_evaluation_that_a_kill_prevented(self):
    scores = iter([0.5, KeyboardInterrupt, 0.4])

    def score(hook, checkpoint, step):
      accuracy = next(scores)
      if accuracy is KeyboardInterrupt:
        raise accuracy
      return {'global_step': step, 'accuracy': accuracy, 'loss': 1.0, 'uses_averages': False}

    options = ['--max_number_of_steps', '9', '--eval_every_epochs', '0.01',
               '--early_stop_patience', '1']
    with mock.patch.object(evaluation_hook.EvaluationHook, '_evaluate', score):
      with self.assertRaises(KeyboardInterrupt):
        self.train(*options)
      self.assertIn('in 1 evaluations', self.train(*options))
    self.assertEqual(self.steps()[-1], 2)

  def test_damage(self):
    for damage in (lambda: os.remove(self.metrics_file),
                   lambda: open(self.metrics_file, 'w').close(),
                   lambda: os.remove(f'{self.best_dir}/model.ckpt-3.index')):
      self.save_best(3, 0.5)
      damage()
      best, message = self.read_best()
      self.assertIsNone(best)
      self.assertIn('is ignored', message)

  def test_a_deleted_run_does_not_decide_for_a_new_one(self):
    self.train('--max_number_of_steps', '2', '--eval_every_epochs', '0.01')
    for path in glob.glob(os.path.join(self.log_dir, '[cm]*')):
      os.remove(path)
    output = self.train('--max_number_of_steps', '1', '--eval_every_epochs', '0.01',
                        '--checkpoint_path', self.best_dir)
    self.assertRegex(output, rf'Starting from (\d+) of \1 variables of {self.best_dir}/model')
    self.assertIn(f'{self.best_dir} is ignored and will be renamed: it is of step', output)
    self.assertRegex(output, r'validation at step 1: .*; best: \d.\d{4} at step 1')
    self.assertEqual(self.steps(self.best_dir), [1])


class WeightsThatAreNotFiniteTest(RunTestCase):

  def test_they_are_not_saved(self):
    self.train('--max_number_of_steps', '2')
    for argv in ([], ['--eval_every_epochs', '0.01']):
      with mock.patch.object(optimization, 'build_learning_rate',
                             lambda *_: tf.constant(float('inf'))), \
           self.assertRaisesRegex(training_step.TrainingError,
                                  'The weights are not finite after step 3 and were not saved'):
        self.train('--max_number_of_steps', '3', *argv)
      self.assertEqual(self.steps(), [0, 2])
    self.assertEqual(self.steps(os.path.join(self.log_dir, 'best')), [2])

  def test_a_folder_that_is_removed(self):
    with tf.Graph().as_default(), tf.Session() as session:
      tf.train.create_global_step()
      saver = saving.Saver(self.log_dir, 1)
      session.run(tf.global_variables_initializer())
      with self.assertRaisesRegex(training_step.TrainingError, 'log was removed or renamed'):
        saver.save(session, os.path.join(self.log_dir, 'model.ckpt'), 1)


class LogFolderTest(RunTestCase):

  def test_a_copy_resumes_from_its_own_checkpoint(self):
    self.train('--max_number_of_steps', '2')
    copy = os.path.join(self.dir, 'copy')
    shutil.copytree(self.log_dir, copy)
    self.train('--max_number_of_steps', '3')
    self.assertIn('Steps 2 to 4', self.train('--max_number_of_steps', '4', log_dir=copy))
    shutil.rmtree(self.log_dir)
    moved = os.path.join(self.dir, 'moved')
    os.rename(copy, moved)
    output = self.train('--max_number_of_steps', '5', '--max_to_keep', '2', log_dir=moved)
    self.assertIn('Steps 4 to 5', output)
    self.assertEqual(self.steps(moved), [4, 5])
    self.assertLen(glob.glob(os.path.join(moved, '*.index')), 2)  # older ones are deleted

  def test_lost_files_never_start_a_run_again(self):
    self.train('--max_number_of_steps', '2')
    self.train('--max_number_of_steps', '4')
    os.remove(os.path.join(self.log_dir, 'checkpoint'))
    self.assertIn('Steps 4 to 5', self.train('--max_number_of_steps', '5'))

    os.remove(os.path.join(self.log_dir, 'model.ckpt-5.index'))
    output = self.train('--max_number_of_steps', '5')
    self.assertIn('model.ckpt-5, the newest checkpoint', output)
    self.assertIn('Steps 4 to 5', output)

    for path in glob.glob(os.path.join(self.log_dir, '*.index')):
      os.remove(path)
    before = {name: os.path.getmtime(os.path.join(self.log_dir, name))
              for name in os.listdir(self.log_dir) if name != log_folder.LOCK_FILE}
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'holds parts of checkpoints'):
      self.train('--max_number_of_steps', '6', '--seed', '2')
    self.assertEqual(before, {name: os.path.getmtime(os.path.join(self.log_dir, name))
                              for name in os.listdir(self.log_dir)
                              if name != log_folder.LOCK_FILE})

  def test_folders_that_cannot_be_used(self):
    file = os.path.join(self.dir, 'file')
    open(file, 'w').close()
    for log_dir, error, message in [
        (self.log_dir + '[1]', checkpoints.CheckpointError, r'contains \[, which TensorFlow reads'),
        ('gs://bucket/log', checkpoints.CheckpointError, 'is a URL'),
        (file, log_folder.LogFolderError, "Cannot write to --log_dir '.*file': File exists"),
        (os.path.join(file, 'log'), log_folder.LogFolderError, 'Not a directory'),
        ('/proc/log', log_folder.LogFolderError, 'Cannot write to --log_dir')]:
      with self.assertRaisesRegex(error, message):
        self.train(log_dir=log_dir)
    self.assertEqual(os.listdir(self.dir), ['file'])
    link = os.path.join(self.dir, 'link')
    os.symlink('nowhere', link)
    with self.assertRaisesRegex(log_folder.LogFolderError, 'link.: it is a broken link'):
      self.train(log_dir=link)
    os.makedirs(self.log_dir)
    open(os.path.join(self.log_dir, 'eval'), 'w').close()
    with self.assertRaisesRegex(NotADirectoryError, 'log/eval is not a folder'):
      self.train('--eval_every_epochs', '1')
    self.assertFalse(os.path.exists('gs:'))
