"""Writes files atomically, and computes their checksums."""

import hashlib
import os

PROJECT_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_atomically(path, content):
  """Writes bytes under a temporary name, then renames the file to `path`.

  A reader sees either the old file or the complete new one.
  """
  with open(path + '.tmp', 'wb') as f:
    f.write(content)
  os.replace(path + '.tmp', path)


def sha256(path):
  """Returns the SHA-256 of a file in lowercase hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
