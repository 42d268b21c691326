"""Tests of eval_flowers.py: its files, its options, --graph and --watch."""

import contextlib
import csv
import dataclasses
import glob
import io
import json
import os
import re
import shutil
import tempfile
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from deployment import towers
import eval_flowers
from evaluation import curves
from evaluation import evaluator
from evaluation import grad_cam
from evaluation import metrics
from evaluation import report
from evaluation import temperature
from export import models
import pipeline_test
from records import flowers
import scripts
from scripts import DATASET_DIR
from scripts import slow
import small_model
import write_pb

FILES = ['metrics.json', 'predictions.csv', 'confusion_matrix.png', 'mistakes.png',
         'predictions.png', 'roc.png', 'precision_recall.png', 'calibration.png']


def evaluate(*args):
  """Runs eval_flowers.py in this process, on the CPU; returns its output."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    eval_flowers.main(eval_flowers.parse_args(
        ['--dataset_dir', DATASET_DIR, '--eval_on_cpu', *args]))
  return output.getvalue()


class EvalTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.log_dir = os.path.join(self.dir, 'log')
    os.mkdir(self.log_dir)

  def without_pictures(self):
    """Saves the time of drawing."""
    patch = mock.patch.object(report, '_draw_pictures', return_value={})
    patch.start()
    self.addCleanup(patch.stop)

  def read_metrics(self, folder=None):
    with open(os.path.join(folder or os.path.join(self.log_dir, 'eval'), 'metrics.json'),
              encoding='utf-8') as f:
      return json.load(f)

  def read_predictions(self):
    path = os.path.join(self.log_dir, 'eval', 'predictions.csv')
    with open(path, encoding='utf-8', newline='') as f:
      header, *rows = csv.reader(f)
    return header, np.array(rows, np.float64)

  def events(self):
    """Returns {(tag, step)} of the evaluation's events."""
    return {(value.tag, event.step)
            for path in tf.gfile.Glob(os.path.join(self.log_dir, 'eval', 'events.*'))
            for event in tf.train.summary_iterator(path) for value in event.summary.value}


