"""Tests of the options that scripts share, and of text that a terminal cannot show."""

import contextlib
import glob
import io
import os
import tempfile

import tensorflow.compat.v1 as tf

import check_dataset
from common import arguments
import eval_flowers
from scripts import PROJECT
from training import options
import write_pb


class DatasetOptionsTest(tf.test.TestCase):

  def test_every_script_that_reads_records_has_them(self):
    argv = ['--dataset_dir', 'mine', '--file_pattern', '%s-*', '--image_key', 'image',
            '--label_key', 'label', '--labels_offset', '1']
    for parse_args in (check_dataset.parse_args, eval_flowers.parse_args, write_pb.parse_args,
                       lambda argv: options.parse_train_args('Trains.', argv)):
      self.assertEqual(arguments.dataset_options(parse_args(argv)), {
          'dataset_dir': 'mine', 'file_pattern': '%s-*', 'image_key': 'image',
          'label_key': 'label', 'labels_offset': 1})


class ValuesTest(tf.test.TestCase):

  def parse(self, *argv):
    """Returns what the parser refuses, or the options."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
      try:
        return options.parse_train_args('Trains.', argv)
      except SystemExit:
        return stderr.getvalue().splitlines()[-1]

  def test_paths(self):
    self.assertEqual(self.parse('--log_dir=~/log').log_dir, os.path.expanduser('~/log'))
    for name in ('log_dir', 'dataset_dir', 'checkpoint_path'):
      self.assertIn(f'argument --{name}', self.parse(f'--{name}', ''))
      self.assertEndsWith(self.parse(f'--{name}', ''), 'must be a path, got nothing')

  def test_numbers_that_are_too_large(self):
    for name in ('num_epochs', 'eval_every_epochs'):
      self.assertEndsWith(self.parse(f'--{name}', '1e308'),
                          'must be a number greater than 0 and at most 1e9, got 1e308')
    for name in ('seed', 'batch_size'):
      self.assertEndsWith(self.parse(f'--{name}', '99999999999999999999'),
                          'must be 1,000,000,000,000 or less, got 99999999999999999999')
    self.assertEndsWith(self.parse('--image_size', '99999'),
                        'must be a whole number from 71 to 10000, got 99999')

  def test_option_files(self):
    path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), 'options')
    for content, expected in [
        ('\ufeff--batch_size 8'.encode(), 8), (f'@{path}'.encode(), 'an @FILE includes itself'),
        ('--log_dir b\xe4r'.encode('latin-1'), 'an @FILE is not UTF-8 text')]:
      with open(path, 'wb') as f:
        f.write(content)
      found = self.parse(f'@{path}')
      if isinstance(expected, int):
        self.assertEqual(found.batch_size, expected)
      else:
        self.assertIn(expected, found)


class OutputTest(tf.test.TestCase):

  def test_characters_that_the_terminal_lacks_are_escaped(self):
    content = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(content, 'ascii')) as output:
      arguments.escape_unprintable_output()
      print('blüte 向')
      output.flush()
      self.assertEqual(content.getvalue(), b'bl\\xfcte \\u5411\n')

  def test_every_script_escapes_them(self):
    num_scripts = 0
    for path in glob.glob(os.path.join(PROJECT, '*_*.py')):
      with open(path, encoding='utf-8') as f:
        code = f.read()
      if 'def parse_args(' in code or 'options.parse_train_args(' in code:
        num_scripts += 1
        self.assertRegex(code, r'escape_unprintable_output\(\)|stdout.reconfigure\(errors', path)
    self.assertEqual(num_scripts, 8)
