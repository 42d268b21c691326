"""Checks training on this machine's GPUs and measures its speed: a report to paste into an issue.

  python -m benchmarks.gpu_report          (make test-gpu)

Takes about ten minutes. Without a GPU it says so and runs nothing.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf

from benchmarks import network
from common import files
from deployment import towers

NUM_STEPS = 3
TOLERANCE = 1e-3  # largest relative difference of the losses of NUM_STEPS steps
MIN_ACCURACY = 0.5  # on the shipped flowers, five classes
# At least so many operations whose types contain these names, which fusing may extend.
KERNELS = {'Conv2D': 41, 'DepthwiseConv2dNative': 34, 'FusedBatchNorm': 40}


class CheckError(Exception):
  """A check failed; the message says what was found."""


def take_steps(devices, batch_size, image_size, depth_multiplier, initial=None,
               variable_update=None):
  """Trains with frozen batch norm: devices and numbers of towers change the rounding only.

  Args:
    devices: device of each tower.
    batch_size, image_size, depth_multiplier: see `network.measure_training`.
    initial: {variable name: value} that training starts with; None draws it.
    variable_update: see `towers.mirrors_variables`.

  Returns:
    The losses of NUM_STEPS steps; the initial values; the largest difference between a variable
    of the first tower and its copy on another.
  """
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    step = network.build_training_step(
        batch_size, image_size, depth_multiplier, devices, 'float32', real_images=False,
        frozen=True, variable_update=variable_update)
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    prefix = re.compile(towers.tower_scope(r'\d+/'))
    copies = [(variable, variables[prefix.sub('', variable.op.name)])
              for variable in tf.local_variables()]
    init_ops = tf.global_variables_initializer(), tf.train.Scaffold.default_local_init_op()
    with tf.Session(config=towers.session_config(devices)) as session:
      session.run(init_ops[0], {variables[name].initializer.inputs[1]: value
                                for name, value in (initial or {}).items()})
      initial = session.run(variables)
      session.run(init_ops[1])
      losses = [session.run([step.loss, step.train_op])[0] for _ in range(NUM_STEPS)]
      difference = max((np.abs(np.subtract(*pair)).max() for pair in session.run(copies)),
                       default=0.0)
  return losses, initial, difference


def compare_losses(losses, expected):
  """Returns the largest relative difference of two lists of losses.

  Raises:
    CheckError: it is greater than TOLERANCE or not a number.
  """
  difference = np.max(np.abs(np.subtract(losses, expected)) / np.abs(expected))
  if not difference <= TOLERANCE:
    raise CheckError(f'losses {losses} and {expected} differ by {difference:.1e}, more than '
                     f'{TOLERANCE}')
  return f'losses of {NUM_STEPS} steps differ by {difference:.1e}'


def check_kernels(devices, **sizes):
  """Checks that convolutions and batch norms run on the first tower's device."""
  with tf.Graph().as_default():
    step = network.build_training_step(devices=devices[:1], precision='float32',
                                       real_images=False, **sizes)
    metadata = tf.RunMetadata()
    with tf.Session(config=towers.session_config(devices[:1])) as session:
      towers.initialize(session)
      session.run(step.train_op, options=tf.RunOptions(output_partition_graphs=True),
                  run_metadata=metadata)
  kind = devices[0].strip('/').upper()
  nodes = [node for graph in metadata.partition_graphs for node in graph.node
           if node.device.endswith(kind)]
  formats = sorted({node.attr['data_format'].s.decode() for node in nodes if 'Conv2D' in node.op})
  for name, number in KERNELS.items():
    found = sum(name in node.op for node in nodes)
    if towers.on_gpus(devices) and found < number:
      raise CheckError(f'{found} of {number} {name} run on {kind}')
  return f'{len(nodes)} operations on {kind}, convolutions in {" and ".join(formats)}'


def check_one_tower(devices, **sizes):
  """Compares one tower on a GPU with one on the CPU, without TF32."""
  expected, initial, _ = take_steps(['/cpu:0'], **sizes)
  losses, *_ = take_steps(devices[:1], initial=initial, **sizes)
  return compare_losses(losses, expected)


def check_towers(devices, **sizes):
  """Compares all towers, with both ways of updating variables, with one tower."""
  expected, initial, _ = take_steps(devices[:1], **sizes)
  details = []
  for variable_update in towers.VARIABLE_UPDATES:
    losses, _, difference = take_steps(devices, initial=initial, variable_update=variable_update,
                                       **sizes)
    details.append(f'{variable_update}: {compare_losses(losses, expected)}')
    if difference:
      raise CheckError(f'the copies of the variables differ by {difference:.1e}')
  return '; '.join(details)