class OnceTest(EvalTestCase):

  def test_files_agree_with_each_other(self):
    checkpoint = small_model.write_checkpoint(self.log_dir, 3, is_fitted=False)
    output = evaluate('--log_dir', self.log_dir)
    header, rows = self.read_predictions()
    self.assertEqual(header, ['record', 'label', 'prediction', '0:daisy', '1:dandelion', '2:roses',
                              '3:sunflowers', '4:tulips'])
    labels, predictions, probabilities = rows[:, 1], rows[:, 2], rows[:, 3:]
    self.assertAllEqual(rows[:, 0], np.arange(100))
    self.assertAllEqual(predictions, probabilities.argmax(1))

    found = self.read_metrics()
    # The loss is computed from logits, and probabilities in float32 are exact to 1e-7 only.
    self.assertAllClose(
        found['loss'], -np.log(probabilities[range(100), labels.astype(int)]).mean(), atol=1e-5)
    expected = metrics.to_dict(metrics.compute(labels.astype(int), probabilities, np.zeros(100)),
                               small_model.CLASS_NAMES)
    for key in ('accuracy', 'confusion_matrix', 'macro_average', 'weighted_average'):
      self.assertEqual(found[key], expected[key])
    separation = curves.to_dict(curves.compute(labels.astype(int), probabilities))
    for entry, areas in zip(expected['classes'], separation.pop('areas')):
      entry.update(areas)
    self.assertEqual(found['classes'], expected['classes'])
    self.assertAllClose(found['roc_auc'], separation['roc_auc'])
    self.assertAllClose(found['expected_calibration_error'],
                        separation['expected_calibration_error'])
    self.assertContainsSubset(
        {('roc_auc', 3), ('average_precision', 3), ('calibration', 3)}, self.events())
    self.assertIsNone(found['top_5_accuracy'])
    self.assertEqual((found['checkpoint'], found['global_step'], found['num_images'],
                      found['num_bad_records'], found['uses_averages']),
                     (checkpoint, 3, 100, 0, False))
    self.check_output(output, found, checkpoint)

  def check_output(self, output, found, checkpoint):
    lines = output.splitlines()
    low, high = found['accuracy_interval']
    self.assertEqual(lines[0], f'Evaluating {checkpoint}, the newest of {self.log_dir}, on 100 '
                     'images of the validation split, on /cpu:0')
    self.assertEqual(lines[1].split(), ['precision', 'recall', 'f1', 'support'])
    self.assertEqual(lines[-6:], [
        f'Wrote {", ".join(FILES)} and events to {self.log_dir}/eval',
        'Weights: as trained, not averaged',
        f'Loss: {found["loss"]:.4f}',
        'Top-5 accuracy: omitted, it is always 1 with 5 classes',
        f'95 % confidence interval of the accuracy: {low:.4f} to {high:.4f}',
        f'Accuracy: {found["accuracy"]:.4f} ({found["num_correct"]} of 100)'])
    self.assertContainsSubset(FILES, os.listdir(os.path.join(self.log_dir, 'eval')))

  def test_records_of_other_tools(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir)
    shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), self.dir)
    original = flowers.get_split('validation', DATASET_DIR)
    path = os.path.join(self.dir, 'test-00000-of-00001')
    with tf.python_io.TFRecordWriter(path) as writer:
      for number in range(10):
        example = tf.train.Example.FromString(original.records[number])
        example.features.feature['image/class/label'].int64_list.value[0] += 1
        writer.write(example.SerializeToString())
    evaluate('--log_dir', self.log_dir, '--dataset_dir', self.dir, '--file_pattern', '%s-*',
             '--labels_offset', '1', '--dataset_split_name', 'test')
    found = self.read_metrics()
    self.assertEqual((found['accuracy'], found['num_images']), (1.0, 10))
    self.assertEqual((found['dataset_split_name'], found['labels_offset'], found['dataset_dir']),
                     ('test', 1, self.dir))

  def test_checkpoint_of_version_1(self):
    self.without_pictures()
    reader = tf.train.load_checkpoint(small_model.write_checkpoint(self.log_dir))
    with tf.Graph().as_default(), tf.Session() as session:
      variables = [tf.Variable(reader.get_tensor(name), name=name)
                   for name in reader.get_variable_to_shape_map()]
      session.run(tf.global_variables_initializer())
      path = tf.train.Saver(variables, write_version=tf.train.SaverDef.V1).save(
          session, os.path.join(self.log_dir, 'old.ckpt'), write_meta_graph=False)
    self.assertTrue(os.path.isfile(path))
    evaluate('--log_dir', self.log_dir, '--checkpoint_path', path)
    expected = self.read_metrics()
    self.assertEqual(expected['accuracy'], 1.0)
    pb = os.path.join(self.dir, 'model.pb')
    with contextlib.redirect_stdout(io.StringIO()):
      write_pb.main(write_pb.parse_args(['--log_dir', self.log_dir, '--checkpoint_path', path,
                                         '--output_file', pb, '--noverify']))
    with open(os.path.join(self.dir, 'model.json'), encoding='utf-8') as f:
      self.assertEqual(json.load(f)['metrics'], expected)

  def test_which_weights(self):
    self.without_pictures()
    newest_but_one = small_model.write_checkpoint(self.log_dir, 1, is_fitted=False)
    newest = small_model.write_checkpoint(self.log_dir, 2, with_averages=True, is_fitted=False)
    best_dir = os.path.join(self.log_dir, 'best')
    os.mkdir(best_dir)
    best = small_model.write_checkpoint(best_dir, 7, is_fitted=False)
    for args, checkpoint, said, uses_averages in [
        ([], newest, f'the newest of {self.log_dir}', True),
        (['--checkpoint_path', newest_but_one], newest_but_one, 'as named', False),
        (['--checkpoint_path', best_dir], best, f'the newest of {best_dir}', False)]:
      output = evaluate('--log_dir', self.log_dir, *args)
      self.assertIn(f'Evaluating {checkpoint}, {said}, ', output)
      self.assertIn('Weights: Polyak averages' if uses_averages else 'Weights: as trained', output)
      self.assertEqual(self.read_metrics()['checkpoint'], checkpoint)
      self.assertEqual(self.read_metrics()['uses_averages'], uses_averages)
    self.assertEqual({step for _, step in self.events()}, {1, 2, 7})

  def test_clones_change_nothing(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir, 1, is_fitted=False)
    self.assertIn('on /cpu:0\n', evaluate('--log_dir', self.log_dir, '--batch_size', '30'))
    expected, (_, expected_rows) = self.read_metrics(), self.read_predictions()
    output = evaluate('--log_dir', self.log_dir, '--batch_size', '30', '--num_clones', '3')
    self.assertIn('on /cpu:0, /cpu:1, /cpu:2\n', output)
    self.assertEqual(self.read_metrics(), expected)
    self.assertAllEqual(self.read_predictions()[1], expected_rows)

  def test_wrong_options(self):
    small_model.write_checkpoint(self.log_dir, 1, is_fitted=False)
    for error, message, args in [
        (checkpoints.CheckpointError, 'has no averages of the weights', ['--use_averages', 'yes']),
        (grad_cam.LayerError, "'Logits' is not a layer .* choose one of block1_conv1, ",
         ['--explain', '--explain_layer', 'Logits']),
        (checkpoints.CheckpointError, 'No checkpoint in nowhere',
         ['--checkpoint_path', 'nowhere'])]:
      with self.assertRaisesRegex(error, message):
        evaluate('--log_dir', self.log_dir, *args)
    with self.assertRaisesRegex(towers.DeviceError, '--num_clones 99 needs 99 GPUs'):
      eval_flowers.main(eval_flowers.parse_args(
          ['--dataset_dir', DATASET_DIR, '--log_dir', self.log_dir, '--num_clones', '99']))
    with self.assertRaises(SystemExit):
      evaluate('--watch', '--checkpoint_path', 'log')


  def test_output_without_unicode(self):
    dataset_dir = os.path.join(self.dir, 'dataset')
    os.mkdir(dataset_dir)
    names = ['向日葵', *small_model.CLASS_NAMES[1:]]
    with open(os.path.join(dataset_dir, 'labels.txt'), 'w', encoding='utf-8') as f:
      f.writelines(f'{label}:{name}\n' for label, name in enumerate(names))
    for path in glob.glob(os.path.join(DATASET_DIR, 'flowers_validation_*')):
      os.symlink(path, os.path.join(dataset_dir, os.path.basename(path)))
    checkpoint = small_model.write_checkpoint(self.log_dir)
    checkpoints.save_config(
        dataclasses.replace(small_model.CONFIG, class_names=names), self.log_dir)
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'CUDA_VISIBLE_DEVICES': '-1'}
    process = scripts.start('eval_flowers.py', '--dataset_dir', dataset_dir, '--checkpoint_path',
                            checkpoint, '--log_dir', self.log_dir, env=environment)
    output, _ = process.communicate(timeout=300)
    self.assertEqual(process.returncode, 0, output)
    self.assertIn('\n\\u5411\\u65e5\\u8475 ', output)

  def test_files_that_are_not_checkpoints(self):
    checkpoints.save_config(small_model.CONFIG, self.log_dir)
    for name, content in [('weights.h5', b'\x89HDF\r\n\x1a\n' + bytes(99)), ('notes.txt', b'text')]:
      path = os.path.join(self.log_dir, name)
      with open(path, 'wb') as f:
        f.write(content)
      with self.assertRaisesRegex(checkpoints.CheckpointError, path):
        evaluate('--log_dir', self.log_dir, '--checkpoint_path', path)
    with self.assertRaisesRegex(checkpoints.CheckpointError, f'No checkpoint in {self.log_dir}'):
      evaluate('--log_dir', self.log_dir)

  def test_results_that_cannot_be_written(self):
    checkpoint = small_model.write_checkpoint(self.log_dir, 1, is_fitted=False)
    file = f'{checkpoint}.index'
    link = os.path.join(self.dir, 'link')
    os.symlink('nowhere', link)
    for folder, message in [(file, f'{file} is not a folder'),
                            (f'{file}/eval', f'{file} is not a folder'),
                            (link, f'{link} is not a folder')]:
      with self.assertRaisesRegex(OSError, f'Cannot write results into {folder}: {message}'):
        evaluate('--log_dir', self.log_dir, '--log_eval', folder)
    with self.assertRaisesRegex(OSError, 'cannot write events into .*, which is not UTF-8'):
      evaluate('--log_dir', self.log_dir, '--log_eval', os.path.join(self.dir, '\udcff'))
    with open(os.path.join(self.log_dir, 'metrics.json'), 'w', encoding='utf-8') as f:
      json.dump({'accuracy': 0.5}, f)
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'is that of training, which looks'):
      evaluate('--log_dir', self.log_dir, '--log_eval', self.log_dir)
    with mock.patch.object(os, 'access', return_value=False):  # root may write anywhere
      with self.assertRaisesRegex(PermissionError, f'new/eval: {self.dir} is read-only'):
        evaluate('--log_dir', self.log_dir, '--log_eval', os.path.join(self.dir, 'new', 'eval'))


  def test_a_network_that_outputs_nan(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir)
    call = evaluator.Evaluator.__call__

    def call_and_spoil(*args):
      result = call(*args)
      result.probabilities[3] = np.nan
      result.losses[3] = np.nan
      return result

    with mock.patch.object(evaluator.Evaluator, '__call__', call_and_spoil), \
         contextlib.redirect_stderr(io.StringIO()) as stderr:
      evaluate('--log_dir', self.log_dir)
    self.assertIn('Warning: the network outputs NaN for 1 of 100 images', stderr.getvalue())
    self.assertIsNone(self.read_metrics()['loss'])


