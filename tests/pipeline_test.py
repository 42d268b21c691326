"""End-to-end tests of the scripts: train, resume, evaluate, freeze, interruptions, mistakes."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from common import checkpoints
from export import models
from records import flowers
from scripts import DATASET_DIR
from scripts import run
from scripts import slow
from scripts import start

# A small network whose few steps are the same in every run.
TRAIN = ['train_flowers.py', '--dataset_dir', DATASET_DIR, '--image_size', '71',
         '--depth_multiplier', '0.125', '--batch_size', '8', '--clone_on_cpu', '--seed', '1',
         '--learning_rate_decay_type', 'fixed', '--dropout_keep_prob', '1',
         '--log_every_n_steps', '1']


def last_line(output):
  return output.strip().splitlines()[-1]


def losses(output):
  """Returns {global step: loss} of the log lines."""
  return {int(step): float(loss) for step, loss in
          re.findall(r'^global step (\d+)/\d+: loss = ([\d.]+)', output, re.MULTILINE)}


def events(folder):
  """Returns the TensorBoard events in a folder."""
  return [event for path in tf.gfile.Glob(os.path.join(folder, 'events.*'))
          for event in tf.train.summary_iterator(path)]


class ScriptTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.log_dir = os.path.join(self.dir, 'log')

  def assertEndsWithMessage(self, result, message):
    returncode, output = result
    self.assertNotEqual(returncode, 0)
    self.assertNotIn('Traceback', output)
    self.assertRegex(last_line(output), message)

  def check_checkpoint(self, log_dir):
    """Checks that all values of the newest checkpoint are finite; returns its step."""
    checkpoint = checkpoints.find(log_dir)
    reader = tf.train.load_checkpoint(checkpoint)
    names = reader.get_variable_to_shape_map()
    self.assertGreater(len(names), 236)  # the network's variables and the optimizer's
    for name in names:
      self.assertTrue(np.isfinite(reader.get_tensor(name)).all(), name)
    return checkpoints.global_step(checkpoint)


class PipelineTest(ScriptTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared_dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.shared_dir)
    cls.trained_dir = os.path.join(cls.shared_dir, 'log')
    cls.train_result = run(*TRAIN, '--log_dir', cls.trained_dir, '--num_clones', '2',
                           '--max_number_of_steps', '8', '--save_interval_steps', '3')

  def test_train_says_what_it_does(self):
    returncode, output = self.train_result
    self.assertEqual(returncode, 0, output)
    for line in (
        r'^2 towers on /cpu:0, /cpu:1; global batch 8, 4 per tower; float32$',
        r'^Recipe: optimizer adam, learning_rate 0.002, learning_rate_decay_type fixed, ',
        r'^400 images of 5 classes: 50.0 steps per epoch$',
        r'^Steps 0 to 8, seed 1; watch it with: tensorboard --logdir=.*log$',
        r'^[\d,]{6,} trainable parameters$',
        r'^global step 8/8: loss = \d\.\d{4}, accuracy = \d\.\d{3} \(\d+\.\d{3} sec/step, '
        r'\d+\.\d images/sec, \d+\.\d per tower, epoch 0\.16, 00:00:00 left\)$',
        r'^Saved step 8 in .*log$'):
      self.assertRegex(output, re.compile(line, re.MULTILINE))
    self.assertEqual(sorted(losses(output)), list(range(1, 9)))
    self.assertEqual(self.check_checkpoint(self.trained_dir), 8)

  def test_tensorboard_has_it_all(self):
    steps, images, graphs = {}, set(), 0
    for event in events(self.trained_dir):
      graphs += event.HasField('graph_def')
      for value in event.summary.value:
        if value.HasField('image'):
          images.add(value.tag)
          with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
            self.assertEqual(image.size, (71, 71))
        else:
          steps.setdefault(value.tag, []).append(event.step)
    self.assertGreater(graphs, 0)
    self.assertEqual(images, {f'distorted_images/image/{i}' for i in range(4)})
    self.assertCountEqual(steps, [
        'losses/total_loss', 'losses/cross_entropy', 'losses/regularization', 'accuracy',
        'learning_rate', 'gradient_norm', 'images_per_second', 'run'])
    self.assertEqual(steps['images_per_second'], list(range(1, 9)))


  def test_resumed_training_is_uninterrupted_training(self):
    options = [*TRAIN, '--num_clones', '2', '--log_dir', self.log_dir, '--max_number_of_steps']
    returncode, output = run(*options, '5')
    self.assertEqual(returncode, 0, output)
    returncode, resumed = run(*options, '8')
    self.assertEqual(returncode, 0, resumed)
    self.assertIn('Steps 5 to 8', resumed)
    expected = losses(self.train_result[1])
    self.assertEqual(losses(output), {step: expected[step] for step in range(1, 6)})
    self.assertEqual(losses(resumed), {step: expected[step] for step in (6, 7, 8)})

    returncode, output = run(*options, '8')
    self.assertEqual(returncode, 0, output)
    self.assertIn('already trained to step 8', output)
    self.assertEndsWithMessage(run(*options, '9', '--image_size', '96'),
                               'image_size is 71 there and 96 here')
    self.assertEqual(self.check_checkpoint(self.log_dir), 8)

  def test_evaluate_and_freeze(self):
    log_eval = os.path.join(self.dir, 'log_eval')
    returncode, output = run('eval_flowers.py', '--dataset_dir', DATASET_DIR, '--log_dir',
                             self.trained_dir, '--log_eval', log_eval, '--batch_size', '30')
    self.assertEqual(returncode, 0, output)
    self.assertRegex(last_line(output), r'^Accuracy: \d\.\d{4} \(\d+ of 100\)$')
    with open(os.path.join(log_eval, 'metrics.json'), encoding='utf-8') as f:
      metrics = json.load(f)
    self.assertEqual(last_line(output), f'Accuracy: {metrics["accuracy"]:.4f} '
                     f'({metrics["num_correct"]} of 100)')
    self.assertEqual(metrics['global_step'], 8)
    self.check_eval_events(log_eval, metrics)

    pb = os.path.join(self.dir, 'frozen_model_xception.pb')
    returncode, output = run('write_pb.py', '--log_dir', self.trained_dir, '--output_file', pb)
    self.assertEqual(returncode, 0, output)
    self.assertRegex(last_line(output), r'^Wrote .*frozen_model_xception.pb \(\d+\.\d MB\)$')
    self.assertEqual(flowers.read_labels(self.dir), flowers.read_labels(DATASET_DIR))
    self.assertCountEqual(os.listdir(self.dir),
                          ['log_eval', 'frozen_model_xception.pb', 'labels.txt', 'model.json'])
    self.check_frozen_graph(pb, metrics)

  def check_eval_events(self, log_eval, metrics):
    values = {value.tag: value for event in events(log_eval) for value in event.summary.value
              if event.step == 8}
    self.assertCountEqual(values, ['accuracy', 'losses/cross_entropy', 'macro_f1', 'metrics',
                                   'confusion_matrix', 'mistakes', 'predictions', 'roc',
                                   'precision_recall', 'calibration', 'roc_auc',
                                   'average_precision', 'expected_calibration_error'])
    self.assertAllClose(values['accuracy'].simple_value, metrics['accuracy'])
    self.assertAllClose(values['losses/cross_entropy'].simple_value, metrics['loss'])
    self.assertEqual(values['metrics'].metadata.plugin_data.plugin_name, 'text')
    for tag in ('confusion_matrix', 'mistakes', 'predictions'):
      with open(os.path.join(log_eval, f'{tag}.png'), 'rb') as f:
        self.assertEqual(values[tag].image.encoded_image_string, f.read())

  def check_frozen_graph(self, pb, metrics):
    graph_def = tf.GraphDef()
    with open(pb, 'rb') as f:
      graph_def.ParseFromString(f.read())
    nodes = {node.name: node for node in graph_def.node}
    self.assertContainsSubset(['input', 'output', 'Xception/Predictions/Softmax'], nodes)
    self.assertEqual([d.size for d in nodes['input'].attr['shape'].shape.dim], [-1, 71, 71, 3])
    self.assertNotIn('ReadVariableOp', {node.op for node in graph_def.node})

    # Every validation image, through the frozen graph and as evaluated.
    with tf.Graph().as_default(), tf.Session() as session:
      images, labels = session.run(flowers.load_batch(
          flowers.get_split('validation', DATASET_DIR), 100, 71, 71, is_training=False))
    probabilities = models.load(pb).predict(images)
    self.assertAllClose(probabilities.sum(1), np.ones(100))
    self.assertEqual((probabilities.argmax(1) == labels).sum(), metrics['num_correct'])
    self.assertAllClose(-np.log(probabilities[range(100), labels]).mean(), metrics['loss'],
                        rtol=1e-5)
    self.assertAllClose(self.run_in_tensorflow_2(pb, images), probabilities, atol=1e-5)

  def run_in_tensorflow_2(self, pb, images):
    """Returns the frozen graph's output in a program that uses TensorFlow 2 only."""
    np.save(os.path.join(self.dir, 'images.npy'), images)
    program = textwrap.dedent('''
        import sys
        import numpy as np
        import tensorflow as tf

        pb, folder = sys.argv[1:]
        graph_def = tf.compat.v1.GraphDef.FromString(open(pb, 'rb').read())
        wrapped = tf.compat.v1.wrap_function(
            lambda: tf.compat.v1.import_graph_def(graph_def, name=''), [])
        predict = wrapped.prune('input:0', 'output:0')
        images = tf.constant(np.load(f'{folder}/images.npy'))
        np.save(f'{folder}/probabilities.npy', predict(images))
    ''')
    subprocess.run([sys.executable, '-c', program, pb, self.dir], check=True)
    return np.load(os.path.join(self.dir, 'probabilities.npy'))


