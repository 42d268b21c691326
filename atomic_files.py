"""Writes files that are never seen half written."""

import os


def write(path, content):
  """Writes bytes under a temporary name, then renames the file to `path`."""
  with open(path + '.tmp', 'wb') as f:
    f.write(content)
  os.replace(path + '.tmp', path)