class TemperatureTest(EvalTestCase):

  def setUp(self):
    super().setUp()
    self.checkpoint = small_model.write_checkpoint(self.log_dir)
    self.file = os.path.join(self.log_dir, 'temperature.json')

  def evaluate(self, *args):
    """Evaluates at a size that the network makes mistakes at."""
    return evaluate('--log_dir', self.log_dir, '--image_size', '80', *args)

  def read_temperature(self):
    with open(self.file, encoding='utf-8') as f:
      return json.load(f)

  def test_fit_then_judge_on_another_split(self):
    output = self.evaluate('--fit_temperature')
    stored, found = self.read_temperature(), self.read_metrics()
    value, calibrated = stored['temperature'], found['calibrated']
    self.assertGreater(value, 2)  # the network is sure of its mistakes
    self.assertEqual((calibrated['temperature'], calibrated['fitted_on']), (value, 'validation'))
    self.check_probabilities(found)
    before, after = stored['before'], stored['after']
    self.assertEqual(before, {key: found[key] for key in before})
    self.assertEqual(after, {key: calibrated[key] for key in after})
    self.assertLess(after['loss'], 0.5 * before['loss'])
    self.assertLess(after['expected_calibration_error'], 0.5 * before['expected_calibration_error'])
    self.assertEqual(
        [stored[key] for key in ('checkpoint', 'checkpoint_sha256', 'global_step', 'uses_averages',
                                 'image_size', 'dataset_split_name', 'dataset_dir', 'num_images')],
        [self.checkpoint, found['checkpoint_sha256'], 7, False, 80, 'validation', DATASET_DIR, 100])
    self.assertContainsSubset({('calibrated/temperature', 7), ('calibrated/cross_entropy', 7),
                               ('calibrated/expected_calibration_error', 7)}, self.events())
    self.assertIn(f'\nTemperature: {value:.4f}, fitted on the validation split, in {self.file}\n'
                  f'At this temperature: loss {after["loss"]:.4f}, expected calibration error '
                  f'{after["expected_calibration_error"]:.4f} instead of '
                  f'{before["expected_calibration_error"]:.4f}\n', output)

    self.without_pictures()
    test_dir = self.write_test_split()
    output = self.evaluate('--dataset_dir', test_dir, '--dataset_split_name', 'test')
    self.assertIn(f'\nTemperature: {value:.4f}, fitted on the validation split, ', output)
    self.assertEqual(self.read_temperature(), stored)
    found = self.read_metrics()
    self.assertEqual((found['num_images'], found['calibrated']['temperature']), (30, value))
    self.assertNotEqual(found['calibrated']['loss'], calibrated['loss'])
    self.check_probabilities(found)

  def check_probabilities(self, found):
    """Compares the metrics with predictions.csv, whose probabilities are the network's own."""
    rows = self.read_predictions()[1]
    labels, powers = rows[:, 1].astype(int), rows[:, 3:]**(1 / found['calibrated']['temperature'])
    probabilities = powers / powers.sum(1, keepdims=True)
    self.assertAllClose(found['calibrated']['loss'],
                        -np.log(probabilities[range(len(labels)), labels]).mean(), atol=1e-5)
    self.assertEqual(sum(row['num_images'] * (row['accuracy'] or 0)
                         for row in found['calibrated']['calibration']), found['num_correct'])

  def write_test_split(self):
    """Makes a test split of 30 of the validation images; returns its folder."""
    shutil.copy(os.path.join(DATASET_DIR, 'labels.txt'), self.dir)
    original = flowers.get_split('validation', DATASET_DIR)
    path = os.path.join(self.dir, flowers.shard_name('test', 0, 1))
    with tf.python_io.TFRecordWriter(path) as writer:
      for number in range(30):
        writer.write(original.records[number])
    return self.dir

  def test_temperature_of_other_weights_is_not_used(self):
    self.without_pictures()
    self.evaluate('--fit_temperature')
    self.evaluate('--image_size', '81')
    self.assertIsNone(self.read_metrics()['calibrated'])
    small_model.write_checkpoint(self.log_dir, is_fitted=False)  # under the same name
    self.assertNotIn('emperature', self.evaluate())
    self.assertIsNone(self.read_metrics()['calibrated'])

  def test_without_a_best_temperature(self):
    self.without_pictures()
    with open(self.file, 'w') as f:
      f.write('kept')
    with self.assertRaisesRegex(temperature.TemperatureError, '100 of 100 predictions are right'):
      evaluate('--log_dir', self.log_dir, '--fit_temperature')
    with self.assertRaisesRegex(PermissionError, f'into {self.log_dir}: .* is read-only'), \
         mock.patch.object(os, 'access', side_effect=lambda path, _: path != self.log_dir):
      self.evaluate('--fit_temperature', '--log_eval', os.path.join(self.dir, 'eval'))
    with open(self.file) as f:
      self.assertEqual(f.read(), 'kept')
    self.assertEqual(glob.glob(os.path.join(self.dir, '**', 'metrics.json'), recursive=True), [])

  def test_what_it_cannot_be_combined_with(self):
    for options, message in [(['--graph', 'model.pb'], 'a frozen model has only probabilities'),
                             (['--watch'], 'leave out --watch')]:
      with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
        eval_flowers.parse_args(['--fit_temperature', *options])
      self.assertIn(message, errors.getvalue())