def run_script(*args):
  """Runs a script of the project; returns what it prints.

  Raises:
    CheckError: its exit code is not 0.
  """
  process = subprocess.run([sys.executable, *args], cwd=files.PROJECT_DIR, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  if process.returncode:
    raise CheckError(f'{" ".join(args)} ended with {process.returncode}: '
                     f'{process.stdout.strip()[-1000:]}')
  return process.stdout


def check_scripts(devices, precision, num_epochs, image_size, depth_multiplier, min_accuracy):
  """Trains on the shipped flowers in two runs, evaluates and freezes."""
  on_cpu = [] if towers.on_gpus(devices) else ['--clone_on_cpu']
  with tempfile.TemporaryDirectory() as folder:
    log_dir = os.path.join(folder, 'log')
    train = ['train_flowers.py', '--dataset_dir', 'dataset', '--log_dir', log_dir,
             '--precision', precision, '--image_size', str(image_size), '--depth_multiplier',
             str(depth_multiplier), '--batch_size', str(16 * len(devices)), '--num_clones',
             str(len(devices)), '--num_epochs', str(num_epochs), *on_cpu]
    run_script(*train, '--max_number_of_steps', '5')
    if 'Steps 5 to' not in run_script(*train):
      raise CheckError('training did not resume at step 5')
    evaluated = run_script('eval_flowers.py', '--dataset_dir', 'dataset', '--log_dir', log_dir,
                           '--log_eval', os.path.join(folder, 'eval'), *on_cpu)
    accuracy = float(re.search(r'^Accuracy: ([\d.]+)', evaluated, re.MULTILINE).group(1))
    if accuracy < min_accuracy:
      raise CheckError(f'the accuracy is {accuracy} after {num_epochs} epochs')
    run_script('write_pb.py', '--log_dir', log_dir, '--output_file',
               os.path.join(folder, 'model.pb'), '--dataset_dir', 'dataset')
  return (f'{precision}: resumed at step 5, accuracy {accuracy} after {num_epochs:g} epochs, '
          'frozen and compared')


def measure(devices, batch_size, *options):
  """Returns images per second and the fraction of the device's limit, as text."""
  figures = json.loads(run_script(
      'benchmark.py', '--json', '--batch_size', str(batch_size), '--num_clones',
      str(len(devices)), *options).strip().splitlines()[-1])
  return (f'{figures["images_per_second"]:.1f} images/s, {figures["fraction_of_limit"]:.1%} of '
          f'{figures["limit_gflops_per_second"] / 1000:.1f} TFLOP/s')


def gpu_checks(devices):
  """Returns {name: function} of everything that is checked and measured on GPUs."""
  sizes = {'batch_size': 8 * len(devices), 'image_size': 96, 'depth_multiplier': 0.5}
  checks = {
      'kernels': functools.partial(check_kernels, devices, **sizes),
      'GPU against CPU': functools.partial(check_one_tower, devices, **sizes),
      'train, resume, evaluate, freeze': functools.partial(
          check_scripts, devices[:2], 'float16', 20, 128, 0.5, MIN_ACCURACY),
      'float32, one tower': functools.partial(measure, devices[:1], 32),
      'float16, one tower': functools.partial(measure, devices[:1], 64, '--precision', 'float16'),
      'float16 with XLA, one tower': functools.partial(
          measure, devices[:1], 64, '--precision', 'float16', '--xla'),
  }
  if len(devices) > 1:
    checks['towers'] = functools.partial(check_towers, devices, **sizes)
    for variable_update in towers.VARIABLE_UPDATES:
      checks[f'float16, {len(devices)} towers, {variable_update}'] = functools.partial(
          measure, devices, 64 * len(devices), '--precision', 'float16', '--variable_update',
          variable_update)
  return checks


def describe_machine():
  """Returns a line about TensorFlow and the GPUs."""
  build = tf.sysconfig.get_build_info()
  gpus = [tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)
          for gpu in tf.config.list_physical_devices('GPU')]
  return (f'TensorFlow {tf.__version__}, CUDA {build.get("cuda_version")}, '
          f'cuDNN {build.get("cudnn_version")}; {", ".join(gpus)}')


def run_checks(checks):
  """Runs functions and prints a line about each; returns the number of failures."""
  failures = 0
  for name, check in checks.items():
    start = time.perf_counter()
    try:
      result = f'ok      {name}: {check()}'
    except (CheckError, tf.errors.OpError, towers.DeviceError) as error:
      failures += 1
      result = f'FAILED  {name}: {type(error).__name__}: {error}'
    print(f'{result} ({time.perf_counter() - start:.0f} s)', flush=True)
  return failures


def main():
  if not tf.config.list_physical_devices('GPU'):
    print('TensorFlow finds no GPU: 0 tests run')
    return 0
  print(describe_machine(), flush=True)
  # The checks compare with the CPU; the speeds are measured in processes of their own, with TF32.
  tf.config.experimental.enable_tensor_float_32_execution(False)
  checks = gpu_checks(towers.tower_devices())
  failures = run_checks(checks)
  print(f'{len(checks)} tests run, {failures} failed')
  return 1 if failures else 0


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  sys.exit(main())
