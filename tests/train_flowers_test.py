"""Tests of what train_flowers.py stores about a run, and of its refusals."""

import os
import tempfile

import tensorflow.compat.v1 as tf

import checkpoints
import train_flowers


class ConfigureModelTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.dir = os.path.join(folder.name, 'log')

  def configure(self, checkpoint=None, **kwargs):
    options = dict(class_names=['daisy', 'Löwenzahn'], image_size=71, depth_multiplier=0.5,
                   seed=1)
    options.update(kwargs)
    class_names = options.pop('class_names')
    dataset = type('Dataset', (), {'labels_to_names': dict(enumerate(class_names)),
                                   'num_classes': len(class_names)})
    return train_flowers.configure_model(dataset, self.dir, checkpoint, **options)

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
        (dict(image_size=96), 'image_size is 71 there and 96 here'),
        (dict(depth_multiplier=1.0), 'depth_multiplier is 0.5 there and 1.0 here'),
        (dict(class_names=['daisy', 'roses']), "'Löwenzahn'.* there and .*'roses'.* here"),
        (dict(seed=2), 'seed is 1 there and 2 here')]:
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


if __name__ == '__main__':
  tf.test.main()
