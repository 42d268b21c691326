"""Evaluation during training: keeps the best checkpoint and stops once nothing improves."""

import itertools
import json
import os
import sys

import tensorflow.compat.v1 as tf
import tqdm

from common import checkpoints
from common import files
from evaluation import metrics
from training import saving

BEST_DIR = 'best'  # in the log folder
EVAL_DIR = 'eval'  # in the log folder, where eval_flowers.py writes too
METRICS_FILE = 'metrics.json'
RECORD_FILE = 'evaluations.json'  # in the log folder
NEXT_SUFFIX = '.next'  # of the metrics whose checkpoint is being saved


class EvaluationHook(tf.train.SessionRunHook):
  """Saves and evaluates at regular intervals.

  The best checkpoint, ranked by accuracy and then by loss, is kept in `best`
  with its metrics.json; pass it to eval_flowers.py and write_pb.py as
  `--checkpoint_path log/best`. The validation curves go to `eval`.

  Attributes:
    stopped_early: why training was stopped, or None.
  """

  def __init__(self, evaluator, global_step, saver, log_dir, config, every_n_steps, max_steps,
               record, patience=None):
    """Initializes the hook.

    Args:
      evaluator: evaluation.Evaluator.
      global_step: int64 [], its value after the step.
      saver: tf.train.Saver of the checkpoints in log_dir.
      log_dir: the run's folder.
      config: ModelConfig, stored beside the best checkpoint.
      every_n_steps: steps between two evaluations.
      max_steps: the last step, which is always evaluated.
      record: the result of `read_record`.
      patience: evaluations without improvement after which training stops, or None.
    """
    self.stopped_early = None
    self._evaluator = evaluator
    self._global_step = global_step
    self._saver = saver
    self._log_dir = log_dir
    self._config = config
    self._every_n_steps = every_n_steps
    self._max_steps = max_steps
    self._patience = patience
    self._best_dir = os.path.join(log_dir, BEST_DIR)
    self._record = dict(record)

  def begin(self):
    self._best_saver = saving.Saver(self._best_dir, max_to_keep=1)
    self._writer = tf.summary.FileWriter(os.path.join(self._log_dir, EVAL_DIR))

  def after_create_session(self, session, coord):
    self._step = int(session.run(tf.train.get_global_step()))  # a step that is skipped repeats it
    if self._step and self._step != self._record['global_step'] and self._is_due(self._step):
      self._evaluate_and_keep(session)  # which a kill has prevented
      if self.stopped_early:
        coord.request_stop()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._global_step)

  def after_run(self, run_context, run_values):
    step = int(run_values.results)
    if step == self._step or not self._is_due(step):
      return
    self._step = step
    self._evaluate_and_keep(run_context.session)
    if self.stopped_early:
      run_context.request_stop()

  def end(self, session):
    self._writer.close()
    self._evaluator.close()

  def _is_due(self, step):
    return step % self._every_n_steps == 0 or step >= self._max_steps

  def _evaluate_and_keep(self, session):
    """Saves and evaluates this step, keeps it if it is the best, and decides whether to stop."""
    step = self._step
    checkpoint = self._saver.save(
        session, os.path.join(self._log_dir, saving.CHECKPOINT_NAME), step,
        write_meta_graph=False)
    found = self._evaluate(checkpoint, step)
    best = self._record['best']
    if best is None or _rank(found) > _rank(best):
      self._keep(session, found)
      best = found
    # After a kill, the step may be the best already.
    num_without = (0 if best['global_step'] == step else
                   self._record['num_without_improvement'] + 1)
    record = {'global_step': step, 'num_without_improvement': num_without}
    files.write_atomically(os.path.join(self._log_dir, RECORD_FILE),
                           (json.dumps(record) + '\n').encode())
    self._record = {**record, 'best': best}
    tqdm.tqdm.write(
        f'validation at step {step}: accuracy = {found["accuracy"]:.4f}, '
        f'loss = {_loss(found):.4f}{" (averages)" if found["uses_averages"] else ""}; '
        f'best: {best["accuracy"]:.4f} at step {best["global_step"]}')
    if self._patience and num_without >= self._patience and step < self._max_steps:
      self.stopped_early = (
          f'Stopped early: no better accuracy than {best["accuracy"]:.4f} of step '
          f'{best["global_step"]} in {num_without} evaluations')

  def _evaluate(self, checkpoint, step):
    """Evaluates a checkpoint and adds its metrics to TensorBoard; returns them."""
    evaluation = self._evaluator(checkpoint)
    computed = metrics.compute(evaluation.labels, evaluation.probabilities, evaluation.losses)
    self._writer.add_summary(tf.Summary(value=[
        # Training's tags, so that both curves share a chart.
        tf.Summary.Value(tag='accuracy', simple_value=computed.accuracy),
        tf.Summary.Value(tag='losses/cross_entropy', simple_value=computed.loss),
    ]), step)
    self._writer.flush()
    return {**metrics.to_dict(computed, self._config.class_names), 'global_step': step,
            'uses_averages': evaluation.uses_averages, 'image_size': self._config.image_size,
            'checkpoint_sha256': checkpoints.sha256(checkpoint)}

  def _keep(self, session, found):
    if self._record['best'] is None and os.path.isdir(self._best_dir):
      os.rename(self._best_dir, next(
          path for path in (f'{self._best_dir}.old{i or ""}' for i in itertools.count())
          if not os.path.exists(path)))
    os.makedirs(self._best_dir, exist_ok=True)
    checkpoints.save_config(self._config, self._best_dir)
    # The metrics replace the old ones together with the checkpoint: `read_best` completes
    # or discards what a kill in between leaves.
    metrics_file = os.path.join(self._best_dir, METRICS_FILE)
    files.write_atomically(metrics_file + NEXT_SUFFIX,
                           (json.dumps(found, indent=2) + '\n').encode())
    self._best_saver.save(session, os.path.join(self._best_dir, saving.CHECKPOINT_NAME),
                          found['global_step'], write_meta_graph=False)
    os.replace(metrics_file + NEXT_SUFFIX, metrics_file)


