"""Tests of what is reported before an evaluation starts."""

import os
import tempfile
import types

import tensorflow.compat.v1 as tf

from common import checkpoints
from evaluation import report


class OtherClassesTest(tf.test.TestCase):

  def test_hundreds_of_other_classes(self):
    names = [f'class {i}' for i in range(600)]
    dataset = types.SimpleNamespace(num_samples=9, labels_to_names=dict(enumerate(names)))
    with tempfile.TemporaryDirectory() as folder:
      log_eval = os.path.join(folder, 'eval')
      split = report.SplitEvaluation(dataset, log_eval, 1, {'dataset_dir': 'data'})
      for class_names, difference in [
          (names[:400] + ['x' * 99] + names[401:], f'400:{"x" * 15}…{"x" * 14} there and 400:class '
           '400 here'),
          (names[:500], '500:no class there and 500:class 500 here')]:
        with self.assertRaises(checkpoints.CheckpointError) as context:
          split.of_frozen_model('model.pb', types.SimpleNamespace(class_names=class_names))
        self.assertEqual(str(context.exception), f'model.pb was trained on {len(class_names)} '
                         f'classes and data has 600; the first difference is {difference}')
      self.assertFalse(os.path.exists(log_eval))
