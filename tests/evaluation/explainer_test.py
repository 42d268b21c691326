"""Tests of the network that explains: its weights, its pictures and their names."""

import os
import shutil
import tempfile
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from common import checkpoints
from evaluation import evaluator
from evaluation import explainer
from evaluation import pictures
from records import flowers
from scripts import DATASET_DIR
import small_model


class FolderTestCase(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)


class ExplainerTest(FolderTestCase):

  def maps(self, explain, image, labels):
    """Returns the maps that a picture would show."""
    with mock.patch.object(pictures, 'draw_explanation', return_value=b'') as draw:
      explain.write_picture(os.path.join(self.dir, 'a.png'), image, labels, [0.5] * len(labels))
    _, maps, *_ = draw.call_args.args
    return maps

  def test_explains_as_evaluation_does(self):
    checkpoint = small_model.write_checkpoint(self.dir, with_averages=True, is_fitted=False)
    explainers = {use: explainer.Explainer(checkpoint, use) for use in ('auto', 'no')}
    evaluate = evaluator.Evaluator(flowers.get_split('validation', DATASET_DIR),
                                   small_model.CONFIG, 100, ['/cpu:0'],
                                   explain_layer='block14_dws_conv2')
    self.addCleanup(evaluate.close)
    for use, explain in explainers.items():
      result = evaluate(checkpoint, use, image_indices=[3, 99], num_mistakes=4)
      self.assertCountEqual(result.maps, result.images)
      for index, image in result.images.items():
        probabilities, = explain.predict([image])
        self.assertAllClose(probabilities, result.probabilities[index], atol=1e-5)
        expected, = self.maps(explain, image, [probabilities.argmax()])
        self.assertAllClose(result.maps[index], expected, rtol=0, atol=1e-4 * expected.max())
    # The weights of the logits are the negative of their averages, and so are the maps before
    # their negative values are left out.
    maps, opposite = (self.maps(explain, result.images[3], range(5))
                      for explain in explainers.values())
    self.assertEqual(maps.shape, (5, 3, 3))
    self.assertAllEqual((maps > 0) + (opposite > 0), np.ones([5, 3, 3], bool))
    self.assertAllEqual(maps * opposite, np.zeros([5, 3, 3]))

  def test_picture(self):
    explain = explainer.Explainer(small_model.write_checkpoint(self.dir))
    images, _ = small_model.validation_images()
    path = os.path.join(self.dir, 'new', 'a.png')
    explain.write_picture(path, images[0], [1, 0, 4], [0.5, 0.25, 0.125])
    with Image.open(path) as picture:
      self.assertEqual(picture.size, (1200, 330))
    self.assertEqual(os.listdir(os.path.dirname(path)), ['a.png'])

  def test_checkpoint_of_another_network(self):
    checkpoints.save_config(small_model.CONFIG, self.dir)
    with tf.Graph().as_default(), tf.Session() as session:
      tf.get_variable('weights', [1])
      session.run(tf.global_variables_initializer())
      checkpoint = tf.train.Saver().save(session, os.path.join(self.dir, 'other.ckpt'))
    with self.assertRaisesRegex(checkpoints.CheckpointError, f'{checkpoint} cannot be restored: '):
      explainer.Explainer(checkpoint)


class PlanPicturesTest(FolderTestCase):

  def test_names(self):
    new = os.path.join(self.dir, 'new')
    paths = explainer.plan_pictures(
        ['a/x.jpg', 'b/x.png', 'x_2.jpg', 'X.JPG', 'a/x.jpg', '-', 'y.tar.gz'], new)
    self.assertEqual([os.path.relpath(path, new) for path in paths], [
        'x.png', 'x_2.png', 'x_2_2.png', 'X_3.png', 'x_4.png', '-.png', 'y.tar.png'])
    self.assertFalse(os.path.exists(new))
    long_names = [f'{"l" * 250}.jpg', f'{"l" * 250}.png', f'{"向" * 80}.jpg']
    self.assertEqual(
        [os.path.basename(path) for path in explainer.plan_pictures(long_names, new)],
        [f'{"l" * 200}.png', f'{"l" * 200}_2.png', f'{"向" * 66}.png'])

  def test_files_in_the_way(self):
    old, link = (os.path.join(self.dir, name) for name in ('y.png', 'link.jpg'))
    with open(old, 'wb'):
      os.symlink(old, link)
    with self.assertRaisesRegex(FileExistsError, f'{old} exists: choose another folder'):
      explainer.plan_pictures(['photos/y.jpg'], self.dir)
    self.assertEqual(explainer.plan_pictures(['photos/y.jpg'], self.dir, overwrite=True), [old])
    for image in (old, link):
      with self.assertRaisesRegex(FileExistsError, f'{old} is itself an image to explain'):
        explainer.plan_pictures(['photos/y.jpg', image], self.dir, overwrite=True)
    with self.assertRaisesRegex(NotADirectoryError, f'{old} is not a folder'):
      explainer.plan_pictures([], old)