def read_record(log_dir, config, start_step):
  """Reads what a run's evaluations have found so far.

  Args:
    log_dir, config, start_step: see `read_best`.

  Returns:
    A dict for JSON: `best`, the result of `read_best`; `global_step`, the step that was
    evaluated last, or 0; `num_without_improvement`, the number of evaluations since the best.

  Raises:
    OSError: the folder of the results cannot be written.
  """
  files.require_writable(os.path.join(log_dir, EVAL_DIR))
  record = {'global_step': 0, 'num_without_improvement': 0}
  try:
    with open(os.path.join(log_dir, RECORD_FILE), encoding='utf-8') as f:
      found = {name: int(value) for name, value in json.load(f).items() if name in record}
    if found.keys() == record.keys() and found['global_step'] <= start_step:
      record = found
  except (OSError, ValueError, TypeError, AttributeError):
    pass  # no evaluation yet, or edited
  return {**record, 'best': read_best(log_dir, config, start_step)}


def read_best(log_dir, config, start_step):
  """Reads the metrics of a run's best checkpoint.

  A `best` that is damaged or belongs to another run is ignored; the hook renames it
  before it saves its own.

  Args:
    log_dir: the run's folder.
    config: the run's ModelConfig.
    start_step: the step that training starts from.

  Returns:
    Its global_step, accuracy and loss, or None without one.
  """
  best_dir = os.path.join(log_dir, BEST_DIR)
  if not os.path.isdir(best_dir):
    return None
  try:
    return _read_metrics(best_dir, config, start_step)
  except (OSError, ValueError, KeyError, TypeError, checkpoints.CheckpointError) as error:
    print(f'Warning: {best_dir} is ignored and will be renamed: {error}', file=sys.stderr)
    return None


def _read_metrics(best_dir, config, start_step):
  """Returns the metrics in `best`, or raises a CheckpointError if they do not count."""
  metrics_file = os.path.join(best_dir, METRICS_FILE)
  for path in (metrics_file + NEXT_SUFFIX, metrics_file):
    if not os.path.exists(path):
      continue
    with open(path, encoding='utf-8') as f:
      found = json.load(f)
    best = {name: found[name] for name in ('global_step', 'accuracy', 'loss')}
    checkpoint = os.path.join(best_dir, f'{saving.CHECKPOINT_NAME}-{best["global_step"]}')
    if checkpoint == checkpoints.find(best_dir):
      os.replace(path, metrics_file)
      break
  else:
    raise checkpoints.CheckpointError('its newest checkpoint has no metrics')
  if best['global_step'] > start_step:
    raise checkpoints.CheckpointError(
        f'it is of step {best["global_step"]}, and training starts from step {start_step}')
  if checkpoints.load_config(checkpoint) != config:
    raise checkpoints.CheckpointError('it belongs to another run')
  return best


def _rank(found):
  return found['accuracy'], -_loss(found)


def _loss(found):
  return float('inf') if found['loss'] is None else found['loss']
