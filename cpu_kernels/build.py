"""Compiles and loads `kernels.cc`, operations that make training on CPUs faster.

  kernels = build.load()

Compilation takes about ten seconds on first use and needs a C++ compiler; the library is kept
in `build/`. Without a compiler, training uses TensorFlow's own operations, which give the same
numbers up to rounding.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import tensorflow.compat.v1 as tf

from common import files

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'kernels.cc')
BUILD_DIR = os.path.join(files.PROJECT_DIR, 'build')
COMPILERS = ('c++', 'g++', 'clang++')
# The kernels use neither errno nor floating-point exceptions, which prevent vectorization. On
# processors with AVX512-FP16, TensorFlow's copy of Eigen does not compile unless that is hidden
# from it; TensorFlow itself is built without.
FLAGS = ('-O3', '-march=native', '-U__AVX512FP16__', '-fno-math-errno', '-fno-trapping-math',
         '-shared', '-fPIC')
TIMEOUT_SECS = 300

# The operations, whose images may all be bfloat16.
OPERATIONS = ('XceptionBatchNorm', 'XceptionBatchNormGrad', 'XceptionBatchNormDepthwise',
              'XceptionBatchNormDepthwiseGrad', 'XceptionDepthwise', 'XceptionDepthwiseGrad')


class BuildError(Exception):
  """The kernels cannot be compiled or loaded; the message says why."""


@functools.cache
def load():
  """Returns the module of the operations, or None after printing why there is none."""
  try:
    path = build_library(BUILD_DIR)
    try:
      return tf.load_op_library(path)
    except tf.errors.OpError as error:
      raise BuildError(f'{path} cannot be loaded: {error.message} Delete it to have it compiled '
                       'again') from error
  except BuildError as error:
    print(f'Training continues without {os.path.basename(SOURCE)}, more slowly: {error}',
          file=sys.stderr)
    return None


def build_library(folder):
  """Compiles the kernels, unless the folder holds them for this machine.

  Args:
    folder: where the library is kept; created if missing.

  Returns:
    The library's path. Its name depends on the source, TensorFlow, the C library and the
    processor, so that different machines may share the folder.

  Raises:
    BuildError: there is no compiler, it failed, or the folder is not writable.
  """
  with open(SOURCE, 'rb') as f:
    fingerprint = hashlib.sha256(f.read())
  for text in (tf.version.VERSION, tf.version.GIT_VERSION, *FLAGS, *platform.libc_ver(),
               platform.machine(), _processor()):
    fingerprint.update(text.encode() + b'\n')
  path = os.path.join(folder, f'kernels-{fingerprint.hexdigest()[:16]}.so')
  if os.path.exists(path):
    return path
  compiler = find_compiler()
  print(f'Compiling {os.path.basename(SOURCE)} (once)', file=sys.stderr)
  try:
    os.makedirs(folder, exist_ok=True)
    # Compiled in a scratch folder, then linked: other processes see a complete library or none,
    # and a library that one of them has loaded is never replaced.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      draft = os.path.join(scratch, 'kernels.so')
      _compile(compiler, draft)
      with open(draft, 'rb') as f:
        os.fsync(f.fileno())
      try:
        os.link(draft, path)
      except FileExistsError:
        pass  # another process was faster
      except OSError:  # a file system without links
        os.replace(draft, path)
  except OSError as error:
    raise BuildError(f'{folder} is not writable: {error.strerror}') from error
  return path


def find_compiler():
  """Returns the command of the C++ compiler as a list: CXX, or the first usual one found.

  Raises:
    BuildError: none is installed.
  """
  names = [os.environ['CXX']] if os.environ.get('CXX') else COMPILERS
  for name in names:
    command = shlex.split(name)
    if shutil.which(command[0]):
      return command
  raise BuildError(f'no C++ compiler found ({", ".join(names)}): install one (Debian and '
                   'Ubuntu: apt install g++), or set CXX')


def _compile(compiler, path):
  command = [*compiler, *FLAGS, *tf.sysconfig.get_compile_flags(), SOURCE, '-o', path,
             *tf.sysconfig.get_link_flags()]
  try:
    process = subprocess.run(command, capture_output=True, text=True, errors='replace',
                             timeout=TIMEOUT_SECS, env={**os.environ, 'LC_ALL': 'C'})
  except subprocess.TimeoutExpired as error:
    raise BuildError(f'{compiler[0]} took more than {TIMEOUT_SECS} s') from error
  except OSError as error:
    raise BuildError(f'{compiler[0]} cannot be run: {error.strerror}') from error
  if process.returncode or not os.path.exists(path):
    lines = process.stderr.strip().splitlines()
    errors = [line for line in lines if 'error: ' in line] or lines[-1:]
    raise BuildError(f'{compiler[0]} failed: {(errors or ["it wrote no library"])[0]}')


def _processor():
  """Returns a description of the processor's instruction sets."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      return next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    return platform.processor()
