"""Evaluates a split and writes the results to files and to TensorBoard."""

import csv
import dataclasses
import io
import itertools
import json
import os
import sys

import numpy as np
import tensorflow.compat.v1 as tf

from common import checkpoints
from common import files
from evaluation import curves
from evaluation import evaluator
from evaluation import metrics
from evaluation import pictures
from evaluation import temperature
from records import flowers

# Keeps the loss finite where a probability is rounded to 0.
MIN_PROBABILITY = np.finfo(np.float32).tiny


def write(folder, writer, result, computed, scaled, picture_indices, class_names, about):
  """Writes the files and events of one evaluation.

  Args:
    folder: folder of the files.
    writer: tf.summary.FileWriter.
    result: evaluator.Evaluation.
    computed: its metrics.Metrics.
    scaled: its temperature.Scaled, or None.
    picture_indices: indices of the images in predictions.png.
    class_names: list of names.
    about: dict that describes the evaluation in metrics.json; has global_step.

  Returns:
    values: dict of the entries of metrics.json.
    files: names of the files.
  """
  found = curves.compute(result.labels, result.probabilities)
  drawn = _draw_pictures(result, computed, found, scaled, picture_indices, class_names)
  values = {**metrics.to_dict(computed, class_names), **curves.to_dict(found),
            'calibrated': scaled and temperature.to_dict(scaled), **about}
  for entry, areas in zip(values['classes'], values.pop('areas')):
    entry.update(areas)
  text = json.dumps(values, indent=2, ensure_ascii=False) + '\n'
  contents = {
      # Bytes of a path that are not UTF-8 become JSON escapes.
      'metrics.json': text.encode(errors='backslashreplace'),
      'predictions.csv': _format_predictions(result, class_names).encode(),
      **{f'{name}.png': png for name, png in drawn.items()},
  }
  for name, content in contents.items():
    files.write_atomically(os.path.join(folder, name), content)
  table = metrics.format_table(computed, class_names)
  if found.thresholds:
    table += f'\n\n{curves.format_thresholds(found.thresholds)}'
  _write_events(writer, computed, found, scaled, drawn, table, about['global_step'])
  return values, list(contents)


def _format_predictions(result, class_names):
  """Returns an Evaluation as CSV text with one line per image.

  The columns are `record` (the image's number in the split), `label`,
  `prediction` (ids of labels.txt) and a probability for each class, headed
  like 0:daisy, with enough digits to restore the same float32.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['record', 'label', 'prediction',
                   *(f'{label}:{name}' for label, name in enumerate(class_names))])
  for position, label, probabilities in zip(result.positions, result.labels,
                                            result.probabilities):
    writer.writerow([position, label, probabilities.argmax(),
                     *(f'{probability:.9g}' for probability in probabilities)])
  return text.getvalue()


def _draw_pictures(result, computed, found, scaled, picture_indices, class_names):
  """Returns {name: bytes of a PNG file} of the pictures of an Evaluation."""
  num_mistakes = computed.num_images - computed.num_correct
  return {
      'confusion_matrix': pictures.draw_confusion_matrix(computed.confusion_matrix, class_names),
      'mistakes': pictures.draw_predictions(
          result, result.mistakes, class_names,
          f'The most confident of {num_mistakes} mistakes' if num_mistakes else 'No mistakes'),
      'predictions': pictures.draw_predictions(
          result, picture_indices, class_names, 'Images from the whole split'),
      'roc': pictures.draw_curves('roc', result, found, class_names),
      'precision_recall': pictures.draw_curves('precision_recall', result, found, class_names),
      'calibration': pictures.draw_calibration(found.calibration, scaled),
  }


def _write_events(writer, computed, found, scaled, drawn, table, step):
  """Adds metrics, pictures and the table to TensorBoard at the checkpoint's step."""
  # Tags of train_flowers.py, so that both curves share one chart.
  scalars = {'accuracy': computed.accuracy, 'losses/cross_entropy': computed.loss,
             'macro_f1': computed.macro_average.f1,
             'expected_calibration_error': found.calibration.expected_error}
  scalars.update({name: averages['macro'] for name, averages in found.averages.items()
                  if averages['macro'] is not None})
  if computed.top_5_accuracy is not None:
    scalars['top_5_accuracy'] = computed.top_5_accuracy
  if scaled:
    scalars.update({
        'calibrated/temperature': scaled.temperature, 'calibrated/cross_entropy': scaled.loss,
        'calibrated/expected_calibration_error': scaled.calibration.expected_error})
  values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
  values += [tf.Summary.Value(tag=tag, image=tf.Summary.Image(encoded_image_string=png))
             for tag, png in drawn.items()]
  text_metadata = tf.SummaryMetadata(
      plugin_data=tf.SummaryMetadata.PluginData(plugin_name='text'))
  # Markdown keeps the columns of lines that are indented by four spaces.
  markdown = '\n'.join(f'    {line}' for line in table.splitlines())
  values.append(tf.Summary.Value(tag='metrics', metadata=text_metadata,
                                 tensor=tf.make_tensor_proto(markdown.encode())))
  writer.add_summary(tf.Summary(value=values), step)
  writer.flush()


