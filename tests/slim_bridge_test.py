"""Tests of the bridge to tf-slim, and of what it keeps off stderr."""

import os
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import slim_bridge

ROOT = __file__.rsplit('tests', 1)[0] or '.'

HEADING = ('WARNING: All log messages before absl::InitializeLog() is called are written to '
           'STDERR\n')
ONEDNN = ('I0000 00:00:1795611601.587361    3666 port.cc:153] oneDNN custom operations are on. '
          'You may see slightly different numerical results due to floating-point round-off '
          'errors from different computation orders.\n')
CUDART = ('I0000 00:00:1795611601.587722    3666 cudart_stub.cc:31] Could not find cuda drivers '
          'on your machine, GPU will not be used.\n')
CUINIT = ('E0000 00:00:1795611606.265451    3666 cuda_platform.cc:52] failed call to cuInit: '
          'INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)\n')
UNKNOWN = 'E0000 00:00:1795611606.265451    3666 xla.cc:1] \u00fcnheard of: oneDNN, cuInit\n'


def run_python(code, **environ):
  return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                        check=False, env={**os.environ, **environ})


class SlimBridgeTest(unittest.TestCase):

  def test_importing_xception_is_enough_for_a_working_slim(self):
    result = run_python('''
import tensorflow.compat.v1 as tf  # what it warns of itself is not the bridge's
import warnings
warnings.simplefilter('error', DeprecationWarning)
import xception
import tf_slim as slim
with tf.Graph().as_default(), tf.Session() as session:
  net = slim.fully_connected(slim.flatten(slim.conv2d(tf.ones([1, 8, 8, 3]), 4, [3, 3])), 2)
  session.run(tf.global_variables_initializer())
  print(session.run(net).shape)
''')
    self.assertEqual(result.stdout, '(1, 2)\n', result.stderr)

  def test_restored_names_are_the_very_objects(self):
    result = run_python('''
import slim_bridge
from tensorflow.python.framework import ops, tensor
from tensorflow.python.ops import array_ops, array_ops_stack
print(ops.Tensor is tensor.Tensor, array_ops.stack is array_ops_stack.stack)
''')
    self.assertEqual(result.stdout, 'True True\n', result.stderr)

  def test_a_name_that_is_still_there_is_left_alone(self):
    result = run_python('''
import slim_bridge
from tensorflow.python.ops import array_ops
before = array_ops.concat
slim_bridge.restore_moved_names({('ops.array_ops', 'concat'): ('nowhere', 'nothing')})
print(array_ops.concat is before)
''')
    self.assertEqual(result.stdout, 'True\n', result.stderr)

  def test_an_unknown_tensorflow_is_an_import_error_with_versions(self):
    for home in ("('ops.array_ops', 'gone_too')", "('ops.no_such_module', 'name')"):
      result = run_python(f'''
import slim_bridge
try:
  slim_bridge.restore_moved_names({{('ops.array_ops', 'gone'): {home}}})
except ImportError as error:
  print(error)
''')
      self.assertRegex(result.stdout, r'tf-slim 1\.1\.0 on TensorFlow 2\.21\.\d+: '
                       r'tensorflow\.python\.ops\.array_ops\.gone is gone.*requirements\.txt')

  def test_a_slim_that_does_not_import_is_an_import_error_with_versions(self):
    # As if slim looked up one more name that TensorFlow has moved.
    result = run_python('''
import sys, types
class Broken:
  def find_spec(self, name, path=None, target=None):
    if name == 'tf_slim':
      raise AttributeError("module 'tensorflow.python.ops' has no attribute 'moved'")
sys.meta_path.insert(0, Broken())
try:
  import slim_bridge
except ImportError as error:
  print(error)
''')
    self.assertRegex(result.stdout, "tf-slim 1.1.0 on TensorFlow .*no attribute 'moved'.*"
                     'requirements.txt')

  def test_a_missing_slim_says_what_to_install(self):
    result = run_python('''
import sys
sys.modules['tf_slim'] = None
try:
  import slim_bridge
except ImportError as error:
  print(error)
''')
    self.assertEqual(result.stdout, 'tf_slim is not installed: '
                     'pip install -r requirements.txt\n', result.stderr)


