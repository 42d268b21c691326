"""Makes tf-slim 1.1.0 work, without noise, on a TensorFlow that moved the names it uses.

`import slim_bridge` before `import tf_slim`; `import xception` does it for you.

tf-slim 1.1.0 (2020) is the newest release, and it looks up nine names in
modules that TensorFlow has since split. `MOVED_NAMES` tells which name moved
where; each one that is missing is set back to the very object that replaced
it, so nothing changes on a TensorFlow that still has it.

The bridge does not cover one case: `slim.batch_norm` with its default
`updates_collections` needs the removed tf.layers. Give it a list,
`updates_collections=[tf.GraphKeys.UPDATE_OPS]`, and it takes slim's own fused
path with the same names and numbers; `xception_arg_scope` does.

This module can go when a tf-slim is released that imports on current
TensorFlow as it is.
"""

import os

# Before TensorFlow is loaded: leaves warnings and errors, drops the C++ chatter.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')

import contextlib
import ctypes
import importlib
import re
import subprocess
import sys
import warnings

# Lines that TensorFlow 2.21 writes to file descriptor 2 at every start, whatever
# TF_CPP_MIN_LOG_LEVEL is; regular expressions that match from the beginning of a line.
KNOWN_LINES = (
    # Informational only: oneDNN is on by default.
    r'I\d{4} .* port\.cc:\d+\] oneDNN custom operations are on\.',
)
# Without an NVIDIA driver these only say that there is no GPU; with one, they say what is wrong.
KNOWN_LINES_WITHOUT_DRIVER = (
    r'I\d{4} .* cudart_stub\.cc:\d+\] Could not find cuda drivers on your machine',
    r'E\d{4} .* cuda_platform\.cc:\d+\] failed call to cuInit: INTERNAL: CUDA error: ',
)
# absl's heading over the first line that it logs: it is dropped if that line is.
ABSL_HEADING = rb'WARNING: All log messages before absl::InitializeLog\(\) is called'

NVIDIA_DRIVER_FILES = ('/proc/driver/nvidia/version', '/dev/nvidiactl', '/dev/dxg')  # dxg: WSL


def has_nvidia_driver():
  """Returns whether an NVIDIA driver is installed, be it working or broken."""
  if any(map(os.path.exists, NVIDIA_DRIVER_FILES)):
    return True
  try:
    ctypes.CDLL('libcuda.so.1')  # loads the library, but does not initialize CUDA
    return True
  except OSError:
    return False


@contextlib.contextmanager
def drop_known_lines():
  """Keeps the known lines off stderr while TensorFlow starts; all others pass unchanged.

  The lines are read by another process. A thread of this one would need the GIL, which
  `import tensorflow` holds while its C++ code runs: if that aborts, the reason would be lost.

  TF_CPP_MIN_LOG_LEVEL=0 shows everything.
  """
  stderr = reader = None
  # In a program made by PyInstaller, sys.executable is that program and not Python.
  if os.environ['TF_CPP_MIN_LOG_LEVEL'] != '0' and not getattr(sys, 'frozen', False):
    with contextlib.suppress(OSError):  # stderr is closed, or no process can be started
      stderr = os.dup(2)
      patterns = KNOWN_LINES + (() if has_nvidia_driver() else KNOWN_LINES_WITHOUT_DRIVER)
      reader = subprocess.Popen(
          [sys.executable, '-I', '-S', __file__, *patterns], stdin=subprocess.PIPE,
          start_new_session=True)  # Ctrl-C does not end it before this process
      os.dup2(reader.stdin.fileno(), 2)
  try:
    yield
  finally:
    if reader is not None:
      os.dup2(stderr, 2)
      reader.stdin.close()
      with contextlib.suppress(subprocess.TimeoutExpired):  # a child may hold the pipe open
        reader.wait(5)
    if stderr is not None:
      os.close(stderr)


def copy_unknown_lines(lines, patterns, output):
  """Writes every line that matches none of the patterns as soon as it is read.

  Args:
    lines: iterable of bytes.
    patterns: list of regular expressions, str.
    output: unbuffered binary file.
  """
  known = re.compile('|'.join(patterns).encode())
  heading = b''
  for line in lines:
    if re.match(ABSL_HEADING, line):
      output.write(heading)
      heading = line
      continue
    if not known.match(line):
      output.write(heading + line)
    heading = b''
  output.write(heading)


if __name__ == '__main__':  # the process that drop_known_lines starts
  with open(2, 'wb', buffering=0) as real_stderr:
    copy_unknown_lines(sys.stdin.buffer, sys.argv[1:], real_stderr)
  sys.exit()

with drop_known_lines():
  import tensorflow.compat.v1 as tf
  from tensorflow.python import pywrap_tfe
  # The first query for GPUs in a process initializes CUDA, or fails to. With a driver it is left
  # to the scripts, which may set CUDA_VISIBLE_DEVICES first and must show what goes wrong.
  if not has_nvidia_driver():
    # tf.config's query would create the eager context, whose mode tf.disable_v2_behavior() could
    # then no longer change for functions of tf.data.
    pywrap_tfe.TF_ListPhysicalDevices()

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
  import importlib.metadata  # slow to import, and hardly ever needed
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
