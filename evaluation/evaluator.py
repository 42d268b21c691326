"""Evaluates checkpoints on every image of a split, exactly once each.

  evaluator = evaluation.Evaluator(dataset, config, batch_size=32)
  evaluation = evaluator('log/model.ckpt-1000')

The graph is built once and stands apart from the default one, so that training
can evaluate what it has just saved.
"""

import collections
import itertools

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim
import tqdm

from common import checkpoints
from deployment import cluster
from deployment import towers
from records import flowers
import xception

Evaluation = collections.namedtuple('Evaluation', [
    'labels',  # int64 [num_images]
    'probabilities',  # float32 [num_images, num_classes]
    'losses',  # float32 [num_images], cross-entropies
    'positions',  # int64 [num_images], rising; the numbers of bad records are left out
    'images',  # {index: float32 [height, width, 3] in [-1, 1]}, those asked for
    'mistakes',  # indices of wrong predictions, as many as asked for, the most confident first
    'uses_averages',  # whether the weights were Polyak averages; None if that is not known
])


class ImageReader:
  """Reads and preprocesses a split from its first image to its last, as often as asked.

  Attributes:
    num_images: how many there are, bad records included.
  """

  def __init__(self, dataset, batch_size, image_size, worker=0, num_workers=1):
    """Initializes the reader.

    Args:
      dataset: slim Dataset from `flowers.get_split`.
      batch_size: images of a batch; the last may have fewer.
      image_size: height and width of the images in pixels.
      worker, num_workers: reads every num_workers-th image, from `worker` on.
    """
    self.num_images = dataset.num_samples
    self._graph = tf.Graph()
    with self._graph.as_default():
      self._batch = flowers.load_numbered_batch(
          dataset, batch_size, image_size, image_size, is_training=False, worker=worker,
          num_workers=num_workers)

  def __iter__(self):
    """Yields images, labels and positions of `flowers.load_numbered_batch` as arrays."""
    # The iterator's state belongs to the session: a new one starts from the first image.
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
  """Predicts every image once, in order, with whatever network.

  Args:
    reader: ImageReader.
    predict: function of a list of batches that returns one (probabilities,
      losses) pair each.
    num_batches: batches that predict is given at a time; fewer at the end.
    image_indices: which images to return.
    num_mistakes: how many of the most confident mistakes' images to return too.
    show_progress: shows a bar on a terminal.

  Returns:
    An Evaluation; uses_averages is None.
  """
  keeper = _ImageKeeper(image_indices, num_mistakes)
  columns = []
  batches = iter(reader)
  with tqdm.tqdm(total=reader.num_images, unit=' images',
                 disable=None if show_progress else True) as progress:
    while group := list(itertools.islice(batches, num_batches)):
      for (images, labels, positions), (probabilities, losses) in zip(group, predict(group)):
        columns.append((labels, probabilities, losses, positions))
        keeper.add(images, labels, probabilities)
        progress.update(len(images))
  return Evaluation(*(np.concatenate(column) for column in zip(*columns)), keeper.images,
                    keeper.mistakes, None)


