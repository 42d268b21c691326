"""Compiles `fast_kernels.cc`, operations that make training on CPUs faster, and loads them.

  kernels = fast_kernels.load()

That takes some ten seconds at the first use and needs a C++ compiler; `build/` keeps
what was compiled. Without a compiler training uses TensorFlow's own operations, whose
numbers are the same to rounding.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import tensorflow.compat.v1 as tf

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'fast_kernels.cc')
BUILD_DIR = os.path.join(os.path.dirname(SOURCE), 'build')
COMPILERS = ('c++', 'g++', 'clang++')
# Nothing here reads errno or floating-point exceptions, and vectors need them gone.
FLAGS = ('-O3', '-march=native', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC')
TIMEOUT_SECS = 300

# The operations, all of whose images may be bfloat16.
OPERATIONS = ('XceptionBatchNorm', 'XceptionBatchNormGrad', 'XceptionDepthwise',
              'XceptionDepthwiseGrad')


class BuildError(Exception):
  """The operations cannot be compiled or loaded; the message says why."""


@functools.cache
def load():
  """Returns the module of the operations, or None, said once, where there are none."""
  try:
    return tf.load_op_library(build(BUILD_DIR))
  except (BuildError, tf.errors.OpError) as error:
    print(f'Training goes on without {os.path.basename(SOURCE)}, slower: {error}',
          file=sys.stderr)
    return None


def build(folder):
  """Compiles the operations, unless the folder has them for this machine.

  Args:
    folder: where the library is kept; made if missing.

  Returns:
    The library's path. Its name tells source, TensorFlow, compiler and processor
    apart: the folder may be shared by machines that differ.

  Raises:
    BuildError: there is no compiler, it failed, or the folder cannot be written.
  """
  compiler = find_compiler()
  with open(SOURCE, 'rb') as f:
    fingerprint = hashlib.sha256(f.read())
  for text in (tf.version.GIT_VERSION, compiler, *FLAGS, platform.machine(), _processor()):
    fingerprint.update(text.encode() + b'\n')
  path = os.path.join(folder, f'fast_kernels-{fingerprint.hexdigest()[:16]}.so')
  if os.path.exists(path):
    return path
  print(f'Compiling {os.path.basename(SOURCE)}, once', file=sys.stderr)
  try:
    os.makedirs(folder, exist_ok=True)
    # Compiled beside its place and renamed: another process sees all of it or nothing.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      draft = os.path.join(scratch, 'fast_kernels.so')
      _compile(compiler, draft)
      os.replace(draft, path)
  except OSError as error:
    raise BuildError(f'{folder} cannot be written: {error.strerror}') from error
  return path


def find_compiler():
  """Returns the path of the C++ compiler: that of the environment's CXX, or a usual one.

  Raises:
    BuildError: there is none.
  """
  names = [os.environ['CXX']] if os.environ.get('CXX') else COMPILERS
  for name in names:
    if path := shutil.which(name):
      return path
  raise BuildError(f'no C++ compiler found ({", ".join(names)}); one of your system\'s packages '
                   'has it (Debian and Ubuntu: apt install g++), or name one in CXX')


def _compile(compiler, path):
  command = [compiler, *FLAGS, *tf.sysconfig.get_compile_flags(), SOURCE, '-o', path,
             *tf.sysconfig.get_link_flags()]
  try:
    process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECS)
  except subprocess.TimeoutExpired as error:
    raise BuildError(f'{compiler} took more than {TIMEOUT_SECS} s') from error
  if process.returncode:
    errors = [line for line in process.stderr.splitlines() if 'error' in line]
    raise BuildError(f'{compiler} failed: {(errors or ["without a message"])[0]}')


def _processor():
  """Returns what tells processors with other instructions apart, or nothing."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      return next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    return platform.processor()
