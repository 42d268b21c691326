"""Tests of the command-line options."""

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile

import tensorflow.compat.v1 as tf

from training import optimization
from training import options


class OptionsTest(tf.test.TestCase):

  def test_slims_and_the_originals_names(self):
    args = options.parse_train_args('Trains.', [
        '--train_dir', 'there', '--initial_learning_rate', '0.5', '--num_epochs_before_decay',
        '3', '--train_image_size', '128', '--rmsprop_momentum', '0.7'])
    self.assertEqual((args.log_dir, args.learning_rate, args.num_epochs_per_decay,
                      args.image_size, args.momentum), ('there', 0.5, 3.0, 128, 0.7))

  def test_help_names_every_option_and_default(self):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), self.assertRaises(SystemExit) as context:
      options.parse_train_args('Trains.', ['--help'])
    self.assertEqual(context.exception.code, 0)
    text = ' '.join(text.getvalue().split())
    for name in vars(options.parse_train_args('Trains.', [])):
      self.assertIn(f'--{name}', text)
    self.assertIn('(default: 0.94)', text)
    self.assertNotIn('None', text)

  def test_a_recipe_sets_defaults_and_an_option_overrides_it(self):
    for name, recipe in optimization.RECIPES.items():
      args = options.parse_train_args('Trains.', ['--recipe', name])
      self.assertEqual(options.recipe(args), recipe)
    for argv in (['--recipe', 'imagenet', '--learning_rate', '0.1', '--no-staircase'],
                 ['--no-staircase', '--learning_rate', '0.1', '--recipe', 'imagenet']):
      args = options.parse_train_args('Trains.', argv)
      self.assertEqual(options.recipe(args), dataclasses.replace(
          optimization.RECIPES['imagenet'], learning_rate=0.1, staircase=False))

  def test_options_of_a_file(self):
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    path = os.path.join(folder, 'options')
    with open(path, 'w', encoding='utf-8') as f:
      f.write('--recipe jft --batch_size 64  # as in the paper\n\n'
              '--log_dir "a folder"\n# nothing\n')
    args = options.parse_train_args('Trains.', [f'@{path}', '--batch_size', '32'])
    self.assertEqual((args.recipe, args.optimizer, args.batch_size, args.log_dir),
                     ('jft', 'rmsprop', 32, 'a folder'))

  def test_scopes(self):
    args = options.parse_train_args('Trains.', ['--trainable_scopes', 'Xception/Logits, b,'])
    self.assertEqual(args.trainable_scopes, ('Xception/Logits', 'b'))
    self.assertEqual(args.checkpoint_exclude_scopes, ())

  def test_options_that_need_another(self):
    for argv, message in ((['--use_averages', 'no'], '--use_averages needs --checkpoint_path'),
                          (['--early_stop_patience', '2'], 'needs --eval_every_epochs')):
      text = io.StringIO()
      with contextlib.redirect_stderr(text), self.assertRaises(SystemExit):
        options.parse_train_args('Trains.', argv)
      self.assertIn(message, text.getvalue())

  def test_bad_values(self):
    for option, value, message in [
        ('--batch_size', '0', 'must be a whole number greater than 0, got 0'),
        ('--batch_size', '1.5', 'must be a whole number greater than 0, got 1.5'),
        ('--num_epochs', '-1', 'must be a number greater than 0 and at most 1e9, got -1'),
        ('--learning_rate', 'nan', 'must be a number greater than 0, got nan'),
        ('--image_size', '70', 'must be a whole number from 71 to 10000, got 70'),
        ('--dropout_keep_prob', '0', 'must be a number greater than 0 and at most 1, got 0'),
        ('--num_preprocessing_threads', '0', 'must be a whole number greater than 0, or -1, got 0'),
        ('--label_smoothing', '1', 'must be a number of 0 or more and less than 1, got 1'),
        ('--weight_decay', '-1', 'must be a number of 0 or more, got -1'),
        ('--num_clones', '0', 'must be a whole number greater than 0, got 0'),
        ('--accumulate_steps', '0', 'must be a whole number greater than 0, got 0'),
        ('--moving_average_decay', '1', 'must be a number of 0 or more and less than 1, got 1'),
        ('--profile_steps', '0', 'must be a whole number greater than 0, got 0'),
        ('--precision', 'float8', "invalid choice: 'float8'"),
        ('--optimizer', 'lion', "invalid choice: 'lion'"),
        ('--use_averages', 'maybe', "invalid choice: 'maybe'")]:
      text = io.StringIO()
      with contextlib.redirect_stderr(text), self.assertRaises(SystemExit) as context:
        options.parse_train_args('Trains.', [option, value])
      self.assertEqual(context.exception.code, 2)
      self.assertRegex(text.getvalue(), f'argument {option}.*: {message}')
