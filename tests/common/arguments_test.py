"""Tests of the options that scripts share, and of text that a terminal cannot show."""

import contextlib
import glob
import io
import os

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


if __name__ == '__main__':
  tf.test.main()
