"""Evaluates Xception on every image of a split, exactly once.

  python eval_flowers.py --dataset_dir dataset --log_dir log --log_eval log_eval

Writes into --log_eval: metrics.json, predictions.csv (the label, prediction and
probabilities of every image), confusion_matrix.png, mistakes.png (the most
confident ones), predictions.png (images from the whole split), roc.png and
precision_recall.png (each class against all others), calibration.png (accuracy
by confidence) and TensorBoard events at the checkpoint's step. The last line is
`Accuracy: 0.xxxx (nn of NN)`.

  python eval_flowers.py --dataset_dir dataset --log_dir log --watch --eval_on_cpu

evaluates every checkpoint of a training run while it is still running, and

  python eval_flowers.py --dataset_dir dataset --graph frozen_model_xception.tflite

evaluates a frozen model, which shows the cost of freezing or quantization.

  python eval_flowers.py --dataset_dir dataset --log_dir log --fit_temperature

also calibrates the probabilities: it writes temperature.json beside the
checkpoint, for write_pb.py --temperature.
"""

import argparse
import os
import sys
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf

from common import arguments
from common import checkpoints
from common import errors
from deployment import towers
from evaluation import grad_cam
from evaluation import metrics
from evaluation import report
from evaluation import temperature
from export import models
from records import flowers

WATCH_INTERVAL_SECS = 2  # between two searches for a new checkpoint


def new_checkpoints(log_dir, timeout):
  """Yields the checkpoints of a folder, oldest first, and waits for new ones.

  Args:
    log_dir: folder of a training run, which may not exist yet.
    timeout: seconds without a new checkpoint after which to stop waiting.

  Yields:
    Paths. Training keeps only its newest checkpoints, so a path may no longer
    exist when it is read.
  """
  seen = set()  # (path, time of the index): a new training run may reuse the names
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    unseen = [found for found in map(written_at, checkpoints.list_checkpoints(log_dir))
              if found not in seen]
    if unseen:
      seen.add(unseen[0])
      yield unseen[0][0]
      deadline = time.monotonic() + timeout
    else:
      time.sleep(min(WATCH_INTERVAL_SECS, timeout))


def written_at(checkpoint):
  """Returns a checkpoint's path and the time at which it was written, None if it is gone."""
  try:
    return checkpoint, os.path.getmtime(f'{checkpoint}.index')
  except FileNotFoundError:
    return checkpoint, None


def watch(evaluate, log_dir, timeout, last_step):
  """Evaluates every checkpoint of a training run as it is written.

  Args:
    evaluate: function from `report.SplitEvaluation.of_checkpoints`.
    log_dir: folder of a training run, which may not exist yet.
    timeout: seconds without a new checkpoint after which to stop.
    last_step: step after which to stop, or None.

  Raises:
    checkpoints.CheckpointError: there was none, or one cannot be evaluated.
  """
  print(f'Watching {log_dir} until there is no new checkpoint for {timeout:g} seconds',
        flush=True)
  num_evaluated = 0
  for checkpoint in new_checkpoints(log_dir, timeout):
    try:
      computed, about, _ = evaluate(checkpoint)
    except checkpoints.CheckpointError:
      if tf.train.checkpoint_exists(checkpoint):
        raise
      print(f'{checkpoint} was deleted before it was evaluated', flush=True)
      continue
    num_evaluated += 1
    step = about['global_step']
    print(f'Step {step}: loss = {computed.loss:.4f}, accuracy = {computed.accuracy:.4f} '
          f'({computed.num_correct} of {computed.num_images}), weights: '
          f'{describe_weights(about["uses_averages"])}', flush=True)
    if last_step and step >= last_step:
      print(f'Evaluated {num_evaluated} checkpoints, the last one at step {step}')
      return
  if not num_evaluated:
    raise checkpoints.CheckpointError(
        f'No checkpoint in {log_dir} after {timeout:g} seconds: is train_flowers.py running?')
  print(f'Evaluated {num_evaluated} checkpoints; no new one for {timeout:g} seconds')