class DropKnownLinesTest(unittest.TestCase):

  def stderr_of(self, text, has_driver=False, level='1', error=None):
    """Returns what arrives of text that is written to descriptor 2 where lines are dropped."""
    real_stderr = os.dup(2)
    self.addCleanup(os.close, real_stderr)
    with tempfile.TemporaryFile() as received, \
         mock.patch.object(slim_bridge, 'has_nvidia_driver', return_value=has_driver), \
         mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL=level):
      os.dup2(received.fileno(), 2)
      try:
        with slim_bridge.drop_known_lines():
          os.write(2, text.encode())
          if error:
            raise error
      finally:
        os.write(2, b'end')
        os.dup2(real_stderr, 2)
        received.seek(0)
        self.received = received.read().decode()
    return self.received

  def test_known_lines_are_dropped_with_their_heading(self):
    self.assertEqual(self.stderr_of(HEADING + ONEDNN + CUDART + HEADING + ONEDNN + CUINIT), 'end')

  def test_other_lines_pass_unchanged_and_in_order(self):
    self.assertEqual(self.stderr_of(f'first\r\n{ONEDNN}{UNKNOWN}{CUDART}\n {CUINIT}no newline'),
                     f'first\r\n{UNKNOWN}\n {CUINIT}no newlineend')

  def test_the_heading_stays_with_an_unknown_line(self):
    self.assertEqual(self.stderr_of(HEADING + HEADING + UNKNOWN + ONEDNN + HEADING),
                     HEADING + HEADING + UNKNOWN + HEADING + 'end')

  def test_more_than_a_pipe_holds_passes(self):
    self.assertEqual(self.stderr_of(UNKNOWN * 5000), UNKNOWN * 5000 + 'end')

  def test_with_a_driver_what_is_said_of_cuda_passes(self):
    self.assertEqual(self.stderr_of(HEADING + ONEDNN + HEADING + CUDART + CUINIT, has_driver=True),
                     HEADING + CUDART + CUINIT + 'end')

  def test_log_level_0_shows_everything(self):
    self.assertEqual(self.stderr_of(HEADING + ONEDNN + CUINIT, level='0'),
                     HEADING + ONEDNN + CUINIT + 'end')

  def test_an_exception_loses_nothing(self):
    with self.assertRaisesRegex(ImportError, 'broken'):
      self.stderr_of(UNKNOWN + HEADING, error=ImportError('broken'))
    self.assertEqual(self.received, UNKNOWN + HEADING + 'end')

  def test_no_descriptor_is_left_open(self):
    self.stderr_of('')
    before = os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else []
    self.stderr_of('')
    after = os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else []
    self.assertEqual(len(after) - len(before), 1)  # the one that is closed at the end of the test

  def test_where_no_process_can_be_started_everything_is_shown(self):
    with mock.patch.object(subprocess, 'Popen', side_effect=OSError):
      self.assertEqual(self.stderr_of(ONEDNN), ONEDNN + 'end')

  def test_the_reason_of_an_abort_arrives(self):
    # PyDLL holds the GIL, as the import of a C++ extension does.
    result = run_python(f'''
import ctypes, slim_bridge
libc = ctypes.PyDLL(None)
with slim_bridge.drop_known_lines():
  libc.write(2, {ONEDNN.encode()!r}, {len(ONEDNN)})
  libc.write(2, b"F0000 the reason\\n", 17)
  libc.abort()
''')
    self.assertEqual((result.returncode, result.stderr), (-6, 'F0000 the reason\n'))

  def test_a_closed_stderr_does_not_matter(self):
    result = subprocess.run(
        ['sh', '-c', '"$0" -c "import slim_bridge; print(slim_bridge.tf.__name__)" 2>&-',
         sys.executable], cwd=ROOT, capture_output=True, text=True, check=False)
    self.assertEqual((result.returncode, result.stdout), (0, 'tensorflow.compat.v1\n'))


class QuietStartTest(unittest.TestCase):

  CODE = '''
import slim_bridge, sys
import tensorflow.compat.v1 as tf
print('imported', file=sys.stderr, flush=True)
tf.config.list_physical_devices('GPU')
with tf.Graph().as_default(), tf.Session() as session:
  print(session.run(tf.constant(7)))
'''
  WITH_DRIVER = '''
import os
exists = os.path.exists
os.path.exists = lambda path: path == '/dev/nvidiactl' or exists(path)
''' + CODE

  @unittest.skipIf(slim_bridge.has_nvidia_driver(), 'this machine has an NVIDIA driver')
  def test_tensorflow_says_nothing_on_a_machine_without_a_gpu(self):
    result = run_python(self.CODE, TF_CPP_MIN_LOG_LEVEL='1')
    self.assertEqual((result.stdout, result.stderr), ('7\n', 'imported\n'))

  @unittest.skipIf(slim_bridge.has_nvidia_driver(), 'this machine has an NVIDIA driver')
  def test_with_a_driver_cuda_is_left_to_the_script_and_its_errors_are_shown(self):
    result = run_python(self.WITH_DRIVER, TF_CPP_MIN_LOG_LEVEL='1')
    self.assertRegex(result.stderr, r'^(I0000.*Could not find cuda drivers.*\n)+'
                     r'imported\n.*failed call to cuInit.*\n$')

  def test_the_query_for_gpus_leaves_graph_mode_to_the_scripts(self):
    result = run_python('''
import slim_bridge
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
dataset = tf.data.Dataset.range(1).map(lambda x: tf.numpy_function(lambda x: x, [x], tf.int64))
functions = tf.data.make_one_shot_iterator(dataset).get_next().graph.as_graph_def().library
print({node.device for function in functions.function for node in function.node_def
       if node.op == 'PyFunc'})
''')
    # In eager mode it would be /job:localhost, which a worker of a cluster does not have.
    self.assertEqual(result.stdout, "{''}\n", result.stderr)

  def test_log_level_0_shows_what_tensorflow_says(self):
    result = run_python(self.CODE, TF_CPP_MIN_LOG_LEVEL='0')
    self.assertIn('oneDNN custom operations are on', result.stderr)


if __name__ == '__main__':
  unittest.main()
