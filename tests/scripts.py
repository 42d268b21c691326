"""Runs the project's scripts as a user does."""

import os
import subprocess
import sys
import unittest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATASET_DIR = os.path.join(PROJECT, 'dataset')

slow = unittest.skipUnless(os.environ.get('SLOW_TESTS'), 'make test-slow runs it')


def start(*args, cwd=PROJECT, **kwargs):
  """Starts a script of the project; its output is one stream of text.

  Args:
    *args: path of the script below the project, and its arguments.
    cwd: working folder.
    **kwargs: as for subprocess.Popen.
  """
  command = [sys.executable, os.path.join(PROJECT, args[0]), *args[1:]]
  return subprocess.Popen(command, cwd=cwd, **{
      'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True, **kwargs})


def run(*args, cwd=PROJECT):
  """Runs a script to its end; returns its exit code and what it printed."""
  process = start(*args, cwd=cwd)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output