class GraphTest(EvalTestCase):

  def test_frozen_models_score_as_the_checkpoint_does(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir)
    evaluate('--log_dir', self.log_dir)
    expected = self.read_metrics()
    self.assertGreater(expected['accuracy'], 0.5)
    pb = os.path.join(self.dir, 'model.pb')
    with contextlib.redirect_stdout(io.StringIO()):
      write_pb.main(write_pb.parse_args([
          '--log_dir', self.log_dir, '--output_file', pb, '--noverify', '--formats',
          'pb,saved_model,tflite,tflite_float16,jpeg_pb']))
    with open(os.path.join(self.dir, 'model.json'), encoding='utf-8') as f:
      self.assertEqual(json.load(f)['metrics'], expected)
    self.assertEqual(expected['image_size'], 71)
    for name in ('model.pb', 'model_saved_model/', 'model.tflite', 'model_float16.tflite'):
      path = os.path.join(self.dir, name)
      output = self.evaluate_graph(path)
      self.assertIn(f'Evaluating {path} on 100 images of the validation split\n', output)
      self.assertIn('\nWeights: as trained, not averaged\n', output)
      found = self.read_metrics(path.rstrip('/') + '.eval')
      self.assertAllClose(found['loss'], expected['loss'], atol=1e-2 if 'float16' in name else 1e-5)
      self.assertEqual(found['confusion_matrix'], expected['confusion_matrix'])
      self.assertEqual((found['graph'], found['global_step']), (path, small_model.GLOBAL_STEP))

    with self.assertRaisesRegex(models.ModelError, 'model_jpeg.pb decodes its images itself'):
      self.evaluate_graph(os.path.join(self.dir, 'model_jpeg.pb'))
    with open(os.path.join(self.dir, 'labels.txt'), 'w') as f:
      f.write('0:daisy\n1:b\n2:c\n3:d\n4:e\n')
    with self.assertRaisesRegex(
        checkpoints.CheckpointError, 'model.pb was trained on 5 classes and .* has 5; the first '
        'difference is 1:b there and 1:dandelion here'):
      self.evaluate_graph(pb)

  def test_another_image_size(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir)
    evaluate('--log_dir', self.log_dir, '--eval_image_size', '80')
    expected = self.read_metrics()
    self.assertEqual(expected['image_size'], 80)
    pb = os.path.join(self.dir, 'model.pb')
    with contextlib.redirect_stdout(io.StringIO()) as output:
      write_pb.main(write_pb.parse_args(['--log_dir', self.log_dir, '--output_file', pb,
                                         '--noverify', '--image_size', '80']))
    self.assertIn('float32 [None, 80, 80, 3]', output.getvalue())
    with open(os.path.join(self.dir, 'model.json'), encoding='utf-8') as f:
      self.assertEqual(json.load(f)['metrics'], expected)
    self.evaluate_graph(pb)
    found = self.read_metrics(pb + '.eval')
    self.assertEqual((found['image_size'], found['confusion_matrix']),
                     (80, expected['confusion_matrix']))

  def evaluate_graph(self, path):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      eval_flowers.main(eval_flowers.parse_args(['--dataset_dir', DATASET_DIR, '--graph', path]))
    return output.getvalue()

  def test_without_model_json(self):
    self.without_pictures()
    small_model.write_checkpoint(self.log_dir)
    pb = os.path.join(self.dir, 'model.pb')
    with contextlib.redirect_stdout(io.StringIO()):
      write_pb.main(write_pb.parse_args(['--log_dir', self.log_dir, '--output_file', pb,
                                         '--noverify']))
    os.remove(os.path.join(self.dir, 'model.json'))
    self.assertIn('\nWeights: as frozen\n', self.evaluate_graph(pb))

  def test_results_are_never_inside_a_saved_model(self):
    for graph, expected in [('x/saved_model.pb', 'x.eval'), ('x/', 'x.eval'),
                            ('saved_model.pb', f'{os.getcwd()}.eval'),
                            ('.', f'{os.getcwd()}.eval')]:
      args = eval_flowers.parse_args(['--graph', graph])
      self.assertEqual(eval_flowers.default_log_eval(args), expected)

  def test_options_that_exclude_each_other(self):
    for option in (['--use_averages', 'no'], ['--num_clones', '2'], ['--eval_on_cpu'], ['--watch'],
                   ['--checkpoint_path', 'log'], ['--image_size', '128'], ['--explain']):
      with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        eval_flowers.parse_args(['--graph', 'model.pb', *option])

  def test_a_layer_without_explain(self):
    error = io.StringIO()
    with self.assertRaises(SystemExit), contextlib.redirect_stderr(error):
      eval_flowers.parse_args(['--explain_layer', 'block4_dws_conv1'])
    self.assertIn('--explain_layer needs --explain', error.getvalue())


