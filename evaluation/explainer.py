"""Classifies images with a checkpoint, and draws where its network sees the classes."""

import collections
import os

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim

from common import checkpoints
from common import files
from deployment import towers
from evaluation import grad_cam
from evaluation import pictures
import xception

MAX_STEM_BYTES = 200  # file systems allow 255 for a whole name


class Explainer:
  """The network of a checkpoint, which classifies images and shows where it sees the classes.

  Attributes:
    class_names: names of the classes.
    image_size: height and width of its images in pixels.
  """

  def __init__(self, checkpoint, use_averages='auto', layer=grad_cam.DEFAULT_LAYER):
    """Restores the network, on the first GPU if there is one.

    Args:
      checkpoint: path of the checkpoint.
      use_averages: 'auto', 'yes' or 'no', see `checkpoints.restore`.
      layer: see `grad_cam.build_maps`.

    Raises:
      checkpoints.CheckpointError: the checkpoint cannot be restored.
      grad_cam.LayerError: there is no such layer.
    """
    config = checkpoints.load_config(checkpoint)
    self.class_names, self.image_size = config.class_names, config.image_size
    with tf.Graph().as_default(), slim.arg_scope(xception.xception_arg_scope()):
      self._images = tf.placeholder(tf.float32, [None, self.image_size, self.image_size, 3])
      self._classes = tf.placeholder(tf.int64, [None])
      logits, end_points = xception.xception(
          self._images, config.num_classes, is_training=False,
          depth_multiplier=config.depth_multiplier)
      self._probabilities = end_points['Predictions']
      self._maps = grad_cam.build_maps(logits, end_points, layer, self._classes)
      self._session = tf.Session(config=towers.session_config(towers.tower_devices()[:1]))
      checkpoints.restore(self._session, checkpoint, use_averages)

  def predict(self, images):
    """Returns the probabilities of images, float32 [n, num_classes].

    Args:
      images: float32 [n, image_size, image_size, 3] in [-1, 1].
    """
    return self._session.run(self._probabilities, {self._images: images})

  def write_picture(self, path, image, labels, probabilities):
    """Writes a PNG file that shows an image and, beside it, the map of each of some classes.

    Args:
      path: path of the file; its folder is created if missing.
      image: float32 [image_size, image_size, 3] in [-1, 1].
      labels: the classes, ints in [0, num_classes).
      probabilities: those of the classes.

    Raises:
      OSError: the file cannot be written.
    """
    images = np.repeat(image[np.newaxis], len(labels), axis=0)
    maps = self._session.run(self._maps, {self._images: images, self._classes: labels})
    png = pictures.draw_explanation(image, maps, labels, probabilities, self.class_names)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    files.write_atomically(path, png)


def plan_pictures(images, folder, overwrite=False):
  """Returns the paths of the pictures that explain image files, all of them different.

  Args:
    images: file names; the picture of photos/a.jpg is a.png or, where the name is taken, a_2.png.
      A very long name is cut.
    folder: folder of the pictures.
    overwrite: whether existing files may be replaced; those of `images` never are.

  Raises:
    OSError: a file is in the way, or the folder cannot be written.
  """
  files.require_writable(folder)
  originals = {os.path.realpath(image) for image in images}
  taken, num_taken, paths = set(), collections.Counter(), []
  for image in images:
    stem = os.path.splitext(os.path.basename(image))[0]
    while len(os.fsencode(stem)) > MAX_STEM_BYTES:
      stem = stem[:-1]
    name = stem
    # Some file systems take A.png and a.png for the same file.
    while name.casefold() in taken:
      num_taken[stem] += 1
      name = f'{stem}_{num_taken[stem] + 1}'
    taken.add(name.casefold())
    path = os.path.join(folder, f'{name}.png')
    if os.path.realpath(path) in originals:
      raise FileExistsError(f'{path} is itself an image to explain: choose another folder')
    if os.path.lexists(path) and not overwrite:
      raise FileExistsError(f'{path} exists: choose another folder, or give --overwrite')
    paths.append(path)
  return paths
