"""Tests that imports run downwards only, from scripts to the network, and never in a circle."""

import ast
import glob
import os

import tensorflow.compat.v1 as tf

from scripts import PROJECT

# Lowest first. A package imports itself and what stands on lower rows.
LAYERS = [
    {'slim_bridge'},
    {'xception', 'xception_preprocessing'},
    {'common'},
    {'records', 'cpu_kernels', 'conversion'},
    {'deployment'},
    {'evaluation', 'export'},
    {'training'},
    {'benchmarks', 'dataset'},
]
PACKAGES = {'common', 'conversion', 'records', 'cpu_kernels', 'deployment', 'evaluation', 'export',
            'training', 'benchmarks', 'dataset'}


def level(name):
  """Returns the row of a module or package; scripts are above all others."""
  for row, names in enumerate(LAYERS):
    if name in names:
      return row
  return len(LAYERS)


def imported_modules(path):
  """Returns the project's modules that a file imports, such as {'xception', 'common.files'}."""
  with open(path, encoding='utf-8') as f:
    tree = ast.parse(f.read())
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      found.update(f'{node.module}.{alias.name}' for alias in node.names)
  roots = PACKAGES | {os.path.basename(script)[:-3] for script in glob.glob(f'{PROJECT}/*.py')}
  return {name for name in found if name.partition('.')[0] in roots}


def project_imports():
  """Returns {module: the project's modules that it imports}, of scripts and packages."""
  paths = glob.glob(f'{PROJECT}/*.py') + [
      path for package in PACKAGES for path in glob.glob(f'{PROJECT}/{package}/*.py')]
  return {os.path.relpath(path, PROJECT)[:-3].replace('/', '.'): imported_modules(path)
          for path in paths}


class ImportsTest(tf.test.TestCase):

  def test_they_run_downwards(self):
    imports = project_imports()
    self.assertIn('common.checkpoints', imports['training.step'])  # the test does read them
    for module, others in imports.items():
      package = module.partition('.')[0]
      for other in others:
        other_package = other.partition('.')[0]
        if package != other_package:
          self.assertLess(level(other_package), level(package), f'{module} imports {other}')

  def test_none_goes_in_a_circle(self):
    imports = project_imports()

    def visit(module, above):
      self.assertNotIn(module, above)
      for other in imports.get(module, ()):
        visit(other, [*above, module])

    for module in imports:
      visit(module, [])

  def test_every_package_is_a_regular_one(self):
    # An installed package of the same name would win over a folder without __init__.py.
    for package in PACKAGES:
      self.assertTrue(os.path.exists(f'{PROJECT}/{package}/__init__.py'), package)