class InterruptionTest(ScriptTestCase):

  def train_until(self, step, *options):
    """Trains until the log shows `step`; returns the running process and its output so far."""
    process = start(*TRAIN, '--log_dir', self.log_dir, *options)
    self.addCleanup(process.stdout.close)
    output = ''
    for line in process.stdout:
      output += line
      if line.startswith(f'global step {step}/'):
        return process, output
    process.wait()
    raise AssertionError(f'Training ended early:\n{output}')

  def check_rerun(self, start_step):
    """Checks that the same command continues from the last checkpoint."""
    returncode, output = run(*TRAIN, '--log_dir', self.log_dir, '--max_number_of_steps',
                             str(start_step + 1))
    self.assertEqual(returncode, 0, output)
    self.assertIn(f'Steps {start_step} to {start_step + 1}', output)
    self.assertEqual(sorted(losses(output)), [start_step + 1])
    self.assertEqual(self.check_checkpoint(self.log_dir), start_step + 1)

  def test_kill_9(self):
    process, _ = self.train_until(7, '--save_interval_steps', '3')
    process.kill()
    process.wait()
    step = self.check_checkpoint(self.log_dir)
    self.assertGreaterEqual(step, 4)  # step 4 has been saved by then
    self.check_rerun(step)

  def test_sigterm_saves(self):
    process, _ = self.train_until(3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    self.assertEqual(process.returncode, 0, output)
    step = self.check_checkpoint(self.log_dir)
    self.assertGreaterEqual(step, 3)
    self.assertIn(f'Saved step {step} in', output)
    self.assertEqual(last_line(output), 'Stopped by SIGTERM: resume with the same command')

  def test_sigterm_before_the_first_step_leaves_no_generated_code(self):
    folder = os.path.join(self.dir, 'tmp')
    os.mkdir(folder)
    with mock.patch.dict(os.environ, TMPDIR=folder):
      process = start(*TRAIN, '--log_dir', self.log_dir)
    output = ''
    for line in process.stdout:
      output += line
      if line.endswith(' trainable parameters\n'):
        break
    process.send_signal(signal.SIGTERM)  # the graph is built, but the hooks are not there yet
    rest, _ = process.communicate(timeout=120)
    self.assertIn(process.returncode, (0, -signal.SIGTERM), output + rest)
    # AutoGraph writes code there that only a process which ends by itself deletes.
    self.assertEqual([name for name in os.listdir(folder) if 'autograph' in name], [])

  @slow
  def test_two_ctrl_c(self):
    process, _ = self.train_until(5, '--save_interval_steps', '2')
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    self.check_rerun(self.check_checkpoint(self.log_dir))

  @slow
  def test_training_that_is_killed_again_and_again_is_uninterrupted_training(self):
    options = ['--dropout_keep_prob', '0.5', '--moving_average_decay', '0.99', '--num_clones', '2',
               '--save_interval_steps', '2', '--max_number_of_steps', '12']
    whole_dir = os.path.join(self.dir, 'whole')
    returncode, output = run(*TRAIN, *options, '--log_dir', whole_dir)
    self.assertEqual(returncode, 0, output)
    expected = losses(output)

    # At random points within a step.
    kills = sorted(random.sample(range(2, 12), 3))
    delays = [random.uniform(0.0, 0.1) for _ in kills]
    message = f'killed after steps {kills} and {delays} seconds'
    for step, delay in zip(kills, delays):
      process, output = self.train_until(step, *options)
      time.sleep(delay)
      process.kill()
      process.wait()
      for logged, loss in losses(output).items():
        self.assertEqual(loss, expected[logged], message)
    returncode, output = run(*TRAIN, *options, '--log_dir', self.log_dir)
    self.assertEqual(returncode, 0, output)

    whole, pieces = (tf.train.load_checkpoint(checkpoints.find(folder))
                     for folder in (whole_dir, self.log_dir))
    names = whole.get_variable_to_shape_map()
    self.assertEqual(names.keys(), pieces.get_variable_to_shape_map().keys())
    for suffix in ('/Adam', '/Adam_1', '/ExponentialMovingAverage', 'moving_mean'):
      self.assertTrue(any(name.endswith(suffix) for name in names), suffix)
    for name in names:
      self.assertEqual(whole.get_tensor(name).tobytes(), pieces.get_tensor(name).tobytes(),
                       f'{name}, {message}')

  def test_a_checkpoint_that_cannot_be_saved_leaves_the_one_before(self):
    # Fails like a full disk.
    os.makedirs(os.path.join(self.log_dir, 'model.ckpt-4.index'))
    self.assertEndsWithMessage(
        run(*TRAIN, '--log_dir', self.log_dir, '--save_interval_steps', '2'),
        'Cannot save in .*log: .* The previous checkpoint is intact: make room, then resume')
    step = self.check_checkpoint(self.log_dir)
    self.assertBetween(step, 1, 3)
    os.rmdir(os.path.join(self.log_dir, 'model.ckpt-4.index'))
    self.check_rerun(step)

  def test_a_second_process_in_the_same_folder(self):
    process, _ = self.train_until(2)
    self.assertEndsWithMessage(run(*TRAIN, '--log_dir', self.log_dir),
                               f'Process {process.pid} is training in .*log: wait for it')
    process.kill()
    process.wait()

  def test_a_loss_that_is_not_finite(self):
    result = run(*TRAIN, '--log_dir', self.log_dir, '--learning_rate', '1e30',
                 '--optimizer', 'sgd', '--save_interval_steps', '1')
    self.assertEndsWithMessage(result, r'train_flowers.py: The loss or a gradient is not finite '
                               r'at step \d+\. .* the last checkpoint in .*log is good')
    self.check_checkpoint(self.log_dir)


class RecipeTest(ScriptTestCase):

  def test_evaluation_inside_training(self):
    returncode, output = run(
        *TRAIN, '--log_dir', self.log_dir, '--max_number_of_steps', '30', '--learning_rate', '1',
        '--optimizer', 'sgd', '--moving_average_decay', '0.5', '--eval_every_epochs', '0.1',
        '--early_stop_patience', '1')
    self.assertEqual(returncode, 0, output)
    evaluations = [(int(step), float(accuracy)) for step, accuracy in re.findall(
        r'^validation at step (\d+): accuracy = ([\d.]+), loss = [\d.]+ \(averages\); best: ',
        output, re.MULTILINE)]
    self.assertEqual([step for step, _ in evaluations],
                     list(range(5, 5 * len(evaluations) + 1, 5)))
    best_dir = os.path.join(self.log_dir, 'best')
    with open(os.path.join(best_dir, 'metrics.json'), encoding='utf-8') as f:
      best = json.load(f)
    self.assertEqual(best['accuracy'], max(accuracy for _, accuracy in evaluations))
    self.assertEqual(self.check_checkpoint(best_dir), best['global_step'])
    if evaluations[-1][0] < 30:
      self.assertIn(f'Stopped early: no better accuracy than {best["accuracy"]:.4f} of step '
                    f'{best["global_step"]} in 1 evaluations', output)

    values = {(value.tag, event.step): value.simple_value
              for event in events(os.path.join(self.log_dir, 'eval'))
              for value in event.summary.value}
    for step, accuracy in evaluations:
      self.assertAllClose(values['accuracy', step], accuracy, atol=1e-4)

    # eval_flowers.py finds the same accuracy for the checkpoint that was kept.
    returncode, output = run('eval_flowers.py', '--dataset_dir', DATASET_DIR, '--checkpoint_path',
                             best_dir, '--log_eval', os.path.join(self.dir, 'log_eval'))
    self.assertEqual(returncode, 0, output)
    self.assertEqual(last_line(output), f'Accuracy: {best["accuracy"]:.4f} '
                     f'({best["num_correct"]} of 100)')

  def test_fine_tuning_a_head(self):
    returncode, output = run(*TRAIN, '--log_dir', self.log_dir, '--max_number_of_steps', '2')
    self.assertEqual(returncode, 0, output)
    tuned_dir = os.path.join(self.dir, 'tuned')
    options = [*TRAIN, '--log_dir', tuned_dir, '--checkpoint_path', self.log_dir,
               '--checkpoint_exclude_scopes', 'Xception/Logits',
               '--trainable_scopes', 'Xception/Logits', '--max_number_of_steps']
    returncode, output = run(*options, '2')
    self.assertEqual(returncode, 0, output)
    self.assertIn(f'Starting from 234 of 236 variables of {self.log_dir}/model.ckpt-2', output)
    self.assertRegex(output, r'(?m)^1,285 trainable parameters$')  # 256 x 5 + 5
    old, new = (tf.train.load_checkpoint(checkpoints.find(folder))
                for folder in (self.log_dir, tuned_dir))
    for name in new.get_variable_to_shape_map():
      if name.startswith('Xception/') and not name.startswith('Xception/Logits'):
        self.assertAllEqual(old.get_tensor(name), new.get_tensor(name), name)

    returncode, output = run(*options, '3')
    self.assertEqual(returncode, 0, output)
    self.assertIn(f'--checkpoint_path {self.log_dir} is NOT used: training resumes from step 2 '
                  f'in {tuned_dir}', output)
    self.assertEndsWithMessage(run(*TRAIN, '--log_dir', tuned_dir, '--optimizer', 'sgd'),
                               'model.ckpt-3 lacks 156 variables that this run needs, '
                               'first Xception')

  @slow
  def test_bfloat16_traces_and_histograms(self):
    returncode, output = run(
        *TRAIN, '--log_dir', self.log_dir, '--max_number_of_steps', '4', '--precision', 'bfloat16',
        '--accumulate_steps', '2', '--class_weights', 'balanced', '--profile_steps', '3',
        '--histograms_every_n_steps', '2')
    if 'needs a CPU with AVX-512' in output:
      self.skipTest('This CPU has no bfloat16')
    self.assertEqual(returncode, 0, output)
    self.assertIn('8 per tower in 2 parts; bfloat16', output)
    with open(os.path.join(self.log_dir, 'timeline-3.json'), encoding='utf-8') as f:
      trace = json.load(f)['traceEvents']
    bfloat16_ops = [event for event in trace if 'bfloat16' in str(event.get('args', {})).lower()
                    or 'AutoMixedPrecision' in str(event.get('args', {}))]
    self.assertNotEmpty(bfloat16_ops)
    tags = {value.tag for event in events(self.log_dir) for value in event.summary.value}
    for kind in ('weights', 'gradients'):
      self.assertIn(f'{kind}/Xception/block14_dws_conv2/pointwise_weights', tags)
    reader = tf.train.load_checkpoint(checkpoints.find(self.log_dir))
    self.assertEqual(set(reader.get_variable_to_dtype_map().values()), {tf.float32, tf.int64})


class BadRecordTest(ScriptTestCase):

  def setUp(self):
    super().setUp()
    # 40 of the shipped flowers in each split, the fourth of them damaged.
    self.dataset_dir = os.path.join(self.dir, 'dataset')
    os.mkdir(self.dataset_dir)
    shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), self.dataset_dir)
    for split in ('train', 'validation'):
      records = flowers.get_split(split, DATASET_DIR).records
      path = os.path.join(self.dataset_dir, flowers.shard_name(split, 0, 1))
      with tf.python_io.TFRecordWriter(path) as writer:
        for i in range(40):
          writer.write(records[i])
      with open(path, 'r+b') as f:
        f.seek(sum(len(records[i]) + 16 for i in range(3)) + 100)
        f.write(b'damage')

  def test_training_skips_a_bad_record(self):
    options = [*TRAIN, '--log_dir', self.log_dir, '--dataset_dir', self.dataset_dir,
               '--max_number_of_steps', '8']
    returncode, output = run(*options, '--max_bad_fraction', '0.05')
    self.assertEqual(returncode, 0, output)
    message = 'flowers_train_00000-of-00001.tfrecord, record 3: its checksum is wrong'
    self.assertEqual(output.count(message), 1)  # though it was skipped in two epochs
    self.assertIn('Bad records skipped: 1', output)
    # 8 steps of 8 images, and one or two that were skipped.
    self.assertBetween(checkpoints.next_image(checkpoints.find(self.log_dir)), 65, 66)
    self.assertIn('bad_records', {value.tag for event in events(self.log_dir)
                                  for value in event.summary.value})

    result = run('eval_flowers.py', '--dataset_dir', self.dataset_dir, '--log_dir', self.log_dir)
    self.assertIn('flowers_validation_00000-of-00001.tfrecord, record 3: its checksum', result[1])
    self.assertRegex(last_line(result[1]), r'\(\d+ of 39\)$')

  def test_too_many_bad_records_stop_training(self):
    self.assertEndsWithMessage(
        run(*TRAIN, '--log_dir', self.log_dir, '--dataset_dir', self.dataset_dir),
        '1 of 40 records are bad, more than the 0.4 that --max_bad_fraction allows')
    self.assertLess(self.check_checkpoint(self.log_dir), 6)

  def test_labels_of_another_dataset(self):
    with open(os.path.join(self.dataset_dir, 'labels.txt'), 'w') as f:
      f.write('0:daisy\n1:roses\n')
    path = os.path.join(self.dataset_dir, flowers.shard_name('train', 0, 1))
    with tf.python_io.TFRecordWriter(path) as writer:
      for _ in range(3):
        writer.write(flowers.make_example(b'', 'jpg', 4, 1, 1).SerializeToString())
    self.assertEndsWithMessage(
        run(*TRAIN, '--log_dir', self.log_dir, '--dataset_dir', self.dataset_dir,
            '--batch_size', '2'), 'None of 3 records can be used: .*, record 0: .')


