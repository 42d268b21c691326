"""Draws the results of an evaluation as PNG pictures, without a display.

Class names are drawn literally, without markup, in installed fonts that have
their characters; long names are shortened in the middle. A name with a
character that no installed font has is replaced by its number, like #3.
"""

import contextlib
import functools
import io
import logging
import math
import unicodedata

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from evaluation import metrics

BASE_FONT = 'DejaVu Sans'  # comes with matplotlib
GRID_COLUMNS = 6
MAX_GRID_IMAGES = 30
GRID_COLUMNS_WITH_MAPS = 3
MAX_NAME_WIDTH = 21  # columns of a terminal, see common/terminal.py
MAX_NUMBERED_CLASSES = 30  # up to this many, cells of the confusion matrix show their counts
MAX_NAMED_CLASSES = 120  # up to this many, its rows and columns show their names
MAX_CURVES = 20  # of more classes, those with the smallest areas are shown
NUM_CONFUSIONS = 20  # pairs listed beside a confusion matrix without counts
THUMBNAIL_SIZE = 128  # pixels of the longer side
MAX_SHEET_ROWS = 100  # classes on a contact sheet
RIGHT, WRONG = 'darkgreen', 'crimson'
MAP_COLOURS, MAP_OPACITY = 'inferno', 0.5
DPI = 100

# Silences matplotlib's message each time a fallback font lacks the requested weight.
logging.getLogger('matplotlib.font_manager').addFilter(
    lambda record: 'font weight' not in record.getMessage())


def draw_confusion_matrix(matrix, class_names):
  """Draws a confusion matrix, coloured by the share of each label's images.

  Args:
    matrix: int64 [num_classes (label), num_classes (prediction)].
    class_names: list of names.

  Returns:
    Bytes of a PNG file.
  """
  with _drawable_names(class_names) as names:
    side = _matrix_side(len(names))
    figure = Figure(figsize=(side, side))
    # The matrix fills the figure; saving it adds the space that the names need.
    axis = figure.add_axes((0, 0, 1, 1))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # The square root makes rare mistakes visible: 1 % of the images has 10 % of the colour.
    axis.imshow(np.sqrt(np.ma.masked_equal(shares, 0)), cmap='Blues', vmin=0, vmax=1, zorder=1)
    _label_axes(axis, names)
    if len(names) <= MAX_NUMBERED_CLASSES:
      for (row, column), count in np.ndenumerate(matrix):
        if count:
          axis.text(column, row, count, ha='center', va='center',
                    color='white' if shares[row, column] > 0.4 else 'black')
    else:
      _list_confusions(axis, matrix, names)
    correct, total = int(np.trace(matrix)), int(matrix.sum())
    axis.set_title(f'Accuracy: {correct / total:.4f} ({correct} of {total})')
    return _png(figure, bbox_inches='tight', pad_inches=0.2)


def _matrix_side(num_classes):
  """Returns the side of the confusion matrix in inches."""
  if num_classes <= MAX_NUMBERED_CLASSES:
    return max(2.5, 0.5 * num_classes)
  return min(0.15 * num_classes, 0.15 * MAX_NAMED_CLASSES)


def _label_axes(axis, names):
  """Labels the rows and columns of a confusion matrix with names."""
  axis.set_xlabel('prediction')
  axis.set_ylabel('label')
  num_classes = len(names)
  if num_classes > MAX_NAMED_CLASSES:
    return  # matplotlib's own numbers
  size = 10 if num_classes <= MAX_NUMBERED_CLASSES else 7
  axis.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
  axis.set_yticks(range(num_classes), names, fontsize=size)
  # Lines below the cells lead from a rare mistake to its names.
  axis.grid(color='0.9', linewidth=0.5)
  axis.set_axisbelow(True)