class Evaluator:
  """Runs the network of checkpoints over every image of a split, in order.

  Several devices take turns with whole batches. Every batch is the same for any
  number of them, and so is every bit of the result.
  """

  def __init__(self, dataset, config, batch_size, devices=None, show_progress=False,
               workers=cluster.SingleWorker()):
    """Builds the graph.

    Args:
      dataset: slim Dataset from `flowers.get_split`.
      config: ModelConfig of the checkpoints.
      batch_size: images that a device is given at a time; changes speed and
        memory, not the result.
      devices: list of device names from `towers.tower_devices`; None is every
        GPU, or the CPU of a machine without.
      show_progress: shows a bar on a terminal.
      workers: cluster.Workers or SingleWorker, who share the images and all have the
        result of all.
    """
    self._workers = workers
    devices = devices or towers.tower_devices()
    self._show_progress = show_progress
    self._reader = ImageReader(dataset, batch_size, config.image_size, workers.index,
                               workers.size)
    self._savers = {}
    self._graph = tf.Graph()
    with self._graph.as_default(), slim.arg_scope(xception.xception_arg_scope()):
      # Each tower is fed by itself: the last images need not divide by the towers.
      self._towers = towers.replicate(lambda: _build_tower(config), devices, [()] * len(devices))
    self._session = tf.Session(graph=self._graph, config=towers.session_config(devices))

  def __call__(self, checkpoint, use_averages='auto', image_indices=(), num_mistakes=0):
    """Evaluates a checkpoint.

    Args:
      checkpoint: path of the checkpoint.
      use_averages: 'auto', 'yes' or 'no', see `checkpoints.inference_saver`.
      image_indices: which images to return as the network saw them.
      num_mistakes: how many of the most confident mistakes' images to return too.

    Returns:
      An Evaluation.

    Raises:
      checkpoints.CheckpointError: the checkpoint cannot be restored, or has no
        averages and 'yes' asks for them.
    """
    uses_averages = self._restore(checkpoint, use_averages)
    result = run_pass(self._reader, self._predict, len(self._towers), image_indices, num_mistakes,
                      self._show_progress)
    return self._workers.merge_evaluation(result._replace(uses_averages=uses_averages),
                               self._reader.num_images)

  def close(self):
    """Gives back the memory of the weights."""
    self._session.close()

  def _restore(self, checkpoint, use_averages):
    """Restores the weights; returns whether they are averages."""
    try:
      # The checkpoints of one training hold the same variables and share a saver: one for
      # each would let the graph grow.
      key = use_averages, frozenset(
          name for name, _ in tf.train.list_variables(checkpoint))
      if key not in self._savers:
        with self._graph.as_default():
          self._savers[key] = checkpoints.inference_saver(checkpoint, use_averages)
      saver, uses_averages = self._savers[key]
      saver.restore(self._session, checkpoint)
    except (tf.errors.OpError, ValueError) as error:
      # What went wrong stands in front of the name of the op that it befell.
      reason = str(error).split('[[{{node')[0].strip().splitlines()[-1]
      raise checkpoints.CheckpointError(f'{checkpoint} cannot be restored: {reason}') from error
    return uses_averages

  def _predict(self, batches):
    """Returns probabilities and losses of up to as many batches as there are towers."""
    fetches, feeds = [], {}
    for tower, (images, labels, _) in zip(self._towers, batches):
      fetches.append([tower.probabilities, tower.losses])
      feeds[tower.images] = images
      feeds[tower.labels] = labels
    return self._session.run(fetches, feeds)


_Tower = collections.namedtuple('_Tower', ['images', 'labels', 'probabilities', 'losses'])


def _build_tower(config):
  """Builds the network of a ModelConfig on placeholders; returns a _Tower."""
  images = tf.placeholder(tf.float32, [None, config.image_size, config.image_size, 3])
  labels = tf.placeholder(tf.int64, [None])
  logits, end_points = xception.xception(
      images, config.num_classes, is_training=False, depth_multiplier=config.depth_multiplier)
  losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
  return _Tower(images, labels, end_points['Predictions'], losses)


class _ImageKeeper:
  """Keeps some images of a pass: those asked for and the most confident mistakes.

  Attributes:
    images: {index: float32 [height, width, 3]} of those kept.
    mistakes: indices, the most confident first.
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
    """Looks at the next batch of the pass."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    mistakes = [(-probabilities[i].max(), self._seen + int(i)) for i in wrong]
    self._mistakes = sorted(self._mistakes + mistakes)[:self._num_mistakes]
    wanted = self._indices.union(self.mistakes)
    # Copies: a view would keep its whole batch in memory.
    self.images.update({self._seen + i: image.copy() for i, image in enumerate(images)
                        if self._seen + i in wanted})
    self.images = {index: image for index, image in self.images.items() if index in wanted}
    self._seen += len(images)