class WatchTest(EvalTestCase):

  def setUp(self):
    super().setUp()
    self.without_pictures()

  def save_all(self, *steps):
    """Writes checkpoints that the file `checkpoint` lists; returns their paths."""
    paths = [small_model.write_checkpoint(self.log_dir, step, is_fitted=False) for step in steps]
    tf.train.update_checkpoint_state(self.log_dir, paths[-1], paths)
    return paths

  def delete(self, checkpoint):
    for path in tf.gfile.Glob(checkpoint + '.*'):
      os.remove(path)

  def watch(self, *args):
    return evaluate('--log_dir', self.log_dir, '--watch', '--watch_timeout', '1', *args)

  @slow
  def test_beside_training(self):
    # 7 checkpoints, of which training keeps 5.
    training = pipeline_test.start(*pipeline_test.TRAIN, '--log_dir', self.log_dir,
                                   '--max_number_of_steps', '12', '--save_interval_steps', '2',
                                   '--save_summaries_secs', '0.001')
    output = evaluate('--log_dir', self.log_dir, '--watch', '--watch_timeout', '120',
                      '--max_number_of_steps', '12')
    training_output, _ = training.communicate(timeout=120)
    self.assertEqual(training.returncode, 0, training_output)
    kept = [checkpoints.global_step(path) for path in
            tf.train.get_checkpoint_state(self.log_dir).all_model_checkpoint_paths]
    self.assertLen(kept, 5)
    steps = [int(step) for step in re.findall(
        r'^Step (\d+): loss = \d+\.\d{4}, accuracy = 0\.\d{4} \(\d+ of 100\), '
        'weights: as trained, not averaged$', output, re.MULTILINE)]
    self.assertEqual(steps, sorted(set(steps)))
    self.assertContainsSubset(kept, steps)
    self.assertEqual(output.splitlines()[-1],
                     f'Evaluated {len(steps)} checkpoints, the last one at step 12')
    # Equal tags and steps put both curves into one chart.
    trained = {(value.tag, event.step)
               for path in tf.gfile.Glob(os.path.join(self.log_dir, 'events.*'))
               for event in tf.train.summary_iterator(path) for value in event.summary.value}
    for tag in ('accuracy', 'losses/cross_entropy'):
      evaluated_at = {step for event_tag, step in self.events() if event_tag == tag}
      trained_at = {step for event_tag, step in trained if event_tag == tag}
      self.assertEqual(evaluated_at, set(steps))
      self.assertBetween(max(trained_at), 11, 12)

  def test_ends_when_nothing_new_comes(self):
    self.save_all(1, 2)
    output = self.watch().splitlines()
    self.assertEqual(output[0],
                     f'Watching {self.log_dir} until there is no new checkpoint for 1 seconds')
    self.assertEqual([line.split(':')[0] for line in output[1:3]], ['Step 1', 'Step 2'])
    self.assertEqual(output[3:], ['Evaluated 2 checkpoints; no new one for 1 seconds'])
    self.assertEqual(self.read_metrics()['global_step'], 2)

  def test_names_that_a_new_training_run_uses_again(self):
    path, = self.save_all(1)
    iterator = eval_flowers.new_checkpoints(self.log_dir, 1)
    self.assertEqual(next(iterator), path)
    os.utime(f'{path}.index', (1, 1))  # as if it had been written again
    self.assertEqual(list(iterator), [path])
    self.delete(path)
    self.assertEqual(eval_flowers.written_at(path), (path, None))

  def test_explains_every_checkpoint(self):
    self.save_all(1, 2)
    self.watch('--explain', '--explain_layer', 'block14_dws_conv1')
    first, second = (call.args[0] for call in report._draw_pictures.call_args_list)
    for result in (first, second):
      self.assertContainsSubset({0, 99, *result.mistakes}, result.maps)
      self.assertEqual({cells.shape for cells in result.maps.values()}, {(3, 3)})
    self.assertNotAllClose(first.maps[0], second.maps[0])

  def test_moved_folder(self):
    self.save_all(1, 2)
    moved = os.path.join(self.dir, 'moved')
    os.rename(self.log_dir, moved)
    self.log_dir = moved
    self.assertEqual(self.watch().splitlines()[3:],
                     ['Evaluated 2 checkpoints; no new one for 1 seconds'])

  def test_nothing_comes(self):
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'No checkpoint in .*log after 1'):
      self.watch()
    self.assertEmpty(os.listdir(self.log_dir))

  def test_deleted_checkpoints(self):
    before, during, last = self.save_all(1, 2, 3)
    self.delete(before)
    restore = checkpoints.restore

    def delete_and_restore(session, checkpoint, *args):
      if checkpoint == during:
        self.delete(checkpoint)
      return restore(session, checkpoint, *args)

    with mock.patch.object(checkpoints, 'restore', delete_and_restore):
      output = self.watch().splitlines()
    self.assertEqual(output[1], f'{during} was deleted before it was evaluated')
    self.assertStartsWith(output[2], 'Step 3: ')
    self.assertEqual(output[3], 'Evaluated 1 checkpoints; no new one for 1 seconds')

  def test_damaged_checkpoint(self):
    path, = self.save_all(1)
    for file in (path + '.data-00000-of-00001', path + '.index'):
      os.truncate(file, 100)
      with self.assertRaisesRegex(checkpoints.CheckpointError, 'model.ckpt-1 cannot be read'):
        self.watch()
