"""Writes files atomically, checks folders, and computes checksums."""

import contextlib
import hashlib
import os

PROJECT_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_atomically(path, content):
  """Writes bytes under a temporary name, then renames the file to `path`.

  A reader sees either the old file or the complete new one.

  Raises:
    OSError: it cannot be written; nothing of it is left.
  """
  temporary = path + '.tmp'
  try:
    with open(temporary, 'wb') as f:
      f.write(content)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise OSError(error.errno, error.strerror, path) from error


def require_writable(folder):
  """Raises an OSError if a folder can be neither written nor created."""
  existing = os.path.abspath(folder)
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing)
  if not os.path.isdir(existing):
    raise NotADirectoryError(f'Cannot write results into {folder}: {existing} is not a folder')
  if not os.access(existing, os.W_OK | os.X_OK):
    raise PermissionError(f'Cannot write results into {folder}: {existing} is read-only')


def sha256(path):
  """Returns the SHA-256 of a file in lowercase hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