def _report_bad_records(dataset, bad_numbers):
  """Warns of records that could not be evaluated, and of truncated shards."""
  for damage in dataset.records.damages[:flowers.MAX_NAMED_BAD_RECORDS]:
    print(f'Warning: {damage}', file=sys.stderr)
  for number in bad_numbers[:flowers.MAX_NAMED_BAD_RECORDS]:
    print(f'Warning: not evaluated: {flowers.describe_bad_record(dataset, number)}',
          file=sys.stderr)
  if bad_numbers:
    print(f'Warning: {len(bad_numbers)} of {dataset.num_samples} records are bad and left out',
          file=sys.stderr)


def holds_metrics_of_training(folder):
  """Returns whether a folder is the `best` of a training run, which keeps its metrics there."""
  try:
    with open(os.path.join(folder, 'metrics.json'), encoding='utf-8') as f:
      return 'dataset_split_name' not in json.load(f)
  except (OSError, ValueError, TypeError):
    return False


class SplitEvaluation:
  """Evaluates networks on a split and writes the results.

  Attributes:
    class_names: names of the split's classes.
  """

  def __init__(self, dataset, log_eval, batch_size, about):
    """Initializes it; nothing is written before the first result.

    Args:
      dataset: slim Dataset from `flowers.get_split`.
      log_eval: folder of the results; created if missing.
      batch_size: images per step.
      about: dict of further entries of metrics.json.

    Raises:
      OSError: log_eval cannot be written.
    """
    files.require_writable(log_eval)
    if log_eval.encode(errors='ignore').decode() != log_eval:
      raise OSError(f'TensorFlow cannot write events into {log_eval!r}, which is not UTF-8')
    self.class_names = [name for _, name in sorted(dataset.labels_to_names.items())]
    self._dataset = dataset
    self._log_eval = log_eval
    self._batch_size = batch_size
    self._about = about
    self._writer = None
    num_pictures = min(pictures.MAX_GRID_IMAGES, dataset.num_samples)
    self._picture_indices = np.linspace(
        0, dataset.num_samples - 1, num_pictures).astype(int).tolist()

  def of_checkpoints(self, devices, use_averages, image_size=None, explain_layer=None,
                     fit_temperature=False):
    """Returns a function that evaluates the checkpoints of a training run, one per call.

    The function takes a checkpoint's path and returns what `_report` returns. It
    raises a checkpoints.CheckpointError if the checkpoint cannot be read or
    belongs to another model or dataset.

    Args:
      devices, use_averages: see `evaluator.Evaluator`.
      image_size: height and width of the images in pixels; None is the size that
        the network was trained with.
      explain_layer: see `evaluator.Evaluator`; the pictures then show the maps.
      fit_temperature: whether to fit a temperature and store it beside the checkpoint;
        the function then also raises a temperature.TemperatureError or an OSError.
        Otherwise a temperature that is stored there is used.
    """
    config = evaluate_checkpoint = None

    def evaluate(checkpoint):
      nonlocal config, evaluate_checkpoint
      if fit_temperature:
        files.require_writable(os.path.dirname(checkpoint) or '.')
      found = checkpoints.load_config(checkpoint)
      found = dataclasses.replace(found, image_size=image_size or found.image_size)
      if found != config:
        if evaluate_checkpoint:  # the folder belongs to another training run now
          evaluate_checkpoint.close()
        config = found
        self._check_classes(checkpoint, config.class_names)
        evaluate_checkpoint = evaluator.Evaluator(
            self._dataset, config, self._batch_size, devices, show_progress=True,
            explain_layer=explain_layer)
      about = {'checkpoint': checkpoint, 'checkpoint_sha256': checkpoints.sha256(checkpoint),
               'global_step': checkpoints.global_step(checkpoint)}
      result = evaluate_checkpoint(checkpoint, use_averages, self._picture_indices,
                                   pictures.MAX_GRID_IMAGES)
      about = {**about, 'image_size': config.image_size, 'uses_averages': result.uses_averages}
      scaled = self._scale(result, about, fit_temperature)
      computed, values, file_names = self._report(result, about, scaled)
      if fit_temperature:
        self._store_temperature(about, values)
      return computed, values, file_names
    return evaluate

  def of_frozen_model(self, path, model):
    """Evaluates a frozen model; returns what `_report` returns.

    Args:
      path: the model's path, for the report.
      model: export.models.FrozenModel that takes pixels.

    Raises:
      checkpoints.CheckpointError: the model has other classes.
    """
    self._check_classes(path, model.class_names)

    def predict(batches):
      for images, labels, _ in batches:
        probabilities = model.predict(images)
        logits = np.log(np.maximum(probabilities, MIN_PROBABILITY))
        yield probabilities, -logits[np.arange(len(labels)), labels], logits

    reader = evaluator.ImageReader(self._dataset, self._batch_size, model.image_size)
    result = evaluator.run_pass(reader, predict, 1, self._picture_indices,
                                pictures.MAX_GRID_IMAGES, show_progress=True)
    evaluator.require_images(result, self._dataset)
    return self._report(result, {
        'graph': path, 'global_step': model.description.get('global_step', 0),
        'image_size': model.image_size,
        'uses_averages': model.description.get('averaged_weights')})

  def _check_classes(self, path, class_names):
    for label, names in enumerate(itertools.zip_longest(class_names, self.class_names)):
      if names[0] != names[1]:
        trained, here = ('no class' if name is None else
                         metrics.shorten(name, metrics.MAX_NAME_WIDTH) for name in names)
        raise checkpoints.CheckpointError(
            f'{path} was trained on {len(class_names)} classes and {self._about["dataset_dir"]} '
            f'has {len(self.class_names)}; the first difference is {label}:{trained} there and '
            f'{label}:{here} here')

  def _scale(self, result, about, fit_temperature):
    """Returns the temperature.Scaled of an Evaluation, or None without a temperature.

    Args:
      result: evaluator.Evaluation.
      about: dict that identifies the weights.
      fit_temperature: whether to fit a temperature or to use the stored one.
    """
    if fit_temperature:
      found = {'temperature': temperature.fit(result.labels, result.logits), **self._about}
    else:
      found = checkpoints.read_temperature(
          about['checkpoint'], about['uses_averages'], about['image_size'])
    return found and temperature.scale(result.labels, result.logits, found['temperature'],
                                       found.get('dataset_split_name', 'an unknown split'))

  def _store_temperature(self, about, values):
    """Writes the temperature that was fitted beside its checkpoint.

    Args:
      about: dict that identifies the weights.
      values: dict of the entries of metrics.json.
    """
    before, after = (
        {name: entries[name] for name in ('loss', 'expected_calibration_error')}
        for entries in (values, values['calibrated']))
    text = json.dumps({
        'temperature': values['calibrated']['temperature'], **about, **self._about,
        'num_images': values['num_images'], 'before': before, 'after': after}, indent=2)
    files.write_atomically(checkpoints.temperature_file(about['checkpoint']),
                           (text + '\n').encode())

  def _report(self, result, about, scaled=None):
    """Writes files and events.

    Args:
      result: evaluator.Evaluation.
      about: dict that describes the network; has global_step.
      scaled: temperature.Scaled, or None.

    Returns:
      computed: metrics.Metrics.
      about: dict of all entries of metrics.json.
      files: names of the files.
    """
    if self._writer is None:
      undrawable = pictures.undrawable_names(self.class_names)
      if undrawable:
        print(f'Warning: no installed font can draw {len(undrawable)} class names, like '
              f'{undrawable[0]}; pictures show their numbers. On Debian, apt install '
              'fonts-noto-cjk helps with most', file=sys.stderr)
      os.makedirs(self._log_eval, exist_ok=True)
      self._writer = tf.summary.FileWriter(self._log_eval)
    bad_numbers = sorted(set(range(self._dataset.num_samples)).difference(result.positions))
    _report_bad_records(self._dataset, bad_numbers)
    if undefined := np.isnan(result.probabilities).any(1).sum():
      print(f'Warning: the network outputs NaN for {undefined} of {len(result.labels)} images: the '
            'metrics count their predictions as class 0', file=sys.stderr)
    computed = metrics.compute(result.labels, result.probabilities, result.losses)
    about = {'num_bad_records': len(bad_numbers), **about, **self._about}
    # With bad records, there are fewer images than records.
    indices = [index for index in self._picture_indices if index in result.images]
    values, file_names = write(self._log_eval, self._writer, result, computed, scaled, indices,
                               self.class_names, about)
    return computed, values, file_names
