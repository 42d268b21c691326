"""Writes the files of a conversion: none is overwritten unasked or left half-written."""

import contextlib
import os
import tempfile

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from conversion import keras_models


def beside(path, name):
  """Returns the path of the file `name` in the folder of `path`."""
  return os.path.join(os.path.dirname(path), name)


def refuse_existing(paths, overwrite):
  """Raises a ConversionError if one of the paths exists and overwrite is False."""
  for path in paths:
    if os.path.exists(path) and not overwrite:
      raise keras_models.ConversionError(
          f'{path} exists: choose another folder or name, or add --overwrite')


@contextlib.contextmanager
def folder_beside(path):
  """Yields a temporary folder in the folder of `path`, so a rename can move files to it.

  Raises:
    keras_models.ConversionError: a file cannot be written while the folder is in use.
  """
  folder = os.path.dirname(path) or '.'
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='converted_', suffix='.tmp', dir=folder) as temporary:
      yield temporary
  except (OSError, tf.errors.OpError) as error:
    raise keras_models.ConversionError(
        f'Cannot write {path} ({getattr(error, "message", error)}): free some space, or choose '
        'another folder') from error
