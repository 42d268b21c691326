"""Makes tf-slim 1.1.0 work, without noise, on a TensorFlow that moved the names it uses.

`import slim_bridge` before `import tf_slim`; `import xception` does it for you.

tf-slim 1.1.0 (2020) is the newest release, and it looks up nine names in
modules that TensorFlow has since split. `MOVED_NAMES` tells which name moved
where; each one that is missing is set back to the very object that replaced
it, so nothing changes on a TensorFlow that still has it.

One thing the bridge cannot mend: `slim.batch_norm` with its default
`updates_collections` needs the removed tf.layers. Give it a list,
`updates_collections=[tf.GraphKeys.UPDATE_OPS]`, and it takes slim's own fused
path with the same names and numbers; `xception_arg_scope` does.

This module can go when a tf-slim is released that imports on current
TensorFlow as it is.
"""

import os

# Before TensorFlow is loaded: leaves warnings and errors, drops the C++ chatter.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')

import importlib
import importlib.metadata
import warnings

import tensorflow.compat.v1 as tf

# Where tf-slim 1.1.0 looks a name up -> where TensorFlow 2.21 keeps it; all
# modules below `tensorflow.python`.
MOVED_NAMES = {
    ('framework.ops', 'Tensor'): ('framework.tensor', 'Tensor'),
    ('framework.ops', 'IndexedSlices'): ('framework.indexed_slices', 'IndexedSlices'),
    ('ops.array_ops', 'stack'): ('ops.array_ops_stack', 'stack'),
    ('ops.array_ops', 'unstack'): ('ops.array_ops_stack', 'unstack'),
    ('ops.control_flow_ops', 'cond'): ('ops.cond', 'cond'),
    ('ops.control_flow_ops', 'case'): ('ops.control_flow_case', 'case'),
    ('ops.control_flow_ops', 'Assert'): ('ops.control_flow_assert', 'Assert'),
    ('ops.control_flow_ops', 'while_loop'): ('ops.while_loop', 'while_loop'),
    ('ops.variable_scope', 'variable'): ('ops.variable_v1', 'VariableV1'),
}


def restore_moved_names(moved_names):
  """Sets each name that is missing from its old module back to its new object.

  Args:
    moved_names: dict {(old module, name): (new module, new name)}, modules
      relative to `tensorflow.python`.

  Raises:
    ImportError: a name is neither where tf-slim looks for it nor at its new
      place: this TensorFlow is one that the bridge does not know.
  """
  for (old_module, name), (new_module, new_name) in moved_names.items():
    try:
      module = importlib.import_module(f'tensorflow.python.{old_module}')
      if not hasattr(module, name):
        home = importlib.import_module(f'tensorflow.python.{new_module}')
        setattr(module, name, getattr(home, new_name))
    except (ImportError, AttributeError) as error:
      raise _unknown_versions(
          f'tensorflow.python.{old_module}.{name} is gone, and '
          f'tensorflow.python.{new_module}.{new_name} is not there either') from error


def import_slim():
  """Imports tf_slim and returns it; an ImportError names the versions found."""
  try:
    return importlib.import_module('tf_slim')
  except ModuleNotFoundError as error:
    if error.name == 'tf_slim':
      raise ImportError(
          'tf_slim is not installed: pip install -r requirements.txt') from error
    raise _unknown_versions(str(error)) from error
  except (ImportError, AttributeError) as error:
    raise _unknown_versions(str(error)) from error


def silence_known_noise():
  """Drops the deprecation notices that tf-slim's own code sets off, nothing else."""
  warnings.filterwarnings(
      'ignore', category=UserWarning, module=r'tensorflow\.python\.keras\.')
  logger = tf.get_logger()
  # TensorFlow's logger has a handler of its own: the root would say it twice.
  logger.propagate = False
  logger.addFilter(_is_no_deprecation_notice)


def _is_no_deprecation_notice(record):
  return record.filename != 'deprecation.py'


def _unknown_versions(detail):
  try:
    slim_version = importlib.metadata.version('tf-slim')
  except importlib.metadata.PackageNotFoundError:
    slim_version = '(not installed)'
  return ImportError(
      f'slim_bridge does not know how to run tf-slim {slim_version} on TensorFlow '
      f'{tf.__version__}: {detail}. It was tried with tf-slim 1.1.0 on TensorFlow '
      '2.21: pip install -r requirements.txt')


silence_known_noise()
restore_moved_names(MOVED_NAMES)
import_slim()
