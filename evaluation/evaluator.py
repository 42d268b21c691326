"""Evaluates checkpoints on every image of a split, exactly once each.

  evaluate = evaluator.Evaluator(dataset, config, batch_size=32)
  evaluation = evaluate('log/model.ckpt-1000')

The network is built once, in a graph of its own, so that training can evaluate
a checkpoint that it has just saved.
"""

import collections
import contextlib
import itertools

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim
import tqdm

from common import checkpoints
from deployment import cluster
from deployment import towers
from evaluation import grad_cam
from records import flowers
import xception

Evaluation = collections.namedtuple('Evaluation', [
    'labels',  # int64 [num_images]
    'probabilities',  # float32 [num_images, num_classes]
    'losses',  # float32 [num_images], cross-entropies
    # float32 [num_images, num_classes], up to a constant for each image; None of several workers.
    # Unlike probabilities, they do not underflow.
    'logits',
    'positions',  # int64 [num_images], record numbers in ascending order, without bad records
    'images',  # {index: float32 [height, width, 3] in [-1, 1]} of the requested images
    'mistakes',  # indices of the most confident wrong predictions, the most confident first
    'uses_averages',  # whether the weights were Polyak averages; None if that is unknown
    'maps',  # {index: float32 [rows, columns]}, Grad-CAM of the predicted class for each of images
], defaults=[None])


class ImageReader:
  """Iterates over the preprocessed images of a split, from the first each time.

  Attributes:
    dataset: slim Dataset of the split.
    num_images: number of images, bad records included.
  """

  def __init__(self, dataset, batch_size, image_size, worker=0, num_workers=1):
    """Initializes the reader.

    Args:
      dataset: slim Dataset from `flowers.get_split`.
      batch_size: images per batch; the last batch may be smaller.
      image_size: height and width of the images in pixels.
      worker, num_workers: reads every num_workers-th image, starting with number `worker`.
    """
    self.dataset = dataset
    self.num_images = dataset.num_samples
    self._graph = tf.Graph()
    with self._graph.as_default():
      self._batch = flowers.load_numbered_batch(
          dataset, batch_size, image_size, image_size, is_training=False, worker=worker,
          num_workers=num_workers)

  def __iter__(self):
    """Yields images, labels and positions of `flowers.load_numbered_batch` as arrays."""
    # The session holds the iterator's state, so a new one starts from the first image.
    config = tf.ConfigProto(device_count={'GPU': 0})
    with tf.Session(graph=self._graph, config=config) as session:
      while True:
        try:
          batch = session.run(self._batch)
        except tf.errors.OutOfRangeError:
          return
        yield batch


def run_pass(reader, predict, num_batches=1, image_indices=(), num_mistakes=0,
             show_progress=False):
  """Predicts every image once, in order, with any network.

  Args:
    reader: ImageReader.
    predict: function of a list of batches that returns (probabilities, losses,
      logits) for each.
    num_batches: batches per call of predict; the last call may get fewer.
    image_indices: indices of images to return.
    num_mistakes: number of the most confident mistakes whose images are returned too.
    show_progress: whether to show a progress bar on a terminal.

  Returns:
    An Evaluation, possibly without any image; uses_averages is None.
  """
  keeper = _ImageKeeper(image_indices, num_mistakes)
  no_scores = np.zeros([0, reader.dataset.num_classes], np.float32)
  columns = [(np.zeros(0, np.int64), no_scores, np.zeros(0, np.float32), no_scores,
              np.zeros(0, np.int64))]
  # After an exception, the traceback would keep the iterator alive, and at exit its open session
  # makes Python hang.
  with contextlib.closing(iter(reader)) as batches, tqdm.tqdm(
      total=reader.num_images, unit=' images',
      disable=None if show_progress else True) as progress:
    while group := list(itertools.islice(batches, num_batches)):
      for (images, labels, positions), scores in zip(group, predict(group)):
        columns.append((labels, *scores, positions))
        keeper.add(images, labels, scores[0])
        progress.update(len(images))
  return Evaluation(*(np.concatenate(column) for column in zip(*columns)), keeper.images,
                    keeper.mistakes, None)


def require_images(result, dataset):
  """Raises a flowers.DatasetError if all records were bad, so that there is nothing to evaluate."""
  if not len(result.labels):
    raise flowers.DatasetError(
        f'None of the {dataset.num_samples} records can be evaluated: '
        + flowers.describe_bad_record(dataset, 0))