class MistakeTest(ScriptTestCase):

  def test_no_checkpoint(self):
    message = r'No checkpoint in \./log: run train_flowers.py first$'
    self.assertEndsWithMessage(run('eval_flowers.py', '--dataset_dir', DATASET_DIR,
                                   cwd=self.dir), message)
    self.assertEndsWithMessage(run('write_pb.py', cwd=self.dir), message)
    self.assertEmpty(os.listdir(self.dir))

  def test_no_dataset(self):
    self.assertEndsWithMessage(run('train_flowers.py', cwd=self.dir),
                               'Cannot read dataset/labels.txt .*: a dataset needs this file')
    self.assertEmpty(os.listdir(self.dir))

  def test_batch_that_does_not_divide(self):
    self.assertEndsWithMessage(
        run(*TRAIN, '--log_dir', self.log_dir, '--num_clones', '3'),
        '--batch_size 8 is the sum over all towers: it must be divisible by '
        'workers x towers x --accumulate_steps, 1 x 3 x 1')

  def test_more_gpus_than_there_are(self):
    self.assertEndsWithMessage(
        run('train_flowers.py', '--dataset_dir', DATASET_DIR, '--num_clones', '99',
            '--batch_size', '99', cwd=self.dir),
        r'--num_clones 99 needs 99 GPUs, but TensorFlow finds \d+ \(.*\)')

  def test_what_a_cpu_cannot_do(self):
    for options, message in [
        (['--precision', 'float16'], '--precision float16 needs a GPU: '),
        (['--xla'], '--xla needs a GPU: on a CPU it makes training six times slower')]:
      self.assertEndsWithMessage(run(*TRAIN, '--log_dir', self.log_dir, *options), message)
    self.assertEmpty(os.listdir(self.dir))
