"""Checks in a real browser that TensorBoard shows everything of a short training run.

It needs Chromium, so `make test-browser` runs it and `make test` does not. The
environment variable SCREENSHOT=FILE.png takes a screenshot; LOG_DIR is an
existing log folder to use instead of training one.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from playwright import sync_api as playwright

import pipeline_test
from scripts import DATASET_DIR

BROWSERS = ['chromium', 'chromium-browser', 'google-chrome']
SCALARS = ['accuracy', 'average_precision', 'expected_calibration_error', 'images_per_second',
           'learning_rate', 'losses/cross_entropy', 'losses/regularization', 'losses/total_loss',
           'macro_f1', 'roc_auc']
IMAGES = ['calibration', 'confusion_matrix', *(f'distorted_images/image/{i}' for i in range(4)),
          'mistakes', 'precision_recall', 'predictions', 'roc']
TIMEOUT_MS = 60_000


def train_and_evaluate(log_dir):
  """Trains for two checkpoints and evaluates them."""
  for command in (
      [*pipeline_test.TRAIN, '--log_dir', log_dir, '--max_number_of_steps', '6',
       '--save_interval_steps', '3', '--save_summaries_secs', '0.001'],
      ['eval_flowers.py', '--dataset_dir', DATASET_DIR, '--log_dir', log_dir,
       '--watch', '--max_number_of_steps', '6', '--eval_on_cpu']):
    returncode, output = pipeline_test.run(*command)
    if returncode:
      raise AssertionError(output)


def start_tensorboard(log_dir):
  """Starts TensorBoard on 127.0.0.1; returns its process and its address."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'tensorboard.main', '--logdir', log_dir, '--host', '127.0.0.1',
       '--port', '0'], stderr=subprocess.PIPE, text=True)
  for line in process.stderr:
    if address := re.search(r'http://127\.0\.0\.1:\d+/', line):
      return process, address[0]
  raise AssertionError('TensorBoard ended without an address')


class TensorBoardTest(unittest.TestCase):

  @classmethod
  def setUpClass(cls):
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable:
      raise AssertionError(f'No {", ".join(BROWSERS)} found: apt install chromium')
    cls.log_dir = os.environ.get('LOG_DIR')
    if not cls.log_dir:
      folder = tempfile.mkdtemp()
      cls.addClassCleanup(shutil.rmtree, folder)
      cls.log_dir = os.path.join(folder, 'log')
      train_and_evaluate(cls.log_dir)

    process, cls.address = start_tensorboard(cls.log_dir)
    cls.addClassCleanup(process.stderr.close)
    cls.addClassCleanup(process.wait)
    cls.addClassCleanup(process.terminate)
    api = cls.enterClassContext(playwright.sync_playwright())
    # Chromium's sandbox does not work for root, as in most containers.
    browser = api.chromium.launch(executable_path=executable,
                                  chromium_sandbox=os.geteuid() != 0)
    cls.addClassCleanup(browser.close)
    cls.page = browser.new_page(viewport={'width': 1400, 'height': 900})
    cls.page.set_default_timeout(TIMEOUT_MS)

  def open(self, dashboard):
    self.page.goto('about:blank')  # changing only the fragment would not reload the page
    self.page.goto(f'{self.address}#{dashboard}')

  def filter_tags(self, tag):
    """Shows the cards of one tag in any group."""
    box = self.page.get_by_label('Filter tags (regular expressions supported)').locator(
        'visible=true')
    box.fill(f'^{tag}$')

  def expect_text(self, text):
    playwright.expect(
        self.page.get_by_text(text, exact=True).locator('visible=true').first).to_be_visible(
            timeout=TIMEOUT_MS)

  def test_scalars(self):
    self.open('scalars')
    for tag in SCALARS:
      self.filter_tags(tag)
      self.expect_text(f'tag: {tag}')
    for run in ('.', 'eval'):
      self.expect_text(run)

  def test_one_chart_has_both_curves(self):
    self.open('timeseries')
    rows = self.page.locator('scalar-card', has_text='accuracy').first.locator('tb-data-table')
    playwright.expect(rows).to_contain_text('eval', timeout=TIMEOUT_MS)
    if path := os.environ.get('SCREENSHOT'):
      self.page.get_by_role('button', name='Close side panel').or_(
          self.page.get_by_label('Close side pane')).first.click()
      self.page.wait_for_timeout(1000)
      self.page.screenshot(path=path)

  def test_images(self):
    self.open('images')
    for tag in IMAGES:
      self.filter_tags(tag)
      self.expect_text(f'tag: {tag}')
      image = self.page.locator('tf-image-loader img').locator('visible=true').first
      playwright.expect(image).to_be_visible(timeout=TIMEOUT_MS)
      self.page.wait_for_function('image => image.naturalWidth > 60', arg=image.element_handle())

  def test_graph(self):
    self.open('graphs')
    self.page.locator('tf-graph-scene').get_by_text('load_batch', exact=True).first.wait_for(
        state='attached')

  def test_text(self):
    self.open('text')
    self.expect_text('tag: metrics')
    table = self.page.locator('tf-text-loader pre').first
    playwright.expect(table).to_contain_text('precision  recall      f1  support',
                                             timeout=TIMEOUT_MS)
    playwright.expect(table).to_contain_text('weighted average')


if __name__ == '__main__':
  unittest.main()