def print_report(computed, about):
  """Prints the last lines of an evaluation."""
  low, high = computed.accuracy_interval
  top_5 = (f'omitted, it is always 1 with {len(computed.confusion_matrix)} classes'
           if computed.top_5_accuracy is None else f'{computed.top_5_accuracy:.4f}')
  print(f'Weights: {describe_weights(about["uses_averages"])}')
  print(f'Loss: {computed.loss:.4f}')
  if scaled := about['calibrated']:
    print(f'Temperature: {scaled["temperature"]:.4f}, fitted on the {scaled["fitted_on"]} split, '
          f'in {checkpoints.temperature_file(about["checkpoint"])}')
    print(f'At this temperature: loss {scaled["loss"]:.4f}, expected calibration error '
          f'{scaled["expected_calibration_error"]:.4f} instead of '
          f'{about["expected_calibration_error"]:.4f}')
  print(f'Top-5 accuracy: {top_5}')
  print(f'95 % confidence interval of the accuracy: {low:.4f} to {high:.4f}')
  print(f'Accuracy: {computed.accuracy:.4f} ({computed.num_correct} of {computed.num_images})')


def describe_weights(uses_averages):
  return {True: 'Polyak averages', False: 'as trained, not averaged',
          None: 'as frozen'}[uses_averages]


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0],
      formatter_class=arguments.HelpFormatter)
  group = parser.add_argument_group('data')
  arguments.add_dataset_options(group)
  group.add_argument('--dataset_split_name', default='validation', choices=flowers.SPLITS,
                     help='split to evaluate')
  group.add_argument('--log_eval', '--eval_dir', type=arguments.path,
                     help='folder of the results (default: eval in --log_dir, or MODEL.eval '
                     'with --graph MODEL)')
  group = parser.add_argument_group('weights')
  group.add_argument('--log_dir', '--train_dir', type=arguments.path, default='./log',
                     help='folder of the training run')
  one_of = group.add_mutually_exclusive_group()
  one_of.add_argument('--checkpoint_path', type=arguments.path,
                      help='evaluates this checkpoint, or the newest of this folder '
                      '(default: the newest of --log_dir)')
  one_of.add_argument('--watch', action='store_true',
                      help='evaluates every checkpoint of --log_dir while training writes them')
  one_of.add_argument('--graph', type=arguments.path, metavar='MODEL',
                      help='evaluates a frozen model of write_pb.py: .pb, SavedModel folder, '
                      '.tflite or .onnx')
  group.add_argument('--watch_timeout', type=arguments.positive_float, default=1800,
                     help='seconds without a new checkpoint after which --watch stops')
  group.add_argument('--max_number_of_steps', type=arguments.positive_int,
                     help='step of the last checkpoint that --watch waits for')
  group.add_argument('--use_averages', choices=['auto', 'yes', 'no'], default='auto',
                     help='whether to use the Polyak averages of the weights; auto: if the '
                     'checkpoint has them')
  group.add_argument('--image_size', '--eval_image_size', type=arguments.image_size,
                     help='height and width of the images in pixels; the network takes any size '
                     '(default: the size it was trained with)')
  group.add_argument('--fit_temperature', action='store_true',
                     help='fits the number that the logits are divided by so that the loss on the '
                     'evaluated split is smallest, and writes it into '
                     f'{checkpoints.TEMPERATURE_FILE} beside the checkpoint')
  group = parser.add_argument_group('pictures')
  group.add_argument('--explain', action='store_true',
                     help='shows beside each image of mistakes.png and predictions.png which parts '
                     'of it speak for the predicted class (Grad-CAM)')
  group.add_argument('--explain_layer', metavar='LAYER',
                     help='layer whose output --explain weighs, such as block4_dws_conv1; earlier '
                     'layers are finer but tell less about the class '
                     f'(default: {grad_cam.DEFAULT_LAYER})')
  group = parser.add_argument_group('devices')
  group.add_argument('--batch_size', type=arguments.positive_int, default=32,
                     help='images per device and step; does not change the result')
  group.add_argument('--num_clones', type=arguments.positive_int,
                     help='devices that share the work; does not change the result '
                     '(default: every GPU, or the CPU)')
  group.add_argument('--eval_on_cpu', '--clone_on_cpu', action='store_true',
                     help='leaves the GPUs to training')
  args = parser.parse_args(argv)
  refuse_combinations(parser, args)
  return args


