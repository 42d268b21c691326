"""Tests of the pictures: what is drawn where, and how class names are drawn."""

import io
from unittest import mock
import warnings

import matplotlib
from matplotlib import font_manager
import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

from evaluation import curves
from evaluation import evaluator
from evaluation import pictures
from evaluation import temperature

DARK_BLUE = (8, 48, 107)  # the upper end of matplotlib's Blues


def pixels(png):
  """Decodes a PNG file; uint8 [height, width, 3]."""
  return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def is_colour(image, colour):
  return np.abs(image.astype(int) - colour).max(-1) <= 2


def box(mask):
  """Returns top, bottom, left and right of the pixels that are True."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return rows[0], rows[-1], columns[0], columns[-1]


def texts_of(draw, *args):
  """Draws a picture; returns its visible texts and the PNG file."""
  figures = []

  def keep(figure, **kwargs):
    figures.append(figure)
    return png(figure, **kwargs)

  png = pictures._png
  with mock.patch.object(pictures, '_png', keep), warnings.catch_warnings():
    warnings.simplefilter('error')  # matplotlib warns of a missing glyph
    content = draw(*args)
  figure, = figures
  texts = list(figure.texts)
  for axis in figure.axes:
    texts += [axis.title, *axis.texts]
    if axis.axison:
      texts += [axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels(),
                *axis.get_yticklabels()]
  return [text.get_text() for text in texts if text.get_text()], content


class ConfusionMatrixTest(tf.test.TestCase):

  def test_cells_are_where_they_belong(self):
    # All images of class 0 are predicted as class 2.
    png = pictures.draw_confusion_matrix(np.array([[0, 0, 9], [0, 0, 0], [0, 0, 0]]), list('abc'))
    top, bottom, left, right = box(is_colour(pixels(png), DARK_BLUE))
    height, width = bottom - top + 1, right - left + 1
    self.assertBetween(height, 78, 86)  # a third of 2.5 inches at 100 dots
    self.assertBetween(width, 78, 86)
    self.assertLess(top, 60)  # in the first row, below the title
    self.assertGreater(left, 200)  # in the last column

  def test_small_matrix_shows_counts_and_names(self):
    matrix = np.array([[7, 2], [0, 11]])
    texts, _ = texts_of(pictures.draw_confusion_matrix, matrix, ['daisy', 'rose'])
    self.assertContainsSubset(['7', '2', '11', 'daisy', 'rose', 'label', 'prediction',
                               'Accuracy: 0.9000 (18 of 20)'], texts)
    self.assertNotIn('0', texts)

  def test_large_matrix_lists_the_mistakes(self):
    matrix = np.diag(np.full(100, 20))
    matrix[3, 14] = 6
    matrix[15, 9] = 2
    names = [f'species {i}' for i in range(100)]
    texts, png = texts_of(pictures.draw_confusion_matrix, matrix, names)
    self.assertIn('Most frequent mistakes\n\n6 x  species 3  →  species 14\n'
                  '2 x  species 15  →  species 9', texts)
    self.assertContainsSubset(names, texts)
    self.assertNotIn('20', texts)
    height, width, _ = pixels(png).shape
    self.assertGreater(height, 1500)
    self.assertGreater(width, height)

  def test_very_many_classes_are_numbered(self):
    texts, png = texts_of(pictures.draw_confusion_matrix, np.eye(1000, dtype=np.int64),
                          [f'class {i}' for i in range(1000)])
    self.assertContainsSubset(['0', '200', '800'], texts)
    self.assertNotIn('class 0', texts)
    self.assertLess(max(pixels(png).shape), 3000)


class PredictionsTest(tf.test.TestCase):

  def result(self):
    images = {0: np.full([8, 8, 3], [1.0, -1.0, -1.0]), 2: np.full([8, 8, 3], [-1.0, -1.0, 1.0])}
    return evaluator.Evaluation(
        labels=np.array([0, 1, 1]),
        probabilities=np.array([[0.9, 0.1], [0.2, 0.8], [0.75, 0.25]], np.float32),
        losses=np.zeros(3), logits=None, positions=np.array([0, 4, 7]), images=images, mistakes=[2],
        uses_averages=None)

  def test_images_names_probabilities_and_records(self):
    texts, png = texts_of(pictures.draw_predictions, self.result(), [2, 0], ['daisy', 'rose'],
                          'All')
    self.assertCountEqual(texts, ['All', 'daisy 0.75\nis rose 0.25', 'daisy 0.90', 'record 7',
                                  'record 0'])
    image = pixels(png)
    blue, red = box(is_colour(image, (0, 0, 255))), box(is_colour(image, (255, 0, 0)))
    for top, bottom, left, right in (blue, red):
      self.assertBetween(bottom - top, 180, 240)
      self.assertBetween(right - left, 180, 240)
    self.assertLess(blue[3], red[2])  # in the given order, the blue one first

  def test_no_mistakes(self):
    texts, png = texts_of(pictures.draw_predictions, self.result(), [], ['daisy', 'rose'],
                          'No mistakes')
    self.assertEqual(texts, ['No mistakes'])
    self.assertLess(pixels(png).mean(), 255)


class MapsTest(tf.test.TestCase):

  def test_overlay(self):
    # Bilinear between the centres of the cells, each 4 pixels wide and 2 high.
    image = np.random.default_rng(0).uniform(size=[2, 8, 3])
    overlay = pictures._lay_over(image, np.array([[0, 3]], np.float32))
    heat = np.interp(np.arange(8) + 0.5, [2, 6], [0, 1])
    for column, value in enumerate(heat):
      colour = matplotlib.colormaps['inferno'](value)[:3]
      for row in range(2):
        self.assertAllClose(overlay[row, column], image[row, column].mean() / 2 + np.array(
            colour) / 2, atol=5e-3)  # a colour map has 256 colours

  def test_empty_map_leaves_the_image(self):
    image = np.zeros([4, 4, 3])
    for value in (0, np.nan, np.inf):
      self.assertIs(pictures._lay_over(image, np.full([2, 2], value, np.float32)), image)

  def test_maps_beside_images(self):
    result = PredictionsTest().result()._replace(
        maps={0: np.zeros([2, 2], np.float32), 2: np.array([[0, 0], [0, 9]], np.float32)})
    texts, png = texts_of(pictures.draw_predictions, result, [2, 0], ['daisy', 'rose'], 'All')
    self.assertContainsSubset(['record 7', 'record 0, empty map', 'daisy 0.90'], texts)
    image = pixels(png)
    blue, red = (is_colour(image, colour) for colour in ((0, 0, 255), (255, 0, 0)))
    self.check_hot_corner(image, box(blue))
    # The red image and its empty map look the same; between them is a gap.
    top, bottom, left, right = box(red)
    self.assertBetween((right - left) / (bottom - top), 1.9, 2.2)
    self.assertLess(box(blue)[3], left)

  def check_hot_corner(self, image, original):
    """Checks that the map right of a blue image has its maximum in the lower right corner."""
    hot = np.array([1 / 3] * 3) / 2 + np.array(matplotlib.colormaps['inferno'](1.0)[:3]) / 2
    top, bottom, left, right = original
    side = bottom - top
    hot_top, hot_bottom, hot_left, hot_right = box(is_colour(image, hot * 255))
    self.assertBetween(hot_left - right, 0.6 * side, side)
    self.assertBetween(hot_right - right, side - 2, 1.2 * side)
    self.assertBetween(hot_top - top, 0.6 * side, 0.9 * side)
    self.assertBetween(hot_bottom - bottom, -2, 2)
    cold = image[top + side // 4, right + side // 3]
    self.assertAllClose(cold, np.array([1, 1, 1]) / 6 * 255, atol=3)  # black over a dark grey

  def test_explanation(self):
    maps = np.array([[[0, 0], [0, 9]], [[0, 0], [0, 0]]], np.float32)
    blue = np.full([8, 8, 3], [-1.0, -1.0, 1.0])
    texts, png = texts_of(pictures.draw_explanation, blue, maps, [2, 0], [0.75, 0.125],
                          ['daisy', 'rose', 'tulip'])
    self.assertEqual(texts, ['as the network saw it', 'tulip 0.7500', 'daisy 0.1250, empty map'])
    image = pixels(png)
    # The image itself is the first picture, and the last one, whose map is empty.
    first = image.copy()
    first[:, 300:] = 255
    self.check_hot_corner(image, box(is_colour(first, (0, 0, 255))))
    self.assertGreater(box(is_colour(image, (0, 0, 255)))[2:][1], 850)


class CurvesTest(tf.test.TestCase):

  def draw(self, kind, num_classes):
    """Draws curves that are perfect but for class 0; returns areas, axis, title and texts."""
    labels = np.repeat(np.arange(num_classes), 3)
    probabilities = np.eye(num_classes)[labels]
    probabilities[:, 0] = 0.1 * (labels != 0)
    result = evaluator.Evaluation(labels, probabilities, None, None, None, {}, [], None)
    found = curves.compute(labels, probabilities)
    names = [f'species {i}' for i in range(num_classes)]
    figures = []
    with mock.patch.object(pictures, '_png', lambda figure, **_: figures.append(figure)):
      pictures.draw_curves(kind, result, found, names)
    axis, = figures[0].axes
    legend = axis.get_legend()
    return found, axis, legend.get_title().get_text(), [text.get_text() for text in legend.texts]

  def test_few_classes(self):
    for kind, name in (('roc', 'roc_auc'), ('precision_recall', 'average_precision')):
      found, axis, title, texts = self.draw(kind, 5)
      areas = getattr(found, name)
      self.assertEqual(title, 'Area')
      self.assertLess(areas[0], 0.5)
      self.assertCountEqual(texts, [f'{area:.4f}  species {i}' for i, area in enumerate(areas)])
      self.assertEqual(texts[0], f'{areas[0]:.4f}  species 0')  # the worst one first
      self.assertIn(f'mean area: {areas.mean():.4f} macro', axis.get_title())

  def test_many_classes_show_the_worst(self):
    _, axis, title, texts = self.draw('roc', 100)
    self.assertEqual(title, 'Smallest areas, 20 of 100')
    self.assertLen(axis.lines, 20)
    self.assertEqual(texts[0].split(maxsplit=1)[1], 'species 0')

  def test_calibration(self):
    labels, probabilities = np.array([0, 1, 1]), np.array([[0.95, 0.05], [0.35, 0.65], [0.6, 0.4]])
    figures = []
    with mock.patch.object(pictures, '_png', figures.append):
      pictures.draw_calibration(curves.calibrate(labels, probabilities))
    upper, lower = figures[0].axes
    self.assertEqual(upper.get_title(), 'Expected calibration error: 0.1000')
    self.assertAllClose([bar.get_height() for bar in upper.patches], [0] * 6 + [0.5, 0, 0, 1])
    self.assertEqual([bar.get_height() for bar in lower.patches], [0] * 6 + [2, 0, 0, 1])

  def test_calibration_at_a_temperature(self):
    labels, logits = np.array([0, 1, 1]), np.array([[2, -1], [0, 1], [0, 0.1]])
    before, after = (temperature.scale(labels, logits, value, 'test') for value in (1.0, 2.5))
    figures = []
    with mock.patch.object(pictures, '_png', figures.append):
      pictures.draw_calibration(before.calibration, after)
    upper_left, upper_right, lower_left, lower_right = figures[0].axes
    self.assertEqual(upper_left.get_title(), 'As the network predicts\n'
                     f'Expected calibration error: {before.calibration.expected_error:.4f}')
    self.assertEqual(upper_right.get_title(), 'At temperature 2.5, fitted on test\n'
                     f'Expected calibration error: {after.calibration.expected_error:.4f}')
    # Probabilities 0.953, 0.731 and 0.525, then 0.769, 0.599 and 0.510; all are right.
    for upper, lower, bins in [(upper_left, lower_left, [5, 7, 9]),
                               (upper_right, lower_right, [5, 5, 7])]:
      counts = np.bincount(bins, minlength=10)
      self.assertAllEqual([bar.get_height() for bar in lower.patches], counts)
      self.assertAllEqual([bar.get_height() for bar in upper.patches], np.minimum(counts, 1))


class NamesTest(tf.test.TestCase):

  def names_drawn(self, names):
    texts, _ = texts_of(pictures.draw_confusion_matrix, np.eye(len(names), dtype=np.int64), names)
    return texts

  def test_names_are_drawn_literally(self):
    names = ['Gänseblümchen', 'кульбаба', 'τουλίπα', '$x_1$ and $5', 'a\\b {c}', '100 %']
    self.assertEqual(pictures.undrawable_names(names), [])
    self.assertContainsSubset(names, self.names_drawn(names))

  def test_invisible_characters(self):
    names = ['می\u200cخواهم', '\u2067rose\u2069']
    self.assertEqual(pictures.undrawable_names(names), [])
    self.assertContainsSubset([names[0], 'rose'], self.names_drawn(names))

  def test_long_names_keep_their_ends(self):
    texts = self.names_drawn(['beetle_' * 10 + 'larva_1', 'beetle_' * 10 + 'larva_2'])
    self.assertContainsSubset(['beetle_bee…le_larva_1', 'beetle_bee…le_larva_2'], texts)

  def test_names_without_a_font_become_numbers(self):
    names = ['daisy', 'sun \U000F1234', '\U000F1235']  # private use, so no font has them
    self.assertEqual(pictures.undrawable_names(names), names[1:])
    texts = self.names_drawn(names)
    self.assertContainsSubset(['daisy', '#1', '#2'], texts)

  def test_fallback_font(self):
    # DejaVu Serif plays a font of another script, which DejaVu Sans seems to lack.
    pictures._fallback_fonts.cache_clear()
    self.addCleanup(pictures._fallback_fonts.cache_clear)
    fallback = font_manager.findfont('DejaVu Serif')
    base = font_manager.findfont(pictures.BASE_FONT)
    coverage = pictures._coverage

    def without_cyrillic(path):
      return coverage(path) - set(range(0x400, 0x500)) if path == base else coverage(path)

    with mock.patch.object(pictures, '_coverage', without_cyrillic), \
         mock.patch.object(font_manager, 'findSystemFonts', return_value=[str(fallback)]):
      families, undrawable = pictures._fallback_fonts('роза')
    self.assertEqual((families, undrawable), (['DejaVu Serif'], set()))