class Evaluator:
  """Runs the network of checkpoints over every image of a split, in order.

  Several devices take turns with whole batches. The batches do not depend on the
  number of devices, and the result only by rounding.
  """

  def __init__(self, dataset, config, batch_size, devices=None, show_progress=False,
               workers=cluster.SingleWorker(), explain_layer=None):
    """Builds the graph.

    Args:
      dataset: slim Dataset from `flowers.get_split`.
      config: ModelConfig of the checkpoints.
      batch_size: images per device and step; changes speed and memory, not the
        result.
      devices: list of device names from `towers.tower_devices`; None is every
        GPU, or the CPU on a machine without one.
      show_progress: whether to show a progress bar on a terminal.
      workers: cluster.Workers or SingleWorker; they share the images, and each
        gets the whole result.
      explain_layer: layer of the maps, see `grad_cam.build_maps`; None computes none.

    Raises:
      grad_cam.LayerError: there is no such layer.
    """
    self._workers = workers
    devices = devices or towers.tower_devices()
    self._show_progress = show_progress
    self._reader = ImageReader(dataset, batch_size, config.image_size, workers.index,
                               workers.size)
    self._savers = {}
    self._graph = tf.Graph()
    with self._graph.as_default(), slim.arg_scope(xception.xception_arg_scope()):
      # Each tower is fed separately: the last images need not divide evenly among them.
      self._towers = towers.replicate(
          lambda: _build_tower(config, explain_layer), devices, [()] * len(devices))
    self._session = tf.Session(graph=self._graph, config=towers.session_config(devices))

  def __call__(self, checkpoint, use_averages='auto', image_indices=(), num_mistakes=0):
    """Evaluates a checkpoint.

    Args:
      checkpoint: path of the checkpoint.
      use_averages: 'auto', 'yes' or 'no', see `checkpoints.restore`.
      image_indices, num_mistakes: see `run_pass`.

    Returns:
      An Evaluation.

    Raises:
      checkpoints.CheckpointError: the checkpoint cannot be restored, or has no
        averages and use_averages is 'yes'.
      flowers.DatasetError: the split has no good image.
    """
    uses_averages = checkpoints.restore(self._session, checkpoint, use_averages, self._savers)
    result = run_pass(self._reader, self._predict, len(self._towers), image_indices, num_mistakes,
                      self._show_progress)
    result = self._workers.merge_evaluation(
        result._replace(uses_averages=uses_averages), self._reader.num_images)
    require_images(result, self._reader.dataset)
    return result._replace(maps=self._explain(result))

  def close(self):
    """Frees the memory of the weights."""
    self._session.close()

  def _predict(self, batches):
    """Returns probabilities, losses and logits of no more batches than there are towers."""
    fetches, feeds = [], {}
    for tower, (images, labels, _) in zip(self._towers, batches):
      fetches.append([tower.probabilities, tower.losses, tower.logits])
      feeds[tower.images] = images
      feeds[tower.labels] = labels
    return self._session.run(fetches, feeds)

  def _explain(self, result):
    """Returns the maps of an Evaluation's images; None without explain_layer."""
    tower = self._towers[0]
    if tower.maps is None:
      return None
    maps = {}
    for index, image in result.images.items():
      feeds = {tower.images: [image], tower.labels: [result.probabilities[index].argmax()]}
      maps[index], = self._session.run(tower.maps, feeds)
    return maps


_Tower = collections.namedtuple(
    '_Tower', ['images', 'labels', 'probabilities', 'losses', 'logits', 'maps'])


def _build_tower(config, explain_layer):
  """Builds the network of a ModelConfig on placeholders; returns a _Tower."""
  images = tf.placeholder(tf.float32, [None, config.image_size, config.image_size, 3])
  labels = tf.placeholder(tf.int64, [None])
  logits, end_points = xception.xception(
      images, config.num_classes, is_training=False, depth_multiplier=config.depth_multiplier)
  losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
  maps = (grad_cam.build_maps(logits, end_points, explain_layer, labels) if explain_layer else
          None)
  return _Tower(images, labels, end_points['Predictions'], losses, logits, maps)


class _ImageKeeper:
  """Keeps the requested images of a pass and those of the most confident mistakes.

  Attributes:
    images: {index: float32 [height, width, 3]} of the images kept so far.
    mistakes: indices of the mistakes kept so far, the most confident first.
  """

  def __init__(self, indices, num_mistakes):
    self.images = {}
    self._indices = frozenset(indices)
    self._num_mistakes = num_mistakes
    self._mistakes = []  # (-confidence, index), the most confident first
    self._seen = 0

  @property
  def mistakes(self):
    return [index for _, index in self._mistakes]

  def add(self, images, labels, probabilities):
    """Processes the next batch of the pass."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    mistakes = [(-probabilities[i].max(), self._seen + int(i)) for i in wrong]
    self._mistakes = sorted(self._mistakes + mistakes)[:self._num_mistakes]
    wanted = self._indices.union(self.mistakes)
    # Copies: a view would keep its whole batch in memory.
    self.images.update({self._seen + i: image.copy() for i, image in enumerate(images)
                        if self._seen + i in wanted})
    self.images = {index: image for index, image in self.images.items() if index in wanted}
    self._seen += len(images)