def refuse_combinations(parser, args):
  """Ends the script if options exclude each other, or need one that is missing."""
  if args.graph and (args.num_clones or args.eval_on_cpu or args.image_size
                     or args.use_averages != 'auto'):
    parser.error('--graph has frozen weights and a fixed image size, and its runtime chooses the '
                 'devices: leave out --use_averages, --image_size, --num_clones and --eval_on_cpu')
  if args.fit_temperature and (args.graph or args.watch):
    parser.error('--fit_temperature divides the logits of one checkpoint: '
                 + ('a frozen model has only probabilities. Fit the checkpoint that it came from, '
                    'and freeze that again with write_pb.py --temperature' if args.graph else
                    'leave out --watch, and fit the one that you keep'))
  if args.graph and args.explain:
    parser.error('--explain needs gradients, which a frozen model does not compute: instead of '
                 '--graph, give the --log_dir or --checkpoint_path that it was frozen from')
  if args.explain_layer and not args.explain:
    parser.error('--explain_layer needs --explain')


def default_log_eval(args):
  """Returns the folder of the results: eval in --log_dir, or MODEL.eval beside the model."""
  if not args.graph:
    return os.path.join(args.log_dir, 'eval')
  path = args.graph.rstrip('/')
  if os.path.basename(path) == models.SAVED_MODEL_FILE:
    path = os.path.dirname(path)
  if os.path.basename(path) in ('', '.', '..'):
    path = os.path.abspath(path)
  return f'{path}.eval'


def main(args):
  # Cheap checks come first.
  checkpoint = (None if args.watch or args.graph else
                checkpoints.find(args.log_dir, args.checkpoint_path))
  devices = None if args.graph else towers.tower_devices(args.num_clones, args.eval_on_cpu)
  dataset_options = arguments.dataset_options(args)
  dataset = flowers.get_split(args.dataset_split_name, **dataset_options)
  flowers.require_readable(dataset)
  log_eval = args.log_eval or default_log_eval(args)
  if report.holds_metrics_of_training(log_eval):
    raise checkpoints.CheckpointError(
        f'The metrics.json of --log_eval {log_eval} is that of training, which looks for its best '
        'checkpoint there: choose another folder')
  split = report.SplitEvaluation(
      dataset, log_eval, args.batch_size,
      {'dataset_split_name': args.dataset_split_name, **dataset_options})
  explain_layer = (args.explain_layer or grad_cam.DEFAULT_LAYER) if args.explain else None
  images = f'{dataset.num_samples} images of the {args.dataset_split_name} split'
  if args.watch:
    watch(split.of_checkpoints(devices, args.use_averages, args.image_size, explain_layer),
          args.log_dir, args.watch_timeout, args.max_number_of_steps)
    return
  if args.graph:
    print(f'Evaluating {args.graph} on {images}', flush=True)
    model = models.load(args.graph)
    if model.image_size is None:
      raise models.ModelError(f'{args.graph} decodes its images itself; evaluation needs a model '
                              'that takes pixels, such as the .pb of --formats pb')
    computed, about, files = split.of_frozen_model(args.graph, model)
  else:
    choice = 'as named' if checkpoint == args.checkpoint_path else (
        f'the newest of {args.checkpoint_path or args.log_dir}')
    print(f'Evaluating {checkpoint}, {choice}, on {images}, on {", ".join(devices)}', flush=True)
    evaluate = split.of_checkpoints(devices, args.use_averages, args.image_size, explain_layer,
                                    args.fit_temperature)
    computed, about, files = evaluate(checkpoint)
  print(metrics.format_table(computed, split.class_names))
  print(f'Wrote {", ".join(files)} and events to {log_eval}')
  print_report(computed, about)


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  arguments.escape_unprintable_output()
  try:
    main(parse_args())
  except (flowers.DatasetError, checkpoints.CheckpointError, towers.DeviceError,
          grad_cam.LayerError, models.ModelError, temperature.TemperatureError,
          OSError) as error:
    sys.exit(f'eval_flowers.py: {error}')
  except tf.errors.ResourceExhaustedError as error:
    sys.exit(f'eval_flowers.py: out of memory ({errors.reason(error)}): use a smaller --batch_size')
  except KeyboardInterrupt:
    sys.exit('eval_flowers.py: interrupted')