def _list_confusions(axis, matrix, names):
  """Lists the most frequent mistakes beside a confusion matrix without counts."""
  mistakes = matrix - np.diag(np.diag(matrix))
  order = np.argsort(-mistakes, axis=None, kind='stable')[:NUM_CONFUSIONS]
  lines = [f'{mistakes.flat[i]} x  {names[i // len(names)]}  →  {names[i % len(names)]}'
           for i in order if mistakes.flat[i]]
  axis.text(1.03, 1, '\n'.join(['Most frequent mistakes', '', *(lines or ['none'])]),
            va='top', linespacing=1.6, transform=axis.transAxes)


def draw_predictions(result, indices, class_names, title):
  """Draws images as the network saw them, with their predictions.

  Beside each image is its map, if there is one, laid over the image.

  Args:
    result: evaluator.Evaluation that has the images.
    indices: indices of the images, at most MAX_GRID_IMAGES.
    class_names: list of names.
    title: text above the images.

  Returns:
    Bytes of a PNG file.
  """
  with _drawable_names(class_names) as names:
    columns = GRID_COLUMNS_WITH_MAPS if result.maps else min(GRID_COLUMNS, max(len(indices), 3))
    rows = max(1, math.ceil(len(indices) / columns))
    width = 4.8 if result.maps else 2.4  # inches of a column
    figure = Figure(figsize=(width * columns, 3.1 * rows + 0.4), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
      axis.axis('off')
    for axis, index in zip(axes.flat, indices):
      label, probabilities = result.labels[index], result.probabilities[index]
      prediction = probabilities.argmax()
      text = f'{names[prediction]} {probabilities[prediction]:.2f}'
      if prediction != label:
        text += f'\nis {names[label]} {probabilities[label]:.2f}'
      image, below = result.images[index] / 2.0 + 0.5, f'record {result.positions[index]}'
      if result.maps:
        gap = np.ones_like(image[:, :len(image) // 24])
        overlay = _lay_over(image, result.maps[index])
        below += ', empty map' if overlay is image else ''
        image = np.concatenate([image, gap, overlay], axis=1)
      axis.imshow(image)
      axis.set_title(text, fontsize=9, color=RIGHT if prediction == label else WRONG)
      axis.text(0.5, -0.03, below, fontsize=7, color='grey',
                ha='center', va='top', transform=axis.transAxes)
    return _png(figure)


def draw_explanation(image, maps, labels, probabilities, class_names):
  """Draws an image and, beside it, the map of each of some classes laid over it.

  Args:
    image: float32 [height, width, 3] in [-1, 1].
    maps: float32 [num_maps, rows, columns], see `grad_cam.build_maps`.
    labels: num_maps ints, the classes of the maps.
    probabilities: their num_maps probabilities.
    class_names: list of the names of all classes.

  Returns:
    Bytes of a PNG file.
  """
  image = image / 2.0 + 0.5
  with _drawable_names(class_names) as names:
    columns = 1 + len(maps)
    figure = Figure(figsize=(3 * columns, 3.3), layout='constrained')
    first, *axes = figure.subplots(1, columns)
    first.imshow(image)
    first.set_title('as the network saw it', fontsize=10)
    for axis, grad_cam_map, label, probability in zip(axes, maps, labels, probabilities):
      overlay = _lay_over(image, grad_cam_map)
      axis.imshow(overlay)
      axis.set_title(f'{names[label]} {probability:.4f}'
                     + (', empty map' if overlay is image else ''), fontsize=10)
    for axis in figure.axes:
      axis.axis('off')
    return _png(figure)


def _lay_over(image, grad_cam_map):
  """Returns an image with a map laid over it, or the image itself if the map is empty.

  The map is scaled by its own maximum. The image is grey under it, so that all colours are the
  map's: black where it is 0, bright yellow where it is largest.

  Args:
    image: float [height, width, 3] in [0, 1].
    grad_cam_map: float32 [rows, columns] of 0 or more.
  """
  maximum = grad_cam_map.max()
  if not 0 < maximum < np.inf:  # the map of a network that diverged is NaN
    return image
  height, width = image.shape[:2]
  heat = np.asarray(Image.fromarray(grad_cam_map / maximum).resize(
      (width, height), Image.Resampling.BILINEAR))
  colours = matplotlib.colormaps[MAP_COLOURS](heat)[..., :3]
  return (1 - MAP_OPACITY) * image.mean(-1, keepdims=True) + MAP_OPACITY * colours


def draw_contact_sheet(thumbnails, class_names):
  """Draws a row of images for each class.

  Args:
    thumbnails: a list of uint8 [height, width, 3] for each of the first classes, up
      to MAX_SHEET_ROWS lists; the sides are up to THUMBNAIL_SIZE pixels.
    class_names: list of the names of all classes.

  Returns:
    Bytes of a PNG file.
  """
  rows, columns = len(thumbnails), max(1, *map(len, thumbnails))
  cell = THUMBNAIL_SIZE + 8
  # One array: thousands of axes would take minutes.
  sheet = np.full([rows * cell, columns * cell, 3], 255, np.uint8)
  for row, images in enumerate(thumbnails):
    for column, image in enumerate(images):
      height, width = image.shape[:2]
      sheet[row * cell:, column * cell:][:height, :width] = image
  with _drawable_names(class_names[:rows]) as names:
    figure = Figure(figsize=(columns * cell / DPI, rows * cell / DPI))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis('off')
    axis.imshow(sheet)
    for row, name in enumerate(names):
      axis.text(-8, (row + 0.5) * cell, name, ha='right', va='center')
    if rows < len(class_names):
      axis.set_title(f'The first {rows} of {len(class_names)} classes')
    return _png(figure, bbox_inches='tight', pad_inches=0.2)


def draw_curves(kind, result, values, class_names):
  """Draws the ROC or precision-recall curve of each class against all others.

  Args:
    kind: 'roc' or 'precision_recall'.
    result: evaluator.Evaluation.
    values: its curves.Curves.
    class_names: list of names.

  Returns:
    Bytes of a PNG file.
  """
  from sklearn import metrics as sklearn_metrics  # takes a second that --help does not have

  area, title, x_label, y_label = {
      'roc': ('roc_auc', 'ROC curves', 'false positive rate', 'true positive rate'),
      'precision_recall': ('average_precision', 'Precision-recall curves', 'recall', 'precision'),
  }[kind]
  areas, averages = getattr(values, area), values.averages[area]
  shown = [label for label in np.argsort(areas, kind='stable')[:MAX_CURVES]  # NaN comes last
           if not np.isnan(areas[label])]
  with _drawable_names(class_names) as names:
    figure = Figure(figsize=(5, 5))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlabel=x_label, ylabel=y_label, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.set_prop_cycle(color=matplotlib.colormaps['tab10' if len(shown) <= 10 else 'tab20'].colors)
    axis.grid(color='0.9', linewidth=0.5)
    for label in shown:
      truth, scores = result.labels == label, result.probabilities[:, label]
      if kind == 'roc':
        x, y, _ = sklearn_metrics.roc_curve(truth, scores)
      else:
        y, x, _ = sklearn_metrics.precision_recall_curve(truth, scores)
      axis.plot(x, y, label=f'{areas[label]:.4f}  {names[label]}')
    if shown:
      title += f'\nmean area: {averages["macro"]:.4f} macro, {averages["weighted"]:.4f} weighted'
      axis.legend(loc='upper left', bbox_to_anchor=(1.02, 1), frameon=False, alignment='left',
                  title='Area' if len(shown) == len(names) else
                  f'Smallest areas, {len(shown)} of {len(names)}')
    axis.set_title(title)
    return _png(figure, bbox_inches='tight', pad_inches=0.2)


def draw_calibration(calibration, scaled=None):
  """Draws a reliability diagram, with the number of images in each bin below it.

  Args:
    calibration: curves.Calibration.
    scaled: temperature.Scaled that is drawn beside it, or None.

  Returns:
    Bytes of a PNG file.
  """
  panels = [('', calibration)] if scaled is None else [
      ('As the network predicts\n', calibration),
      (f'At temperature {scaled.temperature:.4g}, fitted on {scaled.fitted_on}\n',
       scaled.calibration)]
  figure = Figure(figsize=(5 * len(panels), 6), layout='constrained')
  axes = figure.subplots(2, len(panels), sharex=True, sharey='row', squeeze=False,
                         height_ratios=[4, 1])
  edges = np.arange(len(calibration.num_images)) / len(calibration.num_images)
  for (upper, lower), (title, values) in zip(axes.T, panels):
    upper.bar(edges, np.nan_to_num(values.accuracy), 1 / len(edges), align='edge',
              color='tab:blue', edgecolor='white')
    upper.plot([0, 1], [0, 1], color='grey', linestyle='--', label='perfect calibration')
    upper.plot(values.confidence, values.accuracy, 'o', color='crimson', label='mean of a bin')
    upper.set(xlim=(0, 1), ylim=(0, 1.02),
              title=f'{title}Expected calibration error: {values.expected_error:.4f}')
    lower.bar(edges, values.num_images, 1 / len(edges), align='edge', color='0.6',
              edgecolor='white')
    lower.set(xlabel='probability of the predicted class')
  axes[0, 0].set(ylabel='accuracy')
  axes[0, 0].legend(loc='upper left', frameon=False)
  axes[1, 0].set(ylabel='images')
  return _png(figure)


def undrawable_names(class_names):
  """Returns the names that no installed font can draw."""
  _, undrawable = _fallback_fonts(''.join(map(_drop_unknown_marks, class_names)))
  return [name for name in class_names if undrawable.intersection(name)]


@contextlib.contextmanager
def _drawable_names(class_names):
  """Sets up matplotlib's fonts for class names; yields the texts to draw for them."""
  class_names = [_drop_unknown_marks(name) for name in class_names]
  families, undrawable = _fallback_fonts(''.join(class_names))
  with matplotlib.rc_context({
      'font.family': [BASE_FONT, *families],
      'text.parse_math': False,  # draws a $ as a $
  }):
    yield [f'#{label}' if undrawable.intersection(name) else metrics.shorten(name, MAX_NAME_WIDTH)
           for label, name in enumerate(class_names)]


def _drop_unknown_marks(name):
  """Removes invisible formatting characters, such as direction marks, that BASE_FONT lacks."""
  known = _coverage(font_manager.findfont(BASE_FONT))
  return ''.join(character for character in name
                 if unicodedata.category(character) != 'Cf' or ord(character) in known)


@functools.lru_cache(maxsize=8)
def _fallback_fonts(text):
  """Finds installed fonts for the characters of a text that BASE_FONT lacks.

  Returns:
    List of font families, and the set of characters that no font has.
  """
  missing = set(map(ord, text)) - _coverage(font_manager.findfont(BASE_FONT))
  if not missing:
    return [], set()
  installed = set(font_manager.findSystemFonts())
  # matplotlib caches its list of fonts, which lacks those installed since.
  for path in installed.difference(entry.fname for entry in font_manager.fontManager.ttflist):
    with contextlib.suppress(RuntimeError):  # a font that matplotlib cannot read
      font_manager.fontManager.addfont(path)
  upright = [entry for entry in font_manager.fontManager.ttflist
             if entry.fname in installed and entry.style == 'normal']
  families = []
  for entry in sorted(upright, key=lambda entry: -len(missing & _coverage(entry.fname))):
    if missing & _coverage(entry.fname):
      families.append(entry.name)
      missing -= _coverage(entry.fname)
  return families, set(map(chr, missing))


@functools.cache
def _coverage(path):
  """Returns the code points that a font file has glyphs for."""
  return frozenset(font_manager.get_font(path).get_charmap())


def _png(figure, **kwargs):
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=DPI, **kwargs)
  return png.getvalue()
