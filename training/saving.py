"""Saves a training run's checkpoints."""

import os

import tensorflow.compat.v1 as tf

from common import checkpoints
from training import step as training_step

CHECKPOINT_NAME = 'model.ckpt'  # as tf.train.CheckpointSaverHook calls them


class Saver(tf.train.Saver):
  """Saves all variables of the default graph, but only if they are finite.

  The file `checkpoint` gets relative paths, so that the folder can be moved.
  """

  def __init__(self, folder, max_to_keep):
    """Adds the saver to the default graph.

    Args:
      folder: where to save; its checkpoints are deleted too once there are newer ones.
      max_to_keep: number of checkpoints to keep.
    """
    super().__init__(max_to_keep=max_to_keep, save_relative_paths=True)
    self._folder = folder
    self._all_finite = tf.reduce_all([
        tf.reduce_all(tf.math.is_finite(variable)) for variable in tf.global_variables()
        if variable.dtype.is_floating])
    self.recover_last_checkpoints([
        path for path in checkpoints.list_checkpoints(folder)
        if os.path.basename(path).startswith(f'{CHECKPOINT_NAME}-')])

  def save(self, sess, save_path, global_step=None, **kwargs):
    """Saves the variables; see tf.train.Saver.

    Raises:
      step.TrainingError: a variable is not finite, or the folder is gone.
    """
    if not sess.run(self._all_finite):
      raise training_step.TrainingError(
          f'The weights are not finite after step {global_step} and were not saved. Checkpoints '
          'of earlier steps are intact. A smaller --learning_rate or a larger --opt_epsilon may '
          'help')
    if not os.path.isdir(self._folder):
      raise training_step.TrainingError(
          f'{self._folder} was removed or renamed during training, so step {global_step} cannot '
          'be saved')
    return super().save(sess, save_path, global_step, **kwargs)
